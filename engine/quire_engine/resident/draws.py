"""How requests draw, as the device has it: the columns of a `DrawTable`, and draws without a request table.

A step that goes by the host draws with the same kernel and the same noise as one that stays on the device: what a
seeded request gets must not depend on whether a neighbour needs the host.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from quire_engine.step import Draw
from quire_kernels.triton import sample
from quire_kernels.triton.sample import DrawTable

_WORDS = struct.Struct("<fiffq")
"""Temperature, top-k, top-p, min-p and seed as six words of 32 bits."""
_INTS = struct.Struct("<6i")
_HOTTEST = 3e38
"""float32 has nothing above it; all tokens have been equally likely for long by then."""


def words_of(draw: Draw) -> tuple[int, ...]:
    """Six words of 32 bits."""
    asked = draw.sampling
    temperature, seed = min(asked.temperature, _HOTTEST), draw.seed & 0x7FFFFFFFFFFFFFFF
    return _INTS.unpack(_WORDS.pack(temperature, asked.top_k, asked.top_p, asked.min_p, seed))


def columns(draws: Sequence[Draw]) -> Tensor:
    """[6, R] int32 on the host: the words of each draw."""
    return torch.tensor([words_of(draw) for draw in draws], dtype=torch.int32).T.contiguous()


def table_of(words: Tensor) -> DrawTable:
    """The draws of `columns` [6, R], wherever they are."""
    return DrawTable(
        temperature=words[0].view(torch.float32),
        top_k=words[1],
        top_p=words[2].view(torch.float32),
        min_p=words[3].view(torch.float32),
        seed=torch.stack((words[4], words[5]), 1).view(torch.int64).squeeze(1),
    )


def draw_rows(scores: Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> Tensor:
    """`sampler.draw` on the device: one token for each row of `scores` [R, V], [R] int64."""
    rows, vocabulary = scores.shape
    device = scores.device
    places = torch.arange(rows, dtype=torch.int32, device=device)
    ends = torch.tensor(positions, dtype=torch.int32, device=device)
    tokens, last = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    room = sample.scratch(rows, vocabulary, device)
    sample.draw(scores, places, ends, table_of(columns(draws).to(device)), tokens, last, room)
    return tokens.long()
