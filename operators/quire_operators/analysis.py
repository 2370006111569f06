"""Whether a new revision does worse than the stable one: a judgement that may be asked for again and again.

Both serve real requests at the same time, and the router counts for each of them (`Measured`): requests, those
that failed, answers that were empty or cut, and the times to the first token and between tokens, in buckets of one
percent (`Times`). Each *gate* compares one of these. A revision is worse at a gate when both hold:

    it is beyond what is declared   (a share above the limit, a 95th percentile above the stable one's by more)
    and that is no chance           (a revision just like the stable one would look so less often than is stated)

The second is Fisher's exact test: of all requests that failed, or of the slowest of both together, how many are
the new one's, if whose they are was drawn by lot. The slowest are the slowest twentieth, which the limit is
about, and the slower half, which tells by far fewer requests that all of them take longer. It is asked at
moments that were fixed before: after 10 requests, then whenever there are a quarter more. Look k may err in
6/(pi k)^2 of `ALPHA`, shared by the gates; these sum up to `ALPHA`, so a revision that is no worse is given up
in at most that share of its canaries, however long they take and however often it is looked at.

Not being proven worse is no proof of being as good: that is what `minRequests` and the steps are for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from quire_schemas import wire

ALPHA = 0.01
"""At most this share of revisions that are no worse than the stable one is given up for being so."""
FIRST_LOOK, GROWTH = 10, 1.25
PERCENTILE = 0.95
LINES = (0.5, PERCENTILE)
"""Shares of all times below the lines that tell the slow ones; each may err in its part."""


@dataclass(frozen=True, slots=True)
class Times:
    """How often which time was measured: counts by bucket, the time's logarithm in steps of one percent."""

    counts: Mapping[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def percentile(self, share: float = PERCENTILE) -> float | None:
        """The time in seconds that `share` of them are not above; None if there is none."""
        left = math.ceil(share * self.total)
        for bucket in sorted(self.counts):
            left -= self.counts[bucket]
            if left <= 0:
                return math.exp((bucket + 0.5) * wire.TIME_BUCKET)
        return None

    def from_(self, bucket: int) -> int:
        """How many lie in this bucket or above it."""
        return sum(count for each, count in self.counts.items() if each >= bucket)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the router counted of one revision since its canary began."""

    requests: int = 0
    failed: int = 0
    """Those that ended in an error which was not the client's."""
    answers: int = 0
    """Whole ones: those that ended by themselves or at their length."""
    empty: int = 0
    """Of those, how many had no text, or were cut by the length that the model has."""
    first_token: Times = Times()
    """Times to the first token."""
    between_tokens: Times = Times()
    """Mean times between tokens of one answer."""

    @classmethod
    def of(cls, told: wire.Measured) -> Measured:
        """What the router told."""
        first, between = Times(told.first_token), Times(told.between_tokens)
        return cls(told.requests, told.failed, told.answers, told.void, first, between)


@dataclass(frozen=True, slots=True)
class Limits:
    """`rollout.canary.analysis`, in shares."""

    error_rate: float
    first_token: float
    """How much longer, as a share, the 95th percentile may be."""
    between_tokens: float


@dataclass(frozen=True, slots=True)
class Gate:
    """One comparison: what is compared, of the stable and the new revision, and its limit. `worse` is proven."""

    name: str
    stable: float | None
    new: float | None
    limit: float
    relative: bool
    """The limit is a share above the stable value, not a value."""
    worse: bool

    @property
    def beyond(self) -> bool:
        """Whether the new one is beyond the limit, by chance or not."""
        if self.new is None:
            return False
        if not self.relative:
            return self.new > self.limit
        return self.stable is not None and self.new > self.stable * (1 + self.limit)


GATES = 4


def next_look(requests: int) -> int:
    """The count of the new revision's requests at which to look after the one at `requests`."""
    at = FIRST_LOOK
    while at <= requests:
        at = math.ceil(at * GROWTH)
    return at


def number_of(requests: int) -> int:
    """Which look, from 1, is due at so many requests; 0 before the first."""
    at, number = FIRST_LOOK, 0
    while at <= requests:
        at, number = math.ceil(at * GROWTH), number + 1
    return number


def judge(stable: Measured, new: Measured, limits: Limits) -> tuple[Gate, ...]:
    """The gates at a look. Only at the counts of `next_look` does `worse` keep to `ALPHA`."""
    look = number_of(new.requests)
    chance = ALPHA * 6 / (math.pi * look) ** 2 / GATES if look else 0.0
    return (
        _shares("errors", stable.failed, stable.requests, new.failed, new.requests, limits.error_rate, chance),
        _shares(
            "empty or cut", stable.empty, stable.answers, new.empty, new.answers,
            _share(stable.empty, stable.answers, 0.0) + limits.error_rate, chance,
        ),
        _times("first token p95", stable.first_token, new.first_token, limits.first_token, chance),
        _times("between tokens p95", stable.between_tokens, new.between_tokens, limits.between_tokens, chance),
    )  # fmt: skip


def _share(part: int, whole: int, otherwise: float) -> float:
    return part / whole if whole else otherwise


def _shares(name: str, k: int, n: int, k_new: int, n_new: int, limit: float, chance: float) -> Gate:
    stable, new = (k / n if n else None), (k_new / n_new if n_new else None)
    gate = Gate(name, stable, new, limit, False, False)
    if not gate.beyond or tail(k_new, n_new, k, n) > chance:
        return gate
    return Gate(name, stable, new, limit, False, True)


def _times(name: str, stable: Times, new: Times, limit: float, chance: float) -> Gate:
    gate = Gate(name, stable.percentile(), new.percentile(), limit, True, False)
    if not gate.beyond:
        return gate
    both = Times(
        {each: stable.counts.get(each, 0) + new.counts.get(each, 0) for each in {*stable.counts, *new.counts}}
    )
    for share in LINES:
        line = wire.time_bucket(both.percentile(share) or 0.0)
        if tail(new.from_(line), new.total, stable.from_(line), stable.total) <= chance / len(LINES):
            return Gate(gate.name, gate.stable, gate.new, limit, True, True)
    return gate


def tail(k_new: int, n_new: int, k: int, n: int) -> float:
    """How likely it is that at least `k_new` of the `k + k_new` are among the `n_new` of `n + n_new`, if whose
    they are was drawn by lot: the upper tail of the hypergeometric distribution."""
    marked, whole = k + k_new, n + n_new
    first = math.exp(_log_chance(k_new, marked, n_new, whole))
    total, term = first, first
    for each in range(k_new, min(marked, n_new)):
        term *= (marked - each) * (n_new - each) / ((each + 1) * (whole - marked - n_new + each + 1))
        total += term
        if term < total * 1e-12:
            break
    return min(total, 1.0)


def _log_chance(hits: int, marked: int, drawn: int, whole: int) -> float:
    def choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    return choose(marked, hits) + choose(whole - marked, drawn - hits) - choose(whole, drawn)
