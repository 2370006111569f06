"""Where the time of a sequence went, by what its engine told of it.

Engines send `wire.Timings` with the first token and with the end. A sequence that never got that far (its engine
died, the client left while it waited) is one `attempt` with its two ends.

**Clocks.** Engines report monotonic times, as the router does. On one machine that is the same clock, whatever the
process (CLOCK_MONOTONIC counts from the boot); `engine_offset` finds out whether it is, and otherwise how far the
engine's clock is off, as exactly as two messages can tell.
"""

from __future__ import annotations

from collections.abc import Iterable

from quire_schemas import signals
from quire_schemas.telling import Attributes, Event, Phase, Sequence
from quire_schemas.wire import Timings


def engine_offset(timings: Timings, sent_at: float, heard_at: float) -> float:
    """Seconds to add to an engine's times to have them on the router's clock.

    The engine can have received nothing before it was sent, and told nothing after it was heard. If its times fit
    between the two as they are, the clocks are one. Otherwise the middle of what is possible is off by at most
    half of the time that the two messages took.
    """
    low = sent_at - timings.received_at
    last = timings.finished_at or timings.first_token_at or timings.received_at
    high = heard_at - last
    return 0.0 if low <= 0.0 <= high else (low + high) / 2


def phases_of(told: Sequence) -> list[Phase]:
    """The phases of one attempt at a sequence: queue, prefill and decode, or the attempt as a whole."""
    timings = told.timings
    if timings is None or timings.scheduled_at is None or timings.first_token_at is None:
        return [Phase(signals.SPAN_ATTEMPT, told.sent_at, told.heard_at, told.where)]
    offset = engine_offset(timings, told.sent_at, told.heard_at)

    def here(at: float) -> float:
        return min(max(at + offset, told.sent_at), told.heard_at)

    received, scheduled = here(timings.received_at), here(timings.scheduled_at)
    first = here(timings.first_token_at)
    finished = here(timings.finished_at) if timings.finished_at is not None else told.heard_at
    preempted = [Event(signals.EVENT_PREEMPTED, here(at), {}) for at in timings.preempted_at]
    return [
        Phase(signals.SPAN_QUEUE, received, scheduled, told.where),
        Phase(
            signals.SPAN_PREFILL,
            scheduled,
            first,
            {**told.where, signals.QUIRE_TOKENS: told.prompt_tokens},
            [event for event in preempted if event.at < first],
        ),
        Phase(
            signals.SPAN_DECODE,
            first,
            finished,
            {**told.where, signals.QUIRE_TOKENS: told.generated},
            [event for event in preempted if event.at >= first],
        ),
    ]


def longest(sequences: Iterable[list[Phase]]) -> Attributes:
    """Of the phases of all of a request's sequences, the longest times in the engine, as attributes."""
    found: dict[str, float] = {}
    for phases in sequences:
        if len(phases) < 3:
            continue
        queue, prefill, decode = phases
        for name, seconds in (
            (signals.GEN_AI_TIME_IN_QUEUE, queue.end - queue.start),
            (signals.GEN_AI_TIME_IN_PREFILL, prefill.end - prefill.start),
            (signals.GEN_AI_TIME_IN_DECODE, decode.end - decode.start),
            (signals.GEN_AI_TIME_IN_INFERENCE, decode.end - prefill.start),
        ):
            found[name] = max(seconds, found.get(name, 0.0))
    return found
