"""The scheduler without a model: one request's way from its prompt to its end, and who is refused."""

from __future__ import annotations

import pytest
from tests.unit.engine.scheduling import EOS, make_request, make_scheduler, scripted, step

from quire_engine.config import BatchLimits
from quire_engine.errors import InvariantBroken, RequestRefused
from quire_engine.request import Request
from quire_engine.step import StepResult
from quire_schemas.wire import Generate, Sampling


def test_one_counter_takes_a_request_from_prompt_to_end() -> None:
    scheduler = make_scheduler(budget=6)
    scheduler.add(make_request("a", prompt=10, max_tokens=3))
    plan, deltas = step(scheduler)
    assert str(plan) == "step 0: 6 tokens: a[0:6]"
    assert deltas == []
    plan, deltas = step(scheduler)
    assert str(plan) == "step 1: 4 tokens: a[6:10]*"
    assert [d.token_ids for d in deltas] == [(50,)]
    step(scheduler)
    plan, deltas = step(scheduler)
    assert str(plan) == "step 3: 1 tokens: a[11:12]*"
    assert deltas[0].finish_reason == "length"
    assert deltas[0].timings is not None
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0


def test_without_chunks_a_prompt_goes_whole_or_waits() -> None:
    scheduler = make_scheduler(budget=8, chunked=False)
    scheduler.add(make_request("a", prompt=5, max_tokens=3))
    scheduler.add(make_request("b", prompt=6, max_tokens=2))
    assert str(step(scheduler)[0]) == "step 0: 5 tokens: a[0:5]*"
    assert str(step(scheduler)[0]) == "step 1: 7 tokens: a[5:6]* b[0:6]*"


def test_who_writes_waits_for_no_more_of_a_prompt_than_the_limit_says() -> None:
    scheduler = make_scheduler(num_blocks=30, budget=16, prompts=4)

    def parts() -> dict[str, int]:
        plan, _ = step(scheduler)
        return {item.request_id: item.end - item.start for item in plan.items}

    scheduler.add(make_request("a", 14, 9))
    scheduler.add(make_request("b", 10, 5))
    assert parts() == {"a": 14, "b": 2}, "nobody writes yet"
    scheduler.add(make_request("c", 7, 5))
    assert parts() == {"a": 1, "b": 4}
    assert parts() == {"a": 1, "b": 4}
    assert parts() == {"a": 1, "b": 1, "c": 4}
    assert parts() == {"a": 1, "b": 1, "c": 3}
    assert parts() == {"a": 1, "b": 1, "c": 1}
    scheduler.set_limits(BatchLimits(4, 16, True))
    scheduler.add(make_request("d", 9, 1))
    assert parts() == {"a": 1, "b": 1, "c": 1, "d": 9}


def test_one_token_of_prompts_is_one_for_all_of_them_together() -> None:
    scheduler = make_scheduler(num_blocks=40, max_num_seqs=8, budget=16, prompts=1)
    scheduler.add(make_request("a", 4, 30))
    step(scheduler)
    for name in "bcdef":
        scheduler.add(make_request(name, 9, 5))
    for _ in range(6):
        plan, _ = step(scheduler)
        assert sum(item.end - item.start for item in plan.items if item.request_id != "a") == 1


def test_who_has_drawn_its_last_token_holds_up_no_prompt() -> None:
    scheduler = make_scheduler(num_blocks=30, budget=16, prompts=4)
    scheduler.add(make_request("a", 14, 1))
    first = scheduler.schedule()
    scheduler.add(make_request("b", 10, 1))
    second = scheduler.schedule()
    assert [item.end for item in second.items] == [10]
    for plan in (first, second):
        scheduler.commit(plan, scripted(plan))
    assert not scheduler.has_work


