"""Who goes first, who makes room for whom, and who waits."""

from __future__ import annotations

import pytest
from tests.unit.engine.scheduling import make_request, make_scheduler, share, step

from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
from quire_engine.errors import RequestRefused
from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_schemas.wire import Generate, Policy, Sampling


def test_running_requests_come_first_and_prompts_fill_the_rest_of_the_budget() -> None:
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_request("a", prompt=3, max_tokens=9))
    step(scheduler)
    scheduler.add(make_request("b", prompt=12, max_tokens=2))
    scheduler.add(make_request("c", prompt=2, max_tokens=2))
    assert str(step(scheduler)[0]) == "step 1: 8 tokens: a[3:4]* b[0:7]"
    assert str(step(scheduler)[0]) == "step 2: 8 tokens: a[4:5]* b[7:12]* c[0:2]*"


def test_the_newest_running_request_makes_room_and_keeps_what_it_said() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=4, budget=32)
    scheduler.add(make_request("old", prompt=4, max_tokens=12))
    scheduler.add(make_request("new", prompt=4, max_tokens=8))
    said: dict[str, list[int]] = {"old": [], "new": []}
    preempted: list[str] = []
    while scheduler.has_work:
        plan, deltas = step(scheduler)
        preempted += plan.preempted
        for delta in deltas:
            said[delta.id] += delta.token_ids
            if delta.finish_reason and delta.timings:
                assert len(delta.timings.preempted_at) == preempted.count(delta.id)
    assert preempted == ["new"]
    assert scheduler.counters.preemptions == 1
    assert [len(said["old"]), len(said["new"])] == [12, 8], "no token is said twice and none is lost"
    assert scheduler.counters.prompt_tokens == 8, "recomputing a prompt does not count it again"


def test_a_preempted_request_recomputes_prompt_and_output_and_draws_only_then() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=2, budget=3)
    first, second = make_request("a", 2, 7), make_request("b", 2, 3)
    scheduler.add(first)
    scheduler.add(second)
    lost = False
    spans: list[tuple[int, int, bool]] = []
    while scheduler.has_work:
        plan, _ = step(scheduler)
        lost = lost or "b" in plan.preempted
        for item in plan.items:
            if item.request_id == "b" and lost:
                spans.append((item.start, item.end, item.draw is not None))
    assert spans == [(0, 3, False), (3, 4, True)], "two tokens of prompt, both that it had said"
    assert second.token_ids == [100, 101, 50, 50, 50]


def test_priorities_decide_who_starts_and_who_has_to_go() -> None:
    limits = BatchLimits(2, 16, True, "priority")
    scheduler = Scheduler(BlockPool(32, 4), limits, max_model_len=64, clock=lambda: 0.0)

    def request(name: str, priority: int) -> Request:
        message = Generate(name, [1, 2, 3], Sampling(max_tokens=9), priority=priority)
        return Request.of(message, eos_token_ids=(), seed=0, received_at=0.0)

    for name, priority in (("a", 5), ("b", 3), ("c", 5)):
        scheduler.add(request(name, priority))
    assert str(step(scheduler)[0]) == "step 0: 6 tokens: b[0:3]* a[0:3]*"
    scheduler.add(request("urgent", -1))
    plan, _ = step(scheduler)
    assert str(plan) == "step 1: 4 tokens: urgent[0:3]* b[3:4]*; preempted a"
    assert [r.id for r in scheduler.waiting] == ["a", "c"]
    scheduler.add(request("equal", 3))
    assert str(step(scheduler)[0]) == "step 2: 2 tokens: urgent[3:4]* b[4:5]*", "nobody goes for an equal"
    scheduler.set_limits(BatchLimits(3, 16, True, "fcfs"))
    assert str(step(scheduler)[0]) == "step 3: 6 tokens: a[0:4]* b[5:6]* urgent[4:5]*"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_background_work_makes_room_for_whatever_somebody_waits_for(policy: Policy) -> None:
    scheduler = Scheduler(
        BlockPool(32, 4), BatchLimits(2, 16, True, policy, 1), max_model_len=64, clock=lambda: 0.0
    )

    def request(name: str, priority: int, background: bool) -> Request:
        sampling = Sampling(max_tokens=9)
        message = Generate(name, [1, 2, 3], sampling, priority=priority, background=background)
        return Request.of(message, eos_token_ids=(), seed=0, received_at=0.0)

    for name in "abc":
        scheduler.add(request(name, -(2**31), True))
    with pytest.raises(RequestRefused, match="3 requests run or wait"):
        scheduler.add(request("d", 0, True))
    step(scheduler)
    for name in ("first", "second", "third"):
        scheduler.add(request(name, 2**31, False))  # the queue is theirs, however full it is of others
    with pytest.raises(RequestRefused, match="3 requests run or wait"):
        scheduler.add(request("fourth", 0, False))
    preempted: tuple[str, ...] = ()
    for _ in range(2):
        preempted += step(scheduler)[0].preempted
    assert preempted == ("b", "a")
    assert [r.id for r in scheduler.running] == ["first", "second"]
    assert [r.id for r in scheduler.waiting] == ["third", "a", "b", "c"]
    ended = []
    while scheduler.has_work:
        ended += [delta.id for delta in step(scheduler)[1] if delta.finish_reason]
    assert ended[:2] == ["first", "second"]
    assert sorted(ended[2:]) == ["a", "b", "c", "third"], "and nobody is forgotten"


