"""From settings to a result: finds out what the server can do, then one run for each load.

What it asks before anything is measured: one request of the very form that will be sent, which shows whether the
server takes it, whether it counts tokens in every event, and whether it reports usage at all; and what words cost,
where prompts are made.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

from quire.bench import figures, schedule, work
from quire.bench.errors import BadSetting
from quire.bench.lengths import Lengths
from quire.bench.load import Load, Measured
from quire.bench.prompts import Vocabulary, learn
from quire.bench.work import DatasetLine, Form, Request, Size, TraceLine
from quire.remote import Chunk, Refused, Server

DEFAULT_REQUESTS = 100
WARMUP_AT_A_TIME = 8
TRIED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Demand:
    """How hard one run pushes: `concurrency` requests at a time, `rate` a second, or at a trace's own times."""

    kind: Literal["concurrency", "rate", "trace"]
    value: float = 0.0

    @property
    def label(self) -> str:
        return "trace" if self.kind == "trace" else f"{self.kind} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured. One of `trace`, `dataset` or `inputs` says what prompts are."""

    model: str
    demands: tuple[Demand, ...]
    requests: int | None = None
    """Of each run at most."""
    seconds: float | None = None
    """For which requests are sent in each run."""
    inputs: Lengths | None = None
    outputs: Lengths | None = None
    trace: tuple[TraceLine, ...] | None = None
    dataset: tuple[DatasetLine, ...] | None = None
    prefix: int = 0
    endpoint: work.Endpoint = "chat"
    streams: bool = True
    ignores_eos: bool = False
    bounds: Mapping[str, float] = field(default_factory=dict)
    warmup: int = 0
    seed: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    """The trace or the data set, by name; it and what follows are for the record alone."""
    speed: float = 1.0
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One load and what was measured under it."""

    demand: Demand
    measured: Measured


@dataclass(frozen=True, slots=True)
class Result:
    """All that was measured. `tokens_by` is how tokens of an event were known: see `quire.bench.load`."""

    settings: Settings
    url: str
    started_at: float
    tokens_by: Literal["usage", "mean"] | None
    runs: tuple[Run, ...]
    interrupted: bool


class Driver:
    """Measures one server. `stop` ends it early, with what there is; `progress` gets a run and its ended
    requests."""

    def __init__(
        self,
        server: Server,
        settings: Settings,
        stop: asyncio.Event,
        progress: Callable[[str, int], None] = lambda run, ended: None,
    ) -> None:
        self._server = server
        self._settings = settings
        self._stop = stop
        self._progress = progress
        self._path = work.PATHS[settings.endpoint]
        self._prepared: tuple[Form, Vocabulary | None] | None = None

    async def prepare(self) -> None:
        """Ask what has to be known before. Raises `RemoteError` or `BenchError`: then nothing can be measured."""
        form = await self._form()
        self._prepared = form, None if self._settings.dataset is not None else await self._vocabulary()

    async def drive(self) -> Result:
        """Measure, after `prepare`. What goes wrong with a request is in the result."""
        if self._prepared is None:
            raise RuntimeError("not prepared")
        form, vocabulary = self._prepared
        settings, started_at = self._settings, datetime.now(UTC).timestamp()
        if settings.warmup:
            warmers = itertools.islice(self._requests(form, vocabulary, "warmup"), settings.warmup)
            await self._load(form, "warmup").closed(warmers, min(settings.warmup, WARMUP_AT_A_TIME), None)
        runs = []
        for number, demand in enumerate(settings.demands):
            if self._stop.is_set():
                break
            requests = self._requests(form, vocabulary, f"run {number}")
            load = self._load(form, demand.label)
            if demand.kind == "concurrency":
                few = itertools.islice(requests, self._most())
                measured = await load.closed(few, int(demand.value), settings.seconds)
            else:
                measured = await load.open(zip(self._arrivals(demand), requests, strict=False))
            runs.append(Run(demand, measured))
        tokens_by: Literal["usage", "mean"] | None = None
        if settings.streams:
            tokens_by = "usage" if form.counts_tokens else "mean"
        return Result(settings, self._server.url, started_at, tokens_by, tuple(runs), self._stop.is_set())

    def _load(self, form: Form, run: str) -> Load:
        return Load(
            self._server,
            self._path,
            streams=form.streams,
            counts_tokens=form.counts_tokens,
            stop=self._stop,
            progress=lambda ended: self._progress(run, ended),
        )

    def _most(self) -> int | None:
        settings = self._settings
        if settings.requests is None and settings.seconds is None:
            file = settings.trace if settings.trace is not None else settings.dataset
            return DEFAULT_REQUESTS if file is None else len(file)
        return settings.requests

    def _arrivals(self, demand: Demand) -> Iterator[float]:
        """When an open loop's requests are sent."""
        if demand.kind == "trace":
            arrivals: Iterator[float] = iter([line.arrival for line in self._settings.trace or ()])
        else:
            arrivals = schedule.poisson(demand.value, f"{self._settings.seed}:arrivals")
        if self._settings.seconds is not None:
            arrivals = schedule.until(arrivals, self._settings.seconds)
        return itertools.islice(arrivals, self._most())

    def _requests(self, form: Form, vocabulary: Vocabulary | None, run: str) -> Iterator[Request]:
        settings = self._settings
        if settings.dataset is not None:
            return work.taken(list(settings.dataset), form, settings.outputs, settings.seed)
        if vocabulary is None:
            raise RuntimeError("prompts are made without a vocabulary")
        return work.made(self._sizes(), vocabulary, form, settings.prefix, settings.seed, run)

    def _sizes(self) -> Iterator[Size]:
        settings = self._settings
        if settings.trace is not None:
            return itertools.cycle(line.size for line in settings.trace)
        if settings.inputs is None or settings.outputs is None:
            raise RuntimeError("there are no lengths")
        return work.drawn_sizes(settings.inputs, settings.outputs, settings.prefix, settings.seed)

    async def _form(self) -> Form:
        """The form of requests that this server takes."""
        settings = self._settings
        form = Form(
            settings.model,
            settings.endpoint,
            settings.streams,
            counts_tokens=settings.streams,
            ignores_eos=settings.ignores_eos,
            more=settings.more,
        )
        try:
            counts = await self._try(form)
        except Refused as error:
            if error.status not in (400, 422) or not form.counts_tokens:
                raise
            counts = False
        if form.counts_tokens and not counts:
            form = replace(form, counts_tokens=False)
            await self._try(form)
        return form

    async def _try(self, form: Form) -> bool:
        """Send one request of this form; whether every text in its stream came with a count of tokens."""
        try:
            return await self._sent(form)
        except Refused as error:
            if form.ignores_eos and "ignore_eos" in error.message:
                error.hint = "--no-ignore-eos leaves it out"
            raise

    async def _sent(self, form: Form) -> bool:
        dataset = self._settings.dataset
        body = form.body(dataset[0].content if dataset is not None else "What is this?", TRIED_TOKENS)
        if not form.streams:
            _check_usage(await self._server.whole(self._path, body))
            return False
        last, counts = Chunk(), True
        async for found in self._server.stream(self._path, body):
            if any(choice.text or (choice.delta is not None and choice.delta.text) for choice in found.choices):
                counts = counts and found.usage is not None and bool(found.usage.completion_tokens)
            last = found if found.usage is not None else last
        _check_usage(last)
        return counts

    async def _vocabulary(self) -> Vocabulary:
        settings = self._settings
        form = Form(settings.model, settings.endpoint, False, False, ignores_eos=False)

        async def count(text: str) -> int:
            answer = await self._server.whole(self._path, form.body(text, 1))
            _check_usage(answer)
            return 0 if answer.usage is None else answer.usage.prompt_tokens

        return await learn(count)


