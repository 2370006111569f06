"""What this machine and this installation look like, and what is wrong with them: the mind of `platform doctor`.

`examine` looks and never starts or repairs anything: files, tables of the kernel, the sockets that processes of
this state folder left, the admin API where somebody answers. What is broken is a value in the report and hides
nothing else; torch is asked in a process of its own. `judge` is pure: it reads a report and says what is wrong,
and what to do.

The keys of a report are part of the product's surface; docs/doctor.md lists them.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from quire import endpoint
from quire.client import Client, ClientError
from quire_operators import devices, nvml, whereabouts
from quire_operators.host import (
    NETWORK_FILESYSTEMS,
    ControlGroups,
    address_problem,
    file_system,
    listener,
    lock_holder,
    physical_cores,
)
from quire_operators.paths import StateDir
from quire_operators.postgres import schema_of, shown
from quire_operators.sources import Sources
from quire_operators.sqlite import StoreError
from quire_schemas.gateway import DEFAULT_BIND, DEFAULT_PORT

ANSWER_SECONDS = 2.0
"""A process that says nothing for so long does not answer."""
KERNEL_SECONDS = 120.0
"""How long torch may take to load on a cold disk."""
LOW_DISK = 1 << 30
CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip
"""Flags of /proc/cpuinfo that decide how fast kernels can be, on x86 and on Arm."""
PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "pydantic", "msgspec", "litestar", "uvicorn",
    "sqlalchemy", "psutil", "nvidia-ml-py",
)  # fmt: skip
COMPILERS = ("c++", "g++", "clang++")
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. An `error` keeps Quire from working; a `warning` is worth knowing."""

    severity: Literal["error", "warning"]
    subject: str
    message: str
    hint: str


# ── looking ───────────────────────────────────────────────────────────────────────────────────────────────


def examine(state: StateDir, environ: Mapping[str, str] = os.environ) -> Report:
    """The whole report, `findings` and `healthy` included."""
    client = Client(state, start=False, timeout=ANSWER_SECONDS)
    plane, gateway = _control_plane(client)
    shims = [found for path in sorted(_shim_sockets(state)) if (found := _shim(path))]
    address = gateway or _stored_gateway(state)
    router = next((found for found in shims if state.gateway in found["folder"].parents), None)
    cache = Sources.of_environment({}, state.sources, environ).cache.root
    report: Report = {
        "machine": _machine(),
        "memory": _memory(),
        "devices": _devices(),
        "stateDir": _state_dir(state),
        "disk": [_disk("state", state.root), _disk("cache", cache), _disk("sockets", state.runtime)],
        "controlPlane": plane,
        "router": _router(router, address),
        "replicas": [_replica(found) for found in shims if found is not router],
        "ports": [_port(address, router)],
        "versions": _versions(),
        "compiler": _compiler(),
        "kernels": _kernels(),
    }
    findings = judge(report)
    report["findings"] = [asdict(finding) for finding in findings]
    report["healthy"] = not any(finding.severity == "error" for finding in findings)
    return report


