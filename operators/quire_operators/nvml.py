"""GPUs as NVML reports them: memory for those who place replicas, health for those who look after machines.

NVML needs no root for any of it. What a card or its driver does not tell is None, never a guess; a card that is
lost is left out and named, and hides no other.

`ask` opens NVML and closes it again. `Watch` keeps it open in a thread of its own, for whoever wants to know
again and again: a card that is in trouble may hold a call up for seconds, or for good. It also counts the errors
that the driver reports (Xid), which NVML tells only to those who listen.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

log = logging.getLogger(__name__)
T = TypeVar("T")

OLDEST = (8, 0)
"""Compute capability from which on the kernels for GPUs serve; an engine on an older card does not start."""
WATCH_SECONDS = 5.0
"""Between two readings of a `Watch`."""
STALE_SECONDS = 30.0
"""A reading that is older says nothing of now."""

SLOWED_BY_HEAT = ("heat (hardware)", "heat (driver)")
POWER_BRAKE = "power brake"
_SLOWED = (
    (pynvml.nvmlClocksEventReasonHwThermalSlowdown, SLOWED_BY_HEAT[0]),
    (pynvml.nvmlClocksEventReasonSwThermalSlowdown, SLOWED_BY_HEAT[1]),
    (pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown, POWER_BRAKE),
    (pynvml.nvmlClocksEventReasonSwPowerCap, "power limit"),
)


@dataclass(frozen=True, slots=True)
class Health:
    """What a GPU tells of itself at one moment; None where this card or its driver does not tell."""

    utilization: float | None = None
    """Share of the last moments, up to a second, in which some kernel ran: 0 to 1."""
    temperature: int | None = None
    """Degrees Celsius."""
    slowdown_temperature: int | None = None
    """From which on the card slows itself down."""
    power: float | None = None
    """Watts, now and at most."""
    power_limit: float | None = None
    slowed_by: tuple[str, ...] | None = None
    """Why clocks are held back."""
    ecc_errors: int | None = None
    """Memory errors that could not be corrected, since the driver was loaded."""
    repairs: int | None = None
    """Rows of memory that were replaced, or on older cards pages that were retired, for such errors, ever."""
    repair_pending: bool | None = None
    """A repair waits for the card to be reset."""
    repair_failed: bool | None = None
    """There was nothing left to replace a row with."""
    processes: int | None = None
    """That compute on it, ours included."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `memory` is bytes in total, `available` what no process holds, `reserved` what the driver keeps."""

    index: int
    name: str
    memory: int
    available: int
    reserved: int = 0
    health: Health | None = None
    """None: nobody asked."""
    capability: tuple[int, int] | None = None
    """Compute capability; None: not told, or a card that was declared."""

    @property
    def too_old(self) -> bool:
        return self.capability is not None and self.capability < OLDEST

    @property
    def used(self) -> int:
        """Bytes that processes hold, whoever started them."""
        return max(self.memory - self.available - self.reserved, 0)


@dataclass(frozen=True, slots=True)
class Nvml:
    """What NVML says: the driver's version, the newest CUDA that it runs as (major, minor), the GPUs; `problem`
    is why there are none, or not all.
    """

    driver: str | None
    cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    problem: str | None


