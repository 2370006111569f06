"""Rounds in turns, and what they say: whatever the machine does meanwhile meets all that is compared alike.

A ratio is taken within a round or a pair, never between two means of a whole run.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Name = TypeVar("Name")
Measured = TypeVar("Measured")


def in_turns(
    measures: Mapping[Name, Callable[[], Measured]], rounds: int, show: Callable[[Measured], str] | None = None
) -> dict[Name, list[Measured]]:
    """What each measure gave, round by round. A round takes all of them, another one first each time.

    With `show` each round is a line on stdout.
    """
    found: dict[Name, list[Measured]] = {name: [] for name in measures}
    for number in range(rounds):
        turn = number % len(measures)
        for name in [*measures, *measures][turn : turn + len(measures)]:
            found[name].append(measures[name]())
        if show is not None:
            shown = "  ".join(f"{name} {show(took[-1])}" for name, took in found.items())
            print(f"round {number + 1:3}  {shown}", flush=True)
    return found


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


@dataclass(frozen=True, slots=True)
class Against:
    """One thing against another that ran twice in each round: ratios of each round, and those of the A/A pair."""

    ratios: Sequence[float]
    noise: Sequence[float]

    @classmethod
    def of(cls, other: Sequence[float], one: Sequence[float], again: Sequence[float]) -> Against:
        """The ratio of a round is `other` to the geometric mean of `one` and `again`."""
        rounds = list(zip(other, one, again, strict=True))
        return cls(
            [than / statistics.geometric_mean([a, b]) for than, a, b in rounds], [b / a for _, a, b in rounds]
        )

    def row(self, name: str) -> dict[str, float]:
        """The columns of a row: `NAME_ratio` and `aa_ratio`, each the median with the least and the most."""
        columns = {}
        for label, values in ((f"{name}_ratio", self.ratios), ("aa_ratio", self.noise)):
            columns[label] = round(statistics.median(values), 4)
            columns[f"{label}_min"], columns[f"{label}_max"] = round(min(values), 4), round(max(values), 4)
        return columns

    def __str__(self) -> str:
        (ratio, low, high), (noise, *_) = (
            (statistics.median(values), min(values), max(values)) for values in (self.ratios, self.noise)
        )
        return f"{ratio:.3f} ({low:.3f}-{high:.3f}); A/A {noise:.3f}"


def interval(ratios: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float, float]:
    """The geometric mean of `ratios`, and the ends of its 95 % interval by bootstrap: drawn with replacement.

    One ratio has no interval: all three are it.
    """
    rng = random.Random(seed)
    means = sorted(statistics.geometric_mean(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.geometric_mean(ratios), means[int(0.025 * draws)], means[int(0.975 * draws) - 1]
