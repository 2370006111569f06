"""Access policies: the keys behind their references, what the router is told of them, and what their status tells.

A key that is declared by its hash is known already. One that a reference leads to is read at each look, at most
once in `LOOK_SECONDS`, and forgotten but for its id and digest: nothing else goes to the router, to the disk or
into a message. So a secret that is set, a file that is written anew and a reference that leads nowhere any more
count within seconds. A key that cannot be used takes nothing from the others of its policy. Of two policies with
one key the older keeps it, as with names of models: nobody takes a key away by being applied. One that has expired
keeps none.

`read` is the decision, pure but for the reading of secrets; `Policies` holds the conversation with the store. A
policy is in force when the router has acknowledged it; it is gone from the store when the router has acknowledged
that it is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, get_args

from quire_operators import status
from quire_operators.clock import on_the_wall
from quire_operators.records import StoredObject
from quire_operators.rollout import Router
from quire_operators.routes import Routes
from quire_operators.secrets import SecretNotFound, Secrets
from quire_operators.status import Fact, Reason
from quire_operators.store import Store
from quire_schemas import wire
from quire_schemas.access import Calendar
from quire_schemas.keys import MIN_LENGTH, Digest, is_usable
from quire_schemas.quantities import parse_duration, parse_money, parse_percent
from quire_schemas.resource import Key

KIND = "accesspolicy"
LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class KnownKey:
    """One declared key, and what is known of it; `problem` is why it does not work."""

    name: str
    source: str
    digest: Digest | None
    reason: Reason = Reason.ENFORCED
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy with its keys as they are now."""

    stored: StoredObject
    keys: tuple[KnownKey, ...]

    @property
    def usable(self) -> tuple[KnownKey, ...]:
        return tuple(key for key in self.keys if not key.problem)

    @property
    def expires_at(self) -> float | None:
        return expiry(self.stored.resolved)

    def tenant(self) -> wire.Tenant:
        """What the router is told."""
        spec = self.stored.resolved
        return wire.Tenant(
            name=self.stored.key.name,
            keys=tuple(
                wire.AccessKey(key.name, key.digest.sha256, key.digest.id)
                for key in self.usable
                if key.digest is not None
            ),
            models=tuple(spec["allow"]["models"]),
            operations=tuple(spec["allow"]["operations"]),
            limits=tuple(_limit(limit) for limit in spec["limits"]),
            priority=spec["priority"],
            expires_at=self.expires_at,
        )

    def budgets(self) -> tuple[wire.AccessBudget, ...]:
        """What the router is told of its budgets."""
        return tuple(_budget(self.stored.key.name, each) for each in self.stored.resolved.get("budgets", ()))


def _budget(policy: str, declared: Mapping[str, Any]) -> wire.AccessBudget:
    per, cost = declared["per"], declared["cost"]
    return wire.AccessBudget(
        policy=policy,
        name=declared["name"],
        scope=declared["scope"],
        per=per if per in get_args(Calendar) else round(parse_duration(per) / 3600),
        tokens=declared["tokens"],
        counts=declared["counts"],
        cached=declared["cached"],
        cost=None if cost is None else int(parse_money(cost) * wire.TICKS),
        warn_at=round(parse_percent(declared["warnAt"]) * 10_000),
    )


def _limit(declared: Mapping[str, Any]) -> wire.AccessLimit:
    per = declared["per"]
    return wire.AccessLimit(
        scope=declared["scope"],
        requests=declared["requests"],
        tokens=declared["tokens"],
        per=0 if per is None else round(parse_duration(per) * 1000),
        concurrency=declared["concurrency"],
    )


def known_key(declared: Mapping[str, Any], secrets: Secrets) -> KnownKey:
    """What is known of a declared key now. No message has a part of its value."""
    if (line := declared.get("hash")) is not None:
        return KnownKey(declared["name"], "hash", Digest.read(line))
    name, reference = declared["name"], declared["valueFrom"]
    source = next(f"{kind} {value}" for kind, value in reference.items() if value is not None)
    try:
        value = secrets.value(reference)
    except SecretNotFound as error:
        return KnownKey(name, source, None, Reason.SECRET_NOT_FOUND, error.message)
    if not is_usable(value):
        why = (
            f"its value is below {MIN_LENGTH} characters, above 512, or not of letters, digits and signs of ASCII"
        )
        return KnownKey(name, source, None, Reason.KEY_UNFIT, why)
    return KnownKey(name, source, Digest.of(value))


