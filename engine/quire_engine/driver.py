"""The thread that owns the engine: it loads it, steps it, and is the only one that ever touches it.

Commands wait in an inbox and are carried out between two steps, all that are there; what a pass gave leaves as one
`Output` through a callback, together with a `Stats` when one is due. With nothing to compute the thread sleeps on
its inbox. It never waits for a reader: the other side keeps what it cannot send. Nor does it wait for a grammar:
a request with a constraint is taken in when that is compiled, which happens in another thread.

`Stats` is due when somebody asked (after `Hello`, `Limits` and `GetStats`), and otherwise at most four times a
second as long as something changes; the last one before the thread goes to sleep shows the idle engine.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quire_engine.errors import InvalidSpec, RequestRefused, StartError
from quire_schemas.wire import Delta, EngineSpec, Generate, Limits, Stats

if TYPE_CHECKING:
    from quire_engine.engine import Engine
    from quire_engine.grammar import Grammar

log = logging.getLogger(__name__)

STATS_INTERVAL = 0.25
"""Seconds between two reports that nobody asked for."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The engine is in memory and has generated a token."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    seconds: float
    backend: str
    backend_lacking: str
    batch_invariant: bool


@dataclass(frozen=True, slots=True)
class Output:
    """What one pass gave."""

    step: int
    deltas: list[Delta]
    stats: Stats | None


