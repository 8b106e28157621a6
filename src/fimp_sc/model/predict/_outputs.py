"""Prediction methods: embeddings, labels and expression as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
import torch

from fimp_sc._draws import name_key
from fimp_sc._options import checked
from fimp_sc.data import BinnedTokenizer
from fimp_sc.data.expression._binning import unbin
from fimp_sc.model.predict._inference import collect
from fimp_sc.model.predict._labels import label_probability
from fimp_sc.model.predict._reconstruct import hidden_tokens, predict_all
from fimp_sc.model.registry._fields import X_KEY, ExpressionField, check_known, table_states
from fimp_sc.model.registry._graph_data import (
    field_state,
    graph_data,
    known_columns,
    node_indices,
    sequence_size,
    study_of,
    tables_of,
    without_messages,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray
    from scipy import sparse
    from torch import Tensor

    from fimp_sc.data import Batch, GraphData
    from fimp_sc.model._fimp import FIMP
    from fimp_sc.model.module._module import FIMPModule
    from fimp_sc.model.predict._inference import Strategy


# Genes that are tokens of a cell at once, and cells whose bins are turned into values at once.
_GENES, _CELLS = 200, 1024


def decoded_expression(
    data: GraphData,
    nodes: NDArray[np.int64],
    genes: NDArray[np.int64],
    predict: Callable[[torch.Tensor], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Predict genes some hundred at a time, and turn bins into values by what the cell's visible genes say of them.

    Parameters
    ----------
    data
        Cells and how they become tokens.
    nodes
        ``(n,)`` cells to predict.
    genes
        ``(g,)`` genes of the model.
    predict
        From ``(q,)`` genes to their ``(n, q)`` bins.

    Returns
    -------
    ``(n, g)`` float32 log-normalized expression, NaN for genes that the vocabulary does not know.
    """
    source = data.tokenizer
    if not isinstance(source, BinnedTokenizer) or data.expression is None:
        raise ValueError(
            "decoder=True needs a foundation model with a decoder: FIMP-base has none, nor has one that reads ranks."
        )
    out = np.full((len(nodes), len(genes)), np.nan, dtype=np.float32)
    known = np.flatnonzero(source.known.numpy()[genes])
    for i in range(0, len(known), _GENES):
        some = known[i : i + _GENES]
        out[:, some] = predict(torch.from_numpy(genes[some]))
    for i in range(0, len(nodes), _CELLS):
        cells = slice(i, i + _CELLS)
        observed, pattern = (torch.from_numpy(array.copy()) for array in data.expression.observed(nodes[cells]))
        edges = torch.from_numpy(source.edges(data.expression.sparse_rows(nodes[cells]), observed, pattern))
        out[cells, known] = unbin(torch.from_numpy(out[cells][:, known]), edges).numpy()
    return out


@checked
def get_latent_representation(
    model: FIMP,
    adata: AnnData | MuData | None = None,
    indices: Sequence[int] | None = None,
    *,
    messages: bool = True,
    batch_size: int | None = None,
    strategy: Strategy = "auto",
    distribute: bool = False,
) -> NDArray[np.float32]:
    """Embed nodes: cells, regions or images, each with its neighborhood.

    Parameters
    ----------
    adata
        Object to read; that of training by default. It may have other genes, and needs a graph.
    indices
        Positions of nodes, or a mask of them; all by default. Their neighbors are read from the whole object.
    messages
        If False, no messages are passed: each node is embedded from its own tokens by the same network, which of a
        foundation model is what that model itself makes of it. Both embeddings side by side tell a probe more
        than either: ``numpy.hstack([z, model.get_latent_representation(messages=False)])``.
    batch_size
        Destinations per block; by default what fits into some hundred MB. It changes speed and memory, not the result.
    strategy
        ``"blocks"`` computes blocks of nodes with the neighborhood that all layers read, ``"layers"`` one layer for
        all nodes before the next; ``"auto"`` takes what is less work for the graph at hand. It changes speed and
        memory, not the result.
    distribute
        Compute blocks as Dask tasks: on the workers of a ``dask.distributed.Client`` where one is open, else on
        Dask's default scheduler. Workers read expression that is stored in files by themselves, under the same
        path; expression in memory is sent to them.

    Returns
    -------
    ``(len(indices), n_latent)`` float32. A foundation model gives them before any training too ("zero-shot");
    those of scGPT have length 1, as its authors use them.

    Raises
    ------
    IndexError
        A position is out of range.
    RuntimeError
        The model is not trained, and no foundation model.
    ValueError
        The object cannot be used, or ``indices`` is empty.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (200, 64)
    """
    how = {"batch_size": batch_size, "strategy": strategy, "distribute": distribute}
    data = graph_data(model, study_of(model, adata))
    if not messages:
        adds = model.self_loops and model.module.network.adds_self_loops
        data = without_messages(data, self_loops=not adds)
    return collect(model, data, indices, _latent, how, untrained=model.foundation is not None)


