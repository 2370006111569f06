"""`POST /v1/chat/completions`: the conversation, the request, the answer and the events of its stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import AfterValidator, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from quire_schemas.openai.answer import Answer, AnswerOnRequest, FinishReason, PromptLogprobs, Usage
from quire_schemas.openai.body import NOT_YET, Refusal, explained, read
from quire_schemas.openai.request import Count, Shape
from quire_schemas.openai.sampling import MAX_TOP_LOGPROBS, SAMPLING_REFUSED, SamplingFields, check_min_tokens

MAX_MESSAGES: Final = 1024
MAX_TEMPLATE_VARIABLES: Final = 64

CHAT_REFUSED: Final[Mapping[str, Refusal]] = {
    **SAMPLING_REFUSED,
    "best_of": Refusal("choosing the best of several is offered for /v1/completions only", (1,)),
    "tools": Refusal("tool calls are not honoured by this version", ([],)),
    "tool_choice": Refusal("tool calls are not honoured by this version", ("none", "auto")),
    "functions": Refusal("tool calls are not honoured by this version", ([],)),
    "function_call": Refusal("tool calls are not honoured by this version", ("none", "auto")),
    "reasoning_effort": Refusal(f"it {NOT_YET}; what a template offers goes in chat_template_kwargs"),
    "include_reasoning": Refusal(f"hiding a model's reasoning {NOT_YET}", (True,)),
    "separate_reasoning": Refusal(f"it {NOT_YET}", (False,)),
    "stream_reasoning": Refusal(f"it {NOT_YET}", (True,)),
    "verbosity": Refusal(f"it {NOT_YET}"),
    "modalities": Refusal("answers are text", (["text"],)),
    "audio": Refusal("answers are text"),
    "prediction": Refusal(f"it {NOT_YET}"),
    "web_search_options": Refusal("nothing here searches the web"),
    "echo": Refusal("repeating the last message is offered for /v1/completions only", (False,)),
    "documents": Refusal(f"it {NOT_YET}", ([],)),
    "chat_template": Refusal(
        "a template is code; it comes from the checkpoint or the manifest, not from a request"
    ),
    "media_io_kwargs": Refusal("messages are text", ({},)),
    "mm_processor_kwargs": Refusal("messages are text", ({},)),
    "mm_payload": Refusal("messages are text"),
    "return_mm_kwargs": Refusal("messages are text", (False,)),
}


class FunctionCall(Shape):
    """The function in a tool call of an earlier turn."""

    name: str
    arguments: str

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments as templates expect them; their form was checked with the request."""
        value: dict[str, Any] = msgspec.json.decode(self.arguments or "{}")
        return value


def _check_arguments(value: FunctionCall) -> FunctionCall:
    try:
        parsed = msgspec.json.decode(value.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise PydanticCustomError("arguments", "must have arguments that are a JSON object") from error
    if not isinstance(parsed, dict):
        raise PydanticCustomError("arguments", "must have arguments that are a JSON object")
    return value


class ToolCall(Shape):
    """A tool call of an earlier turn, for the template to show."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Annotated[FunctionCall, AfterValidator(_check_arguments)]
    index: int | None = None


def _content(value: object) -> str | None:
    """Content as one string; the text parts of a list are joined by line ends."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "refusal"):  # a tuple: the kind may be anything, hashable or not
            raise PydanticCustomError("content", "must have parts of type text only: other media are not honoured")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise PydanticCustomError("content", "must have a string in each text part")
        texts.append(text)
    return "\n".join(texts)


class TextPart(TypedDict):
    """A part of a message's content."""

    type: Literal["text", "input_text"]
    text: str


class RefusalPart(TypedDict):
    """A refusal in the content of an earlier answer."""

    type: Literal["refusal"]
    refusal: str


class Message(Shape):
    """One turn of the conversation. `developer` is the newer name of `system`, and templates see it as that."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | None, PlainValidator(_content, json_schema_input_type=str | list[TextPart | RefusalPart] | None)
    ] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    # what the official client sends back with an earlier answer, always null here
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _content_where_needed(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content_missing", "must have content")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "may have tool_calls only when its role is assistant")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: plain values, tool arguments as objects."""
        shown: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content if self.content is not None else (self.refusal or ""),
        }
        reasoning = self.reasoning_content if self.reasoning_content is not None else self.reasoning
        if reasoning is not None:
            shown["reasoning_content"] = reasoning
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                shown[name] = value
        if self.tool_calls:
            shown["tool_calls"] = [
                {
                    **({"id": call.id} if call.id is not None else {}),
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.parsed},
                }
                for call in self.tool_calls
            ]
        return shown


class _Conversation(Shape):
    messages: Annotated[list[Message], Field(min_length=1)]


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1, le=MAX_TOP_LOGPROBS)] | None = None
    """-1 is the whole vocabulary."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """The answer goes on with the last message instead of beginning a new one."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_VARIABLES)] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "needs logprobs: true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError("max_tokens", "and max_completion_tokens are the same limit and must agree")
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError("continue_final_message", "and add_generation_prompt exclude each other")
        if self.continue_final_message and self.messages[-1].tool_calls:
            raise PydanticCustomError("continue_final_message", "cannot go on with a message that calls tools")
        check_min_tokens(self.min_tokens, self.asked_tokens)
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def limit_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def logprobs_field(self) -> str:
        return "top_logprobs"


def read_chat(body: bytes, ignore_unknown: bool = False) -> ChatRequest:
    """The chat request in `body`. Raises `BadRequest`."""
    return read(body, ChatRequest, CHAT_REFUSED, ignore_unknown)


def read_messages(messages: list[Any]) -> list[Message]:
    """The turns of a conversation that comes from nowhere but this process. Raises `BadRequest`."""
    try:
        return _Conversation.model_validate({"messages": messages}).messages
    except ValidationError as error:
        raise explained(error.errors(include_url=False)[0]) from None


class TopLogprob(Answer):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The chosen token at a position."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Answer):
    """Log-probabilities in a chat choice."""

    content: list[TokenLogprob] | None
    refusal: None = None


class AssistantMessage(Answer):
    """The answer in a chat choice."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(AnswerOnRequest):
    """One answer. `token_ids` are all that were drawn, one that ended the text included."""

    on_request = frozenset({"token_ids"})

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatCompletion(AnswerOnRequest):
    """Answer to a chat request without `stream`."""

    on_request = frozenset({"prompt_logprobs", "prompt_token_ids"})
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatDelta(Answer):
    """What a chunk adds to one answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    """One answer's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = None


class ChatChunk(Answer):
    """One event of a chat stream: first the role, then content, then the finish reason alone, then usage."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    """In the first event, if asked for."""
