"""What is to run of a model: its intent, joined with what was decided beside it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quire_operators.canary import PROMOTED, Stage
from quire_operators.desired import CRASHES_BEFORE_ROLLBACK, Effective, as_canary, desired_of, effective
from quire_operators.overrides import Kind, Override, ended_by_intent
from quire_operators.placement import Placement
from quire_operators.records import Revision, StoredObject
from quire_schemas.model import Model, resolve_defaults
from quire_schemas.resource import Key

PLACEMENT = Placement(
    device="cpu", dtype="bfloat16", kv_dtype="bfloat16", model_dir="/m", tokenizer_dir="/m", commit=None,
    template="", max_model_len=512, max_num_seqs=64, max_num_batched_tokens=512, num_blocks=8, block_size=16,
    kv=1, kv_tokens=128, weights=1, memory=4, threads=1, seed=0, chat_template_file=None,
)  # fmt: skip


def spec(**fields: Any) -> dict[str, Any]:
    document = {
        "apiVersion": "quire.dev/v1alpha1", "kind": "Model", "metadata": {"name": "m"},
        "spec": {"source": "builtin://tiny", **fields},
    }  # fmt: skip
    return resolve_defaults(Model.model_validate(document))


def revision(n: int, stable_at: float | None = None, **fields: Any) -> Revision:
    return Revision("u", n, f"t{n}", spec(**fields), 1, PLACEMENT.as_dict(), "", 0.0, stable_at=stable_at)


def stored(n: int, **fields: Any) -> StoredObject:
    return StoredObject(Key("model", "m"), "u", n, 1, {}, "", spec(**fields), n, 0.0, 0.0)


ONE, TWO, THREE = revision(1, 10.0), revision(2, 20.0), revision(3)


def wanted(*overrides: Override, now: float = 100.0, **fields: Any) -> Effective:
    return effective(stored(3, **fields), (THREE, TWO, ONE), overrides, now)


def override(kind: Kind, **fields: Any) -> Override:
    return Override(kind, "ada", 50.0, **fields)


def test_without_decisions_the_intent_is_what_runs() -> None:
    found = wanted(replicas=2)
    assert (found.revision, found.newest, found.is_newest) == (THREE, THREE, True)
    assert (found.stable, found.fallback) == (TWO, TWO)
    desired = desired_of(found)
    assert (desired.replicas, desired.revision, desired.fallback, desired.proven) == (2, 3, 2, False)
    assert desired.crashes_before_rollback == CRASHES_BEFORE_ROLLBACK


def test_a_quarantined_template_gives_way_to_the_last_stable_one_and_has_nothing_behind_it() -> None:
    found = wanted(override(Kind.QUARANTINE, revision=3, template_hash="t3"))
    assert (found.revision, found.is_newest) == (TWO, False)
    desired = desired_of(found)
    assert (desired.template_hash, desired.quarantined, desired.fallback) == ("t2", "t3", None)
    other = wanted(override(Kind.QUARANTINE, revision=2, template_hash="t2"))
    assert other.revision == THREE, "it is about a template that is no longer wanted"


def test_a_pin_outranks_a_quarantine_and_may_name_what_was_given_up() -> None:
    quarantine = override(Kind.QUARANTINE, revision=3, template_hash="t3")
    assert wanted(quarantine, override(Kind.PIN, revision=1)).revision == ONE
    again = desired_of(wanted(quarantine, override(Kind.PIN, revision=3)))
    assert (again.template_hash, again.quarantined) == ("t3", "")


def test_under_an_earlier_revision_hot_fields_and_counts_are_the_intents_and_rolling_ones_its_own() -> None:
    fields: dict[str, Any] = {
        "replicas": 4,
        "drainTimeout": "9s",
        "engine": {"seed": 7},
        "batching": {"maxQueueLength": 3},
    }
    spec_now = wanted(override(Kind.PIN, revision=1), **fields).stored.resolved
    assert (spec_now["replicas"], spec_now["drainTimeout"], spec_now["batching"]["maxQueueLength"]) == (4, "9s", 3)
    assert spec_now["engine"]["seed"] == 0
    assert spec_now["source"] == "builtin://tiny"


def test_what_its_engines_have_no_room_for_stays_as_the_earlier_revision_had_it() -> None:
    pin = override(Kind.PIN, revision=1)
    small = wanted(pin, batching={"maxNumSeqs": 8, "maxNumBatchedTokens": 128}).stored.resolved["batching"]
    assert (small["maxNumSeqs"], small["maxNumBatchedTokens"]) == (8, 128)
    large = wanted(pin, batching={"maxNumSeqs": 65, "maxNumBatchedTokens": 128}).stored.resolved["batching"]
    assert (large["maxNumSeqs"], large["maxNumBatchedTokens"]) == (ONE.resolved["batching"]["maxNumSeqs"], 128)


def test_counts_pauses_holds_and_restarts() -> None:
    assert desired_of(wanted(override(Kind.SCALE, replicas=5))).replicas == 5
    assert desired_of(wanted(override(Kind.SCALE, replicas=5), override(Kind.PAUSE))).replicas == 0
    assert desired_of(wanted(override(Kind.PAUSE, until=100.0), replicas=2)).replicas == 2, "its time is over"
    assert desired_of(wanted(override(Kind.PAUSE, until=100.1), replicas=2)).replicas == 0
    held = wanted(override(Kind.HOLD, revision=2))
    assert (held.revision, held.is_newest, desired_of(held).held) == (TWO, False, True)
    assert wanted(override(Kind.HOLD, revision=2), override(Kind.PIN, revision=1)).revision == ONE
    assert wanted(override(Kind.HOLD, revision=9)).revision == THREE, "it is no longer on record"
    assert desired_of(wanted(override(Kind.RESTART))).restarted_at == 50.0


def test_a_model_on_demand_has_replicas_while_it_is_in_memory() -> None:
    away = wanted(residency="onDemand", replicas=2)
    assert (away.standby, away.full, away.stored.resolved["replicas"]) == (True, 2, 0)
    there = wanted(override(Kind.RESIDENT), residency="onDemand", replicas=2)
    assert (there.standby, there.stored.resolved["replicas"]) == (False, 2)
    paused = wanted(override(Kind.RESIDENT), override(Kind.PAUSE), residency="onDemand")
    assert (paused.standby, paused.full) == (False, 0)
    assert not wanted(residency="onDemand", replicas=0).standby


RANGE = {"minReplicas": 0, "maxReplicas": 4}


def test_the_load_decides_within_the_declared_range() -> None:
    def found(*overrides: Override, **declared: Any) -> tuple[int, bool]:
        model = wanted(*overrides, autoscaling={**RANGE, **declared})
        return desired_of(model).replicas, model.standby

    assert found() == (1, False), "one to begin with, that it can be ready once"
    assert found(minReplicas=3) == (3, False)
    assert found(override(Kind.AUTOSCALE, replicas=3)) == (3, False)
    assert found(override(Kind.AUTOSCALE, replicas=9)) == (4, False)
    assert found(override(Kind.AUTOSCALE, replicas=0)) == (0, True), "it comes back when it is asked for"
    assert found(override(Kind.AUTOSCALE, replicas=0), minReplicas=2) == (2, False)
    assert found(override(Kind.AUTOSCALE, replicas=3), override(Kind.SCALE, replicas=2)) == (2, False)
    assert found(override(Kind.AUTOSCALE, replicas=3), override(Kind.SCALE, replicas=0)) == (0, False)
    assert found(override(Kind.AUTOSCALE, replicas=3), override(Kind.PAUSE)) == (0, False)
    assert desired_of(wanted(override(Kind.AUTOSCALE, replicas=3), replicas=2)).replicas == 2, "no range any more"


@given(st.lists(st.sampled_from([*range(5), "other range", "same", "text"]), max_size=12), st.randoms())
def test_who_scales_and_who_applies_commute(moves: list[Any], rng: Any) -> None:
    """The load's decisions and a repository that is applied again and again come to the same in any order."""

    def outcome(order: list[Any]) -> tuple[int, int]:
        decided: dict[Kind, Override] = {}
        fields: dict[str, Any] = {"autoscaling": RANGE}
        for move in order:
            if isinstance(move, int):
                decided[Kind.AUTOSCALE] = override(Kind.AUTOSCALE, replicas=move)
                continue
            before = dict(fields)
            if move == "other range":
                fields["autoscaling"] = {"minReplicas": 2, "maxReplicas": 3}
            elif move == "text":
                fields["drainTimeout"] = "7s"
            for kind in ended_by_intent(spec(**before), spec(**fields)):
                decided.pop(kind, None)
        return desired_of(wanted(*decided.values(), **fields)).replicas, len(decided)

    scales, applies = [m for m in moves if isinstance(m, int)], [m for m in moves if not isinstance(m, int)]
    mixed, left, right = [], list(scales), list(applies)
    while left or right:  # the order among scales, and among applies, is kept
        mixed.append((left if not right or (left and rng.random() < 0.5) else right).pop(0))
    assert outcome(mixed) == outcome(scales + applies) == outcome(applies + scales)