def check_classes(model: FIMP) -> None:
    """Raise a ValueError where a model knows no labels."""
    if not model.classes:
        raise ValueError(
            "This model was trained without labels: call FIMP.setup_anndata(adata, labels_key=...) and train anew."
        )


@checked
def predict(
    model: FIMP,
    adata: AnnData | MuData | None = None,
    indices: Sequence[int] | None = None,
    *,
    soft: bool = False,
    batch_size: int | None = None,
    strategy: Strategy = "auto",
    distribute: bool = False,
) -> NDArray[Any] | pd.DataFrame:
    """Predict labels.

    FIMP-base predicts them twice, with and without neighbors, and mixes both predictions with the weight that suits
    the validation cells of its training best (:attr:`neighbor_weight`). Of up to 5,000 genes a linear model reads all,
    and counts beside both as much as suits these cells (:attr:`linear_weight`). What comes of it is averaged over cells
    and their neighbors, again so (:attr:`smoothing_weight`).

    Parameters
    ----------
    adata
        Object to read; that of training by default. It may have other genes, and needs a graph.
    indices
        Positions of nodes, or a mask of them; all by default. Their neighbors are read from the whole object.
    soft
        Return probabilities instead of the most probable label.
    batch_size
        Destinations per block; by default what fits into some hundred MB. It changes speed and memory, not the result.
    strategy
        ``"blocks"`` computes blocks of nodes with the neighborhood that all layers read, ``"layers"`` one layer for
        all nodes before the next; ``"auto"`` takes what is less work for the graph at hand. It changes speed and
        memory, not the result.
    distribute
        Compute blocks as Dask tasks: on the workers of a ``dask.distributed.Client`` where one is open, else on
        Dask's default scheduler. Workers read expression that is stored in files by themselves, under the same
        path; expression in memory is sent to them.

    Returns
    -------
    ``(len(indices),)`` array of labels as text; with ``soft=True`` a data frame cells x classes of probabilities.

    Raises
    ------
    IndexError
        A position is out of range.
    RuntimeError
        The model is not trained.
    ValueError
        The model was set up without labels, the object cannot be used, or ``indices`` is empty.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, labels_key="cell_type", library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.predict().shape
    (200,)
    >>> model.predict(soft=True, indices=[0, 1]).columns.tolist() == model.classes
    True
    """
    check_classes(model)
    study = study_of(model, adata)
    how = {"batch_size": batch_size, "strategy": strategy, "distribute": distribute}
    probability = label_probability(model, study, indices, how)
    if not soft:
        return np.asarray(model.classes, dtype=object)[probability.argmax(1)]
    names = study.nodes.obs_names if indices is None else study.nodes.obs_names[np.asarray(indices)]
    return pd.DataFrame(probability, index=names, columns=model.classes)


