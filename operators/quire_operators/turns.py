"""Whose turn it is to start on a GPU: one engine after another, and none before the memory it was given is there.

Two engines that load at once share one bus and are both late, and while one loads, its memory cannot be told from
that of strangers: what the second would find is anybody's guess. So the next one waits until the first is ready,
or has come no further for `TURN_SECONDS`. Then the device is asked: an engine whose memory is still held by a
process that has not quite ended, or by a stranger, waits for it and says so, instead of failing for want of it.
After `MEMORY_SECONDS` it tries all the same: a plan is an upper bound, and what is really lacking it tells best.

Main memory needs none of this: a replica's share of it is a promise of the manifests, and not what happens to be
free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quire_operators.devices import Inventory
from quire_operators.rollout import Goal, Process, Row
from quire_schemas.quantities import format_bytes

TURN_SECONDS = 60.0
"""A start that has come no further for so long holds nobody up any more."""
MEMORY_SECONDS = 60.0
"""So long an engine waits for the memory that it was given."""
READING_SECONDS = 2.0
"""What is known of a device's memory may be this old: whoever became ready since may not be in it."""
QUEUE_SECONDS = 3.0
"""Who has not asked again for so long does not wait any more."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another replica on the device. `progress_at` is when it last got on, or became ready; `priority` that of its
    model."""

    row: Row
    process: Process
    progress_at: float
    priority: int = 0

    def is_starting(self, now: float) -> bool:
        """Whether it takes memory now, or has so lately that a reading may not show it."""
        if self.row.incarnation <= self.row.exited or self.process is Process.EXITED:
            return False
        since = now - max(self.progress_at, self.row.launched_at)
        return since < (READING_SECONDS if self.process is Process.READY else TURN_SECONDS)

    def is_due(self, now: float) -> bool:
        """Whether it was to start a moment ago, or is to in a moment: after a reboot all are, in no order."""
        row = self.row
        waits = row.goal is Goal.RUN and row.exited == row.incarnation and row.failed_generation is None
        return waits and abs(now - max(row.not_before, row.created_at)) < QUEUE_SECONDS


class Turns:
    """Remembers who waits, so that the one of the highest priority comes next. Times are unix seconds."""

    def __init__(self) -> None:
        self._queue: dict[str, tuple[str, int, float]] = {}
        """By replica: its device, its priority, and when it last asked."""
        self._lacking: dict[tuple[str, int], float] = {}
        """By replica and the launch before: since when it waits for memory."""

    def bar(
        self, row: Row, priority: int, neighbours: Iterable[Neighbour], inventory: Inventory, now: float
    ) -> str | None:
        """Why a replica may not start now; None if it may, and it is its turn from then on.

        A device that is not in the inventory is no reason: the engine says best what has become of it.
        """
        if row.device == "cpu":
            return None
        self._queue = {name: each for name, each in self._queue.items() if now - each[2] < QUEUE_SECONDS}
        self._lacking = {each: at for each, at in self._lacking.items() if now - at < 2 * MEMORY_SECONDS}
        self._queue[row.id] = (row.device, priority, now)
        beside = [other for other in neighbours if other.row.device == row.device]
        before = [other.row.id for other in beside if other.is_starting(now)]
        if before:
            return f"starts on {row.device} after {before[0]}"
        free = next((gpu.available for gpu in inventory.gpus if f"cuda:{gpu.index}" == row.device), row.memory)
        since = self._lacking.setdefault((row.id, row.incarnation), now)
        if free >= row.memory:
            del self._lacking[row.id, row.incarnation]
        elif now - since < MEMORY_SECONDS:
            del self._queue[row.id]  # it takes nobody's turn while it cannot use its own
            return f"{row.device} has {format_bytes(free)} free of the {format_bytes(row.memory)} it is to have"
        ahead = [
            name for name, (device, rank, _) in self._queue.items() if device == row.device and rank > priority
        ]
        ahead += [other.row.id for other in beside if other.priority > priority and other.is_due(now)]
        if ahead:
            return f"starts on {row.device} after {ahead[0]}, which has priority"
        del self._queue[row.id]
        return None
