"""Alert rules as a table, and as the YAML that Prometheus loads; and a scrape to begin with.

A rule speaks of what clients notice, or soon will. `critical` is for what somebody has to be woken for. What to
do about each is in docs/monitoring.md, under its name. Thresholds that depend on what is served (the time to the
first token) are to be set anew by who knows that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import yaml

from quire.monitoring.promql import added, quantile, rate, select, total
from quire_schemas import signals

JOB: Final = "quire"
_OF: Final = ("instance", signals.LABEL_MODEL)
RUNBOOK: Final = "docs/monitoring.md"


@dataclass(frozen=True, slots=True)
class Rule:
    """One alert: it fires once `expression` has had a value for as long as `lasting`."""

    name: str
    expression: str
    lasting: str
    severity: Literal["warning", "critical"]
    summary: str
    description: str


def _increase(series: str, window: str) -> str:
    return f"increase({series}[{window}])"


_FIVE: Final = "5m"
_REFUSED: Final = f'{signals.LABEL_REASON}="queue_full"'
RULES: Final = (
    Rule(
        "QuireRouterDown",
        f'up{{job="{JOB}"}} == 0',
        "1m",
        "critical",
        "The router at {{ $labels.instance }} does not answer",
        "Prometheus has had no answer from /metrics for a minute: clients have none either.",
    ),
    Rule(
        "QuireNoReadyReplica",
        f"{signals.REPLICAS_WANTED} > 0 and {signals.REPLICAS_READY} == 0",
        "2m",
        "critical",
        "{{ $labels.model }} has no replica that serves",
        "{{ $value }} are wanted and none is ready: requests wait, and then get a 503.",
    ),
    Rule(
        "QuireReplicasMissing",
        f"{signals.REPLICAS_READY} > 0 and {signals.REPLICAS_READY} < {signals.REPLICAS_WANTED}",
        "15m",
        "warning",
        "{{ $labels.model }} has fewer replicas than it should",
        "{{ $value }} are ready. A rollout that takes longer than this looks the same.",
    ),
    Rule(
        "QuireCrashLoop",
        f"{signals.REPLICA_RESTARTS} >= 3",
        "0m",
        "critical",
        "A replica of {{ $labels.model }} ends again and again",
        "It has been started {{ $value }} times in a row without serving.",
    ),
    Rule(
        "QuireReplicaEjected",
        f"{_increase(total(signals.REPLICA_EJECTIONS), '10m')} > 0",
        "0m",
        "warning",
        "A replica of {{ $labels.model }} was lost ({{ $labels.reason }})",
        "Its connection broke, or it made no progress, without anybody having told it to leave.",
    ),
    Rule(
        "QuireNoProgress",
        f"{signals.NUM_REQUESTS_RUNNING} > 0 and {rate(total(signals.ENGINE_STEPS), '2m')} == 0",
        "1m",
        "critical",
        "{{ $labels.replica }} has requests and makes no step",
        "{{ $value }} sequences run there, and nothing has been computed for two minutes.",
    ),
    Rule(
        "QuireErrors",
        added(rate(total(signals.REQUESTS, f'{signals.LABEL_FINISH}="error"'), _FIVE), *_OF)
        + " / "
        + added(rate(total(signals.REQUESTS, f'{signals.LABEL_FINISH}!="refused"'), _FIVE), *_OF)
        + " > 0.05",
        _FIVE,
        "critical",
        "{{ $value | humanizePercentage }} of the requests for {{ $labels.model }} fail",
        "They had begun and ended by no fault of the client.",
    ),
    Rule(
        "QuireNumbersNotFinite",
        f"{_increase(total(signals.CORRUPTED_REQUESTS), '15m')} > 0",
        "0m",
        "critical",
        "{{ $labels.model }} computes numbers that are not finite",
        "A checkpoint that does not bear its dtype, or hardware that is broken.",
    ),
    Rule(
        "QuireQueueFull",
        added(rate(total(signals.ADMISSION_REJECTIONS, _REFUSED), _FIVE), *_OF) + " > 0",
        _FIVE,
        "warning",
        "Requests for {{ $labels.model }} are turned away: its queue is full",
        "{{ $value | humanize }} in each second get a 429.",
    ),
    Rule(
        "QuireSlowFirstToken",
        quantile(0.95, signals.TIME_TO_FIRST_TOKEN, (), *_OF, window="10m") + " > 10",
        "10m",
        "warning",
        "The first token of {{ $labels.model }} takes long",
        "One in twenty requests waits for {{ $value | humanizeDuration }} or more.",
    ),
    Rule(
        "QuireSlowRouter",
        quantile(0.99, signals.ROUTER_ADDED_TIME, (), "instance", signals.LABEL_PART, window="10m") + " > 0.1",
        "10m",
        "warning",
        "The router at {{ $labels.instance }} is slow",
        "It adds {{ $value | humanizeDuration }} to one in a hundred ({{ $labels.part }}).",
    ),
    Rule(
        "QuireKvCachePressure",
        f"{signals.KV_CACHE_USAGE} > 0.95 and {rate(total(signals.PREEMPTIONS), _FIVE)} > 0",
        "10m",
        "warning",
        "{{ $labels.replica }} has too little room for what it computes",
        "Its KV cache is full, and sequences are put back and computed again.",
    ),
    Rule(
        "QuireStoreNearlyFull",
        f"{signals.STORE_FREE} < {1 << 30}",
        _FIVE,
        "warning",
        "The disk of the router's store at {{ $labels.instance }} is nearly full",
        "{{ $value | humanize1024 }}B are left.",
    ),
    Rule(
        "QuireStoreFull",
        f"{signals.STORE_FREE} < {128 << 20}",
        "1m",
        "critical",
        "The disk of the router's store at {{ $labels.instance }} is full",
        "{{ $value | humanize1024 }}B are left; at 64 MiB files, batches and kept responses are refused.",
    ),
    Rule(
        "QuireGpuErrors",
        f"{_increase(total(signals.GPU_XID_ERRORS), '15m')} > 0",
        "0m",
        "critical",
        "{{ $labels.device }} at {{ $labels.instance }} has an error (Xid {{ $labels.xid }})",
        "The driver has reported it; engines on that GPU may fail.",
    ),
    Rule(
        "QuireGpuSlowed",
        select(signals.GPU_SLOWED) + " == 1",
        "10m",
        "warning",
        "{{ $labels.device }} at {{ $labels.instance }} is held back",
        "By heat, or by what it may draw.",
    ),
)


def as_yaml() -> str:
    """The rules as a file for `rule_files`."""
    rules: list[dict[str, Any]] = [
        {
            "alert": rule.name,
            "expr": rule.expression,
            "for": rule.lasting,
            "labels": {"severity": rule.severity},
            "annotations": {
                "summary": rule.summary,
                "description": rule.description,
                "runbook": f"{RUNBOOK}#{rule.name.lower()}",
            },
        }
        for rule in RULES
    ]
    return str(yaml.safe_dump({"groups": [{"name": "quire", "rules": rules}]}, sort_keys=False, width=110))


TARGET = "127.0.0.1:8000"
"""Where a gateway listens unless its manifest says otherwise."""


def scrape(target: str = TARGET, interval: str = "15s") -> str:
    """A configuration of Prometheus that knows one router and loads the rules beside it."""
    job = {"job_name": JOB, "static_configs": [{"targets": [target]}]}
    settings = {"scrape_interval": interval, "evaluation_interval": interval}
    return str(
        yaml.safe_dump(
            {"global": settings, "rule_files": ["alerts.yaml"], "scrape_configs": [job]}, sort_keys=False
        )
    )
