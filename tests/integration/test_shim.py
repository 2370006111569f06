"""The shim with real processes: what it reports, what it takes down, what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import alive, eventually

from quire_operators.fleet import local

IDENTITY = {"installId": "i", "replicaId": "r", "incarnation": 3, "nonce": "n"}


class Shim:
    """One shim started as the fleet starts it."""

    def __init__(self, folder: Path, code: str, **spec: Any) -> None:
        self.folder = folder
        document = {
            "identity": IDENTITY,
            "labels": {"model": "m"},
            "argv": [sys.executable, "-c", code, "{status_fd}"],
            "env": {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"},
            "cwd": "/",
            "log": str(folder / "log" / "child.log"),
            "socket": str(folder / "shim.sock"),
            "exitFile": str(folder / "exit.json"),
            "listen": None,
            "restart": False,
            "grace": 2.0,
            **spec,
        }
        (folder / "shim.json").write_text(json.dumps(document))
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(local.SHIM), str(folder / "shim.json")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            self.said = stdout.readline()

    def ask(self, **request: Any) -> dict[str, Any]:
        with closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.settimeout(15)
            sock.connect(str(self.folder / "shim.sock"))
            with sock.makefile("rwb") as file:
                file.write(json.dumps(request).encode() + b"\n")
                file.flush()
                answer: dict[str, Any] = json.loads(file.readline())
        return answer

    def exit_record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / "exit.json").read_text())
        return record

    @property
    def log(self) -> str:
        return (self.folder / "log" / "child.log").read_text()


Start = Callable[..., Shim]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    shims: list[Shim] = []

    def begin(code: str, **spec: Any) -> Shim:
        folder = tmp_path / str(len(shims))
        folder.mkdir()
        shims.append(Shim(folder, code, **spec))
        return shims[-1]

    yield begin
    for shim in shims:
        shim.process.kill()
        shim.process.wait(10)


def test_it_answers_with_its_identity_and_keeps_status_lines_unread(start: Start) -> None:
    shim = start("import os, sys, time; os.write(int(sys.argv[1]), b'one\\n{\"two\": 2}\\n'); time.sleep(60)")
    assert shim.said == b"ready\n"
    state = eventually(lambda: (s := shim.ask(op="hello"))["lines"] and s, "its lines are told")
    assert state["identity"] == IDENTITY
    assert state["labels"] == {"model": "m"}
    assert state["lines"] == ["one", '{"two": 2}']
    assert state["running"]
    assert alive(state["childPid"])
    assert "error" in shim.ask(op="dance")
    assert (shim.folder / "shim.sock").stat().st_mode & 0o777 == 0o600
    assert (shim.folder / "log" / "child.log").stat().st_mode & 0o777 == 0o600


def test_the_end_of_the_child_is_recorded_with_its_cause_and_its_log(start: Start) -> None:
    shim = start(
        "import os, sys; print('last words', flush=True); os.write(int(sys.argv[1]), b'bye\\n'); sys.exit(78)"
    )
    assert shim.process.wait(10) == 0
    record = shim.exit_record()
    assert record["identity"] == IDENTITY
    assert record["lines"] == ["bye"]
    assert record["exit"]["code"] == 78
    assert not record["exit"]["stopped"]
    assert "last words" in shim.log
    assert not (shim.folder / "shim.sock").exists()


def test_a_child_that_cannot_be_started_is_an_end_too(start: Start) -> None:
    shim = start("", argv=["/nonexistent/engine"])
    assert shim.process.wait(10) == 0
    assert "/nonexistent/engine" in shim.exit_record()["exit"]["message"]


def test_a_killed_child_is_recorded_by_its_signal(start: Start) -> None:
    shim = start("import time; time.sleep(60)")
    os.kill(shim.ask(op="status")["childPid"], signal.SIGKILL)
    assert shim.process.wait(10) == 0
    assert shim.exit_record()["exit"]["signal"] == signal.SIGKILL


GRANDCHILDREN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
near = subprocess.Popen([sys.executable, "-c", code])
far = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
os.write(int(sys.argv[1]), f"{near.pid} {far.pid}\\n".encode())
time.sleep(60)
"""


def test_row_04_stop_takes_down_the_whole_tree_even_what_ignores_it_and_left_the_group(start: Start) -> None:
    shim = start(GRANDCHILDREN)
    state = eventually(lambda: (s := shim.ask(op="status"))["lines"] and s, "it has grandchildren")
    pids = [state["childPid"], *map(int, state["lines"][0].split())]
    assert all(alive(pid) for pid in pids)
    answer = shim.ask(op="stop", grace=0.3)
    assert answer["gone"]
    assert not any(alive(pid) for pid in pids)
    assert shim.process.wait(10) == 0
    assert shim.exit_record()["exit"]["stopped"]


