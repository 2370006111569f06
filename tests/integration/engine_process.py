"""The engine as a process of its own, `python -m quire_engine`, for the tests that look at it from outside."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from tests.engine_specs import tiny_spec

from quire import builtin
from quire_schemas.wire import EngineEvent, EngineSpec


class Process:
    """One engine process, its events as they come, and its end."""

    def __init__(self, spec: dict[str, Any], folder: Path, **environment: str) -> None:
        path = folder / "spec.json"
        path.write_bytes(msgspec.json.encode(spec))
        self.status, writing = os.pipe()
        self.child = subprocess.Popen(
            [sys.executable, "-m", "quire_engine", str(path), "--status-fd", str(writing)],
            pass_fds=(writing,),
            stderr=subprocess.PIPE,
            cwd="/",
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        os.close(writing)
        self.events: list[EngineEvent] = []
        self.seen_at: list[float] = []
        self._rest = b""

    def wait_for(self, name: str, patience: float = 60.0) -> EngineEvent:
        """The first event of that name, once it is there."""
        deadline = time.monotonic() + patience
        while True:
            for event in self.events:
                if event.event == name:
                    return event
            ready, _, _ = select.select([self.status], [], [], max(deadline - time.monotonic(), 0.0))
            assert ready, f"no {name} within {patience} s; so far {self.events}"
            piece = os.read(self.status, 65536)
            assert piece, f"the engine ended without {name}: {self.events}\n{self.stderr()}"
            *lines, self._rest = (self._rest + piece).split(b"\n")
            self.events += [msgspec.json.decode(line, type=EngineEvent) for line in lines]
            self.seen_at += [time.monotonic()] * len(lines)

    def wait(self, patience: float = 30.0) -> int:
        return self.child.wait(patience)

    def stderr(self) -> str:
        self.child.kill()
        return self.child.communicate()[1].decode()

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
        if self.status >= 0:
            os.close(self.status)
            self.status = -1


@contextmanager
def engine_running(**fields: Any) -> Iterator[EngineSpec]:
    """The spec of an engine that is ready; `fields` replace those of `tiny_spec`."""
    with tempfile.TemporaryDirectory(prefix="qe") as name:  # short: a Unix socket's path has 107 bytes
        spec = tiny_spec(socket=str(Path(name) / "e" / "engine.sock"), **fields)
        process = Process(msgspec.to_builtins(spec), Path(name))
        try:
            process.wait_for("ready")
            yield spec
        finally:
            process.close()


def without_weights(folder: Path) -> Path:
    """The built-in checkpoint with everything but its weights."""
    for file in builtin.path("tiny").iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder
