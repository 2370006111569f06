"""The rollout planner: cases by hand, and a state machine over a world of processes, memory and a router.

The invariants are those of the design's list (I1 to I8). The machine is biased towards half-finished rollouts,
because that is where published controllers broke; mutants modelled on such bugs show that it would notice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.effort import EFFORT, times

from quire_operators import rollout
from quire_operators.rollout import (
    Backoff,
    Cause,
    Create,
    Desired,
    Drain,
    Exit,
    Fail,
    Forget,
    Goal,
    Launch,
    Orphan,
    Process,
    PushLimits,
    RollBack,
    Router,
    Row,
    Seen,
    Step,
    Stop,
    StopOrphan,
    Strategy,
    Undrain,
    World,
    after,
    is_available,
    plan,
    state_of,
)

CRASHES, HOPELESS, GOOD, BETTER = "crashes", "hopeless", "good", "better"


# ── a world ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Running:
    template: str
    ready: bool = False
    in_flight: int = 0


@dataclass
class Simulation:
    """Rows, processes and a router; `capacity` replicas fit, those of `neighbours` among them. Carries out steps
    and checks each as it is done.
    """

    capacity: int = 3
    neighbours: list[Simulation] = field(default_factory=list)
    desired: Desired = field(default_factory=lambda: Desired("m", 1, 1, GOOD, 1, hot_hash="h1"))
    now: float = 1000.0
    rows: dict[str, Row] = field(default_factory=dict)
    processes: dict[tuple[str, int], Running] = field(default_factory=dict)
    exits: dict[tuple[str, int], Exit] = field(default_factory=dict)
    table: dict[tuple[str, int], bool] = field(default_factory=dict)
    """What the router acknowledged: (id, incarnation) -> draining."""
    router: Router = Router.KNOWN
    lost: dict[str, float] = field(default_factory=dict)
    lives: dict[str, int] = field(default_factory=dict)
    # what `desired.effective` makes of the store, worked out apart from it
    auto_rollback: bool = False
    newest: tuple[str, int] = (GOOD, 1)
    """Template and revision of the intent."""
    stable: list[tuple[str, int]] = field(default_factory=list)
    quarantined: str = ""
    late: bool = False

    # ── what is seen ──────────────────────────────────────────────────────────────────────────────────────

    def seen(self, row: Row) -> Seen:
        name = (row.id, row.incarnation)
        running = self.processes.get(name)
        if running is not None:
            process = Process.READY if running.ready else Process.STARTING
        else:
            process = Process.EXITED if name in self.exits else Process.NONE
        if self.router is Router.DOWN:
            return Seen(process, exit=self.exits.get(name))
        if self.router is Router.UNKNOWN:
            return Seen(process, exit=self.exits.get(name), released=False)
        connected = name in self.table and running is not None and running.ready
        routed = connected and not self.table[name]
        if routed:
            self.lost.pop(row.id, None)
        elif row.ready_since is not None:
            self.lost.setdefault(row.id, self.now)
        return Seen(
            process,
            progress_at=row.launched_at,
            exit=self.exits.get(name),
            connected=connected,
            routed=routed,
            released=self.table.get(name, True),
            in_flight=running.in_flight if running is not None else 0,
            hot_hash=self.desired.hot_hash if connected else None,
            unready_since=self.lost.get(row.id),
        )

    def holding(self) -> int:
        return sum(row.failed_generation is None for row in self.rows.values())

    def world(self) -> World:
        if self.router is Router.DOWN:  # its end cut its streams off
            for running in self.processes.values():
                running.in_flight = 0
        for row in list(self.rows.values()):
            if self.seen(row).routed and row.ready_since is None and row.goal is Goal.RUN:
                self.rows[row.id] = replace(row, ready_since=self.now)
        pairs = tuple((row, self.seen(row)) for row in self.rows.values())
        return World(pairs, room=max(self.own_capacity() - self.holding(), 0), router=self.router, late=self.late)

    def own_capacity(self) -> int:
        """How many replicas fit beside those of others."""
        return self.capacity - sum(other.holding() for other in self.neighbours)

    def live(self) -> int:
        """Processes on the device, whoever's they are."""
        return len(self.processes) + sum(len(other.processes) for other in self.neighbours)

    def is_current(self, row: Row) -> bool:
        of_now = row.template_hash == self.desired.template_hash
        return of_now and row.created_at >= self.desired.restarted_at

    def available(self) -> int:
        """By the router's word alone, whatever the planner thinks."""
        return sum(
            self.router is Router.KNOWN
            and row.goal is Goal.RUN
            and self.table.get((row.id, row.incarnation)) is False
            and (running := self.processes.get((row.id, row.incarnation))) is not None
            and running.ready
            for row in self.rows.values()
        )

    def floor(self) -> int:
        """How many must stay available, worked out apart from the planner."""
        desired = self.desired
        if desired.strategy is Strategy.RECREATE:
            return 0
        failed = len(self.rows) - self.holding()
        surge = max(0, min(desired.max_surge, self.own_capacity() + failed - desired.replicas))
        stop_first = desired.strategy is Strategy.AUTO and surge == 0 and desired.max_unavailable == 0
        return max(desired.replicas - (1 if stop_first else desired.max_unavailable), 0)

    # ── what happens by itself ────────────────────────────────────────────────────────────────────────────

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for name, running in list(self.processes.items()):
            if running.template == CRASHES:
                self.end(name, Exit("ProcessEnded", "ended with exit status 1"))
            elif running.template == HOPELESS:
                self.end(name, Exit("BadConfig", "no", Cause.CONFIG))
            else:
                running.ready = True

    def end(self, name: tuple[str, int], how: Exit) -> None:
        del self.processes[name]
        self.exits[name] = how

    def sync(self) -> None:
        """The router takes over the table that the rows make."""
        if self.router is not Router.KNOWN:
            return
        self.table = {
            (row.id, row.incarnation): row.goal is Goal.DRAIN
            for row in self.rows.values()
            if row.stop_sent is None
            and (running := self.processes.get((row.id, row.incarnation))) is not None
            and running.ready
        }

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────────

    def reconcile(self, steps: int = 99, *, cut_off: bool = False) -> int:
        """Plan, carry out at most `steps` steps; `cut_off`: the last one's row is written and nothing else."""
        if (
            self.desired.replicas
            and not self.desired.deleting
            and rollout.is_settled(self.desired, self.world(), self.now)
        ):
            self.late = False
            if not self.stable or self.stable[-1] != self.aim():
                self.stable.append(self.aim())
            self.take_aim()
        planned = plan(self.desired, self.world(), self.now).steps[:steps]
        for number, step in enumerate(planned):
            self.execute(step, only_row=cut_off and number == len(planned) - 1)
        return len(planned)

    def execute(self, step: Step, *, only_row: bool = False) -> None:
        match step:
            case Create():
                others = [row for row in self.rows.values() if row.goal is Goal.RUN and not self.is_current(row)]
                assert not (self.desired.held and others), "a rollout that is paused goes on"
                last = self.lives.get(step.replica, 0)
                self.rows[step.replica] = Row(
                    step.replica, "m", step.index, self.desired.revision, self.desired.template_hash, Goal.RUN,
                    self.now, memory=1, incarnation=last, exited=last,
                )  # fmt: skip
                want = 0 if self.desired.deleting else self.desired.replicas
                surge = 0 if self.desired.strategy is Strategy.RECREATE else self.desired.max_surge
                assert len(self.rows) <= want + surge, "I3: more rows than the surge allows"
            case Launch():
                assert not [name for name in self.processes if name[0] == step.replica], "I5: a twin"
                row = self.rows[step.replica] = after(self.rows[step.replica], step, self.now)
                assert row.template_hash != self.quarantined, "I9: what was given up is started again"
                self.lives[row.id] = row.incarnation
                if not only_row:
                    self.processes[row.id, row.incarnation] = Running(row.template_hash)
                    assert self.live() <= self.capacity, "I2: more processes than memory"
            case Drain():
                wanted = sum(row.goal is Goal.RUN for row in self.rows.values())
                want = 0 if self.desired.deleting else self.desired.replicas
                kinds = {self.is_current(row) for row in self.rows.values() if row.goal is Goal.RUN}
                most = want + self.desired.max_surge if len(kinds) == 2 and want else want
                assert not self.desired.held or wanted > most, "a rollout that is paused goes on"
                row = self.rows[step.replica]
                if not self.desired.deleting and self.table.get((row.id, row.incarnation)) is False:
                    running = self.processes.get((row.id, row.incarnation))
                    if running is not None and running.ready and row.ready_since is not None:
                        assert self.router is Router.KNOWN or self.desired.replicas == 0, "a blind drain"
                        after_drain = max(0, self.available() - 1)  # none is, as long as the router is down
                        assert after_drain >= min(self.floor(), self.desired.replicas), "I1: below the floor"
                self.rows[step.replica] = after(row, step, self.now)
            case Stop():
                row = self.rows[step.replica]
                running = self.processes.get((row.id, row.incarnation))
                if step.because in ("Drained", "DrainTimeout") and self.router is not Router.DOWN:
                    assert self.table.get((row.id, row.incarnation), True), "I4: the router still routes to it"
                    late = row.drain_since is not None and self.now >= row.drain_since + self.desired.drain_timeout
                    assert late or running is None or running.in_flight == 0, "I4: requests are cut off"
                self.rows[step.replica] = after(row, step, self.now)
                if running is not None and not only_row:
                    self.end((row.id, row.incarnation), Exit("Stopped", ""))
            case Forget():
                row = self.rows.pop(step.replica)
                assert (row.id, row.incarnation) not in self.processes, "a live process is forgotten"
            case Undrain() | Backoff() | Fail():
                self.rows[step.replica] = after(self.rows[step.replica], step, self.now)
            case RollBack():
                assert self.auto_rollback, "nobody asked for it"
                assert (step.template_hash, step.revision) not in self.stable, "it was rolled out before"
                self.quarantined, self.late = step.template_hash, False
                self.take_aim()
                assert self.desired.revision == step.to
            case PushLimits() | StopOrphan():
                pass

    def intend(self, *, template_hash: str | None = None, **changes: object) -> None:
        template, revision = self.newest
        if template_hash not in (None, template):
            self.newest = (str(template_hash), revision + 1)
        self.quarantined, self.late = "", False
        self.desired = replace(self.desired, **changes, generation=self.desired.generation + 1)  # type: ignore[arg-type]
        self.take_aim()

    def before(self, template: str) -> tuple[str, int] | None:
        """The last revision of another template that was rolled out."""
        return next((each for each in reversed(self.stable) if each[0] != template), None)

    def aim(self) -> tuple[str, int]:
        """Template and revision that are to serve."""
        template, _ = self.newest
        return (self.before(template) if self.quarantined == template else None) or self.newest

    def take_aim(self) -> None:
        template, revision = self.aim()
        behind = self.before(template) if self.auto_rollback and self.aim() == self.newest else None
        self.desired = replace(
            self.desired,
            template_hash=template,
            revision=revision,
            proven=(template, revision) in self.stable,
            fallback=behind[1] if behind is not None else None,
            quarantined=self.quarantined if self.quarantined != template else "",
        )

    def settle(self) -> None:
        """No more faults, the router answers: run until nothing is left to do, here and at the neighbours.

        I6, I7, I8.
        """
        worlds = [self, *self.neighbours]
        for world in worlds:
            world.router = Router.KNOWN
            world.desired = replace(world.desired, held=False)
        for _ in range(300):
            done = sum(world.reconcile() for world in worlds)
            for world in worlds:
                world.sync()
                for running in world.processes.values():
                    running.in_flight = 0
                world.tick(0.0 if done else 20.0)
            if all(rollout.is_settled(world.desired, world.world(), world.now) for world in worlds):
                break
        else:
            raise AssertionError(f"I6: no fixed point: {[(world.rows, world.desired) for world in worlds]}")
        for world in worlds:
            world.check_settled()

    def check_settled(self) -> None:
        assert plan(self.desired, self.world(), self.now).steps == (), "I7: work at the fixed point"
        others = [running for running in self.processes.values() if running.template != self.desired.template_hash]
        assert not others, "I8: rolled out, and another revision lives"
        assert len(self.processes) == self.desired.replicas, "I8: rolled out, and not in full number"
        assert all(row.created_at >= self.desired.restarted_at for row in self.rows.values()), "I8: not restarted"