def test_orphaned_grandchildren_do_not_outlive_the_child(start: Start) -> None:
    shim = start(GRANDCHILDREN)
    state = eventually(lambda: (s := shim.ask(op="status"))["lines"] and s, "it has grandchildren")
    os.kill(state["childPid"], signal.SIGKILL)
    assert shim.process.wait(10) == 0
    assert not any(alive(int(pid)) for pid in state["lines"][0].split())


def test_the_child_dies_with_its_shim(start: Start) -> None:
    shim = start("import time; time.sleep(60)")
    child = shim.ask(op="status")["childPid"]
    shim.process.kill()
    shim.process.wait(10)
    eventually(lambda: not alive(child), "the child is gone")
    with pytest.raises(ConnectionRefusedError), closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.connect(str(shim.folder / "shim.sock"))


def test_a_polite_child_ends_within_the_grace_and_sigterm_to_the_shim_does_the_same(start: Start) -> None:
    polite = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5));"
        "import os; os.write(int(sys.argv[1]), b'x\\n'); time.sleep(60)"
    )
    shim = start(polite)
    eventually(lambda: shim.ask(op="status")["lines"], "it is up")
    shim.process.send_signal(signal.SIGTERM)
    assert shim.process.wait(10) == 0
    assert shim.exit_record()["exit"]["code"] == 5


def test_the_log_is_rotated(start: Start) -> None:
    shim = start(
        "import time\nfor n in range(300): print('x' * 99, flush=True); time.sleep(0.0005)",
        logLimit=10_000,
        logKeep=2,
    )
    assert shim.process.wait(20) == 0
    assert sorted(path.name for path in (shim.folder / "log").iterdir()) == [
        "child.log",
        "child.log.1",
        "child.log.2",
    ]
    assert (shim.folder / "log" / "child.log.1").stat().st_size >= 10_000


SERVER = """
import os, socket, sys
os.write(int(sys.argv[1]), b'{"event": "ready"}\\n')
listening = socket.socket(fileno=int(os.environ["QUIRE_LISTEN_FD"]))
while True:
    connection, _ = listening.accept()
    what = connection.recv(9)
    connection.sendall(str(os.getpid()).encode())
    connection.close()
    if what == b"crash":
        os._exit(1)
    if what == b"refuse":
        os._exit(78)
"""


def say(port: int, what: bytes) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(what)
        return int(sock.recv(20))


def test_a_router_that_crashes_comes_back_behind_the_same_socket_and_no_connection_is_refused(
    start: Start,
) -> None:
    shim = start(SERVER, listen={"host": "127.0.0.1", "port": 0}, restart=True, backoff={"base": 0.3, "max": 1.0})
    port = shim.ask(op="hello")["listen"][1]
    first = say(port, b"hello")
    assert say(port, b"crash") == first
    second = say(port, b"hello")  # waits in the shim's backlog until the next one is up
    assert second != first
    assert shim.ask(op="status")["starts"] == 2
    say(port, b"refuse")
    state = eventually(lambda: not (s := shim.ask(op="status"))["running"] and s["exit"] and s, "it has ended")
    assert state["exit"]["code"] == 78
    time.sleep(0.5)
    assert shim.ask(op="status")["starts"] == 2, "exit 78 is not tried again"
    assert shim.ask(op="stop", grace=1)["gone"]


FOLLOWER = """
import os, signal, socket, sys, time
sock = socket.socket(fileno=int(os.environ["QUIRE_LISTEN_FD"]))
served = []
def leave(*_):
    if "finishes" in sys.argv[2:]:
        sock.close()
        open(sys.argv[2], "w").write("finishes")
        time.sleep(1)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
if "fails" in sys.argv[2:]:
    sys.exit("error: not with these settings")
if "hangs" in sys.argv[2:]:
    time.sleep(60)
if "dies" in sys.argv[2:]:
    time.sleep(0.5)
    os.write(int(sys.argv[1]), b'{"event": "ready"}\\n')
    os.kill(os.getpid(), signal.SIGKILL)
os.write(int(sys.argv[1]), b'{"event": "ready"}\\n')
while True:
    connection, _ = sock.accept()
    with connection:
        connection.recv(100)
        connection.sendall(str(os.getpid()).encode())
"""


