"""`GET /v1/models`."""

from __future__ import annotations

from typing import Literal

from quire_schemas.openai.answer import Answer


class ModelCard(Answer):
    """One served name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["quire"] = "quire"
    root: str
    """The resource behind the name: `model/<name>` or `route/<name>`."""
    parent: str | None = None
    """Of an adapter's name, the name of the model that it is added to."""
    max_model_len: int


class ModelList(Answer):
    """Answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
