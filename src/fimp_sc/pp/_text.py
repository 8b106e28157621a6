"""Texts and a graph of them, such as terms of an ontology, as one modality of a MuData."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._logging import warn
from fimp_sc._options import checked
from fimp_sc.data._modality import CONNECTIVITIES_KEY, check_modality_name, make_mudata
from fimp_sc.data._nodes import node_names, one_label_each, square_by_name
from fimp_sc.data.graph._adjacency import check_adjacency, report_isolated
from fimp_sc.data.sequences._text import TOKENS_KEY
from fimp_sc.data.storage._elements import shorten
from fimp_sc.pretrained.files._tokenizer import TextTokenizer, words_checksum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mudata import MuData

logger = logging.getLogger(__name__)

_TEXT_KEY = "text"


@checked
def text(
    texts: Mapping[Any, str] | pd.Series | Sequence[str],
    *,
    tokenizer: str | Path,
    edges: Any = None,
    adjacency: Any = None,
    directed: bool = False,
    labels: Any = None,
    names: Sequence[Any] | None = None,
    max_tokens: int = 128,
    modality: str = "text",
) -> MuData:
    """Make a MuData of texts, as tokens of a foundation model, and a graph: documents, or terms of an ontology.

    Needs the package tokenizers (``pip install tokenizers``).

    Parameters
    ----------
    texts
        A text for each node: a dictionary or series by name, or a list.
    tokenizer
        Folder of the foundation model that is to read the texts, with its ``tokenizer.json``; that file; or the name of
        a repository on the Hugging Face hub.
    edges
        ``(e, 2)`` array, list of pairs, or data frame whose first two columns are meant: names of the nodes that each
        edge joins, as the source and the destination. Texts of a list without ``names`` are named by their position,
        counted from 0.
    adjacency
        ``(n, n)`` array, data frame or sparse matrix to use as the graph instead; entry ``[i, j]`` is the weight of the
        edge from ``j`` to ``i``.
    directed
        Whether ``edges`` send messages from source to destination alone. By default they do both ways, as between a
        term and the more general one.
    labels
        Data frame or dictionary of columns, or one array (column ``"label"``), with one label for each text. An index
        with the names of nodes, here and of ``adjacency``, says what is whose, whatever the order.
    names
        Names of the texts of a list.
    max_tokens
        Tokens of a text, with those that mark its start and end. The rest of longer texts is left out, with a warning.
        Attention costs the square of it.
    modality
        Name of the modality.

    Returns
    -------
    MuData with the modality ``modality`` without variables, whose

    - ``obsm["token_ids"]`` is an int32 array ``(n, longest)``, numbers of tokens in the vocabulary, -1 after the last
      of a text;
    - ``obs["text"]`` has the texts;
    - ``obsp["spatial_connectivities"]`` is a CSR matrix without self-loops, float32 (1) of ``edges``;
    - ``uns["fimp_modality"]`` has ``kind="text"``, ``graph``, ``n_words`` (of the vocabulary) and ``vocabulary`` (a
      checksum of it), by which a foundation model tells whether the tokens are its own.

    Raises
    ------
    CheckpointError
        There is no tokenizer in the folder, or it cannot be read.
    ImportError
        The package tokenizers is not installed.
    TypeError
        Something that is not a text.
    ValueError
        No texts; neither or both of ``edges`` and ``adjacency``; edges between names that are not there, or none
        between different nodes; labels or a graph of another number of nodes; broken characters; or ``max_tokens`` that
        leaves no room for text.

    Warns
    -----
    UserWarning
        Texts that are empty or longer than ``max_tokens``, or nodes without neighbors.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> terms = {"apoptosis": "A programmed cell death.", "cell death": "A cell ceases to function."}
    >>> mdata = fimp.pp.text(terms, edges=[("apoptosis", "cell death")], tokenizer="all-MiniLM-L6-v2/")
    >>> fimp.data.describe_modality(mdata)["n_edges"]
    2
    """
    from anndata import AnnData

    check_modality_name(modality)
    if (edges is None) == (adjacency is None):
        raise ValueError(
            "A graph is needed: pass edges=, pairs of names, or adjacency=, (n, n) weights; one of the two."
        )
    if directed and edges is None:
        raise ValueError("directed= is for edges=: entry [i, j] of adjacency= is the edge from j to i. Leave it out.")
    named = isinstance(texts, Mapping | pd.Series)
    if named and names is not None:
        raise ValueError("names= does not apply to a dictionary or series of texts, which has its own names.")
    if isinstance(texts, str):
        raise TypeError("texts must be a list, dictionary or series of texts, found one text.")
    if isinstance(texts, Mapping):
        names, values = list(texts), list(texts.values())
    else:
        names, values = list(texts.index) if isinstance(texts, pd.Series) else names, list(texts)
    if not values:
        raise ValueError("texts is empty: pass at least one text.")
    numbered = names is None
    nodes = node_names(names, len(values), "text", "names")
    other = [name for name, value in zip(nodes, values, strict=True) if not isinstance(value, str)]
    if other:
        raise TypeError(
            f"texts must be texts, and {len(other):,} of {len(values):,} are not, such as that of {other[0]!r}: "
            f"{values[nodes.index(other[0])]!r}. Leave these nodes out, or give them a text."
        )
    broken = [name for name, value in zip(nodes, values, strict=True) if not _is_unicode(value)]
    if broken:
        raise ValueError(
            f"{len(broken):,} of {len(values):,} texts have characters that are none of Unicode (half of a pair), such "
            f"as that of {broken[0]!r}: read them again with the encoding of their file."
        )
    obs = pd.DataFrame(
        {_TEXT_KEY: values} | one_label_each(labels, nodes, "text", (_TEXT_KEY,), given=not numbered),
        index=pd.Index(nodes),
    )
    if edges is None:
        found = square_by_name(adjacency, nodes, "adjacency", given=not numbered)
        graph = check_adjacency(found, len(nodes), where="adjacency", what="text", self_loops=False)
    else:
        known = [str(i) for i in range(len(nodes))] if numbered else nodes
        graph = _joined(edges, known, directed)
    if graph.nnz == 0:
        raise ValueError(f"{'adjacency' if edges is None else 'edges'} has no edge between different texts.")
    read = TextTokenizer(tokenizer, max_tokens)
    ids, n_cut = read(values)
    empty = [repr(name) for name, value in zip(nodes, values, strict=True) if not value.strip()]
    if empty:
        warn(f"{len(empty):,} of {len(nodes):,} texts are empty: {shorten(empty)}. Neighbors learn nothing from them.")
    if n_cut:
        warn(
            f"{n_cut:,} of {len(nodes):,} texts are longer than {max_tokens} tokens, and their ends are left out: "
            "raise max_tokens= to read more of them."
        )
    adata = AnnData(obs=obs)
    adata.obsm[TOKENS_KEY] = ids
    info = {
        "kind": "text",
        "graph": "adjacency" if edges is None else "edges",
        "n_words": len(read.words),
        "vocabulary": words_checksum(read.words),
    }
    mdata = make_mudata(adata, modality, info, graph)
    report_isolated(graph, nodes, "text")
    logger.info(
        "%d texts of up to %d tokens, %d edges, in mdata[%r].obsp[%r].",
        len(nodes), ids.shape[1], graph.nnz, modality, CONNECTIVITIES_KEY,
    )  # fmt: skip
    return mdata


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _joined(edges: Any, names: Sequence[str], directed: bool) -> sparse.csr_matrix:
    """Return the graph of pairs of names, source first, of which those that repeat count once."""
    pairs = edges.to_numpy()[:, :2] if isinstance(edges, pd.DataFrame) else np.asarray(_listed(edges), dtype=object)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"edges must be pairs of names, (e, 2), found the shape {pairs.shape}.")
    place = pd.Index(names)
    source, destination = (place.get_indexer(pd.Index(column.astype(str))) for column in pairs.T)
    lacking = pairs[(source < 0) | (destination < 0)]
    if len(lacking):
        unknown = dict.fromkeys(repr(str(name)) for name in lacking.ravel() if str(name) not in place)
        raise ValueError(
            f"{len(lacking):,} of {len(pairs):,} edges lead to names without a text: {shorten(list(unknown))}. Give "
            "these nodes a text, or leave their edges out."
        )
    if not directed:
        source, destination = np.concatenate([source, destination]), np.concatenate([destination, source])
    other = source != destination
    weights = np.ones(int(other.sum()), dtype=np.float32)
    graph = sparse.csr_matrix((weights, (destination[other], source[other])), shape=(len(names), len(names)))
    graph.data[:] = 1.0
    graph.sort_indices()
    return graph


def _listed(edges: Any) -> Any:
    if isinstance(edges, np.ndarray):
        return edges
    try:
        return list(edges)
    except TypeError:
        raise TypeError(f"edges must be pairs of names, found {type(edges).__name__}.") from None
