"""Which tokens are computed next, and what becomes of a request: `schedule() -> StepPlan`, `commit() -> deltas`.

One rule drives everything: each request has a number of *planned* tokens that catches up with its *known* ones
within one budget of tokens per step. A long prompt is computed in chunks because the budget is small, a
generating request needs one token because one is missing, a preempted one starts again because its count went
back, a prompt that others have computed starts further on. Nothing here asks which "phase" a request is in.

Order. Every request has a place, its key: in order of arrival, or, with the policy `priority`, of priority and
then arrival. In order of arrival there are two priorities: that of requests with a *lent* seat, which their
tenant has because nobody else wanted it, is the lower one. Background work comes behind all that somebody waits
for: its priority is below any other. A step is filled in this order. When no block is free, the running request
with the last key loses its blocks and waits again, with all its tokens; since victims never have an earlier key
than the one that needs room, the first always proceeds, and by induction everyone does. A waiting request is let
in only if there is room for all its known tokens, for what running prompts still lack, and for one more block per
running request: it then survives at least one block length of everybody's growth, and a preempted request does
not come back just to be thrown out again. For this room, and for a seat, running requests of a lower priority
have to go. Who cannot be let in keeps those behind it out, too.

Prefixes. A request that may share begins behind the blocks that are there already (never with its last token: that
one's logits are wanted). If the next block of its prompt is being computed by a running request it stands aside
until that is done, and others may pass.

Those who do nothing but draw are the larger part of most steps. As long as they are the first in order, and there
is room for all of them, they are a `Cohort`, which is planned and taken over as one; the plan is the same.

Ahead of time. `schedule` may be called again before the result of the plan before it is known: requests then count
as having what they were given, and the token that is being drawn is `PENDING`. What ends meanwhile is passed over.

A request that could never finish (context, or the whole pool) is refused by `add` and never waits.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from operator import attrgetter

from quire_engine.blocks import BlockPool
from quire_engine.cohort import Cohort, Share
from quire_engine.config import BatchLimits
from quire_engine.errors import InvariantBroken, RequestRefused
from quire_engine.pooling import Pool
from quire_engine.request import NEVER, Request, State
from quire_engine.step import PENDING, Scheduled, Steady, StepPlan, StepResult
from quire_schemas.signals import ITERATION_TOKENS_BUCKETS
from quire_schemas.sizing import longest_held
from quire_schemas.wire import Delta, Repetition, Timings, TokenLogprobs

_KEY = attrgetter("key")
BEHIND_ALL = 1 << 33
"""Above the distance between any two priorities that requests can have."""
_PENDING_ALONE: tuple[int, ...] = (PENDING,)


@dataclass(slots=True)
class Counters:
    """Totals since the engine became ready."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queried_tokens: int = 0
    """Tokens of requests that might have shared, each time one was let in."""
    prefix_hit_tokens: int = 0
    """Those of them that were there."""
    computed_tokens: int = 0
    """Those of all steps, prompts included."""
    steps_by_tokens: list[int] = field(default_factory=lambda: [0] * (len(ITERATION_TOKENS_BUCKETS) + 1))
    """Steps by how many tokens they computed; the last place is for those above all bounds."""


@dataclass(slots=True)
class _Draft:
    """A plan that is being made."""

    left: int
    """Of the budget of tokens."""
    prompts_left: int
    """Of the share of it that prompts may have."""
    steady: Steady | None = None
    covered: int = 0
    """Running requests that come first and are planned as one, or need not be planned."""
    others: list[Scheduled] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    reserved: int | None = None
    """Blocks that running requests may still need; None when it has to be counted."""

    @property
    def is_empty(self) -> bool:
        return self.steady is None and not self.others


