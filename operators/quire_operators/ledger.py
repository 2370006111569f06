"""What is held of this machine's devices now, who holds it without a row, and how much more fits.

No table: the rows of the store name their devices and bytes, processes carry theirs as labels, and what is held is
the sum. It is worked out again when a row or a process has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quire_operators.desired import Effective, priority_of
from quire_operators.devices import Inventory, free_places, held
from quire_operators.fleet.local import Life, LocalFleet, Observation
from quire_operators.placement import Placement
from quire_operators.records import StoredObject
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


class Ledger:
    """Reads `store` and `fleet`; `detect` says what there is, `effective` what is to run of a model."""

    def __init__(
        self,
        store: Store,
        fleet: LocalFleet,
        detect: Callable[[], Inventory],
        effective: Callable[[StoredObject], Effective],
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._detect = detect
        self._effective = effective
        self._kept: tuple[tuple[int, int], Holdings] | None = None
        self._by_priority: tuple[Sequence[StoredObject], dict[int, list[StoredObject]]] = ((), {})

    def now(self) -> Holdings:
        """What all rows and processes hold."""
        version = (self._store.rows_version, self._fleet.version)
        if self._kept is None or self._kept[0] != version:
            rows = self._store.replicas()
            version = (self._store.rows_version, self._fleet.version)  # reading may find that others wrote
            self._kept = (version, Holdings.of(rows, self._fleet.observed()))
        return self._kept[1]

    def places(self, wanted: Effective, placement: Placement) -> list[str]:
        """Devices for as many more replicas as fit now, beside every row, every orphan and what models of higher
        priority lack; no more than a rollout can want."""
        spec = wanted.stored.resolved
        most = spec["replicas"] + spec["rollout"]["maxSurge"]
        taken = dict(self.now().taken)
        for stored in self._above(priority_of(spec)):
            other = self._effective(stored)
            lacks = missing(other, self._store.replicas(stored.key.name))
            for device in self._fit(other, need := Placement.from_dict(other.revision.placement), taken, lacks):
                taken[device] = taken.get(device, 0) + need.memory
        return self._fit(wanted, placement, taken, most)

    def _fit(self, wanted: Effective, placement: Placement, taken: Mapping[str, int], most: int) -> list[str]:
        spec = wanted.stored.resolved
        return free_places(
            self._detect(),
            taken,
            placement.device,
            placement.memory,
            parse_percent(spec["engine"]["memory"]),
            spec["placement"]["deviceIds"],
            most=most,
        )

    def _above(self, priority: int) -> list[StoredObject]:
        """Models of higher priority, the highest first. Where all have the same there are none to go through."""
        stored = self._store.objects("model")
        if self._by_priority[0] is not stored:
            ranks: dict[int, list[StoredObject]] = {}
            for each in stored:
                ranks.setdefault(priority_of(each.resolved), []).append(each)
            self._by_priority = (stored, ranks)
        ranks = self._by_priority[1]
        return [each for rank in sorted(ranks, reverse=True) if rank > priority for each in ranks[rank]]


def missing(wanted: Effective, rows: Sequence[Row]) -> int:
    """Replicas that a model is to have now and has no row for."""
    if wanted.stored.deletion_time is not None:
        return 0
    want: int = wanted.stored.resolved["replicas"]
    return max(want - sum(row.goal is Goal.RUN for row in rows), 0)
