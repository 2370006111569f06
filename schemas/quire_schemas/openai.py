"""The OpenAI-compatible HTTP shapes: what a request may say, and what an answer looks like.

Every field that clients of this kind of server know is in exactly one of three places:

- a field of `ChatRequest` or `CompletionRequest`: it is honoured;
- `CHAT_REFUSED` or `COMPLETION_REFUSED`: it asks for something this version does not do. A value that asks for
  nothing (null, an empty list, the default) is let through, any other is a `BadRequest` that names the field and
  the reason;
- `WITHOUT_EFFECT`: accepted and not looked at. These describe the caller or the billing, not the answer.

Anything else is a `BadRequest` with a guess at what was meant. `read_chat` and `read_completion` take the body's
bytes and give a request in which every bound holds, so that nothing behind them checks again.

    BadRequest        the body is not a request we can honour; has `message` and `param`
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from quire_schemas import wire
from quire_schemas.wire import MAX_STRUCTURED, Structured

MAX_DEPTH: Final = 64
MAX_MESSAGES: Final = 1024
MAX_CHOICES: Final = 16
MAX_STOPS: Final = 16
MAX_STOP_BYTES: Final = 256
MAX_LOGIT_BIAS: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_LOGPROB_IDS: Final = 128
MAX_ALLOWED_IDS: Final = 4096
MAX_BAD_WORDS: Final = 64
MAX_PROMPTS: Final = 64
MAX_SALT: Final = 256
MAX_TIMEOUT: Final = 86_400
_MAX_INT: Final = 2**31 - 1


class BadRequest(Exception):
    """The body is not a request we can honour. `param` names the field, where one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


# ── what is not in the request models ─────────────────────────────────────────────────────────────────────

WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "user": "names the end user for abuse reports; nothing here reads it",
    "metadata": "the caller's own labels",
    "service_tier": "there is one tier",
    "store": "nothing is stored",
    "safety_identifier": "names the end user, as `user`",
    "prompt_cache_key": "a hint for routing to a prompt cache; requests go by their prompts here",
    "prompt_cache_retention": "a hint for a prompt cache",
    "session_id": "a hint for routing",
    "parallel_tool_calls": "matters only with `tools`, which are refused",
}
"""Fields accepted without effect, and what they are for."""


class Refusal(msgspec.Struct, frozen=True):
    """Why a field is refused, and the values that ask for nothing."""

    reason: str
    neutral: tuple[Any, ...] = ()


_NOT_YET = "is not honoured by this version"
_SAMPLING_REFUSED: Final[dict[str, Refusal]] = {
    "watermarking": Refusal(f"watermarking {_NOT_YET}", (False,)),
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
    "trace_decode_token_ids": Refusal(f"it {_NOT_YET}; use return_token_ids", (False,)),
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
    "stop_regex": Refusal(f"it {_NOT_YET}; use stop"),
    "no_stop_trim": Refusal("use include_stop_str_in_output", (False,)),
    "request_id": Refusal("send the header X-Request-Id"),
    "rid": Refusal("send the header X-Request-Id"),
    "return_weight_versions": Refusal(f"it {_NOT_YET}", (False,)),
    "return_token_offsets": Refusal(f"it {_NOT_YET}", (False,)),
    "return_prompt_text": Refusal(f"it {_NOT_YET}", (False,)),
    "return_hidden_states": Refusal(f"it {_NOT_YET}", (False,)),
    "return_cached_tokens_details": Refusal(f"it {_NOT_YET}", (False,)),
    "routed_experts_prompt_start": Refusal(f"it {_NOT_YET}"),
    "extra_key": Refusal("it is another server's name for cache_salt; use that"),
    "kv_transfer_params": Refusal(f"moving KV between engines {_NOT_YET}"),
    "ec_transfer_params": Refusal(f"moving caches between engines {_NOT_YET}"),
    "vllm_xargs": Refusal("its entries have no meaning here", ({},)),
    "lora_path": Refusal(f"adapters {_NOT_YET}".replace("is not", "are not")),
    "session_params": Refusal(f"it {_NOT_YET}"),
    "custom_logit_processor": Refusal("code from a request is never run"),
    "custom_params": Refusal(f"it {_NOT_YET}"),
    "custom_labels": Refusal("labels of metrics come from the manifest alone"),
}

