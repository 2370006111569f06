"""A whole platform of one's own for a test: real command line, control plane, router and engines.

Each has a state directory in the test's temporary folder and a gateway on a free port. At the end everything is
brought down, and the test fails if a process is left.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from quire_operators.paths import StateDir

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = Path(sys.executable).parent / "platform"
GATEWAY = """\
apiVersion: quire.dev/v1alpha1
kind: Gateway
metadata: {name: default}
spec: {port: 0}
"""
MODEL = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {{name: {name}}}
spec:
  source: builtin://tiny
  engine: {{maxModelLen: 1024, kvCache: {{size: 16Mi}}}}
  resources: {{cpu: 1}}
"""


class Platform:
    """Runs `platform` with a state directory of its own. `root` is a folder for the test's files.

    `gateway` is the path of a manifest that takes a free port; `manifests` the folder of the product's examples.
    """

    manifests = ROOT / "manifests"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gateway = self.write("gateway.yaml", GATEWAY)
        self.state = StateDir(root / "state")
        self.environment = {**os.environ, "QUIRE_STATE_DIR": str(self.state.root), "OMP_NUM_THREADS": "1"}

    def start(self, *args: str | Path) -> subprocess.Popen[str]:
        """Start a command without waiting for it; it runs in a folder that has nothing to do with the sources."""
        return subprocess.Popen(
            [COMMAND, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env=self.environment,
        )

    def run(self, *args: str | Path, code: int = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, which must be the exit code `code`."""
        with self.start(*args) as process:
            out, err = process.communicate(timeout=timeout)
        said = f"$ platform {' '.join(map(str, args))}   # exit {process.returncode}\n{out}{err}"
        assert process.returncode == code, f"{said}\n{self.logs()}"
        assert "Traceback" not in err, said
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, *args: str | Path) -> Any:
        """What a command prints with `-o json`."""
        return json.loads(self.run(*args, "-o", "json").stdout)

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def model(self, name: str, more: str = "") -> Path:
        """A manifest of a model small enough to run several of; `more` are lines of its spec."""
        return self.write(f"{name}.yaml", MODEL.format(name=name) + more)

    def base_url(self, model: str) -> str:
        """The base URL that the model's status names."""
        url: str = self.json("get", f"model/{model}")["status"]["endpoints"]["openai"]
        return url

    def processes(self) -> list[psutil.Process]:
        """Every live process that belongs to this platform, found by what it was started with."""
        marks = (str(self.state.root), str(self.state.runtime))
        found = []
        for process in psutil.process_iter():
            if process.pid == os.getpid():
                continue
            try:
                words = [*process.cmdline(), process.environ().get("QUIRE_STATE_DIR", "")]
                if process.status() != psutil.STATUS_ZOMBIE and any(word.startswith(marks) for word in words):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def logs(self) -> str:
        """The tails of all logs, for the message of a test that failed."""
        parts = []
        for path in sorted(self.state.logs.rglob("*.log")):
            parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-30:]))
        return "\n".join(parts)

    def close(self) -> None:
        """Down, and proof that nothing is left. Leftovers are killed, and reported as a failure."""
        self.run("down", "--grace", "1s")
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        report = [f"{process.pid} {' '.join(process.cmdline())}" for process in left]
        for process in left:
            process.kill()
        shutil.rmtree(self.state.runtime, ignore_errors=True)
        assert not report, f"left after down: {report}\n{self.logs()}"


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """A platform whose gateway takes a free port; nothing runs yet."""
    own = Platform(tmp_path)
    yield own
    own.close()


@pytest.fixture(scope="module")
def shared_platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """One platform for all tests of a module that only send requests."""
    own = Platform(tmp_path_factory.mktemp("platform"))
    yield own
    own.close()
