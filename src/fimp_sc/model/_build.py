"""What a model is built from besides its data: pretrained vectors of genes, or a foundation model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc import _logging
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.sequences._tokenizers import token_shape
from fimp_sc.model.registry._fields import SEQUENCE_KEY, X_KEY, SequenceField
from fimp_sc.model.registry._shared_genes import FEW_GENES
from fimp_sc.nn import FoundationNetwork
from fimp_sc.pretrained import GeneVectors, build_foundation, read_foundation, read_gene_vectors
from fimp_sc.pretrained._sequence_inputs import own_token_size, sequence_input
from fimp_sc.pretrained.files._files import checkpoint_folder
from fimp_sc.pretrained.genes._match import advice, match_names
from fimp_sc.pretrained.genes._vocabulary import read_vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fimp_sc.data import SequenceShape
    from fimp_sc.pretrained import Foundation

logger = logging.getLogger(__name__)

_FEW = 0.5
_MATCH = "fimp_sc.pp.match_genes has these options and tells gene by gene; its column goes into vocabulary_key=."


def vocabulary_rows(genes: NDArray[Any], vocabulary: Any, what: str, **how: Any) -> NDArray[np.int64]:
    """Return the row of each of ``genes`` in a vocabulary, -1 where there is none.

    Parameters
    ----------
    genes
        Names.
    vocabulary
        See :func:`~fimp_sc.pretrained.genes._vocabulary.read_vocabulary`.
    what
        Whose vocabulary it is, for messages.
    **how
        ``species`` and ``orthologs``, see :func:`~fimp_sc.pretrained.genes._match.match_names`.

    Raises
    ------
    ValueError
        When next to no gene is found.

    Warns
    -----
    UserWarning
        When half of the genes or less are found.
    """
    known = read_vocabulary(vocabulary)
    table = match_names([str(gene) for gene in genes], known, **how)
    rows = table["id"].to_numpy(dtype=np.int64)
    found = int((rows >= 0).sum())
    hint = ""
    if found <= _FEW * len(genes):
        hint = f" {advice(table, known, how.get('species', 'human'))} {_MATCH}"
    message = f"{what} knows {f'{found:,}' if found else 'none'} of the {len(genes):,} genes of the object."
    if found <= FEW_GENES * len(genes):
        raise ValueError(f"{message}{hint}")
    if hint:
        _logging.warn(f"{message}{hint}")
    else:
        logger.info("%s", message)
    return rows


def gene_vectors(genes: NDArray[Any], source: Any, **how: Any) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read a table of gene vectors and find those of ``genes``.

    Parameters
    ----------
    genes
        Names.
    source
        See :func:`~fimp_sc.pretrained.read_gene_vectors`.
    **how
        See :func:`vocabulary_rows`.

    Returns
    -------
    ``(n_genes, width)`` float32, zeros where there is none, and ``(n_genes,)`` bool, where there is one.

    Raises
    ------
    CheckpointError
        When the table cannot be read.
    ValueError
        When it has a vector for none of the genes.
    """
    table = source if isinstance(source, GeneVectors) else read_gene_vectors(source)
    return table.rows(vocabulary_rows(genes, table.names.tolist(), "gene_embeddings", **how))


def sequence_shapes(
    registry: Mapping[str, Any], token_size: int | Mapping[str, int] | None, *, warn: bool
) -> tuple[dict[str, SequenceShape], dict[str, int]]:
    """Return tokens of signals and images, and the time points or pixels of their sides, by modality.

    Parameters
    ----------
    registry
        Of the object.
    token_size
        See :class:`~fimp_sc.model.FIMP`.
    warn
        Whether to say what is left out.

    Raises
    ------
    TypeError
        When a size is no whole number.
    ValueError
        When a size does not fit, or is given for what is not there.
    """
    states = _sequence_states(registry)
    given = token_size if isinstance(token_size, Mapping) else dict.fromkeys(states, token_size)
    unknown = [name for name in given if name not in states]
    if unknown or (token_size is not None and not states):
        raise ValueError(f"token_size is for signals and images, {list(states)} here: found {token_size!r}.")
    shapes, sizes = {}, {}
    for name, state in states.items():
        kind, size = state[SequenceField.KIND], state[SequenceField.SIZE]
        wanted = given.get(name)
        if wanted is not None and (not isinstance(wanted, Integral) or isinstance(wanted, bool)):
            raise TypeError(f"token_size must be a whole number, found {wanted!r}.")
        sizes[name] = sequence_kind(kind).default_token_size(size) if wanted is None else int(wanted)
        shapes[name] = token_shape(kind, size, sizes[name], state[SequenceField.N_COORDINATES])
        rest = sequence_kind(kind).left_over(size, sizes[name])
        if rest and warn:
            _logging.warn(f"{name!r}: {rest}, are left out. Choose another token_size to use them.")
    return shapes, sizes


