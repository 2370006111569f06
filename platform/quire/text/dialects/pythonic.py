"""The dialect that writes calls as Python does: `[get_weather(city="Oslo", days=2), get_time()]`.

Llama 3.2 and 4 write such a list, and nothing else, where they call; marks may stand around it. Without marks it
is a list of calls only if it begins with a declared tool and an argument by name, or none. Nothing is evaluated:
an argument's value is read up to the comma or bracket behind it, and is given, as JSON, once it is whole. What is
no literal of Python or of JSON becomes a string of what was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from quire.text.dialects.forms import (
    Form,
    any_of,
    fits,
    free,
    literal,
    maybe,
    regex,
    repeat,
    sequence,
    some,
    within,
)
from quire.text.dialects.literals import python_or_json
from quire.text.dialects.parts import Tool
from quire.text.dialects.reading import Marks, Sink, Tape, Waits, accept, pattern, space, until
from quire.text.dialects.schema_types import as_schema, members
from quire.text.dialects.tools import ToolDialect, spelled

_NO_NAME: Final = re.compile(r"[\s\x00-,/:-@\[-^`{-\x7f]")
"""Where a name ends: all letters are of one, whatever their script, and so are `_`, `.` and `-`."""
_NAMES: Final = re.compile(r"[^\s\x00-,/:-@\[-^`{-\x7f]+")
_ANY_NAME: Final = r"[\p{L}_][\p{L}\p{M}\p{N}_]*"
_SIGN: Final = re.compile(r"""["'()\[\]{},]""")
_QUOTED: Final = {quote: re.compile(rf"{quote}|\\(?s:.)|\\\Z") for quote in "\"'"}


class Pythonic(ToolDialect):
    """A list of calls, from the answer's beginning or between `<|python_start|>` and `<|python_end|>`."""

    name = "pythonic"
    opening, closing = "<|python_start|>", "<|python_end|>"
    marks = (opening, closing)
    names = keys = _NAMES

    def script(self, tape: Tape, sink: Sink, tools: Mapping[str, Tool]) -> Waits[None]:
        opening = Marks(self.opening)
        tape.keep()
        yield from self._calls(tape, sink, tools)
        sink.content(tape.kept())
        while (yield from until(tape, opening, sink.content)):
            tape.keep(self.opening)
            if (yield from self._calls(tape, sink, None)):
                sink.content(tape.kept())
                tape.keep()
                yield from space(tape)
                if (yield from accept(tape, self.closing)):
                    tape.kept()
            sink.content(tape.kept())

    def _calls(self, tape: Tape, sink: Sink, declared: Mapping[str, Tool] | None) -> Waits[bool]:
        """Read a list of calls; whether there was one. What is none was kept."""
        yield from space(tape)
        if not (yield from accept(tape, "[")):
            return False
        begun = False
        while True:
            yield from space(tape)
            name = yield from pattern(tape, _NO_NAME)
            if not name or (declared is not None and name not in declared):
                return begun
            if not (yield from accept(tape, "(")):
                return begun
            if not (yield from self._call(tape, sink, name)):
                return begun
            begun = True
            tape.keep()
            yield from space(tape)
            if (yield from accept(tape, "]")):
                tape.kept()
                return True
            if not (yield from accept(tape, ",")):
                return True

    def _call(self, tape: Tape, sink: Sink, name: str) -> Waits[bool]:
        """Read the arguments of a call; whether it is one. Behind the first of them it is, come what may."""
        comma = "{"
        while True:
            yield from space(tape)
            key = yield from pattern(tape, _NO_NAME)
            yield from space(tape)
            closed = not key and bool((yield from accept(tape, ")")))
            by_name = bool(key) and bool((yield from accept(tape, "=")))
            if comma == "{":
                if not (closed or by_name):
                    return False
                tape.kept()
                sink.begin(name)
            if closed:
                sink.arguments("{}" if comma == "{" else "}")
                return True
            pieces: list[str] = []
            end = yield from self._value(tape, pieces)
            written = "".join(pieces)
            if not by_name:  # an argument by its place: no JSON says that, but it is not lost
                sink.arguments(comma + key + written)
            elif end:
                sink.arguments(f"{comma}{spelled(key)}: {_as_json(written)}")
            else:
                sink.arguments(f"{comma}{spelled(key)}: {written}")
            if not end:
                return True
            comma = ", "
            if end == ")":
                sink.arguments("}")
                return True

    def _value(self, tape: Tape, pieces: list[str]) -> Waits[str]:
        """Read a value and the sign that ends it, a comma or a bracket: which; nothing where the text ends."""
        depth, quote = 0, ""
        while True:
            found = (_QUOTED[quote] if quote else _SIGN).search(tape.text, tape.at)
            if found is None or (found[0] == "\\" and not tape.ended):
                pieces.append(tape.read(len(tape.text) if found is None else found.start()))
                if tape.ended:
                    return ""
                yield
                continue
            sign = found[0]
            if not quote and depth == 0 and sign in (",", ")"):
                pieces.append(tape.read(found.start()))
                tape.read(found.end())
                return sign
            pieces.append(tape.read(found.end()))
            if quote:
                quote = "" if sign == quote else quote
            elif sign in _QUOTED:
                quote = sign
            elif sign != ",":
                depth += 1 if sign in "([{" else -1

    def call(self, tool: Tool, arguments: Form) -> Form:
        return self._written(tool, forced=True)

    def _written(self, tool: Tool, *, forced: bool) -> Form:
        if tool.strict or forced:
            return sequence(literal(f"{tool.name}("), within(tool.parameters, _by_name(tool)), literal(")"))
        return sequence(literal(f"{tool.name}("), _anything({}, lenient=True), literal(")"))

    def several(self, calls: Sequence[Form], parallel: bool) -> Form:
        return sequence(literal("["), self._list(calls, parallel))

    def _list(self, calls: Sequence[Form], parallel: bool) -> Form:
        many = repeat(any_of(calls), least=1, most=None if parallel else 1, between=literal(", "))
        return sequence(many, literal("]"))

    def _guided(self, tools: Sequence[Tool]) -> Form:
        calls = self._list([self._written(tool, forced=False) for tool in tools], parallel=True)
        return free([(self.opening, sequence(literal("["), calls, literal(self.closing)))], [("[", calls)])


def _as_json(written: str) -> str:
    found = python_or_json(written.strip())
    return json.dumps(written.strip(), ensure_ascii=False) if found is None else found


def _by_name(tool: Tool) -> Form:
    """The arguments of a tool in the order of its schema: those that are required, then any of the others."""
    found = members(tool.parameters)
    if not found.named:
        return _anything(found.others, not tool.strict) if found.others is not None else sequence()

    def one(key: str) -> Form:
        if found.types(key) == {"boolean"}:
            given = any_of([literal("True"), literal("False")])
        else:
            given = fits(as_schema(found.named[key]), lenient=not tool.strict)
        return sequence(literal(f"{key}="), given)

    required = [one(key) for key in found.named if key in found.required]
    others = [one(key) for key in found.named if key not in found.required]
    comma = literal(", ")
    if not required:
        return some(others, between=comma)
    first = [part for form in required for part in (comma, form)][1:]
    return sequence(*first, *[maybe(sequence(comma, form)) for form in others])


def _anything(schema: Any, lenient: bool) -> Form:
    """Arguments of any names whose values fit a schema."""
    value = fits(as_schema(schema), lenient=lenient)
    return repeat(sequence(regex(f"{_ANY_NAME}="), value), between=literal(", "))
