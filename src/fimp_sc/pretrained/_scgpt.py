"""scGPT: tokens of genes and binned values, and the checkpoint they come from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fimp_sc.data.storage._elements import shorten
from fimp_sc.nn import TransformerStack
from fimp_sc.pretrained._foundation import Foundation, load_layer, load_module
from fimp_sc.pretrained._scgpt_modules import ScGPTDecoder, ScGPTTokens
from fimp_sc.pretrained._scgpt_settings import SPECIAL, chosen_rows, read_config, read_vocabulary
from fimp_sc.pretrained.files._files import CheckpointError, checkpoint_folder, find_weights, read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

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
    r"(flag_encoder|batch_encoder|cls_decoder|mvc_decoder|grad_reverse_discriminator|sim|creterion_cce"
    r"|decoder\.zero_logit)(\.|$)"
)
_LAYER = {
    "attention.qkv": "self_attn.Wqkv",
    "attention.output": "self_attn.out_proj",
    "attention_norm": "norm1",
    "expand": "linear1",
    "contract": "linear2",
    "feedforward_norm": "norm2",
}


def build_scgpt(config: dict[str, Any], **stack_options: Any) -> Foundation:
    """Build the modules of scGPT with random weights, as for a model whose own weights are loaded next.

    Parameters
    ----------
    config
        :attr:`Foundation.config` of :func:`read_scgpt`.
    stack_options
        ``source``, ``aggregate``, ``self_loops`` and ``dropout`` of :class:`TransformerStack`; the last replaces the
        one of ``config``, also in the tokens.
    """
    config = config | {"dropout": stack_options.pop("dropout", config["dropout"])}
    embedding = ScGPTTokens(
        config["embsize"],
        config["n_genes"],
        pad_value=config["pad_value"],
        mask_value=config["mask_value"],
        cls_value=config["cls_value"],
        dropout=config["dropout"],
    )
    stack = TransformerStack(
        config["embsize"],
        config["nheads"],
        config["nlayers"],
        d_feedforward=config["d_hid"],
        norm_first=False,
        activation="relu",
        dropout=config["dropout"],
        eps=1e-5,
        **stack_options,
    )
    decoder = ScGPTDecoder(config["embsize"]).eval() if config["decoder"] else None
    return Foundation("scgpt", config, embedding.eval(), stack.eval(), decoder)


def read_scgpt(
    checkpoint: str | Path,
    *,
    genes: Sequence[str] | None = None,
    rows: ArrayLike | None = None,
    cls_value: float | None = None,
    **stack_options: Any,
) -> Foundation:
    """Read a checkpoint of scGPT.

    Parameters
    ----------
    checkpoint
        Folder (or name of a hub repository) with ``args.json``, ``vocab.json`` and the weights, ``best_model.pt`` or
        ``model.safetensors``. The names of flash attention, of torch's and of a mirror in the format of
        transformers are understood.
    genes
        Names of the model's genes, human symbols as in the vocabulary. Those that it lacks never become tokens.
    rows
        The same as ids of the vocabulary, ``(n_genes,)``, -1 for genes that it lacks. With neither, the genes are the
        whole vocabulary, by id.
    cls_value
        Value of ``<cls>``, see :class:`ScGPTTokens`; ``None`` takes the one of padding.
    stack_options
        ``source``, ``aggregate``, ``self_loops`` and ``dropout`` of :class:`TransformerStack`. Without the last, it is
        the checkpoint's.

    Returns
    -------
    :class:`Foundation` in evaluation mode. Its vocabulary has the id of each gene, without special tokens. The decoder
    is ``None`` where the checkpoint has none, or one that reads batch labels besides tokens.

    Raises
    ------
    CheckpointError
        A file is missing or damaged; settings, vocabulary and weights do not fit each other; or there are weights of
        parts that would change the result and are not known here.
    ValueError
        Both ``genes`` and ``rows`` are given, ids are not of the vocabulary, or no gene is in it.
    """
    folder = checkpoint_folder(checkpoint)
    config = read_config(folder / "args.json")
    vocabulary = read_vocabulary(folder / "vocab.json")
    chosen = chosen_rows(vocabulary, genes, rows, folder / "vocab.json")
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

    # No memory is filled with random numbers that the file replaces.
    with torch.device("meta"):
        foundation = build_scgpt(config, **stack_options)
    modules = (foundation.embedding, foundation.stack, foundation.decoder)
    for module in modules:
        if module is not None:
            module.to_empty(device="cpu")
    _load_tokens(foundation.embedding, weights, table, chosen, vocabulary)
    layers: Any = foundation.stack.layers
    for i, layer in enumerate(layers):
        load_layer(layer, weights, f"transformer_encoder.layers.{i}.", _LAYER)
    if foundation.decoder is not None:
        load_module(foundation.decoder.get_submodule("layers"), weights, "decoder.fc")
    unused = weights.unused()
    if unused:
        raise CheckpointError(
            f"{str(weights.path)!r} has {len(unused):,} tensors that scGPT's tokens, layers and decoder have no place "
            f"for: {shorten([repr(key) for key in unused])}. Without them the model would compute something else than "
            "it was trained for: use a checkpoint of the plain scGPT."
        )
    foundation.vocabulary = {name: row for name, row in vocabulary.items() if not SPECIAL.fullmatch(name)}
    return foundation


def _released_name(key: str) -> str | None:
    for pattern, name in _NAMES:
        key = pattern.sub(name, key)
    return None if _UNREAD.match(key) else key


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
    load_module(tokens.get_submodule("table_norm"), weights, "encoder.enc_norm")
    load_module(tokens.get_submodule("value_expand"), weights, "value_encoder.linear1")
    load_module(tokens.get_submodule("value_contract"), weights, "value_encoder.linear2")
    load_module(tokens.get_submodule("value_norm"), weights, "value_encoder.norm")
