"""What this machine has, and who holds how much of it.

An `Inventory` is either detected (psutil and the cgroup's limits for memory and cores, NVML for GPUs) or
declared in a plan request, so that a manifest for a large machine can be planned on a laptop. The ledger is not
a table: every replica row names its device and its bytes, so what is held is always the sum over the rows,
draining and orphaned processes included. `free_places` says where more replicas fit.

Exceptions:

    InventoryError         a declared inventory is not understood; has message and hint
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from quire_operators import nvml
from quire_operators.host import ControlGroups, physical_cores
from quire_operators.nvml import Gpu
from quire_operators.rollout import Row
from quire_schemas.quantities import BadQuantity, format_bytes, parse_quantity

MAX_PLACES = 1024
"""Nobody asks for more replicas at once; bounds the answer for a tiny model on a large machine."""


class InventoryError(Exception):
    """The declared inventory has the wrong shape."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = (
            'for example {"devices": [{"kind": "cuda", "name": "NVIDIA H100", "memory": "80Gi", "index": 0}], '
            '"cpu": {"memory": "64Gi", "cores": 16}}'
        )


@dataclass(frozen=True, slots=True)
class Inventory:
    """A machine: bytes of main memory in total and not in use, cores that may be used, GPUs."""

    memory: int
    available: int
    cores: int
    gpus: tuple[Gpu, ...] = field(default=())

    def total(self, device: str) -> int:
        """Bytes of `cpu` or `cuda:<index>`; 0 for a device that is not there."""
        if device == "cpu":
            return self.memory
        return next((gpu.memory for gpu in self.gpus if f"cuda:{gpu.index}" == device), 0)

    def usable(self, device: str) -> int:
        """Of those, bytes that the driver does not keep."""
        kept = next((gpu.reserved for gpu in self.gpus if f"cuda:{gpu.index}" == device), 0)
        return self.total(device) - kept

    def foreign(self, device: str, ours: int) -> int:
        """Bytes of a GPU that processes hold beyond `ours`, those that Quire's replicas were given."""
        return next((max(gpu.used - ours, 0) for gpu in self.gpus if f"cuda:{gpu.index}" == device), 0)

    def to_give(self, device: str, ours: int) -> int:
        """Bytes that replicas may have of a device, `ours` among them: of a GPU what is neither others' nor the
        driver's own, of main memory all."""
        return self.usable(device) - self.foreign(device, ours)

    def cleared(self, ours: Mapping[str, int]) -> Inventory:
        """What Quire could have if `ours`, what its replicas hold now, were gone: of each GPU what nobody else
        has, all of it free.
        """
        gpus = []
        for gpu in self.gpus:
            name = f"cuda:{gpu.index}"
            rest = self.to_give(name, ours.get(name, 0))
            gpus.append(replace(gpu, memory=rest, available=rest, reserved=0))
        return replace(self, gpus=tuple(gpus))


def detect() -> Inventory:
    """This machine, now."""
    groups = ControlGroups.own()
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    if (limited := groups.memory()) is not None:
        limit, used = limited
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return Inventory(total, available, usable_cores(groups), nvml.ask().gpus)


def usable_cores(groups: ControlGroups) -> int:
    """Physical cores that this process may run on, and its control groups give it the time of; at least 1."""
    allowed = physical_cores(os.sched_getaffinity(0))
    quota = groups.cores()
    return max(1, allowed if quota is None else min(allowed, int(quota)))


def declared(document: Any) -> Inventory:
    """The inventory of a plan request; what it does not say of the CPU is taken from this machine."""
    if not isinstance(document, dict) or set(document) - {"devices", "cpu"}:
        raise InventoryError("the device inventory is an object with the keys devices and cpu")
    here = detect()
    cpu = document.get("cpu") or {}
    if not isinstance(cpu, dict) or set(cpu) - {"memory", "cores"}:
        raise InventoryError("cpu is an object with the keys memory and cores")
    cores = cpu.get("cores", here.cores)
    if not isinstance(cores, int) or isinstance(cores, bool) or cores < 1:
        raise InventoryError(f"cpu.cores is a number from 1, not {cores!r}")
    memory = _bytes(cpu["memory"], "cpu.memory") if "memory" in cpu else here.memory
    devices = document.get("devices", [])
    if not isinstance(devices, list):
        raise InventoryError("devices is a list")
    gpus = tuple(_declared_gpu(item, number) for number, item in enumerate(devices))
    if len({gpu.index for gpu in gpus}) != len(gpus):
        raise InventoryError("two devices have the same index")
    return Inventory(memory, memory if "memory" in cpu else here.available, cores, gpus)


