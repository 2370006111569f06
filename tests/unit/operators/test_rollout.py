"""The rollout planner: cases by hand. Its state machine is in test_rollout_machine.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.operators.rollout_world import BETTER, GOOD, HOPELESS, Simulation, settled

from quire_operators.rollout import (
    Backoff,
    Cause,
    Create,
    Desired,
    Drain,
    Exit,
    Fail,
    Goal,
    Launch,
    Orphan,
    Process,
    PushLimits,
    RollBack,
    Router,
    Row,
    Seen,
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
    nothing = Seen(Process.NONE)
    waits = replace(fresh, incarnation=0, exited=0)
    assert not rolls_back(desired, (waits, nothing)), "it has not had its turn to start"
    assert not rolls_back(desired, (replace(fresh, exited=1), nothing)), "nor to start again"
    assert rolls_back(desired, (replace(fresh, exited=1, not_before=1e6), nothing)), "a back-off is its own"
    assert rolls_back(desired, (waits, nothing), (replace(fresh, id="m-r2-1"), starting)), "one hangs beside it"
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
