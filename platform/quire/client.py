"""The control plane's admin API, as a command sees it: HTTP over a Unix socket, and a start when nobody answers.

Standard library only, so that `platform get` stays quick.

Auto-start without races. A client connects. If nobody listens it takes an exclusive `flock` on `start.lock` and
connects again: whoever held the lock before may have started it. Only then does it spawn `python -m
quire.controlplane` in a session of its own, with a clean environment, and waits on an inherited pipe for `ready
<version>` or for the error in words. The control plane holds `daemon.lock` for its whole life and leaves with
`HELD` if somebody else has it. While one stands by, nobody is spawned: it takes over. A client that sees `HELD`
(one is just going down, or was started by other means) tries again until its deadline. No process id is ever
consulted.

Exceptions:

    ClientError            has message, hint and the exit code of the command
    ├── Unreachable        nobody listens, the platform is down, a start failed, or the connection broke (7)
    └── Refused            the control plane said no (its own code, by the error)
        └── InvalidManifest    and listed problems, each with its place (3)
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from quire_operators.paths import StateDir, StateDirError, check_private

START_SECONDS = 60.0
"""How long a start may take before the client gives up: a cold disk on a small machine needs several seconds."""
REQUEST_SECONDS = 60.0
TAKEOVER_SECONDS = 20.0
"""How long a client waits for a control plane that stands by to take over, before it starts one."""
TAKEOVER_PAUSE = 0.05
ASK_AGAIN = (0.0, 0.1, 0.5)
"""Seconds before a question whose connection broke is asked again."""
TAIL_LINES = 20
DOWN = "the platform is down: platform down stopped it, and what was applied is kept"
UP = "platform up starts it again, and so does platform apply"
TRACE = ("traceparent", "tracestate")
HELD = 5
"""Exit code of a control plane that found another one on its state directory."""

# fmt: off
PASSED_ON = frozenset({
    "PATH", "CC", "CXX", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "OMP_NUM_THREADS", "TRITON_CACHE_DIR",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH",
    "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX",
})
# fmt: on
"""What a started control plane inherits. HF_TOKEN is what users of the hub expect to be enough; it stays in the
control plane's own process, and is not passed on to engines, to the router, or to any file."""
PASSED_ON_PREFIXES = ("LC_", "QUIRE_", "XDG_", "NVIDIA_", "NCCL_", "OTEL_", "PG")
KEPT_BACK = re.compile(r"OTEL_EXPORTER_OTLP\w*_(HEADERS|CERTIFICATE|CLIENT_KEY)|PGPASSWORD")
"""Of the settings for traces, those that hold or name secrets stay behind as every other secret does. An exporter
that needs them is a collector's task: let the router send to one on this machine. The password of PostgreSQL, too:
a file that holds it will do."""


class ClientError(Exception):
    """A command cannot go on: what happened, what to do about it, and the exit code that says so."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Unreachable(ClientError):
    """Nobody answers on the admin socket."""

    exit_code = 7


class Refused(ClientError):
    """The control plane answered with an error."""

    def __init__(
        self, status: int, code: str, message: str, hint: str | None = None, exit_code: int | None = None
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        self.code = code
        self.exit_code = exit_code if exit_code is not None else _EXIT_BY_STATUS.get(status, 1)


class InvalidManifest(Refused):
    """The manifests have problems; each is a dict with file, line, col, path, message and hint."""

    def __init__(self, problems: list[dict[str, Any]]) -> None:
        super().__init__(422, "invalid_manifest", _count(len(problems), "error"), exit_code=3)
        self.problems = problems


_EXIT_BY_STATUS = {404: 8, 409: 5, 422: 3}


class _UnixConnection(http.client.HTTPConnection):
    """HTTP/1.1 over a Unix socket; the host header is only for show."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("quire", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(str(self._path))
        except BaseException:
            sock.close()
            raise
        self.sock = sock


