"""What a model reads of an object: its nodes, and what each modality holds of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc.data._modality import CONNECTIVITIES_KEY, described, get_modality, modality_info
from fimp_sc.data.sequences._kinds import sequence_kinds
from fimp_sc.data.sequences._pixels import PIXELS_KEY
from fimp_sc.data.storage._elements import in_memory, missing_key

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """One modality.

    Attributes
    ----------
    name
        Of the modality; ``"adata"`` for an object without.
    kind
        ``"expression"``, ``"feature"``, ``"signal"`` or ``"patch"``.
    adata
        What holds it.
    rows
        ``(n_obs,)`` int64, row of each node in ``adata``, -1 where it is missing; ``None`` where they agree.
    """

    name: str
    kind: str
    adata: AnnData
    rows: NDArray[np.int64] | None = None

    @property
    def is_sequence(self) -> bool:
        """Whether nodes are sequences of numbers, rather than rows of a table."""
        return self.kind in sequence_kinds()

    @property
    def absent(self) -> NDArray[np.bool_] | None:
        """``(n_obs,)`` bool, nodes without this modality, if there are any."""
        missing = None if self.rows is None else self.rows < 0
        return missing if missing is not None and missing.any() else None


def is_mudata(data: Any) -> bool:
    """Tell whether an object has modalities."""
    from mudata import MuData

    return isinstance(data, MuData)


def as_modalities(modality: str | Sequence[str] | None) -> list[str] | None:
    """Return names of modalities as a list.

    Raises
    ------
    ValueError
        A name is there twice, or there is none.
    """
    if modality is None:
        return None
    names = [modality] if isinstance(modality, str) else [str(name) for name in modality]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"modality must name modalities once each, found {names}.")
    return names


def parts_of(data: AnnData | MuData, modality: str | Sequence[str] | None) -> list[Part]:
    """Return the modalities that a model reads.

    Parameters
    ----------
    data
        Object. An AnnData object is its own only modality.
    modality
        Names in ``mdata.mod``; ``None`` for the only one.

    Raises
    ------
    MissingKeyError
        There is no such modality.
    TypeError
        Neither a MuData nor an AnnData object.
    ValueError
        No modality is named although there are several, or names of nodes are there twice, by which several modalities
        are brought together.
    """
    names = as_modalities(modality)
    if names is None or len(names) == 1 or not is_mudata(data):
        name, adata = get_modality(data, names[0] if names and is_mudata(data) else None)
        return [Part(name, _kind(adata), adata)]
    parts = []
    for name in names:
        adata = get_modality(data, name)[1]
        for where, found in (("mdata", data.obs_names), (f"mdata[{name!r}]", adata.obs_names)):
            if not found.is_unique:
                raise ValueError(
                    f"{where}.obs_names has {found[found.duplicated()][0]!r} more than once, and several modalities "
                    "are read by the names of their nodes: give each node a name of its own."
                )
        rows = adata.obs_names.get_indexer(data.obs_names).astype(np.int64)
        agree = len(rows) == adata.n_obs and (rows == np.arange(len(rows))).all()
        parts.append(Part(name, _kind(adata), adata, None if agree else rows))
    return parts


def tables_of(parts: Sequence[Part]) -> list[Part]:
    """Return the modalities that hold tables of expression or features."""
    return [part for part in parts if not part.is_sequence]


def feature_names(tables: Sequence[Part]) -> list[pd.Index]:
    """Return the names of genes and features of tables that are read together.

    A name that several tables have stands for none of them: there, it has the name of the table before it, as in
    ``"protein:CD3"``.

    Raises
    ------
    ValueError
        A name that is so made is that of another column.
    """
    names = [part.adata.var_names.astype(str) for part in tables]
    if len(names) == 1:
        return names
    joined = pd.Index(np.concatenate([name.unique().to_numpy(dtype=object) for name in names]))
    shared = joined[joined.duplicated()].unique()
    names = [name.where(~name.isin(shared), f"{part.name}:" + name) for part, name in zip(tables, names, strict=True)]
    joined = pd.Index(np.concatenate([name.unique().to_numpy(dtype=object) for name in names]))
    if not joined.is_unique:
        twice = joined[joined.duplicated()][0]
        raise ValueError(
            f"{twice!r} would be the name of two columns of the modalities {[part.name for part in tables]}: rename "
            "one of them."
        )
    return names


def nodes_of(data: AnnData | MuData, modality: str | Sequence[str] | None) -> AnnData:
    """Return what describes nodes: an object whose ``obs``, ``obsm`` and ``obsp`` are theirs.

    Of one modality this is the modality itself. Several modalities are brought together: nodes are those of the whole
    object; columns, coordinates and graph come from the whole object or from the first modality, in the order of
    their names, that has all nodes. Columns that only a modality with some of the nodes has are missing for the
    others.

    Raises
    ------
    See :func:`parts_of`.
    """
    parts = parts_of(data, modality)
    if len(parts) == 1:
        return parts[0].adata
    from anndata import AnnData

    names = data.obs_names
    columns: dict[str, pd.Series] = {}
    for frame in (data.obs, *(part.adata.obs for part in sorted(parts, key=lambda part: part.absent is not None))):
        columns = {key: frame[key].reindex(names) for key in frame.columns} | columns
    nodes = AnnData(obs=pd.DataFrame(columns, index=names))
    for part in (data, *(part.adata for part in parts)):
        rows = part.obs_names.get_indexer(names)
        if (rows < 0).any():
            continue
        for key in part.obsp:
            if key not in nodes.obsp:
                graph = in_memory(part.obsp[key], f"obsp[{key!r}]")
                nodes.obsp[key] = graph if (rows == np.arange(len(rows))).all() else graph[rows][:, rows]
        # The whole object lists its modalities there too, as masks. Pixels are read when they are asked for.
        for key in set(part.obsm) - {*getattr(part, "mod", ()), PIXELS_KEY} - set(nodes.obsm):
            values = in_memory(part.obsm[key], f"obsm[{key!r}]")
            nodes.obsm[key] = (values if sparse.issparse(values) else np.asarray(values))[rows]
    return nodes


def registered_keys(data: AnnData | MuData, modality: str | Sequence[str] | None) -> dict[str, Any]:
    """Return the keys of graph and samples that a modality names for itself."""
    found: dict[str, Any] = {"connectivities_key": CONNECTIVITIES_KEY, "library_key": None}
    for part in reversed(parts_of(data, modality)):
        info = described(part.adata) or {}
        found |= {key: str(info[key]) for key in found if info.get(key) is not None}
    return found


def expand_rows(matrix: Any, rows: NDArray[np.int64], where: str) -> sparse.csr_matrix:
    """Return the rows of a matrix in memory that nodes have, empty where ``rows`` is -1.

    Parameters
    ----------
    matrix
        ``(n, m)`` array or scipy sparse matrix.
    rows
        ``(n_obs,)`` int64, row of each node.
    where
        Where it was found, for messages.

    Returns
    -------
    ``(n_obs, m)`` CSR of the same dtype.

    Raises
    ------
    ValueError
        The matrix is not in memory.
    """
    if not (isinstance(matrix, np.ndarray) or sparse.issparse(matrix)):
        raise ValueError(
            f"{where} is not in memory, and its nodes are not all those of the whole object in the same order: load it "
            "with mdata[...].to_memory(), or bring the modalities into one order."
        )
    there = np.flatnonzero(rows >= 0)
    chosen = sparse.csr_matrix((np.ones(len(there), matrix.dtype), (there, rows[there])), (len(rows), matrix.shape[0]))
    return sparse.csr_matrix(chosen @ sparse.csr_matrix(matrix))


def _kind(adata: AnnData) -> str:
    info = described(adata)
    if info is None or "kind" not in info or info["kind"] == "expression":
        return "expression"
    return str(modality_info(adata, "adata")["kind"])


def check_whole(data: AnnData | MuData, key: str, modality: str | Sequence[str] | None, nodes: AnnData) -> None:
    """Raise where several modalities have no graph of all nodes.

    Raises
    ------
    MissingKeyError
        Neither the whole object nor a modality with all its nodes has the graph.
    """
    names = as_modalities(modality)
    if names is None or len(names) == 1 or key in nodes.obsp:
        return
    raise missing_key(
        key,
        "mdata.obsp, nor in a modality that has all nodes",
        nodes.obsp,
        f"The modalities {names} need one graph of all {nodes.n_obs:,} nodes: store it in mdata.obsp[{key!r}].",
    )


def check_columns(data: AnnData | MuData, modality: str | Sequence[str] | None, columns: Iterable[str | None]) -> None:
    """Raise where the only modality lacks a column of ``obs`` that the whole object has.

    Raises
    ------
    MissingKeyError
        There is such a column; the message says how to bring it to the modality.
    """
    names = as_modalities(modality)
    if not is_mudata(data) or (names is not None and len(names) > 1):
        return
    name, adata = get_modality(data, names[0] if names else None)
    for column in columns:
        if column is not None and column not in adata.obs and column in data.obs:
            where, call = f"mdata[{name!r}].obs", f"mdata.push_obs(columns=[{column!r}], mods=[{name!r}])"
            raise missing_key(column, where, adata.obs, f"mdata.obs has it: bring it there with {call}.")
