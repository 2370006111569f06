"""All that one router counts, and `/metrics` of it.

All of it is written on the event loop; `render` may run on another thread, and then shows numbers of moments that
lie a little apart. What is counted of a model is in `model_metrics`, what is told of it in `exposition`.

Where a router has several workers, each counts what it serves. What others have counted (`workers.Counts`) is
added up by the head, which renders for all of them; what a worker had counted that is gone stays in the sums.
"""

from __future__ import annotations

import asyncio
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest

from quire.router.exposition import (
    EXPORTED,
    Batches,
    Budgets,
    Disk,
    Gpus,
    Models,
    Processes,
    Replicas,
    Room,
    Routes,
    SpanCounts,
    Standings,
    Told,
)
from quire.router.model_metrics import (
    COPIED,
    COPIES,
    NO_MODEL,
    REFUSALS,
    REFUSED,
    ROUTED,
    STEPPED_IN,
    ModelMetrics,
    Number,
    ReplicaSample,
    Standing,
)
from quire.tracing import Counts as Spans
from quire_operators.nvml import Watch
from quire_schemas import wire
from quire_schemas.workers import Counts

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


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
        self._told = Told((Models(lambda: self._shown.models), Standings(models), Replicas(replicas)))
        self._registry.register(self._told)
        self._registry.register(Batches(self.batches_running, self.batch_lines))
        self._of_routes: dict[tuple[str, ...], Number] = {}
        self._registry.register(Routes(lambda: self._shown.routes))
        self._registry.register(Processes(lambda: self._shown.pids, lambda: self._shown.ended))
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
        self._registry.register(SpanCounts(lambda: self._shown.spans))

    def watch_gpus(self, watch: Watch) -> None:
        """Show what a watch sees of this machine's GPUs."""
        self._registry.register(Gpus(watch))

    def watch_budgets(self, standing: Callable[[], Iterable[wire.BudgetStanding]]) -> None:
        """Show how budgets stand."""
        self._look_at_budgets = standing
        self._registry.register(Budgets(lambda: self._budgets))

    def watch_room(self, refused: Callable[[], int], share: Callable[[], float]) -> None:
        """Show how many connections were turned away, and how much of its memory the router has."""
        self._refused = refused
        self._registry.register(Room(lambda: self._shown.refused, share))

    def watch_store(self, folder: Path) -> None:
        """Show how much room the disk has on which `folder` is, or will be."""
        self._registry.register(Disk(folder))

    def model(self, name: str | None) -> ModelMetrics:
        """The numbers of a model; those of `NO_MODEL` for one that is not routed."""
        return self._models.get(name or NO_MODEL, self._models[NO_MODEL])

    def counts(self, requests: int = 0, *, values: bool = True) -> Counts:
        """What has been counted here, for whoever adds it up."""
        spans = self._spans
        return Counts(
            {name: each.values() for name, each in list(self._models.items())} if values else {},
            [(key, number.value) for key, number in list(self._of_routes.items())],
            {} if spans is None else dict([(EXPORTED, spans.exported), *spans.dropped().items()]),
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


def _ended() -> float:
    """Seconds of the processor that children of this process have had which have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
