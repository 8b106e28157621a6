"""Models as folders: weights with all that belongs to them in one file, and for people a configuration and a card.

Plain data that runs no code. ``model.safetensors`` alone is the model, so that it is replaced in one step;
``config.json`` repeats what its header says, for those who look and for other programs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import torch
from torch.overrides import TorchFunctionMode

import fimp_sc
from fimp_sc._files import is_unfinished, write_files
from fimp_sc._logging import warn
from fimp_sc.data.storage._elements import shorten
from fimp_sc.model.io._card import model_card
from fimp_sc.model.io._config import FORMAT, FORMAT_VERSION, describe, init_arguments, make_history, make_registry
from fimp_sc.pretrained.files._files import (
    CheckpointError,
    check_file,
    checkpoint_folder,
    parse_json,
    read_json,
    read_safetensors,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fimp_sc.model._fimp import FIMP

Model = TypeVar("Model", bound="FIMP")
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
GENES = "genes.txt"  # in folders of the first version
PICKLE = "model.pt"  # as scvi-tools writes


def write_pretrained(model: FIMP, folder: str | Path, *, overwrite: bool = False) -> None:
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
    OSError
        The disk is full, or the system refuses to write. A model that was there stays.
    ValueError
        Weights are NaN or infinite, or names of genes are not unique.
    """
    from safetensors.torch import save

    # A link stays a link, and what it points to is replaced.
    target = Path(folder).expanduser().resolve()
    _check_target(target, overwrite=overwrite)
    # Copies of their own: the format holds no tensors that share memory.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.module.state_dict().items()
    }
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name!r} of the model is NaN or infinite: training diverged, nothing was written.")
    config = describe(model)
    names = pd.Index(config["genes"])
    if not names.is_unique:
        twice = names[names.duplicated()][0]
        raise ValueError(f"Names of genes must be unique to be found in other objects: {twice!r} is there twice.")
    config["sha256"] = {"config": _digest_config(config), "weights": _digest_weights(tensors)}
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    card = model_card(config, sum(p.numel() for p in model.module.parameters()))
    files = {
        WEIGHTS: save(tensors, metadata={"config": text}),
        CONFIG: text.encode(),
        CARD: card.encode(),
    }
    write_files(target, files)
    for former in (PICKLE, GENES):
        (target / former).unlink(missing_ok=True)


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
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise CheckpointError(
                f"{str(folder)!r} holds {PICKLE}, a pickle, which can run code when it is opened: nothing was read. If "
                f"you trust its origin, convert it once: FIMP.load({str(folder)!r}, adata, trust=True)"
                ".save('new_folder')."
            )
        raise CheckpointError(f"There is no {WEIGHTS} in {str(folder)!r}: model.save(folder) writes a model.")
    tensors, metadata = read_safetensors(path)
    if "config" in metadata:
        config = _check_format(parse_json(metadata["config"], path), path, cls)
        if not _is_intact(config) or config["sha256"].get("weights") != _digest_weights(tensors):
            raise _changed(path)
        _check_copy(folder / CONFIG, config)
    else:
        config = _read_first_version(folder, cls)
    try:
        with _Budget(sum(value.numel() for value in tensors.values())):
            model = cls(None, make_registry(config, cls), **init_arguments(config))
        model.module.load_state_dict(tensors)
        model.is_trained_, model.history_ = bool(config["is_trained"]), make_history(config["history"])
    except CheckpointError:
        raise
    except Exception as error:  # what does not fit fails in many places
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(
            f"No model can be built from {str(path)!r} ({reason}): it was changed, or written by a newer version "
            "(pip install -U fimp-sc)."
        ) from error
    model.module.eval()
    return model


class _Budget(TorchFunctionMode):
    """Let tensors be made until they are many times what a file holds: sizes that it states are not trusted."""

    _MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.eye)
    _MORE = 8

    def __init__(self, n_stored: int) -> None:
        super().__init__()
        self._left = self._MORE * n_stored + 2**20

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._MAKERS:
            where = {name: value for name, value in kwargs.items() if name not in ("device", "generator", "out")}
            self._left -= func(*args, **where, device="meta").numel()  # which takes no memory
            if self._left < 0:
                raise ValueError("it states sizes that its weights do not have")
        return func(*args, **kwargs)


def _check_target(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{str(target)!r} is a file: choose a folder to write the model to.")
    entries = target.iterdir() if target.is_dir() else ()
    inside = sorted(entry.name for entry in entries if not is_unfinished(entry))
    foreign = [name for name in inside if name not in (WEIGHTS, CONFIG, CARD, GENES, PICKLE)]
    if foreign:
        raise FileExistsError(
            f"{str(target)!r} holds files that are not of a saved model ({shorten(foreign)}): choose another folder."
        )
    if inside and not overwrite:
        raise FileExistsError(
            f"{str(target)!r} holds a model already: pass overwrite=True to replace it, or choose another folder."
        )


def _check_format(config: dict[str, Any], path: Path, cls: type[FIMP]) -> dict[str, Any]:
    """Refuse the configuration of something else, or of a newer version."""
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} does not describe a model of fimp-sc ('format' is {config.get('format')!r}): pass the "
            "folder that model.save(folder) wrote."
        )
    newer = config.get("format_version")
    if isinstance(newer, int) and newer > FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} has 'format_version' {newer}, and fimp-sc {fimp_sc.__version__} reads up to "
            f"{FORMAT_VERSION}: it was written by a newer version, upgrade with pip install -U fimp-sc."
        )
    if config.get("class") != cls.__name__:
        raise CheckpointError(f"{str(path)!r} describes a {config.get('class')!r}, not a {cls.__name__!r}.")
    return config


def _check_copy(path: Path, config: Mapping[str, Any]) -> None:
    """Look at the configuration beside the weights, which counts for nothing: who changes it must be told."""
    if not path.exists():
        return
    copy = read_json(path)
    if not _is_intact(copy):
        raise _changed(path)
    if copy["sha256"] == config["sha256"]:
        return
    warn(
        f"{str(path)!r} is not of the model beside it, as after a save that was interrupted. The model is read from "
        f"{WEIGHTS} alone; save it again to bring both together.",
    )


def _read_first_version(folder: Path, cls: type[FIMP]) -> dict[str, Any]:
    """Return the configuration of a folder of the first version, which had names of genes in a file of their own."""
    path, genes = folder / CONFIG, folder / GENES
    config = _check_format({"sequences": {}, **read_json(path)}, path, cls)
    if config.get("format_version") != 1:
        raise _changed(path)
    names: list[str] = []
    if config.get("n_genes") != 0:
        check_file(genes)
        try:
            # Line ends of any system, as git may convert them.
            names = genes.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{str(genes)!r} is not a text file of gene names ({error}).") from None
    with (folder / WEIGHTS).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    lines = hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
    if config.get("sha256") != {GENES: lines, WEIGHTS: weights}:
        raise _changed(path)
    warn(
        f"{str(folder)!r} was written by a version of fimp-sc that did not protect {CONFIG} by a checksum: a change of "
        "it would not be seen. Save the model again.",
    )
    return {**config, "genes": names}


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} does not fit its checksum ('sha256'): it was changed or is damaged, or belongs to another "
        "model. Get the folder anew, or save the model again."
    )


def _is_intact(config: Mapping[str, Any]) -> bool:
    digests = config.get("sha256")
    return isinstance(digests, dict) and digests.get("config") == _digest_config(config)


def _digest_config(config: Mapping[str, Any]) -> str:
    content = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest_weights(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
