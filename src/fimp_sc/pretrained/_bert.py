"""Encoders of the BERT kind, of texts and others: layers with norms last, and tokens with learned positions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from fimp_sc.nn import TransformerStack
from fimp_sc.pretrained._backbone import Backbone, SequenceTokens, copy_layer, copy_weights
from fimp_sc.pretrained._registry import FoundationReader, register
from fimp_sc.pretrained._vit import check_all_read
from fimp_sc.pretrained.files._files import CheckpointError, read_json
from fimp_sc.pretrained.files._settings import WEIGHT_FILES, open_checkpoint
from fimp_sc.pretrained.files._tokenizer import read_words, words_checksum

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from fimp_sc.data import SequenceBatch
    from fimp_sc.nn import TransformerLayer
    from fimp_sc.pretrained.files._files import Weights
    from fimp_sc.pretrained.files._settings import Config

_ROOT = "bert."
_LAYER = {
    **{f"attention.{name}": f"attention.self.{name}" for name in ("query", "key", "value")},
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "expand": "intermediate.dense",
    "contract": "output.dense",
    "feedforward_norm": "output.LayerNorm",
}
# Heads, and what is not learned.
_UNREAD = ("pooler.", "cls.", "classifier.", "embeddings.position_ids", "embeddings.token_type_ids")
# Of norms in files that were converted from TensorFlow.
_OLD_NORM = {"gamma": "weight", "beta": "bias"}


class Bert(FoundationReader):
    """Reads encoders of texts: BERT, MiniLM, BioBERT, PubMedBERT, SapBERT, BGE, and others of the model type "bert".

    A text is the mean of its tokens after the last layer, the special ones included, or its first token. What
    sentence-transformers write beside a checkpoint says which (``1_Pooling/config.json``), and whether embeddings have
    length 1 (``modules.json``). Pooler and heads are not read. RoBERTa, MPNet, DistilBERT and DeBERTa have other layers
    or positions, and are not supported.

    Notes
    -----
    Source: Devlin et al. (2019), "BERT", arXiv 1810.04805.
    """

    name = "bert"
    reads = "text"
    nodes = "texts"
    files = "config.json, model.safetensors and tokenizer.json, or the name of a repository on the Hugging Face hub"
    needed = (("config.json",), WEIGHT_FILES)

    def build(self, config: Mapping[str, Any], **stack: Any) -> Backbone:
        """Build the modules with random weights."""
        return Backbone(dict(config), TextTokens(config), build_stack(config, **stack))

    def read(
        self,
        folder: Path,
        rows: Any = None,
        *,
        pooling: Literal["mean", "cls"] | None = None,
        layer: int = -1,
        **stack: Any,
    ) -> Backbone:
        """Read a checkpoint.

        ``pooling`` is ``"mean"`` of tokens or the first token, ``"cls"``; by default what the files say, or else the
        mean. ``layer`` is the last layer that is read, counted from 1, or from the end as -1.

        Raises
        ------
        CheckpointError
            Files are missing or damaged, weights are missing, misshapen or not supported, or the configuration
            contradicts them.
        ValueError
            ``pooling`` is unknown, or there is no such layer.
        """
        if pooling not in (None, "mean", "cls"):
            raise ValueError(f"pooling must be 'mean' or 'cls', found {pooling!r}.")
        weights, settings = open_checkpoint(folder)
        place = weights.path.parent
        weights = bert_names(weights)
        words = read_words(place)
        config = {
            **bert_sizes(weights, settings, layer),
            "n_words": weights.shape("embeddings.word_embeddings.weight")[0],
            "vocabulary": None if words is None else words_checksum(words),
            "pooling": pooling or _pooling(place),
            "unit_length": _has_unit_length(place),
        }
        backbone = self.build(config, **stack)
        load_embeddings(backbone.embedding.tokens, weights)
        load_stack(backbone.stack, weights)
        check_bert_read(weights, backbone.stack)
        return backbone


class TextTokens(SequenceTokens):
    """Tokens of texts: the vector of each word or piece of one, and of its place; hidden ones are left out.

    Parameters
    ----------
    config
        ``d_model``, ``n_words``, ``n_positions``, ``eps``, ``vocabulary``, ``pooling`` and ``unit_length``.
    """

    token_size = 1
    misaligned = (
        "Texts are read and not written: hidden words are not predicted. Embed and annotate texts; of other values of "
        "the same nodes, impute the modality that holds them."
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.n_class = int(config["pooling"] == "cls")
        self.unit_length = bool(config["unit_length"])
        self.n_words, self.vocabulary, self.n_positions = config["n_words"], config["vocabulary"], config["n_positions"]
        self.tokens = BertEmbeddings(config["d_model"], config["n_words"], config["n_positions"], eps=config["eps"])

    def forward(self, nodes: SequenceBatch) -> Tensor:
        """Return ``(n, f, d_model)``, as many tokens as the longest text has."""
        absent = self.padding(nodes)
        rows = nodes["value"][:, : absent.shape[1], 0].long().masked_fill(absent, 0)
        return self.tokens(rows, torch.arange(absent.shape[1], device=rows.device))

    def padding(self, nodes: SequenceBatch) -> Tensor:
        """Return where texts have no token, or a hidden one, ``(n, f)``; what no text has is cut off."""
        used = (~nodes["padding"]).any(0).nonzero()
        longest = int(used.max()) + 1 if len(used) else 1
        return (nodes["padding"] | nodes["masked"])[:, :longest]

    def check(self, size: Sequence[int], n_coordinates: int) -> None:
        """Check the length of texts, and that their tokens are those of this model."""
        length, n_words, vocabulary = size
        if length > self.n_positions:
            raise ValueError(
                f"This model reads texts of up to {self.n_positions} tokens, found {length}: pass "
                f"max_tokens={self.n_positions} to fimp_sc.pp.text."
            )
        if n_words > self.n_words or self.vocabulary not in (None, vocabulary):
            raise ValueError(
                f"The texts were made tokens by another vocabulary, of {n_words:,} words, than that of this model, of "
                f"{self.n_words:,}: pass the folder of this model to fimp_sc.pp.text as tokenizer=."
            )


class BertEmbeddings(nn.Module):
    """Vector of a token plus that of its position, normalized.

    Parameters
    ----------
    d_model
        Width of a token.
    n_rows, n_positions
        Tokens and positions that have a vector.
    eps
        Of the norm.
    """

    def __init__(self, d_model: int, n_rows: int, n_positions: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.table = nn.Embedding(n_rows, d_model)
        self.positions = nn.Embedding(n_positions, d_model)
        self.norm = nn.LayerNorm(d_model, eps=eps)

    def forward(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return tokens.

        Parameters
        ----------
        rows, positions
            ``(n, f)`` int64; positions may be ``(f,)``, the same for all.

        Returns
        -------
        ``(n, f, d_model)``.
        """
        return self.norm(self.table(rows) + self.positions(positions))


