"""The throughput benchmark on its smallest scenario: it runs, its rows are whole, its systems do equal work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.transformers_systems import Transformers
from benchmarks.workload import SCENARIOS

from quire import builtin

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.nightly
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
    assert systems == [
        "quire (A)",
        "transformers static, batch 4, in order",
        "transformers sequential",
        "quire (A again)",
        "transformers continuous",
    ]
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert {"commit", "machine", "torch", "transformers", "seed", "output_tokens", "aa_ratio"} <= row.keys()
    assert 0 < rows[0]["kv_waste"] < rows[0]["kv_waste_contiguous"] < 1


@pytest.mark.nightly
def test_a_peer_that_runs_out_of_time_counts_only_what_it_finished() -> None:
    jobs = SCENARIOS["smoke"].jobs(2048)
    seconds, done = Transformers(builtin.path(), torch.float32).continuous(jobs, limit=0.0)
    assert done < sum(job.output_tokens for job in jobs)
    assert seconds >= 0.0
