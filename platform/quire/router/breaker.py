"""Which replicas get no requests because they fail them: decided here, from how sequences end.

A replica that is not connected or makes no step is out of question already (`engine_client`), and asks to be taken
back by itself. This is about those that look well and fail: that end requests in errors of theirs, or die of them,
come back, and die again. One breaker for each replica, whatever process it has:

    closed   requests go there. It opens after `failures` in a row, or when of at least `requests` in the last
             `window` seconds a `share` has failed.
    open     nothing goes there, for `pause` seconds, twice as many each further time, `longest` at most, a fifth
             more or less by chance, so that not all are tried at one moment.
    trying   the time is over: one sequence goes there, and others as before elsewhere. If it ends well, or brings
             `TRIAL_TOKENS`, the breaker closes; if it fails, it opens again; if its client leaves, another one is
             tried. A new process of the replica is tried at once.

A breaker that stayed closed for as long as it was last open, and for its window, has its first pause again.

**Not all at once.** What fails everywhere is seldom the fault of one. So at most a share `out` of a model's
replicas is kept out, at least one, those that opened first; further ones go on. Only when all of them have opened
there is nobody worth asking: then each is asked only on trial, and requests are refused at once (`Breakers.waits`)
where they would wait for their deadlines.

What counts as a failure: an error that is the engine's (all but `NO_FAILURE`), a connection that broke, once for
all of its sequences, and a stall. Requests that are wrong are no failure, and nor is an end that the engine was
asked for. Times are seconds that never go back.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from quire_schemas import wire

TRIAL_TOKENS: Final = 16
TRIAL_SECONDS: Final = 1.0
"""When to come again, told to those that are refused while a trial goes on."""
JITTER: Final = 0.2
USUAL: Final = wire.BreakerRules()
MOST_KEPT: Final = 4096
"""Ends of sequences that are remembered of one replica."""
NO_FAILURE: Final = frozenset(
    {
        "invalid_request", "no_token_left", "context_length_exceeded", "invalid_grammar", "queue_full", "timeout",
        "engine_shutdown", "engine_died",
    }
)  # fmt: skip
"""Codes of errors that are not the engine's, or that its connection tells once for all of its sequences."""


@dataclass(slots=True)
class Breaker:
    """That of one replica. `chance` gives numbers from 0 to 1."""

    rules: wire.BreakerRules = USUAL
    chance: Callable[[], float] = random.random
    opened_at: float | None = None
    """None while it is closed; kept through trials that fail."""
    until: float = 0.0
    """When the next trial may begin."""
    trial: bool = False
    """One goes on."""
    _pause: float = 0.0
    """The last one."""
    _closed_at: float = 0.0
    _in_a_row: int = 0
    _failed: int = 0
    _ends: deque[tuple[float, bool]] = field(default_factory=deque)

    def state(self, now: float) -> wire.BreakerState:
        if self.opened_at is None:
            return "closed"
        return "trying" if self.trial or now >= self.until else "open"

    def takes(self, now: float) -> bool:
        """Whether a sequence may go there, as far as this replica alone is concerned."""
        return self.opened_at is None or (not self.trial and now >= self.until)

    def begin(self, now: float) -> bool:
        """A sequence goes there; whether it is the trial, whose end is then told as one."""
        if self.opened_at is None or self.trial or now < self.until:
            return False
        self.trial = True
        return True

    def leave(self) -> None:
        """The trial has ended, and told nothing."""
        self.trial = False

    def succeed(self, now: float, *, trial: bool = False) -> bool:
        """A sequence has ended well; whether that closes it. What began before it opened says nothing."""
        if self.opened_at is None:
            self._in_a_row = 0
            self._note(now, failed=False)
            return False
        if not trial:
            return False
        self.opened_at, self.trial, self._closed_at = None, False, now
        return True

    def fail(self, now: float, *, trial: bool = False) -> bool:
        """The replica has failed; whether that opens it, for the first time or again."""
        if self.opened_at is None:
            self._in_a_row += 1
            self._note(now, failed=True)
            many = len(self._ends) >= self.rules.requests and self._failed >= self.rules.share * len(self._ends)
            if self._in_a_row < self.rules.failures and not many:
                return False
            self._open(now)
            return True
        if not trial:
            return False
        self._open(now)
        return True

    def renew(self, now: float) -> None:
        """The replica is another process now."""
        if self.opened_at is not None:
            self.until, self.trial = min(self.until, now), False

    def _open(self, now: float) -> None:
        rules = self.rules
        if self.opened_at is None:
            well = now - self._closed_at >= max(self._pause, rules.window)
            self._pause = 0.0 if well else self._pause
            self.opened_at = now
        self._pause = min(2 * self._pause or rules.pause, rules.longest)
        self.until = now + self._pause * (1 + JITTER * (2 * self.chance() - 1))
        self.trial = False
        self._in_a_row = self._failed = 0
        self._ends.clear()

    def _note(self, now: float, *, failed: bool) -> None:
        self._ends.append((now, failed))
        self._failed += failed
        while now - self._ends[0][0] > self.rules.window or len(self._ends) > MOST_KEPT:
            self._failed -= self._ends.popleft()[1]


