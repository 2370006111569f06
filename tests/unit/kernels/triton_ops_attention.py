"""Triton's paged attention and the addresses it makes on the device, against the reference.

Run as `triton_ops.py` is. Tolerances, as ‖found - expected‖ / ‖expected‖ with the reference in float32: 1e-5 in
float32, whose sums are taken in another order; 16-bit formats round weights and results once each.

Legend: H query heads, K key/value heads, D head size, P slots a block.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from tests.unit.kernels.ptx_by_hand import by_hand

from quire_kernels.paging import PagedBatch
from quire_kernels.reference import ReferenceKernels
from quire_kernels.reference.attention import StepAttention as Reference
from quire_kernels.reference.bytes import E4M3, SCALE_BYTES, to_bytes
from quire_kernels.triton import INTERPRETED, TritonKernels
from quire_kernels.triton.attention import COUNTERS, Chip, StepAttention, num_splits
from quire_kernels.triton.bytes import (
    NEIGHBOURS_TO_BFLOAT16,
    NEIGHBOURS_TO_FLOAT16,
    TO_BFLOAT16,
    TO_FLOAT16,
    e4m3_of,
    halves_of,
    neighbours_of,
)
from quire_kernels.triton.step import LAST, MixedBuffers, StepBuffers, prepare, prepare_mixed

DEVICE = "cpu" if INTERPRETED else "cuda"
CHIP = Chip(16, 227 * 1024) if INTERPRETED else Chip.current()
COUNTED = torch.zeros(COUNTERS, dtype=torch.int32, device=DEVICE)
kernels = TritonKernels()
CLOSE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]

# cached and new tokens of each sequence, H, K, D, P, window
STEPS = {
    "decode": ([(5, 1), (300, 1), (0, 1)], 4, 2, 64, 16, None),
    "decode in few splits": ([(190, 1), (70, 1)], 8, 4, 64, 16, None),
    "one long": ([(700, 1)], 14, 2, 64, 16, None),
    "prompts": ([(0, 37), (20, 5)], 4, 2, 32, 16, None),
    "more blocks than programs": ([(0, 90), (3, 1), (60, 70)], 8, 4, 32, 16, None),
    "mixed": ([(5, 1), (300, 1), (0, 40), (17, 9)], 8, 2, 64, 16, None),
    "window": ([(5, 1), (300, 1), (0, 40), (170, 9)], 6, 2, 80, 8, 33),
    "window of one": ([(90, 1), (0, 20)], 2, 1, 16, 16, 1),
    "no sharing": ([(31, 1), (0, 33), (170, 9)], 8, 8, 128, 16, None),
    "blocks of one": ([(6, 1), (3, 4)], 2, 2, 16, 1, None),
}
SINKS = [1.5, -torch.inf, 300.0, -4.0, 6.0, 0.0, 2.0, 3.0]
# the soft cap of scores whose deviation is one, and each head's sink
BENT: dict[str, tuple[float | None, list[float] | None]] = {
    "cap": (0.5, None),
    "sinks": (None, SINKS),
    "both": (2.0, SINKS),
}
BENT_IN_CI = [("decode", "both", None), ("blocks of one", "both", None)]
LONG = ("decode in few splits", "more blocks than programs", "no sharing")
LONG_IN_FP8 = (*LONG, "decode", "one long", "window")
"""Where one case in CI tells of both formats."""


def in_ci(names: Iterable[str]) -> list[Any]:
    """The steps of these names, of which the night alone has those that take the interpreter longest."""
    return [pytest.param(name, marks=pytest.mark.nightly) if name in LONG else name for name in names]


def batch_of(lengths: list[tuple[int, int]], block_size: int) -> tuple[PagedBatch, int]:
    """A step of sequences in shuffled blocks, and how many blocks there are."""
    held = [-(-(start + count) // block_size) for start, count in lengths]
    ids = list(range(sum(held) + 3))
    random.Random(0).shuffle(ids)
    batch = PagedBatch.build(
        starts=[start for start, _ in lengths],
        query_lens=[count for _, count in lengths],
        block_tables=[[ids.pop() for _ in range(count)] for count in held],
        logits=[1] * len(lengths),
        block_size=block_size,
        device=DEVICE,
    )
    return batch, sum(held) + 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", in_ci(STEPS))
def test_attention(name: str, dtype: torch.dtype) -> None:
    lengths, heads, kv_heads, dim, block_size, window = STEPS[name]
    if INTERPRETED and dtype != torch.float32 and name not in ("mixed", "window"):
        pytest.skip("the interpreter takes its time, and two cases show the rounding")
    batch, blocks = batch_of(lengths, block_size)
    source = torch.Generator().manual_seed(1)
    cache = torch.randn((2, blocks, block_size, kv_heads, dim), generator=source).to(DEVICE, dtype)
    query = torch.randn((batch.num_tokens, heads, dim), generator=source).to(DEVICE, dtype)
    own = cache.transpose(2, 3).contiguous().view(cache.shape)
    # what lies in slots that hold no token must not matter
    ends = {int(table[count // block_size]): count % block_size for table, count in zip(
        batch.block_tables, batch.contexts, strict=True
    ) if count % block_size}  # fmt: skip
    for block, used in ends.items():
        own.view(2, blocks, kv_heads, block_size, dim)[:, block, :, used:] = torch.nan
    expected = Reference(batch, window, 1 << 26)(query.float(), cache.float(), dim**-0.5)
    found = StepAttention(batch, window, CHIP, COUNTED)(query, own, dim**-0.5)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < CLOSE[dtype]
    assert not COUNTED.any(), "the next layer counts from zero"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "bent", "kept"),
    [
        pytest.param(name, bent, kept, marks=() if (name, bent, kept) in BENT_IN_CI else pytest.mark.nightly)
        for name in ("decode", "decode in few splits", "window", "mixed", "blocks of one")
        for bent in BENT
        for kept in (None, torch.int8, E4M3)
        if not (kept and name == "blocks of one")
    ],
)
def test_soft_caps_and_sinks(name: str, bent: str, kept: torch.dtype | None, dtype: torch.dtype) -> None:
    lengths, heads, kv_heads, dim, block_size, window = STEPS[name]
    if INTERPRETED and dtype != torch.float32 and name != "mixed":
        pytest.skip("the interpreter takes its time, and one case shows the rounding; on a GPU all run")
    softcap, sinks = BENT[bent]
    batch, blocks = batch_of(lengths, block_size)
    source = torch.Generator().manual_seed(1)
    cache = torch.randn((2, blocks, block_size, kv_heads, dim), generator=source)
    cache = to_bytes(cache, kept).to(DEVICE) if kept else cache.to(DEVICE, dtype)
    query = torch.randn((batch.num_tokens, heads, dim), generator=source).to(DEVICE, dtype)
    rest = dim**-0.5, None if sinks is None else torch.tensor(sinks[:heads], device=DEVICE)
    wide = cache if kept else cache.float()
    expected = Reference(batch, window, 1 << 26, softcap)(query.float(), wide, *rest)
    own = in_own_order(cache) if kept else cache.transpose(2, 3).contiguous().view(cache.shape)
    found = StepAttention(batch, window, CHIP, COUNTED, softcap)(query, own, *rest)
    assert found.dtype == dtype
    # by head: what a sink leaves of one is much smaller than the others
    for head in range(heads):
        off = (found[:, head].float() - expected[:, head]).norm()
        assert off <= 2 * CLOSE[dtype] * expected[:, head].norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_soft_cap_is_as_near_to_small_scores_as_to_large_ones(dtype: torch.dtype) -> None:
    batch, blocks = batch_of([(90, 1)], 16)
    source = torch.Generator().manual_seed(1)
    cache = torch.randn((2, blocks, 16, 1, 32), generator=source).to(DEVICE, dtype)
    query = torch.randn((1, 2, 32), generator=source).to(DEVICE, dtype)
    expected = Reference(batch, None, 1 << 26)(query.float(), cache.float(), 0.2)
    found = StepAttention(batch, None, CHIP, COUNTED, 2.0**20)(query, cache, 0.2)
    assert (found.float() - expected).norm() / expected.norm() < CLOSE[dtype]


def in_own_order(cache: torch.Tensor) -> torch.Tensor:
    """A cache in 8 bits of the reference, [2, N, P, K, D + 4], as Triton has it: codes by head, then scales. In
    e4m3 the halves of a head share words."""
    octets = cache.view(torch.uint8)
    codes, scales = octets[..., :-SCALE_BYTES], octets[..., -SCALE_BYTES:]
    if cache.dtype == E4M3:
        codes = torch.stack(codes.chunk(2, -1), -1).flatten(-2)
    parts = [part.transpose(2, 3).flatten(2) for part in (codes, scales)]
    return torch.cat(parts, -1).view(cache.shape).contiguous().view(cache.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _convert(to, words, codes, x, NUMBER: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, COUNT)
    low, high = halves_of(tl.load(words + at), NUMBER)
    tl.store(to + at, low)
    tl.store(to + COUNT + at, high)
    tl.store(codes + at, e4m3_of(tl.load(x + at)).to(tl.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_e4m3_is_read_and_rounded_to_bit_by_bit(dtype: torch.dtype) -> None:
    """Each of the numbers there are, NaN apart, in either byte; and what lies between, and on, and beyond them."""
    octets = torch.arange(256, dtype=torch.uint8)
    octets[octets & 127 == 127] = 0
    words = torch.stack((octets, octets.roll(77)), -1).to(DEVICE)
    low, high = (words[:, at].contiguous().view(E4M3).to(dtype) for at in (0, 1))
    numbers = octets.view(E4M3).float().sort().values
    between = (numbers + numbers.roll(1)) / 2
    source = torch.Generator().manual_seed(3)
    x = torch.cat(
        (numbers, between, torch.nextafter(between, numbers), 2000 * torch.rand(256, generator=source) - 1000)
    )
    x = torch.cat(
        (x, x * 2.0**-12, torch.tensor([447.9999, 448.001, -464.0, 479.9, -0.0, 1e-30, -(2.0**-10), 2000.0]))
    )
    found = torch.empty((2, 256), dtype=dtype, device=DEVICE)
    for piece in torch.split(x, 256):
        given = torch.nn.functional.pad(piece, (0, 256 - len(piece))).to(DEVICE)
        codes = torch.empty(256, dtype=torch.uint8, device=DEVICE)
        number = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
        _convert[(1,)](found, words.view(torch.int16), codes, given, NUMBER=number, COUNT=256)
        assert torch.equal(codes, given.clamp(-448, 448).to(E4M3).view(torch.uint8))
    assert torch.equal(found[0], low)
    assert torch.equal(found[1], high)


@pytest.mark.parametrize(("program", "dtype"), [(TO_BFLOAT16, torch.bfloat16), (TO_FLOAT16, torch.float16)])
def test_the_instructions_that_unpack_e4m3_by_hand(program: Any, dtype: torch.dtype) -> None:
    """The interpreter has no assembly: so that what GPUs run is not seen there alone."""
    octets = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    octets[octets & 127 == 127] = 0
    found = by_hand(program.value, octets.view(torch.int32), dtype)
    for name, side in (("$0", 0), ("$1", 1)):
        expected = octets.view(-1, 2)[:, side].contiguous().view(E4M3).to(dtype)
        assert torch.equal(found[name].view(torch.int16), expected.view(torch.int16)), name


@triton.jit  # type: ignore[untyped-decorator]
def _apart(to, words, NUMBER: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    low, high = neighbours_of(tl.load(words + at), NUMBER)
    tl.store(to + 2 * at, low)
    tl.store(to + 2 * at + 1, high)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_two_neighbours_in_int8_are_read_bit_by_bit(dtype: torch.dtype) -> None:
    octets = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.int8).to(DEVICE)
    found = torch.empty(1 << 17, dtype=dtype, device=DEVICE)
    number = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    _apart[(16,)](found, octets.view(torch.int16), NUMBER=number, COUNT=4096)
    assert torch.equal(found, octets.to(dtype))
    assert not (found == 0).logical_and(found.signbit()).any()


@pytest.mark.parametrize(
    ("program", "dtype"), [(NEIGHBOURS_TO_BFLOAT16, torch.bfloat16), (NEIGHBOURS_TO_FLOAT16, torch.float16)]
)
def test_the_instructions_that_unpack_int8_by_hand(program: Any, dtype: torch.dtype) -> None:
    octets = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.int8)
    found = by_hand(program.value, octets.view(torch.int32), dtype)
    for name, side in (("$0", 0), ("$1", 1)):
        expected = octets.view(-1, 2)[:, side].contiguous().to(dtype)
        assert torch.equal(found[name].view(torch.int16), expected.view(torch.int16)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        pytest.param(
            name, kept, marks=pytest.mark.nightly if name in (LONG_IN_FP8 if kept == E4M3 else LONG) else ()
        )
        for kept in (torch.int8, E4M3)
        for name in ("decode", "one long", "mixed", "window", "no sharing")
    ],
)
def test_attention_over_keys_and_values_in_8_bits(name: str, dtype: torch.dtype, kept: torch.dtype) -> None:
    lengths, heads, kv_heads, dim, block_size, window = STEPS[name]
    if INTERPRETED and dtype != torch.float32 and name != "mixed":
        pytest.skip("the interpreter takes its time, and one case shows the rounding; on a GPU all run")
    batch, blocks = batch_of(lengths, block_size)
    source = torch.Generator().manual_seed(1)
    cache = to_bytes(3 * torch.randn((2, blocks, block_size, kv_heads, dim), generator=source), kept).to(DEVICE)
    query = torch.randn((batch.num_tokens, heads, dim), generator=source).to(DEVICE, dtype)
    expected = Reference(batch, window, 1 << 26)(query.float(), cache, dim**-0.5)
    found = StepAttention(batch, window, CHIP, COUNTED)(query, in_own_order(cache), dim**-0.5)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < CLOSE[dtype]


@pytest.mark.parametrize("kept", [torch.int8, pytest.param(E4M3, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.01, 30.0])
def test_many_small_weights_on_values_in_8_bits_are_not_lost(
    size: float, dtype: torch.dtype, kept: torch.dtype
) -> None:
    """One key has most of the weight, and the others, which have 1e-4 each, a value of their own."""
    batch, blocks = batch_of([(1000, 1)], 16)
    key, value = torch.zeros((2, blocks, 16, 1, 32))
    value[..., :16] = size
    first = int(batch.block_tables[0, 0])
    key[first, 0, 0, 0] = 1.0
    value[first, 0] = 0.0
    value[first, 0, 0, 16:] = size
    query = torch.zeros((1, 1, 32), device=DEVICE, dtype=dtype)
    query[..., 0] = 9.2
    cache = to_bytes(torch.stack((key, value)), kept).to(DEVICE)
    expected = Reference(batch, None, 1 << 26)(query.float(), cache, 1.0)
    found = StepAttention(batch, None, CHIP, COUNTED)(query, in_own_order(cache), 1.0)
    for half in (
        slice(0, 16),
        slice(16, 32),
    ):  # twice: a thousand equal weights round alike, and do not cancel out
        off = (found[..., half].float() - expected[..., half]).norm() / expected[..., half].norm()
        assert off < 2 * CLOSE[dtype]


def _ordered(octets: torch.Tensor, kept: torch.dtype) -> torch.Tensor:
    """Codes as whole numbers in the order of what they stand for: those of e4m3 are a sign and a size."""
    codes = octets.int()
    return torch.where(codes < 0, -(codes & 127), codes) if kept == E4M3 else codes


@pytest.mark.parametrize("kept", [torch.int8, E4M3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_placed_in_8_bits(dtype: torch.dtype, kept: torch.dtype) -> None:
    source = torch.Generator().manual_seed(2)
    qkv = torch.randn((5, 4 + 2 * 2, 80), generator=source).to(DEVICE, dtype)
    qkv[1, 4] = 0.0
    qkv[2, 6, 3] = torch.inf  # of a value
    angles = torch.randn((5, 1, 40), generator=source).to(DEVICE)
    cos, sin = (torch.cat(pair, -1) for pair in ((angles.cos(),) * 2, (-angles.sin(), angles.sin())))
    found, expected = (
        torch.full((2, 3, 4, 2, 84), 7, dtype=torch.int8, device=DEVICE).view(kept) for _ in range(2)
    )
    slots = torch.tensor([3, 8, 5, 11, 0], device=DEVICE)
    kernels.place_heads(qkv, 4, None, cos, sin, found, slots)
    ReferenceKernels().place_heads(qkv, 4, None, cos, sin, expected, slots)
    found, expected = found.view(torch.int8), in_own_order(expected).view(torch.int8)
    ours, theirs = (_ordered(x, kept) for x in (found, expected))
    far = (ours - theirs).abs().view(2, 3, -1)
    # sums of two products are taken in another order: a number between two codes may become either
    assert far[..., : 4 * 2 * 80].max() <= 1
    assert (far[..., : 4 * 2 * 80] > 0).float().mean() < (0.01 if dtype == torch.float32 else 0.05)
    ours, theirs = (
        x.view(2, 3, -1)[..., 4 * 2 * 80 :].contiguous().view(torch.float32) for x in (found, expected)
    )
    assert torch.allclose(ours, theirs, rtol=1e-6 if dtype == torch.float32 else 1e-2, equal_nan=True)
    assert theirs.isnan().sum() == 1


@pytest.mark.parametrize(
    ("rows", "longest", "splits"),
    [
        (8, 8192, 32),
        (2048, 8192, 1),
        (8, 70, 1),
        (8, 600, 8),
        (8, 1024, 16),
        (64, 8192, 8),
        (132, 8192, 4),
        (133, 8192, 1),
    ],
)
def test_splits_fill_the_chip_and_are_never_short(rows: int, longest: int, splits: int) -> None:
    assert num_splits(132, rows, longest) == splits


def test_addresses_are_made_on_the_device() -> None:
    # two groups of layers, rows of 6 blocks of 4 slots
    tables = torch.arange(2 * 5 * 6, dtype=torch.int32, device=DEVICE).view(2, 5, 6).clone()
    last = torch.tensor([70, 71, 72, 73, 74], dtype=torch.int32, device=DEVICE)
    step = StepBuffers.allocate(4, tables, 4, 24, torch.device(DEVICE))
    words = [
        [2, 9, LAST, -1, 0, -1, 0],  # goes on with what it drew
        [0, 8, 5, 2, 900, 2, 901],  # a given token, in a block that is new in both groups
        [4, 0, LAST, -1, 0, 0, 555],  # new in one group alone
        [-1, -1, -1, -1, -1, -1, -1],
    ]
    step.items.copy_(torch.tensor(words, dtype=torch.int32))
    prepare(step, tables, last)
    assert step.token_ids.tolist() == [72, 5, 74, 0]
    assert step.batches[0].positions.tolist() == [9, 8, 0, 0]
    assert step.ends.tolist() == step.batches[1].context_lens.tolist() == [10, 9, 1, 0]
    assert step.rows.tolist() == [2, 0, 4, -1]
    assert tables[0, 0].tolist() == [0, 1, 900, 3, 4, 5]
    assert tables[1, 0].tolist() == [30, 31, 901, 33, 34, 35]
    assert tables[1, 4].tolist() == [555, 55, 56, 57, 58, 59]
    assert step.slots[0].tolist() == [14 * 4 + 1, 900 * 4, 24 * 4, -1]
    assert step.slots[1].tolist() == [44 * 4 + 1, 901 * 4, 555 * 4, -1]


def test_addresses_of_mixed_steps_are_made_on_the_device() -> None:
    tables = torch.arange(2 * 5 * 6, dtype=torch.int32, device=DEVICE).view(2, 5, 6).clone()
    last = torch.tensor([70, 71, 72, 73, 74], dtype=torch.int32, device=DEVICE)
    step = MixedBuffers.allocate(12, 5, tables, 4, 24)
    step.items[:3] = torch.tensor([[2, 9, 1, 1], [0, 6, 5, 0], [4, 0, 3, 1]], dtype=torch.int32)
    step.given[:9] = torch.tensor([LAST, 10, 11, 12, 13, 14, 20, 21, 22], dtype=torch.int32)
    step.given[9:] = 99
    prepare_mixed(step, tables, last)
    batch = step.batches[1]
    assert step.token_ids[:9].tolist() == [72, 10, 11, 12, 13, 14, 20, 21, 22]
    assert batch.positions.tolist() == [9, 6, 7, 8, 9, 10, 0, 1, 2, 0, 0, 0]
    assert batch.query_starts.tolist() == [0, 1, 6, 9, 9, 9]
    assert batch.context_lens.tolist() == step.ends.tolist() == [10, 11, 3, 0, 0]
    assert batch.logits_rows.tolist() == [0, 5, 8, 8, 8]
    assert step.rows.tolist() == [[2, 0, 4, -1, -1], [2, -1, 4, -1, -1]]
    assert step.slots[0].tolist() == [14 * 4 + 1, 6, 7, 8, 9, 10, 96, 97, 98, -1, -1, -1]
    assert step.slots[1].tolist() == [44 * 4 + 1, *(30 * 4 + n for n in range(6, 11)), 216, 217, 218, -1, -1, -1]


def test_a_batch_may_name_its_rows() -> None:
    batch, blocks = batch_of([(40, 1), (9, 1), (100, 1)], 16)
    cache = torch.randn((2, blocks, 16, 2, 32), device=DEVICE)
    query = torch.randn((3, 4, 32), device=DEVICE)
    expected = StepAttention(batch, None, CHIP, COUNTED)(query, cache, 0.2)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    named = PagedBatch(
        positions=batch.positions,
        slot_mapping=batch.slot_mapping,
        block_tables=batch.block_tables[order].contiguous(),
        query_starts=batch.query_starts,
        context_lens=batch.context_lens,
        logits_rows=batch.logits_rows,
        block_size=16,
        query_lens=batch.query_lens,
        contexts=batch.contexts,
        table_rows=torch.tensor([1, 2, 0], dtype=torch.int32, device=DEVICE),
    )
    assert torch.equal(StepAttention(named, None, CHIP, COUNTED)(query, cache, 0.2), expected)
