"""scGPT: tokens of genes and binned values, its decoder, and the checkpoint they come from."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fimp_sc.data.storage._elements import shorten
from fimp_sc.nn import TransformerStack
from fimp_sc.pretrained._backbone import (
    Backbone,
    GeneTokens,
    chosen_rows,
    copy_layer,
    copy_weights,
    without_weights,
)
from fimp_sc.pretrained._registry import FoundationReader, register
from fimp_sc.pretrained.files._files import (
    CheckpointError,
    check_file,
    checkpoint_folder,
    find_weights,
    read_json,
    read_weights,
)
from fimp_sc.pretrained.files._text_tables import open_text_table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from fimp_sc.data import BinnedTokenizer, Tokenizer
    from fimp_sc.pretrained.files._files import Weights

_WEIGHTS = ("best_model.pt", "best_model.safetensors", "model.safetensors", "model.pt")
# Names in use for one and the same part: those of a mirror in the format of transformers, of the wrapper around newer
# versions of flash attention, and of torch's own attention. The released names are on the right.
_NAMES = (
    (re.compile(r"^gene_encoder\."), "encoder."),
    (re.compile(r"^transformer\."), "transformer_encoder."),
    (re.compile(r"^expr_decoder\."), "decoder."),
    (re.compile(r"\.self_attn\._impl\."), ".self_attn."),
    (re.compile(r"\.self_attn\.in_proj_"), ".self_attn.Wqkv."),
)
# Parts that neither tokens nor layers pass: heads, and what only pretraining and fine-tuning have.
_UNREAD = re.compile(
    r"(flag_encoder|batch_encoder|cls_decoder|(impute_)?mvc_decoder|grad_reverse_discriminator|sim|creterion_cce"
    r"|decoder\.(zero_logit|moe|experts|gate))(\.|$)"
)
# Of scGPT-spatial: mean of the values above zero of each gene, by its id, by which counts are divided.
_MEANS = "all_dict_mean_std.csv"
_LAYER = {
    "attention.qkv": "self_attn.Wqkv",
    "attention.output": "self_attn.out_proj",
    "attention_norm": "norm1",
    "expand": "linear1",
    "contract": "linear2",
    "feedforward_norm": "norm2",
}
_SPECIAL = re.compile(r"<\w+>")
# Settings that change what the layers compute, and the only value with which they compute what is built here.
_FIXED = {
    "input_emb_style": "continuous",
    "input_style": "binned",
    "pad_token": "<pad>",
    "norm_scheme": "post",
    "pre_norm": False,
}
# Names of the table of genes, and how far it may be filled up to a multiple of something.
_TABLES = ("encoder.embedding.weight", "gene_encoder.embedding.weight", "embedding.weight")
_PADDING = 64


class ScGPT(FoundationReader):
    """Reads checkpoints of scGPT and scGPT-spatial: ``args.json``, ``vocab.json`` and the weights.

    Names of weights may be those of flash attention, of torch's, and of a mirror in the format of transformers. With
    ``all_dict_mean_std.csv`` of scGPT-spatial beside them, counts are divided by the mean of each gene before they are
    put into bins; genes without a mean are no tokens. Its decoder, a mixture of experts, is not read.
    """

    name = "scgpt"
    reads = "expression"
    nodes = "expression"
    files = "args.json, vocab.json and best_model.pt; the authors of scGPT link it from their repository"
    needed = (("args.json",), ("vocab.json",), _WEIGHTS)

    def build(self, config: Mapping[str, Any], **stack: Any) -> Backbone:
        """Build the modules with random weights; ``dropout`` replaces that of ``config``, also in the tokens."""
        config = dict(config) | {"dropout": stack.pop("dropout", config["dropout"])}
        embedding = ScGPTTokens(
            config["embsize"],
            config["n_genes"],
            pad_value=config["pad_value"],
            mask_value=config["mask_value"],
            cls_value=config["cls_value"],
            dropout=config["dropout"],
            n_bins=config["n_bins"],
            by_mean=config.get("by_mean", False),
        )
        layers = TransformerStack(
            config["embsize"],
            config["nheads"],
            config["nlayers"],
            d_feedforward=config["d_hid"],
            norm_first=False,
            activation="relu",
            dropout=config["dropout"],
            eps=1e-5,
            **stack,
        )
        decoder = ScGPTDecoder(config["embsize"]).eval() if config["decoder"] else None
        return Backbone(config, embedding.eval(), layers.eval(), decoder)

    def read(
        self, folder: Path, rows: ArrayLike | None = None, *, cls_value: float | None = None, **stack: Any
    ) -> Backbone:
        """Read a checkpoint, in evaluation mode.

        There is no decoder where the checkpoint has none, or one that reads batch labels besides tokens. Without
        ``dropout``, it is the checkpoint's.

        Raises
        ------
        CheckpointError
            A file is missing or damaged; settings, vocabulary and weights do not fit each other; or there are weights
            of parts that would change the result and are not known here.
        ValueError
            Rows are not ids of the vocabulary, or no gene is in it.
        """
        folder = checkpoint_folder(folder)
        config = _read_config(folder / "args.json")
        vocabulary = _read_vocabulary(folder / "vocab.json")
        chosen = chosen_rows(vocabulary, rows, folder / "vocab.json", "human gene symbols")
        weights = read_weights(find_weights(folder, _WEIGHTS)).renamed(_released_name)
        _check_parts(config, weights, folder / "args.json")
        width = config["embsize"]
        table = weights.take("encoder.embedding.weight", (None, width))
        if len(vocabulary) > len(table):
            raise CheckpointError(
                f"{str(folder / 'vocab.json')!r} has {len(vocabulary):,} tokens, but 'encoder.embedding.weight' in "
                f"{str(weights.path)!r} only {len(table):,} rows: they belong to different models."
            )
        has_decoder = "decoder.fc.0.weight" in weights
        if has_decoder and weights.shape("decoder.fc.0.weight") == (width, 2 * width):
            # Trained with batch labels, which it reads beside the token.
            weights, has_decoder = weights.renamed(lambda key: None if key.startswith("decoder.") else key), False
        config |= {
            "n_genes": len(chosen),
            "cls_value": config["pad_value"] if cls_value is None else float(cls_value),
            "decoder": has_decoder,
        }
        means = _read_means(folder / _MEANS) if (folder / _MEANS).exists() else None
        if means is not None:
            # Bins of divided counts are not those that a decoder could turn into values.
            weights = weights.renamed(lambda key: None if key.startswith("decoder.") else key)
            config |= {"by_mean": True, "decoder": False}

        backbone = without_weights(self.build, config, **stack)
        _load_tokens(backbone.embedding, weights, table, chosen, vocabulary)
        if means is not None:
            usual = np.array([means.get(row, np.nan) for row in chosen.tolist()])
            backbone.embedding.known &= torch.from_numpy(~np.isnan(usual))
            backbone.embedding.usual.copy_(torch.from_numpy(np.nan_to_num(usual, nan=1.0)))
        layers: Any = backbone.stack.layers
        for i, layer in enumerate(layers):
            copy_layer(layer, weights, f"transformer_encoder.layers.{i}.", _LAYER)
        if backbone.decoder is not None:
            copy_weights(backbone.decoder.get_submodule("layers"), weights, "decoder.fc")
        unused = weights.unused()
        if unused:
            raise CheckpointError(
                f"{str(weights.path)!r} has {len(unused):,} tensors that scGPT's tokens, layers and decoder have no "
                f"place for: {shorten([repr(key) for key in unused])}. Without them the model would compute something "
                "else than it was trained for: use a checkpoint of the plain scGPT."
            )
        return backbone

    def gene_vectors(self, folder: Path) -> tuple[list[str], NDArray[Any]] | None:
        """Return names and vectors of the genes, which takes ``vocab.json`` and ``best_model.pt`` alone."""
        path = folder / "vocab.json"
        if not path.is_file():
            return None
        vocabulary = read_json(path)
        weights = read_weights(find_weights(folder, ["best_model.pt"]))
        key = next((key for key in _TABLES if key in weights), _TABLES[0])
        table = weights.take(key, (None, None)).numpy()
        ids = list(vocabulary.values())
        if not ids or any(not isinstance(i, int) or isinstance(i, bool) for i in ids) or len(set(ids)) < len(ids):
            raise CheckpointError(f"{str(path)!r} must give every token a whole number of its own.")
        if min(ids) < 0 or max(ids) >= len(table) or len(table) - len(ids) >= _PADDING:
            raise CheckpointError(
                f"{str(path)!r} has {len(ids):,} tokens with ids from {min(ids):,} to {max(ids):,}, but {key!r} in "
                f"{str(weights.path)!r} has {len(table):,} rows: they belong to different checkpoints."
            )
        genes = [token for token in vocabulary if not (token.startswith("<") and token.endswith(">"))]
        return genes, table[[vocabulary[gene] for gene in genes]]


class ScGPTTokens(GeneTokens):
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
    n_bins
        Bins of the values of a cell.
    by_mean
        Whether counts are divided by the mean of each gene first.

    Notes
    -----
    Source: Nature Methods 2024 (doi 10.1038/s41592-024-02201-0).
    """

    unit_length = True  # as its authors use embeddings
    usual: Tensor

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
        n_bins: int | None = None,
        by_mean: bool = False,
    ) -> None:
        super().__init__()
        self.reads_counts = by_mean
        self.n_genes, self.n_bins = n_genes, n_bins
        self.pad_value, self.mask_value, self.cls_value = pad_value, mask_value, cls_value
        self.max_value = max_value
        self.table = nn.Embedding(n_genes + 2, d_model, padding_idx=n_genes + 1)
        self.table_norm = nn.LayerNorm(d_model)
        self.value_expand = nn.Linear(1, d_model)
        self.value_contract = nn.Linear(d_model, d_model)
        self.value_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("known", torch.ones(n_genes, dtype=torch.bool))
        if by_mean:
            self.register_buffer("usual", torch.ones(n_genes, dtype=torch.float64))

    def tokenizer(
        self, gene_rank: Tensor, random_state: int, n_queries: int, gene_key: NDArray[np.uint64]
    ) -> Tokenizer:
        """Return what puts values, divided by the means of genes where these are known, into bins."""
        tokens = super().tokenizer(gene_rank, random_state, n_queries, gene_key)
        return replace(cast("BinnedTokenizer", tokens), usual=self.usual.cpu().numpy()) if self.reads_counts else tokens

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


