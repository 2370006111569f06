"""Blocks that requests share because they begin alike, and blocks that a window has passed."""

from __future__ import annotations

import pytest
from tests.unit.engine.scheduling import make_request, make_scheduler, share, step

from quire_engine.blocks import GONE, BlockPool
from quire_engine.config import BatchLimits
from quire_engine.errors import RequestRefused
from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_schemas.wire import Delta, Generate, Sampling


def test_a_prompt_that_others_have_computed_starts_behind_it() -> None:
    scheduler = make_scheduler(num_blocks=16, block_size=4, budget=64)
    for name, kin in (("a", "all"), ("b", "all"), ("c", "other")):
        scheduler.add(share(make_request(name, 10, 2), kin))
        deltas: list[Delta] = []
        plan, _ = step(scheduler)
        assert str(plan).endswith({"a": "a[0:10]*", "b": "b[8:10]*", "c": "c[0:10]*"}[name])
        while scheduler.has_work:
            deltas += step(scheduler)[1]
        assert deltas[-1].timings is not None
        assert deltas[-1].timings.cached_tokens == {"a": 0, "b": 8, "c": 0}[name]
    assert scheduler.counters.prefix_hit_tokens == 8
    assert scheduler.counters.prefix_queried_tokens == 30
    assert scheduler.pool.num_used == 0
    assert scheduler.pool.num_idle == 4, "two full blocks of either kin; what a and b drew filled no third"


def test_a_whole_prompt_that_is_there_still_computes_its_last_block_to_draw_from() -> None:
    scheduler = make_scheduler(num_blocks=16, block_size=4)
    for name, span in (("a", "a[0:8]*"), ("b", "b[4:8]*")):
        scheduler.add(share(make_request(name, 8, 1)))
        assert str(step(scheduler)[0]).endswith(span)


def test_who_begins_alike_at_the_same_time_stands_aside_until_it_can_share() -> None:
    scheduler = make_scheduler(num_blocks=32, block_size=4, budget=8, max_num_seqs=8)
    for name in "abc":
        scheduler.add(share(make_request(name, 14, 3)))
    stranger = Generate("d", [7, 7, 7], Sampling(max_tokens=2))
    scheduler.add(share(Request.of(stranger, eos_token_ids=(), seed=0, received_at=0.0)))
    plans = [str(step(scheduler)[0]) for _ in range(4)]
    assert plans == [
        "step 0: 8 tokens: a[0:8]",
        "step 1: 8 tokens: a[8:14]* d[0:2]",
        "step 2: 6 tokens: a[14:15]* b[12:14]* c[12:14]* d[2:3]*",
        "step 3: 4 tokens: a[15:16]* b[14:15]* c[14:15]* d[3:4]*",
    ]
    held = {block for request in scheduler.running for block in request.tables[0][:3]}
    assert len(held) == 3, "the prompt's full blocks are stored once"


def test_nobody_who_is_waited_for_stands_aside_for_background_work() -> None:
    scheduler = make_scheduler(num_blocks=32, block_size=4, budget=4)
    message = Generate("a", [1] * 14, Sampling(max_tokens=3), background=True)
    scheduler.add(share(Request.of(message, eos_token_ids=(), seed=0, received_at=0.0)))
    step(scheduler)
    message = Generate("b", [1] * 14, Sampling(max_tokens=3))
    scheduler.add(share(Request.of(message, eos_token_ids=(), seed=0, received_at=0.0)))
    assert str(step(scheduler)[0]) == "step 1: 4 tokens: b[4:8]", "what is there is shared, what is to come is not"
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.pool.num_used == 0


def test_who_stands_aside_computes_itself_when_the_other_leaves() -> None:
    scheduler = make_scheduler(num_blocks=32, block_size=4, budget=4)
    scheduler.add(share(make_request("a", 14, 3)))
    scheduler.add(share(make_request("b", 14, 3)))
    step(scheduler)
    scheduler.abort("a")
    assert str(step(scheduler)[0]) == "step 1: 4 tokens: b[4:8]"


def test_idle_blocks_go_the_least_recently_used_first_and_the_end_of_a_chain_before_its_beginning() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4, budget=64, max_model_len=100)

    def run(name: str, first: int, prompt: int) -> str:
        ids = [first + i for i in range(prompt)]
        message = Generate(name, ids, Sampling(max_tokens=1))
        scheduler.add(share(Request.of(message, eos_token_ids=(), seed=0, received_at=0.0)))
        return str(step(scheduler)[0]).split(": ", 2)[2]

    run("old", 1000, 12)
    run("young", 2000, 12)
    assert scheduler.pool.num_idle == 6
    run("big", 3000, 15)
    assert run("again", 2000, 13) == "again[12:13]*", "the younger chain is whole"
    assert run("first", 1000, 13) == "first[4:13]*", "of the older one its end has gone"


def test_windows_free_what_lies_before_them() -> None:
    pool = BlockPool(10, 4, (None, 6))
    scheduler = Scheduler(pool, BatchLimits(4, 8, True), max_model_len=64, clock=lambda: 0.0)
    scheduler.add(make_request("a", 14, 6))
    for _ in range(5):
        step(scheduler)
    (request,) = scheduler.running
    full, sliding = request.tables
    assert GONE not in full
    assert len(full) == len(sliding) == 5
    assert sliding[:2] == [GONE, GONE], "token 16 looks back to token 11"
    assert GONE not in sliding[2:]
    with pytest.raises(RequestRefused, match="needs room for 40 tokens; the whole KV cache holds 20"):
        scheduler.add(make_request("b", 20, 21))
