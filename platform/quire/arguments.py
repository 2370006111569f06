"""Checks of what a caller of `quire.LLM` gives, by the name that it has for the caller.

A value of another type is a TypeError, one out of bounds a ValueError; both begin with the name.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Final

MAX_INT: Final = 2**31 - 1
"""As in the HTTP API."""


def flag(name: str, value: object, hint: str = "") -> None:
    """True or False, and not what counts as one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}" + _hinted(hint))


def one_of(name: str, value: object, words: Sequence[str], hint: str = "") -> None:
    """One of some words."""
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, not {value!r}" + _hinted(hint))


def token_ids(name: str, value: object) -> None:
    """None or several ids."""
    for index in several(name, value, "a list of token ids"):
        whole(name, index, 0)


def texts(name: str, value: object, what: str = "a list of strings") -> None:
    """None or several strings; `what` says so."""
    for text in several(name, value, what):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be {what}, not {text!r}")


def several(name: str, value: object, what: str) -> Collection[object]:
    """`value`, which must be one that can be looked at more than once; None is none."""
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise TypeError(f"{name} must be {what}, not {value!r}")
    return value


def whole(name: str, value: object, least: int, most: int | None = None, hint: str = "") -> None:
    """A whole number; without `most` it is at most `MAX_INT`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if most is None and value > MAX_INT:
        raise ValueError(f"{name} must be at most {MAX_INT}, not {_short(value)}")
    _within(name, value, least, most, False, hint)


def number(
    name: str, value: object, least: float, most: float | None, *, above: bool = False, hint: str = ""
) -> None:
    """A finite number; with `above` it is more than `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number, not {_short(value)}")
    _within(name, value, least, most, above, hint)


def _within(name: str, value: float, least: float, most: float | None, above: bool, hint: str) -> None:
    low = value <= least if above else value < least
    if low or (most is not None and value > most):
        bounds = f"{'above' if above else 'at least'} {least}" + ("" if most is None else f" and at most {most}")
        raise ValueError(f"{name} must be {bounds}, not {_short(value)}" + _hinted(hint))


def _hinted(hint: str) -> str:
    return f"\nhint: {hint}" if hint else ""


def _short(value: float) -> str:
    return str(value) if abs(value) < 10**20 or not isinstance(value, int) else "so large a number"
