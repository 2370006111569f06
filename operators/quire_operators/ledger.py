"""What is held of this machine's devices now, who holds it without a row, and how much more fits.

No table: the rows of the store name their devices and bytes, processes carry theirs as labels, and what is held is
the sum. It is worked out again when a row or a process has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from quire_operators.desired import Effective, priority_of
from quire_operators.devices import Inventory, free_places, held
from quire_operators.fleet.local import Life, LocalFleet, Observation
from quire_operators.placement import Placement
from quire_operators.rollout import Goal, Row
from quire_operators.store import Store
from quire_schemas.quantities import parse_percent


@dataclass(frozen=True, slots=True)
class Holdings:
    """What is held at one moment."""

    taken: Mapping[str, int]
    """Bytes by device: of every row, and of every process that may live without one."""
    strays: tuple[Observation, ...]
    """Live processes that no row accounts for."""

    @classmethod
    def of(cls, rows: Sequence[Row], observed: Sequence[Observation]) -> Holdings:
        known = {row.nonce for row in rows}
        names = {(row.id, row.incarnation, row.nonce) for row in rows}
        extra: dict[str, int] = {}
        for seen in observed:
            if seen.nonce not in known and seen.life is not Life.GONE and "memory" in seen.labels:
                device = str(seen.labels["device"])
                extra[device] = extra.get(device, 0) + int(seen.labels["memory"])
        strays = tuple(
            seen
            for seen in observed
            if seen.life is Life.LIVE and (seen.name, seen.incarnation, seen.nonce) not in names
        )
        return cls(held(rows, extra), strays)


@dataclass(frozen=True, slots=True)
class Waiter:
    """A model that wants more replicas than it has room for, and would have them at once if it had it."""

    wanted: Effective
    lacks: int

    @property
    def model(self) -> str:
        return self.wanted.stored.key.name

    @property
    def priority(self) -> int:
        return priority_of(self.wanted.stored.resolved)


def beside_waiters(
    wanted: Effective, waiters: Iterable[Waiter], inventory: Inventory, taken: Mapping[str, int]
) -> dict[str, int]:
    """Bytes by device that are not for this model to have: what is `taken`, and of the rest what those who wait
    with a higher priority could use."""
    taken, mine = dict(taken), priority_of(wanted.stored.resolved)
    above = [each for each in waiters if each.priority > mine and each.model != wanted.stored.key.name]
    for waiter in sorted(above, key=lambda each: -each.priority):
        placement = Placement.from_dict(waiter.wanted.revision.placement)
        for device in _fit(waiter.wanted, placement, inventory, taken, waiter.lacks):
            taken[device] = taken.get(device, 0) + placement.memory
    return taken


class Ledger:
    """Reads `store` and `fleet`; `detect` says what there is. It remembers who waits for room, as passes found."""

    def __init__(self, store: Store, fleet: LocalFleet, detect: Callable[[], Inventory]) -> None:
        self._store = store
        self._fleet = fleet
        self._detect = detect
        self._kept: tuple[tuple[int, int], Holdings] | None = None
        self.waiters: dict[str, Waiter] = {}
        self._had: dict[str, int] = {}
        """Places that models have had since their numbers last grew: one that replaces its own replicas keeps
        them."""
        self._vacated: dict[str, Effective] = {}

    def now(self) -> Holdings:
        """What all rows and processes hold."""
        version = (self._store.rows_version, self._fleet.version)
        if self._kept is None or self._kept[0] != version:
            rows = self._store.replicas()
            version = (self._store.rows_version, self._fleet.version)  # reading may find that others wrote
            self._kept = (version, Holdings.of(rows, self._fleet.observed()))
        return self._kept[1]

    def places(self, wanted: Effective, placement: Placement, rows: int) -> list[str]:
        """Devices for as many more replicas as fit now beside the `rows` that it has, every other row, every
        orphan and what models of higher priority wait for; no more than a rollout can want."""
        spec, model = wanted.stored.resolved, wanted.stored.key.name
        most = spec["replicas"] + spec["rollout"]["maxSurge"]
        inventory, taken = self._detect(), self._with_vacated(model)
        free = _fit(wanted, placement, inventory, taken, most)
        if not free or not self.waiters:
            return free
        beside = _fit(
            wanted, placement, inventory, beside_waiters(wanted, self.waiters.values(), inventory, taken), most
        )
        return max(beside, free[: max(self._had.get(model, 0) - rows, 0)], key=len)

    def vacated(self, wanted: Effective) -> None:
        """A model has let go of a replica: if it is to have another one, the place is kept for it until it
        can have that, in a pass with nothing of it on its way out, whoever asks before."""
        self._vacated[wanted.stored.key.name] = wanted

    def _with_vacated(self, model: str) -> Mapping[str, int]:
        """What is taken, with the places of other models that replace their own replicas."""
        taken = dict(self.now().taken)
        for name, wanted in self._vacated.items():
            lacks = self._had.get(name, 0) - len(self._store.replicas(name)) if name != model else 0
            placement = Placement.from_dict(wanted.revision.placement)
            for device in _fit(wanted, placement, self._detect(), taken, max(lacks, 0)):
                taken[device] = taken.get(device, 0) + placement.memory
        return taken

    def note(self, wanted: Effective, rows: Sequence[Row], *, waits: bool) -> bool:
        """Remember whether a model waits for room; says whether others may have some that was kept for it."""
        model, want = wanted.stored.key.name, wanted.stored.resolved["replicas"]
        if wanted.stored.deletion_time is not None:
            want = 0
        self._had[model] = want if len(rows) >= want else min(self._had.get(model, 0), want)
        if not any(row.goal is Goal.DRAIN for row in rows):
            self._vacated.pop(model, None)  # this very pass creates what it can
        if not self._had[model]:
            del self._had[model]
        before = self.waiters.pop(model, None)
        if waits:
            self.waiters[model] = Waiter(wanted, max(missing(wanted, rows), 1))
        after = self.waiters.get(model)
        if before is None:
            return False
        return after is None or (after.priority, after.lacks) != (before.priority, before.lacks)


def _fit(
    wanted: Effective, placement: Placement, inventory: Inventory, taken: Mapping[str, int], most: int
) -> list[str]:
    spec = wanted.stored.resolved
    return free_places(
        inventory,
        taken,
        placement.device,
        placement.memory,
        parse_percent(spec["engine"]["memory"]),
        spec["placement"]["deviceIds"],
        most=most,
    )


def missing(wanted: Effective, rows: Sequence[Row]) -> int:
    """Replicas that a model is to have now and has no row for."""
    if wanted.stored.deletion_time is not None:
        return 0
    want: int = wanted.stored.resolved["replicas"]
    return max(want - sum(row.goal is Goal.RUN for row in rows), 0)
