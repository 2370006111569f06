"""A control plane process on its own state directory, with the stand-in for engines, and a streaming client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
from tests.waiting import alive, eventually

from quire.client import Client, Refused
from quire_operators.paths import StateDir

HERE = Path(__file__).parent
GATEWAY = "apiVersion: quire.dev/v1alpha1\nkind: Gateway\nmetadata: {name: default}\nspec: {port: 0}\n"


def model(name: str, spec: str = "", **env: object) -> str:
    """A manifest on the built-in model; `env` steers the stand-in."""
    variables = ", ".join(f"{{name: STANDIN_{key}, value: '{value}'}}" for key, value in env.items())
    return (
        f"apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {{name: {name}}}\n"
        f"spec:\n  source: builtin://tiny\n  env: [{variables}]\n{spec}"
    )


WALL_CLOCK = """\
import os, time
_file, _time = os.environ["TEST_WALL_CLOCK"], time.time
def _moved():
    with open(_file) as file:
        return _time() + float(file.read() or 0)
time.time = _moved
"""
"""A `sitecustomize` that moves `time.time`, and nothing else, by what a file says."""


ONE_GPU = """\
import os, types
import pynvml
def _memory(handle, version=None):
    with open(os.environ["TEST_GPU"]) as file:
        total, used = map(int, file.read().split())
    return types.SimpleNamespace(total=total, free=total - used, used=used, reserved=0)
