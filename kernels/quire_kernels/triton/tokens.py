"""Over logits: the largest number of a row, masks of allowed tokens, and soft caps, cap · tanh(x / cap).

`largest` cuts the vocabulary into splits, enough of them that a few rows fill the GPU; `_meet` takes the best of a
row's splits. Each lane keeps the first of its own largest numbers and lanes meet once, at the end. A comparison
with NaN is false, so NaN is looked for by itself.

Legend: R rows, V vocabulary, X splits, M rows of masks, B bytes of a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.triton.tanh import capped

_BLOCK = 2048
_PROGRAMS = 1024
"""Programs that fill a GPU, with some to spare."""
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["splits"])
def _split_largest(peaks, places, logits, stride, vocabulary, share, splits, BLOCK: tl.constexpr):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    begin = split * share
    end = tl.minimum(begin + share, vocabulary)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = begin + lanes
    broken = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(begin, end, BLOCK):
        at = start + lanes
        number = tl.load(logits + row * stride + at, mask=at < end, other=float("-inf")).to(tl.float32)
        better = number > best
        best = tl.where(better, number, best)
        place = tl.where(better, at, place)
        broken = broken | (number != number).to(tl.int32)
    peak = tl.max(best, 0)
    lowest = tl.min(tl.where(best == peak, place, _NOWHERE), 0)
    tl.store(peaks + row * splits + split, tl.where(tl.max(broken, 0) > 0, float("nan"), peak))
    tl.store(places + row * splits + split, lowest.to(places.dtype.element_ty))


@triton.jit(do_not_specialize=["splits"])
def _meet(values, indices, peaks, places, splits, BLOCK: tl.constexpr):
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = lanes < splits
    best = tl.load(peaks + row * splits + lanes, mask=there, other=float("-inf"))
    place = tl.load(places + row * splits + lanes, mask=there, other=_NOWHERE)
    peak = tl.max(best, 0)
    broken = tl.max((best != best).to(tl.int32), 0) > 0
    lowest = tl.min(tl.where(best == peak, place, _NOWHERE), 0)
    tl.store(values + row, tl.where(broken, float("nan"), peak))
    tl.store(indices + row, tl.where(broken, 0, lowest).to(tl.int64))


@triton.jit
def _mask_tokens(logits, stride, vocabulary, rows, bits, width, BLOCK: tl.constexpr):
    mask = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocabulary
    octets = tl.load(bits + mask * width + tokens // 8, mask=inside, other=255).to(tl.int32)
    forbidden = ((octets >> (tokens % 8)) & 1) == 0
    row = tl.load(rows + mask)
    lowest = tl.full([BLOCK], float("-inf"), tl.float32).to(logits.dtype.element_ty)
    tl.store(logits + row * stride + tokens, lowest, mask=inside & forbidden)


@triton.jit
def _cap_logits(logits, stride, vocabulary, CAP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = logits + tl.program_id(0).to(tl.int64) * stride + at
    tl.store(here, capped(tl.load(here, mask=at < vocabulary, other=0.0), CAP), mask=at < vocabulary)


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.largest`."""
    rows, vocabulary = logits.shape
    values = torch.empty(rows, dtype=torch.float32, device=logits.device)
    indices = torch.empty(rows, dtype=torch.int64, device=logits.device)
    blocks = triton.cdiv(vocabulary, _BLOCK)
    share = triton.cdiv(blocks, max(1, min(blocks, _PROGRAMS // rows)))
    splits = triton.cdiv(blocks, share)
    peaks, places = values, indices
    if splits > 1:
        peaks = torch.empty((rows, splits), dtype=torch.float32, device=logits.device)
        places = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    _split_largest[(rows, splits)](
        peaks, places, logits, logits.stride(0), vocabulary, share * _BLOCK, splits, BLOCK=_BLOCK, num_warps=4
    )
    if splits > 1:
        _meet[(rows,)](values, indices, peaks, places, splits, BLOCK=triton.next_power_of_2(blocks), num_warps=1)
    return values, indices


def cap_logits(logits: Tensor, cap: float) -> None:
    """See `Kernels.cap_logits`."""
    rows, vocabulary = logits.shape
    _cap_logits[(rows, triton.cdiv(vocabulary, _BLOCK))](
        logits, logits.stride(0), vocabulary, CAP=cap, BLOCK=_BLOCK, num_warps=4
    )


def mask_tokens(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """See `Kernels.mask_tokens`."""
    vocabulary = logits.shape[1]
    _mask_tokens[(rows.shape[0], triton.cdiv(vocabulary, _BLOCK))](
        logits, logits.stride(0), vocabulary, rows, bits, bits.shape[1], BLOCK=_BLOCK, num_warps=4
    )
