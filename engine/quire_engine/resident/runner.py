"""Begins plans on a device and takes their tokens later: the next plan is behind the one that runs before anyone
has seen its tokens.

What a token depends on is all there: the request table has the token drawn last, the plan the places, the draw
its parameters. So `begin` only enqueues work, and `finish` is the one place that waits, for a copy of the tokens
that was enqueued with it. Steps of one token a request run as one captured program (`decode`); others, with
prompts in them, are launched kernel by kernel.

A draw that depends on more than logits and position (penalties, bad words, grammars, log-probabilities, …) needs
the host between the head and the choice. A plan with such an item, or with states or scores to hand out, is not
`takes`n; `ModelRunner`, which can do all of it, carries it out on the same model and cache.

Legend: T new tokens of the step, R rows that draw, W hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_engine.resident.decode import DecodeProgram
from quire_engine.resident.table import RequestTable
from quire_engine.runner import NOT_FINITE, ModelRunner
from quire_engine.step import PENDING, Scheduled, StepPlan, StepResult
from quire_kernels.paging import PagedBatch
from quire_kernels.triton import sample

_DEPTH = 2
"""Steps with a staging of their own: the one that is being written, and the one that may be under way."""
_BROKEN = -2
"""Instead of a token: the logits were not finite (`quire_kernels.triton.sample`)."""


@dataclass(slots=True)
class Begun:
    """A plan under way; `items` are those that draw, in the order of `tokens` (host, [R] int32)."""

    plan: StepPlan
    items: Sequence[Scheduled]
    tokens: Tensor
    done: torch.cuda.Event | None


@dataclass(slots=True)
class _Staging:
    """Host memory that the device reads and writes by itself."""

    words: Tensor
    tokens: Tensor


class ResidentRunner:
    """`Runner` with `begin` and `finish`. `general` carries out what does not fit the device alone."""

    def __init__(self, general: ModelRunner, *, seats: int, max_model_len: int, captures: bool) -> None:
        self._general = general
        self._model, self._kv = general.model, general.kv
        self._block_size, self._device = general.block_size, general.device
        self._max_model_len = max_model_len
        self._captures = captures
        self._resize(seats)

    def _resize(self, seats: int) -> None:
        """A new table, empty, for steps of `seats` items. Nothing may be under way."""
        groups = len(self._kv.groups)
        width = -(-self._max_model_len // self._block_size)
        self._table = RequestTable(seats, groups, width, self._device)
        self.program = DecodeProgram(
            self._model,
            self._kv,
            self._table,
            block_size=self._block_size,
            max_model_len=self._max_model_len,
            captures=self._captures,
        )
        pinned = self._device.type == "cuda"
        self._staging = [
            _Staging(
                torch.empty((seats, 3 + 2 * groups), dtype=torch.int32, pin_memory=pinned),
                torch.empty(seats, dtype=torch.int32, pin_memory=pinned),
            )
            for _ in range(_DEPTH)
        ]
        self._turn = 0

    def execute(self, plan: StepPlan) -> StepResult:
        """See `Runner`."""
        if len(plan.items) > self._table.seats:
            self._resize(len(plan.items))
        if self.takes(plan):
            return self.finish(self.begin(plan))
        return self._general.execute(plan)

    def takes(self, plan: StepPlan) -> bool:
        """Whether the device can carry out `plan`, which may have pending tokens, without the host."""
        if len(plan.items) > self._table.seats:
            return False
        for item in plan.items:
            if item.targets or item.pooled:
                return False
            draw = item.draw
            if draw is not None and not (draw.is_free and item.end - draw.num_prompt >= draw.sampling.min_tokens):
                return False
        return True

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> Begun:
        """Enqueue all of a plan that `takes` accepts. Raises what the model or the device raises."""
        try:
            return self._begin(plan)
        except BaseException:
            # what was about to be sent may not have been: nothing on the device is taken for granted
            self._table.forget()
            raise

    def _begin(self, plan: StepPlan) -> Begun:
        if plan.copies:
            self._kv.copy_blocks(plan.copies)
        items = plan.items
        staging = self._staging[self._turn]
        self._turn = (self._turn + 1) % _DEPTH
        if all(len(item.token_ids) == 1 and item.draw is not None for item in items):
            drawing: Sequence[Scheduled] = items
            words = staging.words[: len(items)]
            words.numpy()[:] = self._table.addresses(items)
            drawn = self.program.run(words)
        else:
            drawing = [item for item in items if item.draw is not None]
            drawn = self._mixed(items, drawing)
        tokens = staging.tokens[: len(drawing)]
        tokens.copy_(drawn[: len(drawing)], non_blocking=True)
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return Begun(plan, drawing, tokens, done)

    def finish(self, begun: Begun) -> StepResult:
        """Wait for a plan that was begun."""
        if begun.done is not None:
            begun.done.synchronize()
        drawn = begun.tokens.tolist()
        tokens = dict(zip([item.request_id for item in begun.items], drawn, strict=True))
        if _BROKEN not in drawn:
            return StepResult(tokens)
        return StepResult(
            tokens, failures={name: NOT_FINITE for name, token in tokens.items() if token == _BROKEN}
        )

    def _mixed(self, items: Sequence[Scheduled], drawing: Sequence[Scheduled]) -> Tensor:
        """Prompts and others in one step, launched one by one; the tokens of those `drawing`, [R] int32."""
        table, device = self._table, self._device
        rows = table.rows(drawing)
        flat: list[int] = []
        waiting: list[int] = []
        sources: list[int] = []
        row_of = iter(rows)
        for item in items:
            row = next(row_of) if item.draw is not None else -1
            if item.token_ids[-1] == PENDING:
                waiting.append(len(flat) + len(item.token_ids) - 1)
                sources.append(row)
            flat += item.token_ids
        batches = [
            PagedBatch.build(
                starts=[item.start for item in items],
                query_lens=[len(item.token_ids) for item in items],
                block_tables=[item.tables[group] for item in items],
                logits=[item.num_rows for item in items],
                block_size=self._block_size,
                device=device,
            )
            for group in range(len(self._kv.groups))
        ]
        ends = [item.end for item in drawing]
        token_ids_T = self._send(torch.tensor(flat, dtype=torch.int64))
        facts = self._send(torch.tensor([*waiting, *sources, *rows, *ends], dtype=torch.int32))
        cut, count = len(waiting), len(rows)
        if waiting:
            drawn = table.last_token[facts[cut : 2 * cut].long()]
            token_ids_T.index_copy_(0, facts[:cut].long(), drawn.long())
        states_RW = self._model.forward(token_ids_T, batches, self._kv)
        tokens = torch.empty(count, dtype=torch.int32, device=device)
        if count:
            at = 2 * cut
            sample.draw(
                self._model.narrow_logits(states_RW),
                facts[at : at + count],
                facts[at + count :],
                table.draws,
                tokens,
                table.last_token,
                self.program.scratch,
            )
        return tokens

    def _send(self, host: Tensor) -> Tensor:
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)