CHAT_REFUSED: Final[Mapping[str, Refusal]] = {
    **_SAMPLING_REFUSED,
    "best_of": Refusal("choosing the best of several is offered for /v1/completions only", (1,)),
    "tools": Refusal("tool calls are not honoured by this version", ([],)),
    "tool_choice": Refusal("tool calls are not honoured by this version", ("none", "auto")),
    "functions": Refusal("tool calls are not honoured by this version", ([],)),
    "function_call": Refusal("tool calls are not honoured by this version", ("none", "auto")),
    "reasoning_effort": Refusal(f"it {_NOT_YET}; what a template offers goes in chat_template_kwargs"),
    "include_reasoning": Refusal(f"hiding a model's reasoning {_NOT_YET}", (True,)),
    "separate_reasoning": Refusal(f"it {_NOT_YET}", (False,)),
    "stream_reasoning": Refusal(f"it {_NOT_YET}", (True,)),
    "verbosity": Refusal(f"it {_NOT_YET}"),
    "modalities": Refusal("answers are text", (["text"],)),
    "audio": Refusal("answers are text"),
    "prediction": Refusal(f"it {_NOT_YET}"),
    "web_search_options": Refusal("nothing here searches the web"),
    "echo": Refusal("repeating the last message is offered for /v1/completions only", (False,)),
    "documents": Refusal(f"it {_NOT_YET}", ([],)),
    "chat_template": Refusal(
        "a template is code; it comes from the checkpoint or the manifest, not from a request"
    ),
    "media_io_kwargs": Refusal("messages are text", ({},)),
    "mm_processor_kwargs": Refusal("messages are text", ({},)),
    "mm_payload": Refusal("messages are text"),
    "return_mm_kwargs": Refusal("messages are text", (False,)),
}
COMPLETION_REFUSED: Final[Mapping[str, Refusal]] = {
    **_SAMPLING_REFUSED,
    "suffix": Refusal("filling in the middle is not honoured by this version", ("",)),
    "prompt_embeds": Refusal("prompts are text or token ids"),
}
EMBEDDING_REFUSED: Final[Mapping[str, Refusal]] = {
    "messages": Refusal("send texts or token ids as input"),
    "truncate_prompt_tokens": Refusal("an input is never cut short here; send a shorter one", (-1,)),
    "truncation_side": Refusal("an input is never cut short here"),
    "embed_dtype": Refusal("vectors are float32", ("float32",)),
    "endianness": Refusal("base64 has little-endian numbers", ("native", "little")),
    "use_activation": Refusal("vectors have length 1", (True,)),
    "padding": Refusal("inputs are not padded here", (False,)),
    "priority": Refusal(f"priorities of embeddings {_NOT_YET}".replace("is not", "are not"), (0,)),
    "cache_salt": Refusal(f"it {_NOT_YET} for embeddings"),
    "request_id": Refusal("send the header X-Request-Id"),
    "chat_template": Refusal("send texts or token ids as input"),
    "chat_template_kwargs": Refusal("send texts or token ids as input", ({},)),
    "add_generation_prompt": Refusal("send texts or token ids as input", (False,)),
    "continue_final_message": Refusal("send texts or token ids as input", (False,)),
    "stream": Refusal("vectors are not streamed", (False,)),
}
"""Fields refused, by endpoint."""


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _check_stop(value: str) -> str:
    if not value:
        raise PydanticCustomError("stop", "must not be empty")
    if len(value.encode()) > MAX_STOP_BYTES:
        raise PydanticCustomError("stop", f"must not be longer than {MAX_STOP_BYTES} bytes")
    return value


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise PydanticCustomError("bias", "must be an object of token id to bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("bias", f"must not have more than {MAX_LOGIT_BIAS} entries")
    made: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise PydanticCustomError("bias", "must have token ids (whole numbers from 0) as keys")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("bias", "must have biases from -100 to 100")
        made[int(key)] = float(bias)
    return made


def _script(value: object) -> str | list[int]:
    if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)):
        return value
    raise PydanticCustomError("script", "must be a string or a list of token ids")


TokenId = Annotated[int, Field(ge=0, le=_MAX_INT)]
Count = Annotated[int, Field(ge=1, le=_MAX_INT)]


