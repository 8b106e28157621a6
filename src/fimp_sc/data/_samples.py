"""Detection of samples that lie over each other in one coordinate frame and are joined by a graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._logging import warn
from fimp_sc.data._modality import MODALITY_KEY
from fimp_sc.data.storage._elements import get_obs
from fimp_sc.data.validate._checks import check_coordinates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy.spatial import cKDTree

# Words in names of columns that tell samples apart, and words that make such a name one of a measurement.
_SAMPLE = re.compile(
    r"(fov|library|lib|sample|section|slice|slide|donor|batch|patient|subject|individual|animal|mouse|embryo|specimen"
    r"|puck|core|tma|replicate|bregma|roi|timepoint|dataset)(s|id|ids|name|names|key|no|nr|number|label)?"
)
_MEASURE = frozenset(
    {"size", "area", "x", "y", "row", "col", "column", "width", "height", "angle", "px", "pxl", "um", "mm"}
    | {"count", "counts", "n", "total", "score", "prob", "pred", "type", "cluster", "celltype", "leiden", "louvain"}
)
_EXACT = frozenset({"orig.ident", "orig_ident", "origident", "z"})
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_CELLS_PER_SAMPLE = 10  # a column with fewer numbers cells, or measures them
_MOST_NODES, _MOST_PROBED = 100_000, 2000
_NEAREST, _FEW = 20, 3
# The mean of unit vectors to neighbors is about .64 long where they lie on one side, and .2 to .3 on all sides.
_ALL_AROUND = 0.5
# Of cells among which another sample lies: side by side in one tissue at most .001 of all and .06 of one sample.
_OF_ALL, _OF_ONE, _LEAST_CELLS = 0.05, 0.5, 20
_LOCAL = 0.25  # of the diagonal: longer edges are not those of a graph of places
_SHARED_PLACES = 0.25
_FAR, _NEIGHBORS = 10.0, 6


@dataclass(frozen=True)
class _Grouping:
    """Candidate that may tell samples apart: a column, or names of cells.

    Attributes
    ----------
    text, advice
        Where it is found, and how to pass it on.
    codes
        ``(n_obs,)`` integers, -1 where it is missing.
    column, values
        Column of ``obs``, if it is one, and the Python expression of its texts, if there is one.
    """

    text: str
    advice: str
    codes: NDArray[np.int64]
    column: str | None = None
    values: str | None = None

    @property
    def n_groups(self) -> int:
        return int(self.codes.max()) + 1


@dataclass(frozen=True)
class _Frame:
    """Places of cells and edges between them."""

    coordinates: NDArray[np.float64]
    tree: cKDTree
    row: NDArray[np.int64]
    col: NDArray[np.int64]
    n_nodes: int


def warn_joined_samples(adata: AnnData, graph: Any, spatial_key: str, library_key: str | None = None) -> None:
    """Warn where a graph joins samples that lie over each other, as happens without ``library_key``.

    Samples are told by columns of ``adata.obs`` with such names, by the keys of ``adata.uns["spatial"]`` and by names
    of cells. Those that lie side by side in one frame are no reason to warn, nor is a graph of other things than
    places. With ``library_key`` samples are looked for within those that it tells apart: a column of patients leaves
    the sections of a patient joined. A column of batches then counts for none, as those of a technique may share a
    section.

    Parameters
    ----------
    adata
        Object of the user, with its columns.
    graph
        Sparse ``(n_obs, n_obs)``, rows are destinations.
    spatial_key
        Key of the coordinates in ``adata.obsm``; without them nothing can be told.
    library_key
        Column of ``adata.obs`` by which the graph was built; ``None`` if none was named.

    Warns
    -----
    UserWarning
        At most one, which names what tells the samples apart and the argument to pass.
    """
    if spatial_key not in adata.obsm or adata.n_obs < 2:
        return
    frame = _frame(check_coordinates(adata, spatial_key), graph)
    where = f"adata.obsm[{spatial_key!r}]"
    if not frame.row.size or not _is_local(frame):
        return
    columns, names = _columns(adata), _names(adata.obs_names)
    within = ""
    if library_key is not None:
        library = _column(adata, library_key)
        within = f" within those of library_key={library_key!r}"
        frame = _moved_apart(frame, library.codes)
        columns = [c for c in columns if c.column != library_key and "batch" not in str(c.column).lower()]
        columns, names = (_finer(library, found) for found in (columns, names))
    for found in (columns, names):
        joined = [grouping for grouping in found if grouping.n_groups > 1 and _overlap(frame, grouping.codes)]
        if joined:
            chosen = _choose(frame, joined)
            fraction = float((chosen.codes[frame.row] != chosen.codes[frame.col]).mean())
            other = ""
            if "fov" in str(chosen.column).lower() and spatial_key != "spatial_fov" and "spatial_fov" in adata.obsm:
                other = ' Or pass spatial_key="spatial_fov" if it holds the coordinates in the whole slide.'
            warn(
                f"{_percent(fraction)} of the edges join different samples{within}, which lie over each other in "
                f"{where}: {chosen.text} tells {chosen.n_groups:,} of them apart. {chosen.advice}{other}"
            )
            return
    if library_key is not None:
        return
    libraries = _libraries(adata)
    if len(libraries) > 1 and not columns:
        warn(
            f"adata.uns['spatial'] holds {len(libraries)} samples and no column of adata.obs tells which cell is of "
            "which: if the cells are of several, add such a column and name it with library_key=, or edges join them."
        )
    elif not any(grouping.n_groups > 1 for grouping in columns):
        _, number = np.unique(frame.coordinates, axis=0, return_counts=True)
        shared = int(number[number > 1].sum())
        if shared > _SHARED_PLACES * adata.n_obs:
            warn(
                f"{shared:,} of {adata.n_obs:,} cells share their place in {where} with another, as those of several "
                "samples do: name the column of adata.obs that tells samples apart with library_key=."
            )


def _frame(coordinates: NDArray[np.float64], graph: Any) -> _Frame:
    from scipy.spatial import cKDTree

    graph, nodes = sparse.csr_matrix(graph), _evenly(np.arange(len(coordinates)), _MOST_NODES)
    some = graph if len(nodes) == len(coordinates) else graph[nodes]
    row, col = np.repeat(nodes, np.diff(some.indptr)), some.indices.astype(np.int64)
    edge = (some.data != 0) & (row != col)
    return _Frame(coordinates, cKDTree(coordinates), row[edge], col[edge], len(nodes))


def _moved_apart(frame: _Frame, codes: NDArray[np.int64]) -> _Frame:
    """Return places with samples far from each other, and the same edges."""
    from scipy.spatial import cKDTree

    x = frame.coordinates
    x = np.column_stack([x, _FAR * np.ptp(x, axis=0).max() * codes])
    return replace(frame, coordinates=x, tree=cKDTree(x))


def _apart(frame: _Frame, codes: NDArray[np.int64]) -> _Frame:
    """Return places with samples far from each other, and edges to the nearest."""
    frame, n = _moved_apart(frame, codes), len(codes)
    nodes = _evenly(np.arange(n), _MOST_NODES)
    near = frame.tree.query(frame.coordinates[nodes], k=min(_NEIGHBORS + 1, n))[1]
    row, col = np.repeat(nodes, near.shape[1]), near.ravel()
    return replace(frame, row=row[row != col], col=col[row != col], n_nodes=len(nodes))


def _evenly(nodes: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return nodes[np.unique(np.linspace(0, len(nodes) - 1, min(len(nodes), most)).astype(np.int64))]


def _is_local(frame: _Frame) -> bool:
    lengths = np.linalg.norm(frame.coordinates[frame.row] - frame.coordinates[frame.col], axis=1)
    return bool(np.median(lengths) < _LOCAL * np.linalg.norm(np.ptp(frame.coordinates, axis=0)))


def _columns(adata: AnnData) -> list[_Grouping]:
    """Return columns of samples, those with one value included, coarse ones first."""
    named = [str(column) for column in adata.obs.columns if _is_sample(str(column))]
    info = adata.uns.get(MODALITY_KEY)
    if isinstance(info, Mapping) and info.get("library_key") in adata.obs:
        named.append(str(info["library_key"]))
    libraries = _libraries(adata)
    if len(libraries) > 1:
        texts = [str(c) for c in adata.obs.columns if not pd.api.types.is_numeric_dtype(adata.obs[c].dtype)]
        named += [c for c in texts if set(get_obs(adata, [c])[c].dropna().astype(str).unique()) <= libraries]
    found = []
    for column in dict.fromkeys(named):
        grouping = _column(adata, column)
        if 0 < grouping.n_groups < 1 + max(adata.n_obs / _CELLS_PER_SAMPLE, 2):
            found.append(grouping)
    return sorted(found, key=lambda grouping: grouping.n_groups)


def _column(adata: AnnData, column: str) -> _Grouping:
    codes = pd.factorize(get_obs(adata, [column])[column])[0].astype(np.int64)
    advice = (
        f"Pass library_key={column!r}, also to fimp_sc.pp.spatial_graph(adata, library_key={column!r}, "
        "overwrite=True) where a graph is there already."
    )
    return _Grouping(f"adata.obs[{column!r}]", advice, codes, column, f"adata.obs[{column!r}].astype(str)")


def _finer(library: _Grouping, found: Sequence[_Grouping]) -> list[_Grouping]:
    """Return groupings, each with that of the library where it comes again in several of these."""
    pairs = [(grouping, _pair(library, grouping)) for grouping in found]
    pairs = [(grouping, pair) for grouping, pair in pairs if grouping.values or pair.n_groups == grouping.n_groups]
    return [grouping if pair.n_groups == grouping.n_groups else pair for grouping, pair in pairs]


def _is_sample(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    named = name.lower() in _EXACT or any(_SAMPLE.fullmatch(word) for word in words)
    return named and not _MEASURE.intersection(words)


def _libraries(adata: AnnData) -> set[str]:
    images = adata.uns.get("spatial")
    return set(map(str, images)) if isinstance(images, Mapping) else set()


def _names(names: pd.Index) -> list[_Grouping]:
    """Return what names of cells tell: endings and beginnings of concatenated objects, and names that come again."""
    text = pd.Series(names.astype(str))
    found = []
    for what, pattern, call in (
        ("the end", r"[-_]([^-_]+)$", 'str.extract(r"[-_]([^-_]+)$", expand=False)'),
        ("the beginning", r"^([^-_]+)[-_]", 'str.extract(r"^([^-_]+)[-_]", expand=False)'),
    ):
        codes, values = pd.factorize(text.str.extract(pattern, expand=False))
        if 2 <= len(values) < max(len(text) / _CELLS_PER_SAMPLE, 3):
            examples = " or ".join(repr(str(value)) for value in values[:2])
            advice = f'Pass library_key="sample" after adata.obs["sample"] = adata.obs_names.{call}.'
            text_of = f"{what} of adata.obs_names ({examples})"
            found.append(_Grouping(text_of, advice, codes.astype(np.int64), values=f"adata.obs_names.{call}"))
    # The cells of one object have different names: where one comes again, also as obs_names_make_unique writes it, the
    # next object has begun.
    base = text.str.replace(r"-\d+$", "", regex=True)
    again = text.where(~base.isin(set(text)), base)
    occurrence = again.groupby(again.to_numpy()).cumcount().to_numpy()
    if occurrence.any():
        advice = (
            'Join the objects with a column that tells them apart: ad.concat({"a": a, "b": b}, label="sample", '
            'index_unique="-"), and pass library_key="sample".'
        )
        codes = np.maximum.accumulate(occurrence).astype(np.int64)
        found.append(_Grouping("the order of names that come twice in adata.obs_names", advice, codes))
    return found


def _overlap(frame: _Frame, codes: NDArray[np.int64]) -> bool:
    """Tell whether cells of different groups that edges join lie among each other, rather than side by side.

    A cell lies among cells of another group if some edge joins it to one, each inside the bounding box of the other's
    group, and both kinds are found on all sides of it.

    Parameters
    ----------
    codes
        ``(n_obs,)`` group of each cell, -1 where it is missing.
    """
    x, row, col = frame.coordinates, frame.row, frame.col
    boxes = pd.DataFrame(x).groupby(codes)
    group = np.unique(codes, return_inverse=True)[1]
    low, high = boxes.min().to_numpy(), boxes.max().to_numpy()

    def inside(cells: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
        return ((x[cells] >= low[group[others]]) & (x[cells] <= high[group[others]])).all(axis=1)

    joined = (codes[row] != codes[col]) & (codes[row] >= 0) & (codes[col] >= 0)
    row, col = row[joined], col[joined]
    suspects = np.unique(row[inside(row, col) & inside(col, row)])
    if not suspects.size:
        return False
    probed = _evenly(suspects, _MOST_PROBED)
    near = frame.tree.query(x[probed], k=min(_NEAREST + 1, len(x)))[1]
    direction = x[near] - x[probed][:, None]
    length = np.linalg.norm(direction, axis=2, keepdims=True)
    direction = np.divide(direction, length, out=np.zeros_like(direction), where=length > 0)
    own = (codes[near] == codes[probed][:, None]) & (near != probed[:, None])
    other = codes[near] != codes[probed][:, None]

    def around(which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        number = which.sum(axis=1)
        mean = (direction * which[..., None]).sum(axis=1) / np.maximum(number, 1)[:, None]
        return np.linalg.norm(mean, axis=1) < _ALL_AROUND

    among = (other.sum(axis=1) >= _FEW) & around(other) & ((own.sum(axis=1) < _FEW) | around(own))
    if len(suspects) * among.mean() > _OF_ALL * frame.n_nodes:
        return True
    n = len(low)
    size = np.bincount(group, minlength=n) * frame.n_nodes / len(x)
    fraction = np.bincount(group[probed], among, minlength=n) / np.maximum(np.bincount(group[probed], minlength=n), 1)
    fraction *= np.bincount(group[suspects], minlength=n) / np.maximum(size, 1)
    return bool((fraction[size >= _LEAST_CELLS] > _OF_ONE).any())


def _choose(frame: _Frame, joined: list[_Grouping]) -> _Grouping:
    """Return the coarsest grouping within which no other lies over itself, or two that tell samples apart together."""
    pairs = []
    for grouping in joined:
        apart = _apart(frame, grouping.codes)
        pair = next((o for o in joined if o is not grouping and _overlap(apart, _together(grouping, o))), None)
        if pair is None:
            return grouping
        pairs.append((grouping, pair))
    return next((_pair(*pair) for pair in pairs if all(grouping.values for grouping in pair)), joined[0])


def _pair(first: _Grouping, second: _Grouping) -> _Grouping:
    """Return what two groupings tell together."""
    values = f"{first.values} + ' ' + {second.values}"
    advice = f'Pass library_key="library" after adata.obs["library"] = {values}.'
    return _Grouping(f"{first.text} with {second.text}", advice, _together(first, second), second.column, values)


def _together(first: _Grouping, second: _Grouping) -> NDArray[np.int64]:
    """Return codes of the pairs of two groupings, -1 where one is missing."""
    pairs = np.where((first.codes < 0) | (second.codes < 0), -1, first.codes * second.n_groups + second.codes)
    codes, values = pd.factorize(pairs, sort=True)
    return (codes - int(values[0] < 0)).astype(np.int64)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"
