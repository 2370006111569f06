"""What the events of chat and completion streams share: the envelope, and usage beside or after the choices.

The bytes around what changes are made once per stream; an event is three pieces joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec

from quire.errors import HttpError
from quire.router.job import Job, Update
from quire_schemas.openai.answer import RequestMetrics, Usage
from quire_schemas.openai.sampling import StreamOptions

_json = msgspec.json.Encoder()
DONE: Final = b"data: [DONE]\n\n"
COMMENT: Final = b": ping\n\n"
"""What is no event, and passed over by every reader of server-sent events."""


class Envelope:
    """Wraps choices of one stream into `data:` events. `kind` is the `object` of its chunks."""

    def __init__(self, job: Job, kind: str, wanted: StreamOptions | None) -> None:
        self._opened: set[int] = set()
        head = {
            "id": job.id,
            "object": kind,
            "created": job.created,
            "model": job.asked_model,
            "system_fingerprint": job.fingerprint,
        }
        self._head = b"data: " + _json.encode(head)[:-1] + b',"choices":['
        self._wants_usage = bool(wanted and wanted.include_usage)
        self.wants_running_usage = bool(wanted and wanted.continuous_usage_stats)
        self._tail = b',"usage":null}\n\n' if self._wants_usage else b"}\n\n"

    def opens(self, index: int) -> bool:
        """Whether choice `index` is met for the first time."""
        if index in self._opened:
            return False
        self._opened.add(index)
        return True

    def event(self, choice: bytes, usage: Callable[[], Usage], more: bytes = b"") -> bytes:
        """One event with one choice, with the usage so far where the client asked for it in every event.

        `more` are further fields, each behind a comma.
        """
        return self._head + choice + b"]" + more + (_with(usage()) if self.wants_running_usage else self._tail)

    async def end(self, usage: Usage) -> bytes:
        """The end of the stream: for those who asked for it, an event without choices that has the whole usage."""
        return (self._head + b"]" + _with(usage) if self._wants_usage else b"") + DONE

    async def broken(self, error: HttpError) -> bytes:
        """The event of a stream that breaks off."""
        return b"data: " + error.body + b"\n\n"


def ending(update: Update) -> bytes:
    """The finish reason of a choice, and behind it what ended its text."""
    return _json.encode(update.finish_reason) + b',"stop_reason":' + _json.encode(update.stop_reason)


def closed(choices: Iterable[bytes], metrics: RequestMetrics | None) -> Iterator[tuple[bytes, bytes]]:
    """Each choice with the further fields of its event: the last one has the metrics, if there are any."""
    if metrics is None:
        yield from ((choice, b"") for choice in choices)
        return
    every = list(choices)
    told = b',"metrics":' + metrics.model_dump_json().encode()
    for place, choice in enumerate(every):
        yield choice, told if place == len(every) - 1 else b""


def _with(usage: Usage) -> bytes:
    return b',"usage":' + usage.model_dump_json().encode() + b"}\n\n"