class StreamOptions(_Shape):
    """How a stream reports usage."""

    include_usage: bool | None = None
    """One more chunk before `[DONE]`, with the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """The usage so far in every chunk."""
    include_obfuscation: Literal[False] | None = None
    """Padding against traffic analysis is not offered: only false."""


class RepetitionDetection(_Shape):
    """An answer ends when its last tokens are one pattern, `min_count` times over."""

    max_pattern_size: Annotated[int, Field(ge=1, le=128)]
    """Tokens of the longest pattern."""
    min_pattern_size: Annotated[int, Field(ge=1, le=128)] = 1
    min_count: Annotated[int, Field(ge=2, le=64)]

    @model_validator(mode="after")
    def _sizes_are_in_order(self) -> RepetitionDetection:
        if self.min_pattern_size > self.max_pattern_size:
            raise PydanticCustomError("pattern", "must not have min_pattern_size above max_pattern_size")
        return self

    @property
    def repetition(self) -> wire.Repetition:
        """What an engine is told."""
        return wire.Repetition(self.min_pattern_size, self.max_pattern_size, self.min_count)


# Structured output. What a request says becomes one `Structured`; whether it compiles, the engine knows.

_SPACE: Final = r"(?:[ \n\r\t]|\\[nrt]|\\x(?:20|0[9AaDd]))"
_SPACES: Final = re.compile(rf"(?:{_SPACE}|\[{_SPACE}+\]|\{{\d{{1,4}}(?:,\d{{0,4}})?\}}|[*+?|()])*")


def _schema(value: object) -> dict[str, Any]:
    """A JSON Schema, given as an object or as the text of one."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (ValueError, RecursionError) as error:
            raise PydanticCustomError("schema", "must be a JSON Schema: an object, or the text of one") from error
    if not isinstance(value, dict):
        raise PydanticCustomError("schema", "must be a JSON Schema: an object, or the text of one")
    if _depth_and_keys(value)[0] > MAX_DEPTH:
        raise PydanticCustomError("schema", f"must not be nested deeper than {MAX_DEPTH} levels")
    _written(value)
    return value


def _written(value: object) -> str:
    """JSON of no more bytes than a constraint may have."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise PydanticCustomError("schema", "must have no NaN and no infinite number") from error
    return _short(text)


def _short(text: str) -> str:
    size = len(text.encode())
    if size > MAX_STRUCTURED:
        raise PydanticCustomError("schema", f"must not have more than {MAX_STRUCTURED} bytes, not {size}")
    return text


def _spaces(value: str) -> str:
    if len(value) > 256 or not _SPACES.fullmatch(value):
        raise PydanticCustomError("schema", "must be a regular expression of blanks, \\n, \\r and \\t alone")
    return value


Schema = Annotated[dict[str, Any], PlainValidator(_schema)]
ConstraintText = Annotated[str, AfterValidator(_short)]


class TagStructure(_Shape):
    """A structure in free text: its opening, JSON by `schema`, its end."""

    begin: Annotated[str, Field(min_length=1, max_length=1024)]
    schema_: Annotated[Schema, Field(alias="schema")]
    end: Annotated[str, Field(max_length=1024)]


class StructuralTag(_Shape):
    """Free text in which each of `triggers` begins one of the structures whose `begin` starts with it."""

    type: Literal["structural_tag"] | None = None
    structures: Annotated[list[TagStructure], Field(min_length=1, max_length=128)]
    triggers: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(min_length=1, max_length=128)
    ]

    @property
    def text(self) -> str:
        """As a `Structured` has it."""
        structures = [{"begin": s.begin, "schema": s.schema_, "end": s.end} for s in self.structures]
        return _written({"structures": structures, "triggers": self.triggers})


def _tag(value: object) -> StructuralTag:
    """A structural tag, given as an object or as the text of one."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (ValueError, RecursionError) as error:
            raise PydanticCustomError("schema", "must be a structural tag: an object, or its text") from error
    tag = StructuralTag.model_validate(value)
    _short(tag.text)
    return tag


