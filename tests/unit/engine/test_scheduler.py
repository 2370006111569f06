"""The scheduler without a model: scripted tokens, a pretend cache, and a machine that tries every order of events.

Every request has a script: the token it draws at a position is a fixed function of its number and the position.
The pretend cache is a table from slot to what a plan wrote there; a plan may only be carried out if each of its
items finds all its earlier tokens where its block table says they are. Lost, doubled or swapped blocks show.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.effort import EFFORT, times

from quire_engine.blocks import GONE, BlockPool, Tables
from quire_engine.config import BatchLimits
from quire_engine.errors import EngineError, InvariantBroken, RequestRefused
from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_engine.step import PENDING, StepPlan, StepResult, resolve
from quire_schemas.wire import Delta, Generate, Sampling

EOS = 7


def make_scheduler(
    *,
    num_blocks: int = 8,
    block_size: int = 4,
    max_num_seqs: int = 4,
    budget: int = 16,
    chunked: bool = True,
    max_model_len: int = 64,
) -> Scheduler:
    pool = BlockPool(num_blocks, block_size)
    limits = BatchLimits(max_num_seqs, budget, chunked)
    return Scheduler(pool, limits, max_model_len=max_model_len, clock=lambda: 0.0)


def make_request(name: str, prompt: int, max_tokens: int, **fields: Any) -> Request:
    message = Generate(name, [100 + i for i in range(prompt)], Sampling(max_tokens=max_tokens, **fields))
    return Request.of(message, eos_token_ids=(EOS,), seed=0, received_at=0.0)


def scripted(plan: StepPlan, token: int = 50) -> StepResult:
    """Every draw of `plan` gives `token`."""
    return StepResult({item.request_id: token for item in plan.items if item.draw is not None})


def step(scheduler: Scheduler, token: int = 50) -> tuple[StepPlan, list[Delta]]:
    plan = scheduler.schedule()
    deltas = scheduler.commit(plan, scripted(plan, token))
    scheduler.check_integrity()
    return plan, deltas


# ── examples that say what is meant ───────────────────────────────────────────────────────────────────────


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


def test_running_requests_come_first_and_prompts_fill_the_rest_of_the_budget() -> None:
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_request("a", prompt=3, max_tokens=9))
    step(scheduler)
    scheduler.add(make_request("b", prompt=12, max_tokens=2))
    scheduler.add(make_request("c", prompt=2, max_tokens=2))
    assert str(step(scheduler)[0]) == "step 1: 8 tokens: a[3:4]* b[0:7]"
    assert str(step(scheduler)[0]) == "step 2: 8 tokens: a[4:5]* b[7:12]* c[0:2]*"


def test_without_chunks_a_prompt_goes_whole_or_waits() -> None:
    scheduler = make_scheduler(budget=8, chunked=False)
    scheduler.add(make_request("a", prompt=5, max_tokens=3))
    scheduler.add(make_request("b", prompt=6, max_tokens=2))
    assert str(step(scheduler)[0]) == "step 0: 5 tokens: a[0:5]*"
    assert str(step(scheduler)[0]) == "step 1: 7 tokens: a[5:6]* b[0:6]*"


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


def share(request: Request, kin: str = "all") -> Request:
    request.share_with(kin)
    return request


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


# ── every order of events ─────────────────────────────────────────────────────────────────────────────────

CONTEXT = 30
ALPHABET = 5
"""Few tokens, so that requests begin alike."""


def digest(before: int, token: int) -> int:
    """What keys and values of a token are a function of: all tokens up to it, and who may share them."""
    return hash((before, token))


@dataclass
class Life:
    """One request: what it was asked, all that it will say, and what its cache must hold at each position."""

    name: str
    number: int
    prompt: list[int]
    max_tokens: int
    seed: int
    priority: int
    tokens: list[int] = field(default_factory=list)
    """Prompt and answer, and what would follow its end: a step that was planned ahead draws it in vain."""
    contents: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        before = 0
        self.tokens = list(self.prompt)
        for position in range(len(self.prompt) + self.max_tokens):
            if position >= len(self.prompt):
                self.tokens.append(draw_at(before, self.seed))
            before = digest(before, self.tokens[position])
            self.contents.append(before)


def draw_at(content: int, seed: int) -> int:
    """The pretend model: what follows a prefix depends on it and on the seed, and is an end once in a while."""
    number = hash((content, seed)) % 31
    return EOS if number == 0 else number % ALPHABET


class World(RuleBasedStateMachine):
    """A scheduler, a twin that is told the same, a pretend cache, and what each request will say.

    The cache is a table from slot to content. A plan may only be carried out if each of its items finds all the
    tokens it looks back on where its tables say they are. Half of the worlds plan a step ahead, as
    `Engine._step_ahead` does.
    """

    pool_class: type[BlockPool] = BlockPool
    scheduler_class: type[Scheduler] = Scheduler

    @initialize(
        num_blocks=st.integers(3, 12),
        block_size=st.sampled_from([1, 2, 4]),
        windows=st.sampled_from([(None,), (None,), (None, 3), (2,), (None, None, 5)]),
        limits=st.builds(
            BatchLimits,
            st.integers(1, 5),
            st.integers(1, 16),
            st.booleans(),
            st.sampled_from(["fcfs", "priority"]),
            st.none() | st.integers(0, 5),
        ),
        sharing=st.sampled_from(["nobody", "all", "families"]),
        ahead=st.booleans(),
    )
    def build(
        self,
        num_blocks: int,
        block_size: int,
        windows: tuple[int | None, ...],
        limits: BatchLimits,
        sharing: str,
        ahead: bool,
    ) -> None:
        def make() -> Scheduler:
            pool = self.pool_class(num_blocks, block_size, windows)
            return self.scheduler_class(pool, limits, max_model_len=CONTEXT, clock=lambda: 0.0)

        self.scheduler, self.twin = make(), make()
        self.widest = limits.max_num_batched_tokens
        self.sharing, self.ahead, self.by_arrival = sharing, ahead, limits.policy == "fcfs"
        self.cache: dict[tuple[int, int], int] = {}
        self.lives: dict[str, Life] = {}
        self.tickets: dict[int, Life] = {}
        self.arrivals = 0
        self.plan: StepPlan | None = None
        self.result = StepResult({})
        self.drawn = self.lost = self.now = 0

    # rules

    @rule(
        name=st.sampled_from("abcde"),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        max_tokens=st.integers(1, 20),
        seed=st.integers(0, 2),
        priority=st.integers(-1, 1),
        kin=st.sampled_from(["x", "x", "y"]),
        lasts=st.none() | st.integers(1, 40),
    )
    def add(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int,
        seed: int,
        priority: int,
        kin: str,
        lasts: int | None,
    ) -> None:
        pool, limits = self.scheduler.pool, self.scheduler.limits
        cached = len(prompt) + max_tokens - 1
        possible = cached < CONTEXT and pool.most_held(cached, self.widest) <= pool.num_blocks
        full = limits.max_waiting is not None and len(self.lives) >= limits.max_num_seqs + limits.max_waiting
        for scheduler in (self.scheduler, self.twin):
            sampling = Sampling(max_tokens=max_tokens, seed=seed)
            message = Generate(name, list(prompt), sampling, priority=priority, timeout=lasts)
            request = Request.of(message, eos_token_ids=(EOS,), seed=seed, received_at=self.now)
            if self.sharing == "all" or (self.sharing == "families" and kin == "x"):
                request.share_with(kin)
            try:
                scheduler.add(request)
                accepted = True
            except RequestRefused:
                accepted = False
            assert accepted == (possible and not full and name not in self.lives)  # I8
        if accepted:
            self.arrivals += 1
            self.lives[name] = Life(name, self.arrivals, prompt, max_tokens, seed, priority)

    @rule(name=st.sampled_from("abcde"))
    def abort(self, name: str) -> None:
        for scheduler in (self.scheduler, self.twin):
            assert scheduler.abort(name) == (name in self.lives)  # I10
            assert not scheduler.abort(name)
        self.lives.pop(name, None)

    @rule(seconds=st.integers(1, 15))
    def expire(self, seconds: int) -> None:
        self.now += seconds
        deadlines = {r.id for r in self._requests() if r.deadline is not None and r.deadline <= self.now}
        deltas = self.scheduler.expire(self.now)
        assert deltas == self.twin.expire(self.now)
        assert {delta.id for delta in deltas} == deadlines
        for delta in deltas:
            assert (delta.finish_reason, delta.error_code) == ("error", "timeout")
            del self.lives[delta.id]

    @precondition(lambda self: self.plan is None or self.ahead)
    @rule(
        seats=st.integers(1, 5),
        budget=st.integers(1, 12),
        chunked=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
    )
    def set_limits(self, seats: int, budget: int, chunked: bool, policy: Any) -> None:
        self.by_arrival &= policy == "fcfs"
        for scheduler in (self.scheduler, self.twin):
            scheduler.set_limits(BatchLimits(seats, budget, chunked, policy))

    @precondition(lambda self: self.plan is None and self.lives and not self.ahead)
    @rule(failing=st.sets(st.sampled_from("abcde"), max_size=1))
    def begin(self, failing: set[str]) -> None:
        self.plan = self._decide()
        assert self.plan.items, "work and no progress"  # I7
        self.result = self._execute(self.plan, failing)

    @precondition(lambda self: self.plan is not None and not self.ahead)
    @rule()
    def finish(self) -> None:
        plan, self.plan = self.plan, None
        assert plan is not None
        self._take_over(plan, self.result)

    @precondition(lambda self: (self.plan is not None or self.lives) and self.ahead)
    @rule(failing=st.sets(st.sampled_from("abcde"), max_size=1))
    def step_ahead(self, failing: set[str]) -> None:
        done, result = self.plan, self.result
        plan = self._decide()
        assert plan.items or done is not None, "work and no progress"  # I7
        self.plan = None
        if plan.items:
            self.plan = plan
            self.result = self._execute(resolve(plan, {} if done is None else result.tokens), failing)
        if done is not None:
            self._take_over(done, result)

    @precondition(lambda self: self.plan is None and self.lives and not self.ahead)
    @rule(times=st.integers(1, 5))
    def steps(self, times: int) -> None:
        for _ in range(times):
            if self.lives:
                self.begin(set())
                self.finish()
                self.books_balance()

    # what must always hold

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler, pool = self.scheduler, self.scheduler.pool
        requests = self._requests()
        assert {request.id for request in requests} == set(self.lives)
        held = Counter(
            block for request in requests for table in request.tables for block in table if block != GONE
        )
        assert len(held) == pool.num_used  # I1, I18
        assert pool.num_used + pool.num_free == pool.num_blocks  # I1
        assert all(0 <= block < pool.num_blocks for block in held)  # I17
        scheduler.check_integrity()  # I2, I3, I4
        for request in requests:
            assert request.num_planned <= request.num_known + request.num_drawing  # I6
            assert request.token_ids[request.num_prompt :] == self.lives[request.id].said
            for table in request.tables:
                for block in table[request.num_planned // pool.block_size :]:
                    assert held[block] == 1, "what is being written is nobody else's"  # I3
        if self.by_arrival and self.sharing == "nobody":
            numbers = [self.lives[request.id].number for request in requests]
            assert numbers == sorted(numbers), "first come, first served"  # I7
        if not self.ahead:
            tokens = sum(request.num_computed for request in scheduler.running)
            if self.sharing == "nobody" and pool.windows == (None,):
                assert scheduler.slots_used == tokens  # I18
            assert 0 <= scheduler.slots_used <= pool.num_used * pool.block_size
        assert scheduler.counters.generation_tokens == self.drawn  # I18
        assert scheduler.counters.preemptions == self.lost  # I18

    def teardown(self) -> None:
        """I7, I9, I14: with nobody new, all end within as many steps as there are tokens, and nothing is left."""
        if not hasattr(self, "scheduler"):
            return
        if self.plan is not None and not self.ahead:
            self.finish()
            self.books_balance()
        for _ in range(8 + 2 * sum(len(life.prompt) + life.max_tokens for life in self.lives.values())):
            if self.ahead and (self.lives or self.plan is not None):
                self.step_ahead(set())
                self.books_balance()
            elif not self.ahead:
                self.steps(1)
        assert not self.lives, "starved"
        assert not self.scheduler.has_work
        assert self.scheduler.pool.num_used == 0
        assert not self.scheduler._coming

    # the pretend model

    def _requests(self) -> list[Request]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def _decide(self) -> StepPlan:
        scheduler = self.scheduler
        before = set(scheduler.running)
        plan = scheduler.schedule()
        assert plan == self.twin.schedule()  # I16
        self.lost += len(plan.preempted)
        limits = scheduler.limits
        assert plan.num_tokens <= limits.max_num_batched_tokens or (
            not limits.chunked_prefill and len(plan.items) == 1
        )  # I5
        assert set(scheduler.running) <= before or len(scheduler.running) <= limits.max_num_seqs  # I5
        assert {item.request_id for item in plan.items}.isdisjoint(plan.preempted)
        for item in plan.items:
            self.tickets[item.ticket] = self.lives[item.request_id]
        return plan

    def _execute(self, plan: StepPlan, failing: set[str]) -> StepResult:
        """Carry out `plan` on the pretend cache: reads first find their past, then every slot is written once."""
        pool = self.scheduler.pool
        size = pool.block_size
        written: set[tuple[int, int]] = set()
        tokens: dict[str, int] = {}
        for item in plan.items:
            life = self.tickets[item.ticket]
            assert list(item.token_ids) == life.tokens[item.start : item.end]
            for group, (table, window) in enumerate(zip(item.tables, pool.windows, strict=True)):
                assert len(table) == -(-item.end // size)  # I17
                seen = 0 if window is None else max(0, item.start - window + 1)
                for position in range(seen, item.end):
                    block = table[position // size]
                    assert block != GONE
                    slot = (block, position % size)
                    if position < item.start:
                        found = self.cache.get(slot)
                        assert found == life.contents[position] * (group + 1), (
                            "the past is not where the table says"
                        )
                    else:
                        assert slot not in written  # I13
                        written.add(slot)
                        self.cache[slot] = life.contents[position] * (group + 1)
            if item.draw is not None and item.request_id not in failing:
                tokens[item.request_id] = life.tokens[item.end]
        return StepResult(tokens, failures=dict.fromkeys(failing, ("numerical_error", "scripted")))

    def _take_over(self, plan: StepPlan, result: StepResult) -> None:
        live = dict(self.lives)
        deltas = self.scheduler.commit(plan, result)
        assert deltas == self.twin.commit(plan, result)  # I16
        assert len({delta.id for delta in deltas}) == len(deltas)
        for delta in deltas:
            assert delta.id in live, "output after abort"  # I10
            self._hear(live[delta.id], delta, result)

    def _hear(self, life: Life, delta: Delta, result: StepResult) -> None:
        if delta.finish_reason == "error":
            assert delta.id in result.failures  # I15
            del self.lives[life.name]
            return
        assert delta.id not in result.failures
        self.drawn += 1
        expected = life.tokens[len(life.prompt) + len(life.said)]
        life.said += delta.token_ids
        if expected == EOS:
            assert (delta.finish_reason, delta.stop_token_id, delta.token_ids) == ("stop", EOS, ())
        else:
            assert delta.token_ids == (expected,)  # I11: the same tokens, preempted or not, shared or not
            assert (delta.finish_reason == "length") == (len(life.said) == life.max_tokens)
        if delta.finish_reason is not None:
            assert delta.timings is not None
            del self.lives[life.name]


QUICK = settings(
    max_examples=times(300, 10_000),
    stateful_step_count=50,
    deadline=None,
    derandomize=EFFORT == 1,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_no_order_of_events_breaks_an_invariant() -> None:
    run_state_machine_as_test(World, settings=QUICK)


# ── and the machine sees what it should ───────────────────────────────────────────────────────────────────


class LeakyPool(BlockPool):
    """Forgets the last block of a table that has three."""

    __slots__ = ()

    def release(self, tables: Tables) -> None:
        if len(tables[0]) == 3:
            tables[0].pop()
        super().release(tables)


class TwiceMintingPool(BlockPool):
    """Puts a block on the free list before its last table has let go of it."""

    __slots__ = ()

    def grow(self, tables: Tables, num_tokens: int) -> bool:
        grown = super().grow(tables, num_tokens)
        if grown and len(tables[0]) == 4:
            self._blank.append(tables[0][0])
        return grown


class ForgetfulPool(BlockPool):
    """Hands an idle block out again and still knows it by what was in it before."""

    __slots__ = ()

    def _mint(self) -> int:
        if not self._blank:
            block = next(iter(self._idle))
            sealed = self._sealed[block]
            minted = super()._mint()
            if sealed is not None:
                sealed[0][sealed[1]] = minted
            return minted
        return super()._mint()


class ShortSightedPool(BlockPool):
    """Lets go of one block more than the window has passed."""

    __slots__ = ()

    def trim(self, tables: Tables, position: int) -> None:
        super().trim(tables, position + self.block_size)


class StalePreemption(Scheduler):
    """Takes a victim's blocks and still believes its tokens are computed."""

    def _preempt(self, victim: Request) -> None:
        computed = victim.num_computed
        super()._preempt(victim)
        victim.num_planned = victim.num_computed = min(computed, 1)


