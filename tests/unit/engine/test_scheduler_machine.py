"""The scheduler in every order of events, and thirteen planted faults that the machine must catch.

Every request has a script: the token it draws at a position is a fixed function of what is before it and its seed.
The pretend cache is a table from slot to what a plan wrote there; a plan may only be carried out if each of its
items finds all its earlier tokens where its block table says they are. Lost, doubled or swapped blocks show.
"""

from __future__ import annotations

import itertools
import sys
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
from tests.effort import EFFORT, first_in_ci, times
from tests.unit.engine.scheduling import EOS

from quire_engine.blocks import GONE, BlockPool, Tables
from quire_engine.cohort import Cohort, Share
from quire_engine.config import BatchLimits
from quire_engine.errors import EngineError, RequestRefused
from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_engine.step import StepPlan, StepResult, resolve
from quire_schemas.wire import Delta, Generate, Sampling

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
    background: bool
    lent: bool
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
    """A scheduler, a twin that is told the same and asks everybody one by one, a pretend cache, and what each
    request will say.

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
            st.sampled_from([None, None, 1, 3]),
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
        def make(scheduler: type[Scheduler]) -> Scheduler:
            pool = self.pool_class(num_blocks, block_size, windows)
            return scheduler(pool, limits, max_model_len=CONTEXT, clock=lambda: 0.0)

        self.scheduler = make(type("AllAtOnce", (self.scheduler_class,), {"fewest": 1}))
        self.twin = make(type("OneByOne", (self.scheduler_class,), {"fewest": sys.maxsize}))
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
        background=st.booleans(),
        lent=st.booleans(),
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
        background: bool,
        lent: bool,
        kin: str,
        lasts: int | None,
    ) -> None:
        pool, limits = self.scheduler.pool, self.scheduler.limits
        cached = len(prompt) + max_tokens - 1
        possible = cached < CONTEXT and pool.most_held(cached, self.widest) <= pool.num_blocks
        alike = sum(life.background == background for life in self.lives.values())
        full = limits.max_waiting is not None and alike >= limits.max_num_seqs + limits.max_waiting
        for scheduler in (self.scheduler, self.twin):
            sampling = Sampling(max_tokens=max_tokens, seed=seed)
            message = Generate(
                name, list(prompt), sampling, priority=priority, timeout=lasts, background=background, lent=lent
            )
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
            self.lives[name] = Life(name, self.arrivals, prompt, max_tokens, seed, background, lent)

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
        prompts=st.sampled_from([None, None, 1, 3]),
    )
    def set_limits(self, seats: int, budget: int, chunked: bool, policy: Any, prompts: int | None) -> None:
        self.by_arrival &= policy == "fcfs"
        for scheduler in (self.scheduler, self.twin):
            scheduler.set_limits(BatchLimits(seats, budget, chunked, policy, None, prompts))

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
            lives = [self.lives[request.id] for request in requests]
            for kind in itertools.product((False, True), (False, True)):
                numbers = [life.number for life in lives if (life.background, life.lent) == kind]
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
        writing = [it for it in scheduler.running if it.num_planned == it.num_known + it.num_drawing - 1]
        writing = [it for it in writing if not it.num_drawing or it.num_known + it.num_drawing < it.full_at]
        writing = [it for it in writing if not it.told]
        steady = {it.id for it in writing}
        plan = scheduler.schedule()
        assert plan == self.twin.schedule()  # I16
        self.lost += len(plan.preempted)
        limits = scheduler.limits
        assert plan.num_tokens <= limits.max_num_batched_tokens or (
            not limits.chunked_prefill and len(plan.items) == 1
        )  # I5
        if writing and limits.chunked_prefill and limits.max_prefill_tokens is not None and not plan.preempted:
            of_prompts = [item.end - item.start for item in plan.items if item.request_id not in steady]
            assert sum(of_prompts) <= limits.max_prefill_tokens
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


class ClingingCohort(Scheduler):
    """Plans with the others who has left them."""

    def _let_go(self, request: Request) -> None:
        cohort, self._cohort = self._cohort, Cohort(self.pool.block_size)
        super()._let_go(request)
        self._cohort = cohort


class CrampedCohort(Scheduler):
    """Gives nobody another block who is planned with others."""

    def _schedule_steady(self, draft: Any) -> int:
        self._cohort._grows.clear()
        return super()._schedule_steady(draft)


class DeafCohort(Scheduler):
    """Hands out tokens that end a text like others."""

    def _commit_steady(self, share: Share, result: StepResult, now: float) -> list[Delta]:
        share.cohort._endings = frozenset()
        return super()._commit_steady(share, result, now)


class SelfishCohort(Scheduler):
    """Goes first, whoever waits before it."""

    def _schedule_steady(self, draft: Any) -> int:
        waiting, self.waiting = self.waiting, []
        try:
            return super()._schedule_steady(draft)
        finally:
            self.waiting = waiting


MUTANTS = (
    LeakyPool, TwiceMintingPool, ForgetfulPool, ShortSightedPool, StalePreemption, OldestFirstVictim, DeafAbort,
    GreedySharer, HastySeal, ClingingCohort, CrampedCohort, DeafCohort, SelfishCohort,
)  # fmt: skip


@pytest.mark.parametrize("mutant", first_in_ci(MUTANTS))
def test_the_machine_catches_a_planted_fault(mutant: type, capsys: pytest.CaptureFixture[str]) -> None:
    part = "pool_class" if issubclass(mutant, BlockPool) else "scheduler_class"
    planted: type[RuleBasedStateMachine] = type(f"With{mutant.__name__}", (World,), {part: mutant})
    # it ends with the first example that shows the fault, be it by a crash of the pool
    quick = settings(QUICK, phases=[Phase.generate], max_examples=10 * QUICK.max_examples)
    with pytest.raises((AssertionError, EngineError, LookupError)):
        run_state_machine_as_test(planted, settings=quick)
    capsys.readouterr()
