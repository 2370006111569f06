"""Layers of experts: who is sent where, and products of many weights with a few rows each.

    out[t] = Σ_r shares[t, r] · down_e(silu(gate_e(x[t])) · up_e(x[t])),   e = choice[t, r]

`_plan` sorts the pairs (t, r) by expert. What comes out has the same shape whoever chose whom, so that a captured
graph fits every step: a place for each pair, and a list of tiles of up to `rows` pairs of one expert, as many as
there can be at most; those left over name no expert, and their programs end at once. An expert that nobody chose
has no tile and is not read.

    pairs     t·k + r:      0  1  2  3  4  5        choice  5 2  2 0  5 2
    places                  4  1  2  0  5  3        sorted  e0: 3   e2: 1 2 5   e5: 0 4

`_grouped` is the product of one tile with one expert's weight, for `BLOCK_N` outputs: first gate and up, whose
results meet in registers and leave as silu(gate) · up, or clamped (`Clamp`), then down. One side of the tensor
cores' product is 64 tall at least, the other can be as narrow as 16: of a few rows the weight is the tall side,
for such a step is the reading of weights and nothing else; of many it may be either. `_join` adds up the terms
of a token in the order of the experts' numbers, in float32. Nothing is added by atomics: an answer is the same
each time.

A single token needs no plan: pair r is tile r.

Legend: T tokens, E experts, k of which a token goes through, W hidden width, I width inside, N outputs, K width of
a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.errors import KernelError
from quire_kernels.triton.coded import UNIT, Coded, coded_sums
from quire_kernels.triton.launch import dependent, fetch, wait
from quire_kernels.tuning import Choices, Family, Trial, named

if TYPE_CHECKING:
    from quire_kernels import Clamp

_DENSE_PAIRS = (256, 1024)
"""Pairs up to which `_plan` looks at all of them together."""
_PAIRS = 4096
"""Of more than these, so many together."""
_LINE_BYTES, _LINES = 128, 8
"""Of the cache, and how many of each output's weights are fetched ahead."""
AT_ONCE = 1 << 27
"""Numbers inside of experts and behind them that are there at once: if more, some tokens come after the others."""
_ROOMY = 200 * 1024
"""Shared bytes from which on the large tiles fit."""
_NOWHERE = tl.constexpr(2**31 - 1)
_FACTS = tl.constexpr(3)
"""Of a tile: its expert or -1, its first place, how many."""


class Tiling(NamedTuple):
    """How a product is cut: rows and outputs of a tile, numbers along k, and how many of these are on their way.

    `tall`: outputs are the tall side. `halves`: a tile that is less than half full is computed as half a tile.
    """

    rows: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tall: bool = True
    halves: bool = False


class Tilings(NamedTuple):
    """Of both products of a layer. Their tiles are the same, so `rows` is."""

    gated: Tiling
    down: Tiling


# ── who goes where ────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _route(
    choice,
    shares,
    logits,
    stride,
    experts,
    CHOSEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lanes, ranks = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_C)
    wait(DEPENDENT)
    logit = tl.load(logits + token * stride + lanes, mask=lanes < experts, other=float("-inf")).to(tl.float32)
    peak = tl.max(logit, 0)
    # what is not a number is in the sum, whichever experts are taken
    total = tl.sum(tl.exp(logit - peak), 0)
    key = tl.where(logit == logit, logit, float("-inf"))
    left = lanes < experts
    numbers = tl.zeros([BLOCK_C], tl.int32)
    chances = tl.zeros([BLOCK_C], tl.float32)
    for rank in tl.static_range(CHOSEN):
        best = tl.max(tl.where(left, key, float("-inf")), 0)
        lowest = tl.min(tl.where(left & (key == best), lanes, _NOWHERE), 0)
        numbers = tl.where(ranks == rank, lowest, numbers)
        chances = tl.where(ranks == rank, tl.exp(best - peak), chances)
        left = left & (lanes != lowest)
    if OVER_CHOSEN:
        total = tl.where(total == total, tl.sum(chances, 0), total)
    mine = token * CHOSEN + ranks
    tl.store(choice + mine, numbers.to(tl.int64), mask=ranks < CHOSEN)
    tl.store(shares + mine, chances / total, mask=ranks < CHOSEN)


