"""How values of signals and images become tokens: sizes, what is left out, and that the right rows are read."""

from __future__ import annotations

import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from mudata import MuData
from PIL import Image
from scipy import sparse

import fimp_sc
from fimp_sc.data import SequenceShape, SequenceStatistics
from fimp_sc.data._modality import describe_modality, quiet_mudata
from fimp_sc.data._study import resolve
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.sequences._tokenizers import sequence_reader, token_shape

N_REGIONS, N_TIMES = 8, 23
RING = np.roll(np.eye(8), 1, axis=1)


def toy_signals(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 5, (N_REGIONS, N_TIMES)).astype(np.float32)


def toy_images(n=8, shape=(7, 9, 3), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(np.uint8)


def source_of(part, n_obs: int, token_size: int, **kwargs):
    kind = part.kind
    size = sequence_kind(kind).size(part.adata)
    return sequence_reader(part, n_obs, token_shape(kind, size, token_size), token_size, **kwargs)


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("signal", [200], 20),
        ("signal", [50], 12),
        ("signal", [3], 1),
        ("patch", [224, 224, 3], 16),  # as in ViT
        ("patch", [28, 28, 1], 7),
        ("patch", [64, 20, 3], 5),
        ("patch", [3, 100, 3], 1),
    ],
)
def test_default_sizes_can_be_used(kind: str, size: list[int], expected: int) -> None:
    found = sequence_kind(kind).default_token_size(size)
    assert found == expected
    assert token_shape(kind, size, found).n_tokens > 0


@pytest.mark.parametrize(
    ("kind", "size", "token_size", "expected"),
    [
        ("signal", [200], 20, (10, 20)),
        ("signal", [47], 5, (9, 5)),
        ("signal", [5], 5, (1, 5)),
        ("patch", [224, 224, 3], 16, (196, 768)),  # as in ViT
        ("patch", [7, 9, 1], 3, (6, 9)),
        ("patch", [7, 9, 2], 7, (1, 98)),
    ],
)
def test_shapes(kind, size, token_size, expected) -> None:
    assert token_shape(kind, size, token_size, 2) == SequenceShape(*expected, 2, aligned=kind == "patch")


