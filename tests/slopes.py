"""Whether something grows: the slope of a series of readings, and how sure it is.

A line is laid through the readings by least squares. Readings of a process's memory are not independent: it stays
where it is and moves in steps, so a thousand of them tell hardly more than the number of its steps. What is left
of them beside the line is asked how much it resembles itself one reading later (`r`), and the interval is that of
`n * (1 - r) / (1 + r)` readings, at least 3, by Student's t. So a series that wanders widens its interval instead
of proving a leak, and one that climbs steadily, reading after reading, narrows it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

T_975 = (
    (1, 12.71),
    (2, 4.303),
    (3, 3.182),
    (4, 2.776),
    (5, 2.571),
    (7, 2.365),
    (10, 2.228),
    (20, 2.086),
    (60, 2.0),
)
"""Degrees of freedom -> the quantile of Student's t that 97.5 % lie below; between two rows the first counts."""


@dataclass(frozen=True, slots=True)
class Slope:
    """Units of the readings per unit of time, with the 95 % interval around it."""

    value: float
    low: float
    high: float

    def grows(self, bar: float) -> bool:
        """Whether it is at least `bar` and surely more than nothing."""
        return self.value >= bar and self.low > 0


def slope(times: Sequence[float], readings: Sequence[float]) -> Slope:
    """The slope through `readings`, at least 4 of them, at different `times`."""
    count = len(times)
    mean_time, mean = math.fsum(times) / count, math.fsum(readings) / count
    spread = math.fsum((at - mean_time) ** 2 for at in times)
    value = (
        math.fsum((at - mean_time) * (reading - mean) for at, reading in zip(times, readings, strict=True))
        / spread
    )
    left = [reading - mean - value * (at - mean_time) for at, reading in zip(times, readings, strict=True)]
    squares = math.fsum(each**2 for each in left)
    if not squares:
        return Slope(value, value, value)
    alike = math.fsum(one * other for one, other in itertools.pairwise(left)) / squares
    worth = max(count * (1 - max(alike, 0.0)) / (1 + max(alike, 0.0)), 3.0)
    # the spread of times is that of all readings: fewer that tell something are spread by their part of it
    error = math.sqrt(squares / count * worth / (worth - 2) / (spread / count * worth))
    quantile = next((t for degrees, t in reversed(T_975) if degrees <= worth - 2))
    return Slope(value, value - quantile * error, value + quantile * error)
