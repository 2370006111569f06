"""When requests of an open loop are sent: decided before the first one, so that no slow answer delays the next."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator


def poisson(rate: float, seed: str) -> Iterator[float]:
    """Arrival times, in seconds from the start: `rate` a second on average, each independent of the others.

    An infinite rate is all at once.
    """
    if math.isinf(rate):
        yield from itertools.repeat(0.0)
    rng = random.Random(seed)
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


def until(arrivals: Iterator[float], end: float) -> Iterator[float]:
    """Those before `end`."""
    return itertools.takewhile(lambda at: at < end, arrivals)
