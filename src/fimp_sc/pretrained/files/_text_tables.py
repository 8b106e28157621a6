"""Text tables opened within bounds: what a small file unpacks to, and how many columns it has."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import TYPE_CHECKING

from fimp_sc.pretrained.files._weights import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_MOST_DENSE = 100  # of compression
_WIDEST = 1 << 15  # vectors of genes have hundreds or thousands of numbers


def open_text_table(path: Path, separator: str) -> io.BytesIO:
    """Return the content of a text table, unpacked if its name ends in ``.gz``.

    Raises
    ------
    CheckpointError
        It cannot be unpacked, is far larger than its file, or has more columns than any table of genes.
    """
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(_limit(path) + 1)
        except (OSError, EOFError, zlib.error) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{str(path)!r} cannot be read as a table ({reason}).") from None
        check_unpacked(path, len(content))
    table = io.BytesIO(content)
    # Each column costs far more than its bytes, and there are as many as in the first rows.
    widest = max(table.readline().count(separator.encode()) for _ in range(2))
    if widest > _WIDEST:
        raise CheckpointError(
            f"{str(path)!r} has {widest:,} columns beside the first, expected at most {_WIDEST:,}: genes belong in its "
            "rows. Transpose it if they are in its columns."
        )
    table.seek(0)
    return table


def check_unpacked(path: Path, n_bytes: int) -> None:
    """Refuse what is far larger than its file, which no table of genes is.

    Raises
    ------
    CheckpointError
        It is.
    """
    if n_bytes > _limit(path):
        raise CheckpointError(
            f"{str(path)!r} would take more than {_limit(path) >> 20:,} MB when unpacked, far more than a table of "
            "genes in a file of its size: it is damaged or made to do harm."
        )


def _limit(path: Path) -> int:
    return _MOST_DENSE * path.stat().st_size + (1 << 20)