class Renewable:
    """A shim over a server, and what another server on its socket is asked for by."""

    def __init__(self, start: Start, folder: Path) -> None:
        self.folder = folder
        self.marker = folder / "finishes"
        spec = {"listen": {"host": "127.0.0.1", "port": 0}, "restart": True}
        self.shim = start(FOLLOWER, **spec, backoff={"base": 0.05, "max": 1.0, "healthy": 60.0})
        self.port = self.shim.ask(op="hello")["listen"][1]
        self.document = json.loads((self.shim.folder / "shim.json").read_text())

    def spec(self, *words: str, **more: Any) -> Path:
        path = self.folder / "next.json"
        argv = [*self.document["argv"], str(self.marker), *words]
        path.write_text(json.dumps({**self.document, "argv": argv, "labels": {"words": words}, **more}))
        return path

    def renew(self, *words: str, grace: float = 5.0, within: float = 5.0) -> dict[str, Any]:
        return self.shim.ask(op="renew", spec=str(self.spec(*words)), grace=grace, within=within)

    def state_when(self, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        return dict(eventually(lambda: holds(s := self.shim.ask(op="status")) and s, "the shim is so far"))


@pytest.fixture
def renewable(start: Start, tmp_path: Path) -> Renewable:
    return Renewable(start, tmp_path)


def test_another_child_takes_over_once_it_serves_and_the_one_before_finishes(renewable: Renewable) -> None:
    first = say(renewable.port, b"hello")
    asked = renewable.renew("finishes")
    assert (asked["childPid"], asked["labels"], asked["next"]["labels"]) == (
        first, {"model": "m"}, {"words": ["finishes"]},
    )  # fmt: skip
    over = renewable.state_when(lambda state: state["labels"] == {"words": ["finishes"]})
    second = over["childPid"]
    assert (over["next"], over["running"], over["starts"], over["exit"]) == (None, True, 1, None)
    assert say(renewable.port, b"hello") == second != first
    renewable.state_when(lambda state: not state["leaving"])
    assert not alive(first)
    kept = json.loads((renewable.shim.folder / "shim.json").read_text())
    assert (kept["labels"], kept["listen"]) == ({"words": ["finishes"]}, renewable.document["listen"])

    renewable.renew()
    leaves = renewable.state_when(lambda state: state["labels"] == {"words": []})
    assert leaves["leaving"] == [second]
    third = say(renewable.port, b"hello")
    assert third == leaves["childPid"], "nobody waits for the one that finishes"
    eventually(renewable.marker.exists, "it has a second for what runs")
    assert alive(second)
    os.kill(third, signal.SIGKILL)
    eventually(lambda: not alive(third), "it is gone")
    assert say(renewable.port, b"hello") not in (first, second, third), "what is started again is the newest"
    assert renewable.shim.ask(op="status")["starts"] == 2
    assert renewable.shim.ask(op="stop", grace=1)["gone"]


def test_a_child_that_does_not_come_to_serve_changes_nothing(renewable: Renewable) -> None:
    first = say(renewable.port, b"hello")
    renewable.renew("fails")
    refused = renewable.state_when(lambda state: state["refused"])
    assert refused["refused"]["labels"] == {"words": ["fails"]}
    assert refused["refused"]["exit"]["tail"] == ["error: not with these settings"]
    assert (refused["labels"], refused["next"], refused["exit"]) == ({"model": "m"}, None, None)

    renewable.renew("hangs", within=0.3)
    late = renewable.state_when(lambda state: state["refused"])
    assert late["refused"]["exit"]["message"] == "it was not ready within 0.3 s"

    dying = renewable.renew("dies")["next"]["pid"]
    renewable.shim.process.send_signal(signal.SIGSTOP)
    eventually(lambda: not alive(dying), "it has said that it serves, and is dead")
    renewable.shim.process.send_signal(signal.SIGCONT)
    dead = renewable.state_when(lambda state: state["refused"])
    assert (dead["refused"]["exit"]["signal"], dead["childPid"]) == (signal.SIGKILL, first)

    hanging = renewable.renew("hangs")["next"]["pid"]
    kept = renewable.shim.ask(op="keep")
    assert (kept["next"], kept["leaving"], kept["childPid"]) == (None, [hanging], first)
    renewable.state_when(lambda state: not state["leaving"])
    assert not alive(hanging)

    hanging = renewable.renew("hangs")["next"]["pid"]
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not alive(first), "it is gone")  # and started again as it was, beside the one that hangs
    assert say(renewable.port, b"hello") != first
    assert renewable.shim.ask(op="status")["labels"] == {"model": "m"}
    renewable.renew()  # and nobody waits for that one any more
    renewable.state_when(lambda state: state["labels"] == {"words": []} and not state["leaving"])
    assert not alive(hanging)
    assert renewable.shim.ask(op="status")["refused"] is None

    for problem in (renewable.folder / "none.json", renewable.spec(identity={**IDENTITY, "nonce": "other"})):
        assert "error" in renewable.shim.ask(op="renew", spec=str(problem))
    hanging = renewable.renew("hangs")["next"]["pid"]
    assert renewable.shim.ask(op="stop", grace=1)["gone"]
    assert not alive(hanging)