class JsonSchemaFormat(_Shape):
    """The schema of `response_format`. It is kept to the letter, with `strict` or without."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Shape):
    """What the answer is to be, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[TagStructure] | None = None
    triggers: list[str] | None = None

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> ResponseFormat:
        wanted = {"json_schema": ("json_schema",), "structural_tag": ("structures", "triggers")}.get(self.type, ())
        for name in ("json_schema", "structures", "triggers"):
            if (getattr(self, name) is not None) != (name in wanted):
                word = "is required with" if name in wanted else "has no place with"
                raise PydanticCustomError(name, f"{word} type {self.type}")
        if self.type == "structural_tag":
            _tag(
                {
                    "structures": [s.model_dump(by_alias=True) for s in self.structures or ()],
                    "triggers": self.triggers,
                }
            )
        return self

    @property
    def constraint(self) -> Constraint | None:
        if self.type == "json_object":
            return Constraint("response_format", Structured("json_schema", _ANY_OBJECT))
        if self.json_schema is not None:
            text = _written(self.json_schema.schema_)
            return Constraint("response_format.json_schema.schema", Structured("json_schema", text))
        if self.structures is not None and self.triggers is not None:
            tag = StructuralTag(structures=self.structures, triggers=self.triggers)
            return Constraint("response_format", Structured("structural_tag", tag.text))
        return None


_CONSTRAINTS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_ANY_OBJECT: Final = '{"type":"object"}'


class StructuredOutputs(_Shape):
    """What the text is to be: exactly one constraint, and for JSON what may stand between its signs."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    """A JSON Schema."""
    regex: ConstraintText | None = None
    """A regular expression for the whole text; without look-around and back-references."""
    choice: Annotated[list[str], Field(min_length=1, max_length=4096)] | None = None
    """The text is one of these."""
    grammar: ConstraintText | None = None
    """A grammar in Lark's notation."""
    json_object: bool | None = None
    """Any JSON object."""
    structural_tag: Annotated[StructuralTag, PlainValidator(_tag)] | None = None
    """Free text with structures in it."""
    disable_any_whitespace: bool | None = None
    """No blank and no line end between the signs of JSON."""
    whitespace_pattern: Annotated[str, AfterValidator(_spaces)] | None = None
    """A regular expression for what may stand between two of them."""

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        given = [name for name in _CONSTRAINTS if self._value(name) not in (None, False)]
        if len(given) != 1:
            what = "none" if not given else " and ".join(given)
            raise PydanticCustomError(
                "one_constraint", f"must have exactly one of {', '.join(_CONSTRAINTS)}; it has {what}"
            )
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise PydanticCustomError("whitespace_pattern", "and disable_any_whitespace exclude each other")
        spaces = self.disable_any_whitespace or self.whitespace_pattern is not None
        if spaces and given[0] in ("regex", "choice", "grammar"):
            name = "disable_any_whitespace" if self.disable_any_whitespace else "whitespace_pattern"
            raise PydanticCustomError(name, f"is for JSON, and has no place with {given[0]}")
        if self.choice is not None:
            _written(self.choice)
        return self

    def _value(self, name: str) -> object:
        return self.json_ if name == "json" else getattr(self, name)

    @property
    def constraint(self) -> Constraint:
        name = next(name for name in _CONSTRAINTS if self._value(name) not in (None, False))
        spaces = "" if self.disable_any_whitespace else self.whitespace_pattern
        value = self._value(name)
        match name:
            case "json":
                structured = Structured("json_schema", _written(value), spaces)
            case "json_object":
                structured = Structured("json_schema", _ANY_OBJECT, spaces)
            case "choice":
                structured = Structured("choice", _written(value))
            case "structural_tag" if isinstance(value, StructuralTag):
                structured = Structured("structural_tag", value.text, spaces)
            case "regex":
                structured = Structured("regex", str(value))
            case _:
                structured = Structured("grammar", str(value))
        return Constraint(f"structured_outputs.{name}", structured)


class Constraint(msgspec.Struct, frozen=True):
    """What an answer is held to, and the field of the request that says so."""

    field: str
    structured: Structured


