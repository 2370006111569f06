"""Sampling parameters that are about text, turned into what an engine takes: ids.

The router and `quire.llm` both go through here, so that a parameter means the same in a request and in
`SamplingParams`. Each function raises `ParamRefused`, which names the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from quire.text.errors import ParamRefused
from quire.text.tokenizer import Tokenizer
from quire_schemas import wire


def check_ids(given: Mapping[str, Iterable[int]], vocabulary: int) -> None:
    """Raises `ParamRefused` if a parameter of `given` has an id that the model has no logit for."""
    for name, ids in given.items():
        if any(not 0 <= index < vocabulary for index in ids):
            raise ParamRefused(f"'{name}' has a token id outside the vocabulary of {vocabulary}.", param=name)


def bad_words(tokenizer: Tokenizer, words: Sequence[str], vocabulary: int) -> tuple[tuple[int, ...], ...]:
    """The ids of each word as it begins a text, and as it follows a space. Raises `ParamRefused`."""
    # a word that begins with a space says itself what it follows
    texts = [text for word in words for text in ((word,) if word[:1].isspace() else (word, f" {word}"))]
    runs = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    if any(index >= vocabulary for run in runs for index in run):
        raise ParamRefused(f"'bad_words' has a token outside the vocabulary of {vocabulary}.", param="bad_words")
    return tuple(dict.fromkeys(run for run in runs if run))


def thinking(tokenizer: Tokenizer, budget: int, vocabulary: int) -> wire.Thinking:
    """The budget with the tokens that open and close a thought. Raises `ParamRefused` for a model without them."""
    marks = tokenizer.thinking
    if marks is None or max(marks) >= vocabulary:
        raise ParamRefused(
            "'thinking_token_budget' is not honoured for this model: no tokens of it open and close a thought.",
            param="thinking_token_budget",
        )
    return wire.Thinking(budget, marks[:1], marks[1:])


def truncated(
    prompt: list[int], most: int | None, side: Literal["left", "right"] | None, limit: int, asked: int | None
) -> list[int]:
    """`prompt`, or what `truncate_prompt_tokens` (`most`) leaves of a longer one; `side` is where it is cut.

    `limit` is what context and KV cache hold. -1 leaves room there for the `asked` tokens of the answer, or one.
    """
    if most == -1:
        most = max(limit - (asked or 1), 1)
    if most is None or len(prompt) <= most:
        return prompt
    return prompt[:most] if side == "right" else prompt[-most:]
