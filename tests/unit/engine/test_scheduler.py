"""The scheduler without a model: scripted tokens, a pretend cache, and a machine that tries every order of events.

Every request has a script: the token it draws at a position is a fixed function of its number and the position.
The pretend cache is a table from slot to what a plan wrote there; a plan may only be carried out if each of its
items finds all its earlier tokens where its block table says they are. Lost, doubled or swapped blocks show.
"""

from __future__ import annotations

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
from tests.effort import EFFORT, examples

from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
from quire_engine.errors import EngineError, InvariantBroken, RequestRefused
from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_engine.step import StepPlan, StepResult
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
    assert [d.token_ids for d in deltas] == [[50]]
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
        assert deltas[name].token_ids == []
    assert deltas["deaf"].token_ids == [EOS]
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
    assert list(scheduler.running) == ["good"]


def test_fewer_seats_let_nobody_in_until_enough_have_left() -> None:
    scheduler = make_scheduler(num_blocks=32, max_num_seqs=4)
    for name in "abcdef":
        scheduler.add(make_request(name, 2, 2 if name < "d" else 6))
    step(scheduler)
    scheduler.limits = BatchLimits(2, 16, True)
    plan, _ = step(scheduler)
    assert [item.request_id for item in plan.items] == ["a", "b", "c", "d"]
    plan, _ = step(scheduler)
    assert [item.request_id for item in plan.items] == ["d", "e"]


# ── every order of events ─────────────────────────────────────────────────────────────────────────────────


