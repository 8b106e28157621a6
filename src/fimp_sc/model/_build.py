"""Networks from pretrained vectors of genes or from a foundation model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc import _logging
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.sequences._tokenizers import token_shape
from fimp_sc.model.registry._fields import MEANING, SEQUENCE_KEY, X_KEY, ExpressionField, SequenceField, table_states
from fimp_sc.model.registry._shared_genes import FEW_GENES
from fimp_sc.nn._foundation import FoundationNetwork
from fimp_sc.pretrained import GeneVectors, read_gene_vectors
from fimp_sc.pretrained.genes._match import advice, match_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from fimp_sc.data import SequenceShape
    from fimp_sc.pretrained import Foundation, SequenceTokens
    from fimp_sc.pretrained.genes._match import Species

logger = logging.getLogger(__name__)

_FEW = 0.5
_MATCH = (
    "fimp_sc.pp.match_genes has these options and tells gene by gene; fimp_sc.pretrained.load takes its column as "
    "vocabulary_key=."
)


def vocabulary_rows(
    genes: NDArray[Any], vocabulary: Mapping[str, int], what: str, species: Species, orthologs: Any
) -> NDArray[np.int64]:
    """Return the row of each of ``genes`` in a vocabulary, -1 where there is none.

    Parameters
    ----------
    genes
        Names.
    vocabulary
        Row of each name.
    what
        Whose vocabulary it is, for messages.
    species, orthologs
        See :func:`~fimp_sc.pretrained.genes._match.match_names`.

    Raises
    ------
    ValueError
        When next to no gene is found.

    Warns
    -----
    UserWarning
        When half of the genes or less are found.
    """
    table = match_names([str(gene) for gene in genes], vocabulary, species=species, orthologs=orthologs)
    rows = table["id"].to_numpy(dtype=np.int64)
    found = int((rows >= 0).sum())
    hint = ""
    if found <= _FEW * len(genes):
        hint = f" {advice(table, vocabulary, species, orthologs)} {_MATCH}"
    message = f"{what} knows {f'{found:,}' if found else 'none'} of the {len(genes):,} genes of the object."
    if found <= FEW_GENES * len(genes):
        raise ValueError(f"{message}{hint}")
    if hint:
        _logging.warn(f"{message}{hint}")
    else:
        logger.info("%s", message)
    return rows


def gene_vectors(genes: NDArray[Any], source: Any) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read a table of gene vectors and find those of ``genes``.

    Parameters
    ----------
    genes
        Names.
    source
        See :func:`~fimp_sc.pretrained.read_gene_vectors`, or what it returned.

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
    known = {str(name): row for row, name in enumerate(table.names)}
    return table.rows(vocabulary_rows(genes, known, "gene_embeddings", table.species, table.orthologs))


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
        if sequence_kind(kind).words:
            raise ValueError(
                f"Nodes of the kind {kind!r} hold words, which a foundation model alone can read: pass foundation="
                "fimp_sc.pretrained.load('bert', folder). Without one, count words and pass the table to "
                "fimp_sc.pp.features."
            )
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


def foundation_network(
    foundation: Foundation,
    registry: Mapping[str, Any],
    ids: NDArray[np.int64] | None,
    stored: Mapping[str, Any] | None,
    **stack: Any,
) -> tuple[FoundationNetwork, dict[str, Any], dict[str, SequenceShape], dict[str, int]]:
    """Read a foundation model from its checkpoint, or build it from what a saved model says of it.

    Parameters
    ----------
    foundation
        Which one, and how it is used.
    registry
        Of the object.
    ids
        ``(n_genes,)`` int64, row of each gene in its vocabulary, -1 where there is none; by default found by name.
    stored
        Configuration in a saved model, whose weights are loaded afterwards.
    **stack
        ``self_loops`` and ``dropout``, see :class:`~fimp_sc.nn.TransformerStack`.

    Returns
    -------
    The network, the configuration from which it can be built again, and, of signals or images, by modality its tokens
    and their size, as from :func:`sequence_shapes`.

    Raises
    ------
    ValueError
        When the data are not what it reads, or next to no gene is known to it.
    """
    name, reader, states = foundation.name, foundation.reader, _sequence_states(registry)
    expression = registry["field_registries"][X_KEY]["state_registry"]
    if reader.reads == "expression":
        check_expression_alone(f"foundation={name!r}", expression, states)
        (table,) = table_states(expression).values()
        if stored is not None:
            found = foundation.build(stored, **stack)
        else:
            if ids is None:
                what = f"The checkpoint {foundation.checkpoint!r}"
                genes = expression[ExpressionField.NAMES]
                ids = vocabulary_rows(genes, foundation.vocabulary(), what, foundation.species, foundation.orthologs)
            found = foundation.read(ids, **stack)
        scale = table[ExpressionField.TRAINED_SCALE]
        if found.embedding.reads_counts and scale != "counts":
            raise ValueError(
                f"foundation={name!r} reads raw counts, and the values of the object are {MEANING[scale]}: "
                "name the layer with the counts with layer=."
            )
        network = FoundationNetwork(
            found.embedding, found.stack, found.decoder, trained=foundation.train, n_bins=found.embedding.n_bins
        )
        return network, dict(found.config), {}, {}
    if len(states) != 1 or expression["n_vars"]:
        raise ValueError(
            f"foundation={name!r} reads one modality, of {reader.nodes}; this model is set up with "
            f"{[*states] or 'expression'}."
        )
    modality, state = next(iter(states.items()))
    kind, size = state[SequenceField.KIND], state[SequenceField.SIZE]
    if kind != reader.reads:
        raise ValueError(f"foundation={name!r} reads {reader.nodes}, and the modality is of kind {kind!r}.")
    found = foundation.read(**stack) if stored is None else foundation.build(stored, **stack)
    tokens: SequenceTokens = found.embedding
    tokens.check(size, state[SequenceField.N_COORDINATES])
    shape = token_shape(kind, size, tokens.token_size, len(tokens.statistics().center))
    network = FoundationNetwork(tokens, found.stack, trained=foundation.train, sequence=(modality, shape.token_size))
    return network, dict(found.config), {modality: shape}, {modality: tokens.token_size}


def check_expression_alone(what: str, expression: Mapping[str, Any], others: Iterable[str]) -> None:
    """Check that a model reads one table of expression and nothing else, which ``what`` needs.

    Raises
    ------
    ValueError
        When it does not.
    """
    tables = list(table_states(expression))
    read = [*(tables if len(tables) > 1 else ()), *others]
    if read or not tables:
        raise ValueError(f"{what} is for expression alone; this model reads {read} too or instead.")
