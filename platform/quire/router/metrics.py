"""What the router tells of itself at `/metrics`, as Prometheus series.

Counters and histograms are written where things happen, through the handles of one model (`ModelMetrics`), which
exist from the moment the model is routed: every series is there, at zero, before the first request. What engines
report about themselves, and what became of the router's spans, is read at the moment of the scrape, so that no
gauge can go stale. Label values come from closed sets: models and replicas of the routing table, and the words
below. A request for a model nobody serves counts under `NO_MODEL`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quire.tracing import Counts
from quire_operators.nvml import POWER_BRAKE, SLOWED_BY_HEAT, Health, Watch
from quire_schemas import signals, wire

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
COPIES: Final = ("completed", "failed", "dropped")
ROUTED: Final = "routed"
STEPPED_IN: Final = "stepped in"
COPIED: Final = "copied"
NO_MODEL: Final = "-"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class ReplicaSample:
    """One replica at the moment of a scrape."""

    model: str
    replica: str
    up: bool
    stats: wire.Stats | None


class ModelMetrics:
    """The handles of one model's series, looked up once."""

    __slots__ = (
        "e2e",
        "generation_tokens",
        "held",
        "in_flight",
        "inter_token",
        "migrations",
        "prompt_tokens",
        "queue_time",
        "requests",
        "time_to_first_token",
    )

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.requests: Mapping[tuple[str, str], Counter] = {
            (operation, finish): metrics.requests.labels(model, operation, finish)
            for operation in OPERATIONS
            for finish in FINISHES
        }
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.generation_tokens = metrics.generation_tokens.labels(model)
        self.in_flight = metrics.in_flight.labels(model)
        self.held = metrics.held.labels(model)
        self.migrations = metrics.migrations.labels(model)
        self.time_to_first_token = metrics.time_to_first_token.labels(model)
        self.inter_token = metrics.inter_token.labels(model)
        self.e2e = metrics.e2e.labels(model)
        self.queue_time = metrics.queue_time.labels(model)


class Metrics:
    """All series of one router. `sample` tells of the replicas whenever somebody scrapes."""

    def __init__(self, sample: Callable[[], Iterable[ReplicaSample]]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry(auto_describe=False)
        model = (signals.LABEL_MODEL,)
        by_finish = (signals.LABEL_MODEL, signals.LABEL_OPERATION, signals.LABEL_FINISH)
        into: Any = {"registry": self._registry}
        self.requests = Counter(signals.REQUESTS, "Requests by how they ended.", by_finish, **into)
        self.prompt_tokens = Counter(signals.PROMPT_TOKENS, "Tokens of accepted prompts.", model, **into)
        self.generation_tokens = Counter(signals.GENERATION_TOKENS, "Tokens that engines wrote.", model, **into)
        self.in_flight = Gauge(signals.REQUESTS_IN_FLIGHT, "Requests accepted and not yet ended.", model, **into)
        self.held = Gauge(signals.REQUESTS_HELD, "Requests that wait for a replica to take them.", model, **into)
        self.migrations = Counter(
            signals.STREAM_MIGRATIONS,
            "Streams that went on at another replica when an engine was lost.",
            model,
            **into,
        )

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help_text, model, buckets=buckets, **into)

        self.time_to_first_token = histogram(
            signals.TIME_TO_FIRST_TOKEN, "From the request's arrival to its first token.", signals.TTFT_BUCKETS
        )
        self.inter_token = histogram(
            signals.INTER_TOKEN_LATENCY, "Between two tokens of one sequence.", signals.ITL_BUCKETS
        )
        self.e2e = histogram(
            signals.E2E_LATENCY, "From the request's arrival to its end.", signals.LATENCY_BUCKETS
        )
        self.queue_time = histogram(
            signals.QUEUE_TIME, "From the engine's receipt to the first step.", signals.LATENCY_BUCKETS
        )
        by_route = (signals.LABEL_ROUTE, signals.LABEL_MODEL)
        self._routed = Counter(signals.ROUTE_REQUESTS, "Requests by route and model.", by_route, **into)
        self._fallbacks = Counter(
            signals.ROUTE_FALLBACKS,
            "Times that a model stepped in.",
            (*by_route, signals.LABEL_FAILURE),
            **into,
        )
        self._mirrored = Counter(
            signals.ROUTE_MIRRORED, "Copies of requests.", (*by_route, signals.LABEL_FINISH), **into
        )
        self._of_routes: dict[tuple[str, ...], Counter] = {}
        self.batches_running = Gauge(signals.BATCHES_RUNNING, "Batches whose lines are worked off.", **into)
        lines = Counter(
            signals.BATCH_LINES, "Lines of batches that have an answer.", (signals.LABEL_FINISH,), **into
        )
        self.batch_lines = {finish: lines.labels(finish) for finish in ("completed", "failed")}
        self._registry.register(_Replicas(sample))
        self._models: dict[str, ModelMetrics] = {}
        self.set_models(())

    def set_models(self, models: Iterable[str]) -> None:
        """Make the series of these models exist, and drop those of models that are no longer routed."""
        wanted = {NO_MODEL, *models}
        for gone in self._models.keys() - wanted:
            del self._models[gone]
            for operation, finish in ((o, f) for o in OPERATIONS for f in FINISHES):
                self.requests.remove(gone, operation, finish)
            for family in (
                self.prompt_tokens,
                self.generation_tokens,
                self.in_flight,
                self.held,
                self.migrations,
                self.time_to_first_token,
                self.inter_token,
                self.e2e,
                self.queue_time,
            ):
                family.remove(gone)
        for name in wanted - self._models.keys():
            self._models[name] = ModelMetrics(self, name)

    def set_routes(self, routes: Iterable[wire.TrafficRoute]) -> None:
        """Make the series of these routes exist, and drop those of others."""
        wanted: dict[tuple[str, ...], Counter] = {}
        for route in routes:
            stand_ins = [(each.model, failure) for each in route.fallbacks for failure in each.when]
            for model in {*(each.model for each in route.backends), *(model for model, _ in stand_ins)}:
                wanted[ROUTED, route.route, model] = self._routed
            for model, failure in stand_ins:
                wanted[STEPPED_IN, route.route, model, failure] = self._fallbacks
            if route.mirror is not None:
                for finish in COPIES:
                    wanted[COPIED, route.route, route.mirror.model, finish] = self._mirrored
        families = {ROUTED: self._routed, STEPPED_IN: self._fallbacks, COPIED: self._mirrored}
        for gone in self._of_routes.keys() - wanted.keys():
            families[gone[0]].remove(*gone[1:])
        self._of_routes = {
            key: self._of_routes.get(key) or family.labels(*key[1:]) for key, family in wanted.items()
        }

    def count_routed(self, *key: str) -> None:
        """One more of `ROUTED`, `STEPPED_IN` or `COPIED`, which comes first, then the labels. Of a route that has
        left the table meanwhile nothing is counted."""
        if (handle := self._of_routes.get(key)) is not None:
            handle.inc()

    def watch(self, spans: Counts) -> None:
        """Show what becomes of the router's spans."""
        self._registry.register(_Spans(spans))

    def watch_gpus(self, watch: Watch) -> None:
        """Show what a watch sees of this machine's GPUs."""
        self._registry.register(_Gpus(watch))

    def model(self, name: str | None) -> ModelMetrics:
        """The handles of a model; those of `NO_MODEL` for one that is not routed."""
        return self._models.get(name or NO_MODEL, self._models[NO_MODEL])

    def render(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)


