"""Saving a model, reading it again, and binding it to another object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from anndata import AnnData
from scvi.model._utils import parse_device_args

from fimp_sc.data._modality import quiet_mudata
from fimp_sc.model._base import GraphModel
from fimp_sc.model._pretrained import check_saved, is_pretrained, read_pretrained, write_pretrained
from fimp_sc.model._reference import compare

if TYPE_CHECKING:
    from mudata import MuData


class SavedModel(GraphModel):
    """A model that folders hold, and that objects without it can be read with."""

    @classmethod
    def load_query_data(cls, adata: AnnData | MuData, reference_model: Self | str | Path, **setup_kwargs: Any) -> Self:
        """Return a copy of a trained model bound to a new object, with the same weights and no further training.

        Parameters
        ----------
        adata
            New section with a graph. Genes are matched by name: those unknown to the model are dropped, those that
            it lacks are treated as not measured. Signals may be shorter than those the model was trained on.
        reference_model
            A trained model, or the folder of one that :meth:`save` or :meth:`save_pretrained` wrote.
        **setup_kwargs
            Arguments of :meth:`setup_anndata`, where data are found elsewhere in the new object than in that of
            training, or are on another scale: ``layer``, ``library_key``, ``batch_key``, ``input_scale``, ...

        Raises
        ------
        ValueError
            When the object has next to none of the genes of the model, or cannot be used.

        Warns
        -----
        UserWarning
            The genes that it has carry less than half of the counts of training; and what :meth:`setup_anndata` warns
            of.
        """
        if not isinstance(reference_model, str | Path):
            reference: Self = reference_model
        elif is_pretrained(reference_model):
            reference = cls.from_pretrained(reference_model)
        else:
            reference = cls.load(str(reference_model), adata=False)
        registry = reference.registry
        if cls._is_object(adata):
            reference._check_genes(setup_kwargs.get("user_object", adata))
        # What a model learnt from a modality is also applied to an object that is this modality, and the reverse.
        setup = {name: value for name, value in registry["setup_args"].items() if name != "modality"} | setup_kwargs
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
        compare(model)
        return model

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save the model as :meth:`scvi.model.base.BaseModelClass.save` does."""
        with quiet_mudata():
            super().save(*args, **kwargs)

    @classmethod
    def load(
        cls,
        dir_path: str | Path,
        adata: AnnData | MuData | Literal[False] | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
        backup_url: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Read a model that :meth:`save` wrote, as :meth:`scvi.model.base.BaseModelClass.load` does.

        Parameters
        ----------
        dir_path
            Folder that the model was saved to.
        adata
            Object with a graph to bind the model to; ``None`` looks for one that was saved with the model, ``False``
            binds it to none.
        accelerator, device
            Where the weights go, as in Lightning.
        prefix
            Of the names of files in the folder.
        backup_url
            Where to download the file of the model from if it is not in the folder.
        **kwargs
            Further arguments of scvi-tools.

        Raises
        ------
        CheckpointError
            The file of the model is missing, damaged, or something else; a :class:`ValueError`.
        """
        if backup_url is None:
            check_saved(dir_path, prefix)
        if adata is not None and adata is not False and cls._is_object(adata):
            super().load(str(dir_path), False, "cpu", "auto", prefix, backup_url, **kwargs)._check_genes(adata)
        return super().load(str(dir_path), adata, accelerator, device, prefix, backup_url, **kwargs)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the model to a folder to share: ``config.json``, ``model.safetensors``, ``genes.txt``, ``README.md``.

        The folder holds plain data, no pickled objects, no cells and no paths, and needs no other file: a foundation
        model or gene vectors that the model was made from are in its weights. It is written completely or not at all.

        Parameters
        ----------
        folder
            Where to. It may hold nothing else.
        overwrite
            Replace a model that is there.

        Raises
        ------
        FileExistsError
            The folder holds a model and ``overwrite`` is not set, or it holds other files.
        ValueError
            Weights are NaN or infinite, or names of genes cannot be lines of a file.
        """
        write_pretrained(self, folder, overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, adata: AnnData | MuData | None = None, *, accelerator: str = "auto"
    ) -> Self:
        """Read a model that :meth:`save_pretrained` wrote. No code in its files is run.

        Parameters
        ----------
        folder_or_hub_id
            Folder, or name of a repository on the Hugging Face hub, which takes the package huggingface_hub.
        adata
            Object with a graph to bind the model to, as :meth:`load_query_data` does, once all files were found in
            order. Without it the model serves :meth:`load_query_data` and the functions of :mod:`fimp_sc.tl`.
        accelerator
            ``"auto"`` takes a GPU when there is one.

        Raises
        ------
        CheckpointError
            A file is missing, damaged, of a newer version, or does not fit the others; a :class:`ValueError`.
        """
        _, _, device = parse_device_args(accelerator, "auto", return_device="torch", validate_single_device=True)
        model = read_pretrained(cls, folder_or_hub_id)
        if adata is not None:
            model = cls.load_query_data(adata, model)
        model.to_device(device)
        return model