def test_going_back_is_a_wish_and_needs_a_revision_of_another_template() -> None:
    assert desired_of(wanted(rollout={"autoRollback": False})).fallback is None
    alone = effective(stored(3), (THREE,), (), 0.0)
    assert desired_of(alone).fallback is None
    twin = replace(TWO, template_hash="t3")
    assert desired_of(effective(stored(3), (THREE, twin), (), 0.0)).fallback is None
    assert desired_of(wanted(restartPolicy={"maxRestartsBeforeRollback": 7})).crashes_before_rollback == 7


def test_decisions_survive_the_store() -> None:
    for each in (override(Kind.PIN, revision=1, reason="slow"), override(Kind.PAUSE, until=3.0)):
        assert Override.from_dict(each.as_dict()) == each
        assert set(each.as_dict()) == set(asdict(each))


CANARY: dict[str, Any] = {"rollout": {"strategy": "Canary", "canary": {"steps": [{"weight": 10}, {"weight": 60}]}}}


def at_step(step: int) -> Override:
    return Stage(step, 50.0).kept("t3", 50.0)


def test_a_canary_leaves_the_stable_revision_to_serve_and_has_its_own_number_beside_it() -> None:
    found = wanted(replicas=3, **CANARY)
    assert (found.revision, found.is_newest, found.full) == (TWO, False, 3)
    assert desired_of(found).fallback is None
    assert found.canary is not None
    assert (found.canary.revision, found.canary.stage) == (THREE, None)
    alone = desired_of(as_canary(found, found.canary))
    assert (alone.template_hash, alone.replicas, alone.fallback, alone.proven) == ("t3", 1, 2, False)
    later = wanted(at_step(1), replicas=3, **CANARY)
    assert later.canary is not None
    assert desired_of(as_canary(later, later.canary)).replicas == 2


