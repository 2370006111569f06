"""Responses that are kept: to be read again, and gone on from.

A response has a row with what was new in it, the items of its request and of its answer; the conversation before
it is that of its predecessor, whose id it has. So a long conversation takes no more room than its turns, and who
deletes a response cuts off what goes on from it. Items have rows of their own: requests may name them one by one.

What a request goes on from is bounded as a body is, in bytes: a few names may stand for much.

A response in the background has its request, too, until it has ended: whoever works off what is in the background
begins it again after a crash. Once it is cancelled nothing else becomes of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from quire.errors import Conflict, InvalidRequest, NotFound
from quire.router.store import METADATA, Store
from quire_schemas.openai.body import shown
from quire_schemas.openai.chat import MAX_MESSAGES
from quire_schemas.openai.responses import (
    Item,
    ItemReference,
    ItemTextPart,
    MessageItem,
    ResponseError,
    ResponseObject,
    read_items,
    write_items,
)

PREFIX: Final = "resp_"
KEPT_SECONDS: Final = 30 * 86400
"""How long a response is kept."""
RESPONSES: Final = sa.Table(
    "responses",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("created_at", sa.Integer, nullable=False),
    sa.Column("previous_id", sa.Text),
    sa.Column("input", sa.LargeBinary, nullable=False),
    sa.Column("output", sa.LargeBinary, nullable=False),
    sa.Column("answer", sa.LargeBinary, nullable=False),
    sa.Column("request", sa.LargeBinary),
    sa.Column("owner", sa.Text, nullable=False, server_default=""),
    sa.Column("owner_key", sa.Text, nullable=False, server_default=""),
)
"""`input` and `output` are items, `answer` is what clients read, `request` is there while there is work to do.
`owner` is the tenant who may see it, "" where there are none, and `owner_key` the name of his key."""
ITEMS: Final = sa.Table(
    "response_items",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("response_id", sa.Text, nullable=False, index=True),
    sa.Column("item", sa.LargeBinary, nullable=False),
)
_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Waiting:
    """A response that is to be worked on."""

    id: str
    size: int
    """Bytes of its request."""


@dataclass(frozen=True, slots=True)
class Started:
    """What there is to do for a response, and for whom."""

    request: bytes
    owner: str
    key: str


@dataclass(frozen=True, slots=True)
class Context:
    """The conversation that a request goes on from, and its own items with those in place that it refers to."""

    before: list[Item]
    own: list[Item]
    size: int
    """Bytes that were read for it; those of an item as often as it is named."""
    first: str | None = None
    """The response that the conversation began with, if there is one before."""


class Responses:
    """The responses of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def new_id(self) -> str:
        return self.store.new_id(PREFIX)

    async def begin(
        self, response: ResponseObject, request: bytes, given: Sequence[Item], owner: str, key: str
    ) -> None:
        """Keep a response in the background that is to be worked on. `request` is its body, `given` its input."""
        row = _row(response, given, (), owner, key) | {"request": request}
        await self.store.run(lambda db: db.execute(sa.insert(RESPONSES).values(row)))

    async def keep(self, response: ResponseObject, given: Sequence[Item], owner: str, key: str) -> bytes:
        """Keep a response as it is now; what is kept of it, which is no other once it has ended."""
        return await self.store.run(lambda db: _keep(db, response, given, owner, key))

    async def start(self, response_id: str) -> Started | None:
        """Somebody works on it now: its request, or None where it has ended. Raises `NotFound`."""

        def write(db: sa.Connection) -> Started | None:
            row = _one(db, response_id)
            if row.request is None:
                return None
            found = _decoded(row.answer)
            if found.status == "queued":
                found.status = "in_progress"
                changed = sa.update(RESPONSES).where(RESPONSES.c.id == response_id)
                db.execute(changed.values(answer=_encode(found)))
            return Started(bytes(row.request), row.owner, row.owner_key)

        return await self.store.run(write)

    async def fail(self, response_id: str, error: ResponseError) -> None:
        """End a response that cannot be answered."""

        def write(db: sa.Connection) -> None:
            found = _decoded(_one(db, response_id).answer)
            if found.status in ("queued", "in_progress"):
                found.status, found.error = "failed", error
                _end(db, found)

        await self.store.run(write)

    async def cancel(self, response_id: str, owner: str) -> bytes:
        """End a response in the background. Raises `NotFound`, and `Conflict` for any other."""

        def write(db: sa.Connection) -> bytes:
            found = _decoded(_one(db, response_id, owner).answer)
            if not found.background:
                raise Conflict("Only a response in the background can be cancelled.")
            if found.status in ("queued", "in_progress"):
                found.status = "cancelled"
                _end(db, found)
            return _encode(found)

        return await self.store.run(write)

    async def get(self, response_id: str, owner: str) -> bytes:
        """The response as JSON. Raises `NotFound`, also for somebody else's."""
        return await self.store.run(lambda db: bytes(_one(db, response_id, owner).answer))

    async def delete(self, response_id: str, owner: str) -> None:
        """Keep it no more. Raises `NotFound`, and `Conflict` while it is worked on."""

        def write(db: sa.Connection) -> None:
            if _one(db, response_id, owner).request is not None:
                raise Conflict("The response is being worked on. Cancel it first.")
            _delete(db, [response_id])

        await self.store.run(write)

    async def input_of(self, response_id: str, owner: str) -> list[Item]:
        """The items of its request. Raises `NotFound`."""
        return await self.store.run(lambda db: read_items(_one(db, response_id, owner).input))

    async def context(self, previous_id: str | None, given: Sequence[Item], most: int, owner: str) -> Context:
        """What a request of the owner's is to be understood by. Raises `InvalidRequest`, also above `most`
        bytes."""
        names = _names(given)
        if previous_id is None and not names:
            return Context([], list(given), 0)

        def read(db: sa.Connection) -> Context:
            named, size = _named(db, names, owner, most)
            before, size, first = _conversation(db, previous_id, owner, size, most)
            return Context(before, _resolved(given, named), size, first)

        return await self.store.run(read)

    async def resolved(self, given: Sequence[Item], owner: str) -> list[Item]:
        """The items with those of the owner's in place that they refer to. Raises `InvalidRequest`."""
        names = _names(given)
        if not names:
            return list(given)
        return await self.store.run(lambda db: _resolved(given, _named(db, names, owner)[0]))

    async def waiting(self) -> list[Waiting]:
        """Those that are to be worked on, the oldest first."""
        size = sa.func.length(RESPONSES.c.request).label("size")
        query = sa.select(RESPONSES.c.id, size).where(RESPONSES.c.request.is_not(None))
        found = await self.store.run(lambda db: db.execute(query.order_by(RESPONSES.c.id)).all())
        return [Waiting(row.id, row.size) for row in found]

    async def sweep(self) -> int:
        """Forget those whose time is over; how many there were."""
        oldest = int(self.store.clock()) - KEPT_SECONDS
        query = sa.select(RESPONSES.c.id).where(RESPONSES.c.created_at < oldest, RESPONSES.c.request.is_(None))

        def write(db: sa.Connection) -> int:
            found = list(db.scalars(query.limit(1000)))
            _delete(db, found)
            return len(found)

        return await self.store.run(write)


