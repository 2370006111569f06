"""`POST /v1/completions`: the request, and the answer, which is also an event of its stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from quire_schemas import wire
from quire_schemas.openai.answer import (
    Answer,
    AnswerOnRequest,
    FinishReason,
    PromptLogprobs,
    RequestMetrics,
    Usage,
)
from quire_schemas.openai.body import Refusal, read
from quire_schemas.openai.request import MAX_INT, MAX_PROMPTS, Prompt, PromptsAsSent, read_prompts
from quire_schemas.openai.sampling import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    SAMPLING_REFUSED,
    SamplingFields,
    check_min_tokens,
)

COMPLETION_REFUSED: Final[Mapping[str, Refusal]] = {
    **SAMPLING_REFUSED,
    "suffix": Refusal("filling in the middle is not honoured by this version", ("",)),
    "return_prompt_text": Refusal("use echo", (False,)),
    "prompt_embeds": Refusal("prompts are text or token ids"),
    "separate_reasoning": Refusal("a completion is the text as the model writes it", (False,)),
    "stream_reasoning": Refusal("a completion is the text as the model writes it", (True,)),
}


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`. `max_tokens` is 16 when not given, as OpenAI has it."""

    prompt: Annotated[list[Prompt], PlainValidator(read_prompts, json_schema_input_type=PromptsAsSent)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    """0 writes nothing: for the log-probabilities of the prompt."""
    logprobs: Annotated[int, Field(ge=-1, le=MAX_TOP_LOGPROBS)] | None = None
    """With `echo`, of the prompt's tokens, too. -1 is the whole vocabulary."""
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """So many are made, and the `n` with the highest mean log-probability are the answer."""

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise PydanticCustomError("max_tokens", "0 is only for requests with echo or prompt_logprobs")
        shaping = {"use_beam_search": self.use_beam_search, "script": self.script}
        if self.constraint is not None:
            shaping[self.constraint.field] = True
        for name in [name for name, asked in shaping.items() if asked and self.max_tokens == 0]:
            raise PydanticCustomError("max_tokens", "0 cannot be combined with '{name}'", {"name": name})
        if self.sequences > (self.n or 1) and self.max_tokens == 0:
            raise PydanticCustomError("best_of", "above n chooses among texts, and max_tokens 0 writes none")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise PydanticCustomError("best_of", "must not be below n")
        if self.sequences > (self.n or 1) and self.stream:
            raise PydanticCustomError("best_of", "above n is only for requests without stream: true")
        if self.sequences > (self.n or 1) and self.logprobs_mode in ("raw_logits", "processed_logits"):
            raise PydanticCustomError(
                "best_of", "above n goes by log-probabilities, and logprobs_mode asks for logits"
            )
        if len(self.prompt) * self.sequences > MAX_PROMPTS:
            field = "best_of" if self.best_of is not None else "n"
            raise PydanticCustomError(field, f"times the number of prompts must not be above {MAX_PROMPTS}")
        check_min_tokens(self.min_tokens, self.asked_tokens)
        return self

    @property
    def asked_tokens(self) -> int:
        return self.max_tokens if self.max_tokens is not None else 16

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def scored_prompt(self) -> int | None:
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        counts = [count for count in asked if count is not None]
        return None if not counts else wire.WHOLE_VOCABULARY if wire.WHOLE_VOCABULARY in counts else max(counts)

    @property
    def sequences(self) -> int:
        return max(self.n or 1, self.best_of or 1)


def read_completion(body: bytes, ignore_unknown: bool = False) -> CompletionRequest:
    """The completion request in `body`. Raises `BadRequest`."""
    return read(body, CompletionRequest, COMPLETION_REFUSED, ignore_unknown)


class CompletionLogprobs(Answer):
    """Log-probabilities in a completion choice: parallel lists, one entry a token, one that ended it included.

    Clients that have a text scored with `echo` and one token more count on that token's entry, whatever it is.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    """None for a prompt's first token: nothing comes before it."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters from the beginning of the choice's text, an echoed prompt included."""


class CompletionChoice(AnswerOnRequest):
    """One continuation, or in a stream its next part."""

    on_request = frozenset({"prompt_logprobs", "token_ids", "prompt_token_ids"})
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    """In a stream in the last event of a choice alone."""
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(AnswerOnRequest):
    """Answer to a completion request, and one event of its stream."""

    on_request = frozenset({"metrics"})
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
