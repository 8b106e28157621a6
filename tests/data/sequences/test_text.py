"""Texts as numbers of tokens: what is checked, and that what is no token is padding."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from fimp_sc._errors import MissingKeyError
from fimp_sc.data import SequenceReader, SequenceShape
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.sequences._tokenizers import token_shape

IDS = np.array([[2, 5, 9, 3], [2, 3, -1, -1], [2, 7, 3, -1]], dtype=np.int32)
KIND = sequence_kind("text")


def make(ids=IDS, **info):
    adata = ad.AnnData(obs=pd.DataFrame(index=["a", "b", "c"]))
    adata.obsm["token_ids"] = ids
    adata.uns["fimp_modality"] = {"kind": "text", "n_words": 10, "vocabulary": 77, **info}
    return adata


def test_size_and_tokens() -> None:
    adata = make()
    assert KIND.size(adata) == [4, 10, 77]
    assert token_shape("text", [4, 10, 77], KIND.default_token_size([4, 10, 77])) == SequenceShape(4, 1)
    assert KIND.fits([9, 10, 77], [4, 10, 77]) is None
    for other in ([4, 11, 77], [4, 10, 78]):
        assert "another vocabulary" in KIND.fits(other, [4, 10, 77])
    with pytest.raises(ValueError, match="token_size must be 1"):
        KIND.tokens([4, 10, 77], 2)


def test_numbers_come_back() -> None:
    found = KIND.read(make(), np.array([2, 0]), 1)
    assert found.shape == (2, 4, 1)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(KIND.restore(found, [4, 10, 77], 1), IDS[[2, 0]])


def test_large_numbers_stay_exact() -> None:
    """Vocabularies of any encoder have fewer words than float32 counts exactly."""
    ids = np.array([[(1 << 24) - 1, 1]] * 3, dtype=np.int32)
    np.testing.assert_array_equal(KIND.read(make(ids), np.arange(3), 1)[..., 0], ids)


def test_what_is_no_token_is_padding_and_nothing_is_scaled() -> None:
    def source(**how):
        return SequenceReader(lambda nodes: IDS[nodes, :, None].astype(np.float32), SequenceShape(4, 1), 3, **how)

    fields = source(words=True).fields(np.array([1, 2, 0]), 2)
    np.testing.assert_array_equal(fields["padding"], IDS[[1, 2, 0]] < 0)
    np.testing.assert_array_equal(fields["value"][..., 0], np.maximum(IDS[[1, 2, 0]], 0))
    hidden = source(words=True).fields(np.arange(3), 3, (0.9, 0.9), seed=1)["masked"].numpy()
    assert hidden.any()
    assert not hidden[IDS < 0].any()
    np.testing.assert_array_equal(source().fields(np.arange(3), 3)["value"][..., 0], IDS)


def damaged(**changes):
    ids = IDS.copy()
    for row, values in changes.items():
        ids["abc".index(row)] = values
    return make(ids)


@pytest.mark.parametrize(
    ("adata", "error", "message"),
    [
        (damaged(a=[2, 10, 3, -1]), ValueError, "between -1 .* and 9, .* found -1 to 10"),
        (damaged(a=[2, -2, 3, -1]), ValueError, "found -2 to 7"),
        (damaged(b=[-1, -1, -1, -1]), ValueError, "has no token for 'b'"),
        (damaged(c=[2, -1, 3, -1]), ValueError, "tokens after a -1"),
        (make(IDS.astype(float)), TypeError, "whole numbers, found float64"),
        (make(np.zeros((3, 0), int)), ValueError, r"shape \(n_obs, n_tokens\), found \(3, 0\)"),
    ],
)
def test_unusable_tokens_are_refused(adata, error, message: str) -> None:
    with pytest.raises(error, match=message):
        KIND.size(adata)


@pytest.mark.parametrize("key", ["n_words", "vocabulary"])
def test_what_is_missing_is_named(key: str) -> None:
    adata = make()
    del adata.uns["fimp_modality"][key]
    with pytest.raises(MissingKeyError, match=rf"{key}.*fimp_sc\.pp\.text"):
        KIND.size(adata)
    adata = make()
    del adata.obsm["token_ids"]
    with pytest.raises(MissingKeyError, match=r"token_ids.*fimp_sc\.pp\.text"):
        KIND.size(adata)
