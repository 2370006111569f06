"""Dialects in which a call is a JSON object with `name` and `arguments` (or `parameters`): Hermes, Llama 3,
Mistral.

The members may come in either order; arguments that come before the name are kept until it is known. Arguments
are what the model wrote, to the letter, but for those that it wrote as a JSON string, which are what the string
stands for. Other members of the object are part of the form, and dropped.

An object whose name is not known when it breaks off is content, with the marks before it. Behind the name, what
the model writes up to the end of the block is arguments, whole or not; what stands behind whole arguments and
is not the object's end is content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from quire.text.dialects.forms import Form, any_of, free, literal, sequence
from quire.text.dialects.parts import Tool
from quire.text.dialects.reading import (
    Give,
    Marks,
    Sink,
    Tape,
    Waits,
    accept,
    before,
    decoded,
    nothing,
    pattern,
    peek,
    space,
    string,
    until,
    value,
)
from quire.text.dialects.tools import ToolDialect, arguments, spelled

_NO_GAP: Final = re.compile(r"[^ \t\r\n,]")
_ARGUMENTS: Final = ('"arguments"', '"parameters"')
_BARE_MEMBERS: Final = frozenset(('"name"', '"type"', '"id"', *_ARGUMENTS))
"""What an object may have that no mark announces as a call."""


def call_object(
    tape: Tape, sink: Sink, stops: Marks, *, declared: Mapping[str, Tool] | None = None
) -> Waits[bool]:
    """Read a call, as far as it goes before a stop; whether it is one. What it is not, the tape keeps.

    With `declared` it is one only if the name is among these, and if there are no other members before it.
    """
    if (yield from peek(tape)) != "{":
        return False
    tape.read(tape.at + 1)
    begun = given = False
    early: list[str] | None = None
    while True:
        yield from pattern(tape, _NO_GAP)
        char = yield from peek(tape)
        if char == "}":
            tape.read(tape.at + 1)
            break
        if char != '"':
            return (yield from _broken(tape, sink, stops, begun, given))
        key = yield from string(tape)
        yield from space(tape)
        if not (yield from accept(tape, ":")):
            return (yield from _broken(tape, sink, stops, begun, given))
        yield from space(tape)
        if key == '"name"' and not begun:
            name = decoded((yield from string(tape))) if (yield from peek(tape)) == '"' else None
            if not name or (declared is not None and name not in declared):
                return False
            tape.kept()
            sink.begin(name)
            begun = True
            if early is not None:
                sink.arguments(unwrapped("".join(early)))
        elif key in _ARGUMENTS and not given:
            given = True
            if begun:
                yield from written_arguments(tape, stops, sink.arguments)
            else:
                early = []
                if not (yield from value(tape, stops, early.append)):
                    return False
        elif declared is not None and not begun and key not in _BARE_MEMBERS:
            return False
        else:
            yield from value(tape, stops, nothing)
    if begun:
        sink.call_ends()
    return begun


def _broken(tape: Tape, sink: Sink, stops: Marks, begun: bool, given: bool) -> Waits[bool]:
    """The object does not go on as one."""
    if begun and not given and (yield from before(tape, stops, sink.arguments)):
        sink.call_ends()
    return begun


def written_arguments(tape: Tape, stops: Marks, give: Give) -> Waits[bool]:
    """Read the value of arguments; whether it is whole."""
    if (yield from peek(tape)) != '"':
        return (yield from value(tape, stops, give))
    literal = yield from string(tape)
    give(unwrapped(literal))
    return decoded(literal) is not None


def unwrapped(written: str) -> str:
    """Arguments without the JSON string around them, if there is one."""
    inner = decoded(written) if written.startswith('"') else None
    return written if inner is None else inner


class Hermes(ToolDialect):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, each call with marks of its own."""

    name = "hermes"
    opening, closing = "<tool_call>", "</tool_call>"
    marks = (opening, closing)
    separator = "\n"

    def script(self, tape: Tape, sink: Sink, tools: Mapping[str, Tool]) -> Waits[None]:
        opening, stops = Marks(self.opening), Marks(*self.marks)
        mark = yield from until(tape, opening, sink.content)
        while mark:
            mark = yield from self._block(tape, sink, stops)
            if mark != self.opening:
                mark = yield from until(tape, opening, sink.content)

    def _block(self, tape: Tape, sink: Sink, stops: Marks) -> Waits[str]:
        """Read what follows an opening mark; the mark that it ends by. Several objects are several calls."""
        tape.keep(self.opening)
        while True:
            yield from space(tape)
            if not (yield from call_object(tape, sink, stops)):
                sink.content(tape.kept())
                return ""
            yield from space(tape)
            if (yield from peek(tape)) != "{":
                return (yield from until(tape, stops, sink.content))
            tape.keep()

    def call(self, tool: Tool, arguments: Form) -> Form:
        return sequence(literal(self.opening), self._inside(tool, arguments))

    def _inside(self, tool: Tool, arguments: Form) -> Form:
        head = f'\n{{"name": {spelled(tool.name)}, "arguments": '
        return sequence(literal(head), arguments, literal("}\n" + self.closing))

    def guided(self, tools: Sequence[Tool]) -> Form:
        return free(
            [(self.opening, any_of([self._inside(tool, arguments(tool, forced=False)) for tool in tools]))]
        )
