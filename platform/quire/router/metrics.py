"""What the router tells of itself at `/metrics`, as Prometheus series.

What happens is counted in plain numbers of one model (`ModelMetrics`), which are there from the moment the model
is routed and go with it: every series exists, at zero, before the first request. They get names, labels and
cumulative buckets when somebody scrapes. What engines report about themselves, how replicas stand, and what became
of the router's spans is read at that moment, too, so that no gauge can go stale.

On the way of a token stand one addition for all the tokens that a wake-up brought, and one look for a bucket: a
value is observed with how often it came (`Distribution.observe`). All of it is written on the event loop; `render`
may run on another thread, and then shows numbers of moments that lie a little apart.

Where a router has several workers, each counts what it serves. What others have counted (`workers.Counts`) is
added up by the head, which renders for all of them; what a worker had counted that is gone stays in the sums.

Label values come from closed sets: models and replicas of the routing table, the codes of the error contract, and
the words below. A request for a model nobody serves counts under `NO_MODEL`. `vllm_names` says the same under the
names that other dashboards look for.
"""

from __future__ import annotations

import asyncio
import resource
import shutil
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from quire.errors import TABLE, BudgetSpent, PermissionDenied, QueueFull, RateLimited
from quire.router.vllm_names import translated
from quire.tracing import Counts as Spans
from quire_operators.nvml import POWER_BRAKE, SLOWED_BY_HEAT, Health, Watch
from quire_schemas import signals, wire
from quire_schemas.wire import Stats, Welcome
from quire_schemas.workers import Counts

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
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


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