def test_a_child_that_does_not_finish_in_time_is_killed(renewable: Renewable) -> None:
    renewable.renew("finishes")
    second = renewable.state_when(lambda state: state["labels"] == {"words": ["finishes"]})["childPid"]
    since = time.monotonic()
    renewable.renew(grace=0.2)
    renewable.state_when(lambda state: state["labels"] == {"words": []} and not state["leaving"])
    assert not alive(second)
    assert time.monotonic() - since < 1.0


def test_only_a_child_that_did_not_serve_for_a_while_is_waited_for_longer_each_time(start: Start) -> None:
    backoff = {"base": 0.1, "max": 10.0, "healthy": 0.5}
    shim = start(SERVER, listen={"host": "127.0.0.1", "port": 0}, restart=True, backoff=backoff)
    port = shim.ask(op="hello")["listen"][1]

    def restarted(age: float) -> float:
        """Crash a child that old; seconds until the next one answers."""
        say(port, b"hello")
        time.sleep(age)
        say(port, b"crash")
        since = time.monotonic()
        say(port, b"hello")
        return time.monotonic() - since

    young = [restarted(0.0) for _ in range(4)]
    assert young[3] >= 0.8, "0.1 s doubled three times"
    assert restarted(0.5) < 1.6, "it had run well, and is not waited for twice as long again"
    assert shim.ask(op="status")["starts"] == 6
    assert shim.ask(op="stop", grace=1)["gone"]


def test_how_long_a_child_took_to_start_does_not_count_as_serving(start: Start) -> None:
    said = b'[1]\n{"event": "starting"}\n'
    code = f"import os, sys, time; time.sleep(0.4); os.write(int(sys.argv[1]), {said!r})"
    shim = start(code, restart=True, backoff={"base": 0.1, "max": 10.0, "healthy": 0.2})
    since = time.monotonic()
    eventually(lambda: shim.ask(op="status")["starts"] == 4, "the fourth start")
    assert time.monotonic() - since >= 0.1 + 0.2 + 0.4 + 3 * 0.4
    assert shim.ask(op="stop", grace=1)["gone"]


def test_a_taken_address_is_said_before_anything_runs(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        shim = start(SERVER, listen={"host": "127.0.0.1", "port": taken.getsockname()[1]}, restart=True)
        assert json.loads(shim.said)["error"] == "address_in_use"
        assert shim.process.wait(10) == 75


def test_a_watcher_hears_every_change(start: Start) -> None:
    shim = start("import os, sys, time; time.sleep(0.3); os.write(int(sys.argv[1]), b'a\\n'); time.sleep(0.1)")
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(10)
        sock.connect(str(shim.folder / "shim.sock"))
        sock.sendall(b'{"op":"watch"}\n')
        with sock.makefile("rb") as file:
            states = [json.loads(line) for line in file]
    assert states[0]["running"]
    assert next(state["lines"] for state in states if state["lines"]) == ["a"]
    assert states[-1]["gone"]
    assert states[-1]["exit"]["code"] == 0


def test_a_log_that_cannot_be_written_or_rotated_takes_nothing_down(start: Start, tmp_path: Path) -> None:
    in_the_way = tmp_path / "log" / "child.log"
    Path(f"{in_the_way}.1", "not a file").mkdir(parents=True)
    for spec in ({"log": "/dev/full"}, {"log": str(in_the_way), "logLimit": 1000, "logKeep": 1}):
        shim = start("import time\nfor n in range(100): print('x' * 99, flush=True)\ntime.sleep(60)", **spec)
        time.sleep(0.3)
        assert shim.ask(op="status")["running"]
        assert shim.ask(op="stop", grace=1)["gone"]
        assert shim.process.wait(10) == 0


def test_an_end_that_cannot_be_recorded_is_an_end_all_the_same(start: Start, tmp_path: Path) -> None:
    shim = start("import time; time.sleep(60)", exitFile=str(tmp_path / "absent" / "exit.json"))
    assert shim.ask(op="stop", grace=1)["gone"]
    assert shim.process.wait(10) == 0
    assert "exit.json" in shim.log


def test_it_starts_and_stops_nothing_for_a_control_plane_that_was_deposed(start: Start, tmp_path: Path) -> None:
    epochs = tmp_path / "epochs"
    epochs.mkdir()
    (epochs / "4").touch()
    sleeper = "import time; print('it runs', flush=True); time.sleep(60)"
    shim = start(sleeper, epoch=4, epochs=str(epochs))
    assert shim.said == b"ready\n"
    (epochs / "5").touch()
    late = start(sleeper, epoch=4, epochs=str(epochs))
    assert json.loads(late.said)["error"] == "deposed"
    assert late.process.wait(10) == 75
    assert "it runs" not in late.log
    assert not (late.folder / "shim.sock").exists()
    assert shim.ask(op="stop", grace=0, epoch=4) == {"error": "epoch 4 is over"}
    assert shim.ask(op="status")["running"]
    assert shim.ask(op="stop", grace=0, epoch=5)["gone"]
    shim.process.wait(10)
