"""What objects are to one another once they are applied: names and keys that two claim, doors to which nobody has
a key, routes that lead nowhere. Each of them may be well by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire_operators.review import Refusal, Review
from quire_operators.store import Store
from quire_operators.traffic import claims, names_of, owners, targets
from quire_schemas.access import AccessPolicy
from quire_schemas.gateway import Gateway, is_loopback
from quire_schemas.resource import Key
from quire_schemas.route import Route


def look(store: Store, reviews: Sequence[Review], leaving: Sequence[Key]) -> None:
    """Refuse those of `reviews` that cannot stand beside the others and what is stored, and warn of others.
    Objects that are `leaving` are deleted with them, and stand in nobody's way."""
    _refuse_name_conflicts(store, reviews, leaving)
    _refuse_taken_keys(store, reviews, leaving)
    _refuse_open_doors(store, reviews, leaving)
    _warn_of_dead_ends(store, reviews)


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


def _refuse_taken_keys(store: Store, reviews: Sequence[Review], leaving: Sequence[Key]) -> None:
    """A key is that of one policy alone."""
    in_set = {review.key for review in reviews} | set(leaving)
    owners: dict[str, Key] = {}
    for stored in store.objects("accesspolicy"):
        if stored.key not in in_set and stored.deletion_time is None:
            owners.update({key["hash"]: stored.key for key in stored.resolved["keys"] if key["hash"]})
    for review in reviews:
        for index, key in enumerate(review.resolved.get("keys", ())):
            owner = owners.setdefault(key["hash"], review.key) if key["hash"] else review.key
            if owner != review.key and review.refusal is None:
                path, hint = f"spec.keys[{index}].hash", f"make another, or remove it from {owner} first"
                review.refuse(Refusal(path, "KeyTaken", f"the key is one of {owner}", hint))


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
    for review in reviews:
        if isinstance(review.located.resource, Route) and review.refusal is None:
            if not any(each["weight"] for each in review.resolved["backends"]):
                review.warnings.append("spec.backends: all weights are 0, so no request goes to any")
            lacks = [lack for each in targets(review.resolved) if (lack := each.lack(there)) is not None]
            review.warnings += [f"{path}: there is no {what} yet" for what, path in lacks]


def _claimed_at(review: Review, index: int) -> str:
    """The field with the name that an object claims as one of several."""
    if review.key.kind == "route":
        return f"spec.match.modelNames[{index}]"
    names = review.resolved["servedModelNames"]
    if index >= len(names):
        return f"spec.lora.adapters[{(index - len(names)) // len(names)}].name"
    declared = review.located.intent.get("spec", {}).get("servedModelNames")
    return f"spec.servedModelNames[{index}]" if declared else "metadata.name"