class _Replicas(Collector):
    """Series read from the replicas at the moment of the scrape."""

    def __init__(self, sample: Callable[[], Iterable[ReplicaSample]]) -> None:
        self._sample = sample

    def collect(self) -> Iterator[Metric]:
        labels = [signals.LABEL_MODEL, signals.LABEL_REPLICA]
        up = GaugeMetricFamily(signals.REPLICA_UP, "1: connected, and making progress.", labels=labels)
        running = GaugeMetricFamily(
            signals.NUM_REQUESTS_RUNNING, "Sequences in the engine's batch.", labels=labels
        )
        waiting = GaugeMetricFamily(
            signals.NUM_REQUESTS_WAITING, "Sequences in the engine's queue.", labels=labels
        )
        usage = GaugeMetricFamily(signals.KV_CACHE_USAGE, "Allocated KV blocks, of all.", labels=labels)
        saved = GaugeMetricFamily(
            signals.KV_BLOCKS_SAVED, "KV blocks that sharing saves the running sequences.", labels=labels
        )
        preemptions = CounterMetricFamily(
            signals.PREEMPTIONS, "Sequences put back for want of blocks.", labels=labels
        )
        steps = CounterMetricFamily(signals.ENGINE_STEPS, "Steps the engine has made.", labels=labels)
        queries = CounterMetricFamily(
            signals.PREFIX_CACHE_QUERIES, "Tokens looked up in the prefix cache.", labels=labels
        )
        hits = CounterMetricFamily(
            signals.PREFIX_CACHE_HITS, "Tokens that were found in the prefix cache.", labels=labels
        )
        cached = GaugeMetricFamily(
            signals.PREFIX_CACHE_BLOCKS, "Free KV blocks that the prefix cache could still give.", labels=labels
        )
        for replica in self._sample():
            key = [replica.model, replica.replica]
            stats = replica.stats
            up.add_metric(key, float(replica.up))
            running.add_metric(key, stats.running if stats else 0)
            waiting.add_metric(key, stats.waiting if stats else 0)
            usage.add_metric(key, stats.blocks_used / stats.blocks_total if stats and stats.blocks_total else 0)
            saved.add_metric(key, stats.blocks_saved if stats else 0)
            preemptions.add_metric(key, stats.preemptions if stats else 0)
            steps.add_metric(key, stats.steps if stats else 0)
            queries.add_metric(key, stats.prefix_queried_tokens if stats else 0)
            hits.add_metric(key, stats.prefix_hit_tokens if stats else 0)
            cached.add_metric(key, stats.blocks_cached if stats else 0)
        yield from (up, running, waiting, usage, saved, preemptions, steps, queries, hits, cached)


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

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        exported = CounterMetricFamily(signals.SPANS_EXPORTED, "Spans that were delivered.")
        exported.add_metric([], self._counts.exported)
        dropped = CounterMetricFamily(
            signals.SPANS_DROPPED, "Spans that were lost.", labels=[signals.LABEL_REASON]
        )
        for reason, count in self._counts.dropped().items():
            dropped.add_metric([reason], count)
        yield from (exported, dropped)
