"""`POST /v1/responses`: the request, read as the chat request that it stands for, the answer and its events.

A conversation is a list of items: messages, calls, what calls gave, thoughts. `ResponsesRequest.chat` writes them
as the messages of a chat request; items that a stored response brings along stand before those of the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from quire_schemas.openai.body import NOT_YET, Refusal, read, standing_for
from quire_schemas.openai.chat import CHAT_REFUSED, MAX_MESSAGES, ChatRequest, Effort
from quire_schemas.openai.request import Count, ModelRequest, Shape
from quire_schemas.openai.sampling import MAX_TOP_LOGPROBS, SAMPLING_REFUSED
from quire_schemas.openai.structured import Schema
from quire_schemas.openai.tools import MAX_TOOLS, FunctionName, ToolMode, check_tools, choice_kind

MAX_METADATA: Final = 16
MAX_ID: Final = 64
"""Characters of an id; what is longer is none of ours."""
INPUT_ITEMS_LISTED: Final = 20
MAX_INPUT_ITEMS_LISTED: Final = 100
RESPONSES_REFUSED: Final[Mapping[str, Refusal]] = {
    **SAMPLING_REFUSED,
    "conversation": Refusal("go on from a stored response with previous_response_id"),
    "prompt": Refusal("no prompts are kept here"),
    "truncation": Refusal("a conversation is never cut short here", ("disabled",)),
    "verbosity": CHAT_REFUSED["verbosity"],
    "enable_response_messages": Refusal(f"it {NOT_YET}", (False,)),
    "previous_input_messages": Refusal("send them as input"),
    "context_management": Refusal("a conversation is taken as it is sent", ([],)),
    "messages": Refusal("send them as input"),
    "max_tokens": Refusal("send max_output_tokens"),
    "max_completion_tokens": Refusal("send max_output_tokens"),
    "response_format": Refusal("send text with its format"),
    "reasoning_effort": Refusal("send reasoning with its effort"),
    "separate_reasoning": Refusal("a response has its thoughts in items of their own", (True,)),
    "logprobs": Refusal("send include with 'message.output_text.logprobs'", (False,)),
    "return_token_ids": Refusal("a response has no place for them", (False,)),
    "return_metrics": Refusal("a response has no place for them", (False,)),
    "return_prompt_text": Refusal("a response has no place for it", (False,)),
    "prompt_logprobs": Refusal("a response has no place for them"),
    "use_beam_search": Refusal("a response is drawn", (False,)),
    "length_penalty": Refusal("a response is drawn", (1,)),
    "echo": CHAT_REFUSED["echo"],
    "chat_template": CHAT_REFUSED["chat_template"],
    "media_io_kwargs": CHAT_REFUSED["media_io_kwargs"],
    "mm_processor_kwargs": CHAT_REFUSED["mm_processor_kwargs"],
    "mm_payload": CHAT_REFUSED["mm_payload"],
    "return_mm_kwargs": CHAT_REFUSED["return_mm_kwargs"],
    "stream_reasoning": CHAT_REFUSED["stream_reasoning"],
    "add_generation_prompt": Refusal("an answer is always begun", (True,)),
    "continue_final_message": Refusal("an answer is always begun", (False,)),
    "n": Refusal("a response is one answer", (1,)),
    "moderation": Refusal("nothing here moderates"),
}
RESPONSES_WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "user": "names the end user, whom a Route may keep with one replica",
    "service_tier": "there is one tier",
    "safety_identifier": "names the end user, as `user`",
    "prompt_cache_key": "a hint for routing to a prompt cache; requests go by their prompts here",
    "prompt_cache_options": "a hint for a prompt cache",
    "prompt_cache_retention": "a hint for a prompt cache",
    "session_id": "a hint for routing",
    "max_tool_calls": "bounds calls that a server makes itself, which there are none of here",
}
"""Fields of a request accepted without effect, and what they are for."""

_PASSED: Final = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "include_stop_str_in_output",
    "ignore_eos", "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "allowed_token_ids", "bad_words", "thinking_token_budget", "repetition_detection", "skip_special_tokens",
    "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "logprobs_mode", "logprob_token_ids",
    "return_tokens_as_token_ids", "documents", "priority", "cache_salt", "timeout", "structured_outputs",
    "chat_template_kwargs", "script", "include_reasoning",
)  # fmt: skip
"""Fields that mean here what they mean in a chat request."""

# ── items ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Item(Shape):
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ItemTextPart(Shape):
    """Words; what an answer had beside them is accepted, as clients send it back."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Annotated[Any, Field(exclude=True)] = None
    """Without effect, as in a chat."""


