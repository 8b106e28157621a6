from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

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
from fimp_sc.tl._statistics._gene_choice import (
    all_pairs,
    check_pairs,
    feature_values,
    most_variable,
    named_features,
    say_tests,
)
from fimp_sc.tl._statistics._gene_tests import gene_tests, plan_tests
from fimp_sc.tl._statistics._groups import (
    check_edges,
    group_columns,
    groups_of,
    places_of,
    read_domains,
    read_groups,
    say_left_out,
    warn_still,
)
from fimp_sc.tl._statistics._surroundings import N_GENES, alike, coordinates, surroundings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.data import ExpressionReader
    from fimp_sc.data._study import Study
    from fimp_sc.tl._call._inputs import Inputs
    from fimp_sc.tl._statistics._gene_tests import GeneTests, Plan

# Genes of which all pairs can be tested.
_MOST = 5000


@several
@checked
def gene_pairs(
    adata: AnnData | MuData | Sequence[AnnData] | Mapping[str, AnnData],
    groupby: str,
    *,
    genes: Sequence[str] | None = None,
    n_genes: int | None = 50,
    pairs: pd.DataFrame | None = None,
    domain_key: str | None = None,
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
    neighbors more than the groups of the cells, and the place in the tissue, explain.

    Parameters
    ----------
    adata
        Cells with expression and coordinates; or a MuData object, of which a modality with expression or features is
        read. Several AnnData objects, as a list or a dictionary by name, are read as samples of one (see Notes).
    groupby
        Column of ``obs`` with groups of cells, for instance their types. Cells without group (missing, or
        ``unlabeled_category``) are left out.
    genes
        Genes of which all pairs are tested, or those that ``pairs`` are restricted to. By default the ``n_genes`` that
        vary most, or all of ``pairs``.
    n_genes
        Number of genes to choose, if none are named; ``None`` for all, of panels of at most 5,000.
    pairs
        Pairs of genes to test instead of all, with their direction: the first in the source, the second in the
        destination. Columns are those of LIANA (``"ligand"`` and ``"receptor"``, or ``"ligand_complex"`` and
        ``"receptor_complex"``), CellPhoneDB (``"gene_a"`` and ``"gene_b"``), OmniPath (``"source_genesymbol"`` and
        ``"target_genesymbol"``, or ``"genesymbol_intercell_source"`` and ``"genesymbol_intercell_target"``), or
        ``"source"`` and ``"target"``. Names joined by ``_`` are a complex, whose expression is that of the gene with
        the least. Rows with a gene that is missing or not measured are left out, with a warning.
    domain_key
        Column of ``obs`` with known domains of the tissue, such as regions that somebody annotated: cells swap places
        within their domain only, and those without domain are left out. That finds more than the default, which knows
        no domains; but what varies *within* domains, such as a gradient, is found as well. A column of samples, or of
        one value, permutes all cells of a group. By default cells are compared with those of the same group around
        them (see Notes).
    n_permutations
        Number of permutations, at least 10. Time grows with permutations x cells x tests.
    min_edges
        Smallest number of edges of a pair of groups that is tested.
    min_support
        Smallest number of edges that are expected to join cells that express both genes, from the fractions of cells of
        the two groups that do. How much is not tested is told in the log; pairs that are asked for and tested nowhere
        are warned of.
    unlabeled_category
        Label of cells without group, or without domain.
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
      ``destination_group``, ``source_gene``, ``destination_gene``, ``correlation`` over edges (the effect size),
      ``score``, ``expected`` (mean score of permutations), ``z``, ``pvalue``, ``fdr`` (Benjamini-Hochberg over all
      rows), ``n_edges`` (between cells with expression, each once where pairs have no direction);
    - ``uns[key_added]``: ``n_tests``, ``n_untested`` (tests with less than ``min_support``), ``n_untested_groups``
      (pairs of groups with fewer than ``min_edges``), ``directed`` (whether pairs have a direction), ``genes`` (and
      complexes), parameters, seed, versions;
    - the graph in ``obsp`` and ``uns``, if it was built.

    Raises
    ------
    KeyError
        A key or a gene is missing, or ``pairs`` has other columns.
    TypeError
        ``groupby`` holds numbers that measure something, ``pairs`` is no data frame, or an argument is unknown or of
        another type.
    ValueError
        There is one group only or far too many, no cell has a domain, nothing can be tested, all pairs of more than
        5,000 genes would be, values or graph cannot be used, or ``key_added`` has a slash or names data that would be
        lost (see ``overwrite``).

    Warns
    -----
    UserWarning
        Genes or cells without values, cells without neighbors, control probes among the genes, or a graph that joins
        samples that lie over each other. A group whose name says that its cells have none. Pairs that name genes that
        are not there, or that too few neighbors express to be tested.

    Notes
    -----
    Let :math:`x` be the log-normalized values of both genes, centered within strata (cells of one group and sample, and
    of one domain with ``domain_key``), and :math:`k_{ij}` the number of sources of the group of :math:`j` that
    :math:`i` has. The score is :math:`\sum t_{ij} / \sqrt{\sum t_{ij}^2}` over edges, with
    :math:`t_{ij} = x_i x_j / k_{ij}`: the covariance of the gene in a cell and the mean of the other gene over its
    neighbors, divided by its own size so that few edges cannot decide alone. It is compared with scores after cells
    swapped places within strata; groups, edges and the expression in each stratum stay as they are.

    By default, from the values of each cell the mean is subtracted of the 12 cells of its stratum that have the most
    alike surroundings among the 30 nearest (of strata of fewer cells, two fifths of them). Surroundings are 10
    principal components of the 500 most variable genes, averaged twice over neighbors. Without coordinates, nearest are
    those with the most alike surroundings. Domains, borders and gradients over more than a few cells are thus no
    discoveries; where nothing like that exists, power is lost. Within a group, differences to shared cells are
    correlated in themselves; what follows from that is subtracted.

    Pairs of ``pairs`` are tested with their direction, from each group to each. Without, there is none: each pair of
    genes is tested once for each pair of groups, and both directions of an edge count together. Either way,
    associations do not tell which cell acts on which.

    p-values are one-sided and pool standardized permutations of all tests: (1 + b) / (1 + n), where b of n are at least
    as large. Where permutations do not vary (a gene that is constant within groups, groups of one cell), nothing can be
    told: ``z`` is 0, ``pvalue`` and ``fdr`` are 1.

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
    >>> planted = adata.uns["communication"]
    >>> {first["source_gene"], first["destination_gene"]} == {planted["ligand"], planted["receptor"]}
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
    with user_messages(verbose=verbose):
        features = named_features(names, genes, table)
        category = read_groups(study.nodes, groupby, unlabeled_category)
        domain = None if domain_key is None else read_domains(study.nodes, domain_key, unlabeled_category)
        work = working_copy(study, inputs)
        if domain is not None:
            domain = domain[places_of(study.nodes.obs_names, work.nodes.obs_names)]
        category = groups_of(category, study.nodes.obs_names, work.nodes.obs_names, groupby)
        tissue = _read(study, work, inputs)
        n_obs, n_groups = len(category), len(category.categories)
        n_variable = N_GENES if domain is None else 0
        if features is None:
            n_variable = max(n_variable, len(names) if n_genes is None else n_genes)
        variable = most_variable(tissue.source, n_obs, n_variable)
        if features is None:
            chosen = np.sort(variable[:n_genes])
            if not len(chosen):
                raise ValueError("Nothing to test: no gene varies between cells.")
            features = all_pairs(names[chosen], chosen)
        if features.wanted is None and len(features.names) > _MOST:
            raise ValueError(
                f"All pairs of {len(features.names):,} genes are too many to test: lower n_genes (50 by default), or "
                "name genes or pairs."
            )
        value = feature_values(tissue.source, features.members, n_obs)
        codes = measured_codes(category, tissue.source.absent)
        strata = tissue.library * n_groups + codes
        if domain is not None:
            codes = np.where(domain < 0, -1, codes)
            strata += domain * n_groups * (int(tissue.library.max()) + 1)
        strata = np.where(codes >= 0, strata, -1)
        check_edges(tissue.graph, codes, n_groups, min_edges)
        plan = plan_tests(
            tissue.graph, codes, n_groups, value != 0, features.wanted, min_edges=min_edges, min_support=min_support
        )
        if not len(plan.tests.pair):
            raise ValueError(
                f"Nothing to test: between no pair of groups are min_support={min_support:.15g} edges expected to "
                f"join cells that express two of the {len(features.names)} genes. Lower min_support, name other "
                "genes, or merge groups."
            )
        say_left_out(codes, "no group, no genes, or no domain" if domain_key else "no group, or no genes")
        say_tests(features, plan, min_edges=min_edges, min_support=min_support)
        compared = None
        if domain is None:
            profile = feature_values(tissue.source, [np.array([i]) for i in variable[:N_GENES]], n_obs)
            description = surroundings(profile, tissue.graph, strata)
            compared = alike(coordinates(work.nodes, inputs.spatial_key, description), description, strata)
        found = gene_tests(
            value, tissue.graph, codes, strata, n_groups, plan, compared=compared, n_permutations=n_permutations,
            random_state=random_state, verbose=verbose,
        )  # fmt: skip
        warn_still(found.result)
        result = inputs_record(
            inputs, target, "tl.gene_pairs", tissue.states, "scipy", "anndata", groupby=groupby,
            domain_key=domain_key, n_permutations=n_permutations, min_edges=min_edges, min_support=min_support,
        )  # fmt: skip
        result |= {
            "random_state": random_state,
            "pairs": _table(category.categories, np.asarray(features.names), plan, found),
            "genes": np.asarray(features.names, dtype=object),
            "directed": plan.directed,
            "n_tests": len(found.score),
            "n_untested": plan.n_few_cells,
            "n_untested_groups": plan.n_few_edges,
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


def _table(groups: pd.Index, genes: NDArray[Any], plan: Plan, found: GeneTests) -> pd.DataFrame:
    of = plan.tests
    table = pd.DataFrame(
        group_columns(groups, plan.pairs[of.pair])
        | {
            "source_gene": pd.Categorical.from_codes(of.source_gene.tolist(), categories=list(genes)),
            "destination_gene": pd.Categorical.from_codes(of.destination_gene.tolist(), categories=list(genes)),
            "correlation": found.correlation,
            "score": found.score,
        }
        | found.result._asdict()
        | {"n_edges": plan.n_edges[of.pair]}
    )
    table = table.sort_values(["pvalue", "z"], ascending=[True, False], kind="stable", ignore_index=True)
    table.index = table.index.astype(str)
    return table
