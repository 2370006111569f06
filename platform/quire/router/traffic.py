"""Where a request goes: pure decisions by names, headers, weights and callers, from the table's routes.

A name is looked for in this order: the routes with headers that all match, those with more headers first and of
equally many the older one; the Models' own names; the routes without headers. The control plane sees to it that no
two claim the same.

A route's backends that are in the table share its requests by weight, *exactly*: at any moment each has had what
is its due, but for less than one request (`Shares`). A caller that is to stay (`sticky: user`, `header:…`) goes by
a hash instead, so that each caller has one backend, and callers spread by weight; whoever gives no name goes by
weight. If no backend is there, or all weights are 0, the request has failed as `Unavailable` before it began.

`Traffic` holds the one thing that changes with each request: whose turn it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from quire_schemas import wire
from quire_schemas.failures import DEFAULT_ATTEMPTS, Failure, Retried

PREFIX: Final = "prefix"
USER: Final = "user"
HEADER: Final = "header:"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is known of a request before its model is. `headers` are as ASGI has them, `body` is read when somebody
    wants to know who the caller is."""

    name: str
    headers: Sequence[tuple[bytes, bytes]] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request is to be served. The defaults are those of one that goes by no Route."""

    route: str = ""
    caller: str | None = None
    """Whoever is to stay with one replica."""
    by_prefix: bool = True
    """Replicas are chosen by what they have of the prompt."""
    first_token: float | None = None
    """Seconds until the first token, from `Job.begun_at`."""
    request: float | None = None
    """Seconds until the end, from the arrival."""
    attempts: int = DEFAULT_ATTEMPTS
    retried: tuple[Retried, ...] = ("ConnectionError", "503")

    def patient(self) -> Terms:
        """Those of a request that nobody waits for."""
        return dataclasses.replace(self, first_token=None, request=None)


PLAIN: Final = Terms()


@dataclass(frozen=True, slots=True)
class Way:
    """Where one request goes. `model`, which may be one with an adapter, is None if there is none that it could go
    to."""

    name: str
    model: str | None
    route: wire.TrafficRoute | None = None
    terms: Terms = PLAIN
    mirror: str | None = None
    """The model that gets a copy of it, which may be one with an adapter."""

    def instead(self, failure: Failure, tried: Collection[str], there: Container[str]) -> str | None:
        """The first model that steps in for this failure, is there, and was not tried; None if there is none."""
        for fallback in self.route.fallbacks if self.route is not None else ():
            if failure in fallback.when and fallback.model in there and fallback.model not in tried:
                return fallback.model
        return None


def adapter_of(target: str | None) -> str:
    """The adapter of a model that is named with one; empty without."""
    return (target or "").partition(wire.ADAPTER_MARK)[2]


class Shares:
    """Turns by weight: after any number of them each has had its share, but for less than one.

    Someone's k-th turn has a window, from when k - 1 turns are his due until k are, and of those whose window is
    open the one goes first whose window closes first. Windows of fractions that sum up to 1 can all be kept that
    way, with whole turns, too.
    """

    __slots__ = ("_had", "_total", "_turn", "weights")

    def __init__(self, weights: Sequence[int]) -> None:
        """Not all of `weights` are 0."""
        self.weights = tuple(weights)
        self._total = sum(weights)
        self._had = [0] * len(weights)
        self._turn = 0

    @property
    def next(self) -> int:
        """Whose turn it is, by the place in `weights`."""
        open_ = [
            (-((had + 1) * self._total // -weight), place)
            for place, (had, weight) in enumerate(zip(self._had, self.weights, strict=True))
            if weight and had * self._total // weight <= self._turn
        ]
        return min(open_)[1]

    def take(self) -> int:
        """Whose turn it is; the turn is then over."""
        place = self.next
        self._had[place] += 1
        self._turn += 1
        if self._turn == self._total:  # all have exactly what is theirs
            self._had, self._turn = [0] * len(self._had), 0
        return place


def stays_with(caller: str, weights: Mapping[str, int]) -> str | None:
    """The one of those with a weight that a caller always has; None if there is none.

    Callers spread by weight. When a weight changes, or somebody leaves, only as many move as must.
    """
    rated = {name: -math.log(_fraction(caller, name)) / weight for name, weight in weights.items() if weight}
    return min(rated, key=lambda name: (rated[name], name), default=None)


def _fraction(caller: str, name: str) -> float:
    """A number above 0 and below 1, the same for the same two."""
    digest = hashlib.blake2b(f"{name}\0{caller}".encode(errors="surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) + 0.5) / 2.0**64


class _Caller(msgspec.Struct):
    """The fields of all APIs that name the end user."""

    safety_identifier: Any = None
    user: Any = None
    user_profile_id: Any = None
    metadata: Any = None


def user_of(body: bytes) -> str | None:
    """The end user that a request names, in the field that its API has for that."""
    try:
        found = msgspec.json.decode(body, type=_Caller)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None  # whoever reads the request says what is wrong with it
    labels = found.metadata if isinstance(found.metadata, dict) else {}
    named = (found.safety_identifier, found.user, found.user_profile_id, labels.get("user_id"))
    return next((name for name in named if isinstance(name, str) and name), None)


def caller_of(sticky: str, asked: Asked) -> str | None:
    """Who asks, by what a route keeps callers apart by; None where it does not, or nobody is named."""
    if sticky == USER:
        return user_of(asked.body)
    if sticky.startswith(HEADER):
        wanted = sticky.removeprefix(HEADER).encode()
        return next((value.decode("latin-1") for name, value in asked.headers if name == wanted), None)
    return None


def matches(route: wire.TrafficRoute, headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether all headers are there that a route wants."""
    return all((name.encode(), value.encode("utf-8")) in headers for name, value in route.headers)