def kept_out(before: Collection[str], opened: Mapping[str, float], replicas: int, out: float) -> frozenset[str]:
    """Which of the replicas that have opened, and when, get no requests, where those of `before` got none: all, if
    none of `replicas` is left. Else those that got none and have not closed, and with them at most a share `out`
    of all, at least one, the earliest first."""
    if len(opened) >= replicas:
        return frozenset(opened)
    stay = [name for name in before if name in opened]
    room = max(max(1, int(out * replicas)) - len(stay), 0)
    others = sorted((name for name in opened if name not in stay), key=lambda name: (opened[name], name))
    return frozenset([*stay, *others[:room]])


@dataclass(slots=True)
class Breakers:
    """Those of one model's replicas."""

    rules: wire.BreakerRules = USUAL
    chance: Callable[[], float] = random.random
    _all: dict[str, Breaker] = field(default_factory=dict)
    _serving: frozenset[str] = frozenset()
    _out: frozenset[str] = frozenset()

    def set(self, rules: wire.BreakerRules, replicas: Collection[str], serving: Collection[str]) -> None:
        """Act by these rules, for these replicas. Those of `serving` are there for new requests."""
        self.rules = rules
        self._all = {name: self._all.get(name) or Breaker(chance=self.chance) for name in replicas}
        for breaker in self._all.values():
            breaker.rules = rules
        self._serving = frozenset(serving)
        self._look()

    def of(self, replica: str) -> Breaker:
        """That of a replica; a new one of no effect for one that has left."""
        return self._all.get(replica) or Breaker(self.rules, self.chance)

    def takes(self, replica: str, now: float) -> bool:
        """Whether a sequence may go to a replica."""
        return replica not in self._out or self._all[replica].takes(now)

    def begin(self, replica: str, now: float) -> bool:
        """A sequence goes there; whether it is a trial."""
        return replica in self._out and self._all[replica].begin(now)

    def end(self, replica: str, now: float, ok: bool | None, *, trial: bool = False) -> str:
        """A sequence has ended well, or the replica has failed, or (None) nothing can be told. "opened" or
        "closed" where that changes something, else ""."""
        breaker = self.of(replica)
        if ok is None:
            if trial:
                breaker.leave()
            return ""
        # of one that has opened and is not kept out each sequence is a trial
        trial = trial or replica not in self._out
        changed = breaker.succeed(now, trial=trial) if ok else breaker.fail(now, trial=trial)
        if changed:
            self._look()
        return ("closed" if ok else "opened") if changed else ""

    def waits(self, now: float) -> float | None:
        """Seconds after which somebody may be tried, where all replicas have opened and none takes a sequence now;
        None where it makes sense to ask, or to wait."""
        serving = [self._all[name] for name in self._serving]
        if not serving or any(breaker.opened_at is None or breaker.takes(now) for breaker in serving):
            return None
        return min(TRIAL_SECONDS if breaker.trial else breaker.until - now for breaker in serving)

    def _look(self) -> None:
        opened = {
            name: self._all[name].opened_at or 0.0
            for name in self._serving
            if self._all[name].opened_at is not None
        }
        self._out = kept_out(self._out, opened, len(self._serving), self.rules.out)
