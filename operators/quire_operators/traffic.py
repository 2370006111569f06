"""Kind Route: which names it has, where its requests go, and what is told of it.

Pure but for `RouteReconciler`, which writes statuses. Names are given by one rule (`owners`): a claim is a name
with the headers that must come with it, and of two objects with one claim the older keeps it. A Model claims its
names without headers. What is deleted claims nothing. Admission refuses what would lose; should an object lose all
the same, its status says so, and the rest of it is served.

A Route asks for nothing but to be in the router's table, so its reconciler has nothing to start or stop: it
reports, and lets a deleted Route go once the router acts by a table without it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from quire_operators import adapters, status
from quire_operators.clock import on_the_wall
from quire_operators.gateway import GatewayReconciler
from quire_operators.records import StoredObject
from quire_operators.rollout import Router
from quire_operators.routes import Routes
from quire_operators.status import Fact, Reason
from quire_operators.store import Store
from quire_operators.tracing import acted
from quire_schemas import wire
from quire_schemas.quantities import parse_duration
from quire_schemas.resource import Key
from quire_schemas.rules import headers_text

KIND = "route"
RECHECK_SECONDS = 1.0
"""Between two looks at what a status waits for, should no event tell of it."""


@dataclass(frozen=True, slots=True, order=True)
class Claim:
    """A model name that requests use, with the headers that they must carry as well."""

    name: str
    headers: tuple[tuple[str, str], ...] = ()


def claims(kind: str, spec: Mapping[str, Any]) -> tuple[Claim, ...]:
    """What an object with this resolved spec claims, in the order of its manifest."""
    if kind == "model":
        names = spec["servedModelNames"]
        own = [f"{name}{wire.ADAPTER_MARK}{each['name']}" for each in adapters.declared(spec) for name in names]
        return tuple(map(Claim, [*names, *own]))
    if kind == KIND:
        headers = _headers(spec)
        return tuple(Claim(name, headers) for name in spec["match"]["modelNames"])
    return ()


def owners(objects: Iterable[StoredObject]) -> dict[Claim, Key]:
    """Who has each claim: the oldest of those that make it."""
    found: dict[Claim, Key] = {}
    for stored in sorted(objects, key=lambda each: (each.created_at, each.key)):
        if stored.deletion_time is None:
            for claim in claims(stored.key.kind, stored.resolved):
                found.setdefault(claim, stored.key)
    return found


def named(models: Sequence[wire.ModelRoute], owned: Mapping[Claim, Key]) -> tuple[wire.ModelRoute, ...]:
    """The models with the names that are theirs."""

    def kept(model: wire.ModelRoute, names: Sequence[str]) -> tuple[str, ...]:
        mine = Key("model", model.model)
        return tuple(name for name in names if owned.get(Claim(name), mine) == mine)

    return tuple(
        msgspec.structs.replace(
            model,
            names=kept(model, model.names),
            adapters=tuple(wire.AdapterRoute(each.name, kept(model, each.names)) for each in model.adapters),
        )
        for model in models
    )


def table(objects: Iterable[StoredObject], owned: Mapping[Claim, Key]) -> tuple[wire.TrafficRoute, ...]:
    """The routes for the router: those that have a name."""
    routes = [
        _route(stored, owned) for stored in objects if stored.key.kind == KIND and stored.deletion_time is None
    ]
    return tuple(route for route in routes if route.names)


def _headers(spec: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((header["name"].lower(), header["exact"]) for header in spec["match"]["headers"]))


def _route(stored: StoredObject, owned: Mapping[Claim, Key]) -> wire.TrafficRoute:
    spec = stored.resolved
    timeouts, retries, mirror = spec["timeouts"], spec["retries"], spec["mirror"]

    def seconds(name: str) -> float | None:
        return None if timeouts[name] is None else parse_duration(timeouts[name])

    sticky, _, header = spec["sticky"]["by"].partition(":")
    return wire.TrafficRoute(
        route=stored.key.name,
        names=tuple(claim.name for claim in claims(KIND, spec) if owned.get(claim) == stored.key),
        created=int(stored.created_at),
        backends=tuple(wire.Backend(_name(each), each["weight"]) for each in spec["backends"]),
        headers=_headers(spec),
        sticky=f"{sticky}:{header.lower()}" if header else sticky,
        fallbacks=tuple(wire.Fallback(_name(each), tuple(each["when"])) for each in spec["fallbacks"]),
        first_token=seconds("firstToken"),
        request=seconds("request"),
        attempts=retries["maxAttempts"],
        retried=tuple(retries["when"]),
        mirror=wire.Mirror(_name(mirror), mirror["percent"]) if mirror is not None else None,
    )


def _name(entry: Mapping[str, Any]) -> str:
    """The name of what a backend, a stand-in or a mirror is."""
    return Target(entry["model"], entry.get("adapter"), "").name


@dataclass(frozen=True, slots=True)
class Target:
    """What a Route sends requests to: a Model, or one of its adapters."""

    model: str
    adapter: str | None
    path: str
    """Of the entry that names it."""

    @property
    def name(self) -> str:
        """As the router has it."""
        return self.model if self.adapter is None else f"{self.model}{wire.ADAPTER_MARK}{self.adapter}"

    def lack(self, there: Container[str], routes: Container[str]) -> tuple[str, str] | None:
        """What of it is not among the Models and adapters of these names, and the path of the field that names
        that; None if it is there. `routes` are names of Routes, which are no Models."""
        if self.model not in there:
            mixed_up = f" ({self.model} is a Route, and requests go to a Model)" if self.model in routes else ""
            return f"model/{self.model}{mixed_up}", f"{self.path}.model"
        return (
            None
            if self.name in there
            else (f"adapter {self.adapter!r} of model/{self.model}", f"{self.path}.adapter")
        )


def targets(spec: Mapping[str, Any]) -> list[Target]:
    """All that a resolved spec names."""
    found = [(each, f"spec.backends[{at}]") for at, each in enumerate(spec["backends"])]
    found += [(each, f"spec.fallbacks[{at}]") for at, each in enumerate(spec["fallbacks"])]
    if spec["mirror"] is not None:
        found.append((spec["mirror"], "spec.mirror"))
    return [Target(each["model"], each.get("adapter"), path) for each, path in found]


def names_of(model: str, spec: Mapping[str, Any]) -> list[str]:
    """A Model and its adapters, as `Target.name` has them, by its resolved spec."""
    return [model, *(Target(model, each["name"], "").name for each in adapters.declared(spec))]


def hindrances(
    model: str, spec: Mapping[str, Any], told: wire.ModelRoute | None, against: str | None
) -> dict[str, str | None]:
    """What keeps a Model and its adapters from answering, by their names: what is `against` it; and of adapters
    that the router was not `told` of, that a rollout is to bring them. What one takes away is there till then."""
    found: dict[str, str | None] = dict.fromkeys(names_of(model, spec), against)
    if told is None:
        return found
    late: dict[str, str | None] = dict.fromkeys(found, against or Reason.PROGRESS_MADE.value)
    late.update({model: against} | {Target(model, each.name, "").name: against for each in told.adapters})
    return late


# ── status ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class View:
    """One Route with what its status depends on."""

    stored: StoredObject
    lost: Mapping[str, Key]
    """Names that others have, and who."""
    models: Mapping[str, str | None]
    """Of each Model that is stored, and of its adapters, by `Target.name`: what keeps it from answering a request
    now, None if nothing."""
    routes: Container[str]
    """Names of Routes, which somebody may take for Models."""
    taken: bool
    """The router acts by it as it is."""
    older: bool
    """The router is of a version that knows no routes."""
    unavailable: str | None
    """Why the router cannot be reached."""


def facts(view: View) -> list[Fact]:
    """The conditions of a Route that is not deleted."""
    spec = view.stored.resolved
    gone = _gone(view)
    there = {_name(each): each["weight"] for each in spec["backends"] if _name(each) in view.models}
    found = (
        Fact("BackendsFound", False, Reason.BACKEND_NOT_FOUND, f"there is no {gone}")
        if gone
        else Fact("BackendsFound", True, Reason.VALID)
    )
    accepted = Fact("Accepted", True, Reason.VALID)
    if view.lost:
        told = ", ".join(f"{name!r} is a name of {key}" for name, key in view.lost.items())
        accepted = Fact("Accepted", False, Reason.NAME_CONFLICT, f"{told}, which is older")
    return [accepted, found, _rolled_out(view), _ready(view, there, gone), _stalled(view, there, gone)]


def _gone(view: View) -> str:
    """All that the Route names and that does not exist."""
    lacks = [each.lack(view.models, view.routes) for each in targets(view.stored.resolved)]
    return ", ".join(dict.fromkeys(lack[0] for lack in lacks if lack is not None))


def _stand_ins(view: View) -> list[str]:
    """Those that exist and have the requests where no backend can."""
    named = [_name(each) for each in view.stored.resolved["fallbacks"] if "Unavailable" in each["when"]]
    return [name for name in named if name in view.models]


def _is_off(view: View) -> bool:
    """Whether it is by the Route's own words that no backend has any request."""
    return not any(each["weight"] for each in view.stored.resolved["backends"])


