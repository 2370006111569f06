"""An answer read to its end: what all of its parts together say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from quire.text.dialects.parts import CallArguments, CallBegins, Content, Part, Reasoning, joined


@dataclass(slots=True)
class Call:
    """A function that was called, with its arguments as the model wrote them."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Said:
    """Content and reasoning as one text each, and the calls in their order."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Said:
        said = cls()
        for part in joined(parts):
            match part:
                case Content(text=text):
                    said.content += text
                case Reasoning(text=text):
                    said.reasoning += text
                case CallBegins(name=name):
                    said.calls.append(Call(name))
                case CallArguments(index=index, text=text):
                    said.calls[index].arguments += text
        return said
