"""Embeddings of training cells, with which those of a new object are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from sklearn.neighbors import NearestNeighbors

from fimp_sc._logging import warn
from fimp_sc._recipe import recipe
from fimp_sc.model.module._module import N_REFERENCE
from fimp_sc.model.predict._inference import infer, read_embedding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fimp_sc.data import GraphData
    from fimp_sc.model._fimp import FIMP

_LEAST_STD = 1e-3
# Cells looked at in another object.
_N_QUERY, _N_SAME = 256, 64
# Differences of the same cell, in standard deviations of embeddings.
_ROUNDING = 1e-2


def remember(model: FIMP, data: GraphData, train_idx: NDArray[np.int64], val_idx: NDArray[np.int64]) -> None:
    """Keep embeddings of some training cells in the module, and how far validation cells are from them."""
    module, rng = model.module, np.random.default_rng(model.random_state)
    # Of an earlier training, with other weights.
    module.n_reference.zero_()
    if not len(val_idx):
        return
    kept, seen = (np.sort(rng.permutation(nodes)[:N_REFERENCE]) for nodes in (train_idx, val_idx))
    reference = _embed(model, data, kept)
    module.reference.zero_()
    module.reference[: len(kept)].copy_(torch.from_numpy(reference))
    module.reference_name.zero_()
    module.reference_name[: len(kept)].copy_(torch.from_numpy(_hashes(data)[kept]))
    module.n_reference.fill_(len(kept))
    usual = np.finfo(np.float32).max
    if len(seen) >= recipe().fewest_seen:
        usual = np.quantile(_distances(reference, _embed(model, data, seen)), recipe().usual)
    module.reference_distance.fill_(float(usual))


def compare(model: FIMP, data: GraphData) -> bool | None:
    """Compare the cells of an object with those that a model was trained on.

    Parameters
    ----------
    data
        Of an object that is registered with the model.

    Returns
    -------
    Whether they are the same cells, so that labels are to be predicted as after training rather than as suits another
    section; ``None`` where the model knows none of its cells.

    Warns
    -----
    UserWarning
        More than half of the cells are further from the nearest training cell than 99 % of validation cells were. Each
        is compared with its nearest one, so that a crop of one class is near although its mean is not. Not after
        training with fewer than 10 validation cells.
    """
    module, n_reference = model.module, int(model.module.n_reference)
    if not n_reference:
        return None
    names = _hashes(data)
    reference = module.reference[:n_reference].cpu().numpy()
    rows = pd.Series(np.arange(n_reference), index=module.reference_name[:n_reference].cpu().numpy())
    there = rows[~rows.index.duplicated()].reindex(names, fill_value=-1).to_numpy()
    rng = np.random.default_rng(model.random_state)
    named = np.sort(rng.permutation(np.flatnonzero(there >= 0))[:_N_SAME])
    # A cell of the same name may be one of another section, or have lost neighbors in a crop.
    if len(named) and np.median(_apart(reference, _embed(model, data, named), there[named])) < _ROUNDING:
        return True
    nodes = np.sort(rng.permutation(len(names))[:_N_QUERY])
    far = float((_distances(reference, _embed(model, data, nodes)) > float(module.reference_distance)).mean())
    if far > recipe().far:
        warn(
            f"{far:.0%} of the cells are unlike all cells that the model was trained on: expect wrong labels and "
            "expression. Check species, tissue, gene names and input_scale. Where the object differs as a whole, by "
            "donor or technique, and holds about the same mixture of cells as training did, center='batch' takes that "
            "out; else train a model on cells like these."
        )
    return False


def _hashes(data: GraphData) -> NDArray[np.int64]:
    return pd.util.hash_array(np.asarray(data.names).astype(str).astype(object)).view(np.int64)


def _embed(model: FIMP, data: GraphData, nodes: NDArray[np.int64]) -> NDArray[np.float32]:
    return infer(model.module, data, nodes, read_embedding, n_layers=model.n_layers, n_tokens=model.n_tokens)


def _distances(reference: NDArray[np.float32], cells: NDArray[np.float32]) -> NDArray[np.floating]:
    """Return the distance of each cell to the nearest of the reference, in standard deviations of the reference."""
    scale = _scale(reference)
    return NearestNeighbors(n_neighbors=1).fit(reference / scale).kneighbors(cells / scale)[0][:, 0]


def _apart(reference: NDArray[np.float32], cells: NDArray[np.float32], row: NDArray[np.int64]) -> NDArray[np.floating]:
    """Return the largest difference of each cell from one of the reference, in standard deviations."""
    return np.abs((cells - reference[row]) / _scale(reference)).max(1)


def _scale(reference: NDArray[np.float32]) -> NDArray[np.floating]:
    std = reference.std(0)
    # Columns that hardly vary tell nothing.
    return np.maximum(std, _LEAST_STD * max(float(std.max()), 1e-12))
