"""Rows: one JSON object a line, and in each where and on what it was measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quire_kernels import best

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
NO_KERNELS = "none"
"""The back-end in rows of what computes no model."""

Row = dict[str, Any]


def backend(threads: int) -> str:
    """The kernel back-end that an engine on this machine's processors gets."""
    return best("cpu", threads)[0].name


def commit_of(checkout: Path) -> str:
    """The commit that another checkout of this repository is at."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def provenance(backend: str) -> Row:
    """Where and on what a row was measured; `backend` is the one whose kernels computed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else ""),
        "machine": f"{cpu}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "backend": backend,
    }


def write(path: Path, rows: Sequence[Row]) -> None:
    """Append `rows` to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    print(f"\n{len(rows)} rows -> {path}")