def bert_names(weights: Weights) -> Weights:
    """Return weights under the names of the encoder alone, as they are without a head around it."""
    rooted = any(key.startswith(_ROOT) for key in weights)

    def rename(key: str) -> str:
        name = key.removeprefix(_ROOT) if rooted else key
        return re.sub(r"(?<=\.LayerNorm\.)(gamma|beta)$", lambda match: _OLD_NORM[match[0]], name)

    return weights.renamed(rename)


def bert_sizes(weights: Weights, config: Config, layer: int = -1) -> dict[str, Any]:
    """Return the sizes of an encoder from the shapes of its weights, after checking that the configuration agrees.

    Parameters
    ----------
    weights
        See :func:`bert_names`.
    config
        What ``config.json`` says, without which neither heads nor activation are known.
    layer
        Layer whose hidden states are read, counted from 1, or from the last one as -1; those above are left out.

    Returns
    -------
    What :func:`build_stack` takes, and ``n_positions``.

    Raises
    ------
    CheckpointError
        Weights and configuration do not agree, or layers compute something else.
    ValueError
        There is no such layer.
    """
    config.must("model_type", ["bert"])
    config.must("hidden_act", ["gelu", "relu"])
    config.must("position_embedding_type", ["absolute"])
    config.must("is_decoder", [False])
    d_model = weights.shape("embeddings.word_embeddings.weight")[-1]
    hidden = weights.shape("encoder.layer.0.intermediate.dense.weight")[0]
    found = {int(number[1]) for key in weights if (number := re.match(r"encoder\.layer\.(\d+)\.", key))}
    n_layers = max(found) + 1
    config.agree("hidden_size", d_model)
    config.agree("intermediate_size", hidden)
    config.agree("num_hidden_layers", n_layers)
    heads = config.count("num_attention_heads")
    if d_model % heads:
        raise config.error("num_attention_heads", f"which does not divide the width {d_model}")
    return {
        "d_model": d_model,
        "n_heads": heads,
        "n_layers": kept_layers(layer, n_layers, weights),
        "d_feedforward": hidden,
        "activation": config.values.get("hidden_act", "gelu"),
        "eps": config.eps(1e-12),
        "n_positions": weights.shape("embeddings.position_embeddings.weight")[0],
    }