class Metrics:
    """All series of one router. `replicas` and `models` tell how things stand whenever somebody scrapes."""

    def __init__(
        self, replicas: Callable[[], Iterable[ReplicaSample]], models: Callable[[], Iterable[Standing]]
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self.batches_running = Number()
        self.batch_lines = {finish: Number() for finish in ("completed", "failed")}
        self._models: dict[str, ModelMetrics] = {}
        self._gone = Counts({})
        """What workers had counted that are gone."""
        self._spans: Spans | None = None
        self._refused: Callable[[], int] = lambda: 0
        self._teller: Callable[[], int] = lambda: 0
        self._shown = _Shown(self._models, {}, {})
        self._look_at_budgets: Callable[[], Iterable[wire.BudgetStanding]] = tuple
        self._budgets: tuple[wire.BudgetStanding, ...] = ()
        self._rendering = threading.Lock()
        self._told = _Told((_Models(lambda: self._shown.models), _Standings(models), _Replicas(replicas)))
        self._registry.register(self._told)
        self._registry.register(_Batches(self.batches_running, self.batch_lines))
        self._of_routes: dict[tuple[str, ...], Number] = {}
        self._registry.register(_Routes(lambda: self._shown.routes))
        self._registry.register(_Processes(lambda: self._shown.pids, lambda: self._shown.ended))
        self.set_models(())

    def set_models(self, models: Iterable[str]) -> None:
        """Make the series of these models exist, and drop those of models that are no longer routed."""
        wanted = {NO_MODEL, *models}
        for gone in self._models.keys() - wanted:
            del self._models[gone]
        for name in sorted(wanted - self._models.keys()):
            self._models[name] = ModelMetrics()

    def set_routes(self, routes: Iterable[wire.TrafficRoute], tenants: Iterable[wire.Tenant] = ()) -> None:
        """Make the series of these routes and policies exist, and drop those of others."""
        wanted: list[tuple[str, ...]] = [(REFUSED, each.name, reason) for each in tenants for reason in REFUSALS]
        for route in routes:
            stand_ins = [(each.model, failure) for each in route.fallbacks for failure in each.when]
            for model in {*(each.model for each in route.backends), *(model for model, _ in stand_ins)}:
                wanted.append((ROUTED, route.route, model))
            wanted += [(STEPPED_IN, route.route, model, failure) for model, failure in stand_ins]
            if route.mirror is not None:
                wanted += [(COPIED, route.route, route.mirror.model, finish) for finish in COPIES]
        self._of_routes = {key: self._of_routes.get(key) or Number() for key in wanted}

    def count_routed(self, *key: str) -> None:
        """One more of `ROUTED`, `STEPPED_IN`, `COPIED` or `REFUSED`, which comes first, then the labels. Of what
        has left the table meanwhile nothing is counted."""
        if (number := self._of_routes.get(key)) is not None:
            number.inc()

    def add_vllm_names(self) -> None:
        """From now on show what has a name in vLLM under that, too."""
        self._told.in_vllm_too = True

    def watch(self, spans: Spans, teller: Callable[[], int] = lambda: 0) -> None:
        """Show what becomes of the router's spans, and count in the process with this number, which tells of them;
        0 is none."""
        self._spans, self._teller = spans, teller
        self._registry.register(_Spans(lambda: self._shown.spans))

    def watch_gpus(self, watch: Watch) -> None:
        """Show what a watch sees of this machine's GPUs."""
        self._registry.register(_Gpus(watch))

    def watch_budgets(self, standing: Callable[[], Iterable[wire.BudgetStanding]]) -> None:
        """Show how budgets stand."""
        self._look_at_budgets = standing
        self._registry.register(_Budgets(lambda: self._budgets))

    def watch_room(self, refused: Callable[[], int], share: Callable[[], float]) -> None:
        """Show how many connections were turned away, and how much of its memory the router has."""
        self._refused = refused
        self._registry.register(_Room(lambda: self._shown.refused, share))

    def watch_store(self, folder: Path) -> None:
        """Show how much room the disk has on which `folder` is, or will be."""
        self._registry.register(_Disk(folder))

    def model(self, name: str | None) -> ModelMetrics:
        """The numbers of a model; those of `NO_MODEL` for one that is not routed."""
        return self._models.get(name or NO_MODEL, self._models[NO_MODEL])

    def counts(self, requests: int = 0, *, values: bool = True) -> Counts:
        """What has been counted here, for whoever adds it up."""
        spans = self._spans
        return Counts(
            {name: each.values() for name, each in list(self._models.items())} if values else {},
            [(key, number.value) for key, number in list(self._of_routes.items())],
            {} if spans is None else dict([(_EXPORTED, spans.exported), *spans.dropped().items()]),
            requests,
            self._refused(),
            self._teller(),
            _ended(),
        )

    def bury(self, counts: Counts) -> None:
        """Keep what a worker had counted that is gone."""
        models = self._added(self._gone.models, [counts], gone=True)
        routes = Counter(dict(self._gone.routes)) + Counter(dict(counts.routes))
        spans = Counter(self._gone.spans) + Counter(counts.spans)
        sums = {name: each.values() for name, each in models.items()}
        self._gone = Counts(sums, list(routes.items()), spans, refused=self._gone.refused + counts.refused)

    async def scraped(self, others: Sequence[Counts] = (), pids: Sequence[int] = ()) -> bytes:
        """As `render`, on a thread: many models are many lines."""
        self.look()
        return await asyncio.to_thread(self.render, others, pids)

    def look(self) -> None:
        """See how budgets stand. What they add up to is kept by whoever spends them, on the same thread."""
        self._budgets = tuple(self._look_at_budgets())

    def render(self, others: Sequence[Counts] = (), pids: Sequence[int] = ()) -> bytes:
        """All series in Prometheus' text format, with what `others` have counted, which run as `pids`, and with
        budgets as they were seen last (`look`)."""
        with self._rendering:
            if not others and not self._gone.models:
                here = self.counts(values=False)
                pids = [each for each in (*pids, here.teller) if each]
                self._shown = _Shown(self._models, dict(here.routes), here.spans, pids, here.refused, here.ended)
                return generate_latest(self._registry)
            every = [self.counts(), self._gone, *others]
            routes: Counter[tuple[str, ...]] = Counter()
            spans: Counter[str] = Counter()
            for each in every:
                routes.update({key: value for key, value in each.routes if key in self._of_routes})
                spans.update(each.spans)
            refused = sum(each.refused for each in every)
            pids = [*pids, *(each.teller for each in every if each.teller)]
            ended = sum(each.ended for each in every)
            self._shown = _Shown(self._added({}, every), routes, spans, pids, refused, ended)
            return generate_latest(self._registry)

    def _added(
        self, start: Mapping[str, Sequence[float]], every: Iterable[Counts], *, gone: bool = False
    ) -> dict[str, ModelMetrics]:
        """The sums by model, of the models that there are."""
        sums = {name: ModelMetrics() for name in self._models}
        for name, values in start.items():
            if name in sums:
                sums[name].add(values)
        for each in every:
            for name, values in each.models.items():
                if name in sums:
                    sums[name].add(values, gone=gone)
        return sums


class _Shown(NamedTuple):
    """What a scrape shows."""

    models: Mapping[str, ModelMetrics]
    routes: Mapping[tuple[str, ...], float]
    spans: Mapping[str, int]
    pids: Sequence[int] = ()
    refused: int = 0
    ended: float = 0.0


_EXPORTED: Final = "exported"


# ── what is told, and by which name ───────────────────────────────────────────────────────────────────────────


class _Family(NamedTuple):
    """One metric of models. `cells` are its series of one model, by the values of `labels`."""

    name: str
    text: str
    make: type[CounterMetricFamily] | type[GaugeMetricFamily] | type[HistogramMetricFamily]
    cells: Callable[[ModelMetrics], Iterable[tuple[tuple[str, ...], Number | Distribution]]]
    labels: tuple[str, ...] = ()
    also_of_none: bool = False
    """Whether there is a series for requests that are for no model."""


def _only(of: Callable[[ModelMetrics], Number | Distribution]) -> Callable[[ModelMetrics], Iterable[Cell]]:
    return lambda model: (((), of(model)),)


def _each(of: Callable[[ModelMetrics], Mapping[str, Number]]) -> Callable[[ModelMetrics], Iterable[Cell]]:
    return lambda model: (((word,), number) for word, number in of(model).items())


Cell = tuple[tuple[str, ...], Number | Distribution]
_C, _G, _H = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
_REASON: Final = (signals.LABEL_REASON,)
_FAMILIES: Final = (
    _Family(
        signals.REQUESTS,
        "Requests by how they ended.",
        _C,
        lambda model: model.requests.items(),
        (signals.LABEL_OPERATION, signals.LABEL_FINISH),
        also_of_none=True,
    ),
    _Family(
        signals.ADMISSION_REJECTIONS,
        "Refused requests by the code of their error.",
        _C,
        _each(lambda model: model.rejections),
        _REASON,
        also_of_none=True,
    ),
    _Family(signals.PROMPT_TOKENS, "Tokens of accepted prompts.", _C, _only(lambda model: model.prompt_tokens)),
    _Family(
        signals.PROMPT_TOKENS_BY_SOURCE,
        "Tokens of computed prompts by where they came from.",
        _C,
        _each(lambda model: model.tokens_by_source),
        (signals.LABEL_SOURCE,),
    ),
    _Family(
        signals.GENERATION_TOKENS, "Tokens that engines wrote.", _C, _only(lambda model: model.generation_tokens)
    ),
    _Family(signals.RETRIES, "Sequences started again.", _C, _only(lambda model: model.retries)),
    _Family(
        signals.STREAM_MIGRATIONS,
        "Streams that went on at another replica when an engine was lost.",
        _C,
        _only(lambda model: model.migrations),
    ),
    _Family(
        signals.CORRUPTED_REQUESTS, "Sequences without finite numbers.", _C, _only(lambda model: model.corrupted)
    ),
    _Family(
        signals.TOOL_CALL_PARSER_INVOCATIONS,
        "Answers read for calls of tools.",
        _C,
        lambda model: model.calls.items(),
        (signals.LABEL_OPERATION, signals.LABEL_MODE, signals.LABEL_OUTCOME),
    ),
    _Family(
        signals.REPLICA_EJECTIONS,
        "Replicas that stopped being ready by themselves.",
        _C,
        _each(lambda model: model.ejections),
        _REASON,
    ),
    _Family(
        signals.REQUESTS_IN_FLIGHT,
        "Requests accepted and not yet ended.",
        _G,
        _only(lambda model: model.in_flight),
    ),
    _Family(
        signals.REQUESTS_HELD,
        "Requests that wait for a replica to take them.",
        _G,
        _only(lambda model: model.held),
    ),
    _Family(
        signals.TIME_TO_FIRST_TOKEN,
        "From the request's arrival to its first token.",
        _H,
        _only(lambda model: model.time_to_first_token),
    ),
    _Family(
        signals.INTER_TOKEN_LATENCY,
        "Between two tokens of one sequence.",
        _H,
        _only(lambda model: model.inter_token),
    ),
    _Family(
        signals.TIME_PER_OUTPUT_TOKEN,
        "A sequence's decode time by its tokens.",
        _H,
        _only(lambda model: model.per_output_token),
    ),
    _Family(signals.E2E_LATENCY, "From the request's arrival to its end.", _H, _only(lambda model: model.e2e)),
    _Family(
        signals.QUEUE_TIME,
        "From the engine's receipt to the first step.",
        _H,
        _only(lambda model: model.queue_time),
    ),
    _Family(
        signals.PREFILL_TIME,
        "From the first step to the first token.",
        _H,
        _only(lambda model: model.prefill_time),
    ),
    _Family(signals.DECODE_TIME, "From the first token to the last.", _H, _only(lambda model: model.decode_time)),
    _Family(
        signals.INFERENCE_TIME,
        "From the first step to the last token.",
        _H,
        _only(lambda model: model.inference_time),
    ),
    _Family(
        signals.ROUTER_ADDED_TIME,
        "What the router adds to a request, and to a piece of an answer.",
        _H,
        lambda model: ((("request",), model.added_to_request), (("answer",), model.added_to_answer)),
        (signals.LABEL_PART,),
    ),
    _Family(signals.REQUEST_PROMPT_TOKENS, "Tokens of a prompt.", _H, _only(lambda model: model.tokens_of_prompt)),
    _Family(
        signals.REQUEST_COMPUTED_TOKENS,
        "Tokens of a prompt that were not in the cache.",
        _H,
        _only(lambda model: model.computed_tokens),
    ),
    _Family(
        signals.REQUEST_GENERATION_TOKENS,
        "Tokens of a sequence that ended.",
        _H,
        _only(lambda model: model.tokens_generated),
    ),
    _Family(
        signals.REQUEST_MAX_GENERATION_TOKENS,
        "Tokens of a request's longest sequence.",
        _H,
        _only(lambda model: model.most_generated),
    ),
    _Family(
        signals.REQUEST_PARAMS_MAX_TOKENS, "Tokens that were asked for.", _H, _only(lambda model: model.max_tokens)
    ),
    _Family(signals.REQUEST_PARAMS_N, "Sequences that were asked for.", _H, _only(lambda model: model.n)),
    _Family(
        signals.REQUEST_NUM_PREEMPTIONS,
        "How often a sequence lost its blocks.",
        _H,
        _only(lambda model: model.preemptions),
    ),
)


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative, as they are written."""
    named = [*(repr(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(named, accumulate(counts), strict=True))


def _add(family: Metric, labels: Sequence[str], cell: Number | Distribution) -> None:
    match family, cell:
        case HistogramMetricFamily(), Distribution():
            family.add_metric(labels, _buckets(cell.bounds, cell.counts), cell.total)
        case ((CounterMetricFamily() | GaugeMetricFamily()), Number()):
            family.add_metric(labels, cell.value)
        case _:
            raise TypeError(f"{family.name} does not have such series")


class _Told(Collector):
    """What others tell, and, if that is wanted, the same in other words."""

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._collectors = collectors
        self.in_vllm_too = False

    def collect(self) -> Iterator[Metric]:
        families = [family for each in self._collectors for family in each.collect()]
        yield from families
        if self.in_vllm_too:
            yield from translated(families, NO_MODEL)


class _Models(Collector):
    """The numbers of all models."""

    def __init__(self, models: Callable[[], Mapping[str, ModelMetrics]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        models = list(self._models().items())
        for family in _FAMILIES:
            made = family.make(family.name, family.text, labels=(signals.LABEL_MODEL, *family.labels))
            for name, numbers in models:
                if name == NO_MODEL and not family.also_of_none:
                    continue
                for labels, cell in family.cells(numbers):
                    _add(made, (name, *labels), cell)
            yield made


class _Routes(Collector):
    """What became of requests by way of routes, and of those of policies that were refused."""

    def __init__(self, numbers: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        labels = (signals.LABEL_ROUTE, signals.LABEL_MODEL)
        made = {
            ROUTED: _C(signals.ROUTE_REQUESTS, "Requests by route and model.", labels=labels),
            STEPPED_IN: _C(
                signals.ROUTE_FALLBACKS,
                "Times that a model stepped in.",
                labels=(*labels, signals.LABEL_FAILURE),
            ),
            COPIED: _C(signals.ROUTE_MIRRORED, "Copies of requests.", labels=(*labels, signals.LABEL_FINISH)),
            REFUSED: _C(
                signals.POLICY_REFUSALS,
                "Refused requests by policy and code.",
                labels=(signals.LABEL_POLICY, signals.LABEL_REASON),
            ),
        }
        for (what, *values), number in self._numbers().items():
            made[what].add_metric(values, number)
        yield from made.values()


class _Standings(Collector):
    """How the models stand."""

    def __init__(self, models: Callable[[], Iterable[Standing]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        labels = [signals.LABEL_MODEL]
        wanted = GaugeMetricFamily(signals.REPLICAS_WANTED, "Replicas that there are to be.", labels=labels)
        ready = GaugeMetricFamily(signals.REPLICAS_READY, "Replicas that take requests.", labels=labels)
        restarts = GaugeMetricFamily(
            signals.REPLICA_RESTARTS, "Restarts in a row of the replica that fares worst.", labels=labels
        )
        for model in self._models():
            wanted.add_metric([model.model], model.wanted)
            ready.add_metric([model.model], model.ready)
            restarts.add_metric([model.model], model.restarts)
        yield from (wanted, ready, restarts)


class _Replicas(Collector):
    """Series read from the replicas at the moment of the scrape."""

    def __init__(self, sample: Callable[[], Iterable[ReplicaSample]]) -> None:
        self._sample = sample

    def collect(self) -> Iterator[Metric]:
        labels = [signals.LABEL_MODEL, signals.LABEL_REPLICA]
        told: list[tuple[GaugeMetricFamily | CounterMetricFamily, Callable[[Stats], float]]] = [
            (make(name, text, labels=labels), read)
            for make, name, text, read in (
                (_G, signals.NUM_REQUESTS_RUNNING, "Sequences in the engine's batch.", lambda of: of.running),
                (_G, signals.NUM_REQUESTS_WAITING, "Sequences in the engine's queue.", lambda of: of.waiting),
                (_G, signals.KV_CACHE_USAGE, "Allocated KV blocks, of all.", _usage),
                (_G, signals.KV_BLOCKS_SAVED, "KV blocks that sharing saves.", lambda of: of.blocks_saved),
                (_G, signals.PREFIX_CACHE_BLOCKS, "Free blocks that are known.", lambda of: of.blocks_cached),
                (_G, signals.ENGINE_RESIDENT_MEMORY, "Memory of the process.", lambda of: of.resident_bytes),
                (_C, signals.PREEMPTIONS, "Sequences put back for want of blocks.", lambda of: of.preemptions),
                (_C, signals.ENGINE_STEPS, "Steps the engine has made.", lambda of: of.steps),
                (_C, signals.PREFIX_CACHE_QUERIES, "Tokens looked up.", lambda of: of.prefix_queried_tokens),
                (_C, signals.PREFIX_CACHE_HITS, "Tokens that were found.", lambda of: of.prefix_hit_tokens),
                (_C, signals.ENGINE_CPU, "Processor time of the process.", lambda of: of.cpu_seconds),
            )
        ]
        up = GaugeMetricFamily(signals.REPLICA_UP, "1: connected, and making progress.", labels=labels)
        tripped = GaugeMetricFamily(
            signals.REPLICA_TRIPPED, "1: gets no requests because it fails them; 0.5: is tried.", labels=labels
        )
        waiting = GaugeMetricFamily(
            signals.NUM_REQUESTS_WAITING_BY_REASON, "What they wait for.", labels=[*labels, signals.LABEL_REASON]
        )
        tokens = HistogramMetricFamily(signals.ITERATION_TOKENS, "Tokens that a step computed.", labels=labels)
        config = GaugeMetricFamily(
            signals.CACHE_CONFIG_INFO,
            "What the KV cache is.",
            labels=[
                *labels,
                signals.LABEL_BLOCK_SIZE,
                signals.LABEL_NUM_BLOCKS,
                signals.LABEL_MAX_NUM_SEQS,
                signals.LABEL_MAX_MODEL_LEN,
                signals.LABEL_PREFIX_CACHING,
            ],
        )
        bounds = signals.ITERATION_TOKENS_BUCKETS
        none = (0,) * (len(bounds) + 1)
        for replica in self._sample():
            key = [replica.model, replica.replica]
            stats, welcome = replica.stats, replica.welcome
            up.add_metric(key, float(replica.up))
            tripped.add_metric(key, _TRIPPED[replica.breaker])
            for family, read in told:
                family.add_metric(key, read(stats) if stats is not None else 0)
            deferred = stats.deferred if stats is not None else 0
            waiting.add_metric([*key, "capacity"], stats.waiting - deferred if stats is not None else 0)
            waiting.add_metric([*key, "deferred"], deferred)
            steps = stats.steps_by_tokens if stats is not None else ()
            counts = steps if len(steps) == len(none) else none  # of an engine of another version
            tokens.add_metric(key, _buckets(bounds, counts), stats.computed_tokens if stats is not None else 0)
            if welcome is not None:
                seats = stats.max_num_seqs if stats is not None else welcome.max_num_seqs
                facts = (welcome.block_size, welcome.num_blocks, seats, welcome.max_model_len)
                config.add_metric([*key, *map(str, facts), str(replica.prefix_caching)], 1)
        yield from (up, tripped, *(family for family, _ in told), waiting, tokens, config)


_TRIPPED: Final[Mapping[str, float]] = {"closed": 0.0, "trying": 0.5, "open": 1.0}


def _usage(stats: Stats) -> float:
    return stats.blocks_used / stats.blocks_total if stats.blocks_total else 0


class _Batches(Collector):
    def __init__(self, running: Number, lines: Mapping[str, Number]) -> None:
        self._running = running
        self._lines = lines

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            signals.BATCHES_RUNNING, "Batches whose lines are worked off.", self._running.value
        )
        lines = CounterMetricFamily(
            signals.BATCH_LINES, "Lines of batches that have an answer.", labels=[signals.LABEL_FINISH]
        )
        for finish, number in self._lines.items():
            lines.add_metric([finish], number.value)
        yield lines


class _Budgets(Collector):
    def __init__(self, standing: Callable[[], Iterable[wire.BudgetStanding]]) -> None:
        self._standing = standing

    def collect(self) -> Iterator[Metric]:
        spent = GaugeMetricFamily(
            signals.BUDGET_SPENT,
            "Share of a budget that is spent.",
            labels=[signals.LABEL_POLICY, signals.LABEL_BUDGET, signals.LABEL_KEY],
        )
        for budget in self._standing():
            spent.add_metric([budget.policy, budget.name, budget.key], budget.spent / budget.size)
        yield spent


class _Room(Collector):
    def __init__(self, refused: Callable[[], int], share: Callable[[], float]) -> None:
        self._refused = refused
        self._share = share

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            signals.CONNECTIONS_REFUSED, "Connections turned away for want of descriptors.", self._refused()
        )
        yield GaugeMetricFamily(
            signals.MEMORY_SHARE, "Of the memory that the router could have, what it has.", self._share()
        )


class _Disk(Collector):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        place = next(path for path in (self._folder, *self._folder.parents) if path.is_dir())
        yield GaugeMetricFamily(
            signals.STORE_FREE, "Room on the disk of what clients have kept.", shutil.disk_usage(place).free
        )


class _Gpus(Collector):
    """Series of the GPUs of this machine, as they were last read."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def collect(self) -> Iterator[Metric]:
        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, text, labels=[signals.LABEL_DEVICE])

        memory = gauge(signals.GPU_MEMORY, "Memory in total.")
        used = gauge(signals.GPU_MEMORY_USED, "Memory that processes hold.")
        told: list[tuple[GaugeMetricFamily, Callable[[Health], float | None]]] = [
            (gauge(signals.GPU_UTILIZATION, "Share of time in which a kernel ran."), lambda of: of.utilization),
            (gauge(signals.GPU_TEMPERATURE, "Degrees Celsius."), lambda of: of.temperature),
            (gauge(signals.GPU_POWER, "Watts."), lambda of: of.power),
            (gauge(signals.GPU_SLOWED, "1: held back by heat or a power brake."), _slowed),
            (gauge(signals.GPU_ECC_ERRORS, "Memory errors that were not corrected."), lambda of: of.ecc_errors),
        ]
        for gpu in self._watch.gpus:
            key = [f"cuda:{gpu.index}"]
            memory.add_metric(key, gpu.memory)
            used.add_metric(key, gpu.used)
            for family, of in told:
                if gpu.health is not None and (value := of(gpu.health)) is not None:
                    family.add_metric(key, value)
        xids = CounterMetricFamily(
            signals.GPU_XID_ERRORS,
            "Errors that the driver has reported.",
            labels=[signals.LABEL_DEVICE, signals.LABEL_XID],
        )
        for (index, number), count in self._watch.xids.items():
            xids.add_metric([f"cuda:{index}" if index >= 0 else "-", str(number)], count)
        yield from (memory, used, *(family for family, _ in told), xids)