def settled(capacity: int = 3, **intent: Any) -> Simulation:
    world = Simulation(capacity)
    world.intend(**intent)
    world.settle()
    return world


# ── cases by hand ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_first_replica_is_created_launched_and_becomes_ready() -> None:
    world = Simulation()
    first = plan(world.desired, world.world(), world.now)
    assert first.steps == (Create("m-r1-0", 0),)
    world.execute(first.steps[0])
    assert state_of(*world.world().replicas[0]) == "Pending"
    assert plan(world.desired, world.world(), world.now).steps == (Launch("m-r1-0", 1),)
    world.reconcile()
    assert state_of(*world.world().replicas[0]) == "Starting"
    world.tick(1)
    world.sync()
    assert state_of(*world.world().replicas[0]) == "Ready"
    world.settle()


def test_surge_keeps_the_old_replica_until_the_new_one_is_acknowledged() -> None:
    world = settled(capacity=2)
    world.intend(template_hash=BETTER)
    world.reconcile()
    world.reconcile()
    world.tick(1)
    assert not any(isinstance(step, Drain) for step in plan(world.desired, world.world(), world.now).steps)
    world.sync()
    assert Drain("m-r1-0", "Superseded") in plan(world.desired, world.world(), world.now).steps
    world.settle()
    assert list(world.rows) == ["m-r2-0"]


