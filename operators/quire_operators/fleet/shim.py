"""The parent of one engine, or of the router: standard library only, run by file path.

    python -I -S shim.py SPEC.json

A process that outlives the control plane needs a parent that outlives it too: one that can still say how the
child ended, that keeps its log, and that takes everything the child started down with it. The shim is a child
subreaper (orphaned grandchildren come to it), runs its child in a process group of its own, asks the kernel to
kill the child when the shim dies (PR_SET_PDEATHSIG), and answers on a Unix socket in a 0700 folder.

SPEC.json (written by the fleet):

    identity   {installId, replicaId, incarnation, nonce}: what `hello` answers with. Never a pid alone.
    labels     anything; given back by `hello`
    argv       the child's command; "{status_fd}" in it becomes the descriptor for status lines
    env, cwd   the child's whole environment and its folder
    log        file for the child's stdout and stderr; rotated at `logLimit` bytes, `logKeep` old ones are kept
    socket     path of the control socket
    exitFile   path written atomically when the child has ended for good
    listen     {host, port} or null: the shim binds it, keeps it through restarts of the child and passes the
               descriptor's number in QUIRE_LISTEN_FD
    restart    true: start the child again after it ends, except after exit 78 (nothing would change)
    backoff    {base, max, healthy}: seconds to wait before that, from `base` doubling to `max` while children end
               before they have been ready for `healthy` seconds; after one that was, it begins at `base` again.
               How long a start took says nothing: a child is ready from its status line {"event": "ready"} on
    grace      seconds between SIGTERM and SIGKILL when the shim itself is told to end by a signal
    epoch      the number of the control plane that starts it, among those that lead one after the other, and
    epochs     a folder with the numbers of those that led here as names of files. A number that is not the highest
               there is one of a control plane that was deposed: it starts nothing, and stops nothing, any more

Control socket, one JSON object a line: {"op":"hello"} and {"op":"status"} answer with the state, {"op":"watch"}
answers with it now and after every change, {"op":"stop","grace":s,"epoch":n} ends the child's whole tree and then
the shim; its answer comes when the tree is gone. Of the child's status lines the last `KEEP_LINES` are kept; the
shim itself looks for nothing in them but the one that says "ready". `logLost` counts bytes of the log that could
not be written. `exit` in the state is how the child last ended, with the last `TAIL_LINES` lines it wrote to its
log; it stays while the child runs again.

{"op":"renew","spec":path,"grace":s,"within":s,"epoch":n} puts another child in the place of the one there is, on
the same listening socket, with what the file at `path` says of `RENEWED`. It is the `next` of the state until it
says "ready": from then on SPEC.json has it, and the child before gets SIGTERM and is among those `leaving`, for
`grace` seconds at most. One that ends before, or is not ready `within` so many seconds, is `refused`, with its
labels and how it ended, and nothing has changed. {"op":"keep","epoch":n} gives the next child up: nobody wants it.

Start protocol: once the control socket listens the shim writes "ready\\n" on its stdout; before that, an error
is one JSON object {"error", "message"} on stdout and exit status 75 (address in use, deposed or another system
error). It looks at the epochs after its socket listens: whoever leads next leaves a number first, and looks for
sockets then, so that one of the two sees the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KEEP_LINES = 16
TAIL_LINES = 20
TAIL_LINE = 400
"""Characters of a line in the tail."""
MAX_LINE = 64 * 1024
RENEWED = ("argv", "env", "cwd", "labels")
"""What of a specification may be another one while the shim runs."""
TELL_LOST_SECONDS = 30.0
"""Between two messages to watchers about a log that cannot be written."""
NOT_RETRYABLE = 78
START_FAILED = 75

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def complain(text: str) -> None:
    """Say it on stderr, which is a file too: on a disk that is full nothing can be said, and the child goes on."""
    with contextlib.suppress(OSError):
        os.write(2, f"shim: {text}\n".encode())


def says_ready(line: bytes) -> bool:
    """Whether a status line is the one with which a child says that it serves."""
    try:
        said = json.loads(line)
    except ValueError:
        return False
    return isinstance(said, dict) and said.get("event") == "ready"


def stamped(text: str) -> bytes:
    """A line of the shim's own in its child's log."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ shim: ", time.gmtime()).encode() + f"{text}\n".encode()


