"""Carries out a plan: `StepPlan` -> tensors -> forward -> tokens. Owns the model and the KV tensors.

It knows nothing of requests: all that a step needs is in the plan, and nothing is kept between steps but what the
plan's slots were filled with. (A matcher that comes with a draw remembers how far it has read; see `grammar`.)
Carrying out the same item twice writes the same values to the same slots and draws the same token, so a step that
failed can be tried again in parts.

Log-probabilities of prompt tokens need the logits of all of the prompt's rows. These are computed a slice at a
time, so that no more of them are there at once than of the rows that can draw in one step.

Legend: T new tokens of a step, R rows whose states are wanted, S items that are pooled, W hidden width, V
vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from quire_engine.json_schema import REFUSED
from quire_engine.masks import MaskMaker, Masks
from quire_engine.models import DecoderModel, KVCache
from quire_engine.sampler import Drawer, likeliest, sample, score
from quire_engine.step import Scheduled, StepPlan, StepResult
from quire_kernels.paging import PagedBatch, integers
from quire_schemas.wire import Sampling, TokenLogprobs

NOT_FINITE = ("numerical_error", "the model's logits are not finite for this request")
_STATES_NOT_FINITE = ("numerical_error", "the model's hidden states are not finite for this request")
_NO_TOKEN_LEFT = (
    "no_token_left",
    "what the request allows and bans leaves no token to choose: see allowed_token_ids, bad_words, min_tokens, "
    "logit_bias and structured_outputs",
)


class Runner(Protocol):
    """Whatever carries out plans."""

    def execute(self, plan: StepPlan) -> StepResult:
        """The result of every item of a plan without pending tokens. Raises what the model or the device
        raises.
        """

    def warm_up(self, seconds: float) -> None:
        """Make ready for steps of all shapes, as far as the time lasts."""

    def set_seats(self, seats: int) -> None:
        """A step may have as many items from now on."""


class ModelRunner:
    """A model and its cache on one device. `head_rows`: of so many rows logits are there at once."""

    def __init__(
        self,
        model: DecoderModel,
        kv: KVCache,
        *,
        block_size: int,
        head_rows: int,
        device: torch.device,
        masks: MaskMaker,
        drawer: Drawer | None = None,
    ) -> None:
        self.model = model
        self.kv = kv
        self.block_size = block_size
        self.head_rows = head_rows
        self.device = device
        self.masks = masks
        self.drawer = drawer

    def warm_up(self, seconds: float) -> None:
        """Every step is launched as it comes."""

    def set_seats(self, seats: int) -> None:
        """Nothing here depends on it."""

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute every item of `plan` and draw where it says so."""
        items = plan.items
        if plan.copies:
            self.kv.copy_blocks(plan.copies)
        rows = [item for item in items if item.draw is not None]
        parts = [rows[at : at + self.head_rows] for at in range(0, len(rows), self.head_rows)]
        pending = [self.masks.begin(part) for part in parts]
        batches = [
            PagedBatch.build(
                starts=[item.start for item in items],
                query_lens=[len(item.token_ids) for item in items],
                block_tables=[item.tables[group] for item in items],
                logits=[item.num_rows for item in items],
                block_size=self.block_size,
                device=self.device,
            )
            for group in range(len(self.kv.groups))
        ]
        flat = [token for item in items for token in item.token_ids]
        token_ids_T = integers(flat, torch.int64).to(self.device)
        states_RW = self.model.forward(token_ids_T, batches, self.kv, [item.adapter for item in items])
        pooled: dict[str, bytes] = {}
        failures: dict[str, tuple[str, str]] = {}
        scores: dict[str, list[TokenLogprobs]] = {}
        if any(item.pooled or item.targets for item in items):
            firsts = list(itertools.accumulate((item.num_rows for item in items), initial=0))
            pooled = _pool(items, firsts, states_RW, failures)
            scores = self._score(items, firsts, states_RW, failures)
            ends = zip(items, firsts[1:], strict=True)
            states_RW = states_RW[[end - 1 for item, end in ends if item.draw is not None]]
        tokens: dict[str, int] = {}
        logprobs: dict[str, TokenLogprobs] = {}
        for at, part, masks in zip(itertools.count(step=self.head_rows), parts, pending, strict=False):
            drawn = self._draw(states_RW[at : at + len(part)], part, masks)
            tokens.update(drawn.tokens)
            logprobs.update(drawn.logprobs)
            failures.update(drawn.failures)
        return StepResult(tokens, logprobs, failures, pooled, scores)

    def _draw(
        self, states_RW: Tensor, rows: Sequence[Scheduled], pending: Callable[[], Masks] | None
    ) -> StepResult:
        """What `rows` draw of their states."""
        masks = None
        if all(item.draw is not None and item.draw.is_plain for item in rows):
            drawn = likeliest(*self.model.best(states_RW))
        else:
            logits_RV = self.model.logits(states_RW)
            masks = pending() if pending is not None else None
            drawn = sample(logits_RV, rows, self.model.kernels, masks, self.drawer)
        names = [row.request_id for row in rows]
        failures = {names[r]: _NO_TOKEN_LEFT for r in drawn.stuck}
        if masks is not None:
            failures.update({names[r]: (REFUSED, why) for r, why in masks.failed.items()})
        failures.update({names[r]: NOT_FINITE for r in drawn.broken})
        return StepResult(
            dict(zip(names, drawn.tokens, strict=True)),
            {names[r]: entry for r, entry in drawn.logprobs.items()},
            failures,
        )

    def _score(
        self,
        items: Sequence[Scheduled],
        firsts: Sequence[int],
        states_RW: Tensor,
        failures: dict[str, tuple[str, str]],
    ) -> dict[str, list[TokenLogprobs]]:
        """Of each item with targets, whose rows begin at its place in `firsts`, their log-probabilities."""
        scores: dict[str, list[TokenLogprobs]] = {}
        places: list[int] = []
        targets: list[tuple[str, int, Sampling]] = []
        for item, first in zip(items, firsts, strict=False):
            if item.scoring is not None and item.targets:
                scores[item.request_id] = []
                places += range(first, first + len(item.targets))
                targets += [(item.request_id, target, item.scoring) for target in item.targets]
        for at in range(0, len(places), self.head_rows):
            some = targets[at : at + self.head_rows]
            logits = self.model.logits(states_RW[places[at : at + self.head_rows]])
            for finite, (name, _, _) in zip(torch.isfinite(logits.amax(dim=-1)).tolist(), some, strict=True):
                if not finite:
                    failures[name] = NOT_FINITE
            entries = score(logits, [target for _, target, _ in some], [sampling for _, _, sampling in some])
            for (name, _, _), entry in zip(some, entries, strict=True):
                scores[name].append(entry)
        return scores


def _pool(
    items: Sequence[Scheduled], firsts: Sequence[int], states_RW: Tensor, failures: dict[str, tuple[str, str]]
) -> dict[str, bytes]:
    """The sums of the states of each item that is pooled, whose rows begin at its place in `firsts`."""
    names: list[str] = []
    sums: list[Tensor] = []
    for item, first in zip(items, firsts, strict=False):
        if item.pooled:
            names.append(item.request_id)
            sums.append(states_RW[first : first + item.pooled].sum(0, dtype=torch.float32))
    if not sums:
        return {}
    sums_SW = torch.stack(sums)
    host = sums_SW.cpu().numpy()
    for name, finite in zip(names, sums_SW.isfinite().all(1).tolist(), strict=True):
        if not finite:
            failures[name] = _STATES_NOT_FINITE
    return {name: host[number].tobytes() for number, name in enumerate(names)}
