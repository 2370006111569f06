"""Who leads: the lock of the state directory and the lease of its store, taken together and kept.

`daemon.lock` is the kernel's: it comes free the moment its holder ends, however it ends, and stays with one that
is only paused. The lease is the database's: it comes free when its holder has not been heard of for a while.
Whoever has the lock takes the lease at once if the last leader had the lock; otherwise it waits until the lease
has expired. On SQLite there is no second way: one that is paused keeps the lock, and with it the file. Nor is
there one into a database that this state directory does not keep to yet.

A leader that took over from one that is paused has the lease alone, and takes the lock when it comes free.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import sqlalchemy as sa

from quire_operators import whereabouts
from quire_operators.lease import EPOCHS, RENEW_SECONDS, Election, Lease
from quire_operators.paths import StateDir
from quire_operators.sqlite import StoreError, StoreUnavailable

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
"""Between two looks at the lock by one that waits; at the lease, every tenth."""


class Seat:
    """One process's place among the control planes of a state directory. Raises `StateDirError` and `OSError`
    where there is no lock to be had, and what `whereabouts.find` does. `moving`: the store is about to be put
    there."""

    def __init__(self, state: StateDir, environ: Mapping[str, str], *, moving: bool = False) -> None:
        self._state = state
        self._lock = os.open(state.daemon_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._locked = False
        self._environ = environ
        self._moving = moving
        self.place: Path | sa.URL | None = None
        self._election: Election | None = None

    def lock(self) -> bool:
        """Take the lock of the state directory if it is free; whether this process has it."""
        if not self._locked:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._locked = True
        return True

    def unlock(self) -> None:
        """Let go of it: who was deposed has nothing to keep others from."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._locked = False

    def take(self) -> Lease | None:
        """The lease, if it is to be had now. Raises as `Election.take` does."""
        locked = self.lock()
        if self.place is None:
            self.place = whereabouts.find(self._state, self._environ, moving=self._moving)
        if not locked and (isinstance(self.place, Path) or not self._state.database.exists()):
            return None  # whoever has the lock leads from the file, or is about to settle in the database
        if self._election is None:
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            acted = self._state.runtime / EPOCHS
            self._election = Election(self.place, holder, lambda: whereabouts.home(self._state), acted)
        lease = self._election.take(locked=locked)
        if lease is None:
            self.unlock()  # it is for whoever leads
        else:
            log.info("leading: epoch %d, %s the lock", lease.epoch, "with" if locked else "without")
        return lease

    def settle(self) -> None:
        """Have the state directory keep to this database from now on."""
        if self.place is not None:
            whereabouts.settle(self._state, self.place)

    async def wait(self, ended: asyncio.Event) -> Lease | None:
        """The lease, as soon as it is to be had; None when `ended` is set, or everything is down."""
        waiting = os.open(self._state.standby_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(waiting, fcntl.LOCK_SH)  # at once: nobody keeps it, who looks lets go of it
            return await self._wait(ended)
        finally:
            os.close(waiting)

    async def _wait(self, ended: asyncio.Event) -> Lease | None:
        looks, said, down = 0, "", self._state.down_marker.exists()
        while not ended.is_set():
            if down is not (down := self._state.down_marker.exists()) and down:
                log.info("everything goes down: standing by no more")
                return None
            free = not self._locked and self.lock()
            if looks % 10 == 0 or free:
                try:
                    lease = self.take()
                except StoreUnavailable as error:
                    lease, message = None, error.message
                    if message != said:
                        log.warning("cannot lead: %s", message)
                        said = message
                if lease is not None:
                    return lease
            looks += 1
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await ended.wait()
            except TimeoutError:
                continue
        return None

    async def keep(self, lease: Lease, renewed: Callable[[], None]) -> None:
        """Renew the lease until it is lost, or this is cancelled. `renewed` is called after each time."""
        while not lease.lost:
            await asyncio.sleep(RENEW_SECONDS)
            locked = self.lock()
            try:
                if self._election is not None:
                    self._election.renew(lease, locked=locked)
                renewed()
            except StoreUnavailable as error:
                log.warning("the lease is not renewed: %s", error.message)

    def give_up(self, lease: Lease) -> None:
        """Let the next one lead at once. The lock stays until the process ends, or lets go of it."""
        try:
            if self._election is not None:
                self._election.give_up(lease)
        except StoreError as error:
            log.warning("the lease runs out by itself: %s", error.message)

    def close(self) -> None:
        if self._election is not None:
            self._election.close()
        os.close(self._lock)
