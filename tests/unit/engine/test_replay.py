"""The same trace gives the same plans: what the scheduler decides depends on nothing but its input."""

from __future__ import annotations

import random

from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_engine.step import StepPlan, StepResult
from quire_schemas.wire import Generate, Sampling


def plans_of(seed: int) -> list[StepPlan]:
    """Sixty requests that come and go over a pool that is too small for them, with a clock of its own."""
    rng = random.Random(seed)
    ticks = iter(range(10**9))
    limits = BatchLimits(max_num_seqs=12, max_num_batched_tokens=48, chunked_prefill=True)
    scheduler = Scheduler(
        BlockPool(40, 16), limits, max_model_len=256, clock=lambda: next(ticks) * rng.choice([1e-3, 2.0])
    )
    trace = random.Random(seed + 1)
    plans: list[StepPlan] = []
    added = 0
    while added < 60 or scheduler.has_work:
        if added < 60 and trace.random() < 0.5:
            prompt = [trace.randrange(100) for _ in range(trace.randrange(1, 120))]
            sampling = Sampling(max_tokens=trace.randrange(1, 60), temperature=0.0)
            request = Request.of(Generate(str(added), prompt, sampling), eos_token_ids=(), seed=0, received_at=0.0)
            scheduler.add(request)
            added += 1
        if trace.random() < 0.02 and added:
            scheduler.abort(str(trace.randrange(added)))
        plan = scheduler.schedule()
        plans.append(plan)
        drawn = {item.request_id: (item.end * 7 + int(item.request_id)) % 100 for item in plan.items if item.draw}
        scheduler.commit(plan, StepResult(drawn))
    return plans


def test_a_seeded_trace_replays_to_the_same_plans() -> None:
    first, again = plans_of(3), plans_of(3)
    assert first == again
    assert repr(first) == repr(again), "a plan prints all that it is"
    assert any(plan.preempted for plan in first), "the trace must put the scheduler under pressure"
    assert plans_of(4) != first
