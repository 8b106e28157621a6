"""The network: tokens, layers, and one embedding per node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fimp_sc.nn._embedding import FeatureEmbedding
from fimp_sc.nn._transformer import PaperLayer, TransformerLayer, run_layers

if TYPE_CHECKING:
    from fimp_sc.data._batch import Batch

# Share of the normalised neighbourhood that a layer adds to a token before training.
_MESSAGE_SCALE = 0.5


class FIMPNetwork(nn.Module):
    """Tokens of a block in, embeddings of its destinations out.

    Parameters
    ----------
    n_features
        Number of features (genes).
    d_model
        Width of tokens and embedding.
    n_layers, n_heads
        Message-passing layers, and attention heads in each.
    layer
        ``"practical"``: pre-norm transformer layers with residuals and feed-forward part. ``"paper"``: the layer as
        the paper writes it.
    reduce
        ``"mean"`` or ``"sum"`` over neighbours.
    dropout
        Rate in practical layers.
    """

    def __init__(
        self,
        n_features: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        *,
        layer: Literal["practical", "paper"] = "practical",
        reduce: str = "mean",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = FeatureEmbedding(n_features, d_model)
        layers: list[nn.Module] = []
        for _ in range(n_layers):
            if layer == "paper":
                layers.append(PaperLayer(d_model, n_heads, reduce=reduce))
                continue
            practical = TransformerLayer(d_model, n_heads, d_feedforward=2 * d_model, dropout=dropout, reduce=reduce)
            practical.start_as_smoothing(_MESSAGE_SCALE)
            layers.append(practical)
        self.layers = nn.ModuleList(layers)

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(n_dst, d_model)``: the summary token of each destination after the last layer."""
        tokens = self.embedding(batch["feature_id"], batch["value"], batch["profile"], batch["visible"])
        padding = batch["padding"]
        padding = torch.cat([padding.new_zeros(len(padding), 1), padding], dim=1)
        return run_layers(self.layers, tokens, padding, batch, n_queries=1)[:, 0]
