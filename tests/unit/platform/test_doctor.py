"""The doctor's judgement on prepared reports, and what it reads off files. Real processes are in tests/e2e."""

from __future__ import annotations

import copy
import json
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire import doctor
from quire.cli.doctor import exit_code, lines
from quire.cli.outcome import ExitCode
from quire_operators.nvml import Gpu
from quire_operators.paths import StateDir
from quire_operators.store import Store
from quire_operators.tables import SCHEMA_VERSION

DOCS = Path(__file__).resolve().parents[3] / "docs/doctor.md"
REPLICA = {
    "model": "m", "id": "m-r1-0", "shimPid": 5, "shimAnswers": True, "enginePid": 6, "engineAnswers": True,
}  # fmt: skip
Report = dict[str, Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report of this machine on an empty state folder, with a replica that runs and a port that is free."""
    state = StateDir(tmp_path_factory.mktemp("doctor") / "state")
    report = doctor.examine(state)
    assert not os.path.exists(state.root), "the doctor makes nothing"
    report["ports"][0] |= {"state": "free", "pid": None, "process": None, "why": None}
    for disk in report["disk"]:
        disk["free"] = 1 << 40
    report["controlPlane"] |= {"pid": 3, "answers": True, "version": report["versions"]["quire"]}
    base = "http://127.0.0.1:8000/v1"
    report["router"] = {
        "pid": 4, "shimPid": 2, "shimAnswers": True, "baseUrl": base, "answers": True, "problem": None,
    }  # fmt: skip
    report["replicas"] = [dict(REPLICA)]
    report["devices"] = {"driver": None, "cuda": None, "gpus": [], "problem": "none here"}
    return report


def test_a_sound_report_has_no_findings(sound: Report) -> None:
    assert doctor.judge(sound) == []
    assert json.loads(json.dumps(sound)) == sound


def _set(*path: Any, value: Any) -> Callable[[Report], None]:
    def change(report: Report) -> None:
        holder: Any = report
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = value

    return change


GPU: Report = doctor._gpu(Gpu(0, "NVIDIA H200", 140 << 30, 139 << 30))


def _with_gpu(**health: Any) -> Callable[[Report], None]:
    """One GPU that torch sees, of which `health` is known."""

    def change(report: Report) -> None:
        report["devices"]["gpus"] = [GPU | health]
        report["kernels"].update(gpus=1, backends=[{"name": "triton", "available": True, "reason": None}])

    return change


def _without_compiler(report: Report) -> None:
    """As in an image with a driver and torch, and not more."""
    reason = "BackendUnavailable: Triton cannot speak to the driver: RuntimeError: Failed to find C compiler."
    kernels = [
        {"name": "reference", "available": True, "reason": None},
        {"name": "triton", "available": False, "reason": reason},
    ]
    report["devices"]["gpus"] = [GPU]
    report["kernels"].update(gpus=1, backends=kernels)


def _old_driver(report: Report) -> None:
    report["devices"].update(driver="470.1", cuda="11.4", gpus=[GPU])
    report["kernels"].update(cuda="13.0")


WRONG: dict[str, tuple[Callable[[Report], None], str, str, str]] = {
    "owner": (_set("stateDir", "own", value=False), "error", "another user", "QUIRE_STATE_DIR"),
    "full": (_set("stateDir", "writeProblem", value="/x: No space left"), "error", "No space", "make room"),
    "network": (_set("stateDir", "fileSystem", value="nfs4"), "error", "file system (nfs4)", "local disk"),
    "sockets": (_set("stateDir", "sockets", "problem", value="not a folder of"), "error", "somebody", "rm -r"),
    "store": (_set("stateDir", "store", "problem", value="not a database"), "error", "not a database", "move it"),
    "disk": (_set("disk", 0, "free", value=1000), "warning", "0 MiB are free", "make room"),
    "port": (
        lambda report: report["ports"][0].update(state="taken", why="127.0.0.1:8000 is in use (process 7, x)"),
        "error", "in use (process 7, x)", "another spec.port",
    ),
    "silent": (_set("controlPlane", "answers", value=False), "error", "(pid 3) does not answer", "kill -9 3"),
    "older": (_set("controlPlane", "version", value="0.0.1"), "warning", "is 0.0.1", "platform down"),
    "down": (_set("controlPlane", "problem", value="still alive: m"), "error", "still alive", "platform down"),
    "router": (_set("router", "answers", value=False), "error", "router (pid 4)", "logs"),
    "certificate": (_set("router", "problem", value="/x is gone"), "error", "not asked: /x is gone", "put the"),
    "router's shim": (_set("router", "shimAnswers", value=False), "error", "shim of the router", "platform down"),
    "lost": (
        lambda report: report["controlPlane"].update(pid=None, answers=False),
        "warning", "no control plane", "platform get",
    ),
    "shim": (_set("replicas", 0, "shimAnswers", value=False), "error", "shim of m-r1-0", "describe"),
    "engine": (_set("replicas", 0, "engineAnswers", value=False), "warning", "of m-r1-0 (pid 6)", "model/m"),
    "torch": (_set("kernels", "problem", value="ImportError: no"), "error", "ImportError: no", "install"),
    "kernels": (
        _set("kernels", "backends", value=[{"name": "reference", "available": False, "reason": "it computed 7"}]),
        "error", "reference: it computed 7", "install",
    ),
    "native": (
        _set("kernels", "backends", value=[
            {"name": "reference", "available": True, "reason": None},
            {"name": "cpu", "available": False, "reason": "no C++ compiler is installed"},
        ]),
        "warning", "no C++ compiler is installed", "g++",
    ),
    "for gpus": (_without_compiler, "error", "no model runs there: BackendUnavailable: Triton", "a C compiler"),
    "gpu": (
        _set("devices", "gpus", value=[GPU]), "error", "sees 1 GPU, torch none: it is built", "install a torch",
    ),
    "driver": (
        _old_driver, "error", "driver 470.1 runs CUDA up to 11.4, torch is built for 13.0", "a newer driver",
    ),
    "ecc": (_with_gpu(eccErrors=3), "warning", "GPU 0 has had 3 memory errors", "--gpu-reset -i 0"),
    "pending": (_with_gpu(repairPending=True), "warning", "a repair waits for a reset", "--gpu-reset -i 0"),
    "bad memory": (_with_gpu(repairFailed=True, eccErrors=9), "error", "nothing left to", "replace the card"),
    "hot": (_with_gpu(temperature=92, slowdownTemperature=90), "warning", "too hot at 92 °C", "fans"),
    "slowed": (_with_gpu(slowedBy=["heat (driver)", "power limit"]), "warning", "GPU 0 is too hot:", "fans"),
    "brake": (_with_gpu(slowedBy=["power brake"]), "warning", "power supply", "power cables"),
    "package": (_set("versions", "uvicorn", value=None), "error", "not installed: uvicorn", "make venv"),
    "mode": (
        lambda report: report["stateDir"].update(exists=True, mode="drwxr-xr-x"),
        "warning", "open to other users", "chmod 700",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_a_remedy(name: str, sound: Report) -> None:
    change, severity, message, hint = WRONG[name]
    report = copy.deepcopy(sound)
    change(report)
    (finding,) = doctor.judge(report)
    assert finding.severity == severity
    assert message in finding.message
    assert hint in finding.hint
    report |= {"findings": [vars_of(finding)], "healthy": severity != "error"}
    shown = "\n".join(lines({**report, "devices": sound["devices"]}))
    assert f"{severity}: {finding.message}\nhint: " in shown
    wanted = ExitCode.OK if severity == "warning" else ExitCode.FAILED
    assert exit_code(report) == (ExitCode.UNREACHABLE if name == "silent" else wanted)


def vars_of(finding: doctor.Finding) -> dict[str, str]:
    return {name: getattr(finding, name) for name in ("severity", "subject", "message", "hint")}


def test_every_key_is_documented_and_every_documented_key_is_there(sound: Report) -> None:
    table, of_gpus = DOCS.read_text().split("Of each GPU")
    assert set(GPU) == {
        name for row in re.findall(r"^\| (`.*?) \|", of_gpus, re.M) for name in re.findall(r"\w+", row)
    }
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    assert set(rows) == set(sound)
    for name, text in rows.items():
        value = sound[name]
        examples = value if isinstance(value, list) else [value]
        for example in examples:
            if isinstance(example, dict) and name != "versions":
                assert set(example) <= set(re.findall(r"\w+", text)), name


def test_a_store_is_looked_at_and_not_touched(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.root.mkdir()
    Store(state.store).close()
    before = state.store.stat().st_mtime_ns
    found = doctor.store_of(state.store)
    assert (found["problem"], found["schema"]) == (None, str(SCHEMA_VERSION))
    assert state.store.stat().st_mtime_ns == before
    state.store.write_bytes(b"garbage" * 1000)
    assert "not a database" in doctor.store_of(state.store)["problem"]
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE t (x)")
    assert "no such table" in doctor.store_of(tmp_path / "other.db")["problem"]


def test_a_gpu_has_a_line_of_what_it_tells(sound: Report) -> None:
    told = GPU | {
        "utilization": 0.87,
        "temperature": 61,
        "slowdownTemperature": 90,
        "power": 412.7,
        "eccErrors": 0,
    }
    report = {**sound, "findings": [], "devices": {**sound["devices"], "driver": "570.1", "cuda": "12.8"}}
    report["devices"]["gpus"] = [told]
    shown = "\n".join(lines(report))
    assert "cuda:0 NVIDIA H200, 139.0 GiB free of 140.0 GiB, driver 570.1 (CUDA 12.8)" in shown
    assert "busy 87 %, 61 of 90 °C, 413 of ? W, uncorrected memory errors 0, repairs ?, processes ?" in shown
