"""How a model's replicas get from what they are to what was asked for: one pure function, no I/O, no memory.

`plan(desired, world, now)` looks at the rows of the store (what was decided), at what was seen of processes and
router (what is), and returns the steps to take now. It keeps no phase between calls: a crash between any two
steps leaves rows and reality, from which the same function goes on. `after(row, step, now)` says what a step
does to its row; the reconciler writes that to the store *before* it acts, so every side effect has a durable
row that names it.

The budget of a rolling update:

    surge   = min(maxSurge, room + rows - desired)     how many replicas above the count fit on this machine
    floor   = desired - maxUnavailable                 available replicas that no voluntary drain may go below
    ceiling = desired + surge                          rows that may exist

With no surge and `maxUnavailable` 0 nothing could ever move: strategy Auto then takes one replica away first
(the router holds requests meanwhile), RollingUpdate reports that it is blocked. *Available* counts all
revisions and means: the router acknowledged a table with this incarnation, is connected to it, and
`minReadyDuration` passed. So a second change in the middle of a rollout, or a revert, spends from the same
budget.

Destructive steps need positive evidence: no drain is begun and none is ended while the router does not answer
(`Router.UNKNOWN`), and a process that does not answer is UNKNOWN, not gone. A router known not to run (`DOWN`)
holds no requests: drains end at once, but none is begun unless the count is zero.

Alive means progressing. A replica that is ready and whose engine has completed no turn of its loop for
`stall_timeout`, whatever its socket says, is killed and started again; so is one that starts and gets no further
for `startup_timeout`.

Replica states, shown by `state_of`: Pending -> Starting -> Ready -> Draining -> Stopping, and Backoff or Failed
after an unexpected end. What follows an unexpected end depends on its cause:

    CONFIG     another try would repeat it (exit 78, a wrong argument, or the engine says so): Failed at once
    MEMORY     out of memory: a second try, then Failed
    SOURCE     files are missing or may not be read: tried again every `SOURCE_SECONDS`
    UNKNOWN    `backoff_base` doubling to `backoff_max`, 20 % jitter, from the base again after `HEALTHY_SECONDS`

Failed lasts until the intent changes. `not_before` and the counts are in the row, so a restart of the control
plane takes no back-off back.

A revision that fails before it was ever rolled out as a whole (a replica Failed, one ended
`crashes_before_rollback` times, or the progress deadline passed) is given up where there is one to fall back to:
`RollBack` is then the plan's only step. Whoever carries it out remembers the template, so that `Desired` names the
other revision from then on; the way back is a rollout like any other.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

HEALTHY_SECONDS = 600.0
"""After this long available, an unexpected end starts the back-off from its base again."""
BLIP_SECONDS = 10.0
"""A replica that served keeps its place this long when the router's connection to it breaks."""
STOP_AGAIN_SECONDS = 15.0
"""A stop that has shown no effect for this long is sent again."""
SOURCE_SECONDS = 300.0
"""Between two tries of a replica whose files could not be had: a person or a network mends that, not a crash."""
JITTER = 0.2
OUT_OF_MEMORY = "OutOfMemory"
CRASH_LOOP = "CrashLoop"
CONFIG_REJECTED = "ConfigRejected"
PROGRESS_DEADLINE = "ProgressDeadlineExceeded"
STALLED = "EngineStalled"
STARTUP_TIMEOUT = "StartupTimeout"


class Goal(enum.StrEnum):
    """What a row wants of its process."""

    RUN = "run"
    DRAIN = "drain"


class Process(enum.StrEnum):
    """What was seen of a row's process in its current incarnation."""

    NONE = "none"  # nothing carries this identity (positive evidence: its socket is closed or was never made)
    STARTING = "starting"
    READY = "ready"  # the engine said so
    EXITED = "exited"
    UNKNOWN = "unknown"  # something may be there and does not answer

    @property
    def gone(self) -> bool:
        return self in (Process.NONE, Process.EXITED)


