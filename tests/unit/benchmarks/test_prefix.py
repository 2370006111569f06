"""The prefix benchmark: the work that the cache saves, counted without a model; and its smallest run, whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.prefix import Shared, parallel_pass, shared_pass
from benchmarks.workload import Job
from tests.engine_specs import tiny_spec

from quire import builtin
from quire_engine.engine import Engine
from quire_engine.step import StepPlan, StepResult
from quire_schemas.checkpoint import read_profile

ROOT = Path(__file__).resolve().parents[3]


class SameToken:
    """Draws token 7 for everybody."""

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult({item.request_id: 7 for item in plan.items if item.draw is not None})

    def warm_up(self, seconds: float) -> None:
        pass

    def set_seats(self, seats: int) -> None:
        pass


def engine(*, prefix_caching: bool) -> Engine:
    spec = tiny_spec(
        prefix_caching=prefix_caching,
        max_model_len=1024,
        num_blocks=2048,
        max_num_seqs=32,
        max_num_batched_tokens=512,
    )
    return Engine(spec, read_profile(builtin.path()), SameToken())


def test_a_hundred_requests_with_one_system_prompt_compute_it_once() -> None:
    jobs = Shared().jobs(2048)
    off, on = (shared_pass(engine(prefix_caching=caching), jobs, 8) for caching in (False, True))
    assert off.computed == off.prompt_tokens == on.prompt_tokens == sum(len(job.prompt) for job in jobs)
    assert off.computed / on.computed > 5
    own = sum(len(job.prompt) - 600 // 16 * 16 for job in jobs)
    assert on.computed == own + 600 // 16 * 16, "the shared blocks once, what is behind them for each"


def test_the_choices_of_a_request_store_its_prompt_once() -> None:
    """Six sequences of 160 tokens, which fill 10 blocks, and 16 of their own."""
    jobs = [Job(tuple(range(100, 260)), 17)]
    alone, together = (
        parallel_pass(engine(prefix_caching=False), jobs, 6, share=share) for share in (False, True)
    )
    assert (alone.most, together.most) == (6 * 11, 6 * 2 + 9)


@pytest.mark.nightly
def test_a_small_run_gives_whole_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    small = ["--requests", "4", "--rounds", "1", "--steps", "8", "--parallel-requests", "2", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "prefix", *small, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["shared", "parallel", "parallel", "no hits"]
    assert rows[0]["prefill_tokens_on"] < rows[0]["prefill_tokens_off"] == rows[0]["prompt_tokens"]
    assert {"aa_ttft_p50_on", "aa_ttft_p50_off", "ttft_p90_ratio", "commit", "machine"} <= rows[0].keys()
    assert 0 <= rows[1]["saved_mean_percent"] < rows[2]["saved_mean_percent"] < 100, "longer prompts save more"
    assert {"on_ratio", "aa_ratio"} <= rows[3].keys()