def test_auto_stops_first_when_nothing_more_fits_and_rolling_update_says_it_is_blocked() -> None:
    world = settled(capacity=1)
    world.intend(template_hash=BETTER)
    planned = plan(world.desired, world.world(), world.now)
    assert planned.budget.stop_first
    assert planned.steps == (Drain("m-r1-0", "Superseded"),)
    strict = replace(world.desired, strategy=Strategy.ROLLING)
    blocked = plan(strict, world.world(), world.now)
    assert blocked.steps == ()
    assert blocked.no_room


def test_recreate_stops_all_before_it_starts_one() -> None:
    world = settled(capacity=5, replicas=2, strategy=Strategy.RECREATE)
    world.intend(template_hash=BETTER)
    steps = plan(world.desired, world.world(), world.now).steps
    assert {step.replica for step in steps if isinstance(step, Drain)} == {"m-r1-0", "m-r1-1"}
    assert not any(isinstance(step, Create) for step in steps)
    world.settle()


def test_a_drain_waits_for_the_acknowledgement_and_for_requests_until_its_deadline() -> None:
    world = settled()
    world.processes["m-r1-0", 1].in_flight = 2
    world.intend(deleting=True)
    world.reconcile()
    assert world.rows["m-r1-0"].goal is Goal.DRAIN
    assert plan(world.desired, world.world(), world.now).steps == ()
    world.sync()
    waiting = plan(world.desired, world.world(), world.now)
    assert waiting.steps == ()
    assert waiting.requeue_at == world.now + world.desired.drain_timeout
    world.now += world.desired.drain_timeout
    assert plan(world.desired, world.world(), world.now).steps == (Stop("m-r1-0", 1, "DrainTimeout"),)


