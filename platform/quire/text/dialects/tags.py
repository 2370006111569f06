"""The dialects of Qwen3-Coder and Seed-OSS: calls as tags, values as they are.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

Arguments become JSON as they come. The declared schema decides what a value is: a string is what stands between
the line ends, to the letter, and is given on while it is written; of another type it is given once it is whole;
what is not declared, or is not of its type, stays a string. Nothing is escaped in a value, so `</parameter>` ends
it, whatever it holds else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

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
    through,
    within,
)
from quire.text.dialects.json_calls import written_arguments
from quire.text.dialects.parts import Tool
from quire.text.dialects.reading import Give, Marks, Sink, Tape, Waits, accept, before, pattern, peek, space, until
from quire.text.dialects.schema_types import Members, as_json, as_schema, members
from quire.text.dialects.tools import ToolDialect, spelled

_NO_NAME: Final = re.compile(r"[<>\s]")
_NO_KEY: Final = re.compile(r"[<>\r\n]")
_ANY_KEY: Final = r"[\p{L}_][\p{L}\p{M}\p{N}_]*"
_UNKNOWN: Final[frozenset[str]] = frozenset()
_VALUE_ENDS: Final = Marks("</parameter>")


class Tags(ToolDialect):
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>`, with an outer tag of
    the family's own. `gap` is what it writes on either side of a value.
    """

    separator = "\n"
    names = re.compile(r"[^<>\s]+")
    keys = re.compile(r"[^<>\r\n]*")

    def __init__(self, name: str, *, opening: str, closing: str, gap: str) -> None:
        self.name = name
        self.opening, self.closing = opening, closing
        self.marks = (opening, closing)
        self._gap = gap

    _function, _parameter, _function_end = "<function=", "<parameter=", "</function>"

    def script(self, tape: Tape, sink: Sink, tools: Mapping[str, Tool]) -> Waits[None]:
        opening = Marks(self.opening, self._function)  # models leave the outer tag out now and then
        stops = Marks(self._parameter, self._function_end, self.closing, self.opening, self._function)
        known: dict[str, Members] = {}
        while mark := (yield from until(tape, opening, sink.content)):
            tape.keep(mark)
            if mark == self.opening:
                yield from space(tape)
                mark = yield from accept(tape, self._function)
            name = (yield from pattern(tape, _NO_NAME)) if mark else ""
            if name and (yield from accept(tape, ">")):
                tape.kept()
                sink.begin(name)
                if name in tools and name not in known:
                    known[name] = members(tools[name].parameters)
                aside: list[str] = []
                yield from self._call(tape, sink, stops, known.get(name), aside.append)
                sink.content("".join(aside).rstrip(" \t\r\n"))
                tape.keep()
                yield from space(tape)
                if (yield from accept(tape, self.closing)):
                    tape.kept()
            sink.content(tape.kept())

    def _call(self, tape: Tape, sink: Sink, stops: Marks, known: Members | None, aside: Give) -> Waits[None]:
        """Read what follows the name, to the end of the function. What is no argument goes `aside`."""
        comma = "{"
        yield from space(tape)
        if (yield from peek(tape)) == "{":  # arguments as JSON after all
            yield from written_arguments(tape, stops, sink.arguments)
            comma = ""
        while (yield from before(tape, stops, aside)):
            mark = yield from accept(tape, self._parameter, self._function_end)
            if mark != self._parameter:
                if comma:
                    sink.arguments("{}" if comma == "{" else "}")
                return
            key = (yield from pattern(tape, _NO_KEY)) if comma else ""
            if not comma or not (yield from accept(tape, ">")):
                aside(mark + key)
                continue
            sink.arguments(f"{comma}{spelled(key)}: ")
            comma = ", "
            yield from self._value(tape, sink, known.types(key) if known is not None else _UNKNOWN)

    def _value(self, tape: Tape, sink: Sink, kinds: frozenset[str]) -> Waits[None]:
        if kinds <= {"string"}:
            sink.arguments('"')
            lines = _Lines(lambda text: sink.arguments(spelled(text)[1:-1]))
            if (yield from until(tape, _VALUE_ENDS, lines.give)):
                sink.arguments('"')
            else:
                lines.end()
            return
        pieces: list[str] = []
        lines = _Lines(pieces.append)
        if (yield from until(tape, _VALUE_ENDS, lines.give)):
            sink.arguments(as_json("".join(pieces), kinds))
        else:
            lines.end()
            sink.arguments("".join(pieces))

    def call(self, tool: Tool, arguments: Form) -> Form:
        return sequence(literal(f"{self.opening}\n"), self._inside(tool, forced=True))

    def _inside(self, tool: Tool, *, forced: bool) -> Form:
        end = literal(f"{self._function_end}\n{self.closing}")
        return sequence(literal(f"{self._function}{tool.name}>\n"), self._parameters(tool, forced), end)

    def _parameters(self, tool: Tool, forced: bool) -> Form:
        if not (tool.strict or forced):
            return repeat(sequence(literal(self._parameter), through("</parameter>\n")))
        found = members(tool.parameters)
        if found.named:
            given = [(key, self._one(tool, found, literal(key), key)) for key in found.named]
            form = sequence(*[form if key in found.required else maybe(form) for key, form in given])
        elif found.others is not None:
            form = repeat(self._one(tool, found, regex(_ANY_KEY), ""))
        else:
            form = sequence()
        return within(tool.parameters, form)

    def _one(self, tool: Tool, found: Members, name: Form, key: str) -> Form:
        """A parameter. Raises `ParamRefused`."""
        schema, is_text = found.of(key), found.types(key) <= {"string"}
        if tool.strict and is_text:
            self._check_raw(tool.name, key, schema)
        value = self._written(as_schema(schema), is_text, tool.strict)
        return sequence(literal(self._parameter), name, literal(">" + self._gap), value)

    def _written(self, schema: Mapping[str, object], is_text: bool, strict: bool) -> Form:
        end = f"{self._gap}</parameter>"
        if not is_text:
            return sequence(fits(schema, lenient=not strict), literal(end + "\n"))
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list) and values:
            for value in values:
                if self._read_back(str(value)) != value:
                    raise self.refused(f"cannot spell the value {spelled(str(value))}")
            return sequence(any_of([literal(str(value)) for value in values]), literal(end + "\n"))
        least, most = schema.get("minLength"), schema.get("maxLength")
        return sequence(
            through(
                end,
                least=least if isinstance(least, int) else 0,
                most=most if isinstance(most, int) else None,
            ),
            literal("\n"),
        )

    def _read_back(self, value: str) -> str:
        pieces: list[str] = []
        lines = _Lines(pieces.append)
        lines.give(f"{self._gap}{value}{self._gap}".partition("</parameter>")[0])
        return "".join(pieces)

    def _guided(self, tools: Sequence[Tool]) -> Form:
        inside = any_of([self._inside(tool, forced=False) for tool in tools])
        return free([(self.opening, sequence(literal("\n"), inside))])

    def _check_raw(self, tool: str, key: str, schema: object) -> None:
        """Refuse what JSON alone can be held to. Raises `ParamRefused`."""
        for word in ("pattern", "format", "$ref", "anyOf", "oneOf", "allOf"):
            if isinstance(schema, Mapping) and word in schema:
                raise self.refused(
                    f"has no JSON in its values, which the strict tool '{tool}' needs: it has '{word}' in its "
                    f"string '{key}'"
                )


class _Lines:
    """Gives on a value without the line end at its beginning and the one before its end."""

    __slots__ = ("_begun", "_give", "_held")

    def __init__(self, give: Give) -> None:
        self._give = give
        self._begun = False
        self._held = ""

    def give(self, text: str) -> None:
        if not text:
            return
        if not self._begun:
            self._begun = True
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        if out := text.removesuffix("\n"):
            self._give(out)

    def end(self) -> None:
        """The text ended within the value."""
        if self._held:
            self._give(self._held)
