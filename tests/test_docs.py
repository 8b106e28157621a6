"""The documentation's code runs, on toy objects under the names that it uses."""

from __future__ import annotations

import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
from geneformer_toys import write_geneformer
from nicheformer_toys import write_nicheformer
from PIL import Image
from scipy import sparse
from text_toys import make_texts, write_encoder

import fimp_sc
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.data.sequences import _kinds
from fimp_sc.datasets import toy_tissue
from fimp_sc.model import FIMP
from fimp_sc.pretrained import _registry

DOCS = Path(__file__).parents[1] / "docs"
RING = np.roll(np.eye(12), 1, axis=1) + np.roll(np.eye(12), -1, axis=1)
# Pages whose code stands by itself, and how many blocks each has.
PAGES = {
    "index.md": 1,
    "quick_start.md": 5,
    "guide/settings.md": 6,
    "guide/models.md": 4,
    "guide/cost.md": 1,
    "guide/annotation.md": 4,
    "guide/evaluation.md": 9,
    "guide/niches_attention.md": 5,
    "guide/reproducibility.md": 3,
    "extend.md": 5,
}


def code_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(blocks: list[str], page: Path, names: dict) -> None:
    with quiet_mudata():  # as readers of the page make their own objects
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
    plt.close("all")


def small_tissue(n_obs: int = 240, random_state: int = 0) -> ad.AnnData:
    """Return the toy tissue, its sections side by side, without the genes that so few cells do not express."""
    adata = toy_tissue(n_obs, random_state)
    adata.obsm["spatial"][adata.obs["section"] == "section_2", 0] += 1000
    return adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()


@pytest.fixture(autouse=True)
def _short(tmp_path, monkeypatch) -> None:
    """One epoch, a small tissue, no windows, and files in a folder that goes away."""
    train = FIMP.train
    short = {"max_epochs": 1, "enable_progress_bar": False}
    monkeypatch.setattr(FIMP, "train", lambda self, *args, **kwargs: train(self, **kwargs | short))
    monkeypatch.setattr(fimp_sc.datasets, "toy_tissue", small_tissue)
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: None)
    monkeypatch.setattr(_kinds, "_kinds", dict(_kinds.sequence_kinds()))
    for own in _registry._OWN:  # a module registers its reader once, when it is imported
        _registry.foundation_reader(own)
    monkeypatch.setattr(_registry, "_readers", dict(_registry._readers))
    monkeypatch.chdir(tmp_path)


def toy_objects(folder: Path) -> dict:
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(12)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)).save(file)
    adata = small_tissue(n_obs=60)
    adata.obs["layer"] = adata.obs["region"]
    adata.obsm["spatial"] -= adata.obsm["spatial"].min(0)
    herd = ad.AnnData(
        obs={"weight": rng.random(12)}, obsm={"track": rng.normal(size=(12, 50)).cumsum(1)},
        obsp={"spatial_connectivities": sparse.csr_matrix(RING)},
    )  # fmt: skip
    counts = rng.poisson(20, (60, 4)).astype(np.float32)
    protein = ad.AnnData(counts, adata.obs[[]].copy())
    protein.var_names = ["CD3", "CD19", "IgG", "CD45"]
    return {
        "adata": adata,
        "protein": protein,
        "adjacency": RING,
        "bold": rng.normal(size=(2, 10, 200)).cumsum(-1),
        "centers": rng.normal(size=(10, 3)),
        "country": list("xyz") * 4,
        "files": files,
        "fimp": fimp_sc,
        "herd": herd,
        "names": ["Precentral_L", "Insula_R", *(f"r{i}" for i in range(8))],
        "networks": list("ab") * 5,
        "own": small_tissue(n_obs=60),
        "pixels": rng.integers(0, 256, (60, 16, 16, 3)).astype(np.uint8),
        "places": [55, 13] + 0.01 * rng.normal(size=(12, 2)),
        "role": list("ab") * 6,
        "slide": rng.integers(0, 256, (*(adata.obsm["spatial"].max(0)[::-1].astype(int) + 2), 3)).astype(np.uint8),
        "structural": np.roll(np.eye(10), 1, axis=1),
        "table": rng.normal(size=(12, 5)),
    }


