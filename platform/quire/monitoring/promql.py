"""Expressions over the product's series. `WINDOW` stands for a span of time that whoever shows them fills in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

WINDOW: Final = "$__rate_interval"
"""Grafana's: a few scrapes."""


def select(metric: str, *matchers: str) -> str:
    return f"{metric}{{{', '.join(matchers)}}}" if matchers else metric


def total(metric: str, *matchers: str) -> str:
    """A counter, as it is on the wire."""
    return select(f"{metric}_total", *matchers)


def rate(series: str, window: str = WINDOW) -> str:
    """How fast a counter grows, in each second."""
    return f"rate({series}[{window}])"


def added(aggregated: str, *by: str) -> str:
    """The sum over all series with the same labels `by`."""
    return f"sum by ({', '.join(by)}) ({aggregated})" if by else f"sum({aggregated})"


def quantile(share: float, metric: str, matchers: Sequence[str], *by: str, window: str = WINDOW) -> str:
    """Of a histogram: the value that this share of all does not exceed."""
    buckets = added(rate(select(f"{metric}_bucket", *matchers), window), *by, "le")
    return f"histogram_quantile({share:g}, {buckets})"


def mean(metric: str, matchers: Sequence[str], *by: str) -> str:
    """Of a histogram: the mean value."""
    parts = (added(rate(select(f"{metric}_{part}", *matchers)), *by) for part in ("sum", "count"))
    return " / ".join(parts)
