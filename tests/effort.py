"""How hard property tests try: as written in CI, many times that and with fresh randomness in `make nightly`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
EFFORT = int(os.environ.get("QUIRE_TEST_EFFORT", "1"))
"""Factor on the number of examples. Above 1 the examples differ from run to run."""
FUZZ_CI, FUZZ_NIGHTLY = 1_000, 100_000
REPLAY = "QUIRE_FUZZ_CASE"


def examples(count: int) -> int:
    """`count` examples, times the effort."""
    return count * EFFORT


def fuzz_cases() -> Iterator[tuple[int, int]]:
    """(seed, number) of each case of a fuzz: 1,000 with a fixed seed in CI, 100,000 with a new one by night.

    `QUIRE_FUZZ_CASE=seed:number` gives that one case again; `QUIRE_FUZZ_CASE=seed:0-5000` a range of them.
    """
    asked = os.environ.get(REPLAY)
    if asked is not None:
        given, _, numbers = asked.partition(":")
        first, _, last = numbers.partition("-")
        yield from ((int(given), number) for number in range(int(first), int(last or first) + 1))
        return
    seed = 1 if EFFORT == 1 else secrets.randbelow(2**32)
    yield from ((seed, number) for number in range(FUZZ_CI if EFFORT == 1 else FUZZ_NIGHTLY))


def replay(seed: int, number: int) -> str:
    """What to set to have one case again, for the message of a test that failed."""
    return f"{REPLAY}={seed}:{number}"


def times(ci: T, nightly: T) -> T:
    """How often a fault is tried, or what else CI has less of: `ci`, or `nightly` with an effort above 1."""
    return ci if EFFORT == 1 else nightly


def first_in_ci(cases: Sequence[Any]) -> list[Any]:
    """Parameters of which CI has the first one, and the night all: of mutants, say, which try a test and not the
    product."""
    return [cases[0], *(_by_night(case) for case in cases[1:])]


def _by_night(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly)


def bound(figure: float) -> float:
    """Seconds that something may take: the figure itself at night, when the machine has nothing else to do; in CI
    enough that a busy machine does not fail a test that is about what happens, not how fast."""
    return figure if EFFORT > 1 else 10 * figure + 10
