"""Who applies, what the load decides, what failed, and who leads, under any order of them: I9, I10 and I11.

The planner alone is `test_rollout_machine`'s part; here everything goes through the store.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
from tests.effort import EFFORT, first_in_ci, times
from tests.unit.operators.planes_world import KEY, Machine, Manifest, Plane, contents, copied, resolved
from tests.unit.operators.rollout_world import BETTER, CRASHES, GOOD

from quire_operators import autoscaling, demand, desired, lease, overrides, store
from quire_operators.database import Database, Deposed
from quire_operators.fleet import shim
from quire_operators.overrides import Kind
from quire_operators.records import Applied, Change, StoredObject
from quire_operators.rollout import Exit

MANIFESTS = [
    Manifest(template, least, most)
    for template in (GOOD, BETTER, CRASHES)
    for least, most in ((1, None), (2, None), (1, 4), (2, 3), (0, 2))
]


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Nothing is asked of what a disk keeps: `test_store` does that."""


class Planes(RuleBasedStateMachine):
    """One store, one machine, and control planes that lead one after the other; who led before is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="planes-", dir=MEMORY))
        self.path = self.folder / "state.db"
        self.machine = Machine(self.folder / "epochs")
        self.now = 1000.0
        self.planes = [self.next_plane()]
        self.manifest = Manifest(GOOD, 1)
        self.generation = 0
        self.decided: int | None = None
        """What the load called for last, since a range is declared."""
        self.given_up = ""

    def next_plane(self) -> Plane:
        return Plane(self.path, self.machine, lambda: self.now)

    @property
    def leader(self) -> Plane:
        return self.planes[-1]

    def teardown(self) -> None:
        for plane in self.planes:
            plane.store.close()
        shutil.rmtree(self.folder)

    # ── what a leader does ────────────────────────────────────────────────────────────────────────────────

    @initialize(range_=st.booleans())
    def start_settled(self, range_: bool) -> None:
        self.apply(Manifest(GOOD, 1, 4) if range_ else Manifest(GOOD, 2))
        self.settle()

    def settle(self, passes: int = 5) -> None:
        for _ in range(passes):
            self.run_pass()

    def run_pass(self) -> None:
        self.leader.begin_pass(self.note_given_up)
        self.go_on(self.leader)

    def go_on(self, plane: Plane, parts: int = 99) -> None:
        before = set(self.machine.processes)
        plane.go_on(parts)
        for name in self.machine.processes.keys() - before:
            assert self.machine.processes[name] != self.given_up, "I9: what was given up is started again"

    def note_given_up(self, template: str) -> None:
        self.given_up = template

    def apply(self, manifest: Manifest) -> None:
        result = self.leader.apply(manifest)
        if manifest != self.manifest or self.generation == 0:
            assert result in ("created", "updated")
            self.generation += 1
            self.given_up = ""
            self.manifest = manifest
            if manifest.most is None:
                self.decided = None
        else:
            assert result == "unchanged"

    @rule(manifest=st.sampled_from(MANIFESTS))
    def somebody_applies(self, manifest: Manifest) -> None:
        self.apply(manifest)

    @rule()
    def the_same_is_applied_again(self) -> None:
        self.apply(self.manifest)

    @rule(in_flight=st.integers(0, 6))
    def the_load_is_followed(self, in_flight: int) -> None:
        self.leader.follow_the_load(in_flight)
        self.note_what_the_load_calls_for()

    def note_what_the_load_calls_for(self) -> None:
        followed = self.leader.decided(Kind.AUTOSCALE)
        if followed is not None and self.manifest.most is not None:
            self.decided = followed.replicas

    @rule(manifest=st.sampled_from(MANIFESTS), in_flight=st.integers(1, 6))
    def both_at_once(self, manifest: Manifest, in_flight: int) -> None:
        """I10: whoever comes first, they come to the same."""
        with copied(self.path, self.folder, lambda: self.now) as other:
            other.follow_the_load(in_flight)
            other.apply(manifest)
            other.follow_the_load(in_flight)
            theirs = (other.wanted().full, other.stored.generation, other.stored.resolved)
        self.apply(manifest)
        self.the_load_is_followed(in_flight)
        leader = self.leader
        assert (leader.wanted().full, leader.stored.generation, leader.stored.resolved) == theirs, "I10"

    @rule(in_flight=st.integers(1, 6), least=st.integers(0, 3), more=st.integers(0, 2))
    def the_range_changes_under_load(self, in_flight: int, least: int, more: int) -> None:
        self.apply(Manifest(GOOD, 1, 4))
        self.settle(3)
        self.the_load_is_followed(in_flight)
        self.apply(Manifest(GOOD, least, max(least + more, 1)))

    @rule(kind=st.sampled_from([Kind.RESTART, Kind.RESIDENT]))
    def a_person_decides(self, kind: Kind) -> None:
        self.now += 0.001
        self.leader.decide(kind)

    @rule(held=st.booleans())
    def rollouts_are_held_or_go_on(self, held: bool) -> None:
        if held:
            self.leader.decide(Kind.HOLD, revision=self.leader.wanted().revision.n)
        else:
            self.leader.take_back(Kind.HOLD)

    @rule()
    def what_was_given_up_is_retried(self) -> None:
        self.leader.take_back(Kind.QUARANTINE)
        self.given_up = ""

    @rule(then=st.lists(st.sampled_from(["same", "load", "restart", "hold", "next", "time"]), max_size=4))
    def a_template_fails_until_it_is_given_up(self, then: list[str]) -> None:
        """And then everything happens that is no new intent."""
        self.leader.take_back(Kind.HOLD)
        self.apply(Manifest(BETTER, 1, 4))
        self.settle()
        self.apply(Manifest(CRASHES, 1, 4))
        for _ in range(30):
            if self.given_up:
                break
            self.run_pass()
            self.time_passes(31.0)
        assert self.given_up == CRASHES, "I9: it is not given up"
        for each in then:
            match each:
                case "same":
                    self.the_same_is_applied_again()
                case "load":
                    self.the_load_is_followed(3)
                case "restart":
                    self.a_person_decides(Kind.RESTART)
                case "hold":
                    self.rollouts_are_held_or_go_on(held=True)
                case "next":
                    self.another_takes_over_in_the_middle_of_a_pass(2)
                case _:
                    self.time_passes(31.0)
            self.settle(2)

    @rule(seconds=st.sampled_from([0.5, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for name, template in list(self.machine.processes.items()):
            if template == CRASHES:
                self.machine.end(name, Exit("ProcessEnded", "ended with exit status 1"))

    @rule()
    def a_pass(self) -> None:
        self.run_pass()

    @rule(parts=st.integers(0, 5))
    def a_pass_that_stands_still(self, parts: int) -> None:
        self.leader.begin_pass(self.note_given_up)
        self.go_on(self.leader, parts)

    # ── who led before ────────────────────────────────────────────────────────────────────────────────────

    @rule(parts=st.integers(0, 5))
    def another_takes_over_in_the_middle_of_a_pass(self, parts: int) -> None:
        self.a_pass_that_stands_still(parts)
        self.planes.append(self.next_plane())

    @rule(passes=st.integers(0, 1), parts=st.integers(1, 4))
    def another_takes_over_in_the_middle_of_a_rollout(self, passes: int, parts: int) -> None:
        """The old one has written what it is about to do, and does it."""
        old = self.leader
        old.take_back(Kind.HOLD)
        self.apply(Manifest(GOOD if self.manifest.template == BETTER else BETTER, 2))
        self.settle(passes)
        self.another_takes_over_in_the_middle_of_a_pass(parts)
        with self.nothing_changes():
            old.go_on()

    @contextmanager
    def nothing_changes(self) -> Iterator[None]:
        before, ran = contents(self.path), dict(self.machine.processes)
        yield
        assert contents(self.path) == before, "I11: one that was deposed has written"
        assert self.machine.processes == ran, "I11: one that was deposed started or stopped something"

    @precondition(lambda self: len(self.planes) > 1)
    @rule(number=st.integers(0, 5), data=st.data())
    def one_that_was_deposed_goes_on(self, number: int, data: st.DataObject) -> None:
        plane = self.planes[:-1][-1 - number % (len(self.planes) - 1)]
        what: dict[str, Callable[[], Any]] = {
            "its pass": plane.go_on,
            "another pass": plane.whole_pass,
            "an apply": lambda: plane.apply(data.draw(st.sampled_from(MANIFESTS), label="manifest")),
            "the load": lambda: plane.follow_the_load(data.draw(st.integers(0, 6), label="in flight")),
            "a decision": lambda: plane.decide(Kind.RESTART),
            "a retry": lambda: plane.take_back(Kind.QUARANTINE),
            "a table": lambda: plane.store.set_routing_version(99),
            "a deletion": lambda: plane.store.mark_deleting(KEY),
        }
        chosen = data.draw(st.sampled_from(["its pass", "its pass", *what]), label="what")
        with self.nothing_changes():
            try:
                what[chosen]()
            except Deposed:
                plane.begun.clear()

    # ── always ────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def each_has_what_is_his(self) -> None:
        """I10: the manifest is as it was applied, and the number is the load's within the manifest's range."""
        if self.generation == 0:
            return
        stored = self.leader.stored
        assert (stored.generation, stored.resolved) == (self.generation, resolved(self.manifest)), (
            "I10: the intent"
        )
        followed = self.leader.decided(Kind.AUTOSCALE)
        if self.manifest.most is not None:
            assert (followed.replicas if followed is not None else None) == self.decided, "I10: the load's number"
        wanted = self.leader.wanted()
        count = self.manifest.count(self.decided)
        assert (0 if wanted.standby else wanted.full) == count, "I10: how many there are to be"


QUICK = settings(
    max_examples=times(12, 600),
    stateful_step_count=15,
    derandomize=EFFORT == 1,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
UNTIL_CAUGHT = settings(QUICK, max_examples=200, phases=[Phase.generate], report_multiple_bugs=False)


def test_no_order_of_applies_loads_failures_and_leaders_breaks_an_invariant() -> None:
    run_state_machine_as_test(Planes, settings=QUICK)


# ── mutants ───────────────────────────────────────────────────────────────────────────────────────────────


def take_the_same_for_a_new_intent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resync of a repository ends a quarantine."""
    real = store.Store._apply

    def apply(self: store.Store, db: Any, change: Change, now: float, traceparent: str | None) -> Applied:
        done = real(self, db, change, now, traceparent)
        if done.result == "unchanged" and (old := self._get(db, change.key)) is not None:
            self._end_overrides(db, old.uid, (Kind.QUARANTINE,))
        return done

    monkeypatch.setattr(store.Store, "_apply", apply)