class OldestFirstVictim(Scheduler):
    """Takes room from the first request: who came first may never end."""

    def _make_room(self, request: Request, num_tokens: int, preempted: list[str]) -> bool:
        self.running.reverse()
        try:
            return super()._make_room(request, num_tokens, preempted)
        finally:
            self.running.reverse()


class DeafAbort(Scheduler):
    """Lets an aborted request run on if it is in the step that is being computed."""

    def commit(self, plan: StepPlan, result: StepResult) -> list[Delta]:
        deltas = super().commit(plan, result)
        heard = {delta.id for delta in deltas}
        late = [item.request_id for item in plan.items if item.draw and item.request_id not in heard]
        return deltas + [Delta(name, (result.tokens[name],)) for name in late if name in result.tokens]


class GreedySharer(Scheduler):
    """Takes a prompt that is wholly there as computed: nothing is left whose logits would be drawn from."""

    def _cached_prefix(self, request: Request) -> list[bytes] | None:
        size = self.pool.block_size
        digests = request.chain_of(request.num_known // size, size)
        return digests[: self.pool.match(digests)]


class HastySeal(Scheduler):
    """Lets others find a block before it is full."""

    def _seal(self, request: Request) -> None:
        request.num_computed += 1
        super()._seal(request)
        request.num_computed -= 1


MUTANTS = (
    LeakyPool, TwiceMintingPool, ForgetfulPool, ShortSightedPool, StalePreemption, OldestFirstVictim, DeafAbort,
    GreedySharer, HastySeal,
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_machine_catches_a_planted_fault(mutant: type, capsys: pytest.CaptureFixture[str]) -> None:
    part = "pool_class" if issubclass(mutant, BlockPool) else "scheduler_class"
    planted: type[RuleBasedStateMachine] = type(f"With{mutant.__name__}", (World,), {part: mutant})
    quick = settings(QUICK, phases=[Phase.generate])
    with pytest.raises((AssertionError, EngineError)):
        run_state_machine_as_test(planted, settings=quick)
    capsys.readouterr()


def test_nothing_to_compute_for_live_requests_is_an_error_and_not_a_spin() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    scheduler.add(make_request("a", 4, 2))
    scheduler.pool.grow([[]], 8)  # blocks that no request owns
    with pytest.raises(InvariantBroken, match="nothing to compute"):
        scheduler.schedule()
