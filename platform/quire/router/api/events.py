"""What the events of chat and completion streams share: the envelope, and usage beside or after the choices.

The bytes around what changes are made once per stream; an event is three pieces joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from quire.router.job import Job, Update
from quire_schemas.openai.answer import RequestMetrics, Usage

_json = msgspec.json.Encoder()


class Envelope:
    """Wraps choices of one stream into `data:` events. `kind` is the `object` of its chunks."""

    def __init__(self, job: Job, kind: str, *, wants_usage: bool) -> None:
        self._opened: set[int] = set()
        head = {
            "id": job.id,
            "object": kind,
            "created": job.created,
            "model": job.asked_model,
            "system_fingerprint": job.fingerprint,
        }
        self._head = b"data: " + _json.encode(head)[:-1] + b',"choices":['
        self._tail = b',"usage":null}\n\n' if wants_usage else b"}\n\n"

    def opens(self, index: int) -> bool:
        """Whether choice `index` is met for the first time."""
        if index in self._opened:
            return False
        self._opened.add(index)
        return True

    def event(self, choice: bytes, usage: Usage | None, more: bytes = b"") -> bytes:
        """One event with one choice, with the usage so far where the client asked for it in every event.

        `more` are further fields, each behind a comma.
        """
        return self._head + choice + b"]" + more + (self._tail if usage is None else _with(usage))

    def closing(self, usage: Usage) -> bytes:
        """The event without choices that carries the whole usage."""
        return self._head + b"]" + _with(usage)


def ending(update: Update) -> bytes:
    """The finish reason of a choice, and behind it what ended its text."""
    return _json.encode(update.finish_reason) + b',"stop_reason":' + _json.encode(update.stop_reason)


def closed(choices: Iterable[bytes], metrics: RequestMetrics | None) -> Iterator[tuple[bytes, bytes]]:
    """Each choice with the further fields of its event: the last one has the metrics, if there are any."""
    every = list(choices)
    told = b"" if metrics is None else b',"metrics":' + metrics.model_dump_json().encode()
    for place, choice in enumerate(every):
        yield choice, told if place == len(every) - 1 else b""


def _with(usage: Usage) -> bytes:
    return b',"usage":' + usage.model_dump_json().encode() + b"}\n\n"
