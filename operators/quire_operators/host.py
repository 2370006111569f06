"""What the operating system says of this machine: limits of control groups, file systems, holders of locks, ports.

Read from the kernel's own tables and judged by nobody here. `devices` builds the inventory on it, the store
refuses network file systems by it, `platform doctor` prints it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

NETWORK_FILESYSTEMS = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "fuse.sshfs",
        "9p",
        "ceph",
        "glusterfs",
        "fuse.glusterfs",
        "lustre",
        "afs",
    }
)
MOUNTS = Path("/proc/self/mounts")
PROCESSORS = Path("/sys/devices/system/cpu")
_MOST_BYTES = 64 * 1024
"""Of one of the kernel's files, more than any of those that are read here has."""


def physical_cores(processors: Collection[int], root: Path = PROCESSORS) -> int:
    """How many cores these logical processors are. One that the kernel says nothing of is a core of its own.

    Siblings share a core's vector units and its way to memory: a second thread on it takes from the first.
    """
    cores = {_text(root / f"cpu{number}/topology/thread_siblings_list") or str(number) for number in processors}
    return len(cores)


# ── control groups ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ControlGroups:
    """The control groups of one process: where they are mounted, and the text of its `/proc/<pid>/cgroup`.

    Both versions are read. A limit holds for all groups below it, so every ancestor that can be seen counts.
    """

    root: Path
    membership: str

    @classmethod
    def own(cls) -> ControlGroups:
        """Those of this process; none where the kernel tells of none."""
        try:
            membership = Path("/proc/self/cgroup").read_text()
        except OSError:
            membership = ""
        return cls(Path("/sys/fs/cgroup"), membership)

    def cores(self) -> float | None:
        """How many cores' worth of time may be used; None without a limit."""
        found = []
        for folder in self._folders(""):
            quota, _, period = _text(folder / "cpu.max").partition(" ")
            if quota.isdigit() and period.isdigit():
                found.append(int(quota) / int(period))
        for folder in self._folders("cpu"):
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit():  # -1: no limit
                found.append(int(quota) / int(period))
        return min(found, default=None)

    def memory(self) -> tuple[int, int] | None:
        """(limit, used) in bytes of the group that leaves least room; None without a limit."""
        found = []
        for controller, limit_file, used_file in (
            ("", "memory.max", "memory.current"),
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            for folder in self._folders(controller):
                limit, used = _text(folder / limit_file), _text(folder / used_file)
                if limit.isdigit() and int(limit) < 1 << 60:  # version 1 spells "no limit" as a huge number
                    found.append((int(limit), int(used) if used.isdigit() else 0))
        return min(found, key=lambda pair: pair[0] - pair[1], default=None)

    def memory_room(self, *, closely: bool) -> int | None:
        """Bytes that may still be had in the group that leaves least; None without a limit. `closely`: what the
        kernel keeps of files and would give up before it kills anybody counts as room, which it has to add up.
        """
        found = []
        for controller, limit_file, used_file, prefix in (
            ("", "memory.max", "memory.current", ""),
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            for folder in self._folders(controller):
                limit, used = _text(folder / limit_file), _text(folder / used_file)
                if not (limit.isdigit() and used.isdigit()) or int(limit) >= 1 << 60:
                    continue
                kept = 0
                for line in _text(folder / "memory.stat").splitlines() if closely else ():
                    name, _, size = line.partition(" ")
                    if name in (f"{prefix}active_file", f"{prefix}inactive_file"):
                        kept += int(size)
                found.append(int(limit) - int(used) + kept)
        return min(found, default=None)

    def _folders(self, controller: str) -> tuple[Path, ...]:
        return _folders(self.root, self.membership, controller)


@lru_cache(maxsize=16)
def _folders(root: Path, membership: str, controller: str) -> tuple[Path, ...]:
    """The group's folder and its ancestors' up to the mount; version 2 has no controller in its name."""
    found: list[Path] = []
    for line in membership.splitlines():
        _, controllers, own = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        base = root / controller if controller else root
        folder = base / own.strip("/")
        # Inside a container the path may be that of the host, and the mount already be the group itself.
        found += [each for each in (folder, *folder.parents) if each.is_relative_to(base)]
    return tuple(found)


def _text(path: Path) -> str:
    """What a small file has. The memory of a group is looked at ten times a second: a file object would take
    several times as long."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(descriptor, _MOST_BYTES).decode(errors="replace").strip()
    except OSError:
        return ""
    finally:
        os.close(descriptor)


# ── file systems ──────────────────────────────────────────────────────────────────────────────────────────


def file_system(folder: Path) -> str | None:
    """The type of the file system under `folder`, or under the nearest folder above that exists; None: unknown."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        return file_system_in(MOUNTS.read_text(errors="replace"), folder.resolve())
    except OSError:
        return None


def file_system_in(mounts: str, folder: Path) -> str | None:
    """The same by the text of a mount table: the innermost mount around an absolute path, the last of equals."""
    depth, kind = -1, None
    for line in mounts.splitlines():
        words = line.split(" ")
        if len(words) < 3:
            continue
        point = Path(words[1].encode().decode("unicode_escape"))  # blanks are written \040
        if folder.is_relative_to(point) and len(point.parts) >= depth:
            depth, kind = len(point.parts), words[2]
    return kind


# ── locks ─────────────────────────────────────────────────────────────────────────────────────────────────


def lock_holder(lock: Path) -> int | None:
    """The process that holds a `flock` on the file, by the kernel's table of locks."""
    try:
        info = lock.stat()
        table = Path("/proc/locks").read_text()
    except OSError:
        return None
    inode = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    for line in table.splitlines():
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == inode:
            return int(words[4])
    return None


# ── ports ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Listener:
    """A process that listens on a port, as far as this user may see it."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"process {self.pid}, {self.name}"


def listener(host: str, port: int) -> Listener | None:
    """Who listens on (host, port); None when nobody does, or when it is another user's and cannot be seen."""
    own = {host, "0.0.0.0", "::"}  # noqa: S104 - compared with, not bound
    if host == "localhost":
        own |= {"127.0.0.1", "::1"}
    try:
        for each in psutil.net_connections(kind="tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr and each.pid and _same(each.laddr, own, port):
                return Listener(each.pid, psutil.Process(each.pid).name())
    except psutil.Error:
        return None
    return None


def _same(address: tuple[str, int], hosts: set[str], port: int) -> bool:
    return address[0] in hosts and address[1] == port


def address_problem(host: str, port: int) -> str | None:
    """Why nothing can listen on (host, port) now, or None. Binds and lets go at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                who = listener(host, port)
                return f"{host}:{port} is in use by another program" + (f" ({who})" if who is not None else "")
            return f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}"
    return None
