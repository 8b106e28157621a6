from __future__ import annotations

import base64
from html.parser import HTMLParser
from io import BytesIO

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

from fimp_sc import pl, pp, tl

# Elements without an end.
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Sections, images, cells of tables and addresses of a page, whose elements must be closed in order."""

    def __init__(self, file) -> None:
        super().__init__()
        self.open, self.sections, self.images, self.cells, self.addresses, self.tags = [], {}, [], [], [], set()
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections[given["id"]] = ""
        if tag == "img":
            assert given["alt"]
            kind, _, code = given["src"].partition(";base64,")
            assert kind == "data:image/png"
            picture = Image.open(BytesIO(base64.b64decode(code)))
            picture.load()
            self.images.append(picture)
            assert int(given["width"]) == picture.width // 2
        if tag in ("td", "th"):
            self.cells.append("")
        self.addresses += [value for name, value in attrs if name in ("href", "src") and not value.startswith("data:")]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        if "section" in self.open:
            name = list(self.sections)[-1]
            self.sections[name] += data


@pytest.fixture(scope="module")
def tissue(_toy) -> ad.AnnData:
    """Toy with results of every tool."""
    genes = _toy.X.sum(axis=0).A1.argsort()[::-1][:40]
    toy = _toy[:, genes].copy()
    toy.obs["known"] = pd.Categorical(np.where(np.arange(toy.n_obs) % 3, toy.obs["region"].astype(str), "Unknown"))
    pp.spatial_graph(toy, library_key="section")
    tl.embed(toy, max_epochs=1, library_key="section", verbose=False)
    tl.annotate(toy, "known", max_epochs=1, library_key="section", verbose=False)
    tl.niches(toy, n_niches=3, verbose=False)
    tl.attention(toy, "region", n_permutations=10, verbose=False)
    tl.gene_pairs(toy, "region", n_genes=4, n_permutations=20, min_edges=5, verbose=False)
    pp.match_genes(toy, list(toy.var_names[:30]))
    return toy


def test_a_section_for_everything_in_one_file(tissue, tmp_path) -> None:
    keys = {slot: set(getattr(tissue, slot)) for slot in ("obs", "obsm", "obsp", "uns", "var", "layers")}
    file = pl.report(tissue, tmp_path / "report.html", title="Tissue <1> & more")
    assert file == tmp_path / "report.html"
    page = Page(file)
    assert [*page.sections] == [
        "data", "graph", "training", "embedding", "niches", "labels", "influence", "gene-pairs", "gene-match", "calls",
        "versions",
    ]  # fmt: skip
    assert page.addresses == [f"#{name}" for name in page.sections], "nothing is loaded from elsewhere"
    assert not page.tags & {"script", "link", "iframe"}
    text = file.read_text(encoding="utf-8")
    assert "<h1>Tissue &lt;1&gt; &amp; more</h1>" in text
    assert "@import" not in text
    assert "url(" not in text
    assert len(page.images) == 8  # degree, losses, embedding, niches, composition, labels, influence, pairs
    for picture in page.images:
        assert np.ptp(np.asarray(picture.convert("L"))) > 100, "empty"
    pairs = [*zip(page.cells[:-1], page.cells[1:], strict=True)]
    facts = dict(pairs)
    graph = tissue.obsp["spatial_connectivities"]
    assert facts["Cells"] == "240"
    assert facts["Edges"] == f"{graph.nnz:,}"
    assert facts["Edges between samples"] == "0"
    assert facts["Genes with an id"] == "30 of 40"
    pair = tissue.uns["fimp_gene_pairs"]["pairs"].iloc[0]
    assert (pair["source_gene"], pair["destination_gene"]) in pairs
    predicted = tissue.obs["fimp_known"].value_counts()
    assert (predicted.index[0], str(predicted.iloc[0])) in pairs
    assert {slot: set(getattr(tissue, slot)) for slot in keys} == keys, "the object stays as it is"


def test_an_object_that_was_read_has_the_same_sections_but_no_model(tissue, tmp_path) -> None:
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    page = Page(pl.report(ad.read_h5ad(tmp_path / "tissue.h5ad"), str(tmp_path / "report.html")))
    assert "training" not in page.sections
    assert len(page.sections) == 10
    assert len(page.images) == 7


def test_only_what_is_there(tmp_path) -> None:
    bare = ad.AnnData(np.ones((3, 2), dtype=np.float32))
    page = Page(pl.report(bare, tmp_path / "bare.html"))
    assert [*page.sections] == ["data", "versions"]
    assert not page.images
    bare.obsp["spatial_connectivities"] = sparse.csr_matrix(np.eye(3)[[1, 0, 2]] * [[1], [1], [0]])
    page = Page(pl.report(bare, tmp_path / "bare.html"))
    facts = dict(zip(page.cells[:-1], page.cells[1:], strict=True))
    assert (facts["Edges"], facts["Cells without neighbors"], facts["Connected components"]) == ("2", "1", "2")


def test_results_of_a_modality(joint, tmp_path) -> None:
    tl.embed(joint, modality=["rna", "image"], max_epochs=1, verbose=False)
    page = Page(pl.report(joint, tmp_path / "joint.html"))
    assert {"data", "graph", "training", "embedding", "calls"} <= set(page.sections)
    assert "rna, image, bold" in page.cells


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("report.pdf", ValueError, r"file must end in \.html, found 'report\.pdf'"),
        ("nowhere/report.html", FileNotFoundError, "file: the folder .*nowhere.* does not exist"),
    ],
)
def test_files_that_cannot_be_written(toy, tmp_path, file, error, message) -> None:
    with pytest.raises(error, match=message):
        pl.report(toy, tmp_path / file)


def test_names_are_written_as_they_are_and_never_run(toy, tmp_path) -> None:
    name = "<script>alert('$x_1$ & $')</script>"
    toy.obs[name] = pd.Categorical(np.where(toy.obs["region"] == toy.obs["region"].iloc[0], f"{name}1", f"{name}2"))
    toy = toy[:, toy.X.sum(axis=0).A1.argsort()[::-1][:40]].copy()
    toy.var_names = [f"{gene}$^<b>$" for gene in toy.var_names]
    key = "k<i>$_{$"
    toy.obsm["X_fimp"] = np.random.default_rng(0).normal(size=(toy.n_obs, 4))
    pp.spatial_graph(toy, library_key="section")
    tl.niches(toy, 2, n_seeds=2, labels_key=name, key_added=key, verbose=False)
    tl.gene_pairs(toy, name, n_genes=3, n_permutations=10, min_edges=5, verbose=False)
    page = Page(pl.report(toy, tmp_path / "report.html", title=name))
    assert not page.tags & {"script", "b", "i"}
    assert len(page.images) == 4  # degree, niches, composition, pairs
    assert key in page.cells
    assert any(f"labels_key = {name}" in cell for cell in page.cells)


def test_columns_and_embeddings_that_show_nothing_are_left_out(tissue, tmp_path) -> None:
    toy = tissue.copy()
    toy.uns["fimp_niche"]["params"]["labels_key"] = "empty"
    toy.obs["empty"] = np.nan
    toy.obsm["X_fimp"] = sparse.csr_matrix(toy.obsm["X_fimp"])
    assert len(Page(pl.report(toy, tmp_path / "report.html")).images) == 7  # no losses: it is a copy
    with pytest.raises(ValueError, match="adata has no cells"):
        pl.report(toy[:0], tmp_path / "report.html")
