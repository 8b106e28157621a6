from __future__ import annotations

import numpy as np
import pytest
from figure_contract import check_figure
from sklearn.metrics import r2_score

from fimp_sc import pl, pp, tl
from fimp_sc.data import ExpressionReader
from fimp_sc.model.registry._graph_data import _statistics


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


# Another section lacks the most expressed genes of the model, and its cells look like no others for that.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Only 30 of the 40 genes of the model:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:\d+% of the cells are unlike all cells:UserWarning"),
]
QUICK = {
    "max_epochs": 1, "accelerator": "cpu", "verbose": False,
    "model_kwargs": {"n_latent": 16, "n_heads": 2, "n_tokens": 12}, "train_kwargs": {"batch_size": 64},
}  # fmt: skip
GIVEN = {"accelerator": "cpu", "verbose": False}


@pytest.fixture(scope="module")
def trained(_toy):
    """A model of 40 genes of the toy tissue, and another section of it: four times as deep, with other genes too."""
    genes = np.asarray(_toy.X.sum(axis=0)).ravel().argsort()[::-1][:60]
    toy = _toy.copy()
    toy.obsm["spatial"][toy.obs["section"] == "section_2", 0] += 1000  # side by side
    adata = toy[:, genes[:40]].copy()
    tl.embed(adata, **QUICK)
    deep = toy[:200, genes[10:]].copy()
    deep.X = deep.X * 4
    return tl.get_model(adata), deep


@pytest.mark.parametrize("scale", ["counts", "log"])
@pytest.mark.parametrize("chosen", [False, True])
def test_measured_values_are_those_of_the_model(trained, scale, chosen) -> None:
    model, deep = trained
    adata = deep.copy()
    if scale == "log":
        adata.X = (adata.X * 0.5).log1p()
    names = list(adata.var_names[[3, 20, 11]])
    tl.impute(adata, model=model, genes=names if chosen else None, input_scale=scale, **GIVEN)
    columns = adata.var_names.get_indexer(model.genes)
    source = ExpressionReader(adata.X, columns, scale, _statistics(model), trained_scale="counts")
    assert (columns < 0).sum() == 10
    expected = source.rows(np.arange(adata.n_obs))[:, [list(model.genes).index(name) for name in names]]
    assert adata.uns["fimp"]["target_sum"] == float(model.module.target_sum)
    for part in (slice(None), slice(50, 120)):
        axes = pl.imputation(adata[part].copy(), names, show=False)
        drawn = np.stack([row[0].collections[0].get_array() for row in axes], axis=1)
        np.testing.assert_allclose(drawn, expected[part], rtol=1e-4)


def test_measured_values_of_selected_genes(trained) -> None:
    """Those that are left are scaled as the model would, and the difference is told."""
    model, deep = trained
    adata = deep.copy()
    tl.impute(adata, model=model, **GIVEN)
    part = adata[:, adata.var_names[5:25]].copy()
    with pytest.warns(UserWarning, match="10 of the 30 genes that the model saw have left the object"):
        axes = pl.imputation(part, part.var_names[0], show=False)
    columns = part.var_names.get_indexer(model.genes)
    source = ExpressionReader(part.X, columns, "counts", _statistics(model))
    expected = source.rows(np.arange(part.n_obs))[:, list(model.genes).index(part.var_names[0])]
    np.testing.assert_allclose(axes[0, 0].collections[0].get_array(), expected, rtol=1e-4)


def test_log_values_imputed_as_counts(trained) -> None:
    model, deep = trained
    adata, name = deep.copy(), deep.var_names[4]
    adata.X = adata.X.log1p()
    tl.impute(adata, model=model, scale="counts", input_scale="log", **GIVEN)
    axes = pl.imputation(adata, name, show=False)
    counts = deep[:, name].X.toarray().ravel()
    np.testing.assert_allclose(axes[0, 0].collections[0].get_array(), counts, rtol=1e-4)


