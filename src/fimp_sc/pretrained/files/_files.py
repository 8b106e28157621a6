"""Files of a checkpoint: found, and read as data only. Nothing that a file says is run."""

from __future__ import annotations

import json
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fimp_sc.data.storage._elements import shorten
from fimp_sc.pretrained.files._weights import CheckpointError, Weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "CheckpointError",
    "Weights",
    "check_file",
    "check_files",
    "checkpoint_folder",
    "find_weights",
    "parse_json",
    "read_json",
    "read_safetensors",
    "read_weights",
]

_PICKLED = {".pt", ".pth", ".bin", ".ckpt"}
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")  # of data-parallel and of compiled modules
_LONGEST_JSON = 1 << 27  # ten times a vocabulary of all known genes
_ATTEMPTS = 20
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.txt", "*.safetensors", *(f"*{suffix}" for suffix in sorted(_PICKLED))]
# Left where a download or a clone went wrong.
_PLACEHOLDERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"<!doctype html": "a web page: open the link in a browser and download the file it offers",
    b"<html": "a web page: open the link in a browser and download the file it offers",
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    CheckpointError
        The file is missing, is not JSON, or holds something else than an object.
    """
    check_file(path)
    if path.stat().st_size > _LONGEST_JSON:
        raise CheckpointError(f"{str(path)!r} has more than {_LONGEST_JSON >> 20} MB, too much for such a file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON ({error}): download it again.") from None
    return parse_json(text, path)


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """Parse the JSON object that was found in a file.

    Raises
    ------
    CheckpointError
        It is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON ({error}): download it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} must hold a JSON object {{...}}, found {type(content).__name__}.")
    return content


