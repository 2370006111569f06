"""What the fleet's observations mean: what an engine said of its start, how it ended, where a row stands."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from quire_operators import rollout
from quire_operators.fleet.local import Life, Observation
from quire_operators.rollout import Cause, Process, Row, Seen
from quire_schemas import wire

log = logging.getLogger(__name__)

REFUSALS = frozenset({2, 78})
"""Exit codes with which a program says that it was told something wrong: a bad argument, a bad configuration."""
SOURCE_REASONS = frozenset({"MissingFile", "NotFound", "Unauthorized", "Forbidden"})
"""Reasons of engines that mean: the files could not be had."""
_events = msgspec.json.Decoder(wire.EngineEvent)


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine said of its start, from its last status lines."""

    event: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    reason: str = ""
    message: str = ""
    retryable: bool = True
    load_seconds: float = 0.0
    backend: str = ""
    backend_lacking: str = ""
    batch_invariant: bool = False


@functools.lru_cache(maxsize=8192)
def read_report(lines: tuple[str, ...]) -> Report:
    """The state that status lines add up to; a line that is not an event is left aside and logged."""
    report = Report()
    for line in lines:
        try:
            event = _events.decode(line)
        except msgspec.MsgspecError:
            log.warning("not an engine event: %.200s", line)
            continue
        report = Report(
            event.event,
            max(report.bytes_done, event.bytes_done),
            max(report.bytes_total, event.bytes_total),
            event.reason,
            event.message,
            event.retryable,
            event.load_seconds,
            event.backend,
            event.backend_lacking,
            event.batch_invariant,
        )
    return report


def report_of(row: Row, observations: Sequence[Observation]) -> Report:
    """What the engine of a row's own incarnation said of its start."""
    return read_report(next((seen.lines for seen in observations if seen.nonce == row.nonce), ()))


def exit_of(seen: Observation) -> rollout.Exit | None:
    """Why an incarnation ended: the engine's own word if it gave one, else how its process ended."""
    report = read_report(seen.lines)
    if seen.ended is None and report.event != "failed":
        return None
    tail = seen.ended.tail if seen.ended is not None else ()
    refused = seen.ended is not None and seen.ended.code in REFUSALS
    if report.event == "failed":
        reason = report.reason or "EngineFailed"
        if reason in SOURCE_REASONS:
            cause = Cause.SOURCE
        elif reason == rollout.OUT_OF_MEMORY:
            cause = Cause.MEMORY
        else:
            cause = Cause.CONFIG if refused or not report.retryable else Cause.UNKNOWN
        return rollout.Exit(reason, report.message, cause, tail)
    text = seen.ended.text() if seen.ended is not None else ""
    if refused:
        return rollout.Exit("ConfigRejected", text, Cause.CONFIG, tail)
    return rollout.Exit("ProcessEnded", text, Cause.UNKNOWN, tail)


def seen_of(row: Row, observations: Sequence[Observation]) -> Seen:
    """The fleet's side of what was seen of a row: its current incarnation, told by the nonce."""
    others = [o for o in observations if o.nonce != row.nonce]
    own = next((o for o in observations if o.incarnation == row.incarnation and o.nonce == row.nonce), None)
    if own is None:
        # Another process of that name: nothing may be started beside it before it is gone.
        return Seen(Process.UNKNOWN if any(o.life is not Life.GONE for o in others) else Process.NONE)
    if own.life is Life.UNKNOWN:
        return Seen(Process.UNKNOWN)
    if own.life is Life.GONE:
        return Seen(Process.EXITED, exit=exit_of(own))
    report = read_report(own.lines)
    ready = report.event == "ready" and own.running
    return Seen(Process.READY if ready else Process.STARTING)
