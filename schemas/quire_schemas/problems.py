"""What is wrong with a manifest, and where.

Exceptions:

    ManifestInvalid     at least one problem; `.problems` has them all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quire_schemas.keys import masked


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `line` and `column` count from 1; `path` is dotted, empty for the whole file.

    Path, message and hint are short and printable whatever the file holds: they quote it, and a terminal obeys
    the control characters that it is sent. They have no API key of ours, wherever in the file somebody put one.
    """

    file: str
    line: int
    col: int
    path: str
    message: str
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("path", "message", "hint"):
            object.__setattr__(self, name, _printable(getattr(self, name)))

    def __str__(self) -> str:
        path = f"{self.path}: " if self.path else ""
        text = f"{self.file}:{self.line}:{self.col}: error: {path}{self.message}"
        return f"{text}\n    hint: {self.hint}" if self.hint else text

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `Problem(**d)` is the way back."""
        return asdict(self)


MAX_WORDS = 600


def _printable(text: str) -> str:
    text = masked(text)
    if len(text) > MAX_WORDS:
        text = f"{text[: MAX_WORDS - 3]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ManifestInvalid(Exception):
    """At least one problem was found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = list(problems)
