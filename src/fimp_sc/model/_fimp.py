"""The model class: register, train, and read results as arrays."""

from __future__ import annotations

from inspect import getattr_static
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from anndata import AnnData
from scvi.model.base import BaseModelClass

from fimp_sc._draws import name_key
from fimp_sc._options import checked
from fimp_sc._recipe import recipe
from fimp_sc.data.storage._elements import missing_key
from fimp_sc.model._build import check_expression_alone, foundation_network, gene_vectors, sequence_shapes
from fimp_sc.model.io import _saved
from fimp_sc.model.module._module import FIMPModule
from fimp_sc.model.predict._attention import get_edge_influence, get_gene_attention
from fimp_sc.model.predict._outputs import (
    get_expression,
    get_latent_representation,
    get_reconstruction,
    predict,
)
from fimp_sc.model.registry._fields import (
    GRAPH_KEY,
    LABELS_KEY,
    X_KEY,
    ExpressionField,
    GraphField,
    LabelField,
    table_states,
)
from fimp_sc.model.registry._graph_data import check_genes, field_state
from fimp_sc.model.registry._setup import Absent, Listed, is_object, setup_anndata, setup_mudata
from fimp_sc.model.train._plan import FIMPTrainingPlan
from fimp_sc.model.train._runner import FIMPTrainRunner, seeded
from fimp_sc.model.train._train import train

if TYPE_CHECKING:
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.pretrained import Foundation


_LEAST_WIDTH = 12


