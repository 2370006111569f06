"""Every back-end against formulas in double precision, over awkward shapes and a poisoned cache.

Tolerances. float32: 1e-5 absolute and 1.3e-6 relative, what one float32 sum of some hundred terms of size one may
lose against double. bfloat16: the computation is float32 inside, so what is left is one rounding of the result
(2^-8 relative, 3.9e-3) on inputs that are equal in both; 1.6e-2 is four of them.

Over a cache in 8 bits the formulas get numbers that were rounded as the cache rounds them.

The C++ back-end is tested at each level of instructions that this processor has.

Legend: T tokens, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from quire_kernels import BackendUnavailable, HeadNorms, KernelError, PagedBatch, Product
from quire_kernels.cpu import CpuKernels, build
from quire_kernels.quantized import quantize_int4, quantize_int8
from quire_kernels.reference import ReferenceKernels
from quire_kernels.reference.bytes import E4M3, LARGEST, from_bytes, rounded_rows, to_bytes

Backend = ReferenceKernels | CpuKernels

torch.set_num_threads(1)
TOLERANCE = {torch.float32: (1e-5, 1.3e-6), torch.bfloat16: (1e-5, 1.6e-2), torch.float16: (1e-5, 2e-3)}


BACKENDS = ["reference", *(level.name for level in reversed(build.LEVELS))]


@functools.cache
def backend(name: str) -> Backend:
    if name == "reference":
        return ReferenceKernels()
    level = next(level for level in build.LEVELS if level.name == name)
    try:
        build.check(level, build.cpu_flags())
        return CpuKernels(2, level)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Backend:
    return backend(request.param)


@pytest.fixture(params=BACKENDS[1:])
def native(request: pytest.FixtureRequest) -> Backend:
    return backend(request.param)


def keep(kernels: Backend, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Keys and values to their slots, as they are: rotated by nothing."""
    tokens, kv_heads, head = keys.shape
    still, none = torch.ones(tokens, 1, head), torch.zeros(tokens, 1, head)
    kernels.place_heads(torch.cat((keys, keys, values), 1), kv_heads, None, still, none, cache, slots)


def close(found: Tensor, expected: Tensor) -> None:
    absolute, relative = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected, atol=absolute, rtol=relative)


def dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention in double precision: `query` [T, H, D] from position `start`, `keys` [L, K, D]."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (side.double().repeat_interleave(groups, 1) for side in (keys, values))
    scores = torch.einsum("thd,lhd->htl", query.double(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at, key = torch.arange(start, start + query.shape[0])[:, None], torch.arange(keys.shape[0])
    visible = (key <= at) if window is None else (key <= at) & (key > at - window)
    weights = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        weights = weights.softmax(-1)
    else:  # a key more, of which nobody takes the value
        more = sinks.double()[:, None, None].expand(-1, query.shape[0], 1)
        weights = torch.cat((weights, more), -1).softmax(-1)[..., :-1]
    return torch.einsum("htl,lhd->thd", weights, values)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A cache of NaN; in 8 bits the bytes of a scale that is NaN, and of float numbers that are none."""
    if dtype in LARGEST:
        return torch.full(shape, -1, dtype=torch.int8).view(dtype)
    return torch.full(shape, torch.nan, dtype=dtype)


class Case:
    """Sequences in a cache whose every other slot is NaN, with scattered blocks and garbage after each table."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        *,
        block_size: int = 16,
        heads: int = 4,
        kv_heads: int = 2,
        head: int = 64,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        """`sequences`: (tokens already in the cache, new tokens)."""
        torch.manual_seed(seed)
        self.sequences, self.scale = sequences, head**-0.5
        needs = [-(-(start + count) // block_size) for start, count in sequences]
        numbers = list(range(sum(needs) + 3))
        random.Random(seed).shuffle(numbers)
        tables, at = [], 0
        for need in needs:
            tables.append(numbers[at : at + need])
            at += need
        self.cache_dtype = cache_dtype or dtype
        self.cache_shape = (2, len(numbers), block_size, kv_heads, head + 4 * (cache_dtype in LARGEST))
        stored = dtype if cache_dtype in LARGEST else self.cache_dtype
        self.query = torch.randn(sum(count for _, count in sequences), heads, head).to(dtype)
        self.keys, self.values = (
            [torch.randn(start + count, kv_heads, head).to(stored) for start, count in sequences] for _ in range(2)
        )
        self.slots = [
            torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(start + count)])
            for (start, count), table in zip(sequences, tables, strict=True)
        ]
        # what stands behind a table's own entries must not matter: any block, a number far outside the cache
        garbage = [table + [2**31 - 1, -7, numbers[-1]][: max(needs) + 3 - len(table)] for table in tables]
        width = max(map(len, garbage))
        self.batch = PagedBatch.build(
            starts=[start for start, _ in sequences],
            query_lens=[count for _, count in sequences],
            block_tables=[table + [-1] * (width - len(table)) for table in garbage],
            logits=[True] * len(sequences),
            block_size=block_size,
        )

    def check(
        self,
        kernels: Backend,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        cache = poisoned(self.cache_shape, self.cache_dtype)
        for keys, values, slots in zip(self.keys, self.values, self.slots, strict=True):
            keep(kernels, keys, values, cache, slots)
        asked = rounded_rows if self.cache_dtype == torch.int8 else torch.Tensor.double
        seen = asked if self.cache_dtype not in LARGEST else partial(rounded_rows, kept=self.cache_dtype)
        attention = kernels.paged_attention(self.batch, window=window, softcap=softcap)
        found = attention(self.query, cache, self.scale, sinks)
        assert found.dtype == self.query.dtype
        row = 0
        for (start, count), keys, values in zip(self.sequences, self.keys, self.values, strict=True):
            query = asked(self.query[row : row + count])
            expected = dense(query, seen(keys), seen(values), start, self.scale, window, softcap, sinks)
            close(found[row : row + count], expected)
            row += count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 3, 8, 12, 16, 24, 32, 300])
@pytest.mark.parametrize("edge", [-1, 0, 1])
def test_decode_and_prefill_at_block_edges(
    kernels: Backend, block_size: int, edge: int, dtype: torch.dtype
) -> None:
    length = 3 * block_size + edge
    Case(
        [(length - 1, 1), (0, length), (block_size, length - block_size), (0, 1), (2 * length - 1, 1)],
        block_size=block_size,
        dtype=dtype,
    ).check(kernels)


@pytest.mark.parametrize("head", [64, 80, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2), (8, 1), (5, 1)])
def test_head_sizes_and_shared_key_heads(kernels: Backend, heads: int, kv_heads: int, head: int) -> None:
    Case([(40, 1), (0, 19), (17, 20), (33, 1)], heads=heads, kv_heads=kv_heads, head=head).check(kernels)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 1000])
@pytest.mark.parametrize("block_size", [1, 16])
def test_sliding_windows(kernels: Backend, window: int, block_size: int) -> None:
    Case([(40, 1), (39, 1), (0, 50), (20, 30), (3, 1), (64, 1)], block_size=block_size).check(kernels, window)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_soft_caps_and_sinks(kernels: Backend, dtype: torch.dtype, window: int | None) -> None:
    # scores reach several times the cap, and one head has no sink, one hardly anything but
    case = Case(
        [(40, 1), (39, 1), (0, 50), (1300, 1), (1020, 9)],
        heads=6, kv_heads=2, cache_dtype=dtype, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
    )  # fmt: skip
    case.scale *= 4.0
    sinks = torch.tensor([1.5, -4.0, -torch.inf, 300.0, 8.0, 0.0])
    case.check(kernels, window, softcap=3.0)
    case.check(kernels, window, sinks=sinks)
    case.check(kernels, window, softcap=3.0, sinks=sinks)


def test_a_soft_cap_hardly_touches_small_scores(kernels: Backend) -> None:
    # so near to its scores that float32 has no room for a worse tanh
    case = Case([(40, 1), (0, 9)])
    case.check(kernels, softcap=2.0**20)


