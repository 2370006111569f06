"""Wall time of `platform get` against a running control plane, of `--help`, and of the heavier imports, each in a
fresh process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import NO_KERNELS, RESULTS, Row, provenance, write


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "start-up.jsonl")


def run(args: argparse.Namespace) -> None:
    def measure(name: str, command: Sequence[str]) -> Row:
        times = []
        for _ in range(args.repeat):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        row = {
            "benchmark": "start-up", "system": name, "repeat": args.repeat,
            "p50_ms": round(statistics.median(times) * 1000, 1), "max_ms": round(max(times) * 1000, 1),
        }  # fmt: skip
        print(f"{name:44} p50 {row['p50_ms']:7.1f} ms   max {row['max_ms']:7.1f} ms")
        return row

    command = str(Path(sys.executable).with_name("platform"))
    subprocess.run([command, "get"], check=True, capture_output=True)  # starts the control plane if need be
    rows = [measure("platform get", [command, "get"]), measure("platform --help", [command, "--help"])]
    for module in ("quire.controlplane.app", "quire.router.app"):
        rows.append(measure(f"import {module}", [sys.executable, "-c", f"import {module}"]))
    common = provenance(NO_KERNELS)
    write(args.out, [common | row for row in rows])
