"""What objects are to one another once they are applied: names and keys that two claim, doors to which nobody has
a key, routes that lead nowhere. Each of them may be well by itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire_operators.access import has_expired, known_key
from quire_operators.review import Refusal, Review
from quire_operators.secrets import Secrets
from quire_operators.store import Store
from quire_operators.traffic import claims, names_of, owners, targets
from quire_schemas.access import AccessPolicy
from quire_schemas.gateway import Gateway, is_every_address, is_loopback
from quire_schemas.resource import Key
from quire_schemas.route import Route


def look(store: Store, reviews: Sequence[Review], leaving: Sequence[Key], secrets: Secrets) -> None:
    """Refuse those of `reviews` that cannot stand beside the others and what is stored, and warn of others.
    Objects that are `leaving` are deleted with them, and stand in nobody's way."""
    _refuse_name_conflicts(store, reviews, leaving)
    _refuse_taken_keys(store, reviews, leaving, secrets)
    _refuse_open_doors(store, reviews, leaving)
    _warn_of_dead_ends(store, reviews)
    _warn_of_hosts(reviews)
    _warn_of_unknown_names(store, reviews, leaving)


def _refuse_name_conflicts(store: Store, reviews: Sequence[Review], leaving: Sequence[Key]) -> None:
    """No two objects may claim one model name with the same headers, whether stored or in this very set."""
    in_set = {review.key for review in reviews} | set(leaving)
    taken = owners(stored for stored in store.objects() if stored.key not in in_set)
    for review in reviews:
        mine = claims(review.key.kind, review.resolved) if review.resolved else ()
        for index, claim in enumerate(mine):
            owner = taken.setdefault(claim, review.key)
            if owner != review.key and review.refusal is None:
                review.refuse(
                    Refusal(
                        _claimed_at(review, index),
                        "NameConflict",
                        f"the model name {claim.name!r} is already served by {owner}"
                        + (" with the same headers" if claim.headers else ""),
                        f"choose another name, or delete {owner} first",
                    ),
                )


@dataclass(frozen=True, slots=True)
class _Held:
    """A key of a policy, as far as it is known."""

    policy: Key
    name: str
    since: float
    """When the policy was made; one that is to be made is younger than all."""
    shown: bool
    """The manifest itself has its digest."""


def _refuse_taken_keys(store: Store, reviews: Sequence[Review], leaving: Sequence[Key], secrets: Secrets) -> None:
    """A key is that of one policy alone. What manifests show is refused; of what the values behind references are
    now there is a warning, since they may be others when it counts."""
    in_set = {review.key for review in reviews} | set(leaving)
    held: dict[str, _Held] = {}

    def holder(policy: Key, since: float, declared: Mapping[str, Any]) -> tuple[_Held, _Held] | None:
        """A key, and who has had it: itself for the first. None where it is not known."""
        digest = known_key(declared, secrets).digest
        if digest is None:
            return None
        own = _Held(policy, declared["name"], since, bool(declared["hash"]))
        return own, held.setdefault(digest.sha256, own)

    for stored in sorted(store.objects("accesspolicy"), key=lambda each: (each.created_at, each.key)):
        gone = stored.deletion_time is not None or has_expired(stored.resolved, time.time())
        if stored.key not in in_set and not gone:
            for declared in stored.resolved["keys"]:
                holder(stored.key, stored.created_at, declared)
    for review in reviews:
        since = review.old.created_at if review.old is not None else float("inf")
        holds = review.key.kind == "accesspolicy" and not has_expired(review.resolved, time.time())
        declared_keys = review.resolved.get("keys", ()) if holds else ()
        for index, declared in enumerate(declared_keys):
            pair = holder(review.key, since, declared)
            if pair is None or pair[0] == pair[1] or review.refusal is not None:
                continue
            own, other = pair
            if own.shown and other.shown and own.policy != other.policy:
                path, hint = f"spec.keys[{index}].hash", f"make another, or remove it from {other.policy} first"
                review.refuse(Refusal(path, "KeyTaken", f"the key is one of {other.policy}", hint))
            elif (own.since, own.policy) < (other.since, other.policy):
                review.warnings.append(
                    f"key {own.name} is also {other.policy} key {other.name}, which will not work any more: of "
                    "two policies the older keeps a key"
                )
            else:
                older = ", which is older" if own.policy != other.policy else ""
                review.warnings.append(
                    f"key {own.name} will not work: it is that of {other.policy} key {other.name}{older}"
                )


