"""The router's page of metrics, read: what each model does, from one look or from two.

Of Prometheus' text format this reads what belongs to a model, replicas added up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

Series = Mapping[tuple[str, str], float]
"""(metric, model) -> its value, replicas added up."""
Buckets = Mapping[str, Sequence[tuple[float, float]]]
"""Of one histogram: model -> (upper bound, count up to it), by rising bound; the last bound is infinite."""
_SAMPLE = re.compile(r"(quire_\w+)\{([^}]*)\} ([0-9.eE+-]+)$")
_MODEL = re.compile(r'(?:^|,)model="([^"]*)"')
_BOUND = re.compile(r'(?:^|,)le="([^"]*)"')


def read(text: str) -> Series:
    """The series of a page of metrics that belong to a model."""
    found: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        model = _MODEL.search(sample[2]) if sample is not None else None
        if sample is None or model is None:
            continue
        key = (sample[1], model[1])
        found[key] = found.get(key, 0.0) + float(sample[3])
    return found


def read_buckets(text: str, histogram: str) -> Buckets:
    """The buckets of one histogram in a page of metrics."""
    found: dict[str, dict[float, float]] = {}
    for line in text.splitlines():
        if not line.startswith(f"{histogram}_bucket{{"):
            continue
        sample = _SAMPLE.match(line)
        model = _MODEL.search(sample[2]) if sample is not None else None
        bound = _BOUND.search(sample[2]) if sample is not None else None
        if sample is None or model is None or bound is None:
            continue
        of_model = found.setdefault(model[1], {})
        upper = float(bound[1])
        of_model[upper] = of_model.get(upper, 0.0) + float(sample[3])
    return {model: sorted(counts.items()) for model, counts in found.items()}


def rate(before: float, after: float, span: float) -> float:
    """How fast a counter rose, a second. One that fell began anew: a router was replaced."""
    return max(after - before, 0.0) / span


def percentile(
    before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]], share: float
) -> float | None:
    """The value below which `share` (0 to 1) of the observations between two looks lie; None when there were none.

    Within a bucket observations are taken to be spread evenly; of those above the last finite bound it is all that
    is known.
    """
    earlier = dict(before)
    counts = [(bound, count - earlier.get(bound, 0.0)) for bound, count in after]
    if any(count < 0 for _, count in counts):  # a router that began anew counts anew
        counts = list(after)
    total = counts[-1][1] if counts else 0.0
    if total <= 0:
        return None
    wanted, lower, below = share * total, 0.0, 0.0
    for bound, count in counts:
        if count >= wanted:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (wanted - below) / (count - below) if count > below else bound
        lower, below = bound, count
    return lower
