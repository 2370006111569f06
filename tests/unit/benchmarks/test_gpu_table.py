"""The table at the end of `benchmarks/gpu_check.sh`, and the script as far as it goes without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.__main__ import EVERY
from benchmarks.gpu.table import lines, right

ROOT = Path(__file__).parents[3]
ABOUT = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc", "at": "2026-11-26"}


def exactness(dtype: str, equal: int) -> dict[str, Any]:
    return {"part": "exactness", "dtype": dtype, "answers": 24, "equal": equal, "tokens_in_place": equal / 24}


def decode(batch: int, **figures: Any) -> dict[str, Any]:
    return {
        "part": "decode",
        "model": "llama-3.1-8b",
        "batch": batch,
        "tokens_per_second": 1.0,
        **figures,
        **ABOUT,
    }


def test_figures_stand_beside_their_aims() -> None:
    rows = [
        decode(1, tokens_per_second=230.4, roofline_share=0.9),
        decode(32, roofline_share=0.83, host_us=500),
        decode(256, roofline_share=0.7, host_us=100),
        exactness("bfloat16", 15) | ABOUT,
    ]
    machine, head, *table = lines(rows)
    assert machine == "NVIDIA H200, 2.11.0, 3.6.0, abc, 2026-11-26"
    assert head.split() == ["here", "good", "aim"]
    assert [cells(line)[1:5] for line in table[:3]] == [
        ["230", "225", "245", "good"],
        ["83%", "75%", "82%", "reached"],
        ["70%", "75%", "82%", "below"],
    ]
    assert cells(table[0])[5:] == ["90% of the roofline"]
    assert cells(table[3]) == ["", "no profile: --parts profile-0.6b or profile-8b"]
    assert cells(table[4])[1:5] == ["100", "250", "150", "reached"]
    assert "15/24" in table[5]
    assert lines([]) == ["no figures"]


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line)


def profile(**groups: tuple[float, float | None]) -> dict[str, Any]:
    """Microseconds and own share of the roofline of each group, of a decode step of 256."""
    whole = sum(taken for taken, _ in groups.values())
    told = {
        name: {"us": taken, "share": taken / whole} | ({} if own is None else {"roofline_share": own})
        for name, (taken, own) in groups.items()
    }
    row = {"part": "profile", "workload": "decode", "model": "llama-3.1-8b", "batch": 256, "ms": whole / 1000}
    return row | {"groups": told} | ABOUT


def test_a_miss_has_its_profile_and_what_to_try_next() -> None:
    seen = profile(products=(9000, 0.95), attention=(5000, 0.6), between=(900, None), draw=(100, None))
    table = lines([decode(256, roofline_share=0.7), profile(products=(1, None)) | {"batch": 1}, seen])
    assert [cells(line)[-1] for line in table[3:5]] == [
        "its step: products 60% (95%), attention 33% (60%), between 6%",
        "next: attention: python -m benchmarks.gpu --parts attention --sweep",
    ]
    assert cells(table[-1])[:2] == ["llama-3.1-8b, 256 at 1k, a step", "15.0 ms"]
    assert not any("next:" in line for line in lines([decode(256, roofline_share=0.8), seen]))


def against(kind: str, peer: str, ratio: float, **more: Any) -> dict[str, Any]:
    row = {"part": "against", "model": "qwen3-0.6b", "kind": kind, "peer": peer, "tokens_per_second": 500.0}
    row |= {"quire_ratio": ratio, "quire_ratio_min": ratio - 0.5, "quire_ratio_max": ratio + 0.5}
    return row | {"aa_ratio": 1.01, "repeats": 3, "finished": True, "attention": "sdpa"} | more | ABOUT


def test_the_strongest_peer_counts_and_one_that_failed_is_told_of() -> None:
    error = {"part": "against", "model": "qwen3-0.6b", "kind": "continuous", "peer": "graphs"}
    rows = [
        against("static", "batches of 64", 13.0),
        against("static", "batches of 256", 9.2),
        error | {"error": "RuntimeError: no graph"} | ABOUT,
    ]
    _, _, ratio, *peers = lines(rows)
    assert cells(ratio)[1:] == ["9.2x", "8.0x", "12.0x", "good", "8.7x to 9.7x, batches of 256"]
    assert [cells(line)[-3:] for line in peers[:2]] == [
        ["500", f"{times}x", "3 rounds, A/A 1.010, sdpa"] for times in (13.0, 9.2)
    ]
    assert cells(peers[2]) == ["qwen3-0.6b, continuous: graphs", "failed", "RuntimeError: no graph"]


@pytest.mark.parametrize(
    ("off", "verdict"), [(1.9, "reached"), (-1.9, "reached"), (2.1, "below"), (-2.1, "below")]
)
def test_memory_may_be_off_by_two_per_cent_either_way(off: float, verdict: str) -> None:
    row = {"part": "memory", "model": "llama-3.1-8b", "off_percent": off, "planned_overhead_mib": 1280}
    row |= {"planned_activations_mib": 2, "peak_activations_mib": 1, "weights_mib": 3, "kv_mib": 4}
    shown = lines([row | {"device_used_mib": 20} | ABOUT])
    assert cells(shown[2])[1:5] == [f"{off:+.1f}%", "2%", "2%", verdict]
    assert "1280 MiB" in shown[2]
    assert "nobody says" in "\n".join(lines([row | ABOUT]))


def test_host_time_counts_where_it_is_hidden() -> None:
    hidden, bare = (decode(256, host_us=100, host_waits_us=waits) for waits in (900, 0))
    assert ["NOT HIDDEN" in lines([row])[2] for row in (hidden, bare)] == [False, True]


def test_of_attention_only_the_cache_as_it_is_counts() -> None:
    row = {"part": "attention", "batch": 256, "group": 4, "dim": 128, "bandwidth_share": 0.9}
    assert (
        cells(lines([row | {"kept": "bfloat16"}, row | {"kept": "int8", "bandwidth_share": 0.4} | ABOUT])[2])[1]
        == "90%"
    )


def test_a_rehearsal_says_that_it_is_one() -> None:
    row = decode(2, tokens_per_second=3.0, roofline_share=0.1, rehearsal=True, stands_for={"batch": 256})
    first, *rest = lines([row])
    assert first == "REHEARSAL: no figures"
    assert "8B, 256 at 1k" in rest[2]
    assert "REHEARSAL" not in "".join(lines([decode(256, roofline_share=0.1)]))


def test_tilings_are_told_of() -> None:
    found = {"families": 40, "measured": 38, "changed": 5, "left": 2, "seconds": 21.4}
    pair = [
        decode(32, tokens_per_second=1234.0, ms=5.1) | {"part": "tuned decode", "tilings": way}
        for way in ("chosen", "default")
    ]
    shown = lines([{"part": "tuning", "model": "llama-3.1-8b", **found} | ABOUT, *pair])
    assert shown[2].endswith("38/40 timed in 21 s, 2 left")
    assert shown[2].split()[-8] == "5"
    assert ["chosen" in line for line in shown[3:]] == [True, False]
    assert all("1,234" in line and "5.1 ms" in line for line in shown[3:])


def test_the_last_row_of_a_figure_counts() -> None:
    assert "250" in "\n".join(lines([decode(1, tokens_per_second=10.0), decode(1, tokens_per_second=250.0)]))


def test_other_tokens_in_float32_are_wrong_and_near_ties_in_bfloat16_are_not() -> None:
    assert right([exactness("float32", 24), exactness("bfloat16", 15)])
    assert not right([exactness("float32", 23)])
    assert right([])


def test_recorded_rows_make_a_table() -> None:
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/gpu.jsonl").read_text().splitlines()]
    shown = "\n".join(lines(rows))
    assert "8B, 1000 requests" in shown
    assert "MiB besides on the device" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.nightly
def test_the_check_without_a_gpu_says_so_and_with_a_wrong_option_how(tmp_path: Path) -> None:
    script, env = ROOT / "benchmarks/gpu_check.sh", {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run([script], capture_output=True, text=True, env=env | {"OUT": str(tmp_path / "rows")})
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "error: torch sees no GPU")
    assert "hint: " in done.stderr
    assert not (tmp_path / "rows").exists()
    done = subprocess.run([script, "--fast"], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "hint: --quick" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.nightly
@pytest.mark.parametrize("part", ["exactness", *EVERY, "profile-0.6b", "profile-8b", "30b-a3b"])
def test_every_part_can_be_rehearsed_without_a_gpu(part: str, tmp_path: Path) -> None:
    """The time of a card is too dear for what a processor can find out."""
    out = tmp_path / "rows"
    arguments = ["-m", "benchmarks.gpu", "--rehearse", "--parts", part, "--out", str(out)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows
    assert all(row["rehearsal"] for row in rows)
    assert not [row["error"] for row in rows if "error" in row]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.nightly
def test_the_whole_check_can_be_rehearsed_without_a_gpu(tmp_path: Path) -> None:
    script, out = ROOT / "benchmarks/gpu_check.sh", tmp_path / "rows"
    env = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OUT": str(out), "HOME": str(tmp_path)}
    done = subprocess.run([script, "--rehearse", "attention"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "REHEARSAL: no figures" in done.stdout
    verdicts = done.stdout.splitlines()[-20:]
    assert any(line.startswith("attention: right") for line in verdicts)
    assert any(line.startswith("compute-sanitizer: NOT RUN") for line in verdicts)
