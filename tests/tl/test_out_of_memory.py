"""Objects whose expression stays in a file or in dask's hands give the results of those in memory."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import fimp_sc
from fimp_sc.data._study import resolve
from fimp_sc.data.storage._rows import MatrixRows, open_rows, storage
from fimp_sc.model import FIMP
from fimp_sc.tl._call import _inputs, _models

da = pytest.importorskip("dask.array")
pytest.importorskip("xarray")
experimental = pytest.importorskip("anndata.experimental")
if not hasattr(experimental, "read_lazy"):
    pytest.skip("this anndata reads nothing lazily", allow_module_level=True)

# anndata says which version of zarr's format it will write some day.
pytestmark = pytest.mark.filterwarnings("ignore:.*zarr v[23]:UserWarning")

KINDS = ["backed", "backed dense", "lazy h5ad", "lazy zarr", "dask", "dask dense"]
Place = Callable[..., ad.AnnData]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Bring an object to where it is to be read from."""

    def move(adata: ad.AnnData, kind: str) -> ad.AnnData:
        adata = adata.copy()
        if kind.endswith("dense"):
            adata.X = adata.X.toarray()
        if kind.startswith("dask"):
            chunks = da.from_array(adata.X.toarray() if sparse.issparse(adata.X) else adata.X, chunks=(33, 12))
            adata.X = chunks.map_blocks(sparse.csr_matrix) if kind == "dask" else chunks
            return adata
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.{'zarr' if 'zarr' in kind else 'h5ad'}"
        if path.suffix == ".zarr":
            adata.write_zarr(path)
        else:
            adata.write_h5ad(path)
        return ad.read_h5ad(path, backed="r") if "backed" in kind else experimental.read_lazy(path)

    return move


def to_memory(adata: ad.AnnData) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of anndata
        return adata.to_memory()


@pytest.fixture
def graph(tissue: ad.AnnData) -> ad.AnnData:
    """The tissue with a graph."""
    fimp_sc.pp.spatial_graph(tissue, library_key="section")
    return tissue


@pytest.fixture
def no_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where something other than `MatrixRows` brings a matrix of the size of the expression to memory."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the whole matrix was brought to memory")

    monkeypatch.setattr("anndata._core.sparse_dataset.BaseCompressedSparseDataset.to_memory", refuse)
    monkeypatch.setattr(ad.AnnData, "to_memory", refuse)


# Results of a trained model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_embed(tissue: ad.AnnData, place: Place, reference: FIMP, kind: str) -> None:
    stored = place(tissue, kind)
    how = {"library_key": "section", "model": reference, "accelerator": "cpu", "verbose": False}
    fimp_sc.tl.embed(stored, **how)
    fimp_sc.tl.embed(tissue, **how)
    np.testing.assert_allclose(stored.obsm["X_fimp"], tissue.obsm["X_fimp"], rtol=1e-4, atol=1e-5)
    assert storage(stored.X) != "memory"

    kept = to_memory(stored)
    np.testing.assert_array_equal(kept.obsm["X_fimp"], stored.obsm["X_fimp"])
    assert kept.uns["X_fimp"]["params"]["library_key"] == "section"
    assert (kept.obsp["spatial_connectivities"] != tissue.obsp["spatial_connectivities"]).nnz == 0
    assert not [key for key in kept.uns if key.startswith("_scvi")]


@pytest.mark.parametrize("kind", KINDS)
def test_annotate(graph: ad.AnnData, place: Place, reference: FIMP, kind: str) -> None:
    stored = place(graph, kind)
    how = {"library_key": "section", "model": reference, "accelerator": "cpu", "verbose": False}
    fimp_sc.tl.annotate(stored, "label", **how)
    fimp_sc.tl.annotate(graph, "label", **how)
    np.testing.assert_allclose(
        stored.obsm["fimp_label_probabilities"], graph.obsm["fimp_label_probabilities"], rtol=1e-4, atol=1e-5
    )
    kept = to_memory(stored)
    assert isinstance(kept.obs["fimp_label"].dtype, pd.CategoricalDtype)
    assert list(kept.obs["fimp_label"].astype(str)) == list(graph.obs["fimp_label"].astype(str))
    assert list(kept.obs["fimp_label"].cat.categories) == list(graph.obs["fimp_label"].cat.categories)
    np.testing.assert_allclose(kept.obs["fimp_label_confidence"], graph.obs["fimp_label_confidence"], rtol=1e-4)
    assert kept.obs["fimp_label_confidence"].dtype == np.float32
    assert set(graph.obs.columns) == set(kept.obs.columns)


