"""How `quire.LLM` chooses tokens: `SamplingParams` and `BeamSearchParams`, checked when they are made, and what an
engine is told of them.

The names are those that users of other engines know. A name that this version does not honour is a TypeError that
says so, never ignored.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from pydantic import ValidationError

from quire_schemas import wire
from quire_schemas.openai import StructuredOutputs

_BEAMS: Final = "it belongs to beam search: LLM.beam_search(prompts, BeamSearchParams(…))"
_REFUSED: Final[Mapping[str, str]] = {
    "best_of": "choosing the best of several is not honoured by this version; use n",
    "use_beam_search": _BEAMS,
    "length_penalty": _BEAMS,
    "early_stopping": _BEAMS,
    "output_kind": "outputs are given whole, when all are there",
    "stream_interval": "outputs are given whole, when all are there",
    "extra_args": "its entries have no meaning here",
}
"""Names that other engines know, and why this one does not honour them."""
_NOT_YET: Final = frozenset(
    {
        "prompt_logprob_token_ids",
        "prompt_logprob_start",
        "flat_logprobs",
        "spaces_between_special_tokens",
        "guided_decoding",
        "bad_words",
        "skip_reading_prefix_cache",
        "thinking_token_budget",
        "repetition_detection",
        "watermarking",
        "routed_experts_prompt_start",
        "trace_decode_token_ids",
        "truncate_prompt_tokens",
        "logits_processors",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
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
    """Ids that end an answer besides the checkpoint's own; never part of it."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    """Token id to what is added to its logit, from -100 to 100."""
    allowed_token_ids: Sequence[int] | None = None
    """No other id is chosen."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and those of so many of the likeliest; -1: of all."""
    logprob_token_ids: Sequence[int] | None = None
    """Ids whose log-probabilities are reported at every position besides."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, which is then computed and not read from a cache."""
    detokenize: bool = True
    """False: outputs have ids alone, and `text` is empty."""
    skip_special_tokens: bool = True
    structured_outputs: Mapping[str, Any] | None = None
    """What each answer is to be: one of `json`, `regex`, `choice`, `grammar`, `json_object`, `structural_tag`,
    as in the HTTP API (docs/structured-output.md).
    """

    def __new__(cls, *args: Any, **given: Any) -> SamplingParams:
        """Refuse names that `__init__` does not have, in words that help."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name in known:
                continue
            if name in _REFUSED:
                raise TypeError(f"SamplingParams: {name!r} is not honoured: {_REFUSED[name]}")
            if name in _NOT_YET:
                raise TypeError(f"SamplingParams: {name!r} is not honoured by this version")
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"the names are {', '.join(known)}"
            raise TypeError(f"SamplingParams has no {name!r}\nhint: {hint}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        _whole("n", self.n, 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        _number("temperature", self.temperature, 0, None, hint="0 is greedy")
        _number("top_p", self.top_p, 0, 1, above=True, hint="1 is off")
        _whole("top_k", self.top_k, -1, hint="0 and -1 are off")
        _number("min_p", self.min_p, 0, 1, hint="0 is off")
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
        _number("presence_penalty", self.presence_penalty, -2, 2, hint="0 is off")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, hint="0 is off")
        _number("repetition_penalty", self.repetition_penalty, 0, None, above=True, hint="1 is off")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), -1, hint="-1 is the whole vocabulary")
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            for index in getattr(self, name) or ():
                _whole(name, index, 0)
        if self.logprob_token_ids and self.logprobs is None and self.prompt_logprobs is None:
            raise ValueError("logprob_token_ids needs logprobs or prompt_logprobs\nhint: logprobs=0 is enough")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: nothing could be chosen\nhint: None allows every token")
        for key, bias in (self.logit_bias or {}).items():
            _whole("logit_bias: a token id", key, 0)
            _number(f"logit_bias of {key}", bias, -100, 100)
        for stop in self.stops:
            if not isinstance(stop, str):
                raise TypeError(f"stop must be a string or several, not {stop!r}")
            if not stop:
                raise ValueError("stop: an empty string would end every answer at once")
        if self.stops and not self.detokenize:
            raise ValueError("stop needs text, and detokenize is False\nhint: use stop_token_ids")
        _structured(self.structured_outputs)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, index: int, room: int) -> wire.Sampling:
        """What the engine is told of answer `index`; `room` is what `max_tokens` None stands for."""
        return wire.Sampling(
            max_tokens=room if self.max_tokens is None else self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            top_k=max(self.top_k, 0),
            min_p=float(self.min_p),
            # as the router does it: the answers to one seeded prompt must differ from each other
            seed=self.seed if self.seed is None or index == 0 else (self.seed + index) % 2**63,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            repetition_penalty=float(self.repetition_penalty),
            logit_bias={key: float(bias) for key, bias in (self.logit_bias or {}).items()},
            allowed_token_ids=tuple(dict.fromkeys(self.allowed_token_ids or ())),
            logprobs=self.logprobs,
            structured=_structured(self.structured_outputs),
            logprob_token_ids=tuple(dict.fromkeys(self.logprob_token_ids or ())),
            prompt_logprobs=self.prompt_logprobs if index == 0 else None,  # it is one prompt
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchParams:
    """How `LLM.beam_search` looks for the likeliest texts, by log-probability ÷ tokens ^ `length_penalty`."""

    beam_width: int
    max_tokens: int
    min_tokens: int = 0
    length_penalty: float = 1.0
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _whole("beam_width", self.beam_width, 1)
        _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _number("length_penalty", self.length_penalty, -10, 10)

    def sampling(self) -> wire.Sampling:
        """What an engine is told."""
        return wire.Sampling(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=0.0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )


def _structured(asked: Mapping[str, Any] | None) -> wire.Structured | None:
    if asked is None:
        return None
    try:
        return StructuredOutputs.model_validate(dict(asked)).constraint.structured
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("structured_outputs", *first["loc"])))
        raise ValueError(f"{where}: {first['msg']}") from None


def _whole(name: str, value: object, least: int, most: int | None = None, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    _within(name, value, least, most, False, hint)


def _number(
    name: str, value: object, least: float, most: float | None, *, above: bool = False, hint: str = ""
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value}")
    _within(name, value, least, most, above, hint)


def _within(name: str, value: float, least: float, most: float | None, above: bool, hint: str) -> None:
    low = value <= least if above else value < least
    if low or (most is not None and value > most):
        bounds = f"{'above' if above else 'at least'} {least}" + ("" if most is None else f" and at most {most}")
        raise ValueError(f"{name} must be {bounds}, not {value}" + (f"\nhint: {hint}" if hint else ""))
