"""A runner that computes nothing: each request's tokens are those of its script. No torch, no weights, no cache.

Everything around it is the real thing: scheduler, blocks, preemption, wire, text. It honours a plan as a model
would: an item whose block tables do not cover its positions is an error, and the token drawn depends on the item
alone, so that chunks, preemption, batch neighbours and asynchronous scheduling change nothing.

The answer's token at index i, the first being 0, is the script's. Behind the end of the script stands the
checkpoint's end-of-sequence id. A request that is not to end there (`ignore_eos`, `min_tokens`, or a checkpoint
that has no such id) gets its script again from the start. Log-probabilities are those of a model that is certain:
0 for the scripted token, and no other one to report.
"""

from __future__ import annotations

import math
import time

from quire_engine.errors import InvariantBroken
from quire_engine.step import Scheduled, StepPlan, StepResult
from quire_schemas.wire import Sampling, TokenLogprobs


class ScriptedRunner:
    """Draws what scripts say; a step takes at least `step_time` seconds.

    `eos_token_ids` are the checkpoint's, `num_blocks` and `block_size` those of the cache that is not there.
    """

    def __init__(
        self, *, eos_token_ids: tuple[int, ...], num_blocks: int, block_size: int, step_time: float = 0.0
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._step_time = step_time

    def warm_up(self, seconds: float) -> None:
        """There is nothing to make ready."""

    def set_seats(self, seats: int) -> None:
        """Nothing here depends on it."""

    def execute(self, plan: StepPlan) -> StepResult:
        """The scripted token of every item that draws. Raises `InvariantBroken` for a plan that a cache could not
        carry out.
        """
        began = time.monotonic()
        tokens: dict[str, int] = {}
        logprobs: dict[str, TokenLogprobs] = {}
        of_prompts: dict[str, list[TokenLogprobs]] = {}
        for item in plan.items:
            self._check(item)
            if item.scoring is not None:
                wanted = item.scoring.prompt_logprobs
                of_prompts[item.request_id] = [_certain(token, wanted, item.scoring, 1) for token in item.targets]
            if item.draw is None:
                continue
            sampling = item.draw.sampling
            token = tokens[item.request_id] = self._token(sampling, item.end - item.draw.num_prompt)
            if sampling.logprobs is not None:
                logprobs[item.request_id] = _certain(token, sampling.logprobs, sampling)
        rest = began + self._step_time - time.monotonic()
        if rest > 0:
            time.sleep(rest)
        return StepResult(tokens, logprobs, prompt_logprobs=of_prompts)

    def _token(self, sampling: Sampling, index: int) -> int:
        script = sampling.script
        if script is None:
            raise InvariantBroken("a request without a script was scheduled")
        if index < len(script):
            return script[index]
        goes_on = sampling.ignore_eos or index < sampling.min_tokens or not self._eos_token_ids
        return script[index % len(script)] if goes_on else self._eos_token_ids[0]

    def _check(self, item: Scheduled) -> None:
        """What building addresses for a real cache would find."""
        covered = -(-item.end // self._block_size)
        for table in item.tables:
            if len(table) < covered:
                raise InvariantBroken(f"{item.request_id}: {len(table)} blocks for {item.end} tokens")
            if not all(0 <= block < self._num_blocks for block in table[item.start // self._block_size : covered]):
                raise InvariantBroken(f"{item.request_id}: a block outside the cache")
        if min(item.token_ids) < 0:
            raise InvariantBroken(f"{item.request_id}: a token that is not known")


def _certain(token: int, wanted: int | None, sampling: Sampling, rank: int = 0) -> TokenLogprobs:
    """What a model reports that knows the token."""
    named = tuple(0.0 if index == token else -math.inf for index in sampling.logprob_token_ids)
    return TokenLogprobs(token, 0.0, ((token, 0.0),) if wanted else (), rank, named)
