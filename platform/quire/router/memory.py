"""Whether the router still has memory for more work, and the refusal of work when it has not.

What it could have is what it has plus what the tightest bound leaves: of its control group and those above it, of
RLIMIT_AS, of the machine. So one number, the share that it has of that, means the same under each bound, and a
group that it shares with engines which fill it does not count as the router's doing: while there is room left it
may grow into it.

    share        0.0 ───────────── 0.80 ──────── 0.85 ────────── 1.0
    work         taken                begins to be refused, from 0.85 on, until it is at 0.80 again

Refusals are a 429 before the body is read (`MemoryShort`). Health, metrics and what runs go on. When they begin
and once a second while they last, what hangs on nothing but itself is looked for, and what the allocator keeps of
what was freed is given back: else a router that was full once would look full for ever. Once a minute that is done
anyhow: garbage that waits, and holes where it was, are most of what a router grows by over the hours.

Samples are taken on a thread of their own: each is some twenty system calls, behind each of which the event loop
would wait for its turn while another thread computes.

A sample tells of what is. A text of a megabyte takes a hundred more for the moment in which it is made into token
ids, so such work says beforehand what it may take at its height, and is refused if that is not there (`reserved`).

`share`, `decide` are arithmetic; `Memory` samples and acts.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import math
import os
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quire.errors import MemoryShort
from quire_operators.host import ControlGroups

log = logging.getLogger("quire.router")
REFUSE_AT: Final = 0.85
RESUME_AT: Final = 0.80
FULL_AT: Final = 0.90
"""To here what has been announced may reach."""
SMALL_BYTES: Final = 4 << 20
"""Less is not announced."""
SAMPLE_SECONDS: Final = 0.1
TRIM_SECONDS: Final = 1.0
TIDY_SECONDS: Final = 60.0
"""Between two times that it is done anyhow: 7 ms of processor time."""
ARENAS: Final = 2
LARGE_BYTES: Final = 64 << 10
READ_BYTES: Final = 32 << 10
"""Of a connection at a time. asyncio asks for 256 KiB whenever it reads, nearly all of which it gives back."""
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes at one moment: what the process has, and what each bound leaves. None: there is no such bound."""

    resident: int
    group_room: int | None = None
    address_room: int | None = None
    """RLIMIT_AS counts what is set aside, too."""
    machine_room: int | None = None


def share(sample: Sample, more: int = 0) -> float:
    """Of the memory that the process could have, the part that it has, or would have with `more` bytes, by the
    tightest bound: 0 to 1, or above where it could not have them."""
    rooms = [room for room in (sample.group_room, sample.address_room, sample.machine_room) if room is not None]
    could_have = sample.resident + max(min(rooms, default=0), 0)
    return (sample.resident + more) / could_have if rooms and could_have else 0.0


def decide(refusing: bool, now: float) -> bool:
    """Whether work is to be refused, by the share of now and whether it was."""
    return now > RESUME_AT if refusing else now >= REFUSE_AT


def read_less(transport: asyncio.BaseTransport) -> None:
    """Have a connection read `READ_BYTES` at a time: there is no word for that but the attribute."""
    transport.max_size = READ_BYTES  # type: ignore[attr-defined]


class Allocator:
    """glibc's; another one is left as it is.

    Each thread would have an arena of its own, with 64 MiB of address space, which keeps what the thread freed
    from all others. Threads of Python take turns anyhow.

    What is large is had from the system and given back to it, always. The library would do so only until the first
    such piece is freed, and from then on cut pieces of its size out of what lies between small ones: each leaves a
    hole in which others settle, so that the next one takes new memory, and a router grows that holds no more than
    an hour ago. Reading from a connection takes less than `LARGE_BYTES` for that reason (`READ_BYTES`).
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._trim: Callable[[int], int] | None = getattr(library, "malloc_trim", None)
        if self._trim is not None:
            library.mallopt(_M_ARENA_MAX, ARENAS)
            library.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)

    def trim(self) -> None:
        """Give back to the system what nobody uses, as far as it is whole pages."""
        if self._trim is not None:
            self._trim(0)


class Memory:
    """Looks at the process's memory ten times a second while it watches."""

    def __init__(self, groups: ControlGroups | None = None) -> None:
        self.share = 0.0
        self.refusing = False
        self._groups = groups or ControlGroups.own()
        self._allocator = Allocator()
        self._tidied_at = math.inf
        self._announced = 0
        self._turn = threading.Lock()
        self._looker = ThreadPoolExecutor(1, thread_name_prefix="memory")

    def check(self) -> None:
        """Raises `MemoryShort` while there is none for more work."""
        if self.refusing:
            raise MemoryShort(
                "The server has no memory for more requests now. Those that run go on.", retry_after=1.0
            )

    @contextlib.contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """For work that takes up to `size` bytes for a moment, on any thread. Raises `MemoryShort`."""
        if size < SMALL_BYTES:
            yield
            return
        with self._turn:
            if share(self._sample(closely=True), self._announced + size) > FULL_AT:
                raise MemoryShort(
                    f"The server has no memory for a request of this size now, which takes {size >> 20} MiB of it "
                    "for a moment. A shorter one may still be taken.",
                    retry_after=1.0,
                )
            self._announced += size
        try:
            yield
        finally:
            with self._turn:
                self._announced -= size

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await loop.run_in_executor(self._looker, self.look, loop.time())
            await asyncio.sleep(SAMPLE_SECONDS)

    def look(self, now: float) -> None:
        """Take a sample and act by it. `now` is of a monotonic clock."""
        found = share(self._sample())
        if found >= RESUME_AT:  # what could be had back is asked for only when it matters: it is counted for that
            found = share(self._sample(closely=True))
        refusing = decide(self.refusing, found)
        self._tidied_at = min(self._tidied_at, now)  # what a start leaves is no garbage
        began = refusing and not self.refusing
        if began or now - self._tidied_at >= (TRIM_SECONDS if refusing else TIDY_SECONDS):
            self._tidied_at = now
            gc.collect()  # what was freed may hang on exceptions that hang on their frames
            self._allocator.trim()
        if refusing != self.refusing:
            words = "requests are refused" if refusing else "requests are taken again"
            log.warning("memory: %s; the router has %.0f %% of what it could have", words, 100 * found)
        self.share, self.refusing = found, refusing

    def _sample(self, *, closely: bool = False) -> Sample:
        virtual, resident = (int(pages) * _PAGE for pages in Path("/proc/self/statm").read_text().split()[:2])
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        return Sample(
            resident,
            group_room=self._groups.memory_room(closely=closely),
            address_room=None if limit == resource.RLIM_INFINITY else limit - virtual,
            machine_room=_machine_room(),
        )


def _machine_room() -> int | None:
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/meminfo") as told:
        line = next(line for line in told if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return None
