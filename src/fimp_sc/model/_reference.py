"""Embeddings of training cells, with which those of a new object are compared."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from fimp_sc.model._inference import infer, read_embedding
from fimp_sc.model._module import N_REFERENCE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fimp_sc.data import GraphData
    from fimp_sc.model._base import GraphModel

_LEAST_STD = 1e-3
# Cells looked at in another object.
_N_QUERY = 256
# Of validation cells, the distance to the nearest training cell that this fraction stays within.
_USUAL = 0.99
# Fraction of cells beyond it above which an object is reported. Crops of one class and sections with distorted counts
# reach 0.3; another tissue, species or permuted gene names 0.99.
_FAR = 0.5


def remember(model: GraphModel, data: GraphData, train_idx: NDArray[np.int64], val_idx: NDArray[np.int64]) -> None:
    """Keep embeddings of some training cells in the module, and how far validation cells are from them."""
    module, rng = model.module, np.random.default_rng(model.random_state)
    if not len(val_idx):
        return
    kept, seen = (np.sort(rng.permutation(part)[:N_REFERENCE]) for part in (train_idx, val_idx))
    reference = _embed(model, data, kept)
    module.reference.zero_()
    module.reference[: len(kept)].copy_(torch.from_numpy(reference))
    module.n_reference.fill_(len(kept))
    distance = _distances(reference, _embed(model, data, seen))
    module.reference_distance.fill_(float(np.quantile(distance, _USUAL)))


def warn_if_far(model: GraphModel) -> None:
    """Warn where most cells of the object of a model are unlike all cells it was trained on.

    Each cell is compared with its nearest training cell, so that a crop of one class is near although its mean is not.

    Warns
    -----
    UserWarning
        More than half of the cells are further from the nearest training cell than 99 % of validation cells were.
    """
    module, n_reference = model.module, int(model.module.n_reference)
    if not n_reference:
        return
    data = model._graph_data(model.adata)
    n_obs = len(data.label)
    nodes = np.sort(np.random.default_rng(model.random_state).permutation(n_obs)[:_N_QUERY])
    distance = _distances(module.reference[:n_reference].cpu().numpy(), _embed(model, data, nodes))
    far = float((distance > float(module.reference_distance)).mean())
    if far > _FAR:
        warnings.warn(
            f"{far:.0%} of the cells are unlike all cells that the model was trained on: expect wrong labels and "
            "expression. Check species, tissue, gene names and input_scale; or train a model on cells like these.",
            UserWarning,
            stacklevel=2,
        )


def _embed(model: GraphModel, data: GraphData, nodes: NDArray[np.int64]) -> NDArray[np.float32]:
    return infer(model.module, data, nodes, read_embedding, n_layers=model.n_layers, n_tokens=model.n_tokens)


def _distances(reference: NDArray[np.float32], cells: NDArray[np.float32]) -> NDArray[np.floating]:
    """Return the distance of each cell to the nearest of the reference, in standard deviations of the reference."""
    mean, std = reference.mean(0), reference.std(0)
    # Columns that hardly vary tell nothing.
    std = np.maximum(std, _LEAST_STD * max(float(std.max()), 1e-12))
    nearest = NearestNeighbors(n_neighbors=1).fit((reference - mean) / std)
    return nearest.kneighbors((cells - mean) / std)[0][:, 0]
