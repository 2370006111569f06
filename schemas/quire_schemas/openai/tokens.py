"""`POST /tokenize` and `POST /detokenize`: a text or a conversation as the ids that a model reads, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from pydantic import AfterValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from quire_schemas.openai.body import OF_CALLERS, Refusal, read, standing_for
from quire_schemas.openai.chat import (
    CHAT_REFUSED,
    MAX_DOCUMENTS,
    MAX_MESSAGES,
    MAX_TEMPLATE_VARIABLES,
    ChatRequest,
    Effort,
    Message,
)
from quire_schemas.openai.request import MAX_MODEL_NAME, Shape, TokenId, are_ids
from quire_schemas.openai.tools import MAX_TOOLS, Tool, ToolChoice, check_tools

TOKENIZE_REFUSED: Final[Mapping[str, Refusal]] = {
    **{name: CHAT_REFUSED[name] for name in ("chat_template", "media_io_kwargs", "mm_processor_kwargs")},
    "truncate_prompt_tokens": Refusal("nothing is cut short here: all ids are told"),
    "request_id": Refusal("send the header X-Request-Id"),
}
DETOKENIZE_REFUSED: Final[Mapping[str, Refusal]] = {
    "skip_special_tokens": Refusal("special tokens are written out, so that the text has the same ids", (False,)),
    "request_id": Refusal("send the header X-Request-Id"),
}


def _ids(value: object) -> list[int]:
    if not isinstance(value, list) or not are_ids(value):
        raise PydanticCustomError("ids", "must be a list of token ids")
    return value


_OF_CHATS: Final = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "tools",
    "tool_choice",
    "documents",
    "reasoning_effort",
)


class _OfTokenizer(Shape):
    """A request that only the tokenizer answers."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_MODEL_NAME)] | None = None
    """May be left out where one model is served."""


class TokenizeRequest(_OfTokenizer):
    """Body of `POST /tokenize`: a `prompt`, or `messages` that the model's template makes a text of."""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    """What the tokenizer puts around a text: unless given, around a prompt and not around a conversation."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_VARIABLES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), AfterValidator(check_tools)] | None = None
    tool_choice: ToolChoice | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS)] | None = None
    reasoning_effort: Effort | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("messages", "or prompt must be given, and not both")
        for name in _OF_CHATS:
            if self.messages is None and getattr(self, name):
                raise PydanticCustomError(name, "is only for requests with messages")
        return self

    @property
    def chat(self) -> ChatRequest:
        """The chat that begins with these tokens. Raises `BadRequest`."""
        stated = {name: value for name in _OF_CHATS if (value := getattr(self, name)) is not None}
        return standing_for(ChatRequest, {"model": self.model or "-", "messages": self.messages, **stated})


class DetokenizeRequest(_OfTokenizer):
    """Body of `POST /detokenize`."""

    tokens: Annotated[list[int], PlainValidator(_ids, json_schema_input_type=list[TokenId])]


def read_tokenize(body: bytes, ignore_unknown: bool = False) -> TokenizeRequest:
    """The request in `body`. Raises `BadRequest`."""
    return read(body, TokenizeRequest, TOKENIZE_REFUSED, ignore_unknown, OF_CALLERS)


def read_detokenize(body: bytes, ignore_unknown: bool = False) -> DetokenizeRequest:
    """The request in `body`. Raises `BadRequest`."""
    return read(body, DetokenizeRequest, DETOKENIZE_REFUSED, ignore_unknown, OF_CALLERS)


class Tokenized(msgspec.Struct, kw_only=True):
    """Answer to `POST /tokenize`."""

    count: int
    max_model_len: int
    """Tokens that a prompt and its answer may have together."""
    tokens: list[int]
    token_strs: list[str] | None
    """The entries of the vocabulary as it spells them, if asked for."""


class Detokenized(msgspec.Struct):
    """Answer to `POST /detokenize`."""

    prompt: str
