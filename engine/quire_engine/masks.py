"""Masks for the rows of a step that a grammar binds, made while the model computes.

What a row's grammar has to know is in the plan, so a thread can begin with the step and is asked for the result
when the logits are there. The compiler works without Python's lock.

Legend: M bound rows, V vocabulary, B bytes of a packed row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_engine.errors import GrammarFailed
from quire_engine.step import Scheduled


@dataclass(frozen=True, slots=True)
class Masks:
    """`rows` of the step that are bound, their packed bits [M, B] uint8, and why the grammar of others failed."""

    rows: tuple[int, ...]
    bits: Tensor
    failed: dict[int, str]

    def apply(self, logits: Tensor) -> None:
        """-inf in `logits` [R, V] for every token that a bound row does not allow, in place."""
        if not self.rows:
            return
        vocabulary, device = logits.shape[1], logits.device
        octets = torch.arange(256, dtype=torch.int32, device=device).unsqueeze(1)
        allowed = (octets >> torch.arange(8, dtype=torch.int32, device=device)) & 1
        penalty_of = torch.where(allowed == 1, 0.0, -math.inf)
        # eight tokens at a time, and added: on a CPU several times as fast as to fill by a mask of booleans
        bits = self.bits.to(device).flatten().int()
        penalty_MV = penalty_of.index_select(0, bits).view(len(self.rows), -1)[:, :vocabulary]
        if len(self.rows) == logits.shape[0]:
            logits.add_(penalty_MV)
        else:
            logits.index_add_(0, torch.tensor(self.rows, device=device), penalty_MV)


class MaskThread:
    """One thread that makes masks."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, rows: Sequence[Scheduled]) -> Future[Masks] | None:
        """Start on the masks of a step's rows; None if no row is bound."""
        if not any(row.draw is not None and row.draw.matcher is not None for row in rows):
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "masks")
        return self._thread.submit(masks, rows)


def masks(rows: Sequence[Scheduled]) -> Masks:
    """The masks of a step's rows, one after the other."""
    bound: list[int] = []
    packed = bytearray()
    failed: dict[int, str] = {}
    for number, row in enumerate(rows):
        draw = row.draw
        if draw is None or draw.matcher is None:
            continue
        output = row.history[draw.num_prompt :]
        may_end = len(output) >= draw.sampling.min_tokens and not draw.sampling.ignore_eos
        try:
            packed += draw.matcher.allowed(output, may_end=may_end)
        except GrammarFailed as error:
            failed[number] = str(error)
        else:
            bound.append(number)
    bits = torch.frombuffer(packed, dtype=torch.uint8) if packed else torch.empty(0, dtype=torch.uint8)
    return Masks(tuple(bound), bits.view(len(bound), -1) if bound else bits, failed)
