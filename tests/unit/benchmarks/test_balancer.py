"""Replicas as formulas, against what is worked out by hand; and that the rule of the router is worth something."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.balancer import (
    POLICIES,
    Asked,
    Placed,
    Replica,
    Speeds,
    Traffic,
    conversations,
    read_trace,
    simulate,
)

from quire.router.balancer import prefix_chain

ROOT = Path(__file__).resolve().parents[3]
SPEEDS = Speeds(prefill_rate=1000, step_ms=10, per_sequence_ms=1, budget=100, seats=2, kv_tokens=100_000)


def placed(at: float, prompt: int, answer: int, first: int = 0) -> Placed:
    asked = Asked(at, ((first, prompt),), (1 << 30, answer))
    return Placed(asked, prompt, prefix_chain(asked.ids(), ""), prompt)


def run(replica: Replica, requests: list[Placed]) -> dict[int, float]:
    """When each has ended."""
    ends: dict[int, float] = {}
    left = sorted(requests, key=lambda each: each.asked.at)
    while left or replica.due < math.inf:
        if left and left[0].asked.at <= replica.due:
            replica.give(left[0], left[0].asked.at)
            left.pop(0)
            continue
        now = replica.due
        ends |= {requests.index(each): now for each in replica.step(now)}
    return ends


def test_a_replica_takes_the_time_that_its_formula_says() -> None:
    alone = placed(0.0, 500, 11)
    ends = run(Replica("r", SPEEDS), [alone])
    assert alone.first_at == pytest.approx(0.5)
    assert ends[0] == pytest.approx(0.5 + 10 * 0.011)


def test_while_a_prompt_is_read_others_write_more_slowly_and_without_a_seat_it_waits() -> None:
    writing, reading, waiting = placed(0.0, 100, 1001), placed(1.0, 222, 101, 10_000), placed(1.0, 16, 2, 20_000)
    ends = run(Replica("r", SPEEDS), [writing, reading, waiting])
    assert reading.first_at == pytest.approx(1.222)
    after = 1.222 + (101 - 1) * 0.012  # two write, until the second has ended; only then is there a seat
    assert ends[1] == pytest.approx(after)
    assert waiting.first_at == pytest.approx(after + 0.016)
    assert ends[0] > after


def test_what_is_cached_is_not_read_again_and_answers_are_cached_too() -> None:
    first = placed(0.0, 320, 64)
    replica = Replica("r", SPEEDS)
    ends = run(replica, [first])
    follows = Asked(ends[0] + 1, (*first.asked.prompt, first.asked.answer, (1 << 40, 100)), (1 << 41, 2))
    later = Placed(follows, 484, prefix_chain(follows.ids(), ""), 484)
    run(replica, [later])
    assert later.cached == (320 + 63) // 16 * 16, "the last token was written and never read"
    assert later.first_at - follows.at == pytest.approx((484 - later.cached) / 1000)


def test_the_routers_rule_finds_what_round_robin_spreads() -> None:
    trace = Traffic().trace(800, 32.0, seed=3)
    assert trace == Traffic().trace(800, 32.0, seed=3) != Traffic().trace(800, 32.0, seed=4)
    found = {policy: simulate(trace, 4, policy, Speeds(), 0) for policy in ("by-prefix", "least", "round-robin")}
    assert found["by-prefix"].hit_rate > 1.2 * found["round-robin"].hit_rate > 0
    assert found["by-prefix"].hit_rate > 1.2 * found["least"].hit_rate
    median = {policy: each.ttft[len(each.ttft) // 2] for policy, each in found.items()}
    assert 2 * median["by-prefix"] < median["round-robin"]


def test_a_trace_keeps_its_lengths_and_order_and_gets_its_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    lines = [f"{at * 2.0},{100 + 90 * (at % 5)},{5 + at}" for at in range(50)]
    path.write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *lines]))
    trace = read_trace(path, 40, rate=4.0, linked=0.7, seed=0)
    assert [len(asked.ids()) for asked in trace] == [100 + 90 * (at % 5) for at in range(40)]
    assert [asked.answer[1] for asked in trace] == [5 + at for at in range(40)]
    assert trace[-1].at == pytest.approx(39 / 4)
    assert any(len(asked.prompt) > 1 for asked in trace), "none goes on with another"
    assert all(len(asked.prompt) == 1 for asked in read_trace(path, 40, rate=4.0, linked=0.0, seed=0))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="the first line must name"):
        read_trace(path, 40, rate=4.0, linked=0.7, seed=0)


def test_conversations_of_the_real_part_share_system_prompts() -> None:
    made = conversations(12, 2048, seed=0)
    assert len({talk[0].said[:320] for talk in made}) <= 4
    assert all(2 <= len(talk) <= 6 for talk in made)
    assert max(sum(len(turn.said) + len(turn.answer) for turn in talk) for talk in made) < 2048


@pytest.mark.nightly
def test_a_small_run_gives_a_row_of_each_policy(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    small = ["--replicas", "4", "--requests", "60", "--conversations", "6", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.run", "balancer", *small, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["part"], row["policy"]) for row in rows] == [
        *(("virtual", policy) for policy in POLICIES),
        *(("real", policy) for policy in ("by-prefix", "again", "least", "round-robin")),
    ]
    real = {row["policy"]: row["hit_rate"] for row in rows if row["part"] == "real"}
    assert real["by-prefix"] > real["round-robin"] > 0
    assert all(row["decision_p50_us"] > 0 for row in rows if row["part"] == "virtual")
