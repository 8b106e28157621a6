"""Initialization of a training by simple linear models of the training nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lightning.fabric.utilities import move_data_to_device
from scipy import sparse

from fimp_sc._recipe import recipe
from fimp_sc.data import BlockDataset, BlockSampler
from fimp_sc.model.module._matched_batches import matched_gains
from fimp_sc.model.predict._inference import infer, read_embedding
from fimp_sc.model.registry._fields import X_KEY, ExpressionField, table_states
from fimp_sc.model.registry._graph_data import field_state, graph_data, named_batches

if TYPE_CHECKING:
    from fimp_sc.data import ExpressionReader, GraphData
    from fimp_sc.data._study import Study
    from fimp_sc.model._fimp import FIMP


def start_from_data(
    model: FIMP,
    study: Study,
    data: GraphData,
    train_idx: np.ndarray,
    val_idx: np.ndarray,
    mask_ratio: tuple[float, float],
    hidden: dict[str, Any],
) -> GraphData:
    """Start from training nodes, without what is ``hidden`` (arguments of :func:`graph_data`)."""
    module = model.module
    # A foundation model has a scale of its own.
    if not module.network.pretrained:
        for name, sequence in data.sequences.items():
            module.set_sequence_statistics(name, sequence.statistics(train_idx))
    if data.expression is not None:
        measured = data.expression.present(train_idx)
        if not len(measured):
            raise ValueError("No training node has values of the table: check train_indices.")
        _start_from_expression(model, study, data, measured, val_idx, hidden)
    data = graph_data(model, study, **hidden)
    module.eval()
    if module.network.pretrained:
        few = _some(model, data, train_idx, recipe().cells_standardized)
        module.start_from_embeddings(
            infer(module, data, few, read_embedding, n_layers=model.n_layers, n_tokens=model.n_tokens)
        )
    if data.sequences:
        _start_from_sequences(model, data, train_idx, mask_ratio)
    return data


def _start_from_expression(
    model: FIMP, study: Study, data: GraphData, train_idx: np.ndarray, val_idx: np.ndarray, hidden: dict[str, Any]
) -> None:
    module = model.module
    if not module.network.pretrained and _match_batches(model, study, data, train_idx):
        data = graph_data(model, study, **hidden)
    source = cast("ExpressionReader", data.expression)
    some = _some(model, data, train_idx, recipe().cells_components)
    statistics = source.gene_statistics(train_idx)
    rows = source.complete_rows(some, statistics.mean)
    module.set_statistics(statistics, rows)
    if module.network.pretrained:
        return
    data = graph_data(model, study, **hidden)
    source = cast("ExpressionReader", data.expression)
    seen = source.present(val_idx[data.graph.degree[val_idx] > 0])
    # Values are hidden in turn.
    seen = data.ordered(_some(model, data, seen, recipe().cells_smoother))
    mean_of = data.graph.averaging(seen, model.n_layers)
    sources = np.unique(mean_of.indices)
    around = mean_of[:, sources] @ source.complete_rows(sources, statistics.mean)
    drop = recipe().drop_noise and not model.classes and len(train_idx) <= recipe().few_cells
    module.start_as_smoother(
        rows,
        data.graph.among(some),
        source.complete_rows(seen, statistics.mean),
        around,
        statistics.mean,
        neighbor_weight=recipe().neighbor_weight_labels if model.classes else recipe().neighbor_weight,
        drop_noise=drop,
        random_state=model.random_state,
    )


def _match_batches(model: FIMP, study: Study, data: GraphData, train_idx: np.ndarray) -> bool:
    """Fit gains of genes to the cells that technical batches have in common; tell whether there are any."""
    manager = model.get_anndata_manager(study.data, required=True)
    named = named_batches(study.nodes, manager.registry["setup_args"])
    real = [state[ExpressionField.SCALE] == "real" for state in table_states(field_state(model, X_KEY)).values()]
    if named is None or all(real):
        return False
    names, codes = named
    there, code = np.unique(codes[train_idx], return_inverse=True)
    if len(there) < 2:
        return False
    source = cast("ExpressionReader", data.expression)
    cells = _some(model, data, train_idx, recipe().cells_matching)
    around = sparse.csr_matrix(data.graph.averaging(cells, model.n_layers)[:, train_idx])
    # A cell whose neighbors are all kept for validation is its own mean.
    total = np.asarray(around.sum(1)).ravel()
    place = np.searchsorted(train_idx, cells)
    alone = sparse.csr_matrix(((total == 0).astype(np.float32), (np.arange(len(cells)), place)), shape=around.shape)
    around = sparse.csr_matrix(sparse.diags(1.0 / np.where(total > 0, total, 1.0)) @ around + alone)
    used = np.unique(around.indices)
    nodes = train_idx[used]
    mean = source.gene_statistics(train_idx).mean
    complete, seen = source.complete_rows(nodes, mean), source.complete_rows(nodes, np.zeros_like(mean))
    gains = matched_gains(complete, seen, around[:, used], code[used], code[place], model.random_state)
    ends = np.cumsum([0, *(len(s[ExpressionField.NAMES]) for s in table_states(field_state(model, X_KEY)).values())])
    for is_real, start, end in zip(real, ends[:-1], ends[1:], strict=True):
        if is_real:
            gains[:, start:end] = 1.0
    if (gains == 1.0).all():
        return False
    module = model.module
    module.set_gains(names[there], gains)
    return True


def _start_from_sequences(model: FIMP, data: GraphData, train_idx: np.ndarray, mask_ratio: tuple[float, float]) -> None:
    """Let tokens start as their components, and heads as least squares on hidden tokens of some blocks."""
    module, rng = model.module, np.random.default_rng(model.random_state)
    if not module.network.pretrained:
        for name, source in data.sequences.items():
            there = train_idx[~source.absent[train_idx]]
            few = _some(model, data, there, recipe().nodes_components)
            fields = source.fields(few, len(few))
            module.start_from_components(name, fields["target"][~fields["masked"]])
    dataset = BlockDataset(data, n_layers=model.n_layers, n_tokens=model.n_tokens, mask_ratio=mask_ratio)
    blocks = list(BlockSampler(data, train_idx, batch_size=recipe().nodes_per_block, random_state=model.random_state))
    chosen = rng.permutation(len(blocks))[: recipe().blocks_heads]
    module.fit_heads((move_data_to_device(dataset[blocks[i]], module.device) for i in chosen), recipe().ridge_heads)


def _some(model: FIMP, data: GraphData, nodes: np.ndarray, n: int) -> np.ndarray:
    """Return at most ``n`` of ``nodes``, ascending: a sample that their order does not decide."""
    if len(nodes) <= n:
        return np.sort(nodes)
    return np.sort(np.random.default_rng(model.random_state).choice(data.ordered(nodes), n, replace=False))
