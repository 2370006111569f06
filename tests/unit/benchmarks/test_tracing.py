"""The tracing benchmark on its smallest scenario: it runs, and its row is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.nightly
def test_the_smoke_scenario_gives_a_whole_row(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.run", "tracing", "--scenario", "smoke", "--rounds", "2"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["told"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["on", "metrics", "dead"]
    for told, row in rows.items():
        assert row["spans"] == (0 if told == "dead" else 5 * row["requests"] * (row["rounds"] + 1)), told
        assert row["on_ratio_min"] <= row["on_ratio"] <= row["on_ratio_max"]
        assert row["aa_ratio_min"] <= row["aa_ratio"] <= row["aa_ratio_max"]
        assert {"commit", "machine", "seed", "tokens_per_s_off"} <= row.keys()
