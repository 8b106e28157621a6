from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._logging import user_messages
from fimp_sc._options import checked
from fimp_sc.data._access import get_obs, missing_key
from fimp_sc.data._checks import check_key_added
from fimp_sc.data._parts import nodes_of, parts_of
from fimp_sc.tl._attention_genes import check_pairs, choose_genes
from fimp_sc.tl._inputs import choose, copied, working_copy
from fimp_sc.tl._models import fitted_model, write_back
from fimp_sc.tl._results import finite_or_raise, record
from fimp_sc.tl._significance import gene_tests, group_tests

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.model import FIMP
    from fimp_sc.tl._significance import GeneTests, Significance


@checked
def attention(
    adata: AnnData | MuData,
    groupby: str,
    *,
    genes: Sequence[str] | None = None,
    n_genes: int = 50,
    pairs: pd.DataFrame | None = None,
    null: Literal["neighbours", "labels"] = "neighbours",
    statistic: Literal["covariance", "content", "attention"] = "covariance",
    n_permutations: int = 100,
    min_edges: int = 30,
    min_support: float = 10,
    influence_layer: int | None = None,
    modality: str | Sequence[str] | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str = "spatial",
    connectivities_key: str = "spatial_connectivities",
    input_scale: str = "auto",
    key_added: str = "fimp_attention",
    gene_embeddings: Any = None,
    foundation: Literal["scgpt"] | None = None,
    checkpoint: str | Path | None = None,
    model: FIMP | str | Path | None = None,
    n_tokens: int | None = None,
    n_layers: int | None = None,
    max_epochs: int | None = None,
    accelerator: str = "auto",
    random_state: int = 0,
    verbose: bool = True,
    copy: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    train_kwargs: dict[str, Any] | None = None,
    inference_kwargs: dict[str, Any] | None = None,
) -> AnnData | MuData | None:
    r"""Read the attention between neighbouring cells: which neighbours matter, and which genes go with which.

    Uses the model that :func:`embed`, :func:`annotate` or :func:`impute` trained on this object before, if nothing
    has changed, and trains one otherwise. What is found are associations between neighbours. They do not tell which
    cell acts on which, and every domain or gradient of the tissue makes neighbours alike.

    Parameters
    ----------
    adata
        Cells with expression and coordinates; see :func:`embed`.
    groupby
        Column of ``obs`` with groups of cells, for instance their types. Cells without group are left out.
    genes
        Genes to look at; by default those of ``pairs``, else the ``n_genes`` that vary most. Genes whose value never
        is among the highest of a cell (its tokens, see ``n_tokens`` of :class:`fimp_sc.model.FIMP`) have no attention.
    n_genes
        How many genes to choose.
    pairs
        Pairs of genes to test instead of all, such as ligands and receptors: columns ``"source"`` and ``"target"``, or
        ``"ligand"`` and ``"receptor"``. Genes that the model does not know are left out, with a warning.
    null
        What attention is compared with. ``"neighbours"``: cells swap places with cells of the same group and sample.
        Groups, edges and the expression in each group stay as they are; what is lost is who is next to whom. It
        is significant what two random cells of these groups would not show. ``"labels"``: groups are dealt out anew to
        the cells of each sample. It is significant what distinguishes these groups from others, marker genes included.
    statistic
        What is tested of a pair of genes. ``"covariance"``: whether their values go together in neighbours, whatever
        the model attends to; attention then tells how much of it the model uses. ``"content"``: covariance weighted by
        attention. ``"attention"``: mean attention alone. See below; the first finds most.
    n_permutations
        Number of permutations, at least 10. Time grows with permutations x edges.
    min_edges
        Pairs of groups with fewer edges are not tested.
    min_support
        Pairs of genes are tested where so many edges are expected to join expressed tokens of both, from the shares
        of cells in the two groups that have them.
    influence_layer
        Message-passing layer, from 0, of which influence is read; the mean over layers by default.
    modality, layer, library_key, batch_key, spatial_key, connectivities_key, input_scale
        As in :func:`embed`.
    key_added
        Where to write in ``obsp`` and ``uns``.
    gene_embeddings, foundation, checkpoint, model
        As in :func:`embed`. A stack with ``aggregate="final"`` cannot be read.
    n_tokens, n_layers, max_epochs
        As in :func:`embed`, of a model that is trained now. One that was trained with another before is not used.
    random_state
        Seed of permutations, and of a model that is trained now.
    accelerator, verbose, copy, model_kwargs, train_kwargs
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
      with groups dealt out anew, whatever ``null``; NaN where there are fewer than ``min_edges``.
    - ``uns[key_added]["pairs"]``: data frame, a row for each test, most significant first: ``source_group``,
      ``destination_group``, ``source_gene``, ``destination_gene``, ``attention``, ``score``, ``expected`` (mean score
      of permutations), ``z``, ``pvalue``, ``fdr`` (Benjamini-Hochberg over all rows), ``n_edges``.
    - ``uns[key_added]``: ``n_tests``, ``genes``, parameters, seed, versions; and the graph if it was built.

    Raises
    ------
    KeyError
        When a key or a gene is missing.
    ValueError
        When there is one group only, nothing can be tested, the model reads no genes or passes no messages, or
        ``key_added`` has a slash.

    Notes
    -----
    Attention is that of the first layer, mean over heads, from the token of a gene in the destination to that of a
    gene in the source; 0 on edges where either is no token of its cell. ``attention`` is its mean over edges,
    :math:`a_{ij}`.

    With the log-normalised values :math:`x` of both genes, centred within group and sample (``null="labels"``: within
    sample), and the number :math:`k_{ij}` of sources of the group of :math:`j` that :math:`i` has, ``"covariance"`` is
    :math:`\sum t_{ij} / \sqrt{\sum t_{ij}^2}` over edges with :math:`t_{ij} = x_i x_j / k_{ij}`: the mean over
    neighbours that messages are, divided by its own size so that few edges cannot decide alone. ``"content"`` has
    :math:`t_{ij} = a_{ij} x_i x_j / k_{ij}`.

    p-values are one-sided and pool standardised permutations of all tests. With ``null="neighbours"`` and
    ``"covariance"`` the permutations are exact: the model has no part in them. With attention they are nearly so, as a
    model has seen in training who is next to whom.

    On simulated tissues (:func:`fimp_sc.datasets.toy_communication`) attention between genes by itself often misses
    the planted pair, weighting by it costs power, and covariance alone ranks it first: attention starts out as
    likeness of tokens, and little of what masked expression teaches reaches it.
    """
    check_key_added(key_added)
    unknown = sorted(set(inference_kwargs or {}) - {"batch_size"})
    if unknown:
        raise ValueError(f"inference_kwargs takes 'batch_size' alone, found {', '.join(map(repr, unknown))}.")
    if not (model_kwargs or {}).get("messages", True):
        raise ValueError("model_kwargs has messages=False: without messages there is no attention between cells.")
    adata = copied(adata) if copy else adata
    target, inputs = choose(
        adata, modality, layer=layer, library_key=library_key, batch_key=batch_key, spatial_key=spatial_key,
        connectivities_key=connectivities_key, input_scale=input_scale,
    )  # fmt: skip
    if all(part.is_sequence for part in parts_of(target, inputs.modality)):
        raise ValueError("attention reads genes, and there are signals or images only: pass a modality of expression.")
    table = None if pairs is None else check_pairs(pairs)
    _groups(nodes_of(target, inputs.modality), groupby)
    batch_size = (inference_kwargs or {}).get("batch_size")
    with user_messages(verbose=verbose):
        work = working_copy(target, inputs)
        fitted = fitted_model(
            target, work, inputs, model=model, reuse=True, max_epochs=max_epochs, accelerator=accelerator,
            random_state=random_state, same_seed=False, verbose=verbose, model_kwargs=model_kwargs,
            train_kwargs=train_kwargs, gene_embeddings=gene_embeddings, foundation=foundation, checkpoint=checkpoint,
            n_tokens=n_tokens, n_layers=n_layers,
        )  # fmt: skip
        nodes = nodes_of(target, inputs.modality)
        nodes = nodes if nodes.obs_names.equals(work.obs_names) else nodes[work.obs_names]
        category = _groups(nodes, groupby)
        codes, names = np.asarray(category.codes, dtype=np.int64), np.asarray(category.categories.astype(str))
        data = fitted._attention_data(None)
        chosen, wanted = choose_genes(fitted, data, genes, n_genes, table)
        influence = fitted.get_edge_influence(layer=influence_layer, batch_size=batch_size)
        finite_or_raise(influence.data, "influence of edges")
        how: dict[str, Any] = {
            "n_permutations": n_permutations, "min_edges": min_edges, "random_state": random_state,
        }  # fmt: skip
        by_group = group_tests(partial(_means, influence, n_groups=len(names)), codes, data.library, **how)
        by_gene = gene_tests(
            fitted._gene_tokens(data, chosen), data.graph, codes, data.library, len(names), wanted, null=null,
            statistic=statistic, min_support=min_support, batch_size=None, **how,
        )  # fmt: skip
        if not len(by_gene.pair):
            raise ValueError(
                f"Nothing to test: no pair of groups has min_edges={min_edges} edges, {min_support} of which would "
                f"join two of the {len(chosen)} genes as tokens. Name others, merge groups, or raise n_tokens, for "
                "instance to 64."
            )
        result = record(fitted, inputs, groupby=groupby, null=null, statistic=statistic, min_support=min_support, **how)
        result |= {
            "groups": _group_table(names, *by_group), "pairs": _pair_table(names, np.asarray(chosen), by_gene),
            "genes": np.asarray(chosen, dtype=object), "n_tests": len(by_gene.pair),
        }  # fmt: skip
        with write_back(target, work, inputs, fitted):
            target.obsp[key_added] = _placed_edges(influence, work.obs_names, target.obs_names)
            target.uns[key_added] = result
    return adata if copy else None


