"""What 8 and 4 bits cost the built-in model, through real engines: the bars, and that the figures can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.quality import BARS, HELD_OUT, Reading, measure

from quire import builtin

LOG = Path(__file__).resolve().parents[3] / "training/tiny/log.jsonl"


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    text = HELD_OUT.read_text(encoding="utf-8")
    found = measure(builtin.path(), text, threads=1, names=("none", "none, reference", *BARS))
    return {row["quantization"]: row for row in found}


def test_the_plain_model_reads_as_it_did_after_its_training(rows: dict[str, dict[str, Any]]) -> None:
    """By plain transformers in float32, as `evaluate.py` recorded it."""
    recorded = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    (trained,) = (row["heldout_bpb"] for row in recorded if "heldout_bpb" in row)
    assert rows["none"]["bits_per_byte"] == pytest.approx(trained, abs=5e-4)


@pytest.mark.parametrize("name", BARS)
def test_fewer_bits_stay_within_their_bar(rows: dict[str, dict[str, Any]], name: str) -> None:
    row = rows[name]
    assert row["bar"] == (0.003 if "values" in name else 0.005 if name.startswith(("int8", "fp8")) else 0.03)
    assert -row["bar"] <= row["increase"] <= row["bar"]
    moved, same = (0.08, 0.96) if name.startswith(("int8", "fp8 ")) else (0.4, 0.8)
    if name == "fp8":
        moved, same = 0.2, 0.92
    assert 0 < row["moved_bits_per_token"] < moved, "it is another model, and not by much"
    assert same < row["same_likeliest"] < 1


def test_fewer_bits_of_a_key_cost_more(rows: dict[str, dict[str, Any]]) -> None:
    """e4m3 has four where int8 has up to seven."""
    eight, fp8 = (rows[f"{name} keys and values"]["moved_bits_per_token"] for name in ("int8", "fp8"))
    assert eight < fp8 < 4 * eight


def test_rounding_what_enters_costs_more_than_leaving_it(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["int8"]["moved_bits_per_token"] > rows["int8, bf16 activations"]["moved_bits_per_token"]


def test_figures_by_hand() -> None:
    one, other = Reading([-1.0, -3.0], [5, 6]), Reading([-2.0, -2.0], [5, 7])
    assert one.bits_per_byte(2) == pytest.approx(4 / 0.6931471805599453 / 2)
    assert one.moved(other) == pytest.approx(1 / 0.6931471805599453)
    assert one.agrees(other) == 0.5
