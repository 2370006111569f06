"""What is told at a scrape, and by which name: numbers of `model_metrics` as Prometheus families.

What is counted gets its name, labels and cumulative buckets here, when somebody scrapes. What engines report about
themselves, how replicas and GPUs stand, and what became of the router's spans is read at that moment, too, so that
no gauge can go stale. `vllm_names` says the same under the names that other dashboards look for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from quire.router.model_metrics import (
    COPIED,
    NO_MODEL,
    REFUSED,
    ROUTED,
    STEPPED_IN,
    Distribution,
    ModelMetrics,
    Number,
    ReplicaSample,
    Standing,
)
from quire.router.vllm_names import translated
from quire_operators.nvml import POWER_BRAKE, SLOWED_BY_HEAT, Health, Watch
from quire_schemas import signals, wire
from quire_schemas.wire import Stats

EXPORTED: Final = "exported"
"""Among what became of spans: that they were delivered."""


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


class Told(Collector):
    """What others tell, and, if that is wanted, the same in other words."""

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._collectors = collectors
        self.in_vllm_too = False

    def collect(self) -> Iterator[Metric]:
        families = [family for each in self._collectors for family in each.collect()]
        yield from families
        if self.in_vllm_too:
            yield from translated(families, NO_MODEL)


class Models(Collector):
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


class Routes(Collector):
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


class Standings(Collector):
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


class Replicas(Collector):
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


class Batches(Collector):
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


class Budgets(Collector):
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


class Room(Collector):
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


class Disk(Collector):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        place = next(path for path in (self._folder, *self._folder.parents) if path.is_dir())
        yield GaugeMetricFamily(
            signals.STORE_FREE, "Room on the disk of what clients have kept.", shutil.disk_usage(place).free
        )


class Gpus(Collector):
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


class SpanCounts(Collector):
    """What became of the router's spans until now."""

    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        exported = CounterMetricFamily(signals.SPANS_EXPORTED, "Spans that were delivered.")
        exported.add_metric([], counts.get(EXPORTED, 0))
        dropped = CounterMetricFamily(
            signals.SPANS_DROPPED, "Spans that were lost.", labels=[signals.LABEL_REASON]
        )
        for reason, count in counts.items():
            if reason != EXPORTED:
                dropped.add_metric([reason], count)
        yield from (exported, dropped)


class Processes(Collector):
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


def _always(pid: int) -> Callable[[], int]:
    return lambda: pid
