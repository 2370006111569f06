"""Which control plane leads: one row of the database, and what everybody who acts looks at.

Only one control plane at a time may change anything: rows, processes, what the router is told. Which one says the
row of `leases`. Its `epoch` grows by one whenever another takes it, and `expires` is a time of the database's
clock alone: nobody's own clock is compared with anybody else's.

    taken      when it has expired; or at once by whoever holds the lock of the state directory (`daemon.lock`),
               which the kernel takes from a process that ends, if the last holder had it under the same kernel (by
               its boot id): then that one is gone. A copy of a state directory elsewhere has a lock of its own
    renewed    every `RENEW_SECONDS`, for `LEASE_SECONDS` from then; the epoch stays
    given up   at a clean end: it has expired

A new epoch is above that of the row and above every one that acted on this machine: a state directory that moves
to another database, or back, goes on counting where its processes are.

On SQLite the lock alone decides: a lease there never expires, since only one process has the file. The row is the
same, so that there too every process that was started knows by which epoch.

Three things keep whoever was paused, or cut off, from acting on what it decided before:

    writes     every transaction that changes anything holds the row while it lasts (`database`)
    processes  each epoch leaves its number in a folder beside the sockets before it looks at what runs. A shim
               does not start its child, and does not stop it, for an epoch that is not the highest there (`fleet`)
    itself     `check` fails from `MARGIN_SECONDS` before the lease would expire on, by a clock that goes on while
               the machine sleeps

Exceptions are those of `database`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from quire_operators.clock import boot_id
from quire_operators.database import Deposed, Location, location, refuse_newer
from quire_operators.sqlite import UnusableStore
from quire_operators.tables import LEASES, META

log = logging.getLogger(__name__)

LEASE_SECONDS = 10.0
RENEW_SECONDS = 2.0
MARGIN_SECONDS = 1.0
NAME = "controlplane"
EPOCHS = "epochs"
"""Name of the folder, beside the sockets, with the numbers of those that led on this machine."""
HOME = "home"


def _now() -> float:
    """Seconds that go on while a process is paused, or the machine is."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class Lease:
    """That this control plane leads. `until` is when it may no longer be sure of that by its own clock, None where
    the lock of the state directory says so."""

    epoch: int
    until: float | None
    on_lost: Callable[[], None] = lambda: None
    lost: bool = False
    name: str = field(default=NAME, init=False)

    def lose(self) -> None:
        """Another one has it."""
        if not self.lost:
            self.lost = True
            log.error("another control plane leads: epoch %d is over", self.epoch)
            self.on_lost()

    def is_sure(self) -> bool:
        """Whether nobody else can lead now."""
        return not self.lost and (self.until is None or _now() < self.until)

    def check(self) -> None:
        """Raise `Deposed` unless nobody else can lead now."""
        if self.lost:
            raise Deposed(
                f"another control plane leads (this one was number {self.epoch}); nothing was changed",
                "try again: the command reaches the one that leads",
            )
        if not self.is_sure():
            raise Deposed(
                "this control plane cannot tell whether it still leads: its database did not answer in time; "
                "nothing was changed",
                "see that the database can be reached, then try again",
            )


@dataclass(frozen=True, slots=True)
class Home:
    """The state directory whose processes a database tells of: engines and router are on its machine, and no other
    control plane could look after them."""

    id: str
    folder: str
    machine: str


