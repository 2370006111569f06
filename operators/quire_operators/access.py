"""Access policies: the keys behind their references, what the router is told of them, and what their status tells.

A key that is declared by its hash is known already. One that a reference leads to is read at each look, at most
once in `LOOK_SECONDS`, and forgotten but for its id and digest: nothing else goes to the router, to the disk or
into a message. So a secret that is set, a file that is written anew and a reference that leads nowhere any more
count within seconds. A key that cannot be used takes nothing from the others of its policy.

`read` is the decision, pure but for the reading of secrets; `Policies` holds the conversation with the store. A
policy is in force when the router has acknowledged it; it is gone from the store when the router has acknowledged
that it is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from quire_operators import status
from quire_operators.clock import on_the_wall
from quire_operators.records import StoredObject
from quire_operators.rollout import Router
from quire_operators.routes import Routes
from quire_operators.secrets import SecretNotFound, Secrets
from quire_operators.status import Fact, Reason
from quire_operators.store import Store
from quire_schemas import wire
from quire_schemas.keys import MIN_LENGTH, Digest, is_usable
from quire_schemas.quantities import parse_duration
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
        declared = self.stored.resolved["expiresAt"]
        return None if declared is None else datetime.fromisoformat(declared).timestamp()

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


def read(objects: Sequence[StoredObject], secrets: Secrets) -> tuple[Policy, ...]:
    """All policies that are not being deleted, in the order of their names. A key is that of the first who has
    it."""
    owners: dict[Digest, str] = {}
    found = []
    for stored in sorted(objects, key=lambda each: each.key.name):
        if stored.deletion_time is not None:
            continue
        keys = []
        for declared in stored.resolved["keys"]:
            key, own = known_key(declared, secrets), f"{stored.key} key {declared['name']}"
            if key.digest is not None and (owner := owners.setdefault(key.digest, own)) != own:
                key = KnownKey(key.name, key.source, None, Reason.KEY_TAKEN, f"it is that of {owner}")
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

    def names(self) -> list[Key]:
        """All policies, those that are being deleted included."""
        return [stored.key for stored in self._store.objects(KIND)]

    def _now(self) -> tuple[Policy, ...]:
        objects = self._store.objects(KIND)
        of = tuple(f"{each.uid} {each.resource_version} {each.deletion_time}" for each in objects)
        if of != self._of or self._clock() - self._read_at >= LOOK_SECONDS:
            self._read, self._of, self._read_at = read(objects, self._secrets), of, self._clock()
        return self._read

    async def reconcile(self, key: Key) -> float | None:
        """Write the status; remove what is deleted once the router knows no more of it. Seconds until it wants to
        run again, or None."""
        stored = self._store.get(key)
        if stored is None:
            return None
        if stored.deletion_time is not None:
            down = self._routes.knowledge() is Router.DOWN
            if not (down or self._is_acknowledged() or self._routes.is_older("access")):
                return LOOK_SECONDS
            self._store.remove(key)
            self._store.add_event(key, "Normal", "Deleted", "its keys open nothing any more")
            return None
        policy = next((each for each in self._now() if each.stored.key == key), None)
        if policy is None:
            return 0.0
        before = self._store.status(stored.uid)
        self._store.put_status(stored.uid, self.status(policy, before.get("conditions", ())))
        left = None if policy.expires_at is None else policy.expires_at - self._wall()
        return left if left is not None and 0 < left < 86400 else None

    def _is_acknowledged(self) -> bool:
        return self._routes.takes("access", self.table())

    def _ready(self, policy: Policy) -> Fact:
        expires = policy.expires_at
        if expires is not None and self._wall() >= expires:
            return Fact("Ready", False, Reason.EXPIRED, f"since {policy.stored.resolved['expiresAt']}")
        if not policy.usable:
            return Fact("Ready", False, Reason.NO_KEYS, "it has no key that works")
        if self._routes.knowledge() is not Router.KNOWN:
            return Fact("Ready", False, Reason.ROUTER_NOT_READY, "the router does not answer")
        if self._routes.is_older("access"):
            text = "the router is of an earlier version, which asks for no keys: platform down, then platform up"
            return Fact("Ready", False, Reason.HOT_UPDATE_PENDING, text)
        if not self._is_acknowledged():
            return Fact("Ready", False, Reason.HOT_UPDATE_PENDING, "the router has not taken it yet")
        return Fact("Ready", True, Reason.ENFORCED, f"{len(policy.usable)} of {len(policy.keys)} keys work")

    def status(self, policy: Policy, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What is told of a policy, after the conditions `before`."""
        wrong = [key for key in policy.keys if key.problem]
        ready = self._ready(policy)
        facts = [
            Fact("Accepted", True, Reason.VALID),
            Fact("KeysUsable", False, wrong[0].reason, "; ".join(f"{key.name}: {key.problem}" for key in wrong))
            if wrong
            else Fact("KeysUsable", True, Reason.VALID),
            Fact("RolledOut", True, Reason.UP_TO_DATE)
            if self._is_acknowledged()
            else Fact("RolledOut", False, Reason.HOT_UPDATE_PENDING, "the router has not taken it yet"),
            ready,
            Fact("Stalled", True, ready.reason, ready.message)
            if ready.reason in (Reason.EXPIRED, Reason.NO_KEYS)
            else Fact("Stalled", False, Reason.PROGRESS_MADE),
        ]
        stored = policy.stored
        shown = status.conditions(facts, before, stored.generation, on_the_wall(self._clock(), self._clock))
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
                for key in policy.keys
            ],
            "conditions": shown,
            "remedies": status.remedies(str(stored.key), shown),
        }
