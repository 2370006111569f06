"""Products with weights in fp8 on the Triton back-end: see `triton_ops`.

Inputs that are rounded are compared with double-precision products of what codes and scales stand for; those
that are not with products of the input as it is. ‖found - expected‖ / ‖expected‖ may be what rounding the
result costs, and some roundings of float32. Tensor cores of Hopper keep some 14 bits of each term of a group's
sum in fp8 and cut the others off, which `SHORT` is for. The interpreter cuts bfloat16 off instead of rounding
it, and multiplies it wrongly.

Legend: M rows of the input, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import Activations, Fp8Weight
from quire_kernels.quantized import FP8, quantize_fp8, widened
from quire_kernels.reference.bytes import quantize_groups
from quire_kernels.triton import INTERPRETED, TritonKernels, rounding, scaled
from quire_kernels.triton.bytes import e4m3_of
from quire_kernels.triton.quantized import Room, Tiling
from quire_kernels.triton.rounding import FLOATS, round_rows
from quire_schemas import gpu_sizing

torch.set_num_threads(1)
# rows that are not finite are given on purpose; numpy, which interprets, tells each time
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
CLOSE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SHORT = 0.0 if INTERPRETED else 2e-3
SHAPES = [(40, 200, 8), (128, 256, 128)] if INTERPRETED else [(40, 200, 8), (128, 256, 128), (1000, 2048, 8)]
ROWS = [1, 3, 20] if INTERPRETED else [1, 3, 20, 64, 130, 300]
LARGE = [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)]
MANY = [1, 2, 8, 16, 33, 64, 100, 128, 200, 256, 1000, 2049]
BY_CHIP = [True, False] if INTERPRETED or scaled.native() else [False]
kernels = TritonKernels()


@triton.jit  # type: ignore[untyped-decorator]
def _codes_of(out, x, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(out + at, e4m3_of(tl.load(x + at, mask=at < count, other=0.0)), mask=at < count)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    source = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=source, device=DEVICE).to(dtype)


def weight_of(outputs: int, width: int, shared: int | None = None) -> Fp8Weight:
    return quantize_fp8(random(outputs, width, seed=1) / width**0.5, shared)


def rounded(x: Tensor) -> Tensor:
    """What an input stands for once it is rounded, double."""
    codes, scales = (part.to(DEVICE) for part in quantize_groups(x.float().cpu()))
    return widened(codes, scales, 1).double()


def close(found: Tensor, expected: Tensor, most: float) -> None:
    assert found.shape == expected.shape
    assert not found.isnan().any()
    error = (found.double() - expected).norm() / expected.norm()
    assert error < most


def test_every_number_becomes_the_code_that_torch_gives_it() -> None:
    """All numbers in bfloat16 up to 448, those between two codes, and what is next to them."""
    bits = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16).float()
    numbers = torch.cat([bits[bits.abs() <= 448], torch.linspace(0, 448, 997)])
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle = (codes[1:] + codes[:-1]) / 2
    numbers = torch.cat([numbers, middle, middle.nextafter(codes[1:]), middle.nextafter(codes[:-1])])
    numbers = torch.cat([numbers, -numbers]).to(DEVICE)
    found = torch.empty(len(numbers), dtype=torch.int8, device=DEVICE)
    _codes_of[(1,)](found, numbers, len(numbers), BLOCK=1 << 16)
    assert torch.equal(found.cpu().view(torch.uint8), numbers.cpu().to(FP8).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4, 128, 200, 1000])
def test_rows_are_rounded_as_the_reference_does(width: int, dtype: torch.dtype) -> None:
    wide = random(6, width + 3, dtype=dtype) * 100
    wide[1] = 0
    wide[2, 1], wide[3, width - 1], wide[4, 2] = torch.nan, -torch.inf, torch.inf
    if dtype == torch.float32:
        wide[5] *= 1e-38
    x = wide[:, :width]
    codes, scales = round_rows(x, FLOATS)
    expected, expected_scales = quantize_groups(x.float().cpu())
    assert torch.equal(codes.cpu().view(torch.uint8) & 127, expected & 127)
    assert torch.equal(codes.cpu().view(FP8).float(), expected.view(FP8).float())
    assert torch.equal(scales.cpu().nan_to_num(7.0), expected_scales.nan_to_num(7.0))


def check(
    outputs: int, width: int, shared: int | None, activations: Activations, dtype: torch.dtype, counts: list[int]
) -> None:
    weight, bias = weight_of(outputs, width, shared), random(outputs, seed=2)
    stands_for = weight.dequantized().double()
    plain = kernels.quantized_product(weight, None, activations, dtype)
    added = kernels.quantized_product(weight, bias, activations, dtype)
    for rows in counts:
        x = random(rows, width + 16, dtype=dtype)[:, :width]
        expected = (rounded(x) if activations == "fp8" else x.double()) @ stands_for.T
        found, most = plain(x), CLOSE[dtype] + (SHORT if activations == "fp8" else 0.0)
        assert found.dtype == dtype
        close(found, expected, most)
        close(added(x), expected + bias.double(), most)
        assert torch.equal(plain.wide(x), found.float())
    ids = torch.tensor([outputs - 1, 0, outputs // 2], device=DEVICE)
    assert torch.equal(plain.rows(ids), weight.dequantized()[ids].to(dtype))
    assert plain(random(0, width, dtype=dtype)).shape == (0, outputs)


@pytest.mark.parametrize("activations", ["fp8", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype, activations: Activations) -> None:
    for outputs, width, shared in SHAPES:
        check(outputs, width, shared, activations, dtype, ROWS)


@pytest.mark.skipif(INTERPRETED, reason="shapes of a model take the interpreter hours; they run on a GPU")
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("activations", ["fp8", "float"])
def test_large_products(activations: Activations, shape: tuple[int, int]) -> None:
    check(*shape, None, activations, torch.bfloat16, MANY)


TILINGS = [Tiling(16, 16, 128, 1, 4, 2), Tiling(32, 16, 128, 3, 4, 3), Tiling(64, 32, 128, 2, 4, 3)]


@pytest.mark.parametrize("by_chip", BY_CHIP)
@pytest.mark.parametrize("shared", [8, 32])
@pytest.mark.parametrize("activations", ["fp8", "float"])
def test_tilings_and_splits_change_nothing(activations: Activations, shared: int, by_chip: bool) -> None:
    """And whether the chip multiplies codes or widens them first. Of 32 a tile may lie within a block."""
    outputs, width, rows = 96, 600, 18
    weight, bias, room = weight_of(outputs, width, shared), random(outputs, seed=2), Room(torch.device(DEVICE))
    x = random(rows, width, dtype=torch.float16)
    given = round_rows(x, FLOATS) if activations == "fp8" else x
    expected = (
        rounded(x) if activations == "fp8" else x.double()
    ) @ weight.dequantized().double().T + bias.double()
    most = CLOSE[torch.float32] + (SHORT if activations == "fp8" else 0.0)
    for tiling in TILINGS:
        for _ in range(1 + (tiling.splits > 1)):  # the second finds the counts of arrivals as the first did
            found = scaled.multiply(given, weight, bias, torch.float32, tiling, room, by_chip=by_chip)
            close(found, expected, most)


@pytest.mark.parametrize("by_chip", BY_CHIP)
def test_products_of_extremes(by_chip: bool) -> None:
    """Every code of a weight, the largest sums, and rows that are nothing or not finite."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where((codes & 127) == 127, 0, codes)
    weight = Fp8Weight.empty(3, 256, 1, DEVICE)
    weight.put_codes(0, torch.stack([codes, torch.full((256,), 126), torch.full((256,), 129)]).to(torch.uint8))
    weight.put_scales(0, 3, torch.full((1, 2), 2.0**-20))
    ones, eye = torch.ones(1, 256, device=DEVICE), torch.eye(256, device=DEVICE)
    room, tiling = Room(torch.device(DEVICE)), Tiling(16, 16, 128, 1, 4, 2)
    for x in (ones, 0 * ones, eye[:9], eye[247:]):
        expected = x.double() @ weight.dequantized().double().T
        terms = x.double().abs() @ weight.dequantized().double().abs().T
        for given, most in ((round_rows(x, FLOATS), 2e-6 + SHORT), (x.half(), 2e-6)):
            found = scaled.multiply(given, weight, None, torch.float32, tiling, room, by_chip=by_chip)
            assert ((found.double() - expected).abs() <= most * terms).all()
    x = torch.cat([ones, ones, ones])
    x[0, 3], x[2, 200] = torch.nan, torch.inf
    mine = kernels.quantized_product(weight, None, "fp8", torch.float32)(x)
    assert mine.isnan().all(-1).tolist() == [True, False, True]


