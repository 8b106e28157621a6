"""Registration of an object: ``setup_anndata`` and ``setup_mudata``."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, Literal

from scvi.data import AnnDataManager
from scvi.data._manager import AnnDataManagerValidationCheck
from scvi.model.base import BaseModelClass

from fimp_sc._options import checked
from fimp_sc.data._study import Study, as_modalities, resolve
from fimp_sc.data._warnings import warn_inputs
from fimp_sc.model.registry._fields import SEQUENCE_KEY, registered_fields

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from fimp_sc.model._fimp import FIMP

_GRAPH = "spatial_connectivities"


class Absent:
    """A method that scvi-tools lists for every model and leaves to those that have it: here, an unknown attribute."""

    def __init__(self, advice: str) -> None:
        self.advice = advice

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> None:
        raise AttributeError(f"{owner.__name__!r} has no attribute {self.name!r}: {self.advice}")


class Listed(type(BaseModelClass)):  # type: ignore[misc]
    """Lists what its classes have."""

    def __dir__(cls) -> list[str]:
        return [name for name in super().__dir__() if not isinstance(getattr_static(cls, name, None), Absent)]


@checked
def setup_anndata(
    cls: type[FIMP],
    adata: AnnData,
    layer: str | None = None,
    labels_key: str | None = None,
    unlabeled_category: str = "Unknown",
    batch_key: str | None = None,
    library_key: str | None = None,
    connectivities_key: str = _GRAPH,
    spatial_key: str = "spatial",
    input_scale: Literal["auto", "counts", "normalized", "log", "real"] = "auto",
    center: Literal["training", "batch", "matched"] = "training",
    **kwargs: Any,
) -> None:
    """Register where FIMP finds its data. Validates; writes nothing but scvi-tools' own identifier in ``uns``.

    Parameters
    ----------
    adata
        Cells with a graph (:func:`fimp_sc.pp.spatial_graph`). Expression may be in memory, in a file (backed or
        lazy objects) or in a dask array. It is checked now: values changed in place later are not checked again.
        Objects that say in ``uns["fimp_modality"]`` what their nodes hold are read as such, see
        :meth:`setup_mudata`.
    layer
        Layer with expression; ``None`` for ``X``.
    labels_key
        Column of ``obs`` with labels to learn. Missing values and ``unlabeled_category`` are unlabeled.
    unlabeled_category
        Label of cells whose class is not known.
    batch_key
        Column of ``obs`` with technical batches, whose means ``center="batch"`` subtracts. Defaults to
        ``library_key``.
    library_key
        Column of ``obs`` with samples. No edge may join two of them. Defaults to what the object itself names.
        Genes that are NaN throughout a sample were not measured in it, and neither were those that are zero
        throughout although others show them so often that chance cannot explain it, as after
        ``ad.concat(join="outer")``; a warning counts them. Without it ``batch_key`` tells the samples.
    connectivities_key
        Graph in ``obsp``, row = destination. Any non-zero entry is an edge; models with ``use_weights=True`` also
        use its weight.
    spatial_key
        Coordinates in ``obsm``, used to cut the graph into compact blocks; the graph's own order serves when
        absent. Tokens of signals know them, too.
    input_scale
        What the values are: ``"counts"`` (non-negative integers), ``"normalized"`` (non-negative reals), both
        scaled to a common total and ``log1p`` transformed inside; ``"log"`` (log-normalized already, used as
        they are); ``"real"`` (any numbers, used as they are). ``"auto"`` decides from the values of expression,
        logs what it decided, warns where that is a guess, and takes features as real.
    center
        What is subtracted from the expression of each gene: ``"training"``, its mean over all training cells, so
        that results of a cell do not depend on which other cells the object holds; or ``"batch"``, its mean over
        the cells of the same batch (shrunk toward the training mean). The latter takes out what differs between
        batches where each holds about the same mixture of cells, and with it what sets a batch apart that holds
        another: a section of one class is then taken for a mixture of all. Or ``"matched"``: the mean over
        all training cells, after genes of batches were multiplied by factors that make mutually nearest neighborhoods
        of two batches agree. It takes out technique where batches share some tissue, of whatever mixture; batches that
        share none are made alike. The factors are fitted once, to training cells, and apply to batches of the
        same names; others are read as they are.

    Raises
    ------
    KeyError
        When a key is missing.
    ValueError
        When values, labels or graph cannot be used; the message says why.

    Warns
    -----
    UserWarning
        Without ``library_key``, the graph joins samples that lie over each other; control probes are among the
        genes; labels read as if cells had none, or a single cell has them; cells without neighbors; cells or genes
        that are zero throughout.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, labels_key="cell_type", library_key="section")
    >>> FIMP(adata).classes == sorted(adata.obs["cell_type"].unique())
    True
    """
    method_args = cls._get_setup_method_args(**{k: v for k, v in locals().items() if k != "kwargs"})
    register(cls, adata, method_args, kwargs)


@checked
def setup_mudata(
    cls: type[FIMP],
    mdata: MuData,
    modality: str | Sequence[str] | None = None,
    layer: str | None = None,
    labels_key: str | None = None,
    unlabeled_category: str = "Unknown",
    batch_key: str | None = None,
    library_key: str | None = None,
    connectivities_key: str = _GRAPH,
    spatial_key: str = "spatial",
    input_scale: Literal["auto", "counts", "normalized", "log", "real"] | dict[str, str] = "auto",
    center: Literal["training", "batch", "matched"] = "training",
    **kwargs: Any,
) -> None:
    """Register one or several modalities: expression, signals of regions, images, or any features.

    Parameters
    ----------
    mdata
        Object whose modalities say in ``uns["fimp_modality"]`` what their nodes hold, as those from
        :func:`fimp_sc.pp.fmri`, :func:`~fimp_sc.pp.images`, :func:`~fimp_sc.pp.features` and
        :func:`~fimp_sc.pp.from_pyg` do (see :func:`fimp_sc.data.describe_modality`). Others hold expression.
    modality
        Name of a modality. Of several, the tokens of a node are those of all of them; a node may lack some. Nodes
        then are those of ``mdata``, whose ``obs``, ``obsm`` and ``obsp`` are looked at before those of the
        modalities (a graph must have all nodes). Several may be tables of expression or features: each keeps its
        own scale, and is scaled to totals of its own. Their columns are those of one table after the other; a name
        that several of them have follows that of its table there (``"protein:CD3"``).
    layer
        Layer with expression or features; ``None`` for ``X``. Of several tables it is that of each.
    labels_key
        Column of ``obs`` with labels to learn. Missing values and ``unlabeled_category`` are unlabeled.
    unlabeled_category
        Label of nodes whose class is not known.
    batch_key
        Column of ``obs`` with technical batches, whose means ``center="batch"`` subtracts. Defaults to
        ``library_key``.
    library_key
        Column of ``obs`` with samples. No edge may join two of them. Defaults to what the modality names itself.
        Genes that are NaN throughout a sample were not measured in it, and neither were those that are zero
        throughout although others show them so often that chance cannot explain it; a warning counts them.
    connectivities_key
        Graph in ``obsp``, row = destination. Any non-zero entry is an edge; models with ``use_weights=True`` also
        use its weight. Defaults to what the modality names itself.
    spatial_key
        Coordinates in ``obsm``, used to cut the graph into compact blocks; the graph's own order serves when
        absent. Tokens of signals know them, too.
    input_scale
        What the values of expression are: ``"counts"`` (non-negative integers), ``"normalized"`` (non-negative
        reals), both scaled to a common total and ``log1p`` transformed inside; ``"log"`` (log-normalized already,
        used as they are); ``"real"`` (any numbers, used as they are). ``"auto"`` decides from the values of
        expression, logs what it decided, warns where that is a guess, and takes features as real. Of several tables
        also a dictionary by modality.
    center
        What is subtracted from the expression of each gene: ``"training"``, its mean over all training cells, so
        that results of a cell do not depend on which other cells the object holds; or ``"batch"``, its mean over
        the cells of the same batch (shrunk toward the training mean), for batches with about the same mixture of
        cells. Or ``"matched"``: the mean over
        all training cells, after genes of batches were multiplied by factors that make mutually nearest neighborhoods
        of two batches agree. It takes out technique where batches share some tissue, of whatever mixture; batches that
        share none are made alike. The factors are fitted once, to training cells, and apply to batches of the
        same names; others are read as they are.

    Raises
    ------
    KeyError
        When a modality or key is missing.
    ValueError
        When values, signals, images, labels or graph cannot be used; the message says why.

    Warns
    -----
    UserWarning
        The graph joins samples that lie over each other; control probes are among the genes; labels read as if nodes
        had none, or a single node has them; nodes without neighbors; cells or genes that are zero throughout.

    Examples
    --------
    >>> import numpy as np
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> rng = np.random.default_rng(0)
    >>> bold, centers = rng.normal(size=(2, 10, 200)).cumsum(-1), rng.normal(size=(10, 3))
    >>> mdata = fimp.pp.fmri(bold, coordinates=centers)
    >>> FIMP.setup_mudata(mdata, modality="fmri")
    >>> FIMP(mdata).token_sizes
    {'fmri': 20}
    """
    method_args = cls._get_setup_method_args(**{k: v for k, v in locals().items() if k != "kwargs"})
    register(cls, mdata, method_args, kwargs)


def register(cls: type[FIMP], data: AnnData | MuData, method_args: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Register an object with a model class, from arguments of :meth:`FIMP.setup_anndata` and more of the tools.

    Parameters
    ----------
    kwargs
        ``user_study``, what warnings concern where ``data`` is a light copy of it; and ``source_registry`` and
        ``sequences``, what a trained model knows.
    """
    setup = method_args["setup_args"]
    modality = setup.get("modality")
    if modality is not None:
        setup["modality"] = as_modalities(modality)
    sequences = kwargs.pop("sequences", None)
    study = resolve(data, setup.get("modality")) if is_object(data) else None
    # The tools register a light copy of the user's object, and warnings concern all of its columns.
    user_study = kwargs.pop("user_study", study)
    if sequences is None and kwargs.get("source_registry") is not None:
        # The names under which a model knows its tokens: an object that is the modality alone does not say its own.
        known = kwargs["source_registry"]["field_registries"]
        sequences = [key.removeprefix(SEQUENCE_KEY) for key in known if key.startswith(SEQUENCE_KEY)]
    elif sequences is None:
        sequences = [] if study is None else [modality.name for modality in study.sequences]
    if kwargs and "source_registry" not in kwargs:  # with which scvi-tools passes some of its own
        raise TypeError(f"{method_args['setup_method_name']}() got an unexpected keyword argument {min(kwargs)!r}.")
    if getattr(data, "is_view", False):
        raise ValueError(
            "adata is a view of another object, and a model is bound to an object of its own: adata = adata.copy()"
        )
    if study is not None:
        check_layer(setup["layer"], study)
        own = study.registered_keys()
        setup["library_key"] = setup["library_key"] or own["library_key"]
        if setup["connectivities_key"] == _GRAPH:
            setup["connectivities_key"] = own["connectivities_key"]
        # Of a query labels may be missing.
        keys = ("library_key", "batch_key") + (("labels_key",) if kwargs.get("source_registry") is None else ())
        study.check_columns([setup[key] for key in keys])
    fields = registered_fields(setup, sequences)
    for field in fields:
        field.registered = study
    manager = AnnDataManager(
        fields=fields,
        setup_method_args=method_args,
        validation_checks=AnnDataManagerValidationCheck(check_fully_paired_mudata=False),
    )
    manager.register_fields(data, **kwargs)
    for field in fields:
        field.registered = None
    study = study or resolve(data, setup.get("modality"))
    warn_inputs(
        user_study or study,
        study.nodes.obsp[setup["connectivities_key"]],
        library_key=setup["library_key"],
        spatial_key=setup["spatial_key"],
    )
    cls.register_manager(manager)


def is_object(data: Any) -> bool:
    """Tell whether modalities can be looked at; of anything else the fields say what is wrong with it."""
    return hasattr(data, "uns") and getattr(data, "n_obs", 0) > 0


def check_layer(layer: str | None, study: Study) -> None:
    """Raise a ValueError where a layer is named, and signals and images, which have none, are all there is."""
    if layer is not None and not study.tables:
        raise ValueError(
            f"layer={layer!r} is for expression and features: signals are read from X, and images from their pixels or "
            "files. Leave it out."
        )
