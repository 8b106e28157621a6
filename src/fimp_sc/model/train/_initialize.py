"""Where training starts: at what simple linear models of the training nodes already tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lightning.fabric.utilities import move_data_to_device

from fimp_sc._recipe import recipe
from fimp_sc.data import BlockDataset, BlockSampler
from fimp_sc.model._base import GraphModel
from fimp_sc.model._inference import infer, read_embedding

if TYPE_CHECKING:
    from fimp_sc.data import ExpressionSource, GraphData


class StartingModel(GraphModel):
    """A graph model that starts from its training nodes rather than from random weights alone."""

    def _start_from_data(
        self,
        data: GraphData,
        train_idx: np.ndarray,
        val_idx: np.ndarray,
        mask_ratio: tuple[float, float],
        hidden: dict[str, Any],
    ) -> GraphData:
        """Start from training nodes, without what is ``hidden`` (arguments of :meth:`_graph_data`)."""
        module = self.module
        # A foundation model has a scale of its own.
        if not module.network.pretrained:
            for name, sequence in data.sequences.items():
                module.set_sequence_statistics(name, sequence.statistics(train_idx))
        if data.source is not None:
            measured = data.source.present(train_idx)
            if not len(measured):
                raise ValueError("No training node has values of the table: check train_indices.")
            self._start_from_expression(data, measured, val_idx, hidden)
        data = self._graph_data(self.adata, **hidden)
        module.eval()
        if module.network.pretrained:
            few = self._some(data, train_idx, recipe().cells_standardized)
            module.start_from_embeddings(
                infer(module, data, few, read_embedding, n_layers=self.n_layers, n_tokens=self.n_tokens)
            )
        if data.sequences:
            self._start_from_sequences(data, train_idx, mask_ratio)
        return data

    def _start_from_expression(
        self, data: GraphData, train_idx: np.ndarray, val_idx: np.ndarray, hidden: dict[str, Any]
    ) -> None:
        module, source = self.module, cast("ExpressionSource", data.source)
        some = self._some(data, train_idx, recipe().cells_components)
        statistics = source.gene_statistics(train_idx)
        rows = source.complete_rows(some, statistics.mean)
        module.set_statistics(statistics, rows)
        if module.network.pretrained:
            return
        data = self._graph_data(self.adata, **hidden)
        source = cast("ExpressionSource", data.source)
        seen = source.present(val_idx[data.graph.degree[val_idx] > 0])
        # Values are hidden in turn.
        seen = data.ordered(self._some(data, seen, recipe().cells_smoother))
        mean_of = data.graph.averaging(seen, self.n_layers)
        sources = np.unique(mean_of.indices)
        around = mean_of[:, sources] @ source.complete_rows(sources, statistics.mean)
        drop = recipe().drop_noise and not self.classes and len(train_idx) <= recipe().few_cells
        module.start_as_smoother(
            rows,
            data.graph.among(some),
            source.complete_rows(seen, statistics.mean),
            around,
            statistics.mean,
            neighbor_weight=recipe().neighbor_weight_labels if self.classes else recipe().neighbor_weight,
            drop_noise=drop,
            random_state=self.random_state,
        )

    def _start_from_sequences(self, data: GraphData, train_idx: np.ndarray, mask_ratio: tuple[float, float]) -> None:
        """Let tokens start as their components, and heads as least squares on hidden tokens of some blocks."""
        module, rng = self.module, np.random.default_rng(self.random_state)
        if not module.network.pretrained:
            for name, source in data.sequences.items():
                there = train_idx[~source.absent[train_idx]]
                few = self._some(data, there, recipe().nodes_components)
                fields = source.fields(few, len(few))
                module.start_from_components(name, fields["target"][~fields["masked"]])
        dataset = BlockDataset(data, n_layers=self.n_layers, n_tokens=self.n_tokens, mask_ratio=mask_ratio)
        blocks = list(
            BlockSampler(data, train_idx, batch_size=recipe().nodes_per_block, random_state=self.random_state)
        )
        chosen = rng.permutation(len(blocks))[: recipe().blocks_heads]
        module.fit_heads((move_data_to_device(dataset[blocks[i]], module.device) for i in chosen), recipe().ridge_heads)

    def _some(self, data: GraphData, nodes: np.ndarray, n: int) -> np.ndarray:
        """Return at most ``n`` of ``nodes``, ascending: a sample that their order does not decide."""
        if len(nodes) <= n:
            return np.sort(nodes)
        return np.sort(np.random.default_rng(self.random_state).choice(data.ordered(nodes), n, replace=False))
