"""A model over a graph: what it reads from an object, and how results come back block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scvi.model.base import BaseModelClass

from fimp_sc.data import BinnedTokens, CentredTokens, ExpressionSource, GeneStatistics, GraphData, NodeGraph
from fimp_sc.data._checks import check_coordinates, check_obs_key, get_graph, get_matrix, get_obs
from fimp_sc.model._fields import BATCH_KEY, LABELS_KEY, LIBRARY_KEY, X_KEY, ExpressionField, LabelField, match_columns
from fimp_sc.model._inference import infer
from fimp_sc.nn import FoundationNetwork

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse
    from torch import Tensor

    from fimp_sc.data import TokenSource
    from fimp_sc.model._inference import Read
    from fimp_sc.model._module import FIMPModule

# Hidden genes of a cell that the decoder of a foundation model learns from: a fraction of its tokens.
_QUERIES = 32


class GraphModel(BaseModelClass):
    """Reads a registered object as tokens on a graph, and computes exact results for any of its cells.

    Attributes
    ----------
    module
        Network and heads.
    n_layers, n_tokens, self_loops, random_state
        See :class:`~fimp_sc.model.FIMP`.
    """

    module: FIMPModule
    n_layers: int
    n_tokens: int
    self_loops: bool
    random_state: int

    @property
    def genes(self) -> NDArray[Any]:
        """Names of the genes that the model knows, in its own order."""
        return self._state(X_KEY)[ExpressionField.NAMES]

    @property
    def classes(self) -> list[str]:
        """Labels that the model was set up with; empty without ``labels_key``."""
        return [str(label) for label in self._state(LABELS_KEY).get(LabelField.CLASSES, ())]

    def _state(self, registry_key: str) -> dict:
        return self.registry["field_registries"].get(registry_key, {}).get("state_registry", {})

    def _indices(self, adata: AnnData, indices: Sequence[int] | NDArray[np.int64] | None) -> NDArray[np.int64]:
        nodes = np.arange(adata.n_obs) if indices is None else np.asarray(indices)
        if nodes.dtype == bool:
            if nodes.shape != (adata.n_obs,):
                raise IndexError(f"A mask must have one entry for each of {adata.n_obs} cells, found {nodes.shape}")
            nodes = np.flatnonzero(nodes)
        if len(nodes) and (nodes.min() < 0 or nodes.max() >= adata.n_obs):
            raise IndexError(f"indices must be in [0, {adata.n_obs}), found {nodes.min()} to {nodes.max()}")
        return nodes.astype(np.int64)

    def _graph_data(self, adata: AnnData, hidden: sparse.spmatrix | NDArray[np.bool_] | None = None) -> GraphData:
        manager = self.get_anndata_manager(adata, required=True)
        setup = manager.registry["setup_args"]
        codes = {
            key: check_obs_key(adata, name, role).codes.astype(np.int64) if name else np.zeros(adata.n_obs, np.int64)
            for key, name, role in (
                (LIBRARY_KEY, setup["library_key"], "library"),
                (BATCH_KEY, setup["batch_key"] or setup["library_key"], "batch"),
            )
        }
        matrix = get_matrix(adata, setup["layer"])
        # The stack of a foundation model adds self-loops itself.
        self_loops = self.self_loops and not isinstance(self.module.network, FoundationNetwork)
        graph = NodeGraph(get_graph(adata, setup["connectivities_key"]), self_loops=self_loops)
        scale = manager.registry["field_registries"][X_KEY]["state_registry"][ExpressionField.SCALE]
        source = ExpressionSource(
            matrix,
            match_columns(self.genes, adata),
            scale,
            self._statistics(),
            codes[BATCH_KEY],
            hidden,
        )
        located = setup["spatial_key"] in adata.obsm
        coordinates = (
            check_coordinates(adata, setup["spatial_key"]) if located else graph.order()[:, None].astype(np.float64)
        )
        label = np.full(adata.n_obs, -1, dtype=np.int64)
        if self.classes and setup["labels_key"] in adata.obs:
            labels = get_obs(adata, [setup["labels_key"]])[setup["labels_key"]]
            text = labels.astype(object).map(str, na_action="ignore")
            label = pd.Index(self.classes).get_indexer(pd.Index(text)).astype(np.int64)
        return GraphData(source, graph, coordinates, codes[LIBRARY_KEY], label, self._token_source())

    def _token_source(self) -> TokenSource:
        gene_rank: Tensor = self.module.gene_rank.cpu()  # type: ignore[operator, union-attr]
        network = self.module.network
        if not isinstance(network, FoundationNetwork):
            return CentredTokens(gene_rank)
        n_queries = 0 if network.frozen or network.decoder is None else _QUERIES
        return BinnedTokens(
            gene_rank, network.embedding.known.cpu(), int(network.n_bins or 0), self.random_state, n_queries
        )

    def _statistics(self) -> GeneStatistics | None:
        module = self.module
        if not float(module.target_sum):
            return None
        return GeneStatistics(
            module.gene_mean.cpu().numpy(), module.gene_fraction.cpu().numpy(), float(module.target_sum)
        )

    def _collect(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | NDArray[np.int64] | None,
        read: Read,
        how: dict[str, Any],
        data: GraphData | None = None,
        *,
        untrained: bool = False,
        genes: Tensor | None = None,
    ) -> NDArray[np.float32]:
        if not untrained:
            self._check_if_trained(warn=False)
        adata = self._validate_anndata(adata)
        nodes, inverse = np.unique(self._indices(adata, indices), return_inverse=True)
        self.module.eval()
        data = data or self._graph_data(adata)
        out = infer(self.module, data, nodes, read, n_layers=self.n_layers, n_tokens=self.n_tokens, genes=genes, **how)
        return out if indices is None else out[inverse]