def _row(
    response: ResponseObject, given: Sequence[Item], said: Sequence[Item], owner: str, key: str
) -> dict[str, Any]:
    return {
        "id": response.id,
        "created_at": response.created_at,
        "previous_id": response.previous_response_id,
        "input": write_items(given),
        "output": write_items(said),
        "answer": _encode(response),
        "request": None,
        "owner": owner,
        "owner_key": key,
    }


def _keep(db: sa.Connection, response: ResponseObject, given: Sequence[Item], owner: str, key: str) -> bytes:
    found = db.scalar(sa.select(RESPONSES.c.answer).where(RESPONSES.c.id == response.id))
    if found is not None:
        begun = _decoded(found)
        if begun.status not in ("queued", "in_progress"):
            return bytes(found)
        response.created_at = begun.created_at
    said = [_without_scores(item) for item in read_items(_encode(response.output))]
    row = _row(response, given, said, owner, key)
    db.execute(insert(RESPONSES).values(row).on_conflict_do_update(index_elements=["id"], set_=row))
    made = [
        {"id": item.id, "response_id": response.id, "item": write_items([item])}
        for item in said
        if item.id is not None
    ]
    if made:
        db.execute(insert(ITEMS).on_conflict_do_nothing(), made)
    return bytes(row["answer"])


def _end(db: sa.Connection, response: ResponseObject) -> None:
    changed = {"answer": _encode(response), "request": None}
    db.execute(sa.update(RESPONSES).where(RESPONSES.c.id == response.id).values(changed))