def _rolled_out(view: View) -> Fact:
    if view.taken:
        return Fact("RolledOut", True, Reason.UP_TO_DATE)
    if view.unavailable is not None:
        return Fact("RolledOut", False, Reason.ROUTER_NOT_READY, view.unavailable)
    text = "the router has not taken it yet"
    if view.older:
        text = "the router is of an earlier version; platform down and platform up start a new one"
    return Fact("RolledOut", False, Reason.HOT_UPDATE_PENDING, text)


def _ready(view: View, there: Mapping[str, int], gone: str) -> Fact:
    if view.unavailable is not None:
        return Fact("Ready", False, Reason.ROUTER_NOT_READY, view.unavailable)
    if len(view.lost) == len(view.stored.resolved["match"]["modelNames"]):
        return Fact("Ready", False, Reason.NAME_CONFLICT, "all of its names are those of others")
    against = {name: view.models[name] for name, weight in there.items() if weight}
    serving = [name for name, why in against.items() if why is None]
    serving = serving or [name for name in _stand_ins(view) if view.models[name] is None]
    if serving and view.taken:
        return Fact("Ready", True, Reason.SERVING, _shares(there, view.models) or f"{serving[0]} stands in")
    if serving:
        return Fact("Ready", False, Reason.HOT_UPDATE_PENDING, "the router does not act by it yet")
    if _is_off(view) and there:
        return Fact("Ready", False, Reason.NO_WEIGHT, "all weights are 0, so no request goes anywhere")
    if not against:
        idle = f"; the weight of {', '.join(there)} is 0" if there else ""
        return Fact("Ready", False, Reason.BACKEND_NOT_FOUND, f"there is no {gone}{idle}")
    told = "; ".join(f"{name}: {why}" for name, why in against.items())
    wanted_so = set(against.values()) <= {Reason.STOPPED.value, Reason.PAUSED.value}
    return Fact("Ready", False, Reason.STOPPED if wanted_so else Reason.BACKEND_NOT_READY, told)


