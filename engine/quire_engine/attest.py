"""Whether a sequence gets the same numbers whatever else is in its steps: computed in several ways, bit by bit.

What has to come out the same: a prompt computed whole, in chunks, with its last tokens one by one as a text is
written, and among other sequences. All of it is done with the model, the cache and the kernels that will serve, so
a product that rounds otherwise for other numbers of rows shows, whatever the kernels promise.

Legend: R rows, W hidden width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_engine.errors import NotInvariant
from quire_engine.models import DecoderModel, KVCache
from quire_kernels import PagedBatch

TOKENS = 45
"""Of the sequence that is compared: a few blocks, and no multiple of one."""
_COMPANY = (33, 1, 18)
"""Tokens of those beside it."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens of a sequence that a step computes, behind `start` others. `tables`: its blocks in each group."""

    token_ids: list[int]
    tables: list[list[int]]
    start: int = 0
    adapter: int = 0


def attest(model: DecoderModel, kv: KVCache, *, block_size: int, backend: str, adapters: int = 0) -> None:
    """Raises `NotInvariant` unless all ways agree, without an adapter and with each of so many. The cache must be
    idle; what is written to it means nothing.

    `backend` is for the message.
    """
    for adapter in range(adapters + 1):
        _attest(model, kv, block_size=block_size, backend=backend, adapter=adapter, adapters=adapters)


def _attest(
    model: DecoderModel, kv: KVCache, *, block_size: int, backend: str, adapter: int, adapters: int
) -> None:
    num_blocks = kv.tensors[0].shape[1]
    length = min(TOKENS, num_blocks // len(kv.groups) // (1 + len(_COMPANY)) * block_size)
    if length < 2:
        raise NotInvariant(f"a cache of {num_blocks} blocks is too small to find out")
    rng = random.Random(0)  # noqa: S311 - any ids do
    blocks = iter(range(num_blocks))

    def sequence(count: int) -> tuple[list[int], list[list[int]]]:
        ids = [rng.randrange(model.profile.vocab_size) for _ in range(count)]
        return ids, [[next(blocks) for _ in range(-(-count // block_size))] for _ in kv.groups]

    ids, tables = sequence(length)
    others = [
        _Part(*sequence(min(count, length)), adapter=at % (adapters + 1)) for at, count in enumerate(_COMPANY)
    ]

    def rows(*cuts: int, beside: Sequence[_Part] = ()) -> Tensor:
        """States of all its tokens [R, W], computed in steps that end at `cuts`, others before and after it."""
        found: list[Tensor] = []
        for start, end in zip((0, *cuts), cuts, strict=False):
            part = _Part(ids[start:end], tables, start, adapter)
            before, after = beside[:1], beside[1:]
            states = _states(model, kv, [*before, part, *after], block_size)
            first = sum(len(other.token_ids) for other in before)
            found.append(states[first : first + end - start].clone())
        return torch.cat(found)

    whole = rows(length)
    ways = {
        "in chunks": rows(*range(7, length, 7), length),
        "token by token": rows(*range(max(1, length - 6), length + 1)),
        "in company": rows(length, beside=others),
        "in chunks and in company": rows(*range(5, length, 11), length, beside=others),
    }
    for name, found in ways.items():
        if not torch.equal(found, whole) or not torch.equal(model.logits(found[-1:]), model.logits(whole)[-1:]):
            raise NotInvariant(f"the {backend} kernels give a sequence other numbers {name} than alone and whole")


@torch.inference_mode()
def _states(model: DecoderModel, kv: KVCache, parts: Sequence[_Part], block_size: int) -> Tensor:
    batches = [
        PagedBatch.build(
            starts=[part.start for part in parts],
            query_lens=[len(part.token_ids) for part in parts],
            block_tables=[part.tables[group] for part in parts],
            logits=[len(part.token_ids) for part in parts],
            block_size=block_size,
        )
        for group in range(len(kv.groups))
    ]
    token_ids = torch.tensor([token for part in parts for token in part.token_ids])
    return model.forward(token_ids, batches, kv, [part.adapter for part in parts])