@dataclass(frozen=True, slots=True)
class Died:
    """The thread has ended and not because it was told to."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class _Add:
    message: Generate
    received_at: float


@dataclass(frozen=True, slots=True)
class _Compiled:
    """An `_Add` whose constraint is done with, one way or the other."""

    message: Generate
    received_at: float
    grammar: Future[Grammar]


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Report:
    pass


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Add | _Compiled | _Abort | Limits | _Report | _Stop


@dataclass(slots=True)
class _Due:
    """When the next `Stats` is to be sent."""

    asked: bool = False
    changed: bool = False
    last_at: float = field(default=float("-inf"))

    def now(self, now: float) -> bool:
        return self.asked or (self.changed and now - self.last_at >= STATS_INTERVAL)

    def sent(self, now: float) -> None:
        self.asked = self.changed = False
        self.last_at = now

    def patience(self, now: float) -> float | None:
        """Seconds that an idle thread may sleep; None for ever."""
        return max(self.last_at + STATS_INTERVAL - now, 0.0) if self.changed else None


def resident_bytes() -> int:
    """Memory of the host that this process has; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def spare_the_collector() -> None:
    """Let Python's cycle collector look at less, and less often: it would stand in the way of steps.

    What is there once a model is loaded stays. What a step makes is freed by its counts, for there are no cycles
    in it; a young collection every few hundred objects would find nothing, several times a step.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


class Driver:
    """A thread with an engine. `out` is called in that thread and must not block."""

    def __init__(self, spec: EngineSpec, out: Callable[[Loaded | Output | Died], None]) -> None:
        self._spec = spec
        self._out = out
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._due = _Due()
        self._compiling: set[str] = set()
        """Requests whose constraint is being compiled."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.progress = (0, 0)
        """Bytes of weights read, and all of them; 0 until known."""

    def start(self) -> None:
        self._thread.start()

    def add(self, message: Generate, received_at: float) -> None:
        """Start a request; a refusal comes back as its first and last delta."""
        self._inbox.put(_Add(message, received_at))

    def abort(self, request_id: str) -> None:
        self._inbox.put(_Abort(request_id))

    def set_limits(self, limits: Limits) -> None:
        """Apply hot knobs; the next stats show by their hash whether that was possible."""
        self._inbox.put(limits)

    def report(self) -> None:
        """Ask for stats now."""
        self._inbox.put(_Report())

    def stop(self, patience: float) -> bool:
        """End the thread after the step it is in. False if that takes longer than `patience` seconds."""
        if self._thread.ident is None:  # an engine that could not be made is ended, too
            return True
        self._inbox.put(_Stop())
        self._thread.join(patience)
        return not self._thread.is_alive()

    # ── in the thread ─────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            started = time.monotonic()
            # here and not above: torch takes seconds to import, and signals and a bad spec are heard meanwhile
            from quire_engine.engine import Engine
            from quire_engine.memory import bound_allocator

            bound_allocator(self._spec)
            engine = Engine.load(self._spec, self._on_progress)
            engine.grammars.prepare()
            engine.warm_up()
            spare_the_collector()
            if path := os.environ.get("QUIRE_SCHEDULE_TRACE"):
                try:
                    engine.record(Path(path))
                except OSError as error:
                    raise InvalidSpec(f"QUIRE_SCHEDULE_TRACE: {path}: {error.strerror}") from error
            seconds = time.monotonic() - started
            profile = engine.profile
            self._out(
                Loaded(
                    profile.vocab_size,
                    profile.eos_token_ids,
                    seconds,
                    engine.backend,
                    engine.backend_lacking,
                    engine.spec.batch_invariant,
                )
            )
            while self._pass(engine):
                pass
        except BaseException as error:  # noqa: BLE001 - reported, and the process ends by it
            self._out(Died(error))

    def _on_progress(self, done: int, total: int) -> None:
        self.progress = (done, total)

    def _pass(self, engine: Engine) -> bool:
        """Carry out what waits, compute a step, hand out the results. False when told to stop."""
        deltas: list[Delta] = []
        for command in self._commands(engine):
            if isinstance(command, _Stop):
                return False
            deltas += self._carry_out(engine, command)
        if engine.has_work:
            deltas += engine.step()
            self._due.changed = True
        now = time.monotonic()
        stats = None
        if self._due.now(now):
            stats = engine.stats()
            stats.deferred = len(self._compiling)
            stats.waiting += stats.deferred  # they wait for their turn, if not for a step
            stats.cpu_seconds, stats.resident_bytes = time.process_time(), resident_bytes()
            self._due.sent(now)
        if deltas or stats is not None:
            self._out(Output(engine.steps, deltas, stats))
        return True

    def _commands(self, engine: Engine) -> list[_Command]:
        """All that wait in the inbox; an idle thread sleeps until there is one or stats are due."""
        commands: list[_Command] = []
        try:
            if not engine.has_work:
                commands.append(self._inbox.get(timeout=self._due.patience(time.monotonic())))
            while True:
                commands.append(self._inbox.get_nowait())
        except queue.Empty:
            return commands

    def _carry_out(self, engine: Engine, command: _Add | _Compiled | _Abort | Limits | _Report) -> list[Delta]:
        self._due.changed = True
        match command:
            case _Add(message, received_at):
                structured = message.sampling.structured
                if structured is None:
                    return self._take_in(engine, message, received_at, None)
                self._compiling.add(message.id)
                engine.grammars.submit(structured).add_done_callback(
                    lambda done: self._inbox.put(_Compiled(message, received_at, done))
                )
            case _Compiled(message, received_at, grammar):
                if message.id in self._compiling:
                    self._compiling.remove(message.id)
                    return self._take_in(engine, message, received_at, grammar)
            case _Abort(request_id):
                self._compiling.discard(request_id)
                engine.abort(request_id)
            case Limits():
                self._due.asked = True
                try:
                    engine.set_limits(command)
                except StartError as error:
                    log.error("limits %s refused: %s", command.hot_hash, error)
            case _Report():
                self._due.asked = True
        return []

    def _take_in(
        self, engine: Engine, message: Generate, received_at: float, grammar: Future[Grammar] | None
    ) -> list[Delta]:
        """Add a request; a delta that ends it if that cannot be."""
        try:
            engine.add(message, received_at, None if grammar is None else grammar.result())
        except RequestRefused as refusal:
            code, text, param = refusal.code, str(refusal), refusal.param
            return [Delta(message.id, finish_reason="error", error_code=code, error=text, error_param=param)]
        except Exception as error:
            # the books are changed last, so nothing of it is in them: one request is no reason to end
            log.exception("request %s could not be taken in", message.id)
            text = f"the engine failed on this request: {type(error).__name__}"
            return [Delta(message.id, finish_reason="error", error_code="internal_error", error=text)]
        return []
