"""Schedulers, requests and steps for the tests of the scheduler: no model, and every draw gives one token."""

from __future__ import annotations

from typing import Any

from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
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
    prompts: int | None = None,
) -> Scheduler:
    pool = BlockPool(num_blocks, block_size)
    limits = BatchLimits(max_num_seqs, budget, chunked, max_prefill_tokens=prompts)
    return Scheduler(pool, limits, max_model_len=max_model_len, clock=lambda: 0.0)


def make_request(name: str, prompt: int, max_tokens: int, **fields: Any) -> Request:
    message = Generate(name, [100 + i for i in range(prompt)], Sampling(max_tokens=max_tokens, **fields))
    return Request.of(message, eos_token_ids=(EOS,), seed=0, received_at=0.0)


def share(request: Request, kin: str = "all") -> Request:
    request.share_with(kin)
    return request


def scripted(plan: StepPlan, token: int = 50) -> StepResult:
    """Every draw of `plan` gives `token`."""
    return StepResult({item.request_id: token for item in plan.items if item.draw is not None})


def step(scheduler: Scheduler, token: int = 50) -> tuple[StepPlan, list[Delta]]:
    plan = scheduler.schedule()
    deltas = scheduler.commit(plan, scripted(plan, token))
    scheduler.check_integrity()
    return plan, deltas
