"""`GET /v1/models` and `/v1/models/{id}`: each name that requests may use."""

from __future__ import annotations

from quire.router.fleet import Fleet, ServedModel
from quire_schemas.openai.models import ModelCard, ModelList


def all_models(fleet: Fleet) -> bytes:
    """The list, as JSON."""
    cards = [_card(name, served) for name, served in sorted(fleet.models.items())]
    return ModelList(data=cards).model_dump_json().encode()


def one_model(fleet: Fleet, name: str) -> bytes:
    """One entry, as JSON. Raises `ModelNotFound`."""
    return _card(name, fleet.resolve(name)).model_dump_json().encode()


def _card(name: str, served: ServedModel) -> ModelCard:
    route = served.route
    return ModelCard(
        id=name,
        created=route.created,
        root=f"model/{route.model}",
        max_model_len=min(route.max_model_len, route.kv_tokens),
    )
