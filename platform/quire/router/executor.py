"""Works off batches: each line goes the road of a client's request, behind everybody who waits for an answer.

A line is a client (`inside`): it calls the endpoint's `Exchange`, the same that serves HTTP, and leaves like one
when its batch is cancelled, over or handed on. It is background work: requests never wait for it, in admission, at
the choice of a replica or in an engine. There are never more lines at a model than it computes at once beside its
requests, and one while no replica is ready, which asks for one.

What becomes of an answer:

- 200, and every refusal that would be the same next time: it is the line's answer;
- 429, 503, 507 and an engine's death: the model is left alone for a while, longer each time, and the line goes
  behind the others of its model; a fault of ours (500) likewise, but only `FAULTS` times. A line whose engine died
  goes first, so that it is soon known whether the engine died of it. One that seems so (`quarantine`) is put aside
  until that is forgotten, since engines are also killed from outside; the second time it is the line's answer;
- the batch's window ends, or it is cancelled: lines without an answer are told so in the error file.

**Exactly once.** A line counts as done when its answer is committed, in groups of what came within
`GATHER_SECONDS`; then, and only then, it is not sent again. A router that is killed loses what was not committed,
and the next one sends those lines again. A line may so be computed twice; it is answered once, since its row in
`answers` is keyed by it. When all lines are done, the answers are written as files in the order of the input, and
one transaction gives the files their rows, takes the answers away and ends the batch.

**One executor.** Who holds the lock on a file in the store's folder works; every other router tries again each
second. The kernel takes the lock from a process that dies. Who is told to end begins no line any more, lets those
that run go on as long as it serves, and gives the lock up last.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import random
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from quire.errors import StorageUnavailable
from quire.router import quarantine
from quire.router.api.exchange import Exchange, Format
from quire.router.batch_input import Reading
from quire.router.batches import Answer, Batch, Batches, Plan, lines_without_answer
from quire.router.files import Files, read_bytes
from quire.router.gateway import Gateway
from quire.router.inside import InsideClient
from quire.router.spans import RequestSpans
from quire.router.store import Incoming, make
from quire_schemas.openai.batches import LineError, LineResponse, OutputLine, read_line

log = logging.getLogger("quire.router")

GATHER_SECONDS: Final = 0.02
"""How long an answer waits for others to be committed with it."""
LOOK_SECONDS: Final = 1.0
"""Between two looks at the store, for what other processes have changed there, and at the clock."""
SWEEP_SECONDS: Final = 60.0
ROOM_SECONDS: Final = 0.1
"""Between two looks for room at the models."""
PAUSES: Final = (0.25, 15.0)
"""Seconds that a model is left alone when a line could not be answered, and the most that doubling makes of it."""
FAULTS: Final = 3
QUARANTINES: Final = 2
QUARANTINE_SECONDS: Final = quarantine.REMEMBERED_SECONDS + 5.0
BEGUN_AGAIN_SECONDS: Final = 1.0
"""After which a part of the executor that has failed begins again."""
WORKED_AT_ONCE: Final = 16
"""Batches; later ones begin when an earlier one is done."""
MAX_AT_ONCE: Final = 512
"""Lines on their way, of all models."""
MAX_UNCOMMITTED: Final = 200
"""Answers in memory: no line is sent while so many wait for the disk."""
EXPORTED_AT_ONCE: Final = 16
"""Answers: each may have some megabytes."""
_WORDS: Final = {
    "expired": LineError(
        "batch_expired", "This request could not be executed before the completion window expired."
    ),
    "cancelled": LineError("batch_cancelled", "The batch was cancelled before this request was executed."),
}
"""By how a batch ended, what is said of its lines without an answer."""


class _Usage(msgspec.Struct):
    """Of any endpoint: responses have names of their own."""

    prompt_tokens: int = 0
    input_tokens: int = 0
    completion_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: dict[str, int] = {}
    input_tokens_details: dict[str, int] = {}


class _Answered(msgspec.Struct):
    usage: _Usage | None = None


@dataclass(slots=True, eq=False)
class _Work:
    """One batch that this process works off."""

    batch: Batch
    plan: Plan = field(default_factory=Plan)
    lanes: deque[tuple[str, deque[int]]] = field(default_factory=deque)
    """By model, its lines that are to be sent; the model whose turn it is comes first."""
    left: int = 0
    """Lines without a committed answer."""
    on_the_way: int = 0
    """Lines that are sent, and answers that are not committed."""
    faults: dict[int, int] = field(default_factory=dict)
    over: bool = False
    """It was cancelled, or its window has ended."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Who is on the way leaves: the batch is over, or this process is."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def fill(self, plan: Plan, answered: set[int]) -> None:
        lanes: dict[int, deque[int]] = {}
        for line in lines_without_answer(plan, answered):
            lanes.setdefault(plan.of_model[line], deque()).append(line)
        self.plan = plan
        self.lanes = deque((plan.models[at], lines) for at, lines in lanes.items())
        self.left = len(plan) - len(answered)

    def put_back(self, line: int, *, first: bool) -> None:
        """Before or behind the other lines of its model."""
        name = self.plan.models[self.plan.of_model[line]]
        lines = next(lines for model, lines in self.lanes if model == name)
        (lines.appendleft if first else lines.append)(line)

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():
            self.changed.clear()
            await self.changed.wait()