def _groups(nodes: AnnData, groupby: str) -> pd.Categorical:
    if groupby not in nodes.obs:
        raise missing_key(groupby, "adata.obs", nodes.obs, "Name the groups of cells, for instance their types.")
    category = pd.Categorical(get_obs(nodes, [groupby])[groupby]).remove_unused_categories()
    if len(category.categories) < 2:
        raise ValueError(
            f"adata.obs[{groupby!r}] has one group only, {list(category.categories)}: attention is read for pairs of "
            "groups, which takes two."
        )
    return category


def _means(
    influence: sparse.csr_matrix, codes: NDArray[np.int64], n_groups: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return mean influence and number of edges of each pair of groups: source group x ``n_groups`` + destination."""
    source, destination = codes[influence.indices], np.repeat(codes, np.diff(influence.indptr))
    kept = (source >= 0) & (destination >= 0)
    pair = source[kept] * n_groups + destination[kept]
    n_edges = np.bincount(pair, minlength=n_groups**2)
    total = np.bincount(pair, influence.data[kept], minlength=n_groups**2)
    return total / np.where(n_edges, n_edges, np.nan), n_edges


def _group_table(
    names: NDArray[Any], mean: NDArray[np.float64], n_edges: NDArray[np.int64], result: Significance
) -> pd.DataFrame:
    rows = np.flatnonzero(n_edges)
    columns = {"influence": mean, "n_edges": n_edges, **result._asdict()}
    return pd.DataFrame(_named(names, rows) | {name: value[rows] for name, value in columns.items()})


def _pair_table(names: NDArray[Any], genes: NDArray[Any], tests: GeneTests) -> pd.DataFrame:
    columns = {"attention": tests.attention.astype(np.float32), "score": tests.score, **tests.result._asdict()}
    table = pd.DataFrame(
        _named(names, tests.pair)
        | {
            "source_gene": pd.Categorical.from_codes(tests.source_gene.tolist(), categories=list(genes)),
            "destination_gene": pd.Categorical.from_codes(tests.destination_gene.tolist(), categories=list(genes)),
        }
        | columns
        | {"n_edges": tests.n_edges}
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