def _machine() -> Report:
    flags, model = _cpuinfo()
    groups = ControlGroups.own()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": model,
        "features": [name for name in CPU_FEATURES if name in flags],
        "cores": {
            "present": os.cpu_count(),
            "allowed": len(os.sched_getaffinity(0)),
            "physical": physical_cores(os.sched_getaffinity(0)),
            "controlGroupLimit": groups.cores(),
            "usable": devices.usable_cores(groups),
        },
    }


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists (and that this user may look into)."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def _cpuinfo() -> tuple[set[str], str | None]:
    """The first processor's flags, and its name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set(), None
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    name = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(flags[1].split()) if flags else set(), name[1] if name else None


def _memory() -> Report:
    memory, inventory = psutil.virtual_memory(), devices.detect()
    limited = ControlGroups.own().memory()
    return {
        "total": memory.total,
        "usable": inventory.memory,
        "available": inventory.available,
        "controlGroupLimit": limited[0] if limited is not None else None,
    }


def _devices() -> Report:
    found = nvml.ask(health=True)
    return {
        "driver": found.driver,
        "cuda": None if found.cuda is None else "{}.{}".format(*found.cuda),
        "gpus": [_gpu(gpu) for gpu in found.gpus],
        "problem": found.problem,
    }


def _gpu(gpu: nvml.Gpu) -> Report:
    health = gpu.health or nvml.Health()
    return {
        "index": gpu.index,
        "name": gpu.name,
        "memory": gpu.memory,
        "available": gpu.available,
        "utilization": health.utilization,
        "temperature": health.temperature,
        "slowdownTemperature": health.slowdown_temperature,
        "power": health.power,
        "powerLimit": health.power_limit,
        "slowedBy": None if health.slowed_by is None else list(health.slowed_by),
        "eccErrors": health.ecc_errors,
        "repairs": health.repairs,
        "repairPending": health.repair_pending,
        "repairFailed": health.repair_failed,
        "processes": health.processes,
    }


def _disk(what: str, path: Path) -> Report:
    found = {"what": what, "path": str(path), "exists": os.path.exists(path), "fileSystem": file_system(path)}
    try:
        usage = shutil.disk_usage(existing(path))
    except OSError as error:
        return {**found, "free": None, "total": None, "problem": error.strerror or str(error)}
    return {**found, "free": usage.free, "total": usage.total, "problem": None}


def _state_dir(state: StateDir) -> Report:
    found: Report = {
        "path": str(state.root),
        "exists": os.path.isdir(state.root),
        "owner": None,
        "mode": None,
        "own": True,
        "fileSystem": file_system(state.root),
        "writeProblem": None,
        "sockets": {"path": str(state.runtime), "exists": os.path.exists(state.runtime), "problem": None},
        "store": _store(state),
    }
    with contextlib.suppress(OSError):
        info = state.root.stat()
        found |= {"owner": info.st_uid, "mode": stat.filemode(info.st_mode), "own": info.st_uid == os.geteuid()}
    found["writeProblem"] = _write_problem(state.root)
    with contextlib.suppress(OSError):
        info = state.runtime.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            found["sockets"]["problem"] = "not a folder of this user with mode 0700"
    return found


def _write_problem(folder: Path) -> str | None:
    """Why nothing can be written to the folder (or, before it exists, to the one it would be made in)."""
    folder = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return None


def _store(state: StateDir) -> Report:
    """The store, in its file or on a server, wherever this state directory and the environment say."""
    found: Report = {"path": str(state.database), "exists": True, "bytes": None, "schema": None, "problem": None}
    try:
        place = whereabouts.find(state, os.environ)
        if isinstance(place, Path):
            return store_of(place)
        found["path"] = shown(place)
        found["schema"] = schema_of(place)
    except StoreError as error:
        found["problem"] = error.message
    return found


def store_of(path: Path) -> Report:
    """The store as a file: its size and schema, and what is wrong with it. Opened for reading alone."""
    found: Report = {"path": str(path), "exists": os.path.exists(path), "bytes": None}
    found |= {"schema": None, "problem": None}
    if not found["exists"]:
        return found
    try:
        found["bytes"] = path.stat().st_size
        with _reading(path) as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'schemaVersion'").fetchone()
            found["schema"] = row[0] if row else None
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            found["problem"] = None if verdict == "ok" else str(verdict)
    except (OSError, sqlite3.Error) as error:
        found["problem"] = str(error)
    return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The store, opened so that nothing can be written."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=ANSWER_SECONDS)) as db:
        yield db


def _stored_gateway(state: StateDir) -> tuple[str, int]:
    """Where the router would listen by the store, for when nobody can be asked; the default without one."""
    if os.path.exists(state.store) and not os.path.exists(state.database):
        with contextlib.suppress(sqlite3.Error, ValueError), _reading(state.store) as db:
            query = "SELECT resolved FROM objects WHERE kind = 'gateway' AND name = 'default'"
            if (row := db.execute(query).fetchone()) is not None:
                spec = json.loads(row[0])
                return spec["bind"], spec["port"]
    return DEFAULT_BIND, DEFAULT_PORT


def _control_plane(client: Client) -> tuple[Report, tuple[str, int] | None]:
    """The control plane, and where its router listens. One that holds its lock and stays silent has a pid, too."""
    found: Report = {"pid": None, "answers": False, "version": None, "startedAt": None, "problem": None}
    found["pid"] = lock_holder(client.state.daemon_lock)
    if found["pid"] is None and not os.path.exists(client.state.admin_socket):
        return found, None
    try:
        ping = client.get("/v1/ping")
    except ClientError as error:
        found["problem"] = error.message if found["pid"] is not None else None
        return found, None
    found |= {"pid": ping["pid"], "answers": True, "version": ping["version"], "startedAt": ping["startedAt"]}
    found["problem"] = ping["downFailed"]
    address = urlsplit(ping["router"]["baseUrl"])
    return found, (address.hostname or "", address.port or 0)


def _shim_sockets(state: StateDir) -> Sequence[Path]:
    try:
        return list(state.runtime.glob("**/shim.sock"))
    except OSError:
        return []


def _shim(path: Path) -> Report | None:
    """What a shim says of itself and its child; None when it is gone (its socket refuses)."""
    found: Report = {"folder": path.parent, "shimPid": None, "answers": False, "listen": None, "childPid": None}
    found |= {"labels": {}, "running": False, "replica": None}
    try:
        heard = _ask(path, b'{"op": "hello"}\n', lambda got: got.endswith(b"\n"))
    except (ConnectionRefusedError, FileNotFoundError):
        return None
    except OSError:  # it listens and stays silent
        return found
    with contextlib.suppress(ValueError):
        said = json.loads(heard)
        found |= {name: said.get(name) for name in ("shimPid", "childPid", "running", "listen", "labels")}
        found["answers"] = said.get("shimPid") is not None
        found["replica"] = (said.get("identity") or {}).get("replicaId")
    return found


def _ask(path: Path, question: bytes, whole: Callable[[bytes], bool]) -> bytes:
    """The answer of a Unix socket. A silent one is a TimeoutError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(str(path))
        connection.sendall(question)
        heard = b""
        while not whole(heard):
            piece = connection.recv(65536)
            if not piece:
                raise ConnectionError("closed without an answer")
            heard += piece
        return heard


