"""Graph data of a registered object: from a study to tokens, graph and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._logging import warn
from fimp_sc.data import ExpressionReader, GeneStatistics, GraphData, NodeGraph
from fimp_sc.data._study import Modality, Study, expand_rows, resolve
from fimp_sc.data.expression._reader import Gains, JoinedExpression, Panels, split_statistics
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.sequences._reader import SequenceStatistics
from fimp_sc.data.sequences._tokenizers import sequence_reader, token_shape
from fimp_sc.data.validate._checks import check_coordinates, check_obs_key, get_graph, get_matrix, get_obs, label_text
from fimp_sc.model.registry._fields import (
    BATCH_KEY,
    LIBRARY_KEY,
    SEQUENCE_KEY,
    X_KEY,
    ExpressionField,
    SequenceField,
    as_trained,
    match_columns,
    sequence_modality,
    table_states,
)
from fimp_sc.model.registry._shared_genes import check_shared_genes

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray
    from torch import Tensor

    from fimp_sc.data import SequenceKind, SequenceReader, Tokenizer
    from fimp_sc.model._fimp import FIMP


def field_state(model: FIMP, registry_key: str) -> dict:
    """Return what is registered under a key of :mod:`fimp_sc.model.registry._fields`."""
    return model.registry["field_registries"].get(registry_key, {}).get("state_registry", {})


def check_genes(model: FIMP, data: AnnData | MuData) -> None:
    """Check that another object has enough genes of the model, see :func:`check_shared_genes`."""
    states = table_states(field_state(model, X_KEY))
    if not states:
        return
    tables = resolve(data, model.registry["setup_args"].get("modality")).tables
    if not tables:
        return  # which is said where they are registered
    weights = np.split(model.module.gene_fraction.cpu().numpy(), table_ends(model)[:-1])
    for part, state, weight in zip(as_trained(tables, states), states.values(), weights, strict=True):
        check_shared_genes(state[ExpressionField.NAMES], weight * (part.kind == "expression"), part.adata)


def node_indices(
    names: pd.Index | NDArray[Any], indices: Sequence[int] | NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Return positions of nodes from positions or a mask, by default of all."""
    nodes = np.arange(len(names)) if indices is None else np.asarray(indices)
    if nodes.dtype == bool:
        if nodes.shape != (len(names),):
            raise IndexError(f"A mask must have one entry for each of {len(names)} cells, found {nodes.shape}")
        nodes = np.flatnonzero(nodes)
    if len(nodes) and (nodes.min() < 0 or nodes.max() >= len(names)):
        raise IndexError(f"indices must be in [0, {len(names)}), found {nodes.min()} to {nodes.max()}")
    return nodes.astype(np.int64)


def study_of(model: FIMP, adata: AnnData | MuData | None) -> Study:
    """Return what the model reads of a registered object, by default its own."""
    adata = model._validate_anndata(adata)
    return resolve(adata, model.get_anndata_manager(adata, required=True).registry["setup_args"].get("modality"))


def tables_of(model: FIMP, study: Study) -> list[Modality]:
    """Return the modalities with expression or features, in the order of the model."""
    return as_trained(study.tables, table_states(field_state(model, X_KEY))) if study.tables else []


def known_columns(model: FIMP, tables: Sequence[Modality]) -> list[NDArray[np.int64]]:
    """Return the place among the genes of the model of each column of tables as :func:`tables_of` returns them.

    Columns that it does not know have -1.
    """
    places, first = [], 0
    for part, state in zip(tables, table_states(field_state(model, X_KEY)).values(), strict=True):
        names = pd.Index(state[ExpressionField.NAMES])
        place = names.get_indexer(pd.Index(part.adata.var_names.astype(str))).astype(np.int64)
        places.append(np.where(place < 0, -1, place + first))
        first += len(names)
    return places


def table_ends(model: FIMP) -> NDArray[np.int64]:
    """Return the number of genes of the model up to the end of each table."""
    states = table_states(field_state(model, X_KEY)).values()
    return np.cumsum([len(state[ExpressionField.NAMES]) for state in states]).astype(np.int64)


