"""Masks for the rows of a step that a grammar binds, made beside the model or behind it.

What a row's grammar has to know is in the plan, so a thread can begin with the step and is asked for the result
when the logits are there. The compiler works without Python's lock. Where the model's own threads have all
cores, there is nothing to gain: whoever takes one from them for a moment holds up all of them. The masks are
then made behind the logits.

Legend: M bound rows, V vocabulary, B bytes of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quire_engine.errors import GrammarFailed
from quire_engine.step import Scheduled
from quire_kernels import Kernels


@dataclass(frozen=True, slots=True)
class Masks:
    """`rows` of the step that are bound, their packed bits [M, B] uint8, and why the grammar of others failed."""

    rows: tuple[int, ...]
    bits: Tensor
    failed: dict[int, str]

    def apply(self, logits: Tensor, kernels: Kernels) -> None:
        """-inf in `logits` [R, V] for every token that a bound row does not allow, in place."""
        if self.rows:
            rows = torch.tensor(self.rows, device=logits.device)
            kernels.mask_tokens(logits, rows, self.bits.to(logits.device))


class MaskMaker:
    """Makes masks, `meanwhile` the model computes or behind it."""

    def __init__(self, *, meanwhile: bool) -> None:
        self._meanwhile = meanwhile
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, rows: Sequence[Scheduled]) -> Callable[[], Masks] | None:
        """What gives the masks of a step's rows when it is called; None if no row is bound."""
        if not any(row.draw is not None and row.draw.matcher is not None for row in rows):
            return None
        if not self._meanwhile:
            return partial(masks, rows)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "masks")
        return self._thread.submit(masks, rows).result


def masks(rows: Sequence[Scheduled]) -> Masks:
    """The masks of a step's rows, one after the other."""
    made: list[int] = []
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
            made.append(number)
    bits = torch.frombuffer(packed, dtype=torch.uint8) if packed else torch.empty(0, dtype=torch.uint8)
    return Masks(tuple(made), bits.view(len(made), -1) if made else bits, failed)
