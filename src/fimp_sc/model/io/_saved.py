"""Saving a model, reading it again, and binding it to another object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anndata import AnnData
from scvi.model._utils import parse_device_args
from scvi.model.base import BaseModelClass

from fimp_sc.data._study import resolve
from fimp_sc.data.storage._elements import missing_key
from fimp_sc.model.io._folder import WEIGHTS, read_pretrained, write_pretrained
from fimp_sc.model.predict._labels import use_mixture
from fimp_sc.model.predict._reference import compare
from fimp_sc.model.registry._graph_data import check_genes, graph_data, study_of
from fimp_sc.model.registry._setup import is_object
from fimp_sc.model.registry._unmeasured import mark_unmeasured

if TYPE_CHECKING:
    from mudata import MuData

    from fimp_sc.model._fimp import FIMP


def load_query_data(
    cls: type[FIMP], adata: AnnData | MuData, reference_model: FIMP | str | Path, **setup_kwargs: Any
) -> FIMP:
    """Return a copy of a trained model bound to a new object, with the same weights and no further training.

    Parameters
    ----------
    adata
        New section with a graph. Genes are matched by name: those unknown to the model are dropped, those that
        it lacks are treated as not measured. Signals may be shorter than those the model was trained on.
    reference_model
        A trained model, or the folder of one that :meth:`save` wrote.
    **setup_kwargs
        Arguments of :meth:`setup_anndata`, where data are found elsewhere in the new object than in that of
        training, or are on another scale: ``layer``, ``library_key``, ``batch_key``, ``input_scale``, ...

    Returns
    -------
    A model of its own, with the weights, labels and settings of the other.

    Raises
    ------
    KeyError
        A key is missing.
    ValueError
        The object has next to none of the genes of the model, or cannot be used.

    Warns
    -----
    UserWarning
        The genes that it has carry less than half of the counts of training; genes with 5 % or more of these are zero
        throughout a sample of 100 cells or more, and count as not measured; and what :meth:`setup_anndata` warns of.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=400, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> train, query = (adata[adata.obs["section"] == name].copy() for name in adata.obs["section"].unique()[:2])
    >>> FIMP.setup_anndata(train, labels_key="cell_type")
    >>> model = FIMP(train)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> bound = FIMP.load_query_data(query, model)
    >>> len(bound.predict()) == query.n_obs
    True
    """
    reference = cls.load(reference_model) if isinstance(reference_model, str | Path) else reference_model
    registry = reference.registry
    if is_object(adata):
        user_study = setup_kwargs.get("user_study")
        check_genes(reference, adata if user_study is None else user_study.data)
    # What a model learned from a modality is also applied to an object that is this modality, and the reverse.
    setup = {name: value for name, value in registry["setup_args"].items() if name != "modality"} | setup_kwargs
    labels_key = setup_kwargs.get("labels_key")
    if labels_key is not None and is_object(adata):
        obs = resolve(adata, registry["setup_args"].get("modality")).nodes.obs
        if labels_key not in obs:
            raise missing_key(labels_key, "adata.obs", obs, "Leave labels_key out for an object without labels.")
    how = {"source_registry": registry, "sequences": list(reference.module.sequences)}
    if isinstance(adata, AnnData):
        cls.setup_anndata(adata, **setup, **how)
    else:
        cls.setup_mudata(adata, modality=registry["setup_args"].get("modality"), **setup, **how)
    model = cls(None, registry=registry, **reference.init_params_["non_kwargs"])
    model.module.load_state_dict(reference.module.state_dict())
    model.to_device(reference.device)
    model.module.eval()
    model.is_trained_, model.history_ = reference.is_trained, dict(reference.history or {}) or None
    # Left to itself, scvi-tools would register the object once more, reading all of its values again.
    model._adata = adata
    model._adata_manager = cls._get_most_recent_anndata_manager(adata, required=True)
    model._register_manager_for_instance(model._adata_manager)
    if is_object(adata):
        mark_unmeasured(model, adata)
    if (same := compare(model, graph_data(model, study_of(model, adata)))) is not None:
        use_mixture(model, elsewhere=not same)
    return model


def save(
    model: FIMP, dir_path: str | Path, prefix: str | None = None, overwrite: bool = False, save_anndata: bool = False
) -> None:
    """Write the model to a folder: ``model.safetensors``, ``config.json`` and ``README.md``.

    The folder holds plain data, no pickled objects, no cells and no paths, and needs no other file: a foundation
    model or gene vectors that the model was made from are in its weights. It is written completely or not at all,
    also where the process is killed or the disk is full; what was there before is replaced in one step.

    Parameters
    ----------
    dir_path
        Where to; folders above it are made. It may hold nothing else.
    prefix, save_anndata
        Of scvi-tools, not supported: a folder holds one model, and no cells.
    overwrite
        Replace a model that is there, also one that scvi-tools' format holds.

    Raises
    ------
    FileExistsError
        The folder holds a model and ``overwrite`` is not set, or it holds other files.
    OSError
        The disk is full, or the system refuses to write.
    ValueError
        Weights are NaN or infinite, names of genes are not unique, or an argument is not supported.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.save("model")
    >>> FIMP.load("model", adata).get_latent_representation().shape
    (200, 64)
    """
    if prefix is not None:
        raise ValueError(f"A folder holds one model, so files have no prefix={prefix!r}: give it another folder.")
    if save_anndata:
        raise ValueError(
            "A folder holds a model without cells: write these with adata.write_h5ad(file), and pass the object to "
            "FIMP.load(folder, adata)."
        )
    write_pretrained(model, dir_path, overwrite=overwrite)


def save_pretrained(model: FIMP, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write the model to a folder to share; the same as :meth:`save`, under the name that the hub uses.

    Parameters
    ----------
    folder
        Where to; folders above it are made. It may hold nothing else.
    overwrite
        Replace a model that is there, also one that scvi-tools' format holds.

    Raises
    ------
    FileExistsError
        The folder holds a model and ``overwrite`` is not set, or it holds other files.
    OSError
        The disk is full, or the system refuses to write.
    ValueError
        Weights are NaN or infinite, or names of genes are not unique.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.save_pretrained("model")
    >>> FIMP.from_pretrained("model", adata).get_latent_representation().shape
    (200, 64)
    """
    model.save(folder, overwrite=overwrite)


