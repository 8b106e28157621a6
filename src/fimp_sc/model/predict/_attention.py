"""Attention of a model as arrays: influence of neighbors, and attention between genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from lightning.fabric.utilities import move_data_to_device
from scipy import sparse

from fimp_sc._options import checked
from fimp_sc.data import BlockDataset, BlockSampler, NodeGraph
from fimp_sc.data.storage._elements import label_text, shorten
from fimp_sc.model.predict._gene_pairs import gene_tokens, pair_sums
from fimp_sc.model.registry._graph_data import graph_data, study_of
from fimp_sc.nn._read_attention import recorded_influence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.data import ExpressionReader, GraphData
    from fimp_sc.data.expression._reader import JoinedExpression
    from fimp_sc.model._fimp import FIMP

_BLOCK = 256
# So many groups are never too many; of more, each should have about so many cells.
_GROUPS, _CELLS_PER_GROUP = 100, 10


@checked
def get_edge_influence(
    model: FIMP, adata: AnnData | MuData | None = None, *, layer: int | None = None, batch_size: int | None = None
) -> sparse.csr_matrix:
    r"""Return how large the message of each edge is.

    The rows of attention sum to one, so that attention itself cannot tell which neighbor matters. The influence of
    node :math:`j` on node :math:`i` in one layer is the length of what its message adds to the summary token of
    :math:`i`, over all heads together and before the mean over neighbors,
    :math:`w_{ij} \lVert W_O \, \mathrm{softmax}(q_i K_j^\top / \sqrt d) V_j \rVert`. The weight of an edge is 1
    unless the model uses those of the graph. Of a foundation model whose embedding is a mean of tokens, messages are
    averaged over these first.

    Parameters
    ----------
    adata
        Object to read; that of training by default. It may have other genes, and needs a graph.
    layer
        Which message-passing layer, from 0; the mean over layers by default.
    batch_size
        Destinations per block, by default 256. It changes speed and memory, not the result.

    Returns
    -------
    ``(n_obs, n_obs)`` float32 CSR, row = destination: the edges of the graph, without self-loops.

    Raises
    ------
    RuntimeError
        The model is not trained, and no foundation model.
    ValueError
        There is no such layer, the model reads no genes or passes no messages, or edges run the whole stack of a
        foundation model (``aggregate="final"``).

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> influence = model.get_edge_influence()
    >>> influence.shape, bool(influence.nnz == adata.obsp["spatial_connectivities"].nnz)
    ((200, 200), True)
    """
    network = model.module.network
    check_message_layer(model, layer)
    data = attention_data(model, adata)
    csr = data.graph.csr
    row = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    real = csr.indices != row
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row[real], minlength=csr.shape[0]))])
    out = np.zeros(int(indptr[-1]), dtype=np.float32)
    dataset = BlockDataset(data, n_layers=model.n_layers, n_tokens=model.n_tokens)
    sampler = BlockSampler(data, np.arange(csr.shape[0]), batch_size=batch_size or _BLOCK)
    for item in sampler:
        batch = move_data_to_device(dataset[item], model.module.device)
        with torch.inference_mode(), recorded_influence(network, len(batch["nodes"]), len(item.nodes)) as found:
            network.states(batch, network.n_queries(batch))
        value = torch.stack(found).mean(0) if layer is None else found[layer]
        start, degree = indptr[item.nodes], np.diff(indptr)[item.nodes]
        within = np.arange(degree.sum()) - np.repeat(np.cumsum(degree) - degree, degree)
        out[np.repeat(start, degree) + within] = value.float().cpu().numpy()
    return sparse.csr_matrix((out, csr.indices[real], indptr), shape=csr.shape)


@checked
def get_gene_attention(
    model: FIMP,
    groups: Sequence[Any] | pd.Series,
    adata: AnnData | MuData | None = None,
    *,
    genes: Sequence[str],
    batch_size: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    """Return the mean attention between genes over the edges of each pair of groups.

    This is the attention of the first layer, where tokens are genes and nothing else, mean over heads, from the
    token of a gene in the destination to the token of a gene in the source; 0 on edges where one of the two is
    no token of its cell.

    Parameters
    ----------
    groups
        ``(n_obs,)`` group of each node, missing for nodes to leave out. A series whose index has the names of the
        nodes in another order is brought into theirs. Nodes without expression are left out, too.
    adata
        Object to read; that of training by default. It may have other genes, and needs a graph.
    genes
        Genes that the model knows, names as in :attr:`genes`, once each.
    batch_size
        Edges at once; by default what fits into memory. It changes speed and memory, not the result.

    Returns
    -------
    attention
        ``(n_groups, n_groups, n_genes, n_genes)`` float32: source group, destination group, source gene,
        destination gene; NaN for pairs of groups without edges.
    n_edges
        ``(n_groups, n_groups)`` int64, source group x destination group.
    groups
        Names.

    Raises
    ------
    KeyError
        The model does not know a gene.
    RuntimeError
        The model is not trained, and no foundation model.
    TypeError
        ``groups`` are real numbers.
    ValueError
        The model reads no genes or passes no messages, or ``groups`` has another length or far too many groups, or a
        gene is there twice.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> genes = model.genes[:3].tolist()
    >>> attention, n_edges, groups = model.get_gene_attention(adata.obs["cell_type"], genes=genes)
    >>> attention.shape == (len(groups), len(groups), 3, 3)
    True
    """
    data = attention_data(model, adata)
    names, source = pd.Index(data.names), cast("ExpressionReader | JoinedExpression", data.expression)
    column = groups if isinstance(groups, pd.Series) else pd.Series(list(groups))
    if len(column) != len(names):
        raise ValueError(f"groups must have one entry per node, {len(names)}: found {len(column)}.")
    if not column.index.equals(names) and column.index.is_unique and names.isin(column.index).all():
        column = column.loc[names]
    if len(set(map(str, genes))) < len(genes):
        raise ValueError(f"genes has a gene more than once: {shorten(sorted(map(str, genes)))}.")
    category = cell_groups(column, "groups")
    tokens = gene_tokens(model.module, data, model.n_tokens, gene_columns(model, genes))
    n_groups = len(category.categories)
    to, of, pair = edge_pairs(data.graph, measured_codes(category, source.absent), n_groups)
    n_edges = np.bincount(pair, minlength=n_groups**2)
    divisor = np.where(n_edges, n_edges, np.nan)[:, None, None]
    mean = np.empty((n_groups**2, len(genes), len(genes)), dtype=np.float32)
    for pairs, sums in pair_sums(tokens, to, of, pair, n_groups**2, batch_size=batch_size):
        here = slice(pairs.start, pairs.stop)
        mean[here] = (sums / divisor[here]).transpose(0, 2, 1)
    shape = (n_groups, n_groups, len(genes), len(genes))
    return mean.reshape(shape), n_edges.reshape(n_groups, n_groups), [str(name) for name in category.categories]


def check_message_layer(model: FIMP, layer: int | None) -> None:
    n_layers = len(model.module.network.message_layers())
    if layer is not None and not 0 <= layer < n_layers:
        raise ValueError(f"layer must be from 0 to {n_layers - 1}, found {layer}.")


def check_messages(model: FIMP) -> None:
    """Raise a ValueError where a model has no attention over edges to read."""
    model.module.network.message_layers()
    if not model.messages:
        raise ValueError(
            "This model passes no messages (messages=False), as every model of cells without neighbors, and has no "
            "attention between cells."
        )


def attention_data(model: FIMP, adata: AnnData | MuData | None) -> GraphData:
    if model.foundation is None:  # type: ignore[attr-defined]
        model._check_if_trained(warn=False)
    check_messages(model)
    data = graph_data(model, study_of(model, adata))
    if data.expression is None:
        raise ValueError("This model reads no expression: attention between cells is read for genes only.")
    model.module.eval()
    return data


def gene_columns(model: FIMP, genes: Sequence[str]) -> NDArray[np.int64]:
    columns = pd.Index(model.genes.astype(str)).get_indexer(pd.Index([str(gene) for gene in genes]))
    if (columns < 0).any():
        unknown = [repr(str(gene)) for gene, column in zip(genes, columns, strict=True) if column < 0]
        raise KeyError(f"Not among the {len(model.genes)} genes of the model: {shorten(unknown)}.")
    return columns.astype(np.int64)


def cell_groups(column: pd.Series, where: str, unlabeled_category: str | None = None) -> pd.Categorical:
    """Return groups of cells as text, in the order of their categories; missing where a cell has none.

    Parameters
    ----------
    column
        One entry per cell.
    where
        Where it was found, for messages.
    unlabeled_category
        What cells without group are called, besides missing ones.

    Raises
    ------
    TypeError
        They are real numbers, or so many whole ones that they measure something.
    ValueError
        There are far too many for pairs of groups to have edges.
    """
    text, names = label_text(column), label_text(pd.Series(pd.Categorical(column).categories)).unique()
    if unlabeled_category is not None:
        names = names[names != str(unlabeled_category)]
    groups = pd.Categorical(text.where(text.isin(names)).to_numpy(), categories=names).remove_unused_categories()
    n_groups, n_cells = len(groups.categories), int((groups.codes >= 0).sum())
    many = n_groups > max(_GROUPS, n_cells // _CELLS_PER_GROUP)
    if pd.api.types.is_numeric_dtype(column.dtype):
        numbers = column.dropna().to_numpy(dtype=np.float64)
        if n_groups > _GROUPS or (numbers != np.round(numbers)).any():
            raise TypeError(
                f"{where} holds numbers (dtype {column.dtype}, {n_groups:,} different ones), not groups: name a column "
                "of groups, divide the numbers with pandas.cut, or say that they are names with .astype('category')."
            )
    if many:
        raise ValueError(
            f"{where} has {n_groups:,} groups of {n_cells:,} cells: far too many for pairs of groups to be compared. "
            "Name a column with fewer, for instance types of cells."
        )
    return groups


def measured_codes(groups: pd.Categorical, absent: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    """Return ``(n,)`` int64 group of each node, -1 for those without, and for ``absent`` ones, without expression."""
    codes = np.asarray(groups.codes, dtype=np.int64)
    return codes if absent is None else np.where(absent, -1, codes)


def edge_pairs(
    graph: NodeGraph, codes: NDArray[np.int64], n_groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return destination, source and pair of groups (source group x ``n_groups`` + destination group) of each edge.

    Self-loops and edges of nodes without group (code -1) are left out. Edges of one pair come together.
    """
    csr = graph.csr
    destination = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    source = csr.indices.astype(np.int64)
    kept = (source != destination) & (codes[source] >= 0) & (codes[destination] >= 0)
    destination, source = destination[kept], source[kept]
    pair = codes[source] * n_groups + codes[destination]
    order = np.argsort(pair, kind="stable")
    return destination[order], source[order], pair[order]