class Scheduler:
    """Owner of all requests and their states. `clock` gives seconds for the timings and decides nothing.

    `tickets` were given out by a scheduler before it; whoever carries out plans may still know them.
    """

    fewest = 8
    """Requests that run: fewer are asked one by one in less time."""

    def __init__(
        self,
        pool: BlockPool,
        limits: BatchLimits,
        *,
        max_model_len: int,
        tickets: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.max_model_len = max_model_len
        self.counters = Counters()
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        """Both in order of their keys."""
        self._widest = limits.max_num_batched_tokens
        self._live: dict[str, Request] = {}
        self._arrivals = 0
        self.tickets = tickets
        """Given out so far."""
        self._at_work: dict[int, Request] = {}
        """Those that run, by ticket."""
        self._given_out = 0
        self._cohort = Cohort(pool.block_size)
        self._copies: dict[int, int] = {}
        """Of blocks, by the one that is written to, to be made before the next step."""
        self._coming: dict[bytes, Request] = {}
        """Digests of blocks of prompts that are not computed yet, and who computes them."""
        self._deadlines: list[tuple[float, int, str]] = []
        """A heap of when, arrival and id."""
        self._clock = clock

    # ── in and out ────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: Request) -> None:
        """Queue `request`, or raise `RequestRefused` if it could not finish even alone, or too many wait."""
        if request.id in self._live:
            raise RequestRefused("duplicate_request", f"a request with the id {request.id!r} is still live")
        total = request.num_prompt + request.draw.sampling.max_tokens
        if total > self.max_model_len:
            raise RequestRefused(
                "context_length_exceeded",
                f"{request.num_prompt} prompt tokens and max_tokens {request.draw.sampling.max_tokens} "
                f"make {total}, above the context of {self.max_model_len}",
            )
        pool = self.pool
        if self._most_held(request) > pool.num_blocks:
            most = longest_held(pool.windows, pool.num_blocks, self._widest, pool.block_size, request.max_cached)
            room = f"{request.max_cached} tokens" + (f" in each of {request.width} beams" if request.held else "")
            raise RequestRefused(
                "context_length_exceeded",
                f"the request needs room for {room}; the whole KV cache holds {most}",
            )
        self._check_queue(request)
        self._arrivals += 1
        request.key = self._place(request, self._arrivals)
        request.tables = pool.empty()
        if request.held:
            request.full_at = request.num_known + 1  # nothing is planned behind what it is told
        self._live[request.id] = request
        insort(self.waiting, request, key=_KEY)
        self._watch(request)

    def _check_queue(self, request: Request) -> None:
        """Raise `RequestRefused` when too many wait. Background work takes no place from what is not, and has as
        many of its own."""
        limits = self.limits
        if limits.max_waiting is None or len(self._live) < limits.max_num_seqs + limits.max_waiting:
            return
        alike = sum(other.background == request.background for other in self._live.values())
        if alike >= limits.max_num_seqs + limits.max_waiting:
            raise RequestRefused(
                "queue_full",
                f"{alike} requests run or wait, as many as {limits.max_num_seqs} seats and a queue of "
                f"{limits.max_waiting} hold",
            )

    def set_limits(self, limits: BatchLimits) -> None:
        """Limits from the next step on. Another policy puts everybody in its order and throws nobody out."""
        self.limits = limits
        self._disband()
        for queue in (self.running, self.waiting):
            for request in queue:
                request.key = self._place(request, request.key[1])
            queue.sort(key=_KEY)

    def abort(self, request_id: str) -> bool:
        """End a request now, without a delta; its blocks are free on return. False if it is not live."""
        request = self._live.get(request_id)
        if request is None:
            return False
        self._leave(request)
        return True

    def extend(self, name: str, token: int) -> None:
        """The next token of a held request."""
        request = self._live[name]
        request.token_ids.append(token)
        request.full_at += 1
        request.told = False

    def fork(self, name: str, child: str) -> None:
        """A second held request like `name`, whose known tokens are all computed, in its place and with its
        blocks.

        Without a seat or a block for it, it waits and is computed anew.
        """
        parent = self._live[name]
        twin = replace(parent, id=child, token_ids=list(parent.token_ids), digests=list(parent.digests))
        twin.preempted_at, twin.tables, twin.frozen_tables, twin.ticket = [], self.pool.empty(), None, 0
        self._live[child] = twin
        self._watch(twin)
        if parent.state is State.RUNNING and len(self.running) < self.limits.max_num_seqs:
            forked = self.pool.fork(parent.tables, parent.num_computed)
            if forked is not None:
                twin.tables, copies = forked
                self._copies.update((target, source) for source, target in copies)
                self._number(twin)
                twin.capacity = len(twin.tables[0]) * self.pool.block_size
                insort(self.running, twin, key=_KEY)
                return
        twin.state = State.WAITING
        self._let_go(twin)
        insort(self.waiting, twin, key=_KEY)

    def timings(self, name: str) -> Timings:
        """Where the time of a live request went, if this is its end."""
        return self._live[name].timings(self._clock())

    def expire(self, now: float) -> list[Delta]:
        """End every request whose deadline has come."""
        deltas: list[Delta] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = self._whose(heapq.heappop(self._deadlines))
            if request is not None:
                deltas.append(self._fail(request, now, "timeout", "the request did not end within its time"))
        return deltas

    def _most_held(self, request: Request) -> int:
        """Blocks that it holds at most, with all beams of its search, which share the full blocks of their
        prompt.
        """
        pool = self.pool
        alone = pool.most_held(request.max_cached, self._widest)
        shared = min(alone, request.num_prompt // pool.block_size * pool.num_groups)
        return shared + (alone - shared) * max(1, request.width)

    def _watch(self, request: Request) -> None:
        """Let `expire` find a live request, if it has a deadline."""
        if request.deadline is None:
            return
        if len(self._deadlines) > 2 * len(self._live) + 64:  # most are of requests that ended in time
            self._deadlines = [entry for entry in self._deadlines if self._whose(entry) is not None]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (request.deadline, request.key[1], request.id))

    def _place(self, request: Request, arrival: int) -> tuple[int, int]:
        priority = request.priority if self.limits.policy == "priority" else int(request.lent)
        return (priority + BEHIND_ALL if request.background else priority, arrival)

    def _whose(self, deadline: tuple[float, int, str]) -> Request | None:
        """The live request that a deadline is of, if it still lives."""
        _, arrival, name = deadline
        request = self._live.get(name)
        return request if request is not None and request.key[1] == arrival else None

    # ── one step ──────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> StepPlan:
        """Decide the next step. Not empty while there is work, unless all of it hangs on steps given out."""
        draft = self._draft()
        while draft.is_empty and self._live and not self._given_out:
            # all that run are beams that wait for one that has no room
            idle = next((request for request in reversed(self.running) if request.held), None)
            if idle is None:
                raise InvariantBroken(f"{len(self._live)} live requests and nothing to compute")
            self._preempt(idle)
            gone = [*draft.preempted, idle.id]
            draft = self._draft()
            draft.preempted = gone + draft.preempted
        copies: tuple[tuple[int, int], ...] = ()
        step = self.counters.steps + self._given_out
        if not draft.is_empty:
            self._given_out += 1
            copies = tuple((source, target) for target, source in self._copies.items())
            self._copies.clear()
        return StepPlan(step, tuple(draft.others), tuple(draft.preempted), copies, draft.steady)

    def _draft(self) -> _Draft:
        """Fill a step."""
        draft = _Draft(self.limits.max_num_batched_tokens, self._prefill_share())
        at = 0  # places in the two queues, which are gone through as one
        seen = self._schedule_steady(draft)
        while draft.left > 0:
            ahead = self.waiting[at] if at < len(self.waiting) and not draft.preempted else None
            seen = self._schedule_running(draft, seen, None if ahead is None else ahead.key)
            if ahead is None or draft.left <= 0:
                break
            if draft.preempted:
                continue  # where somebody has to go, nobody comes in
            if len(self.running) >= self.limits.max_num_seqs and self.running[-1].key[0] <= ahead.key[0]:
                self._schedule_running(draft, seen, None)  # all seats are taken, and nobody has to go for it
                break
            digests = self._cached_prefix(ahead)
            if digests is None or ahead.told:  # the latter has nothing to do until it is extended
                at += 1
            elif self._schedule_waiting(draft, ahead, at, digests):
                seen += 1
            else:
                self._schedule_running(draft, seen, None)
                break
        return draft

    def _prefill_share(self) -> int:
        """Tokens of prompts that a step may have: all of it, unless somebody writes and would wait for them."""
        share = self.limits.max_prefill_tokens
        if share is None or not self.limits.chunked_prefill:
            return self.limits.max_num_batched_tokens
        return share if any(map(_writes, self.running)) else self.limits.max_num_batched_tokens

    def commit(self, plan: StepPlan, result: StepResult) -> list[Delta]:
        """Take over what a step computed. Requests that left since `schedule` are passed over."""
        self._count(plan)
        self._given_out -= 1
        now = self._clock()
        deltas: list[Delta] = []
        at_work, drawn, failures, logprobs = self._at_work, result.tokens, result.failures, result.logprobs
        items, counted = plan.others, None
        if plan.steady is not None:
            if isinstance(plan.steady, Share) and plan.steady.cohort is self._cohort and not failures:
                deltas, counted = self._commit_steady(plan.steady, result, now), self._cohort
            else:
                if failures:  # else it is of a cohort before, and this one has not counted it
                    self._disband()
                items = plan.items
        passed = 0  # items that drew nothing
        for item in items:
            request = at_work.get(item.ticket)
            if request is None:
                passed += 1
                continue
            name = item.request_id
            if failures and name in failures:
                passed += 1
                deltas.append(self._fail(request, now, *failures[name]))
                continue
            request.num_computed = computed = item.end
            if computed >= request.seal_at:
                self._seal(request)
            draw = item.draw
            if draw is None:
                passed += 1
                if request.pool is not None and (pooled := self._pool(request, request.pool, item, result, now)):
                    deltas.append(pooled)
                if item.targets and (scores := _new_scores(request, item, result)):
                    deltas.append(Delta(name, prompt_logprobs=scores))
                continue
            if request.pace is not counted:  # else it has joined since, and this step counts for all
                request.num_drawing -= 1
            token, token_ids = drawn[name], request.token_ids
            if (
                request.is_steady
                and not logprobs
                and token not in request.ending_ids
                and len(token_ids) + 1 < request.full_at
            ):  # what `_drawn` does, without the call: nearly all of a large batch comes by here
                token_ids.append(token)
                deltas.append(Delta(name, (token,)))
            elif request.held:
                deltas.append(self._told(request, logprobs[name], now))
            else:
                deltas.append(self._drawn(request, item, token, result, now))
        self.counters.generation_tokens += len(items) - passed
        return deltas

    def _count(self, plan: StepPlan) -> None:
        tokens, counters = plan.num_tokens, self.counters
        counters.steps += 1
        counters.computed_tokens += tokens
        counters.steps_by_tokens[bisect_left(ITERATION_TOKENS_BUCKETS, tokens)] += 1

    def _commit_steady(self, share: Share, result: StepResult, now: float) -> list[Delta]:
        """Take over what a step computed for the cohort."""
        cohort = share.cohort
        for request in cohort.come_back(share):
            self._seal(request)
        deltas, ends = cohort.hand_out(share, result.tokens)
        for at, request, token in ends:
            deltas[at] = self._drawn(request, None, token, result, now)
        self.counters.generation_tokens += len(deltas)
        return deltas

    def _drawn(
        self, request: Request, item: Scheduled | None, token: int, result: StepResult, now: float
    ) -> Delta:
        """Take over the `token` that was drawn for a request; it may be the last."""
        sampling, token_ids = request.draw.sampling, request.token_ids
        # a grammar lets a text end below min_tokens only when nothing else may come
        if token in request.ending_ids and (
            request.num_output >= sampling.min_tokens or sampling.structured is not None
        ):
            delta = Delta(request.id, finish_reason="stop", stop_token_id=token)
        else:
            token_ids.append(token)
            delta = Delta(request.id, (token,))
            if request.repetition is not None and _goes_round(request, request.repetition):
                delta.finish_reason = "repetition"
            elif len(token_ids) >= request.full_at:
                delta.finish_reason = "length"
        if request.id in result.logprobs:
            delta.logprobs = [result.logprobs[request.id]]
        if request.first_token_at is None:  # before which all of its prompt has been scored
            if item is not None and item.targets:
                delta.prompt_logprobs = _new_scores(request, item, result) or None
            request.first_token_at = now
            request.is_steady = request.repetition is None and not request.adapter
            self.counters.prompt_tokens += request.num_prompt
            delta.timings = request.timings()
        if delta.finish_reason is not None:
            delta.timings = request.timings(now)
            self._leave(request)
        return delta

    def _told(self, request: Request, told: TokenLogprobs, now: float) -> Delta:
        """What a held request would draw."""
        request.told = True
        delta = Delta(request.id, logprobs=[told])
        if request.first_token_at is None:
            request.first_token_at = now
            self.counters.prompt_tokens += request.num_prompt
            delta.timings = request.timings()
        return delta

    def _pool(self, request: Request, pool: Pool, item: Scheduled, result: StepResult, now: float) -> Delta | None:
        """Take over final states; with the last of them the request ends."""
        if item.pooled:
            pool.add(result.states[request.id])
        if item.end < request.num_prompt:
            return None
        request.first_token_at = now
        self.counters.prompt_tokens += request.num_prompt
        self._leave(request)
        return Delta(request.id, finish_reason="stop", timings=request.timings(now), embedding=pool.vector())

    # ── deciding ──────────────────────────────────────────────────────────────────────────────────────

    def _schedule_steady(self, draft: _Draft) -> int:
        """Plan the first of the running requests as one, if that can be. How many need not be asked any more."""
        pool, cohort, ahead = self.pool, self._cohort, self.waiting[0] if self.waiting else None
        if len(self.running) < self.fewest:
            if cohort.last_key:
                self._disband()
            return 0
        if ahead is not None and ahead.key <= cohort.last_key:
            cohort = self._disband()
        seen = cohort.covered(self.running)
        candidates: Iterator[Request] = islice(self.running, seen, None)
        if ahead is not None:
            candidates = takewhile(lambda request: request.key < ahead.key, candidates)
        seen += cohort.invite(candidates, draft.left, self._given_out)
        if not len(cohort):
            return seen
        growing = cohort.growing()
        if len(growing) * pool.num_groups > pool.num_free:
            for request in growing:
                if request.pace is cohort and self._make_room(request, request.num_planned + 1, draft.preempted):
                    self._freeze(request)
            growing = [request for request in growing if request.pace is cohort]
            seen = cohort.covered(self.running)
            if not len(cohort):
                return seen
        else:
            for request in growing:
                tables = request.tables
                if pool.is_windowed:
                    pool.trim(tables, request.num_planned)
                pool.extend(tables)
                request.capacity += pool.block_size
                request.frozen_tables = tuple(map(tuple, tables))
        draft.covered = seen
        draft.steady = cohort.advance(growing, pending=self._given_out > 0)
        draft.left -= len(draft.steady)
        return seen

    def _disband(self) -> Cohort:
        """Whoever was planned as one is asked alone; a cohort to be."""
        self._cohort.disband()
        self._cohort = Cohort(self.pool.block_size)
        return self._cohort

    def _schedule_running(self, draft: _Draft, seen: int, until: tuple[int, int] | None) -> int:
        """Give running requests their share of the budget, in order, from place `seen` to the key `until`
        or to the last.

        Returns the place reached.
        """
        left, items = draft.left, draft.others
        draft.reserved = None
        for request in islice(self.running, seen, None):  # which loses requests at its end meanwhile, only there
            if left <= 0 or (until is not None and request.key > until):
                break
            seen += 1
            start, drawing = request.num_planned, request.num_drawing
            known = len(request.token_ids) + drawing
            count = known - start
            if count == 1:
                if drawing and known >= request.full_at:
                    continue  # what is being drawn is its last token
                is_short = request.is_plain
            else:
                most = min(left, draft.prompts_left)
                count = self._chunk(request, count, most, first=draft.is_empty) if count and most else 0
                if not count:
                    continue
                draft.prompts_left -= count
                is_short = False
            end = start + count
            if end > request.capacity and not self._make_room(request, end, draft.preempted):
                break
            left -= count
            if not is_short:
                items.append(self._scheduled(request, start, end, known))
                continue
            # what `_scheduled` does, without the call: nearly all of a large batch comes by here
            tokens = _PENDING_ALONE if drawing else (request.token_ids[start],)
            request.num_planned = end
            request.num_drawing = drawing + 1
            tables = request.frozen_tables or self._freeze(request)
            items.append(Scheduled(request.id, request.ticket, tokens, start, end, tables, request.draw))
        draft.left = left
        return seen

    def _schedule_waiting(self, draft: _Draft, request: Request, at: int, digests: list[bytes]) -> bool:
        """Let in the waiting request at place `at` behind its prefix `digests`, if budget, seat and blocks last.

        One of lower priority that runs makes room for it.
        """
        if draft.prompts_left <= 0:
            return False
        pool = self.pool
        start = len(digests) * pool.block_size
        held, idle = pool.price(digests) if digests else (0, 0)
        need = pool.most_held(request.num_known, self._widest) - held + idle
        if draft.reserved is None:
            # whoever draws has a block for the token that is being drawn
            covered = 0 if pool.is_windowed else draft.covered
            draft.reserved = covered * pool.num_groups + sum(
                map(self._reserve, islice(self.running, covered, None))
            )
        while not self._has_room(need + draft.reserved):
            if (
                not self.running
                or self.running[-1].key[0] <= request.key[0]
                or not self._would_help(request, need)
            ):
                return False
            victim = self.running[-1]
            draft.reserved -= self._reserve(victim)
            self._preempt(victim)
            draft.preempted.append(victim.id)
            if digests:  # what of the prefix the victim alone held is idle now, and no longer free of charge
                held, idle = pool.price(digests)
                need = pool.most_held(request.num_known, self._widest) - held + idle
        most = min(draft.left, draft.prompts_left)
        count = self._chunk(request, request.num_known - start, most, first=draft.is_empty)
        if not count:
            return False
        if count > self._widest:  # it goes whole, and windows let go of nothing in the middle of a step
            whole = pool.most_held(request.num_known, count) - held + idle
            if not self._has_room(whole + draft.reserved):
                return False
        del self.waiting[at]
        self._let_in(request, digests, start + count)
        draft.reserved += self._reserve(request)
        draft.others.append(self._scheduled(request, start, start + count, request.num_known))
        draft.left -= count
        draft.prompts_left -= count
        return True

    def _has_room(self, num_blocks: int) -> bool:
        """Whether a seat is free, and so many blocks."""
        return len(self.running) < self.limits.max_num_seqs and num_blocks <= self.pool.num_free

    def _would_help(self, request: Request, need: int) -> bool:
        """Whether `need` blocks and a seat would be there if all that run with a lower priority had gone."""
        lesser = [running for running in self.running if running.key[0] > request.key[0]]
        others = self.running[: len(self.running) - len(lesser)]
        freed = self.pool.freed_by(running.tables for running in lesser)
        kept = sum(self._reserve(running) for running in others)
        return len(others) < self.limits.max_num_seqs and need + kept <= self.pool.num_free + freed

    def _chunk(self, request: Request, missing: int, left: int, *, first: bool) -> int:
        """How many of its `missing` tokens go into this step; 0 if it must wait for the next.

        Without chunked prefill they are computed all at once; more than the whole budget only when the step holds
        nothing else (`first`), and when the pool could hold them whole.
        """
        if self.pool.is_windowed:
            left = min(left, self._widest)  # what windows leave free is counted for no wider a step
        if missing <= left:
            return missing
        whole = self.pool.blocks_for(request.num_known) * self.pool.num_groups
        if self.limits.chunked_prefill or whole > self.pool.num_blocks:
            return left
        return missing if first else 0

    def _reserve(self, request: Request) -> int:
        """Blocks that must stay free for a running request: what it lacks, and one more in every group."""
        pool = self.pool
        lacking = pool.most_held(request.num_known, self._widest) - pool.held(request.tables)
        return max(0, lacking) + pool.num_groups

    def _make_room(self, request: Request, num_tokens: int, preempted: list[str]) -> bool:
        """Blocks for `num_tokens` tokens, from later requests if need be. False if `request` itself had to go."""
        pool = self.pool
        if pool.is_windowed:
            pool.trim(request.tables, request.num_planned)
        while not pool.grow(request.tables, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            preempted.append(victim.id)
            if victim is request:
                return False
        request.capacity = len(request.tables[0]) * pool.block_size
        request.frozen_tables = None
        return True

    def _preempt(self, victim: Request) -> None:
        """Back to the queue: what was known stays known, what was computed is to be computed again."""
        if victim.pool is not None:
            victim.pool.clear()
        self.running.remove(victim)
        self._let_go(victim)
        victim.state = State.WAITING
        victim.preempted_at.append(self._clock())
        self.counters.preemptions += 1
        insort(self.waiting, victim, key=_KEY)

    def _let_in(self, request: Request, digests: list[bytes], num_tokens: int) -> None:
        """Give a waiting request a seat, the blocks of the prefix `digests`, and room for `num_tokens` tokens."""
        pool = self.pool
        self._number(request)
        request.state = State.RUNNING
        insort(self.running, request, key=_KEY)
        if request.root is not None:
            self.counters.prefix_queried_tokens += request.num_known
            self.counters.prefix_hit_tokens += len(digests) * pool.block_size
            pool.adopt(request.tables, digests)
            request.num_sealed = len(digests)
            request.num_planned = request.num_computed = len(digests) * pool.block_size
            request.seal_at = request.num_planned + pool.block_size
            in_prompt = request.num_prompt // pool.block_size
            for digest in request.chain_of(in_prompt, pool.block_size)[len(digests) : in_prompt]:
                self._coming.setdefault(digest, request)
        if request.scheduled_at is None:
            request.scheduled_at = self._clock()
            request.num_cached = min(len(digests) * pool.block_size, request.num_prompt)
        if not pool.grow(request.tables, num_tokens):
            raise InvariantBroken(f"{request.id} was let in without room for {num_tokens} tokens")
        request.capacity = len(request.tables[0]) * pool.block_size

    def _number(self, request: Request) -> None:
        """Give a request the ticket of a new life."""
        self.tickets += 1
        request.ticket = self.tickets
        self._at_work[request.ticket] = request

    def _scheduled(self, request: Request, start: int, end: int, known: int) -> Scheduled:
        """Its share of the step, tokens `start` to `end` of the `known` ones; it counts as planned from now on."""
        token_ids, drawing = request.token_ids, request.num_drawing
        request.num_planned = end
        tables = request.frozen_tables or self._freeze(request)
        if drawing:
            tokens = _PENDING_ALONE
        elif end - start == 1:
            tokens = (token_ids[start],)
        else:
            tokens = tuple(token_ids[start:end])
        if request.pool is not None:
            rows = request.pool.rows(start, end)
            return Scheduled(
                request.id, request.ticket, tokens, start, end, tables, pooled=rows, adapter=request.adapter
            )
        targets: tuple[int, ...] = ()
        if request.num_unscored:
            targets = tuple(token_ids[start + 1 : min(end + 1, request.num_prompt)])
        scoring = request.draw.sampling if targets else None
        draw = None
        history: tuple[int, ...] = ()
        if end >= known and not request.told:
            draw = request.draw
            request.num_drawing = drawing + 1
            history = draw.history(token_ids, pending=bool(drawing)) if draw.needs_history else ()
        return Scheduled(
            request.id, request.ticket, tokens, start, end, tables, draw, history, targets, scoring, 0,
            request.adapter,
        )  # fmt: skip

    @staticmethod
    def _freeze(request: Request) -> tuple[tuple[int, ...], ...]:
        """Its tables as plans show them until they change."""
        request.frozen_tables = tuple(map(tuple, request.tables))
        return request.frozen_tables

    # ── prefixes ──────────────────────────────────────────────────────────────────────────────────────

    def _cached_prefix(self, request: Request) -> list[bytes] | None:
        """Digests of the leading blocks that need not be computed; None if it should wait for more of them."""
        if request.root is None or request.num_unscored:
            return []
        size = self.pool.block_size
        most = (request.num_known - 1) // size
        digests = request.chain_of(most, size)[:most]
        count = self.pool.match(digests)
        if count < len(digests):
            maker = self._coming.get(digests[count])
            if maker is not None and (request.background or not maker.background):
                return None  # nobody who is waited for stands aside for background work
        return digests[:count]

    def _seal(self, request: Request) -> None:
        """Others may find the blocks that have become full and computed."""
        pool, coming = self.pool, self._coming
        count = request.num_computed // pool.block_size
        digests = request.chain_of(count, pool.block_size)
        for index in range(request.num_sealed, count):
            digest = digests[index]
            pool.seal(request.tables, index, digest)
            if coming and coming.get(digest) is request:
                del coming[digest]
        request.num_sealed = count
        request.seal_at = (count + 1) * pool.block_size

    # ── leaving ───────────────────────────────────────────────────────────────────────────────────────

    def _fail(self, request: Request, now: float, code: str, message: str) -> Delta:
        self._leave(request)
        return Delta(
            request.id,
            finish_reason="error",
            error_code=code,
            error=message,
            timings=request.timings(now),
        )

    def _leave(self, request: Request) -> None:
        """The one way out of every state: blocks back, name forgotten."""
        (self.running if request.state is State.RUNNING else self.waiting).remove(request)
        self._let_go(request)
        request.state = State.FINISHED
        del self._live[request.id]

    def _let_go(self, request: Request) -> None:
        """It holds nothing any more, and steps that still run are not for it."""
        for digest in request.digests[request.num_sealed :]:
            if self._coming.get(digest) is request:
                del self._coming[digest]
        self._cohort.leave(request)
        self.pool.release(request.tables)
        self._at_work.pop(request.ticket, None)
        request.ticket = request.num_planned = request.num_computed = request.num_drawing = 0
        request.capacity = request.num_sealed = 0
        request.seal_at = NEVER
        request.frozen_tables = None

    # ── looking ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def slots_used(self) -> int:
        """Slots of allocated blocks that hold a token: all but the rest of the block that each request fills."""
        unfilled = sum(request.capacity - request.num_computed for request in self.running)
        return self.pool.num_used * self.pool.block_size - unfilled * self.pool.num_groups

    @property
    def blocks_saved(self) -> int:
        """Blocks that would be in use besides if no two tables shared one: those held, less those in use."""
        return sum(self.pool.held(request.tables) for request in self.running) - self.pool.num_used

    @property
    def oldest_running_at(self) -> float | None:
        """When the running request that was let in first was let in; None when nothing runs."""
        return min((r.scheduled_at for r in self.running if r.scheduled_at is not None), default=None)

    def check_integrity(self) -> None:
        """Raise `InvariantBroken` unless queues, states, tables and pool agree. For tests and idle moments."""
        self.pool.check_integrity(request.tables for request in self._live.values())
        queued = [*self.running, *self.waiting]
        if len(queued) != len(self._live) or any(self._live.get(r.id) is not r for r in queued):
            raise InvariantBroken("a live request is not in exactly one queue")
        for queue in (self.running, self.waiting):
            if queue != sorted(queue, key=_KEY):
                raise InvariantBroken("a queue is not in order")
        for request in self.waiting:
            if request.state is not State.WAITING or any(request.tables) or request.num_planned or request.ticket:
                raise InvariantBroken(f"{request.id} waits with blocks, a ticket or planned tokens")
        for request in self.running:
            known = request.num_known + request.num_drawing
            if request.state is not State.RUNNING or not (
                0
                <= request.num_sealed * self.pool.block_size
                <= request.num_computed
                <= request.num_planned
                <= known
            ):
                raise InvariantBroken(
                    f"{request.id} runs with {request.num_computed} tokens computed, {request.num_planned} planned"
                )
            if len(request.tables[0]) != self.pool.blocks_for(request.num_planned):
                raise InvariantBroken(f"{request.id} has {len(request.tables[0])} blocks for its tokens")
        if self._at_work != {request.ticket: request for request in self.running}:
            raise InvariantBroken("the tickets are not those of the running requests")
        if not set(self._coming.values()) <= set(self.running):
            raise InvariantBroken("a block is said to come from a request that does not run")
        if not self.running and self._coming:
            raise InvariantBroken("blocks are said to come, and nobody runs")
        self._cohort.check_integrity(self.running)


def _writes(request: Request) -> bool:
    """Whether a running request lacks exactly the token that comes next, and will get it."""
    known = request.num_known + request.num_drawing
    ends = request.num_drawing and known >= request.full_at
    return known - request.num_planned == 1 and not ends and not request.told


def _new_scores(request: Request, item: Scheduled, result: StepResult) -> list[TokenLogprobs]:
    """Log-probabilities of prompt tokens that this step gave and none before: a preempted prompt comes twice."""
    before = request.num_prompt - 1 - request.num_unscored
    known = max(0, before - item.start)
    request.num_unscored -= max(0, len(item.targets) - known)
    return result.prompt_logprobs.get(request.id, [])[known:]


def _goes_round(request: Request, repetition: Repetition) -> bool:
    """Whether the output ends with one run of tokens as often as `repetition` says."""
    token_ids = request.token_ids
    for size in range(repetition.shortest, repetition.longest + 1):
        first = len(token_ids) - size * repetition.count
        if first < request.num_prompt:
            break
        if token_ids[-1] == token_ids[-1 - size] and token_ids[first + size :] == token_ids[first:-size]:
            return True
    return False
