"""Geneformer: genes in the order of their counts over usual ones, and the checkpoint that reads them."""

from __future__ import annotations

from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fimp_sc.data.storage._elements import shorten
from fimp_sc.pretrained._backbone import Backbone, RankTokens, chosen_rows, distinct_tokens, without_weights
from fimp_sc.pretrained._bert import (
    BertEmbeddings,
    bert_names,
    bert_sizes,
    build_stack,
    check_bert_read,
    load_embeddings,
    load_stack,
)
from fimp_sc.pretrained._registry import FoundationReader, register
from fimp_sc.pretrained.files._files import CheckpointError, checkpoint_folder, read_json
from fimp_sc.pretrained.files._pickles import read_pickle
from fimp_sc.pretrained.files._settings import WEIGHT_FILES, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

# What the names of the dictionaries hold, besides the release and the ending.
_TOKENS, _MEDIANS = "token_dictionary", "gene_median_dictionary"
_NAMES = ("ensembl_mapping_dict", "gene_name_id_dict")
_ENDINGS = (".json", ".pkl", ".pickle")
# Before the genes of a cell, in the second version; attention asks for positions, not for the order of tokens.
_SPECIAL = ("<cls>", "<eos>")


class Geneformer(FoundationReader):
    """Reads Geneformer, V1 and V2, from a folder with the files of a model and the dictionaries of its release.

    A model is ``config.json`` beside ``model.safetensors`` or ``pytorch_model.bin``. The dictionaries are in the folder
    ``geneformer`` of the release, and must be copied to them: ``token_dictionary_….pkl``,
    ``gene_median_dictionary_….pkl`` and, for symbols and for older ids of Ensembl, ``ensembl_mapping_dict_….pkl`` or
    ``gene_name_id_dict_….pkl``; each may be JSON instead. Pickles are read as plain data, whatever they name.
    """

    name = "geneformer"
    reads = "expression"
    nodes = "expression"
    files = (
        "config.json, model.safetensors and the dictionaries of the release: token_dictionary*.pkl, "
        "gene_median_dictionary*.pkl, ensembl_mapping_dict*.pkl"
    )
    needed = (("config.json",), WEIGHT_FILES)

    def build(self, config: Mapping[str, Any], **stack: Any) -> Backbone:
        """Build the modules with random weights."""
        tokens = GeneformerTokens(
            config["d_model"],
            config["n_genes"],
            config["n_tokens"],
            config["n_positions"],
            special=config["special"],
            pooling=config["pooling"],
            eps=config["eps"],
        )
        return Backbone(dict(config), tokens.eval(), build_stack(config, **stack).eval())

    def read(
        self,
        folder: Path,
        rows: ArrayLike | None = None,
        *,
        layer: int = -2,
        pooling: Literal["cls", "mean"] | None = None,
        **stack: Any,
    ) -> Backbone:
        """Read a checkpoint, in evaluation mode.

        ``layer`` is that of the hidden states that are read, by default the last but one, as the authors of Geneformer
        do; ``pooling`` makes the embedding of a cell, ``"cls"`` (its first token, by default where there is one) or
        ``"mean"`` (of its genes).

        Raises
        ------
        CheckpointError
            A file is missing or damaged, or dictionaries, configuration and weights do not fit each other.
        ValueError
            There is no such layer or pooling; rows are not those of the vocabulary, or no gene is in it.
        """
        folder = checkpoint_folder(folder)
        token_of, path = _tokens(folder)
        special = all(name in token_of for name in _SPECIAL)
        if pooling not in (None, "cls", "mean") or (pooling == "cls" and not special):
            choices = "'cls' or 'mean'" if special else "'mean', as this version has no <cls>"
            raise ValueError(f"pooling must be {choices}: found {pooling!r}.")
        names = _vocabulary(folder, token_of)
        ids = np.array([token_of[gene] for gene in names.values()])
        chosen = chosen_rows(names, rows, path)
        used, place = distinct_tokens(np.where(chosen >= 0, ids[chosen], -1))

        weights, settings = open_checkpoint(folder)
        weights = bert_names(weights)
        sizes = bert_sizes(weights, settings, layer)
        n_rows = weights.shape("embeddings.word_embeddings.weight")[0]
        if max(token_of.values()) >= n_rows:
            raise CheckpointError(
                f"{str(path)!r} has tokens up to {max(token_of.values()):,}, but {str(weights.path)!r} only {n_rows:,} "
                "rows for them: they belong to different releases."
            )
        config = sizes | {
            "n_genes": len(place),
            "n_tokens": len(used),
            "special": special,
            "pooling": pooling or ("cls" if special else "mean"),
        }
        backbone = without_weights(self.build, config, **stack)
        tokens: GeneformerTokens = backbone.embedding
        extra = [token_of[name] for name in _SPECIAL] if special else []
        load_embeddings(tokens.embeddings, weights, np.concatenate([used, extra]).astype(np.int64))
        load_stack(backbone.stack, weights)
        check_bert_read(weights, backbone.stack)
        tokens.place.copy_(torch.from_numpy(place))
        tokens.usual.copy_(torch.from_numpy(_medians(folder, token_of, used)))
        return backbone

    def vocabulary(self, folder: Path) -> dict[str, int]:
        """Return a row for each name of a gene; several names may lead to the same token."""
        folder = checkpoint_folder(folder)
        return {name: row for row, name in enumerate(_vocabulary(folder, _tokens(folder)[0]))}


