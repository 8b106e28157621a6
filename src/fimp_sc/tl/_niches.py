from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from anndata import ImplicitModificationWarning

from fimp_sc._keys import check_key, find_results, new_record
from fimp_sc._logging import user_messages
from fimp_sc._options import checked
from fimp_sc._palette import palette
from fimp_sc._recipe import recipe
from fimp_sc.data._study import as_whole, resolve
from fimp_sc.data.storage._elements import get_obs, label_text, missing_key
from fimp_sc.tl._call._inputs import inherit
from fimp_sc.tl._call._several import opened, several
from fimp_sc.tl._smooth import smoothed
from fimp_sc.tl._statistics._clusterings import Leiden, fit_mixture
from fimp_sc.tl._statistics._mapping import Axes, stored_mixture
from fimp_sc.tl._statistics._reference import Reference
from fimp_sc.tl._statistics._representation import made_by, read_representation
from fimp_sc.tl._statistics._stability import mixtures_of_halves, most_stable, seeds_of_leiden, stability

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Method = Literal["mixture", "leiden"]
Covariance = Literal["tied", "full", "diag", "spherical"]


@several
@checked
def niches(
    adata: AnnData | MuData | Sequence[AnnData] | Mapping[str, AnnData],
    n_niches: int | None = None,
    *,
    reference: AnnData | MuData | None = None,
    modality: str | Sequence[str] | None = None,
    use_rep: str | None = None,
    method: Method = "mixture",
    smooth: int | None = None,
    n_components: int | None = 15,
    covariance_type: Covariance = "tied",
    n_range: tuple[int, int] = (4, 15),
    n_seeds: int = 5,
    labels_key: str | None = None,
    library_key: str | None = None,
    connectivities_key: str | None = None,
    key_added: str = "fimp_niche",
    random_state: int = 0,
    verbose: bool = True,
    overwrite: bool = False,
    copy: bool = False,
) -> AnnData | MuData | list[AnnData] | dict[str, AnnData] | None:
    """Divide the tissue into niches: groups of cells whose embeddings, and whose surroundings, are alike.

    Either niches are found in these cells, or those of a ``reference`` are found again, with their names and colors.

    Parameters
    ----------
    adata
        Cells with an embedding and, unless ``smooth=0``, a spatial graph; or a MuData object. Several AnnData objects,
        as a list or a dictionary by name, are read as samples of one (see Notes).
    n_niches
        Number of niches. By default (``None``) it is chosen: every number of ``n_range`` is tried several times, and
        the largest one is taken with which the clusterings agree about as well as with the best (mean adjusted Rand
        index of all pairs at most 0.05 below the highest). Mixtures are compared between random halves of the cells,
        Leiden clusterings between seeds.
    reference
        Object whose niches, found by a mixture under ``key_added``, these cells are to be divided into. Both must be
        embedded by the same model: ``fimp.tl.embed(adata, model=fimp.tl.get_model(reference))``. Nothing is fitted:
        how niches were found (``n_niches`` to ``n_seeds``) is a matter of the reference.
    modality
        Name of the modality of a MuData object to read and to write to; of several that :func:`embed` read together,
        results are read from and written to the MuData object, whose graph and columns include those of these
        modalities. By default the MuData object if it holds ``use_rep``, else the modality that does.
    use_rep
        Representation in ``obsm``, ``(n_obs, n_features)``. By default that of the ``reference``, else ``"X_fimp"``.
    method
        ``"mixture"``
            a mixture of normal distributions of scikit-learn, the likeliest of 30 starts (of more than
            20,000 cells fewer, at least ``n_seeds``).
        ``"leiden"``
            Leiden clusters of scanpy's graph of nearest neighbors in the representation; the resolution that gives
            the number is searched by bisection. Needs igraph (``pip install igraph``).
    smooth
        Number of times that the representation of a cell is replaced by the mean over the cell and its neighbors in the
        spatial graph, whose edges all count alike. More makes larger, smoother niches; 0 needs no graph. By default 1
        for a mixture, and 0 for Leiden, whose clusters it would make stringy.
    n_components
        Number of leading principal components of the (averaged) representation that are clustered; ``None`` for all of
        it.
    covariance_type
        Covariances of the mixture: ``"tied"`` (one for all niches, which differ in their means), ``"full"`` (one for
        each niche), ``"diag"`` (diagonal) or ``"spherical"`` (one variance).
    n_range
        Smallest and largest number to try without ``n_niches``.
    n_seeds
        Number of clusterings of each number that are compared; at least 2.
    labels_key
        Column of ``obs``, for instance of cell types, that is counted in every niche.
    library_key
        Column of ``obs`` with samples; no edge of the graph may join two of them. By default that of the latest call,
        else none.
    connectivities_key
        Graph in ``obsp``, ``(n_obs, n_obs)``. By default that of the latest call, else ``"spatial_connectivities"``.
    key_added
        Name of the results in ``obs`` and ``uns``.
    random_state
        Seed of the clusterings. The order of cells does not matter.
    verbose
        Show a progress bar and lines of the log.
    overwrite
        Replace anything that is under the names of the results. If False, only earlier results of this function are
        replaced. Data that the call itself reads are never replaced.
    copy
        Return a copy with the results instead of writing to ``adata``; of several objects a list, or a dictionary.

    Returns
    -------
    ``None``, or the copy. Nothing is written when the call fails. Writes:

    - ``obs[key_added]``: categorical, ``"0"`` is the largest niche, ``"1"`` the next; or the names of the reference,
      as they are there now;
    - ``uns[f"{key_added}_colors"]``: colors that color-blind readers can tell apart, or those of the reference;
    - ``uns[key_added]``: ``n_niches``, parameters, seed, versions; without ``n_niches`` also ``stability``, a data
      frame of the numbers that were tried and their agreement; with ``labels_key`` also ``composition``, a data frame
      of the numbers of cells, labels x niches, without unlabeled cells; of a mixture ``mixture``, by which niches are
      found again in other cells;
    - with ``reference``, ``obsm[f"{key_added}_probabilities"]``: ``(n_obs, n_niches)`` float32, in the order of the
      categories; and ``obs[f"{key_added}_fit"]``: float32, from 0 to 1, the fraction of the cells of the reference that
      are less typical of its niches than this cell. Without, both are removed where an earlier call wrote them.

    Raises
    ------
    KeyError
        The representation, the graph or a column is missing.
    TypeError
        An argument is unknown or of another type.
    ValueError
        Values, graph or arguments cannot be used; the reference was embedded by another model, or its niches have no
        mixture; or ``key_added`` has a slash or names data that would be lost (see ``overwrite``).
    ImportError
        ``method="leiden"``, and igraph is missing.

    Warns
    -----
    UserWarning
        Many cells fit none of the niches of the reference.

    Notes
    -----
    Graph and samples that are not given (``None``) are those of the latest call of :mod:`fimp_sc.tl` whose results are
    in the object, also if it was written to a file since. A warning in the log says if fewer niches were found than
    asked for.

    Several objects are embedded by one model, together (``embed([a, b])``) or one by one. Niches are found in all cells
    at once, and have the same names and colors in each object. ``library_key`` tells samples within an object.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_communication(n_obs=400, n_genes=40)
    >>> fimp.tl.embed(adata, library_key="section", max_epochs=1, verbose=False)
    >>> fimp.tl.niches(adata, 3, verbose=False)
    >>> list(adata.obs["fimp_niche"].cat.categories)
    ['0', '1', '2']

    The same niches in another object that the same model embeds:

    >>> other = adata[:150].copy()
    >>> fimp.tl.embed(other, model=fimp.tl.get_model(adata), verbose=False)
    >>> fimp.tl.niches(other, reference=adata, verbose=False)
    >>> other.obsm["fimp_niche_probabilities"].shape
    (150, 3)
    """
    adata = opened(adata, copy)
    known = None if reference is None else Reference(reference, key_added, n_niches, smooth)
    if use_rep is None:
        use_rep = "X_fimp" if known is None else known.use_rep
    found_in = find_results(adata, modality, lambda held, names: use_rep in held.obsm)
    target: Any = found_in[0]
    if known is not None:
        known.check_other(target)
    modalities = found_in[1]
    # Columns and graph of several modalities may be those of one of them.
    study = as_whole(target) if modalities is None else resolve(target, modalities)
    nodes = study.nodes
    keys = {"library_key": library_key, "connectivities_key": connectivities_key}
    keys = inherit(study, keys, verbose=verbose)
    library_key, connectivities_key = keys["library_key"], str(keys["connectivities_key"])
    reads = {("obs", library_key): "library_key", ("obs", labels_key): "labels_key"}
    check_key(key_added, "tl.niches", target, reads, overwrite=overwrite)
    if smooth is None:
        smooth = int(method == "mixture") if known is None else known.smooth
    raw = read_representation(target, use_rep)
    if known is None and (raw == raw[0]).all():
        raise ValueError(f"adata.obsm[{use_rep!r}] is the same for all {len(raw):,} cells: there is nothing to divide.")
    if known is not None:
        known.check(target, raw.shape[1], use_rep)
    numbers = _numbers(n_niches, n_range, len(raw), halves=method == "mixture") if known is None else []
    labels = None if labels_key is None else _labels(nodes, labels_key)
    # In an order that values alone decide, so that random starts do not depend on the order of cells.
    order = np.lexsort(raw.T[::-1])
    values = smoothed(nodes, raw, order, smooth, connectivities_key, library_key)

    codes = np.empty(len(raw), dtype=np.int64)
    found: dict[str, Any] = {}
    mapped: dict[str, Any] = {}
    if known is not None:
        with user_messages(verbose=verbose):
            codes[order], mapped = known.find(values, order)
            logger.info(
                "%s cells divided into the %d niches of the reference, written to obs[%r].",
                f"{len(raw):,}", len(known.names), key_added,
            )  # fmt: skip
        names = known.names
    else:
        how = {"covariance_type": covariance_type, "n_seeds": int(n_seeds), "random_state": int(random_state)}
        with user_messages(verbose=verbose):
            axes = Axes(values, n_components)
            clusters, found = _clustered(axes.values, n_niches, numbers, method, how)
            model = found.pop("model", None)
            codes[order] = _by_size(clusters)
            if model is not None:
                found["mixture"] = stored_mixture(model, axes, codes[order], target.obs_names.to_numpy()[order])
                found["mixture"] |= made_by(target, use_rep)
            names = [str(i) for i in range(int(codes.max()) + 1)]
            asked = n_niches or most_stable(found["stability"])
            if len(names) != asked:
                logger.warning("Found %d niches instead of %d: the cells do not divide further.", len(names), asked)
            logger.info(
                "%d niches%s of %s cells: %s of obsm[%r] (%d columns%s), written to obs[%r].",
                len(names),
                f" (the largest stable number from {numbers[0]} to {numbers[-1]})" if "stability" in found else "",
                f"{len(raw):,}",
                "a mixture" if method == "mixture" else "Leiden clusters",
                use_rep,
                axes.values.shape[1],
                f", averaged over neighbors {smooth} x" if smooth else "",
                key_added,
            )
    column = pd.Series(pd.Categorical.from_codes(codes.tolist(), categories=names), index=target.obs_names)
    if labels is not None:
        table = pd.crosstab(labels.to_numpy(), column.to_numpy()).reindex(columns=names, fill_value=0)
        found["composition"] = table.rename_axis(index=labels_key, columns=None)

    params = {
        "use_rep": use_rep, "smooth": int(smooth), "labels_key": labels_key, "library_key": library_key,
        "connectivities_key": connectivities_key, "modality": modalities,
    }  # fmt: skip
    if known is None:
        params |= {
            "method": method, "n_components": n_components, "covariance_type": covariance_type,
            "n_range": list(map(int, n_range)), "n_seeds": int(n_seeds),
        }  # fmt: skip
    used = ("scikit-learn", "numpy") if method == "mixture" else ("scanpy", "igraph", "numpy")
    result = {
        "params": {key: value for key, value in params.items() if value is not None},
        "random_state": int(random_state),
        "n_niches": len(names),
        **new_record(target, "tl.niches", *used),
        **found,
    }
    with warnings.catch_warnings():
        # Writing to a view turns it into an object of its own, as anndata documents.
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        target.obs[key_added] = column
        target.uns[f"{key_added}_colors"] = palette(len(names)) if known is None else known.colors
        for slot, name in (("obs", f"{key_added}_fit"), ("obsm", f"{key_added}_probabilities")):
            if slot in mapped:
                getattr(target, slot)[name] = mapped[slot]
            elif name in getattr(target, slot):
                del getattr(target, slot)[name]
        target.uns[key_added] = result
    return adata if copy else None