def read_weights(path: Path) -> Weights:
    """Read the tensors of a file without running any code that it may carry.

    Parameters
    ----------
    path
        ``.safetensors``, or what ``torch.save`` wrote: ``.pt``, ``.pth``, ``.bin``, ``.ckpt``. A dictionary of weights
        inside ``"state_dict"``, ``"model_state_dict"`` or ``"model"`` is found there. ``"module."`` or ``"_orig_mod."``
        is taken off names that all start with it.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, of another kind, without weights, or holds objects that could run code.
    """
    path = Path(path)
    check_file(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        tensors, _ = read_safetensors(path)
    elif suffix in _PICKLED:
        tensors = _state_dict(_load(path), path)
    else:
        known = ", ".join([".safetensors", *sorted(_PICKLED)])
        raise CheckpointError(f"{str(path)!r} is not a file of weights by its name: expected {known}.")
    for prefix in _WRAPPERS:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if not tensors:
        raise CheckpointError(f"{str(path)!r} holds no tensors.")
    return Weights(path, tensors)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata.

    Raises
    ------
    CheckpointError
        The file is missing or damaged.
    """
    from safetensors import safe_open

    check_file(path)
    for attempt in range(_ATTEMPTS):
        before = _identity(path)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
                metadata = dict(file.metadata() or {})
        except Exception as error:
            if _identity(path) == before or attempt == _ATTEMPTS - 1:
                raise _damaged(path, error) from None
        # The file is opened more than once: replaced meanwhile, its header and its numbers would be of two files.
        if _identity(path) == before:
            return tensors, metadata
    raise CheckpointError(f"{str(path)!r} is being written all the time: read it when that is done.")


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def find_weights(folder: Path, names: Sequence[str]) -> Path:
    """Return the first of the files ``names`` that is in the folder.

    Raises
    ------
    CheckpointError
        None of them is there.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    inside = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    raise CheckpointError(
        f"{str(folder)!r} has no {' or '.join(repr(name) for name in names)}; found there: "
        f"{shorten([repr(name) for name in inside], 10) or 'nothing'}. Put the file there under "
        f"{'one of these names' if len(names) > 1 else 'this name'}."
    )


def check_files(folder: Path, needed: Iterable[Sequence[str]]) -> None:
    """Check that a folder has files that are needed, of each group of names at least one.

    Raises
    ------
    CheckpointError
        One is missing; the message names what is there.
    """
    for names in needed:
        find_weights(folder, names)


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """Return the folder of a checkpoint, downloading it where a name on the Hugging Face hub is given.

    Parameters
    ----------
    checkpoint
        A folder, or the name of a hub repository, ``"owner/name"``, which takes the package huggingface_hub.

    Raises
    ------
    CheckpointError
        There is no such folder, and nothing can be downloaded under that name.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{str(folder)!r} is a file: pass the folder that it is in, {str(folder.parent)!r}.")
    if not (isinstance(checkpoint, str) and _HUB_NAME.fullmatch(checkpoint)):
        raise CheckpointError(
            f"There is no folder {str(folder)!r} (looked from {str(Path.cwd())!r}): name the one that holds the "
            "model or checkpoint."
        )
    absent = f"There is no folder {checkpoint!r} here, and it could not be had from the Hugging Face hub"
    try:
        from huggingface_hub import snapshot_download  # type: ignore[import-not-found]
    except ImportError:
        raise CheckpointError(
            f"{absent}: huggingface_hub is not installed. Install it (pip install huggingface_hub), or download the "
            "checkpoint yourself and pass its folder."
        ) from None
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise CheckpointError(
            f"{absent} ({_first_line(error)}). Check the name and the connection, or download the checkpoint "
            "yourself and pass its folder."
        ) from error


def check_file(path: Path) -> None:
    """Check that a file is there, can be read, and is not what a failed download leaves.

    Raises
    ------
    CheckpointError
        It is missing, empty, a folder, a web page or a Git LFS pointer, or the system refuses to open it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {str(path)!r}.") from None
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    if not head:
        raise CheckpointError(f"{str(path)!r} is empty: download it again.")
    for start, what in _PLACEHOLDERS.items():
        if head.lstrip().lower().startswith(start):
            raise CheckpointError(f"{str(path)!r} is {what}.")


def _load(path: Path) -> Any:
    """Return what ``torch.save`` wrote, if it is made of tensors and plain values."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # as torch decides
    # Two older formats that torch < 2.6 reads with code in them, whatever it is told.
    if _is_program(path) if is_zip else tarfile.is_tarfile(path):
        raise CheckpointError(
            f"{str(path)!r} is a {'TorchScript program' if is_zip else 'tar archive'}, which can carry code and was "
            "not run. Use a file that holds the state_dict, or one in the safetensors format."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how old the file is
            # Mapped, large tables come from the disk only when they are taken.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # damaged pickles raise anything
        refused = re.search(r"GLOBAL (\S+) was not|whose module (\S+) is blocked", str(error))
        if refused is None:
            raise _damaged(path, error) from None
        name = refused[1] or refused[2]
        raise CheckpointError(
            f"{str(path)!r} carries code, which was not run: besides tensors it asks for {name!r}. If you "
            "trust its origin, load it with the program that wrote it, and save model.state_dict() alone."
        ) from None


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return False  # torch says what is wrong with it
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{str(path)!r} states more content than it has: it is damaged, or made to do harm.")
    return any(Path(member.filename).name == "constants.pkl" for member in members)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors by name, out of the dictionaries that training programs put around them."""
    seen = content
    while isinstance(seen, Mapping):
        inner = next((seen[name] for name in _CONTAINERS if isinstance(seen.get(name), Mapping)), None)
        if inner is None:
            tensors = {key: value for key, value in seen.items() if isinstance(key, str) and isinstance(value, Tensor)}
            for key, value in tensors.items():
                # One number may be stated as a tensor of any size.
                if value.layout == torch.strided and value.nbytes > value.untyped_storage().nbytes():
                    raise CheckpointError(
                        f"{key!r} in {str(path)!r} is {tuple(value.shape)}, more than its stored numbers: the file is "
                        "damaged, or the tensor was saved without contiguous()."
                    )
            if tensors:
                return tensors
            break
        seen = inner
    what = type(seen).__name__
    if isinstance(seen, Mapping):
        what = f"a dictionary of {shorten([repr(key) for key in seen]) or 'nothing'}"
    raise CheckpointError(
        f"{str(path)!r} holds {what}, expected tensors by name: save model.state_dict() with torch.save."
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    # torch's own text about a broken pickle advises to load it with code and all.
    reason = type(error).__name__ + ("" if isinstance(error, UnpicklingError) else f": {_first_line(error)}")
    return CheckpointError(
        f"{str(path)!r} cannot be read as weights: it is damaged, cut short or of another kind ({reason}). Download it "
        "again and compare its size with the original."
    )


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    return line if len(line) <= 120 else f"{line[:117]}..."
