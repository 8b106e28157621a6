"""The one batch layout that every modality shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor

_OF_NODES = ("nodes", "feature_id", "value", "padding", "profile", "pattern")
_OF_SEQUENCE_NODES = ("value", "masked", "padding", "coordinates")


class SequenceBatch(TypedDict):
    """Nodes of a block as sequences of ``f`` tokens of ``p`` numbers: segments of a signal, patches of an image."""

    value: Tensor
    """``(n, f, p)`` float32, standardized; 0 where not seen."""
    masked: Tensor
    """``(n, f)`` bool, tokens whose numbers are hidden."""
    padding: Tensor
    """``(n, f)`` bool, True where a node has no token."""
    position: Tensor
    """``(f,)`` int64, place of each token in the sequence."""
    coordinates: Tensor
    """``(n, c)`` float32, standardized place of a node."""
    mean: Tensor
    """``(n_dst, 1, 1)`` float32, what was taken off."""
    std: Tensor
    """``(n_dst, 1, 1)`` float32, by what numbers were divided; 0 for a node that does not move where it is seen."""
    target: Tensor
    """``(n_dst, f, p)`` float32, standardized numbers to predict."""
    target_mask: Tensor
    """``(n_dst, f)`` bool, tokens that were hidden on purpose."""


class Batch(TypedDict):
    """Tensors of one block: destinations first, then their halo.

    ``n`` is the number of nodes loaded, ``n_dst`` the number of destinations, ``f`` the number of tokens per node
    and ``g`` the number of features (genes) of the model. What is not required is there for expression only, or for
    sequences only.
    """

    nodes: Tensor
    """``(n,)`` int64, row of each node in the object."""
    n_nodes: list[int]
    """``n_layers + 1`` counts, outermost first; the last is ``n_dst``."""
    indptr: list[Tensor]
    """One per layer, int64: compressed sparse rows over the nodes that the layer updates."""
    indices: list[Tensor]
    """One per layer, int64: sources, as positions in ``nodes``."""
    edge_weight: NotRequired[list[Tensor]]
    """One per layer, float32: factor of each message, in the order of ``indices``; 1 where absent."""
    feature_id: NotRequired[Tensor]
    """``(n, f)`` int64, feature of each token."""
    value: NotRequired[Tensor]
    """``(n, f)`` float32, value of each token: centered for FIMP-base, binned for foundation models of expression."""
    padding: NotRequired[Tensor]
    """``(n, f)`` bool, True where there is no token."""
    profile: NotRequired[Tensor]
    """``(n, g)`` float32, centered values of all features, 0 where not visible."""
    visible: NotRequired[Tensor]
    """``(n_patterns, g)`` bool, features whose value may be used."""
    pattern: NotRequired[Tensor]
    """``(n,)`` int64, which pattern of ``visible`` holds for each node."""
    target: NotRequired[Tensor]
    """``(n_dst, g)`` float32, centered values to predict."""
    target_mask: NotRequired[Tensor]
    """``(n_dst, g)`` bool, entries of ``target`` that were hidden on purpose."""
    label: Tensor
    """``(n_dst,)`` int64 class, -1 where unlabeled."""
    query_id: NotRequired[Tensor]
    """``(n_dst, q)`` int64, hidden features that a decoder learns to predict."""
    query_bin: NotRequired[Tensor]
    """``(n_dst, q)`` float32, their true bins."""
    query_padding: NotRequired[Tensor]
    """``(n_dst, q)`` bool, True where a node has no more of them."""
    sequences: NotRequired[dict[str, SequenceBatch]]
    """By modality."""
    embedding: NotRequired[Tensor]
    """``(n_dst, width)`` float32, from a network that does not change; there are no tokens then."""


def without_neighbors(batch: Batch) -> Batch:
    """Return the block of the destinations by themselves, each joined with itself alone.

    Parameters
    ----------
    batch
        A block.

    Returns
    -------
    The same with ``n_dst`` nodes and as many edges; fields of the halo are left out, nothing is copied.
    """
    n_dst, n_layers = batch["n_nodes"][-1], len(batch["indptr"])
    steps = torch.arange(n_dst + 1, device=batch["nodes"].device)
    alone: dict[str, Any] = {**batch}
    alone.pop("edge_weight", None)  # of a node on itself: 1
    alone |= {name: alone[name][:n_dst] for name in _OF_NODES if name in alone}
    alone |= {
        "n_nodes": [n_dst] * (n_layers + 1),
        "indptr": [steps] * n_layers,
        "indices": [steps[:-1]] * n_layers,
        "sequences": {
            name: {key: value[:n_dst] if key in _OF_SEQUENCE_NODES else value for key, value in fields.items()}
            for name, fields in alone.get("sequences", {}).items()
        },
    }
    return cast("Batch", alone)
