"""Lines of batches on their way: sent where there is room, answered, tried again, committed.

A line is a client (`inside`): it calls the endpoint's `Exchange`, the same that serves HTTP, and leaves like one
when its batch is cancelled, over or handed on. It is background work: requests never wait for it, in admission, at
the choice of a replica or in an engine. There are never more lines at a model than it computes at once beside its
requests, and one while no replica is ready, which asks for one.

What becomes of an answer:

- 200, and every refusal that would be the same next time: it is the line's answer;
- 429 for a limit of its owner: the batch rests for as long as that says, others go on;
- any other 429, 503, 507 and an engine's death: the model is left alone for a while, longer each time, and the
  line goes behind the others of its model; a fault of ours (500) likewise, but only `FAULTS` times. A line whose
  engine died goes first, so that it is soon known whether the engine died of it. One that seems so (`quarantine`)
  is put aside until that is forgotten, since engines are also killed from outside; the second time it is the
  line's answer.

**Exactly once.** A line counts as done when its answer is committed, in groups of what came within
`GATHER_SECONDS`; then, and only then, it is not sent again. A router that is killed loses what was not committed,
and the next one sends those lines again. A line may so be computed twice; it is answered once, since its row in
`answers` is keyed by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from quire.errors import ModelNotFound, ModelStopped, StorageUnavailable
from quire.router import quarantine
from quire.router.access import BUDGET_SPENT, EVERYBODY, OF_LINES, RATE_LIMITED
from quire.router.batches import Answer, Batch, Batches, Plan, lines_without_answer
from quire.router.exchange import Exchange
from quire.router.files import Files, read_bytes
from quire.router.fleet import ServedModel
from quire.router.formats import Format
from quire.router.gateway import Gateway
from quire.router.inside import InsideClient
from quire.router.spans import RequestSpans
from quire.router.traffic import Asked
from quire_schemas.openai.batches import LineResponse, OutputLine, read_line

log = logging.getLogger("quire.router")

GATHER_SECONDS: Final = 0.02
"""How long an answer waits for others to be committed with it."""
AGAIN_SECONDS: Final = 1.0
"""Until the next try to commit what the disk has refused."""
ROOM_SECONDS: Final = 0.1
"""Between two looks for room at the models."""
PAUSES: Final = (0.25, 15.0)
"""Seconds that a model is left alone when a line could not be answered, and the most that doubling makes of it."""
LONGEST_REST: Final = 60.0
"""Seconds after which a batch whose owner is at a limit looks again, which may have been raised."""
FAULTS: Final = 3
QUARANTINES: Final = 2
QUARANTINE_SECONDS: Final = quarantine.REMEMBERED_SECONDS + 5.0
MAX_AT_ONCE: Final = 512
"""Lines on their way, of all models."""
MAX_UNCOMMITTED: Final = 200
"""Answers in memory: no line is sent while so many wait for the disk."""


class _Usage(msgspec.Struct):
    """Of any endpoint: responses have names of their own."""

    prompt_tokens: int = 0
    input_tokens: int = 0
    completion_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: dict[str, int] = {}
    input_tokens_details: dict[str, int] = {}


class _Told(msgspec.Struct):
    code: str | None = None


class _Refusal(msgspec.Struct):
    error: _Told


class _Answered(msgspec.Struct):
    usage: _Usage | None = None


@dataclass(slots=True, eq=False)
class Work:
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
    rests_until: float = 0.0
    """It sends no line before, by the monotonic clock."""
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
class Again:
    """A line has no answer yet. `first`: it goes before the others of its model; `after` so many seconds. Its
    batch sends no other for `rest` seconds: its owner is at a limit, and other batches are not."""

    first: bool = False
    after: float = 0.0
    rest: float = 0.0


@dataclass(slots=True)
class _Pause:
    until: float = 0.0
    seconds: float = 0.0


class Lines:
    """The lines of all batches that this process works off.

    `begin` makes a task of that name, which the owner ends. `send` and `commit` go on for ever; both may be begun
    again after they failed.
    """

    def __init__(
        self,
        gateway: Gateway,
        spans: RequestSpans,
        files: Files,
        batches: Batches,
        formats: Mapping[str, Format[Any]],
        begin: Callable[[Awaitable[None], str], None],
    ) -> None:
        self.draining = False
        """No line is begun any more."""
        self._gateway = gateway
        self._fleet = gateway.fleet
        self._spans = spans
        self._files = files
        self._batches = batches
        self._formats = formats
        self._begin = begin
        self._turns: deque[Work] = deque()
        """Those whose lines are to be sent; whose turn it is comes first."""
        self._held: dict[str, int] = {}
        """By model, sequences of lines that are on the way."""
        self._pauses: dict[str, _Pause] = {}
        self._fresh: list[tuple[Work, Answer]] = []
        """Answers that are to be committed."""
        self._room = asyncio.Event()
        self._answered = asyncio.Event()

    @property
    def batches(self) -> int:
        """How many have lines to be sent."""
        return len(self._turns)

    async def work_off(self, work: Work) -> None:
        """Have the lines of a batch sent until each has its answer on the disk, or the batch is over."""
        self._turns.append(work)
        self._room.set()
        try:
            await work.until(lambda: work.left == 0 or work.over)
        finally:
            self._turns.remove(work)
        await work.until(lambda: work.on_the_way == 0)

    async def send(self) -> None:
        """Send lines wherever there is room, one of each batch in turn."""
        while True:
            self._room.clear()
            while not self.draining and self._send_one():
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
            rests = work.over or time.monotonic() < work.rests_until
            rests = rests or not self._fleet.access.has_place(work.batch.owner, work.batch.owner_key)
            for _ in range(0 if rests else len(work.lanes)):
                name, lines = work.lanes[0]
                work.lanes.rotate(-1)
                if lines and self._has_room(name, work.plan.sequences[lines[0]]):
                    line = lines.popleft()
                    work.on_the_way += 1
                    self._begin(self._line(work, line, name), "line")
                    return True
        return False

    def _has_room(self, name: str, sequences: int) -> bool:
        served = self._next_for(name)
        key = served.route.model if served is not None else name
        pause, held = self._pauses.get(key), self._held.get(key, 0)
        if pause is not None and time.monotonic() < pause.until:
            return False
        if served is None or not served.ready or not held:
            return not held  # one asks for a replica, and one that is wider than what there is goes alone
        return held + sequences <= served.slots - (served.in_flight - served.background)

    def _next_for(self, name: str) -> ServedModel | None:
        """The model that a line for this name would go to now. Where weights decide, another request may take the
        turn before it, and the line goes elsewhere."""
        try:
            return self._fleet.resolve(Asked(name), EVERYBODY)  # whether its owner may is asked when it is sent
        except (ModelNotFound, ModelStopped):
            return None

    async def _line(self, work: Work, line: int, name: str) -> None:
        served = self._next_for(name)
        key = served.route.model if served is not None else name
        sequences = work.plan.sequences[line]
        self._held[key] = self._held.get(key, 0) + sequences
        came: Answer | Again = Again()
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

    async def _aside(self, work: Work, line: int, again: Again) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(again.after):
                await work.gone.wait()
        self._put_back(work, line, again)

    def _put_back(self, work: Work, line: int, again: Again) -> None:
        work.put_back(line, first=again.first)
        work.on_the_way -= 1
        work.changed.set()
        self._room.set()

    async def _answer(self, work: Work, line: int, key: str) -> Answer | Again:
        """Ask for the answer of a line."""
        batch, plan = work.batch, work.plan
        path = self._files.path(batch.input_file_id)
        text = await asyncio.to_thread(read_bytes, path, plan.offsets[line], plan.lengths[line])
        custom_id, body = read_line(text, batch.endpoint)
        visit = self._fleet.access.inside(batch.owner, batch.owner_key, OF_LINES[batch.endpoint])
        client = InsideClient(batch.endpoint, body, work.gone, visit)
        form = self._formats[batch.endpoint]
        await client.ask(Exchange(self._gateway, self._spans, form, background=True))
        if client.status is None:
            return Again()  # it left
        if (later := again(work, line, client)) is not None:
            if later.rest:
                work.rests_until = max(work.rests_until, time.monotonic() + later.rest)
            elif not later.after:
                self._leave_alone(key)
            return later
        self._pauses.pop(key, None)
        whole = bytes(client.body)
        ok = client.status == 200
        response = LineResponse(client.status, client.request_id, msgspec.Raw(whole))
        made = encoded(OutputLine(request_id(), custom_id, response, None))
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

    async def commit(self) -> None:
        """Commit answers, as they come."""
        while True:
            await self._answered.wait()
            await asyncio.sleep(GATHER_SECONDS)
            try:
                await self.commit_once()
            except StorageUnavailable:  # they are kept, and no more are asked for once there are many
                await asyncio.sleep(AGAIN_SECONDS)

    async def commit_once(self) -> None:
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


def again(work: Work, line: int, client: InsideClient) -> Again | None:
    """How a line is tried again that may have another answer then; None when what came is its answer."""
    if client.status == 429 and (after := client.headers.get(b"retry-after-ms")) is not None and _is_limit(client):
        return Again(first=True, rest=min(int(after) / 1000, LONGEST_REST))
    if client.status in (429, 503, 507):
        return Again()
    quarantined = client.status == 502 and client.headers.get(b"x-should-retry") == b"false"
    if client.status == 502 and not quarantined:
        return Again(first=True)
    if client.status == 500 or quarantined:
        work.faults[line] = work.faults.get(line, 0) + 1
        if work.faults[line] < (QUARANTINES if quarantined else FAULTS):
            return Again(after=QUARANTINE_SECONDS if quarantined else 0.0)
    return None


def _is_limit(client: InsideClient) -> bool:
    """Whether its owner has had as much as he may for now, rather than its model no room."""
    return msgspec.json.decode(bytes(client.body), type=_Refusal).error.code in (RATE_LIMITED, BUDGET_SPENT)


def request_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def encoded(line: OutputLine) -> bytes:
    return msgspec.json.encode(line) + b"\n"
