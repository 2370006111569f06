"""Processes on this machine: each under a shim of its own, found again after a restart of the control plane.

Every incarnation of a unit (a replica, or the router) has a folder of its own in the folder of sockets:

    shim.json     what the shim was told, the identity included; written before anything is started. Where it is
                  gone, the shim's own answer takes its place
    next.json     the same for a child that is to follow the one there is (`renew`); the shim reads it at once
    shim.sock     the shim's control socket; it listens exactly as long as the shim lives
    exit.json     how it ended; written by the shim before it ends

So what there is can be read off the disk: a socket that answers is a living shim, one that refuses is a dead
one (the kernel closed it), and one that accepts and stays silent is `UNKNOWN`, which is not dead. A living shim
counts as ours only by what it answers: installation, unit, incarnation and nonce. No pid is ever trusted.

What a child started carries `QUIRE_UNIT` in its environment. A shim that was killed takes its child with it, not
what that had started: such strays are killed before the unit counts as `GONE`, through a descriptor of the process
(pidfd), so that a pid that was given to somebody else in the meantime is not.

The fleet keeps one connection to each shim and hears every change over it; `on_change` is told the unit's name.

Nothing is started, stopped or killed without the lease (`lease`): it is looked at right before, and its epoch goes
with what the shim is told, which looks again. So a control plane that was paused in between comes to nothing.

Exceptions:

    FleetError
    ├── StartFailed        a shim could not be started; `code` is `address_in_use` or `cannot_start`
    └── RenewFailed        a shim does not take another child in the place of its own, or cannot be asked
"""

from __future__ import annotations

import asyncio
import enum
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quire_operators.database import Leading
from quire_operators.lease import EPOCHS, enter
from quire_operators.paths import private_dir

log = logging.getLogger(__name__)

SHIM = Path(__file__).with_name("shim.py")
START_SECONDS = 20.0
"""How long a shim may take until its control socket listens."""
ANSWER_SECONDS = 10.0
"""A shim that stays silent this long is UNKNOWN."""
RETRY_SECONDS = 1.0
STRAY_SECONDS = 5.0
"""How long a stray may take to be gone after it was killed."""
BACKOFF = {"base": 0.05, "max": 10.0, "healthy": 0.5}
"""How a shim waits before it starts a child again. Only the router is started again, and while it is not there
nobody is served: one that served for half a second starts again at once, however often it is killed. One that ends
in its start, or by the requests that waited for it, is worth waiting for."""
MAX_LINE = 4 * 1024 * 1024


class FleetError(Exception):
    """A process cannot be started or reached."""


class StartFailed(FleetError):
    """A shim did not come up."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class RenewFailed(FleetError):
    """A shim did not take the next child, or it is not known whether it did. `unable`: it is of a version that has
    none."""

    def __init__(self, message: str, *, unable: bool = False) -> None:
        super().__init__(message)
        self.unable = unable


class Life(enum.StrEnum):
    """What is known of a shim."""

    LIVE = "live"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Unit:
    """One incarnation to start. `argv` may hold "{status_fd}"; `listen` is (host, port) or None."""

    folder: Path
    name: str
    incarnation: int
    nonce: str
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    log: Path
    labels: Mapping[str, Any]
    files: Mapping[str, bytes]
    """Written into the folder, mode 0600, before the child starts."""
    listen: tuple[str, int] | None = None
    restart: bool = False
    grace: float = 5.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How the child last ended; both None when it could not be started at all or nothing was recorded."""

    code: int | None
    signal: int | None
    asked: bool
    message: str = ""
    tail: tuple[str, ...] = ()
    """The last lines of its log."""
    pause: float | None = None
    """Seconds from then until its shim starts it again."""

    def text(self) -> str:
        """For people."""
        if self.message:
            return self.message
        if self.signal is not None:
            return f"killed by {signal.Signals(self.signal).name}"
        return f"ended with exit status {self.code}"


@dataclass(frozen=True, slots=True)
class Refused:
    """The last child that was to follow another one, and did not come to serve."""

    labels: Mapping[str, Any]
    ended: Ended


@dataclass(frozen=True, slots=True)
class Observation:
    """What was last heard of one incarnation. `lines` are its last status lines, unread."""

    folder: Path
    name: str
    incarnation: int
    nonce: str
    labels: Mapping[str, Any]
    life: Life
    at: float
    running: bool = False
    child_pid: int | None = None
    shim_pid: int | None = None
    starts: int = 0
    stopping: bool = False
    listen: tuple[str, int] | None = None
    lines: tuple[str, ...] = ()
    log_lost: int = 0
    """Bytes of its log that could not be written."""
    ended: Ended | None = None
    following: Mapping[str, Any] | None = None
    """Labels of a child that is to take the place of this one, and starts."""
    following_pid: int | None = None
    leaving: tuple[int, ...] = ()
    """Children before this one that still finish what they have."""
    refused: Refused | None = None