pynvml.nvmlInit = pynvml.nvmlShutdown = lambda: None
pynvml.nvmlSystemGetDriverVersion = lambda: "570.124.06"
pynvml.nvmlSystemGetCudaDriverVersion_v2 = lambda: 12080
pynvml.nvmlDeviceGetCount = lambda: 1
pynvml.nvmlDeviceGetHandleByIndex = lambda index: index
pynvml.nvmlDeviceGetName = lambda handle: "NVIDIA Played"
pynvml.nvmlDeviceGetMemoryInfo = _memory
"""
"""A `sitecustomize` that plays a driver with one GPU, whose memory is what a file says."""


class Plane:
    """A state directory and the control plane process on it. `movable`: `move_clock` sets its wall clock, and that
    of its children. `gpu`: bytes of a GPU that it believes to have; `use_gpu` says how much of it is in use."""

    def __init__(self, folder: Path, *, movable: bool = False, gpu: int = 0) -> None:
        self.state = StateDir(folder / "state")
        standin = folder / "standin" / "quire_engine"
        standin.mkdir(parents=True)
        (standin / "__init__.py").write_text("")
        shutil.copy(HERE / "standin_engine.py", standin / "__main__.py")
        self.env = {**os.environ, "PYTHONPATH": str(standin.parent), "OMP_NUM_THREADS": "1"}
        self.env["HF_HUB_OFFLINE"] = "1"
        self.wall_clock = folder / "wall-clock"
        self.gpu, self.gpu_memory = gpu, folder / "gpu-memory"
        played = ""
        if movable:
            self.move_clock(0)
            played += WALL_CLOCK
            self.env["TEST_WALL_CLOCK"] = str(self.wall_clock)
        if gpu:
            self.use_gpu(0)
            played += ONE_GPU
            self.env["TEST_GPU"] = str(self.gpu_memory)
        standin.with_name("sitecustomize.py").write_text(played)
        self.client = Client(self.state, start=False)
        self.process: subprocess.Popen[bytes] | None = None

    def move_clock(self, seconds: float) -> None:
        """Have the wall clock stand this far from the real time."""
        _replace(self.wall_clock, str(seconds))

    def use_gpu(self, used: int) -> None:
        """Have NVML show so many bytes in use, whoever's they are."""
        _replace(self.gpu_memory, f"{self.gpu} {used}")

    def spawn(self) -> tuple[subprocess.Popen[bytes], str]:
        """Start one more control plane; what it said on its readiness pipe, up to the end of a line."""
        readable, writable = os.pipe()
        process = subprocess.Popen(
            [
                sys.executable, "-P", "-m", "quire.controlplane",
                "--state-dir", str(self.state.root), "--ready-fd", str(writable),
            ],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writable,),
            start_new_session=True,
        )  # fmt: skip
        os.close(writable)
        with open(readable) as pipe:
            return process, pipe.readline()

    def start(self) -> None:
        self.process, said = self.spawn()
        assert said.startswith("ready "), said

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(15)

    def end(self) -> None:
        """Take everything down, whatever a test left."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        assert self.process is not None
        self.client.post("/v1/down", {"grace": 0.2})
        self.process.wait(40)

    # ── the API ───────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, *texts: str) -> dict[str, dict[str, Any]]:
        files = [{"name": f"{number}.yaml", "text": text} for number, text in enumerate(texts)]
        return {item["key"]: item for item in self.client.post("/v1/apply", {"files": files})["results"]}

    def plan(self, text: str, **more: Any) -> dict[str, Any]:
        report = self.client.post("/v1/plan", {"files": [{"name": "m.yaml", "text": text}], **more})
        (item,) = report["items"]
        return dict(item)

    def view(self, name: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/objects/model/{name}"))

    def condition(self, name: str, type_: str) -> dict[str, Any]:
        conditions = self.view(name)["status"].get("conditions", [])
        return next((c for c in conditions if c["type"] == type_), {"status": "Unknown", "reason": ""})

    def wait_served(self, name: str) -> dict[str, Any]:
        def served() -> dict[str, Any] | None:
            view = self.view(name)
            true = {c["type"] for c in view["status"].get("conditions", ()) if c["status"] == "True"}
            current = view["status"].get("observedGeneration") == view["generation"]
            return view if current and {"Ready", "RolledOut"} <= true else None

        return dict(eventually(served, f"{name} is served"))

    def wait_stopped(self, name: str) -> None:
        eventually(lambda: self.view(name)["status"].get("summary") == "Stopped", f"{name} is stopped")

    def wait_stalled(self, name: str) -> dict[str, Any]:
        return dict(
            eventually(lambda: (c := self.condition(name, "Stalled"))["status"] == "True" and c, f"{name} stalls")
        )

    def delete(self, name: str) -> None:
        self.client.delete(f"/v1/objects/model/{name}")
        eventually(lambda: not self.exists(name), f"{name} is gone")

    def exists(self, name: str) -> bool:
        try:
            self.view(name)
        except Refused as error:
            if error.status != 404:
                raise
            return False
        return True

    @property
    def base_url(self) -> str:
        return str(self.client.get("/v1/ping")["router"]["baseUrl"])

    def complete(self, name: str, tokens: int = 3) -> httpx.Response:
        body = {"model": name, "prompt": "hi", "max_tokens": tokens}
        return httpx.post(f"{self.base_url}/completions", json=body, timeout=30)

    def ours(self) -> list[int]:
        """Processes of this installation: engines, the router and their shims."""
        marks = (str(self.state.runtime).encode(), str(self.state.root).encode())
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    command = (entry / "cmdline").read_bytes()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if any(mark in command for mark in marks) and alive(int(entry.name)):
                    found.append(int(entry.name))
        return found


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)


class Stream(threading.Thread):
    """One streamed completion, read to its end."""

    def __init__(self, base_url: str, name: str, tokens: int) -> None:
        super().__init__()
        self.url = f"{base_url}/completions"
        self.tokens = tokens
        self.body = {
            "model": name,
            "prompt": "hi",
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self.lines: list[str] = []
        self.problem: str | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=self.body, timeout=60) as answer:
                self.lines.extend(line for line in answer.iter_lines() if line)
                if answer.status_code != 200:
                    self.problem = str(answer.status_code)
        except httpx.HTTPError as error:
            self.problem = repr(error)

    def wait_running(self) -> None:
        eventually(lambda: len(self.lines) > 2 or not self.is_alive(), "the stream runs")
        assert self.is_alive(), (self.problem, self.lines)

    def finish(self) -> None:
        """It ran to its regular end and every token arrived."""
        self.join(60)
        assert self.problem is None, self.problem
        assert self.lines[-1] == "data: [DONE]", self.lines[-3:]
        assert not any('"error"' in line for line in self.lines)
        assert json.loads(self.lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == self.tokens