class GeneformerTokens(RankTokens):
    """Tokens of Geneformer: a gene's vector and that of its rank in the cell, added and normalized.

    In the second version ``<cls>`` and ``<eos>`` come first; the position of ``<eos>`` is that behind the last gene.

    Parameters
    ----------
    d_model
        Width of a token.
    n_genes
        Genes of the model.
    n_tokens
        Tokens that they are; the same of several genes whose counts are added.
    n_positions
        Positions that have a vector.
    special
        Whether there are ``<cls>`` and ``<eos>``.
    pooling
        See :class:`GeneTokens`.
    eps
        Of the norm.

    Notes
    -----
    Source: Nature 2023 (doi 10.1038/s41586-023-06139-9).
    """

    def __init__(
        self,
        d_model: int,
        n_genes: int,
        n_tokens: int,
        n_positions: int,
        *,
        special: bool = True,
        pooling: str = "cls",
        eps: float = 1e-12,
    ) -> None:
        n_class = len(_SPECIAL) if special else 0
        super().__init__(n_genes, n_tokens, n_positions - n_class)
        self.n_class, self.pooling = n_class, pooling
        self.embeddings = BertEmbeddings(d_model, n_tokens + n_class, n_positions, eps=eps)

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
            ``(n, n_class + f, d_model)``.
        padding
            ``(n, n_class + f)`` bool.
        """
        rows, rank, padding = self.ranked(feature_id, padding)
        if not self.n_class:
            return self.embeddings(rows, rank), padding
        start = rows.new_zeros(len(rows), 1)
        rows = torch.cat([start + self.n_tokens, start + self.n_tokens + 1, rows], 1)
        last = (~padding).sum(1, keepdim=True) + 1
        rank = torch.cat([start, last, rank + 1], 1)
        return self.embeddings(rows, rank), torch.cat([start.bool(), start.bool(), padding], 1)


def _tokens(folder: Path) -> tuple[dict[str, int], Path]:
    """Return the token of each gene by its Ensembl id, special ones included, and the file."""
    path = _file(folder, _TOKENS)
    tokens = _dictionary(path, Integral, "a whole number that is not negative", lambda value: value >= 0)
    if len(set(tokens.values())) < len(tokens) or "<pad>" not in tokens:
        raise CheckpointError(
            f"{str(path)!r} must give each gene a token of its own, and '<pad>' one: it is not a token dictionary of "
            "Geneformer."
        )
    return {name: int(token) for name, token in tokens.items()}, path


def _medians(folder: Path, token_of: Mapping[str, int], used: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the usual value of each of the tokens ``used``."""
    path = _file(folder, _MEDIANS)
    median = _dictionary(path, Real, "a number above zero", lambda value: 0 < value < np.inf)
    name = {token: gene for gene, token in token_of.items()}
    genes = [name[token] for token in used.tolist()]
    lacking = [gene for gene in genes if gene not in median]
    if lacking:
        raise CheckpointError(
            f"{str(path)!r} has no median of {len(lacking):,} genes that are tokens, such as {shorten(lacking)}: take "
            "both dictionaries from the same release."
        )
    return np.array([float(median[gene]) for gene in genes])


def _vocabulary(folder: Path, token_of: Mapping[str, int]) -> dict[str, str]:
    """Return the gene, as the token dictionary names it, of each name: its own, then symbols and older ids."""
    genes = [gene for gene in token_of if not gene.startswith("<")]
    names = {gene: gene for gene in genes}
    for stem in _NAMES:
        for path in _files(folder, stem):
            known = _dictionary(path, str, "the Ensembl id of a gene", lambda value: True)
            names = {name: gene for name, gene in known.items() if gene in token_of} | names
    # Their own come first, whatever other files say.
    return {gene: gene for gene in genes} | names


def _files(folder: Path, stem: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if stem in path.name and path.suffix.lower() in _ENDINGS)


def _file(folder: Path, stem: str) -> Path:
    found = _files(folder, stem)
    if len(found) != 1:
        state = f"several: {shorten([repr(path.name) for path in found])}; leave that of the model" if found else "none"
        advice = "" if found else ": copy it there from the folder 'geneformer' of the release of the model"
        raise CheckpointError(f"{str(folder)!r} must hold one {stem}*.pkl or .json, and has {state}{advice}.")
    return found[0]


def _dictionary(path: Path, kind: type, what: str, fits: Any) -> dict[str, Any]:
    content = read_json(path) if path.suffix.lower() == ".json" else read_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} must hold a dictionary, found {type(content).__name__}.")
    for name, value in content.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
            raise CheckpointError(f"{str(path)!r} must give {what} for each name, found {value!r} for {name!r}.")
    return content


register(Geneformer())
