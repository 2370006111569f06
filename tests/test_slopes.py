"""The arithmetic that tells a leak from memory that wanders."""

from __future__ import annotations

import random

from tests.slopes import slope

TIMES = [float(at) for at in range(240)]


def test_a_steady_climb_is_found_and_measured() -> None:
    rng = random.Random(1)
    found = slope(TIMES, [100 + 0.05 * at + rng.gauss(0, 0.5) for at in TIMES])
    assert abs(found.value - 0.05) < 0.002
    assert found.low < 0.05 < found.high
    assert found.grows(0.04)
    assert not found.grows(0.06), "below the bar it may be as sure as it likes"


def test_what_stands_still_and_what_falls_does_not_grow() -> None:
    assert slope(TIMES, [7.0] * len(TIMES)).value == 0
    assert not slope(TIMES, [7.0] * len(TIMES)).grows(0.01)
    assert not slope(TIMES, [100 - 0.05 * at for at in TIMES]).grows(0.01)


def test_of_a_hundred_series_that_only_wander_few_are_called_growing() -> None:
    """Readings that stay near the one before are worth little, however many they are."""
    grows = 0
    for seed in range(100):
        rng, here, readings = random.Random(seed), 0.0, []
        for _ in TIMES:
            here = 0.9 * here + rng.gauss(0, 1)
            readings.append(here)
        grows += slope(TIMES, readings).low > 0
    assert grows <= 8


def test_of_noise_about_one_in_forty_is_called_growing() -> None:
    grows = 0
    for seed in range(400):
        rng = random.Random(seed)
        grows += slope(TIMES, [rng.gauss(0, 1) for _ in TIMES]).low > 0
    assert 2 <= grows <= 20
