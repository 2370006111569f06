"""How the kernels of `attention` may be cut, and what their cuts are timed on where an engine starts.

Legend: as `attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from quire_kernels.paging import PagedBatch
from quire_kernels.triton.attention import (
    Chip,
    StepAttention,
    decode_tuning,
    num_splits,
    prefill_tuning,
    rungs,
)
from quire_kernels.tuning import Choices, Family, Trial

_TRIED_TOKENS = 2048
"""Of the sequences that cuts are timed with."""


class DecodeCut(NamedTuple):
    """How `_decode` is cut, and the most splits."""

    block_n: int
    num_warps: int
    num_stages: int
    splits: int

    @property
    def tuning(self) -> dict[str, int]:
        return {"BLOCK_N": self.block_n, "num_warps": self.num_warps, "num_stages": self.num_stages}


class PromptsCut(NamedTuple):
    """How `_prefill` is cut."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int

    @property
    def tuning(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "PROGRAMS": self.programs,
        }


Cut = DecodeCut | PromptsCut

_DECODE_TRIED = ((64, 2, 3), (64, 4, 3), (128, 4, 3), (32, 4, 2))
_PROMPTS_TRIED = (
    PromptsCut(128, 128, 8, 3, 1), PromptsCut(128, 64, 8, 3, 1), PromptsCut(128, 64, 4, 3, 2),
    PromptsCut(128, 64, 8, 2, 1), PromptsCut(64, 64, 4, 2, 2), PromptsCut(64, 32, 4, 2, 2),
)  # fmt: skip
"""Timed where an engine starts."""


def decode_candidates(chip: Chip, rung: int, head_dim: int, kept: torch.dtype) -> tuple[DecodeCut, ...]:
    """The default at a rung, and others worth trying. None has more splits: their room is counted."""
    tuning = decode_tuning(chip, rung, head_dim, kept)
    splits = num_splits(chip.multiprocessors, rung, 1 << 30)
    default = DecodeCut(tuning["BLOCK_N"], tuning["num_warps"], tuning["num_stages"], splits)
    found = [default, *(DecodeCut(*cut, splits) for cut in _DECODE_TRIED)]
    if splits > 1:
        found.append(default._replace(splits=splits // 2))
    return tuple(dict.fromkeys(found))


def prompts_candidates(
    chip: Chip, head_dim: int, number: torch.dtype, kept: torch.dtype
) -> tuple[PromptsCut, ...]:
    """The default, and others worth trying."""
    tuning = prefill_tuning(chip, head_dim, number, kept)
    default = PromptsCut(*(tuning[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "PROGRAMS")))
    return tuple(dict.fromkeys((default, *(() if number.itemsize > 2 else _PROMPTS_TRIED))))


def trials(
    chip: Chip,
    prepare: Callable[[PagedBatch, Chip], StepAttention],
    caches: Sequence[Tensor],
    query: Tensor,
    *,
    sequences: int,
    tokens: int,
    longest: int,
    sinks: bool = False,
) -> Iterator[Trial]:
    """Of layers whose keys and values are `caches`, [2, N, P, K, any], for up to so many sequences, and tokens of
    a step: sequences of `_TRIED_TOKENS` tokens, or as many as there are. What lies in the caches is only read.
    `prepare` is the attention of a step on such layers, `query` [0, H, D] one of no tokens; `sinks`: heads have
    some.
    """
    _, blocks, block_size, kv_heads, _ = caches[0].shape
    head_dim, kept = query.shape[2], caches[0].dtype
    facts = prepare(_step(caches[0], [], 0), chip).facts(query, caches[0], sinks)

    def each(kernel: str, rung: int, counts: list[int], held: int, cuts: tuple[Cut, ...]) -> Iterator[Trial]:
        family, given = Family(kernel, facts, rung), partial(_given, caches[0], query, counts, held, sinks)
        for cache in caches:
            nbytes = len(counts) * held * cache[:, 0].nbytes
            yield Trial(family, cuts, given, partial(_launch, chip, prepare, cache, family), nbytes)

    for below, rung in pairwise((0, *rungs(chip.multiprocessors))):
        count = min(rung // kv_heads, sequences, blocks)
        if count * kv_heads > below:
            held = max(1, min(min(longest, _TRIED_TOKENS) // block_size, blocks // count))
            cuts = decode_candidates(chip, rung, head_dim, kept)
            yield from each("attention.decode", rung, [1] * count, held, cuts)
    held = min(longest, tokens, _TRIED_TOKENS, blocks * block_size) // block_size
    if held * block_size > 1:
        prompts = prompts_candidates(chip, head_dim, query.dtype, kept)
        yield from each("attention.prompts", 0, [held * block_size], held, prompts)


def _step(cache: Tensor, counts: Sequence[int], held: int) -> PagedBatch:
    """Sequences with `counts` new tokens each, the last of `held` blocks."""
    block_size = cache.shape[2]
    batch = PagedBatch.build(
        starts=[held * block_size - count for count in counts],
        query_lens=counts,
        block_tables=[range(at * held, (at + 1) * held) for at in range(len(counts))],
        logits=[1] * len(counts),
        block_size=block_size,
        device=cache.device,
    )
    # as an engine's steps have it
    return replace(batch, table_rows=torch.arange(len(counts), dtype=torch.int32, device=cache.device))


_Given = tuple[PagedBatch, Tensor, Tensor | None]
"""A step, its queries, and what sinks its heads have."""


def _given(cache: Tensor, query: Tensor, counts: Sequence[int], held: int, sinks: bool) -> _Given:
    some = query.new_zeros(query.shape[1], dtype=torch.float32) if sinks else None
    return _step(cache, counts, held), query.new_zeros((sum(counts), *query.shape[1:])), some


def _launch(
    chip: Chip,
    prepare: Callable[[PagedBatch, Chip], StepAttention],
    cache: Tensor,
    family: Family,
    given: _Given,
    cut: Cut,
) -> Tensor:
    choices, (batch, query, sinks) = Choices(), given
    choices.take(family, cut)
    return prepare(batch, replace(chip, choices=choices))(query, cache, 1.0, sinks)