@pytest.mark.parametrize("token_size", [0, -1, 8])
def test_sizes_that_cannot_be(token_size: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and 7, the time points of the signals: found {token_size}"):
        token_shape("signal", [7], token_size)
    with pytest.raises(ValueError, match=rf"between 1 and 7, the pixels of the shorter side.*: found {token_size}"):
        token_shape("patch", [9, 7, 3], token_size)


@pytest.mark.parametrize(
    ("kind", "size", "token_size", "expected"),
    [
        ("signal", [40], 20, None),
        ("signal", [1047], 20, "the last 7 of 1,047 time points, which do not fill a segment of 20"),
        ("patch", [6, 9, 3], 3, None),
        (
            "patch", [7, 11, 3], 3,
            "the 1 lowest rows and the 2 rightmost columns of images of 7 × 11 pixels",
        ),
        ("patch", [6, 10, 3], 3, "the 1 rightmost columns of images of 6 × 10 pixels"),
        ("patch", [8, 9, 3], 3, "the 2 lowest rows of images of 8 × 9 pixels"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_said(kind, size, token_size, expected) -> None:
    if kind == "patch" and expected:
        expected += ", which do not fill patches of 3 × 3"
    assert sequence_kind(kind).left_over(size, token_size) == expected


# Reading --------------------------------------------------------------------------------------------------------------


def test_signals_of_regions() -> None:
    mdata = fimp_sc.pp.fmri(toy_signals(), connectivity=RING)
    (part,) = resolve(mdata).modalities
    source = source_of(part, N_REGIONS, 5)
    nodes = np.array([6, 0, 0, 3])
    tokens = source.tokens(nodes)
    np.testing.assert_array_equal(tokens, toy_signals()[nodes, :20].reshape(4, 4, 5))
    assert tokens.dtype == np.float32
    made = source.fields(nodes, 2)
    flat = made["value"].reshape(4, -1)
    np.testing.assert_allclose(flat.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(flat.std(1, correction=0), 1, rtol=1e-5)
    back = sequence_kind("signal").restore(tokens, [N_TIMES], 5)
    np.testing.assert_array_equal(back[:, :20], toy_signals()[nodes, :20])
    assert back.shape == (4, N_TIMES)
    assert np.isnan(back[:, 20:]).all()


def test_what_is_known_reaches_the_source() -> None:
    mdata = fimp_sc.pp.fmri(toy_signals(), connectivity=RING)
    (part,) = resolve(mdata).modalities
    hidden = np.random.default_rng(0).random((N_REGIONS, 4)) < 0.4
    places = np.random.default_rng(1).random((N_REGIONS, 3))
    known = SequenceStatistics(0.0, 1.0, np.full(3, 2, np.float32), np.full(3, 4, np.float32))
    shape = token_shape("signal", [N_TIMES], 5, 3)
    source = sequence_reader(part, N_REGIONS, shape, 5, coordinates=places, statistics=known, hidden=hidden)
    made = source.fields(np.arange(N_REGIONS), 3)
    np.testing.assert_array_equal(made["masked"], hidden)
    np.testing.assert_allclose(made["coordinates"], (places - 2) / 4, rtol=1e-5)


@pytest.mark.parametrize("stored", ["pixels", "files"])
def test_images_from_memory_and_from_files(stored: str, tmp_path) -> None:
    pixels = toy_images()
    images = pixels
    if stored == "files":
        images = [tmp_path / f"{i}.png" for i in range(8)]
        for path, image in zip(images, pixels, strict=True):
            Image.fromarray(image).save(path)
    mdata = fimp_sc.pp.images(images, adjacency=RING, lazy=stored == "files")
    (part,) = resolve(mdata, "image").modalities
    assert describe_modality(mdata)["stored"] == stored
    known = SequenceStatistics(100.0, 50.0, np.zeros(0, np.float32), np.ones(0, np.float32))
    source = source_of(part, 8, 3, statistics=known)
    nodes = np.array([5, 1, 5])
    tokens = source.tokens(nodes)
    assert tokens.shape == (3, 2 * 3, 27)
    np.testing.assert_array_equal(tokens[:, 4].reshape(3, 3, 3, 3), pixels[nodes, 3:6, 3:6])
    np.testing.assert_allclose(source.fields(nodes, 3)["value"], (tokens - 100) / 50, rtol=1e-6)
    back = sequence_kind("patch").restore(tokens, [7, 9, 3], 3)
    np.testing.assert_array_equal(back[:, :6, :9], pixels[nodes, :6])
    assert back.shape == (3, 7, 9, 3)
    assert np.isnan(back[:, 6:]).all()


def test_values_are_read_when_they_are_asked_for(tmp_path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(toy_images()[0]).save(path)
    mdata = fimp_sc.pp.images([path] * 8, adjacency=RING, names=list("abcdefgh"), lazy=True)
    source = source_of(resolve(mdata, "image").modalities[0], 8, 3)
    path.unlink()
    with pytest.raises(ValueError, match=r"image\.png"):
        source.tokens(np.array([2]))


def test_nodes_of_several_modalities_have_their_own_rows() -> None:
    """Signals of some nodes, and images of others in another order."""
    nodes = [f"n{i}" for i in range(10)]
    of_signals, of_images = [1, 2, 3, 4, 5, 6, 8, 9], [7, 0, 9, 4, 3, 2, 1, 5]
    signals = ad.AnnData(toy_signals(), obs=pd.DataFrame(index=[nodes[i] for i in of_signals]))
    signals.uns["fimp_modality"] = {"kind": "signal"}
    images = fimp_sc.pp.images(toy_images(), adjacency=RING, names=[nodes[i] for i in of_images])["image"]
    with quiet_mudata():
        mdata = MuData({"bold": signals, "image": images})
    at = {name: i for i, name in enumerate(mdata.obs_names)}
    bold, image = resolve(mdata, ["bold", "image"]).modalities
    for part, members, cut, size in (
        (bold, of_signals, toy_signals()[:, :20].reshape(8, 4, 5), 5),
        (image, of_images, None, 3),
    ):
        source = source_of(part, 10, size)
        expected = np.zeros((10, source.shape.n_tokens, source.shape.token_size), np.float32)
        for row, node in enumerate(members):
            expected[at[nodes[node]]] = (
                cut[row] if cut is not None
                else [toy_images()[row, i : i + 3, j : j + 3].ravel() for i in (0, 3) for j in (0, 3, 6)]
            )  # fmt: skip
        for chosen in (np.arange(10), np.array([9, 2, 2, 0])):
            np.testing.assert_array_equal(source.tokens(chosen), expected[chosen])
            lacks = [nodes.index(mdata.obs_names[i]) not in members for i in chosen]
            made = source.fields(chosen, 1)
            np.testing.assert_array_equal(made["padding"].all(1), lacks)
            np.testing.assert_array_equal(made["padding"].any(1), lacks)


def test_nothing_of_the_object_is_changed() -> None:
    mdata = fimp_sc.pp.fmri(toy_signals(), connectivity=sparse.csr_matrix(RING))
    source = source_of(resolve(mdata).modalities[0], N_REGIONS, 5)
    source.tokens(np.arange(N_REGIONS))[:] = 0
    source.fields(np.arange(N_REGIONS), 3, (0.5, 0.5))["value"].zero_()
    np.testing.assert_array_equal(mdata["fmri"].X, toy_signals())


@pytest.mark.parametrize("start", [0, 3, 22])
def test_signals_are_cut_from_any_time_on_and_a_segment_is_left(start: int) -> None:
    """Also where the first segment would start too late: it is the last one then."""
    mdata = fimp_sc.pp.fmri(toy_signals(), connectivity=RING)
    source = source_of(resolve(mdata).modalities[0], N_REGIONS, 5)
    source = pickle.loads(pickle.dumps(source))  # as workers get it where processes are not forked
    nodes = np.array([4, 0])
    first = min(start, N_TIMES - 5)
    n = (N_TIMES - first) // 5
    tokens = source.tokens(nodes, start)
    np.testing.assert_array_equal(tokens.reshape(2, -1), toy_signals()[nodes, first : first + 5 * n])
    assert tokens.shape == (2, n, 5)
