"""Control planes that are forked off a process which has loaded all modules: for tests that start very many.

Such a one is a process like any other, and dies like it; only what Python takes to import is left out, which is
most of the second that a start takes. What an interpreter is told as it starts (a `sitecustomize`, LD_PRELOAD)
does not reach it: a clock that moves, a GPU that is played, and a start that is itself what is tested, want a
`Plane`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.integration.plane import Plane

from quire.controlplane.__main__ import main

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


class ForkedPlane(Plane):
    """A plane whose control planes start quickly."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._forked: list[Forked] = []

    def spawn(self) -> tuple[Forked, str]:  # type: ignore[override]
        readable, forked = self._fork()
        with open(os.dup(readable.fileno())) as said:
            return forked, said.readline()

    def stand_by(self) -> Forked:
        """Start one more that leads when it may; does not wait for anything."""
        return self._fork("--standby")[1]

    def _fork(self, *words: str) -> tuple[Connection, Forked]:
        readable, writable = _context.Pipe(duplex=False)
        arguments = (str(self.state.root), self.env, writable, words)
        process = _context.Process(target=_run, args=arguments, daemon=True)
        process.start()
        writable.close()
        self._forked.append(Forked(process))
        return readable, self._forked[-1]

    def ours(self) -> list[int]:
        """Control planes too: nothing shows whose they are but that they were started here."""
        running = [forked.pid for forked in self._forked if forked.poll() is None]
        return [*super().ours(), *(pid for pid in running if pid is not None)]


class Forked:
    """What `Plane` asks of a process."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        assert self._process.exitcode is not None, "it did not end"
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode


def _run(state: str, env: dict[str, str], ready: Connection, words: tuple[str, ...]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    sys.argv = ["quire.controlplane", "--state-dir", state, "--ready-fd", str(os.dup(ready.fileno())), *words]
    ready.close()
    sys.exit(main())