class World(RuleBasedStateMachine):
    """A scheduler, a twin that is told the same, the pretend cache, and what each request has said so far."""

    pool_class: type[BlockPool] = BlockPool
    scheduler_class: type[Scheduler] = Scheduler

    @initialize(
        num_blocks=st.integers(2, 9),
        block_size=st.sampled_from([1, 2, 4]),
        seats=st.integers(1, 5),
        budget=st.integers(1, 16),
        chunked=st.booleans(),
    )
    def build(self, num_blocks: int, block_size: int, seats: int, budget: int, chunked: bool) -> None:
        def make() -> Scheduler:
            return self.scheduler_class(
                self.pool_class(num_blocks, block_size),
                BatchLimits(seats, budget, chunked),
                max_model_len=30,
                clock=lambda: 0.0,
            )

        self.scheduler, self.twin = make(), make()
        self.cache: dict[int, tuple[int, int, int]] = {}
        self.number: dict[str, int] = {}  # of live requests, by arrival
        self.said: dict[str, list[int]] = {}
        self.size: dict[str, tuple[int, int]] = {}
        self.arrivals = 0
        self.plan: StepPlan | None = None
        self.drawn = 0
        self.lost = 0

    # rules

    @rule(name=st.sampled_from("abcdefgh"), prompt=st.integers(1, 8), max_tokens=st.integers(1, 20))
    def add(self, name: str, prompt: int, max_tokens: int) -> None:
        pool = self.scheduler.pool
        possible = prompt + max_tokens <= 30 and prompt + max_tokens - 1 <= pool.num_blocks * pool.block_size
        waiting = len(self.scheduler.waiting)
        for scheduler in (self.scheduler, self.twin):
            try:
                scheduler.add(make_request(name, prompt, max_tokens))
                accepted = True
            except RequestRefused:
                accepted = False
            assert accepted == (possible and name not in self.number)  # I8
        if not accepted:
            assert len(self.scheduler.waiting) == waiting
            return
        self.arrivals += 1
        self.number[name] = self.arrivals
        self.said[name] = []
        self.size[name] = (prompt, max_tokens)

    @rule(name=st.sampled_from("abcdefgh"))
    def abort(self, name: str) -> None:
        for scheduler in (self.scheduler, self.twin):
            assert scheduler.abort(name) == (name in self.number)  # I10
            assert not scheduler.abort(name)
        self._forget(name)

    @precondition(lambda self: self.plan is None)
    @rule(seats=st.integers(1, 5), budget=st.integers(1, 12), chunked=st.booleans())
    def set_limits(self, seats: int, budget: int, chunked: bool) -> None:
        self.scheduler.limits = self.twin.limits = BatchLimits(seats, budget, chunked)

    @precondition(lambda self: self.plan is None and self.number)
    @rule()
    def begin(self) -> None:
        before = set(self.scheduler.running)
        computed = {name: request.num_computed for name, request in self.scheduler.running.items()}
        self.plan = self.scheduler.schedule()
        assert self.plan == self.twin.schedule()  # I16
        self.lost += len(self.plan.preempted)
        limits = self.scheduler.limits
        assert self.plan.items, "work and no progress"  # I7
        assert self.plan.num_tokens <= limits.max_num_batched_tokens or (
            not limits.chunked_prefill and len(self.plan.items) == 1
        )  # I5
        new = set(self.scheduler.running) - before
        assert not new or len(self.scheduler.running) <= limits.max_num_seqs  # I5
        planned = {item.request_id for item in self.plan.items}
        assert planned.isdisjoint(self.plan.preempted)
        for item in self.plan.items:
            assert item.start == computed.get(item.request_id, 0)  # I6
        self._write(self.plan)

    @precondition(lambda self: self.plan is not None)
    @rule(failing=st.sets(st.sampled_from("abcdefgh"), max_size=1))
    def finish(self, failing: set[str]) -> None:
        plan, self.plan = self.plan, None
        assert plan is not None
        result = StepResult(
            {i.request_id: self._script(i.request_id, i.end) for i in plan.items if i.draw is not None},
            failures=dict.fromkeys(failing, ("numerical_error", "scripted")),
        )
        live = set(self.number)
        deltas = self.scheduler.commit(plan, result)
        assert deltas == self.twin.commit(plan, result)  # I16
        assert len({delta.id for delta in deltas}) == len(deltas)
        for delta in deltas:
            assert delta.id in live, "output after abort"  # I10
            self._hear(delta, failing)

    @precondition(lambda self: self.plan is None and self.number)
    @rule(times=st.integers(1, 5))
    def steps(self, times: int) -> None:
        for _ in range(times):
            if self.number:
                self.begin()
                self.finish(set())
                self.books_balance()

    # what must always hold

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler, pool = self.scheduler, self.scheduler.pool
        requests = [*scheduler.running.values(), *scheduler.waiting]
        assert {request.id for request in requests} == set(self.number)
        tables = [request.block_ids for request in requests]
        used = [block for table in tables for block in table]
        assert len(set(used)) == len(used) == pool.num_used  # I1, I2, I3, I18
        assert all(0 <= block < pool.num_blocks for block in used)  # I17
        pool.check_integrity(tables)
        if self.plan is None:
            scheduler.check_integrity()
        for request in requests:
            assert request.num_computed < request.num_known  # I6
            assert request.token_ids[request.num_prompt :] == self.said[request.id]
        arrivals = [self.number[request.id] for request in requests]
        assert arrivals == sorted(arrivals), "first come, first served"  # I7
        assert scheduler.slots_used == sum(request.num_computed for request in requests)  # I18
        assert scheduler.counters.generation_tokens == self.drawn  # I18
        assert scheduler.counters.preemptions == self.lost  # I18

    def teardown(self) -> None:
        """I7, I9, I14: with nobody new, all end within as many steps as there are tokens, and nothing is left."""
        if not hasattr(self, "scheduler"):
            return
        if self.plan is not None:
            self.finish(set())
            self.books_balance()
        for _ in range(sum(prompt + output for prompt, output in (self.size[name] for name in self.number))):
            if not self.number:
                break
            self.steps(1)
        assert not self.number, "starved"
        assert not self.scheduler.has_work
        assert self.scheduler.pool.num_used == 0

    # the pretend model

    def _script(self, name: str, position: int) -> int:
        """What the request draws at `position`: an end about once in thirty, else a token of its own."""
        number = self.number.get(name, 0)
        return EOS if (number * 31 + position * 17) % 29 == 0 else 1000 + (number * 131 + position * 7) % 997

    def _write(self, plan: StepPlan) -> None:
        """Carry out `plan` on the pretend cache: reads first find their past, then every slot is written once."""
        size = self.scheduler.pool.block_size
        written: set[int] = set()
        for item in plan.items:
            number = self.number[item.request_id]
            known = self.scheduler.running[item.request_id].token_ids
            assert list(item.token_ids) == known[item.start : item.end]
            assert len(item.block_ids) == -(-item.end // size)  # I17
            assert (item.draw is not None) == (item.end == len(known))
            slots = [item.block_ids[p // size] * size + p % size for p in range(item.end)]
            for position in range(item.start):
                expected = (number, position, known[position])
                assert self.cache.get(slots[position]) == expected, "the past is not where the table says"
            for position in range(item.start, item.end):
                assert slots[position] not in written  # I13
                written.add(slots[position])
                self.cache[slots[position]] = (number, position, known[position])

    def _hear(self, delta: Delta, failing: set[str]) -> None:
        if delta.finish_reason == "error":
            assert delta.id in failing  # I15
            return self._forget(delta.id)
        assert delta.id not in failing
        prompt, max_tokens = self.size[delta.id]
        token = self._script(delta.id, prompt + len(self.said[delta.id]))
        self.drawn += 1
        self.said[delta.id] += delta.token_ids
        if token == EOS:
            assert (delta.finish_reason, delta.stop_token_id, delta.token_ids) == ("stop", EOS, [])
        else:
            assert delta.token_ids == [token]  # I11: the same tokens, preempted or not
            assert (delta.finish_reason == "length") == (len(self.said[delta.id]) == max_tokens)
        if delta.finish_reason is not None:
            assert delta.timings is not None
            self._forget(delta.id)
        return None

    def _forget(self, name: str) -> None:
        for book in (self.number, self.said, self.size):
            book.pop(name, None)


QUICK = settings(
    max_examples=examples(200),
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

    def release(self, table: list[int]) -> None:
        if len(table) == 3:
            table.pop()
        super().release(table)


class TwiceMintingPool(BlockPool):
    """Puts a block on the free list before its last table has let go of it."""

    __slots__ = ()

    def grow(self, table: list[int], num_tokens: int) -> bool:
        grown = super().grow(table, num_tokens)
        if grown and len(table) == 4:
            self._free.append(table[0])
        return grown


class StalePreemption(Scheduler):
    """Takes a victim's blocks and still believes its tokens are computed."""

    def _preempt(self, victim: Request) -> None:
        computed = victim.num_computed
        super()._preempt(victim)
        victim.num_computed = min(computed, 1)


class OldestFirstVictim(Scheduler):
    """Takes room from the oldest request: who came first may never end."""

    def _make_room(self, request: Request, num_tokens: int, preempted: list[str]) -> bool:
        while not self.pool.grow(request.block_ids, num_tokens):
            victim = next(iter(self.running.values()))
            self._preempt(victim)
            preempted.append(victim.id)
            if victim is request:
                return False
        return True


class DeafAbort(Scheduler):
    """Lets an aborted request run on if it is in the step that is being computed."""

    def commit(self, plan: StepPlan, result: StepResult) -> list[Delta]:
        deltas = super().commit(plan, result)
        heard = {delta.id for delta in deltas}
        late = [item.request_id for item in plan.items if item.draw and item.request_id not in heard]
        return deltas + [Delta(name, [result.tokens[name]]) for name in late if name in result.tokens]


@pytest.mark.parametrize("mutant", [LeakyPool, TwiceMintingPool, StalePreemption, OldestFirstVictim, DeafAbort])
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
    scheduler.pool.grow([], 8)  # blocks that no request owns
    with pytest.raises(InvariantBroken, match="nothing to compute"):
        scheduler.schedule()
