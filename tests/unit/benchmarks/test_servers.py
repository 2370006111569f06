"""The benchmark of HTTP servers: the smallest run, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.nightly
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the server and what measures it need a core each")
def test_every_server_answers_and_is_compared_with_ours(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.run", "servers", "--seconds", "0.3", "--rounds", "1", "--clients",
               "4", "--out", str(out)]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    systems = {"quire", "again", "uvicorn-h11", "uvicorn-httptools", "granian"}
    for part in ("whole", "stream"):
        told = {row["system"]: row for row in rows if row["part"] == part}
        assert systems <= set(told)
        assert all(row["cpu_us_per_request"] > 0 and row["requests_per_s"] > 0 for row in told.values())
        assert told["quire"]["cpu_to_quire"] == 1.0
