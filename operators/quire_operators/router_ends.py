"""Routers that end and were not told to: an event for each, and whether it is one end after the other.

What was told is a note in the store. So those that end while there is no control plane are told of too, and none
is twice.
"""

from __future__ import annotations

from collections.abc import Callable

from quire_operators.fleet.local import Ended, Life, Observation
from quire_operators.store import Store
from quire_schemas import wire
from quire_schemas.resource import Key

NOTE = "router"
WORKERS_NOTE = "router workers"
MANY = 10
"""Restarts that are told apart."""
LOOP_ENDS = 3
LOOP_SECONDS = 60.0
"""A router that ends so often within this time is in a loop, whatever it does in between."""


class RouterEnds:
    """Of the router of the gateway `key`. `clock` as the store's."""

    def __init__(self, store: Store, key: Key, clock: Callable[[], float]) -> None:
        self._store = store
        self._key = key
        self._clock = clock

    def look(self, seen: Observation | None, gone: Observation | None) -> None:
        """Tell of ends that are new: of the router whose shim lives, or may; else `gone` is its last one."""
        told = self._store.note(NOTE)
        if seen is None:
            if gone is not None and gone.ended is None and told.get("nonce") == gone.nonce:
                text = f"the router and its shim (incarnation {gone.incarnation}) are gone without a record"
                self._store.add_event(self._key, "Warning", "RouterLost", text)
                self._store.set_note(NOTE, {"listen": told.get("listen")})
            return
        if seen.life is Life.UNKNOWN:
            return
        same, known = told.get("nonce") == seen.nonce, seen.starts - seen.running
        # a note of a version before counts starts
        before = told["told"] if "told" in told else told.get("starts", 1) - 1
        ends = known - (before if same else 0)
        if seen.stopping and seen.ended is not None and seen.ended.asked:
            ends = 0  # it was told to
        at = list(told.get("ends", ())) if same and told.get("labels") == dict(seen.labels) else []
        if ends > 0:
            how = seen.ended.text() if seen.ended is not None else "for an unknown cause"
            often = "" if ends == 1 else f" {ends} times, the last time"
            text = f"the router ended{often}: {how}; {_follows(seen, known)}"
            self._store.add_event(self._key, "Warning", "RouterEnded", text)
            if seen.ended is None or not error_of(seen.ended):
                # one for a look: nobody knows when the others were that nobody saw
                at = [*at, self._clock()][-LOOP_ENDS:]
        now = {
            "nonce": seen.nonce,
            "told": known,
            "listen": list(seen.listen) if seen.listen else None,
            "labels": dict(seen.labels),
            "ends": at,
        }
        if now != told:
            self._store.set_note(NOTE, now)

    def look_at_workers(self, status: wire.RouterStatus) -> None:
        """Tell of ends of the router's workers that are new, by what its head says."""
        told = self._store.note(WORKERS_NOTE)
        last = told["number"] if told.get("pid") == status.pid else 0
        for end in status.worker_ends:
            if end.number <= last:
                continue
            text = f"worker {end.worker} of the router ended: {_how(end)}; {restarts(end.restarts, end.pause)}"
            self._store.add_event(self._key, "Warning", "WorkerEnded", text)
        now = {"pid": status.pid, "number": max((end.number for end in status.worker_ends), default=last)}
        if now["number"] != last:
            self._store.set_note(WORKERS_NOTE, now)

    def listened_on(self) -> tuple[str, int] | None:
        """Where the last router was."""
        last = self._store.note(NOTE).get("listen")
        return None if last is None else (last[0], int(last[1]))

    def loop_left(self) -> float:
        """For how many seconds it still counts as one that ends again and again; 0 if it does not. One that says
        why it ends is a failure of its own, and not counted."""
        ends = self._store.note(NOTE).get("ends", ())
        if len(ends) < LOOP_ENDS or ends[-1] - ends[-LOOP_ENDS] > LOOP_SECONDS:
            return 0.0
        return float(max(ends[-1] + LOOP_SECONDS - self._clock(), 0.0))


def _how(end: wire.WorkerEnd) -> str:
    if end.code is None:
        return end.because
    code, killer = (end.code, None) if end.code >= 0 else (None, -end.code)
    how = Ended(code, killer, asked=False).text()
    return f"{how}, as {end.because}" if end.because else how


def restarts(number: int, pause: float) -> str:
    """What follows an end. Of very many one sentence, so that they are one event, which is counted."""
    if number > MANY:
        return f"it is started again, for the {MANY + 1}th time or more, after the longest pause"
    return f"restart {number} follows in {pause:.2g} s"


def _follows(seen: Observation, number: int) -> str:
    pause = seen.ended.pause if seen.ended is not None else None
    if seen.running:
        return f"its shim started it again (restart {number})" if number <= MANY else "its shim started it again"
    return "it is not started again" if pause is None else restarts(number, pause)


def error_of(ended: Ended) -> str:
    """What a router said of why it ended; "" if it did not."""
    said = next((line for line in reversed(ended.tail) if line.startswith("error: ")), "")
    return said.removeprefix("error: ")


def said(ended: Ended) -> str:
    """Why it ended, by its own word if it gave one."""
    return error_of(ended) or ended.text()