def _clustered(
    values: NDArray[np.float64], n_niches: int | None, numbers: list[int], method: Method, how: dict[str, Any]
) -> tuple[NDArray[np.integer], dict[str, Any]]:
    """Return the cluster of each cell, and of what was found on the way ``stability``, ``resolution`` and ``model``."""
    found: dict[str, Any] = {}
    seeds = {name: how[name] for name in ("n_seeds", "random_state")}
    leiden = Leiden(values, how["random_state"]) if method == "leiden" else None
    if n_niches is None:
        clusterings = mixtures_of_halves(values, **how) if leiden is None else seeds_of_leiden(leiden, **seeds)
        found["stability"] = stability(clusterings, numbers)
        n_niches = most_stable(found["stability"])
    if leiden is None:
        found["model"] = fit_mixture(
            values, n_niches, covariance_type=how["covariance_type"],
            n_init=max(how["n_seeds"], min(recipe().niche_starts, recipe().cells_starts // len(values))),
            random_state=how["random_state"],
        )  # fmt: skip
        return found["model"].predict(values), found
    clusters, found["resolution"] = leiden.with_number(n_niches, how["random_state"])
    return clusters, found


def _numbers(n_niches: int | None, n_range: tuple[int, int], n_cells: int, *, halves: bool) -> list[int]:
    """Return the numbers of niches to try; those of a range are compared between ``halves`` of the cells."""
    if n_niches is not None:
        if n_niches > n_cells:
            raise ValueError(f"n_niches must be at most the number of cells, {n_cells:,}, found {n_niches}.")
        return [n_niches]
    low, high = n_range
    limit = n_cells // 2 if halves else n_cells
    if low > limit:
        needed = f"{2 * low:,} cells, {low:,} in each half of them" if halves else f"{low:,} cells"
        raise ValueError(
            f"{n_cells:,} cells are too few to choose a number of niches from n_range={n_range!r}, which takes "
            f"{needed}: pass n_niches=, or a smaller n_range."
        )
    return list(range(low, min(high, limit) + 1))


def _labels(adata: Any, key: str) -> pd.Series:
    if key not in adata.obs:
        raise missing_key(key, "adata.obs", adata.obs, "Name the column to count with labels_key=.")
    return label_text(get_obs(adata, [key])[key])


def _by_size(clusters: NDArray[np.integer]) -> NDArray[np.int64]:
    """Renumber clusters by size, the largest first; of equal ones that whose first cell comes first."""
    _, first, codes, counts = np.unique(clusters, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.lexsort([first, -counts])] = np.arange(len(counts))
    return rank[codes]
