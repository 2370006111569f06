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

import random
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

from quire.router.account import Account
from quire.router.telling import Sampler
from quire_schemas import signals
from quire_schemas.telling import Attributes, Event, Phase, Sequence, Trace

_TRACEPARENT: Final = re.compile(
    r"(?!ff|00-.{52}.)([0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2}))(?:-.*)?", re.ASCII
)
"""Versions to come may have more behind what is known."""
_MOST_STATE: Final = 8192
"""Signs of a `tracestate` that is handed on."""
_SAMPLED: Final = 1
_RANDOM: Final = 2
"""Flags of a trace: it is told of; its id was drawn at random."""


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

    def name(self, model: str) -> None:
        """Call the span by its model, too, which must be one that exists: names are few."""
        if self._told is not None:
            self._told.asked = model

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Attributes of the request; None stands for one that does not apply."""
        if self._told is not None:
            self._told.attributes.update(attributes)

    def event(self, name: str, at: float, attributes: Attributes | None = None) -> None:
        if self._told is not None:
            self._told.events.append(Event(name, at, attributes or {}))

    def phase(self, name: str, start: float, end: float, attributes: Attributes | None = None) -> None:
        """A span below the request's."""
        if self._told is not None:
            self._told.phases.append(Phase(name, start, end, attributes or {}))

    def sequence(self, told: Sequence) -> None:
        """An attempt at a sequence has ended."""
        if self._told is not None:
            self._told.sequences.append(told)

    def end(self, at: float, error_code: str | None, *, failed: bool) -> None:
        """Close the span. `error_code` is the word of the error contract, None for success.

        `failed`: the fault is on this side, which makes the span an error (a client's mistake does not).
        """
        told, tells = self._told, self._tells
        if told is None or tells is None or (tells.errors_only and not failed):
            return
        if error_code is not None:
            told.attributes[signals.ERROR_TYPE] = error_code
        told.ended_at, told.failed = at, failed
        tells.trace(told)


class RequestSpans:
    """Begins the spans of requests, and has requests measured, if that goes anywhere."""

    def __init__(self, tells: Tells) -> None:
        self._tells = tells
        self._sampler = tells.sampler

    def measure(self, account: Account) -> None:
        """A request has ended."""
        self._tells.measure(account)

    def start(
        self,
        operation: str,
        headers: Iterable[tuple[bytes, bytes]],
        route: str,
        server: tuple[str, int | None] | None,
    ) -> RequestSpan:
        """A span for one request, from now on; below the client's own when it sent a proper `traceparent`."""
        parents, states = [], []
        for name, value in headers:
            if name == b"traceparent":
                parents.append(value.decode("latin-1"))
            elif name == b"tracestate":
                states.append(value.decode("latin-1"))
        parent = parents[0] if len(parents) == 1 else ""
        found = _TRACEPARENT.fullmatch(parent) if parent else None
        if self._sampler is None:
            return RequestSpan(found[1] if found is not None else None)
        if found is None:
            ids, parent, state, asked, flags = _drawn(24), "", "", None, _RANDOM
        else:
            parent, ids, state, theirs = found[1], found[2] + _drawn(8), ",".join(states), int(found[3], 16)
            asked, flags = bool(theirs & _SAMPLED), theirs & _RANDOM
        sampled = self._sampler.takes(ids[:32], asked)
        own = f"00-{ids[:32]}-{ids[32:]}-{flags | _SAMPLED if sampled else flags:02x}"
        if not sampled:
            return RequestSpan(own)
        state = state if len(state) <= _MOST_STATE else ""
        wall, now = time.time_ns(), time.monotonic()
        told = Trace(own, parent, state, operation, "", route, server, wall, now, now, {}, [], [], [])
        return RequestSpan(own, told, self._tells)


def _drawn(count: int) -> str:
    """So many bytes of an id."""
    return random.randbytes(count).hex()  # noqa: S311 - no secret, and nobody gains by guessing it
