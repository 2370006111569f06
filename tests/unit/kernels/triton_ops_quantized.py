"""Products with weights in 8 and 4 bits on the Triton back-end: see `triton_ops`.

What is rounded is compared with whole numbers added up exactly and scaled in double precision; what is not with
double-precision products of what the weight stands for. ‖found - expected‖ / ‖expected‖ may be: in float32 some
roundings of 6e-8, or 1e-4 with an input in two planes; else the rounding of the result, and with many rows that of
each number of the weight, too. The interpreter cuts bfloat16 off instead of rounding it.

On a GPU shapes are those of a model, so that splits, bands of tiles and masks are as they are there.

Legend: M rows of the input, N outputs, K inputs, g inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quire_kernels import Activations, KernelError
from quire_kernels.quantized import Int4Weight, Int8Weight, IntegerWeight, quantize_int4, quantize_int8
from quire_kernels.reference.bytes import quantize_rows
from quire_kernels.triton import INTERPRETED, TritonKernels, quantized, rounding
from quire_kernels.triton.quantized import Line, Packed, Room, Tiling
from quire_kernels.triton.rounding import round_rows
from quire_schemas import gpu_sizing

torch.set_num_threads(1)
# rows that are not finite are given on purpose; numpy, which interprets, tells each time
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CLOSE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2 if INTERPRETED else 6e-3}
SHAPES = [(40, 192)] if INTERPRETED else [(40, 192), (1000, 2048)]
ROWS = [1, 3, 20] if INTERPRETED else [1, 3, 20, 130, 300]
LARGE = [(4096, 4096), (6144, 4096), (16640, 1024), (4096, 14336)]
MANY = [1, 2, 8, 16, 33, 64, 100, 128, 200, 256, 1000, 2049]
kernels = TritonKernels()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    source = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=source, device=DEVICE).to(dtype)


def weight_of(outputs: int, width: int, group_size: int | None) -> IntegerWeight:
    rows = random(outputs, width, seed=1) / width**0.5
    return quantize_int8(rows) if group_size is None else quantize_int4(rows, group_size)


def copied(weight: IntegerWeight) -> IntegerWeight:
    """For a product takes over what it is given."""
    return weight.part(torch.arange(weight.shape[0], device=DEVICE))


def in_whole_numbers(x: Tensor, weight: Int8Weight) -> Tensor:
    """The product of rounded rows, [M, N] double. Doubles hold these sums exactly."""
    codes, scales = (part.to(DEVICE) for part in quantize_rows(x.float().cpu()))
    sums = codes.double() @ weight.values.double().T
    return sums * scales.double()[:, None] * weight.scales.double()


def close(found: Tensor, expected: Tensor, most: float) -> None:
    assert found.shape == expected.shape
    assert not found.isnan().any()
    error = (found.double() - expected).norm() / expected.norm()
    assert error < most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 100, 1000, 14336])
def test_rows_are_rounded_as_the_reference_does(width: int, dtype: torch.dtype) -> None:
    wide = random(7, width + 3, dtype=dtype) * 100
    wide[1] = 0
    wide[2, 1], wide[3, 0], wide[4, 2] = torch.nan, -torch.inf, torch.inf
    if dtype == torch.float32:
        wide[5] *= 1e-38
    x = wide[:, :width]
    codes, scales = round_rows(x)
    expected, expected_scales = quantize_rows(x.float().cpu())
    assert torch.equal(codes.cpu(), expected)
    assert torch.equal(scales.cpu().nan_to_num(7.0), expected_scales.nan_to_num(7.0))


def test_two_planes_of_codes_are_a_row_to_a_part_in_64516() -> None:
    x = random(6, 1000) * torch.logspace(-3, 3, 6, device=DEVICE)[:, None]
    x[1, 5], x[2], x[3, 1] = 3000.0, 0, torch.inf
    codes, scales = round_rows(x, 2)
    coarse, fine = codes[0::2].double(), codes[1::2].double()
    assert torch.equal(codes[0::2], round_rows(x)[0])
    found = (coarse + fine / 254) * scales.double()[:, None]
    assert found[3].isnan().all()
    for row in (0, 1, 2, 4, 5):
        most = x[row].double().abs().max() / 64516
        assert ((found[row] - x[row].double()).abs() <= most * (1 + 1e-3)).all()


def check(
    outputs: int,
    width: int,
    group_size: int | None,
    activations: Activations,
    dtype: torch.dtype,
    counts: list[int],
) -> None:
    weight, bias = weight_of(outputs, width, group_size), random(outputs, seed=2)
    plain = kernels.quantized_product(copied(weight), None, activations, dtype)
    added = kernels.quantized_product(copied(weight), bias, activations, dtype)
    for rows in counts:
        x = random(rows, width + 16, dtype=dtype)[:, :width]
        if isinstance(weight, Int8Weight) and activations == "int8":
            expected = in_whole_numbers(x, weight)
        else:
            expected = x.double() @ weight.dequantized().double().T
        found = plain(x)
        assert found.dtype == dtype
        close(found, expected, CLOSE[dtype])
        close(added(x), expected + bias.double(), CLOSE[dtype])
        assert torch.equal(plain.wide(x), found.float())
    ids = torch.tensor([outputs - 1, 0, outputs // 2], device=DEVICE)
    expected = weight.dequantized()[ids]
    close(plain.rows(ids), expected.double(), CLOSE[dtype])
    if dtype == torch.float32:
        assert torch.equal(plain.rows(ids), expected)
    assert plain(random(0, width, dtype=dtype)).shape == (0, outputs)


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype, group_size: int | None, activations: Activations) -> None:
    if group_size is not None and activations == "int8":
        with pytest.raises(KernelError, match="4 bits by floating-point activations"):
            kernels.quantized_product(weight_of(8, 128, group_size), None, activations, dtype)
        return
    for outputs, width in SHAPES:
        check(outputs, 256 if width == 192 and group_size == 128 else width, group_size, activations, dtype, ROWS)


@pytest.mark.skipif(INTERPRETED, reason="shapes of a model take the interpreter hours; they run on a GPU")
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("group_size", [None, 32, 128])
def test_large_products(group_size: int | None, shape: tuple[int, int]) -> None:
    for activations in ("int8", "float") if group_size is None else ("float",):
        check(*shape, group_size, activations, torch.bfloat16, MANY)


def test_groups_that_are_no_pairs_are_multiplied_unpacked() -> None:
    check(40, 96, 32, "float", torch.bfloat16, [1, 20])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if not INTERPRETED else [torch.float16])
@pytest.mark.parametrize("group_size", [None, 32])
def test_many_rows_meet_the_weight_unpacked(
    group_size: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, width = (600, 64) if INTERPRETED else (6000, 4096)
    monkeypatch.setattr(quantized, "SCRATCH_BYTES", 256 * width * dtype.itemsize)  # in pieces, the last one less
    weight, bias = weight_of(outputs, width, group_size), random(outputs, seed=2)
    mine = kernels.quantized_product(copied(weight), bias, "float", dtype)
    x = random(max(quantized.MANY_ROWS.values()), width, dtype=dtype)
    close(mine(x), x.double() @ weight.dequantized().double().T + bias.double(), CLOSE[dtype])


TILINGS = [
    Tiling(64, 16, 64, 1, 4, 2),
    Tiling(16, 16, 128, 3, 4, 3),
    Tiling(32, 32, 64, 4, 4, 3),
]


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("group_size", [None, 32, 64])
def test_tilings_and_splits_change_nothing(group_size: int | None, planes: int) -> None:
    outputs, width, rows = 40, 320, 18 // planes
    weight, bias = weight_of(outputs, width, group_size), random(outputs, seed=2)
    packed, room = Packed.of(copied(weight)), Room(torch.device(DEVICE))
    codes, scales = round_rows(random(rows, width), planes)
    exact = codes.double() @ weight.dequantized().double().T
    if planes == 2:
        exact = exact[0::2] + exact[1::2] / 254
    results = []
    for tiling in TILINGS:
        for _ in range(1 + (tiling.splits > 1)):  # the second finds the counts of arrivals as the first did
            results.append(quantized.multiply(codes, scales, packed, bias, torch.float32, tiling, room))
            close(results[-1], exact * scales.double()[:, None] + bias.double(), 1e-6)
    if group_size is None:
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("line", [Line(8, 32, 2, 1), Line(16, 16, 4, 2), Line(32, 1024, 4, 1)])
def test_one_row_is_what_many_are(line: Line) -> None:
    weight, bias, room = weight_of(70, 192, None), random(70, seed=2), Room(torch.device(DEVICE))
    packed, (codes, scales) = Packed.of(copied(weight)), round_rows(random(3, 192))
    whole = quantized.multiply(codes, scales, packed, bias, torch.float32, TILINGS[0], room)
    for row in range(3):
        alone = quantized.multiply_row(codes[row : row + 1], scales[row:], packed, bias, torch.float32, line)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("group_size", [None, 128])
def test_products_of_extremes(group_size: int | None) -> None:
    """The largest sums that codes can make, and rows that are nothing or not finite."""
    width = 1024
    signs = torch.tensor([1.0, -1.0], device=DEVICE).repeat(width // 2)
    ones = torch.ones(width, device=DEVICE)
    rows = torch.stack([ones, -ones, signs, -signs])
    weight = quantize_int8(rows) if group_size is None else quantize_int4(rows, group_size)
    x = torch.stack([127 * ones, 127 * signs, 0 * ones, ones, ones])
    x[3, 5], x[4, 1000] = torch.nan, torch.inf
    dtype = torch.float32 if group_size is None else torch.bfloat16
    mine = kernels.quantized_product(copied(weight), None, "float" if group_size else "int8", dtype)
    found, expected = mine(x.to(dtype)), x.double() @ weight.dequantized().double().T
    assert torch.equal(found[:3], expected[:3].to(dtype))
    assert found[3:].isnan().all()


def test_codes_in_other_planes_than_are_wanted_are_made_anew() -> None:
    beside, x = rounding.Rounding(), random(2, 8)
    beside.want(1, 99)
    beside.beside(x)
    found, expected = beside.of(x, 2), round_rows(x, 2)
    assert torch.equal(found.planes, expected.planes)


@pytest.mark.parametrize(
    ("activations", "dtype"), [("int8", torch.float16), ("int8", torch.bfloat16), ("float", torch.bfloat16)]
)
def test_what_a_norm_or_a_gate_gives_is_rounded_with_it(
    activations: Activations, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, weight = TritonKernels(), weight_of(40, 192, None)
    product = mine.quantized_product(copied(weight), None, activations, dtype)
    x, residual, scale = random(3, 192, dtype=dtype), random(3, 192, dtype=dtype, seed=1), random(192, dtype=dtype)
    x[1, 5] = torch.nan
    makers: list[Callable[[], Tensor]] = [
        lambda: mine.rms_norm(x, scale, 1e-5),
        lambda: mine.add_rms_norm(x, residual.clone(), scale, 1e-5),
        lambda: mine.silu_mul(random(3, 384, dtype=dtype)),
        lambda: mine.gelu_mul(random(3, 384, dtype=dtype)),
    ]
    for make in makers:
        given = make()
        monkeypatch.setattr(rounding, "round_rows", lambda *_: pytest.fail("rounded twice"))
        found = product(given)
        monkeypatch.undo()
        assert torch.equal(found.isnan(), product(given.clone()).isnan())
        assert torch.equal(found.nan_to_num(7.0), product(given.clone()).nan_to_num(7.0))
        # handed out once: and never for rows that only look alike
        make()
        assert torch.equal(product(given).nan_to_num(7.0), found.nan_to_num(7.0))


@pytest.mark.parametrize("group_size", [None, 32, 128])
def test_a_product_holds_the_bytes_of_its_weight(group_size: int | None) -> None:
    weight = weight_of(70, 128, group_size)
    size = weight.values.nbytes + weight.scales.nbytes
    mine = kernels.quantized_product(weight, random(70, dtype=torch.float16), "float", torch.float16)
    assert sum(part.nbytes for part in mine.parameters()) == size + 4 * 70


def test_four_bits_are_put_in_order_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(70, 256, 64)
    assert isinstance(weight, Int4Weight)
    whole = Packed.of(weight)
    monkeypatch.setattr(quantized, "_PIECE", 3 * 256)
    assert torch.equal(Packed.of(weight).values, whole.values)
    byte = int(whole.values[2, 5, 7])
    assert [(byte & 15 ^ 8) - 8, (byte >> 4 ^ 8) - 8] == weight.codes()[5, [128 + 7, 128 + 32 + 7]].tolist()


def test_splits_have_room_and_use_the_chip() -> None:
    for group_size in (0, 32, 128):
        for outputs in (64, 1024, 4096, 28672, 151936):
            for width in (64, 1024, 4096, 14336):
                weight = Packed(torch.empty(0), torch.empty(0), group_size, outputs, width)
                for rows, tiling in (
                    *((rows, quantized.tiling_for(rows, weight, 132)) for rows in (2, 16, 40, 128, 256, 4096)),
                    # a tiling of a rung serves all between it and the one below
                    *(
                        (rows, tiling)
                        for below, rung in pairwise(quantized.RUNGS)
                        for tiling in quantized.candidates(rung, weight, 132)
                        for rows in (below + 1, rung)
                    ),
                ):
                    assert isinstance(tiling, Tiling)
                    tiles = -(-rows // tiling.block_m) * -(-outputs // tiling.block_n)
                    assert tiling.block_m <= max(16, 2 * rows)
                    if tiling.splits > 1:
                        assert tiles <= quantized.MOST_TILES
                        held = tiles * tiling.splits * tiling.block_n * tiling.block_m * 4
                        bound = 384 * 128 * min(max(4 * rows, 16), 128) * 4
                        assert held <= min(quantized.ROOM_BYTES, bound)


def test_the_two_sides_agree_on_what_products_take() -> None:
    for name in ("SCRATCH_BYTES", "ROOM_BYTES", "MOST_TILES"):
        assert getattr(gpu_sizing, name) == getattr(quantized, name)
    assert max(quantized.MANY_ROWS.values()) == gpu_sizing.MANY_ROWS