def _shares(weights: Mapping[str, int], models: Mapping[str, str | None]) -> str:
    """Who has which part of the requests, and what keeps one from answering them."""
    total = sum(weights.values())
    told = []
    for name, weight in weights.items():
        if weight:
            against = "" if models[name] is None else f" ({models[name]})"
            told.append(f"{name} {100 * weight / total:.4g} %{against}")
    return ", ".join(told)


def _stalled(view: View, there: Mapping[str, int], gone: str) -> Fact:
    if view.lost:
        return Fact("Stalled", True, Reason.NAME_CONFLICT, "a name belongs to one object")
    off = _is_off(view) and there  # which is nothing to be put right
    if not off and not any(there.values()) and not _stand_ins(view):
        return Fact("Stalled", True, Reason.BACKEND_NOT_FOUND, f"there is no {gone}")
    return Fact("Stalled", False, Reason.PROGRESS_MADE)


def summary(found: Sequence[Fact], *, deleting: bool) -> str:
    """A few words for a table; may change at any time."""
    by_type = {fact.type: fact for fact in found}
    if deleting:
        return "Deleting"
    if by_type["Stalled"].status:
        return f"Stalled: {by_type['Stalled'].reason}"
    if not by_type["Ready"].status:
        return by_type["Ready"].reason.value
    return "Serving" if by_type["BackendsFound"].status else "Serving, and a model is missing"