@checked
def get_expression(
    model: FIMP,
    adata: AnnData | MuData | None = None,
    indices: Sequence[int] | None = None,
    *,
    genes: Sequence[str] | None = None,
    scale: Literal["log", "counts"] = "log",
    hidden: sparse.spmatrix | NDArray[np.bool_] | Mapping[str, Any] | None = None,
    decoder: bool = False,
    batch_size: int | None = None,
    strategy: Strategy = "auto",
    distribute: bool = False,
) -> NDArray[np.float32]:
    """Predict expression from a cell's visible genes and its neighbors.

    Parameters
    ----------
    adata
        Object to read; that of training by default. It may have other genes, and needs a graph.
    indices
        Positions of nodes, or a mask of them; all by default. Their neighbors are read from the whole object.
    genes
        Genes to predict, of those that the model knows, measured in ``adata`` or not: names as in :attr:`genes`, which
        are spelled as in the object of training, also where a foundation model knows them by others (its symbols, or
        those of human orthologs). By default the genes of ``adata``; columns of genes that the model does not know are
        NaN. Of several tables these are one after the other, in the order in which the model was trained on them.
    scale
        ``"log"``: ``log1p`` of values scaled to the model's common total; ``"counts"``: scaled back to the
        total of each cell (for input on the log scale: ``expm1``). Not negative.
    hidden
        ``(n_obs, n_vars)`` boolean, True for entries that the model must not see; of several modalities a row for
        each node of the whole object, of several tables a dictionary of these by modality. Cells are scaled by
        totals of what is visible, over the fraction that these genes have in training; predictions are on the scale
        of whole cells. Values on the log scale are used as they are, and carry the totals that they were
        normalized with: pass counts.
    decoder
        Read values with the expression decoder of the foundation model instead of the head that training fits;
        possible without training. Every gene becomes a token with a hidden value, so that cost grows with the
        number of genes: name ``genes``. Up to 200 are asked for at once and attend to each other, as masked genes
        do in scGPT, so that values depend a little on which. Bins come back on the scale of the cell's own visible
        genes. Genes without a match in the vocabulary are NaN.
    batch_size
        Destinations per block; by default what fits into some hundred MB. It changes speed and memory, not the result.
    strategy
        ``"blocks"`` computes blocks of nodes with the neighborhood that all layers read, ``"layers"`` one layer for
        all nodes before the next; ``"auto"`` takes what is less work for the graph at hand. It changes speed and
        memory, not the result.
    distribute
        Compute blocks as Dask tasks: on the workers of a ``dask.distributed.Client`` where one is open, else on
        Dask's default scheduler. Workers read expression that is stored in files by themselves, under the same
        path; expression in memory is sent to them.

    Returns
    -------
    ``(len(indices), len(genes))`` float32.

    Raises
    ------
    IndexError
        A position is out of range.
    KeyError
        A gene of ``genes`` is not known to the model.
    RuntimeError
        The model is not trained; with ``decoder=True`` it need not be.
    ValueError
        The model reads no expression or has no decoder, ``hidden`` has another shape, or ``indices`` is empty.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> genes = model.genes[:5].tolist()
    >>> model.get_expression(genes=genes).shape
    (200, 5)

    Values that are kept for a test are neither shown nor learned from:

    >>> import numpy as np
    >>> hidden = np.random.default_rng(0).random(adata.shape) < 0.1
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, hidden=hidden, enable_progress_bar=False)
    >>> predicted = model.get_expression(hidden=hidden)[hidden]
    """
    study = study_of(model, adata)
    tables = tables_of(model, study)
    if not tables:
        raise ValueError("This model reads no expression: call get_reconstruction for signals and images.")
    if len(tables) > 1 and hidden is not None and not isinstance(hidden, Mapping):
        names = [table.name for table in tables]
        raise ValueError(f"hidden is one array for several tables: pass a dictionary, with keys of {names}.")
    if genes is None:
        known = np.concatenate(known_columns(model, tables))
    else:
        wanted = [str(gene) for gene in genes]
        check_known(wanted, model.genes)
        known = pd.Index(model.genes).get_indexer(pd.Index(wanted))
    states = table_states(field_state(model, X_KEY)).values()
    sizes = [len(state[ExpressionField.NAMES]) for state in states]
    real = np.repeat([state[ExpressionField.SCALE] == "real" for state in states], sizes)[known[known >= 0]]
    if real.any() and scale == "counts":
        raise ValueError("scale='counts' needs expression: these features are predicted as they are, scale='log'.")
    data = graph_data(model, study, hidden)
    source = cast("Any", data.expression)
    features = torch.from_numpy(known[known >= 0]).to(model.device)
    how = {"batch_size": batch_size, "strategy": strategy, "distribute": distribute}
    nodes = node_indices(study.nodes.obs_names, indices)
    if not decoder and model.module.network.pretrained and model.is_trained and not _learned(model.module):
        raise ValueError(
            "This model learned labels alone (mask_cells=0), and no expression: train another one without mask_cells=0."
        )
    if decoder:
        values = decoded_expression(
            data, nodes, known[known >= 0],
            lambda genes: collect(model, data, nodes, _bins, how, untrained=True, genes=genes),
        )  # fmt: skip
    else:
        values = collect(model, data, nodes, partial(_values, features=features), how)
        values += source.center[source.batch[nodes]][:, known[known >= 0]]
        values /= source.gains(nodes, known[known >= 0])
    np.maximum(values, 0.0, out=values, where=~real)
    if scale == "counts":
        np.expm1(values, out=values)
        values /= source.factors(nodes, known[known >= 0])
    if (known >= 0).all():
        return values
    out = np.full((len(nodes), len(known)), np.nan, dtype=np.float32)
    out[:, known >= 0] = values
    return out


