"""What is made of NVML's answers. There is no driver here, so the functions of pynvml itself are played."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from quire.router.exposition import Gpus
from quire_operators import devices, nvml
from quire_operators.nvml import STALE_SECONDS, Gpu, Health, Watch

GIB = 1 << 30


def refused(code: int = pynvml.NVML_ERROR_NOT_SUPPORTED) -> pynvml.NVMLError:
    return pynvml.NVMLError(code)


@dataclass
class Card:
    """Answers by the name of the function; one that is missing is not supported."""

    answers: dict[str, Any]
    lost: bool = False


@dataclass
class Driver:
    """NVML as a machine's driver gives it."""

    cards: list[Card]
    loaded: bool = True
    opened: int = 0
    events: list[tuple[int, int]] = field(default_factory=list)

    def init(self) -> None:
        if not self.loaded:
            raise refused(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.opened += 1

    def shutdown(self) -> None:
        self.opened -= 1

    def handle(self, index: int) -> int:
        if self.cards[index].lost:
            raise refused(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def answer(self, name: str) -> Callable[..., Any]:
        def told(handle: int, *arguments: Any) -> Any:
            found = self.cards[handle].answers.get(name)
            if callable(found):
                return found(*arguments)
            if found is None:
                raise refused()
            return found

        return told

    def wait(self, events: Any, timeout: int) -> Any:
        if not self.events:
            raise refused(pynvml.NVML_ERROR_TIMEOUT)
        device, number = self.events.pop(0)
        return SimpleNamespace(device=device, eventData=number)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        played: dict[str, Callable[..., Any]] = {
            "nvmlInit": self.init,
            "nvmlShutdown": self.shutdown,
            "nvmlSystemGetDriverVersion": lambda: "570.124.06",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
            "nvmlDeviceGetCount": lambda: len(self.cards),
            "nvmlDeviceGetHandleByIndex": self.handle,
            "nvmlDeviceGetIndex": lambda handle: handle,
            "nvmlEventSetCreate": lambda: "events",
            "nvmlDeviceRegisterEvents": lambda *_: None,
            "nvmlEventSetWait_v2": self.wait,
        }
        for name in (
            "MemoryInfo", "Name", "UtilizationRates", "PowerUsage", "PowerManagementLimit",
            "CurrentClocksEventReasons", "ComputeRunningProcesses", "RemappedRows",
            "RetiredPages", "RetiredPagesPendingStatus", "Temperature",
            "TemperatureThreshold", "TotalEccErrors", "UUID", "MigMode", "CudaComputeCapability",
        ):  # fmt: skip
            played[f"nvmlDeviceGet{name}"] = self.answer(f"nvmlDeviceGet{name}")
        for name, function in played.items():
            assert callable(getattr(pynvml, name)), name
            monkeypatch.setattr(pynvml, name, function)


def memory(total: int, free: int, reserved: int | None = None) -> Callable[..., Any]:
    """Both versions of the call; `reserved` None: a driver without the second."""

    def told(version: int | None = None) -> Any:
        if version is not None and reserved is None:
            raise refused(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return SimpleNamespace(total=total, free=free, reserved=reserved)

    return told


def plain(total: int = 80 * GIB, free: int = 80 * GIB, reserved: int | None = None) -> Card:
    return Card({"nvmlDeviceGetName": "NVIDIA A100", "nvmlDeviceGetMemoryInfo": memory(total, free, reserved)})


FULL = Card(
    {
        "nvmlDeviceGetName": "NVIDIA H200",
        "nvmlDeviceGetMemoryInfo": memory(140 * GIB, 100 * GIB, 1 * GIB),
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=87, memory=40),
        "nvmlDeviceGetPowerUsage": 412_700,
        "nvmlDeviceGetPowerManagementLimit": 700_000,
        "nvmlDeviceGetCurrentClocksEventReasons": (
            pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwThermalSlowdown
        ),
        "nvmlDeviceGetComputeRunningProcesses": ["a", "b"],
        "nvmlDeviceGetRemappedRows": (5, 2, 1, 0),
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetTemperature": lambda sensor: 88 if sensor == pynvml.NVML_TEMPERATURE_GPU else 0,
        "nvmlDeviceGetTemperatureThreshold": lambda of: (
            90 if of == pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN else 0
        ),
        "nvmlDeviceGetTotalEccErrors": lambda error, counter: (
            3 if (error, counter) == (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC) else 0
        ),
    }
)


def test_all_that_a_card_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver([FULL])
    driver.install(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = nvml.ask(health=True)
    assert (found.driver, found.cuda, found.problem) == ("570.124.06", (12, 8), None)
    (gpu,) = found.gpus
    assert gpu.capability == (9, 0)
    assert not gpu.too_old
    assert (gpu.name, gpu.memory, gpu.available, gpu.used) == ("NVIDIA H200", 140 * GIB, 100 * GIB, 39 * GIB)
    assert gpu.health == Health(
        utilization=0.87,
        temperature=88,
        slowdown_temperature=90,
        power=412.7,
        power_limit=700.0,
        slowed_by=("heat (hardware)", "power limit"),
        ecc_errors=3,
        repairs=2,
        repair_pending=True,
        repair_failed=False,
        processes=2,
    )
    assert nvml.ask().gpus == (replace(gpu, health=None),)
    assert driver.opened == 0, "what is opened is closed"


def test_what_a_card_does_not_tell_is_none_and_not_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver([plain()]).install(monkeypatch)
    (gpu,) = nvml.ask(health=True).gpus
    assert gpu == Gpu(0, "NVIDIA A100", 80 * GIB, 80 * GIB, 0, Health())


def test_older_cards_retire_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    card = plain()
    card.answers["nvmlDeviceGetRetiredPages"] = lambda cause: (
        [1, 2] if cause == pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR else [1, 2, 3]
    )
    card.answers["nvmlDeviceGetRetiredPagesPendingStatus"] = 1
    Driver([card]).install(monkeypatch)
    health = nvml.ask(health=True).gpus[0].health
    assert health == Health(repairs=2, repair_pending=True)


def test_a_lost_card_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver([plain(), Card({}, lost=True), plain()])
    driver.install(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = nvml.ask()
    assert [gpu.index for gpu in found.gpus] == [0, 2]
    assert found.problem is not None
    assert found.problem.startswith("GPU 1 does not answer: ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    found = nvml.ask()
    assert [gpu.index for gpu in found.gpus] == [2]
    assert found.problem is not None
    assert "hides 2 of 3" in found.problem


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", [1]),
        ("GPU-1d7, 2", [0, 2]),  # the beginning of one will do
        ("GPU-77", []),
        ("MIG-8932f937", []),
    ],
)
def test_gpus_may_be_shown_by_uuid(visible: str, shown: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [plain() for _ in range(3)]
    for card, uuid in zip(cards, ("GPU-1d7a", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"), strict=False):
        card.answers["nvmlDeviceGetUUID"] = uuid
    Driver([*cards, Card({}, lost=True)]).install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = nvml.ask()
    assert [gpu.index for gpu in found.gpus] == shown
    assert found.problem is not None
    assert found.problem.endswith(f"CUDA_VISIBLE_DEVICES={visible} hides {4 - len(shown)} of 4")


def test_a_divided_gpu_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is that of all its parts, of which CUDA sees one."""
    divided, whole = plain(), plain()
    divided.answers["nvmlDeviceGetMigMode"], whole.answers["nvmlDeviceGetMigMode"] = [1, 1], [0, 1]
    divided.answers["nvmlDeviceGetMemoryInfo"] = lambda *_: (_ for _ in ()).throw(
        refused(pynvml.NVML_ERROR_NO_PERMISSION)
    )
    Driver([divided, whole]).install(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = nvml.ask()
    assert [gpu.index for gpu in found.gpus] == [1]
    assert found.problem == "GPU 0 is divided (MIG), and only whole ones are given to replicas"


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver([FULL], loaded=False).install(monkeypatch)
    found = nvml.ask(health=True)
    assert found.gpus == ()
    assert found.problem is not None
    assert "cannot be used" in found.problem
    assert not Watch().open()


def test_what_others_hold_of_a_gpu_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is the driver's own share; what our replicas hold is counted once."""
    Driver([plain(100, 60, 4)]).install(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = devices.detect()
    assert machine.foreign("cuda:0", 0) == 36
    assert machine.foreign("cuda:0", 30) == 6
    assert machine.foreign("cpu", 0) == 0
    assert devices.gpus_text(machine, {"cuda:0": 30}) == "cuda:0 of 100 B, held by replicas 30 B and others 6 B"
    assert devices.gpus_text(machine, {"cuda:0": 36}) == "cuda:0 of 100 B, held by replicas 36 B"
    assert devices.free_places(machine, {}, "cuda", 30, 0.9) == ["cuda:0"] * 2
    assert devices.free_places(machine, {}, "cuda", 31, 0.9) == ["cuda:0"]
    assert devices.free_places(machine, {}, "cuda", 30, 0.9, most=1) == ["cuda:0"]
    assert devices.free_places(machine.cleared({}), {}, "cuda", 60, 0.9) == ["cuda:0"], "nothing is taken twice"
    assert devices.free_places(machine, {"cuda:0": 30}, "cuda", 30, 0.9) == ["cuda:0"] * 2
    assert devices.free_places(machine, {"cuda:0": 30}, "cuda", 31, 0.9) == ["cuda:0"]


def test_a_watch_shows_the_last_reading_and_counts_what_drivers_report(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    driver = Driver([FULL, plain()])
    driver.install(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    watch = Watch(clock=lambda: now[0])
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Gpus(watch))
    assert watch.gpus == ()
    assert watch.open()
    driver.events = [(1, 79), (0, 48), (1, 79)]
    watch.read()
    assert watch.xids == {(1, 79): 2, (0, 48): 1}
    page = generate_latest(registry).decode()
    shown = {name: float(value) for name, value in re.findall(r"^(quire_\S+) (\S+)$", page, re.MULTILINE)}
    assert shown == {
        'quire_gpu_memory_bytes{device="cuda:0"}': 140 * GIB,
        'quire_gpu_memory_used_bytes{device="cuda:0"}': 39 * GIB,
        'quire_gpu_utilization_ratio{device="cuda:0"}': 0.87,
        'quire_gpu_temperature_celsius{device="cuda:0"}': 88,
        'quire_gpu_power_watts{device="cuda:0"}': 412.7,
        'quire_gpu_slowed{device="cuda:0"}': 1,
        'quire_gpu_ecc_uncorrected_errors{device="cuda:0"}': 3,
        'quire_gpu_memory_bytes{device="cuda:1"}': 80 * GIB,
        'quire_gpu_memory_used_bytes{device="cuda:1"}': 0,
        'quire_gpu_xid_errors_total{device="cuda:0",xid="48"}': 1,
        'quire_gpu_xid_errors_total{device="cuda:1",xid="79"}': 2,
    }, "what is not told has no series"
    driver.loaded = False
    now[0] += STALE_SECONDS + 1
    assert watch.gpus == (), "an old reading is none"
    assert 'device="cuda:0"}' not in generate_latest(registry).decode()


def test_what_is_planned_with_is_what_the_kernels_take() -> None:
    """Neither may import the other."""
    from quire_kernels.triton import OLDEST

    assert nvml.OLDEST == OLDEST