def test_without_chunks_a_prompt_above_the_budget_goes_alone() -> None:
    scheduler = make_scheduler(budget=8, chunked=False)
    scheduler.add(make_request("a", prompt=2, max_tokens=2))
    scheduler.add(make_request("big", prompt=12, max_tokens=1))
    scheduler.add(make_request("c", prompt=2, max_tokens=1))
    plans = []
    while scheduler.has_work:
        plans.append(str(step(scheduler)[0]))
    assert plans == [
        "step 0: 2 tokens: a[0:2]*",
        "step 1: 1 tokens: a[2:3]*",
        "step 2: 12 tokens: big[0:12]*",
        "step 3: 2 tokens: c[0:2]*",
    ]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "refused"),
    [(60, 4, False), (60, 5, True), (64, 1, True), (63, 1, False), (1, 63, False), (1, 64, True)],
)
def test_a_request_above_the_context_is_refused_by_name(prompt: int, max_tokens: int, refused: bool) -> None:
    scheduler = make_scheduler(num_blocks=100, max_model_len=64)
    request = make_request("a", prompt, max_tokens)
    if not refused:
        return scheduler.add(request)
    with pytest.raises(RequestRefused, match=f"make {prompt + max_tokens}, above the context of 64") as error:
        scheduler.add(request)
    assert error.value.code == "context_length_exceeded"
    assert not scheduler.has_work


def test_a_request_above_the_whole_pool_is_refused_and_never_waits() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(make_request("fits", prompt=10, max_tokens=7))  # 16 tokens are ever cached
    with pytest.raises(RequestRefused, match="needs room for 17 tokens; the whole KV cache holds 16") as error:
        scheduler.add(make_request("large", prompt=10, max_tokens=8))
    assert error.value.code == "context_length_exceeded"
    assert [request.id for request in scheduler.waiting] == ["fits"]


def test_a_second_live_request_of_the_same_id_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 2, 2))
    with pytest.raises(RequestRefused, match="still live"):
        scheduler.add(make_request("a", 3, 2))


def test_stop_ids_end_the_text_and_are_not_part_of_it() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("eos", 2, 9))
    scheduler.add(make_request("deaf", 2, 9, ignore_eos=True))
    scheduler.add(make_request("own", 2, 9, ignore_eos=True, stop_token_ids=(EOS, 9)))
    deltas = {delta.id: delta for delta in step(scheduler, token=EOS)[1]}
    for name in ("eos", "own"):
        assert deltas[name].finish_reason == "stop"
        assert deltas[name].stop_token_id == EOS
        assert deltas[name].token_ids == ()
    assert deltas["deaf"].token_ids == (EOS,)
    assert deltas["deaf"].finish_reason is None


def test_the_draw_carries_history_only_for_penalties() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("plain", 3, 9, temperature=0.0))
    scheduler.add(make_request("penalised", 3, 9, frequency_penalty=0.5))
    step(scheduler)
    plan = scheduler.schedule()
    histories = {item.request_id: item.history for item in plan.items}
    assert histories == {"plain": (), "penalised": (100, 101, 102, 50)}
    assert [item.draw is not None and item.draw.is_plain for item in plan.items] == [True, False]


def test_deadlines_end_requests_wherever_they_are() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, seconds in (("running", 5.0), ("waiting", 7.0), ("patient", None)):
        message = Generate(name, [1, 2], Sampling(max_tokens=9), timeout=seconds)
        scheduler.add(Request.of(message, eos_token_ids=(), seed=0, received_at=100.0))
    step(scheduler)
    assert scheduler.expire(104.9) == []
    (delta,) = scheduler.expire(105.0)
    assert (delta.id, delta.finish_reason, delta.error_code) == ("running", "error", "timeout")
    assert [d.id for d in scheduler.expire(1e9)] == ["waiting"]
    assert [d.id for d in step(scheduler)[1]] == ["patient"]


def test_a_failing_request_ends_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("good", 3, 4))
    scheduler.add(make_request("bad", 3, 4))
    plan = scheduler.schedule()
    deltas = scheduler.commit(plan, StepResult({"good": 50}, failures={"bad": ("numerical_error", "not finite")}))
    assert [(d.id, d.finish_reason, d.error_code) for d in deltas] == [
        ("good", None, None),
        ("bad", "error", "numerical_error"),
    ]
    scheduler.check_integrity()
    assert [request.id for request in scheduler.running] == ["good"]


def test_nothing_to_compute_for_live_requests_is_an_error_and_not_a_spin() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    scheduler.add(make_request("a", 4, 2))
    scheduler.pool.grow([[]], 8)  # blocks that no request owns
    with pytest.raises(InvariantBroken, match="nothing to compute"):
        scheduler.schedule()
