"""What is counted of a model, in plain numbers: there from the moment the model is routed, and gone with it.

Every series exists, at zero, before the first request. On the way of a token stand one addition for all the tokens
that a wake-up brought, and one look for a bucket: a value is observed with how often it came
(`Distribution.observe`).

Label values come from closed sets: models and replicas of the routing table, the codes of the error contract, and
the words below. A request for a model nobody serves counts under `NO_MODEL`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from quire.errors import TABLE, BudgetSpent, PermissionDenied, QueueFull, RateLimited
from quire_schemas import signals, wire
from quire_schemas.wire import Stats, Welcome

OPERATIONS: Final = (
    "chat",
    "text_completion",
    "responses",
    "embeddings",
    "score",
    "tokenize",
    "detokenize",
    "count_tokens",
)
FINISHES: Final = ("stop", "length", "repetition", "abort", "error", "refused")
REFUSED_FOR_ITSELF: Final = "invalid_request"
"""The reason of a refusal whose error has no code."""
REASONS: Final = tuple(sorted({row.code or REFUSED_FOR_ITSELF for row in TABLE.values()}))
SOURCES: Final = ("local_compute", "local_cache_hit")
EJECTIONS: Final = ("disconnected", "stalled", "tripped")
READ_FOR_CALLS: Final = ("chat", "responses")
MODES: Final = ("streaming", "non_streaming")
OUTCOMES: Final = ("tool_call", "no_tool_call")
COPIES: Final = ("completed", "failed", "dropped")
ROUTED: Final = "routed"
STEPPED_IN: Final = "stepped in"
COPIED: Final = "copied"
REFUSED: Final = "refused"
REFUSALS: Final = tuple(
    TABLE[each].code or REFUSED_FOR_ITSELF for each in (PermissionDenied, RateLimited, BudgetSpent, QueueFull)
)
"""For what of a policy a request is refused."""
NO_MODEL: Final = "-"


class Number:
    """One series that is a number."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def dec(self, amount: float = 1) -> None:
        self.value -= amount

    def set(self, value: float) -> None:
        self.value = value


class Distribution:
    """One series that is a histogram; `bounds` ascend, and each is the last value of its bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """By bucket, not cumulative; the last is for values above all bounds."""
        self.total: float = 0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value that came so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class ReplicaSample:
    """One replica at the moment of a scrape."""

    model: str
    replica: str
    up: bool
    stats: Stats | None
    welcome: Welcome | None = None
    """What it was built with, while it is connected."""
    prefix_caching: bool = False
    breaker: wire.BreakerState = "closed"


@dataclass(frozen=True, slots=True)
class Standing:
    """How a model stands at the moment of a scrape."""

    model: str
    wanted: int
    ready: int
    restarts: int


class ModelMetrics:
    """The numbers of one model."""

    __slots__ = (
        "added_to_answer",
        "added_to_request",
        "calls",
        "computed_tokens",
        "corrupted",
        "decode_time",
        "e2e",
        "ejections",
        "generation_tokens",
        "held",
        "in_flight",
        "inference_time",
        "inter_token",
        "max_tokens",
        "migrations",
        "most_generated",
        "n",
        "per_output_token",
        "preemptions",
        "prefill_time",
        "prompt_tokens",
        "queue_time",
        "rejections",
        "requests",
        "retries",
        "time_to_first_token",
        "tokens_by_source",
        "tokens_generated",
        "tokens_of_prompt",
    )

    def __init__(self) -> None:
        self.requests: Mapping[tuple[str, str], Number] = {
            (operation, finish): Number() for operation in OPERATIONS for finish in FINISHES
        }
        self.rejections: Mapping[str, Number] = {reason: Number() for reason in REASONS}
        self.prompt_tokens = Number()
        self.tokens_by_source: Mapping[str, Number] = {source: Number() for source in SOURCES}
        self.generation_tokens = Number()
        self.retries = Number()
        self.migrations = Number()
        self.corrupted = Number()
        self.calls: Mapping[tuple[str, str, str], Number] = {
            key: Number() for key in product(READ_FOR_CALLS, MODES, OUTCOMES)
        }
        self.ejections: Mapping[str, Number] = {reason: Number() for reason in EJECTIONS}
        self.in_flight = Number()
        self.held = Number()
        self.time_to_first_token = Distribution(signals.TTFT_BUCKETS)
        self.inter_token = Distribution(signals.ITL_BUCKETS)
        self.per_output_token = Distribution(signals.ITL_BUCKETS)
        self.e2e = Distribution(signals.LATENCY_BUCKETS)
        self.queue_time = Distribution(signals.LATENCY_BUCKETS)
        self.prefill_time = Distribution(signals.LATENCY_BUCKETS)
        self.decode_time = Distribution(signals.LATENCY_BUCKETS)
        self.inference_time = Distribution(signals.LATENCY_BUCKETS)
        self.added_to_request = Distribution(signals.ADDED_BUCKETS)
        self.added_to_answer = Distribution(signals.ADDED_BUCKETS)
        self.tokens_of_prompt = Distribution(signals.TOKENS_BUCKETS)
        self.computed_tokens = Distribution(signals.TOKENS_BUCKETS)
        self.tokens_generated = Distribution(signals.TOKENS_BUCKETS)
        self.most_generated = Distribution(signals.TOKENS_BUCKETS)
        self.max_tokens = Distribution(signals.TOKENS_BUCKETS)
        self.n = Distribution(signals.FEW_BUCKETS)
        self.preemptions = Distribution(signals.FEW_BUCKETS)

    def _cells(self) -> Iterator[tuple[str, Number | Distribution]]:
        for name in self.__slots__:
            held = getattr(self, name)
            for cell in held.values() if isinstance(held, Mapping) else (held,):
                yield name, cell

    def values(self) -> list[float]:
        """All of it in one order, the same in each process of one version."""
        told: list[float] = []
        for _, cell in self._cells():
            told += (cell.value,) if isinstance(cell, Number) else (*cell.counts, cell.total)
        return told

    def add(self, values: Sequence[float], *, gone: bool = False) -> None:
        """Add what `values` gave elsewhere; that of a process that is `gone` without what it had at a time."""
        at = iter(values)
        for name, cell in self._cells():
            if isinstance(cell, Number):
                cell.inc(next(at) * (not (gone and name in _AT_A_TIME)))
            else:
                cell.counts = [count + int(next(at)) for count in cell.counts]
                cell.total += next(at)


_AT_A_TIME: Final = ("in_flight", "held")
"""What goes up and down."""
