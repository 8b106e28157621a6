"""Tokens and decoder of scGPT."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScGPTTokens(nn.Module):
    """Tokens of scGPT: a gene's vector and the encoding of its binned value, each normalized, added; ``<cls>`` first.

    Parameters
    ----------
    d_model
        Width of a token.
    n_genes
        Genes of the model; each has a row, followed by one for ``<cls>`` and one for padding.
    pad_value, mask_value, cls_value
        Values of padding, of genes whose value is to be predicted, and of ``<cls>``. For the last, scGPT's embedding
        task has ``pad_value``, its tokenizer for fine-tuning 0.
    max_value
        Larger values are taken for this one.
    dropout
        Rate on the encoding of values.

    Attributes
    ----------
    known
        ``(n_genes,)`` bool, genes that the vocabulary has. The others have a row of zeros and never become tokens.

    Notes
    -----
    Source: Nature Methods 2024 (doi 10.1038/s41592-024-02201-0).
    """

    known: Tensor

    def __init__(
        self,
        d_model: int,
        n_genes: int,
        *,
        pad_value: float = -2.0,
        mask_value: float = -1.0,
        cls_value: float = -2.0,
        max_value: float = 512.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_genes = n_genes
        self.pad_value, self.mask_value, self.cls_value = pad_value, mask_value, cls_value
        self.max_value = max_value
        self.table = nn.Embedding(n_genes + 2, d_model, padding_idx=n_genes + 1)
        self.table_norm = nn.LayerNorm(d_model)
        self.value_expand = nn.Linear(1, d_model)
        self.value_contract = nn.Linear(d_model, d_model)
        self.value_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("known", torch.ones(n_genes, dtype=torch.bool))

    def forward(self, feature_id: Tensor, value: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of nodes.

        Parameters
        ----------
        feature_id
            ``(n, f)`` int64 gene of each token, in ``[0, n_genes)``.
        value
            ``(n, f)`` float32 bin of each token.
        padding
            ``(n, f)`` bool, True where there is no token. Genes that are not ``known`` are padding too.

        Returns
        -------
        tokens
            ``(n, 1 + f, d_model)``.
        padding
            ``(n, 1 + f)`` bool, False for ``<cls>``.
        """
        padding = padding | ~self.known[feature_id]
        rows = feature_id.masked_fill(padding, self.n_genes + 1)
        rows = torch.cat([rows.new_full((len(rows), 1), self.n_genes), rows], dim=1)
        value = value.masked_fill(padding, self.pad_value)
        value = torch.cat([value.new_full((len(rows), 1), self.cls_value), value], dim=1)
        tokens = self.table_norm(self.table(rows)) + self.dropout(self._encoded(value))
        return tokens, torch.cat([padding.new_zeros(len(rows), 1), padding], dim=1)

    def query_tokens(self, feature_id: Tensor) -> Tensor:
        """Return the tokens of genes whose value is hidden, ``(..., d_model)`` for ``feature_id`` of any shape."""
        # One encoding serves all of them.
        value = self._encoded(self.table.weight.new_full((1,), self.mask_value))[0].expand(*feature_id.shape, -1)
        return self.table_norm(self.table(feature_id)) + self.dropout(value)

    def _encoded(self, value: Tensor) -> Tensor:
        value = value.clamp(max=self.max_value).unsqueeze(-1).to(self.value_expand.weight.dtype)
        return self.value_norm(self.value_contract(torch.relu(self.value_expand(value))))


class ScGPTDecoder(nn.Module):
    """Expression decoder of scGPT: the binned value of a gene read off its last hidden state.

    Parameters
    ----------
    d_model
        Width of a token.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, 1),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(n, f)`` predicted bins, real numbers, of ``(n, f, d_model)`` tokens."""
        return self.layers(tokens).squeeze(-1)