def test_a_layer_that_was_not_imputed_from(trained) -> None:
    """What it holds is found out; counts are scaled as those that the model read."""
    model, deep = trained
    adata, name = deep.copy(), deep.var_names[4]
    adata.layers["raw"], adata.layers["log"] = adata.X * 3, adata.X.log1p()
    tl.impute(adata, model=model, **GIVEN)
    own, raw, log = (
        pl.imputation(adata, name, observed_layer=layer, show=False)[0, 0].collections[0].get_array()
        for layer in (None, "raw", "log")
    )
    np.testing.assert_allclose(raw, own, rtol=1e-5)
    np.testing.assert_allclose(log, adata.layers["log"][:, [4]].toarray().ravel(), rtol=1e-6)


def test_features_are_drawn_as_they_are() -> None:
    rng = np.random.default_rng(0)
    ring = np.roll(np.eye(40), 1, axis=1)
    mdata = pp.features(rng.integers(0, 9, (40, 6)).astype(float), ring + ring.T, feature_names=list("abcdef"))
    mdata["feature"].obsm["spatial"] = rng.random((40, 2))
    tl.impute(mdata, **{**QUICK, "model_kwargs": {"n_latent": 16, "n_heads": 2}})
    adata = mdata["feature"]
    assert adata.uns["fimp"]["input_scale"] == "real"
    axes = pl.imputation(adata, "c", show=False)
    np.testing.assert_array_equal(axes[0, 0].collections[0].get_array(), adata.X[:, 2])


@pytest.mark.parametrize("chosen", [False, True])
def test_objects_that_stay_out_of_memory(trained, stored, chosen) -> None:
    model, deep = trained
    names = list(deep.var_names[[3, 20]])
    adata = deep.copy()
    tl.impute(adata, model=model, genes=names if chosen else None, library_key="section", **GIVEN)
    expected = pl.imputation(adata, names, show=False)
    axes = pl.imputation(stored(adata), names, show=False)
    assert axes.shape == expected.shape == (4, 3)
    for ax, like in zip(axes[:, :2].flat, expected[:, :2].flat, strict=True):
        np.testing.assert_allclose(ax.collections[0].get_array(), like.collections[0].get_array(), rtol=1e-6)
    assert [ax.get_title() for ax in axes.flat] == [ax.get_title() for ax in expected.flat]


def test_a_gene_that_is_there_twice_is_refused(imputed) -> None:
    names = imputed.var_names.to_numpy().copy()
    names[3] = names[0]
    imputed.var_names = names
    with pytest.raises(ValueError, match=r"'HES4' is the name of several genes"):
        pl.imputation(imputed, "HES4", show=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"genes": "no gene"}, KeyError, r"'no gene' is not in adata\.var_names"),
        ({"genes": []}, ValueError, "genes must be .* not empty"),
        ({"genes": "HES4", "layer": "other"}, KeyError, r"fimp_sc\.tl\.impute"),
        ({"genes": "HES4", "observed_layer": "log"}, KeyError, r"'log' is not in adata\.layers"),
        ({"genes": "HES4", "library_key": "slide"}, KeyError, "library_key='slide'"),
    ],
)
def test_unusable_input(imputed, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        pl.imputation(imputed, show=False, **arguments)


def test_what_becomes_of_the_figure(imputed) -> None:
    check_figure(pl.imputation, imputed, list(imputed.var_names[:2]), shape=(2, 3))


def test_many_rows_stand_two_by_two(imputed) -> None:
    genes = list(imputed.var_names[:5])
    axes = pl.imputation(imputed, genes, show=False)
    assert axes.shape == (5, 3)
    figure = axes[0, 0].figure
    figure.draw_without_rendering()
    boxes = np.array([[ax.get_position().bounds[:2] for ax in row] for row in axes])
    assert (np.diff(boxes[:, :, 0], axis=1) > 0).all()
    assert np.allclose(boxes[0, :, 1], boxes[1, :, 1], atol=0.02)
    assert boxes[1, 0, 0] > boxes[0, 2, 0]
    assert (np.diff(boxes[::2, 0, 1]) < 0).all()
    assert [ax.get_title().split(",")[0] for ax in axes[:, 0]] == genes
