"""A model over a graph: what it reads from an object, and how results come back block by block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scvi.model.base import BaseModelClass

from fimp_sc.data import BlockLoader, ExpressionSource, GeneStatistics, GraphData, NodeGraph
from fimp_sc.data._checks import check_coordinates, check_obs_key, check_values, get_matrix
from fimp_sc.model._fields import BATCH_KEY, LABELS_KEY, LIBRARY_KEY, X_KEY, ExpressionField, LabelField, match_columns

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse
    from torch import Tensor

    from fimp_sc.model._module import FIMPModule

_INFERENCE_BATCH = 512


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

    def _indices(self, adata: AnnData, indices: Sequence[int] | None) -> NDArray[np.int64]:
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
        graph = NodeGraph(adata.obsp[setup["connectivities_key"]], self_loops=self.self_loops)
        where = "adata.X" if setup["layer"] is None else f"adata.layers[{setup['layer']!r}]"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the object was registered
            scale = check_values(matrix, where=where, input_scale=setup["input_scale"])
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
            text = adata.obs[setup["labels_key"]].astype(object).map(str, na_action="ignore")
            label = pd.Index(self.classes).get_indexer(pd.Index(text)).astype(np.int64)
        return GraphData(source, graph, coordinates, codes[LIBRARY_KEY], label, self.module.gene_rank.cpu())

    def _statistics(self) -> GeneStatistics | None:
        module = self.module
        if not float(module.target_sum):
            return None
        return GeneStatistics(
            module.gene_mean.cpu().numpy(), module.gene_fraction.cpu().numpy(), float(module.target_sum)
        )

    @torch.inference_mode()
    def _collect(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        read: Callable[[Tensor], Tensor],
        data: GraphData | None = None,
    ) -> NDArray[np.float32]:
        self._check_if_trained(warn=False)
        adata = self._validate_anndata(adata)
        nodes = self._indices(adata, indices)
        wanted, inverse = np.unique(nodes, return_inverse=True)
        loader = BlockLoader(
            data or self._graph_data(adata),
            wanted,
            batch_size=batch_size or _INFERENCE_BATCH,
            n_layers=self.n_layers,
            n_tokens=self.n_tokens,
        )
        self.module.eval()
        row = np.empty(adata.n_obs, dtype=np.int64)
        row[wanted] = np.arange(len(wanted))
        out: NDArray[np.float32] | None = None
        for batch in loader:
            part = read(self.module.inference(batch)["embedding"]).float().cpu().numpy()
            out = np.empty((len(wanted), part.shape[1]), dtype=np.float32) if out is None else out
            out[row[batch["nodes"][: len(part)].cpu().numpy()]] = part
        if out is None:
            raise ValueError("indices is empty: there is nothing to compute.")
        return out if indices is None else out[inverse]
