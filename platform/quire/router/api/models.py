"""`GET /v1/models` and `/v1/models/{id}`: each name that requests may use."""

from __future__ import annotations

from typing import Any

from litestar import Request, get
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from quire.router.access import ANY, Caller, visit_of
from quire.router.api.reply import Reply, named
from quire.router.fleet import Fleet, ServedModel
from quire_schemas.openai.models import ModelCard, ModelList


def all_models(fleet: Fleet, caller: Caller) -> bytes:
    """The list of what the caller may use, as JSON."""
    cards = [_card(name, served) for name, served in sorted(fleet.models.items()) if caller.may_use(name)]
    return ModelList(data=cards).model_dump_json().encode()


def one_model(fleet: Fleet, name: str, caller: Caller) -> bytes:
    """One entry, as JSON. Raises `PermissionDenied` and `ModelNotFound`."""
    return _card(name, fleet.resolve(name, caller)).model_dump_json().encode()


def _card(name: str, served: ServedModel) -> ModelCard:
    route = served.route
    return ModelCard(
        id=name,
        created=route.created,
        root=f"model/{route.model}",
        max_model_len=min(route.max_model_len, route.kv_tokens),
    )


def routes(fleet: Fleet) -> list[HTTPRouteHandler]:
    """What `/v1/models` answers."""

    @get("/v1/models", operation=ANY)
    async def list_models(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, all_models(fleet, visit_of(request.scope).known))

    @get("/v1/models/{name:path}", operation=ANY)
    async def get_model(request: Request[Any, Any, Any]) -> ASGIApp:
        name = named(request, "name").removeprefix("/")  # names may have slashes, as hubs' do
        return Reply(200, one_model(fleet, name, visit_of(request.scope).known))

    return [list_models, get_model]