def _router(shim: Report | None, address: tuple[str, int]) -> Report:
    """The router: whether its own `/livez` answers. `address` is where to ask when its shim says nothing."""
    if shim is None:
        return {
            "pid": None, "shimPid": None, "shimAnswers": False, "baseUrl": None, "answers": False, "problem": None,
        }  # fmt: skip
    host, port = shim["listen"] or address
    tls = (shim["labels"] or {}).get("tls")
    base = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    answers, problem = False, None
    try:
        with contextlib.closing(
            endpoint.connection(base, ANSWER_SECONDS, tls["certFile"] if tls else None)
        ) as asked:
            asked.request("GET", "/livez")
            answers = asked.getresponse().status == 200
    except endpoint.NoCertificate as error:
        problem = str(error)
    except (OSError, http.client.HTTPException):
        pass
    return {
        "pid": shim["childPid"],
        "shimPid": shim["shimPid"],
        "shimAnswers": shim["answers"],
        "baseUrl": f"{base}/v1",
        "answers": answers,
        "problem": problem,
    }


def _replica(shim: Report) -> Report:
    """A replica: whether its engine greets, which it does from the moment it has loaded."""
    return {
        "model": (shim["labels"] or {}).get("model"),
        "id": shim["replica"],
        "shimPid": shim["shimPid"],
        "shimAnswers": shim["answers"],
        "enginePid": shim["childPid"],
        "engineAnswers": bool(shim["running"]) and _engine_greets(shim["folder"] / "engine.sock"),
    }