def expiry(resolved: Mapping[str, Any]) -> float | None:
    """When the keys of a policy end, in unix seconds."""
    declared = resolved["expiresAt"]
    return None if declared is None else datetime.fromisoformat(declared).timestamp()


def has_expired(resolved: Mapping[str, Any], wall: float) -> bool:
    """Whether a policy's keys open nothing any more, and are anybody's."""
    end = expiry(resolved)
    return end is not None and wall >= end


def read(objects: Sequence[StoredObject], secrets: Secrets, wall: float) -> tuple[Policy, ...]:
    """All policies that are not being deleted, those in force first, and of these the oldest. A key is that of the
    first who has it, however it is declared; so is the id of one."""
    owners: dict[str, tuple[Key, str]] = {}
    ids: dict[str, str] = {}
    found = []
    order = lambda each: (has_expired(each.resolved, wall), each.created_at, each.key)  # noqa: E731
    for stored in sorted((each for each in objects if each.deletion_time is None), key=order):
        keys = []
        for declared in stored.resolved["keys"]:
            key = known_key(declared, secrets)
            if (digest := key.digest) is not None:
                first = ids.setdefault(digest.id, digest.sha256) if digest.id else digest.sha256
                own = (stored.key, key.name)
                if (owner := owners.setdefault(first, own)) != own:
                    what = "it is that of" if digest.sha256 in owners else "its id is that of"
                    why = f"{what} {owner[0]} key {owner[1]}" + (", which is older" * (owner[0] != stored.key))
                    key = KnownKey(key.name, key.source, None, Reason.KEY_TAKEN, why)
            keys.append(key)
        found.append(Policy(stored, tuple(keys)))
    return tuple(found)


