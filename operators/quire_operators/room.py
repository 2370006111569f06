"""What fits on this machine now, and what a change therefore does: refused, waiting, or carried out step by step.

Pure: the rows of the store say what is taken, the inventory what there is. `placement.py` has decided before how
much one replica needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire_operators import rollout
from quire_operators.desired import (
    Canary,
    Effective,
    declared_replicas,
    desired_of,
    is_on_demand,
    priority_of,
)
from quire_operators.devices import Inventory, device_names, free_places, held
from quire_operators.overrides import Kind
from quire_operators.placement import Placement
from quire_operators.records import Revision
from quire_operators.review import Refusal, Review
from quire_schemas.quantities import format_bytes, format_duration, parse_percent
from quire_schemas.resource import Key


def count_replicas(
    review: Review,
    placement: Placement,
    rows: Sequence[rollout.Row],
    inventory: Inventory,
    kept: Callable[[Mapping[str, int]], Mapping[str, int]],
) -> None:
    """Refuse more replicas than this machine's share could ever hold; warn of more than it holds now. `kept` adds
    to what is taken what others come before it for."""
    spec = review.resolved
    want, memory = declared_replicas(spec), placement.memory
    share, device_ids = parse_percent(spec["engine"]["memory"]), spec["placement"]["deviceIds"]
    limits = _limits(spec, placement, inventory)
    names = list(limits)
    most = most_replicas(spec, placement, inventory)
    field = "spec.replicas" if spec["autoscaling"] is None else "spec.autoscaling.minReplicas"
    if 0 < most < want:
        whole = format_bytes(sum(limits.values()))
        review.refuse(
            Refusal(
                field,
                "InsufficientMemory" if placement.device == "cpu" else "InsufficientDevices",
                f"{want} replicas of {format_bytes(memory)} each need {format_bytes(want * memory)}; "
                f"what replicas may take of this machine, even with nothing else on it, is {whole}",
                f"at most {most} fit: set {field} to {most} or less",
            ),
        )
        return
    if spec["autoscaling"] is not None and most < (declared := spec["autoscaling"]["maxReplicas"]):
        review.warnings.append(
            f"spec.autoscaling.maxReplicas is {declared}, and {most} fit on this machine with nothing else on it: "
            "further ones wait for room"
        )
    if want and is_on_demand(spec):
        review.notes.append(
            "loaded by the first request for it, beside what is there or in place of what is there on demand"
        )
        return
    others = [row for row in rows if row.model != review.key.name]
    now = len(free_places(inventory, kept(held(others)), placement.device, memory, share, device_ids))
    if now < want:
        holders: dict[str, int] = {}
        for row in others:
            if row.device in names and row.failed_generation is None:
                holders[row.model] = holders.get(row.model, 0) + row.memory
        who = ", ".join(f"model/{name} holds {format_bytes(size)}" for name, size in sorted(holders.items()))
        review.warnings.append(
            f"{now} of {_count(want, 'replica')} fit{'s' if want == 1 else ''} now"
            + (f": {who}" if who else "")
            + "; the rest waits until there is room"
        )


def most_replicas(spec: Mapping[str, Any], placement: Placement, inventory: Inventory) -> int:
    """How many replicas fit on this machine with nothing else on it."""
    return sum(limit // placement.memory for limit in _limits(spec, placement, inventory).values())


def _limits(spec: Mapping[str, Any], placement: Placement, inventory: Inventory) -> dict[str, int]:
    """Bytes that replicas may take of each device."""
    share = parse_percent(spec["engine"]["memory"]) if placement.device == "cpu" else 1
    names = device_names(inventory, placement.device, spec["placement"]["deviceIds"])
    return {name: int(inventory.usable(name) * share) for name in names}


def rollout_text(
    review: Review,
    wanted: Effective,
    current: Revision | None,
    rows: Sequence[rollout.Row],
    inventory: Inventory,
    kept: Callable[[Mapping[str, int]], Mapping[str, int]],
) -> str:
    """How what is `wanted` once this is applied would be carried out now, by the very budget that the planner
    uses, which `review` keeps. `kept` as above."""
    spec, desired = wanted.stored.resolved, desired_of(wanted)
    mine = [row for row in rows if row.model == review.key.name]
    own, want = len(mine), desired.replicas
    stale = sum(row.goal is rollout.Goal.RUN and not rollout.is_current(desired, row) for row in mine)
    review.replaces = min(stale, want)
    if Kind.PAUSE in wanted.overrides:
        return "none: it is paused"
    if wanted.canary is not None:
        return _canary_text(review, wanted, wanted.canary, rows, inventory, kept)
    if desired.held and (stale or not wanted.is_newest):
        return "none before its rollouts are resumed"
    if own and not stale:
        return f"{own} → {want} replicas; none restarts" if want != own else "no replica restarts"
    share = parse_percent(spec["engine"]["memory"])
    placement = Placement.from_dict(wanted.revision.placement)
    places = free_places(
        inventory, kept(held(rows)), placement.device, placement.memory, share, spec["placement"]["deviceIds"]
    )
    budget = review.budget = rollout.budget(desired, own, len(places))
    if not own and wanted.standby:
        return f"{_count(wanted.full, 'replica')} to start with the first request"
    if not own:
        short = "" if len(places) >= want else f"; {len(places)} of them fit now"
        return f"{_count(want, 'replica')} to start{short}"
    if budget.strategy is rollout.Strategy.RECREATE:
        return f"Recreate: {_count(own, 'replica')} stop first, then {want} start"
    text = f"RollingUpdate, surge {budget.surge}, unavailable {budget.unavailable}"
    if budget.stop_first:
        asked = spec["rollout"]
        text += f" (asked for {asked['maxSurge']}/{asked['maxUnavailable']}; nothing more fits)"
    elif budget.surge == 0 and budget.unavailable == 0:
        text += ": blocked, because nothing more fits and none may be taken away"
    each = current.load_seconds if current is not None else None
    if each is not None:
        text += f"\n{_count(want, 'replica')}, about {format_duration(each)} each"
    return text + f"; {budget.floor} of {want} serve meanwhile"


def _canary_text(
    review: Review,
    wanted: Effective,
    tried: Canary,
    rows: Sequence[rollout.Row],
    inventory: Inventory,
    kept: Callable[[Mapping[str, int]], Mapping[str, int]],
) -> str:
    """How a canary would go; it is refused where one replica more could never fit."""
    spec, placement = wanted.stored.resolved, Placement.from_dict(tried.revision.placement)
    want, most = spec["replicas"], most_replicas(spec, placement, inventory)
    if wanted.standby or not want:
        return "a canary with the first replica"
    review.replaces = want
    if most < want + 1:
        review.refuse(
            Refusal(
                "spec.rollout.strategy",
                "InsufficientMemory" if placement.device == "cpu" else "InsufficientDevices",
                f"a canary needs room for one replica beside the {want} that serve; {most} fit on this machine",
                "lower spec.replicas, or declare strategy: Auto",
            )
        )
        return ""
    template = tried.revision.template_hash
    there = [row for row in rows if row.template_hash == template and row.model == review.key.name]
    share, device_ids = parse_percent(spec["engine"]["memory"]), spec["placement"]["deviceIds"]
    if not there and not free_places(
        inventory, kept(held(rows)), placement.device, placement.memory, share, device_ids
    ):
        review.warnings.append("nothing has room for a replica of the canary now; it begins when there is room")
    steps = ", ".join(
        f"{step.weight} %" + (f" for {format_duration(step.hold)}" if step.hold else "")
        for step in tried.policy.steps
    )
    text = f"Canary beside {_count(want, 'replica')}: {steps} of the requests, then it replaces them"
    if tried.policy.paper is not None and tried.stage is None:
        text += f"\nbefore any request its exam: {tried.policy.paper.says(wanted.revision.n)}"
    if not tried.policy.gives_up:
        text += "\nif it fails it stays, without requests, until you decide: autoRollback is false"
    return text


@dataclass(frozen=True, slots=True)
class Claim:
    """What one model is to have of this machine once all is carried out."""

    key: Key
    placement: Placement
    replicas: int
    share: float
    device_ids: tuple[int, ...]
    priority: int
    kept: tuple[str, ...]
    """Devices of replicas that stay as they are."""
    guests: int
    """Replicas that it has on demand; 0 for a model that stays."""
    surge: int
    """Replicas that its rollout has meanwhile beside the old ones."""
    in_set: bool
    """It is changed by what is reviewed."""
    new: bool
    """Nothing of it is stored yet."""

    def places(self, inventory: Inventory, taken: Mapping[str, int], most: int) -> list[str]:
        """Devices for as many more replicas as fit beside what is `taken`."""
        placement = self.placement
        return free_places(
            inventory, taken, placement.device, placement.memory, self.share, self.device_ids, most
        )[:most]


def claim(
    wanted: Effective, rows: Sequence[rollout.Row], inventory: Inventory, review: Review | None = None
) -> Claim:
    """What is `wanted` of a model with these `rows`, as it is stored or as `review` would have it. A machine that
    is only declared may lack a device that a replica is on.
    """
    spec, desired = wanted.stored.resolved, desired_of(wanted)
    kept = [
        row.device
        for row in rows
        if row.goal is rollout.Goal.RUN
        and row.failed_generation is None
        and rollout.is_current(desired, row)
        and inventory.total(row.device)
    ]
    budget = review.budget if review is not None and review.replaces else None
    return Claim(
        wanted.stored.key,
        Placement.from_dict(wanted.revision.placement),
        desired.replicas,
        parse_percent(spec["engine"]["memory"]),
        tuple(spec["placement"]["deviceIds"]),
        priority_of(spec),
        tuple(kept[: desired.replicas]),
        wanted.full if is_on_demand(spec) else 0,
        budget.surge if budget is not None else 0,
        review is not None,
        review is not None and review.old is None,
    )


def settle(claims: Iterable[Claim], inventory: Inventory) -> list[tuple[Claim, list[str]]]:
    """Each claim with the devices of its replicas once nothing moves any more, in the order in which they come:
    what is there stays, then the highest priority, those that exist before new ones; models on demand have what is
    left. `inventory` is cleared: what others hold of a GPU does not change with what replicas leave.
    """
    ordered = sorted(claims, key=lambda claim: (claim.guests > 0, -claim.priority, claim.new))
    taken: dict[str, int] = {}
    for claim in ordered:
        for device in claim.kept if not claim.guests else ():
            taken[device] = taken.get(device, 0) + claim.placement.memory
    settled = []
    for claim in ordered:
        places = [] if claim.guests else list(claim.kept)
        more = claim.places(inventory, taken, claim.replicas - len(places)) if claim.replicas > len(places) else []
        for device in more:
            taken[device] = taken.get(device, 0) + claim.placement.memory
        settled.append((claim, places + more))
    return settled


def note_crowding(reviews: Sequence[Review], claims: Sequence[Claim], inventory: Inventory) -> None:
    """Each model was reviewed as if it came alone: say so where together they do not fit.

    `inventory` is cleared.
    """
    notes = {review.key: review.notes for review in reviews}
    others = held_by(settle([claim for claim in claims if not claim.in_set], inventory))
    before: dict[str, list[str]] = {"cpu": [], "cuda": []}
    for claim, places in settle(claims, inventory):
        if not claim.in_set or claim.guests:
            continue
        missing, neighbours = claim.replicas - len(places), before[claim.placement.device]
        if missing and neighbours and len(claim.places(inventory, others, claim.replicas)) == claim.replicas:
            who = "it" if missing == claim.replicas else f"{missing} of its {claim.replicas} replicas"
            names = ", ".join(neighbours)
            notes[claim.key].append(f"fits alone; together with {names} {who} will wait as {_lack(claim)}")
        if places:
            neighbours.append(str(claim.key))


def held_by(settled: Iterable[tuple[Claim, Sequence[str]]]) -> dict[str, int]:
    """Bytes that settled claims hold of each device, those of models on demand left out, which give way."""
    sums: dict[str, int] = {}
    for claim, places in settled:
        for device in places if not claim.guests else ():
            sums[device] = sums.get(device, 0) + claim.placement.memory
    return sums


def devices_after(claims: Sequence[Claim], inventory: Inventory, ours: Mapping[str, int]) -> dict[str, Any]:
    """The proof of fit of all models together: of each device what there is, what each model's replicas take of
    it, and what is left; then who waits, and who comes on demand. Sizes are bytes; `ours` is what replicas hold
    now.
    """
    cleared = inventory.cleared(ours)
    devices: dict[str, dict[str, Any]] = {}
    waiting, guests = [], []
    for claim, places in settle(claims, cleared):
        placement = claim.placement
        if claim.guests:
            guests.append({"key": str(claim.key), "replicas": claim.guests, "memory": placement.memory})
        elif len(places) < claim.replicas:
            missing = claim.replicas - len(places)
            waiting.append({"key": str(claim.key), "replicas": missing, "reason": _lack(claim)})
        for number, name in enumerate(dict.fromkeys(places if not claim.guests else ())):
            total, limit = inventory.total(name), cleared.total(name)
            device = devices.setdefault(
                name, {"device": name, "total": total, "foreign": total - limit, "limit": 0, "models": []}
            )
            # of main memory each model declares how much all replicas together may take
            device["limit"] = max(device["limit"], int(limit * claim.share) if name == "cpu" else limit)
            device["models"].append(
                {
                    "key": str(claim.key),
                    "replicas": places.count(name),
                    "memory": placement.memory,
                    "weights": placement.weights,
                    "kv": placement.kv,
                    "surge": 0 if number else claim.surge,
                }
            )
    for device in devices.values():
        device["free"] = device["limit"] - sum(item["replicas"] * item["memory"] for item in device["models"])
    return {"devices": list(devices.values()), "waiting": waiting, "onDemand": guests}


def _lack(claim: Claim) -> str:
    return "InsufficientMemory" if claim.placement.device == "cpu" else "InsufficientDevices"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