def _delete(db: sa.Connection, ids: Iterable[str]) -> None:
    gone = list(ids)
    db.execute(sa.delete(ITEMS).where(ITEMS.c.response_id.in_(gone)))
    db.execute(sa.delete(RESPONSES).where(RESPONSES.c.id.in_(gone)))


def _one(db: sa.Connection, response_id: str, owner: str | None = None) -> sa.Row[Any]:
    found = db.execute(sa.select(RESPONSES).where(RESPONSES.c.id == response_id)).first()
    if found is None or owner not in (None, found.owner):
        raise NotFound("There is no such response, or it is not kept any more.")
    return found


def _decoded(answer: bytes) -> ResponseObject:
    return msgspec.json.decode(answer, type=ResponseObject)


def _without_scores(item: Item) -> Item:
    """An item of an answer for whoever goes on from it."""
    if not isinstance(item, MessageItem) or isinstance(item.content, str):
        return item
    parts = [
        part.model_copy(update={"logprobs": None}) if isinstance(part, ItemTextPart) else part
        for part in item.content
    ]
    return item.model_copy(update={"content": parts})


_TURN: Final = sa.select(
    RESPONSES.c.input,
    RESPONSES.c.output,
    RESPONSES.c.previous_id,
    RESPONSES.c.request.is_not(None).label("is_open"),
)


def _conversation(
    db: sa.Connection, last: str | None, owner: str, size: int, most: int
) -> tuple[list[Item], int, str | None]:
    """All that was said up to a response of the owner's, its own answer included, its bytes added to `size`, and
    the first response of it."""
    turns: list[list[Item]] = []
    at, first = last, last
    while at is not None:
        row = db.execute(_TURN.where(RESPONSES.c.id == at, RESPONSES.c.owner == owner)).first()
        if row is None:
            gone = "is gone" if turns else "does not exist, or is not kept any more"
            raise InvalidRequest(
                f"The response '{shown(at)}' that this goes on from {gone}.", param="previous_response_id"
            )
        if row.is_open:
            raise InvalidRequest(f"The response '{shown(at)}' is not complete yet.", param="previous_response_id")
        size += len(row.input) + len(row.output)
        if size > most:
            raise InvalidRequest(
                f"What the request goes on from has more than {most} bytes, the limit of a body.",
                param="previous_response_id",
            )
        turns.append([*read_items(row.input), *read_items(row.output)])
        if sum(map(len, turns)) > MAX_MESSAGES:
            raise InvalidRequest(
                f"The conversation has more than {MAX_MESSAGES} items.", param="previous_response_id"
            )
        first, at = at, row.previous_id
    return [item for turn in reversed(turns) for item in turn], size, first


def _names(given: Sequence[Item]) -> Counter[str]:
    """The ids of the items that are referred to, and how often each is."""
    return Counter(item.id for item in given if isinstance(item, ItemReference))


def _named(
    db: sa.Connection, names: Counter[str], owner: str, most: float = math.inf
) -> tuple[dict[str, Item], int]:
    """The owner's items by their ids, and the bytes that they take together, each as often as it is named."""
    if not names:
        return {}, 0
    query = sa.select(ITEMS.c.id, sa.func.length(ITEMS.c.item))
    mine = query.join(RESPONSES, RESPONSES.c.id == ITEMS.c.response_id).where(RESPONSES.c.owner == owner)
    sizes = {row[0]: row[1] for row in db.execute(mine.where(ITEMS.c.id.in_(names)))}
    missing = next((each for each in names if each not in sizes), None)
    if missing is not None:
        raise InvalidRequest(f"There is no item '{shown(missing)}' that is kept.", param="input")
    size = sum(count * sizes[name] for name, count in names.items())
    if size > most:
        raise InvalidRequest(
            f"The items that 'input' refers to have more than {most} bytes, the limit of a body.",
            param="input",
        )
    rows = db.execute(sa.select(ITEMS.c.id, ITEMS.c.item).where(ITEMS.c.id.in_(names))).all()
    return {row.id: read_items(row.item)[0] for row in rows}, size


def _resolved(given: Sequence[Item], named: Mapping[str, Item]) -> list[Item]:
    """The items with those in place that they refer to."""
    return [named[item.id] if isinstance(item, ItemReference) else item for item in given]
