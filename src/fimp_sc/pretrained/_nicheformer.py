"""Nicheformer: tokens of species, assay and modality, then genes in the order of their counts over usual ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fimp_sc.data.storage._elements import shorten
from fimp_sc.pretrained._backbone import (
    Backbone,
    RankTokens,
    chosen_rows,
    copy_layer,
    copy_weights,
    distinct_tokens,
    without_weights,
)
from fimp_sc.pretrained._bert import build_stack, kept_layers
from fimp_sc.pretrained._registry import FoundationReader, register
from fimp_sc.pretrained._vit import check_all_read
from fimp_sc.pretrained.files._files import CheckpointError, check_file, checkpoint_folder
from fimp_sc.pretrained.files._settings import WEIGHT_FILES, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    from fimp_sc.nn import TransformerLayer
    from fimp_sc.pretrained.files._files import Weights

_ROOT = "nicheformer."
_LAYER = {
    "attention.qkv": "self_attn.in_proj",
    "attention.output": "self_attn.out_proj",
    "attention_norm": "norm1",
    "expand": "linear1",
    "contract": "linear2",
    "feedforward_norm": "norm2",
}
# Heads, and the layer of which torch makes copies.
_UNREAD = ("encoder_layer.", "classifier_head.", "pooler_head.", "cls_head.", "pos")
# Tokens below are not genes.
_FIRST_GENE = 30
_MODALITY = {"dissociated": 3, "spatial": 4}
_SPECIES = {"human": 5, "mouse": 6}
_ASSAY = {
    "merfish": 7,
    "cosmx": 8,
    "xenium": 9,
    "10x 5' v2": 10,
    "10x 3' v3": 11,
    "10x 3' v2": 12,
    "10x 5' v1": 13,
    "10x 3' v1": 14,
    "10x 3' transcription profiling": 15,
    "10x 5' transcription profiling": 16,
    "CITE-seq": 17,
    "Smart-seq v4": 18,
}
_SPATIAL = ("merfish", "cosmx", "xenium")
_GENES = ("genes.txt", "model.h5ad")


class Nicheformer(FoundationReader):
    """Reads Nicheformer from a folder with its weights, its order of genes, and the usual counts of a technique.

    Weights are ``model.safetensors`` or ``pytorch_model.bin``, with ``config.json`` where there is one. The order of
    genes is that of ``model.h5ad`` from the repository of its authors, or ``genes.txt`` with an Ensembl id in each
    line; from there are ``merfish_mean_script.npy`` and its likes, too.
    """

    name = "nicheformer"
    reads = "expression"
    nodes = "expression"
    files = (
        "model.safetensors, model.h5ad (or genes.txt) and the means of the technique, such as xenium_mean_script.npy"
    )
    needed = (WEIGHT_FILES,)

    def build(self, config: Mapping[str, Any], **stack: Any) -> Backbone:
        """Build the modules with random weights."""
        tokens = NicheformerTokens(config["d_model"], config["n_genes"], config["n_tokens"], config["n_positions"])
        return Backbone(dict(config), tokens.eval(), build_stack(config, **stack).eval())

    def read(
        self,
        folder: Path,
        rows: ArrayLike | None = None,
        *,
        assay: str | None = None,
        species: str = "human",
        layer: int = -1,
        **stack: Any,
    ) -> Backbone:
        """Read a checkpoint, in evaluation mode.

        ``assay`` and ``species`` are tokens before the genes of a cell, and the assay decides by which usual counts of
        genes its own are divided. ``layer`` is that of the hidden states that are read, by default the last.

        Raises
        ------
        CheckpointError
            A file is missing or damaged, or configuration, genes, means and weights do not fit each other.
        ValueError
            ``assay`` is missing or unknown, there is no such layer, rows are not those of the vocabulary, or no gene
            is in it.
        """
        if assay not in _ASSAY:
            raise ValueError(
                f"Nicheformer reads the assay of cells: pass assay= to load, one of {', '.join(map(repr, _ASSAY))}; "
                f"found {assay!r}. For a technique that it was not trained on, such as Visium, take the nearest."
            )
        technique = assay if assay in _SPATIAL else "dissociated"
        folder = checkpoint_folder(folder)
        genes, path = _genes(folder)
        used, place = distinct_tokens(chosen_rows(genes, rows, path))

        weights, settings = open_checkpoint(folder)
        rooted = any(key.startswith(_ROOT) for key in weights)
        weights = weights.renamed(lambda key: key.removeprefix(_ROOT) if rooted else key)
        settings.must("learnable_pe", [True])
        table = weights.take("embeddings.weight", (None, None))
        if len(table) < _FIRST_GENE + len(genes):
            raise CheckpointError(
                f"{str(path)!r} has {len(genes):,} genes, but {str(weights.path)!r} only {len(table):,} rows, "
                f"{_FIRST_GENE} of which are no genes: they belong to different models."
            )
        config = _sizes(weights, settings, table.shape[1], layer)
        config |= {"n_genes": len(place), "n_tokens": len(used)}
        backbone = without_weights(self.build, config, **stack)
        tokens: NicheformerTokens = backbone.embedding
        modality = _MODALITY["spatial" if technique == assay else "dissociated"]
        context = [_SPECIES[species], _ASSAY[assay], modality]
        with torch.no_grad():
            tokens.table.weight.copy_(table[np.concatenate([used + _FIRST_GENE, context])])
        copy_weights(tokens.positions, weights, "positional_embedding")
        for i, part in enumerate(backbone.stack.layers):
            copy_layer(cast("TransformerLayer", part), weights, f"encoder.layers.{i}.", _LAYER)
        above = tuple(f"encoder.layers.{i}." for i in range(config["n_layers"], config["n_layers_file"]))
        check_all_read(weights, (*_UNREAD, *above))
        tokens.place.copy_(torch.from_numpy(place))
        means = _means(folder / f"{technique}_mean_script.npy", len(genes))
        tokens.usual.copy_(torch.from_numpy(means[used]))
        return backbone

    def vocabulary(self, folder: Path) -> dict[str, int]:
        """Return the place of each gene in the order of the model."""
        return {gene: row for row, gene in enumerate(_genes(checkpoint_folder(folder))[0])}


class NicheformerTokens(RankTokens):
    """Tokens of Nicheformer: vectors of species, assay and modality, then those of genes; each with that of its place.

    Parameters
    ----------
    d_model
        Width of a token.
    n_genes, n_tokens
        See :class:`RankTokens`.
    n_positions
        Positions that have a vector.

    Notes
    -----
    Source: Nature Methods 2025 (doi 10.1038/s41592-025-02814-z).
    """

    n_class = 3
    pooling = "mean"

    def __init__(self, d_model: int, n_genes: int, n_tokens: int, n_positions: int) -> None:
        super().__init__(n_genes, n_tokens, n_positions - self.n_class)
        self.table = nn.Embedding(n_tokens + self.n_class, d_model)
        self.positions = nn.Embedding(n_positions, d_model)

    def forward(self, feature_id: Tensor, value: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of nodes.

        Parameters
        ----------
        feature_id
            ``(n, f)`` int64 gene of each token, in the order of their ranks.
        value
            ``(n, f)``, not read.
        padding
            ``(n, f)`` bool, True where there is no token. Genes that are not ``known`` are padding, too.

        Returns
        -------
        tokens
            ``(n, 3 + f, d_model)``.
        padding
            ``(n, 3 + f)`` bool.
        """
        rows, rank, padding = self.ranked(feature_id, padding)
        context = torch.arange(self.n_class, device=rows.device).expand(len(rows), -1)
        rows = torch.cat([self.n_tokens + context, rows], 1)
        tokens = self.table(rows) + self.positions(torch.cat([context, rank + self.n_class], 1))
        return tokens, torch.cat([torch.zeros_like(context, dtype=torch.bool), padding], 1)


