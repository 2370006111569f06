"""How far two distributions are apart by what engines tell of them, beside the sum over all tokens."""

from __future__ import annotations

import math
import random

import pytest

from quire.router import drift
from quire_schemas import wire


def softmax(logits: list[float]) -> list[float]:
    most = max(logits)
    total = sum(math.exp(each - most) for each in logits)
    return [each - most - math.log(total) for each in logits]


def told(logprobs: list[float], token: int, top: int = drift.TOP) -> wire.TokenLogprobs:
    order = sorted(range(len(logprobs)), key=lambda index: (-logprobs[index], index))
    likeliest = tuple((index, logprobs[index]) for index in order[:top])
    return wire.TokenLogprobs(token, logprobs[token], likeliest, 1)


def true_divergence(p: list[float], q: list[float]) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def buckets_at_their_best(p: list[float], q: list[float], token: int) -> float:
    """The same bound by trying: the least divergence of any Q that fits what is told of the tokens of P."""
    ours, its = drift.told(told(p, token)), drift.told(told(q, token))
    both, alone = ours.keys() & its.keys(), ours.keys() - its.keys()
    known = sum(math.exp(ours[t]) * (ours[t] - its[t]) for t in both)
    own, left = sum(math.exp(ours[t]) for t in alone), 1 - sum(math.exp(ours[t]) for t in ours)
    new_left = 1 - sum(math.exp(its[t]) for t in both)
    most = min(len(alone) * math.exp(told(q, token).top[-1][1]), 1 - sum(map(math.exp, its.values())))
    if not alone:
        return known + left * math.log(left / new_left)
    tried = (most * step / 4000 for step in range(1, 4001))
    return known + min(own * math.log(own / x) + left * math.log(left / (new_left - x)) for x in tried)


@pytest.mark.parametrize("apart", [0.0, 0.01, 0.3, 1.0, 4.0])
def test_it_is_the_tightest_bound_that_what_is_told_allows(apart: float) -> None:
    draw, found_all, true_all = random.Random(7), 0.0, 0.0
    for _ in range(40):
        logits = [draw.gauss(0, 3) for _ in range(200)]
        p = softmax(logits)
        q = softmax([each + draw.gauss(0, apart) for each in logits])
        token = p.index(max(p))
        found = drift.divergence(told(p, token), told(q, token))
        true = true_divergence(p, q)
        assert -1e-9 <= found <= true + 1e-9
        assert found == pytest.approx(buckets_at_their_best(p, q, token), rel=1e-3, abs=1e-9)
        found_all, true_all = found_all + found, true_all + true
    assert found_all >= 0.5 * true_all, (
        "most of it lies among the likeliest, of distributions as flat as these, too"
    )


def test_two_that_are_told_whole_have_the_whole_divergence_and_equals_none() -> None:
    draw = random.Random(3)
    p, q = (softmax([draw.gauss(0, 2) for _ in range(12)]) for _ in range(2))
    found = drift.divergence(told(p, 0), told(q, 0))
    assert found == pytest.approx(true_divergence(p, q), rel=1e-6)
    assert drift.divergence(told(p, 0), told(p, 0)) == 0


def test_a_token_that_the_other_holds_for_impossible_counts_although_it_does_not_tell_it() -> None:
    p = softmax([8.0] + [0.0] * 99)
    q = softmax([-8.0] + [0.0] * 99)
    chosen = 0
    unseen = wire.TokenLogprobs(5, q[5], told(q, 5).top, 1)
    kl = drift.divergence(told(p, chosen), unseen)
    assert kl > 2, "it is no likelier there than the last of those that are told"
    assert drift.divergence(told(p, chosen), told(q, chosen)) > 10, "as it stands there"


def test_which_of_two_equals_comes_first_is_no_difference() -> None:
    p = softmax([5.0, 5.0 - 0.9 * drift.TIE, 4.0, *[0.0] * 40])
    swapped = softmax([5.0 - 0.9 * drift.TIE, 5.0, 4.0, *[0.0] * 40])
    third = softmax([5.0, 4.9, 5.5, *[0.0] * 40])
    far = softmax([0.0] * 42 + [9.0])
    assert drift.agree(told(p, 0), told(swapped, 0))
    assert not drift.agree(told(p, 0), told(third, 0))
    assert not drift.agree(told(p, 0), told(far, 0)), "one that is not among those told"
    agreed, kl = drift.compare([told(p, 0)] * 3, [told(p, 0), told(swapped, 0), told(far, 0)])
    assert agreed == 2
    assert kl > 5