def ask(*, health: bool = False) -> Nvml:
    """GPUs that NVML reports; none on a machine without its driver. CUDA_VISIBLE_DEVICES narrows them, by number
    or UUID. One that is divided (MIG) is left out: replicas are given whole ones."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Nvml(None, None, (), f"NVML cannot be used: {error}")
    try:
        return _ask_open(health=health)
    except pynvml.NVMLError as error:
        return Nvml(None, None, (), f"NVML stopped answering: {error}")
    finally:
        pynvml.nvmlShutdown()


def _ask_open(*, health: bool) -> Nvml:
    driver = str(pynvml.nvmlSystemGetDriverVersion())
    newest = _told(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    problems: list[str] = []
    found: list[Gpu] = []
    count = pynvml.nvmlDeviceGetCount()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = [index for index in range(count) if visible is None or _is_named(visible, index)]
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            # what NVML says then is of the whole card, and CUDA would see one of its parts
            mig = _told(pynvml.nvmlDeviceGetMigMode, handle)
            if mig is not None and mig[0]:
                problems.append(f"GPU {index} is divided (MIG), and only whole ones are given to replicas")
            elif index in shown:
                found.append(_gpu(index, handle, health=health))
        except pynvml.NVMLError as error:
            problems.append(f"GPU {index} does not answer: {error}")
    if len(shown) < count:
        problems.append(f"CUDA_VISIBLE_DEVICES={visible} hides {count - len(shown)} of {count}")
    cuda = None if newest is None else (newest // 1000, newest % 1000 // 10)
    return Nvml(driver, cuda, tuple(found), "; ".join(problems) or None)


def _is_named(visible: str, index: int) -> bool:
    """Whether CUDA_VISIBLE_DEVICES says this one: by its number, or by its UUID or how that begins."""
    parts = [part.strip() for part in visible.split(",")]
    if index in [int(part) for part in parts if part.isdigit()]:
        return True
    beginnings = tuple(part for part in parts if part.startswith("GPU-"))
    handle = _told(pynvml.nvmlDeviceGetHandleByIndex, index) if beginnings else None
    uuid = None if handle is None else _told(pynvml.nvmlDeviceGetUUID, handle)
    return uuid is not None and str(uuid).startswith(beginnings)


def _gpu(index: int, handle: Any, *, health: bool) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    # drivers before 510 do not tell what they keep for themselves
    apart = _told(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    capability = _told(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Gpu(
        index,
        str(pynvml.nvmlDeviceGetName(handle)),
        int(memory.total),
        int(memory.free),
        0 if apart is None else int(apart.reserved),
        _health(handle) if health else None,
        None if capability is None else (int(capability[0]), int(capability[1])),
    )


def _health(handle: Any) -> Health:
    rates = _told(pynvml.nvmlDeviceGetUtilizationRates, handle)
    power = _told(pynvml.nvmlDeviceGetPowerUsage, handle)
    limit = _told(pynvml.nvmlDeviceGetPowerManagementLimit, handle)
    reasons = _told(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    processes = _told(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    repairs, pending, failed = _repairs(handle)
    return Health(
        utilization=None if rates is None else rates.gpu / 100,
        temperature=_told(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        slowdown_temperature=_told(
            pynvml.nvmlDeviceGetTemperatureThreshold, handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        ),
        power=None if power is None else power / 1000,
        power_limit=None if limit is None else limit / 1000,
        slowed_by=None if reasons is None else tuple(word for bit, word in _SLOWED if reasons & bit),
        ecc_errors=_told(
            pynvml.nvmlDeviceGetTotalEccErrors,
            handle,
            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            pynvml.NVML_VOLATILE_ECC,
        ),
        repairs=repairs,
        repair_pending=pending,
        repair_failed=failed,
        processes=None if processes is None else len(processes),
    )


def _repairs(handle: Any) -> tuple[int | None, bool | None, bool | None]:
    """Rows that were remapped; of cards from before they could be (Ampere), pages that were retired."""
    rows = _told(pynvml.nvmlDeviceGetRemappedRows, handle)
    if rows is not None:
        _, uncorrectable, pending, failed = rows
        return uncorrectable, bool(pending), bool(failed)
    pages = _told(pynvml.nvmlDeviceGetRetiredPages, handle, pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR)
    waits = _told(pynvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)
    return None if pages is None else len(pages), None if waits is None else bool(waits), None


def _told(question: Callable[..., T], *arguments: Any) -> T | None:
    """The answer, or None where there is none: not supported, not permitted, or unknown to this driver."""
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None


class Watch:
    """Reads all GPUs every few seconds, once started. `gpus` and `xids` may be read from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._read: tuple[float, tuple[Gpu, ...]] = (float("-inf"), ())
        self._events: Any = None
        self._xids: Counter[tuple[int, int]] = Counter()

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """As of the last reading; none if that is too long ago."""
        at, gpus = self._read
        return gpus if self._clock() - at <= STALE_SECONDS else ()

    @property
    def xids(self) -> dict[tuple[int, int], int]:
        """(index of the GPU, number of the error) to how often the driver reported it since the start."""
        return dict(self._xids)

    def start(self) -> None:
        """Begin, if there is an NVML: the thread ends with the process, however long a call hangs."""
        threading.Thread(target=self._run, name="nvml", daemon=True).start()

    def _run(self) -> None:
        if self.open():
            while True:
                self.read()
                time.sleep(WATCH_SECONDS)

    def open(self) -> bool:
        """Whether NVML is there; it stays open."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return False
        self._events = _told(pynvml.nvmlEventSetCreate)
        for index in range(_told(pynvml.nvmlDeviceGetCount) or 0):
            handle = _told(pynvml.nvmlDeviceGetHandleByIndex, index)
            if handle is not None and self._events is not None:
                _told(pynvml.nvmlDeviceRegisterEvents, handle, pynvml.nvmlEventTypeXidCriticalError, self._events)
        return True

    def read(self) -> None:
        """One reading, and all errors reported since the last one."""
        try:
            found = _ask_open(health=True)
        except pynvml.NVMLError as error:
            log.warning("NVML stopped answering: %s", error)
            return
        for index, number in self._reported():
            log.error("GPU %d: the driver reports Xid %d", index, number)
            self._xids[index, number] += 1
        self._read = (self._clock(), found.gpus)

    def _reported(self) -> Iterator[tuple[int, int]]:
        while self._events is not None:
            event = _told(pynvml.nvmlEventSetWait_v2, self._events, 0)
            if event is None:
                return
            index = _told(pynvml.nvmlDeviceGetIndex, event.device)
            yield -1 if index is None else index, int(event.eventData)
