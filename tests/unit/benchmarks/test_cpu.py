"""The CPU benchmark: its arithmetic, what it leaves out, how it goes on after a break; and that its parts run."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from benchmarks.client import Answered, Stream, keep_busy
from benchmarks.cpu import ceilings, child, ledger
from benchmarks.cpu.ceilings import Ceilings
from benchmarks.cpu.ledger import QUIET, Ledger
from benchmarks.cpu.llama import best_of, candidates
from benchmarks.cpu.report import Ratios, report
from benchmarks.cpu.servers import summary
from benchmarks.models import SHAPES, parameters
from benchmarks.rounds import Against, in_turns, interval
from benchmarks.rows import Row
from benchmarks.workload import Job

from quire import builtin

ROOT = Path(__file__).resolve().parents[3]
ZEN = Ceilings(threads=2, read_one=39e9, read=70e9, fma=0.46e12, dpbf16=0.87e12, dpbusd=1.87e12)
QWEN = parameters(SHAPES["qwen2.5-0.5b"])


# ── rooflines ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_shapes_have_as_many_weights_as_their_names_say() -> None:
    assert (QWEN.layers, QWEN.head) == (357_826_560, 136_134_656)
    assert parameters(SHAPES["llama-3.2-1b"]).all == 1_235_746_816


@pytest.mark.parametrize(
    ("format", "clients", "tokens"),
    [("bf16", 1, 63), ("bf16", 8, 280), ("bf16", 32, 446), ("int8", 1, 126), ("int8", 8, 581), ("int8", 32, 943)],
)
def test_the_roofline_of_the_work_is_the_one_worked_out_by_hand(format: str, clients: int, tokens: int) -> None:
    found = ZEN.tokens_per_second(format, QWEN, clients, prompt=160, output=200)  # type: ignore[arg-type]
    assert found == pytest.approx(tokens, rel=0.01)


def test_the_roofline_of_served_work_counts_the_steps_that_are_not_full() -> None:
    even = [(160, 200)] * 16
    full = 16 * 200 / ZEN.tokens_per_second("int8", QWEN, 8, prompt=160, output=200)
    assert ZEN.served_seconds("int8", QWEN, even, 8) == pytest.approx(full)
    a_step = QWEN.all / ZEN.read
    longer = ZEN.served_seconds("int8", QWEN, [*even, (0, 100)], 8)  # whoever is free first has it alone
    of_its_own = 100 * (a_step + 2.0 * QWEN.all / ZEN.dpbusd)
    assert longer == pytest.approx(full + of_its_own)
    beside = ZEN.served_seconds("int8", QWEN, [(160, 300), *even[1:]], 8)
    assert beside == pytest.approx(longer), "in whatever request they are"


def test_the_roofline_of_decode_alone() -> None:
    assert [round(n / ZEN.step_seconds("bf16", QWEN, n)) for n in (1, 16, 32)] == [
        pytest.approx(tokens, rel=0.03) for tokens in (66, 495, 633)
    ]


def test_without_the_instruction_for_a_format_the_next_best_is_the_peak() -> None:
    plain = Ceilings(threads=1, read_one=1.0, read=1.0, fma=2.0, dpbf16=0.0, dpbusd=0.0)
    assert [plain.peak(format) for format in ("fp32", "bf16", "int8", "int4")] == [2.0] * 4
    assert [ZEN.peak(format) for format in ("fp32", "bf16", "int4")] == [ZEN.fma, ZEN.dpbf16, ZEN.dpbusd]


@pytest.mark.nightly
def test_the_plain_loops_give_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "BUFFER_BYTES", ceilings._SLICE)
    found = ceilings.measure(1, seconds=0.02)
    assert 1e8 < found.read < 1e12
    assert 1e8 < found.fma < 1e13
    assert found.dpbusd == 0 or 1e8 < found.dpbusd < 1e14


# ── rounds and pairs ──────────────────────────────────────────────────────────────────────────────────────


def test_each_round_takes_all_and_another_one_first() -> None:
    order: list[str] = []

    def measure(name: str) -> int:
        order.append(name)
        return len(order)

    found = in_turns({name: partial(measure, name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_an_a_a_pair_stands_beside_the_ratio() -> None:
    compared = Against.of(other=[6.0, 2.0], one=[1.0, 1.0], again=[4.0, 1.0])
    assert compared.row("on") == {
        "on_ratio": 2.5, "on_ratio_min": 2.0, "on_ratio_max": 3.0,
        "aa_ratio": 2.5, "aa_ratio_min": 1.0, "aa_ratio_max": 4.0,
    }  # fmt: skip


def test_an_interval_holds_the_mean_and_is_that_of_what_was_measured() -> None:
    assert interval([1.5]) == (1.5, 1.5, 1.5)
    mean, low, high = interval([1.0, 4.0, 2.0, 2.0])
    assert mean == pytest.approx(2.0)
    assert 1.0 <= low < 2.0 < high <= 4.0
    assert interval([1.0, 4.0, 2.0, 2.0]) == (mean, low, high)
    narrow = interval([1.9, 2.1, 2.0, 2.0])
    assert narrow[2] - narrow[1] < (high - low) / 4


def row(block: int, half: int, figure: float, foreign: float = 0.0) -> Row:
    return {"block": block, "half": half, "figure": figure, "foreign": foreign}


def test_pairs_are_of_the_same_half_and_loaded_ones_count_only_if_there_are_no_others() -> None:
    ours = [row(0, 0, 6.0), row(0, 1, 8.0, foreign=QUIET * 2), row(1, 0, 9.0)]
    theirs = [row(0, 1, 2.0), row(0, 0, 3.0), row(1, 1, 1.0)]
    found = Ratios(ours, theirs, "figure")
    assert (found.values, found.loaded) == ([2.0], False)
    found = Ratios(ours[1:], theirs, "figure")
    assert (found.values, found.loaded) == ([4.0], True)
    assert str(found) == "~4.00"
    assert math.isnan(Ratios(ours, [], "figure").mean)


# ── the ledger ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_broke_off_goes_on_behind_its_last_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = Ledger(path, {"benchmark": "cpu"}, resume=False)
    first.measured(lambda: {"figure": 1}, part="gemm", rows=1)
    with pytest.raises(ZeroDivisionError):
        first.measured(lambda: {"figure": 1 // 0}, part="gemm", rows=8)
    again = Ledger(path, {"benchmark": "cpu"}, resume=True)
    kept = again.measured(lambda: {"figure": 1 // 0}, part="gemm", rows=1)
    new = again.measured(lambda: {"figure": 2}, part="gemm", rows=8)
    assert (kept["figure"], new["figure"], again.run) == (1, 2, first.run)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [each["rows"] for each in rows] == [1, 8]
    assert {"run", "date", "benchmark", "wall_s", "foreign", "steal_s", "spin"} <= rows[0].keys()


def test_what_others_use_is_told_and_what_children_use_is_ours(tmp_path: Path) -> None:
    burn = [
        sys.executable,
        "-c",
        "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: 1",
    ]
    before = ledger._own()
    subprocess.run(burn, check=True)
    assert ledger._own() - before > 0.25, "0.3, counted in ticks"
    other = subprocess.Popen([*burn[:2], burn[2].replace("0.3", "600")])

    def until_it_has_had(seconds: float) -> Row:
        until = ledger.tree_seconds(other.pid) + seconds
        while ledger.tree_seconds(other.pid) < until:
            time.sleep(0.01)
        return {}

    try:
        row = Ledger(tmp_path / "rows.jsonl", {}, resume=False).measured(
            lambda: until_it_has_had(0.3), part="beside"
        )
    finally:
        other.kill()
        other.wait()
    assert row["foreign"] * row["wall_s"] * (os.cpu_count() or 1) > 0.1


# ── peers and clients ─────────────────────────────────────────────────────────────────────────────────────


def test_of_a_batched_bench_the_best_speeds_count() -> None:
    lines = [{"pp": 128, "tg": 32, "pl": 1, "speed_pp": pp, "speed_tg": tg} for pp, tg in ((9.0, 3.0), (8.0, 4.0))]
    assert best_of(lines) == {"prefill_tokens_per_s": 9.0, "decode_tokens_per_s": 4.0}


def test_the_flags_that_are_tried_differ_and_have_places_for_the_clients() -> None:
    for clients in (1, 8, 32):
        tried = candidates(clients)
        assert len({json.dumps(flags) for flags in tried}) == len(tried) > 1
        assert all(int(flags["-np"]) in (clients, 16) for flags in tried)


def test_the_summary_of_a_pass() -> None:
    streams = [Stream(0.1, [0.01] * 99 + [0.5]), Stream(0.3, [0.01] * 100)]
    found = summary(Answered(2.0, 0.25, streams), tokens=202)
    assert (found["tokens_per_s"], found["ttft_p50_ms"], found["itl_p50_ms"]) == (101.0, 200.0, 10.0)
    assert (found["itl_p99_ms"], found["client_cpu_s"]) == (10.0, 0.25)


@pytest.mark.parametrize("tokens", [2, 3])
async def test_a_client_reads_streams_however_they_are_cut_and_counts(tokens: int) -> None:
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})
    events = ['data: {"choices": [{"text": "a"}]}', 'data: {"choices": [{"text": ""}]}',
              'data: {"choices": [{"text": "b"}]}', f"data: {usage}", "data: [DONE]"]  # fmt: skip
    body = "".join(f"{event}\n\n" for event in events).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(body), 7):
            part = body[at : at + 7]
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        answers = keep_busy(port, "m", [Job((1, 2), 2)] * 3, clients=2)
        if tokens == 2:
            streams = await answers
            assert [len(stream.gaps) for stream in streams] == [1, 1, 1]
        else:
            with pytest.raises(RuntimeError, match="3 tokens came where 2 were asked for"):
                await answers
    finally:
        server.close()


# ── the parts ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.nightly
def test_our_engine_alone_and_its_host_time() -> None:
    folder = str(builtin.path())
    found = child.engine(folder, "bf16", threads=1, sequences=2, prompt=16, output=3, repeats=1)
    assert min(found["prefill_tokens_per_s"], found["decode_tokens_per_s"]) > 0
    found = child.host(folder, "bf16", threads=1, steps=3)
    assert 0 < found["outside_ms"] < found["step_ms"]
    assert found["native_calls"] > 0 or found["backend"] == "reference"


@pytest.mark.nightly
def test_a_small_run_without_peers_gives_whole_rows_and_tables(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    small = [
        "--quick",
        "--no-peers",
        "--models",
        "tiny",
        "--formats",
        "bf16",
        "--sequences",
        "2",
        "--clients",
        "2",
    ]
    parts = ["--parts", "gemm", "attention", "host", "engine", "servers"]
    command = [sys.executable, "-m", "benchmarks.run", "cpu", *small, *parts, "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {each["part"] for each in rows} == {"ceilings", "gemm", "attention", "host", "engine", "servers"}
    assert all({"backend", "commit", "machine", "run", "foreign"} <= each.keys() for each in rows)
    for title in ("products", "attention", "a step of one sequence", "engine alone, decode", "servers"):
        assert title in report(rows)
    subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, check=True)
    assert len(out.read_text().splitlines()) == len(rows), "nothing is measured twice"


def test_the_tables_of_a_run() -> None:
    """Two pairs of each, ours twice and four times as fast; what is missed is marked."""
    common: Row = {"machine": "a machine", "level": "avx512", "backend": "cpu", "run": "1", "quick": False,
                   "foreign": 0.0, "model": "qwen2.5-0.5b", "format": "bf16"}  # fmt: skip
    rows: list[Row] = [common | {"part": "ceilings", **asdict(ZEN)}]
    for half, times in ((0, 2.0), (1, 4.0)):
        for system, factor in (("quire bf16", times), ("llama.cpp BF16", 1.0)):
            place: Row = common | {"block": 0, "half": half, "system": system}
            speeds: Row = {"decode_tokens_per_s": 20.0 * factor, "prefill_tokens_per_s": 500.0 * factor}
            rows.append(place | {"part": "engine", "kind": "decode", "sequences": 1, **speeds})
            rows.append(place | {"part": "engine", "kind": "prefill", "prompt": 512, **speeds})
            rows.append(
                place | {"part": "servers", "clients": 32, "requests": 64, "seconds": 10.0, "client_cpu_s": 1.0,
                         "tokens_per_s": 50.0 * factor, "cpu_s_per_1000": 9.0 / factor,
                         "ttft_p50_ms": 9.0 / factor, "itl_p99_ms": 100.0}
            )  # fmt: skip
    layer: Row = {"part": "experts", "tokens": 16, "quire_ms": 2.0, "dense_ms": 2.5, "dense_ratio": 0.8}
    rows.append(common | layer | {"dense_low": 0.7, "dense_high": 0.9, "torch_ms": 40.0, "torch_ratio": 0.05})
    rows.append(common | layer | {"dense_low": 0.7, "dense_high": 0.9, "format": "int8"})
    theirs = common | {"part": "transformers", "requests": 64, "block": 0, "half": 0}
    rows += [
        theirs | {"system": "quire bf16 at 32", "tokens_per_s": 150.0},
        theirs | {"system": "transformers static", "batch": 16, "tokens_per_s": 20.0},
        theirs | {"system": "transformers static", "batch": 32, "tokens_per_s": 25.0},
    ]
    lines = {tuple(line.split()) for line in report(rows).splitlines()}
    model = "qwen2.5-0.5b"
    assert (model, "bf16", "1", "60.0", "20.0", "2.83", "[2.00,", "4.00]", "1.25", "91%", "85%") in lines
    assert (model, "bf16", "1500.0", "500.0", "2.83", "[2.00,", "4.00]", "1.30", "128%") in lines
    assert ("bf16", "16", "2.00", "2.50", "0.80", "[0.70,", "0.90]", "40.00", "0.05") in lines
    assert ("int8", "16", "2.00", "2.50", "0.80", "[0.70,", "0.90]", "-", "-") in lines
    served = next(line for line in lines if line[:3] == (model, "bf16", "32") and "5.0%" in line)
    assert served[3:10] == ("150.0", "50.0", "2.83", "[2.00,", "4.00]", "3.00!", "36%")
    assert served[-5:] == ("1.00", "[1.00,", "1.00]", "0.70!", "5.0%")
    assert (model, "bf16", "32", "150.0", "static,", "batch", "32", "25.0", "6.00", "5.50") in lines