class Policies:
    """The access policies of one control plane. `clock` is the store's, `wall` tells what time people have."""

    def __init__(
        self,
        store: Store,
        secrets: Secrets,
        routes: Routes,
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._secrets = secrets
        self._routes = routes
        self._clock = clock
        self._wall = wall
        self._read: tuple[Policy, ...] = ()
        self._of: tuple[str, ...] | None = None
        self._read_at = float("-inf")

    def look_again(self) -> None:
        """A secret was set or removed."""
        self._of = None

    def table(self) -> tuple[wire.Tenant, ...]:
        """What the router is to act by."""
        return tuple(policy.tenant() for policy in self._now())

    def budgets(self) -> tuple[wire.AccessBudget, ...]:
        """The budgets that the router is to hold them to."""
        return tuple(budget for policy in self._now() for budget in policy.budgets())

    def names(self) -> list[Key]:
        """All policies, those that are being deleted included."""
        return [stored.key for stored in self._store.objects(KIND)]

    def _now(self) -> tuple[Policy, ...]:
        objects = self._store.objects(KIND)
        of = tuple(f"{each.uid} {each.resource_version} {each.deletion_time}" for each in objects)
        if of != self._of or self._clock() - self._read_at >= LOOK_SECONDS:
            self._read, self._of, self._read_at = read(objects, self._secrets, self._wall()), of, self._clock()
        return self._read

    async def reconcile(self, key: Key) -> float | None:
        """Write the status; remove what is deleted once the router knows no more of it. Seconds until it wants to
        run again, or None."""
        stored = self._store.get(key)
        if stored is None:
            return None
        if stored.deletion_time is not None:
            down = self._routes.knowledge() is Router.DOWN
            if not (down or self.are_acknowledged() or self._routes.is_older("access")):
                return LOOK_SECONDS
            self._store.remove(key)
            self._store.add_event(key, "Normal", "Deleted", "its keys open nothing any more")
            return None
        policy = next((each for each in self._now() if each.stored.key == key), None)
        if policy is None:
            return 0.0
        before = self._store.status(stored.uid)
        told = self.status(policy, before.get("conditions", ()))
        self._store.put_status(stored.uid, told)
        turns = (*_losses(policy, before, told), *_turns(before.get("budgets", ()), told["budgets"]))
        for text, reason in turns:
            self._store.add_event(key, "Warning", reason.value, text)
        left = None if policy.expires_at is None else policy.expires_at - self._wall()
        return left if left is not None and 0 < left < 86400 else None

    def are_acknowledged(self) -> bool:
        """Whether the router acts by all of them as they are now, as far as it knows how."""
        budgets = self._routes.is_older("budgets") or self._routes.takes("budgets", self.budgets())
        return budgets and self._routes.takes("access", self.table())

    def _lag(self, policy: Policy) -> str:
        """Why the router does not act by a policy as it is now; "" where it does."""
        older = "the router is of an earlier version, which {}: platform down, then platform up"
        if self._routes.is_older("access"):
            return older.format("asks for no keys")
        if policy.budgets() and self._routes.is_older("budgets"):
            return older.format("knows no budgets")
        return "" if self.are_acknowledged() else "the router has not taken it yet"

    def _ready(self, policy: Policy) -> Fact:
        expires = policy.expires_at
        if expires is not None and self._wall() >= expires:
            return Fact("Ready", False, Reason.EXPIRED, f"since {policy.stored.resolved['expiresAt']}")
        if not policy.usable:
            return Fact("Ready", False, Reason.NO_KEYS, "it has no key that works")
        if self._routes.knowledge() is not Router.KNOWN:
            return Fact("Ready", False, Reason.ROUTER_NOT_READY, "the router does not answer")
        if lag := self._lag(policy):
            return Fact("Ready", False, Reason.HOT_UPDATE_PENDING, lag)
        return Fact("Ready", True, Reason.ENFORCED, f"{len(policy.usable)} of {len(policy.keys)} keys work")

    def _of_budgets(self, policy: Policy) -> Iterator[Fact]:
        """Whether what is declared of budgets can be counted, and whether one is spent."""
        if not policy.budgets():
            return
        free = self._without_prices(policy)
        if free:
            text = f"these Models have no spec.prices, so their requests cost nothing: {', '.join(free)}"
            yield Fact("BudgetsCounted", False, Reason.NO_PRICES, text)
        else:
            yield Fact("BudgetsCounted", True, Reason.VALID)
        low = [shown(each) for each in self._low(policy)]
        spent = [each for each in low if each["state"] == "spent"]
        if low:
            reason = Reason.BUDGET_SPENT if spent else Reason.BUDGET_LOW
            yield Fact("BudgetsLeft", False, reason, "; ".join(_words(each) for each in (spent or low)))
        else:
            yield Fact("BudgetsLeft", True, Reason.VALID)

    def _without_prices(self, policy: Policy) -> list[str]:
        """Models that the policy may ask by their own names, which a budget of money cannot count."""
        if not any(budget.cost is not None for budget in policy.budgets()):
            return []
        allowed = set(policy.stored.resolved["allow"]["models"])
        return sorted(
            model.key.name
            for model in self._store.objects("model")
            if model.deletion_time is None
            and model.resolved.get("prices") is None
            and (not allowed or allowed & set(model.resolved["servedModelNames"]))
        )

    def _low(self, policy: Policy) -> list[wire.BudgetStanding]:
        return [each for each in self._routes.budgets if each.policy == policy.stored.key.name]

    def status(self, policy: Policy, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What is told of a policy, after the conditions `before`."""
        ready = self._ready(policy)
        keys = policy.keys
        if ready.reason is Reason.EXPIRED:
            why = f"the policy has expired, {ready.message}"
            keys = tuple(replace(key, reason=Reason.EXPIRED, problem=why) for key in keys)
        wrong = [key for key in keys if key.problem]
        facts = [
            Fact("Accepted", True, Reason.VALID),
            Fact("KeysUsable", False, wrong[0].reason, "; ".join(f"{key.name}: {key.problem}" for key in wrong))
            if wrong
            else Fact("KeysUsable", True, Reason.VALID),
            Fact("RolledOut", False, Reason.HOT_UPDATE_PENDING, lag)
            if (lag := self._lag(policy))
            else Fact("RolledOut", True, Reason.UP_TO_DATE),
            *self._of_budgets(policy),
            ready,
            Fact("Stalled", True, ready.reason, ready.message)
            if ready.reason in (Reason.EXPIRED, Reason.NO_KEYS)
            else Fact("Stalled", False, Reason.PROGRESS_MADE),
        ]
        stored = policy.stored
        conditions = status.conditions(facts, before, stored.generation, on_the_wall(self._clock(), self._clock))
        words = "Enforced" if ready.status else ready.reason.value
        part = f", {len(policy.usable)} of {len(policy.keys)} keys" if wrong and ready.status else ""
        return {
            "observedGeneration": stored.generation,
            "summary": words + part,
            "keys": [
                {
                    "name": key.name,
                    "id": key.digest.id if key.digest is not None else "",
                    "source": key.source,
                    "works": not key.problem,
                    "problem": key.problem,
                }
                for key in keys
            ],
            "budgets": [{name: shown(each)[name] for name in _SETTLED} for each in self._low(policy)],
            "conditions": conditions,
            "remedies": status.remedies(str(stored.key), conditions),
        }


def amount(unit: str, value: int) -> int | str:
    """Tokens as they are; ticks of money as a decimal with four digits, rounded up."""
    if unit == "tokens":
        return value
    places = -(-value // (wire.TICKS // 10_000))
    return f"{places // 10_000}.{places % 10_000:04d}"


def shown(budget: wire.BudgetStanding) -> dict[str, Any]:
    """How a budget stands, as people and programs read it."""
    return {
        "policy": budget.policy,
        "name": budget.name,
        "key": budget.key,
        "unit": budget.unit,
        "size": amount(budget.unit, budget.size),
        "spent": amount(budget.unit, budget.spent),
        "left": amount(budget.unit, max(budget.size - budget.spent, 0)),
        "held": amount(budget.unit, budget.held),
        "state": budget.state,
        "resetsAt": None if not budget.resets else status.timestamp(budget.resets),
    }


def _words(budget: Mapping[str, Any]) -> str:
    whose = f" of key {budget['key']}" if budget["key"] else ""
    until = f", until {budget['resetsAt']}" if budget["resetsAt"] else ""
    return (
        f"budget {budget['name']}{whose} of {budget['size']} {budget['unit']} is {_STATES[budget['state']]}{until}"
    )


_SETTLED = ("name", "key", "unit", "size", "state", "resetsAt")
"""What of a budget does not change with each request."""
_STATES = {"open": "open", "warned": "nearly spent", "spent": "spent"}


def _losses(policy: Policy, before: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[tuple[str, Reason]]:
    """What is to be told of keys that do not work and did, or were not there, and of a policy that nobody can use
    any more; by the statuses before and now."""
    known = {each["name"]: each["problem"] for each in before.get("keys", ())}
    for key in policy.keys:
        if key.problem and known.get(key.name) != key.problem:
            yield f"key {key.name} does not work: {key.problem}", key.reason
    was, now = (_condition(status, "Ready") for status in (before, told))
    if now["reason"] in (Reason.EXPIRED, Reason.NO_KEYS) and was.get("reason") != now["reason"]:
        yield f"its keys open nothing: {now['message']}", Reason(now["reason"])


def _condition(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((each for each in status.get("conditions", ()) if each["type"] == name), {})


def _turns(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Reason]]:
    """What is to be told of budgets that have come into another state."""
    known = {(each["name"], each["key"], each["state"], each["resetsAt"]) for each in before}
    for each in now:
        if (each["name"], each["key"], each["state"], each["resetsAt"]) not in known:
            yield _words(each), Reason.BUDGET_SPENT if each["state"] == "spent" else Reason.BUDGET_LOW