def _declared_gpu(item: Any, number: int) -> Gpu:
    where = f"devices[{number}]"
    if not isinstance(item, dict) or set(item) - {"kind", "name", "memory", "index"}:
        raise InventoryError(f"{where} is an object with the keys kind, name, memory and index")
    if item.get("kind") != "cuda":
        raise InventoryError(f"{where}.kind is 'cuda', not {item.get('kind')!r}; the CPU is declared under cpu")
    if "memory" not in item:
        raise InventoryError(f"{where}.memory is missing")
    index = item.get("index", number)
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise InventoryError(f"{where}.index is a number from 0, not {index!r}")
    memory = _bytes(item["memory"], f"{where}.memory")
    return Gpu(index, str(item.get("name", "cuda")), memory, memory)


def _bytes(value: Any, where: str) -> int:
    if not isinstance(value, str):
        raise InventoryError(f"{where} is a byte quantity such as '80Gi', not {value!r}")
    try:
        return parse_quantity(value)
    except BadQuantity as error:
        raise InventoryError(f"{where}: {error} ({error.hint})") from error


def held(rows: Iterable[Row], extra: Mapping[str, int] | None = None) -> dict[str, int]:
    """Bytes held on each device: by every row whose process may live or will be started, and by `extra`."""
    sums: dict[str, int] = dict(extra or {})
    for row in rows:
        if row.failed_generation is None:
            sums[row.device] = sums.get(row.device, 0) + row.memory
    return sums


def gpus_text(inventory: Inventory, taken: Mapping[str, int]) -> str:
    """For people: what Quire's replicas and other processes hold of each GPU."""
    parts = []
    for gpu in inventory.gpus:
        name = f"cuda:{gpu.index}"
        ours, others = taken.get(name, 0), inventory.foreign(name, taken.get(name, 0))
        beside = f" and others {format_bytes(others)}" if others else ""
        parts.append(f"{name} of {format_bytes(gpu.memory)}, held by replicas {format_bytes(ours)}{beside}")
    return "; ".join(parts) or "there is none"


def device_names(inventory: Inventory, kind: str, device_ids: Sequence[int] = ()) -> list[str]:
    """The ledger's names of the devices of that kind that serve; only those of `device_ids` if it names any."""
    if kind == "cpu":
        return ["cpu"]
    some = (gpu for gpu in inventory.gpus if not device_ids or gpu.index in device_ids)
    return [f"cuda:{gpu.index}" for gpu in some if not gpu.too_old]


def free_places(
    inventory: Inventory,
    taken: Mapping[str, int],
    kind: str,
    need: int,
    share: float,
    device_ids: Sequence[int] = (),
    most: int = MAX_PLACES,
) -> list[str]:
    """Devices for as many more replicas of `need` bytes as fit, at most `most`, emptiest device first.

    A device appears once for each replica that fits on it. Of main memory all replicas together take no more than
    `share`, for the machine has other work, and other processes give way. A GPU may be given whole, `need` being
    within the replica's own share of it; what other processes hold there is not there to be given.
    """
    names = device_names(inventory, kind, device_ids)
    free = {}
    for name in names:
        ours = taken.get(name, 0)
        whole = inventory.to_give(name, ours)
        free[name] = (int(whole * share) if kind == "cpu" else whole) - ours
    places: list[str] = []
    while free and len(places) < min(most, MAX_PLACES):
        name = max(free, key=lambda name: (free[name], -names.index(name)))
        if need <= 0 or free[name] < need:
            break
        free[name] -= need
        places.append(name)
    return places