class FIMP(BaseModelClass, metaclass=Listed):
    """Foundation-informed message passing between cells (arXiv 2210.09475), brain regions, images or any nodes.

    A cell is a sequence of gene tokens; over each edge of the graph the tokens of the destination attend to those of
    the source, messages are averaged over neighbors and combined with the cell's own tokens. The model learns to
    predict hidden expression and, where labels are given, labels. Regions are sequences of time segments, images of
    patches: what holds for cells and genes below holds for them alike.

    What makes the messages is learned from scratch (FIMP-base), or it is the transformer stack of a foundation model
    whose self-attention runs between cells (``foundation=``). FIMP-base can start from pretrained vectors of genes
    (``gene_embeddings=``).

    Parameters
    ----------
    adata
        Object registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    n_latent
        Width of tokens and of the embedding, by default 64, and 128 where there are no genes. A foundation model brings
        its own, as it does layers and heads.
    n_layers
        Message-passing layers; a cell sees as many hops. A foundation model reads one hop.
    n_heads
        Attention heads; must divide ``n_latent``.
    n_tokens
        Token budget: the highest values of a cell become tokens; in FIMP-base all genes enter the summary token. By
        default 16, or 200 for a foundation model.
    token_size
        Of signals: time points of a segment, by default 20 or, of short recordings, a quarter; of images: pixels of the
        side of a patch, by default a quarter of the shorter side and at most 16. A dictionary by modality where there
        are several. Time points and pixels that do not fill a segment or patch are left out, with a warning.
    layer
        Of FIMP-base: ``"practical"`` (pre-norm transformer layer with residuals) or ``"paper"`` (messages added, one
        projection).
    self_loops
        Whether a cell also attends to its own genes.
    messages
        Whether cells hear their neighbors. Without, each is embedded by itself by the same network: what neighbors
        are worth shows beside it. Always False for cells without neighbors, of an object with an empty graph
        (``fimp_sc.pp.spatial_graph(adata, n_neighbors=0)``).
    use_weights
        Whether the weights of the graph count. They are divided by their mean over the neighbors of a cell, so that
        graphs whose weights are all alike give what graphs without weights do: near neighbors may count more than far
        ones, and a cell with ``self_loops`` counts as its mean neighbor.
    reduce
        ``"mean"`` or ``"sum"`` over neighbors, in FIMP-base.
    dropout
        Rate on messages, on what feed-forward parts add and before the label head; by default 0.2; without
        genes 0.5 where labels are learned, 0 otherwise.
    label_weight
        Weight of the label loss beside the masked-expression loss.
    gene_embeddings
        Pretrained vectors of genes for FIMP-base, projected to the width of tokens; GenePT, or any other table: a file,
        mapping or data frame as :func:`fimp_sc.pretrained.read_gene_vectors` reads it. Genes without a vector learn
        one.
    foundation
        A foundation model whose stack makes the messages, from :func:`fimp_sc.pretrained.load`, which says what it
        reads, what of it is trained and how. It brings its own width, layers and ``token_size``.
    random_state
        Seed of initialization, splits, blocks and masks. The global random state is not touched.
    architecture
        What a saved model is built from in place of files, of which it keeps the names only.

    Raises
    ------
    CheckpointError
        When files of a foundation model or of gene vectors cannot be used; a :class:`ValueError`.
    TypeError
        When an argument is unknown or of another type.
    ValueError
        When an argument is out of its range, or no gene is known to the foundation model.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, labels_key="cell_type", library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> adata.obsm["X_fimp"] = model.get_latent_representation()
    """

    _module_cls = FIMPModule

    @checked
    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int | None = None,
        n_layers: int = 2,
        n_heads: int = 4,
        n_tokens: int | None = None,
        token_size: int | dict[str, int] | None = None,
        layer: Literal["practical", "paper"] = "practical",
        self_loops: bool = True,
        messages: bool = True,
        use_weights: bool = False,
        reduce: Literal["mean", "sum"] = "mean",
        dropout: float | None = None,
        label_weight: float = 1.0,
        gene_embeddings: Any = None,
        foundation: Foundation | None = None,
        random_state: int = 0,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(adata, registry)
        numbers = recipe()
        if n_tokens is None:
            n_tokens = numbers.tokens if foundation is None else numbers.tokens_foundation
        tables = bool(self.summary_stats.n_vars)
        states = table_states(field_state(self, X_KEY))
        n_tables = len(states)
        n_latent = (numbers.width if tables else numbers.width_sequences) if n_latent is None else n_latent
        if dropout is None:
            dropout = numbers.dropout if tables else numbers.dropout_sequences if self.classes else 0.0
        if foundation is not None and gene_embeddings is not None:
            raise ValueError(
                "gene_embeddings are for FIMP-base: a foundation model brings its own. Leave one of them out."
            )
        if foundation is not None and token_size is not None:
            raise ValueError(f"token_size is that of foundation={foundation.name!r} itself: leave it out.")
        self.foundation, self.n_tokens = foundation, n_tokens
        why = "messages=False"
        if messages and not field_state(self, GRAPH_KEY).get(GraphField.EDGES, True):
            # Messages that were never seen in training would be noise where the model meets neighbors.
            messages, why = False, "a graph without edges"
        if not (messages or self_loops):
            raise ValueError(f"{why} leaves each cell its own tokens, and self_loops=False nothing: keep one.")
        self.self_loops, self.messages, self.random_state = self_loops, messages, random_state
        self.use_weights = use_weights
        if use_weights and not messages:
            raise ValueError(f"use_weights=True weighs messages, and {why} leaves none: choose one.")
        stored = architecture or {}
        network, vectors, known = None, None, None
        with seeded(random_state):
            if foundation is not None:
                ids = None if stored else self._vocabulary_rows(foundation.vocabulary_key)
                network, config, shapes, self.token_sizes = foundation_network(
                    foundation, self.registry, ids, stored.get("foundation"), self_loops=self_loops, dropout=dropout
                )
                stored = {"foundation": config}
            else:
                shapes, self.token_sizes = sequence_shapes(self.registry, token_size, warn=adata is not None)
                if shapes and n_latent < _LEAST_WIDTH:
                    raise ValueError(
                        f"n_latent must be at least {_LEAST_WIDTH} for signals and images, found {n_latent}"
                    )
            if gene_embeddings is not None:
                check_expression_alone("gene_embeddings", field_state(self, X_KEY), shapes)
                if architecture is None:
                    vectors, known = gene_vectors(self.genes, gene_embeddings)
                    stored = {"vector_width": vectors.shape[1]}
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
                vector_width=stored.get("vector_width"),
                sequences=shapes,
                network=network,
                alone=messages and foundation is None and numbers.self_prediction,
                gene_key=name_key(self.genes),
                n_tables=max(n_tables, 1),
            )
            if vectors is not None and known is not None:
                self.module.start_from_vectors(vectors, known)
        self.n_layers = self.module.network.n_hops
        kind = f"{layer} layers: {n_layers}, n_latent: {n_latent}, n_heads: {n_heads}"
        if foundation is not None:
            kind = (
                f"{foundation.name}, {foundation.train}, neighbor_states: {foundation.neighbor_states}, "
                f"aggregate: {foundation.aggregate}"
            )
        tokens = [f"n_tokens: {n_tokens}, genes: {self.summary_stats.n_vars}"] if self.summary_stats.n_vars else []
        tokens += [f"{name}: {shape.n_tokens} tokens of {shape.token_size} numbers" for name, shape in shapes.items()]
        self._model_summary_string = f"FIMP with {kind}, {', '.join(tokens)}, classes: {len(self.classes)}"
        self.init_params_ = self._get_init_params(locals())
        # A saved model must not need the files again, which may have moved.
        self.init_params_["non_kwargs"] |= {
            "gene_embeddings": _name_of(gene_embeddings),
            "foundation": None if foundation is None else foundation.record(),
            "architecture": stored or None,
        }

    _training_plan_cls = FIMPTrainingPlan
    _train_runner_cls = FIMPTrainRunner

    # Each is documented where it is written.
    setup_anndata = classmethod(setup_anndata)
    setup_mudata = classmethod(setup_mudata)
    train = train
    predict = predict
    get_latent_representation = get_latent_representation
    get_expression = get_expression
    get_reconstruction = get_reconstruction
    get_edge_influence = get_edge_influence
    get_gene_attention = get_gene_attention
    save = _saved.save
    save_pretrained = _saved.save_pretrained
    load = classmethod(_saved.load)
    load_query_data = classmethod(_saved.load_query_data)
    from_pretrained = classmethod(_saved.from_pretrained)
    load_registry = classmethod(_saved.load_registry)
    convert_legacy_save = Absent("no FIMP model was ever saved in the format of scvi-tools before 0.15.")
    get_normalized_expression = Absent("get_expression() predicts expression.")
    differential_abundance = Absent("compare groups of cells in get_latent_representation().")

    @property
    def genes(self) -> NDArray[Any]:
        """Names of the genes that the model knows, in its own order, spelled as in the object of training.

        Of several tables one after the other; a name that several of them have follows that of its table there
        (``"protein:CD3"``).
        """
        return field_state(self, X_KEY)[ExpressionField.NAMES]

    @property
    def classes(self) -> list[str]:
        """Labels that the model was set up with; empty without ``labels_key``."""
        return [str(label) for label in field_state(self, LABELS_KEY).get(LabelField.CLASSES, ())]

    @property
    def neighbor_weight(self) -> float:
        """Weight of the prediction with neighbors in predicted labels, 0 to 1; the one without has the rest.

        Fitted to the log loss of the labeled validation cells; 0.5 where there are none, 0 without messages, and 1 of
        a foundation model, which predicts with neighbors alone, or without labels. A model that is bound to other cells
        than those of training has the weight that suits shifted validation cells.
        """
        return float(self.module.neighbor_weight) if self.messages else 0.0

    @property
    def smoothing_weight(self) -> float:
        """Weight of the neighbors' mean when predicted labels are smoothed, 0 to 1.

        Log-probabilities are replaced twice by their mean over the cell and its neighbors, which has this weight, and
        those of the cell itself, which have the rest. Fitted together with :attr:`neighbor_weight`; 0 where there are
        no labeled validation cells, without messages or without labels.
        """
        return float(self.module.smoothing_weight) if self.messages else 0.0

    @property
    def linear_weight(self) -> float:
        """Weight in predicted labels of a linear model that reads all genes of a panel, 0 to 1.

        Its log-probabilities and those of the network, which have the rest, are averaged before they are smoothed.
        Fitted to the labeled validation cells; 0 where there are none, of more than 5,000 genes, of a foundation model,
        or without labels.
        """
        return float(self.module.linear_weight)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if not isinstance(getattr_static(self, name, None), Absent)]

    def _validate_anndata(self, adata: Any = None, **kwargs: Any) -> Any:
        if getattr(self, "_adata_manager", None) is None:
            raise ValueError(
                "This model is bound to no object: bind it to one with FIMP.load_query_data(adata, model), or "
                "FIMP.from_pretrained(folder, adata)."
            )
        if adata is not None and is_object(adata) and self.get_anndata_manager(adata) is None:
            check_genes(self, adata)
        return super()._validate_anndata(adata, **kwargs)

    def _vocabulary_rows(self, key: str | None) -> NDArray[np.int64] | None:
        if key is None or not isinstance(self.adata, AnnData):
            return None
        if key not in self.adata.var:
            advice = "fimp_sc.pp.match_genes(adata, checkpoint) writes it."
            raise missing_key(key, "adata.var", self.adata.var, advice)
        return self.adata.var[key].to_numpy(dtype=np.int64)


def _name_of(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value) if isinstance(value, Path) else type(value).__name__