@checked
def get_reconstruction(
    model: FIMP,
    adata: AnnData | MuData | None = None,
    indices: Sequence[int] | None = None,
    *,
    modality: str | None = None,
    hidden: NDArray[np.bool_] | None = None,
    batch_size: int | None = None,
    strategy: Strategy = "auto",
    distribute: bool = False,
) -> NDArray[np.float32]:
    """Predict signals or images; every segment or patch while it is hidden, from the others and the neighbors.

    Parameters
    ----------
    adata
        Object to read; that of training by default. It needs a graph.
    indices
        Positions of nodes, or a mask of them; all by default. Their neighbors are read from the whole object.
    modality
        Which one, where the model reads several signals or images.
    hidden
        What the model must not see: boolean, ``(n_obs, n_tokens)``, ``(n_obs, n_times)`` or ``(n_obs, height,
        width)``; a segment or patch is hidden as a whole. The rest is predicted in five passes, in each of which a
        fifth of it is hidden too.
    batch_size
        Destinations per block; by default what fits into some hundred MB. It changes speed and memory, not the result.
    strategy
        ``"blocks"`` computes blocks of nodes with the neighborhood that all layers read, ``"layers"`` one layer for
        all nodes before the next; ``"auto"`` takes what is less work for the graph at hand. It changes speed and
        memory, not the result.
    distribute
        Compute blocks as Dask tasks: on the workers of a ``dask.distributed.Client`` where one is open, else on
        Dask's default scheduler. Workers read expression that is stored in files by themselves, under the same
        path; expression in memory is sent to them.

    Returns
    -------
    float32 on the scale of the data: signals ``(len(indices), n_times)`` or images ``(len(indices), height, width,
    channels)``; NaN for what does not fill a segment or patch. Signals of which nothing is seen, and whose scale
    is not known therefore, are on that of the training nodes as a whole.

    Raises
    ------
    IndexError
        A position is out of range.
    RuntimeError
        The model is not trained.
    ValueError
        The model reads no signals or images, or its foundation model does not reconstruct them; ``modality`` is none
        of them; ``hidden`` has another shape; or ``indices`` is empty.

    Examples
    --------
    >>> import numpy as np
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> rng = np.random.default_rng(0)
    >>> bold, centers = rng.normal(size=(2, 10, 200)).cumsum(-1), rng.normal(size=(10, 3))
    >>> mdata = fimp.pp.fmri(bold, coordinates=centers)
    >>> FIMP.setup_mudata(mdata, modality="fmri")
    >>> model = FIMP(mdata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_reconstruction(indices=[0, 1, 2]).shape
    (3, 200)
    """
    names = list(model.module.sequences)
    if modality is None and len(names) == 1:
        modality = names[0]
    network: Any = model.module.network
    if names and not network.heads:
        raise ValueError(network.embedding.misaligned)
    if modality not in names:
        raise ValueError(
            f"modality must be one of the signals and images that the model reads, {names}: found {modality!r}."
            if names
            else "This model reads no signals or images: call get_expression."
        )
    study = study_of(model, adata)
    kind, size = sequence_size(model, study, modality)
    token_size, n_obs = model.token_sizes[modality], study.nodes.n_obs
    given = None if hidden is None else hidden_tokens(hidden, kind, n_obs, size, token_size)
    nodes = node_indices(study.nodes.obs_names, indices)
    how = {"batch_size": batch_size, "strategy": strategy, "distribute": distribute}

    def predict(now: NDArray[np.bool_]) -> NDArray[np.float32]:
        data = graph_data(model, study, hidden_tokens={modality: now})
        read = partial(_numbers, name=modality)
        tokens = collect(model, data, nodes, read, how, reconstruct=True)
        return np.where(now[nodes, :, None], tokens, np.float32(np.nan))

    key = name_key(study.nodes.obs_names)
    tokens = predict_all(n_obs, kind.tokens(size, token_size)[0], given, model.random_state, predict, key)
    return kind.restore(tokens, size, token_size)


def _learned(module: FIMPModule) -> bool:
    """Tell whether the head of values, which starts at zero with a foundation model, has learned anything."""
    return module.value_head is not None and bool(module.value_head.loading.any())


def _latent(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> Tensor:
    embedding = outputs["embedding"]
    return torch.nn.functional.normalize(embedding) if module.network.unit_length else embedding


def _values(module: FIMPModule, outputs: dict[str, Any], batch: Batch, features: Tensor) -> Tensor:
    return module.generative(outputs["embedding"], features)["value"]


def _bins(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> Tensor:
    return outputs["bin"]


def _numbers(module: FIMPModule, outputs: dict[str, Any], batch: Batch, name: str) -> Tensor:
    nodes = batch["sequences"][name]
    return outputs["sequences"][name].float().cpu() * nodes["std"].cpu() + nodes["mean"].cpu()
