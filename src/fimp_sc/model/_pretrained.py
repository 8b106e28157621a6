"""Models as folders to share: a configuration, weights, genes and a model card; plain data that runs no code."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fimp_sc.data._access import shorten
from fimp_sc.model._card import model_card
from fimp_sc.model._saved_config import check_config, describe, make_history, make_registry
from fimp_sc.pretrained._files import CheckpointError, check_file, checkpoint_folder, read_json, read_safetensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fimp_sc.model._base import GraphModel

Model = TypeVar("Model", bound="GraphModel")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GENES = "genes.txt"
CARD = "README.md"


def is_pretrained(folder: str | Path) -> bool:
    """Tell whether a folder looks like one that :func:`write_pretrained` wrote."""
    return all(Path(folder, name).is_file() for name in (CONFIG, WEIGHTS))


def write_pretrained(model: GraphModel, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a model to a folder, completely or not at all.

    Parameters
    ----------
    model
        Trained, or a foundation model as it is.
    folder
        Where to; folders above it are made.
    overwrite
        Replace a model that is there. A folder that holds anything else is left alone.

    Raises
    ------
    FileExistsError
        The folder is not empty, and ``overwrite`` is not set or it holds other files.
    ValueError
        Weights are NaN or infinite, or names of genes cannot be lines of a file.
    """
    # A link stays a link, and what it points to is replaced.
    target = Path(folder).expanduser().resolve()
    _check_target(target, overwrite=overwrite)
    genes = _check_genes([str(gene) for gene in model.genes])
    config = describe(model)
    # Copies of their own: the format holds no tensors that share memory.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.module.state_dict().items()
    }
    for name, value in tensors.items():
        if not _is_finite(value):
            raise ValueError(f"{name!r} of the model is NaN or infinite: training diverged, nothing was written.")
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    part.mkdir(parents=True)
    try:
        _write_files(part, config, genes, tensors, sum(p.numel() for p in model.module.parameters()))
        _check_target(target, overwrite=overwrite)  # writing took its time
        _put_in_place(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_pretrained(cls: type[Model], source: str | Path) -> Model:
    """Read a model that :func:`write_pretrained` wrote, onto the CPU and bound to no object.

    Parameters
    ----------
    cls
        Class of the model.
    source
        Folder, or the name of a repository on the Hugging Face hub.

    Raises
    ------
    CheckpointError
        A file is missing, damaged, of a newer version, or does not fit the others.
    """
    folder = checkpoint_folder(source)
    path = folder / CONFIG
    if not path.is_file() and (folder / "model.pt").is_file():
        raise CheckpointError(f"{str(folder)!r} was written by model.save(folder): read it with FIMP.load(folder).")
    config = check_config(read_json(path), path, cls)
    history = make_history(config, path)
    genes = _read_genes(folder / GENES, config)
    tensors, _ = read_safetensors(folder / WEIGHTS)
    try:
        model = cls(None, make_registry(config, genes), **config["init_params"])
    except Exception as error:  # values out of their range fail in many places
        raise CheckpointError(f"{str(path)!r} has 'init_params' that no model can be built from: {error}") from error
    _check_tensors(tensors, model.module.state_dict(), folder / WEIGHTS)
    with (folder / WEIGHTS).open("rb") as file:
        _check_digest(hashlib.file_digest(file, "sha256").hexdigest(), config, folder / WEIGHTS)
    model.module.load_state_dict(tensors)
    model.module.eval()
    model.is_trained_, model.history_ = config["is_trained"], history
    return model


def check_saved(folder: str | Path, prefix: str | None = None) -> None:
    """Refuse what :meth:`SavedModel.load` cannot read, on which torch and scvi-tools fail in their own ways.

    Parameters
    ----------
    folder
        Where :meth:`SavedModel.save` wrote to.
    prefix
        Of the names of files in it.

    Raises
    ------
    CheckpointError
        The file of the model is missing, damaged, or something else.
    """
    file = Path(folder, f"{prefix or ''}model.pt")
    if not file.is_file():
        if is_pretrained(folder):
            message = f"{str(folder)!r} was written by model.save_pretrained(folder): read it with "
            raise CheckpointError(f"{message}FIMP.from_pretrained(folder).")
        raise CheckpointError(f"{str(file)!r} does not exist: model.save(folder) writes it.")
    content: Any = None
    cause: Exception | None = None
    try:
        # Weights stay in the file; what else is unpickled here is unpickled again by scvi-tools.
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # of many kinds, by where the file is damaged
        cause = error
    if not isinstance(content, dict) or not {"model_state_dict", "var_names", "attr_dict"} <= content.keys():
        raise CheckpointError(f"{str(file)!r} is no saved model, or not all of it: save or copy it again.") from cause


def _check_target(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{str(target)!r} is a file: choose a folder to write the model to.")
    inside = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    foreign = [name for name in inside if name not in (CONFIG, WEIGHTS, GENES, CARD)]
    if foreign:
        raise FileExistsError(
            f"{str(target)!r} holds files that are not of a saved model ({shorten(foreign)}): choose another folder."
        )
    if inside and not overwrite:
        raise FileExistsError(
            f"{str(target)!r} holds a model already: pass overwrite=True to replace it, or choose another folder."
        )


def _write_files(
    folder: Path, config: dict[str, Any], genes: Sequence[str], tensors: Mapping[str, Tensor], n_parameters: int
) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    _write_text(folder / GENES, _lines(genes))
    # Some versions of safetensors write a file that only its owner can read.
    shutil.copymode(folder / GENES, folder / WEIGHTS)
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = config | {"sha256": {GENES: _digest(genes), WEIGHTS: digest}}
    _write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write_text(folder / CARD, model_card(config, genes, n_parameters))


def _put_in_place(part: Path, target: Path) -> None:
    """Rename the finished folder; what was there before comes back if that fails."""
    if not target.exists():
        part.rename(target)
        return
    old = part.with_suffix(".old")
    target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    # The same bytes on every system, as they are compared by their digest.
    path.write_text(text, encoding="utf-8", newline="\n")


def _lines(genes: Sequence[str]) -> str:
    return "".join(f"{gene}\n" for gene in genes)


def _digest(genes: Sequence[str]) -> str:
    return hashlib.sha256(_lines(genes).encode()).hexdigest()


def _check_genes(genes: list[str]) -> list[str]:
    bad = [gene for gene in genes if not gene or "\n" in gene or "\r" in gene]
    if bad:
        raise ValueError(f"Names of genes must be lines of {GENES}, found {bad[0]!r}: rename it before training.")
    if len(set(genes)) < len(genes):
        raise ValueError(
            f"Names of genes must be unique to be found in other objects: {_twice(genes)!r} is there twice."
        )
    return genes


def _twice(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _read_genes(path: Path, config: Mapping[str, Any]) -> list[str]:
    if not config["n_genes"]:
        return []  # signals or images alone
    check_file(path)
    try:
        genes = path.read_text(encoding="utf-8-sig").split("\n")  # line ends of any system, as git may convert them
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is not a text file of gene names ({error}): download it again.") from None
    if genes[-1] == "":
        del genes[-1]
    if len(genes) != config["n_genes"]:
        raise CheckpointError(
            f"{str(path)!r} has {len(genes):,} lines, but 'n_genes' in {str(path.parent / CONFIG)!r} is "
            f"{config['n_genes']:,}: they belong to different models, or one is cut short."
        )
    if len(set(genes)) < len(genes):
        raise CheckpointError(f"{str(path)!r} has {_twice(genes)!r} twice: it was changed or is damaged.")
    _check_digest(_digest(genes), config, path)
    return genes


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    missing = [repr(name) for name in expected if name not in found]
    unknown = [repr(name) for name in found if name not in expected]
    if missing or unknown:
        what = [f"{kind} {shorten(names)}" for kind, names in (("no", missing), ("unknown", unknown)) if names]
        raise CheckpointError(
            f"{str(path)!r} has {' and '.join(what)}: it does not belong to the model of the {CONFIG} beside it."
        )
    for name, value in found.items():
        wanted = expected[name]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise CheckpointError(
                f"{name!r} in {str(path)!r} is {_kind(value)}, expected {_kind(wanted)}: it does not belong to the "
                f"model of the {CONFIG} beside it."
            )
        if not _is_finite(value):
            raise CheckpointError(f"{name!r} in {str(path)!r} is NaN or infinite: the file is damaged, get it anew.")


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _check_digest(found: str, config: Mapping[str, Any], path: Path) -> None:
    if config["sha256"].get(path.name) != found:
        raise CheckpointError(
            f"{str(path)!r} is not the file that 'sha256' in {str(path.parent / CONFIG)!r} describes: it was changed "
            "or is damaged, or the two belong to different models. Get both anew."
        )
