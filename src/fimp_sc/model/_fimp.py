"""The model class: register, train, and read results as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scvi.data import AnnDataManager

from fimp_sc.model._fields import BATCH_KEY, LIBRARY_KEY, ExpressionField, GraphField, GroupField, LabelField
from fimp_sc.model._module import FIMPModule
from fimp_sc.model._train import TrainableModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

    from fimp_sc.model._inference import Strategy


class FIMP(TrainableModel):
    """Foundation-informed message passing between cells (arXiv 2210.09475), FIMP-base.

    A cell is a sequence of gene tokens; over each edge of the graph the tokens of the destination attend to those of
    the source, messages are averaged over neighbours and combined with the cell's own tokens. The model learns to
    predict hidden expression and, where labels are given, labels.

    Parameters
    ----------
    adata
        Object registered with :meth:`setup_anndata`.
    n_latent
        Width of tokens and of the embedding.
    n_layers
        Message-passing layers; a cell sees as many hops.
    n_heads
        Attention heads; must divide ``n_latent``.
    n_tokens
        Token budget: the highest values of a cell become tokens, all genes enter the summary token.
    layer
        ``"practical"`` (pre-norm transformer layer with residuals) or ``"paper"`` (messages added, one projection).
    self_loops
        Whether a cell also attends to its own genes.
    reduce
        ``"mean"`` or ``"sum"`` over neighbours.
    dropout
        Rate on messages, on what feed-forward parts add and before the label head.
    label_weight
        Weight of the label loss beside the masked-expression loss.
    random_state
        Seed of initialisation, splits, blocks and masks. The global random state is not touched.

    Examples
    --------
    >>> fimp.pp.spatial_graph(adata)
    >>> fimp.model.FIMP.setup_anndata(adata, labels_key="cell_type")
    >>> model = fimp.model.FIMP(adata)
    >>> model.train()
    >>> adata.obsm["X_fimp"] = model.get_latent_representation()
    """

    _module_cls = FIMPModule

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        n_tokens: int = 32,
        layer: Literal["practical", "paper"] = "practical",
        self_loops: bool = True,
        reduce: Literal["mean", "sum"] = "mean",
        dropout: float = 0.2,
        label_weight: float = 1.0,
        random_state: int = 0,
    ) -> None:
        super().__init__(adata, registry)
        _check_choice("layer", layer, ("practical", "paper"))
        _check_choice("reduce", reduce, ("mean", "sum"))
        for name, number in (("n_latent", n_latent), ("n_layers", n_layers), ("n_tokens", n_tokens)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, found {number}")
        self.n_tokens, self.n_layers = n_tokens, n_layers
        self.self_loops, self.random_state = self_loops, random_state
        with torch.random.fork_rng():
            torch.manual_seed(random_state)
            self.module = FIMPModule(
                n_features=self.summary_stats.n_vars,
                n_labels=len(self.classes),
                n_latent=n_latent,
                n_layers=n_layers,
                n_heads=n_heads,
                layer=layer,
                reduce=reduce,
                dropout=dropout,
                label_weight=label_weight,
                random_state=random_state,
            )
        self._model_summary_string = (
            f"FIMP with {layer} layers: {n_layers}, n_latent: {n_latent}, n_heads: {n_heads}, n_tokens: {n_tokens}, "
            f"genes: {self.summary_stats.n_vars}, classes: {len(self.classes)}"
        )
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        labels_key: str | None = None,
        unlabeled_category: str = "Unknown",
        batch_key: str | None = None,
        library_key: str | None = None,
        connectivities_key: str = "spatial_connectivities",
        spatial_key: str = "spatial",
        input_scale: Literal["auto", "counts", "normalized", "log"] = "auto",
        **kwargs: Any,
    ) -> None:
        """Register where FIMP finds its data. Validates; writes nothing but scvi-tools' own identifier in ``uns``.

        Parameters
        ----------
        adata
            Cells with a graph (:func:`fimp_sc.pp.spatial_graph`). Expression may be in memory, in a file (backed or
            lazy objects) or in a dask array. It is checked now: values changed in place later are not checked again.
        layer
            Layer with expression; ``None`` for ``X``.
        labels_key
            Column of ``obs`` with labels to learn. Missing values and ``unlabeled_category`` are unlabeled.
        unlabeled_category
            Label of cells whose class is not known.
        batch_key
            Column of ``obs`` with technical batches: expression is centred per batch. Defaults to ``library_key``.
        library_key
            Column of ``obs`` with samples. No edge may join two of them.
        connectivities_key
            Graph in ``obsp``, row = destination. Any non-zero entry is an edge; weights are not used.
        spatial_key
            Coordinates in ``obsm``, used to cut the graph into compact blocks; the graph's own order serves when
            absent.
        input_scale
            What the values are: ``"counts"`` (non-negative integers), ``"normalized"`` (non-negative reals), both
            scaled to a common total and ``log1p`` transformed inside; ``"log"`` (log-normalised already, used as
            they are). ``"auto"`` decides from the values.

        Raises
        ------
        KeyError
            When a key is missing.
        ValueError
            When values, labels or graph cannot be used; the message says why.
        """
        method_args = cls._get_setup_method_args(**{k: v for k, v in locals().items() if k != "kwargs"})
        manager = AnnDataManager(
            fields=[
                ExpressionField(layer, input_scale),
                GraphField(connectivities_key, library_key),
                LabelField(labels_key, unlabeled_category),
                GroupField(LIBRARY_KEY, library_key, "library"),
                GroupField(BATCH_KEY, batch_key or library_key, "batch"),
            ],
            setup_method_args=method_args,
        )
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        batch_size: int | None = None,
        strategy: Strategy = "auto",
        distribute: bool = False,
    ) -> NDArray[np.float32]:
        """Embed cells.

        Parameters
        ----------
        adata
            Object to embed; the training object by default. It may have other genes, and needs a graph.
        indices
            Cells to embed; all by default. Their neighbours are read from the whole object.
        batch_size
            Destinations per block; by default what fits into some hundred MB. Like ``strategy`` and ``distribute`` it
            changes speed and memory, not the result.
        strategy
            ``"blocks"`` computes blocks of cells with the neighbourhood that all layers read, ``"layers"`` one layer
            for all cells before the next; ``"auto"`` takes what is less work for the graph at hand.
        distribute
            Compute blocks as Dask tasks: on the workers of a ``dask.distributed.Client`` where one is open, else on
            Dask's default scheduler. Workers read expression that is stored in files by themselves, under the same
            path; expression in memory is sent to them.

        Returns
        -------
        ``(len(indices), n_latent)`` float32.
        """
        how = {"batch_size": batch_size, "strategy": strategy, "distribute": distribute}
        return self._collect(adata, indices, lambda module, z: z, how)

    def predict(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        soft: bool = False,
        batch_size: int | None = None,
        strategy: Strategy = "auto",
        distribute: bool = False,
    ) -> NDArray[Any] | pd.DataFrame:
        """Predict labels.

        Parameters
        ----------
        adata, indices, batch_size, strategy, distribute
            As in :meth:`get_latent_representation`.
        soft
            Return probabilities instead of the most probable label.

        Returns
        -------
        ``(len(indices),)`` array of labels, or a data frame cells x classes of probabilities with ``soft=True``.

        Raises
        ------
        ValueError
            When the model was set up without labels.
        """
        if not self.classes:
            raise ValueError(
                "This model was trained without labels: call FIMP.setup_anndata(adata, labels_key=...) and train anew."
            )
        adata = self._validate_anndata(adata)
        how = {"batch_size": batch_size, "strategy": strategy, "distribute": distribute}
        probability = self._collect(adata, indices, lambda module, z: module.generative(z)["logits"].softmax(-1), how)
        if not soft:
            return np.asarray(self.classes, dtype=object)[probability.argmax(1)]
        names = adata.obs_names if indices is None else adata.obs_names[np.asarray(indices)]
        return pd.DataFrame(probability, index=names, columns=self.classes)

    def get_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        genes: Sequence[str] | None = None,
        scale: Literal["log", "counts"] = "log",
        hidden: sparse.spmatrix | NDArray[np.bool_] | None = None,
        batch_size: int | None = None,
        strategy: Strategy = "auto",
        distribute: bool = False,
    ) -> NDArray[np.float32]:
        """Predict expression from a cell's visible genes and its neighbours.

        Parameters
        ----------
        adata, indices, batch_size, strategy, distribute
            As in :meth:`get_latent_representation`.
        genes
            Genes to predict, of those that the model knows, measured in ``adata`` or not. By default the genes of
            ``adata``; columns of genes that the model does not know are NaN.
        scale
            ``"log"``: ``log1p`` of values scaled to the model's common total; ``"counts"``: scaled back to the
            total of each cell (for input on the log scale: ``expm1``). Not negative.
        hidden
            ``(n_obs, n_vars)`` boolean, True for entries that the model must not see.

        Returns
        -------
        ``(len(indices), len(genes))`` float32.

        Raises
        ------
        KeyError
            When a gene of ``genes`` is not known to the model.
        """
        _check_choice("scale", scale, ("log", "counts"))
        adata = self._validate_anndata(adata)
        names = pd.Index(adata.var_names.astype(str) if genes is None else [str(gene) for gene in genes])
        known = pd.Index(self.genes).get_indexer(names)
        if genes is not None and (known < 0).any():
            raise KeyError(f"Not among the {len(self.genes)} genes of the model: {list(names[known < 0][:5])}")
        data = self._graph_data(adata, hidden)
        features = torch.from_numpy(known[known >= 0]).to(self.device)
        how = {"batch_size": batch_size, "strategy": strategy, "distribute": distribute}
        values = self._collect(
            adata, indices, lambda module, z: module.generative(z, features)["value"], how, data=data
        )
        nodes = self._indices(adata, indices)
        values += data.source.center[data.source.batch[nodes]][:, known[known >= 0]]
        np.maximum(values, 0.0, out=values)
        if scale == "counts":
            np.expm1(values, out=values)
            values /= data.source.factor[nodes, None]
        if (known >= 0).all():
            return values
        out = np.full((len(nodes), len(names)), np.nan, dtype=np.float32)
        out[:, known >= 0] = values
        return out

    @classmethod
    def load_query_data(cls, adata: AnnData, reference_model: FIMP | str | Path) -> FIMP:
        """Return a copy of a trained model bound to a new object, with the same weights and no further training.

        Parameters
        ----------
        adata
            New section with a graph. Genes are matched by name: those unknown to the model are dropped, those that
            it lacks are treated as not measured.
        reference_model
            A trained model, or the folder of a saved one.
        """
        if isinstance(reference_model, str | Path):
            reference: FIMP = cls.load(str(reference_model), adata=False)
        else:
            reference = reference_model
        registry = reference.registry
        cls.setup_anndata(adata, source_registry=registry, **registry["setup_args"])
        model = cls(None, registry=registry, **reference.init_params_["non_kwargs"])
        model.module.load_state_dict(reference.module.state_dict())
        model.module.eval()
        model.is_trained_ = reference.is_trained
        model._validate_anndata(adata)
        return model


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}")
