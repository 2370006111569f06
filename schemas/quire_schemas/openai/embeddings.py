"""`POST /v1/embeddings`: the request and the answer, which is long, so its shapes are Structs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from quire_schemas.openai.body import NOT_YET, Refusal, read
from quire_schemas.openai.request import MAX_INPUTS, Count, ModelRequest, Prompt, PromptsAsSent, read_prompts

EMBEDDING_REFUSED: Final[Mapping[str, Refusal]] = {
    "messages": Refusal("send texts or token ids as input"),
    "truncate_prompt_tokens": Refusal("an input is never cut short here; send a shorter one", (-1,)),
    "truncation_side": Refusal("an input is never cut short here"),
    "embed_dtype": Refusal("vectors are float32", ("float32",)),
    "endianness": Refusal("base64 has little-endian numbers", ("native", "little")),
    "use_activation": Refusal("vectors have length 1", (True,)),
    "padding": Refusal("inputs are not padded here", (False,)),
    "priority": Refusal(f"priorities of embeddings {NOT_YET}".replace("is not", "are not"), (0,)),
    "cache_salt": Refusal(f"it {NOT_YET} for embeddings"),
    "request_id": Refusal("send the header X-Request-Id"),
    "chat_template": Refusal("send texts or token ids as input"),
    "chat_template_kwargs": Refusal("send texts or token ids as input", ({},)),
    "add_generation_prompt": Refusal("send texts or token ids as input", (False,)),
    "continue_final_message": Refusal("send texts or token ids as input", (False,)),
    "stream": Refusal("vectors are not streamed", (False,)),
}


def _inputs(value: object) -> list[Prompt]:
    try:
        return read_prompts(value, MAX_INPUTS)
    except PydanticCustomError as error:
        raise PydanticCustomError("input", error.message().replace(" prompts", " inputs")) from None


class PooledFields(ModelRequest):
    """What requests take that have vectors made: which one is made of a text."""

    dimensions: Count | None = None
    """The leading ones alone, for models that were trained for it."""
    pooling: Literal["last", "mean"] | None = None
    """The state of the last token, as is the default, or the mean over all."""
    add_special_tokens: bool | None = None


class EmbeddingRequest(PooledFields):
    """Body of `POST /v1/embeddings`."""

    input: Annotated[list[Prompt], PlainValidator(_inputs, json_schema_input_type=PromptsAsSent)]
    encoding_format: Literal["float", "base64"] | None = None


def read_embedding(body: bytes, ignore_unknown: bool = False) -> EmbeddingRequest:
    """The embedding request in `body`. Raises `BadRequest`."""
    return read(body, EmbeddingRequest, EMBEDDING_REFUSED, ignore_unknown)


class Embedding(msgspec.Struct, kw_only=True):
    """The vector of one input: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: str | list[float]


class EmbeddingUsage(msgspec.Struct):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    """Answer to `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
