"""How much of its memory the router has, and when it refuses work."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import MemoryShort
from quire.router import memory
from quire.router.exchange import _Pings
from quire.router.memory import (
    FULL_AT,
    READ_BYTES,
    REFUSE_AT,
    RESUME_AT,
    SMALL_BYTES,
    Memory,
    Sample,
    decide,
    read_less,
    share,
)
from quire_operators.host import ControlGroups

MIB = 1 << 20


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (Sample(100), 0.0),
        (Sample(100, group_room=300), 0.25),
        (Sample(100, group_room=300, address_room=100), 0.5),
        (Sample(100, group_room=300, address_room=100, machine_room=0), 1.0),
        (Sample(100, group_room=-50), 1.0),
        (Sample(0, machine_room=0), 0.0),
    ],
)
def test_the_tightest_bound_counts(sample: Sample, expected: float) -> None:
    assert share(sample) == expected


def test_a_group_that_engines_fill_is_not_the_routers_doing() -> None:
    """96 of 100 GiB are in use, by others: the router may still become forty times as large."""
    assert share(Sample(100 * MIB, group_room=4096 * MIB)) < 0.03


@given(st.integers(1, 1 << 40), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_more_is_never_less(resident: int, room: int, more: int) -> None:
    sample = Sample(resident, machine_room=room)
    assert share(sample) <= share(sample, more)
    assert (share(sample, more) > 1) == (more > room)


@given(st.lists(st.floats(0, 1), max_size=40))
def test_it_refuses_from_one_mark_and_takes_again_at_another(shares: list[float]) -> None:
    refusing = False
    for now in shares:
        before, refusing = refusing, decide(refusing, now)
        if now >= REFUSE_AT:
            assert refusing
        elif now <= RESUME_AT:
            assert not refusing
        else:
            assert refusing == before


def test_what_is_announced_together_fits_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Memory(ControlGroups.own())
    monkeypatch.setattr(
        memory.Memory, "_sample", lambda self, closely=False: Sample(100 * MIB, group_room=900 * MIB)
    )
    most = int(FULL_AT * 1000) - 100
    with watched.reserved(SMALL_BYTES - 1), watched.reserved((most - 100) * MIB):
        with pytest.raises(MemoryShort, match="takes 101 MiB"), watched.reserved(101 * MIB):
            pass
        with watched.reserved(99 * MIB):
            pass
    with watched.reserved(most * MIB):
        pass


async def test_samples_are_taken_where_nobody_waits_for_them() -> None:
    """A sample is many system calls, behind each of which the thread that takes it may have to wait its turn."""
    taken_on: set[int] = set()

    class Groups(ControlGroups):
        def memory_room(self, *, closely: bool) -> int | None:
            taken_on.add(threading.get_ident())
            return 0

    watched = Memory(Groups(Path("/"), ""))
    watching = asyncio.create_task(watched.watch())
    while not watched.refusing:  # what it finds is known here
        await asyncio.sleep(0.01)
    watching.cancel()
    assert len(taken_on) == 1
    assert threading.get_ident() not in taken_on


LARGE_PIECES = """
import ctypes
from quire.router.memory import LARGE_BYTES, Allocator
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
class Told(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
ask = ctypes.CDLL(None).mallinfo2
ask.restype = Told
Allocator()
counts = [ask().hblks]
for size in (16 * LARGE_BYTES, 12 * LARGE_BYTES, 8 * LARGE_BYTES):
    piece = bytes(size)
    counts.append(ask().hblks)
    del piece
    counts.append(ask().hblks)
print([count - counts[0] for count in counts])
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="without glibc there is nothing to set; CI has it"
)
def test_large_pieces_come_from_the_system_and_go_back_to_it() -> None:
    """Left to itself glibc has them lie among small ones as soon as it has seen one freed."""
    told = subprocess.run([sys.executable, "-c", LARGE_PIECES], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[0, 1, 0, 1, 0, 1, 0]"


async def test_a_connection_is_read_in_small_pieces() -> None:
    sizes: list[int] = []

    class Read(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            read_less(transport)

        def data_received(self, data: bytes) -> None:
            sizes.append(len(data))

    loop = asyncio.get_running_loop()
    server = await loop.create_server(Read, "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(bytes(1 << 20))
    while sum(sizes) < 1 << 20:
        await asyncio.sleep(0.001)
    writer.close()
    server.close()
    await server.wait_closed()
    assert max(sizes) <= READ_BYTES


async def test_a_streams_pings_are_gone_with_it() -> None:
    """What only the search for garbage finds stays for thousands of requests."""

    async def send(_: object) -> None:
        """It never gets to send one."""

    gc.collect()
    gc.disable()
    try:
        pings = _Pings(send, b"")
        async with pings:
            pings.begin()
            await asyncio.sleep(0)
        left = weakref.ref(pings)
        del pings
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("room", "after"), [(100 * MIB, memory.TIDY_SECONDS), (0, memory.TRIM_SECONDS)])
def test_garbage_is_looked_for_every_now_and_then(room: int, after: float) -> None:
    """Of objects that hang on each other the first search tells."""

    class Groups(ControlGroups):
        def memory_room(self, *, closely: bool) -> int | None:
            return room << 10

    class Ring:
        def __init__(self) -> None:
            self.itself = self

    watched = Memory(Groups(Path("/"), ""))
    gc.disable()
    try:
        watched.look(1000.0)
        ring = weakref.ref(Ring())
        watched.look(1000.0 + after - 0.1)
        assert ring() is not None
        watched.look(1000.0 + after)
        assert ring() is None
    finally:
        gc.enable()
