"""Which tokens are computed next, and what becomes of a request: `schedule() -> StepPlan`, `commit() -> deltas`.

One rule drives everything: each request has a number of *computed* tokens that catches up with its *known* ones
within one budget of tokens per step. A long prompt is computed in chunks because the budget is small, a
generating request needs one token because one is missing, a preempted one starts again because its count went back
to zero. Nothing here asks which "phase" a request is in.

Order. Running requests come first, oldest first, then waiting ones in order of arrival. When no block is free, the
newest running request loses its blocks and goes to the head of the queue with all its tokens; since victims
are never older than the one that needs room, the oldest always proceeds, and by induction everyone does. A
waiting request is let in only if there is room for all its known tokens, for what running prompts still lack, and
for one more block per running request: it then survives at least one block length of everybody's growth, and a
preempted request does not come back just to be thrown out again.

A request that could never finish (context, or the whole pool) is refused by `add` and never waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
from quire_engine.errors import InvariantBroken, RequestRefused
from quire_engine.request import Request, State
from quire_engine.step import Scheduled, StepPlan, StepResult
from quire_schemas.wire import Delta


@dataclass(slots=True)
class Counters:
    """Totals since the engine became ready."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class Scheduler:
    """Owner of all requests and their states. `clock` gives seconds for the timings and decides nothing."""

    def __init__(
        self,
        pool: BlockPool,
        limits: BatchLimits,
        *,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.max_model_len = max_model_len
        self.counters = Counters()
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Request] = {}  # in order of admission
        self._live: dict[str, Request] = {}
        self._clock = clock

    # ── in and out ────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: Request) -> None:
        """Queue `request`, or raise `RequestRefused` if it could not finish even alone."""
        if request.id in self._live:
            raise RequestRefused("duplicate_request", f"a request with the id {request.id!r} is still live")
        total = request.num_prompt + request.draw.sampling.max_tokens
        if total > self.max_model_len:
            raise RequestRefused(
                "context_length_exceeded",
                f"{request.num_prompt} prompt tokens and max_tokens {request.draw.sampling.max_tokens} "
                f"make {total}, above the context of {self.max_model_len}",
            )
        if self.pool.blocks_for(request.max_cached) > self.pool.num_blocks:
            raise RequestRefused(
                "context_length_exceeded",
                f"the request needs room for {request.max_cached} tokens; the whole KV cache holds "
                f"{self.pool.num_blocks * self.pool.block_size}",
            )
        self._live[request.id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """End a request now, without a delta; its blocks are free on return. False if it is not live."""
        request = self._live.get(request_id)
        if request is None:
            return False
        self._leave(request)
        return True

    # ── one step ──────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> StepPlan:
        """Decide the next step. Not empty while there is work."""
        items: list[Scheduled] = []
        preempted: list[str] = []
        left = self._schedule_running(items, preempted)
        if self.waiting and not preempted:
            self._schedule_waiting(items, left)
        if self._live and not items:
            raise InvariantBroken(f"{len(self._live)} live requests and nothing to compute")
        return StepPlan(self.counters.steps, tuple(items), tuple(preempted))

    def commit(self, plan: StepPlan, result: StepResult) -> list[Delta]:
        """Take over what a step computed. Requests that left since `schedule` are passed over."""
        self.counters.steps += 1
        now = self._clock()
        deltas: list[Delta] = []
        for item in plan.items:
            request = self.running.get(item.request_id)
            if request is None or request.num_computed != item.start:
                continue
            failure = result.failures.get(request.id)
            if failure is not None:
                deltas.append(self._fail(request, now, *failure))
                continue
            request.num_computed = item.end
            if item.draw is not None:
                deltas.append(self._take_token(request, result, now))
        return deltas

    # ── deciding ──────────────────────────────────────────────────────────────────────────────────────

    def _schedule_running(self, items: list[Scheduled], preempted: list[str]) -> int:
        """Give each running request its share of the budget, oldest first; returns what is left of it."""
        left = self.limits.max_num_batched_tokens
        for request in list(self.running.values()):
            if left <= 0:
                break
            if request.state is not State.RUNNING:
                continue  # an older one has just taken its blocks
            count = self._chunk(request, left, first=not items)
            if count and self._make_room(request, request.num_computed + count, preempted):
                items.append(self._scheduled(request, count))
                left -= count
        return left

    def _schedule_waiting(self, items: list[Scheduled], left: int) -> None:
        """Let waiting requests in, in order, while budget, seats and blocks last."""
        reserved = sum(self.pool.blocks_for(r.num_known) - len(r.block_ids) + 1 for r in self.running.values())
        while self.waiting and left > 0 and len(self.running) < self.limits.max_num_seqs:
            request = self.waiting[0]
            need = self.pool.blocks_for(request.num_known)
            count = self._chunk(request, left, first=not items)
            if not count or need + reserved > self.pool.num_free:
                return
            self._let_in(request, count)
            reserved += need - len(request.block_ids) + 1
            items.append(self._scheduled(request, count))
            left -= count

    def _chunk(self, request: Request, left: int, *, first: bool) -> int:
        """How many tokens of `request` go into this step; 0 if it must wait for the next.

        Without chunked prefill missing tokens are computed all at once; more than the whole budget only when the
        step holds nothing else (`first`).
        """
        pending = request.num_pending
        if pending <= left:
            return pending
        if self.limits.chunked_prefill:
            return left
        return pending if first else 0

    def _make_room(self, request: Request, num_tokens: int, preempted: list[str]) -> bool:
        """Blocks for `num_tokens` tokens, from newer requests if need be. False if `request` itself had to go."""
        while not self.pool.grow(request.block_ids, num_tokens):
            victim = next(reversed(self.running.values()))
            self._preempt(victim)
            preempted.append(victim.id)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request) -> None:
        """Back to the head of the queue: what was known stays known, what was computed is to be computed again."""
        del self.running[victim.id]
        self.pool.release(victim.block_ids)
        victim.state = State.WAITING
        victim.num_computed = 0
        victim.preempted_at.append(self._clock())
        self.counters.preemptions += 1
        self.waiting.appendleft(victim)

    def _let_in(self, request: Request, count: int) -> None:
        self.waiting.popleft()
        request.state = State.RUNNING
        self.running[request.id] = request
        if request.scheduled_at is None:
            request.scheduled_at = self._clock()
        if not self.pool.grow(request.block_ids, count):
            raise InvariantBroken(f"{request.id} was let in without room for {count} tokens")

    def _scheduled(self, request: Request, count: int) -> Scheduled:
        start, known = request.num_computed, request.token_ids
        completes = start + count == len(known)
        return Scheduled(
            request_id=request.id,
            token_ids=(known[start],) if count == 1 else tuple(known[start : start + count]),
            start=start,
            block_ids=tuple(request.block_ids),
            draw=request.draw if completes else None,
            history=tuple(known) if completes and request.draw.has_penalty else (),
        )

    # ── taking over ───────────────────────────────────────────────────────────────────────────────────

    def _take_token(self, request: Request, result: StepResult, now: float) -> Delta:
        """One drawn token: known from now on, or the end of the text."""
        token = result.tokens[request.id]
        sampling = request.draw.sampling
        self.counters.generation_tokens += 1
        delta = Delta(request.id)
        if request.first_token_at is None:
            request.first_token_at = now
            self.counters.prompt_tokens += request.num_prompt
            delta.timings = request.timings()
        if token in request.ending_ids and request.num_output >= sampling.min_tokens:
            delta.finish_reason, delta.stop_token_id = "stop", token
        else:
            request.token_ids.append(token)
            delta.token_ids = [token]
            if sampling.logprobs is not None:
                delta.logprobs = [result.logprobs[request.id]]
            if request.num_output >= sampling.max_tokens:
                delta.finish_reason = "length"
        if delta.finish_reason is not None:
            delta.timings = request.timings(now)
            self._leave(request)
        return delta

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
        if request.state is State.RUNNING:
            del self.running[request.id]
        else:
            self.waiting.remove(request)
        request.state = State.FINISHED
        self.pool.release(request.block_ids)
        del self._live[request.id]

    # ── looking ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def slots_used(self) -> int:
        """Tokens that lie in allocated blocks."""
        return sum(request.num_computed for request in self.running.values())

    @property
    def oldest_running_at(self) -> float | None:
        """When the running request that was let in first was let in; None when nothing runs."""
        return min((r.scheduled_at for r in self.running.values() if r.scheduled_at is not None), default=None)

    def check_integrity(self) -> None:
        """Raise `InvariantBroken` unless queues, states, tables and pool agree. For tests and idle moments."""
        self.pool.check_integrity(request.block_ids for request in self._live.values())
        queued = [*self.running.values(), *self.waiting]
        if len(queued) != len(self._live) or any(self._live.get(r.id) is not r for r in queued):
            raise InvariantBroken("a live request is not in exactly one queue")
        for request in self.waiting:
            if request.state is not State.WAITING or request.block_ids or request.num_computed:
                raise InvariantBroken(f"{request.id} waits with blocks or computed tokens")
        for request in self.running.values():
            if request.state is not State.RUNNING or not 0 <= request.num_computed < request.num_known:
                raise InvariantBroken(f"{request.id} runs with a count of {request.num_computed} computed tokens")
            if len(request.block_ids) != self.pool.blocks_for(request.num_computed):
                raise InvariantBroken(f"{request.id} has {len(request.block_ids)} blocks for its tokens")