def test_code_of_the_page_on_modalities_runs(tmp_path) -> None:
    torch_geometric_data = pytest.importorskip("torch_geometric.data")
    import torch

    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    names = toy_objects(tmp_path)
    names["data"] = torch_geometric_data.Data(x=torch.randn(6, 3), edge_index=edges, y=torch.tensor([0, 1] * 3))
    page = DOCS / "modalities.md"
    blocks = [block for block in code_of(page) if "pretrained.load" not in block]
    assert len(blocks) == 8
    run(blocks, page, names)
    assert names["herd"].obsm["X_fimp"].shape == (12, 128)
    made = names["herd"].obsm["fimp"]
    assert np.isfinite(made[:, :40]).all()
    assert np.isnan(made[:, 40:]).all(), "steps that fill no token"
    assert np.isfinite(names["mdata"].obsm["X_fimp"]).all()


def test_code_of_texts_runs(tmp_path) -> None:
    pytest.importorskip("tokenizers")
    page, texts = DOCS / "modalities.md", dict(enumerate(make_texts(12)))
    write_encoder(tmp_path / "all-MiniLM-L6-v2")
    names = {"fimp": fimp_sc, "definitions": texts, "is_a": [(i, i // 2) for i in range(1, 12)]}
    names["branch"] = [*"abcd" * 2, "a", "b", "Unknown", None]
    (block,) = [block for block in code_of(page) if "pp.text" in block]
    run([block], page, names)
    assert set(names["terms"]["text"].obs["fimp_branch"]) <= set("abcd")
    assert names["terms"]["text"].obsm["X_fimp"].shape == (12, 24)


@pytest.mark.parametrize("name", PAGES)
def test_code_of_the_other_pages_runs(name: str, tmp_path, scgpt_checkpoint) -> None:
    blocks = code_of(DOCS / name)
    assert len(blocks) == PAGES[name]
    if any("scGPT_human/" in block for block in blocks):
        (tmp_path / "scGPT_human").symlink_to(scgpt_checkpoint(toy_tissue(n_obs=60).var_names[:700]))
    if name == "guide/models.md":
        genes = list(toy_tissue(n_obs=60).var_names)
        write_geneformer(tmp_path / "Geneformer-V2-104M", genes, n_positions=80)
        write_nicheformer(tmp_path / "Nicheformer", genes)
    run(blocks, DOCS / name, {})


def test_code_of_the_page_on_other_tools_runs(tmp_path) -> None:
    page = DOCS / "guide" / "elsewhere.md"
    blocks = code_of(page)
    assert len(blocks) == 7
    text = page.read_text(encoding="utf-8")
    for package in ("spatialdata_plot", "napari_spatialdata", "vitessce"):
        (needing,) = (block for block in blocks if package in block)
        assert "Needs `pip install" in text.partition(needing)[0].rpartition("## ")[2]
        if package.startswith("napari") or find_spec(package) is None:  # napari opens a window
            blocks.remove(needing)
    names: dict = {}
    with warnings.catch_warnings():
        # Of spatialdata, and of what it builds on.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        warnings.filterwarnings("ignore", ".*zarr v[23]", UserWarning)
        run(blocks, page, names)
    read = names["sd"].read_zarr(tmp_path / "tissue.zarr")
    table = read.tables["table"]
    assert list(table.obs["fimp_niche"]) == list(names["adata"].obs["fimp_niche"])
    for name, shapes in read.shapes.items():
        rows = table.obs["section"] == name
        assert list(shapes.index) == list(table.obs.loc[rows, "cell"])
        np.testing.assert_allclose(np.c_[shapes.geometry.x, shapes.geometry.y], table.obsm["spatial"][rows])
    export = ad.read_h5ad(tmp_path / "cellxgene.h5ad")
    assert (export.raw.X != names["adata"].X).nnz == 0
    assert not any(hasattr(value, "keys") for value in export.uns.values())
    assert ad.read_zarr(tmp_path / "section_1.zarr").obsm["X_fimp"].shape[1] == 64


def test_no_other_page_has_code() -> None:
    kept = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if code_of(path)}
    kept = {name for name in kept if not name.startswith(("_build/", "api/", "generated/"))}
    assert kept == {*PAGES, "modalities.md", "guide/elsewhere.md"}


def test_every_place_that_contributors_are_sent_to_exists() -> None:
    """And every room has a place in it, but for that of toys."""
    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    source = DOCS.parent / "src" / "fimp_sc"
    named = set(re.findall(r"(?:\w+/)+(?:\w+\.py)?|\w+\.py", text)) - {"src/", "generated/"}
    assert len(named) > 40
    for place in sorted(named):
        assert (source / place).exists(), place
    rooms = {path.parent.relative_to(source).as_posix() + "/" for path in source.rglob("*/__init__.py")}
    assert {room for room in rooms if not any(place.startswith(room) for place in named)} == {"datasets/"}
