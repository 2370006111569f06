"""How `quire.LLM` chooses tokens: `SamplingParams` and `BeamSearchParams`, checked when they are made, and what an
engine is told of them.

The names are those that users of other engines know, and mean what they mean in the HTTP API. As there, a name
that is not honoured is refused (here by a TypeError) unless its value asks for nothing, and never ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, TypeVar, get_args

from pydantic import BaseModel

from quire.arguments import flag, number, one_of, texts, token_ids, whole
from quire_schemas import wire
from quire_schemas.openai.body import BadRequest, asks_for_nothing, read_part
from quire_schemas.openai.completions import COMPLETION_REFUSED
from quire_schemas.openai.sampling import RepetitionDetection
from quire_schemas.openai.structured import StructuredOutputs

if TYPE_CHECKING:
    from quire.text import Tokenizer

_S = TypeVar("_S", bound=BaseModel)


class _Refusal(NamedTuple):
    """Why a name is not honoured, what to do instead, and the values that ask for nothing."""

    reason: str
    hint: str
    neutral: tuple[object, ...] = ()


_BEAMS: Final = ("it belongs to beam search", "LLM.beam_search(prompts, BeamSearchParams(…))")
_WHOLE: Final = ("outputs are given whole, when all are there", "leave it out")
_SHAPES_A_DRAW: Final = ("a beam search draws nothing", "leave it out, or draw with SamplingParams")
_REFUSED: Final[Mapping[str, _Refusal]] = {
    "best_of": _Refusal(
        "the best of several are chosen over HTTP only", "use n and compare cumulative_logprob", (1,)
    ),
    "use_beam_search": _Refusal(*_BEAMS, (False,)),
    "length_penalty": _Refusal(*_BEAMS, (1, 1.0)),
    "early_stopping": _Refusal(*_BEAMS, (False,)),
    "output_kind": _Refusal(*_WHOLE),
    "stream_interval": _Refusal(*_WHOLE, (1,)),
    "guided_decoding": _Refusal("it is another version's name", "use structured_outputs"),
    "response_format": _Refusal("it is a name of the HTTP API alone", "use structured_outputs"),
    "logits_processors": _Refusal(
        "no code is run between the logits and the draw", "use logit_bias, allowed_token_ids or bad_words", ([],)
    ),
    "skip_reading_prefix_cache": _Refusal(
        "one prompt alone cannot be kept from the cache", "LLM(…, prefix_caching=False)", (False,)
    ),
    "trace_decode_token_ids": _Refusal("tokens are not traced", "outputs have token_ids", (False,)),
    **{
        name: _Refusal(COMPLETION_REFUSED[name].reason, "leave it out", COMPLETION_REFUSED[name].neutral)
        for name in (
            "watermarking",
            "prompt_logprob_token_ids",
            "prompt_logprob_start",
            "flat_logprobs",
            "spaces_between_special_tokens",
            "extra_args",
            "routed_experts_prompt_start",
        )
    },
}
"""Names that other engines know."""
_REFUSED_OF_BEAMS: Final[Mapping[str, _Refusal]] = {
    "n": _Refusal("as many texts are given as there are beams", "use beam_width"),
    "early_stopping": _Refusal("a beam search ends when no better text can be found", "leave it out", (False,)),
    "temperature": _Refusal(*_SHAPES_A_DRAW, (0, 0.0)),
    "top_p": _Refusal(*_SHAPES_A_DRAW, (1, 1.0)),
    "top_k": _Refusal(*_SHAPES_A_DRAW, (0, -1)),
    "min_p": _Refusal(*_SHAPES_A_DRAW, (0, 0.0)),
    "seed": _Refusal(*_SHAPES_A_DRAW),
    "stop": _Refusal("stop strings have no meaning in a beam search", "use stop_token_ids", ([],)),
    "logprobs": _Refusal("a text has its cumulative_logprob alone", "leave it out"),
}


class _Named(type):
    """Makes parameters of names that they have; others are refused in words that help."""

    refused: Mapping[str, _Refusal]

    def __call__(cls, *args: Any, **given: Any) -> Any:
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name in [name for name in given if name not in known]:
            refusal = cls.refused.get(name)
            if refusal is None:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]!r}?" if near else f"the names are {', '.join(known)}"
                raise TypeError(f"{cls.__name__} has no {name!r}\nhint: {hint}")
            if not asks_for_nothing(given[name], refusal.neutral):
                raise TypeError(
                    f"{cls.__name__}: {name!r} is not honoured: {refusal.reason}\nhint: {refusal.hint}"
                )
            del given[name]
        return super().__call__(*args, **given)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams(metaclass=_Named):
    """How the answers to one prompt are chosen. Wrong names are a TypeError, values out of bounds a ValueError.

    The defaults are those of the field's engines: one sampled answer of at most 16 tokens.
    """

    n: int = 1
    """Answers to each prompt. With a seed they differ from each other and repeat from run to run."""
    max_tokens: int | None = 16
    """None: as many as the context has room for."""
    min_tokens: int = 0
    """No stop token and no stop string ends an answer before so many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1 are off."""
    min_p: float = 0.0
    seed: int | None = None
    """None: drawn from the engine's, so that prompts differ."""
    stop: str | Sequence[str] | None = None
    """Strings that end an answer; they are not part of its text unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] | None = None
    """Ids that end an answer besides the checkpoint's own; never among its `token_ids`."""
    include_stop_str_in_output: bool = False
    """The text keeps the stop string or the stop token that ended it."""
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    """Token id to what is added to its logit, from -100 to 100."""
    allowed_token_ids: Sequence[int] | None = None
    """No other id is chosen."""
    bad_words: Sequence[str] | None = None
    """Texts that never come into an answer in the tokens that stand for them, with or without a space before."""
    thinking_token_budget: int | None = None
    """Tokens that thoughts may have; then they are closed. Only for models that mark their thoughts."""
    repetition_detection: Mapping[str, Any] | None = None
    """`max_pattern_size`, `min_count` and, 1 unless given, `min_pattern_size`: an answer whose last tokens are one
    pattern of such a size so many times over ends, with the finish reason `repetition`.
    """
    truncate_prompt_tokens: int | None = None
    """A longer prompt loses its beginning, so that so many tokens are left; -1: what there is no room for."""
    truncation_side: Literal["left", "right"] | None = None
    """`right`: it loses its end."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and those of so many of the likeliest; -1: of all."""
    logprob_token_ids: Sequence[int] | None = None
    """Ids whose log-probabilities are reported at every position besides."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, which is then computed and not read from a cache."""
    logprobs_mode: wire.LogprobsMode = "raw_logprobs"
    """Of the model's own logits (`raw_`) or as the draw sees them (`processed_`); logits or their logs."""
    detokenize: bool = True
    """False: outputs have ids alone, and `text` is empty."""
    skip_special_tokens: bool = True
    structured_outputs: Mapping[str, Any] | None = None
    """What each answer is to be: one of `json`, `regex`, `choice`, `grammar`, `json_object`, `structural_tag`,
    as in the HTTP API (docs/structured-output.md).
    """

    refused: ClassVar[Mapping[str, _Refusal]] = _REFUSED

    def __post_init__(self) -> None:
        whole("n", self.n, 1)
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens, 1)
        whole("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}\nhint: lower it")
        number("temperature", self.temperature, 0, None, hint="0 is greedy")
        number("top_p", self.top_p, 0, 1, above=True, hint="1 is off")
        whole("top_k", self.top_k, -1, hint="0 and -1 are off")
        number("min_p", self.min_p, 0, 1, hint="0 is off")
        if self.seed is not None:
            whole("seed", self.seed, -(2**63), 2**63 - 1)
        number("presence_penalty", self.presence_penalty, -2, 2, hint="0 is off")
        number("frequency_penalty", self.frequency_penalty, -2, 2, hint="0 is off")
        least, most = wire.MIN_REPETITION_PENALTY, wire.MAX_REPETITION_PENALTY
        number("repetition_penalty", self.repetition_penalty, least, most, hint="1 is off")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), -1, hint="-1 is the whole vocabulary")
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            flag(name, getattr(self, name))
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            token_ids(name, getattr(self, name))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: nothing could be chosen\nhint: None allows every token")
        if not isinstance(self.logit_bias, Mapping | None):
            raise TypeError(f"logit_bias must be a mapping of token id to bias, not {self.logit_bias!r}")
        for key, bias in (self.logit_bias or {}).items():
            whole("logit_bias: a token id", key, 0)
            number(f"logit_bias of {key}", bias, -100, 100)
        if not isinstance(self.stop, str):
            texts("stop", self.stop, "a string or several")
        if "" in self.stops:
            raise ValueError("stop: an empty string would end every answer at once\nhint: leave it out")
        if self.stops and not self.detokenize:
            raise ValueError("stop needs text, and detokenize is False\nhint: use stop_token_ids")
        texts("bad_words", self.bad_words)
        if "" in (self.bad_words or ()):
            raise ValueError("bad_words: an empty string would ban every token\nhint: leave it out")
        if self.thinking_token_budget is not None:
            whole("thinking_token_budget", self.thinking_token_budget, 0, hint="None is without a limit")
        if self.truncate_prompt_tokens is not None:
            whole("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, hint="-1 is the room that there is")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens must be -1 or at least 1, not 0\nhint: None cuts nothing")
        if self.truncation_side is not None:
            one_of("truncation_side", self.truncation_side, ("left", "right"))
            if self.truncate_prompt_tokens is None:
                raise ValueError(
                    "truncation_side needs truncate_prompt_tokens\nhint: -1 is the room that there is"
                )
        one_of("logprobs_mode", self.logprobs_mode, get_args(wire.LogprobsMode))
        if self.logprobs is None and self.prompt_logprobs is None:
            for name, asks in (
                ("logprob_token_ids", bool(self.logprob_token_ids)),
                ("logprobs_mode", self.logprobs_mode != "raw_logprobs"),
            ):
                if asks:
                    raise ValueError(f"{name} needs logprobs or prompt_logprobs\nhint: logprobs=0 is enough")
        _structured(self.structured_outputs)
        _repetition(self.repetition_detection)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def constrained_by(self) -> str:
        """What an answer is held to, in the words of an error; empty if it is not."""
        shape = _shaped("structured_outputs", self.structured_outputs, StructuredOutputs)
        return "" if shape is None else shape.constraint.field

    def sampling(self, room: int, vocabulary: int, tokenizer: Callable[[], Tokenizer]) -> wire.Sampling:
        """What the engine is told; `room` is what `max_tokens` None stands for. Asks for the tokenizer if need be.

        Raises `quire.text.ParamRefused`, and ValueError if there is no room for `min_tokens`.
        """
        from quire.text import params

        max_tokens = room if self.max_tokens is None else self.max_tokens
        if self.min_tokens > max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, and the context has room for {max_tokens}\nhint: lower it"
            )
        params.check_ids(
            {
                "logit_bias": self.logit_bias or (),
                "stop_token_ids": self.stop_token_ids or (),
                "allowed_token_ids": self.allowed_token_ids or (),
                "logprob_token_ids": self.logprob_token_ids or (),
            },
            vocabulary,
        )
        budget = self.thinking_token_budget
        return wire.Sampling(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            top_k=max(self.top_k, 0),
            min_p=float(self.min_p),
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            repetition_penalty=float(self.repetition_penalty),
            logit_bias={key: float(bias) for key, bias in (self.logit_bias or {}).items()},
            allowed_token_ids=tuple(dict.fromkeys(self.allowed_token_ids or ())),
            bad_words=params.bad_words(tokenizer(), self.bad_words, vocabulary) if self.bad_words else (),
            thinking=None if budget is None else params.thinking(tokenizer(), budget, vocabulary),
            repetition=_repetition(self.repetition_detection),
            logprobs=self.logprobs,
            structured=_structured(self.structured_outputs),
            logprob_token_ids=tuple(dict.fromkeys(self.logprob_token_ids or ())),
            prompt_logprobs=self.prompt_logprobs,
            logprobs_mode=self.logprobs_mode,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchParams(metaclass=_Named):
    """How `LLM.beam_search` looks for the likeliest texts, by log-probability ÷ tokens ^ `length_penalty`."""

    beam_width: int
    max_tokens: int
    min_tokens: int = 0
    length_penalty: float = 1.0
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    """Texts keep the stop token that ended them."""
    skip_special_tokens: bool = True

    refused: ClassVar[Mapping[str, _Refusal]] = _REFUSED_OF_BEAMS

    def __post_init__(self) -> None:
        whole("beam_width", self.beam_width, 1)
        whole("max_tokens", self.max_tokens, 1)
        whole("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}\nhint: lower it")
        number("length_penalty", self.length_penalty, -10, 10, hint="1 is the mean, 0 the sum")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            flag(name, getattr(self, name))
        token_ids("stop_token_ids", self.stop_token_ids)

    def sampling(self, vocabulary: int) -> wire.Sampling:
        """What an engine is told. Raises `quire.text.ParamRefused`."""
        from quire.text import params

        params.check_ids({"stop_token_ids": self.stop_token_ids or ()}, vocabulary)
        return wire.Sampling(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=0.0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )


def _structured(asked: Mapping[str, Any] | None) -> wire.Structured | None:
    shape = _shaped("structured_outputs", asked, StructuredOutputs)
    return None if shape is None else shape.constraint.structured


def _repetition(asked: Mapping[str, Any] | None) -> wire.Repetition | None:
    shape = _shaped("repetition_detection", asked, RepetitionDetection)
    return None if shape is None else shape.repetition


def _shaped(name: str, asked: object, shape: type[_S]) -> _S | None:
    """`asked` in the form that the HTTP API gives it."""
    if asked is None:
        return None
    if not isinstance(asked, Mapping):
        raise TypeError(f"{name} must be a mapping, not {asked!r}\nhint: its entries are those of the HTTP API")
    try:
        return read_part(name, asked, shape)
    except BadRequest as error:
        raise ValueError(f"{error.message.rstrip('.')}\nhint: its entries are those of the HTTP API") from None