def _read_config(path: Path) -> dict[str, Any]:
    """Return the settings that the modules are built from."""
    args = read_json(path)

    def number(key: str, kind: type, low: float, high: float) -> Any:
        if key not in args:
            raise CheckpointError(
                f"{str(path)!r} has no {key!r}; it has {shorten([repr(k) for k in sorted(args)], 30) or 'nothing'}. "
                "Use the args.json that was released with the weights."
            )
        value = args[key]
        fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not (fits and low <= value <= high):
            wanted = "a whole number" if kind is int else "a number"
            raise CheckpointError(
                f"{key!r} in {str(path)!r} must be {wanted} from {low:,} to {high:,}, found {value!r}."
            )
        return kind(value)

    for key, known in _FIXED.items():
        if args.get(key, known) != known:
            raise CheckpointError(
                f"{key!r} in {str(path)!r} is {args[key]!r}; only scGPT models with {known!r} can be used."
            )
    config = {key: number(key, int, 1, 100_000) for key in ("embsize", "nheads", "d_hid", "nlayers")}
    config |= {"n_bins": number("n_bins", int, 3, 100_000), "dropout": number("dropout", float, 0, 1)}
    config |= {key: number(key, float, -1_000_000, 1_000_000) for key in ("pad_value", "mask_value")}
    if config["embsize"] % config["nheads"]:
        raise CheckpointError(
            f"'nheads' in {str(path)!r} must divide 'embsize': {config['embsize']} is not a multiple of "
            f"{config['nheads']}."
        )
    return config


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Return the id of every token, special ones included; ids are 0, 1, 2, ..."""
    vocabulary = read_json(path)
    bad = [name for name, row in vocabulary.items() if type(row) is not int]
    if bad:
        raise CheckpointError(
            f"{str(path)!r} must give a whole number for every token, found {vocabulary[bad[0]]!r} for {bad[0]!r}."
        )
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise CheckpointError(
            f"The ids of the {len(vocabulary):,} tokens in {str(path)!r} must be 0 to {len(vocabulary) - 1:,}, each "
            "once: some are missing or given twice. Use the vocab.json that was released with the weights."
        )
    for token in ("<cls>", "<pad>"):
        if token not in vocabulary:
            raise CheckpointError(f"{str(path)!r} has no {token!r}: it is not a vocabulary of scGPT.")
    return vocabulary


def _released_name(key: str) -> str | None:
    for pattern, name in _NAMES:
        key = pattern.sub(name, key)
    return None if _UNREAD.match(key) else key


def _read_means(path: Path) -> dict[int, float]:
    """Return the mean of each gene by its id."""
    check_file(path)
    try:
        table = pd.read_csv(open_text_table(path, ","), index_col=0)
        means = {int(gene): float(mean) for gene, mean in table["mean"].items()}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{str(path)!r} must be a table with ids of genes in its first column and a column 'mean' ({error})."
        ) from None
    if not all(0 < mean < np.inf for mean in means.values()):
        raise CheckpointError(
            f"{str(path)!r} has means that are not above zero: take it from where the weights are from."
        )
    return means


def _check_parts(config: dict[str, Any], weights: Weights, path: Path) -> None:
    """Check that the file has as many layers as the settings say: others would be missing, or stay unused."""
    layers = {int(name[1]) for key in weights if (name := re.match(r"transformer_encoder\.layers\.(\d+)\.", key))}
    if layers != set(range(config["nlayers"])):
        found = f"layers {shorten([str(i) for i in sorted(layers)], 20)}" if layers else "none"
        raise CheckpointError(
            f"'nlayers' in {str(path)!r} is {config['nlayers']}, but {str(weights.path)!r} has {found} under "
            "'transformer_encoder.layers': they belong to different models."
        )


@torch.no_grad()
def _load_tokens(
    tokens: nn.Module, weights: Weights, table: Tensor, chosen: NDArray[np.int64], vocabulary: dict[str, int]
) -> None:
    """Copy the rows of the model's genes, ``<cls>`` and padding, and the encoder of values."""
    rows = torch.from_numpy(np.concatenate([chosen, [vocabulary["<cls>"], vocabulary["<pad>"]]]))
    weight = tokens.get_parameter("table.weight")
    torch.index_select(table, 0, rows.clamp(min=0), out=weight.data)
    weight[rows < 0] = 0.0
    tokens.get_buffer("known").copy_(rows[:-2] >= 0)
    copy_weights(tokens.get_submodule("table_norm"), weights, "encoder.enc_norm")
    copy_weights(tokens.get_submodule("value_expand"), weights, "value_encoder.linear1")
    copy_weights(tokens.get_submodule("value_contract"), weights, "value_encoder.linear2")
    copy_weights(tokens.get_submodule("value_norm"), weights, "value_encoder.norm")


register(ScGPT())
