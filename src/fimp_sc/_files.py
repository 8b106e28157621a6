"""Files that are replaced whole: a reader finds the old content or the new, never a part of it."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_PART = ".fimp-part"


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder. A folder that is not there appears with all of them at once.

    All are written beside and are on the disk before the first takes its place. In a folder that exists they then do so
    one by one, in their order: what must not be read in part belongs into one file, the first. What a killed process
    left unfinished is removed.

    Parameters
    ----------
    folder
        Where to; folders above it are made.
    files
        Content of each file by name.

    Raises
    ------
    OSError
        The disk is full, or the system refuses to write. What was there before stays.
    """
    fresh = not folder.is_dir()
    # In the folder itself, as nothing may be written beside where it is a file system of its own.
    where, name = (folder.parent, folder.name) if fresh else (folder, next(iter(files)))
    part = where / f".{name}.{uuid.uuid4().hex}{_PART}"
    part.mkdir(parents=True)
    try:
        try:
            for name, content in files.items():
                with (part / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            what = f"{error.strerror}; nothing was written to the folder"
            raise OSError(error.errno, what, str(folder)) from error
        _sync(part)
        if fresh:
            part.rename(folder)
            _sync(folder.parent)
        else:
            for name in files:
                (part / name).replace(folder / name)
            _sync(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for place, name in ((folder.parent, folder.name), (folder, next(iter(files)))):
        for left in place.glob(f".{glob.escape(name)}.*{_PART}"):
            shutil.rmtree(left, ignore_errors=True)


def is_unfinished(path: Path) -> bool:
    """Tell whether a path is what :func:`write_files` leaves when it is killed."""
    return path.name.startswith(".") and path.name.endswith(_PART)


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
