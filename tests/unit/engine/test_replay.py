"""The same trace gives the same plans: what the scheduler decides depends on nothing but what it was told."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
from quire_engine.errors import RequestRefused
from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_engine.step import StepPlan, StepResult
from quire_engine.trace import RecordingScheduler, replay
from quire_schemas.wire import Generate, Repetition, Sampling


def run(scheduler: Scheduler, seed: int) -> list[StepPlan]:
    """Sixty requests that come and go over a pool that is too small for them, planned a step ahead."""
    trace = random.Random(seed)
    plans: list[StepPlan] = []
    flying: StepPlan | None = None
    added = now = refused = 0
    while added < 60 or scheduler.has_work:
        if added < 60 and trace.random() < 0.5:
            prompt = [trace.randrange(2) for _ in range(trace.randrange(1, 120))]
            sampling = Sampling(
                max_tokens=trace.randrange(1, 60),
                temperature=0.0,
                frequency_penalty=added % 2,
                prompt_logprobs=0 if added % 4 == 1 else None,  # such a prompt is not read from the cache
                repetition=Repetition(1, 3, 2) if added % 5 == 1 else None,
            )
            timeout = trace.choice([None, None, 40.0])
            message = Generate(
                str(added),
                prompt,
                sampling,
                priority=added % 3,
                timeout=timeout,
                background=added % 7 == 3,
                lent=added % 2 == 0,
            )
            request = Request.of(message, eos_token_ids=(9,), seed=0, received_at=now)
            if trace.random() < 0.7:
                request.share_with("all")
            try:
                scheduler.add(request)
            except RequestRefused:
                refused += 1
            added += 1
        if trace.random() < 0.02 and added:
            scheduler.abort(str(trace.randrange(added)))
        if trace.random() < 0.02:
            scheduler.set_limits(BatchLimits(12, trace.randrange(8, 60), True, "priority", 5))
        now += 1
        scheduler.expire(now)
        plan = scheduler.schedule()
        plans.append(plan)
        if flying is not None:
            drawn = {i.request_id: (i.end * 7 + int(i.request_id)) % 10 for i in flying.items if i.draw}
            scheduler.commit(flying, StepResult(drawn))
        flying = plan if plan.items else None
    assert refused < 50, "most are let in"
    if isinstance(scheduler, RecordingScheduler):
        scheduler.close()
    return plans


def make(path: Path | None = None) -> Scheduler:
    limits = BatchLimits(max_num_seqs=12, max_num_batched_tokens=48, chunked_prefill=True, max_waiting=5)
    pool = BlockPool(60, 16, (None, 40))
    if path is not None:
        return RecordingScheduler(pool, limits, max_model_len=256, path=path)
    return Scheduler(pool, limits, max_model_len=256)


def test_the_clock_decides_nothing() -> None:
    first, again = run(make(), 3), run(make(), 3)
    assert first == again
    assert repr(first) == repr(again), "a plan prints all that it is"
    assert any(plan.preempted for plan in first), "the trace must put the scheduler under pressure"
    assert run(make(), 4) != first


@pytest.mark.parametrize("seed", range(4))
def test_a_recorded_trace_gives_the_same_plans_again(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    scheduler = make(path)
    plans = run(scheduler, seed)
    assert path.stat().st_mode & 0o777 == 0o600
    pairs = list(replay(path.read_bytes().splitlines(keepends=True)))
    assert len(pairs) == len(plans)
    assert all(recorded == decided for recorded, decided in pairs)
    assert [recorded.preempted for recorded, _ in pairs] == [list(plan.preempted) for plan in plans]


def test_the_command_says_whether_and_where_a_plan_comes_out_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    plans = run(make(path), 1)

    def replayed() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "quire_engine.trace", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = replayed()
    assert (done.returncode, done.stdout) == (0, f"{len(plans)} plans, each as recorded\n")
    whole = path.read_bytes()
    kept = [*whole.splitlines(keepends=True)]
    path.write_bytes(b"".join(kept[:-1]) + kept[-1][:-9])
    done = replayed()
    assert done.returncode == 0, "a kill cuts the last line; what is whole is replayed"
    assert re.fullmatch(rf"\d+ plans, each as recorded; line {len(kept)} is cut, and not replayed\n", done.stdout)
    path.write_bytes(b"".join([*kept[:-2], kept[-2][:-9], b"\n", kept[-1]]))
    assert replayed().returncode == 2, "a line cut in the middle of a file is no end"
    path.write_bytes(whole)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["num_blocks"] = 40
    path.write_text("\n".join(map(json.dumps, lines)))
    done = replayed()
    assert done.returncode == 1
    assert "differs" in done.stdout
    for text, problem in (("no trace", "line 1: "), ("", "the file is empty"), (whole[:20].decode(), "line 1: ")):
        path.write_text(text)
        done = replayed()
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {path}: {problem}")
        assert "hint:" in done.stderr


def test_who_begins_to_record_keeps_the_trace_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    first, _ = make(path), make(path)
    first.schedule()
    assert len(path.read_bytes().splitlines()) == 1, "what the first one writes is not in the second one's file"
    assert len((tmp_path / "trace.jsonl.1").read_bytes().splitlines()) == 2