@pytest.mark.parametrize("seed", range(4))
def test_random_mixed_steps(kernels: Backend, seed: int) -> None:
    source = random.Random(seed)
    sequences = [(source.randrange(200), source.choice([1, 1, 1, source.randrange(2, 70)])) for _ in range(24)]
    case = Case(sequences, block_size=source.choice([8, 16, 32]), seed=seed)
    case.check(kernels)
    case.check(kernels, window=source.randrange(1, 120))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cache_and_query_may_differ_in_dtype(
    kernels: Backend, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    Case([(30, 1), (0, 20), (11, 1)], dtype=dtype, cache_dtype=cache_dtype).check(kernels)


@pytest.mark.parametrize(
    ("block_size", "dtype"),
    [
        pytest.param(size, dtype, marks=() if i % 3 == j else pytest.mark.nightly)
        for i, size in enumerate([1, 8, 12, 16, 32, 300])
        for j, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16])
    ],
)
def test_caches_in_8_bits(kernels: Backend, block_size: int, dtype: torch.dtype) -> None:
    sequences = [(600, 1), (0, 40), (255, 3), (17, 1), (1030, 1)]
    for heads, kv_heads, head in ((4, 2, 64), (7, 1, 80), (3, 3, 20)):
        case = Case(
            sequences, block_size=block_size, heads=heads, kv_heads=kv_heads, head=head, dtype=dtype,
            cache_dtype=torch.int8,
        )  # fmt: skip
        case.check(kernels)
        case.check(kernels, window=100)


def test_what_8_bits_keep_of_keys_and_values(kernels: Backend) -> None:
    # a value is read back by a query that sees it alone; zeros and numbers too small to divide by stay zeros
    torch.manual_seed(0)
    values = torch.randn(4, 2, 16) * torch.tensor([1e-20, 1.0, 300.0, 1e30])[:, None, None]
    values[1, 0] = 0.0
    cache = poisoned((2, 4, 8, 2, 20), torch.int8)
    keep(kernels, torch.randn(4, 2, 16), values, cache, torch.arange(4) * 8)
    batch = PagedBatch.build(
        starts=[0] * 4, query_lens=[1] * 4, block_tables=[[0], [1], [2], [3]], logits=[1] * 4, block_size=8
    )
    found = kernels.paged_attention(batch, window=None)(torch.randn(4, 2, 16), cache, 0.25)
    torch.testing.assert_close(found, rounded_rows(values), atol=0, rtol=1e-6)
    assert ((found - values).abs() <= values.abs().amax(-1, keepdim=True) / 253).all()


def test_a_cache_in_fp8_is_read_as_it_was_rounded() -> None:
    """By the reference, which alone has it on a CPU."""
    case = Case([(300, 1), (0, 40), (255, 3), (17, 1)], heads=6, dtype=torch.bfloat16, cache_dtype=E4M3)
    case.check(ReferenceKernels())
    case.check(ReferenceKernels(), window=100)


def test_what_fp8_keeps_of_a_head() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    numbers = every[every & 127 != 127].view(E4M3).float()  # all there are but NaN
    heads = numbers * torch.tensor([2.0**-30, 1.0, 2.0**50])[:, None]
    assert torch.equal(from_bytes(to_bytes(heads, E4M3)), heads)
    torch.manual_seed(0)
    x = torch.randn(50, 64) * 10.0 ** torch.randint(-20, 20, (50, 1))
    most = x.abs().amax(-1, keepdim=True)
    kept = to_bytes(x, E4M3)
    read = from_bytes(kept)
    assert kept[..., :-4].float().isfinite().all()
    assert ((read - x).abs() <= torch.maximum(x.abs() / 16, most / (448 * 1024)) * (1 + 1e-6)).all()
    torch.testing.assert_close(read.abs().amax(-1, keepdim=True), most, rtol=1e-6, atol=0)
    # torch rounds as the format says: what lies beyond its largest number is that number
    codes = (x.double() * (448 / most.double())).clamp(-448, 448).to(E4M3).float()
    assert ((codes - kept[..., :-4].float()) != 0).float().mean() < 1e-3
    x[0, 5], x[1, 5], x[2] = torch.nan, -torch.inf, 0.0
    read = from_bytes(to_bytes(x, E4M3))
    assert read[:2].isnan().all()
    assert torch.equal(read[2], torch.zeros(64))
    assert read[3:].isfinite().all()


@pytest.mark.parametrize("gather_bytes", [1, 70_000, 200_000])
def test_a_small_gather_bound_cuts_groups_and_heads_but_not_results(gather_bytes: int) -> None:
    case = Case([(300, 1), (310, 1), (0, 40), (280, 1), (290, 30)], heads=8, kv_heads=4, head=64)
    case.check(ReferenceKernels(gather_bytes))
    case.check(ReferenceKernels(gather_bytes), window=100, softcap=1.0, sinks=torch.arange(-4.0, 4.0))


def test_long_prompts_are_masked_in_tiles(kernels: Backend) -> None:
    # 1300 rows of 1300 keys are above one tile of 2^20 entries
    case = Case([(0, 1300)], heads=1, kv_heads=1)
    case.check(kernels)
    case.check(kernels, window=900)


