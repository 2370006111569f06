"""How a dialect is read: a script over a tape.

A dialect's reader is written as if the whole text were there: a generator that looks for marks, takes white
space, copies a JSON value. Where it needs more than has come it yields, and goes on when the next piece is on
the tape. So no reader knows how the text was cut, and none can depend on it. What stays on the tape from piece
to piece is at most the beginning of a mark; everything longer is handed on, or kept as a list of pieces
(`Tape.keep`), so reading takes time linear in the text.

`Sink` collects what comes out. It alone decides about white space around calls: what stands before the first
and behind the last of them belongs to the format and is dropped, and so is what stands between two; between a
call and content that follows it is content if there was content before. A call's arguments come in one run: a
script that finds other text between them gives it once the call has ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import Any, Final, TypeVar

from quire.text.dialects.literals import sound
from quire.text.dialects.parts import CallArguments, CallBegins, Content, Part, Reasoning

T = TypeVar("T")
Waits = Generator[None, None, T]
"""Gives a `T` once enough of the text has come."""
Give = Callable[[str], None]
"""Takes text that is read."""

_SPACE: Final = " \t\r\n"
_NO_SPACE: Final = re.compile(r"[^ \t\r\n]")
_IN_STRING: Final = re.compile(r'"|\\(?s:.)|\\\Z')
_SCALAR_ENDS: Final = re.compile(r"[\s,}\]]")


class Marks:
    """Texts that mean something where they stand. None of them contains another."""

    __slots__ = ("_firsts", "_texts", "find", "find_sign", "longest")

    def __init__(self, *texts: str) -> None:
        self._texts = texts
        self._firsts = frozenset(text[0] for text in texts)
        self.longest = max(map(len, texts), default=1)
        written = [re.escape(text) for text in texts]
        self.find = re.compile("|".join(written) or r"(?!)").search
        self.find_sign = re.compile("|".join([*written, r'["\[\]{}]'])).search
        """Finds a mark, or a sign that JSON is nested by."""

    def __contains__(self, text: str) -> bool:
        return text in self._texts

    def begun(self, text: str, at: int) -> int:
        """The place from `at` on where a mark may have begun that is not whole yet; the text's end if nowhere."""
        for start in range(max(at, len(text) - self.longest + 1), len(text)):
            if text[start] in self._firsts:
                rest = text[start:]
                if any(mark.startswith(rest) for mark in self._texts):
                    return start
        return len(text)


