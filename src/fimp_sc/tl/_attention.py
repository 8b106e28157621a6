from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._logging import user_messages
from fimp_sc._options import checked
from fimp_sc.data._study import feature_names
from fimp_sc.data.storage._elements import get_obs, missing_key
from fimp_sc.data.validate._labels import warn_words
from fimp_sc.model.predict._attention import (
    attention_data,
    cell_groups,
    check_message_layer,
    edge_pairs,
    genes_with_tokens,
    measured_codes,
    tokens_of_genes,
)
from fimp_sc.tl._call._inputs import check_results, choose, copied, working_copy
from fimp_sc.tl._call._models import fitted_model, given_model, write_back
from fimp_sc.tl._call._results import finite_or_raise, record
from fimp_sc.tl._statistics._attention_genes import check_genes, check_pairs, choose_genes, say_untested
from fimp_sc.tl._statistics._significance import gene_tests, group_tests, plan_tests

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.model import FIMP
    from fimp_sc.pretrained import Foundation
    from fimp_sc.tl._statistics._significance import GeneTests, GroupTests, Plan

logger = logging.getLogger(__name__)


@checked
def attention(
    adata: AnnData | MuData,
    groupby: str,
    *,
    unlabeled_category: str = "Unknown",
    genes: Sequence[str] | None = None,
    n_genes: int = 50,
    pairs: pd.DataFrame | None = None,
    null: Literal["neighbors", "labels"] = "neighbors",
    statistic: Literal["covariance", "content", "attention"] = "covariance",
    n_permutations: int = 100,
    min_edges: int = 30,
    min_support: float = 10,
    influence_layer: int | None = None,
    modality: str | Sequence[str] | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = None,
    connectivities_key: str | None = None,
    input_scale: str | None = None,
    center: Literal["training", "batch"] | None = None,
    key_added: str = "fimp_attention",
    gene_embeddings: Any = None,
    foundation: Foundation | None = None,
    model: FIMP | str | Path | None = None,
    n_tokens: int | None = None,
    n_layers: int | None = None,
    max_epochs: int | None = None,
    accelerator: str = "auto",
    random_state: int = 0,
    verbose: bool = True,
    overwrite: bool = False,
    copy: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    train_kwargs: dict[str, Any] | None = None,
    inference_kwargs: dict[str, Any] | None = None,
) -> AnnData | MuData | None:
    r"""Read the attention between neighboring cells: which neighbors matter, and which genes go with which.

    Uses the model that :func:`embed`, :func:`annotate` or :func:`impute` trained on this object before, if nothing
    has changed, and trains one otherwise. What is found are associations between neighbors. They do not tell which
    cell acts on which, and every domain or gradient of the tissue makes neighbors alike.

    Parameters
    ----------
    adata
        Cells with expression and coordinates; see :func:`embed`.
    groupby
        Column of ``obs`` with groups of cells, for instance their types. Cells without group are left out: those that
        are missing (NaN) or ``unlabeled_category``.
    unlabeled_category
        What cells without group are called.
    genes
        Genes to look at; by default those of ``pairs``, else the ``n_genes`` that vary most. Genes whose value never
        is among the highest of a cell (its tokens, see ``n_tokens`` of :class:`fimp_sc.model.FIMP`) have no attention.
    n_genes
        How many genes to choose.
    pairs
        Pairs of genes to test instead of all, such as ligands and receptors: columns ``"source"`` and ``"target"``, or
        ``"ligand"`` and ``"receptor"``. Pairs with genes that are not measured, or that the model does not know, are
        left out, with a warning.
    null
        What attention is compared with. ``"neighbors"``: cells swap places with cells of the same group and sample.
        Groups, edges and the expression in each group stay as they are; what is lost is who is next to whom. It
        is significant what two random cells of these groups would not show. ``"labels"``: groups are dealt out anew to
        the cells of each sample. It is significant what distinguishes these groups from others, marker genes included.
    statistic
        What is tested of a pair of genes. ``"covariance"``: whether their values go together in neighbors, whatever
        the model attends to; attention then tells how much of it the model uses. ``"content"``: covariance weighted by
        attention. ``"attention"``: mean attention alone. See below; the first finds most.
    n_permutations
        Number of permutations, at least 10. Time grows with permutations x edges, and memory with permutations x tests
        (4 bytes each).
    min_edges
        Pairs of groups with fewer edges are not tested.
    min_support
        Pairs of genes are tested where so many edges are expected to join expressed tokens of both, from the shares
        of cells in the two groups that have them. Pairs that are tested nowhere are counted and said.
    influence_layer
        Message-passing layer, from 0, of which influence is read; the mean over layers by default.
    modality, layer, library_key, batch_key, spatial_key, connectivities_key, input_scale, center
        As in :func:`embed`.
    key_added
        Where to write in ``obsp`` and ``uns``.
    gene_embeddings, foundation, model
        As in :func:`embed`. A stack with ``aggregate="final"`` cannot be read.
    n_tokens, n_layers, max_epochs
        As in :func:`embed`, of a model that is trained now. One that was trained with another before is not used.
    random_state
        Seed of permutations, and of a model that is trained now.
    accelerator, verbose, overwrite, copy, model_kwargs, train_kwargs
        As in :func:`embed`.
    inference_kwargs
        ``batch_size``, the number of cells of a block; nothing else.

    Returns
    -------
    ``None``, or the copy. Writes, and nothing when the call fails:

    - ``obsp[key_added]``: ``(n_obs, n_obs)`` float32 CSR, row = destination, the edges of the graph without self-loops:
      the influence of each, :math:`\lVert W_O \, \mathrm{softmax}(q_i K_j^\top / \sqrt d) V_j \rVert`, length of its
      message to the summary token of the destination; see :meth:`fimp_sc.model.FIMP.get_edge_influence`.
    - ``uns[key_added]["groups"]``: data frame, a row for each pair of groups that has edges: ``source_group``,
      ``destination_group``, ``influence`` (mean over edges), ``n_edges``, and ``expected``, ``z``, ``pvalue``, ``fdr``
      with groups dealt out anew, whatever ``null``; NaN where there are fewer than ``min_edges``, or no edge at all in
      some permutation.
    - ``uns[key_added]["pairs"]``: data frame, a row for each test, most significant first: ``source_group``,
      ``destination_group``, ``source_gene``, ``destination_gene``, ``attention``, ``score``, ``expected`` (mean score
      of permutations), ``z``, ``pvalue``, ``fdr`` (Benjamini-Hochberg over all rows), ``n_edges`` (between cells with
      expression).
    - ``uns[key_added]``: ``n_tests``, ``genes``, parameters, seed, versions; and the graph if it was built.

    Raises
    ------
    KeyError
        When a key or a gene is missing.
    TypeError
        When ``groupby`` holds numbers that measure something, or ``pairs`` is no data frame.
    ValueError
        When there is one group only or far too many, nothing can be tested, the model reads no genes or passes no
        messages, or ``key_added`` has a slash or is the name of something that would be lost.

    All of these come before a model is trained.

    Notes
    -----
    Attention is that of the first layer, mean over heads, from the token of a gene in the destination to that of a
    gene in the source; 0 on edges where either is no token of its cell. ``attention`` is its mean over edges,
    :math:`a_{ij}`.

    With the log-normalized values :math:`x` of both genes, centered within group and sample (``null="labels"``: within
    sample), and the number :math:`k_{ij}` of sources of the group of :math:`j` that :math:`i` has, ``"covariance"`` is
    :math:`\sum t_{ij} / \sqrt{\sum t_{ij}^2}` over edges with :math:`t_{ij} = x_i x_j / k_{ij}`: the mean over
    neighbors that messages are, divided by its own size so that few edges cannot decide alone. ``"content"`` has
    :math:`t_{ij} = a_{ij} x_i x_j / k_{ij}`.

    p-values are one-sided and pool standardized permutations of all tests: (1 + b) / (1 + n), where b of n are at least
    as large. Where permutations do not vary (a gene that is constant within groups, groups of one cell), nothing can be
    told: ``z`` is 0, ``pvalue`` and ``fdr`` are 1. With ``null="neighbors"`` and ``"covariance"`` the permutations are
    exact: the model has no part in them. With attention they are nearly so, as a model has seen in training who is next
    to whom.

    On simulated tissues (:func:`fimp_sc.datasets.toy_communication`) attention between genes by itself often misses
    the planted pair, weighting by it costs power, and covariance alone ranks it first: attention starts out as
    likeness of tokens, and little of what masked expression teaches reaches it.
    """
    unknown = sorted(set(inference_kwargs or {}) - {"batch_size"})
    if unknown:
        raise ValueError(f"inference_kwargs takes 'batch_size' alone, found {', '.join(map(repr, unknown))}.")
    if not (model_kwargs or {}).get("messages", True):
        raise ValueError("model_kwargs has messages=False: without messages there is no attention between cells.")
    adata = copied(adata) if copy else adata
    model = given_model(model, accelerator, verbose=verbose)
    study, inputs = choose(
        adata, modality, verbose=verbose, model=model, layer=layer, library_key=library_key, batch_key=batch_key,
        spatial_key=spatial_key, connectivities_key=connectivities_key, input_scale=input_scale,
        center=center,
        unlabeled_category=unlabeled_category,
    )  # fmt: skip
    target = study.data
    check_results(key_added, "tl.attention", study, inputs, overwrite=overwrite)
    if not study.tables:
        raise ValueError("attention reads genes, and there are signals or images only: pass a modality of expression.")
    table = None if pairs is None else check_pairs(pairs)
    names = np.concatenate(feature_names(study.tables))
    check_genes(pd.Index(names), "adata.var_names", genes, table)
    nodes = study.nodes
    category = _groups(nodes, groupby, unlabeled_category)
    batch_size = (inference_kwargs or {}).get("batch_size")
    with user_messages(verbose=verbose):
        work = working_copy(study, inputs)
        there = work.nodes.obs_names
        if not nodes.obs_names.equals(there):
            category = _at_least_two(category[nodes.obs_names.get_indexer(there)], groupby)
        least: dict[str, Any] = {"min_edges": min_edges, "min_support": min_support}
        plans: list[tuple[list[str], Plan]] = []

        def check(model: FIMP) -> None:
            check_message_layer(model, influence_layer)
            plans.append(_planned(model, category, genes, n_genes, table, **least))

        fitted = fitted_model(
            study, work, inputs, model=model, reuse=True, max_epochs=max_epochs, accelerator=accelerator,
            random_state=random_state, same_seed=False, verbose=verbose, model_kwargs=model_kwargs,
            train_kwargs=train_kwargs, gene_embeddings=gene_embeddings, foundation=foundation,
            check=check,
            n_tokens=n_tokens, n_layers=n_layers,
        )  # fmt: skip
        if not plans:
            check(fitted)
        chosen, plan = plans[0]
        n_groups, names = len(category.categories), np.asarray(category.categories)
        influence = fitted.get_edge_influence(layer=influence_layer, batch_size=batch_size)
        finite_or_raise(influence.data, "influence of edges")
        data = attention_data(fitted, None)
        how: dict[str, Any] = {"n_permutations": n_permutations, "random_state": random_state}
        by_group = group_tests(
            influence, np.asarray(category.codes, dtype=np.int64), data.library, n_groups, min_edges=min_edges,
            verbose=verbose, **how,
        )  # fmt: skip
        by_gene = gene_tests(
            tokens_of_genes(fitted, data, chosen), data.graph, measured_codes(data, category), data.library, n_groups,
            plan, null=null, statistic=statistic, batch_size=None, verbose=verbose, **how,
        )  # fmt: skip
        if not by_gene.result.z.any():
            logger.warning(
                "No permutation differs from what was found, so that nothing can be told (all p-values are 1): "
                "cells of one group and sample are all alike, or there is one of each."
            )
        result = record(
            fitted, inputs, target, "tl.attention", groupby=groupby, null=null, statistic=statistic, **least, **how,
        )  # fmt: skip
        result |= {
            "groups": _group_table(names, by_group), "pairs": _pair_table(names, np.asarray(chosen), plan, by_gene),
            "genes": np.asarray(chosen, dtype=object), "n_tests": len(by_gene.score),
        }  # fmt: skip
        with write_back(study, work, inputs, fitted):
            target.obsp[key_added] = _placed_edges(influence, work.nodes.obs_names, target.obs_names)
            target.uns[key_added] = result
    return adata if copy else None


