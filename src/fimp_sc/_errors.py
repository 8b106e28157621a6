"""Exceptions shared by the whole package."""

from __future__ import annotations


class MissingKeyError(KeyError):
    """A key that a function needs is absent from the data object.

    A subclass of :class:`KeyError`, so ``except KeyError`` catches it; unlike :class:`KeyError`, which prints the
    ``repr`` of its argument, it prints the message as plain text.
    """

    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()
