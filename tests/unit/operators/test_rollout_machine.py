"""The rollout planner under random intents and faults, of one model and of several that share a device.

The machines are biased towards half-finished rollouts, because that is where published controllers broke; mutants
modelled on such bugs show that they would notice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
from tests.effort import EFFORT, first_in_ci, times
from tests.unit.operators.rollout_world import BETTER, CRASHES, GOOD, HOPELESS, Simulation, settled

from quire_operators import rollout
from quire_operators.rollout import (
    Desired,
    Exit,
    Goal,
    Process,
    RollBack,
    Router,
    Row,
    Seen,
    Strategy,
    World,
)


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
    first_in_ci(
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
        ]
    ),
)
def test_the_machine_catches_mutants(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Rollouts, settings=UNTIL_CAUGHT)


@pytest.mark.parametrize(
    "mutate", first_in_ci([surge_without_end, take_memory_that_draining_replicas_hold, ignore_the_floor])
)
def test_the_machine_of_several_models_catches_mutants(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Neighbours, settings=UNTIL_CAUGHT)


def test_what_a_router_that_came_back_sent_to_a_replica_of_before_is_not_cut_off() -> None:
    """It was stopped while the router was down; the control plane died before the process had heard."""
    world = settled(1, replicas=1, max_surge=0)
    world.router = Router.DOWN
    world.intend(replicas=0)
    world.reconcile(1)
    world.reconcile(1, cut_off=True)
    (row,) = world.rows.values()
    (running,) = world.processes.values()
    assert row.stop_sent is not None
    world.router, running.in_flight = Router.KNOWN, 1  # by the table that it had
    world.sync()
    for _ in range(3):
        world.tick(5.0)
        world.reconcile()
    assert world.processes, "it is written to"
    deadline = (row.drain_since or 0.0) + world.desired.drain_timeout
    planned = rollout.plan(world.desired, world.world(), world.now)
    assert planned.requeue_at == deadline, "then it has written long enough"
    running.in_flight = 0
    world.tick(5.0)
    world.reconcile()
    assert not world.processes