class Client:
    """Calls the control plane of one state directory.

    `start` says whether a control plane that does not run is started; `notice` gets the one line that says so.
    After a `down` only a client that `wakes` starts one: whoever merely looks is told.
    Answers are decoded JSON. Raises `Unreachable` or `Refused`.
    """

    def __init__(
        self,
        state: StateDir,
        *,
        start: bool = True,
        wakes: bool = False,
        notice: Callable[[str], None] | None = None,
        timeout: float = REQUEST_SECONDS,
    ) -> None:
        self.state = state
        self._start = start
        self._wakes = wakes
        self._notice = notice or (lambda line: None)
        self._timeout = timeout
        self.trace = {name: os.environ[name.upper()] for name in TRACE if name.upper() in os.environ}
        """Headers of the W3C trace context that requests are made in; at first the one of this process."""

    def get(self, path: str, **query: str | float | None) -> Any:
        """GET. Asked again when the connection breaks: the control plane may die and return at any time, and while
        the system clears away a killed one's socket, connections are taken and broken.
        """
        given = {name: value for name, value in query.items() if value is not None}
        target = f"{path}?{urlencode(given)}" if given else path
        for pause in ASK_AGAIN:
            try:
                return self._request("GET", target, None)
            except (http.client.HTTPException, ConnectionError):
                time.sleep(pause)
        return self._once("GET", target, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._once("POST", path, body)

    def delete(self, path: str) -> Any:
        return self._once("DELETE", path, None)

    def is_running(self) -> bool:
        """Whether somebody listens; never starts anything."""
        connection = self._try_connect()
        if connection is None:
            return False
        connection.close()
        return True

    def _once(self, method: str, target: str, body: Mapping[str, Any] | None) -> Any:
        try:
            return self._request(method, target, body)
        except (http.client.HTTPException, ConnectionError) as error:
            raise Unreachable(
                f"the control plane broke the connection during {method} {target} ({type(error).__name__})",
                f"run the command again; its log is {display(self.state.log('controlplane'))}",
            ) from error

    def _request(self, method: str, target: str, body: Mapping[str, Any] | None) -> Any:
        with closing(self._connect()) as connection:
            try:
                if body is None:
                    connection.request(method, target, headers=self.trace)
                else:
                    headers = {"content-type": "application/json", **self.trace}
                    connection.request(method, target, json.dumps(body).encode(), headers)
                answer = connection.getresponse()
                raw = answer.read()
            except TimeoutError as error:
                raise Unreachable(
                    f"the control plane did not answer {method} {target} within {self._timeout:.0f} s",
                    f"see its log: {display(self.state.log('controlplane'))}",
                ) from error
        return _decode(answer.status, raw)

    def _connect(self) -> _UnixConnection:
        connection = self._try_connect()
        if connection is not None:
            self._wakes = False  # a `down` that comes later is meant
            return connection
        if not self._start:
            raise Unreachable("the control plane is not running", "any of plan, apply and get starts it")
        if self.state.down_marker.exists() and not self._wakes:
            raise Unreachable(DOWN, UP)
        return self._start_and_connect()

    def _try_connect(self) -> _UnixConnection | None:
        """None when nobody listens. Never speaks to a socket in a folder that somebody else could have made."""
        connection = _UnixConnection(self.state.admin_socket, self._timeout)
        try:
            check_private(self.state.runtime)  # only looks: a folder that `down` removed must stay away
            connection.connect()
        except StateDirError as error:
            raise Unreachable(error.message, error.hint) from error
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise Unreachable(
                f"cannot connect to {self.state.admin_socket}: {error.strerror or error}",
                "the socket must be yours; QUIRE_STATE_DIR chooses another state directory",
            ) from error
        return connection

    def _start_and_connect(self) -> _UnixConnection:
        deadline = time.monotonic() + START_SECONDS
        patience = time.monotonic() + TAKEOVER_SECONDS
        try:
            self.state.create()
            lock = os.open(self.state.start_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except StateDirError as error:
            raise Unreachable(error.message, error.hint) from error
        except OSError as error:
            raise Unreachable(
                f"cannot use the state directory {self.state.root}: {error.strerror or error}",
                "QUIRE_STATE_DIR chooses another one",
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            while True:
                connection = self._try_connect()
                if connection is not None:
                    return connection
                if stands_by(self.state) and time.monotonic() < patience:
                    time.sleep(TAKEOVER_PAUSE)  # it takes over; a new one would take longer
                    continue
                if time.monotonic() > deadline:
                    raise Unreachable(
                        f"the control plane did not come up within {START_SECONDS:.0f} s" + self._log_tail(),
                        "another control plane may be holding daemon.lock in the state directory",
                    )
                self._spawn(deadline)
        finally:
            os.close(lock)

    def _spawn(self, deadline: float) -> None:
        """Start one control plane; return when it is ready, or has left because another has the lock."""
        log = self.state.log("controlplane")
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        readable, writable = os.pipe()
        try:
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    [
                        sys.executable, "-P", "-m", "quire.controlplane",
                        "--state-dir", str(self.state.root), "--ready-fd", str(writable),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=self.state.root,
                    env=clean_environment(os.environ),
                    pass_fds=(writable,),
                    start_new_session=True,
                )  # fmt: skip
        except BaseException:
            os.close(readable)
            raise
        finally:
            os.close(writable)
        try:
            said = _read_line(readable, deadline)
        finally:
            os.close(readable)
        if said is None:
            process.kill()
            process.wait()
            raise Unreachable(
                f"the control plane said nothing within {START_SECONDS:.0f} s" + self._log_tail(),
                f"see its log: {display(log)}",
            )
        word, _, rest = said.partition(" ")
        if word == "ready":
            self._notice(
                f"control plane  not running: started quire {rest} (pid {process.pid}, log {display(log)})"
            )
            # The control plane outlives this command on purpose: nobody waits for it, and the
            # destructor's warning about a child that still runs does not apply.
            process.returncode = 0
            return
        code = process.wait()
        if said or code not in (0, HELD):
            reason, _, hint = said.partition("\nhint: ")
            raise Unreachable(
                "the control plane failed to start: "
                + (reason or f"it exited with status {code}{self._log_tail()}"),
                hint or f"its log: {display(log)}",
            )
        time.sleep(0.1)

    def _log_tail(self) -> str:
        """The last lines of the control plane's log, indented, for an error message; empty if there are none."""
        try:
            lines = self.state.log("controlplane").read_text(errors="replace").splitlines()[-TAIL_LINES:]
        except FileNotFoundError:
            return ""
        return "".join(f"\n    | {line}" for line in lines)


def stands_by(state: StateDir) -> bool:
    """Whether a control plane waits until it may lead."""
    try:
        waiting = state.standby_lock.open("rb")
    except FileNotFoundError:
        return False
    with waiting:
        try:
            fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a control plane may inherit from the shell that happens to start it: an allow-list."""
    return {
        name: value
        for name, value in environment.items()
        if (name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)) and not KEPT_BACK.fullmatch(name)
    }


def display(path: Path) -> str:
    """The path as a person writes it: `~` for the home folder."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)


def _read_line(descriptor: int, deadline: float) -> str | None:
    """A line that begins with `ready`, or else all text up to the end of file; None past the deadline."""
    heard = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not (heard.startswith(b"ready ") and heard.endswith(b"\n")):
            if not selector.select(max(deadline - time.monotonic(), 0)):
                return None
            piece = os.read(descriptor, 4096)
            if not piece:
                break
            heard += piece
    return heard.decode(errors="replace").strip()


def _decode(status: int, raw: bytes) -> Any:
    """The body of a good answer; raises what a bad one says."""
    try:
        body = json.loads(raw) if raw else None
    except ValueError as error:
        raise Refused(
            status, "bad_answer", f"the control plane answered {status} with no JSON: {raw[:200]!r}"
        ) from error
    if status < 400:
        return body
    if not isinstance(body, dict):
        raise Refused(status, "unknown", f"the control plane answered {status}")
    if isinstance(body.get("problems"), list):
        raise InvalidManifest(body["problems"])
    said = body.get("error")
    if not isinstance(said, dict):
        raise Refused(status, "unknown", f"the control plane answered {status}: {body}")
    exit_code = said.get("exitCode", body.get("exitCode"))
    raise Refused(
        status,
        str(said.get("code", "unknown")),
        str(said.get("message", f"status {status}")),
        said.get("hint"),
        exit_code if isinstance(exit_code, int) else None,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
