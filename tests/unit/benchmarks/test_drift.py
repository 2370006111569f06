"""The table of drifts: its figures by hand, that the page shows what was measured, and, in a night, that engines
which differ so are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.drift import CHANGES, bound, measure, replaced, table

from quire import builtin
from quire_operators.exam import Drift

ROOT = Path(__file__).resolve().parents[3]


def rows() -> list[dict[str, Any]]:
    lines = (ROOT / "benchmarks/results/drift.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][-len(CHANGES) :]


def test_the_least_bound_is_one_that_a_drift_is_within_and_no_less_is() -> None:
    assert bound(Drift(100, 0.0, 0.0009)) == 0.0, "rounding"
    assert bound(Drift(100, 0.03, 0.0)) == 0.03
    assert bound(Drift(100, 0.0, 0.005)) == 0.05
    assert bound(Drift(100, 0.01, 0.02)) == 0.1, "by its divergence"
    for share, kl in ((0.0123, 0.0), (0.0, 0.0131), (0.2, 0.05), (0.0, 0.9)):
        drift = Drift(1000, share, kl)
        assert not drift.beyond(bound(drift))
        assert drift.beyond(bound(drift) - 0.001)


def test_a_template_that_has_no_such_piece_is_no_change() -> None:
    assert replaced("b", "x")("abc") == "axc"
    with pytest.raises(ValueError, match="2 times 'b'"):
        replaced("b", "x")("bb")
    template = json.loads((builtin.path() / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    for name, change in CHANGES.items():
        assert change.template is None or change.template(template) != template, name


def test_the_page_shows_what_was_measured_last() -> None:
    found = rows()
    assert [row["change"] for row in found] == list(CHANGES)
    assert "\n".join(table(found)) in (ROOT / "docs/canaries.md").read_text(encoding="utf-8")


def test_of_what_was_measured_equals_have_no_drift_and_the_gravest_changes_the_largest() -> None:
    least = {row["change"]: row["passes_at"] for row in rows()}
    assert least["the same weights"] == least["float32"] == 0
    assert least["one matrix, noise of 0.3 sigma"] < least["one matrix, noise of 1.0 sigma"]
    assert least["int8"] < least["int4, groups of 32"]
    assert least["template without its last newline"] < least["template of another family"]


@pytest.mark.nightly
def test_engines_that_differ_are_told_apart() -> None:
    names = ("the same weights", "rope base 9,000 for 10,000", "template without its last newline")
    found = measure(builtin.path(), {name: CHANGES[name] for name in names}, threads=1)
    same, rope, newline = (row["passes_at"] for row in found)
    assert same == 0
    assert 0.03 < rope < 0.1
    assert newline > 0.2
    assert all(row["tokens"] > 100 for row in found)
