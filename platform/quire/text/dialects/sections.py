"""Dialects that mark every part of a call: DeepSeek V3 and V3.1, Kimi K2.

Calls stand in a section. Each has a mark before it, a head, a mark, its arguments, and a mark behind. The head has
the name, and its end makes the name certain. What is no such call is content, with the marks before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from quire.text.dialects.forms import Form, any_of, free, literal, regex, repeat, sequence
from quire.text.dialects.json_calls import written_arguments
from quire.text.dialects.parts import Tool
from quire.text.dialects.reading import Marks, Sink, Tape, Waits, accept, before, pattern, peek, space, until
from quire.text.dialects.tools import ToolDialect, arguments

_NO_NAME: Final = re.compile(r"[\n`{<]")
_NAMES: Final = re.compile(r"[^\s`{<]+(?: +[^\s`{<]+)*")
_FENCE: Final = "```"
_NUMBERED: Final = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?\Z", re.DOTALL)


class Sections(ToolDialect):
    """Calls between marks, whose head is the name."""

    names = _NAMES

    def __init__(
        self, name: str, *, section: str, call: str, arguments: str, call_end: str, section_end: str
    ) -> None:
        self.name = name
        self._section, self._call, self._arguments = section, call, arguments
        self._call_end, self._section_end = call_end, section_end
        self.marks = (section, call, arguments, call_end, section_end)
        self._any = Marks(*self.marks)

    def script(self, tape: Tape, sink: Sink, tools: Mapping[str, Tool]) -> Waits[None]:
        opening = Marks(self._section, self._call)
        stops = Marks(self._section, self._call, self._call_end, self._section_end)
        mark = yield from until(tape, opening, sink.content)
        while mark:
            tape.keep(mark)
            if mark == self._section:
                yield from space(tape)
                mark = yield from accept(tape, self._call)
            if mark and (yield from self._one(tape, sink, stops)):
                tape.keep()
                yield from space(tape)
                mark = yield from accept(tape, self._call, self._section_end)
                if mark:
                    tape.kept()
            else:
                mark = ""
            sink.content(tape.kept())
            if mark != self._call:
                mark = yield from until(tape, opening, sink.content)

    def _one(self, tape: Tape, sink: Sink, stops: Marks) -> Waits[bool]:
        """Read a call behind its first mark; whether it is one."""
        head: list[str] = []
        if not (yield from before(tape, self._any, head.append)):
            return False
        if not (yield from accept(tape, self._arguments)):
            return False
        name = yield from self._name(tape, "".join(head).strip())
        if not name:
            return False
        tape.kept()
        sink.begin(name)
        yield from self._fence(tape)
        if (yield from peek(tape)) in ("{", '"'):
            yield from written_arguments(tape, stops, sink.arguments)
            yield from self._fence(tape)
        elif (yield from before(tape, stops, sink.arguments)):
            sink.call_ends()
        if not (yield from accept(tape, self._call_end)) and (yield from before(tape, stops, sink.content)):
            yield from accept(tape, self._call_end)
        return True

    def _name(self, tape: Tape, head: str) -> Waits[str]:
        """The name of a call with this head; what more of it follows is read."""
        yield from ()
        return head

    def _fence(self, tape: Tape) -> Waits[None]:
        """Read what stands on either side of the arguments."""
        yield from space(tape)

    def call(self, tool: Tool, arguments: Form) -> Form:
        return sequence(literal(self._call), self._inside(tool, arguments))

    def _inside(self, tool: Tool, arguments: Form) -> Form:
        return sequence(literal(tool.name + self._arguments), arguments, literal(self._call_end))

    def several(self, calls: Sequence[Form], parallel: bool) -> Form:
        between = literal(self.separator) if self.separator else None
        many = repeat(any_of(calls), least=1, most=None if parallel else 1, between=between)
        return sequence(literal(self._section), many, literal(self._section_end))

    def _guided(self, tools: Sequence[Tool]) -> Form:
        inside = [self._inside(tool, arguments(tool, forced=False)) for tool in tools]
        return free([(self._call, any_of(inside))])


class Fenced(Sections):
    """The head is `function`; the name and a fenced block follow."""

    separator = "\n"

    def _name(self, tape: Tape, head: str) -> Waits[str]:
        return (yield from pattern(tape, _NO_NAME)).strip() if head == "function" else ""

    def _fence(self, tape: Tape) -> Waits[None]:
        yield from space(tape)
        if (yield from accept(tape, _FENCE)):
            yield from accept(tape, "json")
            yield from space(tape)

    def _inside(self, tool: Tool, arguments: Form) -> Form:
        head = f"function{self._arguments}{tool.name}\n{_FENCE}json\n"
        return sequence(literal(head), arguments, literal(f"\n{_FENCE}{self._call_end}"))


class Numbered(Sections):
    """The head is `functions.NAME:NUMBER`."""

    def _name(self, tape: Tape, head: str) -> Waits[str]:
        yield from ()
        found = _NUMBERED.match(head)
        return found[1] if found is not None else ""

    def _inside(self, tool: Tool, arguments: Form) -> Form:
        return sequence(
            literal(f"functions.{tool.name}:"),
            regex("[0-9]{1,3}"),
            literal(self._arguments),
            arguments,
            literal(self._call_end),
        )
