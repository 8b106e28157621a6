"""Expression from the decoder of a foundation model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_toys import data_of
from scipy import sparse

from fimp_sc.model import FIMP
from fimp_sc.model.predict._inference import collect

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def test_decoder_predicts_known_genes_without_training(tissue, make) -> None:
    model = make(tissue, {"library_key": "section"})
    expression = model.get_expression(decoder=True)
    unknown = np.arange(40) % 7 == 0
    assert expression.shape == tissue.shape
    assert expression.dtype == np.float32
    assert np.isnan(expression[:, unknown]).all()
    assert np.isfinite(expression[:, ~unknown]).all()
    assert (expression[:, ~unknown] >= 0).all()
    # On the scale of the cell: up to its largest visible value.
    data = data_of(model, tissue)
    assert (expression[:, ~unknown].max(1) <= data.expression.rows(np.arange(120))[:, ~unknown].max(1) + 1e-4).all()
    genes = [tissue.var_names[i] for i in (9, 7, 2)]
    few = model.get_expression(decoder=True, genes=genes, batch_size=11)
    assert np.isnan(few[:, 1]).all()
    assert np.isfinite(few[:, [0, 2]]).all()
    assert few[:, 0].std() > 0
    assert np.isnan(model.get_expression(decoder=True, genes=[tissue.var_names[7]])).all()
    rows = [30, 2, 30]
    np.testing.assert_allclose(model.get_expression(indices=rows, decoder=True, genes=genes), few[rows], **TOLERANCE)
    counts = model.get_expression(indices=rows, decoder=True, genes=genes, scale="counts")
    factor = data.expression.factor[rows, None]
    np.testing.assert_allclose(counts, np.expm1(few[rows]) / factor, rtol=1e-3, atol=1e-4)


def test_decoded_values_are_bins_between_edges_of_what_is_visible(distinct, make) -> None:
    model = make(distinct, {"input_scale": "log"})
    genes = [distinct.var_names[i] for i in (9, 2)]
    hidden = np.zeros(distinct.shape, dtype=bool)
    hidden[:, [9, 2, 20]] = True
    data = data_of(model, distinct, hidden)
    asked = {"untrained": True, "genes": torch.tensor([9, 2])}
    bins = collect(model, data, None, lambda module, outputs, batch: outputs["bin"], {}, **asked)
    values = np.where(hidden, 0, distinct.X.toarray())
    values[:, np.arange(40) % 7 == 0] = 0
    expected = np.empty((120, 2))
    for cell in range(120):
        shown = values[cell][values[cell] > 0]
        edges = np.concatenate([[0], np.quantile(shown, np.linspace(0, 1, 8))])
        expected[cell] = np.interp(bins[cell], np.arange(9), edges)
    found = model.get_expression(decoder=True, genes=genes, hidden=hidden)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_hidden_values_do_not_reach_the_decoder(distinct, make) -> None:
    model = make(distinct, {"input_scale": "log"})
    hidden = np.random.default_rng(0).random(distinct.shape) < 0.3
    genes = list(distinct.var_names[:12])
    found = model.get_expression(decoder=True, hidden=hidden, genes=genes)
    spoilt = distinct.copy()
    spoilt.X = sparse.csr_matrix(np.where(hidden, 3.3, distinct.X.toarray()).astype(np.float32))
    FIMP.setup_anndata(spoilt, input_scale="log")
    np.testing.assert_allclose(
        model.get_expression(spoilt, decoder=True, hidden=hidden, genes=genes), found, equal_nan=True, **TOLERANCE
    )


def test_fimp_base_has_no_decoder(trained: FIMP) -> None:
    with pytest.raises(ValueError, match="FIMP-base has none"):
        trained.get_expression(decoder=True)