class Log:
    """Appends to a file; at `limit` bytes renames it to `.1`, `.1` to `.2`, and so on up to `keep`."""

    def __init__(self, path: str, limit: int, keep: int) -> None:
        self.path, self.limit, self.keep = path, limit, keep
        self.lost = 0
        """Bytes that could not be written, ever."""
        self.unsaid = 0
        """Of them, those that the log itself does not tell of yet."""
        self.complained = False
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self.descriptor = os.open(self.path, flags, 0o600)
        self.size = os.fstat(self.descriptor).st_size

    def write(self, data: bytes) -> None:
        """Losing a log line (a full disk) must not take the child down: it is counted, said on stderr, and in the
        log itself once that can be written again."""
        if self.unsaid:
            gap, before = b"\n" + stamped(f"{self.unsaid} bytes of this log were lost"), self.size
            if self._append(gap) < len(gap):
                with contextlib.suppress(OSError):  # a piece of it would be one more with every try
                    os.ftruncate(self.descriptor, before)
                    self.size = before
                self._lose(len(data))
                return
            self.unsaid, self.complained = 0, False
        self._lose(len(data) - self._append(data))
        if self.size >= self.limit:
            self.size = 0  # should the rotation fail, it is tried again after as many bytes
            try:
                self._rotate()
            except OSError as error:
                self._complain(error)

    def _append(self, data: bytes) -> int:
        """How many bytes of it could be written."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.descriptor, view) :]
        except OSError as error:
            self._complain(error)
        done = len(data) - len(view)
        self.size += done
        return done

    def _lose(self, count: int) -> None:
        self.lost += count
        self.unsaid += count

    def _complain(self, error: OSError) -> None:
        if not self.complained:
            self.complained = True
            complain(f"cannot write {self.path}: {error}")

    def note(self, text: str) -> None:
        self.write(stamped(text))

    def _rotate(self) -> None:
        """The old file is closed last: whatever fails here, there is one to write to."""
        for number in range(self.keep, 0, -1):
            older = self.path if number == 1 else f"{self.path}.{number - 1}"
            if os.path.exists(older):
                os.replace(older, f"{self.path}.{number}")
        old = self.descriptor
        self._open()
        os.close(old)


class Connection:
    """One client of the control socket. Writes never block the shim: a client that does not read is dropped."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.heard = b""
        self.watching = False


