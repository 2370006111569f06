"""Dashboards as a table of panels, and as the JSON that Grafana imports.

Each has a variable for the source of the data and, where series are of models, one for the models. Identifiers are
fixed, so that a later version of a dashboard takes the place of an earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from quire.monitoring.promql import added, mean, quantile, rate, select, total
from quire_schemas import signals

MODEL: Final = f'{signals.LABEL_MODEL}=~"$model"'
COLUMNS, HEIGHT = 3, 8
_SCHEMA: Final = 39


@dataclass(frozen=True, slots=True)
class Query:
    """One expression. `legend` names a line by its labels."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot. `unit` is Grafana's word for it."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard."""

    uid: str
    title: str
    text: str
    rows: tuple[Row, ...]
    of_models: bool = True

    @property
    def expressions(self) -> Iterator[str]:
        for row in self.rows:
            for panel in row.panels:
                yield from (query.expression for query in panel.queries)


def _quantiles(metric: str) -> tuple[Query, ...]:
    return tuple(
        Query(quantile(share, metric, (MODEL,), signals.LABEL_MODEL), f"{{{{model}}}} p{share * 100:g}")
        for share in (0.5, 0.95, 0.99)
    )


def _each(metric: str, *by: str) -> tuple[Query, ...]:
    """A gauge, a line for each combination of labels."""
    return (Query(added(select(metric, MODEL), *by), _legend(*by)),)


def _rates(metric: str, *by: str) -> tuple[Query, ...]:
    return (Query(added(rate(total(metric, MODEL)), *by), _legend(*by)),)


def _legend(*by: str) -> str:
    return " ".join(f"{{{{{label}}}}}" for label in by)


def _plain(metric: str, legend: str) -> Query:
    return Query(metric, legend)


_REPLICA: Final = (signals.LABEL_REPLICA,)
_ERRORS: Final = added(
    rate(total(signals.REQUESTS, MODEL, f'{signals.LABEL_FINISH}="error"')), signals.LABEL_MODEL
)
_ALL: Final = added(rate(total(signals.REQUESTS, MODEL)), signals.LABEL_MODEL)
_FOUND: Final = added(
    rate(total(signals.PROMPT_TOKENS_BY_SOURCE, MODEL, f'{signals.LABEL_SOURCE}="local_cache_hit"')),
    signals.LABEL_MODEL,
)
_COMPUTED: Final = added(rate(total(signals.PROMPT_TOKENS_BY_SOURCE, MODEL)), signals.LABEL_MODEL)

REQUESTS: Final = Board(
    "quire-requests",
    "Quire: requests",
    "What clients ask for, what they get, and how long it takes.",
    (
        Row(
            "Traffic",
            (
                Panel("Requests by how they ended", "reqps", _rates(signals.REQUESTS, signals.LABEL_FINISH)),
                Panel(
                    "Share of requests that failed",
                    "percentunit",
                    (Query(f"{_ERRORS} / {_ALL}", _legend(signals.LABEL_MODEL)),),
                    "By no fault of the client.",
                ),
                Panel("Refused, by code", "reqps", _rates(signals.ADMISSION_REJECTIONS, signals.LABEL_REASON)),
                Panel(
                    "Refused, by policy",
                    "reqps",
                    (
                        Query(
                            added(
                                rate(total(signals.POLICY_REFUSALS)), signals.LABEL_POLICY, signals.LABEL_REASON
                            ),
                            _legend(signals.LABEL_POLICY, signals.LABEL_REASON),
                        ),
                    ),
                    "For what it allows, for its limits and budgets, or for a full queue.",
                ),
                Panel(
                    "Share of budgets that is spent",
                    "percentunit",
                    (
                        Query(
                            signals.BUDGET_SPENT,
                            _legend(signals.LABEL_POLICY, signals.LABEL_BUDGET, signals.LABEL_KEY),
                        ),
                    ),
                    "Above 1 nothing is left: requests get 429 insufficient_quota.",
                ),
                Panel("Tokens written", "short", _rates(signals.GENERATION_TOKENS, signals.LABEL_MODEL)),
                Panel("Tokens read", "short", _rates(signals.PROMPT_TOKENS, signals.LABEL_MODEL)),
                Panel(
                    "Share of prompt tokens found in the cache",
                    "percentunit",
                    (Query(f"{_FOUND} / {_COMPUTED}", _legend(signals.LABEL_MODEL)),),
                ),
                Panel(
                    "Answers read for calls",
                    "short",
                    _rates(signals.TOOL_CALL_PARSER_INVOCATIONS, signals.LABEL_MODEL, signals.LABEL_OUTCOME),
                    "In each second, of requests that offered tools: how many called one.",
                ),
                Panel("Requests in flight", "short", _each(signals.REQUESTS_IN_FLIGHT, signals.LABEL_MODEL)),
                Panel(
                    "Held for a replica",
                    "short",
                    _each(signals.REQUESTS_HELD, signals.LABEL_MODEL),
                    "They wait in the router until one is ready or has a place.",
                ),
                Panel(
                    "Requests by what they are",
                    "reqps",
                    _rates(signals.REQUESTS, signals.LABEL_MODEL, signals.LABEL_OPERATION),
                ),
            ),
        ),
        Row(
            "Time",
            (
                Panel("To the first token", "s", _quantiles(signals.TIME_TO_FIRST_TOKEN)),
                Panel("Between tokens", "s", _quantiles(signals.INTER_TOKEN_LATENCY)),
                Panel("From arrival to end", "s", _quantiles(signals.E2E_LATENCY)),
                Panel("In the engine's queue", "s", _quantiles(signals.QUEUE_TIME)),
                Panel("Prefill", "s", _quantiles(signals.PREFILL_TIME)),
                Panel("Decode", "s", _quantiles(signals.DECODE_TIME)),
                Panel("Per token of an answer", "s", _quantiles(signals.TIME_PER_OUTPUT_TOKEN)),
                Panel("In the model", "s", _quantiles(signals.INFERENCE_TIME)),
            ),
        ),
        Row(
            "Shape",
            (
                Panel("Tokens of prompts", "short", _quantiles(signals.REQUEST_PROMPT_TOKENS)),
                Panel(
                    "Tokens of prompts that were computed", "short", _quantiles(signals.REQUEST_COMPUTED_TOKENS)
                ),
                Panel("Tokens of answers", "short", _quantiles(signals.REQUEST_GENERATION_TOKENS)),
                Panel("Longest answer of a request", "short", _quantiles(signals.REQUEST_MAX_GENERATION_TOKENS)),
                Panel("Tokens asked for", "short", _quantiles(signals.REQUEST_PARAMS_MAX_TOKENS)),
                Panel("Answers asked for", "short", _quantiles(signals.REQUEST_PARAMS_N)),
            ),
        ),
    ),
)

ENGINES: Final = Board(
    "quire-engines",
    "Quire: engines",
    "What each replica has to do, and what it does it with.",
    (
        Row(
            "Replicas",
            (
                Panel(
                    "Ready and wanted",
                    "short",
                    (
                        *_each(signals.REPLICAS_READY, signals.LABEL_MODEL),
                        Query(
                            added(select(signals.REPLICAS_WANTED, MODEL), signals.LABEL_MODEL), "{{model}} wanted"
                        ),
                    ),
                ),
                Panel("Up", "short", _each(signals.REPLICA_UP, *_REPLICA)),
                Panel(
                    "Ejected",
                    "short",
                    _rates(signals.REPLICA_EJECTIONS, signals.LABEL_MODEL, signals.LABEL_REASON),
                    "Replicas that stopped being ready by themselves, in each second.",
                ),
                Panel(
                    "Kept from requests",
                    "short",
                    _each(signals.REPLICA_TRIPPED, *_REPLICA),
                    "1: it fails what it is given, and gets no more for a while; 0.5: it is tried.",
                ),
                Panel("Restarts in a row", "short", _each(signals.REPLICA_RESTARTS, signals.LABEL_MODEL)),
                Panel("Sequences started again", "short", _rates(signals.RETRIES, signals.LABEL_MODEL)),
                Panel(
                    "Streams that went on elsewhere",
                    "short",
                    _rates(signals.STREAM_MIGRATIONS, signals.LABEL_MODEL),
                ),
                Panel(
                    "By route",
                    "reqps",
                    _rates(signals.ROUTE_REQUESTS, signals.LABEL_ROUTE, signals.LABEL_MODEL),
                    "Requests that came by way of a Route.",
                ),
                Panel(
                    "Stepped in",
                    "short",
                    _rates(
                        signals.ROUTE_FALLBACKS, signals.LABEL_ROUTE, signals.LABEL_MODEL, signals.LABEL_FAILURE
                    ),
                    "Models that stepped in for one that failed, in each second.",
                ),
                Panel(
                    "Copies",
                    "short",
                    _rates(signals.ROUTE_MIRRORED, signals.LABEL_ROUTE, signals.LABEL_MODEL, signals.LABEL_FINISH),
                ),
                Panel(
                    "Sequences without finite numbers",
                    "short",
                    _rates(signals.CORRUPTED_REQUESTS, signals.LABEL_MODEL),
                ),
            ),
        ),
        Row(
            "Work",
            (
                Panel("Running", "short", _each(signals.NUM_REQUESTS_RUNNING, *_REPLICA)),
                Panel("Waiting", "short", _each(signals.NUM_REQUESTS_WAITING, *_REPLICA)),
                Panel(
                    "Waiting, by what for",
                    "short",
                    _each(signals.NUM_REQUESTS_WAITING_BY_REASON, signals.LABEL_MODEL, signals.LABEL_REASON),
                ),
                Panel("Steps", "ops", _rates(signals.ENGINE_STEPS, *_REPLICA)),
                Panel(
                    "Tokens of a step",
                    "short",
                    (Query(mean(signals.ITERATION_TOKENS, (MODEL,), *_REPLICA), _legend(*_REPLICA)),),
                ),
                Panel("Preemptions", "ops", _rates(signals.PREEMPTIONS, *_REPLICA)),
                Panel("Preemptions of a sequence", "short", _quantiles(signals.REQUEST_NUM_PREEMPTIONS)),
            ),
        ),
        Row(
            "Memory",
            (
                Panel("KV cache in use", "percentunit", _each(signals.KV_CACHE_USAGE, *_REPLICA)),
                Panel("KV blocks that sharing saves", "short", _each(signals.KV_BLOCKS_SAVED, *_REPLICA)),
                Panel("Free KV blocks with known content", "short", _each(signals.PREFIX_CACHE_BLOCKS, *_REPLICA)),
                Panel(
                    "Share of looked up tokens that were found",
                    "percentunit",
                    (
                        Query(
                            f"{added(rate(total(signals.PREFIX_CACHE_HITS, MODEL)), *_REPLICA)} / "
                            f"{added(rate(total(signals.PREFIX_CACHE_QUERIES, MODEL)), *_REPLICA)}",
                            _legend(*_REPLICA),
                        ),
                    ),
                ),
                Panel("Host memory of the process", "bytes", _each(signals.ENGINE_RESIDENT_MEMORY, *_REPLICA)),
                Panel("Processors in use", "short", _rates(signals.ENGINE_CPU, *_REPLICA)),
                Panel(
                    "KV cache configuration",
                    "short",
                    _each(
                        signals.CACHE_CONFIG_INFO,
                        *_REPLICA,
                        signals.LABEL_NUM_BLOCKS,
                        signals.LABEL_BLOCK_SIZE,
                        signals.LABEL_MAX_NUM_SEQS,
                    ),
                ),
            ),
        ),
    ),
)

ROUTER: Final = Board(
    "quire-router",
    "Quire: router",
    "What the router itself costs, and what it keeps.",
    (
        Row(
            "Time it adds",
            tuple(
                Panel(
                    title,
                    "s",
                    tuple(
                        Query(
                            quantile(share, signals.ROUTER_ADDED_TIME, (f'{signals.LABEL_PART}="{part}"',)),
                            f"p{share * 100:g}",
                        )
                        for share in (0.5, 0.99)
                    ),
                )
                for part, title in (("request", "To a request"), ("answer", "To a piece of an answer"))
            ),
        ),
        Row(
            "Process",
            (
                Panel("Processors in use", "short", (Query(rate(total(signals.ROUTER_CPU)), "{{instance}}"),)),
                Panel(
                    "Memory",
                    "bytes",
                    (
                        _plain(signals.ROUTER_RESIDENT_MEMORY, "{{instance}}"),
                        _plain(signals.ROUTER_VIRTUAL_MEMORY, "{{instance}} virtual"),
                    ),
                ),
                Panel(
                    "Open descriptors",
                    "short",
                    (
                        _plain(signals.ROUTER_OPEN_FDS, "{{instance}}"),
                        _plain(signals.ROUTER_MAX_FDS, "{{instance}} at most"),
                    ),
                ),
                Panel("Share of its memory", "percentunit", (_plain(signals.MEMORY_SHARE, "{{instance}}"),)),
                Panel(
                    "Connections turned away",
                    "ops",
                    (Query(rate(total(signals.CONNECTIONS_REFUSED)), "{{instance}}"),),
                ),
                Panel("Started", "dateTimeAsIso", (Query(f"{signals.ROUTER_START_TIME} * 1000", "{{instance}}"),)),
            ),
        ),
        Row(
            "Batches, and what is kept",
            (
                Panel("Batches", "short", (_plain(signals.BATCHES_RUNNING, "{{instance}}"),)),
                Panel(
                    "Lines of batches",
                    "ops",
                    (Query(added(rate(total(signals.BATCH_LINES)), signals.LABEL_FINISH), "{{finish}}"),),
                ),
                Panel("Room on the disk of the store", "bytes", (_plain(signals.STORE_FREE, "{{instance}}"),)),
                Panel("Spans delivered", "ops", (Query(rate(total(signals.SPANS_EXPORTED)), "{{instance}}"),)),
                Panel(
                    "Spans lost",
                    "ops",
                    (Query(added(rate(total(signals.SPANS_DROPPED)), signals.LABEL_REASON), "{{reason}}"),),
                ),
            ),
        ),
    ),
    of_models=False,
)

_DEVICE: Final = "{{instance}} {{device}}"
GPUS: Final = Board(
    "quire-gpus",
    "Quire: GPUs",
    "How the machine's GPUs are. Empty where there are none.",
    (
        Row(
            "GPUs",
            (
                Panel("Busy", "percentunit", (_plain(signals.GPU_UTILIZATION, _DEVICE),)),
                Panel(
                    "Memory",
                    "bytes",
                    (
                        _plain(signals.GPU_MEMORY_USED, _DEVICE),
                        _plain(signals.GPU_MEMORY, f"{_DEVICE} in all"),
                    ),
                ),
                Panel("Temperature", "celsius", (_plain(signals.GPU_TEMPERATURE, _DEVICE),)),
                Panel("Power", "watt", (_plain(signals.GPU_POWER, _DEVICE),)),
                Panel("Held back by heat or power", "short", (_plain(signals.GPU_SLOWED, _DEVICE),)),
                Panel("Memory errors", "short", (_plain(signals.GPU_ECC_ERRORS, _DEVICE),)),
                Panel(
                    "Errors of the driver",
                    "short",
                    (Query(total(signals.GPU_XID_ERRORS), f"{_DEVICE} {{{{xid}}}}"),),
                ),
            ),
        ),
    ),
    of_models=False,
)
BOARDS: Final = (REQUESTS, ENGINES, ROUTER, GPUS)


def as_json(board: Board) -> str:
    """The dashboard as Grafana imports it."""
    return json.dumps(_board(board), indent=1, ensure_ascii=False) + "\n"


def _board(board: Board) -> dict[str, Any]:
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.text,
        "tags": ["quire"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables(board)},
        "panels": list(_placed(board.rows)),
    }


def _variables(board: Board) -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    models = {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": f"label_values({signals.REQUESTS_IN_FLIGHT}, {signals.LABEL_MODEL})", "refId": "model"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
    return [source, models] if board.of_models else [source]


_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}


def _placed(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Rows and panels with their places, from the top."""
    number, top, width = 0, 0, 24 // COLUMNS
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
        }
        top += 1
        for place, panel in enumerate(row.panels):
            number += 1
            across, down = place % COLUMNS, place // COLUMNS
            grid = {"x": width * across, "y": top + HEIGHT * down, "w": width, "h": HEIGHT}
            yield {"id": number, "gridPos": grid, **_panel(panel)}
        top += HEIGHT * -(-len(row.panels) // COLUMNS)


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": _SOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
            }
            for place, query in enumerate(panel.queries)
        ],
    }