class Router(enum.StrEnum):
    """What is known of the router."""

    KNOWN = "known"
    UNKNOWN = "unknown"
    DOWN = "down"


class Strategy(enum.StrEnum):
    AUTO = "Auto"
    ROLLING = "RollingUpdate"
    RECREATE = "Recreate"


class Cause(enum.StrEnum):
    """What kind of end an incarnation came to: it decides whether and when it is tried again."""

    CONFIG = "config"
    MEMORY = "memory"
    SOURCE = "source"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Exit:
    """How an incarnation ended. `reason` is a word, `message` a sentence for people, `lines` its log's last, `at`
    when that was recorded, in unix seconds."""

    reason: str
    message: str
    cause: Cause = Cause.UNKNOWN
    lines: tuple[str, ...] = ()
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One replica as the store keeps it. Times are unix seconds; `memory` is bytes held on its device."""

    id: str
    model: str
    index: int
    revision: int
    template_hash: str
    goal: Goal
    created_at: float
    memory: int = 0
    device: str = "cpu"
    """`cpu`, or `cuda:<index>`."""
    incarnation: int = 0
    """Counts launches; 0 before the first."""
    exited: int = 0
    """The newest incarnation whose end was recorded; equal to `incarnation` when a launch is due."""
    nonce: str = ""
    restarts: int = 0
    not_before: float = 0.0
    launched_at: float = 0.0
    ready_since: float | None = None
    """When the router first acknowledged this incarnation."""
    drain_since: float | None = None
    stop_sent: float | None = None
    failed_generation: int | None = None
    """Set when the replica is Failed: the generation of the intent under which it failed."""
    reason: str = ""
    message: str = ""
    last_exit: Exit | None = None
    """How it last ended unexpectedly; kept while it runs again."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was observed of one row."""

    process: Process = Process.NONE
    progress_at: float = 0.0
    """When the engine last got on with loading."""
    silent_since: float | None = None
    """Since when a ready engine has completed no turn of its loop; None while it answers."""
    exit: Exit | None = None
    connected: bool = False
    """The router has this incarnation in its table, draining or not, and is connected to it."""
    routed: bool = False
    """Connected, and the acknowledged table gives it new requests, or has it stand by: then it is the moment's
    tokenizer that keeps requests from it, and it serves as soon as the replicas of the other one leave."""
    released: bool = True
    """The router acknowledged a table that gives it no new requests."""
    in_flight: int = 0
    hot_hash: str | None = None
    unready_since: float | None = None
    """Since when a replica that had been routed is not."""
    failing: bool = False
    """The router gives it no requests, or one on trial, because it failed those it had."""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A live process that no row accounts for: a leftover of a launch that was given up, or of a lost store."""

    id: str
    incarnation: int
    nonce: str
    seen_at: float
    released: bool = True
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Desired:
    """The intent for one model, all numbers resolved; durations in seconds."""

    model: str
    generation: int
    revision: int
    template_hash: str
    replicas: int
    deleting: bool = False
    strategy: Strategy = Strategy.AUTO
    max_surge: int = 1
    max_unavailable: int = 0
    min_ready: float = 0.0
    drain_timeout: float = 30.0
    startup_timeout: float = 1800.0
    stall_timeout: float = 30.0
    backoff_base: float = 1.0
    backoff_max: float = 300.0
    hot_hash: str = ""
    held: bool = False
    """No replica takes the place of one of another template, or of an older one. Their number is brought about."""
    restarted_at: float = 0.0
    """Replicas that were created before this are not current, whatever their template."""
    proven: bool = False
    """This revision was rolled out as a whole before."""
    fallback: int | None = None
    """The revision to go back to if this one fails; None when there is none, or going back is not wanted."""
    crashes_before_rollback: int = 3
    quarantined: str = ""
    """The template that was given up: none of its replicas is started again."""


@dataclass(frozen=True, slots=True)
class World:
    """Everything the planner may know besides the intent."""

    replicas: tuple[tuple[Row, Seen], ...]
    room: int
    """How many more replicas of the wanted revision fit on this machine now."""
    router: Router = Router.KNOWN
    orphans: tuple[Orphan, ...] = ()
    jitter: float = 0.0
    """Between -1 and 1, drawn by the caller; times 20 % of a back-off."""
    late: bool = False
    """Nothing of the rollout has moved until its deadline."""


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Create:
    """Write a row: it takes its memory from the machine."""

    replica: str
    index: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Start the next incarnation of a row."""

    replica: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Give it no new requests; it leaves when idle."""

    replica: str
    because: str


@dataclass(frozen=True, slots=True)
class Undrain:
    """Take a drain back: the replica is needed after all."""

    replica: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process through its shim."""

    replica: str
    incarnation: int
    because: str