def kept_layers(layer: int, n_layers: int, weights: Weights) -> int:
    """Return how many of ``n_layers`` layers are run for the hidden states of ``layer``, see :func:`bert_sizes`.

    Raises
    ------
    ValueError
        There is no such layer.
    """
    whole = isinstance(layer, int) and not isinstance(layer, bool)
    kept = layer if not whole or layer >= 0 else n_layers + 1 + layer
    if not whole or not 1 <= kept <= n_layers:
        raise ValueError(
            f"layer must be from 1 to {n_layers}, or from -{n_layers} to -1 counted from the last, found {layer}: "
            f"{str(weights.path)!r} has {n_layers} layers."
        )
    return kept


def build_stack(config: Mapping[str, Any], **options: Any) -> TransformerStack:
    """Make the layers of an encoder.

    Parameters
    ----------
    config
        See :func:`bert_sizes`.
    **options
        See :class:`~fimp_sc.nn.TransformerStack`.
    """
    return TransformerStack(
        config["d_model"],
        config["n_heads"],
        config["n_layers"],
        d_feedforward=config["d_feedforward"],
        activation=config["activation"],
        eps=config["eps"],
        norm_first=False,
        **options,
    )


def load_stack(stack: TransformerStack, weights: Weights) -> None:
    """Copy the weights of all layers that ``stack`` has."""
    for i, layer in enumerate(stack.layers):
        copy_layer(cast("TransformerLayer", layer), weights, f"encoder.layer.{i}.", _LAYER)


@torch.no_grad()
def load_embeddings(embeddings: BertEmbeddings, weights: Weights, rows: NDArray[Any] | None = None) -> None:
    """Copy vectors of tokens and positions, and their norm; that of the first type of token joins the positions.

    Parameters
    ----------
    embeddings
        Where to.
    weights
        Where from, see :func:`bert_names`.
    rows
        Row in the file of each row of ``embeddings``, -1 where it has none; by default the same.

    Raises
    ------
    CheckpointError
        When a tensor is missing or has another shape.
    """
    n_rows, width = embeddings.table.weight.shape
    table = weights.take("embeddings.word_embeddings.weight", (n_rows if rows is None else None, width))
    if rows is None:
        embeddings.table.weight.copy_(table)
    else:
        chosen = torch.as_tensor(rows)
        embeddings.table.weight.copy_(table[chosen.clamp(min=0)] * (chosen >= 0)[:, None])
    copy_weights(embeddings.positions, weights, "embeddings.position_embeddings")
    if "embeddings.token_type_embeddings.weight" in weights:
        embeddings.positions.weight += weights.take("embeddings.token_type_embeddings.weight", (None, width))[0]
    copy_weights(embeddings.norm, weights, "embeddings.LayerNorm")


def check_bert_read(weights: Weights, stack: TransformerStack) -> None:
    """Check that all weights were read but heads and the layers above those of ``stack``.

    Raises
    ------
    CheckpointError
        Others are left: the model has parts that would be missing.
    """
    view = weights.renamed(lambda key: None if _is_above(key, len(stack.layers)) else key)
    check_all_read(view, _UNREAD)


def _is_above(key: str, n_layers: int) -> bool:
    number = re.match(r"encoder\.layer\.(\d+)\.", key)
    return number is not None and int(number[1]) >= n_layers


def _pooling(folder: Path) -> str:
    """Return what the files of sentence-transformers say of the pooling, by default the mean."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    content = read_json(path)
    modes = [key for key, value in content.items() if key.startswith("pooling_mode_") and value is True]
    named = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in named:
        raise CheckpointError(
            f"{str(path)!r} asks for {' and '.join(modes) or 'no pooling'}, and only the mean of tokens or the first "
            "token is supported: pass pooling='mean' or 'cls' to fimp_sc.pretrained.load."
        )
    return named[modes[0]]


def _has_unit_length(folder: Path) -> bool:
    """Tell whether sentence-transformers divide embeddings by their length, as the list of its modules says."""
    path = folder / "modules.json"
    return path.is_file() and b"sentence_transformers.models.Normalize" in path.read_bytes()


register(Bert())