class LocalFleet:
    """All shims below the folders `roots`: a unit has a folder in one of them, an incarnation one in that."""

    def __init__(
        self,
        roots: Sequence[Path],
        install_id: str,
        on_change: Callable[[str], None],
        clock: Callable[[], float],
        lease: Leading | None = None,
    ) -> None:
        self._roots = tuple(roots)
        self._lease = lease
        self._epochs = self._roots[0].parent / EPOCHS
        self._install_id = install_id
        # With the folder in it: a copy of a store has the installation's id, and nothing of what runs.
        self._mark = f"{install_id}@{self._roots[0].parent.name}/"
        self._on_change = on_change
        self._clock = clock
        self._observed: dict[Path, Observation] = {}
        self._by_name: dict[str, dict[Path, Observation]] = {}
        self.version = 0
        """Changes whenever an observation does."""
        self._watches: dict[Path, asyncio.Task[None]] = {}
        self._children: set[int] = set()

    async def open(self) -> None:
        """Find every shim there is and hear from each; returns when all answered, or are UNKNOWN after 10 s. From
        then on those of an earlier epoch start and stop nothing."""
        if self._lease is not None:
            self._lease.check()
            enter(self._epochs, self._lease.epoch)
        nameless: set[Path] = set()
        for root in self._roots:
            for folder in sorted(root.glob("*/*")):
                document = _read_json(folder / "shim.json") or _read_json(folder / "exit.json")
                if document is not None and "identity" in document:
                    self._keep(self._from_identity(folder, document, Life.UNKNOWN))
                elif (folder / "shim.sock").exists():
                    # Cleaners of /tmp take old files and leave sockets: the shim itself says who it is.
                    nameless.add(folder)
                else:
                    shutil.rmtree(folder)  # a launch that was cut off before it wrote what it would start
        for folder in (*self._observed, *nameless):
            self._watch(folder)
        deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS
        while any(seen.life is Life.UNKNOWN for seen in self._observed.values()) or any(
            folder not in self._observed and not self._watches[folder].done() for folder in nameless
        ):
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.01)
        for folder in nameless - set(self._observed):
            if self._watches[folder].done():
                self._drop(folder)  # nobody listens, and nothing says who did
        if all(folder in self._observed or folder not in self._watches for folder in nameless):
            # Else the owner of a name may be one that has not said who it is.
            for name in {name for name, _ in _carriers(self._mark)}:
                await self._end_strays(name)  # of units that left no folder

    async def close(self) -> None:
        """Stop listening to shims. They and their children go on."""
        for task in self._watches.values():
            task.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)
        self._watches.clear()
        self._reap()

    def observed(self, name: str | None = None) -> list[Observation]:
        """What was last heard, of one unit or of all."""
        self._reap()
        return list((self._observed if name is None else self._by_name.get(name, {})).values())

    async def start(self, unit: Unit) -> Observation:
        """Start a shim for `unit`, which starts the child. Returns when the shim listens. Raises `StartFailed`.

        Refuses while another incarnation of the same unit may live: no two processes ever carry one name. Raises
        `Deposed` without the lease.
        """
        self._check_lease()
        for seen in self.observed(unit.name):
            if seen.folder == unit.folder and seen.life is Life.LIVE and seen.nonce == unit.nonce:
                return seen  # a repeated step finds its work done
            if seen.life is not Life.GONE:
                raise StartFailed("cannot_start", f"incarnation {seen.incarnation} of {unit.name} still lives")
        if (left := await self._end_strays(unit.name)) is not None:
            raise StartFailed("cannot_start", f"process {left} still carries the name {unit.name}")
        for old in list(self._observed):
            if self._observed[old].name == unit.name and old != unit.folder:
                self._drop(old)
        self._check_lease()
        private_dir(unit.folder.parent)
        if unit.folder.exists():
            self._drop(unit.folder)
            shutil.rmtree(unit.folder, ignore_errors=True)
        private_dir(unit.folder)
        spec = self._shim_spec(unit)
        for name, content in unit.files.items():
            _write(unit.folder / name, content)
        _write(unit.folder / "shim.json", json.dumps(spec).encode())
        unit.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        spawned = asyncio.ensure_future(self._spawn_known(unit, spec))
        try:
            await asyncio.shield(spawned)
        except asyncio.CancelledError:
            # whoever gives up, and then stops all that is known, has to know of this one
            await asyncio.gather(spawned, return_exceptions=True)
            raise
        return await self._heard(unit.folder)

    async def _spawn_known(self, unit: Unit, spec: dict[str, Any]) -> None:
        """Start the shim and write down that it lives, or leave nothing of it."""
        try:
            await self._spawn(unit)
        except StartFailed:
            shutil.rmtree(unit.folder)  # nothing of it lives: an address in use is tried again every few seconds
            raise
        self._keep(replace(self._from_identity(unit.folder, spec, Life.LIVE), running=True, starts=1))
        self._watch(unit.folder)

    async def stop(self, folder: Path, grace: float) -> None:
        """Tell the shim in `folder` to end its child's whole tree, and then itself. Does not wait for it.

        A shim that is gone is no error: then there is nothing to stop. Raises `Deposed` without the lease.
        """
        self._check_lease()
        try:
            _, writer = await asyncio.open_unix_connection(str(folder / "shim.sock"))
        except (FileNotFoundError, ConnectionRefusedError):
            self._watch(folder)
            return
        try:
            self._check_lease()
            told = {"op": "stop", "grace": grace}
            if self._lease is not None:
                told["epoch"] = self._lease.epoch
            writer.write(json.dumps(told).encode() + b"\n")
            await writer.drain()
        finally:
            writer.close()  # the request lies in the socket's buffer; the shim reads it before the end of file

    async def renew(self, unit: Unit, within: float) -> None:
        """Have the shim in `unit.folder`, of the same incarnation, start another child of `unit`'s command,
        environment and labels on the same listening socket. Once it is ready it takes over, and the one before has
        `unit.grace` seconds to finish; one that is not ready `within` seconds is given up. Does not wait for it.

        `unit.files` are written, so they need names that the running child does not use. Raises `RenewFailed`, and
        `Deposed` without the lease.
        """
        self._check_lease()
        for name, content in unit.files.items():
            _write(unit.folder / name, content)
        path = unit.folder / "next.json"
        _write(path, json.dumps(self._shim_spec(unit)).encode())
        await self._ask(unit.folder, {"op": "renew", "spec": str(path), "grace": unit.grace, "within": within})

    async def keep(self, folder: Path) -> None:
        """Have the shim in `folder` give up the child that is to follow its own. Raises as `renew` does."""
        await self._ask(folder, {"op": "keep"})

    async def _ask(self, folder: Path, asked: dict[str, Any]) -> None:
        """Have a shim do something, and be told of it."""
        before = self._observed.get(folder)
        if self._lease is not None:
            asked["epoch"] = self._lease.epoch
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                reader, writer = await asyncio.open_unix_connection(str(folder / "shim.sock"), limit=MAX_LINE)
                try:
                    self._check_lease()
                    writer.write(json.dumps(asked).encode() + b"\n")
                    answer = json.loads(await reader.readline())
                finally:
                    writer.close()
        except (OSError, TimeoutError, ValueError) as error:
            raise RenewFailed(f"its shim does not answer: {error!r}") from error
        if "error" in answer:
            why = str(answer["error"])
            raise RenewFailed(why, unable=why.startswith("unknown operation"))
        deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS
        while self._observed.get(folder) is before and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)  # the watch tells the same, and in its order

    async def gone(self, names: Sequence[str], timeout: float) -> bool:
        """Wait until no incarnation of these units lives; False when `timeout` seconds passed before."""
        deadline = asyncio.get_running_loop().time() + timeout
        while any(seen.life is not Life.GONE for name in names for seen in self.observed(name)):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def forget(self, name: str) -> None:
        """Remove the folders of a unit's incarnations that are gone."""
        for seen in self.observed(name):
            if seen.life is Life.GONE:
                self._drop(seen.folder)
                parent = seen.folder.parent
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────

    def _shim_spec(self, unit: Unit) -> dict[str, Any]:
        return {
            "identity": {
                "installId": self._install_id,
                "replicaId": unit.name,
                "incarnation": unit.incarnation,
                "nonce": unit.nonce,
            },
            "labels": dict(unit.labels),
            "argv": list(unit.argv),
            "env": {**unit.env, "QUIRE_UNIT": f"{self._mark}{unit.name}"},
            "cwd": str(unit.cwd),
            "log": str(unit.log),
            "socket": str(unit.folder / "shim.sock"),
            "exitFile": str(unit.folder / "exit.json"),
            "listen": None if unit.listen is None else {"host": unit.listen[0], "port": unit.listen[1]},
            "restart": unit.restart,
            "backoff": BACKOFF,
            "grace": unit.grace,
            "epoch": self._lease.epoch if self._lease is not None else None,
            "epochs": str(self._epochs),
        }

    async def _heard(self, folder: Path) -> Observation:
        """What a shim that was just started says of itself, or what is known after a while."""
        deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS
        while self._observed[folder].shim_pid is None and self._observed[folder].life is not Life.GONE:
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.005)
        return self._observed[folder]

    async def _spawn(self, unit: Unit) -> None:
        """Start the shim in a session of its own and read its readiness line."""
        readable, writable = os.pipe()
        try:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", str(SHIM), str(unit.folder / "shim.json")],
                {
                    name: os.environ[name]
                    for name in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
                    if name in os.environ
                },
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, writable, 1),
                    (os.POSIX_SPAWN_OPEN, 2, str(unit.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                ],
                setsid=True,
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD],
            )
        except OSError as error:
            os.close(readable)
            raise StartFailed("cannot_start", f"cannot start a shim: {error.strerror or error}") from error
        finally:
            os.close(writable)
        self._children.add(pid)
        said = await _first_line(readable, START_SECONDS)
        if said == b"ready\n":
            return
        if pid in self._children:  # not yet waited for, so the pid is its own; it may only be slow
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._children.discard(pid)
        try:
            error_ = json.loads(said)
            raise StartFailed(error_["error"], error_["message"])
        except (ValueError, KeyError, TypeError) as error:
            raise StartFailed("cannot_start", f"the shim did not come up; see {unit.log}") from error

    def _watch(self, folder: Path) -> None:
        task = self._watches.get(folder)
        if task is None or task.done():
            self._watches[folder] = asyncio.create_task(self._listen(folder), name=f"watch {folder.name}")

    async def _listen(self, folder: Path) -> None:
        """Keep the observation of one shim fresh until it is gone."""
        while True:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    reader, writer = await asyncio.open_unix_connection(str(folder / "shim.sock"), limit=MAX_LINE)
            except (FileNotFoundError, ConnectionRefusedError):
                seen = self._observed.get(folder)
                if seen is None or (left := await self._end_strays(seen.name, folder)) is None:
                    self._note_gone(folder)
                    return
                self._note_unknown(folder, FleetError(f"its shim is gone, and process {left} is not"))
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except (OSError, TimeoutError) as error:
                self._note_unknown(folder, error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            try:
                writer.write(b'{"op":"watch"}\n')
                async with asyncio.timeout(ANSWER_SECONDS):
                    line = await reader.readline()
                while line:
                    self._note_state(folder, json.loads(line))
                    line = await reader.readline()
            except (OSError, TimeoutError, ValueError) as error:
                self._note_unknown(folder, error)
                await asyncio.sleep(RETRY_SECONDS)
            finally:
                writer.close()

    async def _end_strays(self, name: str, dead: Path | None = None) -> int | None:
        """Kill what carries the name of a unit that no living shim holds (`dead`: the folder of one that does
        not); the pid of a process that is still there afterwards, or None."""
        if any(seen.life is not Life.GONE and seen.folder != dead for seen in self.observed(name)):
            return None
        for carried, pid in _carriers(self._mark):
            if carried != name:
                continue
            try:
                process = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                if _unit_of(pid, self._mark) == name:  # the descriptor is of the process that was looked at
                    self._check_lease()
                    log.warning("killing process %d: it carries the name %s, and its shim is gone", pid, name)
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    if not await _ends(process, STRAY_SECONDS):
                        return pid
            except ProcessLookupError:
                continue
            finally:
                os.close(process)
        return None

    def _note_state(self, folder: Path, state: dict[str, Any]) -> None:
        listen, following, refused = state.get("listen"), state.get("next"), state.get("refused")
        end = None if refused is None else _ended(refused["exit"])
        self._put(
            replace(
                self._from_identity(folder, state, Life.LIVE),
                running=bool(state["running"]),
                child_pid=state["childPid"],
                shim_pid=state["shimPid"],
                starts=state["starts"],
                stopping=state["stopping"],
                listen=(listen[0], listen[1]) if listen else None,
                lines=tuple(state["lines"]),
                log_lost=state.get("logLost", 0),  # a shim of a version before does not count
                ended=_ended(state["exit"]),
                following=None if following is None else following["labels"],
                following_pid=None if following is None else following["pid"],
                leaving=tuple(state.get("leaving", ())),
                refused=None if refused is None or end is None else Refused(refused["labels"], end),
            )
        )

    def _note_gone(self, folder: Path) -> None:
        """Nobody listens any more: what is left is the record, if there is one."""
        self._reap()
        old = self._observed.get(folder)
        if old is None:
            return
        record = _read_json(folder / "exit.json") or {}
        ours = record.get("identity", {}).get("nonce") == old.nonce
        self._put(
            replace(
                old,
                life=Life.GONE,
                at=self._clock(),
                running=False,
                child_pid=None,
                shim_pid=None,
                stopping=False,
                following=None,
                following_pid=None,
                leaving=(),
                ended=_ended(record.get("exit")) if ours else None,
                lines=tuple(record.get("lines", old.lines)) if ours else old.lines,
            )
        )

    def _note_unknown(self, folder: Path, error: Exception) -> None:
        log.warning("the shim in %s does not answer as it should: %r", folder, error)
        if (old := self._observed.get(folder)) is not None:
            self._put(replace(old, life=Life.UNKNOWN, at=self._clock()))

    def _from_identity(self, folder: Path, document: Mapping[str, Any], life: Life) -> Observation:
        identity = document["identity"]
        if identity["installId"] != self._install_id:
            # Another installation's leftovers in our folder: shown under a name that no row has.
            identity = {**identity, "replicaId": f"{identity['installId']}/{identity['replicaId']}"}
        return Observation(
            folder=folder,
            name=identity["replicaId"],
            incarnation=identity["incarnation"],
            nonce=identity["nonce"],
            labels=document.get("labels", {}),
            life=life,
            at=self._clock(),
        )

    def _put(self, seen: Observation) -> None:
        old = self._observed.get(seen.folder)
        self._keep(seen)
        if old is None or replace(old, at=seen.at) != seen:
            self._on_change(seen.name)

    def _drop(self, folder: Path) -> None:
        task = self._watches.pop(folder, None)
        if task is not None:
            task.cancel()
        self._lose(folder)
        shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, seen: Observation) -> None:
        """Take an observation in place of the one of its folder."""
        old = self._observed.get(seen.folder)
        if old is not None and old.name != seen.name:
            self._lose(seen.folder)
        self._observed[seen.folder] = seen
        self._by_name.setdefault(seen.name, {})[seen.folder] = seen
        self.version += 1

    def _lose(self, folder: Path) -> None:
        seen = self._observed.pop(folder, None)
        if seen is None:
            return
        named = self._by_name[seen.name]
        del named[folder]
        if not named:
            del self._by_name[seen.name]
        self.version += 1

    def _reap(self) -> None:
        """Collect shims of ours that ended, so that none stays a zombie."""
        for pid in list(self._children):
            try:
                done, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                done = pid
            if done:
                self._children.discard(pid)


