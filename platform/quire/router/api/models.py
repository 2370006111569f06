"""`GET /v1/models` and `/v1/models/{id}`: each name that requests may use.

Both APIs have these paths. Anthropic's clients name the version that they speak in a header, and are answered in
the shapes that they read.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from litestar import Request, get
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from quire.errors import Api, InvalidRequest
from quire.router.api.query import unknown, whole
from quire.router.api.reply import Reply, named
from quire.router.fleet import Fleet, ServedModel
from quire_schemas.anthropic import MAX_MODELS_LISTED, MODELS_LISTED, ModelInfo, ModelPage
from quire_schemas.openai.models import ModelCard, ModelList


def all_models(fleet: Fleet) -> bytes:
    """The list, as JSON."""
    cards = [_card(name, served) for name, served in sorted(fleet.models.items())]
    return ModelList(data=cards).model_dump_json().encode()


def one_model(fleet: Fleet, name: str) -> bytes:
    """One entry, as JSON. Raises `ModelNotFound`."""
    return _card(name, fleet.resolve(name)).model_dump_json().encode()


def page_of_models(fleet: Fleet, query: Mapping[str, str]) -> bytes:
    """A page of the list for Anthropic's clients, as JSON. Raises `InvalidRequest`."""
    names = sorted(fleet.models)
    limit = whole(query, "limit", MODELS_LISTED, MAX_MODELS_LISTED)
    after, before = query.get("after_id"), query.get("before_id")
    if after is not None and before is not None:
        raise InvalidRequest("'after_id' and 'before_id' exclude each other.", param="after_id")
    if before is not None:
        found = [name for name in names if name < before]
        page = found[-limit:]
    else:
        found = [name for name in names if after is None or name > after]
        page = found[:limit]
    return msgspec.json.encode(
        ModelPage(
            data=[_info(name, fleet.models[name]) for name in page],
            has_more=len(found) > len(page),
            first_id=page[0] if page else None,
            last_id=page[-1] if page else None,
        )
    )


def _card(name: str, served: ServedModel) -> ModelCard:
    route = served.route
    return ModelCard(id=name, created=route.created, root=f"model/{route.model}", max_model_len=_context(served))


def _info(name: str, served: ServedModel) -> ModelInfo:
    created = datetime.fromtimestamp(served.route.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return ModelInfo(id=name, display_name=name, created_at=created, max_input_tokens=_context(served))


def _context(served: ServedModel) -> int:
    return min(served.route.max_model_len, served.route.kv_tokens)


def _is_anthropic(request: Request[Any, Any, Any]) -> bool:
    return Api.of(request.scope["path"], request.scope["headers"]) is Api.ANTHROPIC


def routes(fleet: Fleet) -> list[HTTPRouteHandler]:
    """What `/v1/models` answers."""

    @get("/v1/models")
    async def list_models(request: Request[Any, Any, Any]) -> ASGIApp:
        query = dict(request.query_params)
        if _is_anthropic(request):
            return Reply(200, page_of_models(fleet, query))
        if (strange := next(iter(query), None)) is not None and not fleet.table.http.ignore_unknown:
            raise unknown(strange, ())
        return Reply(200, all_models(fleet))

    @get("/v1/models/{name:path}")
    async def get_model(request: Request[Any, Any, Any]) -> ASGIApp:
        name = named(request, "name").removeprefix("/")  # names may have slashes, as hubs' do
        if _is_anthropic(request):
            return Reply(200, msgspec.json.encode(_info(name, fleet.resolve(name))))
        return Reply(200, one_model(fleet, name))

    return [list_models, get_model]