@pytest.mark.parametrize("block_size", [1, 5, 12, 20, 24, 32, 100, 256, 300])
def test_long_sequences_in_blocks_of_any_size(kernels: Backend, block_size: int) -> None:
    case = Case([(599, 1), (250, 30), (0, 270), (255, 1), (256, 1)], block_size=block_size)
    case.check(kernels)
    case.check(kernels, window=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_of_several_splits(kernels: Backend, dtype: torch.dtype) -> None:
    # a split ends every 1024 keys
    sequences = [(2500, 1), (1023, 1), (1024, 1), (1020, 9), (3, 1)]
    for heads, kv_heads in ((7, 1), (10, 5)):
        case = Case(sequences, heads=heads, kv_heads=kv_heads, dtype=dtype)
        case.check(kernels)
        case.check(kernels, window=1200)


def test_sequences_may_share_blocks(kernels: Backend) -> None:
    torch.manual_seed(1)
    cache = torch.empty(2, 6, 16, 2, 64)
    kept = torch.randn(2, 6, 16, 2, 64)
    keep(kernels, kept[0].view(96, 2, 64), kept[1].view(96, 2, 64), cache, torch.arange(96))
    tables = [[4, 4, 1], [4, 2, 2]]
    batch = PagedBatch.build(
        starts=[40, 35], query_lens=[1, 1], block_tables=tables, logits=[True, True], block_size=16
    )
    query = torch.randn(2, 4, 64)
    found = kernels.paged_attention(batch, window=None)(query, cache, 0.125)
    for row, (table, length) in enumerate(zip(tables, (41, 36), strict=True)):
        keys, values = (side[table].reshape(-1, 2, 64)[:length] for side in kept)
        close(found[row : row + 1], dense(query[row : row + 1], keys, values, length - 1, 0.125, None))


def test_a_query_that_is_a_slice_of_a_wider_tensor(kernels: Backend) -> None:
    case = Case([(20, 1), (0, 9)])
    case.query = torch.cat((case.query, torch.randn_like(case.query)), 1)[:, :4]
    assert not case.query.is_contiguous()
    case.check(kernels)


def test_place_heads_touches_its_slots_and_nothing_else(kernels: Backend) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        cache = torch.full((2, 5, 4, 2, 8), torch.nan, dtype=dtype)
        qkv = torch.randn(3, 8, 8)
        slots = torch.tensor([17, 2, 11])
        keep(kernels, qkv[:, 4:6], qkv[:, 6:], cache, slots)
        for side, written in zip(cache, (qkv[:, 4:6], qkv[:, 6:]), strict=True):
            # in what order a block has its numbers is the back-end's own business
            numbers = side[~torch.isnan(side)]
            assert torch.equal(numbers.sort().values, written.to(dtype).flatten().sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms(kernels: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(7, 96) * 3).to(dtype), torch.randn(96).to(dtype)
    residual = torch.randn(7, 96).to(dtype)
    total = (residual + x).clone()

    def norm(wide: Tensor) -> Tensor:
        return wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()

    close(kernels.rms_norm(x, weight, 1e-6), norm(x.double()))
    assert torch.equal(kernels.rms_norm(x, weight.float(), 1e-6), kernels.rms_norm(x, weight, 1e-6))
    close(kernels.add_rms_norm(x, residual, weight, 1e-6), norm(total.double()))
    assert torch.equal(residual, total)


@pytest.mark.parametrize("width", [2, 10, 64])
def test_turns_are_cosines_and_signed_sines(kernels: Backend, width: int) -> None:
    positions = torch.tensor([0, 1, 7, 4000, 131_071, 3])
    frequencies = 10_000.0 ** -(torch.arange(width // 2) * 2 / width)
    angles = (positions.float()[:, None] * frequencies).double()
    cos, sin = kernels.turns(positions, frequencies, 1.3)
    close(cos, 1.3 * torch.cat((angles.cos(), angles.cos()), -1)[:, None])
    close(sin, 1.3 * torch.cat((-angles.sin(), angles.sin()), -1)[:, None])


@pytest.mark.parametrize("normed", ["", "normed", "in float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_are_normed_turned_and_kept(kernels: Backend, dtype: torch.dtype, normed: str) -> None:
    torch.manual_seed(0)
    qkv, angles = torch.randn(5, 9, 40).to(dtype), torch.randn(5, 1, 20).double()
    cos, sin = angles.cos(), angles.sin()
    kept = torch.float32 if normed == "in float32" else dtype
    norms = HeadNorms(torch.randn(40).to(kept), torch.randn(40).to(kept), 1e-5) if normed else None

    def placed(x: Tensor, weight: Tensor | None) -> Tensor:
        wide = x.double()
        if weight is not None:
            wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
            wide = wide.to(dtype).double()
        first, second = wide.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    slots = torch.tensor([3, 8, 1, 11, 6])
    expected, found = (torch.zeros(2, 3, 4, 2, 40, dtype=dtype) for _ in range(2))
    turned = torch.cat((cos, cos), -1).float(), torch.cat((-sin, sin), -1).float()
    query = kernels.place_heads(qkv, 5, norms, *turned, found, slots)
    assert query.dtype == dtype
    close(query, placed(qkv[:, :5], norms.query if norms else None))
    keep(kernels, placed(qkv[:, 5:7], norms.key if norms else None).to(dtype), qkv[:, 7:], expected, slots)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=TOLERANCE[dtype][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_taken(kernels: Backend, dtype: torch.dtype) -> None:
    x, rows = torch.randn(6, 7).to(dtype), torch.tensor([5, 0, 0, 3])
    assert torch.equal(kernels.take(x, rows), x[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_of_an_mlp(kernels: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both = (torch.randn(4, 60) * 3).to(dtype)
    both[0, :4] = torch.tensor([-1e4, 1e4, 0.0, torch.nan])
    gate, up = both.double().chunk(2, -1)
    bent = 1 + torch.tanh((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    for found, expected in (
        (kernels.silu_mul(both), gate * gate.sigmoid() * up),
        (kernels.gelu_mul(both), gate / 2 * bent * up),
    ):
        assert found[0, 3].isnan()
        close(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_factor_is_rounded_before_it_multiplies(kernels: Backend, dtype: torch.dtype) -> None:
    x = torch.randn(5, 40).to(dtype)
    expected = (x.float() * torch.tensor(2304**0.5 + 0.1).to(dtype).float()).to(dtype)
    assert kernels.multiply(x[:, :33], 2304**0.5 + 0.1).data_ptr() == x.data_ptr()
    assert torch.equal(x[:, :33], expected[:, :33])
    assert not torch.equal(x[:, 33:], expected[:, 33:])


@pytest.mark.parametrize("cap", [30.0, 0.5])
def test_soft_caps_of_logits(kernels: Backend, cap: float) -> None:
    logits = torch.randn(3, 40_001) * torch.tensor([[1e-3], [30.0], [1e4]])
    logits[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    found = logits.clone()
    kernels.cap_logits(found, cap)
    assert found[0, :2].tolist() == [cap, -cap]
    assert found[0, 2].isnan()
    torch.testing.assert_close(
        found[:, 3:].double(), cap * torch.tanh(logits[:, 3:].double() / cap), atol=1e-9, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("outputs", "width"), [(1, 2), (15, 64), (16, 8), (63, 64), (64, 64), (65, 66), (130, 96), (448, 896)]
)
def test_products(kernels: Backend, outputs: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(outputs, width) / width**0.5).to(dtype), torch.randn(outputs).to(dtype)
    plain, added = kernels.product(weight.clone(), None), kernels.product(weight.clone(), bias)
    assert sum(held.nbytes for held in added.parameters()) == weight.nbytes + bias.nbytes
    for rows in (1, 2, 3, 4, 5, 6, 7, 11, 12, 37):
        x = torch.randn(rows, 2 * width).to(dtype)[:, :width]
        expected = x.double() @ weight.double().T
        assert plain(x).dtype == dtype
        assert plain.wide(x).dtype == torch.float32
        # two roundings of what is of size one, for a bias may be added to what was rounded
        absolute = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        for found, wanted in (
            (plain(x), expected), (added(x), expected + bias.double()), (plain.wide(x), expected),
        ):  # fmt: skip
            torch.testing.assert_close(found.double(), wanted, atol=absolute, rtol=2 * absolute)
    ids = torch.tensor([0, outputs - 1, 0, outputs // 2])
    assert torch.equal(plain.rows(ids), weight[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_comes_out_the_same_whatever_is_beside_it(native: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    product = native.product(torch.randn(200, 128).to(dtype), torch.randn(200).to(dtype))
    x = torch.randn(40, 128).to(dtype)
    whole = product(x)
    for first, last in ((0, 1), (3, 7), (5, 40), (39, 40)):
        assert torch.equal(product(x[first:last]), whole[first:last])


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_comes_out_the_same_in_chunks_and_in_company(
    native: Backend, dtype: torch.dtype, bent: bool
) -> None:
    softcap, sinks = (1.5, torch.linspace(-2.0, 3.0, 6)) if bent else (None, None)
    torch.manual_seed(0)
    length, query = 600, torch.randn(600, 6, 64).to(dtype)
    keys, values = torch.randn(2, length, 2, 64).to(dtype)
    table = random.Random(0).sample(range(60), 38)
    slots = torch.tensor([table[p // 16] * 16 + p % 16 for p in range(length)])
    cache = torch.zeros(2, 60, 16, 2, 64, dtype=dtype)
    keep(native, keys, values, cache, slots)

    def attend(*chunks: tuple[int, int]) -> Tensor:
        """Of one sequence, as if it was several that share their blocks."""
        batch = PagedBatch.build(
            starts=[first for first, _ in chunks],
            query_lens=[last - first for first, last in chunks],
            block_tables=[table] * len(chunks),
            logits=[True] * len(chunks),
            block_size=16,
        )
        rows = torch.cat([query[first:last] for first, last in chunks])
        return native.paged_attention(batch, window=None, softcap=softcap)(rows, cache, 0.125, sinks)

    whole = attend((0, length))
    for cuts in ([0, 1, 17, 300, 600], [0, 256, 511, 513, 600]):
        spans = list(itertools.pairwise(cuts))
        assert torch.equal(attend(*spans), whole)
        for first, last in spans:
            assert torch.equal(attend((first, last)), whole[first:last])


@pytest.mark.parametrize(("window", "bent"), [(None, False), (1500, False), (None, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_splits_come_out_the_same_whoever_computes_them(
    name: str, dtype: torch.dtype, window: int | None, bent: bool
) -> None:
    native = backend(name)
    softcap, sinks = (1.5, torch.linspace(-2.0, 3.0, 6)) if bent else (None, None)
    torch.manual_seed(0)
    length = 3000
    query, (keys, values) = torch.randn(length, 6, 32).bfloat16(), torch.randn(2, length, 2, 32).bfloat16()
    table = list(range(-(-length // 16)))
    cache = torch.zeros(2, len(table), 16, 2, 32 + 4 * (dtype == torch.int8), dtype=dtype)
    keep(native, keys, values, cache, torch.arange(length))

    def attend(kernels: Backend, ends: list[int], new: int) -> Tensor:
        """The last `new` tokens of each of several sequences that share their blocks and end at `ends`."""
        batch = PagedBatch.build(
            starts=[end - new for end in ends],
            query_lens=[new] * len(ends),
            block_tables=[table] * len(ends),
            logits=[1] * len(ends),
            block_size=16,
        )
        rows = torch.cat([query[end - new : end] for end in ends])
        attention = kernels.paged_attention(batch, window=window, softcap=softcap)
        return attention(rows, cache, 0.2, sinks).view(len(ends), new, 6, 32)

    alone = attend(native, [length], 1)[0]
    level = next(level for level in build.LEVELS if level.name == name)
    for threads in (1, 3, 8):
        assert torch.equal(attend(CpuKernels(threads, level), [length], 1)[0], alone)
    assert torch.equal(attend(native, [length, *range(100, 3000, 40)], 1)[0], alone)  # nothing is cut
    assert torch.equal(attend(native, [700, length], 70)[1, -1:], alone)


def test_a_recorded_step_has_its_soft_cap_and_its_sinks(native: Backend) -> None:
    table, heads, sinks = torch.randn(50, 3 * 64), 3, torch.tensor([1.0, -3.0, 2.0])
    cache = torch.randn(2, 8, 16, 1, 64)

    def body(token_ids: Tensor, batches: Sequence[PagedBatch]) -> Tensor:
        query = native.take(table, token_ids).view(-1, heads, 64)
        attention = native.paged_attention(batches[0], window=None, softcap=2.0)
        found = attention(query, cache, 0.5, sinks).view(-1, heads * 64)
        return native.take(found, batches[0].logits_rows)

    recorded = native.recorded(body)
    for starts, lens in (([100, 0], [1, 1]), ([0, 60], [30, 1]), ([7], [80])):
        batch = PagedBatch.build(
            starts=starts, query_lens=lens, block_tables=[range(8)] * len(lens), logits=[1] * len(lens),
            block_size=16,
        )  # fmt: skip
        ids = torch.randint(50, (sum(lens),))
        assert torch.equal(recorded(ids, [batch]), body(ids, [batch]))


@pytest.mark.parametrize("what", ["query", "keys", "values"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_what_is_not_finite_shows_in_its_own_sequence_alone(
    kernels: Backend, what: str, number: float, dtype: torch.dtype
) -> None:
    case = Case([(30, 1), (20, 1)], cache_dtype=dtype)
    if what == "query":
        case.query[0, 0, 5] = number
    else:
        getattr(case, what)[0][3, 0, 5] = number
    cache = poisoned(case.cache_shape, dtype)
    for keys, values, slots in zip(case.keys, case.values, case.slots, strict=True):
        keep(kernels, keys, values, cache, slots)
    found = kernels.paged_attention(case.batch, window=None)(case.query, cache, case.scale)
    assert not found[0].isfinite().all()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("width", [1, 7, 8, 70, 32768, 70001])
def test_masks_set_nothing_but_what_they_forbid(kernels: Backend, width: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, width)
    bits = torch.randint(0, 256, (2, width // 8 + 3), dtype=torch.uint8)
    bits[:, : width // 16] = 255
    shaped = logits.clone()
    kernels.mask_tokens(shaped, torch.tensor([0, 2]), bits)
    assert torch.equal(shaped[1], logits[1])
    allowed = (bits[:, :, None] >> torch.arange(8) & 1).bool().flatten(1)[:, :width]
    assert torch.equal(shaped[[0, 2]], logits[[0, 2]].masked_fill(~allowed, -torch.inf))


@pytest.mark.parametrize("width", [1, 5, 128, 257, 70001])
def test_the_largest_number_is_the_first_of_equals(kernels: Backend, width: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, width + 3)[:, :width]
    logits[0] = 1.5
    logits[1, width // 2 :] = 9.0
    logits[2] = -torch.inf
    logits[3, width - 1] = torch.inf
    logits[4, width // 3] = torch.nan
    values, places = kernels.largest(logits)
    expected = logits.max(dim=-1).values
    assert torch.equal(values.nan_to_num(7.0), expected.nan_to_num(7.0))
    for row in (0, 1, 2, 3, 5):
        assert places[row] == (logits[row] == expected[row]).nonzero()[0, 0]
    assert values[4].isnan()


def products(kernels: Backend, weight: Tensor, bias: Tensor) -> list[Product]:
    """Of all formats."""
    made = [kernels.product(weight.to(dtype), bias.to(dtype)) for dtype in TOLERANCE]
    for activations in ("int8", "float"):
        for quantized in (quantize_int8(weight), quantize_int4(weight, 32)):
            made.append(kernels.quantized_product(quantized, bias, activations, torch.bfloat16))
    return made


def test_the_largest_of_a_product_is_that_of_its_logits(kernels: Backend) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(20_000, 64), torch.randn(20_000)
    for twin in (17_000, 19_999):  # the first of equals counts
        weight[twin], bias[twin] = weight[2], bias[2]
    for product in products(kernels, weight, bias):
        dtype = product.rows(torch.tensor([0])).dtype
        for rows in (1, 7, 33):
            x = torch.randn(2 * rows, 64).to(dtype)[::2]
            x[-1] = weight[2].to(dtype) * 9
            if rows > 1:
                x[1, 3] = torch.nan
            for found, expected in zip(
                kernels.largest_of(product, x), kernels.largest(product.wide(x)), strict=True
            ):
                kept = [row for row in range(rows) if rows == 1 or row != 1]
                assert torch.equal(found[kept], expected[kept])
            assert rows == 1 or kernels.largest_of(product, x)[0][1].isnan()
            assert kernels.largest_of(product, x)[1][-1] == 2


def test_what_does_not_fit_a_weight_is_refused(native: Backend) -> None:
    product = native.product(torch.randn(8, 16).bfloat16(), None)
    for x in (torch.randn(2, 16), torch.randn(2, 8).bfloat16(), torch.randn(16, 2).bfloat16().T):
        with pytest.raises(KernelError, match=r"the product of torch\.bfloat16"):
            product(x)