def test_a_revert_takes_the_draining_replica_back() -> None:
    world = settled(capacity=2)
    world.processes["m-r1-0", 1].in_flight = 1
    world.intend(template_hash=BETTER)
    for _ in range(4):
        world.reconcile()
        world.tick(1)
        world.sync()
    assert world.rows["m-r1-0"].goal is Goal.DRAIN
    world.sync()
    world.intend(template_hash=GOOD)
    assert Undrain("m-r1-0") in plan(world.desired, world.world(), world.now).steps
    world.settle()
    assert list(world.rows) == ["m-r1-0"]


def test_crash_back_off_doubles_with_jitter_up_to_its_maximum_and_starts_again_after_health() -> None:
    row = Row("m-r1-0", "m", 0, 1, GOOD, Goal.RUN, 0.0, incarnation=1)
    seen = Seen(Process.EXITED, exit=Exit("ProcessEnded", "killed by SIGKILL"))
    desired = Desired("m", 1, 1, GOOD, 1, backoff_max=300.0)

    def delay(restarts: int, jitter: float = 0.0, ready_since: float | None = None) -> float:
        changed = replace(row, restarts=restarts, ready_since=ready_since)
        step = plan(desired, World(((changed, seen),), room=1, jitter=jitter), 5000.0).steps[0]
        assert isinstance(step, Backoff)
        return step.not_before - 5000.0

    assert [delay(n) for n in range(4)] == [1, 2, 4, 8]
    assert delay(20) == 300
    assert delay(0, jitter=1.0) == pytest.approx(1.2)
    assert delay(0, jitter=-1.0) == pytest.approx(0.8)
    assert delay(6, ready_since=4500.0) == 64
    assert delay(6, ready_since=4400.0) == 1


def test_a_hopeless_failure_waits_for_a_new_intent() -> None:
    world = Simulation()
    world.intend(template_hash=HOPELESS)
    for _ in range(4):
        world.reconcile()
        world.tick(1)
    (row,) = world.rows.values()
    assert state_of(row, world.seen(row)) == "Failed"
    world.now += 10_000
    assert plan(world.desired, world.world(), world.now).steps == ()
    world.intend(template_hash=GOOD)
    world.settle()


def test_out_of_memory_is_tried_twice() -> None:
    row = Row("m-r1-0", "m", 0, 1, GOOD, Goal.RUN, 0.0, incarnation=1)
    seen = Seen(Process.EXITED, exit=Exit("OutOfMemory", "needs 3 GiB", Cause.MEMORY))
    desired = Desired("m", 1, 1, GOOD, 1)
    crashed = replace(row, restarts=7, last_exit=Exit("ProcessEnded", "killed by SIGKILL"))
    first = plan(desired, World(((crashed, seen),), room=1), 1.0).steps[0]
    assert isinstance(first, Backoff), "a crash of another kind before it is none of the two"
    again = replace(after(crashed, first, 1.0), incarnation=2)
    assert isinstance(plan(desired, World(((again, seen),), room=1), 1000.0).steps[0], Fail)
    healthy = replace(again, ready_since=0.0)
    assert isinstance(plan(desired, World(((healthy, seen),), room=1), 1000.0).steps[0], Backoff)


def test_missing_files_are_looked_for_every_five_minutes() -> None:
    row = Row("m-r1-0", "m", 0, 1, GOOD, Goal.RUN, 0.0, incarnation=1, restarts=12)
    seen = Seen(Process.EXITED, exit=Exit("MissingFile", "no model.safetensors", Cause.SOURCE))
    (step,) = plan(Desired("m", 1, 1, GOOD, 1), World(((row, seen),), room=1), 1.0).steps
    assert isinstance(step, Backoff)
    assert step.not_before == 301.0


# ── paused rollouts, and progress ─────────────────────────────────────────────────────────────────────────


def test_a_paused_rollout_replaces_nothing_and_keeps_the_number() -> None:
    world = settled(replicas=2, max_surge=1)
    world.intend(template_hash=BETTER)
    world.desired = replace(world.desired, held=True)
    assert plan(world.desired, world.world(), world.now).steps == ()
    world.intend(replicas=1)
    (drain,) = plan(world.desired, world.world(), world.now).steps
    assert isinstance(drain, Drain)
    world.intend(replicas=3)
    assert plan(world.desired, world.world(), world.now).steps == (), "one more would be a step of the rollout"
    world.intend(replicas=0)
    assert [type(step) for step in plan(world.desired, world.world(), world.now).steps] == [Drain, Drain]


def test_what_has_no_replica_left_is_started_though_its_rollouts_are_paused() -> None:
    world = settled(replicas=2)
    world.desired = replace(world.desired, held=True)
    world.rows.clear()
    world.processes.clear()
    steps = plan(world.desired, world.world(), world.now).steps
    assert [type(step) for step in steps] == [Create, Create]