class Tape:
    """The text that has come and is not read yet: `text` from `at` on."""

    __slots__ = ("_kept", "at", "ended", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self._kept: list[str] | None = None

    def feed(self, piece: str) -> None:
        self.text = self.text[self.at :] + piece if self.at < len(self.text) else piece
        self.at = 0

    def read(self, end: int) -> str:
        """What stands before `end`; it is read now."""
        piece = self.text[self.at : end]
        self.at = end
        if self._kept is not None and piece:
            self._kept.append(piece)
        return piece

    def keep(self, before: str = "") -> None:
        """Remember from here on, behind `before`, what is read: it may turn out to be content after all."""
        self._kept = [before]

    def kept(self) -> str:
        """What was remembered, and no more of it."""
        kept, self._kept = "".join(self._kept or ()), None
        return kept


class Sink:
    """The parts that came out."""

    __slots__ = (
        "_behind_call",
        "_breaks",
        "_calls",
        "_parts",
        "_said",
        "_silent",
        "_space",
        "_thinking",
        "_thought",
    )

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._space: list[str] = []
        """White space that may be the last before a call, a thought's end, or the text's."""
        self._calls = 0
        self._behind_call = False
        """No content has come since the last call."""
        self._silent = False
        """The last call has no arguments yet."""
        self._said = False
        """There was content."""
        self._thinking = self._thought = False
        """A thought is being given; there was one."""
        self._breaks = False
        """What comes next is content of another message than what came last."""

    def take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def content(self, text: str) -> None:
        if self._breaks or (self._calls and not self._said):  # nothing that white space could stand behind
            text = text.lstrip(_SPACE)
        body = text.rstrip(_SPACE)
        if not body:
            if text:
                self._space.append(text)
            return
        before = ["\n"] if self._breaks else self._space
        self._said, self._breaks, self._behind_call = True, False, False
        self._parts.append(Content("".join([*before, body])))
        self._space = [text[len(body) :]] if len(text) > len(body) else []

    def thought(self, text: str) -> None:
        """More of a thought. White space at its beginning and before its end is the format's."""
        if not self._thinking:
            text = text.lstrip(_SPACE)
        body = text.rstrip(_SPACE)
        if not body:
            if text:
                self._space.append(text)
            return
        before = self._space if self._thinking else ["\n"] if self._thought else []
        self._thinking = self._thought = True
        self._parts.append(Reasoning("".join([*before, body])))
        self._space = [text[len(body) :]] if len(text) > len(body) else []

    def thought_ends(self) -> None:
        """Another thought begins on a new line."""
        self._thinking = False
        self._space.clear()

    def content_ends(self) -> None:
        """Other content begins on a new line."""
        self._breaks = self._said
        self._space.clear()

    def begin(self, name: str) -> None:
        self._space.clear()
        self._parts.append(CallBegins(self._calls, name))
        self._calls += 1
        self._silent = self._behind_call = True

    def arguments(self, text: str) -> None:
        if text:
            self._silent = False
            self._parts.append(CallArguments(self._calls - 1, text))

    def call_ends(self) -> None:
        """A call without arguments, whose end was written, has none: that is an empty object."""
        if self._silent:
            self.arguments("{}")

    def end(self) -> None:
        """The text has ended."""
        space = "".join(self._space)
        if space and self._thinking:
            self._parts.append(Reasoning(space))
        elif space and not self._behind_call:
            self._parts.append(Content(space))
        self._space.clear()


class ScriptReader:
    """A reader that runs a script. A script ends with the text, not before."""

    __slots__ = ("_script", "_sink", "_tape")

    def __init__(self, script: Callable[[Tape, Sink], Waits[None]]) -> None:
        self._tape, self._sink = Tape(), Sink()
        self._script = script(self._tape, self._sink)
        next(self._script)

    def push(self, text: str) -> list[Part]:
        if not text:
            return []
        self._tape.feed(text)
        next(self._script)
        return self._sink.take()

    def finish(self) -> list[Part]:
        self._tape.ended = True
        if next(self._script, self) is not self:
            raise RuntimeError("a script waits for more of a text that has ended")
        self._sink.end()
        return self._sink.take()


# ── what scripts are made of ──────────────────────────────────────────────────────────────────────────────


def until(tape: Tape, marks: Marks, give: Give) -> Waits[str]:
    """Read up to the next mark and the mark; it is the result, or nothing where the text ends without."""
    while True:
        found = marks.find(tape.text, tape.at)
        if found is not None:
            give(tape.read(found.start()))
            tape.read(found.end())
            return found[0]
        if tape.ended:
            give(tape.read(len(tape.text)))
            return ""
        give(tape.read(marks.begun(tape.text, tape.at)))
        yield


def before(tape: Tape, marks: Marks, give: Give) -> Waits[bool]:
    """Read up to the next mark, which stays; whether there is one."""
    while True:
        found = marks.find(tape.text, tape.at)
        if found is not None:
            give(tape.read(found.start()))
            return True
        if tape.ended:
            give(tape.read(len(tape.text)))
            return False
        give(tape.read(marks.begun(tape.text, tape.at)))
        yield


def peek(tape: Tape) -> Waits[str]:
    """The next character, which stays; nothing at the end."""
    while tape.at == len(tape.text) and not tape.ended:
        yield
    return tape.text[tape.at : tape.at + 1]


def accept(tape: Tape, *words: str) -> Waits[str]:
    """Read one of `words` if the text goes on with it: which, or nothing. None of them begins another."""
    while True:
        waiting = False
        for word in words:
            come = tape.text[tape.at : tape.at + len(word)]
            if come == word:
                tape.read(tape.at + len(word))
                return word
            waiting |= word.startswith(come)
        if tape.ended or not waiting:
            return ""
        yield


def pattern(tape: Tape, chars: re.Pattern[str]) -> Waits[str]:
    """Read characters as long as they are not what `chars` finds."""
    pieces: list[str] = []
    while True:
        found = chars.search(tape.text, tape.at)
        pieces.append(tape.read(len(tape.text) if found is None else found.start()))
        if found is not None or tape.ended:
            return "".join(pieces)
        yield


def space(tape: Tape) -> Waits[str]:
    """Read white space."""
    return (yield from pattern(tape, _NO_SPACE))


def string(tape: Tape) -> Waits[str]:
    """Read a JSON string, which the text goes on with, as it is written; less of it at the end."""
    pieces = [tape.read(tape.at + 1)]
    while True:
        found = _IN_STRING.search(tape.text, tape.at)
        if found is None:
            pieces.append(tape.read(len(tape.text)))
        elif found[0] == '"':
            pieces.append(tape.read(found.end()))
            return "".join(pieces)
        elif found[0] != "\\":
            pieces.append(tape.read(found.end()))
            continue
        else:
            pieces.append(tape.read(found.end() if tape.ended else found.start()))
        if tape.ended:
            return "".join(pieces)
        yield


def value(tape: Tape, stops: Marks, give: Give) -> Waits[bool]:
    """Read a JSON value, or what stands in its place, up to a stop outside of strings. Whether it is whole."""
    first = yield from peek(tape)
    if first not in ('"', "{", "["):
        return (yield from _scalar(tape, stops, give))
    depth, inside = 0, False
    while True:
        text, at = tape.text, tape.at
        while at < len(text):
            if inside:
                found = _IN_STRING.search(text, at)
                if found is None:
                    at = len(text)
                    break
                if found[0] == "\\" and not tape.ended:
                    at = found.start()
                    break
                at = found.end()
                if found[0] != '"':
                    continue
                inside = False
            else:
                found = stops.find_sign(text, at)
                start = found.start() if found is not None else len(text)
                if not tape.ended and start > len(text) - stops.longest:
                    begun = stops.begun(text, at)  # it may be no sign, but the first of a mark
                    if begun <= start:
                        at = begun
                        break
                if found is None:
                    at = len(text)
                    break
                sign = found[0]
                if sign in stops:
                    give(tape.read(start))
                    return False
                at = found.end()
                if sign == '"':
                    inside = True
                    continue
                depth += 1 if sign in "[{" else -1
            if depth <= 0:
                give(tape.read(at))
                return True
        give(tape.read(at))
        if tape.ended:
            return False
        yield


def _scalar(tape: Tape, stops: Marks, give: Give) -> Waits[bool]:
    while True:
        text, at = tape.text, tape.at
        ends, stop = _SCALAR_ENDS.search(text, at), stops.find(text, at)
        place = min(found.start() if found is not None else len(text) for found in (ends, stop))
        begun = len(text) if tape.ended else stops.begun(text, at)
        give(tape.read(min(place, begun)))
        if place < len(text) and place <= begun:
            return stop is None or place < stop.start()
        if tape.ended:
            return False
        yield


def decoded(literal: str) -> str | None:
    """The text that a JSON string stands for; None if it is none."""
    try:
        found: Any = json.loads(literal, strict=False)
    except ValueError:
        return None
    return sound(found) if isinstance(found, str) else None


def nothing(text: str) -> None:
    """Takes text that is dropped."""
