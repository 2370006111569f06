"""Whether ready engines still get on: one connection to each, and a `GetStats` on it twice a second.

An engine answers `GetStats` between two steps of its loop. So the answer stays out when the process is stopped,
when a step hangs, and when the loop is dead behind a socket that still accepts; it comes from an idle engine and
from a busy one. How long the silence may last is the planner's business.

Silence is counted only while this process itself was awake: a control plane that was stopped, or starved on a busy
machine, has heard nobody, and that says nothing about them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quire_schemas import wire

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
SILENCE_SECONDS = 1.0
"""An engine that has not answered for this long is called silent."""
HANDSHAKE_SECONDS = 5.0

Name = tuple[str, int]
"""Replica id and incarnation."""


@dataclass(slots=True)
class _Pulse:
    """One engine. `heard_at` is when it last answered, or when it began to be asked."""

    model: str
    socket: str
    heard_at: float
    speaks: bool = False
    """It has answered once. What another version makes of a greeting that it cannot read is no silence."""
    silent: bool = False
    task: asyncio.Task[None] | None = None


class _Stranger(Exception):
    """Somebody else answers on the socket: that says nothing of the engine."""


class Heartbeats:
    """Asks the engines it was told of. `clock` never jumps; `on_silence` gets the model of a replica that fell
    silent, or that answers again."""

    def __init__(self, on_silence: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._on_silence = on_silence
        self._clock = clock
        self._pulses: dict[Name, _Pulse] = {}
        self._ticker: asyncio.Task[None] | None = None

    def keep(self, model: str, sockets: Mapping[Name, str]) -> None:
        """Ask exactly these engines of `model`."""
        for name in [name for name, pulse in self._pulses.items() if pulse.model == model and name not in sockets]:
            task = self._pulses.pop(name).task
            if task is not None:
                task.cancel()
        for name, socket in sockets.items():
            if name not in self._pulses:
                pulse = self._pulses[name] = _Pulse(model, socket, self._clock())
                pulse.task = asyncio.create_task(self._ask(name, pulse), name=f"heartbeat {name[0]}")
        if self._pulses and self._ticker is None:
            self._ticker = asyncio.create_task(self._tick(), name="heartbeats")

    def silent_since(self, name: Name) -> float | None:
        """When it last answered, if that is longer ago than an answer may take; None for one that is not asked."""
        pulse = self._pulses.get(name)
        return pulse.heard_at if pulse is not None and pulse.silent else None

    async def close(self) -> None:
        """Ask nobody any more."""
        tasks = [pulse.task for pulse in self._pulses.values()] + [self._ticker]
        self._pulses.clear()
        self._ticker = None
        waited = [task for task in tasks if task is not None]
        for task in waited:
            task.cancel()
        await asyncio.gather(*waited, return_exceptions=True)

    async def _tick(self) -> None:
        """Judge the silences, and take the time that this process was not awake out of them."""
        before = self._clock()
        while True:
            await asyncio.sleep(BEAT_SECONDS / 2)
            now = self._clock()
            asleep = now - before - BEAT_SECONDS / 2
            before = now
            for pulse in list(self._pulses.values()):
                if asleep > BEAT_SECONDS:
                    pulse.heard_at = min(pulse.heard_at + asleep, now)
                silent = now - pulse.heard_at >= SILENCE_SECONDS
                if silent is not pulse.silent:
                    pulse.silent = silent
                    self._on_silence(pulse.model)

    async def _ask(self, name: Name, pulse: _Pulse) -> None:
        complaint = ""
        while True:
            try:
                await self._converse(name, pulse)
            except (OSError, EOFError, TimeoutError, _Stranger, wire.WireError) as error:
                if isinstance(error, wire.WireError) and not pulse.speaks:
                    pulse.heard_at = self._clock()
                if complaint != (complaint := repr(error)):
                    log.info("no heartbeat of %s, incarnation %d: %s", *name, complaint)
            await asyncio.sleep(BEAT_SECONDS)

    async def _converse(self, name: Name, pulse: _Pulse) -> None:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            reader, writer = await asyncio.open_unix_connection(pulse.socket)
        try:
            frames: wire.Reader[wire.FromEngine] = wire.Reader(reader, wire.FromEngine)
            writer.write(wire.frame(wire.Hello(role="control")))
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                welcome = await frames.read()
            if not isinstance(welcome, wire.Welcome):
                raise wire.BadMessage(f"it answers with {welcome!r:.80}")
            if (welcome.replica_id, welcome.incarnation) != name:
                raise _Stranger(f"it answers as {welcome.replica_id}, incarnation {welcome.incarnation}")
            beat = asyncio.create_task(self._beat(writer), name=f"beat {name[0]}")
            try:
                while (message := await frames.read()) is not None:
                    if isinstance(message, wire.Stats):
                        pulse.heard_at, pulse.speaks = self._clock(), True
                if not pulse.speaks:
                    raise wire.BadMessage("it left without an answer")
            finally:
                beat.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await beat
        finally:
            writer.close()

    @staticmethod
    async def _beat(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(wire.frame(wire.GetStats()))
            await writer.drain()
            await asyncio.sleep(BEAT_SECONDS)
