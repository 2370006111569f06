"""Steps of a canary in virtual time: when the next one begins, when it is promoted, held or given up."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest

from quire_operators.analysis import Limits, Measured, Times
from quire_operators.canary import Decision, Fail, Next, Policy, Promote, Stage, Stay, Step, decide, policy_of
from quire_schemas.model import Model, resolve_defaults
from quire_schemas.wire import time_bucket

POLICY = Policy((Step(5, 300.0), Step(25, 600.0), Step(100, 0.0)), 200, Limits(0.01, 0.2, 0.2), "Hold")


def measured(requests: int, failed: int = 0, first: float = 0.3) -> Measured:
    answers = requests - failed
    first_token = Times(Counter({time_bucket(first): answers}))
    return Measured(requests, failed, answers, 0, first_token, Times(Counter({time_bucket(0.03): answers})))


def at(stage: Stage, now: float, new: Measured, policy: Policy = POLICY) -> Decision:
    return decide(policy, stage, measured(5000), new, now)


def test_a_step_ends_when_its_time_is_over_and_enough_requests_were_seen() -> None:
    first = Stage(0, 1000.0)
    assert at(first, 1299.0, measured(500)) == Stay(Stage(0, 1000.0, 0, 500), False, 1300.0)
    assert at(first, 1300.0, measured(199)) == Stay(Stage(0, 1000.0, 0, 199), True, None)
    moved = at(first, 1300.0, measured(200))
    assert moved == Next(Stage(1, 1300.0, 200, 200))
    assert isinstance(moved, Next)
    assert at(moved.stage, 1900.0, measured(399)) == Stay(Stage(1, 1300.0, 200, 399), True, None), "of this step"
    last = at(moved.stage, 1900.0, measured(400))
    assert isinstance(last, Next)
    assert isinstance(at(last.stage, 1900.0, measured(599)), Stay)
    assert at(last.stage, 1900.0, measured(600)) == Promote()


@pytest.mark.parametrize(("way", "expected"), [("Hold", Stay), ("Rollback", Fail), ("Promote", Next)])
def test_too_few_requests_are_no_failure_unless_that_is_declared(
    way: Literal["Hold", "Rollback", "Promote"], expected: type
) -> None:
    assert isinstance(at(Stage(0, 0.0), 300.0, measured(3), replace(POLICY, on_inconclusive=way)), expected)
    assert isinstance(at(Stage(0, 0.0), 299.0, measured(3), replace(POLICY, on_inconclusive=way)), Stay)


def test_who_is_worse_is_given_up_before_the_step_is_over_and_in_words() -> None:
    found = at(Stage(0, 0.0), 5.0, measured(40, failed=30))
    assert found == Fail("errors 75.0% against 0.0%, 1.0% at most")
    slow = at(Stage(0, 0.0), 5.0, measured(2000, first=0.41))
    assert isinstance(slow, Fail)
    assert slow.because.startswith("first token p95 41")
    assert slow.because.endswith("ms, +20% at most")


def test_nobody_is_looked_at_twice_at_one_count() -> None:
    """Looking again at the same counts would be another chance to err."""
    stage = Stage(0, 0.0, 0, looked_at=40)
    assert isinstance(at(stage, 5.0, measured(41, failed=31)), Stay)
    assert isinstance(at(stage, 5.0, measured(60, failed=31)), Fail)


def test_one_that_has_failed_and_is_kept_goes_nowhere_by_itself() -> None:
    failed = Stage(0, 0.0, failed="CanaryFailed: errors")
    assert at(failed, 900.0, measured(5000)) == Stay(failed, False, None), "though it does well by now"
    assert at(failed, 900.0, measured(5000, failed=900)) == Stay(failed, False, None)
    late = replace(failed, step=7)
    assert at(late, 900.0, measured(5000)) == Stay(late, False, None), "though the manifest has fewer steps by now"


def test_a_step_of_weight_0_waits_for_its_time_alone_and_fewer_steps_promote() -> None:
    dark = replace(POLICY, steps=(Step(0, 60.0), Step(100, 0.0)))
    assert isinstance(at(Stage(0, 0.0), 59.0, measured(0), dark), Stay)
    assert isinstance(at(Stage(0, 0.0), 60.0, measured(0), dark), Next)
    assert at(Stage(7, 0.0), 0.0, measured(0)) == Promote()


def test_a_step_needs_its_share_of_replicas_and_one_at_least() -> None:
    assert [POLICY.replicas(step, 4) for step in (0, 1, 2, 9)] == [1, 1, 4, 4]
    assert POLICY.replicas(1, 10) == 3


def test_the_manifest_in_numbers() -> None:
    def spec(rollout: dict[str, object]) -> dict[str, object]:
        document = {
            "apiVersion": "quire.dev/v1alpha1", "kind": "Model", "metadata": {"name": "m"},
            "spec": {"source": "builtin://tiny", "rollout": rollout},
        }  # fmt: skip
        return resolve_defaults(Model.model_validate(document))

    canary = {"steps": [{"weight": 5, "hold": "5m"}, {"weight": 25, "hold": "10m"}, {"weight": 100}]}
    assert policy_of(spec({"strategy": "Canary", "canary": canary})) == POLICY
    kept = policy_of(spec({"strategy": "Canary", "canary": canary, "autoRollback": False}))
    assert kept == replace(POLICY, gives_up=False)
    assert policy_of(spec({})) is None
