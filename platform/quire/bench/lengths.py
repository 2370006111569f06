"""How many tokens a request has: always the same, or drawn."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from quire.bench.errors import BadSetting

MOST = 10_000_000
_HINT = "write 256, uniform:64:512 or lognormal:256:0.8 (median and sigma)"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of whole numbers from 1. `a` and `b` are the bounds of `uniform`, both included, or the
    median and the sigma of the underlying normal of `lognormal`; `fixed` is `a`."""

    kind: Literal["fixed", "uniform", "lognormal"]
    a: float
    b: float = 0.0

    def draw(self, rng: random.Random) -> int:
        match self.kind:
            case "fixed":
                return int(self.a)
            case "uniform":
                return rng.randint(int(self.a), int(self.b))
            case "lognormal":
                return min(MOST, max(1, round(math.exp(rng.gauss(math.log(self.a), self.b)))))


def parse(text: str) -> Lengths:
    """`256`, `uniform:64:512` or `lognormal:256:0.8`. Raises `BadSetting`."""
    kind, *rest = text.split(":")
    try:
        if not rest:
            return _checked(Lengths("fixed", int(kind)), text)
        first, second = rest
        if kind == "uniform":
            return _checked(Lengths("uniform", int(first), int(second)), text)
        if kind == "lognormal":
            return _checked(Lengths("lognormal", int(first), float(second)), text)
    except ValueError:
        pass
    raise BadSetting(f"{text!r} is no number of tokens and no distribution of it", _HINT)


def _checked(lengths: Lengths, text: str) -> Lengths:
    is_good = 1 <= lengths.a <= MOST
    if lengths.kind == "uniform":
        is_good = is_good and lengths.a <= lengths.b <= MOST
    if lengths.kind == "lognormal":
        is_good = is_good and 0 <= lengths.b <= 10
    if not is_good:
        raise BadSetting(f"{text!r} has a length below 1, above {MOST:,}, or bounds in the wrong order", _HINT)
    return lengths
