"""The fields that all requests for text share, with their bounds, and those that all of them refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from quire_schemas import wire
from quire_schemas.openai.body import NOT_YET, Refusal, asks_for_nothing, shown
from quire_schemas.openai.request import MAX_INT, Count, ModelRequest, Shape, TokenId, are_ids
from quire_schemas.openai.structured import Constraint, ResponseFormat, StructuredOutputs

MAX_CHOICES: Final = 16
MAX_STOPS: Final = 16
MAX_STOP_BYTES: Final = 256
MAX_LOGIT_BIAS: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_LOGPROB_IDS: Final = 128
MAX_ALLOWED_IDS: Final = 4096
MAX_BAD_WORDS: Final = 64
MAX_SALT: Final = 256
MAX_TIMEOUT: Final = 86_400
MAX_STOP_IDS: Final = 64
MAX_PATTERN: Final = 128
MAX_PATTERN_COUNT: Final = 64
MAX_TEMPERATURE: Final = 2
MAX_TOP_K: Final = 1_000_000

SAMPLING_REFUSED: Final[dict[str, Refusal]] = {
    "watermarking": Refusal(f"watermarking {NOT_YET}", (False,)),
    "early_stopping": Refusal("a beam search ends when no better text can be found", (False,)),
    "spaces_between_special_tokens": Refusal(
        "it is true or false, and either way the tokenizers read here put no spaces there", (True, False)
    ),
    "stream_interval": Refusal("a stream has one event for each step of the engine", (1,)),
    "prompt_logprob_token_ids": Refusal("use logprob_token_ids with prompt_logprobs", ([],)),
    "prompt_logprob_start": Refusal("prompt_logprobs are of the whole prompt", (0,)),
    "flat_logprobs": Refusal("log-probabilities have one form here", (False,)),
    "detokenize": Refusal("answers are text; ids are added by return_token_ids", (True,)),
    "output_kind": Refusal("use stream"),
    "extra_args": Refusal("its entries have no meaning here", ({},)),
    "skip_reading_prefix_cache": Refusal("a cache_salt of the request's own has that effect", (False,)),
    "trace_decode_token_ids": Refusal(f"it {NOT_YET}; use return_token_ids", (False,)),
    "guided_json": Refusal("send structured_outputs with 'json'"),
    "guided_json_object": Refusal("send structured_outputs with 'json_object'", (False,)),
    "guided_regex": Refusal("send structured_outputs with 'regex'"),
    "guided_choice": Refusal("send structured_outputs with 'choice'"),
    "guided_grammar": Refusal("send structured_outputs with 'grammar'"),
    "guided_whitespace_pattern": Refusal("send structured_outputs with 'whitespace_pattern'"),
    "guided_decoding_backend": Refusal("there is one way to structured output here"),
    "regex": Refusal("send structured_outputs with 'regex'"),
    "ebnf": Refusal("send structured_outputs with 'grammar'"),
    "json_schema": Refusal("send structured_outputs with 'json', or response_format"),
    "stop_regex": Refusal(f"it {NOT_YET}; use stop"),
    "no_stop_trim": Refusal("use include_stop_str_in_output", (False,)),
    "request_id": Refusal("send the header X-Request-Id"),
    "rid": Refusal("send the header X-Request-Id"),
    "return_weight_versions": Refusal(f"it {NOT_YET}", (False,)),
    "return_token_offsets": Refusal(f"it {NOT_YET}", (False,)),
    "return_hidden_states": Refusal(f"it {NOT_YET}", (False,)),
    "return_cached_tokens_details": Refusal(f"it {NOT_YET}", (False,)),
    "routed_experts_prompt_start": Refusal(f"it {NOT_YET}"),
    "extra_key": Refusal("it is another server's name for cache_salt; use that"),
    "kv_transfer_params": Refusal(f"moving KV between engines {NOT_YET}"),
    "ec_transfer_params": Refusal(f"moving caches between engines {NOT_YET}"),
    "vllm_xargs": Refusal("its entries have no meaning here", ({},)),
    "lora_path": Refusal("an adapter is asked for by its name: model:adapter in 'model'"),
    "session_params": Refusal(f"it {NOT_YET}"),
    "custom_logit_processor": Refusal("code from a request is never run"),
    "custom_params": Refusal(f"it {NOT_YET}"),
    "custom_labels": Refusal("labels of metrics come from the manifest alone"),
}


def _as_list(value: object) -> object:
    if not isinstance(value, str | list):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    return [value] if isinstance(value, str) else value


def _check_stop(value: str) -> str:
    if not value:
        raise PydanticCustomError("stop", "must not be empty")
    if len(value.encode()) > MAX_STOP_BYTES:
        raise PydanticCustomError("stop", f"must not be longer than {MAX_STOP_BYTES} bytes")
    return value


_StopString = Annotated[
    str,
    AfterValidator(_check_stop),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_STOP_BYTES}),
]
_StopAsSent = _StopString | Annotated[list[_StopString], Field(max_length=MAX_STOPS)]
_BiasAsSent = Annotated[
    dict[Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIAS, json_schema_extra={"additionalProperties": False}),
]


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise PydanticCustomError("bias", "must be an object of token id to bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("bias", f"must not have more than {MAX_LOGIT_BIAS} entries")
    made: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise PydanticCustomError(
                "bias", f"must have token ids (whole numbers from 0) as keys, not '{shown(key)}'"
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("bias", f"must have biases from -100 to 100, as that of {key} is not")
        if int(key) in made:
            raise PydanticCustomError("bias", f"must not have the token id {int(key)} twice")
        made[int(key)] = float(bias)
    return made


def _script(value: object) -> str | list[int]:
    if isinstance(value, str) or (isinstance(value, list) and are_ids(value)):
        return value
    raise PydanticCustomError("script", "must be a string or a list of token ids")


class StreamOptions(Shape):
    """How a stream reports usage."""

    include_usage: bool | None = None
    """One more chunk before `[DONE]`, with the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """The usage so far in every chunk."""
    include_obfuscation: Literal[False] | None = None
    """Padding against traffic analysis is not offered: only false."""


