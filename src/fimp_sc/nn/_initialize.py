"""Initialization of layers whose nodes are sequences of numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fimp_sc._recipe import recipe
from fimp_sc.nn._sequence import MARK

if TYPE_CHECKING:
    from fimp_sc.nn._layers import TransformerLayer
    from fimp_sc.nn._sequence import SequenceEmbedding


@torch.no_grad()
def start_as_gated_mean(layer: TransformerLayer, embedding: SequenceEmbedding, *, later: bool) -> None:
    r"""Initialize a layer as a signed mean, with gates, over what neighbors show at the same position.

    Token :math:`(i, t)` starts by receiving

    .. math:: \sum_h W_h \, \mathrm{mean}_j \, g_h(i, j) \, x_{jt}, \qquad g_h(i, j) = \sigma(q_h(i)^\top k_h(j) + b)

    for tokens :math:`x_{jt}` of neighbors that are not masked: queries and keys match on the position; the summary of
    a source competes with that match at about equal strength and carries no value, so that what it takes is a gate,
    which depends on the places of both nodes; keys of masked tokens lie below either. Heads of either sign give each
    pair of places a weight of its own. From a random start most of an epoch budget goes into finding this. Summaries
    read tokens evenly; where these are aligned, they receive the mean of their neighbors' summaries instead.

    Parameters
    ----------
    layer
        Pre-norm layer to change. One with heads of a single column is left as it is.
    embedding
        Which columns hold what.
    later
        Half of the heads carry what sources received in the layer before, also at their masked tokens.
    """
    attention, spread, numbers = layer.attention, embedding.spread, recipe()
    n_heads, d_model = attention.n_heads, len(attention.query.weight)
    width = d_model // n_heads
    if width < 2:
        return  # no room for both a match and a constant: the usual random start stays
    for linear in (attention.query, attention.key, attention.value, attention.output, layer.contract):
        linear.weight.mul_(numbers.sequence_noise)
        linear.bias.zero_()
    n_position, n_where = (columns.stop - columns.start for columns in (embedding.at, embedding.where))
    # A third of a head is left to gates.
    n_match = max(min(n_position, width - width // 3 - 1), 1)
    unit = (
        math.sqrt(width) / numbers.sequence_bias * spread
    )  # weight of a key that makes one logit of a column of size one
    for head in range(n_heads):
        first = head * width
        match, constant = slice(first, first + n_match), first + n_match
        gate = slice(constant + 1, first + width)
        turn = torch.linalg.qr(torch.randn(n_position, n_position))[0][:n_match]
        gain = spread * math.sqrt(numbers.sequence_focus * math.sqrt(width) / n_match)
        filled = later and head >= n_heads // 2
        for linear in (attention.query, attention.key):
            linear.weight[match, embedding.at] = gain * turn
            linear.weight[constant] = 0.0
            if n_where > 0:
                linear.weight[gate, embedding.where] = torch.randn(gate.stop - gate.start, n_where) / math.sqrt(n_where)
        attention.query.bias[constant] = numbers.sequence_bias
        summary = numbers.sequence_focus + (
            numbers.sequence_summary if embedding.whole is None else numbers.sequence_whole_summary
        )
        attention.key.weight[constant, embedding.summary_flag] = unit * summary / math.sqrt(n_position)
        # A summary asks all tokens alike, or summaries most.
        turned = -1.0 if embedding.whole is None else 1.5
        attention.query.weight[constant, embedding.summary_flag] = (
            turned * numbers.sequence_bias * spread / math.sqrt(n_position)
        )
        if not filled:
            attention.key.weight[constant, embedding.masked_flag] = numbers.sequence_masked * unit / MARK
        read = embedding.received if filled else embedding.own
        write = embedding.received_later if later else embedding.received
        columns = torch.arange(min(embedding.own.stop, width))  # narrow heads carry the leading components
        attention.value.weight[first + columns, read.start + columns] += 1.0
        size = numbers.sequence_message * spread * 2 / n_heads * (numbers.sequence_later if later else 1.0)
        attention.output.weight[write.start + columns, first + columns] += size * (1.0 if head % 2 == 0 else -0.5)
        if embedding.whole is not None:
            _pass_summaries(layer, embedding, head, spread, later=later)


def _pass_summaries(
    layer: TransformerLayer, embedding: SequenceEmbedding, head: int, spread: float, *, later: bool
) -> None:
    """Let a head carry its part of what summaries hold, into columns that summaries have to spare."""
    attention = layer.attention
    width = len(attention.query.weight) // attention.n_heads
    carried = min(embedding.own.stop, width)  # by tokens
    held = torch.arange(embedding.where.start, embedding.where.stop)
    spare = torch.arange(embedding.at.stop)
    n = min(len(held), len(spare))
    mine = torch.arange(head, n, attention.n_heads)[: width - carried]
    through = head * width + carried + torch.arange(len(mine))
    attention.value.weight[through, (spare if later else held)[mine]] += 1.0
    attention.output.weight[spare[mine], through] += spread
