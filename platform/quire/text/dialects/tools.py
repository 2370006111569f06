"""What all dialects of tool calls have in common, and the two forms that an engine holds a model to.

`calls` is the form of an answer that is a call and nothing else, for a request that forces one: arguments fit
the tool's schema, to the letter where the tool is strict, and otherwise as far as an engine can follow the
schema. `guided` is for a request that leaves the model free and has a strict tool: any text, but what begins a
call has to go on as one of a declared tool, whose arguments fit if it is strict.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring

from quire.text.dialects.forms import Form, any_of, fits, literal, repeat
from quire.text.dialects.parts import Reader, Tool
from quire.text.dialects.reading import ScriptReader, Sink, Tape, Waits
from quire.text.dialects.schema_types import members
from quire.text.errors import ParamRefused


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
    names: re.Pattern[str] | None = None
    """Functions that it can spell; any, if it writes names as JSON."""
    keys: re.Pattern[str] | None = None
    """Arguments that it can spell; any, if it writes them as a JSON object."""

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
        """At least one call of one of `tools`; any number of them with `parallel`, where the dialect has that.
        Raises `ParamRefused` where the dialect cannot write a call so that it could be read.
        """
        self._check(tools, forced=True)
        return self.several([self.call(tool, arguments(tool, forced=True)) for tool in tools], parallel)

    def several(self, calls: Sequence[Form], parallel: bool) -> Form:
        return repeat(
            any_of(calls),
            least=1,
            most=None if parallel and self.many else 1,
            between=literal(self.separator) if self.separator else None,
        )

    def guided(self, tools: Sequence[Tool]) -> Form:
        """Any text in which what begins a call goes on as a call of one of `tools`. Raises `ParamRefused`."""
        self._check(tools, forced=False)
        return self._guided(tools)

    @abstractmethod
    def _guided(self, tools: Sequence[Tool]) -> Form: ...

    def _check(self, tools: Sequence[Tool], *, forced: bool) -> None:
        for tool in tools:
            if self.names is not None and not self.names.fullmatch(tool.name):
                raise self.refused(f"cannot spell the function '{tool.name}'")
            if self.keys is None or not (forced or tool.strict):
                continue
            found = members(tool.parameters)
            for key in found.named:
                if not self.keys.fullmatch(key):
                    raise self.refused(f"cannot spell the argument '{key}' of the function '{tool.name}'")
            if found.beyond is not None and (tool.strict or (found.demanding and not found.named)):
                raise self.refused(
                    f"writes arguments one by one, which cannot follow '{found.beyond}' at the top of the "
                    f"parameters of '{tool.name}'"
                )

    def refused(self, why: str) -> ParamRefused:
        """The error of a tool that this dialect cannot call."""
        return ParamRefused(
            f"'tools' is not honoured for this model: the way it writes calls ({self.name}) {why}.", param="tools"
        )


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
