"""What every request to a model is made of: a shape without unknown fields, counts, token ids, prompts."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_INT: Final = 2**31 - 1
MAX_PROMPTS: Final = 64
MAX_INPUTS: Final = 2048
"""Of a request for vectors."""
MAX_MODEL_NAME: Final = 256
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Count = Annotated[int, Field(ge=1, le=MAX_INT)]


class Shape(BaseModel):
    """Strict and frozen, without fields that it does not know. A router serves sooner when its readers are made
    with the first request that needs them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


class ModelRequest(Shape):
    """What every request to a model has."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_MODEL_NAME)]


Prompt = str | list[int]
PromptsAsSent = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
)
"""What `read_prompts` reads, as the API's description has it."""


def read_prompts(value: object, most: int = MAX_PROMPTS) -> list[Prompt]:
    """`str | str[] | int[] | int[][]` as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if value == []:
        raise PydanticCustomError("prompt", "must not be empty")
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            found: list[Prompt] = list(value)
        elif are_ids(value):
            found = [value]
        elif all(isinstance(item, list) and are_ids(item) for item in value):
            found = list(value)
        else:
            raise PydanticCustomError(
                "prompt", "must be a string, a list of strings, token ids, or lists of token ids"
            )
        if len(found) > most:
            raise PydanticCustomError("prompt", f"must not have more than {most} prompts")
        return found
    raise PydanticCustomError("prompt", "must be a string, a list of strings, token ids, or lists of token ids")


def are_ids(value: list[Any]) -> bool:
    """Whether all of it could be token ids; true of an empty list."""
    return all(type(item) is int and 0 <= item <= MAX_INT for item in value)