class ItemRefusalPart(Shape):
    """Words by which a model refused."""

    type: Literal["refusal"]
    refusal: str


Words = str | list[Annotated[ItemTextPart | ItemRefusalPart, Field(discriminator="type")]]


def _joined(words: Words) -> str:
    """Content as one string; the parts of a list are joined by line ends."""
    if isinstance(words, str):
        return words
    return "\n".join(part.text if isinstance(part, ItemTextPart) else part.refusal for part in words)


class MessageItem(_Item):
    """Words of somebody."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Words
    phase: str | None = None


class CallItem(_Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Annotated[Any, Field(exclude=True)] = None
    """Without effect, as in a chat."""
    namespace: None = None


class CallOutputItem(_Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: Words


class ThoughtText(Shape):
    """A piece of a thought."""

    type: Literal["summary_text", "reasoning_text"]
    text: str


class ThoughtItem(_Item):
    """What the model thought."""

    type: Literal["reasoning"]
    summary: Annotated[tuple[ThoughtText, ...], Field(strict=False)] = ()
    content: Annotated[tuple[ThoughtText, ...], Field(strict=False)] | None = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        return "\n".join(piece.text for piece in self.content or self.summary)


class ItemReference(Shape):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"]
    id: str


def _kind(value: object) -> str | None:
    """Which item it is; a message may leave it out."""
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


_KINDS: Final = "message, function_call, function_call_output, reasoning, item_reference"
Item = MessageItem | CallItem | CallOutputItem | ThoughtItem | ItemReference
AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ThoughtItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(
        _kind, custom_error_type="item", custom_error_message=f"must be an object with a type of {_KINDS}"
    ),
]
_items: Final[TypeAdapter[list[Item]]] = TypeAdapter(list[AnyItem])


def _as_items(value: object) -> object:
    if not isinstance(value, str | list):
        raise PydanticCustomError("input", "must be a string or a list of items")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def messages_of(items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Items as messages of a chat request: thought, words and calls of one turn of the model are one message."""
    turn: dict[str, Any] | None = None
    for item in items:
        if isinstance(item, CallOutputItem) or (isinstance(item, MessageItem) and item.role != "assistant"):
            if turn is not None:
                yield turn
                turn = None
            if isinstance(item, CallOutputItem):
                yield {"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)}
            else:
                yield {"role": item.role, "content": _joined(item.content)}
            continue
        begins = isinstance(item, ThoughtItem) or (
            isinstance(item, MessageItem) and bool(turn and "content" in turn)
        )
        if turn is not None and (begins or (isinstance(item, MessageItem) and "tool_calls" in turn)):
            yield turn
            turn = None
        turn = turn if turn is not None else {"role": "assistant"}
        match item:
            case ThoughtItem():
                turn["reasoning"] = item.text
            case MessageItem():
                turn["content"] = _joined(item.content)
            case CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                turn.setdefault("tool_calls", []).append(
                    {"id": item.call_id, "type": "function", "function": function}
                )
    if turn is not None:
        yield turn


# ── the request ───────────────────────────────────────────────────────────────────────────────────────────


class ResponseStreamOptions(Shape):
    """How a stream is written."""

    include_obfuscation: Literal[False] | None = None
    """Padding against traffic analysis is not offered: only false."""


class FunctionTool(Shape):
    """A function that the model may call; tools that a server runs are not offered here."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    @property
    def called(self) -> str:
        return self.name

    def for_chat(self) -> dict[str, Any]:
        """As a tool of a chat request."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class FunctionChoice(Shape):
    """The function that is to be called, or one of those that may be."""

    type: Literal["function"]
    name: FunctionName

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


class AllowedFunctions(Shape):
    """Those of the tools that may be called now, and whether one must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]


ResponseChoice = Annotated[
    Annotated[ToolMode, Tag("a mode")]
    | Annotated[FunctionChoice, Tag("a function")]
    | Annotated[AllowedFunctions, Tag("some tools")],
    Discriminator(
        choice_kind,
        custom_error_type="choice",
        custom_error_message="must be none, auto, required, a function ('type' and 'name') or allowed_tools",
    ),
]


class TextFormat(Shape):
    """What the text is to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_named(self) -> TextFormat:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            word = "is required with" if self.type == "json_schema" else "has no place with"
            raise PydanticCustomError(
                "schema", "{said} type {type}", {"said": word, "type": self.type, "inside": "schema"}
            )
        return self

    def for_chat(self) -> dict[str, Any]:
        """As the `response_format` of a chat request."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name or "answer", "schema": self.schema_}}


class TextOptions(Shape):
    """What the text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None
    """How much is said is the model's affair: only the value that asks for nothing."""


class ReasoningOptions(Shape):
    """How much the model thinks, and whether its thoughts are shown as a summary: they are that themselves."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
Label = Annotated[str, Field(max_length=64)]
LabelText = Annotated[str, Field(max_length=512)]
_fields: Final[dict[str, Any]] = {
    name: (ChatRequest.model_fields[name].annotation, ChatRequest.model_fields[name]) for name in _PASSED
}
_Passed: type[ModelRequest] = create_model("_Passed", __base__=ModelRequest, **_fields)


class ResponsesRequest(_Passed):  # type: ignore[misc, valid-type]
    """Body of `POST /v1/responses`."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[
        list[AnyItem],
        BeforeValidator(_as_items, json_schema_input_type=str | list[AnyItem]),
        Field(min_length=1, max_length=MAX_MESSAGES),
    ]
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=MAX_ID)] | None = None
    store: bool | None = None
    """Whether the response can be had again, and gone on from; it can unless this is false."""
    background: bool | None = None
    """Answer at once, and work on; the response is to be asked for."""
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[Included] | None = None
    metadata: Annotated[dict[Label, LabelText], Field(max_length=MAX_METADATA)] | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS), AfterValidator(check_tools)] | None = None
    tool_choice: ResponseChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _it_can_be_kept(self) -> ResponsesRequest:
        if self.background and self.store is False:
            raise PydanticCustomError("background", "needs store: nobody could ask for the response")
        if self.background and self.stream:
            raise PydanticCustomError("background", "excludes stream: the response is to be asked for")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "is only for requests with stream: true")
        if self.top_logprobs is not None and not self.wants_logprobs:
            raise PydanticCustomError("top_logprobs", "needs 'message.output_text.logprobs' in include")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    @property
    def wants_summary(self) -> bool:
        """Whether thoughts are to be shown where clients look for a summary of them."""
        return self.reasoning is not None and bool(self.reasoning.summary or self.reasoning.generate_summary)

    @property
    def stored(self) -> bool:
        return self.store is not False

    def chat(self, items: Sequence[Item]) -> ChatRequest:
        """The chat request that this stands for, as the end of a conversation. Raises `BadRequest`."""
        return standing_for(ChatRequest, self._for_chat(items))

    def _for_chat(self, items: Sequence[Item]) -> dict[str, Any]:
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages.extend(messages_of(items))
        made: dict[str, Any] = {"model": self.model, "messages": messages, "stream": bool(self.stream)}
        made |= {name: value for name in _PASSED if (value := getattr(self, name)) is not None}
        if "logit_bias" in made:
            made["logit_bias"] = {str(index): bias for index, bias in made["logit_bias"].items()}
        if self.max_output_tokens is not None:
            made["max_completion_tokens"] = self.max_output_tokens
        if self.text is not None and self.text.format is not None:
            made["response_format"] = self.text.format.for_chat()
        if self.reasoning is not None and self.reasoning.effort is not None:
            made["reasoning_effort"] = self.reasoning.effort
        if self.tools:
            made["tools"] = [tool.for_chat() for tool in self.tools]
        match self.tool_choice:
            case FunctionChoice():
                made["tool_choice"] = self.tool_choice.for_chat()
            case AllowedFunctions(mode=mode, tools=tools):
                allowed = {"mode": mode, "tools": [tool.for_chat() for tool in tools]}
                made["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
            case str():
                made["tool_choice"] = self.tool_choice
        if self.parallel_tool_calls is not None:
            made["parallel_tool_calls"] = self.parallel_tool_calls
        if self.wants_logprobs:
            made |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return made


def read_response(body: bytes, ignore_unknown: bool = False) -> ResponsesRequest:
    """The request in `body`. Raises `BadRequest`."""
    return read(body, ResponsesRequest, RESPONSES_REFUSED, ignore_unknown, RESPONSES_WITHOUT_EFFECT)


def read_items(stored: bytes) -> list[Item]:
    """Items as `write_items` wrote them."""
    return _items.validate_python(msgspec.json.decode(stored))


def write_items(items: Sequence[Item]) -> bytes:
    """Items for the store."""
    return msgspec.json.encode([item.model_dump(exclude_none=True) for item in items])


# ── answers: msgspec, as a stream writes them again and again ─────────────────────────────────────────────


class OutputText(msgspec.Struct, tag="output_text", tag_field="type", kw_only=True):
    """Words of a message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []
    """As in a chat, where `include` asks for them."""


class OutputThought(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    """A thought as the model wrote it."""

    text: str


class OutputSummary(msgspec.Struct, tag_field="type", tag="summary_text"):
    """The same where clients look for a summary."""

    text: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(msgspec.Struct, tag="message", tag_field="type", kw_only=True):
    """What the model says."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class OutputReasoning(msgspec.Struct, tag="reasoning", tag_field="type", kw_only=True):
    """What it thought before."""

    id: str
    status: ItemStatus
    summary: list[OutputSummary]
    content: list[OutputThought]
    encrypted_content: None = None


class OutputCall(msgspec.Struct, tag="function_call", tag_field="type", kw_only=True):
    """A call that it makes."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputDetails(msgspec.Struct):
    """Where tokens of the prompt came from."""

    cached_tokens: int


class OutputDetails(msgspec.Struct):
    """What tokens of the answer were for."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(msgspec.Struct):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens"]


ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseObject(msgspec.Struct, kw_only=True):
    """One response. What the request said is repeated."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str]

    @classmethod
    def begun(cls, id: str, created_at: int, request: ResponsesRequest) -> ResponseObject:
        """A response of which nothing is there yet."""
        reasoning = request.reasoning or ReasoningOptions()
        said = request.text or TextOptions()
        wanted = said.format.model_dump(by_alias=True, exclude_none=True) if said.format else {"type": "text"}
        choice = request.tool_choice
        return cls(
            id=id,
            created_at=created_at,
            status="queued" if request.background else "in_progress",
            background=bool(request.background),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            model=request.model,
            parallel_tool_calls=request.parallel_tool_calls is not False,
            previous_response_id=request.previous_response_id,
            reasoning={"effort": reasoning.effort, "summary": reasoning.summary or reasoning.generate_summary},
            store=request.stored,
            temperature=getattr(request, "temperature", None),
            text={"format": wanted},
            tool_choice=choice.model_dump() if isinstance(choice, Shape) else choice or "auto",
            tools=[{"strict": None, **tool.model_dump(exclude_none=True)} for tool in request.tools or ()],
            top_logprobs=request.top_logprobs or 0,
            top_p=getattr(request, "top_p", None),
            metadata=dict(request.metadata or {}),
        )


class RetrieveResponse(Shape):
    """Parameters of `GET /v1/responses/{id}`, without effect: all that is kept is told, and it is not streamed."""

    include: list[str] | None = None
    include_obfuscation: str | None = None


class ListInputItems(Shape):
    """Parameters of `GET /v1/responses/{id}/input_items`."""

    include: list[str] | None = None
    """Without effect: all that is kept is told."""

    limit: Annotated[int, Field(ge=1, le=MAX_INPUT_ITEMS_LISTED)] = INPUT_ITEMS_LISTED
    after: str | None = None
    """The last item of the page before."""
    order: Literal["asc", "desc"] = "desc"
    """From the last item back, or from the first on."""


class InputTokens(msgspec.Struct, kw_only=True):
    """Answer to `POST /v1/responses/input_tokens`."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class ResponseDeleted(msgspec.Struct, kw_only=True):
    """Answer to `DELETE /v1/responses/{id}`."""

    id: str
    object: Literal["response.deleted"] = "response.deleted"
    deleted: Literal[True] = True


class InputItems(msgspec.Struct, kw_only=True):
    """Answer to `GET /v1/responses/{id}/input_items`."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