@dataclass(slots=True)
class _Turns:
    """Of one route, as long as its backends and their weights stay."""

    models: tuple[str, ...]
    shares: Shares | None
    mirror: Shares | None


@dataclass(slots=True)
class Traffic:
    """The routes of one table, and whose turn it is at each."""

    _own: Mapping[str, str] = field(default_factory=dict)
    _routes: dict[str, list[wire.TrafficRoute]] = field(default_factory=dict)
    _there: Container[str] = ()
    _turns: dict[str, _Turns] = field(default_factory=dict)

    def set(self, routes: Iterable[wire.TrafficRoute], own: Mapping[str, str], there: Collection[str]) -> None:
        """Act by these routes. `own` gives Models and adapters by the names that they have themselves, `there` is
        all of them.

        Turns go on where nothing of them changed.
        """
        self._own, self._there = own, there
        by_name: dict[str, list[wire.TrafficRoute]] = {}
        turns: dict[str, _Turns] = {}
        for route in sorted(routes, key=lambda each: (-len(each.headers), each.created, each.route)):
            for name in route.names:
                by_name.setdefault(name, []).append(route)
            turns[route.route] = _kept(self._turns.get(route.route), _turns(route, there))
        self._routes, self._turns = by_name, turns

    def route_for(self, asked: Asked) -> wire.TrafficRoute | None:
        """The route that has the request; None if it goes by a Model's own name, or nobody has it."""
        for route in self._routes.get(asked.name, ()):
            if not route.headers and asked.name in self._own:
                return None
            if matches(route, asked.headers):
                return route
        return None

    def way(self, asked: Asked, *, ahead: bool = False) -> Way | None:
        """Where the request goes; None if nobody has the name. `ahead`: only look, and leave whose turn it is."""
        route = self.route_for(asked)
        if route is None:
            own = self._own.get(asked.name)
            return None if own is None else Way(asked.name, own)
        caller, weighed, _ = self.turns_at(route, asked)
        model, copied = (None, False) if ahead else self.take(route.route, weighed=weighed) or (None, False)
        return self.going(route, asked, caller, model, copied=copied)

    def turns_at(self, route: wire.TrafficRoute, asked: Asked) -> tuple[str | None, bool, bool]:
        """The caller who stays with what he has, whether it is by turns which model has a request, and whether
        some are copied."""
        turns, caller = self._turns[route.route], caller_of(route.sticky, asked)
        weighed = caller is None and turns.shares is not None and sum(map(bool, turns.shares.weights)) > 1
        return caller, weighed, turns.mirror is not None

    def take(self, name: str, *, weighed: bool) -> tuple[str | None, bool] | None:
        """The model whose turn it is at a route, if the request is `weighed`, and whether it is copied; the turns
        are then over. None if there is no such route."""
        turns = self._turns.get(name)
        if turns is None:
            return None
        model = turns.models[turns.shares.take()] if weighed and turns.shares is not None else None
        return model, turns.mirror is not None and turns.mirror.take() == 0

    def going(
        self, route: wire.TrafficRoute, asked: Asked, caller: str | None, model: str | None, *, copied: bool
    ) -> Way:
        """The way by a route to the model whose turn it is; None: to the one that its caller stays with, or that
        is next."""
        turns = self._turns[route.route]
        if model is None and turns.shares is not None and caller is not None:
            model = stays_with(caller, dict(zip(turns.models, turns.shares.weights, strict=True)))
        elif model is None and turns.shares is not None:
            model = turns.models[turns.shares.next]
        return Way(
            asked.name,
            model,
            route,
            Terms(
                route.route,
                caller,
                route.sticky == PREFIX or (caller is None and route.sticky != "none"),
                route.first_token,
                route.request,
                route.attempts,
                route.retried,
            ),
            route.mirror.model if copied and route.mirror is not None else None,
        )

    def names(self, headers: Sequence[tuple[bytes, bytes]] = ()) -> list[str]:
        """All names that a request with these headers may use."""
        found = {name for name in self._routes if self.route_for(Asked(name, headers)) is not None}
        return sorted({*self._own, *found})

    def behind_name(self, name: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> list[str]:
        """The models that requests for a name with these headers go to."""
        route = self.route_for(Asked(name, headers))
        if route is not None:
            return self.behind(route)
        return [self._own[name]] if name in self._own else []

    def behind(self, route: wire.TrafficRoute) -> list[str]:
        """The models that its requests go to first; those that step in, if there is none."""
        models = [backend.model for backend in route.backends if backend.weight and backend.model in self._there]
        return models or [each.model for each in route.fallbacks if each.model in self._there]


def _turns(route: wire.TrafficRoute, there: Container[str]) -> _Turns:
    """At their beginning. A backend that is not there leaves its share to the others."""
    known = [backend for backend in route.backends if backend.model in there]
    mirror, percent = None, route.mirror.percent if route.mirror is not None else 0
    if percent:
        mirror = Shares((percent, 100 - percent))
    weights = [backend.weight for backend in known]
    return _Turns(tuple(backend.model for backend in known), Shares(weights) if any(weights) else None, mirror)


def _kept(old: _Turns | None, new: _Turns) -> _Turns:
    """The new turns, gone on with where they are as they were."""
    if old is None:
        return new
    if old.models == new.models and _weights(old.shares) == _weights(new.shares):
        new.shares = old.shares
    if _weights(old.mirror) == _weights(new.mirror):
        new.mirror = old.mirror
    return new


def _weights(shares: Shares | None) -> tuple[int, ...]:
    return shares.weights if shares is not None else ()
