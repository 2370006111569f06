"""A conversation in a terminal, without the terminal: turns, the request for the next one, and text made harmless.

A turn is in the conversation once there is something to keep: the question with its answer, also with the part
that was there when somebody stopped it. A question that got none stays outside, so that what follows is asked
without it, and can be asked again.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quire.remote import Server
from quire.remote.server import encode

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """`text` that a terminal can only show: every control character but tab and line feed becomes a picture of it.

    A terminal would obey the original: move the cursor, change colours or the title, answer as if typed. Each
    character is replaced by itself, so it does not matter where a text is cut.
    """
    return _CONTROL.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, or of the thought before it; or its end, with why it ended."""

    kind: Literal["thought", "text", "end"]
    text: str


@dataclass(slots=True)
class Conversation:
    """What was said, and how the next answer is asked for. `sampling` goes into each request as it is."""

    model: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    """Question and answer."""
    asked: str | None = None
    """The last question."""
    is_answered: bool = False
    """Whether the last question is the last turn."""

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """All that was said, in the API's form, and then `question`."""
        said = [] if self.system is None else [{"role": "system", "content": self.system}]
        for user, assistant in self.turns:
            said += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return said if question is None else [*said, {"role": "user", "content": question}]

    def body(self, question: str) -> bytes:
        """The request for an answer to `question`."""
        return encode(
            {"model": self.model, "messages": self.messages(question), "stream": True, **dict(self.sampling)}
        )

    def reset(self) -> None:
        """Forget what was said; the system text stays."""
        self.turns.clear()
        self.asked, self.is_answered = None, False

    def again(self) -> str | None:
        """The last question, with its answer taken back; None where nothing was asked."""
        if self.is_answered:
            self.turns.pop()
            self.is_answered = False
        return self.asked

    async def answer(self, server: Server, question: str) -> AsyncGenerator[Piece, None]:
        """Ask, and give the answer as it comes. Raises `RemoteError`, which keeps nothing of this turn.

        Leaving it early (closing the iterator, or cancelling) aborts the request and keeps what came.
        """
        self.asked, self.is_answered = question, False
        said: list[str] = []
        ended = "stop"
        try:
            async with aclosing(server.stream("/chat/completions", self.body(question))) as chunks:
                async for chunk in chunks:
                    for choice in chunk.choices:
                        delta = choice.delta
                        if delta is not None and delta.thought:
                            yield Piece("thought", delta.thought)
                        if delta is not None and delta.text:
                            said.append(delta.text)
                            yield Piece("text", delta.text)
                        ended = choice.finish_reason or ended
        except BaseException as error:
            if not isinstance(error, Exception) and said:
                self._keep(question, said)
            raise
        self._keep(question, said)
        yield Piece("end", ended)

    def _keep(self, question: str, said: list[str]) -> None:
        self.turns.append((question, "".join(said)))
        self.is_answered = True

    def save(self, path: Path) -> None:
        """Write the conversation as one line of JSON, which `platform bench --dataset` reads, too. Raises
        OSError."""
        path.write_text(
            json.dumps({"model": self.model, "messages": self.messages()}, ensure_ascii=False) + "\n", "utf-8"
        )
