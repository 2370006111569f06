"""Anthropic's Messages API: the request, read as the chat request that it stands for, the answer and its events.

`MessagesRequest.chat` is the conversation in the shape that everything behind it knows. System texts become the
first message, results of tools messages of their own, and a final message of the assistant the beginning of the
answer. Fields are honoured, refused by name, or without effect, as in `quire_schemas.openai`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from quire_schemas.openai.body import Refusal, read, standing_for
from quire_schemas.openai.chat import MAX_MESSAGES, MAX_TEMPLATE_VARIABLES, ChatRequest, Effort
from quire_schemas.openai.request import Count, ModelRequest, Shape
from quire_schemas.openai.sampling import MAX_SALT, MAX_STOPS, MAX_TEMPERATURE, MAX_TOP_K
from quire_schemas.openai.structured import Schema
from quire_schemas.openai.tools import MAX_TOOLS, FunctionName, check_tools

MESSAGES_REFUSED: Final[Mapping[str, Refusal]] = {
    "thread": Refusal("no threads are kept here", ({"type": "create"},)),
    "container": Refusal("nothing here runs code"),
    "mcp_servers": Refusal("tools are called by the client alone", ([],)),
    "context_management": Refusal("a conversation is taken as it is sent", ({"edits": []}, {})),
    "vllm_xargs": Refusal("its entries have no meaning here", ({},)),
}
MESSAGES_WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "metadata": "the caller's own labels; `user_id` names the end user, whom a Route may keep with one replica",
    "service_tier": "there is one tier",
    "inference_geo": "requests are served where the server is",
    "speed": "there is one speed",
    "betas": "names of beta features",
    "diagnostics": "asks why a prompt cache was missed; usage tells what was cached",
    "user_profile_id": "names the end user",
    "workspace_id": "names the caller's workspace",
    "cache_control": "prompts are cached by their beginnings, without being told",
}
"""Fields of a request accepted without effect, and what they are for."""


class CacheControl(Shape):
    """Accepted without effect: prompts are cached by their beginnings, without being told."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class _Block(Shape):
    cache_control: CacheControl | None = None


class TextBlock(_Block):
    """Text."""

    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class ThinkingBlock(_Block):
    """What the model thought in an earlier turn."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(_Block):
    """A thought that cannot be read, and so is left out."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(_Block):
    """A call of an earlier turn."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


class ToolResultBlock(_Block):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        return _joined(self.content or "")


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")
]


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


class UserMessage(Shape):
    """A turn of the user: words, and what calls gave."""

    role: Literal["user"]
    content: str | Annotated[list[UserBlock], Field(min_length=1)]

    def for_chat(self) -> Iterator[dict[str, Any]]:
        """As messages of a chat request: results first, as each answers a call of the turn before."""
        if isinstance(self.content, str):
            yield {"role": "user", "content": self.content}
            return
        for block in self.content:
            if isinstance(block, ToolResultBlock):
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}
        words = [block for block in self.content if isinstance(block, TextBlock)]
        if words:
            yield {"role": "user", "content": _joined(words)}


class AssistantMessage(Shape):
    """A turn of the model."""

    role: Literal["assistant"]
    content: str | list[AssistantBlock]

    def for_chat(self) -> Iterator[dict[str, Any]]:
        """As one message of a chat request."""
        if isinstance(self.content, str):
            yield {"role": "assistant", "content": self.content}
            return
        thoughts = [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]
        calls = [
            {
                "id": block.id,
                "type": "function",
                "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
            }
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        made: dict[str, Any] = {
            "role": "assistant",
            "content": _joined([block for block in self.content if isinstance(block, TextBlock)]),
        }
        if thoughts:
            made["reasoning"] = "\n".join(thoughts)
        if calls:
            made["tool_calls"] = calls
        yield made


class SystemMessage(Shape):
    """Directions in the middle of a conversation."""

    role: Literal["system"]
    content: str | Annotated[list[TextBlock], Field(min_length=1)]

    def for_chat(self) -> Iterator[dict[str, Any]]:
        """As one message of a chat request."""
        yield {"role": "system", "content": _joined(self.content)}


Turn = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class ToolDefinition(Shape):
    """A function that the model may call; those that a server runs are not offered here."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: Schema
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    """Without effect: arguments are streamed as they are written."""

    @property
    def called(self) -> str:
        return self.name

    def for_chat(self) -> dict[str, Any]:
        """As a tool of a chat request."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": {**function, "strict": self.strict}}


class AnyChoice(Shape):
    """Whether tools are called: as the model likes, at least one, or none."""

    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Shape):
    """The tool that is to be called."""

    type: Literal["tool"]
    name: FunctionName
    disable_parallel_tool_use: bool | None = None


class Thinking(Shape):
    """How the model is to think. `adaptive` leaves it to the model."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens that thoughts may have."""
    display: Literal["summarized", "omitted"] | None = None
    """Thoughts are shown as they are, or left out; nothing here makes a summary of them."""

    @model_validator(mode="after")
    def _budget_where_enabled(self) -> Thinking:
        if self.budget_tokens is not None and self.type != "enabled":
            raise PydanticCustomError("budget_tokens", f"has no place with type {self.type}")
        return self