def _engine_greets(path: Path) -> bool:
    from quire_schemas import wire

    def whole(heard: bytes) -> bool:
        return len(heard) >= 4 and len(heard) >= 4 + struct.unpack(">I", heard[:4])[0]

    try:
        return bool(_ask(path, wire.frame(wire.Hello(role="script")), whole))
    except OSError:
        return False


def _port(address: tuple[str, int], router: Report | None) -> Report:
    """The gateway's port: held by our router, free, or taken by somebody else."""
    host, port = address
    why = address_problem(host, port)
    # A shim that is silent does not say which port it holds: the one that it was given, as long as one is held.
    if router is not None and (router["listen"][1] == port if router["listen"] else why is not None):
        return {
            "host": host,
            "port": port,
            "state": "ours",
            "pid": router["shimPid"],
            "process": None,
            "why": None,
        }
    if why is None:
        return {"host": host, "port": port, "state": "free", "pid": None, "process": None, "why": None}
    who = listener(host, port)
    found = {"pid": who.pid, "process": who.name} if who is not None else {"pid": None, "process": None}
    return {"host": host, "port": port, "state": "taken", **found, "why": why}


def _versions() -> Report:
    found: Report = {"python": platform.python_version(), "executable": sys.executable}
    for name in ("quire", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _compiler() -> Report | None:
    for name in COMPILERS:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"path": path, "version": None, "problem": str(error)}
        problem = None if done.returncode == 0 else f"it ends with {done.returncode}"
        return {"path": path, "version": (done.stdout.splitlines() or [""])[0], "problem": problem}
    return None