@dataclass(frozen=True, slots=True)
class StopOrphan:
    """End a process that no row accounts for."""

    replica: str
    incarnation: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Backoff:
    """Record an unexpected end that is worth another try at `not_before`."""

    replica: str
    not_before: float
    restarts: int
    exit: Exit


@dataclass(frozen=True, slots=True)
class Fail:
    """Record an end that another try would repeat."""

    replica: str
    generation: int
    exit: Exit


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove the row of a process that is gone."""

    replica: str


@dataclass(frozen=True, slots=True)
class PushLimits:
    """Send the hot knobs to running engines that report another hash."""

    replicas: tuple[str, ...]
    hot_hash: str


@dataclass(frozen=True, slots=True)
class RollBack:
    """Give a revision up: its template is not started again, and another revision is to serve."""

    revision: int
    template_hash: str
    to: int
    reason: str
    message: str


Step = Create | Launch | Drain | Undrain | Stop | StopOrphan | Backoff | Fail | Forget | PushLimits | RollBack
RowStep = Launch | Drain | Undrain | Stop | Backoff | Fail


@dataclass(frozen=True, slots=True)
class Budget:
    """What a rollout may do at this moment."""

    strategy: Strategy
    want: int
    surge: int
    unavailable: int
    floor: int
    ceiling: int
    stop_first: bool
    """Auto took one replica away first because nothing more fits."""


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """Steps to take now, in order; when to look again at the latest; what stands in the way, if anything does."""

    steps: tuple[Step, ...]
    requeue_at: float | None
    budget: Budget
    available: int
    no_room: bool
    """A replica is missing and does not fit, and nothing of this model is about to make room."""


def budget(desired: Desired, rows: int, room: int) -> Budget:
    """The budget of the module's docstring, for `rows` existing rows and `room` more that fit."""
    want = 0 if desired.deleting else desired.replicas
    if desired.strategy is Strategy.RECREATE:
        return Budget(desired.strategy, want, 0, want, 0, want, False)
    surge = max(0, min(desired.max_surge, room + rows - want))
    unavailable = desired.max_unavailable
    stop_first = surge == 0 and unavailable == 0 and want > 0 and desired.strategy is Strategy.AUTO
    if stop_first:
        unavailable = 1
    return Budget(desired.strategy, want, surge, unavailable, max(want - unavailable, 0), want + surge, stop_first)


def is_current(desired: Desired, row: Row) -> bool:
    """Whether a replica is what is wanted now: of the template, and not older than the last restart."""
    return row.template_hash == desired.template_hash and row.created_at >= desired.restarted_at


def is_available(desired: Desired, row: Row, seen: Seen, now: float) -> bool:
    """Whether a request sent now may be answered by this replica, for long enough to count on it."""
    return (
        row.goal is Goal.RUN
        and seen.routed
        and not seen.process.gone
        and row.ready_since is not None
        and now - row.ready_since >= desired.min_ready
    )


