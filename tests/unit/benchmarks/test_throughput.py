"""The throughput benchmark on its smallest scenario: it runs, its rows are whole, its systems do equal work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_smoke_scenario_gives_whole_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.run", "throughput", "--scenario", "smoke", "--threads", "1"]
    done = subprocess.run(
        [*command, "--dtype", "float32", "--static-batches", "4", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    systems = [row["system"] for row in rows]
    assert systems[0] == "quire (A)"
    assert systems[-1] == "quire (A again)"
    assert {"transformers sequential", "transformers continuous"} <= set(systems)
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert {"commit", "machine", "torch", "transformers", "seed", "output_tokens", "aa_ratio"} <= row.keys()
    assert 0 < rows[0]["kv_waste"] < rows[0]["kv_waste_contiguous"] < 1
