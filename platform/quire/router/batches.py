"""Batches in the store: what each is to do, how far it is, and the answers it has.

    batches    a row each: what was asked for, its status, when it came to which, counts of its lines
    plans      where in the input each line is, and which model it is for (`Plan`); from validation to the end
    answers    a line of the output each, by the line of the input that it answers; until they are files

A line is answered when its row in `answers` is committed, and its key is the line: whatever is executed twice is
answered once. A status changes by compare-and-set, so that a cancellation and a step of the executor, which may be
another process, cannot undo each other.

    validating -> in_progress -> finalizing -> completed | expired
         |             |
         |             +-> cancelling -> cancelled         (also from validating)
         +-> failed
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from quire.errors import Conflict, InvalidRequest, NotFound, QueueFull
from quire.router.files import Files, page_of
from quire.router.store import METADATA, Store
from quire_schemas.openai.batches import KEPT_SECONDS, WINDOW_SECONDS, CreateBatch

BATCHES: Final = sa.Table(
    "batches",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("input_file_id", sa.Text, nullable=False),
    sa.Column("completion_window", sa.Text, nullable=False),
    sa.Column("metadata", sa.Text),
    sa.Column("output_expires_after", sa.Integer),
    sa.Column("model", sa.Text),
    sa.Column("errors", sa.Text),
    sa.Column("output_file_id", sa.Text),
    sa.Column("error_file_id", sa.Text),
    sa.Column("created_at", sa.Integer, nullable=False),
    sa.Column("in_progress_at", sa.Integer),
    sa.Column("expires_at", sa.Integer, nullable=False),
    sa.Column("finalizing_at", sa.Integer),
    sa.Column("completed_at", sa.Integer),
    sa.Column("failed_at", sa.Integer),
    sa.Column("expired_at", sa.Integer),
    sa.Column("cancelling_at", sa.Integer),
    sa.Column("cancelled_at", sa.Integer),
    sa.Column("total", sa.Integer, nullable=False, default=0),
    sa.Column("completed", sa.Integer, nullable=False, default=0),
    sa.Column("failed", sa.Integer, nullable=False, default=0),
    sa.Column("input_tokens", sa.Integer, nullable=False, default=0),
    sa.Column("cached_tokens", sa.Integer, nullable=False, default=0),
    sa.Column("output_tokens", sa.Integer, nullable=False, default=0),
    sa.Column("owner", sa.Text, nullable=False, server_default=""),
    sa.Column("owner_key", sa.Text, nullable=False, server_default=""),
)
PLANS: Final = sa.Table(
    "plans",
    METADATA,
    sa.Column("batch", sa.Text, primary_key=True),
    sa.Column("plan", sa.LargeBinary, nullable=False),
)
ANSWERS: Final = sa.Table(
    "answers",
    METADATA,
    sa.Column("batch", sa.Text, primary_key=True),
    sa.Column("line", sa.Integer, primary_key=True),
    sa.Column("ok", sa.Boolean, nullable=False),
    sa.Column("text", sa.LargeBinary, nullable=False),
)
PREFIX: Final = "batch_"
LIVE: Final = ("validating", "in_progress", "finalizing", "cancelling")
"""Those that the executor still has to do with."""
MAX_LIVE: Final = 1_000


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch's row. Times are unix seconds."""

    id: str
    status: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: str | None
    """As JSON, as are `errors`."""
    output_expires_after: int | None
    model: str | None
    errors: str | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    total: int
    completed: int
    failed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    owner: str
    """The tenant who may see it, and in whose name its lines are sent; "" is everybody, where there are none."""
    owner_key: str
    """The name of the key that made it."""


COLUMNS: Final = [BATCHES.c[each.name] for each in fields(Batch)]


class _Packed(msgspec.Struct, array_like=True):
    models: list[str]
    offsets: bytes
    lengths: bytes
    of_model: bytes
    sequences: bytes


@dataclass(slots=True)
class Plan:
    """Where each line of an input is (bytes of the file), which of `models` it is for, and how many sequences it
    takes."""

    models: list[str] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    of_model: array[int] = field(default_factory=lambda: array("H"))
    sequences: array[int] = field(default_factory=lambda: array("H"))

    def __len__(self) -> int:
        return len(self.offsets)

    def packed(self) -> bytes:
        columns = (self.offsets, self.lengths, self.of_model, self.sequences)
        return msgspec.msgpack.encode(_Packed(self.models, *(column.tobytes() for column in columns)))

    @classmethod
    def unpacked(cls, packed: bytes) -> Plan:
        found = msgspec.msgpack.decode(packed, type=_Packed)
        plan = cls(found.models)
        plan.offsets.frombytes(found.offsets)
        plan.lengths.frombytes(found.lengths)
        plan.of_model.frombytes(found.of_model)
        plan.sequences.frombytes(found.sequences)
        return plan