def load(
    cls: type[FIMP],
    dir_path: str | Path,
    adata: AnnData | MuData | Literal[False] | None = None,
    accelerator: str = "auto",
    device: int | str = "auto",
    *,
    trust: bool = False,
    **kwargs: Any,
) -> FIMP:
    """Read a model that :meth:`save` wrote. No code in its files is run, unless ``trust`` says so.

    Parameters
    ----------
    dir_path
        Folder, or name of a repository on the Hugging Face hub, which takes the package huggingface_hub.
    adata
        Object with a graph to bind the model to, as :meth:`load_query_data` does, once all files were found in
        order. Without it the model serves :meth:`load_query_data` and the functions of :mod:`fimp_sc.tl`.
    accelerator, device
        Where the weights go, as in Lightning; ``"auto"`` takes a GPU when there is one.
    trust
        Whether a folder in the format of scvi-tools (``model.pt``, a pickle) may be opened, which runs any code
        that its author put there. Save such a model again to be rid of it.
    **kwargs
        Further arguments of scvi-tools' ``load`` for such a folder.

    Returns
    -------
    The model, in evaluation mode.

    Raises
    ------
    CheckpointError
        A file is missing, damaged, of a newer version, or does not fit the others, or it is a pickle that is not
        trusted; a :class:`ValueError`.
    ValueError
        The object cannot be used with the model, or an argument is not supported.

    Warns
    -----
    UserWarning
        The folder is of a version without a checksum of the configuration, or ``config.json`` is of another model
        than the weights.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.save("model")
    >>> again = FIMP.load("model", accelerator="cpu")
    >>> fimp.tl.embed(adata, model=again, verbose=False)
    """
    if trust and (kwargs or not Path(dir_path, WEIGHTS).is_file()):
        return BaseModelClass.load.__func__(cls, str(dir_path), adata, accelerator, device, **kwargs)
    if kwargs:
        raise ValueError(f"{', '.join(kwargs)}: only with trust=True, for a folder in the format of scvi-tools.")
    _, _, place = parse_device_args(accelerator, device, return_device="torch", validate_single_device=True)
    model = read_pretrained(cls, dir_path)
    if adata is not None and adata is not False:
        model = cls.load_query_data(adata, model)
    model.to_device(place)
    return model


def from_pretrained(
    cls: type[FIMP], folder_or_hub_id: str | Path, adata: AnnData | MuData | None = None, *, accelerator: str = "auto"
) -> FIMP:
    """Read a model from a folder or the hub; the same as :meth:`load` without trust in pickles.

    Parameters
    ----------
    folder_or_hub_id
        Folder, or name of a repository on the Hugging Face hub, which takes the package huggingface_hub.
    adata
        Object with a graph to bind the model to, as :meth:`load_query_data` does, once all files were found in
        order. Without it the model serves :meth:`load_query_data` and the functions of :mod:`fimp_sc.tl`.
    accelerator
        Where the weights go, as in Lightning; ``"auto"`` takes a GPU when there is one.

    Returns
    -------
    The model, in evaluation mode.

    Raises
    ------
    CheckpointError
        A file is missing, damaged, of a newer version, or does not fit the others, or it is a pickle; a
        :class:`ValueError`.
    ValueError
        The object cannot be used with the model.

    Warns
    -----
    UserWarning
        The folder is of a version without a checksum of the configuration, or ``config.json`` is of another model
        than the weights.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.save_pretrained("model")
    >>> again = FIMP.from_pretrained("model", adata)
    >>> bool((again.get_latent_representation() == model.get_latent_representation()).all())
    True
    """
    return cls.load(folder_or_hub_id, adata, accelerator)


def load_registry(cls: type[FIMP], dir_path: str | Path) -> dict[str, Any]:
    """Return what a saved model knows of its data, as scvi-tools keeps it; no code in its files is run.

    Parameters
    ----------
    dir_path
        Folder, or name of a repository on the Hugging Face hub, which takes the package huggingface_hub.

    Returns
    -------
    Arguments of :meth:`setup_anndata` under ``"setup_args"``, and what was registered under ``"field_registries"``.

    Raises
    ------
    CheckpointError
        A file is missing, damaged, of a newer version, or does not fit the others, or it is a pickle; a
        :class:`ValueError`.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, labels_key="cell_type", library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.save("model")
    >>> FIMP.load_registry("model")["setup_args"]["labels_key"]
    'cell_type'
    """
    return cls.load(dir_path, accelerator="cpu").registry