def _refuse_open_doors(store: Store, reviews: Sequence[Review], leaving: Sequence[Key]) -> None:
    """An address that others can reach is for routers that somebody has a key to."""
    own = next((each for each in reviews if isinstance(each.located.resource, Gateway)), None)
    if own is None or own.refusal is not None or is_loopback(own.resolved["bind"]):
        return
    declared = any(isinstance(each.located.resource, AccessPolicy) for each in reviews)
    policies = store.objects("accesspolicy")
    if not declared and all(each.deletion_time or each.key in leaving for each in policies):
        text = f"other machines can reach {own.resolved['bind']}, and there is no AccessPolicy: nobody has a key"
        hint = "apply one with it, or before; platform key create NAME makes a key for it"
        own.refuse(Refusal("spec.bind", "NoAccessPolicy", text, hint))


def _warn_of_dead_ends(store: Store, reviews: Sequence[Review]) -> None:
    """Say of Routes what of them will lead nowhere: Models that there will not be, and weights of 0 alone."""
    specs = {each.key.name: each.resolved for each in store.objects("model") if each.deletion_time is None}
    new = {review.key.name: review.resolved for review in reviews if review.key.kind == "model"}
    specs |= {name: resolved or specs.get(name, {}) for name, resolved in new.items()}
    there = {name for model, spec in specs.items() for name in (names_of(model, spec) if spec else [model])}
    routes = {each.key.name for each in store.objects("route") if each.deletion_time is None}
    routes |= {review.key.name for review in reviews if review.key.kind == "route"}
    for review in reviews:
        if isinstance(review.located.resource, Route) and review.refusal is None:
            if not any(each["weight"] for each in review.resolved["backends"]):
                review.warnings.append("spec.backends: all weights are 0, so no request goes to any")
            lacks = [lack for each in targets(review.resolved) if (lack := each.lack(there, routes)) is not None]
            review.warnings += [f"{path}: there is no {what} yet" for what, path in lacks]


def _warn_of_hosts(reviews: Sequence[Review]) -> None:
    """Say of a Gateway that others are to reach, and that turns them all away: none of them asks for localhost."""
    for review in reviews:
        spec = review.resolved
        if not isinstance(review.located.resource, Gateway) or review.refusal is not None:
            continue
        if is_every_address(spec["bind"]) and not spec.get("hosts"):
            review.warnings.append(
                f"spec.bind: {spec['bind']} is every address of this machine, and only requests for localhost are "
                "answered: name the hosts that clients use in spec.hosts"
            )


def _warn_of_unknown_names(store: Store, reviews: Sequence[Review], leaving: Sequence[Key]) -> None:
    """Say of AccessPolicies which names they allow that nobody will serve."""
    in_set = {review.key for review in reviews} | set(leaving)
    specs = [
        (stored.key.kind, stored.resolved)
        for stored in store.objects()
        if stored.key not in in_set and stored.deletion_time is None
    ]
    specs += [(review.key.kind, review.resolved) for review in reviews if review.resolved]
    unread = {review.key.name for review in reviews if review.key.kind == "model" and not review.resolved}
    served = {claim.name for kind, spec in specs for claim in claims(kind, spec)} | unread
    for review in reviews:
        if isinstance(review.located.resource, AccessPolicy) and review.refusal is None and review.resolved:
            review.warnings += [
                f"spec.allow.models[{index}]: nothing is served as {name!r} yet"
                for index, name in enumerate(review.resolved["allow"]["models"])
                if name not in served
            ]


def _claimed_at(review: Review, index: int) -> str:
    """The field with the name that an object claims as one of several."""
    if review.key.kind == "route":
        return f"spec.match.modelNames[{index}]"
    names = review.resolved["servedModelNames"]
    if index >= len(names):
        return f"spec.lora.adapters[{(index - len(names)) // len(names)}].name"
    declared = review.located.intent.get("spec", {}).get("servedModelNames")
    return f"spec.servedModelNames[{index}]" if declared else "metadata.name"
