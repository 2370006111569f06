"""`GET /v1/models` and `/v1/models/{id}`: each name that requests may use, of Models and of Routes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from litestar import Request, get
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from quire.errors import ModelStopped
from quire.router.access import ANY, Caller, visit_of
from quire.router.api.reply import Reply, named
from quire.router.fleet import Fleet
from quire.router.traffic import Asked
from quire_schemas.openai.models import ModelCard, ModelList

Headers = Sequence[tuple[bytes, bytes]]


def all_models(fleet: Fleet, headers: Headers, caller: Caller) -> bytes:
    """The list, as JSON: names that the caller may use with these headers, as long as a model is behind them."""
    cards = []
    for name in fleet.names(headers, caller):
        with contextlib.suppress(ModelStopped):
            cards.append(_card(fleet, Asked(name, headers), caller))
    return ModelList(data=cards).model_dump_json().encode()


def one_model(fleet: Fleet, name: str, headers: Headers, caller: Caller) -> bytes:
    """One entry, as JSON. Raises `PermissionDenied`, `ModelNotFound`, and `ModelStopped` where no model is behind
    the name."""
    return _card(fleet, Asked(name, headers), caller).model_dump_json().encode()


def _card(fleet: Fleet, asked: Asked, caller: Caller) -> ModelCard:
    """A name that a Route gives leads to several models: what it takes is what all of them take."""
    route, served = fleet.traffic.route_for(asked), [fleet.resolve(asked, caller)]
    if route is not None:
        served = [fleet.by_model[model] for model in fleet.traffic.behind(route)]
    return ModelCard(
        id=asked.name,
        created=served[0].route.created if route is None else route.created,
        root=f"model/{served[0].route.model}" if route is None else f"route/{route.route}",
        max_model_len=min(min(each.route.max_model_len, each.route.kv_tokens) for each in served),
    )


def routes(fleet: Fleet) -> list[HTTPRouteHandler]:
    """What `/v1/models` answers."""

    @get("/v1/models", operation=ANY)
    async def list_models(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, all_models(fleet, list(request.scope["headers"]), visit_of(request.scope).known))

    @get("/v1/models/{name:path}", operation=ANY)
    async def get_model(request: Request[Any, Any, Any]) -> ASGIApp:
        name = named(request, "name").removeprefix("/")  # names may have slashes, as hubs' do
        return Reply(200, one_model(fleet, name, list(request.scope["headers"]), visit_of(request.scope).known))

    return [list_models, get_model]