class Child:
    """One life of the command, by what of a specification is `RENEWED`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.process: subprocess.Popen[bytes] | None = None
        self.since = time.monotonic()
        self.ready_since: float | None = None
        self.ready_by: float | None = None
        """When it is given up, if it is not ready by then."""
        self.late = ""
        """How long it was waited for in vain."""
        self.kill_at: float | None = None
        self.pipes: set[int] = set()
        self.lines: list[str] = []
        self.status_rest = b""
        self.tail = b""
        """The end of what it wrote."""

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    @property
    def lives(self) -> bool:
        """Whether it has neither ended nor is killed."""
        if self.process is None or self.kill_at is not None:
            return False
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def last_lines(self) -> list[str]:
        lines = self.tail.decode(errors="replace").splitlines()[-TAIL_LINES:]
        return [line[:TAIL_LINE] for line in lines]


class Shim:
    def __init__(self, spec: dict[str, Any], path: str = "") -> None:
        """`path`: the file of the specification."""
        self.spec = spec
        self.path = path
        self.identity: dict[str, Any] = spec["identity"]
        self.log = Log(spec["log"], spec.get("logLimit", 16 * 1024 * 1024), spec.get("logKeep", 3))
        self.selector = selectors.DefaultSelector()
        self.connections: set[Connection] = set()
        self.listening: socket.socket | None = None
        self.address: tuple[str, int] | None = None
        """Of it."""
        self.child: Child | None = None
        self.next: Child | None = None
        self.next_grace = 0.0
        """Seconds for the child that the next one follows."""
        self.leaving: list[Child] = []
        self.refused: dict[str, Any] | None = None
        self.starts = 0
        self.lines: list[str] = []
        self.exit: dict[str, Any] | None = None
        self.stopping = False
        self.stop_waiters: list[Connection] = []
        self.kill_at: float | None = None
        self.restart_at: float | None = None
        self.backoff = {"base": 0.2, "max": 30.0, "healthy": 60.0, **spec.get("backoff", {})}
        self.delay = self.backoff["base"]
        self.done = False
        self.lost_untold = False
        self.tell_lost_at = 0.0

    # ── start ─────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> None:
        """Bind what must be bound. After this the shim is reachable."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        if listen := self.spec.get("listen"):
            family = socket.AF_INET6 if ":" in listen["host"] else socket.AF_INET
            self.listening = socket.socket(family, socket.SOCK_STREAM)
            self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.listening.bind((listen["host"], listen["port"]))
            self.listening.listen(2048)
            self.address = self.listening.getsockname()[:2]
        path = self.spec["socket"]
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            server.bind(path)
        finally:
            os.umask(mask)
        server.listen(64)
        server.setblocking(False)
        self.server = server
        self.selector.register(server, selectors.EVENT_READ, self.accept)
        wake_read, wake_write = os.pipe()
        for descriptor in (wake_read, wake_write):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self.selector.register(wake_read, selectors.EVENT_READ, lambda: self.signalled(wake_read))

    def spawn(self) -> None:
        """Start the child that there is to be."""
        self.starts += 1
        self.child = Child(self.spec)
        self.child.lines = self.lines
        self.begin(self.child)

    def begin(self, child: Child) -> None:
        """Start a child in a process group of its own, with a log pipe and a status pipe."""
        out_read, out_write = os.pipe()
        status_read, status_write = os.pipe()
        env = dict(child.spec["env"])
        keep = [status_write]
        if self.listening is not None:
            env["QUIRE_LISTEN_FD"] = str(self.listening.fileno())
            keep.append(self.listening.fileno())
        argv = [part.replace("{status_fd}", str(status_write)) for part in child.spec["argv"]]
        parent = os.getpid()

        def before_exec() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the shim died before the line above took effect
                os._exit(1)

        self.log.note(f"starting {' '.join(argv)}")
        try:
            child.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out_write,
                stderr=out_write,
                env=env,
                cwd=child.spec.get("cwd") or "/",
                pass_fds=keep,
                process_group=0,
                preexec_fn=before_exec,
            )
        except OSError as error:
            self.log.note(f"cannot start: {error}")
            os.close(out_read)
            os.close(status_read)
            self.ended(child, {"code": 127, "signal": None, "message": f"cannot start {argv[0]}: {error}"})
            return
        finally:
            os.close(out_write)
            os.close(status_write)
        for descriptor, reader in ((out_read, self.read_log), (status_read, self.read_status)):
            os.set_blocking(descriptor, False)
            child.pipes.add(descriptor)
            self.selector.register(descriptor, selectors.EVENT_READ, _bind(reader, child, descriptor))
        self.changed()

    def renew(self, path: str, grace: float, within: float) -> str:
        """Start the next child. Why it cannot be, or nothing."""
        try:
            with open(path) as file:
                spec = json.load(file)
            if spec["identity"] != self.identity:
                return f"{path} is for another one: {spec['identity']}"
            child = Child({name: spec[name] for name in RENEWED})
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{path} cannot be used: {error!r}"
        if self.stopping:
            return "it is stopping"
        self.keep()
        self.next, self.next_grace, self.refused = child, grace, None
        child.ready_by = child.since + within
        self.begin(child)
        return ""

    def keep(self) -> None:
        """Give the next child up, if there is one: nobody wants it any more."""
        given_up, self.next = self.next, None
        if given_up is not None and given_up.process is not None:
            self.leave(given_up, 0.0)

    def take_over(self, child: Child) -> None:
        """The next child serves: it is the child from now on, and the one before may finish."""
        before, self.child, self.next = self.child, child, None
        child.ready_by = None
        self.lines, self.exit, self.restart_at = child.lines, None, None
        self.delay = self.backoff["base"]
        self.spec = {**self.spec, **child.spec}
        temporary = f"{self.path}.{os.getpid()}"
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(self.spec, file)
            os.replace(temporary, self.path)
        except OSError as error:  # whoever asks is told by this process, as long as it lives
            self.log.note(f"cannot write {self.path}: {error}")
        if before is not None and before.process is not None:
            served = before.ready_since is not None
            self.leave(before, self.next_grace if served else 0.0)

    def leave(self, child: Child, grace: float) -> None:
        """Have a child end that is not wanted any more."""
        child.ready_by, child.kill_at = None, time.monotonic() + grace
        self.leaving.append(child)
        self.log.note(f"process {child.pid} is to leave, grace {grace:g} s")
        self.signal(child, signal.SIGTERM)

    def children(self) -> list[Child]:
        """Those that live."""
        known = [self.child, self.next, *self.leaving]
        return [child for child in known if child is not None and child.process is not None]

    def deposed(self, epoch: int | None) -> bool:
        """Whether a control plane of a higher epoch has led here since. Who names no epoch is of a version without
        them, and so is whoever leaves no folder."""
        folder = self.spec.get("epochs")
        if epoch is None or folder is None:
            return False
        try:
            return any(int(name) > epoch for name in os.listdir(folder) if name.isdigit())
        except FileNotFoundError:
            return False

    # ── loop ──────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        self.spawn()
        while not self.done:
            tell_at = self.tell_lost_at if self.lost_untold else None
            times = [at for child in self.children() for at in (child.kill_at, child.ready_by)]
            deadlines = [at for at in (self.kill_at, self.restart_at, tell_at, *times) if at is not None]
            timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            for key, _ in self.selector.select(timeout):
                key.data()
            now = time.monotonic()
            self.tell_lost()
            if self.kill_at is not None and now >= self.kill_at:
                self.kill_at = now + 0.5
                self.kill_tree(signal.SIGKILL)
            for child in self.children():
                self.press(child, now)
            if self.restart_at is not None and now >= self.restart_at and not self.stopping:
                self.restart_at = None
                self.spawn()
            self.reap()
        self.close()

    def press(self, child: Child, now: float) -> None:
        """Kill a child that is to leave, or was to be ready, by now."""
        if child.ready_by is not None and now >= child.ready_by:
            child.late, child.ready_by, child.kill_at = f"{child.ready_by - child.since:g} s", None, now
        if child.kill_at is not None and now >= child.kill_at:
            child.kill_at = now + 0.5
            self.signal(child, signal.SIGKILL)

    def signalled(self, descriptor: int) -> None:
        try:
            numbers = os.read(descriptor, 512)
        except BlockingIOError:
            return
        if any(number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) for number in numbers):
            self.stop(float(self.spec.get("grace", 5.0)))

    def reap(self) -> None:
        """Collect every child that ended: the child itself and orphans that came to this subreaper."""
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if dead is None:
                break
            child = next((each for each in self.children() if each.pid == dead.si_pid), None)
            if child is not None:
                self.kill_group(dead.si_pid, signal.SIGKILL)  # before the pid is freed for somebody else
            _, status = os.waitpid(dead.si_pid, 0)
            if child is not None and child.process is not None:
                code = os.waitstatus_to_exitcode(status)
                child.process.returncode = code
                self.ended(child, {"code": code if code >= 0 else None, "signal": -code if code < 0 else None})
        if self.stopping and not self.children():
            if self.descendants():
                self.kill_tree(signal.SIGKILL)
                self.kill_at = time.monotonic() + 0.05
            else:
                self.finish()

    def ended(self, child: Child, how: dict[str, Any]) -> None:
        """A child is gone: drain its pipes, then stay, start again, or finish."""
        child.process = None
        for descriptor in list(child.pipes):
            reader = self.selector.get_key(descriptor).data
            reader()
            if descriptor in child.pipes:
                self.forget(child, descriptor)
        now = time.monotonic()
        ran = now - child.since
        end = {**how, "ran": round(ran, 3), "stopped": self.stopping, "tail": child.last_lines()}
        self.log.note(f"ended with {how}")
        if child in self.leaving:
            self.leaving.remove(child)
            self.changed()
            return
        if child is self.next:
            self.next = None
            if child.late:
                end["message"] = f"it was not ready within {child.late}"
            self.refused = {"labels": child.spec["labels"], "exit": end}
            self.changed()
            return
        self.child, self.exit = None, end
        if self.stopping:
            return
        if not self.spec.get("restart"):
            self.stopping, self.kill_at = True, now
            return
        if (
            how["code"] != NOT_RETRYABLE
        ):  # else it stays, so that the reason can be asked for and the address is kept
            if child.ready_since is not None and now - child.ready_since >= self.backoff["healthy"]:
                self.delay = self.backoff["base"]
            self.restart_at, end["pause"] = now + self.delay, self.delay
            self.delay = min(self.delay * 2, self.backoff["max"])
        self.changed()

    def stop(self, grace: float) -> None:
        if not self.stopping:
            self.stopping = True
            self.restart_at = None
            if self.listening is not None:  # nobody takes what would lie in its queue
                self.listening.close()
            self.log.note(f"stopping, grace {grace:g} s")
            for child in self.children():
                self.signal(child, signal.SIGTERM)
        at = time.monotonic() + (grace if self.children() else 0.0)
        self.kill_at = at if self.kill_at is None else min(self.kill_at, at)
        self.changed()

    def signal(self, child: Child, number: int) -> None:
        if child.process is not None:
            self.kill_group(child.process.pid, number)

    def kill_group(self, group: int, number: int) -> None:
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return  # nobody is left in it, which is what was wanted
        except PermissionError as error:
            self.log.note(f"cannot signal process group {group}: {error}")

    def kill_tree(self, number: int) -> None:
        """Signal the child's group and every descendant, also those that made a session of their own."""
        for child in self.children():
            self.signal(child, number)
        for pid in self.descendants():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def descendants(self) -> list[int]:
        """Live processes below this one (zombies are about to be reaped and do not count)."""
        parents: dict[int, int] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/stat", "rb") as file:
                        fields = file.read().rpartition(b")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if fields[0] not in (b"Z", b"X"):
                    parents[int(entry)] = int(fields[1])
        found: list[int] = []
        level = {os.getpid()}
        while level:
            level = {pid for pid, parent in parents.items() if parent in level}
            found.extend(level)
        return found

    def finish(self) -> None:
        """Everything is gone: leave the record, answer those who asked for the stop, end.

        Without a record (a full disk, a folder that was cleaned away) the end is seen all the same, its cause not.
        """
        record = {"identity": self.identity, "labels": self.spec.get("labels", {}), "exit": self.exit}
        record["lines"] = self.lines
        path = self.spec["exitFile"]
        temporary = f"{path}.{os.getpid()}"
        try:
            with open(temporary, "w") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            self.log.note(f"cannot write {path}: {error}")
        self.changed()
        for connection in self.stop_waiters:
            self.send(connection, self.state())
        self.done = True

    def close(self) -> None:
        if os.path.exists(self.spec["socket"]):
            os.unlink(self.spec["socket"])
        self.server.close()
        for connection in list(self.connections):
            connection.sock.close()

    # ── pipes from the child ──────────────────────────────────────────────────────────────────────────────

    def read_log(self, child: Child, descriptor: int) -> None:
        before, gap = self.log.lost, self.log.unsaid
        while (data := self.read(child, descriptor)) is not None:
            child.tail = (child.tail + data)[-TAIL_LINES * TAIL_LINE :]
            self.log.write(data)
        if gap and not self.log.unsaid:
            self.tell_lost_at, self.lost_untold = 0.0, True
        elif self.log.lost > before:
            self.lost_untold = True
        self.tell_lost()

    def tell_lost(self) -> None:
        """Tell watchers what the log has lost, now and then: who writes it down may have the same full disk."""
        if self.lost_untold and time.monotonic() >= self.tell_lost_at:
            self.tell_lost_at, self.lost_untold = time.monotonic() + TELL_LOST_SECONDS, False
            self.changed()

    def read_status(self, child: Child, descriptor: int) -> None:
        changed = False
        while (data := self.read(child, descriptor)) is not None:
            *lines, child.status_rest = (child.status_rest + data).split(b"\n")
            if len(child.status_rest) > MAX_LINE:
                child.status_rest = b""
            for line in lines:
                if line.strip() and len(line) <= MAX_LINE:
                    child.lines = [*child.lines[-(KEEP_LINES - 1) :], line.decode(errors="replace")]
                    changed = True
                    if child.ready_since is None and says_ready(line):
                        child.ready_since = time.monotonic()
        if child is self.next and child.ready_since is not None and child.lives and not self.stopping:
            self.take_over(child)
        if changed and child is self.child:
            self.lines = child.lines
        if changed:
            self.changed()

    def read(self, child: Child, descriptor: int) -> bytes | None:
        """Bytes now there; None when there are none, at the end too (then the pipe is closed)."""
        if descriptor not in child.pipes:
            return None
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return None
        if data:
            return data
        self.forget(child, descriptor)
        return None

    def forget(self, child: Child, descriptor: int) -> None:
        self.selector.unregister(descriptor)
        child.pipes.discard(descriptor)
        os.close(descriptor)

    # ── control socket ────────────────────────────────────────────────────────────────────────────────────

    def state(self) -> dict[str, Any]:
        following = self.next
        return {
            "identity": self.identity,
            "labels": self.spec.get("labels", {}),
            "shimPid": os.getpid(),
            "childPid": self.child.pid if self.child is not None else None,
            "running": self.child is not None,
            "starts": self.starts,
            "next": None if following is None else {"pid": following.pid, "labels": following.spec["labels"]},
            "leaving": [child.pid for child in self.leaving],
            "refused": self.refused,
            "stopping": self.stopping,
            "gone": self.done or (self.stopping and not self.children() and not self.descendants()),
            "listen": list(self.address) if self.address else None,
            "lines": self.lines,
            "logLost": self.log.lost,
            "exit": self.exit,
        }

    def accept(self) -> None:
        sock, _ = self.server.accept()
        connection = Connection(sock)
        self.connections.add(connection)
        self.selector.register(sock, selectors.EVENT_READ, lambda: self.hear(connection))

    def hear(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or len(connection.heard) > MAX_LINE:
            self.drop(connection)
            return
        *lines, connection.heard = (connection.heard + data).split(b"\n")
        for line in lines:
            self.answer(connection, line)

    def answer(self, connection: Connection, line: bytes) -> None:
        try:
            request = json.loads(line)
            operation = request["op"]
            grace = float(request.get("grace", self.spec.get("grace", 5.0)))
            epoch = int(request["epoch"]) if "epoch" in request else None
            path, within = str(request.get("spec", "")), float(request.get("within", 60.0))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.send(connection, {"error": f"not a request: {error!r}"})
            return
        if operation in ("hello", "status"):
            self.send(connection, self.state())
        elif operation == "watch":
            connection.watching = True
            self.send(connection, self.state())
        elif operation in ("stop", "renew", "keep") and self.deposed(epoch):
            self.log.note(f"no {operation} for epoch {epoch}: another control plane leads")
            self.send(connection, {"error": f"epoch {epoch} is over"})
        elif operation == "renew":
            problem = self.renew(path, grace, within)
            self.send(connection, {"error": problem} if problem else self.state())
        elif operation == "keep":
            self.keep()
            self.send(connection, self.state())
        elif operation == "stop":
            self.stop_waiters.append(connection)
            self.stop(grace)
        else:
            self.send(connection, {"error": f"unknown operation {operation!r}"})

    def changed(self) -> None:
        state = self.state() if any(connection.watching for connection in self.connections) else None
        for connection in list(self.connections):
            if connection.watching and state is not None:
                self.send(connection, state)

    def send(self, connection: Connection, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            sent = connection.sock.send(data)
        except OSError:
            sent = -1
        if sent != len(data):
            self.drop(connection)

    def drop(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.discard(connection)
            self.selector.unregister(connection.sock)
            connection.sock.close()


def _bind(reader: Callable[[Child, int], None], child: Child, descriptor: int) -> Callable[[], None]:
    return lambda: reader(child, descriptor)


def main(path: str) -> int:
    with open(path) as file:
        shim = Shim(json.load(file), path)
    try:
        shim.open()
    except OSError as error:
        code = "address_in_use" if error.errno == errno.EADDRINUSE else "cannot_start"
        print(json.dumps({"error": code, "message": error.strerror or str(error)}), flush=True)
        return START_FAILED
    if shim.deposed(shim.spec.get("epoch")):
        print(json.dumps({"error": "deposed", "message": "another control plane leads"}), flush=True)
        shim.close()
        return START_FAILED
    print("ready", flush=True)
    # The starter's pipe must not stay open in a process that lives long, nor reach the child.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    shim.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
