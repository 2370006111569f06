"""What all dialects of tool calls have in common, and the two forms that an engine holds a model to.

`calls` is the form of an answer that is a call and nothing else, for a request that forces one: arguments fit
the tool's schema, to the letter where the tool is strict, and otherwise as far as an engine can follow the
schema. `guided` is for a request that leaves the model free and has a strict tool: any text, but what begins a
call has to go on as one of a declared tool, whose arguments fit if it is strict.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring

from quire.text.dialects.forms import Form, any_of, fits, literal, repeat
from quire.text.dialects.parts import Reader, Tool
from quire.text.dialects.reading import ScriptReader, Sink, Tape, Waits


class ToolDialect(ABC):
    """How a family of models writes calls of tools."""

    name: str
    """As `spec.parsers.tools` spells it."""
    marks: tuple[str, ...] = ()
    """Tokens that the reader must see, special or not."""
    separator: str = ""
    """Between two calls of one answer."""
    many: bool = True
    """An answer may have several calls."""

    def reader(self, tools: Sequence[Tool]) -> Reader:
        """Reads one answer to a request that declared `tools`."""
        declared = {tool.name: tool for tool in tools}
        return ScriptReader(lambda tape, sink: self.script(tape, sink, declared))

    @abstractmethod
    def script(self, tape: Tape, sink: Sink, tools: Mapping[str, Tool]) -> Waits[None]:
        """Reads a whole text."""

    @abstractmethod
    def call(self, tool: Tool, arguments: Form) -> Form:
        """A call of a tool, marks included. `arguments` is the form of its arguments as a JSON object."""

    def calls(self, tools: Sequence[Tool], *, parallel: bool) -> Form:
        """At least one call of one of `tools`; any number of them with `parallel`, where the dialect has that."""
        return self.several([self.call(tool, arguments(tool, forced=True)) for tool in tools], parallel)

    def several(self, calls: Sequence[Form], parallel: bool) -> Form:
        return repeat(
            any_of(calls),
            least=1,
            most=None if parallel and self.many else 1,
            between=literal(self.separator) if self.separator else None,
        )

    @abstractmethod
    def guided(self, tools: Sequence[Tool]) -> Form:
        """Any text in which what begins a call goes on as a call of one of `tools`."""


def arguments(tool: Tool, *, forced: bool) -> Form:
    """The form of a tool's arguments as JSON."""
    if not tool.parameters:
        return literal("{}") if tool.strict or forced else fits({"type": "object"})
    if tool.strict or forced:
        return fits({"type": "object", **tool.parameters}, lenient=not tool.strict)
    return fits({"type": "object"})


def spelled(text: str) -> str:
    """A text as a JSON string."""
    return encode_basestring(text)
