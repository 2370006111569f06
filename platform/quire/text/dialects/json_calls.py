"""Dialects in which a call is a JSON object with `name` and `arguments` (or `parameters`): Hermes, Llama 3,
Mistral.

The members may come in either order; arguments that come before the name are kept until it is known. Arguments
are what the model wrote, to the letter, but for those that it wrote as a JSON string, which are what the string
stands for. Other members of the object are part of the form, and dropped.

An object whose name is not known when it breaks off is content, with the marks before it. Behind the name, what
the model writes up to the end of the block is arguments, whole or not; what stands behind whole arguments and
is not the object's end is content. Where the text ends between name and arguments there are none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from quire.text.dialects.forms import Form, any_of, free, literal, regex, repeat, sequence
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
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9_.:/-]")
_NAMES: Final = re.compile(r"[A-Za-z0-9_.:/-]+")
_NAME: Final = '"name"'
_ARGUMENTS: Final = ('"arguments"', '"parameters"')
_BARE_MEMBERS: Final = frozenset((_NAME, '"type"', '"id"', *_ARGUMENTS))
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
        if begun:
            tape.keep()
        char = yield from peek(tape)
        if char == "}":
            tape.read(tape.at + 1)
            break
        key = (yield from string(tape)) if char == '"' else ""
        yield from space(tape)
        if not key or not (yield from accept(tape, ":")):
            return (yield from _broken(tape, sink, stops, begun, given))
        yield from space(tape)
        if key == _NAME and not begun:
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
                tape.kept()
                yield from written_arguments(tape, stops, sink.arguments)
            else:
                early = []
                if not (yield from value(tape, stops, early.append)):
                    return False
        elif key == _NAME or key in _ARGUMENTS:
            return (yield from _broken(tape, sink, stops, begun, given))
        elif declared is not None and not begun and key not in _BARE_MEMBERS:
            return False
        else:
            yield from value(tape, stops, nothing)
    if begun:
        tape.kept()
        sink.call_ends()
    return begun


def _broken(tape: Tape, sink: Sink, stops: Marks, begun: bool, given: bool) -> Waits[bool]:
    """The object does not go on as one."""
    if not begun:
        return False
    if given:
        sink.content(tape.kept())
        return True
    if tape.ended:  # cut off before the arguments: what was begun of the form is dropped
        tape.kept()
        return True
    sink.arguments(tape.kept())
    if (yield from before(tape, stops, sink.arguments)):
        sink.call_ends()
    return True


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


class Llama3(ToolDialect):
    """`{"name": …, "parameters": {…}}`, several separated by `;`, a comma or a line end, from the answer's
    beginning or behind `<|python_tag|>`. At the beginning nothing announces a call, so it must be one of a
    declared tool.
    """

    name = "llama3_json"
    opening = "<|python_tag|>"
    marks = (opening,)
    separator = "; "

    def script(self, tape: Tape, sink: Sink, tools: Mapping[str, Tool]) -> Waits[None]:
        opening = Marks(self.opening)
        tape.keep()
        yield from self._calls(tape, sink, opening, tools)
        while (yield from until(tape, opening, sink.content)):
            tape.keep(self.opening)
            yield from self._calls(tape, sink, opening, None)

    def _calls(self, tape: Tape, sink: Sink, stops: Marks, declared: Mapping[str, Tool] | None) -> Waits[None]:
        """Read calls as long as they come; what is none was kept, and is content."""
        yield from space(tape)
        while (yield from call_object(tape, sink, stops, declared=declared)):
            tape.keep()
            yield from space(tape)
            yield from accept(tape, ";", ",")
            yield from space(tape)
        sink.content(tape.kept())

    def call(self, tool: Tool, arguments: Form) -> Form:
        return sequence(literal("{"), self._inside(tool, arguments))

    def _inside(self, tool: Tool, arguments: Form) -> Form:
        return sequence(literal(f'"name": {spelled(tool.name)}, "parameters": '), arguments, literal("}"))

    def _guided(self, tools: Sequence[Tool]) -> Form:
        inside = any_of([self._inside(tool, arguments(tool, forced=False)) for tool in tools])
        calls = repeat(inside, least=1, between=literal(self.separator + "{"))
        return free([(self.opening, sequence(literal("{"), calls))], [("{", calls)])


class Mistral(ToolDialect):
    """`[TOOL_CALLS]` and then a list of objects, or a name and the arguments, which `[ARGS]` may separate.

    The list is the older way. Of the newer one each call has a mark, and there may be an id (`[CALL_ID]`), which
    is part of the form. Both are read; `listed` says which one is written.
    """

    opening, id_mark, arguments_mark = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
    marks = (opening, id_mark, arguments_mark)

    def __init__(self, name: str, *, listed: bool) -> None:
        self.name = name
        self.names = None if listed else _NAMES
        self._listed = listed

    def script(self, tape: Tape, sink: Sink, tools: Mapping[str, Tool]) -> Waits[None]:
        opening = Marks(self.opening)
        while (yield from until(tape, opening, sink.content)):
            tape.keep(self.opening)
            yield from space(tape)
            char = yield from peek(tape)
            if char == "[" and not (yield from self._starts_anew(tape)):
                tape.read(tape.at + 1)
                yield from self._list(tape, sink, opening)
            elif char == "{":
                yield from self._list(tape, sink, opening)
            else:
                yield from self._named(tape, sink, opening)
            sink.content(tape.kept())

    def _starts_anew(self, tape: Tape) -> Waits[bool]:
        """Whether the text goes on with another mark, which stays."""
        while True:
            come = tape.text[tape.at : tape.at + len(self.opening)]
            if come == self.opening or tape.ended or not self.opening.startswith(come):
                return come == self.opening
            yield

    def _list(self, tape: Tape, sink: Sink, stops: Marks) -> Waits[None]:
        yield from space(tape)
        while (yield from call_object(tape, sink, stops)):
            yield from pattern(tape, _NO_GAP)
            if (yield from accept(tape, "]")):
                return
            if (yield from peek(tape)) != "{":
                return
            tape.keep()

    def _named(self, tape: Tape, sink: Sink, stops: Marks) -> Waits[None]:
        name = yield from pattern(tape, _NO_NAME)
        yield from space(tape)
        mark = ""
        if (yield from peek(tape)) != "{":
            mark = yield from accept(tape, self.arguments_mark, self.id_mark)
            if not mark:
                return
        if not name:
            return
        tape.kept()
        sink.begin(name)
        if mark == self.id_mark and not (yield from until(tape, Marks(self.arguments_mark), nothing)):
            return
        yield from space(tape)
        if (yield from peek(tape)) in ("{", '"'):
            yield from written_arguments(tape, stops, sink.arguments)
        elif (yield from before(tape, stops, sink.arguments)):
            sink.call_ends()

    def call(self, tool: Tool, arguments: Form) -> Form:
        if self._listed:
            return sequence(literal(f'{{"name": {spelled(tool.name)}, "arguments": '), arguments, literal("}"))
        return sequence(literal(f"{self.opening}{tool.name}{self.arguments_mark}"), arguments)

    def several(self, calls: Sequence[Form], parallel: bool) -> Form:
        if not self._listed:
            return super().several(calls, parallel)
        return sequence(literal(self.opening), self._inside(calls, parallel))

    def _inside(self, calls: Sequence[Form], parallel: bool) -> Form:
        items = repeat(any_of(calls), least=1, most=None if parallel else 1, between=literal(", "))
        return sequence(regex(r" ?\["), items, literal("]"))

    def _guided(self, tools: Sequence[Tool]) -> Form:
        if self._listed:
            calls = [self.call(tool, arguments(tool, forced=False)) for tool in tools]
            return free([(self.opening, self._inside(calls, parallel=True))])
        rest = [
            sequence(literal(tool.name + self.arguments_mark), arguments(tool, forced=False)) for tool in tools
        ]
        return free([(self.opening, any_of(rest))])


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
        yield from space(tape)
        if not (yield from call_object(tape, sink, stops)):
            sink.content(tape.kept())
            return ""
        yield from space(tape)
        tape.keep()
        while (yield from call_object(tape, sink, stops)):
            yield from space(tape)
            tape.keep()
        sink.content(tape.kept())
        return (yield from until(tape, stops, sink.content))

    def call(self, tool: Tool, arguments: Form) -> Form:
        return sequence(literal(self.opening), self._inside(tool, arguments))

    def _inside(self, tool: Tool, arguments: Form) -> Form:
        head = f'\n{{"name": {spelled(tool.name)}, "arguments": '
        return sequence(literal(head), arguments, literal("}\n" + self.closing))

    def _guided(self, tools: Sequence[Tool]) -> Form:
        return free(
            [(self.opening, any_of([self._inside(tool, arguments(tool, forced=False)) for tool in tools]))]
        )