def test_a_lent_seat_goes_to_whose_part_it_is_and_comes_back() -> None:
    scheduler = Scheduler(BlockPool(32, 4), BatchLimits(2, 16, True, "fcfs"), max_model_len=64, clock=lambda: 0.0)

    def request(name: str, lent: bool) -> Request:
        message = Generate(name, [1, 2, 3], Sampling(max_tokens=4), priority=-5, lent=lent)
        return Request.of(message, eos_token_ids=(), seed=0, received_at=0.0)

    for name, lent in (("own", False), ("lent", True), ("lent too", True)):
        scheduler.add(request(name, lent))
    step(scheduler)
    assert [r.id for r in scheduler.running] == ["own", "lent"]
    scheduler.add(request("other", False))
    assert step(scheduler)[0].preempted == ("lent",), "not to the one that is lent, too, and came before"
    scheduler.add(request("another", False))
    assert not step(scheduler)[0].preempted, "whose own it is keeps it"
    assert [r.id for r in scheduler.waiting] == ["another", "lent", "lent too"]
    scheduler.set_limits(BatchLimits(2, 16, True, "priority"))
    assert [r.id for r in scheduler.waiting] == ["lent", "lent too", "another"], "then ranks alone count"
    scheduler.set_limits(BatchLimits(2, 16, True, "fcfs"))
    ended: list[str] = []
    while scheduler.has_work:
        ended += [delta.id for delta in step(scheduler)[1] if delta.finish_reason]
    assert ended == ["own", "other", "another", "lent", "lent too"]


def test_nobody_is_thrown_out_for_blocks_that_others_hold_as_well() -> None:
    limits = BatchLimits(8, 64, True, "priority")
    scheduler = Scheduler(BlockPool(32, 4), limits, max_model_len=256, clock=lambda: 0.0)

    def request(name: str, prompt: list[int], priority: int) -> Request:
        message = Generate(name, prompt, Sampling(max_tokens=9), priority=priority)
        return share(Request.of(message, eos_token_ids=(), seed=0, received_at=0.0))

    common = list(range(40))
    for name in "abc":
        scheduler.add(request(name, [*common, ord(name)], 5))
    for _ in range(3):
        step(scheduler)
    scheduler.add(request("kept", common, 0))
    step(scheduler)
    assert scheduler.pool.num_used < 4 * 11, "the prompt is there once"
    scheduler.add(request("large", [9] * 100, 1))
    plan, _ = step(scheduler)
    assert plan.preempted == (), "what they would free is not enough"


def test_a_prefix_that_only_the_one_who_makes_room_holds_is_not_counted_as_there() -> None:
    """Whoever is thrown out takes nothing along, but what it held has to be paid for again."""
    limits = BatchLimits(8, 64, True, "priority")
    scheduler = Scheduler(BlockPool(12, 1), limits, max_model_len=64, clock=lambda: 0.0)

    def request(name: str, prompt: list[int], priority: int) -> Request:
        message = Generate(name, prompt, Sampling(max_tokens=2), priority=priority)
        return share(Request.of(message, eos_token_ids=(), seed=0, received_at=0.0))

    common = list(range(1, 8))
    scheduler.add(request("first", [90, 91], 0))
    scheduler.add(request("victim", common, 9))
    step(scheduler)
    scheduler.add(request("urgent", [*common, 70, 71, 72], 1))
    done: set[str] = set()
    while scheduler.has_work:
        _, deltas = step(scheduler)
        done |= {delta.id for delta in deltas if delta.finish_reason}
    assert done == {"first", "victim", "urgent"}


def test_a_full_queue_refuses_by_name() -> None:
    limits = BatchLimits(2, 16, True, max_waiting=1)
    scheduler = Scheduler(BlockPool(32, 4), limits, max_model_len=64, clock=lambda: 0.0)
    for name in "abc":
        scheduler.add(make_request(name, 3, 3))
    with pytest.raises(RequestRefused, match="2 seats and a queue of 1") as error:
        scheduler.add(make_request("d", 3, 3))
    assert error.value.code == "queue_full"
    scheduler.abort("b")
    scheduler.add(make_request("d", 3, 3))


def test_fewer_seats_let_nobody_in_until_enough_have_left() -> None:
    scheduler = make_scheduler(num_blocks=32, max_num_seqs=4)
    for name in "abcdef":
        scheduler.add(make_request(name, 2, 2 if name < "d" else 6))
    step(scheduler)
    scheduler.set_limits(BatchLimits(2, 16, True))
    plan, _ = step(scheduler)
    assert [item.request_id for item in plan.items] == ["a", "b", "c", "d"]
    plan, _ = step(scheduler)
    assert [item.request_id for item in plan.items] == ["d", "e"]
