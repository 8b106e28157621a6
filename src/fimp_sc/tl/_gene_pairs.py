from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from fimp_sc._logging import user_messages
from fimp_sc._options import checked
from fimp_sc.data import NodeGraph
from fimp_sc.data._study import feature_names
from fimp_sc.data._warnings import warn_inputs
from fimp_sc.data.expression._reader import JoinedExpression
from fimp_sc.data.validate._checks import get_graph
from fimp_sc.model.predict._attention import measured_codes
from fimp_sc.model.registry._fields import X_KEY, registered_fields, table_states
from fimp_sc.model.registry._graph_data import table_reader
from fimp_sc.tl._call._inputs import check_results, choose, sample_codes, working_copy
from fimp_sc.tl._call._models import write_back
from fimp_sc.tl._call._results import inputs_record
from fimp_sc.tl._call._several import opened, several
from fimp_sc.tl._statistics._gene_choice import check_pairs, most_variable, named_genes, say_untested, wanted_pairs
from fimp_sc.tl._statistics._groups import check_edges, group_columns, groups_of, read_groups, say_left_out, warn_still
from fimp_sc.tl._statistics._significance import gene_tests, plan_tests

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.data import ExpressionReader
    from fimp_sc.data._study import Study
    from fimp_sc.tl._call._inputs import Inputs
    from fimp_sc.tl._statistics._significance import GeneTests, Plan

_CELLS = 4096


