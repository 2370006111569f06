"""What rows come to: means and percentiles, throughput, goodput, errors by kind.

A percentile between two values is on the line between them: of n sorted values, p is at (n - 1) * p / 100.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quire.bench.errors import BadSetting
from quire.bench.load import Measured, Row

BOUNDED = ("ttft", "itl", "tpot", "e2e")
ITL_SHARE = 99
"""Percentile of a request's own inter-token latencies that a bound is for."""


def percentile(ordered: Sequence[float], p: float) -> float:
    """Of values in ascending order, at least one."""
    at = (len(ordered) - 1) * p / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, p50, p90, p99 and max, in the values' unit; None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    found = {"mean": math.fsum(ordered) / len(ordered)}
    found |= {f"p{p}": percentile(ordered, p) for p in (50, 90, 99)}
    return {name: round(value, 6) for name, value in {**found, "max": ordered[-1]}.items()}


def parse_bounds(text: str) -> dict[str, float]:
    """`ttft:500ms,itl:50ms,e2e:5s` -> seconds by name. Raises `BadSetting`."""
    from quire_schemas.quantities import BadQuantity, parse_duration

    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, colon, bound = part.strip().partition(":")
        if name not in BOUNDED or not colon or name in bounds:
            raise BadSetting(
                f"{part!r} is no bound on a latency", f"write ttft:500ms,itl:50ms; there are {', '.join(BOUNDED)}"
            )
        try:
            bounds[name] = parse_duration(bound)
        except BadQuantity as error:
            raise BadSetting(f"{part!r}: {error}", error.hint) from error
    return bounds


def meets(row: Row, bounds: Mapping[str, float]) -> bool:
    """Whether a request was answered within all bounds. An answer of one token has no time between tokens to be
    too long; one without text has no first token that came in time."""
    if row.error is not None:
        return False
    itl = percentile(sorted(row.itl), ITL_SHARE) if row.itl else 0.0
    found = {"ttft": row.ttft, "itl": itl, "tpot": row.tpot or 0.0, "e2e": row.e2e}
    return all((value := found[name]) is not None and value <= bound for name, bound in bounds.items())


def summary(measured: Measured, bounds: Mapping[str, float]) -> dict[str, Any]:
    """The figures of one run, in the form of `quire.cli.shapes.BenchRun` without what names the run."""
    good = [row for row in measured.rows if row.error is None]
    seconds = max(measured.seconds, 1e-9)
    inputs = sum(row.input_tokens or 0 for row in good)
    outputs = sum(row.output_tokens or 0 for row in good)
    cached = [row.cached_tokens for row in good if row.cached_tokens is not None]
    met = sum(meets(row, bounds) for row in measured.rows)
    return {
        "seconds": round(measured.seconds, 6),
        "requests": len(measured.rows),
        "answered": len(good),
        "failed": len(measured.rows) - len(good),
        "unfinished": measured.unfinished,
        "inputTokens": inputs,
        "cachedTokens": sum(cached) if cached else None,
        "outputTokens": outputs,
        "inputTokensAsked": _asked(good, "input_asked"),
        "outputTokensAsked": _asked(good, "output_asked"),
        "requestsPerSecond": round(len(good) / seconds, 6),
        "outputTokensPerSecond": round(outputs / seconds, 6),
        "totalTokensPerSecond": round((inputs + outputs) / seconds, 6),
        "ttft": spread([row.ttft for row in good if row.ttft is not None]),
        "itl": spread([each for row in good for each in row.itl]),
        "tpot": spread([row.tpot for row in good if row.tpot is not None]),
        "e2e": spread([row.e2e for row in good if row.e2e is not None]),
        "lateness": spread([row.sent - row.due for row in measured.rows]),
        "clientCpu": round(measured.cpu_seconds / seconds, 4),
        "goodput": {
            "requestsPerSecond": round(met / seconds, 6),
            "share": round(met / len(measured.rows), 6) if measured.rows else 0.0,
        }
        if bounds
        else None,
        "errors": errors(measured.rows),
    }


def _asked(rows: Sequence[Row], name: str) -> int | None:
    found = [getattr(row, name) for row in rows]
    return None if not found or None in found else sum(found)


def errors(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many of each kind, the most frequent first, with the message of the first of each."""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        if row.error is not None:
            kinds.setdefault(row.error, []).append(row.message or "")
    return [
        {"kind": kind, "count": len(messages), "message": messages[0]}
        for kind, messages in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]


def row(found: Row) -> dict[str, Any]:
    """A row in the form of `quire.cli.shapes.BenchRow`."""
    return {
        "index": found.index,
        "due": round(found.due, 6),
        "sent": round(found.sent, 6),
        "ttft": _rounded(found.ttft),
        "tpot": _rounded(found.tpot),
        "e2e": _rounded(found.e2e),
        "itl": [round(each, 6) for each in found.itl],
        "inputTokensAsked": found.input_asked,
        "inputTokens": found.input_tokens,
        "cachedTokens": found.cached_tokens,
        "outputTokensAsked": found.output_asked,
        "outputTokens": found.output_tokens,
        "finishReason": found.finish_reason,
        "error": found.error,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