class RouteReconciler:
    """One pass over one Route. `clock` is the store's."""

    def __init__(
        self, store: Store, routes: Routes, gateway: GatewayReconciler, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._routes = routes
        self._gateway = gateway
        self._clock = clock

    def fill(
        self,
        models: Sequence[wire.ModelRoute],
        http: wire.HttpSettings,
        access: tuple[wire.Tenant, ...] = (),
        budgets: tuple[wire.AccessBudget, ...] = (),
    ) -> wire.RoutingTable:
        """The routing table of these models, with the names that are theirs, of all Routes, and of these tenants
        and their budgets; not numbered."""
        objects = self._store.objects()
        owned = owners(objects)
        return wire.RoutingTable(0, named(models, owned), http, table(objects, owned), access, budgets)

    def reconcile(self, key: Key) -> float | None:
        """Report; seconds until it wants to run again, or None to wait for a hint."""
        stored = self._store.get(key)
        if stored is None:
            return None
        if stored.deletion_time is not None:
            if self._is_in_force(stored):
                self._write(stored)
                return RECHECK_SECONDS
            self._store.add_event(key, "Normal", "Deleted", "the router sends nothing by it any more")
            self._store.remove(key)
            acted("the route is gone")
            return None
        return None if self._write(stored) else RECHECK_SECONDS

    def _is_in_force(self, stored: StoredObject) -> bool:
        """Whether the router may still act by a Route that is deleted."""
        if self._gateway.current() is None or self._routes.is_older("routes"):
            return False
        if self._routes.knowledge() is Router.DOWN:
            return False
        told = self._routes.in_force()
        return told is None or any(route.route == stored.key.name for route in told.routes)

    def _view(self, stored: StoredObject) -> View:
        objects = self._store.objects()
        owned = owners(objects)
        mine = claims(KIND, stored.resolved)
        told = self._routes.in_force()
        routed = {each.model: each for each in told.models} if told is not None else {}
        return View(
            stored=stored,
            lost={
                f"{claim.name}{headers_text(stored.resolved['match']['headers'])}": owned[claim]
                for claim in mine
                if owned.get(claim, stored.key) != stored.key
            },
            models={
                name: why
                for each in objects
                if _is_model(each)
                for name, why in hindrances(
                    each.key.name, each.resolved, routed.get(each.key.name), self._against(each)
                ).items()
            },
            routes={each.key.name for each in objects if each.key.kind == KIND},
            taken=told is not None and set(table([stored], owned)) <= set(told.routes),
            older=self._routes.is_older("routes"),
            unavailable=self._gateway.unavailable(),
        )

    def hindrance(self, model: Key) -> str | None:
        """What keeps a Model from answering a request now; None if nothing."""
        stored = self._store.get(model)
        return Reason.NOT_FOUND.value if stored is None or not _is_model(stored) else self._against(stored)

    def _against(self, model: StoredObject) -> str | None:
        """What its status says against a request now. A model on demand is there when it is asked for."""
        conditions = self._store.status(model.uid).get("conditions", ())
        ready = next((each for each in conditions if each["type"] == "Ready"), None)
        if ready is None:
            return Reason.STARTING.value
        good = ready["status"] == "True" or ready["reason"] in (Reason.ON_DEMAND, Reason.SCALED_TO_ZERO)
        return None if good else str(ready["reason"])

    def _write(self, stored: StoredObject) -> bool:
        """Write the status; whether all is as wished."""
        view = self._view(stored)
        found = facts(view)
        before = self._store.status(stored.uid)
        wall = on_the_wall(self._clock(), self._clock)
        shown = status.conditions(found, before.get("conditions", ()), stored.generation, wall)
        names = [claim.name for claim in claims(KIND, stored.resolved) if claim.name not in view.lost]
        document = {
            "observedGeneration": stored.generation,
            "summary": summary(found, deleting=stored.deletion_time is not None),
            "endpoints": {**self._gateway.endpoints(), "modelNames": names},
            "conditions": shown,
            "remedies": status.remedies(str(stored.key), shown),
        }
        self._store.put_status(stored.uid, document)
        known = {(each["reason"], each["message"]) for each in before.get("conditions", ())}
        bad = [fact for fact in found if fact.status is (fact.type == "Stalled")]
        for reason, message in dict.fromkeys((fact.reason, fact.message) for fact in bad):
            if reason in _GRAVE and (reason.value, message) not in known:
                self._store.add_event(stored.key, "Warning", reason.value, message)
        return not bad


_GRAVE = frozenset({Reason.BACKEND_NOT_FOUND, Reason.NAME_CONFLICT, Reason.NO_WEIGHT})
"""What is worth an event: somebody has to do something."""


def _is_model(stored: StoredObject) -> bool:
    return stored.key.kind == "model" and stored.deletion_time is None
