"""The table at the end of `benchmarks/gpu_check.sh`, and the script as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu_table import lines, right

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
    assert [line.split()[-4:] for line in table[:4]] == [
        ["230", "225", "245", "good"],
        ["83%", "75%", "82%", "reached"],
        ["70%", "75%", "82%", "below"],
        ["100", "250", "150", "reached"],
    ]
    assert "15/24" in table[4]
    assert lines([]) == ["no figures"]


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