def rolling(**more: object) -> tuple[Desired, Row, Seen]:
    """A revision with one to fall back to, whose deadline has passed, and a replica of it that serves."""
    desired = replace(Desired("m", 2, 2, BETTER, 1, fallback=1), **more)  # type: ignore[arg-type]
    row = Row("m-r2-0", "m", 0, 2, BETTER, Goal.RUN, 0.0, incarnation=1, ready_since=1.0)
    return desired, row, Seen(Process.READY, connected=True, routed=True, released=False)


def rolls_back(desired: Desired, *pairs: tuple[Row, Seen], **more: object) -> bool:
    world = replace(World(pairs, room=1, late=True), **more)  # type: ignore[arg-type]
    return any(isinstance(step, RollBack) for step in plan(desired, world, 5000.0).steps)


def test_a_deadline_is_missed_by_replicas_that_do_not_serve_and_by_nothing_else() -> None:
    desired, row, serves = rolling()
    starting = replace(serves, process=Process.STARTING, connected=False, routed=False)
    fresh = replace(row, ready_since=None)
    assert rolls_back(desired, (fresh, starting))
    assert rolls_back(desired, (fresh, replace(serves, routed=False))), "the router does not take it"
    assert not rolls_back(desired, (fresh, starting), late=False)
    assert not rolls_back(replace(desired, held=True), (fresh, starting))
    old = Row("m-r1-0", "m", 0, 1, GOOD, Goal.DRAIN, 0.0, incarnation=1, ready_since=1.0, drain_since=10.0)
    streams = replace(serves, routed=False, released=True, in_flight=3)
    slow = replace(desired, drain_timeout=1e6)
    assert not rolls_back(slow, (row, serves), (old, streams)), "old streams may take their time"
    assert not rolls_back(replace(desired, min_ready=1e6), (row, serves)), "so may minReadyDuration"
    assert not rolls_back(replace(desired, replicas=2), (row, serves), room=0), "what does not fit waits"
    for state in (Router.UNKNOWN, Router.DOWN):
        assert not rolls_back(desired, (fresh, starting), router=state), "nobody can tell"


def test_an_engine_that_makes_no_step_is_killed_after_the_stall_time_even_while_it_drains() -> None:
    row = Row("m-r1-0", "m", 0, 1, GOOD, Goal.RUN, 0.0, incarnation=1, ready_since=0.0)
    silent = Seen(Process.READY, silent_since=100.0, connected=True, routed=True, released=False, in_flight=2)
    desired = Desired("m", 1, 1, GOOD, 1, stall_timeout=30.0)
    planned = plan(desired, World(((row, silent),), room=0), 129.0)
    assert (planned.steps, planned.requeue_at) == ((), 130.0)
    stop = Stop("m-r1-0", 1, "EngineStalled")
    assert plan(desired, World(((row, silent),), room=0), 130.0).steps == (stop,)
    leaving = replace(row, goal=Goal.DRAIN, drain_since=129.0)
    assert stop in plan(desired, World(((leaving, silent),), room=0), 130.0).steps
    unknown = replace(silent, process=Process.UNKNOWN)
    assert plan(desired, World(((row, unknown),), room=0), 9e9).steps == (), "no word of it is no evidence"
    ended = Exit("ProcessEnded", "killed by SIGKILL")
    gone = replace(silent, process=Process.EXITED, silent_since=None, exit=ended)
    (step,) = plan(desired, World(((after(row, stop, 130.0), gone),), room=0), 131.0).steps
    assert isinstance(step, Backoff)
    assert (step.exit.reason, step.not_before) == ("EngineStalled", 132.0)


def test_a_start_without_progress_is_ended_and_progress_moves_its_deadline() -> None:
    row = Row("m-r1-0", "m", 0, 1, GOOD, Goal.RUN, 0.0, incarnation=1, launched_at=100.0)
    desired = Desired("m", 1, 1, GOOD, 1, startup_timeout=60.0)
    loading = World(((row, Seen(Process.STARTING, progress_at=150.0)),), room=0)
    assert plan(desired, loading, 209.0).requeue_at == 210.0
    assert plan(desired, loading, 210.0).steps == (Stop("m-r1-0", 1, "StartupTimeout"),)
    stopped = after(row, Stop("m-r1-0", 1, "StartupTimeout"), 210.0)
    gone = World(((stopped, Seen(Process.EXITED, exit=Exit("ProcessEnded", ""))),), room=0)
    (step,) = plan(desired, gone, 211.0).steps
    assert isinstance(step, Backoff)
    assert step.exit.reason == "StartupTimeout"


def test_a_silent_router_stops_no_replica_and_a_silent_process_starts_no_twin() -> None:
    world = settled(capacity=2)
    world.intend(template_hash=BETTER)
    world.router = Router.UNKNOWN
    for _ in range(5):
        world.reconcile()
        world.now += 100
    assert world.rows["m-r1-0"].goal is Goal.RUN
    row = Row("m-r1-0", "m", 0, 1, GOOD, Goal.RUN, 0.0, incarnation=1)
    silent = World(((row, Seen(Process.UNKNOWN)),), room=1)
    assert plan(Desired("m", 1, 1, GOOD, 1), silent, 9e9).steps == ()


