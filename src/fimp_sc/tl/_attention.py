from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._logging import user_messages
from fimp_sc._options import checked
from fimp_sc.data import NodeGraph
from fimp_sc.data.storage._elements import get_graph
from fimp_sc.model.predict._attention import check_messages
from fimp_sc.tl._call._inputs import check_results, choose, copied, sample_codes, working_copy
from fimp_sc.tl._call._models import fitted_model, given_model, write_back
from fimp_sc.tl._call._results import finite_or_raise, record
from fimp_sc.tl._statistics._groups import check_edges, group_columns, groups_of, read_groups, say_left_out, warn_still
from fimp_sc.tl._statistics._significance import group_tests

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from fimp_sc.model import FIMP
    from fimp_sc.pretrained import Foundation


@checked
def attention(
    adata: AnnData | MuData,
    groupby: str,
    *,
    unlabeled_category: str = "Unknown",
    n_permutations: int = 100,
    min_edges: int = 30,
    modality: str | Sequence[str] | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = None,
    connectivities_key: str | None = None,
    input_scale: str | dict[str, str] | None = None,
    center: Literal["training", "batch", "matched"] | None = None,
    key_added: str = "fimp_attention",
    foundation: Foundation | None = None,
    model: FIMP | str | Path | None = None,
    n_tokens: int | None = None,
    n_layers: int | None = None,
    max_epochs: int | None = None,
    accelerator: str = "auto",
    random_state: int = 0,
    verbose: bool = True,
    overwrite: bool = False,
    copy: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    train_kwargs: dict[str, Any] | None = None,
) -> AnnData | MuData | None:
    r"""Measure the influence of neighboring cells on each other, per edge and per pair of groups.

    The model that :func:`embed`, :func:`annotate` or :func:`impute` trained on this object before is used, if nothing
    has changed; otherwise one is trained, and a line of the log says why. Influence describes the model, not the
    tissue: cells with many molecules or marker genes have a large influence without any communication.
    :func:`gene_pairs` tests pairs of genes in neighbors without a model, and
    :meth:`fimp_sc.model.FIMP.get_gene_attention` returns the attention between genes.

    Parameters
    ----------
    adata
        Cells with expression and coordinates; or a MuData object, of which a modality with expression is read.
    groupby
        Column of ``obs`` with groups of cells, for instance their types. Cells without group (missing, or
        ``unlabeled_category``) are left out of the table.
    unlabeled_category
        Label of cells without group.
    n_permutations
        Number of permutations of the group labels, within samples; at least 10.
    min_edges
        Smallest number of edges of a pair of groups that is tested.
    modality
        Name of the modality of a MuData object to read and to write to. Several are read together: the tokens of a node
        are those of all of them, and results are written to the MuData object. By default the modality, or the several,
        of earlier results.
    layer
        Layer with expression; ``"X"`` for ``X``. By default that of the ``model`` or of the latest call (see Notes),
        else ``X``.
    library_key
        Column of ``obs`` with samples; no edge joins two of them. By default that of the ``model`` or of the latest
        call, else none.
    batch_key
        Column of ``obs`` with technical batches, whose means ``center="batch"`` subtracts. By default that of the
        ``model`` or of the latest call, else ``library_key``.
    spatial_key
        Coordinates in ``obsm``, ``(n_obs, 2)`` or ``(n_obs, 3)``. By default that of the ``model`` or of the latest
        call, else ``"spatial"``.
    connectivities_key
        Graph in ``obsp``, ``(n_obs, n_obs)``, row = destination. If it is absent, a graph of the 6 nearest neighbors is
        built with :func:`fimp_sc.pp.spatial_graph`. By default that of the ``model`` or of the latest call, else
        ``"spatial_connectivities"``.
    input_scale
        Scale of the values: ``"counts"`` (whole numbers), ``"normalized"`` (without logarithm), ``"log"``
        (log-normalized), ``"real"`` (any numbers, used as they are), or ``"auto"``, which decides from the values; of
        several tables also a dictionary by modality. By default that of the latest call for the same layer, else that
        of the ``model``, else ``"auto"``.
    center
        Mean that is subtracted from the expression of a gene: ``"training"``, over all training cells, so that results
        of a cell do not depend on the other cells of the object; ``"batch"``, over the cells of its batch, for batches
        with about the same mixture of cells; ``"matched"``, that of training, after genes of batches were scaled so
        that neighborhoods which batches have in common agree, for batches that share some tissue. By default that of
        the ``model`` or of the latest call, else ``"training"``.
    key_added
        Name of the results in ``obsp`` and ``uns``.
    foundation
        A foundation model that makes the messages, from :func:`fimp_sc.pretrained.load`, such as
        ``fimp_sc.pretrained.load("scgpt", "scGPT_human/")``.
    model
        A trained model to apply without training: the model, its folder, or its name on the Hugging Face hub. Genes are
        matched by name. The object must hold the keys of the model, or others must be given; a column of samples is
        only needed where the model subtracts means of batches by it (``center="batch"``).
    n_tokens
        Number of tokens of a cell: its genes with the highest values. By default 16, or 200 with a foundation model.
        For a model that is trained now.
    n_layers
        Number of message-passing layers; a cell sees as many hops. By default 2. For a model that is trained now.
    max_epochs
        Upper limit of epochs. By default about 600 steps, and up to four times as many from 4,000 cells on, with early
        stopping. For a model that is trained now.
    accelerator
        Device: ``"auto"`` takes a GPU if there is one; else ``"cpu"``, ``"gpu"``, ``"cuda"`` or ``"mps"``.
    random_state
        Seed of permutations, and of training. A model that was trained before with another seed is used, too.
    verbose
        Show a progress bar and lines of the log.
    overwrite
        Replace anything that is under the names of the results. If False, only earlier results of this function are
        replaced. Data that the call itself reads are never replaced.
    copy
        Return a copy with the results instead of writing to ``adata``.
    model_kwargs
        Further arguments of :class:`fimp_sc.model.FIMP` for a model that is trained now, such as ``{"n_latent": 128}``,
        or ``{"gene_embeddings": "vectors.npz"}`` for pretrained vectors of genes.
    train_kwargs
        Further arguments of :meth:`fimp_sc.model.FIMP.train` for a model that is trained now, such as ``{"checkpoint":
        "folder"}`` for a training that can be continued.

    Returns
    -------
    ``None``, or the copy. Nothing is written when the call fails. Writes:

    - ``obsp[key_added]``: ``(n_obs, n_obs)`` float32 CSR, row = destination, the edges of the graph without self-loops:
      the influence of each, :math:`\lVert W_O \, \mathrm{softmax}(q_i K_j^\top / \sqrt d) V_j \rVert`, the length of
      its message to the summary token of the destination, mean over layers;
      :meth:`fimp_sc.model.FIMP.get_edge_influence` also returns that of one layer;
    - ``uns[key_added]["groups"]``: data frame, a row for each pair of groups that has edges: ``source_group``,
      ``destination_group``, ``influence`` (mean over edges), ``n_edges``, and ``expected`` (mean of the permutations),
      ``z``, ``pvalue`` (one-sided), ``fdr`` (Benjamini-Hochberg); NaN where there are fewer than ``min_edges``, or no
      edge at all in some permutation;
    - ``uns[key_added]``: parameters, seed, versions;
    - the graph in ``obsp`` and ``uns``, if it was built.

    Raises
    ------
    KeyError
        A key is missing.
    TypeError
        ``groupby`` holds numbers that measure something, or an argument is unknown or of another type.
    ValueError
        There is one group only or far too many, no pair of groups has ``min_edges`` edges, the model reads no genes or
        passes no messages, edges run the whole stack of a foundation model (``aggregate="final"``), or ``key_added``
        has a slash or names data that would be lost (see ``overwrite``). These come before a model is trained.
    FloatingPointError
        Training diverged.

    Warns
    -----
    UserWarning
        Genes or cells without values, cells without neighbors, control probes among the genes, or a graph that joins
        samples that lie over each other. A group whose name says that its cells have none.

    Notes
    -----
    Keys that are not given (``None``) are those that a given ``model`` was trained with, else those of the latest call
    of :mod:`fimp_sc.tl` whose results are in the object, also if it was written to a file since; a line of the log
    names them.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.tl.attention(adata, "cell_type", library_key="section", max_epochs=1, verbose=False)
    >>> len(adata.uns["fimp_attention"]["groups"])
    9
    """
    if not (model_kwargs or {}).get("messages", True):
        raise ValueError("model_kwargs has messages=False: without messages there is no attention between cells.")
    adata = copied(adata) if copy else adata
    model = given_model(model, accelerator, verbose=verbose)
    study, inputs = choose(
        adata, modality, verbose=verbose, model=model, layer=layer, library_key=library_key, batch_key=batch_key,
        spatial_key=spatial_key, connectivities_key=connectivities_key, input_scale=input_scale,
        center=center,
        unlabeled_category=unlabeled_category,
    )  # fmt: skip
    target = study.data
    check_results(key_added, "tl.attention", study, inputs, overwrite=overwrite)
    if not study.tables:
        raise ValueError("attention reads genes, and there are signals or images only: pass a modality of expression.")
    category = read_groups(study.nodes, groupby, unlabeled_category)
    with user_messages(verbose=verbose):
        work = working_copy(study, inputs)
        category = groups_of(category, study.nodes.obs_names, work.nodes.obs_names, groupby)
        codes = np.asarray(category.codes, dtype=np.int64)
        graph = NodeGraph(get_graph(work.nodes, inputs.connectivities_key), self_loops=False)
        check_edges(graph, codes, len(category.categories), min_edges)
        fitted = fitted_model(
            study, work, inputs, model=model, reuse=True, max_epochs=max_epochs, accelerator=accelerator,
            random_state=random_state, same_seed=False, verbose=verbose, model_kwargs=model_kwargs,
            train_kwargs=train_kwargs, foundation=foundation,
            check=check_messages,
            n_tokens=n_tokens, n_layers=n_layers,
        )  # fmt: skip
        influence = fitted.get_edge_influence()
        finite_or_raise(influence.data, "influence of edges")
        say_left_out(codes, "no group")
        how: dict[str, Any] = {"n_permutations": n_permutations, "min_edges": min_edges, "random_state": random_state}
        samples = sample_codes(work.nodes, inputs.library_key)
        tests = group_tests(influence, codes, samples, len(category.categories), verbose=verbose, **how)
        warn_still(tests.result)
        table = group_columns(category.categories, tests.pair)
        table |= {"influence": tests.influence, "n_edges": tests.n_edges, **tests.result._asdict()}
        with write_back(study, work, inputs, fitted):
            target.obsp[key_added] = _placed_edges(influence, work.nodes.obs_names, target.obs_names)
            target.uns[key_added] = record(fitted, inputs, target, "tl.attention", groupby=groupby, **how) | {
                "groups": pd.DataFrame(table)
            }
    return adata if copy else None


def _placed_edges(edges: sparse.csr_matrix, nodes: pd.Index, wanted: pd.Index) -> sparse.csr_matrix:
    """Return edges between ``nodes`` as edges between the nodes of the object, which may have others too."""
    wanted = wanted.astype(str)
    if nodes.equals(wanted):
        return edges
    place, coo = wanted.get_indexer(nodes), edges.tocoo()
    return sparse.csr_matrix((coo.data, (place[coo.row], place[coo.col])), shape=(len(wanted), len(wanted)))
