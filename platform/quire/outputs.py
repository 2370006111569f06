"""What `quire.LLM` gives back. The names are those that users of other engines know."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire_schemas.wire import FinishReason, Timings


@dataclass(slots=True)
class Logprob:
    """One token at one position: its log-probability or its logit, as `logprobs_mode` says; minus infinity where a
    filter left it out, in the `processed_` modes.

    `rank` is 1 for the likeliest; None where it is not known: of tokens that are not among the likeliest reported.
    """

    logprob: float
    rank: int | None
    decoded_token: str | None
    """Its text alone, U+FFFD where it is part of a character; None with `detokenize=False`."""


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `token_ids` has neither a stop token nor what came behind a stop string."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum over the tokens; None unless `logprobs` was asked for, and where they are logits."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token: it and the likeliest ones, by id."""
    finish_reason: FinishReason | None = None
    """`stop`, `length`, `repetition`, or `error`: then `error` says what went wrong with this answer alone."""
    stop_reason: int | str | None = None
    """The stop string that was hit, or the id of a stop token that is not the checkpoint's own."""
    stop_token_id: int | None = None
    """The id that ended it, also when it is the checkpoint's own."""
    error: str | None = None
    timings: Timings | None = None


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt."""

    request_id: str
    prompt: str | None
    """Its text as it was given; None when it was given as ids."""
    prompt_token_ids: list[int]
    """What of it was computed: see `truncate_prompt_tokens`."""
    outputs: list[CompletionOutput]
    """One for each of `n`, by index."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each token of the prompt, as in `CompletionOutput`; None for the first, before which nothing stands."""

    @property
    def finished(self) -> bool:
        """Always true: outputs are given when all are there."""
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that the first answer found computed."""
        timings = self.outputs[0].timings
        return timings.cached_tokens if timings is not None else 0


@dataclass(slots=True)
class EmbeddingOutput:
    """One vector; empty if the engine failed on this prompt, which `error` tells then."""

    embedding: list[float]
    error: str | None = None
    timings: Timings | None = None


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What became of one prompt that was embedded."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