def test_many_rows_meet_the_weight_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, width = (600, 130) if INTERPRETED else (6000, 4096)
    monkeypatch.setattr(
        "quire_kernels.triton.quantized.SCRATCH_BYTES", 256 * width * 2
    )  # in pieces, the last less
    weight, bias = weight_of(outputs, width), random(outputs, seed=2)
    mine = kernels.quantized_product(weight, bias, "float", torch.float16)
    x = random(scaled.MANY_ROWS, width, dtype=torch.float16)
    close(mine(x), x.double() @ weight.dequantized().double().T + bias.double(), CLOSE[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_norm_or_a_gate_gives_is_rounded_with_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, weight = TritonKernels(), weight_of(40, 200, 8)
    multiply = mine.quantized_product(weight, None, "fp8", dtype)
    x, residual, scale = random(3, 200, dtype=dtype), random(3, 200, dtype=dtype, seed=1), random(200, dtype=dtype)
    x[1, 5] = torch.nan
    makers: list[Callable[[], Tensor]] = [
        lambda: mine.rms_norm(x, scale, 1e-5),
        lambda: mine.add_rms_norm(x, residual.clone(), scale, 1e-5),
        lambda: mine.silu_mul(random(3, 400, dtype=dtype)),
    ]
    for make in makers:
        given = make()
        monkeypatch.setattr(rounding, "round_rows", lambda *_: pytest.fail("rounded twice"))
        found = multiply(given)
        monkeypatch.undo()
        assert torch.equal(found.isnan(), multiply(given.clone()).isnan())
        assert torch.equal(found.nan_to_num(7.0), multiply(given.clone()).nan_to_num(7.0))


def test_a_product_holds_the_bytes_of_its_weight() -> None:
    weight = weight_of(70, 200)
    mine = kernels.quantized_product(weight, random(70, dtype=torch.float16), "float", torch.float16)
    assert sum(part.nbytes for part in mine.parameters()) == 70 * 200 + 4 * 35 * 2 + 4 * 70


def test_splits_have_room_and_use_the_chip() -> None:
    shapes = product((64, 1024, 4096, 28672, 151936), (64, 1024, 4096, 14336))
    for outputs, width in shapes:
        for rows in (1, 2, 16, 40, 128, 256, 4096):
            for rounded_rows in (True, False):
                tiling = scaled.tiling_for(rows, outputs, width, 132, rounded=rounded_rows)
                taken = tiling.block_n + tiling.block_m * (1 if rounded_rows else 2)
                assert taken * tiling.block_k * tiling.num_stages <= 96 << 10
                tiles = -(-rows // tiling.block_m) * -(-outputs // tiling.block_n)
                assert tiling.block_m <= max(16, 2 * rows)
                if tiling.splits > 1:
                    held = tiles * tiling.splits * tiling.block_n * tiling.block_m * 4
                    bound = 384 * 128 * min(max(4 * rows, 16), 128) * 4
                    assert held <= min(gpu_sizing.ROOM_BYTES, bound)
                    assert tiles <= gpu_sizing.MOST_TILES
