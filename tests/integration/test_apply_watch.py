"""`platform apply --watch`: files are edited while the command runs, against a real control plane and router."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.integration.plane import Plane, model
from tests.waiting import eventually

from quire_operators.paths import StateDir

COMMAND = Path(sys.executable).parent / "platform"
IDLE = r"^watching .*; Ctrl-C"


def queue(length: int) -> str:
    """Lines of a manifest whose change needs no new engine."""
    return f"  batching: {{maxQueueLength: {length}}}\n"


class Watching:
    """The command, and all it has said so far, stdout and stderr in one."""

    def __init__(self, state: Path, *args: str | Path) -> None:
        self.process = subprocess.Popen(
            [COMMAND, "apply", "--watch", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "QUIRE_STATE_DIR": str(state), "PYTHONUNBUFFERED": "1"},
        )
        self.lines: list[str] = []
        self._heard = 0
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def until(self, *patterns: str, seconds: float = 60) -> list[str]:
        """What it says up to a line for each pattern, in this order, from where the last call ended."""
        begun = self._heard
        for pattern in patterns:

            def found(wanted: str = pattern) -> bool:
                while self._heard < len(self.lines):
                    self._heard += 1
                    if re.search(wanted, self.lines[self._heard - 1]):
                        return True
                return False

            eventually(found, f"it says {pattern}", seconds, logs=lambda: "\n".join(self.lines))
        return self.lines[begun : self._heard]

    def settle(self) -> None:
        """Let it say what it has to say, and forget that."""
        while not self.is_quiet(1):
            self._heard = len(self.lines)

    def is_quiet(self, seconds: float) -> bool:
        time.sleep(seconds)
        return self._heard == len(self.lines)

    def interrupt(self) -> str:
        """Ctrl-C; what it says at last. It exits with 130."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(10) == 130, "\n".join(self.lines)
        self._reader.join(10)
        assert not [line for line in self.lines if "Traceback" in line], "\n".join(self.lines)
        return self.lines[-1]


@contextmanager
def watching(state: Path, *args: str | Path) -> Iterator[Watching]:
    own = Watching(state, *args)
    try:
        yield own
    finally:
        if own.process.poll() is None:
            own.process.kill()
        own.process.wait()
        own._reader.join()
        assert own.process.stdout is not None
        own.process.stdout.close()


def replace(path: Path, text: str) -> None:
    """Save as an editor does that cannot lose a file."""
    beside = path.with_name(f".{path.name}.swp")
    beside.write_text(text)
    beside.replace(path)


def without_pause(steps: Iterator[None]) -> bool:
    """Take the steps; whether none of them took so long that it looks like the end."""
    took, begun = [0.0], time.monotonic()
    for _ in steps:
        took.append(time.monotonic() - begun)
        begun = time.monotonic()
    return max(*took, time.monotonic() - begun) < 0.12


def test_whatever_is_saved_is_applied_once_and_what_is_bad_loses_nothing(plane: Plane, tmp_path: Path) -> None:
    path, template = tmp_path / "edited.yaml", tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}")

    def text(more: str) -> str:
        return model("edited", f"  tokenizer: {{chatTemplateFile: {template}}}\n{more}")

    def stands() -> tuple[int, int]:
        view = plane.view("edited")
        return view["generation"], len(view["revisions"])

    path.write_text(text(queue(1)))
    with watching(plane.state.root, path, "--no-wait") as seen:
        seen.until(r"^model/edited  created \(revision 1\)$", IDLE)

        path.write_text(text("  batching: {maxQueueLenth: 2}\n"))
        said = seen.until("^changed: .*edited.yaml$", "^1 error$")
        assert any(re.match(rf"{path}:\d+:\d+: error: spec.batching.maxQueueLenth: ", line) for line in said), said
        assert any(line.startswith("    hint: did you mean") for line in said)
        assert stands() == (1, 1)

        def burst(length: int) -> Iterator[None]:
            for each in range(100 * length, 100 * length + 15):
                path.write_text(text(queue(each)))
                time.sleep(0.01)
                yield
            replace(path, text(queue(length)))

        def halves(length: int) -> Iterator[None]:
            whole = text(queue(length))
            with path.open("w") as file:
                file.write(whole[:40])
                file.flush()
                time.sleep(0.05)
                yield
                file.write(whole[40:])

        # a program that saves on each key, and at last by another name; what is a mistake while it is half-written
        for saves, first in ((burst, 2), (halves, 12)):
            for length in range(first, first + 10):
                before = stands()[0]
                swift = without_pause(saves(length))
                said = seen.until("^changed: .*edited.yaml$", "^model/edited  updated", IDLE)
                if swift:
                    break
                seen.settle()
            assert swift, "this machine is too slow to tell"
            assert len([line for line in said if line.startswith(("changed", "model/"))]) == 2, said
            assert not [line for line in said if "error" in line], said
            assert stands() == (before + 1, 1)
            replace(path, path.read_text())  # the name stands for another file by now; it holds the same
            path.touch()
            assert seen.is_quiet(0.4)

        template.write_text("Answer: {{ messages[0].content }}")
        seen.until(rf"^changed: {template}$", r"^model/edited  updated \(revision 2\)$", IDLE)
        reached = stands()
        assert reached == (before + 2, 2)
        template.unlink()
        seen.until(rf"^changed: {template}$", "is not a file")
        saved = path.read_text()
        path.unlink()
        seen.until("^gone: .*edited.yaml$", "^model/edited  was in .*, which is gone: it stays as it is", IDLE)
        template.write_text("Answer: {{ messages[0].content }}")
        path.write_text(saved)
        seen.until("^model/edited  unchanged$", IDLE)
        assert stands() == reached
        assert seen.interrupt() == "^C no longer watching; what was applied goes on"
    assert plane.complete("edited").status_code == 200