def _groups(nodes: AnnData, groupby: str, unlabeled_category: str) -> pd.Categorical:
    if groupby not in nodes.obs:
        raise missing_key(groupby, "adata.obs", nodes.obs, "Name the groups of cells, for instance their types.")
    column = get_obs(nodes, [groupby])[groupby]
    groups = _at_least_two(cell_groups(column, f"adata.obs[{groupby!r}]", unlabeled_category), groupby)
    warn_words(nodes, groupby, unlabeled_category, "each is a group")
    return groups


def _at_least_two(category: pd.Categorical, groupby: str) -> pd.Categorical:
    category = category.remove_unused_categories()
    if len(category.categories) < 2:
        found = f"one group only, {category.categories[0]!r}" if len(category.categories) else "no group"
        n_missing = int((category.codes < 0).sum())
        raise ValueError(
            f"adata.obs[{groupby!r}] has {found}, and {n_missing:,} of {len(category):,} cells without one: attention "
            "is read for pairs of groups, which takes two."
        )
    return category


def _planned(
    model: FIMP,
    category: pd.Categorical,
    genes: Sequence[str] | None,
    n_genes: int,
    pairs: pd.DataFrame | None,
    *,
    min_edges: int,
    min_support: float,
) -> tuple[list[str], Plan]:
    """Return genes to look at and what to test of them, by a model that need not be trained.

    Which genes are tokens of a cell depends on the order of its values alone.
    """
    data = attention_data(model, None, untrained=True)
    chosen, wanted = choose_genes(model, data, genes, n_genes, pairs)
    codes = measured_codes(data, category)
    plan = plan_tests(
        data.graph, codes, len(category.categories), genes_with_tokens(model, data, chosen), wanted,
        min_edges=min_edges, min_support=min_support,
    )  # fmt: skip
    if not len(plan.pairs):
        n_edges = len(edge_pairs(data.graph, codes, 1)[0])
        raise ValueError(
            f"Nothing to test: no pair of {len(category.categories)} groups has min_edges={min_edges} edges, of "
            f"{n_edges:,} that join cells with a group. Merge groups, lower min_edges, or look at the graph."
        )
    if not len(plan.tests.pair):
        raise ValueError(
            f"Nothing to test: between no pair of groups are min_support={min_support:.15g} edges expected to join "
            f"tokens of two of the {len(chosen)} genes. Lower min_support, name other genes, merge groups, or raise "
            "n_tokens."
        )
    n_missing = int((codes < 0).sum())
    if n_missing:
        logger.info("%s of %s cells have no group, or no genes, and are left out.", f"{n_missing:,}", f"{len(codes):,}")
    say_untested(chosen, wanted, plan.tests, asked=genes is not None or pairs is not None)
    return chosen, plan