class OutputFormat(Shape):
    """The JSON Schema that the answer's text is held to."""

    type: Literal["json_schema"]
    schema_: Annotated[Schema, Field(alias="schema")]


class OutputConfig(Shape):
    """How much is thought, and what the text is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Conversation(ModelRequest):
    """What the model is shown: all that counts for the tokens of its prompt."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS), AfterValidator(check_tools)] | None = None
    tool_choice: Annotated[AnyChoice | NamedChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_VARIABLES)] | None = None

    @model_validator(mode="after")
    def _the_rest_fits(self) -> Conversation:
        if self.tool_choice is not None and self.tool_choice.type in ("any", "tool") and not self.tools:
            raise PydanticCustomError("tool_choice", "needs tools")
        if isinstance(self.tool_choice, NamedChoice) and all(
            tool.name != self.tool_choice.name for tool in self.tools or ()
        ):
            raise PydanticCustomError("tool_choice", f"names {self.tool_choice.name}, which is none of tools")
        return self

    @property
    def for_chat(self) -> dict[str, Any]:
        """The fields of the chat request that this stands for."""
        system = _joined(self.system or "")
        messages = [{"role": "system", "content": system}] if system else []
        for turn in self.messages:
            messages.extend(turn.for_chat())
        made: dict[str, Any] = {"model": self.model, "messages": messages}
        if isinstance(self.messages[-1], AssistantMessage):
            made["continue_final_message"] = True
        if self.tools:
            made["tools"] = [tool.for_chat() for tool in self.tools]
        match self.tool_choice:
            case NamedChoice(name=name):
                made["tool_choice"] = {"type": "function", "function": {"name": name}}
            case AnyChoice(type=kind):
                made["tool_choice"] = "required" if kind == "any" else kind
        if self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use:
            made["parallel_tool_calls"] = False
        effort = self._effort
        if effort is not None:
            made["reasoning_effort"] = effort
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            made["thinking_token_budget"] = self.thinking.budget_tokens
        if self.thinking is None or self.thinking.display == "omitted":
            made["include_reasoning"] = False  # who does not ask for thoughts has words as the first block
        if self.chat_template_kwargs is not None:
            made["chat_template_kwargs"] = self.chat_template_kwargs
        return made

    @property
    def _effort(self) -> Effort | None:
        if self.thinking is not None and self.thinking.type == "disabled":
            return "none"
        if self.output_config is not None and self.output_config.effort is not None:
            return "xhigh" if self.output_config.effort == "max" else self.output_config.effort
        return "high" if self.thinking is not None and self.thinking.type == "enabled" else None