def test_there_is_no_canary_where_it_is_over_or_nothing_is_to_be_tried() -> None:
    done = wanted(at_step(PROMOTED), **CANARY)
    assert (done.canary, done.revision, done.fallback) == (None, THREE, TWO), "it takes over"
    given_up = wanted(override(Kind.QUARANTINE, revision=3, template_hash="t3"), at_step(0), **CANARY)
    assert (given_up.canary, given_up.revision) == (None, TWO)
    pinned = wanted(override(Kind.PIN, revision=1), at_step(0), **CANARY)
    assert (pinned.canary, pinned.revision) == (None, ONE)
    assert wanted().canary is None, "another strategy"
    first = effective(stored(3, **CANARY), (THREE,), (), 100.0)
    assert (first.canary, first.revision) == (None, THREE), "nothing is stable yet"
    same = effective(stored(3, **CANARY), (THREE, replace(TWO, template_hash="t3"), ONE), (), 100.0)
    assert same.canary is None, "what is stable is of this template"
    deleted = effective(replace(stored(3, **CANARY), deletion_time=1.0), (THREE, TWO), (), 100.0)
    assert deleted.canary is None


def test_a_pause_of_rollouts_keeps_a_canary_from_beginning_and_one_that_has_begun_where_it_is() -> None:
    hold = override(Kind.HOLD, revision=2)
    assert wanted(hold, **CANARY).canary is None
    begun = wanted(hold, at_step(1), **CANARY)
    assert begun.canary is not None
    assert (begun.canary.step, begun.revision) == (1, TWO)
    noted = wanted(hold, override(Kind.CANARY, template_hash="t3"), **CANARY)
    assert noted.canary is not None
    assert (noted.canary.stage, noted.canary.is_noted) == (None, True), "it waits for its first replica"
    another = wanted(replace(at_step(1), template_hash="t9"), **CANARY)
    assert another.canary is not None
    assert another.canary.stage is None, "a stage of another template says nothing of this one"


def test_what_is_left_of_a_canary_that_did_not_take_over_is_set_aside() -> None:
    noted = override(Kind.CANARY, template_hash="t3")
    given_up = override(Kind.QUARANTINE, revision=3, template_hash="t3")
    for kept in (noted, at_step(1)):
        assert wanted(kept, **CANARY).set_aside == "", "it goes on"
        assert wanted(kept, given_up, **CANARY).set_aside == "t3"
        assert wanted(kept, override(Kind.PIN, revision=1), **CANARY).set_aside == "t3"
        another = wanted(replace(kept, template_hash="t9"), **CANARY)
        assert (another.set_aside, another.canary is not None) == ("t9", True), "another template is tried now"
        assert wanted(kept).set_aside == "", "by another strategy it is what is to serve"
    assert wanted(at_step(PROMOTED), given_up, **CANARY).set_aside == "", "it had taken over before it failed"
    assert wanted(**CANARY).set_aside == ""


def test_a_model_that_has_no_replica_has_none_of_its_canary() -> None:
    found = wanted(override(Kind.PAUSE), **CANARY)
    assert found.canary is not None
    assert desired_of(as_canary(found, found.canary)).replicas == 0
