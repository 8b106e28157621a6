"""Tensors read from a checkpoint, checked when they are taken."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fimp_sc.data.storage._elements import shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint, or a table of gene vectors, that cannot be used; says which file, and what to do."""


class Weights:
    """Tensors of a checkpoint by name, which say what file and what key is at fault.

    Parameters
    ----------
    path
        The file they come from.
    tensors
        Tensors by name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self._tensors = dict(tensors)
        self._stored = {key: key for key in self._tensors}
        self._taken: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises
        ------
        CheckpointError
            There is no such tensor.
        """
        if key not in self._tensors:
            close = get_close_matches(key, self._tensors, n=3, cutoff=0.5) or list(self._tensors)
            raise CheckpointError(
                f"{str(self.path)!r} has no tensor {key!r} among its {len(self):,}; the nearest: "
                f"{shorten([repr(k) for k in close]) or 'none'}. Is it a checkpoint of this kind of model?"
            )
        return tuple(self._tensors[key].shape)

    def take(self, key: str, shape: tuple[int | None, ...]) -> Tensor:
        """Return a tensor, and remember that it was used.

        Parameters
        ----------
        key
            Its name.
        shape
            The shape it must have; ``None`` stands for any length.

        Returns
        -------
        float32 tensor. It may share memory with the file: copy it into a parameter, don't change it.

        Raises
        ------
        CheckpointError
            The tensor is absent, has another shape or no real numbers, or is NaN or infinite somewhere.
        """
        found = self.shape(key)
        where = self._where(key)
        if len(found) != len(shape) or any(n is not None and n != m for n, m in zip(shape, found, strict=True)):
            wanted = f"({', '.join('any' if n is None else str(n) for n in shape)}{',' if len(shape) == 1 else ''})"
            raise CheckpointError(
                f"{where} has the shape {found}, expected {wanted}: the weights and the configuration beside them "
                "belong to different models."
            )
        stored = self._tensors[key]
        if stored.layout != torch.strided or stored.device.type != "cpu" or not stored.is_floating_point():
            raise CheckpointError(
                f"{where} is {stored.dtype} ({stored.layout}, {stored.device.type}), expected plain real numbers: use "
                "weights that are not quantized."
            )
        values = stored.detach().to(torch.float32)
        # Smallest and largest instead of `isfinite`: NaN shows in both, and nothing of the tensor's size is made.
        if values.numel() and not all(math.isfinite(float(v)) for v in torch.aminmax(values)):
            bad = int((~torch.isfinite(values)).sum())
            raise CheckpointError(
                f"{where} is NaN or infinite in {bad:,} of {values.numel():,} entries: the file is damaged, or "
                "training diverged. Download it again, or use another checkpoint."
            )
        self._taken.add(self._stored[key])
        return values

    def unused(self) -> list[str]:
        """Return the names of the tensors that were never taken, here or under other names (:meth:`renamed`)."""
        return [key for key in self._tensors if self._stored[key] not in self._taken]

    def renamed(self, rename: Callable[[str], str | None]) -> Weights:
        """Return the same tensors under other names; errors still tell the names in the file.

        Parameters
        ----------
        rename
            Gives the new name, or ``None`` to leave a tensor out.

        Raises
        ------
        CheckpointError
            Two tensors would have the same name.
        """
        view = Weights(self.path, {})
        view._taken = self._taken
        for key, tensor in self._tensors.items():
            name = rename(key)
            if name is None:
                continue
            if name in view:
                raise CheckpointError(f"{self._where(key)} and {view._where(name)} are the same part of the model.")
            view._tensors[name], view._stored[name] = tensor, self._stored[key]
        return view

    def _where(self, key: str) -> str:
        stored = self._stored[key]
        return f"{stored!r} in {str(self.path)!r}" + (f" (read as {key!r})" if key != stored else "")
