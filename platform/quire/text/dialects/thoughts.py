"""How a model marks its thoughts, and the reader that takes them out of the text.

A thought stands at the beginning of an answer, before any content; there may be several in a row. What is no
thought goes on to the reader behind, which knows of calls. A mark that comes later, or that closes what is not
open, is content. White space around thoughts, and at both ends of one, is the format's and is dropped; a
thought that the text's end cuts off keeps what it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from quire.text.dialects.forms import Form, is_free, literal, maybe, regex, sequence, through
from quire.text.dialects.parts import Part, Reader
from quire.text.dialects.reading import Marks, Sink, Tape, Waits, accept, peek, space, until

_GAP = regex(r"[ \t\r\n]{0,4}")
"""Between a thought and what follows it."""


class ReasoningDialect(ABC):
    """How a family of models writes its thoughts."""

    name: str
    """As `spec.parsers.reasoning` spells it."""
    marks: tuple[str, ...]
    """Tokens that the reader must see, special or not."""
    always: bool = False
    """Every answer begins with its thought, whoever asks."""
    apart: bool = True
    """Thoughts have marks of their own, so that an answer behind them is read without."""
    answer: str = ""
    """What stands between thoughts and an answer that is no call, besides white space."""

    @abstractmethod
    def opens(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside a thought, so that the answer begins there."""

    def closed(self, prompt: str) -> bool:
        """Whether a rendered prompt ends behind a thought, so that there is no other before the answer."""
        return False

    @abstractmethod
    def left_open(self, answer: str) -> bool:
        """Whether an answer that is to be continued ends inside a thought, which a mark in it began: text without
        is content, however answers begin.
        """

    @abstractmethod
    def behind(self, form: Form, *, opened: bool = False) -> Form:
        """What an answer is held to that has a thought before `form`, or may have one if none is open."""


class Thoughts(ReasoningDialect):
    """Thoughts between two marks. With `begins_open` an answer begins inside one even where nobody opened it."""

    def __init__(self, name: str, opening: str, closing: str, *, begins_open: bool = False) -> None:
        self.name = name
        self.opening, self.closing, self.begins_open = opening, closing, begins_open
        self.always = begins_open
        self.marks = (opening, closing)
        self.end = Marks(closing)

    def opens(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.opening)

    def closed(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.closing)

    def left_open(self, answer: str) -> bool:
        begun = answer.lstrip().startswith(self.opening)
        return begun and answer.rfind(self.opening) >= answer.rfind(self.closing)

    def reader(self, inner: Reader, *, opened: bool = False) -> Reader:
        """Reads an answer; what is no thought goes to `inner`."""
        return ThoughtReader(self, inner, opened or self.begins_open)

    def behind(self, form: Form, *, opened: bool = False) -> Form:
        thought = through(self.closing) if is_free(form) else sequence(through(self.closing), _GAP)
        if opened or self.begins_open:
            return sequence(thought, form)
        if is_free(form):  # which must not begin as a thought does, and be none
            begin = {"mark": self.opening, "then": thought, "again": True}
            return {**form, "begins": [*form.get("begins", ()), begin]}
        return sequence(maybe(sequence(literal(self.opening), thought)), form)


class ThoughtReader:
    """Thoughts first, then everything to the reader behind."""

    __slots__ = ("_inner", "_script", "_sink", "_tape")

    def __init__(self, thoughts: Thoughts, inner: Reader, opened: bool) -> None:
        self._tape, self._sink = Tape(), Sink()
        self._inner = inner
        self._script: Waits[str] | None = _thoughts(thoughts, opened, self._tape, self._sink)
        next(self._script)

    def push(self, text: str) -> list[Part]:
        if self._script is None:
            return self._inner.push(text)
        if not text:
            return []
        self._tape.feed(text)
        return self._go_on()

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if self._script is not None:
            self._tape.ended = True
            parts = self._go_on()
        return parts + self._inner.finish()

    def _go_on(self) -> list[Part]:
        if self._script is None:
            return []
        try:
            next(self._script)
        except StopIteration as done:
            self._script = None
            self._sink.end()
            left: str = done.value + self._tape.read(len(self._tape.text))
            return self._sink.take() + self._inner.push(left)
        return self._sink.take()


def _thoughts(thoughts: Thoughts, opened: bool, tape: Tape, sink: Sink) -> Waits[str]:
    """Reads all thoughts. Gives white space that turned out to be content, where there was no thought."""
    before = "" if opened else (yield from space(tape))
    while opened or (yield from accept(tape, thoughts.opening)):
        if opened:
            yield from space(tape)
            yield from accept(tape, thoughts.opening)  # opened by the prompt, and by the model once more
        opened, before = False, ""
        if not (yield from until(tape, thoughts.end, sink.thought)):
            return ""
        sink.thought_ends()
        yield from space(tape)
    yield from peek(tape)
    return before
