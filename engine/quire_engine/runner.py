"""Carries out a plan: `StepPlan` -> tensors -> forward -> tokens. Owns the model and the KV tensors.

It knows nothing of requests: all that a step needs is in the plan, and nothing is kept between steps but what the
plan's slots were filled with. Carrying out the same item twice writes the same values to the same slots and
draws the same token, so a step that failed can be tried again in parts.

Legend: T new tokens of a step, R rows that draw or are pooled, S items that are pooled, W hidden width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from quire_engine.models import DecoderModel, KVCache
from quire_engine.sampler import sample
from quire_engine.step import Scheduled, StepPlan, StepResult
from quire_kernels.paging import PagedBatch


class Runner(Protocol):
    """Whatever carries out plans."""

    def execute(self, plan: StepPlan) -> StepResult:
        """The result of every item of a plan without pending tokens. Raises what the model or the device
        raises.
        """


class ModelRunner:
    """A model and its cache on one device."""

    def __init__(self, model: DecoderModel, kv: KVCache, *, block_size: int, device: torch.device) -> None:
        self.model = model
        self.kv = kv
        self.block_size = block_size
        self.device = device

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute every item of `plan` and draw where it says so."""
        items = plan.items
        if plan.copies:
            self.kv.copy_blocks(plan.copies)
        rows = [item for item in items if item.draw is not None]
        wanted = [item.pooled or int(item.draw is not None) for item in items]
        batches = [
            PagedBatch.build(
                starts=[item.start for item in items],
                query_lens=[len(item.token_ids) for item in items],
                block_tables=[item.tables[group] for item in items],
                logits=wanted,
                block_size=self.block_size,
                device=self.device,
            )
            for group in range(len(self.kv.groups))
        ]
        flat = [token for item in items for token in item.token_ids]
        token_ids_T = torch.tensor(flat, dtype=torch.int64, device=self.device)
        states_RW = self.model.forward(token_ids_T, batches, self.kv)
        pooled: dict[str, bytes] = {}
        broken: dict[str, tuple[str, str]] = {}
        if any(item.pooled for item in items):
            pooled, broken, states_RW = _pool(items, wanted, states_RW)
        if not rows:
            return StepResult({}, failures=broken, states=pooled)
        drawn = sample(self.model.logits(states_RW), rows)
        return StepResult(
            tokens={row.request_id: token for row, token in zip(rows, drawn.tokens, strict=True)},
            logprobs={rows[r].request_id: entry for r, entry in drawn.logprobs.items()},
            failures={
                rows[r].request_id: ("numerical_error", "the model's logits are not finite for this request")
                for r in drawn.broken
            }
            | broken,
            states=pooled,
        )


def _pool(
    items: Sequence[Scheduled], wanted: Sequence[int], states_RW: Tensor
) -> tuple[dict[str, bytes], dict[str, tuple[str, str]], Tensor]:
    """The sums of pooled states, whose are not finite, and the states of the rows that draw."""
    names: list[str] = []
    sums: list[Tensor] = []
    drawing: list[int] = []
    at = 0
    for item, count in zip(items, wanted, strict=True):
        if item.pooled:
            names.append(item.request_id)
            sums.append(states_RW[at : at + count].sum(0, dtype=torch.float32))
        elif count:
            drawing.append(at)
        at += count
    sums_SW = torch.stack(sums)
    finite = sums_SW.isfinite().all(1).tolist()
    host = sums_SW.cpu().numpy()
    pooled = {name: host[number].tobytes() for number, name in enumerate(names)}
    message = ("numerical_error", "the model's hidden states are not finite for this request")
    broken = {name: message for name, fine in zip(names, finite, strict=True) if not fine}
    return pooled, broken, states_RW[drawing]