def test_a_router_that_is_down_holds_up_no_deletion() -> None:
    world = settled()
    world.intend(deleting=True)
    world.router = Router.DOWN
    for _ in range(4):
        world.reconcile()
    assert world.rows == {}
    assert world.processes == {}


def test_an_orphan_is_ended_once_the_router_let_go_of_it() -> None:
    desired = Desired("m", 1, 1, GOOD, 0)
    orphan = Orphan("m-r9-0", 4, "n", seen_at=0.0, released=False)
    assert plan(desired, World((), room=1, orphans=(orphan,)), 1.0).steps == ()
    busy = replace(orphan, released=True, in_flight=1)
    assert plan(desired, World((), room=1, orphans=(busy,)), 1.0).steps == ()
    idle = replace(orphan, released=True)
    assert plan(desired, World((), room=1, orphans=(idle,)), 1.0).steps == (StopOrphan("m-r9-0", 4, "n"),)
    assert plan(desired, World((), room=1, orphans=(busy,)), 31.0).steps == (StopOrphan("m-r9-0", 4, "n"),)


def test_hot_settings_are_pushed_until_the_engine_reports_them() -> None:
    row = Row("m-r1-0", "m", 0, 1, GOOD, Goal.RUN, 0.0, incarnation=1, ready_since=0.0)
    seen = Seen(Process.READY, connected=True, routed=True, released=False, hot_hash="old")
    desired = Desired("m", 1, 1, GOOD, 1, hot_hash="new")
    assert plan(desired, World(((row, seen),), room=0), 9.0).steps == (PushLimits(("m-r1-0",), "new"),)
    assert plan(desired, World(((row, replace(seen, hot_hash="new")),), room=0), 9.0).steps == ()


def test_min_ready_duration_delays_availability() -> None:
    row = Row("m-r1-0", "m", 0, 1, GOOD, Goal.RUN, 0.0, incarnation=1, ready_since=100.0)
    seen = Seen(Process.READY, connected=True, routed=True, released=False)
    desired = Desired("m", 1, 1, GOOD, 1, min_ready=10.0)
    assert not is_available(desired, row, seen, 109.0)
    assert is_available(desired, row, seen, 110.0)
    assert plan(desired, World(((row, seen),), room=0), 109.0).requeue_at == 110.0


# ── the state machine ─────────────────────────────────────────────────────────────────────────────────────


