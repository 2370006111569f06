"""What a model's text is made of once its markup is read: content, reasoning, calls.

A reader takes one answer, in pieces of any size, and gives parts in the order in which they stand in the text.
How the text was cut makes no difference to what the parts are when they are joined (`joined`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a request declares. `parameters` is the JSON Schema of its arguments, an object."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Content:
    """Text for whoever asked."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of a thought."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A function is called. Calls of one answer are counted from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of the call that began last: JSON, as far as the model wrote any."""

    index: int
    text: str


Part = Content | Reasoning | CallBegins | CallArguments


class Reader(Protocol):
    """Reads one answer. Nothing may be pushed after `finish`."""

    def push(self, text: str) -> list[Part]:
        """The parts that are certain with `text`."""
        ...

    def finish(self) -> list[Part]:
        """What was held back, when the text has ended."""
        ...


class Plain:
    """Reads a text that is content and nothing else."""

    __slots__ = ()

    def push(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        return []


def joined(parts: Iterable[Part]) -> list[Part]:
    """The parts with neighbours of one kind made one: the same for every way to cut a text."""
    parts = list(parts)
    if len(parts) < 2:
        return parts
    runs: list[tuple[Part, list[str]]] = []
    for part in parts:
        if isinstance(part, CallBegins):
            runs.append((part, []))
            continue
        if not runs or type(runs[-1][0]) is not type(part):
            runs.append((part, []))
        runs[-1][1].append(part.text)
    whole: list[Part] = []
    for first, texts in runs:
        match first:
            case CallBegins():
                whole.append(first)
            case CallArguments(index=index):
                whole.append(CallArguments(index, "".join(texts)))
            case _:
                whole.append(type(first)("".join(texts)))
    return whole
