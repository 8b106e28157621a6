"""Genes of an object matched with the vocabulary of a foundation model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._keys import check_key, new_record
from fimp_sc._logging import warn
from fimp_sc._options import checked
from fimp_sc.data.storage._elements import get_matrix, missing_key
from fimp_sc.data.storage._rows import open_rows
from fimp_sc.data.validate._checks import check_anndata
from fimp_sc.pp._gene_match import GeneMatch, percent
from fimp_sc.pretrained.files._files import CheckpointError
from fimp_sc.pretrained.genes._match import Species, advice, match_names
from fimp_sc.pretrained.genes._vocabulary import bare, mostly_ensembl, read_vocabulary

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from fimp_sc.pretrained.genes._orthologs import OrthologSource
    from fimp_sc.pretrained.genes._vocabulary import AliasSource, VocabularySource

# Usual names of columns of `adata.var`, in lower case.
_SYMBOL_COLUMNS = (
    *("gene_symbols", "gene_symbol", "symbols", "symbol", "gene_names", "gene_name", "feature_name"),
    *("gene_short_name", "hgnc_symbol", "mgi_symbol", "external_gene_name"),
)
_ENSEMBL_COLUMNS = ("gene_ids", "gene_id", "ensembl_ids", "ensembl_id", "ensembl_gene_id", "feature_id", "ensembl")
_LOW_FRACTION = 0.5


@checked
def match_genes(
    adata: AnnData,
    vocabulary: VocabularySource,
    *,
    species: Species = "human",
    gene_key: str | None = None,
    layer: str | None = None,
    orthologs: OrthologSource = None,
    aliases: AliasSource = None,
    key_added: str = "fimp_vocabulary_id",
    overwrite: bool = False,
) -> GeneMatch:
    """Match genes with the vocabulary of a foundation model, offline.

    For each gene these steps are tried in order: ``"exact"``, the name as it is; ``"case"``, regardless of case if
    only one name of the vocabulary fits (C1ORF112, C1orf112); ``"alias"``, through ``aliases``; ``"ortholog"``, from
    mouse to human, one-to-one relations first, then the highest confidence. Each id goes to one gene at most: to the
    one with the better evidence, then to the one with more counts.

    Parameters
    ----------
    adata
        Cells × genes; the expression, in memory or not, is only read.
    vocabulary
        Dict from symbol to id; sequence of symbols, whose ids are their positions; path of a ``vocab.json``, or of the
        folder of a checkpoint (scGPT, Geneformer, Nicheformer). It may hold Ensembl ids instead of symbols. Tokens in
        angle brackets, such as ``<pad>``, are no genes.
    species
        ``"human"`` or ``"mouse"``, of the genes in ``adata``. Mouse genes are translated unless the vocabulary holds
        mouse genes itself.
    gene_key
        Column of ``adata.var`` with the names; by default ``adata.var_names``. Symbols or Ensembl ids, the version of
        which is ignored. A column of symbols, or of Ensembl ids, under a usual name (``gene_symbols``,
        ``feature_name``, ``gene_ids``, …) is used where the names are of the other kind than the vocabulary.
    layer
        Layer with the counts; by default ``adata.X``. They weigh genes in the report, and decide between genes.
    orthologs
        Table of mouse and human genes, see Notes: data frame, or path of a tab- or comma-separated file.
        ``"uppercase"``, a last resort, takes mouse symbols in upper case for human ones.
    aliases
        Dict from alias to symbol or symbols, or path of a table with these two columns, tab-separated, without header.
    key_added
        Key of the results.
    overwrite
        Replace what is under this key already. Without, only earlier results of this function are replaced. The column
        that names are read from never is.

    Returns
    -------
    :class:`GeneMatch`. Written to ``adata``:

    ``adata.var[key_added]``
        int64, id in the vocabulary, -1 for genes that have none.
    ``adata.uns[key_added]``
        parameters, numbers of genes, version.

    Raises
    ------
    KeyError
        ``gene_key`` or ``layer`` is absent.
    ValueError
        No gene is in the vocabulary; a table of orthologs is needed and there is none; negative or missing expression;
        unusable vocabulary or tables; or ``key_added`` has a slash, or is the name of something that would be lost.
        ``adata`` is unchanged whenever an exception is raised.
    TypeError
        An argument of the wrong type.
    FileNotFoundError
        A path leads nowhere.

    Warns
    -----
    UserWarning
        Less than half of the counts fall on genes of the vocabulary.

    Notes
    -----
    A table of orthologs has the columns ``mouse_symbol`` and ``human_symbol``, and optionally ``mouse_ensembl``,
    ``human_ensembl``, ``type`` (``"ortholog_one2one"`` where the relation is one-to-one) and ``confidence`` (higher is
    better); the headings of Ensembl's BioMart (mouse genes with their human homologs) are understood too. Of several
    orthologs with equal evidence, that of the same name is taken, else the first in the alphabet,
    and the gene is reported as ambiguous. An ortholog with less evidence never stands in for one that the
    vocabulary lacks: its vector would be another gene's.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_tissue(n_obs=300)
    >>> match = fimp.pp.match_genes(adata, list(adata.var_names[::-1]))
    >>> match.fraction_of_counts
    1.0
    """
    check_anndata(adata)
    ids = _vocabulary(vocabulary)
    matrix = get_matrix(adata, layer)
    names, symbols, used = _names(adata, gene_key, ids)
    check_key(key_added, "pp.match_genes", adata, {("var", used): "gene_key"}, overwrite=overwrite)
    counts = _gene_totals(matrix, "adata.X" if layer is None else f"adata.layers[{layer!r}]")
    table = match_names(
        names,
        ids,
        species=species,
        ensembl_symbols=symbols,
        orthologs=orthologs,
        aliases=aliases,
        counts=counts,
    )
    known = (table["id"] >= 0).to_numpy()
    fraction = float(counts[known].sum() / counts.sum()) if counts.sum() > 0 else float("nan")
    match = GeneMatch(table, fraction, len(ids))
    if not known.any():
        raise ValueError(
            f"None of the {adata.n_vars:,} genes are in the vocabulary. {advice(table, ids, species, orthologs)}"
        )
    if (fraction if np.isfinite(fraction) else known.mean()) < _LOW_FRACTION:
        warn(
            f"Only {percent(fraction)} of the counts, and {match.n_used:,} of {adata.n_vars:,} genes, are in the "
            f"vocabulary: the model will not see the rest. {advice(table, ids, species, orthologs)}"
        )
    parameters = {
        "species": species,
        "gene_key": used,
        "layer": layer,
        "vocabulary": str(vocabulary) if isinstance(vocabulary, str | Path) else None,
        "orthologs": _place(orthologs),
        "aliases": _place(aliases),
    }
    _write(adata, key_added, match, {key: value for key, value in parameters.items() if value is not None})
    return match


def _vocabulary(source: VocabularySource) -> dict[str, int]:
    """Return the id of each gene: of a folder without ``vocab.json`` as a foundation model reads it from its files."""
    if not isinstance(source, str | Path) or not Path(source).is_dir() or (Path(source) / "vocab.json").exists():
        return read_vocabulary(source)
    from fimp_sc.pretrained._registry import foundation_names, foundation_reader

    readers = [foundation_reader(name) for name in foundation_names()]
    why = []
    for reader in (reader for reader in readers if reader.reads == "expression"):
        try:
            return reader.vocabulary(Path(source))
        except CheckpointError as error:
            why.append(f"{reader.name}: {error}")
    raise CheckpointError(f"{str(source)!r} holds no vocabulary that a foundation model reads. {' '.join(why)}")


def _names(
    adata: AnnData, gene_key: str | None, ids: dict[str, int]
) -> tuple[pd.Series, dict[str, str] | None, str | None]:
    """Return the names to look up, symbols of those that are Ensembl ids, and the column that names come from."""
    columns = {str(column).lower(): column for column in adata.var.columns}
    if gene_key is not None:
        if gene_key not in adata.var:
            raise missing_key(gene_key, "adata.var", adata.var.columns, "Pass gene_key=None to use adata.var_names.")
        names = _column(adata, gene_key)
    else:
        names = pd.Series(adata.var_names.astype(str), index=adata.var_names, dtype=object)
    if mostly_ensembl(ids):
        found = next((columns[name] for name in _ENSEMBL_COLUMNS if name in columns), None)
        if gene_key is None and found is not None and not mostly_ensembl(names):
            ensembl = _column(adata, found)
            if mostly_ensembl(ensembl.dropna().astype(str)):
                return ensembl, None, str(found)
        return names, None, gene_key
    if not mostly_ensembl(names.dropna().astype(str)):
        return names, None, gene_key
    found = next((columns[name] for name in _SYMBOL_COLUMNS if name in columns and columns[name] != gene_key), None)
    if found is None and mostly_ensembl(adata.var_names.astype(str)):
        return names, None, gene_key
    symbols = adata.var_names if found is None else _column(adata, found)
    pairs = zip(names, symbols, strict=True)
    return names, {bare(str(name)): str(symbol) for name, symbol in pairs if pd.notna(symbol)}, gene_key


def _column(adata: AnnData, key: str) -> pd.Series:
    """Return a column of ``adata.var`` in memory."""
    column = adata.var[key] if isinstance(adata.var, pd.DataFrame) else adata.var[[key]].to_memory()[key]
    return pd.Series(np.asarray(column, dtype=object), index=adata.var_names, dtype=object)


def _gene_totals(matrix: Any, where: str) -> NDArray[np.float64]:
    # CSC in memory is summed as the rows of its transpose, which shares its values, and needs no conversion.
    turned = sparse.issparse(matrix) and matrix.format == "csc"
    rows = open_rows(matrix.T if turned else matrix, where)
    total = np.zeros(matrix.shape[1])
    for first, piece in rows.stream():
        values = np.asarray(piece.data if sparse.issparse(piece) else piece)
        if values.size and not (np.isfinite(values).all() and values.min() >= 0):
            raise ValueError(
                f"{where} holds negative, missing or infinite values, so that fractions of counts make no sense: pass "
                "layer= with counts or normalized expression."
            )
        sums = np.asarray(piece.sum(int(turned), dtype=np.float64)).ravel()
        if turned:
            total[first : first + len(sums)] = sums
        else:
            total += sums
    return total


def _place(source: Any) -> str | None:
    if source is None or isinstance(source, str | Path):
        return None if source is None else str(source)
    return type(source).__name__


def _write(adata: AnnData, key: str, match: GeneMatch, parameters: dict[str, str]) -> None:
    from anndata import ImplicitModificationWarning

    methods = match.table.loc[match.table["status"] == "matched", "method"].value_counts()
    with warnings.catch_warnings():
        # Writing to a view makes it an object of its own.
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        adata.var[key] = match.table["id"].to_numpy()
        adata.uns[key] = {
            "params": parameters,
            **new_record(adata, "pp.match_genes"),
            "n_vocabulary": match.n_vocabulary,
            "n_used": match.n_used,
            "n_matched": match.n_matched,
            "n_ambiguous": match.n_ambiguous,
            "n_lost": match.n_lost,
            "fraction_of_counts": match.fraction_of_counts,
            "methods": {str(method): int(n) for method, n in methods.items()},
        }