def forget_what_failed_while_rollouts_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision of a person hides one of the control plane."""
    real = overrides.in_force

    def in_force(kept: Any, now: float) -> Any:
        found = dict(real(kept, now))
        if Kind.RESTART in found:
            found.pop(Kind.QUARANTINE, None)
        return found

    monkeypatch.setattr(desired, "in_force", in_force)


def write_the_number_into_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoscaler applies: the next apply of the same manifest takes it back, and so on."""
    real = demand.Demand._follow_load

    def follow(self: demand.Demand, stored: StoredObject, policy: autoscaling.Policy) -> bool:
        asleep = real(self, stored, policy)
        followed = self._effective(stored).overrides.get(Kind.AUTOSCALE)
        if followed is not None:
            spec = {**stored.resolved, "replicas": followed.replicas}
            change = Change(stored.key, {}, f"scaled to {followed.replicas}", spec, stored.resource_version)
            self._store.apply([change])
        return asleep

    monkeypatch.setattr(demand.Demand, "_follow_load", follow)


def begin_anew_with_every_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """An apply of something else throws away what the load called for."""
    real = overrides.ended_by_intent

    def ended(old: Any, new: Any) -> tuple[Kind, ...]:
        return (*real(old, new), Kind.AUTOSCALE)

    monkeypatch.setattr(store, "ended_by_intent", ended)