class RepetitionDetection(Shape):
    """An answer ends when its last tokens are one pattern, `min_count` times over."""

    max_pattern_size: Annotated[int, Field(ge=1, le=MAX_PATTERN)]
    """Tokens of the longest pattern."""
    min_pattern_size: Annotated[int, Field(ge=1, le=MAX_PATTERN)] = 1
    min_count: Annotated[int, Field(ge=2, le=MAX_PATTERN_COUNT)]

    @model_validator(mode="after")
    def _sizes_are_in_order(self) -> RepetitionDetection:
        if self.min_pattern_size > self.max_pattern_size:
            raise PydanticCustomError("pattern", "must not have min_pattern_size above max_pattern_size")
        return self

    @property
    def repetition(self) -> wire.Repetition:
        """What an engine is told."""
        return wire.Repetition(self.min_pattern_size, self.max_pattern_size, self.min_count)


_NOT_WITH_BEAMS: Final = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "stop", "allowed_token_ids", "bad_words", "thinking_token_budget",
    "repetition_detection",
    "prompt_logprobs", "logprob_token_ids", "script", "stream", "response_format",
    "structured_outputs",
)  # fmt: skip

_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "temperature": (0, 0.0),
    "top_p": (1, 1.0),
    "top_k": (-1, 0),
    "min_p": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "stop": ([],),
    "bad_words": ([],),
    "logprob_token_ids": ([],),
    "stream": (False,),
}
"""Values that ask for nothing."""


