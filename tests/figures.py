"""What survival tests measured, as rows in the file that QUIRE_FIGURES names; nowhere if it names none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import backend, provenance, write


def record(*rows: dict[str, Any]) -> None:
    """Append rows, each with its `system` and what was measured of it."""
    if path := os.environ.get("QUIRE_FIGURES"):
        common = {**provenance(backend(1)), "benchmark": "survival"}
        write(Path(path), [{**common, **row} for row in rows])


def quantile(values: Sequence[float], part: float) -> float:
    """The value that so large a part of them is at most, counted upwards: of few values rather one too high."""
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """What a row says of times that were measured; `repeat` is how many."""
    figure = {f"p{int(100 * part)}_s": quantile(seconds, part) for part in (0.5, 0.9, 0.99)}
    figure["max_s"] = max(seconds)
    return {"repeat": len(seconds), **{name: round(value, 4) for name, value in figure.items()}}