@triton.jit(do_not_specialize=["pairs", "most", "rows"])
def _plan(
    tiles,
    tokens,
    places,
    choice,
    pairs,
    most,
    experts,
    rows,
    DENSE: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A program an expert: each counts everybody's pairs, so that none has to wait for another. DENSE: all pairs
    are looked at together, and tiles that there are not come last."""
    mine = tl.program_id(0)
    numbers, lanes = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_P)
    wait(DEPENDENT)
    if DENSE:
        expert = tl.load(choice + lanes, mask=lanes < pairs, other=0).to(tl.int32)
        # lanes behind the last pair were counted for the first expert
        counts = tl.histogram(expert, BLOCK_E) - tl.where(numbers == 0, BLOCK_P - pairs, 0)
        needed = (counts + rows - 1) // rows
        first = tl.sum(tl.where(numbers < mine, counts, 0), 0)
        own = tl.sum(tl.where(numbers == mine, counts, 0), 0)
        tile = tl.sum(tl.where(numbers < mine, needed, 0), 0)
        end = tl.where(mine == experts - 1, most, tile + (own + rows - 1) // rows)
    else:
        before, same = tl.zeros([BLOCK_P], tl.int32), tl.zeros([BLOCK_P], tl.int32)
        for begin in tl.range(0, pairs, BLOCK_P):
            expert = tl.load(choice + begin + lanes, mask=begin + lanes < pairs, other=experts).to(tl.int32)
            before += (expert < mine).to(tl.int32)
            same += (expert == mine).to(tl.int32)
        first, own = tl.sum(before, 0), tl.sum(same, 0)
        # n places take at most n / rows + 1 tiles: if tiles begin here, no two experts have one in common
        tile, end = first // rows + mine, (first + own) // rows + mine + 1
    for begin in tl.range(tile, end, BLOCK_E):
        at = begin + numbers
        done = (at - tile) * rows
        fact = tiles + at * _FACTS
        tl.store(fact, tl.where(done < own, mine, -1), mask=at < end)
        tl.store(fact + 1, first + done, mask=at < end)
        tl.store(fact + 2, tl.minimum(own - done, rows), mask=at < end)
    if own > 0:
        for begin in tl.range(0, pairs, BLOCK_P):
            at = begin + lanes
            here = tl.load(choice + at, mask=at < pairs, other=-1).to(tl.int32) == mine
            place = first + tl.cumsum(here.to(tl.int32), 0) - 1
            tl.store(places + at, place, mask=here)
            tl.store(tokens + place, at // CHOSEN, mask=here)
            first += tl.sum(here.to(tl.int32), 0)


# ── products ──────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _times(weight, number, acc, TALL: tl.constexpr):
    if TALL:
        acc = tl.dot(weight, number, acc, input_precision="ieee")
    else:
        acc = tl.dot(number, weight, acc, input_precision="ieee")
    return acc


@triton.jit
def _tile(
    out,
    x,
    weight,
    second,
    scales,
    second_scales,
    bias,
    second_bias,
    tokens,
    first,
    count,
    output,
    outputs,
    width,
    x_stride,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    PLANNED: tl.constexpr,
    TALL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
):
    """Of `count` places from `first` on, with weights of one expert."""
    lanes, ks = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    real = lanes < count
    place = (first + lanes).to(tl.int64)
    row = place
    if GATED:
        row = tl.load(tokens + place, mask=real, other=0).to(tl.int64) if PLANNED else place * 0
    # the axis that a vector of rows or of outputs lacks
    across: tl.constexpr = 0 if TALL else 1
    along: tl.constexpr = 1 - across
    # outputs behind the last one are computed as that one, and dropped
    near = tl.minimum(output, outputs - 1)
    numbers = x + tl.expand_dims(row * x_stride, across)
    real = tl.expand_dims(real, across)
    acc = tl.zeros([BLOCK_N, ROWS] if TALL else [ROWS, BLOCK_N], tl.float32)
    other = tl.zeros_like(acc)
    if CODES > 0:
        tl.static_assert(TALL)  # what is unpacked is in registers, where the narrow side cannot be
        acc, other = coded_sums(
            acc, other, weight, second, scales, second_scales, numbers, real, near, outputs, width,
            GATED, CODES, GROUP, LEFT,
        )  # fmt: skip
    else:
        here = tl.expand_dims(near * width, along) + tl.expand_dims(ks, across)
        numbers += tl.expand_dims(ks, along)
        for k in tl.range(0, width, BLOCK_K):
            if EVEN:
                number = tl.load(numbers + k, mask=real, other=0.0)
                acc = _times(tl.load(weight + here + k), number, acc, TALL)
                if GATED:
                    other = _times(tl.load(second + here + k), number, other, TALL)
            else:
                there = k + ks < width
                number = tl.load(numbers + k, mask=tl.expand_dims(there, along) & real, other=0.0)
                there = tl.expand_dims(there, across)
                acc = _times(tl.load(weight + here + k, mask=there, other=0.0), number, acc, TALL)
                if GATED:
                    other = _times(tl.load(second + here + k, mask=there, other=0.0), number, other, TALL)
    if BIASED:
        acc += tl.expand_dims(tl.load(bias + tl.minimum(output, outputs - 1)).to(tl.float32), along)
        if GATED:
            other += tl.expand_dims(tl.load(second_bias + tl.minimum(output, outputs - 1)).to(tl.float32), along)
    if GATED:
        if LIMIT > 0.0:
            # written so that what is not a number goes through
            acc = tl.where(acc > LIMIT, LIMIT, acc)
            other = tl.where(other > LIMIT, LIMIT, tl.where(other < -LIMIT, -LIMIT, other))
            acc = acc / (1.0 + tl.exp(-ALPHA * acc)) * (other + 1.0)
        else:
            acc = acc / (1.0 + tl.exp(-acc)) * other
    places = out + tl.expand_dims(place * outputs, across) + tl.expand_dims(output, along)
    tl.store(places, acc.to(out.dtype.element_ty), mask=tl.expand_dims(output < outputs, along) & real)


@triton.jit
def _grouped(
    out,
    x,
    weight,
    second,
    scales,
    second_scales,
    bias,
    second_bias,
    choice,
    tiles,
    tokens,
    outputs,
    width,
    row,
    scale_count,
    x_stride,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    PLANNED: tl.constexpr,
    TALL: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
    LINE: tl.constexpr,
    LINES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """GATED: of tokens, with two weights, silu(first) · second; else of places, with one. CODES: what weights are
    (`coded`); then `row` are words of an output and `scale_count` scales of an expert."""
    tile = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if DEPENDENT and not GATED:
        # who goes where is older than the kernel before this one: weights can be on their way before it has ended
        expert = tl.load(tiles + tile * _FACTS) if PLANNED else tl.load(choice + tile).to(tl.int32)
        if expert >= 0:
            near = tl.minimum(output, outputs - 1) * row
            lines = tl.minimum(tl.arange(0, LINES) * LINE, row - 1)
            fetch(weight + expert.to(tl.int64) * outputs * row + near[:, None] + lines[None, :])
    wait(DEPENDENT)
    if PLANNED:
        expert = tl.load(tiles + tile * _FACTS)
        if expert < 0:
            return
        first, count = tl.load(tiles + tile * _FACTS + 1), tl.load(tiles + tile * _FACTS + 2)
    else:
        expert, first, count = tl.load(choice + tile).to(tl.int32), tile, 1
    weight += expert.to(tl.int64) * outputs * row
    second += expert.to(tl.int64) * outputs * row
    scales += expert.to(tl.int64) * scale_count
    second_scales += expert.to(tl.int64) * scale_count
    if BIASED:
        bias += expert * outputs
        second_bias += expert * outputs
    # of a few rows only half of what many would take is computed
    if HALVES and count <= ROWS // 2:
        _tile(
            out, x, weight, second, scales, second_scales, bias, second_bias, tokens, first, count, output,
            outputs, width, x_stride, GATED, BIASED, ALPHA, LIMIT, PLANNED, TALL, ROWS // 2, BLOCK_N, BLOCK_K,
            EVEN, CODES, GROUP, LEFT,
        )  # fmt: skip
    else:
        _tile(
            out, x, weight, second, scales, second_scales, bias, second_bias, tokens, first, count, output,
            outputs, width, x_stride, GATED, BIASED, ALPHA, LIMIT, PLANNED, TALL, ROWS, BLOCK_N, BLOCK_K,
            EVEN, CODES, GROUP, LEFT,
        )  # fmt: skip


@triton.jit
def _join(
    out,
    parts,
    choice,
    shares,
    places,
    width,
    PLANNED: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    ranks = tl.arange(0, BLOCK_C)
    there = ranks < CHOSEN
    pair = token * CHOSEN + ranks
    wait(DEPENDENT)
    expert = tl.load(choice + pair, mask=there, other=_NOWHERE)
    share = tl.load(shares + pair, mask=there, other=0.0)
    place = ranks
    if PLANNED:
        place = tl.load(places + pair, mask=there, other=0)
    turn = tl.sum((expert[None, :] < expert[:, None]).to(tl.int32), 1)
    acc = tl.zeros([BLOCK_W], tl.float32)
    for at in tl.static_range(CHOSEN):
        row = tl.sum(tl.where(turn == at, place, 0), 0).to(tl.int64)
        part = tl.load(parts + row * width + dims, mask=dims < width, other=0.0).to(tl.float32)
        acc += tl.sum(tl.where(turn == at, share, 0.0), 0) * part
    tl.store(out + token * width + dims, acc.to(out.dtype.element_ty), mask=dims < width)


def route(logits: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
    """See `Kernels.route`; logits of any float format."""
    tokens, experts = logits.shape
    choice = torch.empty((tokens, count), dtype=torch.int64, device=logits.device)
    shares = torch.empty((tokens, count), dtype=torch.float32, device=logits.device)
    _route[(tokens,)](
        choice, shares, logits, logits.stride(0), experts, CHOSEN=count, BLOCK_C=triton.next_power_of_2(count),
        BLOCK_E=triton.next_power_of_2(experts), OVER_CHOSEN=over_chosen, num_warps=1, **dependent(),
    )  # fmt: skip
    return choice, shares


@dataclass(slots=True, frozen=True)
class Plan:
    """Who goes where."""

    tiles: Tensor
    """[any, 3] int32: an expert or -1, its first place, how many places from there."""
    tokens: Tensor
    """[T · k] int32: whose each place is."""
    places: Tensor
    """[T, k] int32."""

    @classmethod
    def of(cls, choice: Tensor, experts: int, rows: int) -> Plan:
        """Of `choice` [T, k] int64, in tiles of `rows` places."""
        (_, chosen), pairs = choice.shape, choice.numel()
        dense = pairs <= _DENSE_PAIRS[-1]
        most = most_tiles(pairs, experts, rows) if dense else pairs // rows + experts
        tiles = torch.empty((most, _FACTS.value), dtype=torch.int32, device=choice.device)
        tokens = torch.empty(pairs, dtype=torch.int32, device=choice.device)
        places = torch.empty(choice.shape, dtype=torch.int32, device=choice.device)
        block = next((block for block in _DENSE_PAIRS if pairs <= block), _PAIRS)
        _plan[(experts,)](
            tiles, tokens, places, choice, pairs, most, experts, rows, DENSE=dense, CHOSEN=chosen,
            BLOCK_E=max(32, triton.next_power_of_2(experts)), BLOCK_P=block, num_warps=4 if dense else 8,
            **dependent(),
        )  # fmt: skip
        return cls(tiles, tokens, places)


def most_tiles(pairs: int, experts: int, rows: int) -> int:
    """Tiles of `rows` places that pairs can make at most: every expert that is chosen has one that is not full."""
    return (pairs + (rows - 1) * min(experts, pairs)) // rows


Weight = Tensor | Coded
"""Of all experts, [E, N, K]."""
Kept = TypeVar("Kept", bound="Tensor | Coded")


def grouped(
    x: Tensor,
    weight: Weight,
    second: Weight | None,
    choice: Tensor,
    plan: Plan | None,
    tiling: Tiling,
    biases: tuple[Tensor, ...] = (),
    clamp: Clamp | None = None,
) -> Tensor:
    """Of each place the product with its expert's weight, [T · k, N]. Of weights in few bits outputs are the tall
    side, and `tiling.block_k` has no say: they are read unit by unit.

    With `second` silu(x · weightᵀ) · (x · secondᵀ) of tokens `x` [T, K]; else of places `x` [T · k, K]. The
    weights are [E, N, K], `biases` as many of [E, N], or none. Without a plan there is one token.
    """
    _, outputs, width = weight.shape
    out = torch.empty((choice.numel(), outputs), dtype=x.dtype, device=x.device)
    tiles, tokens = (choice, choice) if plan is None else (plan.tiles, plan.tokens)
    count = choice.shape[1] if plan is None else plan.tiles.shape[0]
    second_one = weight if second is None else second
    (numbers, scales, codes, group), (others, other_scales, *_) = map(_laid_out, (weight, second_one))
    _grouped[(count, triton.cdiv(outputs, tiling.block_n))](
        out, x, numbers, others, scales, other_scales, biases[0] if biases else scales,
        biases[-1] if biases else scales, choice, tiles, tokens, outputs, width, numbers.shape[2],
        scales[0].numel(), x.stride(0), GATED=second is not None, BIASED=bool(biases),
        ALPHA=0.0 if clamp is None else clamp.alpha, LIMIT=0.0 if clamp is None else clamp.limit,
        PLANNED=plan is not None, TALL=tiling.tall, HALVES=tiling.halves, ROWS=tiling.rows,
        BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, EVEN=width % tiling.block_k == 0, CODES=codes,
        GROUP=group, LEFT=width % UNIT if codes else 0, LINE=_LINE_BYTES // numbers.element_size(),
        LINES=_LINES, num_warps=tiling.num_warps, num_stages=tiling.num_stages, **dependent(),
    )  # fmt: skip
    return out


def kind_of(weight: Weight) -> str:
    """What its codes are; empty for numbers."""
    return weight.kind if isinstance(weight, Coded) else ""


def _laid_out(weight: Weight) -> tuple[Tensor, Tensor, int, int]:
    """Numbers or words, scales, what the codes are, and the size of a group."""
    if isinstance(weight, Coded):
        return weight.words, weight.scales, weight.codes, weight.group
    return weight, weight, 0, 0


def join(out: Tensor, parts: Tensor, choice: Tensor, shares: Tensor, plan: Plan | None) -> None:
    """Puts the sums of each token's `parts` [T · k, W], which lie at their places, times its `shares` [T, k], into
    `out` [T, W]."""
    (tokens, chosen), width = choice.shape, parts.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    _join[(tokens, triton.cdiv(width, block))](
        out, parts, choice, shares, choice if plan is None else plan.places, width, PLANNED=plan is not None,
        CHOSEN=chosen, BLOCK_C=triton.next_power_of_2(chosen), BLOCK_W=block, num_warps=4, **dependent(),
    )  # fmt: skip


def tilings_for(
    tokens: int, chosen: int, experts: int, number_bytes: int, shared_bytes: int, *, coded: bool = False
) -> Tilings:
    """The tilings of a layer, by how many rows its experts have, `tokens` at most, and in the mean; and by what a
    program may share on a multiprocessor. Found on an H200 (`benchmarks.gpu --parts experts --sweep`), but for
    weights in few bits, with which nothing has been measured."""
    mean = tokens * chosen / experts
    if number_bytes > 2:
        return (_WIDE_CODED if coded else _WIDE)[0 if mean <= 8 or tokens <= 16 else 1]
    if coded:
        few, some = tokens <= 16 or mean <= 8, tokens <= 32 or mean <= 20
        return _CODED[0 if few else 1 if some else 2]
    if tokens <= 16 or mean <= 8:
        return _NARROW[0]
    if tokens <= 32 or mean <= 20:
        return _NARROW[1]
    if tokens <= 64 or mean <= 40:
        return _NARROW[2]
    return _NARROW[3 if shared_bytes < _ROOMY else 4]


_WIDE = tuple(Tilings(tiling, tiling) for tiling in (Tiling(16, 32, 32, 4, 2), Tiling(32, 32, 32, 4, 2)))
_NARROW = (
    Tilings(Tiling(16, 64, 128, 4, 3), Tiling(16, 64, 128, 4, 4)),
    Tilings(Tiling(32, 64, 64, 4, 4), Tiling(32, 64, 128, 4, 4)),
    Tilings(Tiling(64, 64, 64, 4, 4), Tiling(64, 128, 64, 4, 4)),
    Tilings(Tiling(128, 128, 64, 8, 3, halves=True), Tiling(128, 128, 64, 4, 3, halves=True)),
    Tilings(Tiling(128, 128, 64, 8, 4, halves=True), Tiling(128, 256, 64, 8, 4, halves=True)),
)
"""Of numbers of 4 bytes and of 2."""
_WIDE_CODED = tuple(Tilings(tiling, tiling) for tiling in (Tiling(16, 32, UNIT, 4, 2), Tiling(32, 32, UNIT, 4, 2)))
_CODED = (
    Tilings(Tiling(16, 64, UNIT, 4, 4), Tiling(16, 64, UNIT, 4, 5)),
    Tilings(Tiling(32, 64, UNIT, 4, 3), Tiling(32, 64, UNIT, 4, 4)),
    Tilings(Tiling(64, 64, UNIT, 8, 3, halves=True), Tiling(64, 128, UNIT, 8, 3, halves=True)),
)
"""Of weights in few bits: of the same numbers."""
_BESIDE_CODED = (
    Tilings(Tiling(16, 128, UNIT, 8, 3), Tiling(16, 128, UNIT, 8, 4)),
    Tilings(Tiling(32, 128, UNIT, 8, 3), Tiling(32, 128, UNIT, 8, 3)),
    Tilings(Tiling(64, 128, UNIT, 8, 2), Tiling(64, 128, UNIT, 8, 2)),
    Tilings(Tiling(128, 64, UNIT, 8, 2, halves=True), Tiling(128, 128, UNIT, 8, 2, halves=True)),
)
_BESIDE = (
    Tilings(Tiling(16, 32, 256, 4, 3), Tiling(16, 64, 256, 4, 3)),
    Tilings(Tiling(32, 64, 128, 4, 3), Tiling(32, 128, 64, 4, 4)),
    Tilings(Tiling(64, 128, 64, 8, 4), Tiling(64, 256, 64, 8, 3)),
    Tilings(Tiling(128, 128, 64, 8, 4), Tiling(128, 256, 64, 8, 4)),
)
"""Timed besides the defaults of more and of fewer tokens, where an engine starts."""
RUNGS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Tokens up to which tilings are chosen; more have those of the last."""


def rung_of(tokens: int) -> int:
    """The rung of a step of so many tokens."""
    return 1 if tokens <= 1 else min(max(16, triton.next_power_of_2(tokens)), RUNGS[-1])


def candidates(
    rung: int, chosen: int, experts: int, number_bytes: int, shared_bytes: int, *, coded: bool = False
) -> tuple[Tilings, ...]:
    """The default with `rung` tokens, and others whose tiles are about as full."""
    default = tilings_for(rung, chosen, experts, number_bytes, shared_bytes, coded=coded)
    every = _WIDE if number_bytes > 2 else (*_NARROW, *_BESIDE)
    if coded:
        every = _WIDE_CODED if number_bytes > 2 else (*_CODED, *_BESIDE_CODED)
    mean = rung * chosen / experts
    most = max(16.0, min(4 * mean, 2 * rung))
    some = (pair for pair in every if min(mean / 2, 64) <= pair.gated.rows <= most)
    return tuple(dict.fromkeys((default, *some)))


GATED = tuple(
    Tiling(*sizes)
    for sizes in (
        (16, 16, 128, 2, 6), (16, 32, 128, 4, 3), (16, 32, 256, 4, 3), (16, 64, 64, 4, 4), (16, 64, 128, 4, 3),
        (32, 32, 128, 4, 4), (32, 64, 64, 4, 4), (32, 64, 128, 4, 3),
        (64, 64, 64, 4, 4), (64, 128, 64, 8, 4), (64, 64, 64, 4, 4, False), (64, 128, 64, 4, 2, False),
        (64, 128, 64, 4, 4, False), (64, 128, 64, 8, 4, False), (64, 256, 64, 8, 3, False),
        (128, 64, 64, 4, 3, True, True), (128, 128, 64, 8, 3, True, True), (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 4, True, True), (128, 128, 64, 8, 4, False, True), (128, 128, 32, 8, 4, False, True),
    )
)  # fmt: skip
"""Tilings worth trying for gate and up."""
DOWN = tuple(
    Tiling(*sizes)
    for sizes in (
        (16, 32, 256, 4, 4), (16, 64, 128, 4, 4), (16, 64, 256, 4, 3), (16, 128, 64, 4, 4), (16, 128, 128, 8, 3),
        (32, 64, 128, 4, 4), (32, 128, 64, 4, 4), (32, 128, 128, 8, 3),
        (64, 64, 128, 4, 3), (64, 128, 64, 4, 4), (64, 256, 64, 8, 3), (64, 128, 64, 4, 4, False),
        (64, 256, 64, 4, 2, False), (64, 256, 64, 4, 4, False), (64, 256, 64, 8, 4, False),
        (128, 128, 64, 4, 3, True, True), (128, 128, 64, 8, 4, True, True), (128, 256, 64, 8, 3, True, True),
        (128, 256, 64, 8, 4), (128, 256, 64, 8, 4, True, True), (128, 256, 64, 8, 4, False, True),
    )
)  # fmt: skip
"""Tilings worth trying for down."""


@dataclass(slots=True, frozen=True, eq=False, weakref_slot=True)
class ExpertLayer(Generic[Kept]):
    """`Experts` of the Triton back-end, of weights that are kept as numbers or as codes."""

    gate: Kept
    """[E, I, W], as `up`; each of the three dense."""
    up: Kept
    down: Kept
    """[E, W, I]."""
    shared_bytes: int
    """That a program may share on a multiprocessor."""
    biases: tuple[Tensor, Tensor, Tensor] | None = None
    """Of the three, [E, I], [E, I] and [E, W]; each dense."""
    clamp: Clamp | None = None
    choices: Choices = field(default_factory=Choices)

    def __post_init__(self) -> None:
        count, inner, width = self.gate.shape
        inward, outward = (count, inner, width), (count, width, inner)
        for weight, shape in ((self.up, inward), (self.down, outward)):
            alike = kind_of(weight) == kind_of(self.gate) and weight.dtype == self.gate.dtype
            if weight is self.up and isinstance(weight, Coded) and isinstance(self.gate, Coded):
                alike = alike and weight.group == self.gate.group  # one program reads both
            if weight.shape != shape or not alike:
                raise KernelError(
                    f"experts differ: {self.gate.dtype} {inward} and {weight.dtype} {tuple(weight.shape)}"
                )

    def __call__(self, x: Tensor, choice: Tensor, shares: Tensor) -> Tensor:
        return self.cut(x, choice, shares, self.tilings(*choice.shape))

    def tilings(self, tokens: int, chosen: int) -> Tilings:
        """Those of a step of so many tokens."""
        found: Tilings | None = self.choices.get("experts", self._facts(chosen), rung_of(tokens))
        return found or tilings_for(tokens, chosen, *self._cut_by, coded=isinstance(self.gate, Coded))

    @property
    def _cut_by(self) -> tuple[int, int, int]:
        """What tilings go by, besides the step."""
        return self.gate.shape[0], self.gate.dtype.itemsize, self.shared_bytes

    def _facts(self, chosen: int) -> tuple[str | int, ...]:
        gate = ["biased"] * (self.biases is not None) + ["clamped"] * (self.clamp is not None)
        coded = [kind] if (kind := kind_of(self.gate)) else []
        return named(self.gate.dtype), *coded, *self.gate.shape, chosen, "-".join(gate) or "plain"

    def trials(self, tokens: int, chosen: int) -> Iterator[Trial]:
        """Of steps of up to `tokens` tokens, each of which goes through `chosen` experts."""
        count, coded = self.gate.shape[0], isinstance(self.gate, Coded)
        each = sum(weight.nbytes for weight in (self.gate, self.up, self.down)) // count
        for below, rung in pairwise((0, *RUNGS)):
            if below < tokens:
                some = min(rung, tokens)
                tried = candidates(rung, chosen, *self._cut_by, coded=coded)
                read = each * min(count, some * chosen)
                family = Family("experts", self._facts(chosen), rung)
                given = partial(self._given, some, chosen)
                yield Trial(family, tried, given, self._launch, read)

    def _given(self, tokens: int, chosen: int) -> tuple[Tensor, Tensor, Tensor]:
        """A step whose tokens choose without any preference."""
        device = self.gate.device
        source = torch.Generator(device).manual_seed(tokens)
        x = torch.zeros((tokens, self.gate.shape[2]), dtype=self.gate.dtype, device=device)
        choice = torch.rand((tokens, self.gate.shape[0]), generator=source, device=device).topk(chosen).indices
        return x, choice, torch.full((tokens, chosen), 1 / chosen, device=device)

    def _launch(self, given: tuple[Tensor, Tensor, Tensor], tilings: Tilings) -> Tensor:
        return self.cut(*given, tilings)

    def cut(self, x: Tensor, choice: Tensor, shares: Tensor, tilings: Tilings) -> Tensor:
        """As a call, by tilings of one's own."""
        _, inner, width = self.gate.shape
        if x.dtype != self.gate.dtype or x.shape[1] != width or x.stride(1) != 1:
            raise KernelError(f"x is {x.dtype} {tuple(x.shape)}, the experts are of {self.gate.dtype} [{width}]")
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        step = max(1, AT_ONCE // (choice.shape[1] * (inner + width)))
        for first in range(0, x.shape[0], step):
            some = slice(first, first + step)
            self._some(out[some], x[some], choice[some], shares[some], tilings)
        return out

    def _some(self, out: Tensor, x: Tensor, choice: Tensor, shares: Tensor, tilings: Tilings) -> None:
        plan = Plan.of(choice, self.gate.shape[0], tilings.gated.rows) if x.shape[0] > 1 else None
        inward, outward = ((), ()) if self.biases is None else (self.biases[:2], self.biases[2:])
        inner = grouped(x, self.gate, self.up, choice, plan, tilings.gated, inward, self.clamp)
        parts = grouped(inner, self.down, None, choice, plan, tilings.down, outward)
        join(out, parts, choice, shares, plan)

    def parameters(self) -> Iterator[Tensor]:
        for weight in (self.gate, self.up, self.down):
            if isinstance(weight, Coded):
                yield from weight.parameters()
            else:
                yield weight
        yield from self.biases or ()


class TritonExperts(ExpertLayer[Tensor]):
    """Of numbers."""

    __slots__ = ()


class CodedExperts(ExpertLayer[Coded]):
    """Of codes."""

    __slots__ = ()
