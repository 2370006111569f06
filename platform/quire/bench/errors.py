"""Why nothing can be measured; the tree is drawn in `quire.bench`."""

from __future__ import annotations


class BenchError(Exception):
    """Nothing was measured."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadSetting(BenchError):
    """What was asked for cannot be."""


class BadFile(BenchError):
    """A file is not what it should be."""
