"""What is asked for decides what is there: models on demand come into memory and leave it for each other, and the
replicas of others follow their load.

`residency` and `autoscaling` decide, without I/O; here the router's word on use is put before them, and what they
decide is written beside the intent as an override, which the next pass of a model carries out. What is remembered
between two looks is in memory alone: a control plane that starts anew looks again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from quire_operators import autoscaling, residency
from quire_operators.desired import Effective, is_on_demand, own_rows, priority_of
from quire_operators.devices import Inventory, held
from quire_operators.ledger import Ledger
from quire_operators.overrides import Kind, Override, in_force
from quire_operators.placement import Placement
from quire_operators.records import StoredObject
from quire_operators.rollout import Goal, Router
from quire_operators.routes import ROUTES, Routes
from quire_operators.sqlite import StoreError
from quire_operators.store import Store
from quire_schemas import wire
from quire_schemas.quantities import parse_percent
from quire_schemas.resource import Key

log = logging.getLogger(__name__)

DEMAND_POLL = 0.2
"""Seconds between two looks at whether somebody asks for a model that is not in memory."""
LOAD_POLL = 1.0
"""Seconds between two looks at the load of models whose replicas follow it."""


class Demand:
    """What all models are asked for. `clock` gives unix seconds and never jumps."""

    def __init__(
        self,
        store: Store,
        routes: Routes,
        ledger: Ledger,
        detect: Callable[[], Inventory],
        effective: Callable[[StoredObject], Effective],
        is_fetching: Callable[[Effective], bool],
        changed: Callable[[Key], None],
        clock: Callable[[], float],
    ) -> None:
        """`is_fetching` says whether files that a model needs are on their way; `changed` is told keys that may
        need a pass."""
        self._store = store
        self._routes = routes
        self._ledger = ledger
        self._detect = detect
        self._effective = effective
        self._is_fetching = is_fetching
        self._changed = changed
        self._clock = clock
        self._asked: dict[str, float] = {}
        """Models that want replicas and have no room for them, or are asked for and not in memory; since when."""
        self._short: set[str] = set()
        """Those of them for which nobody can make room."""
        self._loads: dict[str, autoscaling.Memory] = {}
        """By model: what its load called for."""

    def wants_room(self, model: str) -> None:
        """A model has replicas to start, and no room for them."""
        self._asked.setdefault(model, self._clock())

    def is_short(self, model: str) -> bool:
        """Whether nobody can make the room that a model wants."""
        return model in self._short

    def is_being_made_room_for(self, model: str) -> bool:
        """Whether a model on demand may leave for it."""
        return model not in self._short and model in self._asked and bool(self._guests())

    # ── models on demand ──────────────────────────────────────────────────────────────────────────────────

    def _guests(self) -> list[str]:
        """Models on demand that are in memory, and might leave it."""
        return [
            stored.key.name
            for stored in self._store.objects("model")
            if is_on_demand(stored.resolved)
            and Kind.RESIDENT in in_force(self._store.overrides(stored.uid), self._clock())
        ]

    def settle_residency(self) -> float | None:
        """Load and unload models that are there on demand, by what the router tells of their use. Seconds until
        another look may bring more; None when nobody waits, and none is there on demand."""
        stored = self._store.objects("model")
        if not any(is_on_demand(each.resolved) for each in stored):
            self._asked.clear()
            self._short.clear()
            return None
        if self._routes.knowledge() is not Router.KNOWN:
            return None
        now = self._clock()
        tenants = [self._tenant(self._effective(each), now) for each in stored]
        self._asked = {tenant.model: at for tenant in tenants if (at := tenant.asked_since) is not None}
        planned = residency.plan(tenants, self._detect(), self._ledger.now().taken, now)
        for move in planned.moves:
            self._move_in_or_out(move)
        short = set(planned.short)
        for name in short ^ self._short:
            self._changed(Key("model", name))
        self._short = short
        return DEMAND_POLL if self._asked or any(not tenant.resident for tenant in tenants) else None

    def _tenant(self, wanted: Effective, now: float) -> residency.Tenant:
        stored, name = wanted.stored, wanted.stored.key.name
        placement = Placement.from_dict(wanted.revision.placement)
        rows = self._store.replicas(name)
        runs = [row for row in own_rows(wanted, rows) if row.goal is Goal.RUN]
        use = self._routes.use(name) or wire.ModelUse(0)
        on_demand, deleting = is_on_demand(stored.resolved), stored.deletion_time is not None
        missing = 0 if deleting else max(wanted.full - len(runs), 0)
        if on_demand:  # further replicas take what room there is; nobody leaves for them
            asks = missing > 0 and not runs and use.waiting > 0
        else:
            asks = name in self._ledger.waiters
            missing = max(missing, asks)
        if asks and self._is_fetching(wanted):
            asks = False
        resident = wanted.overrides.get(Kind.RESIDENT)
        since = resident.at if resident is not None else 0.0
        leaves = deleting or (on_demand and wanted.standby)
        return residency.Tenant(
            model=name,
            on_demand=on_demand,
            resident=not wanted.standby,
            missing=missing,
            kind=placement.device,
            need=placement.memory,
            share=parse_percent(stored.resolved["engine"]["memory"]),
            device_ids=stored.resolved["placement"]["deviceIds"],
            priority=priority_of(stored.resolved),
            holds=held(rows),
            leaving=held(rows if leaves else [row for row in rows if row.goal is Goal.DRAIN]),
            asked_since=self._asked.get(name, now) if asks else None,
            busy=use.in_flight > 0,
            used_at=since if use.idle is None else max(now - use.idle, since),
            serving_since=min((row.ready_since for row in runs if row.ready_since is not None), default=None),
        )

    def _move_in_or_out(self, move: residency.Load | residency.Unload) -> None:
        key = Key("model", move.model)
        stored = self._store.get(key)
        if stored is None:
            return
        log.info("%s: %s", key, move)
        if isinstance(move, residency.Load):
            override = Override(Kind.RESIDENT, "platform", self._clock(), "it was asked for")
            self._store.set_override(stored.uid, override)
            self._store.add_event(key, "Normal", "Loading", "it is asked for")
        else:
            self._store.end_overrides(stored.uid, (Kind.RESIDENT,))
            self._store.add_event(key, "Normal", "Unloading", f"model/{move.because} needs its room")
        self._changed(key)
        self._changed(ROUTES)

    # ── models whose replicas follow the load ─────────────────────────────────────────────────────────────

    def settle_scaling(self) -> float | None:
        """Have as many replicas as the load calls for, of models that declare a range. Seconds until another look;
        None when there are no such models."""
        followed = {
            stored.key.name: (stored, policy)
            for stored in self._store.objects("model")
            if stored.deletion_time is None and (policy := autoscaling.policy_of(stored.resolved)) is not None
        }
        for gone in self._loads.keys() - followed.keys():
            del self._loads[gone]
        asleep = False
        for stored, policy in followed.values():
            try:
                asleep |= self._follow_load(stored, policy)
            except StoreError:
                raise
            except Exception:  # one model's trouble is not the others', nor the routing table's
                log.exception("%s: its load is not followed", stored.key)
        return (DEMAND_POLL if asleep else LOAD_POLL) if followed else None

    def _follow_load(self, stored: StoredObject, policy: autoscaling.Policy) -> bool:
        """One look at one model; says whether it has no replica until somebody asks."""
        name, now = stored.key.name, self._clock()
        memory = self._loads.setdefault(name, autoscaling.Memory())
        use, wanted = self._routes.use(name), self._effective(stored)
        if self._routes.status is not None:
            memory.hear_from(self._routes.status.pid)
        decided_otherwise = Kind.SCALE in wanted.overrides or Kind.PAUSE in wanted.overrides
        if use is None or decided_otherwise:
            memory.forget()
            return False
        followed = wanted.overrides.get(Kind.AUTOSCALE)
        current = followed.replicas if followed is not None else None
        rows = [row for row in own_rows(wanted, self._store.replicas(name)) if row.goal is Goal.RUN]
        served = [row.ready_since for row in rows if row.ready_since is not None]
        # at most since the first of them serves, and the router can be asked: who comes up is waited for
        since = now - max(min(served, default=now), now if memory.began is None else memory.began)
        idle = since if use.idle is None else min(use.idle, since)
        load = autoscaling.Load(use.in_flight, use.ready, use.queue_time, use.kv_usage, idle)
        given = autoscaling.first_count(policy) if current is None else current
        decision = autoscaling.decide(policy, memory, load, given, wanted.stable is not None, now)
        if decision.replicas != current and (current is not None or decision.replicas != given):
            override = Override(Kind.AUTOSCALE, "platform", now, decision.because, replicas=decision.replicas)
            self._store.set_override(stored.uid, override)
            what = "ScaledUp" if decision.replicas > given else "ScaledDown"
            because = f": {decision.because}" if decision.because else ""
            self._store.add_event(stored.key, "Normal", what, f"{given} → {decision.replicas} replicas{because}")
            self._changed(stored.key)
            self._changed(ROUTES)
        return decision.replicas == 0