@several
@checked
def gene_pairs(
    adata: AnnData | MuData | Sequence[AnnData] | Mapping[str, AnnData],
    groupby: str,
    *,
    genes: Sequence[str] | None = None,
    n_genes: int = 50,
    pairs: pd.DataFrame | None = None,
    null: Literal["neighbors", "labels"] = "neighbors",
    n_permutations: int = 100,
    min_edges: int = 30,
    min_support: float = 10,
    unlabeled_category: str = "Unknown",
    modality: str | Sequence[str] | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    spatial_key: str | None = None,
    connectivities_key: str | None = None,
    input_scale: str | dict[str, str] | None = None,
    key_added: str = "fimp_gene_pairs",
    random_state: int = 0,
    verbose: bool = True,
    overwrite: bool = False,
    copy: bool = False,
) -> AnnData | MuData | list[AnnData] | dict[str, AnnData] | None:
    r"""Test pairs of genes between neighboring groups of cells, by permutation and without a model.

    A pair of genes is significant if the expression of one gene in a cell goes with the expression of the other in its
    neighbors more than in random pairs of cells of these groups.

    Parameters
    ----------
    adata
        Cells with expression and coordinates; or a MuData object, of which a modality with expression or features is
        read. Several AnnData objects, as a list or a dictionary by name, are read as samples of one (see Notes).
    groupby
        Column of ``obs`` with groups of cells, for instance their types. Cells without group (missing, or
        ``unlabeled_category``) are left out.
    genes
        Genes to test. By default those of ``pairs``, else the ``n_genes`` that vary most.
    n_genes
        Number of genes to choose, if none are named.
    pairs
        Pairs of genes to test instead of all, such as ligands and receptors: columns ``"source"`` and ``"target"``, or
        ``"ligand"`` and ``"receptor"``. Pairs with genes that are not measured are left out, with a warning in the log.
    null
        ``"neighbors"``: cells swap places with cells of the same group and sample. Groups, edges and the expression in
        each group stay as they are, and a pair is significant if its score exceeds that of random pairs of cells of
        these groups. ``"labels"``: group labels are permuted within samples, and a pair is significant if it
        distinguishes these groups from others, marker genes included.
    n_permutations
        Number of permutations, at least 10. Time grows with permutations x edges, and memory with permutations x tests
        (4 bytes each).
    min_edges
        Smallest number of edges of a pair of groups that is tested.
    min_support
        Smallest number of edges that are expected to join cells that express both genes, from the fractions of cells of
        the two groups that do. Pairs that are tested nowhere are named in the log.
    unlabeled_category
        Label of cells without group.
    modality
        Name of the modality of a MuData object to read and to write to. Several are read together: pairs may join genes
        of different tables, and results are written to the MuData object. By default the modality, or the several, of
        earlier results.
    layer
        Layer with expression; ``"X"`` for ``X``. By default that of the latest call (see Notes), else ``X``.
    library_key
        Column of ``obs`` with samples; no edge joins two of them. By default that of the latest call, else none.
    spatial_key
        Coordinates in ``obsm``, ``(n_obs, 2)`` or ``(n_obs, 3)``. By default that of the latest call, else
        ``"spatial"``.
    connectivities_key
        Graph in ``obsp``, ``(n_obs, n_obs)``, row = destination. If it is absent, a graph of the 6 nearest neighbors is
        built with :func:`fimp_sc.pp.spatial_graph`. By default that of the latest call, else
        ``"spatial_connectivities"``.
    input_scale
        Scale of the values: ``"counts"`` (whole numbers), ``"normalized"`` (without logarithm), ``"log"``
        (log-normalized), ``"real"`` (any numbers, used as they are), or ``"auto"``, which decides from the values; of
        several tables also a dictionary by modality. By default that of the latest call for the same layer, else
        ``"auto"``.
    key_added
        Name of the results in ``uns``.
    random_state
        Seed of permutations.
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

    - ``uns[key_added]["pairs"]``: data frame, a row for each test, most significant first: ``source_group``,
      ``destination_group``, ``source_gene``, ``destination_gene``, ``score``, ``expected`` (mean score of
      permutations), ``z``, ``pvalue``, ``fdr`` (Benjamini-Hochberg over all rows), ``n_edges`` (between cells with
      expression);
    - ``uns[key_added]``: ``n_tests``, ``genes``, parameters, seed, versions;
    - the graph in ``obsp`` and ``uns``, if it was built.

    Raises
    ------
    KeyError
        A key or a gene is missing.
    TypeError
        ``groupby`` holds numbers that measure something, ``pairs`` is no data frame, or an argument is unknown or of
        another type.
    ValueError
        There is one group only or far too many, nothing can be tested, values or graph cannot be used, or ``key_added``
        has a slash or names data that would be lost (see ``overwrite``).

    Warns
    -----
    UserWarning
        Genes or cells without values, cells without neighbors, control probes among the genes, or a graph that joins
        samples that lie over each other. A group whose name says that its cells have none.

    Notes
    -----
    With the log-normalized values :math:`x` of both genes, centered within group and sample (``null="labels"``: within
    sample), and the number :math:`k_{ij}` of sources of the group of :math:`j` that :math:`i` has, the score is
    :math:`\sum t_{ij} / \sqrt{\sum t_{ij}^2}` over edges, with :math:`t_{ij} = x_i x_j / k_{ij}`: the covariance of the
    gene in a cell and the mean of the other gene over its neighbors, divided by its own size so that few edges cannot
    decide alone.

    p-values are one-sided and pool standardized permutations of all tests: (1 + b) / (1 + n), where b of n are at least
    as large. Where permutations do not vary (a gene that is constant within groups, groups of one cell), nothing can be
    told: ``z`` is 0, ``pvalue`` and ``fdr`` are 1.

    Associations have no direction: they do not tell which cell acts on which, and every domain or gradient of the
    tissue makes neighbors alike.

    Keys that are not given (``None``) are those of the latest call of :mod:`fimp_sc.tl` whose results are in the
    object, also if it was written to a file since; a line of the log names them.

    Several objects are in memory; each is a sample, as is each value of ``library_key`` within it. Genes that an object
    does not have were not measured there. Pairs are tested in all cells at once, and the same table is written to each
    object.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_communication(n_obs=500, n_genes=40)
    >>> fimp.tl.gene_pairs(adata, "cell_type", library_key="section", verbose=False)
    >>> first = adata.uns["fimp_gene_pairs"]["pairs"].iloc[0]
    >>> (first["source_gene"], first["destination_gene"]) == (
    ...     adata.uns["communication"]["ligand"],
    ...     adata.uns["communication"]["receptor"],
    ... )
    True
    """
    adata = opened(adata, copy)
    study, inputs = choose(
        adata, modality, verbose=verbose, layer=layer, library_key=library_key, spatial_key=spatial_key,
        connectivities_key=connectivities_key, input_scale=input_scale, unlabeled_category=unlabeled_category,
        # Not read here: later calls take their keys from the record of this one.
        batch_key=None, center=None,
    )  # fmt: skip
    target = study.data
    check_results(key_added, "tl.gene_pairs", study, inputs, overwrite=overwrite)
    if not study.tables:
        raise ValueError("gene_pairs reads genes, and there are signals or images only: pass a modality of expression.")
    table = None if pairs is None else check_pairs(pairs)
    names = pd.Index(np.concatenate(feature_names(study.tables)))
    chosen = named_genes(names, genes, table)
    category = read_groups(study.nodes, groupby, unlabeled_category)
    with user_messages(verbose=verbose):
        work = working_copy(study, inputs)
        category = groups_of(category, study.nodes.obs_names, work.nodes.obs_names, groupby)
        tissue = _read(study, work, inputs)
        if chosen is None:
            chosen = list(names[most_variable(tissue.source, len(category), n_genes)])
            if not chosen:
                raise ValueError("Nothing to test: no gene varies between cells.")
        wanted, value = wanted_pairs(chosen, table), _values(tissue.source, names.get_indexer(chosen), len(category))
        codes, n_groups = measured_codes(category, tissue.source.absent), len(category.categories)
        check_edges(tissue.graph, codes, n_groups, min_edges)
        plan = plan_tests(
            tissue.graph, codes, n_groups, value != 0, wanted, min_edges=min_edges, min_support=min_support
        )
        if not len(plan.tests.pair):
            raise ValueError(
                f"Nothing to test: between no pair of groups are min_support={min_support:.15g} edges expected to "
                f"join cells that express two of the {len(chosen)} genes. Lower min_support, name other genes, or "
                "merge groups."
            )
        say_left_out(codes, "no group, or no genes")
        say_untested(chosen, wanted, plan.tests, asked=genes is not None or pairs is not None)
        found = gene_tests(
            value, tissue.graph, codes, tissue.library, n_groups, plan, null=null, n_permutations=n_permutations,
            random_state=random_state, verbose=verbose,
        )  # fmt: skip
        warn_still(found.result)
        result = inputs_record(
            inputs, target, "tl.gene_pairs", tissue.states, "scipy", "anndata", groupby=groupby, null=null,
            n_permutations=n_permutations, min_edges=min_edges, min_support=min_support,
        )  # fmt: skip
        result |= {
            "random_state": random_state,
            "pairs": _table(category.categories, np.asarray(chosen), plan, found),
            "genes": np.asarray(chosen, dtype=object),
            "n_tests": len(found.score),
        }
        with write_back(study, work, inputs, None):
            target.uns[key_added] = result
    return adata if copy else None


