"""Whether a canary passes its exam: by what the router tells, and what is asked at all."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from quire_operators.canary import Stage, policy_of
from quire_operators.exam import (
    DRIFTED,
    NOISE,
    PROMPTS,
    SMOKE_FAILED,
    Failed,
    Paper,
    Passed,
    Waits,
    judge,
    most_divergence,
)
from quire_schemas import wire
from quire_schemas.model import Model, resolve_defaults

SMOKE = (wire.Question("2+2=", 4, "4"), wire.Question("Capital of France?", 64, "Paris"))
WELL = (wire.Answered("= 4", True), wire.Answered("It is Paris.", True))


def examined(paper: Paper, *smoke: wire.Answered, drift: tuple[wire.Drifted, ...] = (), waits: str = "") -> Any:
    return judge(paper, wire.Examined(paper.exam, smoke, drift, waits))


def paper_of(analysis: dict[str, object]) -> Paper | None:
    canary = {"steps": [{"weight": 5}], "analysis": analysis}
    document = {
        "apiVersion": "quire.dev/v1alpha1", "kind": "Model", "metadata": {"name": "m"},
        "spec": {"source": "builtin://tiny", "rollout": {"strategy": "Canary", "canary": canary}},
    }  # fmt: skip
    policy = policy_of(resolve_defaults(Model.model_validate(document)))
    assert policy is not None
    return policy.paper


def test_what_a_manifest_asks() -> None:
    prompts = [{"prompt": "2+2=", "expectContains": "4", "maxTokens": 4}]
    asked = wire.Question("2+2=", 4, "4")
    assert paper_of({}) is None
    smoke = paper_of({"smokePrompts": prompts})
    assert smoke == Paper((asked,), None)
    assert smoke.exam == wire.Exam((asked,), ())
    both = paper_of({"smokePrompts": prompts, "maxDrift": "5%"})
    assert both == Paper((asked,), 0.05)
    assert both.exam == wire.Exam((asked,), (wire.Question("2+2=", 32),)), "a few tokens are little to go by"
    mixed = paper_of({"smokePrompts": [{"prompt": "Hello", "maxTokens": 50}, *prompts], "maxDrift": "5%"})
    assert mixed == Paper((asked,), 0.05, (wire.Question("Hello", 50),))
    assert mixed.exam == wire.Exam((asked,), (wire.Question("2+2=", 32), wire.Question("Hello", 50)))
    unknown = paper_of({"smokePrompts": [{"prompt": "Hello"}], "maxDrift": "5%"})
    assert unknown is not None
    assert unknown.exam == wire.Exam((), (wire.Question("Hello", 32),)), "none of Quire's own beside given ones"
    alone = paper_of({"maxDrift": "0%"})
    assert alone == Paper((), 0.0)
    assert [each.prompt for each in alone.exam.drift] == list(PROMPTS)


def test_each_smoke_prompt_is_answered_as_expected_or_it_fails_in_words() -> None:
    paper = Paper(SMOKE, None)
    assert judge(paper, None) == Waits(0, 2, "the router has not begun; one of an older version never does")
    assert examined(paper) == Waits(0, 2)
    assert examined(paper, WELL[0], waits="no replica is ready") == Waits(1, 2, "no replica is ready")
    assert examined(paper, *WELL) == Passed("2 smoke prompts answered as expected")
    wrong = examined(paper, wire.Answered("five, I believe, " + "and so on " * 20))
    assert isinstance(wrong, Failed)
    assert wrong.reason == SMOKE_FAILED
    assert wrong.text.startswith("'2+2=' was answered 'five, I believe, and so on ")
    assert wrong.text.endswith("…', without '4'")
    assert len(wrong.text) < 120, "it is short"
    silent = examined(paper, WELL[0], wire.Answered(problem="its engine says numerical_error"))
    assert silent == Failed(SMOKE_FAILED, "'Capital of France?' was not answered: its engine says numerical_error")


def test_a_plan_says_what_is_asked_and_a_status_how_far_it_is() -> None:
    assert Paper(SMOKE, None).says(3) == "2 smoke prompts answered as expected"
    bound = "5.0% of tokens and 0.0050 nats a token"
    own = f"drift from revision 3's answers to {len(PROMPTS)} prompts of Quire's own of at most {bound}"
    assert Paper((), 0.05).says(3) == own
    both = Paper(SMOKE[:1], 0.05)
    one = "1 smoke prompt answered as expected"
    assert both.says(3) == f"{one}; drift from revision 3's answers to 1 given prompt of at most {bound}"
    two = Paper(SMOKE, 0.05)
    half = examined(two, *WELL, drift=(wire.Drifted(20, 19, 0.2),), waits="old is not connected")
    assert half.text == (
        "asked 3 of 4 questions before it has any request; so far 5.0% of 20 tokens would be others, 5.0% at "
        "most; divergence 0.0100 nats a token, 0.0050 at most; waits: old is not connected"
    )
    assert isinstance(half, Waits), "a drift beyond the bound may still come within it"


def test_what_the_router_tells_of_another_exam_is_no_verdict() -> None:
    before = Paper(SMOKE[:1], None)
    assert judge(Paper(SMOKE, None), wire.Examined(before.exam, WELL[:1])) == Waits(0, 2)
    stricter = Paper((wire.Question("2+2=", 4, "four"),), None)
    assert judge(stricter, wire.Examined(before.exam, WELL[:1])) == Waits(0, 1)


def test_drift_is_bounded_over_all_tokens_by_the_share_and_by_its_divergence() -> None:
    paper = Paper((), 0.05)
    most = len(PROMPTS)

    def told(agreed: int, kl: float) -> Any:
        return examined(paper, drift=(wire.Drifted(20, 20, 0.0),) * (most - 1) + (wire.Drifted(20, agreed, kl),))

    tokens = 20 * most
    assert isinstance(told(20, 0.0), Passed)
    assert isinstance(told(20 - int(0.05 * tokens), 0.0), Passed)
    assert isinstance(told(20 - int(0.05 * tokens) - 1, 0.0), Failed)
    assert isinstance(told(20, 0.0049 * tokens), Passed)
    failed = told(20, 0.0051 * tokens)
    assert failed == Failed(
        DRIFTED,
        f"0.0% of {tokens} tokens would be others, 5.0% at most; divergence 0.0051 nats a token, 0.0050 at most",
    )
    assert isinstance(told(20, math.nan), Failed), "what is no number passes nothing"
    assert isinstance(examined(paper, drift=(wire.Drifted(20, 20, 0.0),) * (most - 1)), Waits), "one is left"


def test_what_cannot_be_compared_fails_and_nothing_compared_does_not_pass() -> None:
    paper = Paper((), 1.0)
    whole = (wire.Drifted(20, 20, 0.0),) * (len(PROMPTS) - 1)
    assert isinstance(examined(paper, drift=(*whole, wire.Drifted())), Passed), "one that does not fit is left out"
    nothing = examined(paper, drift=(wire.Drifted(),) * len(PROMPTS))
    assert nothing == Failed(DRIFTED, "none of the prompts fits into the context, so nothing was compared")
    other = examined(paper, drift=(*whole, wire.Drifted(problem="the tokenizers differ")))
    assert isinstance(other, Failed)
    assert other.text.endswith("cannot be compared: the tokenizers differ")


def test_the_divergence_that_belongs_to_a_share_bounds_the_draws_that_differ_by_it() -> None:
    """Pinsker, tried: whatever two distributions, total variation d needs a divergence of 2 d^2 at least."""
    draw = random.Random(5)
    for _ in range(300):
        apart = draw.choice((0.05, 0.3, 2.0))
        weights = [draw.expovariate(1.0) for _ in range(9)]
        others = [each * math.exp(draw.gauss(0, apart)) for each in weights]
        p, q = [w / sum(weights) for w in weights], [w / sum(others) for w in others]
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        differ = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
        assert kl >= 2 * differ**2
    assert most_divergence(0.05) == pytest.approx(0.005)
    assert most_divergence(0.0) == NOISE


def test_how_it_passed_stays_with_where_it_stands() -> None:
    stage = Stage(0, 1.0, examined="2 smoke prompts answered as expected")
    assert Stage.of(stage.kept("t", 1.0)) == stage
