"""Leads canaries on: puts each on record, has it examined (`exam.judge`), looks at what the router has counted,
and has it go a step further, take over or be given up (`canary.decide`).

A canary is on record before any of it runs, and stays so until nothing of it does, so that its replicas are known
for what they are however it ends (`Effective.set_aside`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from quire_operators import canary, exam, rollout
from quire_operators.analysis import Measured, next_look
from quire_operators.desired import Canary, Effective
from quire_operators.overrides import Kind, Override
from quire_operators.records import StoredObject
from quire_operators.rollout import Goal
from quire_operators.routes import Routes
from quire_operators.store import Store
from quire_schemas import wire
from quire_schemas.resource import Key

FAILED = "CanaryFailed"
POLL = 0.5
"""Seconds between two looks."""


class Trials:
    """The canaries of all models. `serving` counts replicas of a template that serve, `roll_back` gives a revision
    up, `changed` is told keys that may need a pass; `clock` as the store's."""

    def __init__(
        self,
        store: Store,
        routes: Routes,
        effective: Callable[[StoredObject], Effective],
        serving: Callable[[str, str], int],
        roll_back: Callable[[StoredObject, rollout.RollBack], None],
        changed: Callable[[Key], None],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._routes = routes
        self._effective = effective
        self._serving = serving
        self._roll_back = roll_back
        self._changed = changed
        self._clock = clock
        self._compared: dict[str, wire.Comparison] = {}
        """By model: what the router has counted of its canary and of the stable revision."""

    def compared(self, model: str, tried: Canary) -> wire.Comparison | None:
        """What was counted of this canary; None before there is anything."""
        found = self._compared.get(model)
        return found if found is not None and found.template_hash == tried.revision.template_hash else None

    def note(self, wanted: Effective, tried: Canary) -> bool:
        """Put a canary on record, once what is left of another one has been sent away; says whether it was written
        now."""
        rows = self._store.replicas(wanted.stored.key.name)
        left = any(row.template_hash == wanted.set_aside and row.goal is Goal.RUN for row in rows)
        if tried.is_noted or left:
            return False
        noted = Override(Kind.CANARY, "platform", self._clock(), template_hash=tried.revision.template_hash)
        self._store.set_override(wanted.stored.uid, noted)
        return True

    def settle(self) -> float | None:
        """Look at each canary. Seconds until another look; None when there is none."""
        there = False
        for stored in self._store.objects("model"):
            if canary.policy_of(stored.resolved) is None:
                continue
            wanted = self._effective(stored)
            if wanted.canary is None:
                self._compared.pop(stored.key.name, None)
                self._forget(wanted)
                continue
            there = True
            if wanted.full:
                self._look(wanted, wanted.canary)
        return POLL if there else None

    def _forget(self, wanted: Effective) -> None:
        """Take a canary off the record that is over: the same template may come once more, as a new one."""
        kept, stable = wanted.overrides.get(Kind.CANARY), wanted.stable
        if kept is None:
            return
        template = kept.template_hash
        over = (stable is not None and stable.template_hash == template) or template != wanted.newest.template_hash
        rows = self._store.replicas(wanted.stored.key.name)
        if over and not (wanted.set_aside and any(row.template_hash == template for row in rows)):
            self._store.end_overrides(wanted.stored.uid, (Kind.CANARY,))

    def _look(self, wanted: Effective, tried: Canary) -> None:
        """One look at one canary."""
        stored, policy, stage, now = wanted.stored, tried.policy, tried.stage, self._clock()
        name, template = stored.key.name, tried.revision.template_hash
        held = Kind.HOLD in wanted.overrides
        if stage is None:
            if not held and self._serving(name, template):
                self._examine(wanted, tried)
            return
        if stage.failed and policy.gives_up:  # by now
            self._give_up(wanted, tried, *stage.failed.split(": ", 1))
            return
        told = self._routes.comparison(name)
        if told is None or told.template_hash != template:
            return  # the router has not begun to count yet, or does not answer
        news = self._compared.get(name) != told
        self._compared[name] = told
        match canary.decide(policy, stage, Measured.of(told.stable), Measured.of(told.new), now):
            case canary.Fail(because):
                self._give_up(wanted, tried, FAILED, because)
            case canary.Stay(after):
                self._keep(stored, tried, after)
            case canary.Next() | canary.Promote() if held:
                if told.new.requests >= next_look(stage.looked_at):  # it was looked at all the same
                    self._keep(stored, tried, replace(stage, looked_at=told.new.requests))
            case canary.Next(after):
                self._begin(stored, tried, after)
            case canary.Promote():
                self._store.set_override(stored.uid, canary.Stage(canary.PROMOTED, now).kept(template, now))
                text = f"revision {tried.revision.n} takes over: all steps are done"
                self._store.add_event(stored.key, "Normal", "CanaryPromoted", text)
                self._changed(stored.key)
        if news:
            self._changed(stored.key)

    def _examine(self, wanted: Effective, tried: Canary) -> None:
        """Begin the first step of a canary that serves, once it has passed its exam."""
        stored, paper, told = wanted.stored, tried.policy.paper, self._routes.comparison(wanted.stored.key.name)
        first = canary.Stage(0, self._clock())
        if paper is None:
            self._begin(stored, tried, first)
            return
        if told is None or told.template_hash != tried.revision.template_hash:
            return
        news = self._compared.get(stored.key.name) != told
        self._compared[stored.key.name] = told
        match exam.judge(paper, told.examined):
            case exam.Passed(text):
                self._store.add_event(
                    stored.key, "Normal", "CanaryExamined", f"revision {tried.revision.n}: {text}"
                )
                self._begin(stored, tried, replace(first, examined=text))
            case exam.Failed(reason, because):
                self._give_up(wanted, tried, reason, because)
            case exam.Waits() if news:
                self._changed(stored.key)

    def _give_up(self, wanted: Effective, tried: Canary, reason: str, because: str) -> None:
        """It has failed: it is rolled back, or stays without requests where it is not to be."""
        stored, new = wanted.stored, tried.revision
        if not tried.policy.gives_up:
            stage = tried.stage or canary.Stage(0, self._clock())
            self._keep(stored, tried, replace(stage, failed=f"{reason}: {because}"))
            self._store.add_event(
                stored.key, "Warning", reason, f"revision {new.n} has no requests now: {because}"
            )
            self._changed(stored.key)
            return
        self._roll_back(stored, rollout.RollBack(new.n, new.template_hash, wanted.revision.n, reason, because))
        self._store.add_event(stored.key, "Warning", reason, because)
        self._changed(stored.key)

    def _keep(self, stored: StoredObject, tried: Canary, stage: canary.Stage) -> None:
        if stage != tried.stage:
            self._store.set_override(stored.uid, stage.kept(tried.revision.template_hash, stage.since))

    def _begin(self, stored: StoredObject, tried: Canary, stage: canary.Stage) -> None:
        """A step begins."""
        self._keep(stored, tried, stage)
        which = f"step {stage.step + 1} of {len(tried.policy.steps)}: {tried.policy.says(stage.step)}"
        self._store.add_event(stored.key, "Normal", "CanaryStep", f"revision {tried.revision.n}: {which}")
        self._changed(stored.key)
