"""A model over a graph: what it reads from an object, and how results come back block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._logging import warn
from fimp_sc.data import CenteredTokens, ExpressionSource, GeneStatistics, GraphData, NodeGraph
from fimp_sc.data._study import Part, expand_rows, nodes_of, parts_of, tables_of
from fimp_sc.data.expression._joined import JoinedExpression, split_statistics
from fimp_sc.data.expression._reader import Panels
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.sequences._reader import SequenceStatistics
from fimp_sc.data.sequences._tokenizers import sequence_source, token_shape
from fimp_sc.data.validate._checks import check_coordinates, check_obs_key, get_graph, get_matrix, get_obs, label_text
from fimp_sc.model._fields import (
    BATCH_KEY,
    LABELS_KEY,
    LIBRARY_KEY,
    SEQUENCE_KEY,
    X_KEY,
    ExpressionField,
    LabelField,
    SequenceField,
    as_trained,
    match_columns,
    table_states,
)
from fimp_sc.model._inference import infer
from fimp_sc.model._setup import RegisteringModel
from fimp_sc.model._shared_genes import check_shared_genes
from fimp_sc.nn import FoundationNetwork

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray
    from torch import Tensor

    from fimp_sc.data import SequenceKind, SequenceSource, TokenSource
    from fimp_sc.model._inference import Read
    from fimp_sc.model.module._module import FIMPModule

# Hidden genes of a cell that the decoder of a foundation model learns from: a fraction of its tokens.
_QUERIES = 32


class GraphModel(RegisteringModel):
    """Reads a registered object as tokens on a graph, and computes exact results for any of its cells.

    Attributes
    ----------
    module
        Network and heads.
    n_layers, n_tokens, self_loops, messages, use_weights, random_state
        See :class:`~fimp_sc.model.FIMP`.
    token_sizes
        By modality of signals or images: time points of a segment, or pixels of the side of a patch.
    """

    module: FIMPModule
    n_layers: int
    n_tokens: int
    self_loops: bool
    messages: bool
    use_weights: bool
    random_state: int
    token_sizes: dict[str, int]

    @property
    def genes(self) -> NDArray[Any]:
        """Names of the genes that the model knows, in its own order.

        Of several tables one after the other; a name that several of them have follows that of its table there
        (``"protein:CD3"``).
        """
        return self._state(X_KEY)[ExpressionField.NAMES]

    @property
    def classes(self) -> list[str]:
        """Labels that the model was set up with; empty without ``labels_key``."""
        return [str(label) for label in self._state(LABELS_KEY).get(LabelField.CLASSES, ())]

    def _state(self, registry_key: str) -> dict:
        return self.registry["field_registries"].get(registry_key, {}).get("state_registry", {})

    def _validate_anndata(self, adata: Any = None, **kwargs: Any) -> Any:
        if getattr(self, "_adata_manager", None) is None:
            raise ValueError(
                "This model is bound to no object: bind it to one with FIMP.load_query_data(adata, model), or "
                "FIMP.from_pretrained(folder, adata)."
            )
        if adata is not None and self._is_object(adata) and self.get_anndata_manager(adata) is None:
            self._check_genes(adata)
        return super()._validate_anndata(adata, **kwargs)

    def _check_genes(self, data: AnnData | MuData) -> None:
        """Check that another object has enough genes of the model, see :func:`check_shared_genes`."""
        states = table_states(self._state(X_KEY))
        if not states:
            return
        tables = tables_of(parts_of(data, self.registry["setup_args"].get("modality")))
        if not tables:
            return  # which is said where they are registered
        weights = np.split(self.module.gene_fraction.cpu().numpy(), self._table_ends[:-1])
        for part, state, weight in zip(as_trained(tables, states), states.values(), weights, strict=True):
            check_shared_genes(state[ExpressionField.NAMES], weight * (part.kind == "expression"), part.adata)

    def _indices(self, adata: AnnData, indices: Sequence[int] | NDArray[np.int64] | None) -> NDArray[np.int64]:
        nodes = np.arange(adata.n_obs) if indices is None else np.asarray(indices)
        if nodes.dtype == bool:
            if nodes.shape != (adata.n_obs,):
                raise IndexError(f"A mask must have one entry for each of {adata.n_obs} cells, found {nodes.shape}")
            nodes = np.flatnonzero(nodes)
        if len(nodes) and (nodes.min() < 0 or nodes.max() >= adata.n_obs):
            raise IndexError(f"indices must be in [0, {adata.n_obs}), found {nodes.min()} to {nodes.max()}")
        return nodes.astype(np.int64)

    def _modality(self, adata: AnnData | MuData) -> Any:
        return self.get_anndata_manager(adata, required=True).registry["setup_args"].get("modality")

    def _nodes(self, adata: AnnData | MuData) -> AnnData:
        """Return the object that describes the nodes of a registered one."""
        return nodes_of(adata, self._modality(adata))

    def _tables(self, adata: AnnData | MuData) -> list[Part]:
        """Return the modalities of a registered object with expression or features, in the order of the model."""
        tables = tables_of(parts_of(adata, self._modality(adata)))
        return as_trained(tables, table_states(self._state(X_KEY))) if tables else []

    def _known_columns(self, tables: list[Part]) -> list[NDArray[np.int64]]:
        """Return the place among the genes of the model of each column of tables as :meth:`_tables` returns them.

        Columns that it does not know have -1.
        """
        places, first = [], 0
        for part, state in zip(tables, table_states(self._state(X_KEY)).values(), strict=True):
            names = pd.Index(state[ExpressionField.NAMES])
            place = names.get_indexer(pd.Index(part.adata.var_names.astype(str))).astype(np.int64)
            places.append(np.where(place < 0, -1, place + first))
            first += len(names)
        return places

    @property
    def _table_ends(self) -> NDArray[np.int64]:
        """Number of genes of the model up to the end of each table."""
        states = table_states(self._state(X_KEY)).values()
        return np.cumsum([len(state[ExpressionField.NAMES]) for state in states]).astype(np.int64)

    def _sequence_part(self, adata: AnnData | MuData, name: str) -> Part:
        """Return the modality of a registered object that holds signals or images under ``name``."""
        return SequenceField(name, "", self._modality(adata)).part(adata)

    def _sequence_size(self, adata: AnnData | MuData, name: str) -> tuple[SequenceKind, list[int]]:
        """Return the kind of a modality of signals or images, and the size of the values of a node."""
        registries = self.get_anndata_manager(adata, required=True).registry["field_registries"]
        state = registries[SEQUENCE_KEY + name]["state_registry"]
        return sequence_kind(state[SequenceField.KIND]), state[SequenceField.SIZE]

    def _graph_data(
        self,
        adata: AnnData | MuData,
        hidden: Any = None,
        hidden_tokens: Mapping[str, NDArray[np.bool_]] | None = None,
        *,
        messages: bool | None = None,
    ) -> GraphData:
        manager = self.get_anndata_manager(adata, required=True)
        setup, nodes = manager.registry["setup_args"], self._nodes(adata)
        codes = {
            key: check_obs_key(nodes, name, role).codes.astype(np.int64) if name else np.zeros(nodes.n_obs, np.int64)
            for key, name, role in (
                (LIBRARY_KEY, setup["library_key"], "library"),
                (BATCH_KEY, setup["batch_key"] or setup["library_key"], "batch"),
            )
        }
        messages = self.messages if messages is None else messages
        # The stack of a foundation model adds self-loops itself.
        self_loops = (self.self_loops or not messages) and not isinstance(self.module.network, FoundationNetwork)
        edges = get_graph(nodes, setup["connectivities_key"])
        edges = edges if messages else sparse.csr_matrix(edges.shape)
        graph = NodeGraph(edges, self_loops=self_loops, weighted=self.use_weights)
        if self.use_weights and messages and np.allclose(graph.csr.data, 1.0):
            key = setup["connectivities_key"]
            warn(
                f"The model uses weights (use_weights=True), but those of the neighbors of a node are all alike in "
                f"obsp[{key!r}]: store a graph with other weights, for instance ones that fall with distance, and name "
                "it with connectivities_key=.",
                about=self,
            )
        located = check_coordinates(nodes, setup["spatial_key"]) if setup["spatial_key"] in nodes.obsm else None
        names = np.asarray(nodes.obs_names)
        coordinates = graph.order(names)[:, None].astype(np.float64) if located is None else located
        label = np.full(nodes.n_obs, -1, dtype=np.int64)
        if self.classes and setup["labels_key"] in nodes.obs:
            labels = get_obs(nodes, [setup["labels_key"]])[setup["labels_key"]]
            label = pd.Index(self.classes).get_indexer(pd.Index(label_text(labels))).astype(np.int64)
        data = GraphData(None, graph, coordinates, codes[LIBRARY_KEY], label, names=names)
        tables = self._tables(adata)
        if tables:
            states = table_states(manager.registry["field_registries"][X_KEY]["state_registry"])
            sizes = [len(state[ExpressionField.NAMES]) for state in states.values()]
            masks = hidden if isinstance(hidden, Mapping) else {tables[0].name: hidden}
            batch = codes[BATCH_KEY] if setup["center"] == "batch" else None
            sample = codes[LIBRARY_KEY if setup["library_key"] else BATCH_KEY]
            sources = []
            keys = np.split(self.module.gene_key, np.cumsum(sizes)[:-1])
            known = zip(tables, states.values(), split_statistics(self._statistics(), sizes), keys, strict=True)
            for table, state, statistics, gene_key in known:
                matrix = get_matrix(table.adata, setup["layer"])
                if table.rows is not None:
                    matrix = expand_rows(matrix, table.rows, f"mdata[{table.name!r}]")
                scale = state[ExpressionField.SCALE]
                columns = match_columns(state[ExpressionField.NAMES], table.adata)
                source = ExpressionSource(
                    matrix, columns, scale, statistics, batch, masks.get(table.name), table.absent,
                    state.get(ExpressionField.TRAINED_SCALE, scale), _panels(state, sample), gene_key,
                )  # fmt: skip
                sources.append(source)
            data.source = sources[0] if len(sources) == 1 else JoinedExpression(sources)
            data.tokens = self._token_source()
        data.sequences = self._sequence_sources(adata, located, hidden_tokens or {})
        return data

    def _sequence_sources(
        self,
        adata: AnnData | MuData,
        located: NDArray[np.floating] | None,
        hidden_tokens: Mapping[str, NDArray[np.bool_]],
    ) -> dict[str, SequenceSource]:
        network = self.module.network
        if located is not None and isinstance(network, FoundationNetwork) and network.sequence is not None:
            located = network.embedding.places(located)
        sources = {}
        for i, (name, shape) in enumerate(self.module.sequences.items()):
            (kind, size), token_size = self._sequence_size(adata, name), self.token_sizes[name]
            known: Any = self.module.statistics[str(i)]
            sources[name] = sequence_source(
                self._sequence_part(adata, name),
                self._nodes(adata).n_obs,
                # Another object may have fewer tokens.
                token_shape(kind.name, size, token_size, shape.n_coordinates),
                token_size,
                coordinates=None if located is None else located[:, : shape.n_coordinates],
                statistics=SequenceStatistics(
                    float(known.mean), float(known.std), known.center.cpu().numpy(), known.spread.cpu().numpy()
                ),
                hidden=hidden_tokens.get(name),
            )
        return sources

    def _token_source(self) -> TokenSource:
        gene_rank: Tensor = self.module.gene_rank.cpu()  # type: ignore[operator, union-attr]
        network = self.module.network
        if not isinstance(network, FoundationNetwork):
            return CenteredTokens(gene_rank)
        n_queries = 0 if network.frozen or network.decoder is None else _QUERIES
        return network.embedding.tokenizer(gene_rank, self.random_state, n_queries, self.module.gene_key)

    def _statistics(self) -> GeneStatistics | None:
        module = self.module
        if not bool(module.target_sum.all()):
            return None
        total = module.target_sum.cpu().numpy()
        return GeneStatistics(module.gene_mean.cpu().numpy(), module.gene_fraction.cpu().numpy(), total)

    def _collect(
        self,
        adata: AnnData | MuData | None,
        indices: Sequence[int] | NDArray[np.int64] | None,
        read: Read,
        how: dict[str, Any],
        data: GraphData | None = None,
        *,
        untrained: bool = False,
        genes: Tensor | None = None,
        reconstruct: bool = False,
    ) -> NDArray[np.float32]:
        if not untrained:
            self._check_if_trained(warn=False)
        adata = self._validate_anndata(adata)
        nodes, inverse = np.unique(self._indices(self._nodes(adata), indices), return_inverse=True)
        self.module.eval()
        data = data or self._graph_data(adata)
        out = infer(
            self.module, data, nodes, read, n_layers=self.n_layers, n_tokens=self.n_tokens, genes=genes,
            reconstruct=reconstruct, **how,
        )  # fmt: skip
        return out if indices is None else out[inverse]


def _panels(state: Mapping[str, Any], sample: NDArray[np.int64]) -> Panels | None:
    """Return which genes each cell's sample measured, where that is not all, from what was registered."""
    lacking = state.get(ExpressionField.LACKING)
    return None if lacking is None else Panels(sample, lacking)