def _sequence_states(registry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        key.removeprefix(SEQUENCE_KEY): field["state_registry"]
        for key, field in registry["field_registries"].items()
        if key.startswith(SEQUENCE_KEY)
    }


def sequence_network(
    name: str,
    registry: Mapping[str, Any],
    checkpoint: Any,
    stored: Mapping[str, Any] | None,
    *,
    trained: str,
    **stack: Any,
) -> tuple[FoundationNetwork, dict[str, Any], dict[str, SequenceShape], dict[str, int]]:
    """Read a foundation model of signals or images, or build it from what a saved model says of it.

    Parameters
    ----------
    name
        ``"vit"`` or ``"brainlm"``.
    registry
        Of the object.
    checkpoint, stored, trained, **stack
        See :func:`foundation_network`.

    Returns
    -------
    The network, the configuration from which it can be built again, and by modality its tokens and their size, as from
    :func:`sequence_shapes`.

    Raises
    ------
    ValueError
        When there is not one modality that it can read.
    """
    states = _sequence_states(registry)
    if len(states) != 1 or registry["field_registries"][X_KEY]["state_registry"]["n_vars"]:
        raise ValueError(
            f"foundation={name!r} reads one modality, of {'images' if name == 'vit' else 'signals'}; this model is "
            f"set up with {[*states] or 'expression'}."
        )
    if stored is not None:
        found: Foundation = build_foundation(name, stored, **stack)
    else:
        found = read_foundation(name, checkpoint_folder(checkpoint), **stack)
    modality, state = next(iter(states.items()))
    kind, size = state[SequenceField.KIND], state[SequenceField.SIZE]
    found_input: Any = sequence_input(found, kind, size, state[SequenceField.N_COORDINATES])
    token_size = own_token_size(found)
    shape = token_shape(kind, size, token_size, len(found_input.statistics().center))
    network = FoundationNetwork(found_input, found.stack, trained=trained, sequence=(modality, shape.token_size))
    return network, dict(found.config), {modality: shape}, {modality: token_size}


def foundation_network(
    name: str,
    genes: NDArray[Any],
    checkpoint: Any,
    rows: NDArray[np.int64] | None,
    stored: Mapping[str, Any] | None,
    *,
    trained: str,
    species: str,
    orthologs: Any,
    **stack: Any,
) -> tuple[FoundationNetwork, dict[str, Any]]:
    """Read a foundation model from its checkpoint, or build it from what a saved model says of it.

    Parameters
    ----------
    name
        Of the foundation model; one that reads expression.
    genes
        Names of the genes of the model.
    checkpoint
        Folder, or hub id.
    rows
        ``(n_genes,)`` int64, row of each gene in the vocabulary, -1 where there is none; by default found by name.
    stored
        Configuration in a saved model, whose weights are loaded afterwards.
    trained
        See :func:`~fimp_sc.nn._foundation.choose_trained`.
    species, orthologs
        See :func:`~fimp_sc.pretrained.genes._match.match_names`.
    **stack
        See :class:`~fimp_sc.nn.TransformerStack`.

    Returns
    -------
    The network, and the configuration from which it can be built again.
    """
    if stored is not None:
        found: Foundation = build_foundation(name, stored, **stack)
    else:
        folder = checkpoint_folder(checkpoint)
        if rows is None:
            rows = vocabulary_rows(
                genes, folder, f"The checkpoint {str(checkpoint)!r}", species=species, orthologs=orthologs
            )
        found = read_foundation(name, folder, rows=rows, **stack)
    network = FoundationNetwork(
        found.embedding, found.stack, found.decoder, trained=trained, n_bins=found.config["n_bins"]
    )
    return network, dict(found.config)