class Election:
    """Takes, renews and gives up the lease, by a connection of its own. `holder` is for people, `acted` the folder
    of the epochs that acted on this machine."""

    def __init__(self, place: Path | sa.URL, holder: str, home: Callable[[], Home], acted: Path) -> None:
        self._holder = holder
        self._home = home
        self._acted = acted
        self._location: Location = location(place)
        self._expires = not isinstance(place, Path)
        self._engine = self._location.engine()
        self._ready = False

    def __str__(self) -> str:
        return str(self._location)

    def close(self) -> None:
        self._location.close()
        self._engine.dispose()

    def take(self, *, locked: bool) -> Lease | None:
        """The lease, if it is to be had. `locked` says that this process holds the lock of the state directory.

        Raises `UnusableStore` where this version, or this state directory, must not write; `StoreUnavailable`
        while the database cannot be asked."""
        try:
            return self._take(locked=locked)
        finally:
            if not self._expires:
                # A process that closes a file loses all its locks on it, those of other connections too: whoever
                # opens the store next must be the only one.
                self._engine.dispose()

    def _take(self, *, locked: bool) -> Lease | None:
        began = _now()
        with self._transaction() as db:
            if not self._ready:
                self._location.prepare(db)
                for table in (META, LEASES):
                    table.create(db, checkfirst=True)
            refuse_newer(db, self._location)
            if self._expires:
                self._claim(db)
            row = db.execute(self._row().with_for_update()).first()
            if row is None:
                epoch = self._above(0)
                db.execute(sa.insert(LEASES).values(name=NAME, epoch=epoch, **self._values(locked=locked)))
            elif self._is_free(db, row, locked=locked):
                epoch = self._above(row.epoch)
                db.execute(self._update().values(epoch=epoch, **self._values(locked=locked)))
            else:
                return None
        self._ready = True
        return Lease(epoch, began + LEASE_SECONDS - MARGIN_SECONDS if self._expires else None)

    def renew(self, lease: Lease, *, locked: bool) -> None:
        """Keep it for longer; loses it if somebody else has it. Raises `StoreUnavailable` while the database
        cannot be asked."""
        if not self._expires:
            return
        began = _now()
        with self._transaction() as db:
            done = db.execute(self._update(lease).values(**self._values(locked=locked)))
        if done.rowcount != 1:
            lease.lose()
        else:
            lease.until = began + LEASE_SECONDS - MARGIN_SECONDS

    def give_up(self, lease: Lease) -> None:
        """Let the next one have it at once."""
        if self._expires and not lease.lost:
            with self._transaction() as db:
                db.execute(self._update(lease).values(expires=self._clock() - 1.0))

    def _above(self, epoch: int) -> int:
        return max([epoch, *highest_first(self._acted)]) + 1

    def _is_free(self, db: sa.Connection, row: Any, *, locked: bool) -> bool:
        if locked and (row.expires is None or (row.locked and row.boot == boot_id())):
            return True
        return row.expires is not None and row.expires < db.scalar(sa.select(self._clock()))

    def _claim(self, db: sa.Connection) -> None:
        """See that the database's processes are those of this state directory."""
        own = self._home()
        found = db.scalar(sa.select(META.c.value).where(META.c.key == HOME))
        if found is None:
            home = {"id": own.id, "folder": own.folder, "machine": own.machine}
            db.execute(sa.insert(META).values(key=HOME, value=json.dumps(home)))
            return
        kept = json.loads(found)
        if kept["id"] != own.id:
            raise UnusableStore(
                f"{self} is the store of the state directory {kept['folder']} on {kept['machine']}: the engines "
                "that it tells of are there",
                "run further control planes on that state directory; to move to this one: platform backup, then "
                "platform restore into a database of its own",
            )

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """One transaction, whose errors are those of a store."""
        try:
            with self._engine.begin() as db:
                yield db
        except sa.exc.DatabaseError as error:
            raise self._location.unusable(error) from error

    @staticmethod
    def _row() -> sa.Select[Any]:
        return sa.select(LEASES).where(LEASES.c.name == NAME)

    @staticmethod
    def _update(lease: Lease | None = None) -> sa.Update:
        update = sa.update(LEASES).where(LEASES.c.name == NAME)
        return update if lease is None else update.where(LEASES.c.epoch == lease.epoch)

    @staticmethod
    def _clock() -> sa.ColumnElement[float]:
        return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Float)

    def _values(self, *, locked: bool) -> dict[str, Any]:
        expires = self._clock() + LEASE_SECONDS if self._expires else None
        return {"holder": self._holder, "boot": boot_id(), "locked": locked, "expires": expires}


# ── epochs of a machine ───────────────────────────────────────────────────────────────────────────────────


def enter(folder: Path, epoch: int) -> None:
    """Leave the number of an epoch where shims look, before anything else is looked at. A number is never taken
    back by a lower one: each is a name of its own."""
    folder.mkdir(mode=0o700, exist_ok=True)
    os.close(os.open(folder / str(epoch), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    for older in highest_first(folder)[1:]:
        (folder / str(older)).unlink(missing_ok=True)


def highest_first(folder: Path) -> list[int]:
    """Epochs that acted on this machine."""
    try:
        return sorted((int(name) for name in os.listdir(folder) if name.isdigit()), reverse=True)
    except FileNotFoundError:
        return []
