"""A picture of a result: how latency grows with throughput over its runs, and how TTFT and ITL are distributed.

The only module that loads matplotlib, which the extra `quire[bench]` installs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

View = Mapping[str, Any]
INCHES, DOTS = (15.0, 4.8), 110
MOST_POINTS = 2000
"""Of one curve."""


def draw(result: View, path: Path) -> None:
    """Write a PNG of a result that has its rows. Raises OSError."""
    figure = Figure(figsize=INCHES, dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    speed, first, between = figure.subplots(1, 3)
    runs = result["runs"]
    _speed(speed, runs)
    _distribution(first, runs, "TTFT", lambda run: [row["ttft"] for row in run["rows"] if row["ttft"] is not None])
    _distribution(between, runs, "ITL", lambda run: [each for row in run["rows"] for each in row["itl"]])
    figure.suptitle(f"{result['model']}, {result['startedAt'][:16].replace('T', ' ')} UTC", fontsize=11)
    figure.savefig(path, format="png")


def _speed(axes: Axes, runs: Sequence[View]) -> None:
    measured = [run for run in runs if run["e2e"] is not None]
    measured.sort(key=lambda run: float(run["outputTokensPerSecond"]))
    across = [run["outputTokensPerSecond"] for run in measured]
    for share, line in (("p50", "-"), ("p99", "--")):
        axes.plot(across, [run["e2e"][share] for run in measured], line, marker="o", label=f"E2E {share}")
    for run, at in zip(measured, across, strict=True):
        axes.annotate(
            run["load"],
            (at, run["e2e"]["p99"]),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=8,
        )
    axes.margins(0.15)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _finish(axes, "Latency over throughput", "output tokens/s", "seconds", bool(measured))


def _distribution(axes: Axes, runs: Sequence[View], name: str, of: Any) -> None:
    """The share of values that are at most so long, a curve for each run."""
    drawn = False
    for run in runs:
        values = sorted(of(run))
        if not values:
            continue
        step = max(len(values) // MOST_POINTS, 1)
        kept = [(values[i] * 1000, (i + 1) / len(values)) for i in range(0, len(values), step)]
        kept.append((values[-1] * 1000, 1.0))
        axes.step([at for at, _ in kept], [share for _, share in kept], where="post", label=run["load"])
        drawn = True
    if drawn:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    axes.set_ylim(0, 1.02)
    _finish(axes, f"{name}, cumulative", "milliseconds", "share of values", drawn)


def _finish(axes: Axes, title: str, across: str, up: str, drawn: bool) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(visible=True, alpha=0.3)
    if drawn:
        axes.legend(fontsize=8, loc="upper left")
    else:
        axes.text(0.5, 0.5, "nothing was measured", ha="center", va="center", transform=axes.transAxes)