@pytest.mark.parametrize("kind", KINDS)
def test_impute(graph: ad.AnnData, place: Place, reference: FIMP, kind: str) -> None:
    stored = place(graph, kind)
    genes = list(graph.var_names[[5, 2]])
    how = {"library_key": "section", "model": reference, "accelerator": "cpu", "verbose": False}
    for scale in ("log", "counts"):
        fimp_sc.tl.impute(stored, genes=genes, scale=scale, **how)
        fimp_sc.tl.impute(graph, genes=genes, scale=scale, **how)
        np.testing.assert_allclose(stored.obsm["fimp"], graph.obsm["fimp"], rtol=1e-4, atol=1e-5)
    fimp_sc.tl.impute(stored, **how)
    fimp_sc.tl.impute(graph, **how)
    kept = to_memory(stored)
    np.testing.assert_allclose(np.asarray(kept.layers["fimp"]), graph.layers["fimp"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lazy h5ad", "lazy zarr", "dask"])
def test_layer_and_another_section(section: ad.AnnData, place: Place, reference: FIMP, kind: str) -> None:
    section.layers["counts"] = section.X.copy()
    stored = place(section, kind)
    if kind == "dask":
        stored.layers["counts"] = stored.X
    stored.X = None
    how = {"layer": "counts", "model": reference, "accelerator": "cpu", "verbose": False}
    fimp_sc.tl.embed(stored, **how)
    fimp_sc.tl.embed(section, **how)
    np.testing.assert_allclose(stored.obsm["X_fimp"], section.obsm["X_fimp"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lazy h5ad", "dask"])
def test_view(graph: ad.AnnData, place: Place, reference: FIMP, kind: str) -> None:
    part = graph.obs["section"] == graph.obs["section"].iloc[0]
    view = place(graph, kind)[part.to_numpy()]
    how = {"model": reference, "accelerator": "cpu", "verbose": False}
    fimp_sc.tl.embed(view, **how)
    expected = fimp_sc.tl.embed(graph[part], copy=True, **how)
    np.testing.assert_allclose(view.obsm["X_fimp"], expected.obsm["X_fimp"], rtol=1e-4, atol=1e-5)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_whole_matrix")
@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_the_same_numbers(tissue: ad.AnnData, place: Place, quick: dict, kind: str) -> None:
    stored = place(tissue, kind)
    fimp_sc.tl.annotate(stored, "label", library_key="section", **quick)
    if kind.endswith("dense"):
        tissue.X = tissue.X.toarray()  # sums of dense and sparse rows differ in the last digit
    fimp_sc.tl.annotate(tissue, "label", library_key="section", **quick)
    np.testing.assert_allclose(
        stored.obsm["fimp_label_probabilities"], tissue.obsm["fimp_label_probabilities"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["backed", "lazy h5ad", "dask"])
def test_model_class(graph: ad.AnnData, place: Place, kind: str) -> None:
    """The object itself is registered, without the light copy that the tools make."""
    models = []
    for adata in (graph, place(graph, kind)):
        FIMP.setup_anndata(adata, labels_key="label", library_key="section")
        model = FIMP(adata, n_latent=16, n_heads=2, n_tokens=12)
        model.train(1, accelerator="cpu", batch_size=32, enable_progress_bar=False)
        models.append(model)
    first, second = models
    assert first.classes == second.classes
    np.testing.assert_allclose(
        second.get_latent_representation(), first.get_latent_representation(), rtol=1e-3, atol=1e-4
    )
    pd.testing.assert_frame_equal(
        second.predict(soft=True), first.predict(soft=True), check_names=False, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_impute_uses_the_model_of_embed_until_the_data_change(
    tissue: ad.AnnData, place: Place, quick: dict, kind: str
) -> None:
    stored = place(tissue, kind)
    fimp_sc.tl.embed(stored, **quick)
    model = fimp_sc.tl.get_model(stored)
    fimp_sc.tl.impute(stored, genes=[tissue.var_names[0]], accelerator="cpu", verbose=False)
    assert fimp_sc.tl.get_model(stored) is model
    if kind.startswith("dask"):
        stored.X = stored.X * 2
        fimp_sc.tl.impute(stored, genes=[tissue.var_names[0]], **quick)
        assert fimp_sc.tl.get_model(stored) is not model


def test_marks_read_no_expression(graph: ad.AnnData, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs.Inputs()
    works = [
        _inputs.working_copy(resolve(place(graph, kind)), inputs) for kind in ("backed", "backed dense", "lazy h5ad")
    ]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("expression was read")

    for name in ("read", "take"):
        monkeypatch.setattr(f"fimp_sc.data.storage._rows.StoredArray.{name}", refuse)
    monkeypatch.setattr("dask.base.compute", refuse)
    marks = [_models._marks(work, inputs) for work in works]
    assert all(a != b for i, a in enumerate(marks) for b in marks[:i])
    assert marks == [_models._marks(work, inputs) for work in works]


# Nothing is brought to memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_working_copy_holds_what_the_object_holds(graph: ad.AnnData, place: Place, kind: str) -> None:
    stored = place(graph, kind)
    work = _inputs.working_copy(resolve(stored), _inputs.Inputs(library_key="section", labels_key="label")).nodes
    assert storage(work.X) == storage(stored.X) != "memory"
    assert isinstance(work.obs, pd.DataFrame)
    assert list(work.obs["section"].astype(str)) == list(graph.obs["section"].astype(str))
    assert isinstance(work.obsm["spatial"], np.ndarray)
    assert sparse.issparse(work.obsp["spatial_connectivities"])
    pickle.dumps(open_rows(work.X))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_in_pieces(
    tissue: ad.AnnData, place: Place, reference: FIMP, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = place(tissue, kind)
    readers: set[type[MatrixRows]] = set()
    for reader in MatrixRows.__subclasses__():

        def watched(self: MatrixRows, nodes: np.ndarray, read: Any = reader.read) -> Any:
            readers.add(type(self))
            return read(self, nodes)

        monkeypatch.setattr(reader, "read", watched)
    fimp_sc.tl.embed(stored, library_key="section", model=reference, accelerator="cpu", verbose=False)
    assert all(not reader.in_memory for reader in readers)
    assert storage(stored.X) != "memory"


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "1 value that is NaN"), (-1.0, "1 value that is below zero"), (np.inf, "1 value that is infinite")],
)
def test_bad_values_in_a_file(tissue: ad.AnnData, place: Place, quick: dict, kind: str, value: float, message: str):
    matrix = tissue.X.toarray()
    matrix[57, 3] = value
    tissue.X = sparse.csr_matrix(matrix)
    stored = place(tissue, kind)
    with pytest.raises(ValueError, match=rf"adata\.X contains {message}.*first at cell 57, gene 3 "):
        fimp_sc.tl.embed(stored, library_key="section", **quick)
    assert list(stored.obsm) == list(tissue.obsm)
    assert list(stored.obsp) == []
    assert set(stored.uns) == set(tissue.uns)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_keys(tissue: ad.AnnData, place: Place, quick: dict, kind: str) -> None:
    stored = place(tissue, kind)
    for arguments, message in (
        ({"library_key": "sectoin"}, r"'sectoin' is not in adata\.obs.*Did you mean 'section'"),
        ({"layer": "counts"}, r"'counts' is not in adata\.layers"),
        ({"spatial_key": "X_spatial"}, r"'X_spatial' is not in adata\.obsm.*Did you mean 'spatial'"),
    ):
        with pytest.raises(KeyError, match=message):
            fimp_sc.tl.embed(stored, **arguments, **quick)
    with pytest.raises(ValueError, match=r"adata\.obs\['label'\] has no labeled cell"):
        fimp_sc.tl.annotate(_unlabeled(tissue, place, kind), "label", **quick)
    assert set(stored.uns) == set(tissue.uns)


def _unlabeled(tissue: ad.AnnData, place: Place, kind: str) -> ad.AnnData:
    tissue = tissue.copy()
    tissue.obs["label"] = pd.Categorical(["Unknown"] * tissue.n_obs)
    return place(tissue, kind)


def test_view_of_a_backed_object_is_refused_at_once(tissue: ad.AnnData, place: Place, quick: dict) -> None:
    stored = place(tissue, "backed")
    with pytest.raises(ValueError, match=r"adata is a view of an object backed by '.*h5ad', which can take no results"):
        fimp_sc.tl.embed(stored[:50], **quick)


def test_columns_in_a_file(tissue: ad.AnnData, tmp_path: Path, quick: dict) -> None:
    tissue.X = sparse.csc_matrix(tissue.X)
    tissue.write_h5ad(tmp_path / "csc.h5ad")
    with pytest.raises(ValueError, match=r"adata\.X is stored in a file as CSC.*to_memory\(\)"):
        fimp_sc.tl.embed(ad.read_h5ad(tmp_path / "csc.h5ad", backed="r"), **quick)


def test_the_file_stays_as_it_is(tissue: ad.AnnData, place: Place, reference: FIMP) -> None:
    stored = place(tissue, "backed")
    path = Path(stored.filename)
    before = path.read_bytes()
    fimp_sc.tl.annotate(stored, "label", library_key="section", model=reference, accelerator="cpu", verbose=False)
    stored.file.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_graph_alone(tissue: ad.AnnData, place: Place, kind: str) -> None:
    stored = place(tissue, kind)
    fimp_sc.pp.spatial_graph(stored, library_key="section")
    fimp_sc.pp.spatial_graph(tissue, library_key="section")
    built = to_memory(stored)
    assert (built.obsp["spatial_connectivities"] != tissue.obsp["spatial_connectivities"]).nnz == 0
    fimp_sc.pp.spatial_graph(place(built, "lazy h5ad"), library_key="section")  # found, checked and kept
