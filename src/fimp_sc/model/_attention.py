"""What a model's attention tells of edges, as arrays: influence of neighbours, and attention between genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from lightning.fabric.utilities import move_data_to_device
from scipy import sparse

from fimp_sc._options import checked
from fimp_sc.data import BlockDataset, BlockSampler, NodeGraph
from fimp_sc.data._access import shorten
from fimp_sc.model._base import GraphModel
from fimp_sc.model._gene_pairs import GeneTokens, gene_tokens, pair_sums
from fimp_sc.nn._edge_attention import message_layers, recorded_influence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.data import GraphData

_BLOCK = 256


class AttentiveModel(GraphModel):
    """A graph model whose attention can be read; nothing is written to the object."""

    @checked
    def get_edge_influence(
        self, adata: AnnData | MuData | None = None, *, layer: int | None = None, batch_size: int | None = None
    ) -> sparse.csr_matrix:
        r"""Return how large the message of each edge is.

        The rows of attention sum to one, so that attention itself cannot tell which neighbour matters. The influence of
        node :math:`j` on node :math:`i` in one layer is the length of what its message adds to the summary token of
        :math:`i`, over all heads together and before the mean over neighbours,
        :math:`w_{ij} \lVert W_O \, \mathrm{softmax}(q_i K_j^\top / \sqrt d) V_j \rVert`. The weight of an edge is 1
        unless the model uses those of the graph.

        Parameters
        ----------
        adata
            As in :meth:`get_latent_representation`.
        layer
            Which message-passing layer, from 0; the mean over layers by default.
        batch_size
            Destinations per block. Changes speed and memory, not the result.

        Returns
        -------
        ``(n_obs, n_obs)`` float32 CSR, row = destination: the edges of the graph, without self-loops.

        Raises
        ------
        ValueError
            When there is no such layer, the model passes no messages, or edges run the whole stack of a foundation
            model (``aggregate="final"``).
        """
        network = self.module.network
        layers = message_layers(network)
        if layer is not None and not 0 <= layer < len(layers):
            raise ValueError(f"layer must be from 0 to {len(layers) - 1}, found {layer}.")
        data = self._attention_data(adata)
        csr = data.graph.csr
        row = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
        real = csr.indices != row
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row[real], minlength=csr.shape[0]))])
        out = np.zeros(int(indptr[-1]), dtype=np.float32)
        dataset = BlockDataset(data, n_layers=self.n_layers, n_tokens=self.n_tokens)
        sampler = BlockSampler(data, np.arange(csr.shape[0]), batch_size=batch_size or _BLOCK)
        for item in sampler:
            batch = move_data_to_device(dataset[item], self.module.device)
            with torch.inference_mode(), recorded_influence(network, len(batch["nodes"]), len(item.nodes)) as found:
                network.states(batch, 1)
            value = torch.stack(found).mean(0) if layer is None else found[layer]
            start, degree = indptr[item.nodes], np.diff(indptr)[item.nodes]
            within = np.arange(degree.sum()) - np.repeat(np.cumsum(degree) - degree, degree)
            out[np.repeat(start, degree) + within] = value.float().cpu().numpy()
        return sparse.csr_matrix((out, csr.indices[real], indptr), shape=csr.shape)

    @checked
    def get_gene_attention(
        self,
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
            ``(n_obs,)`` group of each node, missing for nodes to leave out.
        adata
            As in :meth:`get_latent_representation`.
        genes
            Genes that the model knows.
        batch_size
            Edges at once. Changes speed and memory, not the result.

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
            When the model does not know a gene.
        ValueError
            When the model reads no genes or passes no messages, or ``groups`` has another length.
        """
        data = self._attention_data(adata)
        category = pd.Categorical(groups).remove_unused_categories()
        if len(category) != data.graph.csr.shape[0]:
            raise ValueError(f"groups must have one entry per node, {data.graph.csr.shape[0]}: found {len(category)}.")
        tokens = self._gene_tokens(data, genes)
        n_groups = len(category.categories)
        to, of, pair = edge_pairs(data.graph, np.asarray(category.codes, dtype=np.int64), n_groups)
        n_edges = np.bincount(pair, minlength=n_groups**2)
        sums = pair_sums(tokens, None, to, of, pair, n_groups**2, batch_size=batch_size)
        mean = sums.first / np.where(n_edges, n_edges, np.nan)[:, None, None]
        shape = (n_groups, n_groups, len(genes), len(genes))
        mean = mean.transpose(0, 2, 1).reshape(shape).astype(np.float32)
        counts = n_edges.reshape(n_groups, n_groups).astype(np.int64)
        return np.asarray(mean, dtype=np.float32), counts, [str(name) for name in category.categories]

    def _attention_data(self, adata: AnnData | MuData | None) -> GraphData:
        if self.foundation is None:  # type: ignore[attr-defined]
            self._check_if_trained(warn=False)
        message_layers(self.module.network)
        if not self.messages:
            raise ValueError("This model passes no messages (messages=False), and has no attention between cells.")
        data = self._graph_data(self._validate_anndata(adata))
        if data.source is None:
            raise ValueError("This model reads no expression: attention between cells is read for genes only.")
        self.module.eval()
        return data

    def _gene_tokens(self, data: GraphData, genes: Sequence[str]) -> GeneTokens:
        columns = pd.Index(self.genes.astype(str)).get_indexer(pd.Index([str(gene) for gene in genes]))
        if (columns < 0).any():
            unknown = [repr(str(gene)) for gene, column in zip(genes, columns, strict=True) if column < 0]
            raise KeyError(f"Not among the {len(self.genes)} genes of the model: {shorten(unknown)}.")
        return gene_tokens(self.module, data, self.n_tokens, columns.astype(np.int64))


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