def _kernels() -> Report:
    """What `python -m quire_kernels` says, or why it said nothing."""
    silent: Report = {"torch": None, "cuda": None, "gpus": 0, "backends": []}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "quire_kernels"],
            capture_output=True, text=True, timeout=KERNEL_SECONDS, check=False,
        )  # fmt: skip
        said = json.loads(done.stdout) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        return {**silent, "problem": f"torch and the kernels did not load within {KERNEL_SECONDS:.0f} s"}
    except (OSError, ValueError) as error:
        return {**silent, "problem": str(error)}
    if said is None:
        return {**silent, "problem": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return {**said, "problem": None}


# ── judging ───────────────────────────────────────────────────────────────────────────────────────────────


def judge(report: Report) -> list[Finding]:
    """What is wrong, the gravest first. Pure."""
    found = [finding for rule in _RULES for finding in rule(report)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def _judge_state(report: Report) -> Iterator[Finding]:
    state = report["stateDir"]
    path, another = state["path"], "QUIRE_STATE_DIR chooses another folder"
    if not state["own"]:
        yield Finding("error", "stateDir", f"{path} belongs to another user", another)
    elif state["writeProblem"]:
        hint = f"make room, or make it writable; {another}"
        yield Finding("error", "stateDir", f"cannot write there: {state['writeProblem']}", hint)
    if state["fileSystem"] in NETWORK_FILESYSTEMS:
        message = f"{path} is on a network file system ({state['fileSystem']}), where locks do not hold"
        yield Finding("error", "stateDir", message, "QUIRE_STATE_DIR must name a folder on a local disk")
    if state["exists"] and state["mode"] is not None and state["mode"][4:] != "------":
        message = f"{path} is open to other users ({state['mode']})"
        yield Finding("warning", "stateDir", message, f"chmod 700 {path}")
    if state["sockets"]["problem"]:
        sockets = state["sockets"]["path"]
        message = f"{sockets} is {state['sockets']['problem']}; somebody else may have made it"
        yield Finding("error", "stateDir", message, f"look at it, then remove it: rm -r {sockets}")
    if state["store"]["problem"]:
        message = f"the store {state['store']['path']} cannot be read: {state['store']['problem']}"
        on_file = state["store"]["path"].endswith(".db")
        remedy = "move it away and apply your manifests again" if on_file else "see that QUIRE_DATABASE is right"
        yield Finding("error", "store", message, remedy)


def _judge_disk(report: Report) -> Iterator[Finding]:
    for disk in report["disk"]:
        if disk["free"] is not None and disk["free"] < LOW_DISK:
            message = f"{disk['free'] // 2**20} MiB are free where {disk['path']} is"
            yield Finding("warning", "disk", message, "make room: logs, the store and downloads need it")


def _judge_port(report: Report) -> Iterator[Finding]:
    for port in report["ports"]:
        if port["state"] == "taken":
            hint = (
                "stop that program, or apply a Gateway named default with another spec.port "
                "(manifests/gateway.yaml)"
            )
            yield Finding("error", "ports", port["why"], hint)


def _judge_processes(report: Report) -> Iterator[Finding]:
    plane, router = report["controlPlane"], report["router"]
    if plane["pid"] is not None and not plane["answers"]:
        message = f"the control plane (pid {plane['pid']}) does not answer: {plane['problem'] or 'it is silent'}"
        hint = (
            f"its log is {report['stateDir']['path']}/logs/controlplane.log; kill -9 {plane['pid']}: "
            "it ends alone, what it serves goes on, and the next command starts another"
        )
        yield Finding("error", "controlPlane", message, hint)
    elif plane["answers"] and plane["version"] != report["versions"]["quire"]:
        message = f"the control plane is {plane['version']}, this command {report['versions']['quire']}"
        yield Finding("warning", "controlPlane", message, "platform down, then any command that starts it again")
    elif plane["problem"]:
        message = f"a down did not succeed: {plane['problem']}"
        yield Finding("error", "controlPlane", message, "platform down tries again")
    if router["baseUrl"] is not None and not router["shimAnswers"]:
        message = "the shim of the router does not answer"
        yield Finding("error", "router", message, "platform logs router; platform down, then platform up")
    elif router["problem"] is not None:
        message = f"the router was not asked: {router['problem']}. It fails with its next start"
        yield Finding("error", "router", message, "put the file back, or apply a Gateway with another one")
    elif router["baseUrl"] is not None and not router["answers"]:
        message = f"the router (pid {router['pid']}) does not answer on {router['baseUrl']}"
        yield Finding("error", "router", message, "platform logs router")
    lost = plane["pid"] is None and (router["baseUrl"] is not None or report["replicas"])
    if lost:
        message = "there is no control plane; what it started goes on, and nobody replaces what fails"
        yield Finding("warning", "controlPlane", message, "platform get starts it; it takes over what runs")
    for replica in report["replicas"]:
        name = replica["id"] or replica["model"] or "a replica"
        if not replica["shimAnswers"]:
            message = f"the shim of {name} does not answer"
            yield Finding("error", "replicas", message, "platform describe model/NAME; platform logs model/NAME")
        elif not replica["engineAnswers"]:
            message = f"the engine of {name} (pid {replica['enginePid']}) does not answer; it may still be loading"
            hint = f"platform logs model/{replica['model']}"
            yield Finding("warning", "replicas", message, hint)


def _judge_kernels(report: Report) -> Iterator[Finding]:
    kernels = report["kernels"]
    if kernels["problem"]:
        message = f"torch cannot be used: {kernels['problem']}"
        yield Finding(
            "error", "kernels", message, "install it again: make venv, or pip install --force-reinstall torch"
        )
        return
    if not any(backend["available"] for backend in kernels["backends"]):
        reasons = "; ".join(f"{backend['name']}: {backend['reason']}" for backend in kernels["backends"])
        yield Finding(
            "error", "kernels", f"no kernel back-end works ({reasons})", "install Quire again: make venv"
        )
    native = next((backend for backend in kernels["backends"] if backend["name"] == "cpu"), None)
    if native is not None and not native["available"]:
        yield Finding(
            "warning",
            "kernels",
            f"the native kernels for CPUs cannot be used, models run slowly there: {native['reason']}",
            "they need a processor with AVX2, and once a C++ compiler (g++, clang++, or what CXX names)",
        )
    on_gpus = next((backend for backend in kernels["backends"] if backend["name"] == "triton"), None)
    if kernels["gpus"] and on_gpus is not None and not on_gpus["available"]:
        yield Finding(
            "error",
            "kernels",
            f"the kernels for GPUs cannot be used, no model runs there: {on_gpus['reason']}",
            "install triton, and once a C compiler (gcc, clang, or what CC names) and the headers of Python",
        )
    if report["devices"]["gpus"] and not kernels["gpus"]:
        yield _unseen(report["devices"], kernels["cuda"])


def _unseen(found: Report, built: str | None) -> Finding:
    """Why torch uses no GPU although there are some."""
    seen = f"NVML sees {_counted(len(found['gpus']), 'GPU')}, torch none"
    if built is not None and found["cuda"] is not None and _release(found["cuda"]) < _release(built):
        message = f"{seen}: driver {found['driver']} runs CUDA up to {found['cuda']}, torch is built for {built}"
        hint = f"install a newer driver, or a torch for CUDA {found['cuda']} or older; see pytorch.org"
        return Finding("error", "devices", message, hint)
    how = "for the CPU alone" if built is None else f"for CUDA {built}"
    hint = "install a torch for the driver's CUDA version; see pytorch.org"
    return Finding("error", "devices", f"{seen}: it is built {how}", hint)


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _judge_gpus(report: Report) -> Iterator[Finding]:
    for gpu in report["devices"]["gpus"]:
        name, reset = (
            f"GPU {gpu['index']}",
            f"nvidia-smi --gpu-reset -i {gpu['index']}, with nothing running on it",
        )
        if gpu["repairFailed"]:
            message = f"{name} has bad memory and nothing left to replace it with"
            yield Finding("error", "devices", message, "replace the card; spec.placement.deviceIds names others")
        elif gpu["eccErrors"] or gpu["repairPending"]:
            count = _counted(gpu["eccErrors"] or 0, "memory error")
            message = f"{name} has had {count} that could not be corrected since its driver was loaded"
            if gpu["repairPending"]:
                message += "; a repair waits for a reset"
            hint = f"{reset}; if they come again, replace the card (dmesg | grep Xid tells more)"
            yield Finding("warning", "devices", message, hint)
        heat = sorted({*(gpu["slowedBy"] or ())} & {*nvml.SLOWED_BY_HEAT})
        limit = gpu["slowdownTemperature"]
        hot = gpu["temperature"] is not None and limit is not None and gpu["temperature"] >= limit
        if heat or hot:
            at = "" if gpu["temperature"] is None else f" at {gpu['temperature']} °C"
            message = f"{name} is too hot{at}: it computes more slowly"
            yield Finding("warning", "devices", message, "look at fans, filters and the room's air")
        if nvml.POWER_BRAKE in (gpu["slowedBy"] or ()):
            message = f"{name} is held back by its power supply (power brake)"
            yield Finding("warning", "devices", message, "look at its power cables, and at what else they feed")


def _judge_packages(report: Report) -> Iterator[Finding]:
    missing = [name for name in PACKAGES if report["versions"][name] is None]
    needed = [name for name in missing if name not in ("triton", "safetensors")]
    if needed:
        yield Finding("error", "versions", f"not installed: {', '.join(needed)}", "install Quire again: make venv")


_RULES: tuple[Callable[[Report], Iterator[Finding]], ...] = (
    _judge_state,
    _judge_processes,
    _judge_port,
    _judge_kernels,
    _judge_gpus,
    _judge_packages,
    _judge_disk,
)