def _slowed(health: Health) -> float | None:
    if health.slowed_by is None:
        return None
    return float(bool({*SLOWED_BY_HEAT, POWER_BRAKE} & {*health.slowed_by}))


class _Spans(Collector):
    """What became of the router's spans until now."""

    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        exported = CounterMetricFamily(signals.SPANS_EXPORTED, "Spans that were delivered.")
        exported.add_metric([], counts.get(_EXPORTED, 0))
        dropped = CounterMetricFamily(
            signals.SPANS_DROPPED, "Spans that were lost.", labels=[signals.LABEL_REASON]
        )
        for reason, count in counts.items():
            if reason != _EXPORTED:
                dropped.add_metric([reason], count)
        yield from (exported, dropped)


class _Processes(Collector):
    """What the system tells of the router's processes: memory, processor time and files of all of them."""

    def __init__(self, others: Callable[[], Sequence[int]], ended: Callable[[], float]) -> None:
        """`ended` is the processor time of children that are no more."""
        self._others = others
        self._ended = ended
        self._spent = 0.0
        """Processor time that was told of. A process that died without a last word is missing later, and a counter
        does not fall."""

    def collect(self) -> Iterator[Metric]:
        told = list(ProcessCollector(registry=None).collect())
        for pid in self._others():
            its = {each.name: each.samples for each in ProcessCollector(pid=_always(pid), registry=None).collect()}
            for mine in told:
                if mine.name in _SUMMED and mine.name in its:  # else it is gone
                    mine.samples = [
                        ours._replace(value=ours.value + theirs.value)
                        for ours, theirs in zip(mine.samples, its[mine.name], strict=True)
                    ]
        for mine in told:
            if mine.name == "process_cpu_seconds":
                self._spent = max(self._spent, mine.samples[0].value + self._ended())
                mine.samples = [mine.samples[0]._replace(value=self._spent)]
        yield from told


_SUMMED: Final = (
    "process_virtual_memory_bytes", "process_resident_memory_bytes", "process_cpu_seconds", "process_open_fds"
)  # fmt: skip


def _ended() -> float:
    """Seconds of the processor that children of this process have had which have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _always(pid: int) -> Callable[[], int]:
    return lambda: pid
