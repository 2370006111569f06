"""Works off batches, behind everybody who waits for an answer.

Each has a task that takes it from its validation over its lines (`lines`) to the files that it leaves. When all
lines are done, or the window ends, or it is cancelled, the answers are written as files in the order of the
input; lines without an answer are told so in the error file. One transaction gives the files their rows, takes the
answers away and ends the batch.

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
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from quire.errors import StorageUnavailable
from quire.router.batch_input import Reading
from quire.router.batches import Batches, Plan
from quire.router.files import Files, read_bytes
from quire.router.formats import Format
from quire.router.gateway import Gateway
from quire.router.lines import Lines, Work, encoded, request_id
from quire.router.spans import RequestSpans
from quire.router.store import Incoming, make
from quire_schemas.openai.batches import LineError, OutputLine, read_line

log = logging.getLogger("quire.router")

LOOK_SECONDS: Final = 1.0
"""Between two looks at the store, for what other processes have changed there, and at the clock."""
SWEEP_SECONDS: Final = 60.0
BEGUN_AGAIN_SECONDS: Final = 1.0
"""After which a part of the executor that has failed begins again."""
WORKED_AT_ONCE: Final = 16
"""Batches; later ones begin when an earlier one is done."""
EXPORTED_AT_ONCE: Final = 16
"""Answers: each may have some megabytes."""
_WORDS: Final = {
    "expired": LineError(
        "batch_expired", "This request could not be executed before the completion window expired."
    ),
    "cancelled": LineError("batch_cancelled", "The batch was cancelled before this request was executed."),
}
"""By how a batch ended, what is said of its lines without an answer."""


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
        self._fleet = gateway.fleet
        self._files = files
        self._batches = batches
        self._lines = Lines(gateway, spans, files, batches, formats, self._begin)
        self._works: dict[str, Work] = {}
        self._news = asyncio.Event()
        self._validating = asyncio.Lock()
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
        self._lines.draining = True

    async def close(self) -> None:
        """Let those on the way leave, commit what has come, give the lock up, and close the store."""
        self._lines.draining = True
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
            for part in (self._lines.send, self._lines.commit, *(each.resume for each in self._beside)):
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
            await self._lines.commit_once()

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
        if self._lines.draining:
            return
        now = self._batches.store.clock()
        for batch in await self._batches.live():
            work = self._works.get(batch.id)
            over = batch.status == "cancelling" or now >= batch.expires_at
            if work is None:
                if len(self._works) >= WORKED_AT_ONCE and not over:
                    continue
                work = self._works[batch.id] = Work(batch)
                self._begin(self._carry(work))
            if over:
                work.over = True
                work.gone.set()
                work.changed.set()
        self._fleet.metrics.batches_running.set(self._lines.batches)
        if now - self._swept_at >= SWEEP_SECONDS:
            self._swept_at = now
            await self._batches.sweep()
            for each in self._beside:
                await each.sweep()
            if expired := await self._files.sweep():
                log.info("%d files have expired", expired)

    async def _carry(self, work: Work) -> None:
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

    async def _carry_once(self, work: Work) -> None:
        work.batch = await self._batches.read(work.batch.id)
        if work.batch.status == "validating":
            await self._validate(work)
        if work.batch.status == "in_progress":
            await self._work_off(work)
        if work.batch.status in ("finalizing", "cancelling"):
            await self._export(work)

    async def _validate(self, work: Work) -> None:
        async with self._validating:  # one takes half of the interpreter's time
            await self._validate_alone(work)

    async def _validate_alone(self, work: Work) -> None:
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

    async def _work_off(self, work: Work) -> None:
        work.fill(*await self._batches.plan(work.batch.id))
        await self._lines.work_off(work)
        work.batch = await self._batches.finalize(work.batch.id)

    async def _export(self, work: Work) -> None:
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
        work: Work,
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
                text = encoded(OutputLine(request_id(), custom_id, None, _WORDS[status]))
            elif not text:  # somebody took it away
                log.error("batch %s: its input is gone, and line %d has no name", work.batch.id, line + 1)
            if text:
                (output if ok else errors).write(text)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)
