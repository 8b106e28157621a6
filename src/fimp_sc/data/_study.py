"""A study: an AnnData or MuData object resolved once into nodes, tables and sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc.data._modality import CONNECTIVITIES_KEY, SPATIAL_KEY, described, get_modality, modality_info
from fimp_sc.data.sequences._kinds import sequence_kinds
from fimp_sc.data.sequences._pixels import PIXELS_KEY
from fimp_sc.data.storage._elements import in_memory, missing_key

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Modality:
    """One modality of a study.

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


@dataclass(frozen=True)
class Study:
    """An object and what is read of it, resolved once by :func:`resolve`.

    Attributes
    ----------
    data
        AnnData or MuData object.
    names
        Names of the modalities that were asked for; ``None`` for the only one.
    modalities
        What each of them holds. An AnnData object is its own only modality.
    """

    data: AnnData | MuData
    names: tuple[str, ...] | None
    modalities: tuple[Modality, ...]

    @property
    def is_joined(self) -> bool:
        """Whether several modalities are read together; nodes then are those of the whole object."""
        return len(self.modalities) > 1

    @property
    def tables(self) -> list[Modality]:
        """Modalities that hold tables of expression or features."""
        return [modality for modality in self.modalities if not modality.is_sequence]

    @property
    def sequences(self) -> list[Modality]:
        """Modalities whose nodes are sequences of numbers."""
        return [modality for modality in self.modalities if modality.is_sequence]

    @cached_property
    def nodes(self) -> AnnData:
        """Object whose ``obs``, ``obsm`` and ``obsp`` are those of the nodes.

        Of one modality this is the modality itself. Several modalities are brought together: nodes are those of the
        whole object; columns, coordinates and graph come from the whole object or from the first modality, in the order
        of their names, that has all nodes. Columns that only a modality with some of the nodes has are missing for the
        others.
        """
        return _joined(self.data, self.modalities) if self.is_joined else self.modalities[0].adata

    def registered_keys(self) -> dict[str, Any]:
        """Return the keys of graph and samples that a modality names for itself."""
        found: dict[str, Any] = {"connectivities_key": CONNECTIVITIES_KEY, "library_key": None}
        for modality in reversed(self.modalities):
            info = described(modality.adata) or {}
            found |= {key: str(info[key]) for key in found if info.get(key) is not None}
        return found

    def check_graph(self, key: str) -> None:
        """Raise where several modalities have no graph of all nodes.

        Raises
        ------
        MissingKeyError
            Neither the whole object nor a modality with all its nodes has the graph.
        """
        nodes = self.nodes
        if self.is_joined and key not in nodes.obsp:
            whole = [part for part in self.modalities if part.adata.n_obs == nodes.n_obs]
            located = [part.name for part in whole if SPATIAL_KEY in part.adata.obsm and key == CONNECTIVITIES_KEY]
            way = f"build it with fimp_sc.pp.spatial_graph(mdata[{located[0]!r}]), or " if located else ""
            raise missing_key(
                key,
                "mdata.obsp, nor in a modality that has all nodes",
                nodes.obsp,
                f"The modalities {[modality.name for modality in self.modalities]} need one graph of all "
                f"{nodes.n_obs:,} nodes: {way}store it in mdata.obsp[{key!r}].",
            )

    def check_columns(self, columns: Iterable[str | None]) -> None:
        """Raise where the only modality lacks a column of ``obs`` that the whole object has.

        Raises
        ------
        MissingKeyError
            There is such a column; the message says how to bring it to the modality.
        """
        if not is_mudata(self.data) or self.is_joined:
            return
        name, adata = self.modalities[0].name, self.modalities[0].adata
        for column in columns:
            if column is not None and column not in adata.obs and column in self.data.obs:
                where, call = f"mdata[{name!r}].obs", f"mdata.push_obs(columns=[{column!r}], mods=[{name!r}])"
                raise missing_key(column, where, adata.obs, f"mdata.obs has it: bring it there with {call}.")


def as_whole(data: AnnData | MuData) -> Study:
    """Return an object whose own ``obs``, ``obsm`` and ``obsp`` are read, whatever modalities it has."""
    return Study(data, None, (Modality("mdata" if is_mudata(data) else "adata", "expression", data),))


def resolve(data: AnnData | MuData, modality: str | Sequence[str] | None = None) -> Study:
    """Find out what an object holds of its nodes.

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
    asked = None if names is None else tuple(names)
    if names is None or len(names) == 1 or not is_mudata(data):
        name, adata = get_modality(data, names[0] if names and is_mudata(data) else None)
        return Study(data, asked, (Modality(name, _kind(adata), adata),))
    modalities = []
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
        modalities.append(Modality(name, _kind(adata), adata, None if agree else rows))
    return Study(data, asked, tuple(modalities))


def feature_names(tables: Sequence[Modality]) -> list[pd.Index]:
    """Return the names of genes and features of tables that are read together.

    A name that several tables have stands for none of them: there, it has the name of the table before it, as in
    ``"protein:CD3"``.

    Raises
    ------
    ValueError
        A name that is so made is that of another column.
    """
    names = [table.adata.var_names.astype(str) for table in tables]
    if len(names) == 1:
        return names
    joined = pd.Index(np.concatenate([name.unique().to_numpy(dtype=object) for name in names]))
    shared = joined[joined.duplicated()].unique()
    names = [name.where(~name.isin(shared), f"{table.name}:" + name) for table, name in zip(tables, names, strict=True)]
    joined = pd.Index(np.concatenate([name.unique().to_numpy(dtype=object) for name in names]))
    if not joined.is_unique:
        twice = joined[joined.duplicated()][0]
        raise ValueError(
            f"{twice!r} would be the name of two columns of the modalities {[table.name for table in tables]}: rename "
            "one of them."
        )
    return names


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


def _joined(data: MuData, modalities: Sequence[Modality]) -> AnnData:
    from anndata import AnnData

    names = data.obs_names
    columns: dict[str, pd.Series] = {}
    for frame in (data.obs, *(one.adata.obs for one in sorted(modalities, key=lambda one: one.absent is not None))):
        columns = {key: frame[key].reindex(names) for key in frame.columns} | columns
    nodes = AnnData(obs=pd.DataFrame(columns, index=names))
    for one in (data, *(modality.adata for modality in modalities)):
        rows = one.obs_names.get_indexer(names)
        if (rows < 0).any():
            continue
        for key in one.obsp:
            if key not in nodes.obsp:
                graph = in_memory(one.obsp[key], f"obsp[{key!r}]")
                nodes.obsp[key] = graph if (rows == np.arange(len(rows))).all() else graph[rows][:, rows]
        # The whole object lists its modalities there too, as masks. Pixels are read when they are asked for.
        for key in set(one.obsm) - {*getattr(one, "mod", ()), PIXELS_KEY} - set(nodes.obsm):
            values = in_memory(one.obsm[key], f"obsm[{key!r}]")
            nodes.obsm[key] = (values if sparse.issparse(values) else np.asarray(values))[rows]
    return nodes


def _kind(adata: AnnData) -> str:
    info = described(adata)
    if info is None or "kind" not in info or info["kind"] == "expression":
        return "expression"
    return str(modality_info(adata, "adata")["kind"])