@dataclass(frozen=True, slots=True)
class _Again:
    """A line has no answer yet. `first`: it goes before the others of its model; `after` so many seconds."""

    first: bool = False
    after: float = 0.0


@dataclass(slots=True)
class _Pause:
    until: float = 0.0
    seconds: float = 0.0


class Beside(Protocol):
    """Other work of the one router that works off batches."""

    async def resume(self) -> None:
        """Go on with what a router before has left."""

    async def sweep(self) -> None:
        """Forget what nobody may ask for any more."""

    async def close(self) -> None:
        """End, and leave what is not done to the next router."""


class Executor:
    """The batches of one store, on the models of one fleet.

    `formats` are those of the endpoints, by path; `beside` is what else goes by this router's lock.
    """

    def __init__(
        self,
        gateway: Gateway,
        spans: RequestSpans,
        files: Files,
        batches: Batches,
        formats: Mapping[str, Format[Any]],
        beside: Sequence[Beside] = (),
    ) -> None:
        self.formats = formats
        self._beside = beside
        self._gateway = gateway
        self._fleet = gateway.fleet
        self._spans = spans
        self._files = files
        self._batches = batches
        self._works: dict[str, _Work] = {}
        self._turns: deque[_Work] = deque()
        """Those whose lines are to be sent; whose turn it is comes first."""
        self._held: dict[str, int] = {}
        """By model, sequences of lines that are on the way."""
        self._pauses: dict[str, _Pause] = {}
        self._fresh: list[tuple[_Work, Answer]] = []
        """Answers that are to be committed."""
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._answered = asyncio.Event()
        self._validating = asyncio.Lock()
        self._draining = False
        self._swept_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[None] | None = None

    # ── its life ──────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        self._main = asyncio.create_task(self._run(), name="batches")

    def wake(self) -> None:
        """A batch was made or cancelled."""
        self._news.set()

    def drain(self) -> None:
        """Begin no line any more."""
        self._draining = True

    async def close(self) -> None:
        """Let those on the way leave, commit what has come, give the lock up, and close the store."""
        self._draining = True
        for work in self._works.values():
            work.gone.set()
        for each in self._beside:  # while this router has the lock
            await each.close()
        if self._main is not None:
            self._main.cancel()
            await asyncio.wait([self._main])
        await self._batches.store.close()

    async def _run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(await self._lock())
            log.info("this router works off batches")
            stack.push_async_callback(self._leave)
            for part in (self._send, self._commit, *(each.resume for each in self._beside)):
                self._begin(self._kept_up(part))
            while True:
                self._news.clear()
                try:
                    await self._look()
                except StorageUnavailable:
                    pass  # it is in the log, and looked at again
                except Exception:
                    log.exception("the batches could not be looked at")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._news.wait()

    async def _leave(self) -> None:
        """The end of all that was begun; what has come is committed."""
        others = {task for task in self._tasks if task.get_name() != "line"}
        for task in others:
            task.cancel()
        for work in self._works.values():
            work.gone.set()
        if self._tasks:
            await asyncio.wait(self._tasks)
        with contextlib.suppress(StorageUnavailable):
            await self._commit_once()

    async def _lock(self) -> contextlib.AbstractContextManager[None]:
        """Wait until no other process works off batches."""
        path = self._batches.store.folder / "lock"
        while True:
            try:
                make(path.parent)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError:
                await asyncio.sleep(LOOK_SECONDS)  # the first who wants to keep something is told why
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                await asyncio.sleep(LOOK_SECONDS)
                continue
            return _closing(descriptor)

    async def _kept_up(self, part: Callable[[], Awaitable[None]]) -> None:
        """Carry a part of the executor to its end; whenever it fails, it begins again."""
        while True:
            try:
                return await part()
            except Exception:
                log.exception("the executor of batches failed, and goes on")
            await asyncio.sleep(BEGUN_AGAIN_SECONDS)

    def _begin(self, work: Awaitable[None], name: str = "") -> None:
        async def carried() -> None:
            await work

        task = asyncio.create_task(carried(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the executor of batches failed", exc_info=error)

    # ── one batch from its beginning to its end ───────────────────────────────────────────────────────────

    async def _look(self) -> None:
        """See what there is to do, and which batches are over."""
        if self._draining:
            return
        now = self._batches.store.clock()
        for batch in await self._batches.live():
            work = self._works.get(batch.id)
            over = batch.status == "cancelling" or now >= batch.expires_at
            if work is None:
                if len(self._works) >= WORKED_AT_ONCE and not over:
                    continue
                work = self._works[batch.id] = _Work(batch)
                self._begin(self._carry(work))
            if over:
                work.over = True
                work.gone.set()
                work.changed.set()
        self._fleet.metrics.batches_running.set(len(self._turns))
        if now - self._swept_at >= SWEEP_SECONDS:
            self._swept_at = now
            await self._batches.sweep()
            for each in self._beside:
                await each.sweep()
            if expired := await self._files.sweep():
                log.info("%d files have expired", expired)

    async def _carry(self, work: _Work) -> None:
        pause = 1.0
        while True:
            try:
                await self._carry_once(work)
            except StorageUnavailable:
                pass  # it is in the log
            except Exception:
                log.exception("batch %s: a step failed, and is tried again", work.batch.id)
            else:
                break
            await asyncio.sleep(pause)
            pause = min(pause * 2, 60.0)
        del self._works[work.batch.id]

    async def _carry_once(self, work: _Work) -> None:
        work.batch = await self._batches.get(work.batch.id)
        if work.batch.status == "validating":
            await self._validate(work)
        if work.batch.status == "in_progress":
            await self._work_off(work)
        if work.batch.status in ("finalizing", "cancelling"):
            await self._export(work)

    async def _validate(self, work: _Work) -> None:
        async with self._validating:  # one takes half of the interpreter's time
            await self._validate_alone(work)

    async def _validate_alone(self, work: _Work) -> None:
        batch = work.batch
        settings = self._fleet.table.http
        try:
            reading = Reading(
                self._files.path(batch.input_file_id),
                batch.endpoint,
                self.formats[batch.endpoint],
                max_body=settings.max_body_bytes,
                ignore_unknown=settings.ignore_unknown,
            )
        except FileNotFoundError:
            gone = {"code": "file_not_found", "message": "The input is gone.", "param": None, "line": None}
            work.batch = await self._batches.fail(batch.id, [gone])
            return
        try:
            while not work.over and await asyncio.to_thread(reading.go_on):
                await asyncio.sleep(0.002)
        finally:
            reading.close()
        if reading.errors:
            work.batch = await self._batches.fail(batch.id, reading.errors)
            log.info("batch %s: its input has %d errors", batch.id, len(reading.errors))
        elif work.over:  # it was cancelled, or expires with nothing to say of its lines
            work.batch = await self._batches.begin(batch.id, Plan())
        else:
            work.batch = await self._batches.begin(batch.id, reading.plan)
            log.info("batch %s: %d lines for %s", batch.id, len(reading.plan), batch.endpoint)

    async def _work_off(self, work: _Work) -> None:
        work.fill(*await self._batches.plan(work.batch.id))
        self._turns.append(work)
        self._room.set()
        try:
            await work.until(lambda: work.left == 0 or work.over)
        finally:
            self._turns.remove(work)
        await work.until(lambda: work.on_the_way == 0)
        work.batch = await self._batches.finalize(work.batch.id)

    async def _export(self, work: _Work) -> None:
        """Write the answers as files, and end the batch."""
        batch = work.batch
        plan, answered = await self._batches.plan(batch.id)
        complete = len(answered) == len(plan) and batch.status == "finalizing" and len(plan) > 0
        status = "cancelled" if batch.status == "cancelling" else "completed" if complete else "expired"
        async with self._files.incoming() as (output_id, output), self._files.incoming() as (error_id, errors):
            for first in range(0, len(plan), EXPORTED_AT_ONCE):
                lines = range(first, min(first + EXPORTED_AT_ONCE, len(plan)))
                told = await self._batches.answers(batch.id, lines)
                await asyncio.to_thread(self._write, work, plan, lines, told, status, output, errors)
            for file in (output, errors):
                if file.size:
                    await asyncio.to_thread(file.keep)
            work.batch = await self._batches.end(batch, status, (output_id, output.size), (error_id, errors.size))
        done = work.batch
        log.info("batch %s: %s, %d completed, %d failed", done.id, done.status, done.completed, done.failed)

    def _write(
        self,
        work: _Work,
        plan: Plan,
        lines: Sequence[int],
        told: Mapping[int, tuple[bool, bytes]],
        status: str,
        output: Incoming,
        errors: Incoming,
    ) -> None:
        """Write what `lines` came to. Blocks."""
        path = self._files.path(work.batch.input_file_id)
        for line in lines:
            ok, text = told.get(line, (False, b""))
            if not text and path.exists():
                whole = read_bytes(path, plan.offsets[line], plan.lengths[line])
                custom_id, _ = read_line(whole, work.batch.endpoint)
                text = _encoded(OutputLine(_request_id(), custom_id, None, _WORDS[status]))
            elif not text:  # somebody took it away
                log.error("batch %s: its input is gone, and line %d has no name", work.batch.id, line + 1)
            if text:
                (output if ok else errors).write(text)

    # ── lines ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _send(self) -> None:
        """Send lines wherever there is room, one of each batch in turn."""
        while True:
            self._room.clear()
            while not self._draining and self._send_one():
                began = time.monotonic()
                await asyncio.sleep(0)  # who came in meanwhile goes first,
                await asyncio.sleep(time.monotonic() - began)  # and half of the loop's time is left to others
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROOM_SECONDS if self._turns else None):
                    await self._room.wait()

    def _send_one(self) -> bool:
        """Send a line of the first batch that has one which there is room for; whether there was one."""
        if sum(self._held.values()) >= MAX_AT_ONCE or len(self._fresh) >= MAX_UNCOMMITTED:
            return False
        if not self._fleet.table.version:
            return False  # nothing is served because nobody has said yet what
        for work in list(self._turns):
            self._turns.rotate(-1)
            for _ in range(0 if work.over else len(work.lanes)):
                name, lines = work.lanes[0]
                work.lanes.rotate(-1)
                if lines and self._has_room(name, work.plan.sequences[lines[0]]):
                    line = lines.popleft()
                    work.on_the_way += 1
                    self._begin(self._line(work, line, name), "line")
                    return True
        return False

    def _has_room(self, name: str, sequences: int) -> bool:
        served = self._fleet.models.get(name)
        key = served.route.model if served is not None else name
        pause, held = self._pauses.get(key), self._held.get(key, 0)
        if pause is not None and time.monotonic() < pause.until:
            return False
        if served is None or not served.ready or not held:
            return not held  # one asks for a replica, and one that is wider than what there is goes alone
        return held + sequences <= served.slots - (served.in_flight - served.background)

    async def _line(self, work: _Work, line: int, name: str) -> None:
        served = self._fleet.models.get(name)
        key = served.route.model if served is not None else name
        sequences = work.plan.sequences[line]
        self._held[key] = self._held.get(key, 0) + sequences
        came: Answer | _Again = _Again()
        try:
            came = await self._answer(work, line, key)
        except StorageUnavailable:
            self._leave_alone(key)
        except Exception:
            log.exception("batch %s: line %d failed", work.batch.id, line + 1)
            self._leave_alone(key)
        finally:
            self._held[key] -= sequences
            if not self._held[key]:
                del self._held[key]
            if isinstance(came, Answer):
                self._fresh.append((work, came))
                self._answered.set()
            elif came.after:
                self._begin(self._aside(work, line, came), "line")
            else:
                self._put_back(work, line, came)
            self._room.set()

    async def _aside(self, work: _Work, line: int, again: _Again) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(again.after):
                await work.gone.wait()
        self._put_back(work, line, again)

    def _put_back(self, work: _Work, line: int, again: _Again) -> None:
        work.put_back(line, first=again.first)
        work.on_the_way -= 1
        work.changed.set()
        self._room.set()

    async def _answer(self, work: _Work, line: int, key: str) -> Answer | _Again:
        """Ask for the answer of a line."""
        batch, plan = work.batch, work.plan
        path = self._files.path(batch.input_file_id)
        text = await asyncio.to_thread(read_bytes, path, plan.offsets[line], plan.lengths[line])
        custom_id, body = read_line(text, batch.endpoint)
        client = InsideClient(batch.endpoint, body, work.gone)
        form = self.formats[batch.endpoint]
        await Exchange(self._gateway, self._spans, form, background=True)(
            client.scope,  # type: ignore[arg-type]
            client.receive,  # type: ignore[arg-type]
            client.send,
        )
        if client.status is None:
            return _Again()  # it left
        if (later := again(work, line, client)) is not None:
            if not later.after:
                self._leave_alone(key)
            return later
        self._pauses.pop(key, None)
        whole = bytes(client.body)
        ok = client.status == 200
        response = LineResponse(client.status, client.request_id, msgspec.Raw(whole))
        made = _encoded(OutputLine(_request_id(), custom_id, response, None))
        usage = msgspec.json.decode(whole, type=_Answered).usage if ok else None
        if usage is None:
            return Answer(batch.id, line, ok, made)
        read, said = usage.prompt_tokens + usage.input_tokens, usage.completion_tokens + usage.output_tokens
        cached = (usage.prompt_tokens_details | usage.input_tokens_details).get("cached_tokens", 0)
        return Answer(batch.id, line, ok, made, read, cached, said)

    def _leave_alone(self, key: str) -> None:
        """Send the model no line for a while, longer each time, until one is answered."""
        pause, now = self._pauses.setdefault(key, _Pause()), time.monotonic()
        if now < pause.until:
            return  # it was sent before the one that brought the pause
        pause.seconds = min(max(pause.seconds * 2, PAUSES[0]), PAUSES[1])
        pause.until = now + pause.seconds * random.uniform(0.8, 1.2)  # noqa: S311 (jitter, not a secret)

    # ── answers ───────────────────────────────────────────────────────────────────────────────────────────

    async def _commit(self) -> None:
        while True:
            await self._answered.wait()
            await asyncio.sleep(GATHER_SECONDS)
            try:
                await self._commit_once()
            except StorageUnavailable:  # they are kept, and no more are asked for once there are many
                await asyncio.sleep(LOOK_SECONDS)

    async def _commit_once(self) -> None:
        """Commit what has come. What the disk refuses is kept for another try."""
        self._answered.clear()
        fresh, self._fresh = self._fresh, []
        if not fresh:
            return
        try:
            await self._batches.add_answers([answer for _, answer in fresh])
        except BaseException:
            self._fresh = fresh + self._fresh
            self._answered.set()
            raise
        for work, answer in fresh:
            self._fleet.metrics.batch_lines["completed" if answer.ok else "failed"].inc()
            work.left -= 1
            work.on_the_way -= 1
            work.changed.set()


def again(work: _Work, line: int, client: InsideClient) -> _Again | None:
    """How a line is tried again that may have another answer then; None when what came is its answer."""
    if client.status in (429, 503, 507):
        return _Again()
    quarantined = client.status == 502 and client.headers.get(b"x-should-retry") == b"false"
    if client.status == 502 and not quarantined:
        return _Again(first=True)
    if client.status == 500 or quarantined:
        work.faults[line] = work.faults.get(line, 0) + 1
        if work.faults[line] < (QUARANTINES if quarantined else FAULTS):
            return _Again(after=QUARANTINE_SECONDS if quarantined else 0.0)
    return None


def _request_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def _encoded(line: OutputLine) -> bytes:
    return msgspec.json.encode(line) + b"\n"


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)
