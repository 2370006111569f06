"""What happens between a step's plan and its result: aborts, names used again, the next step's plan."""

from __future__ import annotations

from tests.unit.engine.scheduling import make_request, make_scheduler, scripted, step

from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
from quire_engine.scheduler import Scheduler
from quire_engine.step import PENDING, resolve


def test_a_prompt_that_goes_whole_waits_for_the_blocks_of_what_is_being_computed() -> None:
    # windows let go of blocks between steps alone, so ten tokens in one step need ten
    pool = BlockPool(10, 1, [2])
    scheduler = Scheduler(pool, BatchLimits(2, 1, False), max_model_len=20, clock=lambda: 0.0)
    scheduler.add(make_request("a", 1, 1))
    scheduler.add(make_request("b", 10, 1))
    first = scheduler.schedule()
    assert [item.request_id for item in first.items] == ["a"]
    assert not scheduler.schedule().items
    scheduler.commit(first, scripted(first))
    second = scheduler.schedule()
    assert [(item.request_id, item.end) for item in second.items] == [("b", 10)]
    scheduler.commit(second, scripted(second))
    assert not scheduler.has_work


def test_abort_frees_blocks_at_once_in_every_state_and_again_is_no_error() -> None:
    scheduler = make_scheduler(num_blocks=16, max_num_seqs=2, budget=8)
    for name in "abc":
        scheduler.add(make_request(name, 6, 6))
    step(scheduler)
    assert scheduler.abort("c"), "waiting"
    assert scheduler.abort("a"), "running"
    assert not scheduler.abort("a")
    assert not scheduler.abort("nobody")
    plan = scheduler.schedule()
    assert scheduler.abort("b"), "between plan and result"
    assert scheduler.pool.num_used == 0
    assert scheduler.commit(plan, scripted(plan)) == []
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_a_name_used_again_between_plan_and_result_gets_nothing_of_the_old_result() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4, 4))
    plan = scheduler.schedule()
    scheduler.abort("a")
    scheduler.add(make_request("a", 2, 4))
    assert scheduler.commit(plan, scripted(plan)) == []
    assert [request.num_known for request in scheduler.waiting] == [2]
    scheduler.check_integrity()


def test_a_name_used_again_while_a_step_ahead_is_planned_gets_nothing_of_the_old_result() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4, 4))
    old = scheduler.schedule()
    scheduler.abort("a")
    scheduler.add(make_request("a", 4, 4))
    new = scheduler.schedule()
    assert scheduler.commit(old, scripted(old)) == []
    (delta,) = scheduler.commit(new, scripted(new, 51))
    assert delta.token_ids == (51,)
    scheduler.check_integrity()


def test_a_step_is_planned_before_the_token_of_the_last_one_is_known() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, 3, frequency_penalty=0.5))
    scheduler.add(make_request("b", 3, 1))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert str(second) == "step 1: 1 tokens: a[3:4]*", "b draws its last token, which is never computed"
    assert second.items[0].token_ids == (PENDING,)
    assert second.items[0].history == (100, 101, 102, PENDING)
    resolved = resolve(second, {"a": 50, "b": 51}).items[0]
    assert (resolved.token_ids, resolved.history) == ((50,), (100, 101, 102, 50))
    assert resolve(second, {}).items == (), "who drew nothing has nothing to compute"
    assert [delta.id for delta in scheduler.commit(first, scripted(first))] == ["a", "b"]
    third = scheduler.schedule()
    assert str(third) == "step 2: 1 tokens: a[4:5]*"
    assert scheduler.schedule().items == (), "its last token is being drawn"
    scheduler.commit(second, scripted(second))
    (delta,) = scheduler.commit(third, scripted(third))
    assert delta.finish_reason == "length"
    assert not scheduler.has_work