def _sizes(weights: Weights, settings: Any, width: int, layer: int) -> dict[str, Any]:
    hidden = weights.shape("encoder.layers.0.linear1.weight")[0]
    found = {int(number[1]) for key in weights if (number := re.match(r"encoder\.layers\.(\d+)\.", key))}
    n_layers = max(found) + 1
    for key, size in (("dim_model", width), ("dim_feedforward", hidden), ("nlayers", n_layers)):
        settings.agree(key, size)
    heads = settings.count("nheads", 16)
    if width % heads:
        raise settings.error("nheads", f"which does not divide the width {width}")
    return {
        "d_model": width,
        "n_heads": heads,
        "n_layers": kept_layers(layer, n_layers, weights),
        "n_layers_file": n_layers,
        "d_feedforward": hidden,
        "activation": "relu",
        "eps": 1e-12,
        "n_positions": weights.shape("positional_embedding.weight")[0],
    }


def _genes(folder: Path) -> tuple[list[str], Path]:
    """Return the genes of the model in its order, and the file that says so."""
    path = next((folder / name for name in _GENES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{str(folder)!r} has no {' or '.join(map(repr, _GENES))}, the order of the genes: copy model.h5ad there "
            "from the folder data/model_means of the repository theislab/nicheformer."
        )
    check_file(path)
    try:
        if path.suffix == ".h5ad":
            import anndata

            genes = [str(gene) for gene in anndata.read_h5ad(path, backed="r").var_names]
        else:
            genes = path.read_text(encoding="utf-8").split()
    except Exception as error:  # damaged files of HDF5 raise anything
        raise CheckpointError(f"{str(path)!r} cannot be read ({type(error).__name__}): download it again.") from None
    twice = sorted({gene for gene in genes if genes.count(gene) > 1}) if len(set(genes)) < len(genes) else []
    if not genes or twice:
        raise CheckpointError(f"{str(path)!r} must name each gene once: found {shorten(twice) or 'none'}.")
    return genes, path


def _means(path: Path, n_genes: int) -> NDArray[np.float64]:
    """Return the usual count of each gene, whole numbers as for training; 1 where it was not measured."""
    check_file(path)
    try:
        means = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as an array ({error}): download it again.") from None
    if means.shape != (n_genes,) or means.dtype.kind not in "fiu":
        raise CheckpointError(
            f"{str(path)!r} must have a number for each of {n_genes:,} genes, found {means.dtype} of shape "
            f"{means.shape}: take it from where the order of genes is from."
        )
    rounded = np.floor(np.nan_to_num(means.astype(np.float64)) + 0.5)
    return np.where(rounded == 0, 1.0, rounded)


register(Nicheformer())