def _check_usage(answer: Chunk) -> None:
    if answer.usage is None or answer.usage.completion_tokens is None:
        raise BadSetting("the server does not report usage, so tokens cannot be counted", "try --no-stream")


def record(result: Result, *, with_rows: bool) -> dict[str, Any]:
    """The result in the form of `quire.cli.shapes.Bench`, but for its version and kind."""
    rows = [row for run in result.runs for row in run.measured.rows]
    return {
        "url": result.url,
        "model": result.settings.model,
        "fingerprint": next((row.fingerprint for row in rows if row.fingerprint is not None), None),
        "startedAt": _time(result.started_at),
        "parameters": parameters(result.settings),
        "versions": {
            "quire": version("quire"),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count() or 0,
        },
        "tokensBy": result.tokens_by,
        "interrupted": result.interrupted,
        "runs": [_run(run, result.settings.bounds, with_rows) for run in result.runs],
    }


def _run(run: Run, bounds: Mapping[str, float], with_rows: bool) -> dict[str, Any]:
    demand = run.demand
    found = {
        "load": demand.label,
        "concurrency": int(demand.value) if demand.kind == "concurrency" else None,
        "rate": demand.value if demand.kind == "rate" and math.isfinite(demand.value) else None,
        "startedAt": _time(run.measured.started_at),
        **figures.summary(run.measured, bounds),
    }
    if with_rows:
        found["rows"] = [figures.row(row) for row in run.measured.rows]
    return found


def parameters(settings: Settings) -> dict[str, Any]:
    """What the result depends on, as it was asked for."""

    def drawn(lengths: Lengths | None) -> str | None:
        if lengths is None:
            return None
        if lengths.kind == "fixed":
            return f"{lengths.a:g}"
        return f"{lengths.kind}:{lengths.a:g}:{lengths.b:g}"

    return {
        "requests": settings.requests,
        "duration": settings.seconds,
        "inputTokens": drawn(settings.inputs),
        "outputTokens": drawn(settings.outputs),
        "trace": None if settings.trace is None else settings.file,
        "speed": settings.speed,
        "dataset": None if settings.dataset is None else settings.file,
        "prefixTokens": settings.prefix,
        "endpoint": settings.endpoint,
        "stream": settings.streams,
        "ignoreEos": settings.ignores_eos,
        "timeout": settings.timeout,
        "goodput": dict(settings.bounds),
        "warmup": settings.warmup,
        "seed": settings.seed,
        "extraBody": dict(settings.more),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
