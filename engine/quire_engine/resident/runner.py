"""Begins plans on a device and takes their tokens later: the next plan is behind the one that runs before anyone
has seen its tokens.

What a token depends on is all there: the request table has the token drawn last, the plan the places, the draw
its parameters. So `begin` only enqueues work, and `finish` is the one place that waits, for a copy of the tokens
that was enqueued with it. Most steps run as one captured program (`program`); those with long prompts are launched
kernel by kernel.

A draw that depends on more than logits and position (penalties, bad words, grammars, log-probabilities, …) needs
the host between the head and the choice. A plan with such an item, or with states or scores to hand out, is not
`takes`n; `ModelRunner`, which can do all of it, carries it out on the same model and cache.

Legend: B items of the step, T new tokens, R items that draw, W hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from quire_engine.resident.program import StepProgram, mixed_sizes
from quire_engine.resident.table import RequestTable
from quire_engine.runner import NOT_FINITE, ModelRunner
from quire_engine.step import PENDING, Drawn, StepPlan, StepResult
from quire_kernels.paging import integers
from quire_kernels.triton import Served, TritonKernels
from quire_kernels.tuning import Report

log = logging.getLogger(__name__)

_DEPTH = 2
"""Steps with a staging of their own: the one that is being written, and the one that may be under way."""
TUNING_SECONDS = 30.0
"""What the first start on a machine may take longer to find the tilings that are fastest there."""
_BROKEN = -2
"""Instead of a token: the logits were not finite (`quire_kernels.triton.sample`)."""


@dataclass(slots=True)
class Begun:
    """A plan under way; `tokens` (host, [B] int32) in the order of `begun`: items that draw have theirs."""

    plan: StepPlan
    begun: StepPlan
    """`plan` with what was known by then."""
    tokens: Tensor
    done: torch.cuda.Event | None


@dataclass(slots=True)
class _Staging:
    """Host memory that the device reads and writes by itself, int32, and when it has done so."""

    decode: Tensor
    mixed: Tensor
    token_ids: Tensor
    drawn: Tensor
    done: torch.cuda.Event | None
    """When the step that it was used for last has ended."""


class ResidentRunner:
    """`Runner` with `begin` and `finish`. `general` carries out what does not fit the device alone."""

    def __init__(
        self,
        general: ModelRunner,
        *,
        seats: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        captures: bool,
    ) -> None:
        self._general = general
        self._model, self._kv = general.model, general.kv
        self._block_size, self._device = general.block_size, general.device
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._stream = torch.cuda.Stream(self._device) if captures else None  # type: ignore[no-untyped-call]
        self._seats = seats
        self.tuned = Report()
        """What came of choosing tilings."""
        self._resize(seats)

    def _resize(self, seats: int) -> None:
        """A new table, empty, for steps of `seats` items. Nothing may be under way.

        If that fails, all is as before.
        """
        groups = len(self._kv.groups)
        width = -(-self._max_model_len // self._block_size)
        table = RequestTable(seats, groups, width, self._block_size, self._device)
        program = StepProgram(
            self._model,
            self._kv,
            table,
            block_size=self._block_size,
            max_model_len=self._max_model_len,
            max_num_batched_tokens=self._max_num_batched_tokens,
            stream=self._stream,
        )

        room = self._room
        staging = [
            _Staging(
                room(seats, 3 + 2 * groups),
                room(seats, 4),
                room(mixed_sizes(self._max_num_batched_tokens)[-1]),
                room(seats),
                torch.cuda.Event() if self._device.type == "cuda" else None,  # type: ignore[no-untyped-call]
            )
            for _ in range(_DEPTH)
        ]
        self._table, self.program, self._staging, self._turn = table, program, staging, 0

    def set_seats(self, seats: int) -> None:
        """See `Runner`: room for them is made when they are all taken."""
        self._seats = seats

    @torch.inference_mode()
    def warm_up(self, seconds: float) -> None:
        """See `Runner`: choose tilings, capture programs, compile and load what launched steps need besides."""
        self._tune(self._stream)
        if self._stream is None:
            return
        others = self._table.seats - 1
        for sequences in self._crowds():
            self._rehearse(sequences - 1, 2)
        self._rehearse(min(1, others), max(2, self._max_num_batched_tokens - 1))
        self.program.warm_up(seconds)
        torch.cuda.synchronize()

    @property
    def served(self) -> Served:
        """What steps will be, as far as tilings depend on it."""
        profile = self._model.profile
        return Served(
            layers=[(group.window, self._kv.tensors) for group in self._kv.groups],
            heads=profile.num_heads,
            head_dim=profile.head_dim,
            number=self._model.dtype,
            sequences=self._table.seats,
            tokens=self._max_num_batched_tokens,
            longest=self._max_model_len,
            softcap=profile.attention_softcap,
            sinks=profile.sinks,
            chosen=0 if profile.experts is None else profile.experts.num_experts_per_tok,
        )

    @torch.inference_mode()
    def take_tilings(self) -> None:
        """Launch steps with the tilings that are known on this machine. Nothing is measured, or decided."""
        self._tune(None)

    def _tune(self, stream: torch.cuda.Stream | None) -> None:
        """From now on steps are launched with the same tilings, and by the next engine like this, too."""
        kernels = self._model.kernels
        if not isinstance(kernels, TritonKernels):
            return
        self.tuned = kernels.tune(self.served, TUNING_SECONDS, stream)
        for name, default, taken, before, after in self.tuned.measured:
            if taken != default:
                log.info("tiling of %s: %s, %.1f us for %.1f", name, tuple(taken), after * 1e6, before * 1e6)
        if self.tuned.families:
            log.info("%s", self.tuned)

    def _crowds(self) -> list[int]:
        """Numbers of sequences of a launched step whose attention is by kernels of its own, the fewest of each."""
        kernels, most = self._model.kernels, self._table.seats
        if not isinstance(kernels, TritonKernels):
            return [most]
        return kernels.crowds(self._model.profile.num_kv_heads, most)

    def _rehearse(self, singles: int, longest: int) -> None:
        """Launch a step of padding, as if it were that many sequences with one new token, and one with more."""
        counts = (*(1,) * singles, longest)
        words = torch.tensor([(-1, self._max_model_len - count, count, 1) for count in counts], dtype=torch.int32)
        self.program.launched(words, len(counts), torch.zeros(sum(counts), dtype=torch.int32))

    def execute(self, plan: StepPlan) -> StepResult:
        """See `Runner`."""
        if plan.num_items > self._table.seats:
            # what was captured is of no more use, and its memory may be needed
            self.program.release()
            self._resize(max(self._seats, plan.num_items))
        if self.takes(plan):
            return self.finish(self.begin(plan))
        return self._general.execute(plan)

    def takes(self, plan: StepPlan) -> bool:
        """Whether the device can carry out `plan`, which may have pending tokens, without the host."""
        if plan.num_items > self._table.seats:
            return False
        for item in plan.others:
            if item.targets or item.pooled:
                return False
            draw = item.draw
            if draw is not None and not (draw.is_free and item.end - draw.num_prompt >= draw.sampling.min_tokens):
                return False
        return True

    def begin(self, plan: StepPlan) -> Begun:
        """Enqueue all of a plan that `takes` accepts. Raises what the model or the device raises."""
        try:
            with torch.inference_mode():
                return self._begin(plan)
        except BaseException:
            # what was about to be sent may not have been: nothing on the device is taken for granted
            self._table.forget()
            raise

    def _begin(self, plan: StepPlan) -> Begun:
        self.copy_blocks(plan.copies)
        others, table = plan.others, self._table
        count = plan.num_items
        staging = self._staging[self._turn]
        self._turn = (self._turn + 1) % _DEPTH
        if all(len(item.token_ids) == 1 and item.draw is not None for item in others):
            staging.decode.numpy()[:count] = table.addresses(plan)
            drawn = self.program.decode(staging.decode, count)
        else:
            # a pending token is `LAST` to the device
            flat = [] if plan.steady is None else list(plan.steady.tokens or repeat(PENDING, len(plan.steady)))
            for item in others:
                flat += item.token_ids
            staging.mixed.numpy()[:count] = table.spans(plan)
            if self.program.fits(len(flat)):
                token_ids = staging.token_ids[: len(flat)]
                token_ids.numpy()[:] = flat
                drawn = self.program.mixed(staging.mixed, count, token_ids)
            else:
                token_ids = self._room(len(flat)).copy_(integers(flat, torch.int32))
                drawn = self.program.launched(staging.mixed, count, token_ids)
        tokens = staging.drawn[:count]
        tokens.copy_(drawn[:count], non_blocking=True)
        if staging.done is not None:
            staging.done.record()
        return Begun(plan, plan, tokens, staging.done)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Make each second block what the first of its pair is, behind all that was begun."""
        if copies:
            self._kv.copy_blocks(copies)

    def finish(self, begun: Begun) -> StepResult:
        """Wait for a plan that was begun."""
        if begun.done is not None:
            begun.done.synchronize()
        drawn = begun.tokens.tolist()
        steady, others = begun.begun.steady, begun.begun.others
        names = () if steady is None else steady.members.names
        own = zip(others, drawn[len(names) :], strict=True)
        alone = {item.request_id: token for item, token in own if item.draw is not None}
        tokens = Drawn(names, drawn[: len(names)] if others else drawn, alone) if names else alone
        if _BROKEN not in drawn:
            return StepResult(tokens)
        # a plan behind this one must not go on with what is no token
        broken = [name for name, token in tokens.items() if token == _BROKEN]
        return StepResult(
            {name: token for name, token in tokens.items() if token != _BROKEN},
            failures=dict.fromkeys(broken, NOT_FINITE),
        )

    def _room(self, *shape: int) -> Tensor:
        """On the host, for what the device reads and writes by itself, int32."""
        return torch.empty(shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")