def is_settled(desired: Desired, world: World, now: float) -> bool:
    """Whether every live replica is of the wanted revision, available, and their count is right."""
    want = 0 if desired.deleting else desired.replicas
    return (
        len(world.replicas) == want
        and not world.orphans
        and all(is_current(desired, row) and is_available(desired, row, seen, now) for row, seen in world.replicas)
    )


def lags(desired: Desired, world: World, now: float) -> bool:
    """Whether the rollout waits for a replica of its own that does not serve. Waiting for room, for a turn to
    start, for a router that does not answer, for `minReadyDuration` or for old streams to end is no failure of
    what is rolled out.
    """
    return world.router is Router.KNOWN and any(
        row.goal is Goal.RUN
        and is_current(desired, row)
        and not (seen.process is Process.READY and seen.routed)
        and not (row.exited == row.incarnation and row.failed_generation is None and now >= row.not_before)
        for row, seen in world.replicas
    )


def state_of(row: Row, seen: Seen) -> str:
    """The state of a replica for people."""
    if row.failed_generation is not None:
        return "Failed"
    if row.stop_sent is not None and not seen.process.gone:
        return "Stopping"
    if row.goal is Goal.DRAIN:
        return "Stopping" if seen.process.gone else "Draining"
    if row.exited == row.incarnation:
        return "Backoff" if row.reason else "Pending"
    if seen.process.gone:
        return "Backoff"
    return "Ready" if seen.routed and row.ready_since is not None else "Starting"


def plan(desired: Desired, world: World, now: float) -> RolloutPlan:
    """The steps that bring `world` nearer to `desired`; none when it is there."""
    return _Planner(desired, world, now).run()


def failure(desired: Desired, world: World, now: float) -> tuple[str, str] | None:
    """Why the revision is not worth another try, whether or not it is given up: a reason and a sentence."""
    return _Planner(desired, world, now).failure()


