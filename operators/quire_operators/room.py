"""What fits on this machine now, and what a change therefore does: refused, waiting, or carried out step by step.

Pure: the rows of the store say what is taken, the inventory what there is. `placement.py` has decided before how
much one replica needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from quire_operators import rollout
from quire_operators.desired import Effective, desired_of, is_on_demand
from quire_operators.devices import Inventory, device_names, free_places, held
from quire_operators.overrides import Kind
from quire_operators.placement import Placement
from quire_operators.review import Refusal, Review
from quire_operators.store import Revision
from quire_schemas.quantities import format_bytes, format_duration, parse_percent


def count_replicas(
    review: Review, placement: Placement, rows: Sequence[rollout.Row], inventory: Inventory
) -> None:
    """Refuse more replicas than this machine's share could ever hold; warn of more than it holds now."""
    spec = review.resolved
    want, memory = spec["replicas"], placement.memory
    share, device_ids = parse_percent(spec["engine"]["memory"]), spec["placement"]["deviceIds"]
    limits = _limits(spec, placement, inventory)
    names = list(limits)
    most = most_replicas(spec, placement, inventory)
    if 0 < most < want:
        whole = format_bytes(sum(limits.values()))
        review.refuse(
            Refusal(
                "spec.replicas",
                "InsufficientMemory" if placement.device == "cpu" else "InsufficientDevices",
                f"{want} replicas of {format_bytes(memory)} each need {format_bytes(want * memory)}; "
                f"what replicas may take of this machine, even with nothing else on it, is {whole}",
                f"at most {most} fit: set spec.replicas to {most} or less",
            ),
        )
        return
    if want and is_on_demand(spec):
        review.notes.append(
            "loaded by the first request for it, beside what is there or in place of what is there on demand"
        )
        return
    others = [row for row in rows if row.model != review.key.name]
    now = len(free_places(inventory, held(others), placement.device, memory, share, device_ids))
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
    return {name: int(inventory.total(name) * share) for name in names}


def rollout_text(
    review: Review,
    wanted: Effective,
    current: Revision | None,
    rows: Sequence[rollout.Row],
    inventory: Inventory,
) -> str:
    """How what is `wanted` once this is applied would be carried out now, by the very budget that the planner
    uses, which `review` keeps."""
    spec, desired = wanted.stored.resolved, desired_of(wanted)
    mine = [row for row in rows if row.model == review.key.name]
    own, want = len(mine), desired.replicas
    stale = sum(row.goal is rollout.Goal.RUN and not rollout.is_current(desired, row) for row in mine)
    review.replaces = min(stale, want)
    if Kind.PAUSE in wanted.overrides:
        return "none: it is paused"
    if desired.held and (stale or not wanted.is_newest):
        return "none before its rollouts are resumed"
    if own and not stale:
        return f"{own} → {want} replicas; none restarts" if want != own else "no replica restarts"
    share = parse_percent(spec["engine"]["memory"])
    placement = Placement.from_dict(wanted.revision.placement)
    places = free_places(
        inventory, held(rows), placement.device, placement.memory, share, spec["placement"]["deviceIds"]
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


def note_crowding(reviews: Sequence[Review], rows: Sequence[rollout.Row], inventory: Inventory) -> None:
    """Each model was reviewed as if it came alone: say so where together they do not fit this machine.

    Those that exist already come first, as they do when it is applied.
    """
    in_set = {review.key.name for review in reviews}
    taken = held(row for row in rows if row.model not in in_set)
    others = dict(taken)
    before: dict[str, list[str]] = {"cpu": [], "cuda": []}
    for review in sorted(reviews, key=lambda review: review.old is None):
        placement, spec = review.placement, review.resolved
        if review.refusal is not None or placement is None or is_on_demand(spec):
            continue
        fits = partial(
            free_places,
            inventory,
            kind=placement.device,
            need=placement.memory,
            share=parse_percent(spec["engine"]["memory"]),
            device_ids=spec["placement"]["deviceIds"],
        )
        want = spec["replicas"]
        places = fits(taken=taken)[:want]
        missing, neighbours = want - len(places), before[placement.device]
        if missing and neighbours and len(fits(taken=others)) >= want:
            reason = "InsufficientMemory" if placement.device == "cpu" else "InsufficientDevices"
            who = "it" if missing == want else f"{missing} of its {want} replicas"
            names = ", ".join(neighbours)
            review.notes.append(f"fits alone; together with {names} {who} will wait as {reason}")
        for device in places:
            taken[device] = taken.get(device, 0) + placement.memory
        if places:
            neighbours.append(str(review.key))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
