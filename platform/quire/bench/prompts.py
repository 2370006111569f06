"""Texts of a wanted number of tokens, for a tokenizer that is not known.

A tokenizer of words makes the same tokens of a word wherever it stands behind a blank. So the server is asked, by
its own usage, what each word of a small vocabulary costs, and what a prompt costs that is one word alone (with
what the chat template puts around it). A text is then that first word and words drawn at random, the last ones
chosen so that the sum comes out. A tokenizer that joins words now and then makes it come out a little different;
every row of a result has the server's own count.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from quire.bench.errors import BadSetting

FIRST = "The"
# fmt: off
WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company",
)
# fmt: on
REPEATED = 8
AT_A_TIME = 4
FEWEST = 6
"""Words that can be counted on, without which texts would all be alike."""

Count = Callable[[str], Awaitable[int]]
"""A text -> the tokens of a prompt that is this text alone."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What words cost. `overhead` is the cost of the shortest prompt."""

    overhead: int
    costs: Mapping[str, int]

    def text(self, tokens: int, rng: random.Random, prefix: str = FIRST) -> str:
        """`prefix` and then words of `tokens` tokens, as nearly as words can be put together."""
        words, costs = list(self.costs), self.costs
        left, most = tokens, max(costs.values())
        chosen = [prefix]
        while left >= most:
            drawn = rng.choices(words, k=left // most)
            chosen += drawn
            left -= sum(costs[word] for word in drawn)
        while left > 0:
            fitting = [word for word in words if costs[word] == left] or [
                word for word in words if costs[word] < left
            ]
            if not fitting:
                break
            drawn_word = rng.choice(fitting)
            chosen.append(drawn_word)
            left -= costs[drawn_word]
        return " ".join(chosen)

    def prompt(self, tokens: int, rng: random.Random, prefix: str = FIRST, of_prefix: int = 0) -> str:
        """A prompt of `tokens` tokens in all, of which `prefix` has `of_prefix` beside the overhead."""
        return self.text(max(tokens - self.overhead - of_prefix, 0), rng, prefix)


async def learn(count: Count) -> Vocabulary:
    """Ask what words cost. Raises `BadSetting` where the server's counts make no sense, and what `count`
    raises."""
    overhead = await count(FIRST)
    places = asyncio.Semaphore(AT_A_TIME)

    async def cost(word: str) -> float:
        async with places:
            return (await count(" ".join([FIRST, *[word] * REPEATED])) - overhead) / REPEATED

    try:
        async with asyncio.TaskGroup() as group:
            asked = {word: group.create_task(cost(word)) for word in WORDS}
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    found = {word: task.result() for word, task in asked.items()}
    costs = {
        word: round(each) for word, each in found.items() if round(each) >= 1 and abs(each - round(each)) < 0.3
    }
    if len(costs) < FEWEST:
        raise BadSetting(
            "prompts of a given length cannot be made for this server: its prompt_tokens do not grow by the words",
            "give prompts with --dataset",
        )
    return Vocabulary(overhead, costs)