def test_an_edit_takes_the_place_of_a_rollout_and_neither_a_bad_one_nor_a_down_ends_it(
    plane: Plane, tmp_path: Path
) -> None:
    path, below = tmp_path / "slow.yaml", tmp_path / "more" / "other.yaml"
    path.write_text(model("slow", LOAD=60))
    with watching(plane.state.root, tmp_path) as seen:
        seen.until("^model/slow  created", "^slow  ")
        below.parent.mkdir()
        below.write_text("kind: [")
        (tmp_path / ".hidden").mkdir()
        (tmp_path / ".hidden" / "no.yaml").write_text(model("no"))
        seen.until("^changed: ", r"other.yaml:1:\d+: error: ", "^[12] errors?$")
        below.write_text(model("other"))
        said = seen.until("^changed: .*other.yaml", "^model/other  created", "^model/slow  unchanged")
        assert not [line for line in said if re.search(IDLE, line)], "it stopped following for a bad edit"
        path.write_text(model("slow"))
        said = seen.until(
            "^changed: .*slow.yaml$",
            "^model/slow  generation 1 is followed no further: generation 2 is in its place$",
            "^Base URL",
            IDLE,
        )
        assert not [line for line in said if line.startswith("error")], said
        assert plane.view("slow")["status"]["replicas"]["ready"] == 1
        assert not plane.exists("no")

        path.write_text(model("slow", LOAD=60))
        below.unlink()
        seen.until("^model/slow  updated", "^model/other  was in .*other.yaml, which is gone", "^slow  ")
        assert plane.exists("other")
        saved = path.read_text()
        path.unlink()
        seen.until("^there is no manifest now: ", "^model/slow  was in .*slow.yaml, which is gone: it stays")
        path.write_text(saved)
        seen.until("^model/slow  unchanged$")
        plane.client.post("/v1/down", {"grace": 0.2})
        assert plane.process is not None
        plane.process.wait(20)
        seen.until("^error: the platform is down", "^hint: .* up starts", "^it is asked again")
        plane.start()
        plane.client.post("/v1/up", {})
        seen.until("^control plane  answers again$", "^slow  ")
        assert re.fullmatch(
            r"\^C detached: the rollout continues. Follow with: (\S*/)?platform wait model/slow", seen.interrupt()
        )


class Hesitant(ThreadingHTTPServer):
    """Answers in a control plane's place: with each of `answers` once, and with the last for ever."""

    address_family = socket.AF_UNIX

    def __init__(self, state: StateDir, *answers: tuple[int, dict[str, Any]]) -> None:
        state.create()
        self.state = state
        self.asked: list[float] = []
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hesitant.asked.append(time.monotonic())
                self.rfile.read(int(self.headers["content-length"]))
                status, body = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: object) -> None:
                return

        hesitant = self
        super().__init__(str(state.admin_socket), Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)


def test_who_cannot_apply_now_is_asked_again_and_ever_less_often(tmp_path: Path) -> None:
    def refusal(code: str, message: str) -> dict[str, Any]:
        return {"error": {"code": code, "message": message, "hint": None, "exitCode": 7}}

    applied = {"key": "model/again", "result": "created", "generation": 1, "revision": 1}
    answers: list[tuple[int, dict[str, Any]]] = [
        (507, refusal("store_unavailable", "the disk is full")),
        (507, refusal("store_unavailable", "the disk is full")),
        (409, refusal("conflict", "model/again was changed by somebody else meanwhile")),
        (200, {"results": [applied]}),
        (409, refusal("managed", "model/again is managed by gitsource/fleet")),
    ]
    path = tmp_path / "again.yaml"
    path.write_text(model("again"))
    with Hesitant(StateDir(tmp_path / "state"), *answers) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with watching(server.state.root, path, "--no-wait") as seen:
                said = seen.until(
                    "disk is full", "asked again", "changed by somebody else", "^control plane  answers again$"
                )
                seen.until(r"^model/again  created \(revision 1\)$", IDLE)
                assert len([line for line in said if "disk is full" in line]) == 1, said
                pauses = [after - before for before, after in pairwise(server.asked)]
                assert [round(pause / 0.3) for pause in pauses] == [1, 2, 4], pauses
                path.write_text(model("again", queue(2)))
                seen.until("managed by gitsource", IDLE)
                assert seen.is_quiet(1)
        finally:
            server.shutdown()
    assert len(server.asked) == len(answers)