class ModelRequest(_Shape):
    """What every request to a model has."""

    model: Annotated[str, Field(min_length=1, max_length=256)]

    @property
    def wants_usage(self) -> bool:
        """One more event of a stream, with the usage."""
        return False

    @property
    def wants_running_usage(self) -> bool:
        """The usage so far in every event of a stream."""
        return False


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

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    """0 and -1 are off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[int, float], PlainValidator(_bias)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: (
        Annotated[
            list[Annotated[str, AfterValidator(_check_stop)]],
            BeforeValidator(_as_list),
            Field(max_length=MAX_STOPS),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None
    max_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-_MAX_INT, le=_MAX_INT)] | None = None
    """Lower goes first; other than 0 only for models whose `batching.policy` is `priority`."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None
    """Cached blocks of the prompt are shared with requests of the same salt alone."""
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT)] | None = None
    """Seconds from the arrival of the request after which it ends with an error, whatever is still missing."""
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_IDS)] | None = None
    """Only these are chosen."""
    bad_words: (
        Annotated[list[Annotated[str, AfterValidator(_check_stop)]], Field(max_length=MAX_BAD_WORDS)] | None
    ) = None
    """Texts that never come into the answer in the tokens that stand for them, with or without a space before."""
    thinking_token_budget: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None
    """Tokens that thoughts may have; then they are closed. Only for models that mark their thoughts."""
    repetition_detection: RepetitionDetection | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=_MAX_INT)] | None = None
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
    use_beam_search: bool | None = None
    """Look for the `n` likeliest texts (`best_of` widens the search) instead of drawing."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    """Of a beam search, whose texts go by log-probability ÷ tokens ^ `length_penalty`. 1 unless given."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    script: Annotated[str | list[int], PlainValidator(_script)] | None = None
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
        if self.logprob_token_ids and self.wanted_logprobs is None and self.prompt_logprobs is None:
            raise PydanticCustomError("logprob_token_ids", "needs logprobs or prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise PydanticCustomError("truncate_prompt_tokens", "must be -1 or at least 1, not 0")
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise PydanticCustomError("truncation_side", "needs truncate_prompt_tokens")
        self._check_beams()
        return self

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

    @property
    def prompt_field(self) -> str:
        """The field that the prompt is from."""
        return "prompt"

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class FunctionCall(_Shape):
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


class ToolCall(_Shape):
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


class Message(_Shape):
    """One turn of the conversation. `developer` is the newer name of `system`, and templates see it as that."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, PlainValidator(_content)] = None
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


class _Conversation(_Shape):
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
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None

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
        _check_min_tokens(self.min_tokens, self.asked_tokens)
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def limit_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"

    @property
    def prompt_field(self) -> str:
        return "messages"

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def logprobs_field(self) -> str:
        return "top_logprobs"


Prompt = str | list[int]


def _prompts(value: object) -> list[Prompt]:
    """`str | str[] | int[] | int[][]` as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            found: list[Prompt] = list(value)
        elif _are_ids(value):
            found = [value]
        elif all(isinstance(item, list) and item and _are_ids(item) for item in value):
            found = list(value)
        else:
            raise PydanticCustomError(
                "prompt", "must be a string, a list of strings, token ids, or lists of token ids"
            )
        if len(found) > MAX_PROMPTS:
            raise PydanticCustomError("prompt", f"must not have more than {MAX_PROMPTS} prompts")
        return found
    raise PydanticCustomError("prompt", "must be a string, a list of strings, token ids, or lists of token ids")


def _are_ids(value: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item <= _MAX_INT for item in value)


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`. `max_tokens` is 16 when not given, as OpenAI has it."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=-1, le=MAX_TOP_LOGPROBS)] | None = None
    """With `echo`, of the prompt's tokens, too. -1 is the whole vocabulary."""
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """So many are made, and the `n` with the highest mean log-probability are the answer."""

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
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
        _check_min_tokens(self.min_tokens, self.asked_tokens)
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


def _inputs(value: object) -> list[Prompt]:
    try:
        return _prompts(value)
    except PydanticCustomError as error:
        raise PydanticCustomError("input", error.message().replace(" prompts", " inputs")) from None


class EmbeddingRequest(ModelRequest):
    """Body of `POST /v1/embeddings`."""

    input: Annotated[list[Prompt], PlainValidator(_inputs)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    """The leading ones alone, for models that were trained for it."""
    pooling: Literal["last", "mean"] | None = None
    """The state of the last token, as is the default, or the mean over all."""
    add_special_tokens: bool | None = None


def _check_min_tokens(least: int | None, most: int | None) -> None:
    if least is not None and most is not None and least > most:
        raise PydanticCustomError("min_tokens", "must not be above max_tokens")


# ── reading a body ────────────────────────────────────────────────────────────────────────────────────────

P = TypeVar("P", bound=BaseModel)
R = TypeVar("R", bound=ModelRequest)


def read_chat(body: bytes) -> ChatRequest:
    """The chat request in `body`. Raises `BadRequest`."""
    return _read(body, ChatRequest, CHAT_REFUSED)


def read_messages(messages: list[Any]) -> list[Message]:
    """The turns of a conversation that comes from nowhere but this process. Raises `BadRequest`."""
    try:
        return _Conversation.model_validate({"messages": messages}).messages
    except ValidationError as error:
        raise _explained(error.errors(include_url=False)[0]) from None


def read_part(name: str, value: Mapping[str, Any], shape: type[P]) -> P:
    """The object that requests have as field `name`, from nowhere but this process. Raises `BadRequest`."""
    try:
        return shape.model_validate(dict(value))
    except ValidationError as error:
        raise _explained(error.errors(include_url=False)[0], name) from None


def read_completion(body: bytes) -> CompletionRequest:
    """The completion request in `body`. Raises `BadRequest`."""
    return _read(body, CompletionRequest, COMPLETION_REFUSED)


def read_embedding(body: bytes) -> EmbeddingRequest:
    """The embedding request in `body`. Raises `BadRequest`."""
    return _read(body, EmbeddingRequest, EMBEDDING_REFUSED)


def _read(body: bytes, kind: type[R], refused: Mapping[str, Refusal]) -> R:
    stated = _json_object(body)
    honoured = kind.model_fields
    kept: dict[str, Any] = {}
    for name, value in stated.items():
        if name in honoured:
            kept[name] = value
        elif name in refused:
            refusal = refused[name]
            if not asks_for_nothing(value, refusal.neutral):
                raise BadRequest(f"'{name}' is not honoured: {refusal.reason}.", name)
        elif name not in WITHOUT_EFFECT:
            raise BadRequest(_unknown(name, [*honoured, *refused, *WITHOUT_EFFECT]), _shown(name))
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False)[0]) from None


def asks_for_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether `value` is None or one of `neutral`, by an equality that keeps true and 1 apart."""
    return value is None or any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
    )


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.7)
    return f"Unknown field '{_shown(name)}'." + (f" Did you mean '{near[0]}'?" if near else "")


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:64])


def _json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, nested at most `MAX_DEPTH` deep, all of its text proper Unicode."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # covers msgspec's errors and broken UTF-8
        value = _json_object_slowly(body)
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    depth, keys = _depth_and_keys(value)
    if depth > MAX_DEPTH:
        raise _too_deep()
    _check_keys(body, keys)
    return value


_MAYBE_KEY: Final = re.compile(rb'"\s*+:')


def _check_keys(body: bytes, keys: int) -> None:
    """Refuse a body with a key twice in one object; `keys` are left of it after decoding.

    Every key in the body has a colon behind it, so with as many such places as keys left, none was lost. Texts
    may have more of them; only then is the body read again, by a reader that shows every pair.
    """
    if len(_MAYBE_KEY.findall(body)) != keys:
        json.loads(body, object_pairs_hook=_distinct, parse_int=float)


def _distinct(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise BadRequest(f"The body has the key '{_shown(key)}' twice in one object.", _shown(key))
        seen.add(key)


def _json_object_slowly(body: bytes) -> object:
    """What the fast reader refused, read once more by one that takes NaN, Infinity and 1e999.

    They are no JSON, but clients send them, and the models can then name the field that has one.
    """
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is a string that is no text
    except UnicodeError:
        raise BadRequest("The body is not valid UTF-8 text.") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    except ValueError:
        raise BadRequest("The body has a number that is too long.") from None
    return value


def _too_deep() -> BadRequest:
    return BadRequest(f"The body is nested deeper than {MAX_DEPTH} levels.")


def _depth_and_keys(value: object) -> tuple[int, int]:
    """How deep objects and lists are nested, counted to just above the limit, and the keys of all objects."""
    level, depth, keys = [value], 0, 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            break
        keys += sum(len(item) for item in level if isinstance(item, dict))
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(child, dict | list)
        ]
    return depth, keys


_WORDS: Final[Mapping[str, str]] = {
    "missing": "is required",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_too_long": "must not be longer than {max_length} characters",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "is too large",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "none_required": "must be null",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} item",
    "too_long": "must not have more than {max_length} items",
    "literal_error": "must be {expected}",
    "extra_forbidden": "is not a field of this object",
}
_CROSS_FIELD: Final = frozenset(
    {
        "stream_options",
        "top_logprobs",
        "max_tokens",
        "continue_final_message",
        "min_tokens",
        "n",
        "best_of",
        "prompt_logprobs",
        "logprob_token_ids",
        "truncate_prompt_tokens",
        "truncation_side",
        "length_penalty",
        "use_beam_search",
        "structured_outputs",
        "json_schema",
        "structures",
        "triggers",
        "whitespace_pattern",
        "disable_any_whitespace",
    }
)
"""Checks over several fields: the error's type is the field to name."""


def _explained(detail: ErrorDetails, *within: str) -> BadRequest:
    """Our words for the first thing that Pydantic found, in the field `within` of a request or in all of it."""
    where = [*within, *detail["loc"]]
    kind = detail["type"]
    words = _WORDS.get(kind)
    if words is None:  # our own checks bring their words; any other kind of the library has none here
        ours = kind in _CROSS_FIELD | {
            "stop",
            "bias",
            "content",
            "content_missing",
            "tool_calls",
            "arguments",
            "prompt",
            "input",
            "script",
            "schema",
            "one_constraint",
            "pattern",
        }
        text = detail["msg"] if ours else "is not valid"
        if kind in _CROSS_FIELD:
            where.append(kind)
    else:
        text = words.format(**detail.get("ctx", {}))
        given = detail["input"]
        if isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < 1e18:
            whole = isinstance(given, float) and given.is_integer()
            if whole and kind in {"int_type", "int_from_float"}:
                text += f", written without a point or an exponent: {int(given)}"
            else:
                text += f", not {int(given) if whole else given}"
    param = ""
    for step in where:
        word = f"[{step}]" if isinstance(step, int) else _shown(str(step))
        param += f".{word}" if param and isinstance(step, str) else word
    return BadRequest(f"'{param}' {text}.", param or None)


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _AnswerOnRequest(_Answer):
    on_request: ClassVar[frozenset[str]] = frozenset()
    """Fields that are only there when they were asked for; all others are there with null."""

    @model_serializer(mode="wrap")
    def _without_what_nobody_asked_for(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        for name in self.on_request:
            if written[name] is None:
                del written[name]
        return written


class PromptTokensDetails(_Answer):
    """Where prompt tokens came from."""

    cached_tokens: int = 0


class Usage(_Answer):
    """Tokens of one request. A token that ended the text counts, as the model made it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class TopLogprob(_Answer):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The chosen token at a position."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(_Answer):
    """Log-probabilities in a chat choice."""

    content: list[TokenLogprob] | None
    refusal: None = None


class AssistantMessage(_Answer):
    """The answer in a chat choice."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length", "repetition"]


class PromptLogprob(_Answer):
    """One token at a position of a prompt; `rank` from 1, where it is known."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By position of the prompt, by id: the token that is there, the likeliest, those named. None at the first."""


class ChatChoice(_AnswerOnRequest):
    """One answer. `token_ids` are all that were drawn, one that ended the text included."""

    on_request = frozenset({"token_ids"})

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatCompletion(_AnswerOnRequest):
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


class ChatDelta(_Answer):
    """What a chunk adds to one answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Answer):
    """One answer's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = None


class ChatChunk(_Answer):
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


class CompletionLogprobs(_Answer):
    """Log-probabilities in a completion choice: parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """None for a prompt's first token: nothing comes before it."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters from the beginning of the choice's text, an echoed prompt included."""


class CompletionChoice(_AnswerOnRequest):
    """One continuation, or in a stream its next part."""

    on_request = frozenset({"prompt_logprobs", "token_ids", "prompt_token_ids"})
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(_Answer):
    """Answer to a completion request, and one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


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


class ModelCard(_Answer):
    """One served name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["quire"] = "quire"
    root: str
    """The resource behind the name: `model/<name>`."""
    parent: str | None = None
    max_model_len: int


class ModelList(_Answer):
    """Answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """Body of every answer that is not a success, and the last event of a stream that broke."""

    error: ErrorDetail