class SamplingFields(ModelRequest):
    """What requests for text take. None everywhere means the default: the checkpoint's advice, else OpenAI's."""

    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None
    """0 and -1 are off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: (
        Annotated[float, Field(ge=wire.MIN_REPETITION_PENALTY, le=wire.MAX_REPETITION_PENALTY)] | None
    ) = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[int, float], PlainValidator(_bias, json_schema_input_type=_BiasAsSent)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: (
        Annotated[
            list[_StopString],
            Field(max_length=MAX_STOPS),
            BeforeValidator(_as_list, json_schema_input_type=_StopAsSent),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    max_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)] | None = None
    """Lower goes first; other than 0 only for models whose `batching.policy` is `priority`."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None
    """Cached blocks of the prompt are shared with requests of the same salt alone."""
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT)] | None = None
    """Seconds from the arrival of the request after which it ends with an error, whatever is still missing."""
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_IDS)] | None = None
    """Only these are chosen."""
    bad_words: Annotated[list[_StopString], Field(max_length=MAX_BAD_WORDS)] | None = None
    """Texts that never come into the answer in the tokens that stand for them, with or without a space before."""
    thinking_token_budget: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    """Tokens that thoughts may have; then they are closed. Only for models that mark their thoughts."""
    repetition_detection: RepetitionDetection | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    """A longer prompt loses its beginning (see `truncation_side`). -1: what the context has no room for."""
    truncation_side: Literal["left", "right"] | None = None
    logprobs_mode: wire.LogprobsMode | None = None
    """Of the model's own logits (`raw_`), which is the default, or as the draw sees them; logits or their logs."""
    logprob_token_ids: Annotated[list[TokenId], Field(max_length=MAX_LOGPROB_IDS)] | None = None
    """Ids that are among the alternatives at every position, likely or not."""
    prompt_logprobs: Annotated[int, Field(ge=-1, le=MAX_TOP_LOGPROBS)] | None = None
    """Alternatives to report at each position of the prompt. -1 is the whole vocabulary."""
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """Tokens in log-probabilities are written `token_id:5`."""
    return_metrics: bool | None = None
    """The answer tells where the time went; in a stream, the last event but for the usage."""
    use_beam_search: bool | None = None
    """Look for the `n` likeliest texts (`best_of` widens the search) instead of drawing."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    """Of a beam search, whose texts go by log-probability ÷ tokens ^ `length_penalty`. 1 unless given."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    script: (
        Annotated[str | list[int], PlainValidator(_script, json_schema_input_type=str | list[TokenId])] | None
    ) = None
    """The answer, for models whose runner is scripted alone: text, or token ids."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _one_constraint(self) -> SamplingFields:
        free = self.response_format is None or self.response_format.type == "text"
        if self.structured_outputs is not None and not free:
            raise PydanticCustomError("structured_outputs", "and response_format exclude each other")
        return self

    @model_validator(mode="after")
    def _sampling_fields_agree(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "is only for requests with stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError("prompt_logprobs", "is only for requests without stream: true")
        if self.wanted_logprobs is None and self.prompt_logprobs is None:
            self._check_nothing_reported()
        if self.truncate_prompt_tokens == 0:
            raise PydanticCustomError("truncate_prompt_tokens", "must be -1 or at least 1, not 0")
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise PydanticCustomError("truncation_side", "needs truncate_prompt_tokens")
        self._check_beams()
        return self

    def _check_nothing_reported(self) -> None:
        """What shapes log-probabilities has no meaning where none are reported."""
        by_score = self.sequences > (self.n or 1) and not self.use_beam_search  # best_of goes by them, too
        if self.logprobs_mode not in (None, "raw_logprobs") and not by_score:
            raise PydanticCustomError("logprobs_mode", "needs logprobs or prompt_logprobs")
        for name in ("logprob_token_ids", "return_tokens_as_token_ids"):
            if getattr(self, name):
                raise PydanticCustomError(name, "needs logprobs or prompt_logprobs")

    def _check_beams(self) -> None:
        """A beam search draws nothing, so what shapes a draw or watches it has no meaning there."""
        if not self.use_beam_search:
            if self.length_penalty is not None and self.length_penalty != 1:
                raise PydanticCustomError("length_penalty", "is only for requests with use_beam_search: true")
            return
        if self.wanted_logprobs is not None:
            raise PydanticCustomError("use_beam_search", "cannot be combined with 'logprobs'")
        for name in _NOT_WITH_BEAMS:
            if not asks_for_nothing(getattr(self, name, None), _NEUTRAL.get(name, ())):
                raise PydanticCustomError("use_beam_search", "cannot be combined with '{name}'", {"name": name})

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives to report at each position, -1 for all; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def scored_prompt(self) -> int | None:
        """Alternatives that are needed at each position of the prompt, as in `wanted_logprobs`."""
        return self.prompt_logprobs

    @property
    def logprobs_field(self) -> str:
        """The field that asks for the alternatives in an answer."""
        return "logprobs"

    @property
    def sequences(self) -> int:
        """Sequences that are made of each prompt."""
        return self.n or 1

    @property
    def asked_tokens(self) -> int | None:
        """The most tokens the answer may have, when the request says so."""
        return self.max_tokens

    @property
    def constraint(self) -> Constraint | None:
        """What the answer is held to, if anything."""
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint
        return self.response_format.constraint if self.response_format is not None else None

    @property
    def limit_field(self) -> str:
        """The field that `asked_tokens` is from, or would be."""
        return "max_tokens"


def check_min_tokens(least: int | None, most: int | None) -> None:
    """For the end of a request's validation, when it is known which field has the limit."""
    if least is not None and most is not None and least > most:
        raise PydanticCustomError("min_tokens", "must not be above max_tokens")
