"""Which models are in memory: those that are always there, and of the others those that are asked for.

A model with `residency: onDemand` has replicas while it is *resident*. It becomes so when requests wait for it and
its replicas fit, and it stays so until somebody else needs the room: another model that is asked for, or one that
is always there and lacks a replica. `plan` says what to do now, from what is held and who asks; it is pure, and
keeps nothing between two calls.

Unload before load: a model is loaded only into room that is free now. Room that is on its way to be free (replicas
that drain, models that were told to leave) is waited for, and nobody else is sent away for it.

Who leaves: those that nobody uses, of the lowest priority and the least recently used first. One that is in use
leaves only for one of at least its priority, when it has served for `PATIENCE` seconds and somebody has waited as
long, and its running requests have its `drainTimeout` to end; so two busy models that do not fit together take
turns of at least that long, however long they load. Who asks: the highest priority first, then who is always
there, then who has waited longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quire_operators.devices import Inventory, free_places

PATIENCE = 10.0
"""Seconds that a model in use has served, and that another one's requests have waited, before it is unloaded."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """One model. Times are the store's; `need` is bytes of one replica, `holds` bytes by device of its rows."""

    model: str
    on_demand: bool
    resident: bool
    """Replicas of it are wanted."""
    missing: int
    """Replicas that it would need and has no row for."""
    kind: str
    need: int
    share: float
    device_ids: Sequence[int] = ()
    priority: int = 0
    holds: Mapping[str, int] = field(default_factory=dict)
    leaving: Mapping[str, int] = field(default_factory=dict)
    """Of that, what replicas hold that are on their way out."""
    asked_since: float | None = None
    """Since when somebody waits for it; None while nobody does."""
    busy: bool = False
    """Requests run on it or wait for it."""
    used_at: float = 0.0
    """When the last request came or ended."""
    serving_since: float | None = None
    """Since when a replica of it serves; None while none does."""

    @property
    def stays(self) -> dict[str, int]:
        """What it holds and is not about to give back."""
        return {device: size - self.leaving.get(device, 0) for device, size in self.holds.items()}

    def may_go_at(self, asked_since: float) -> float:
        """From when on it may be unloaded for somebody who has asked since then."""
        if not self.busy:
            return 0.0
        if self.serving_since is None:
            return float("inf")
        return max(asked_since, self.serving_since) + PATIENCE


@dataclass(frozen=True, slots=True)
class Load:
    """Have replicas of this model."""

    model: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Have no replicas of this model, for `because` needs the room."""

    model: str
    because: str


@dataclass(frozen=True, slots=True)
class ResidencyPlan:
    """What to do now; who waits for room that nobody can make, and when to look again at the latest."""

    moves: tuple[Load | Unload, ...]
    short: tuple[str, ...]
    look_at: float | None


def plan(tenants: Sequence[Tenant], inventory: Inventory, taken: Mapping[str, int], now: float) -> ResidencyPlan:
    """What to load and unload now. `taken` is bytes by device of all rows and processes."""
    inventory = inventory.cleared(taken)  # measured use says nothing of a world in which somebody has left
    moves: list[Load | Unload] = []
    short: list[str] = []
    look_at: list[float] = []
    free_now, in_the_end = dict(taken), dict(taken)
    """What is held now with what this plan loads; and when all that leaves has left."""
    for tenant in tenants:
        _take(in_the_end, tenant.leaving, -1)
    may_leave = sorted(
        (tenant for tenant in tenants if tenant.on_demand and tenant.resident),
        key=lambda tenant: (tenant.busy, tenant.priority, tenant.used_at),
    )
    asking = [tenant for tenant in tenants if tenant.asked_since is not None and tenant.missing > 0]
    for tenant in sorted(asking, key=lambda tenant: (-tenant.priority, tenant.on_demand, tenant.asked_since)):
        waited_since = now if tenant.asked_since is None else tenant.asked_since
        beside = dict(free_now)
        _take(beside, tenant.leaving, -1)  # replicas of its own that are leaving are taken back, or awaited
        promised = _places(tenant, inventory, in_the_end) is None  # to who asked before
        if not promised and (places := _places(tenant, inventory, beside)) is not None:
            if not tenant.resident:
                moves.append(Load(tenant.model))
            may_leave = [other for other in may_leave if other is not tenant]
            for held in (free_now, in_the_end):
                _take(held, places, 1)
            continue
        if (places := _places(tenant, inventory, in_the_end)) is None:
            leaving, impatient_at = _victims(tenant, may_leave, inventory, in_the_end, waited_since, now)
            if leaving is None:
                if impatient_at is not None:
                    look_at.append(impatient_at)
                else:
                    short.append(tenant.model)
                continue
            for other in leaving:
                moves.append(Unload(other.model, tenant.model))
                _take(in_the_end, other.stays, -1)
            may_leave = [other for other in may_leave if other not in leaving]
            places = _places(tenant, inventory, in_the_end)
        _take(in_the_end, places or {}, 1)  # nobody else counts on this room
    return ResidencyPlan(tuple(moves), tuple(short), min(look_at, default=None))


def _victims(
    tenant: Tenant,
    may_leave: Sequence[Tenant],
    inventory: Inventory,
    held: Mapping[str, int],
    waited_since: float,
    now: float,
) -> tuple[list[Tenant] | None, float | None]:
    """Who has to leave for a tenant: the first of `may_leave` that make room for it together, without those that
    need not go. None if they cannot, with the time from which those in use may be sent away, if that would help.
    """
    candidates = [
        other
        for other in may_leave
        if other.model != tenant.model and not (other.busy and other.priority > tenant.priority)
    ]
    leaves = {other.model: other.may_go_at(waited_since) for other in candidates}
    times = sorted({now, *(at for at in leaves.values() if now < at < float("inf"))})
    for at in times:
        free_to_go = [other for other in candidates if leaves[other.model] <= at]
        chosen = _enough(tenant, free_to_go, inventory, held)
        if chosen is not None:
            return (chosen, None) if at == now else (None, at)
    loading = float("inf") in leaves.values()
    return None, now + PATIENCE if loading and _enough(tenant, candidates, inventory, held) is not None else None


def _enough(
    tenant: Tenant, candidates: Sequence[Tenant], inventory: Inventory, held: Mapping[str, int]
) -> list[Tenant] | None:
    """The first candidates whose room together is enough, without those that need not go; None if it never is."""
    without = dict(held)
    chosen: list[Tenant] = []
    for other in candidates:
        chosen.append(other)
        _take(without, other.stays, -1)
        if _places(tenant, inventory, without) is None:
            continue
        for kept in list(chosen):  # one on another device makes no room here
            _take(without, kept.stays, 1)
            if _places(tenant, inventory, without) is not None:
                chosen.remove(kept)
            else:
                _take(without, kept.stays, -1)
        return chosen
    return None


def _places(tenant: Tenant, inventory: Inventory, held: Mapping[str, int]) -> dict[str, int] | None:
    """Bytes by device that its missing replicas take beside what is held: of all that fit; None if none does."""
    places = free_places(
        inventory, held, tenant.kind, tenant.need, tenant.share, tenant.device_ids, most=tenant.missing
    )
    taken: dict[str, int] = {}
    for device in places:
        taken[device] = taken.get(device, 0) + tenant.need
    return taken or None


def _take(held: dict[str, int], what: Mapping[str, int], sign: int) -> None:
    for device, size in what.items():
        held[device] = held.get(device, 0) + sign * size