def _ended(document: Any) -> Ended | None:
    if not isinstance(document, dict):
        return None
    return Ended(
        document.get("code"),
        document.get("signal"),
        bool(document.get("stopped")),
        str(document.get("message", "")),
        tuple(map(str, document.get("tail", ()))),
        document.get("pause"),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _write(path: Path, content: bytes) -> None:
    """Atomic, mode 0600: the files hold the environment of the child."""
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
    os.replace(temporary, path)


def _carriers(mark: str) -> list[tuple[str, int]]:
    """Live processes of this user whose environment says that they belong to a unit: (its name, pid)."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (name := _unit_of(int(entry), mark)) is not None:
            found.append((name, int(entry)))
    return found


def _unit_of(pid: int, mark: str) -> str | None:
    """The unit that a process carries the name of, if it does. A zombie has no environment any more."""
    wanted = f"QUIRE_UNIT={mark}".encode()
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            found = next((part for part in file.read().split(b"\0") if part.startswith(wanted)), None)
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
    return found.removeprefix(wanted).decode(errors="replace") if found is not None else None


async def _ends(process: int, timeout: float) -> bool:
    """Whether the process behind a pidfd ends within `timeout` seconds."""
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()

    def ended() -> None:
        loop.remove_reader(process)
        gone.set_result(None)

    loop.add_reader(process, ended)
    try:
        async with asyncio.timeout(timeout):
            await gone
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(process)
    return True


async def _first_line(descriptor: int, timeout: float) -> bytes:
    """What a pipe says up to its first newline or its end; b"" after `timeout` seconds. Closes it."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Future[bytes] = loop.create_future()
    parts: list[bytes] = []
    os.set_blocking(descriptor, False)

    def read() -> None:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        parts.append(data)
        if (not data or data.endswith(b"\n")) and not heard.done():
            heard.set_result(b"".join(parts))

    loop.add_reader(descriptor, read)
    try:
        async with asyncio.timeout(timeout):
            return await heard
    except TimeoutError:
        return b""
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