def _group_table(names: NDArray[Any], tests: GroupTests) -> pd.DataFrame:
    columns = {"influence": tests.influence, "n_edges": tests.n_edges, **tests.result._asdict()}
    return pd.DataFrame(_named(names, tests.pair) | columns)


def _pair_table(names: NDArray[Any], genes: NDArray[Any], plan: Plan, tests: GeneTests) -> pd.DataFrame:
    columns = {"attention": tests.attention.astype(np.float32), "score": tests.score, **tests.result._asdict()}
    of = plan.tests
    table = pd.DataFrame(
        _named(names, plan.pairs[of.pair])
        | {
            "source_gene": pd.Categorical.from_codes(of.source_gene.tolist(), categories=list(genes)),
            "destination_gene": pd.Categorical.from_codes(of.destination_gene.tolist(), categories=list(genes)),
        }
        | columns
        | {"n_edges": plan.n_edges[of.pair]}
    )
    table = table.sort_values(["pvalue", "z"], ascending=[True, False], kind="stable", ignore_index=True)
    table.index = table.index.astype(str)
    return table


def _named(names: NDArray[Any], pair: NDArray[np.int64]) -> dict[str, pd.Categorical]:
    source, destination = np.divmod(pair, len(names))
    return {
        "source_group": pd.Categorical.from_codes(source.tolist(), categories=list(names)),
        "destination_group": pd.Categorical.from_codes(destination.tolist(), categories=list(names)),
    }


def _placed_edges(edges: sparse.csr_matrix, nodes: pd.Index, wanted: pd.Index) -> sparse.csr_matrix:
    """Return edges between ``nodes`` as edges between the nodes of the object, which may have others too."""
    if nodes.equals(wanted):
        return edges
    place, coo = wanted.get_indexer(nodes), edges.tocoo()
    return sparse.csr_matrix((coo.data, (place[coo.row], place[coo.col])), shape=(len(wanted), len(wanted)))
