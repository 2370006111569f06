"""`POST /v1/chat/completions`: the conversation, the request, the answer and the events of its stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import AfterValidator, Field, PlainValidator, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from quire_schemas.openai.answer import (
    Answer,
    AnswerOnRequest,
    FinishReason,
    PromptLogprobs,
    RequestMetrics,
    Usage,
)
from quire_schemas.openai.body import NOT_YET, Refusal, explained, ignores_unknown, read, shown
from quire_schemas.openai.request import Count, Shape
from quire_schemas.openai.sampling import MAX_TOP_LOGPROBS, SAMPLING_REFUSED, SamplingFields, check_min_tokens
from quire_schemas.openai.tools import (
    MAX_TOOLS,
    AllowedChoice,
    AnsweredCall,
    CallDelta,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
    check_tools,
)

MAX_MESSAGES: Final = 1024
MAX_TEMPLATE_VARIABLES: Final = 64
MAX_DOCUMENTS: Final = 256
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
ChatFinishReason = FinishReason | Literal["tool_calls"]

CHAT_REFUSED: Final[Mapping[str, Refusal]] = {
    **SAMPLING_REFUSED,
    "best_of": Refusal("choosing the best of several is offered for /v1/completions only", (1,)),
    "functions": Refusal("it is the old name of tools; send those", ([],)),
    "function_call": Refusal("it is the old name of tool_choice; send that", ("none", "auto")),
    "stream_reasoning": Refusal(f"it {NOT_YET}", (True,)),
    "verbosity": Refusal(f"it {NOT_YET}"),
    "modalities": Refusal("answers are text", (["text"],)),
    "audio": Refusal("answers are text"),
    "web_search_options": Refusal("nothing here searches the web"),
    "echo": Refusal("repeating the last message is offered for /v1/completions only", (False,)),
    "chat_template": Refusal(
        "a template is code; it comes from the checkpoint or the manifest, not from a request"
    ),
    "media_io_kwargs": Refusal("messages are text", ({},)),
    "mm_processor_kwargs": Refusal("messages are text", ({},)),
    "mm_payload": Refusal("messages are text"),
    "return_mm_kwargs": Refusal("messages are text", (False,)),
}


_PART_WITHOUT_EFFECT: Final = ("cache_control", "prompt_cache_breakpoint")
"""Of a part of a message: prompts are cached by their beginnings, without being told."""


def _content(value: object, info: ValidationInfo) -> str | None:
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
        words = "refusal" if kind == "refusal" else "text"
        if not isinstance(part.get(words), str):
            raise PydanticCustomError("content", "must have a string in each text part")
        strange = next((name for name in part if name not in ("type", words, *_PART_WITHOUT_EFFECT)), None)
        if strange is not None and not ignores_unknown(info):
            raise PydanticCustomError("content", f"must not have the field '{shown(strange)}' in a text part")
        texts.append(part[words])
    return "\n".join(texts)


class TextPart(TypedDict):
    """A part of a message's content."""

    type: Literal["text", "input_text"]
    text: str
    cache_control: NotRequired[Any]
    prompt_cache_breakpoint: NotRequired[Any]


class RefusalPart(TypedDict):
    """A refusal in the content of an earlier answer."""

    type: Literal["refusal"]
    refusal: str
    cache_control: NotRequired[Any]
    prompt_cache_breakpoint: NotRequired[Any]


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
    return_prompt_text: bool | None = None
    """The answer has the text that the template made of the messages."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_VARIABLES)] | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS)] | None = None
    """Texts to answer from, for templates that show them."""
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), AfterValidator(check_tools)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """False: an answer has one call at most."""
    reasoning_effort: Effort | None = None
    """How much the model thinks: in the template's own words, or as a bound on the tokens of its thoughts."""
    include_reasoning: bool | None = None
    """False: the answer is shown without the model's reasoning."""
    separate_reasoning: bool | None = None
    """False: reasoning and tool calls stay in the text as the model wrote them."""

    @model_validator(mode="after")
    def _tools_agree(self) -> ChatRequest:
        names = {tool.function.name for tool in self.tools or ()}
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise PydanticCustomError("tool_choice", "needs tools")
        for name in self.allowed_names:
            if name not in names:
                raise PydanticCustomError("tool_choice", f"names {name}, which is no function of tools")
        if self.separate_reasoning is False:
            for field in ("include_reasoning", "tools"):
                if getattr(self, field):
                    raise PydanticCustomError("separate_reasoning", f"cannot be false with {field}")
        if self.must_call and self.constraint is not None:
            field = "structured_outputs" if self.structured_outputs is not None else "response_format"
            raise PydanticCustomError("tool_choice", f"asks for a call, and {field} for an answer")
        for field in ("tools", "reasoning_effort"):
            if self.use_beam_search and getattr(self, field):
                raise PydanticCustomError("use_beam_search", "cannot be combined with '{field}'", {"field": field})
        return self

    @property
    def allowed_names(self) -> tuple[str, ...]:
        """The functions that the choice names."""
        match self.tool_choice:
            case NamedTool(function=function):
                return (function.name,)
            case AllowedChoice(allowed_tools=allowed):
                return tuple(tool.function.name for tool in allowed.tools)
        return ()

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is shown: none where it is to call none, and of several those allowed."""
        if self.tool_choice == "none":
            return ()
        names = self.allowed_names
        return tuple(tool for tool in self.tools or () if not names or tool.function.name in names)

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        match self.tool_choice:
            case "required" | NamedTool():
                return True
            case AllowedChoice(allowed_tools=allowed):
                return allowed.mode == "required"
        return False

    @property
    def one_call(self) -> bool:
        """Whether the answer has one call at most: a function that is named is called once."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

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
    def turns(self) -> list[Message]:
        return self.messages

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


def read_conversation(messages: list[Any]) -> list[Message]:
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


class ChoiceMessage(AnswerOnRequest):
    """The answer in a chat choice: `content` is null where there is nothing but calls.

    The model's thoughts are there under both names that clients look for.
    """

    on_request = frozenset({"tool_calls", "reasoning", "reasoning_content"})

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatChoice(AnswerOnRequest):
    """One answer. `token_ids` are all that were drawn, one that ended the text included."""

    on_request = frozenset({"token_ids"})

    index: int
    message: ChoiceMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(AnswerOnRequest):
    """Answer to a chat request without `stream`."""

    on_request = frozenset({"prompt_logprobs", "prompt_token_ids", "prompt_text", "metrics"})
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
    metrics: RequestMetrics | None = None


class ChatDelta(Answer):
    """What a chunk adds to one answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(Answer):
    """One answer's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: str | int | None = None
    """Beside the finish reason alone."""
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
    prompt_text: str | None = None
    """In the first event, if asked for."""
    metrics: RequestMetrics | None = None
    """In the event of the last finish reason, if asked for."""
