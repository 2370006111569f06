"""`/v1/batches`: what is asked of a batch, and how one is shown. Its work is the executor's."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from litestar import Request, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from quire.errors import InvalidRequest
from quire.router.access import OF_LINES, visit_of
from quire.router.api.query import cursor, whole
from quire.router.api.reply import Reply, named, owner_of
from quire.router.batches import PREFIX, Batch, Batches
from quire.router.fleet import Fleet
from quire.router.reception import ClientGone, read_body, send_json
from quire_schemas import wire
from quire_schemas.openai.batches import (
    BATCHES_LISTED,
    MAX_BATCHES_LISTED,
    BatchList,
    BatchObject,
    read_create,
)
from quire_schemas.openai.body import BadRequest

_SHOWN: Final = (
    "id", "endpoint", "model", "input_file_id", "completion_window", "status", "output_file_id", "error_file_id",
    "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
    "cancelling_at", "cancelled_at",
)  # fmt: skip


class Create:
    """Answers `POST /v1/batches`. Call it as an ASGI application."""

    def __init__(
        self, batches: Batches, paths: Collection[str], wake: Callable[[], None], settings: wire.HttpSettings
    ) -> None:
        """`paths` are those that lines may be for; `wake` tells whoever works off batches."""
        self._batches = batches
        self._paths = paths
        self._wake = wake
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(dict(scope["headers"]), receive, self._settings)
            asked = read_create(body, self._settings.ignore_unknown)
        except BadRequest as error:
            raise InvalidRequest(error.message, param=error.param) from None
        except ClientGone:
            return
        caller = visit_of(scope).known
        if asked.endpoint not in self._paths:
            paths = ", ".join(sorted(self._paths))
            raise InvalidRequest(f"'endpoint' must be one of: {paths}.", param="endpoint")
        caller.check_operation(OF_LINES[asked.endpoint])
        made = await self._batches.create(asked, caller.owner, caller.key)
        self._wake()
        await send_json(send, shown(made))


def shown(batch: Batch) -> bytes:
    """A batch as JSON."""
    return batch_object(batch).model_dump_json().encode()


def batch_object(batch: Batch) -> BatchObject:
    fields: dict[str, Any] = {name: getattr(batch, name) for name in _SHOWN}
    usage = None
    if batch.completed:
        usage = {
            "input_tokens": batch.input_tokens,
            "input_tokens_details": {"cached_tokens": batch.cached_tokens},
            "output_tokens": batch.output_tokens,
            "output_tokens_details": {},
            "total_tokens": batch.input_tokens + batch.output_tokens,
        }
    return BatchObject.model_validate(
        {
            **fields,
            "errors": None if batch.errors is None else {"data": json.loads(batch.errors)},
            "metadata": None if batch.metadata is None else json.loads(batch.metadata),
            "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
            "usage": usage,
        }
    )


async def listed(batches: Batches, owner: str, query: Mapping[str, str]) -> bytes:
    """Answer to `GET /v1/batches`. Raises `InvalidRequest`."""
    found, more = await batches.page(
        owner, whole(query, "limit", BATCHES_LISTED, MAX_BATCHES_LISTED), cursor(query, PREFIX)
    )
    answer = BatchList(
        data=[batch_object(each) for each in found],
        first_id=found[0].id if found else None,
        last_id=found[-1].id if found else None,
        has_more=more,
    )
    return answer.model_dump_json().encode()


async def one(batches: Batches, owner: str, batch_id: str) -> bytes:
    return shown(await batches.get(batch_id, owner))


async def cancelled(batches: Batches, wake: Callable[[], None], owner: str, batch_id: str) -> bytes:
    batch = await batches.cancel(batch_id, owner)
    wake()
    return shown(batch)


def routes(
    batches: Batches, paths: Collection[str], wake: Callable[[], None], fleet: Fleet
) -> list[HTTPRouteHandler]:
    """What `/v1/batches` answers."""

    @post("/v1/batches", operation="batches")
    async def create_batch() -> ASGIApp:
        return Create(batches, paths, wake, fleet.table.http)

    @get("/v1/batches", operation="batches")
    async def list_batches(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await listed(batches, owner_of(request), dict(request.query_params)))

    @get("/v1/batches/{batch_id:str}", operation="batches")
    async def get_batch(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await one(batches, owner_of(request), named(request, "batch_id")))

    @post("/v1/batches/{batch_id:str}/cancel", operation="batches")
    async def cancel_batch(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await cancelled(batches, wake, owner_of(request), named(request, "batch_id")))

    return [create_batch, list_batches, get_batch, cancel_batch]
