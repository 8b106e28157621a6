"""`fimp_sc.pp.match_genes` on objects of every kind, and against symbols that others assigned to real genes."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from geneformer_toys import dictionaries, write_dictionaries
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc.pp import match_genes
from fimp_sc.pretrained import load

KEY = "fimp_vocabulary_id"
VOCABULARY = {"GFAP": 5, "AQP4": 2, "C1orf112": 9, "<pad>": 1}
VALUES = np.array([[1, 0, 3, 0], [0, 2, 0, 4]], dtype=np.float32)
# anndata says which version of zarr's format it will write some day.
ZARR = pytest.mark.filterwarnings("ignore:.*zarr v[23]:UserWarning")


def make_adata(names=("AQP4", "gfap", "C1ORF112", "NOVEL"), **columns) -> ad.AnnData:
    var = pd.DataFrame(columns, index=list(names))
    adata = ad.AnnData(sparse.csr_matrix(VALUES[:, : len(var)]), var=var, obs=pd.DataFrame(index=["c0", "c1"]))
    adata.layers["twice"] = sparse.csr_matrix(adata.X * 2)
    adata.uns["kept"] = {"a": 1}
    return adata


def test_result_is_written_and_survives_a_file(tmp_path):
    adata = make_adata()
    match = match_genes(adata, VOCABULARY)
    assert match.table["id"].tolist() == adata.var[KEY].tolist() == [2, 5, 9, -1]
    assert match.table.index.equals(adata.var_names)
    assert match.table["fraction_of_counts"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert match.fraction_of_counts == pytest.approx(0.6)
    assert (match.n_matched, match.n_ambiguous, match.n_lost, match.n_used) == (3, 0, 1, 3)
    record = adata.uns[KEY]
    assert record["params"] == {"species": "human"}
    assert record["methods"] == {"case": 2, "exact": 1}
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    assert again.var[KEY].dtype == np.int64
    assert again.var[KEY].tolist() == [2, 5, 9, -1]
    assert again.uns[KEY]["fraction_of_counts"] == pytest.approx(0.6)
    assert again.uns[KEY]["n_lost"] == 1
    assert (again.X != VALUES).sum() == 0


def test_report_is_readable():
    text = repr(match_genes(make_adata(), VOCABULARY))
    assert "3 of 4 genes, 60.0 % of counts" in text
    assert "vocabulary of 3" in text
    assert "exact 1, case 2" in text
    assert "NOVEL (40.0 %)" in text


def test_second_call_replaces_the_first_and_keys_are_free():
    adata = make_adata()
    match_genes(adata, VOCABULARY)
    match_genes(adata, ["NOVEL", "AQP4"], key_added="other", layer="twice")
    match_genes(adata, ["AQP4", "NOVEL"])
    assert adata.var["other"].tolist() == [1, -1, -1, 0]
    assert adata.var[KEY].tolist() == [0, -1, -1, 1]
    assert adata.uns["other"]["params"]["layer"] == "twice"


def test_names_from_a_column():
    adata = make_adata("abcd", feature=pd.Categorical(["GFAP", None, "AQP4", "AQP4"]))
    match = match_genes(adata, VOCABULARY, gene_key="feature")
    assert match.table["id"].tolist() == [5, -1, -1, 2]  # d has more counts than c
    assert match.table.loc["c", "note"] == "AQP4 went to d"
    assert match.table["status"].tolist() == ["matched", "lost", "ambiguous", "matched"]
    assert adata.uns[KEY]["params"]["gene_key"] == "feature"


IDS = ["ENSG00000000001.2", "ENSG00000000002", "ENSG00000000003.1", "ENSG00000000004"]
SYMBOLS = ["AQP4", "GFAP", None, "NOVEL"]


@pytest.mark.parametrize("column", ["gene_symbols", "feature_name", "Symbol", "gene_name", "gene_short_name"])
def test_symbols_of_ensembl_ids_come_from_a_column(column):
    match = match_genes(make_adata(IDS, **{column: SYMBOLS}), VOCABULARY | {"ENSG00000000003": 8})
    assert match.table["id"].tolist() == [2, 5, 8, -1]


def test_ensembl_ids_on_either_side():
    adata = make_adata(["AQP4", "GFAP", "C1orf112", "NOVEL"], gene_ids=IDS)
    stripped = [name.partition(".")[0] for name in IDS]
    assert match_genes(adata, stripped[:3]).table["id"].tolist() == [0, 1, 2, -1]
    assert adata.uns[KEY]["params"]["gene_key"] == "gene_ids"
    # The names of the object are the symbols of a column of Ensembl ids.
    assert match_genes(adata, VOCABULARY, gene_key="gene_ids").table["id"].tolist() == [2, 5, 9, -1]


def test_mouse_through_a_table_of_orthologs(tmp_path):
    adata = make_adata(["Aqp4", "Gfap", "Gm1", "Gm2"])
    table = pd.DataFrame({"mouse_symbol": ["Aqp4", "Gfap"], "human_symbol": ["AQP4", "GFAP"]})
    table.to_csv(tmp_path / "o.tsv", sep="\t", index=False)
    with pytest.warns(UserWarning, match=r"Only 30\.0 % of the counts, and 2 of 4 genes"):
        match = match_genes(adata, VOCABULARY, species="mouse", orthologs=tmp_path / "o.tsv")
    assert match.table["id"].tolist() == [2, 5, -1, -1]
    assert adata.uns[KEY]["params"]["orthologs"].endswith("o.tsv")


def _negative(adata):
    adata.X.data[0] = -1


def _missing(adata):
    adata.X.data[0] = np.nan


def _nothing(adata):
    adata.X = None


def _doubled(adata):
    adata.var_names = ["A", "A", "B", "C"]


@pytest.mark.parametrize(
    ("arguments", "damage", "error", "message"),
    [
        ({"vocabulary": ["X"]}, None, ValueError, r"None of the 4 genes.*'NOVEL'.*vocabulary: 'X'.*aliases="),
        ({"vocabulary": ["Aqp4", "Gfap"]}, None, ValueError, "vocabulary looks like that of a mouse"),
        ({"vocabulary": ["ENSG00000000001"]}, None, ValueError, "pass gene_key= with a column of Ensembl ids"),
        ({"gene_key": "symbols"}, None, MissingKeyError, "'symbols' is not in adata.var.*Did you mean 'symbol'"),
        ({"layer": "twise"}, None, MissingKeyError, "'twise' is not in adata.layers.*'twice'"),
        ({"species": "mouse"}, None, ValueError, "pass orthologs=, a table"),
        ({}, _negative, ValueError, "adata.X holds negative"),
        ({}, _missing, ValueError, "missing or infinite"),
        ({}, _nothing, ValueError, "adata.X is None"),
        ({}, _doubled, ValueError, "1 duplicate gene name"),
    ],
)
def test_failures_change_nothing(arguments, damage, error, message):
    adata = make_adata(symbol=["a", "b", "c", "d"])
    if damage is not None:
        damage(adata)
    before = adata.var.copy()
    with pytest.raises(error, match=message):
        match_genes(adata, **{"vocabulary": VOCABULARY} | arguments)
    pd.testing.assert_frame_equal(adata.var, before)
    assert list(adata.uns) == ["kept"]


def test_mouse_names_of_a_human_call_are_told():
    adata = make_adata(["Aqp4", "Gfap", "Mbp", "Plp1"])
    with pytest.raises(ValueError, match=r'None of the 4 genes.*look like mouse genes.*species="mouse"'):
        match_genes(adata, VOCABULARY)


def test_a_place_without_vocabulary_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder '.*nowhere' \(looked from .*name a vocab\.json"):
        match_genes(make_adata(), tmp_path / "nowhere")
    (tmp_path / "args.json").touch()
    with pytest.raises(ValueError, match=r"has no 'vocab\.json'; found there: 'args\.json'"):
        match_genes(make_adata(), str(tmp_path))


def test_advice_takes_account_of_the_table_that_was_given():
    mouse, vocabulary = make_adata(["Aqp4", "Gfap", "Mbp", "Plp1"]), ["AQP4", "GFAP", "MBP", "PLP1"]
    table = pd.DataFrame({"mouse_symbol": ["Xkr4"], "human_symbol": ["XKR4"]})
    with pytest.raises(ValueError, match=r'pass species="mouse", without which orthologs= translates nothing'):
        match_genes(mouse, vocabulary, orthologs=table)
    with pytest.raises(ValueError, match=r"orthologs= has no ortholog of 4 genes: .*larger table") as raised:
        match_genes(mouse, vocabulary, species="mouse", orthologs=table)
    assert "translate genes of another species" not in str(raised.value)
    with pytest.raises(ValueError, match="vocabulary lacks the human genes that orthologs= leads to"):
        match_genes(mouse, ["XKR4"], species="mouse", orthologs="uppercase")
    ensembl = make_adata([f"ENSG0000000000{i}" for i in range(4)])
    with pytest.raises(ValueError, match=r"pass gene_key= with a column of symbols\.$"):
        match_genes(ensembl, vocabulary, orthologs=table)


def test_a_warning_made_an_error_leaves_nothing_behind():
    adata = make_adata()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match=r"Only 10\.0 % of the counts"):
            match_genes(adata, ["AQP4"])
    assert KEY not in adata.var
    assert KEY not in adata.uns


def test_no_counts_at_all(tmp_path):
    adata = make_adata()
    adata.X = sparse.csr_matrix((2, 4), dtype=np.float32)
    match = match_genes(adata, VOCABULARY)
    assert np.isnan(match.fraction_of_counts)
    assert "none of counts" in repr(match)
    adata.write_h5ad(tmp_path / "a.h5ad")


def _place(adata, kind, folder):
    if kind == "csc":
        adata.X = adata.X.tocsc()
    elif kind == "dense":
        adata.X = adata.X.toarray()
    elif kind == "integers":
        adata.X = adata.X.astype(np.int32)
    elif kind == "dask":
        da = pytest.importorskip("dask.array")
        adata.X = da.from_array(adata.X.toarray(), chunks=(1, 3)).map_blocks(sparse.csr_matrix)
    elif kind == "view":
        return ad.concat([adata, adata], index_unique="-", merge="same")[:2]
    elif kind == "backed":
        adata.write_h5ad(folder / "a.h5ad")
        return ad.read_h5ad(folder / "a.h5ad", backed="r")
    elif kind.startswith("lazy"):
        pytest.importorskip("xarray")
        experimental = pytest.importorskip("anndata.experimental")
        if not hasattr(experimental, "read_lazy"):
            pytest.skip("this anndata reads nothing lazily")
        path = folder / f"a.{kind.split()[1]}"
        adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
        return experimental.read_lazy(path)
    return adata


@ZARR
@pytest.mark.parametrize(
    "kind", ["csr", "csc", "dense", "integers", "dask", "view", "backed", "lazy h5ad", "lazy zarr"]
)
@pytest.mark.parametrize("gene_key", [None, "feature"])
def test_expression_may_be_anywhere_and_is_not_changed(kind, gene_key, tmp_path):
    adata = _place(make_adata(feature=["AQP4", "gfap", "C1ORF112", "NOVEL"]), kind, tmp_path)
    match = match_genes(adata, VOCABULARY, gene_key=gene_key)
    assert match.fraction_of_counts == pytest.approx(0.6)
    assert match.table["id"].tolist() == [2, 5, 9, -1]
    assert np.asarray(adata.var[KEY]).tolist() == [2, 5, 9, -1]
    if kind not in {"lazy h5ad", "lazy zarr"}:
        matrix = adata.X[:] if kind == "backed" else adata.X.compute() if kind == "dask" else adata.X
        np.testing.assert_array_equal(matrix.toarray() if sparse.issparse(matrix) else matrix, VALUES)


MOUSE_SECTIONS = ["starmap_visual_cortex_1020", "merfish_hypothalamus_animal1"]


@pytest.mark.parametrize("section", MOUSE_SECTIONS)
def test_real_mouse_genes_get_the_symbols_that_others_gave_them(shared_data, section):
    adata = ad.read_h5ad(shared_data / f"{section}.h5ad")
    match = match_genes(
        adata,
        shared_data / "scgpt_default_gene_vocab.json",
        species="mouse",
        orthologs=shared_data / "mouse_human_orthologs.tsv.gz",
    )
    known = match.table["id"] >= 0
    theirs = adata.var["human_symbol"].astype(str).str.strip()
    same = match.table.loc[known, "symbol"] == theirs[known]
    # Among genes with equal orthologs, of the families of protocadherins, the choice is arbitrary.
    family = match.table.loc[known, "name"].str.startswith("Pcdh")
    assert same[~family].all()
    assert (known == adata.var["in_scgpt_vocab"]).mean() > 0.985
    assert match.fraction_of_counts > 0.95
    assert match.table.loc[known, "method"].isin(["exact", "ortholog"]).all()


def test_real_human_genes(shared_data):
    adata = ad.read_h5ad(shared_data / "dlpfc_visium_151673.h5ad")
    vocabulary = shared_data / "scgpt_default_gene_vocab.json"
    match = match_genes(adata, vocabulary)
    assert ((match.table["id"] >= 0) == adata.var["in_scgpt_vocab"]).all()
    truth = np.asarray(adata.X[:, adata.var["in_scgpt_vocab"].to_numpy()].sum() / adata.X.sum())
    assert match.fraction_of_counts == pytest.approx(float(truth), rel=1e-5)
    by_id = match_genes(adata, vocabulary, gene_key="ensembl_id")
    assert by_id.table["id"].tolist() == match.table["id"].tolist()


@pytest.mark.parametrize("ending", ["pkl", "json"])
def test_folders_of_geneformer_are_read(tmp_path, ending):
    genes = [f"ENSG{i:011d}" for i in range(3)]
    names = {"AQP4": genes[0], "GFAP": genes[1], "C1orf112": genes[2]}
    write_dictionaries(tmp_path, dictionaries(genes, names=names), ending)
    adata = make_adata()
    match_genes(adata, tmp_path)
    row = load("geneformer", write_settings(tmp_path)).vocabulary()
    assert adata.var[KEY].tolist() == [row["AQP4"], row["GFAP"], row["C1orf112"], -1]


def test_a_folder_without_any_vocabulary_says_what_models_look_for(tmp_path):
    with pytest.raises(ValueError, match=r"no vocabulary that .*scgpt: .*geneformer: .*token_di"):
        match_genes(make_adata(), tmp_path)


def write_settings(folder):
    """The files without which no checkpoint is loaded; nothing in them is read for names of genes."""
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder
