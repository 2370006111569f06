"""The benchmark of the router: its stand-in against itself, and the smallest run, whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from benchmarks.router import BARS, CASES, figures, inside, is_missed, standin_running
from benchmarks.standin import Case, Measured, Record, Spread

ROOT = Path(__file__).resolve().parents[3]


def test_a_write_has_come_when_all_of_it_is_read() -> None:
    """Two writes of the engine that one read brings, and one that two reads bring."""
    record = Record(6, sent_at=0.0, written=[(1, 1.0), (2, 1.1), (6, 2.0)], read=[(2, 1.5), (5, 2.1), (6, 2.3)])
    assert [seconds for _, seconds in record.outward()] == pytest.approx([0.5, 0.4, 0.3])


def test_percentiles_are_of_what_was_measured() -> None:
    assert Spread.of([each / 1000 for each in range(100, 0, -1)]) == Spread(50.0, 90.0, 99.0)
    assert Spread.of([0.002]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([]) is None


def test_processor_time_is_told_for_what_it_was_spent_on() -> None:
    spread = Spread(1.0, 2.0, 3.0)
    row = figures(Measured(10.0, 500, 20_000, spread, spread, spread, 1.5, 0.1, 0.5, 3, 0.01))
    assert (row["requests_per_s"], row["chunks_per_s"], row["cpu_ms_per_request"]) == (50.0, 2000.0, 3.0)
    assert row["teller_cpu_s_per_1000_requests"] == 0.2
    assert (row["cpu_s_per_1000_chunks"], row["cpu_share"], row["standin_cpu_share"]) == (0.075, 0.15, 0.05)
    assert (row["added_p50_ms"], row["added_p99_ms"], row["unasked"]) == (1.0, 3.0, 3)
    assert [is_missed("requests_per_s", value, 2000) for value in (1999, 2000)] == [True, False]
    assert [is_missed("added_p50_ms", value, 1.0) for value in (1.1, 1.0)] == [True, False]


def test_what_a_router_counts_itself_is_what_came_between_two_looks() -> None:
    def look(request: tuple[int, int, int], answer: tuple[int, int, int]) -> dict[str, float]:
        return {
            f'quire_router_added_seconds_bucket{{model="{model}",part="{part}",le="{edge}"}}': float(count)
            for part, counts in (("request", request), ("answer", answer))
            for model in "ab"
            for edge, count in zip(("0.001", "0.002", "+Inf"), counts, strict=True)
        }

    row = inside(look((10, 10, 10), (0, 0, 0)), look((60, 110, 110), (100, 100, 100)))
    assert (row["inside_request_p50_ms"], row["inside_answer_p50_ms"], row["inside_p50_ms"]) == (1.0, 0.5, 1.5)
    assert row["inside_request_p99_ms"] == pytest.approx(1.98)
    assert inside({}, {}) == {}
    assert inside(look((0, 0, 0), (0, 0, 0)), look((0, 0, 9), (0, 9, 9)))["inside_p50_ms"] == pytest.approx(3.5)


@pytest.mark.parametrize("stream", [False, True])
def test_the_stand_in_measures_itself(tmp_path: Path, stream: bool) -> None:
    with standin_running(tmp_path, 1) as standin:
        case = Case("direct", standin.http_port, "tiny", [], 0.3, stream=stream, clients=3, shortest=4, longest=9,
                    pace=0.002, warm=0.05)  # fmt: skip
        measured = standin.measure(case)
        assert measured.requests > 3
        assert measured.chunks >= 4 * (measured.requests - 3) * stream
        assert measured.added is not None
        assert 0 < measured.added.p50 < 1000
        assert (measured.cpu_s, measured.unasked) == (0, 0)
        again = standin.measure(msgspec.structs.replace(case, rate=50.0, clients=16))
        assert 2 <= again.requests < 40


def test_an_answer_that_is_no_answer_ends_the_measurement(tmp_path: Path) -> None:
    with standin_running(tmp_path, 1) as standin, socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
        closed.close()
        with pytest.raises(RuntimeError, match="has ended"):
            standin.measure(Case("nobody", port, "tiny", [], 0.1))


@pytest.mark.nightly
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for the router, and one for the rest")
def test_a_small_run_gives_a_row_of_each_case_and_system(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    small = [
        "--seconds",
        "0.2",
        "--warm",
        "0.1",
        "--rounds",
        "1",
        "--rate",
        "200",
        "--clients",
        "4",
        "--engines",
        "2",
    ]
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "router",
        *small,
        "--litellm",
        str(tmp_path),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "litellm is left out" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["part"], row["system"]) for row in rows] == [
        (case, system) for case in CASES for system in ("here", "again", "direct")
    ]
    for row in rows:
        assert {"commit", "machine", "python", "standin_cpu_share", "unasked"} <= row.keys()
        assert row["outward_p50_ms"] > 0, row
        assert (row["chunks_per_s"] > 0) == ("stream" in row["part"])
        if row["system"] == "here":
            assert row["cpu_share"] > 0
            assert set(row["missed"]) <= BARS[row["part"]].keys()