def sequence_size(model: FIMP, study: Study, name: str) -> tuple[SequenceKind, list[int]]:
    """Return the kind of a modality of signals or images, and the size of the values of a node."""
    registries = model.get_anndata_manager(study.data, required=True).registry["field_registries"]
    state = registries[SEQUENCE_KEY + name]["state_registry"]
    return sequence_kind(state[SequenceField.KIND]), state[SequenceField.SIZE]


def graph_data(
    model: FIMP,
    study: Study,
    hidden: Any = None,
    hidden_tokens: Mapping[str, NDArray[np.bool_]] | None = None,
) -> GraphData:
    """Return everything that blocks of a registered object are made of.

    Parameters
    ----------
    study
        Of :func:`study_of`.
    hidden
        What is hidden of the tables: ``(n_obs, n_vars)``, or a dictionary by modality.
    hidden_tokens
        By modality: ``(n_obs, n_tokens)`` bool, tokens of sequences that are hidden.
    """
    manager = model.get_anndata_manager(study.data, required=True)
    setup, nodes = manager.registry["setup_args"], study.nodes
    codes = {
        key: check_obs_key(nodes, name, role).codes.astype(np.int64) if name else np.zeros(nodes.n_obs, np.int64)
        for key, name, role in (
            (LIBRARY_KEY, setup["library_key"], "library"),
            (BATCH_KEY, setup["batch_key"] or setup["library_key"], "batch"),
        )
    }
    self_loops = (model.self_loops or not model.messages) and not model.module.network.adds_self_loops
    edges = get_graph(nodes, setup["connectivities_key"])
    edges = edges if model.messages else sparse.csr_matrix(edges.shape)
    graph = NodeGraph(edges, self_loops=self_loops, weighted=model.use_weights)
    if model.use_weights and model.messages and np.allclose(graph.csr.data, 1.0):
        key = setup["connectivities_key"]
        warn(
            f"The model uses weights (use_weights=True), but those of the neighbors of a node are all alike in "
            f"obsp[{key!r}]: store a graph with other weights, for instance ones that fall with distance, and name "
            "it with connectivities_key=.",
            about=model,
        )
    located = check_coordinates(nodes, setup["spatial_key"]) if setup["spatial_key"] in nodes.obsm else None
    names = np.asarray(nodes.obs_names)
    coordinates = graph.order(names)[:, None].astype(np.float64) if located is None else located
    label = np.full(nodes.n_obs, -1, dtype=np.int64)
    if model.classes and setup["labels_key"] in nodes.obs:
        labels = get_obs(nodes, [setup["labels_key"]])[setup["labels_key"]]
        label = pd.Index(model.classes).get_indexer(pd.Index(label_text(labels))).astype(np.int64)
    data = GraphData(None, graph, coordinates, codes[LIBRARY_KEY], label, names=names)
    tables = tables_of(model, study)
    if tables:
        states = table_states(manager.registry["field_registries"][X_KEY]["state_registry"])
        sizes = [len(state[ExpressionField.NAMES]) for state in states.values()]
        masks = hidden if isinstance(hidden, Mapping) else {tables[0].name: hidden}
        batch = codes[BATCH_KEY] if setup["center"] == "batch" else None
        sample = codes[LIBRARY_KEY if setup["library_key"] else BATCH_KEY]
        sources = []
        keys = np.split(model.module.gene_key, np.cumsum(sizes)[:-1])
        gains = _gains(model, nodes, setup, sizes)
        known = zip(tables, states.values(), split_statistics(_statistics(model), sizes), keys, gains, strict=True)
        for table, state, statistics, gene_key, gain in known:
            source = table_reader(
                table, setup["layer"], state, sample, statistics=statistics, batch=batch, hidden=masks.get(table.name),
                gene_key=gene_key, gains=gain,
            )  # fmt: skip
            sources.append(source)
        data.expression = sources[0] if len(sources) == 1 else JoinedExpression(sources)
        data.tokenizer = _tokenizer(model)
    data.sequences = _sequence_readers(model, study, located, hidden_tokens or {})
    return data