class _Planner:
    """One pass. The lists shrink and grow as steps are decided, so that later steps see earlier ones."""

    def __init__(self, desired: Desired, world: World, now: float) -> None:
        self.desired, self.world, self.now = desired, world, now
        self.steps: list[Step] = []
        self.wake: list[float] = []
        self.seen = {row.id: seen for row, seen in world.replicas}
        self.rows = {row.id: row for row, _ in world.replicas}
        self.budget = budget(desired, len(self.rows), world.room)
        self.recreate = desired.strategy is Strategy.RECREATE
        self.can_drain = world.router is Router.KNOWN or (world.router is Router.DOWN and self.budget.want == 0)
        self.held = desired.held and not desired.deleting
        self.can_finish = world.router is not Router.UNKNOWN
        self.no_room = False

    def run(self) -> RolloutPlan:
        if (given_up := self.roll_back()) is not None:
            return RolloutPlan((given_up,), None, self.budget, self.available(), no_room=False)
        self.stop_orphans()
        self.stop_stalled()
        self.record_ends()
        self.finish_drains()
        if self.can_drain:
            self.take_back_drains()
            self.begin_drains()
        self.create()
        self.launch()
        self.push_limits()
        later = [at for at in self.wake if at > self.now]
        return RolloutPlan(
            tuple(self.steps), min(later, default=None), self.budget, self.available(), self.no_room
        )

    # ── small questions ───────────────────────────────────────────────────────────────────────────────────

    def is_current(self, row: Row) -> bool:
        return is_current(self.desired, row)

    def is_available(self, row: Row) -> bool:
        return is_available(self.desired, row, self.seen[row.id], self.now)

    def available(self) -> int:
        return sum(self.is_available(row) for row in self.rows.values())

    def is_blinking(self, row: Row) -> bool:
        """It served, its process says it is ready, and the router lost it or has not yet taken it back."""
        seen = self.seen[row.id]
        return (
            row.goal is Goal.RUN
            and not self.is_available(row)
            and seen.process in (Process.READY, Process.UNKNOWN)
            and row.ready_since is not None
            and now_or(seen.unready_since, self.now) + BLIP_SECONDS > self.now
        )

    def runs(self) -> Iterable[Row]:
        return (row for row in list(self.rows.values()) if row.goal is Goal.RUN)

    def do(self, step: RowStep) -> None:
        self.steps.append(step)
        self.rows[step.replica] = after(self.rows[step.replica], step, self.now)

    # ── the passes ────────────────────────────────────────────────────────────────────────────────────────

    def roll_back(self) -> RollBack | None:
        """The end of a revision that failed before it was rolled out, if there is one to go back to."""
        desired = self.desired
        if desired.fallback is None or desired.proven or self.held or self.budget.want == 0:
            return None
        failure = self.failure()
        if failure is None:
            return None
        return RollBack(desired.revision, desired.template_hash, desired.fallback, *failure)

    def failure(self) -> tuple[str, str] | None:
        """Why the revision is not worth another try: a reason and a sentence."""
        for row in self.runs():
            if not self.is_current(row):
                continue
            if row.failed_generation == self.desired.generation:
                reason = OUT_OF_MEMORY if row.reason == OUT_OF_MEMORY else CONFIG_REJECTED
                return reason, f"{row.id}: {row.reason}: {row.message}"
            if row.restarts >= self.desired.crashes_before_rollback and not self.seen[row.id].routed:
                said = f": {row.last_exit.message}" if row.last_exit is not None else ""
                return CRASH_LOOP, f"{row.id} ended {row.restarts} times{said}"
        if self.world.late and lags(self.desired, self.world, self.now):
            return PROGRESS_DEADLINE, "its replicas made no progress for rollout.progressDeadline"
        return None

    def stop_orphans(self) -> None:
        for orphan in self.world.orphans:
            deadline = orphan.seen_at + self.desired.drain_timeout
            if self.can_finish and orphan.released and (orphan.in_flight == 0 or self.now >= deadline):
                self.steps.append(StopOrphan(orphan.id, orphan.incarnation, orphan.nonce))
                self.wake.append(self.now + STOP_AGAIN_SECONDS)
            else:
                self.wake.append(deadline)

    def stop_stalled(self) -> None:
        """Engines that no longer get on, draining ones too: what they still have to say, they never will."""
        for row in list(self.rows.values()):
            seen = self.seen[row.id]
            if seen.process is not Process.READY or seen.silent_since is None or row.stop_sent is not None:
                continue
            deadline = seen.silent_since + self.desired.stall_timeout
            self.wake.append(deadline)
            if self.now >= deadline:
                self.do(Stop(row.id, row.incarnation, STALLED))

    def record_ends(self) -> None:
        """Unexpected ends of rows that should run, and starts that no longer get on."""
        for row in self.runs():
            seen = self.seen[row.id]
            if seen.process is Process.STARTING and row.stop_sent is None:
                deadline = max(seen.progress_at, row.launched_at) + self.desired.startup_timeout
                self.wake.append(deadline)
                if self.now >= deadline:
                    self.do(Stop(row.id, row.incarnation, STARTUP_TIMEOUT))
            if row.stop_sent is not None and not seen.process.gone:
                self.wake.append(row.stop_sent + STOP_AGAIN_SECONDS)
                if self.now >= row.stop_sent + STOP_AGAIN_SECONDS:
                    self.do(Stop(row.id, row.incarnation, row.reason))
            if not seen.process.gone or row.exited == row.incarnation:
                continue
            self.record_end(row, seen)

    def record_end(self, row: Row, seen: Seen) -> None:
        exit_ = seen.exit or Exit("ProcessLost", "its process and its shim are gone without a record")
        if row.stop_sent is not None and row.reason == STALLED:
            text = f"no step and no sign of life for {self.desired.stall_timeout:g} s; it was killed"
            exit_ = Exit(row.reason, text, lines=exit_.lines)
        elif row.stop_sent is not None and row.reason:
            text = f"no progress in loading for {self.desired.startup_timeout:g} s; it was killed"
            exit_ = Exit(row.reason, text, lines=exit_.lines)
        healthy = row.ready_since is not None and self.now - row.ready_since >= HEALTHY_SECONDS
        restarts = 0 if healthy else row.restarts
        before = None if healthy or row.last_exit is None else row.last_exit.cause
        if exit_.cause is Cause.CONFIG or (exit_.cause is Cause.MEMORY and before is Cause.MEMORY):
            self.do(Fail(row.id, self.desired.generation, exit_))
            return
        delay = min(self.desired.backoff_base * 2.0 ** min(restarts, 30), self.desired.backoff_max)
        if exit_.cause is Cause.SOURCE:
            delay = SOURCE_SECONDS
        delay *= 1 + JITTER * self.world.jitter
        self.do(Backoff(row.id, self.now + delay, restarts + 1, exit_))

    def finish_drains(self) -> None:
        for row in list(self.rows.values()):
            seen = self.seen[row.id]
            stale_failure = row.failed_generation is not None and (
                row.failed_generation != self.desired.generation
                or not self.is_current(row)
                or self.budget.want == 0
            )
            if seen.process.gone and (row.goal is Goal.DRAIN or stale_failure):
                self.steps.append(Forget(row.id))
                del self.rows[row.id]
            elif row.goal is Goal.DRAIN:
                deadline = now_or(row.drain_since, self.now) + self.desired.drain_timeout
                idle = seen.in_flight == 0
                unused = seen.released and (idle or self.now >= deadline)
                if row.stop_sent is not None:
                    # a router that was down when it was first stopped may have come back with a table of before:
                    # what it has sent there since is not cut off
                    again = row.stop_sent + STOP_AGAIN_SECONDS
                    self.wake += (again, deadline)
                    if self.now >= again and (unused or row.reason not in ("Drained", "DrainTimeout")):
                        self.do(Stop(row.id, row.incarnation, row.reason))
                elif self.can_finish and unused:
                    self.do(Stop(row.id, row.incarnation, "Drained" if idle else "DrainTimeout"))
                    self.wake.append(self.now + STOP_AGAIN_SECONDS)
                else:
                    self.wake.append(deadline)

    def take_back_drains(self) -> None:
        def candidates(current: bool) -> list[Row]:
            return sorted(
                (
                    row
                    for row in self.rows.values()
                    if row.goal is Goal.DRAIN
                    and row.stop_sent is None
                    and self.is_current(row) is current
                    and self.seen[row.id].connected
                    and self.seen[row.id].process is Process.READY
                ),
                key=lambda row: row.index,
            )

        missing = self.budget.want - sum(self.is_current(row) for row in self.runs())
        for row in candidates(current=True):
            if missing > 0:
                self.do(Undrain(row.id))
                missing -= 1
        if self.held:
            lacking = self.budget.want - sum(1 for _ in self.runs())
            for row in candidates(current=False)[: max(lacking, 0)]:
                self.do(Undrain(row.id))
        if self.recreate:
            return
        short = self.budget.floor - self.available() - sum(self.is_blinking(row) for row in self.runs())
        for row in candidates(current=False):
            if short > 0:
                self.do(Undrain(row.id))
                short -= 1

    def begin_drains(self) -> None:
        """Old revisions, and current ones above the count: those that do not serve first."""
        current = sorted(
            (row for row in self.runs() if self.is_current(row)),
            key=lambda row: (
                row.failed_generation is not None,
                not self.is_available(row),
                not self.is_blinking(row),
                row.index,
            ),
        )
        surplus = [row for row in self.runs() if not self.is_current(row)]
        surplus += reversed(current[self.budget.want :])
        if self.held:
            surplus = surplus[: self.beyond_hold()]
        available = self.available()
        for row in sorted(surplus, key=self.is_available):
            because = "Surplus" if self.is_current(row) else "Superseded"
            if self.is_available(row):
                if self.recreate or available - 1 >= self.budget.floor:
                    available -= 1
                    self.do(Drain(row.id, because))
            elif self.budget.want == 0 or self.recreate or not self.is_blinking(row):
                self.do(Drain(row.id, because))

    def is_mixed(self) -> bool:
        """Whether a rollout has begun and not ended."""
        return len({self.is_current(row) for row in self.runs()}) == 2

    def beyond_hold(self) -> int:
        """Replicas that may be taken away while rollouts are paused: those above the number; in the middle of a
        rollout, where both kinds serve, those above what it may have at most."""
        want = self.budget.want
        most = want + self.desired.max_surge if self.is_mixed() and want else want
        return max(sum(1 for _ in self.runs()) - most, 0)

    def create(self) -> None:
        current = sum(self.is_current(row) for row in self.runs())
        missing = self.budget.want - current
        if missing <= 0:
            return
        others = [row for row in self.rows.values() if not (row.goal is Goal.RUN and self.is_current(row))]
        if self.recreate and others:
            return
        if self.held and not all(self.is_current(row) for row in self.runs()):
            return  # a replica that is added would be a step of the rollout
        room = self.world.room
        number = min(missing, self.budget.ceiling - len(self.rows), room)
        leaving = any(row.goal is Goal.DRAIN for row in others) or any(
            isinstance(step, Forget) for step in self.steps
        )
        self.no_room = room == 0 and not leaving
        taken = {row.id for row, _ in self.world.replicas} | {orphan.id for orphan in self.world.orphans}
        index = 0
        for _ in range(max(number, 0)):
            while (name := f"{self.desired.model}-r{self.desired.revision}-{index}") in taken:
                index += 1
            taken.add(name)
            self.steps.append(Create(name, index))

    def launch(self) -> None:
        for row in self.runs():
            due = row.exited == row.incarnation and row.failed_generation is None
            due = due and row.template_hash != self.desired.quarantined
            if not due or not self.seen[row.id].process.gone:
                continue
            if self.now >= row.not_before:
                self.do(Launch(row.id, row.incarnation + 1))
            else:
                self.wake.append(row.not_before)

    def push_limits(self) -> None:
        behind = tuple(
            row.id
            for row in self.rows.values()
            if self.is_current(row)
            and self.seen[row.id].connected
            and self.seen[row.id].hot_hash not in (None, self.desired.hot_hash)
        )
        if behind:
            self.steps.append(PushLimits(behind, self.desired.hot_hash))
            self.wake.append(self.now + 1.0)
        for row in self.runs():
            if row.ready_since is not None:
                self.wake.append(row.ready_since + self.desired.min_ready)
            if (since := self.seen[row.id].unready_since) is not None:
                self.wake.append(since + BLIP_SECONDS)


