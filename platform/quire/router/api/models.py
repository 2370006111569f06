"""`GET /v1/models` and `/v1/models/{id}`: each name that requests may use, of Models and of Routes.

Both APIs have these paths. Anthropic's clients name the version that they speak in a header, and are answered in
the shapes that they read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from litestar import Request, get
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from quire.errors import Api, InvalidRequest, ModelStopped
from quire.router.access import ANY, Caller, visit_of
from quire.router.api.query import unknown, whole
from quire.router.api.reply import Reply, named
from quire.router.fleet import Fleet
from quire.router.traffic import Asked, adapter_of
from quire_schemas.anthropic import MAX_MODELS_LISTED, MODELS_LISTED, ModelInfo, ModelPage
from quire_schemas.openai.models import ModelCard, ModelList
from quire_schemas.wire import ADAPTER_MARK

Headers = Sequence[tuple[bytes, bytes]]


def all_models(fleet: Fleet, headers: Headers, caller: Caller) -> list[ModelCard]:
    """Names that the caller may use with these headers, as long as a model is behind them."""
    cards = []
    for name in fleet.names(headers, caller):
        with contextlib.suppress(ModelStopped):
            cards.append(one_model(fleet, Asked(name, headers), caller))
    return cards


def one_model(fleet: Fleet, asked: Asked, caller: Caller) -> ModelCard:
    """A name. One that a Route gives leads to several models: what it takes is what all of them take.

    Raises `PermissionDenied`, `ModelNotFound`, and `ModelStopped` where no model is behind the name.
    """
    route, served = fleet.traffic.route_for(asked), [fleet.resolve(asked, caller)]
    if route is not None:
        served = [fleet.targets[target] for target in fleet.traffic.behind(route)]
    adapter = adapter_of(fleet.way(asked, caller, ahead=True).model) if route is None else ""
    return ModelCard(
        id=asked.name,
        created=served[0].route.created if route is None else route.created,
        root=f"model/{served[0].route.model}" if route is None else f"route/{route.route}",
        parent=asked.name.removesuffix(f"{ADAPTER_MARK}{adapter}") if adapter else None,
        max_model_len=min(min(each.route.max_model_len, each.route.kv_tokens) for each in served),
    )


def page_of_models(cards: Sequence[ModelCard], query: Mapping[str, str]) -> ModelPage:
    """A page of the list for Anthropic's clients. Raises `InvalidRequest`."""
    limit = whole(query, "limit", MODELS_LISTED, MAX_MODELS_LISTED)
    after, before = query.get("after_id"), query.get("before_id")
    if after is not None and before is not None:
        raise InvalidRequest("'after_id' and 'before_id' exclude each other.", param="after_id")
    listed = sorted(cards, key=lambda card: card.id)
    if before is not None:
        found = [card for card in listed if card.id < before]
        page = found[-limit:]
    else:
        found = [card for card in listed if after is None or card.id > after]
        page = found[:limit]
    return ModelPage(
        data=[_info(card) for card in page],
        has_more=len(found) > len(page),
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
    )


def _info(card: ModelCard) -> ModelInfo:
    created = datetime.fromtimestamp(card.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return ModelInfo(id=card.id, display_name=card.id, created_at=created, max_input_tokens=card.max_model_len)


def _is_anthropic(request: Request[Any, Any, Any]) -> bool:
    return Api.of(request.scope["path"], request.scope["headers"]) is Api.ANTHROPIC


def routes(fleet: Fleet) -> list[HTTPRouteHandler]:
    """What `/v1/models` answers."""

    @get("/v1/models", operation=ANY)
    async def list_models(request: Request[Any, Any, Any]) -> ASGIApp:
        caller, headers = visit_of(request.scope).known, list(request.scope["headers"])
        query, cards = dict(request.query_params), all_models(fleet, headers, caller)
        if _is_anthropic(request):
            return Reply(200, msgspec.json.encode(page_of_models(cards, query)))
        if (strange := next(iter(query), None)) is not None and not fleet.table.http.ignore_unknown:
            raise unknown(strange, ())
        return Reply(200, ModelList(data=cards).model_dump_json().encode())

    @get("/v1/models/{name:path}", operation=ANY)
    async def get_model(request: Request[Any, Any, Any]) -> ASGIApp:
        name = named(request, "name").removeprefix("/")  # names may have slashes, as hubs' do
        card = one_model(fleet, Asked(name, list(request.scope["headers"])), visit_of(request.scope).known)
        if _is_anthropic(request):
            return Reply(200, msgspec.json.encode(_info(card)))
        return Reply(200, card.model_dump_json().encode())

    return [list_models, get_model]