class MessagesRequest(Conversation):
    """Body of `POST /v1/messages`."""

    max_tokens: Count
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None

    @property
    def for_chat(self) -> dict[str, Any]:
        made = super().for_chat
        same = ("max_tokens", "stream", "temperature", "top_k", "top_p", "cache_salt")
        made |= {name: value for name in same if (value := getattr(self, name)) is not None}
        if self.stop_sequences:
            made["stop"] = self.stop_sequences
        if self.output_config is not None and self.output_config.format is not None:
            wanted = {"name": "answer", "schema": self.output_config.format.schema_}
            made["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return made


class CountRequest(Conversation):
    """Body of `POST /v1/messages/count_tokens`."""


def read_messages(body: bytes, ignore_unknown: bool = False) -> ChatRequest:
    """The chat request that the request in `body` stands for. Raises `BadRequest`."""
    request = read(body, MessagesRequest, MESSAGES_REFUSED, ignore_unknown, MESSAGES_WITHOUT_EFFECT)
    return standing_for(ChatRequest, request.for_chat)


def read_count(body: bytes, ignore_unknown: bool = False) -> ChatRequest:
    """The conversation whose tokens are to be counted. Raises `BadRequest`."""
    request = read(body, CountRequest, MESSAGES_REFUSED, ignore_unknown, MESSAGES_WITHOUT_EFFECT)
    return standing_for(ChatRequest, request.for_chat)


# ── answers: msgspec, as a stream has many of them ────────────────────────────────────────────────────────


class MessagesUsage(msgspec.Struct):
    """Tokens: those of the prompt that were not cached, those that were, and those of the answer, thoughts among
    them.
    """

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: dict[Literal["thinking_tokens"], int]


class MessagesErrorDetail(msgspec.Struct):
    """What went wrong."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "api_error",
        "overloaded_error",
        "timeout_error",
    ]
    message: str


class MessagesError(msgspec.Struct):
    """Body of every answer of this API that is not a success, and the last event of a stream that broke."""

    error: MessagesErrorDetail
    type: Literal["error"] = "error"


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnswerTextBlock(msgspec.Struct, tag="text", tag_field="type"):
    """Words of the answer."""

    text: str


class AnswerThinkingBlock(msgspec.Struct, tag="thinking", tag_field="type"):
    """What the model thought. Nothing is signed here."""

    thinking: str
    signature: str = ""


class AnswerToolUseBlock(msgspec.Struct, tag="tool_use", tag_field="type"):
    """A call."""

    id: str
    name: str
    input: dict[str, Any]


class MessagesAnswer(msgspec.Struct, kw_only=True):
    """Answer to `POST /v1/messages`."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerTextBlock | AnswerThinkingBlock | AnswerToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(msgspec.Struct):
    """Answer to `POST /v1/messages/count_tokens`."""

    input_tokens: int


class MessageStart(msgspec.Struct, tag="message_start", tag_field="type"):
    """The first event of a stream: the answer without content."""

    message: MessagesAnswer


class BlockStart(msgspec.Struct, tag="content_block_start", tag_field="type"):
    """A block begins, empty."""

    index: int
    content_block: AnswerTextBlock | AnswerThinkingBlock | AnswerToolUseBlock


class TextDelta(msgspec.Struct, tag="text_delta", tag_field="type"):
    """More of a text."""

    text: str


class ThinkingDelta(msgspec.Struct, tag="thinking_delta", tag_field="type"):
    """More of a thought."""

    thinking: str


class SignatureDelta(msgspec.Struct, tag="signature_delta", tag_field="type"):
    """The end of a thought. Nothing is signed here."""

    signature: str


class InputDelta(msgspec.Struct, tag="input_json_delta", tag_field="type"):
    """More of the JSON that a call is given."""

    partial_json: str


class BlockDelta(msgspec.Struct, tag="content_block_delta", tag_field="type"):
    """More of a block."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(msgspec.Struct, tag="content_block_stop", tag_field="type"):
    """A block is complete."""

    index: int


class Ending(msgspec.Struct):
    """What ended an answer."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag="message_delta", tag_field="type"):
    """The answer is complete."""

    delta: Ending
    usage: MessagesUsage
    """Of all of it."""


class MessageStop(msgspec.Struct, tag="message_stop", tag_field="type"):
    """The last event."""


MessagesEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