def hold_the_number_against_a_new_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaling.Policy, "clamp", lambda self, replicas: replicas)


def keep_the_number_though_there_is_no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """The load's number outlives the range that it was chosen from, and counts."""
    real = desired._how_many

    def how_many(spec: Any, current: Any) -> tuple[int, bool]:
        followed = current.get(Kind.AUTOSCALE)
        if followed is not None and autoscaling.policy_of(spec) is None:
            return followed.replicas, False
        return real(spec, current)

    monkeypatch.setattr(desired, "_how_many", how_many)
    monkeypatch.setattr(store, "ended_by_intent", lambda old, new: (Kind.PIN, Kind.QUARANTINE))


def write_without_looking_who_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Database, "_before", lambda self, *_: None)


def look_who_leads_before_the_first_write_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was let write once goes on."""
    real = Database._before

    def before(self: Database, db: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if not getattr(self, "_was_let", False):
            real(self, db, cursor, statement, *rest)
            self._was_let = self._fenced  # type: ignore[attr-defined]

    monkeypatch.setattr(Database, "_before", before)


def start_and_stop_for_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim.Shim, "deposed", lambda self, epoch: False)


def lead_under_the_number_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease.Election, "_above", lambda self, epoch: max(epoch, 1))


@pytest.mark.parametrize(
    ("mutate", "caught"),
    first_in_ci(
        [
            (lead_under_the_number_of_the_last_one, "I11"),
            (take_the_same_for_a_new_intent, "I9"),
            (forget_what_failed_while_rollouts_are_held, "I9"),
            (write_the_number_into_the_manifest, "I10"),
            (begin_anew_with_every_apply, "I10"),
            (hold_the_number_against_a_new_range, "I10"),
            (keep_the_number_though_there_is_no_range, "I10"),
            (write_without_looking_who_leads, "I11"),
            (look_who_leads_before_the_first_write_only, "I11"),
            (start_and_stop_for_whoever_asks, "I11"),
        ]
    ),
)
def test_the_machine_catches_mutants(
    mutate: Callable[[pytest.MonkeyPatch], None], caught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=caught):
        run_state_machine_as_test(Planes, settings=UNTIL_CAUGHT)
