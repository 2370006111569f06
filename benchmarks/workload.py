"""The work a benchmark does, as data: token ids in, lengths out, all drawn from one seed.

Every system in a run gets the same list. Prompts are random ids: what a token means does not change the cost of
computing it, and random ids make no system lucky with a shared prefix.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt and exactly how many tokens it must produce (EOS is ignored)."""

    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal by its mean, clipped to `low`–`high` tokens. `sigma` is that of the underlying normal."""

    mean: float
    sigma: float = 0.8
    low: int = 8
    high: int = 512

    def draw(self, rng: random.Random) -> int:
        mu = math.log(self.mean) - self.sigma**2 / 2
        return min(self.high, max(self.low, round(rng.lognormvariate(mu, self.sigma))))


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is run: how many requests of which lengths."""

    name: str
    requests: int = 64
    prompt: Lengths = Lengths(mean=160)
    output: Lengths = Lengths(mean=200)
    seed: int = 0

    def jobs(self, vocab_size: int) -> list[Job]:
        """The work for a vocabulary. Ids below 32 are left out: special tokens live there in small models."""
        rng = random.Random(self.seed)
        lengths = [(self.prompt.draw(rng), self.output.draw(rng)) for _ in range(self.requests)]
        return [
            Job(tuple(rng.randrange(32, vocab_size) for _ in range(prompt)), output) for prompt, output in lengths
        ]


SCENARIOS = {
    "mixed": Scenario("mixed"),
    "short": Scenario("short", requests=96, prompt=Lengths(mean=48, high=128), output=Lengths(mean=48, high=96)),
    "smoke": Scenario("smoke", requests=4, prompt=Lengths(mean=24, high=48), output=Lengths(mean=16, high=32)),
}
