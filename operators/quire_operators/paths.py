"""Where a control plane keeps its things: one durable folder, one folder of sockets.

The durable folder (the state directory) holds the store, the locks and the logs. Sockets cannot live there: a
Unix socket's path may have 107 bytes, and a state directory may be anywhere. They live in a short folder under
`/tmp`, named by user and by a hash of the state directory, so that every process that knows the state directory
finds them. `/tmp` is fixed rather than taken from `TMPDIR`, because two shells with different environments must
find the same control plane. Everyone may write to `/tmp`, so the folder is used only if it is a real directory
that belongs to this user and is closed to everybody else.

    <root>/state.db  database.json  {daemon,start,standby}.lock  down  routes.snapshot
    <root>/logs/{controlplane,router}.log
    <root>/logs/replicas/<model>/<replica id>.log
    <root>/router/router.db  router/files/<id>  router/lock
    <root>/sources/<repository>@<commit>.<part>.json   secrets/<name>   git/<source's uid>/<hash of its URL>
    /tmp/quire-<uid>-<hash>/admin.sock  router.sock  gateway/1/shim.sock  r/<hash of replica id>/<incarnation>/…

Exceptions:

    StateDirError          has message and hint
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOCKET_BASE = Path("/tmp")  # noqa: S108 - see the module's docstring: checked for owner and mode before use


class StateDirError(Exception):
    """A folder of the state directory cannot be trusted or made."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class StateDir:
    """Names every path below one state directory. Nothing is created before `create()`."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(os.path.abspath(self.root)))

    @classmethod
    def default(cls, environ: Mapping[str, str] = os.environ) -> StateDir:
        """`$QUIRE_STATE_DIR`, else `~/.local/state/quire` (or the same below `$XDG_STATE_HOME`). Raises
        `StateDirError` where that can be no path of this system."""
        if given := environ.get("QUIRE_STATE_DIR"):
            root = Path(given).expanduser()
        else:
            base = environ.get("XDG_STATE_HOME")
            root = (Path(base) if base else Path.home() / ".local" / "state") / "quire"
        try:
            root.is_dir()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise StateDirError(
                    f"{root} can be no folder: {error.strerror}", "QUIRE_STATE_DIR chooses another one"
                ) from error
        return cls(root)

    @property
    def store(self) -> Path:
        return self.root / "state.db"

    @property
    def database(self) -> Path:
        """Says which database on a server has the store, where it is not in the file `store`."""
        return self.root / "database.json"

    @property
    def daemon_lock(self) -> Path:
        return self.root / "daemon.lock"

    @property
    def standby_lock(self) -> Path:
        """Shared by control planes that wait until they may lead."""
        return self.root / "standby.lock"

    @property
    def start_lock(self) -> Path:
        return self.root / "start.lock"

    @property
    def down_marker(self) -> Path:
        """Lies there from a `down` until an `apply` or `up`: meanwhile nothing is started."""
        return self.root / "down"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def router_snapshot(self) -> Path:
        """The routing table that the router last accepted, and begins with when there is no control plane."""
        return self.root / "routes.snapshot"

    @property
    def router_store(self) -> Path:
        """The folder of what the router keeps by itself: files and batches."""
        return self.root / "router"

    @property
    def sources(self) -> Path:
        """What is known of the repositories whose files lie in the cache."""
        return self.root / "sources"

    @property
    def secrets(self) -> Path:
        return self.root / "secrets"

    @property
    def git(self) -> Path:
        """Clones of the repositories that git sources follow, by the source's uid."""
        return self.root / "git"

    @property
    def runtime(self) -> Path:
        """The folder of sockets; short whatever the length of `root`."""
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]
        return SOCKET_BASE / f"quire-{os.geteuid()}-{digest}"

    @property
    def admin_socket(self) -> Path:
        return self.runtime / "admin.sock"

    @property
    def router_control(self) -> Path:
        return self.runtime / "router.sock"

    @property
    def replicas(self) -> Path:
        """Parent of all replica folders."""
        return self.runtime / "r"

    @property
    def gateway(self) -> Path:
        """Folder of the router's shim."""
        return self.runtime / "gateway"

    def replica_dir(self, replica_id: str) -> Path:
        """Folder of one replica; each of its incarnations has a folder of its own in it, named by number."""
        return self.replicas / hashlib.sha256(replica_id.encode()).hexdigest()[:12]

    def log(self, name: str) -> Path:
        """Log of `controlplane` or `router`."""
        return self.logs / f"{name}.log"

    def replica_log(self, model: str, replica_id: str) -> Path:
        return self.logs / "replicas" / model / f"{replica_id}.log"

    def create(self) -> None:
        """Make the state directory and the folder of sockets, closed to others. Raises `StateDirError`."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.logs.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StateDirError(
                f"cannot make the state directory {self.root}: {error.strerror or error}",
                "QUIRE_STATE_DIR chooses another one",
            ) from error
        if self.root.stat().st_uid != os.geteuid():
            raise StateDirError(
                f"the state directory {self.root} belongs to another user", "QUIRE_STATE_DIR chooses another one"
            )
        os.chmod(self.root, 0o700)
        for folder in (self.runtime, self.replicas, self.gateway):
            private_dir(folder)


def private_dir(path: Path) -> None:
    """Make `path` with mode 0700, or accept it if it is a directory of this user closed to others."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise StateDirError(
            f"cannot make {path}: {error.strerror or error}", f"its parent {path.parent} must be a writable folder"
        ) from error
    check_private(path)


def check_private(path: Path) -> None:
    """Accept `path` if it is a directory of this user closed to others. Makes nothing: one that is not there is a
    FileNotFoundError."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise StateDirError(
            f"{path} is not a folder of this user with mode 0700",
            f"somebody else may have made it: look at it, then remove it with rm -r {path}",
        )


def sync_folder(folder: Path) -> None:
    """Have names that were given or taken in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
