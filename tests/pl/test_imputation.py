from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt
from sklearn.metrics import r2_score

from fimp_sc import pl


def _log(adata) -> np.ndarray:
    counts = adata.X.toarray().astype(float)
    total = counts.sum(1, keepdims=True)
    return np.log1p(counts / total * np.median(total))


@pytest.fixture
def imputed(toy):
    """Toy tissue whose imputed values are the measured ones on the log scale, with noise."""
    noise = np.random.default_rng(0).normal(0, 0.2, toy.shape)
    toy.layers["fimp"] = (_log(toy) + noise).astype(np.float32)
    toy.uns["fimp"] = {"params": {"scale": "log", "input_scale": "auto"}}
    return toy


def test_maps_are_on_one_scale(imputed) -> None:
    genes = list(imputed.var_names[[5, 2]])
    axes = pl.imputation(imputed, genes, show=False)
    assert axes.shape == (2, 3)
    for row, gene in zip(axes, genes, strict=True):
        left, right = (ax.collections[0] for ax in row[:2])
        column = imputed.var_names.get_loc(gene)
        np.testing.assert_allclose(left.get_array(), _log(imputed)[:, column], rtol=1e-6)
        np.testing.assert_allclose(right.get_array(), imputed.layers["fimp"][:, column])
        assert left.get_clim() == right.get_clim()
        assert row[0].get_title() == f"{gene}, measured"
        r2 = r2_score(left.get_array(), right.get_array())
        assert row[2].get_title() == f"R² = {r2:.2f}, 240 cells"
    axes[0, 0].figure.canvas.draw()


def test_measured_values_as_they_are(imputed) -> None:
    gene = imputed.var_names[7]
    imputed.layers["twice"] = imputed.X * 2
    imputed.uns["fimp"]["params"] = {"scale": "counts", "layer": "twice"}
    axes = pl.imputation(imputed, gene, show=False)
    np.testing.assert_allclose(axes[0, 0].collections[0].get_array(), imputed.X[:, 7].toarray().ravel() * 2)
    imputed.layers["done"] = _log(imputed)
    imputed.uns["fimp"]["params"] = {"scale": "log"}
    axes = pl.imputation(imputed, gene, observed_layer="done", show=False)
    np.testing.assert_allclose(axes[0, 0].collections[0].get_array(), _log(imputed)[:, 7])


def test_samples_and_chosen_genes(imputed) -> None:
    genes = np.array(imputed.var_names[[30, 4]], dtype=object)
    imputed.obsm["some"] = imputed.layers["fimp"][:, [30, 4]]
    imputed.uns["some"] = {"genes": genes, "params": {"scale": "log"}}
    axes = pl.imputation(imputed, [genes[1]], "some", library_key="section", show=False)
    assert axes.shape == (2, 3)
    second = (imputed.obs["section"] == "section_2").to_numpy()
    np.testing.assert_allclose(axes[1, 1].collections[0].get_array(), imputed.layers["fimp"][second, 4])
    assert axes[1, 0].get_title() == f"{genes[1]}, section_2, measured"
    # As they were told apart when values were imputed.
    imputed.uns["some"]["params"]["library_key"] = "section"
    assert pl.imputation(imputed, [genes[1]], "some", show=False).shape == (2, 3)


def test_genes_the_model_does_not_know(imputed) -> None:
    imputed.layers["fimp"][:, 3] = np.nan
    axes = pl.imputation(imputed, imputed.var_names[3], show=False)
    assert axes[0, 2].get_title() == "R² cannot be computed, 0 cells"
    axes[0, 0].figure.canvas.draw()


def test_show_and_save(imputed, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(plt, "show", lambda: None)
    assert pl.imputation(imputed, imputed.var_names[0], save=tmp_path / "a.png") is None
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"genes": "no gene"}, KeyError, r"'no gene' is not in adata\.var_names"),
        ({"genes": []}, ValueError, "genes is empty"),
        ({"genes": "HES4", "layer": "other"}, KeyError, r"fimp_sc\.tl\.impute"),
        ({"genes": "HES4", "observed_layer": "log"}, KeyError, r"'log' is not in adata\.layers"),
        ({"genes": "HES4", "library_key": "slide"}, KeyError, "library_key='slide'"),
    ],
)
def test_unusable_input(imputed, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        pl.imputation(imputed, show=False, **arguments)
