"""What is made once per machine and kept: a folder in the user's cache, and who may work in it.

~/.cache/quire/NAME        or $XDG_CACHE_HOME/quire/NAME
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from quire_kernels.errors import KernelError

_LOOK_SECONDS = 0.05


def folder(name: str) -> Path:
    """The folder of that name, which need not be there. Raises `KernelError` where nobody knows a home."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "quire" / name
    except RuntimeError as error:
        raise KernelError(f"{error}; XDG_CACHE_HOME names one") from error


@contextlib.contextmanager
def alone(place: Path, seconds: float | None = None) -> Iterator[bool]:
    """Whoever else works in `place`, which is made, waits. True: it is ours. False: somebody else still has it
    after `seconds` (None: as long as it takes), or there can be no lock, or no such folder.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        yield _locked(lock, seconds)
    finally:
        os.close(lock)


def _locked(lock: int, seconds: float | None) -> bool:
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if until is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if until is None or time.monotonic() > until:
                return False
            time.sleep(_LOOK_SECONDS)
        except OSError:
            return False
        else:
            return True