def now_or(value: float | None, now: float) -> float:
    return now if value is None else value


def after(row: Row, step: RowStep, now: float) -> Row:
    """The row once `step` was decided; written before the side effect. A launch's nonce is the caller's."""
    match step:
        case Launch():
            return replace(
                row,
                incarnation=step.incarnation,
                launched_at=now,
                ready_since=None,
                stop_sent=None,
                reason="",
                message="",
            )
        case Drain():
            return replace(row, goal=Goal.DRAIN, drain_since=now, reason=step.because, message="")
        case Undrain():
            return replace(row, goal=Goal.RUN, drain_since=None, reason="", message="")
        case Stop():
            return replace(row, stop_sent=now, reason=step.because)
        case Backoff():
            return replace(
                row,
                exited=row.incarnation,
                ready_since=None,
                stop_sent=None,
                restarts=step.restarts,
                not_before=step.not_before,
                reason=step.exit.reason,
                message=step.exit.message,
                last_exit=replace(step.exit, at=now),
            )
        case Fail():
            return replace(
                row,
                exited=row.incarnation,
                ready_since=None,
                stop_sent=None,
                restarts=row.restarts + 1,
                failed_generation=step.generation,
                reason=step.exit.reason,
                message=step.exit.message,
                last_exit=replace(step.exit, at=now),
            )
