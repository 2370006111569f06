"""What a process of the router says to its teller, the child that tells collectors for it, and back.

Each end is one of a socket pair, and a frame (`wire.frame`) is a `ToTeller` or a `FromTeller`. The first message
is `Begin`; its answer is `Ready` or `Unable`. Then come `News` of requests that have ended; and `Done`, whenever
it is known what became of spans.

Times named `*_at`, and those of phases and events, are `time.monotonic()` of the sender.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from quire_schemas.wire import Timings

Attributes = dict[str, Any]
"""Values are texts, numbers, truths, or lists of texts."""


class _Message(msgspec.Struct, tag=True, array_like=True):
    pass


class Event(msgspec.Struct, array_like=True, gc=False):
    """Something that happened within a span."""

    name: str
    at: float
    attributes: Attributes


class Phase(msgspec.Struct, array_like=True, gc=False):
    """A span below that of its request."""

    name: str
    start: float
    end: float
    attributes: Attributes
    events: list[Event] = []


class Sequence(msgspec.Struct, array_like=True, gc=False):
    """One attempt at one sequence, as the router saw it: a span for each phase in the engine, or one for all of it
    if the engine told nothing."""

    sent_at: float
    heard_at: float
    """When the router had its last news of it, or gave it up."""
    timings: Timings | None
    """What the engine told, on its own clock."""
    prompt_tokens: int
    generated: int
    where: Attributes
    """Of each of its spans."""

    @property
    def spans(self) -> int:
        told = self.timings
        return 1 if told is None or told.scheduled_at is None or told.first_token_at is None else 3


class Trace(_Message, gc=False):
    """The spans of one request that has ended: its own, and those below it. Attributes that are None do not
    apply."""

    context: str
    """Of its own span, as a `traceparent`."""
    parent: str
    """The client's, likewise; empty where it sent none."""
    state: str
    """The client's `tracestate`."""
    operation: str
    asked: str
    """The name that the request has for its model; empty where it has none that is served."""
    model: str
    """That model."""
    route: str
    server: tuple[str, int | None] | None
    """Address and port that it came to."""
    wall: int
    """When it began, in nanoseconds since 1970."""
    began_at: float
    """The same moment, by the clock of all other times."""
    ended_at: float
    attributes: Attributes
    events: list[Event]
    phases: list[Phase]
    sequences: list[Sequence]
    status: int | None = None
    """Of the answer that was sent."""
    error: str = ""
    """The word of the error contract; empty for success."""
    failed: bool = False
    """By no fault of the client."""
    kept: int | None = None
    """How many of its spans are to be made, its own first, if not all."""

    @property
    def spans(self) -> int:
        return 1 + len(self.phases) + sum([each.spans for each in self.sequences])


class Measure(_Message, gc=False):
    """What is measured of one request that has ended. Times are seconds; None is not known or does not apply."""

    operation: str
    model: str
    """Empty for one that nobody serves."""
    asked: str
    """The name that the request has for it."""
    background: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    first_token: float | None
    writing: float | None
    total: float
    error: str


class Begin(_Message):
    """Tell for the process `pid` of the service, as was declared, else as the environment says."""

    service: str
    pid: int
    declared: bool
    otlp_endpoint: str | None
    sampling: Literal["always", "errors", "never"]
    metrics: Literal["always", "never"]


class News(_Message):
    """Requests that have ended, in that order."""

    items: list[Trace | Measure]


ToTeller = Begin | News


class Ready(_Message):
    """What comes now is told."""


class Unable(_Message):
    """The environment asks for what cannot be done, which is said in `text`; and the end."""

    text: str


class Done(_Message):
    """What became of so many spans since the last one, each counted for each exporter."""

    exported: int
    queue_full: int
    export_failed: int


FromTeller = Ready | Unable | Done
