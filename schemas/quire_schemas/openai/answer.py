"""What answers of several endpoints have in common, and the body of every error."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Answer(BaseModel):
    """What a client reads: no field but those declared."""

    model_config = ConfigDict(extra="forbid", defer_build=True)


class AnswerOnRequest(Answer):
    """An answer some of whose fields are only there when asked for."""

    on_request: ClassVar[frozenset[str]] = frozenset()
    """Fields that are only there when they were asked for; all others are there with null."""

    @model_serializer(mode="wrap")
    def _without_what_nobody_asked_for(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        for name in self.on_request:
            if written.get(name) is None:
                written.pop(name, None)
        return written


class PromptTokensDetails(Answer):
    """Where prompt tokens came from."""

    cached_tokens: int = 0


class CompletionTokensDetails(Answer):
    """What completion tokens were for."""

    reasoning_tokens: int = 0


class Usage(AnswerOnRequest):
    """Tokens of one request. A token that ended the text counts, as the model made it."""

    on_request = frozenset({"completion_tokens_details"})

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None
    """Of chats."""


class RequestMetrics(Answer):
    """Where the time of one request went, in milliseconds as the router saw it; null where it tells nothing."""

    time_to_first_token_ms: float | None
    """From the request's arrival, the queue included."""
    generation_time_ms: float | None
    """From the first token to the last."""
    queue_time_ms: float | None
    """In the engine's queue; of several choices, that of the one that waited longest."""
    mean_itl_ms: float | None
    """Between two tokens of one choice; null without two."""
    tokens_per_second: float | None
    """Of all choices together, after the first token; null without two."""


FinishReason = Literal["stop", "length", "repetition"]


class PromptLogprob(Answer):
    """One token at a position of a prompt; `rank` from 1, where it is known."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By position of the prompt, by id: the token that is there, the likeliest, those named. None at the first."""


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """Body of every answer that is not a success, and the last event of a stream that broke."""

    error: ErrorDetail