class _Tissue(NamedTuple):
    source: ExpressionReader | JoinedExpression
    graph: NodeGraph
    library: NDArray[np.int64]
    states: dict[str, dict[str, Any]]


def _read(study: Study, work: Study, inputs: Inputs) -> _Tissue:
    """Check what a model would check, and return the readers of expression and graph."""
    registered = {}
    for field in registered_fields(asdict(inputs)):
        if not field.is_empty:
            field.registered = work
            registered[field.registry_key] = field.register_field(work.data)
    nodes = work.nodes
    edges = get_graph(nodes, inputs.connectivities_key)
    warn_inputs(study, edges, library_key=inputs.library_key, spatial_key=inputs.spatial_key)
    sample = sample_codes(nodes, inputs.library_key or inputs.batch_key)
    states = table_states(registered[X_KEY])
    sources = [
        table_reader(table, inputs.layer, state, sample)
        for table, state in zip(work.tables, states.values(), strict=True)
    ]
    source = sources[0] if len(sources) == 1 else JoinedExpression(sources)
    return _Tissue(source, NodeGraph(edges, self_loops=False), sample_codes(nodes, inputs.library_key), states)


def _values(
    source: ExpressionReader | JoinedExpression, columns: NDArray[np.integer], n_obs: int
) -> NDArray[np.float32]:
    """Return ``(n_obs, len(columns))`` log-normalized values."""
    blocks = (np.arange(start, min(start + _CELLS, n_obs)) for start in range(0, n_obs, _CELLS))
    return np.concatenate([source.rows(nodes)[:, columns] for nodes in blocks])


def _table(groups: pd.Index, genes: NDArray[Any], plan: Plan, found: GeneTests) -> pd.DataFrame:
    of = plan.tests
    table = pd.DataFrame(
        group_columns(groups, plan.pairs[of.pair])
        | {
            "source_gene": pd.Categorical.from_codes(of.source_gene.tolist(), categories=list(genes)),
            "destination_gene": pd.Categorical.from_codes(of.destination_gene.tolist(), categories=list(genes)),
            "score": found.score,
        }
        | found.result._asdict()
        | {"n_edges": plan.n_edges[of.pair]}
    )
    table = table.sort_values(["pvalue", "z"], ascending=[True, False], kind="stable", ignore_index=True)
    table.index = table.index.astype(str)
    return table