@dataclass(frozen=True, slots=True)
class Answer:
    """What one line of the input came to: a line of the output file (`ok`) or of the error file."""

    batch: str
    line: int
    """From 0."""
    ok: bool
    text: bytes
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Batches:
    """The batches of one store."""

    def __init__(self, store: Store, files: Files) -> None:
        self.store = store
        self._files = files
        files.holds.append(_holder)

    # ── for clients ───────────────────────────────────────────────────────────────────────────────────────

    async def create(self, asked: CreateBatch, owner: str, key: str) -> Batch:
        """Raises `InvalidRequest` for an input that there is not, `QueueFull` when too many are not done, and
        `StorageFull`."""

        def write(db: sa.Connection) -> Batch:
            try:
                file = self._files.find(db, asked.input_file_id, owner)
            except NotFound:
                raise InvalidRequest(
                    "'input_file_id' is the id of no file that is here.", param="input_file_id"
                ) from None
            if file.purpose != "batch":
                raise InvalidRequest(
                    f"'input_file_id' is a file whose purpose is '{file.purpose}', not 'batch'.",
                    param="input_file_id",
                )
            live = db.scalar(sa.select(sa.func.count()).where(BATCHES.c.status.in_(LIVE)))
            if live is not None and live >= MAX_LIVE:
                raise QueueFull(f"{live} batches are not done, as many as are taken.", retry_after=60.0)
            self.store.check_room()
            now = int(self.store.clock())
            expiry = asked.output_expires_after
            made = {
                "id": self.store.new_id(PREFIX),
                "status": "validating",
                "endpoint": asked.endpoint,
                "input_file_id": asked.input_file_id,
                "completion_window": asked.completion_window,
                "metadata": None if asked.metadata is None else json.dumps(asked.metadata),
                "output_expires_after": None if expiry is None else expiry.seconds,
                "created_at": now,
                "expires_at": now + WINDOW_SECONDS,
                "owner": owner,
                "owner_key": key,
            }
            db.execute(sa.insert(BATCHES).values(made))
            return _find(db, str(made["id"]))

        return await self.store.run(write)

    async def get(self, batch_id: str, owner: str) -> Batch:
        """Raises `NotFound`, also for somebody else's."""
        return await self.store.run(lambda db: _find(db, batch_id, owner))

    async def page(self, owner: str, limit: int, after: str | None) -> tuple[list[Batch], bool]:
        """Up to `limit` batches of the owner's behind the one with the id `after`, the newest first; whether more
        follow."""

        def read(db: sa.Connection) -> tuple[list[Batch], bool]:
            rows = page_of(
                db, sa.select(*COLUMNS).where(BATCHES.c.owner == owner), BATCHES, limit, after, newest_first=True
            )
            return [_batch(row) for row in rows[:limit]], len(rows) > limit

        return await self.store.run(read)

    async def cancel(self, batch_id: str, owner: str) -> Batch:
        """Have a batch end early; what it has stays. Raises `NotFound`, and `Conflict` when it is too late."""

        def write(db: sa.Connection) -> Batch:
            found = _find(db, batch_id, owner)
            if found.status == "cancelling":
                return found
            if found.status not in ("validating", "in_progress"):
                raise Conflict(f"A batch that is {found.status} cannot be cancelled.", param="batch_id")
            return self._move(db, batch_id, found.status, "cancelling")

        return await self.store.run(write)

    # ── for the executor ──────────────────────────────────────────────────────────────────────────────────

    async def live(self) -> list[Batch]:
        """All that are not done, the oldest first."""
        query = sa.select(*COLUMNS).where(BATCHES.c.status.in_(LIVE)).order_by(BATCHES.c.id)
        return await self.store.run(lambda db: [_batch(row) for row in db.execute(query)])

    async def read(self, batch_id: str) -> Batch:
        """As it is now, whoever's it is."""
        return await self.store.run(lambda db: _find(db, batch_id))

    async def begin(self, batch_id: str, plan: Plan) -> Batch:
        """A validated batch goes on by `plan`; one that was cancelled meanwhile stays as it is."""
        packed = plan.packed()

        def write(db: sa.Connection) -> Batch:
            if _find(db, batch_id).status != "validating":
                return _find(db, batch_id)
            db.execute(sa.insert(PLANS).values(batch=batch_id, plan=packed))
            model = plan.models[0] if len(plan.models) == 1 else None
            return self._move(db, batch_id, "validating", "in_progress", total=len(plan), model=model)

        return await self.store.run(write)

    async def fail(self, batch_id: str, errors: Sequence[dict[str, Any]]) -> Batch:
        """The input is none of a batch's; one that was cancelled meanwhile stays as it is."""

        def write(db: sa.Connection) -> Batch:
            found = _find(db, batch_id)
            if found.status != "validating":
                return found
            return self._move(db, batch_id, "validating", "failed", errors=json.dumps(list(errors)))

        return await self.store.run(write)

    async def plan(self, batch_id: str) -> tuple[Plan, set[int]]:
        """A batch's plan, and the lines that have their answer; an empty plan if it never had one."""

        def read(db: sa.Connection) -> tuple[bytes | None, set[int]]:
            packed = db.scalar(sa.select(PLANS.c.plan).where(PLANS.c.batch == batch_id))
            return packed, set(db.scalars(sa.select(ANSWERS.c.line).where(ANSWERS.c.batch == batch_id)))

        packed, answered = await self.store.run(read)
        return Plan() if packed is None else Plan.unpacked(packed), answered

    async def add_answers(self, answers: Sequence[Answer]) -> None:
        """Commit them all; a line that has its answer keeps that. Raises `StorageFull`, too: none is committed."""

        def write(db: sa.Connection) -> None:
            self.store.check_room()
            for each in answers:
                row = insert(ANSWERS).values(batch=each.batch, line=each.line, ok=each.ok, text=each.text)
                if db.execute(row.on_conflict_do_nothing()).rowcount == 0:
                    continue
                of = BATCHES.c
                count = of.completed if each.ok else of.failed
                gained = {
                    count.name: count + 1,
                    "input_tokens": of.input_tokens + each.input_tokens,
                    "cached_tokens": of.cached_tokens + each.cached_tokens,
                    "output_tokens": of.output_tokens + each.output_tokens,
                }
                db.execute(sa.update(BATCHES).where(of.id == each.batch).values(gained))

        await self.store.run(write)

    async def answers(self, batch_id: str, lines: range) -> dict[int, tuple[bool, bytes]]:
        """The answers of those of `lines` that have one: whether it is for the output file, and its text."""
        query = sa.select(ANSWERS.c.line, ANSWERS.c.ok, ANSWERS.c.text).where(
            ANSWERS.c.batch == batch_id, ANSWERS.c.line >= lines.start, ANSWERS.c.line < lines.stop
        )
        return await self.store.run(lambda db: {row[0]: (row[1], row[2]) for row in db.execute(query)})

    async def finalize(self, batch_id: str) -> Batch:
        """No more lines are to come; a batch that was cancelled meanwhile stays so."""

        def write(db: sa.Connection) -> Batch:
            found = _find(db, batch_id)
            if found.status != "in_progress":
                return found
            return self._move(db, batch_id, "in_progress", "finalizing")

        return await self.store.run(write)

    async def end(self, before: Batch, status: str, output: tuple[str, int], errors: tuple[str, int]) -> Batch:
        """The end of a batch. `output` and `errors` are id and size of files whose bytes are kept; one without
        bytes is none."""

        def write(db: sa.Connection) -> Batch:
            if _find(db, before.id).status != before.status:
                return _find(db, before.id)
            ids: dict[str, str] = {}
            for kind, (file_id, size) in (("output", output), ("error", errors)):
                if size:
                    name = f"{before.id}_{kind}.jsonl"
                    after = before.output_expires_after
                    self._files.insert(db, file_id, "batch_output", name, size, after, before.owner)
                    ids[f"{kind}_file_id"] = file_id
            db.execute(sa.delete(ANSWERS).where(ANSWERS.c.batch == before.id))
            db.execute(sa.delete(PLANS).where(PLANS.c.batch == before.id))
            return self._move(db, before.id, before.status, status, **ids)

        return await self.store.run(write)

    async def sweep(self) -> None:
        """Forget batches that ended long ago."""
        limit = self.store.clock() - KEPT_SECONDS
        ended = [BATCHES.c[f"{word}_at"] for word in ("completed", "failed", "expired", "cancelled")]
        old = sa.func.coalesce(*ended) <= limit
        await self.store.run(lambda db: db.execute(sa.delete(BATCHES).where(old)))

    def _move(self, db: sa.Connection, batch_id: str, before: str, status: str, **values: Any) -> Batch:
        values[f"{status}_at"] = int(self.store.clock())
        db.execute(
            sa.update(BATCHES)
            .where(BATCHES.c.id == batch_id, BATCHES.c.status == before)
            .values(status=status, **values)
        )
        return _find(db, batch_id)


def lines_without_answer(plan: Plan, answered: set[int]) -> Iterator[int]:
    """In the input's order."""
    return (line for line in range(len(plan)) if line not in answered)


def _find(db: sa.Connection, batch_id: str, owner: str | None = None) -> Batch:
    found = db.execute(sa.select(*COLUMNS).where(BATCHES.c.id == batch_id)).one_or_none()
    if found is None or owner not in (None, found.owner):
        raise NotFound("There is no such batch.", param="batch_id")
    return _batch(found)


def _batch(row: sa.Row[Any]) -> Batch:
    return Batch(**dict(row._mapping))


def _holder(db: sa.Connection, file_id: str) -> str | None:
    """The batch that still reads a file, if one does."""
    query = sa.select(BATCHES.c.id).where(BATCHES.c.input_file_id == file_id, BATCHES.c.status.in_(LIVE)).limit(1)
    found = db.scalar(query)
    return None if found is None else f"the batch {found}"
