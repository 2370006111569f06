"""The dialect of gpt-oss: an answer is several messages, each in a channel.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
    <|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>

The first `<|start|>assistant` stands in the prompt. The tokens that end an answer (`<|return|>`, `<|call|>`) may
be missing from its text. A message to somebody (`to=`, in the channel or before it) is a call, with the message as
arguments; one in the channel `analysis` is a thought; all others are content. Several thoughts, or contents, are
put on lines of their own. Headers are the format's: one that the text's end cuts off is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from quire.text.dialects.forms import Form, any_of, literal, maybe, regex, repeat, sequence, through
from quire.text.dialects.parts import Tool
from quire.text.dialects.reading import (
    Marks,
    ScriptReader,
    Sink,
    Tape,
    Waits,
    accept,
    before,
    nothing,
    peek,
    space,
    until,
    value,
)
from quire.text.dialects.thoughts import ReasoningDialect
from quire.text.dialects.tools import ToolDialect, arguments

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_END, _CALL, _RETURN = "<|end|>", "<|call|>", "<|return|>"
_MARKS: Final = (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, _END, _CALL, _RETURN)
_THOUGHT: Final = f"{_CHANNEL}analysis{_MESSAGE}"
_NEXT: Final = f"{_START}assistant"
_RECIPIENT: Final = re.compile(r"(?:^|[\s>])to=([^\s<]+)")
_CUT_HEADER: Final = re.compile(r"(?=<)(?:<\|\w*+\|?>?|to=[^\s<]*+|\w++|\s++){0,12}<?")
"""What begins as a header, in a text that ends before there is a message."""
_CHANNEL_NAME: Final = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyThoughts(ReasoningDialect):
    """Thoughts are messages in the channel `analysis`."""

    name = "harmony"
    marks = _MARKS
    always = True
    apart = False
    answer = f"{_CHANNEL}final{_MESSAGE}"

    def opens(self, prompt: str) -> bool:
        return prompt.endswith(_THOUGHT)

    def left_open(self, answer: str) -> bool:
        return False

    def behind(self, form: Form, *, opened: bool = False) -> Form:
        thought = sequence(through(_END), literal(_NEXT))
        return sequence(thought if opened else maybe(sequence(literal(_THOUGHT), thought)), form)


class Harmony(ToolDialect):
    """Calls are messages to `functions.NAME`. An answer ends with its first call."""

    name = "harmony"
    marks = _MARKS
    many = False
    names = re.compile(r"[^\s<]+")

    def script(self, tape: Tape, sink: Sink, tools: Mapping[str, Tool]) -> Waits[None]:
        return _messages(tape, sink, calls=True, opened=False)

    def call(self, tool: Tool, arguments: Form) -> Form:
        return sequence(literal(_CHANNEL), self._inside(tool, arguments))

    def _inside(self, tool: Tool, arguments: Form) -> Form:
        header = f"commentary to=functions.{tool.name} {_CONSTRAIN}json{_MESSAGE}"
        return sequence(literal(header), arguments)

    def _guided(self, tools: Sequence[Tool]) -> Form:
        calls = [self._inside(tool, arguments(tool, forced=False)) for tool in tools]
        others = any_of([literal(f"{channel}{_MESSAGE}") for channel in ("analysis", "commentary")])
        before_last = sequence(literal(_CHANNEL), others, through(_END), literal(_NEXT))
        last = any_of([sequence(literal(f"final{_MESSAGE}"), regex(r"(.|\n)*")), *calls])
        return sequence(repeat(before_last), literal(_CHANNEL), last)


class HarmonyReader(ScriptReader):
    """Reads calls, where there are tools, and thoughts: the marks of both are the same."""

    __slots__ = ()

    def __init__(self, tools: Sequence[Tool] | None, opened: bool) -> None:
        super().__init__(lambda tape, sink: _messages(tape, sink, calls=tools is not None, opened=opened))


def _messages(tape: Tape, sink: Sink, *, calls: bool, opened: bool) -> Waits[None]:
    starts, ends = Marks(_START, _CHANNEL, _MESSAGE), Marks(*_MARKS)
    if opened:
        yield from _body(tape, sink, "analysis", ends)
    else:
        tape.keep()
        yield from space(tape)
        if (yield from accept(tape, "to=")):
            yield from _message(tape, sink, ends, calls)
        else:
            sink.content(tape.kept())
    while True:
        if not (yield from before(tape, starts, sink.content)):
            return
        tape.keep()
        yield from _message(tape, sink, ends, calls)


def _message(tape: Tape, sink: Sink, ends: Marks, calls: bool) -> Waits[None]:
    """Read a message from its header on, which is kept as far as it is read."""
    mark = _START
    while mark in (_START, _CHANNEL, _CONSTRAIN):
        mark = yield from until(tape, ends, nothing)
    kept = tape.kept()
    if mark != _MESSAGE:
        if mark or not _CUT_HEADER.fullmatch(kept):
            sink.content(kept)
        return
    channel, recipient = _CHANNEL_NAME.search(kept), _RECIPIENT.search(kept)
    if recipient is not None and calls:
        sink.begin(recipient[1].removeprefix("functions."))
        yield from _arguments(tape, sink, ends)
        return
    if recipient is not None:
        sink.content(kept)
    yield from _body(tape, sink, channel[1] if channel is not None and recipient is None else "final", ends)


def _arguments(tape: Tape, sink: Sink, ends: Marks) -> Waits[None]:
    yield from space(tape)
    if (yield from peek(tape)) == "{":
        yield from value(tape, ends, sink.arguments)
        yield from space(tape)
        if not (yield from accept(tape, _CALL, _END, _RETURN)):
            yield from before(tape, ends, sink.content)
            yield from accept(tape, _CALL, _END, _RETURN)
        return
    if (yield from before(tape, ends, sink.arguments)):
        yield from accept(tape, _CALL, _END, _RETURN)
        sink.call_ends()


def _body(tape: Tape, sink: Sink, channel: str, ends: Marks) -> Waits[None]:
    """Read a message that is no call, and the mark that ends it, but not one that begins another."""
    thought = channel == "analysis"
    closed = yield from before(tape, ends, sink.thought if thought else sink.content)
    if not closed:
        return
    if thought:
        sink.thought_ends()
    else:
        sink.content_ends()
    yield from accept(tape, _CALL, _END, _RETURN)