class Rollouts(RuleBasedStateMachine):
    """Random intents and faults; every step is checked where it is carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.world = Simulation()

    @initialize(
        capacity=st.integers(1, 4),
        replicas=st.integers(1, 3),
        surge=st.integers(0, 2),
        unavailable=st.integers(0, 1),
        auto_rollback=st.booleans(),
    )
    def start_settled(
        self, capacity: int, replicas: int, surge: int, unavailable: int, auto_rollback: bool
    ) -> None:
        self.world = settled(
            max(capacity, replicas), replicas=replicas, max_surge=surge, max_unavailable=unavailable
        )
        self.world.auto_rollback = auto_rollback
        self.world.reconcile()

    @rule(
        template=st.sampled_from([GOOD, BETTER, CRASHES, HOPELESS]),
        way=st.lists(st.sampled_from(["tick", "sync", "reconcile", "one step", "cut off"]), max_size=8),
    )
    def change_the_template_and_get_part_of_the_way(self, template: str, way: list[str]) -> None:
        self.world.intend(template_hash=template)
        for part in way:
            match part:
                case "tick":
                    self.world.tick(1.0)
                case "sync":
                    self.world.sync()
                case "reconcile":
                    self.world.reconcile()
                case "one step":
                    self.world.reconcile(1)
                case _:
                    self.world.reconcile(1, cut_off=True)

    @rule(
        template=st.sampled_from([BETTER, CRASHES, HOPELESS]),
        router=st.sampled_from([Router.KNOWN, Router.UNKNOWN, Router.DOWN]),
    )
    def roll_out_until_it_fails_and_lose_the_router(self, template: str, router: Router) -> None:
        """The new revision is rolled out, or given up; then what there is of it dies again and again."""
        world = self.world
        world.auto_rollback = True
        world.intend(template_hash=template, replicas=max(world.desired.replicas, 1))
        for _ in range(12):
            world.reconcile()
            world.tick(3.0)
            world.sync()
            if world.quarantined:
                break
        world.router = router
        for _ in range(4):
            for name in [name for name in world.processes if world.processes[name].template == template]:
                world.end(name, Exit("ProcessEnded", "killed by SIGKILL"))
            world.reconcile()
            world.tick(31.0)
            world.reconcile()

    @rule(replicas=st.integers(0, 3))
    def scale(self, replicas: int) -> None:
        self.world.intend(replicas=min(replicas, self.world.capacity))

    @rule(strategy=st.sampled_from([Strategy.AUTO, Strategy.AUTO, Strategy.ROLLING, Strategy.RECREATE]))
    def change_the_strategy(self, strategy: Strategy) -> None:
        self.world.intend(strategy=strategy)

    @rule(held=st.booleans())
    def pause_or_resume_rollouts(self, held: bool) -> None:
        self.world.desired = replace(self.world.desired, held=held)

    @rule()
    def restart(self) -> None:
        self.world.now += 0.001
        self.world.desired = replace(self.world.desired, restarted_at=self.world.now)

    @rule()
    def the_deadline_passes(self) -> None:
        world = self.world
        world.late = not world.desired.held and not rollout.is_settled(world.desired, world.world(), world.now)

    @rule(steps=st.integers(1, 6), cut_off=st.booleans())
    def reconcile(self, steps: int, cut_off: bool) -> None:
        self.world.reconcile(steps, cut_off=cut_off)

    @rule(seconds=st.sampled_from([0.5, 2.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule()
    def router_takes_the_table(self) -> None:
        self.world.sync()

    @rule(busy=st.integers(0, 2))
    def requests_come_and_go(self, busy: int) -> None:
        for name, running in self.world.processes.items():
            if self.world.table.get(name) is False:
                running.in_flight = busy

    @precondition(lambda self: self.world.processes)
    @rule(number=st.integers(0, 5))
    def a_process_dies(self, number: int) -> None:
        names = sorted(self.world.processes)
        self.world.end(names[number % len(names)], Exit("ProcessEnded", "killed by SIGKILL"))

    @rule(state=st.sampled_from([Router.KNOWN, Router.KNOWN, Router.UNKNOWN, Router.DOWN]))
    def the_router_changes(self, state: Router) -> None:
        self.world.router = state

    @invariant()
    def memory_is_not_overcommitted(self) -> None:
        assert self.world.live() <= self.world.capacity, "I2"

    def teardown(self) -> None:
        self.world.intend(template_hash=GOOD, strategy=Strategy.AUTO, max_surge=1)
        self.world.settle()


class Neighbours(Rollouts):
    """The same on a device that several models share: one at a time has its turn, and each has its own router's
    word, its own rollout and its own faults. What one leaves another may take at once.
    """

    worlds: list[Simulation]

    @initialize(
        capacity=st.integers(3, 6),
        replicas=st.lists(st.integers(1, 2), min_size=2, max_size=3),
        surge=st.integers(0, 2),
        unavailable=st.integers(0, 1),
        auto_rollback=st.booleans(),
    )
    def start_settled(
        self, capacity: int, replicas: list[int], surge: int, unavailable: int, auto_rollback: bool
    ) -> None:
        self.worlds = []
        for number in replicas:
            world = settled(max(number, 1), replicas=number, max_surge=surge, max_unavailable=unavailable)
            world.auto_rollback = auto_rollback
            self.worlds.append(world)
        for world in self.worlds:
            world.capacity = max(capacity, sum(replicas))
            world.neighbours = [other for other in self.worlds if other is not world]
            world.reconcile()
        self.world = self.worlds[0]

    @rule(number=st.integers(0, 2))
    def turn_to_another(self, number: int) -> None:
        self.world = self.worlds[number % len(self.worlds)]

    @rule()
    def all_reconcile(self) -> None:
        for world in self.worlds:
            world.reconcile()

    def teardown(self) -> None:
        for world in self.worlds:
            most = world.capacity // len(self.worlds)
            world.intend(template_hash=GOOD, strategy=Strategy.AUTO, max_surge=1)
            world.intend(replicas=min(world.desired.replicas, most))
        self.world.settle()


QUICK = settings(
    max_examples=times(300, 10_000),
    stateful_step_count=25,
    derandomize=EFFORT == 1,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


UNTIL_CAUGHT = settings(QUICK, max_examples=5_000, phases=[Phase.generate], report_multiple_bugs=False)
"""Most mutants are caught within some fifty examples; which ones come is another matter after each change here."""


def test_who_was_to_be_stopped_while_the_router_was_down_is_stopped_when_it_lets_go() -> None:
    """The stop was written and never sent; the router comes back with the table that it had."""
    world = settled(capacity=1, replicas=1, max_surge=0)
    world.router = Router.DOWN
    world.intend(strategy=Strategy.AUTO, replicas=0)
    world.reconcile(1)
    world.reconcile(1, cut_off=True)
    (row,) = world.rows.values()
    assert row.stop_sent is not None
    world.router = Router.KNOWN
    world.tick(rollout.STOP_AGAIN_SECONDS + 1)
    world.reconcile()
    assert world.processes, "not while the router may send something there"
    world.settle()
    assert not world.processes
    assert not world.rows


def test_a_stop_that_was_never_sent_is_sent_again_when_the_router_is_back() -> None:
    """A drain ended because the router was down; what ran through it ended with it."""
    world = settled(capacity=1, replicas=1, max_surge=0)
    for running in world.processes.values():
        running.in_flight = 2
    world.intend(replicas=0)
    world.reconcile(1)
    world.sync()
    world.router = Router.DOWN
    world.reconcile(1, cut_off=True)
    world.router = Router.KNOWN
    world.tick(rollout.STOP_AGAIN_SECONDS + 1)
    world.reconcile()
    assert not world.processes


def test_no_sequence_of_intents_and_faults_breaks_an_invariant() -> None:
    run_state_machine_as_test(Rollouts, settings=QUICK)


def test_no_competition_of_models_for_a_device_breaks_one() -> None:
    run_state_machine_as_test(Neighbours, settings=QUICK)


def ignore_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout.budget

    def budget(desired: Desired, rows: int, room: int) -> rollout.Budget:
        found = real(desired, rows, room)
        return replace(found, floor=max(found.floor - 1, 0))

    monkeypatch.setattr(rollout, "budget", budget)


def believe_the_engine_instead_of_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    def available(desired: Desired, row: Row, seen: Seen, now: float) -> bool:
        return row.goal is Goal.RUN and seen.process is Process.READY

    monkeypatch.setattr(rollout, "is_available", available)


def stop_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout._Planner.finish_drains

    def finish(self: rollout._Planner) -> None:
        self.seen = {name: replace(seen, released=True, in_flight=0) for name, seen in self.seen.items()}
        real(self)

    monkeypatch.setattr(rollout._Planner, "finish_drains", finish)


def take_memory_that_draining_replicas_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout._Planner.__init__

    def begin(self: rollout._Planner, desired: Desired, world: World, now: float) -> None:
        draining = sum(row.goal is Goal.DRAIN for row, _ in world.replicas)
        real(self, desired, replace(world, room=world.room + draining), now)

    monkeypatch.setattr(rollout._Planner, "__init__", begin)


def start_what_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout._Planner.launch

    def launch(self: rollout._Planner) -> None:
        self.desired = replace(self.desired, quarantined="")
        real(self)

    monkeypatch.setattr(rollout._Planner, "launch", launch)


def start_beside_a_process_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout._Planner.launch

    def launch(self: rollout._Planner) -> None:
        self.seen = {name: replace(seen, process=Process.NONE) for name, seen in self.seen.items()}
        self.rows = {
            name: replace(row, exited=row.incarnation) if row.ready_since is None else row
            for name, row in self.rows.items()
        }
        real(self)

    monkeypatch.setattr(rollout._Planner, "launch", launch)


def surge_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout._Planner.create

    def create(self: rollout._Planner) -> None:
        self.budget = replace(self.budget, ceiling=self.budget.ceiling + 1)
        real(self)

    monkeypatch.setattr(rollout._Planner, "create", create)


def say_rolled_out_while_the_old_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout._Planner.begin_drains

    def begin(self: rollout._Planner) -> None:
        if self.available() < self.budget.want:
            real(self)

    def count_all(desired: Desired, world: World, now: float) -> bool:
        return (
            sum(rollout.is_available(desired, row, seen, now) for row, seen in world.replicas) >= desired.replicas
        )

    monkeypatch.setattr(rollout._Planner, "begin_drains", begin)
    monkeypatch.setattr(rollout, "is_settled", count_all)


def take_no_answer_for_none_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout._Planner.__init__

    def begin(self: rollout._Planner, desired: Desired, world: World, now: float) -> None:
        real(self, desired, world, now)
        self.can_drain = self.can_finish = True

    monkeypatch.setattr(rollout._Planner, "__init__", begin)


def give_up_what_had_been_rolled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout._Planner.roll_back

    def roll_back(self: rollout._Planner) -> RollBack | None:
        self.desired = replace(self.desired, proven=False)
        return real(self)

    monkeypatch.setattr(rollout._Planner, "roll_back", roll_back)


def go_on_with_a_paused_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout._Planner.__init__

    def begin(self: rollout._Planner, desired: Desired, world: World, now: float) -> None:
        real(self, desired, world, now)
        self.held = False

    monkeypatch.setattr(rollout._Planner, "__init__", begin)


def never_take_a_drain_back_nor_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout that was cut off between the drain of a replica and its end is not gone on with."""
    real = rollout._Planner.finish_drains

    def finish(self: rollout._Planner) -> None:
        if any(row.goal is Goal.RUN and not self.is_current(row) for row in self.rows.values()):
            real(self)

    monkeypatch.setattr(rollout._Planner, "finish_drains", finish)


@pytest.mark.parametrize(
    "mutate",
    [
        start_what_was_given_up,
        start_beside_a_process_that_lives,
        surge_without_end,
        say_rolled_out_while_the_old_serve,
        take_no_answer_for_none_in_flight,
        give_up_what_had_been_rolled_out,
        go_on_with_a_paused_rollout,
        never_take_a_drain_back_nor_forget,
        ignore_the_floor,
        believe_the_engine_instead_of_the_router,
        stop_without_waiting,
        take_memory_that_draining_replicas_hold,
    ],
)
def test_the_machine_catches_mutants(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Rollouts, settings=UNTIL_CAUGHT)


@pytest.mark.parametrize("mutate", [surge_without_end, take_memory_that_draining_replicas_hold, ignore_the_floor])
def test_the_machine_of_several_models_catches_mutants(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Neighbours, settings=UNTIL_CAUGHT)
