"""The spans of one request: its own, below the client's, and one for each place where its time went.

No span is made here: a request notes its attributes, its phases and what engines told of its sequences, and
`RequestSpan.end` hands that on (`telling`) to where spans are made of it (`quire.teller`, `quire.phases`). A
request that is not sampled notes nothing.

**Clocks.** Spans are told in nanoseconds since 1970; everything here is measured in seconds of `time.monotonic()`.
Each request pairs the two once, when it arrives, and all of its times are counted from that pair: a wall clock
that is set meanwhile moves no phase against another.

No span carries text: not of a prompt, not of an answer, not a stop string, and no header but `traceparent` and
`tracestate`; `baggage` is neither read nor handed on.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from quire.router.account import Account
from quire.router.telling import Sampler
from quire_schemas import telling
from quire_schemas.telling import Attributes, Event, Phase, Trace

_TRACEPARENT: Final = re.compile(
    r"(?!ff|00-.{52}.)([0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2}))(?:-.*)?", re.ASCII
)
"""Versions to come may have more behind what is known."""
_MOST_STATE: Final = 8192
"""Signs of a `tracestate` that is handed on."""
_SAMPLED: Final = 1
_RANDOM: Final = 2
"""Flags of a trace: it is told of (as Python's True); its id was drawn at random."""
_AHEAD: Final = 64


class Tells(Protocol):
    """Where requests that have ended are told of."""

    sampler: Sampler | None
    errors_only: bool

    def trace(self, told: Trace) -> None: ...

    def measure(self, account: Account) -> None: ...


class RequestSpan:
    """What is noted of one request; nothing unless it is told of."""

    __slots__ = ("_tells", "_told", "is_recorded", "traceparent")

    def __init__(self, traceparent: str | None, told: Trace | None = None, tells: Tells | None = None) -> None:
        """`told` is what is known of it from the start, if it is told of."""
        self.traceparent = traceparent
        """For the engine: this span, or what the client sent when there is none."""
        self.is_recorded = told is not None
        """Whether anything that is noted here is kept."""
        self._told = told
        self._tells = tells

    @classmethod
    def unseen(cls) -> RequestSpan:
        """Of a request that nobody is told of."""
        return cls(None)

    @property
    def trace_id(self) -> str:
        """Of the trace that it is in; empty where there is none."""
        return self.traceparent[3:35] if self.traceparent is not None else ""

    def name(self, asked: str, model: str) -> None:
        """Call the span by the name that the request has for its model, which must be one that exists: names are
        few."""
        if self._told is not None:
            self._told.asked, self._told.model = asked, model

    def set(self, attributes: Attributes) -> None:
        """Attributes of the request, which it may keep; None stands for one that does not apply."""
        if self._told is not None:
            if self._told.attributes:
                self._told.attributes.update(attributes)
            else:
                self._told.attributes = attributes

    def event(self, name: str, at: float, attributes: Attributes | None = None) -> None:
        if self._told is not None:
            self._told.events.append(Event(name, at, attributes or {}))

    def phase(self, name: str, start: float, end: float, attributes: Attributes | None = None) -> None:
        """A span below the request's."""
        if self._told is not None:
            self._told.phases.append(Phase(name, start, end, attributes or {}))

    def sequence(self, told: telling.Sequence) -> None:
        """An attempt at a sequence has ended."""
        if self._told is not None:
            self._told.sequences.append(told)

    def end(self, at: float, error: str | None, *, failed: bool, status: int | None = None) -> None:
        """Close the span. `error` is the word of the error contract, None for success; `status` what was sent.

        `failed`: the fault is on this side, which makes the span an error (a client's mistake does not).
        """
        told, tells = self._told, self._tells
        if told is None or tells is None or (tells.errors_only and not failed):
            return
        told.ended_at, told.error, told.failed, told.status = at, error or "", failed, status
        tells.trace(told)


class RequestSpans:
    """Begins the spans of requests, and has requests measured, if that goes anywhere."""

    def __init__(self, tells: Tells) -> None:
        self._tells = tells
        self._sampler = tells.sampler
        self._ids: list[str] = []
        """Of traces and their first spans, drawn ahead: many at once take a fraction of what each takes alone."""

    def _draw(self) -> str:
        drawn = os.urandom(24 * _AHEAD).hex()
        self._ids = [f"{drawn[at : at + 32]}-{drawn[at + 32 : at + 48]}" for at in range(0, len(drawn), 48)]
        return self._ids.pop()

    def measure(self, account: Account) -> None:
        """A request has ended."""
        self._tells.measure(account)

    def start(
        self,
        operation: str,
        headers: Sequence[tuple[bytes, bytes]],
        route: str,
        server: tuple[str, int | None] | None,
    ) -> RequestSpan:
        """A span for one request, from now on; below the client's own when it sent a proper `traceparent`."""
        found = _parent(headers) if b"traceparent" in dict(headers) else None
        sampler = self._sampler
        if sampler is None:
            return RequestSpan(None if found is None else found[1])
        ids = self._ids.pop() if self._ids else self._draw()
        if found is None:
            parent, state, sampled = "", "", sampler.takes(ids[:32], None)
            own = f"00-{ids}-03" if sampled else f"00-{ids}-02"
        else:
            parent, state, theirs = found[1], _state(headers), int(found[3], 16)
            sampled = sampler.takes(found[2], bool(theirs & _SAMPLED))
            own = f"00-{found[2]}-{ids[33:]}-{theirs & _RANDOM | sampled:02x}"
        if not sampled:
            return RequestSpan(own)
        wall, now = time.time_ns(), time.monotonic()
        told = Trace(own, parent, state, operation, "", "", route, server, wall, now, now, {}, [], [], [])
        return RequestSpan(own, told, self._tells)


def _parent(headers: Iterable[tuple[bytes, bytes]]) -> re.Match[str] | None:
    """The client's `traceparent`, if there is one and it is proper."""
    stated = [value.decode("latin-1") for name, value in headers if name == b"traceparent"]
    return _TRACEPARENT.fullmatch(stated[0]) if len(stated) == 1 else None


def _state(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """His `tracestate`, unless it is too long."""
    state = ",".join(value.decode("latin-1") for name, value in headers if name == b"tracestate")
    return state if len(state) <= _MOST_STATE else ""