def table_reader(
    table: Modality,
    layer: str | None,
    state: Mapping[str, Any],
    sample: NDArray[np.int64],
    *,
    statistics: GeneStatistics | None = None,
    batch: NDArray[np.int64] | None = None,
    hidden: Any = None,
    gene_key: NDArray[np.uint64] | None = None,
    gains: Gains | None = None,
) -> ExpressionReader:
    """Return the reader of one table.

    Parameters
    ----------
    table, layer
        The table, and the layer that holds its values.
    state
        What :class:`ExpressionField` registered of it.
    sample
        ``(n_obs,)`` int64 code of the sample of each node.
    statistics, batch, hidden, gene_key, gains
        See :class:`ExpressionReader`.
    """
    matrix = get_matrix(table.adata, layer)
    if table.rows is not None:
        matrix = expand_rows(matrix, table.rows, f"mdata[{table.name!r}]")
    scale = state[ExpressionField.SCALE]
    columns = match_columns(state[ExpressionField.NAMES], table.adata)
    return ExpressionReader(
        matrix, columns, scale, statistics, batch, hidden, table.absent,
        state.get(ExpressionField.TRAINED_SCALE, scale), _panels(state, sample), gene_key, gains,
    )  # fmt: skip


def named_batches(nodes: AnnData, setup: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return hashes of the names of technical batches, and the code of the batch of each node.

    ``None`` where none are named, or batches are not to be matched.
    """
    key = setup["batch_key"] or setup["library_key"]
    if key is None or setup["center"] != "matched":
        return None
    batches = check_obs_key(nodes, key, "batch")
    names = pd.util.hash_array(np.asarray(batches.categories).astype(str).astype(object)).view(np.int64)
    return names, batches.codes.astype(np.int64)


def without_messages(data: GraphData, *, self_loops: bool = True) -> GraphData:
    """Return the same data with a graph in which every node is its own only neighbor.

    Parameters
    ----------
    data
        Of a model.
    self_loops
        Whether the graph says so, rather than the network, which then adds them.
    """
    n_obs = len(data.label)
    return replace(data, graph=NodeGraph(sparse.csr_matrix((n_obs, n_obs)), self_loops=self_loops), embedding=None)


def _sequence_readers(
    model: FIMP,
    study: Study,
    located: NDArray[np.floating] | None,
    hidden_tokens: Mapping[str, NDArray[np.bool_]],
) -> dict[str, SequenceReader]:
    located = None if located is None else model.module.network.places(located)
    sources = {}
    for i, (name, shape) in enumerate(model.module.sequences.items()):
        (kind, size), token_size = sequence_size(model, study, name), model.token_sizes[name]
        known: Any = model.module.statistics[str(i)]
        sources[name] = sequence_reader(
            sequence_modality(study, name),
            study.nodes.n_obs,
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


def _tokenizer(model: FIMP) -> Tokenizer:
    gene_rank: Tensor = model.module.gene_rank.cpu()  # type: ignore[operator, union-attr]
    return model.module.network.tokenizer(gene_rank, model.module.gene_key, model.random_state)


def _statistics(model: FIMP) -> GeneStatistics | None:
    module = model.module
    if not bool(module.target_sum.all()):
        return None
    total = module.target_sum.cpu().numpy()
    return GeneStatistics(module.gene_mean.cpu().numpy(), module.gene_fraction.cpu().numpy(), total)


def _gains(model: FIMP, nodes: AnnData, setup: Mapping[str, Any], sizes: Sequence[int]) -> list[Gains | None]:
    """Return the gains of each table. Batches of the names of training are known, others read as they are."""
    named = named_batches(nodes, setup) if len(model.module.batch_name) else None
    if named is None:
        return [None] * len(sizes)
    names, codes = named
    row = pd.Index(model.module.batch_name.cpu().numpy()).get_indexer(pd.Index(names)).astype(np.int64)
    factors = np.split(model.module.batch_gain.cpu().numpy(), np.cumsum(sizes)[:-1], axis=1)
    return [Gains(row[codes], factor) for factor in factors]


def _panels(state: Mapping[str, Any], sample: NDArray[np.int64]) -> Panels | None:
    """Return which genes each cell's sample measured, where that is not all, from what was registered."""
    lacking = state.get(ExpressionField.LACKING)
    return None if lacking is None else Panels(sample, lacking)
