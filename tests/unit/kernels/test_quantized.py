"""Weights in 8 and 4 bits, and products with them, at each level of instructions that this processor has.

What a weight stands for is held against bounds by formula: half a step of the output's or the group's own scale.
Products are held against whole numbers added up in int64 and scaled in double precision, from the same codes; what
may be lost then is float32's rounding of the sum, of two scales and of the bias.

Legend: N outputs, K inputs, T rows of the input, g inputs of a group.
"""

from __future__ import annotations

import pytest
import torch
from tests.effort import times
from tests.unit.kernels.test_backends import BACKENDS, backend
from torch import Tensor

from quire_kernels import Activations, Int4Weight, Int8Weight, KernelError, Kernels
from quire_kernels.quantized import IntegerWeight, quantize_int4, quantize_int8
from quire_kernels.reference.bytes import quantize_rows

ROWS = times((1, 6, 8, 13, 33), (1, 2, 5, 6, 7, 8, 9, 12, 13, 33))
"""Around what is swept at once: 4, 8 or 12 of one strip, up to 6 of two."""
SHAPES_INT8 = [(1, 3), (15, 64), (16, 8), (31, 36), (32, 20), (65, 70), (130, 96), (200, 2052), (448, 896)]
SHAPES_INT4 = [(1, 128), (15, 128), (31, 384), (32, 128), (65, 256), (130, 640), (448, 896)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return backend(request.param)


def copied(weight: IntegerWeight) -> IntegerWeight:
    """For a product takes over what it is given."""
    return weight.part(torch.arange(weight.shape[0]))


def random_weight(outputs: int, width: int, group_size: int | None) -> IntegerWeight:
    rows = torch.randn(outputs, width) / width**0.5
    return quantize_int8(rows) if group_size is None else quantize_int4(rows, group_size)


def in_whole_numbers(x: Tensor, weight: IntegerWeight) -> Tensor:
    """The product of rounded rows, [T, N] double."""
    codes, scales = quantize_rows(x.float())
    if isinstance(weight, Int8Weight):
        sums = codes.long() @ weight.values.long().T
        return sums.double() * scales.double()[:, None] * weight.scales.double()
    size = weight.group_size
    parts = zip(torch.split(codes.long(), size, -1), torch.split(weight.codes().long(), size, -1), strict=True)
    sums = torch.stack([left @ right.T for left, right in parts], -1)  # [T, N, groups]
    return (sums.double() * weight.scales.double()).sum(-1) * scales.double()[:, None]


def close(found: Tensor, expected: Tensor, weight: IntegerWeight, x: Tensor) -> None:
    """Equal but for float32: sums of `groups` terms, each rounded, then of the result in its own dtype."""
    terms = weight.scales.shape[1] if isinstance(weight, Int4Weight) else 1
    size = x.double().abs() @ weight.dequantized().double().abs().T
    most = 2.0**-23 * (terms + 4) * size + ROUNDING[found.dtype] * expected.abs() + 1e-6
    wrong = (found.double() - expected).abs() > most
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} numbers"


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_within_half_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(9, 70) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    rows[4] = 0
    weight = quantize_int8(rows)
    wide = rows.double()
    step = wide.abs().amax(-1, keepdim=True) / 127
    assert ((weight.dequantized().double() - wide).abs() <= step * (0.5 + 1e-4)).all()
    assert weight.values.abs().amax(-1).tolist() == [127] * 4 + [0] + [127] * 4
    assert torch.equal(weight.dequantized()[4], torch.zeros(70))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bits_are_within_a_step_of_the_group(dtype: torch.dtype, group_size: int) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(9, 256) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    rows[4, :group_size] = 0
    weight = quantize_int4(rows, group_size)
    wide = rows.double().view(9, -1, group_size)
    step = wide.abs().amax(-1, keepdim=True) / 8
    # on the side without the largest number codes end at 7: there up to a whole step is cut off
    error = (weight.dequantized().double().view(wide.shape) - wide).abs()
    assert (error <= step * (1 + 2.0**-5)).all()
    inside = wide.abs() < 7 * step
    assert (error <= step * (0.5 + 2.0**-5))[inside].all()
    assert torch.equal(weight.dequantized()[4, :group_size], torch.zeros(group_size))


def test_how_four_bits_lie_in_a_byte() -> None:
    rows = torch.zeros(1, 32)
    rows[0, :4] = torch.tensor([-8.0, 3.0, 7.0, -1.0])
    weight = quantize_int4(rows, 32)
    assert weight.scales.tolist() == [[1.0]]
    assert weight.values[0, :3].tolist() == [0 | 11 << 4, 15 | 7 << 4, 8 | 8 << 4]
    assert torch.equal(weight.dequantized(), rows)
    assert quantize_int4(-rows, 32).scales.tolist() == [[-1.0]]


def test_a_weight_made_in_pieces_is_the_same() -> None:
    torch.manual_seed(0)
    rows = torch.randn(11, 128)
    whole, parts = quantize_int8(rows), Int8Weight.empty(11, 128)
    nibbles, nibble_parts = quantize_int4(rows, 64), Int4Weight.empty(11, 128, 64)
    for start, stop in ((5, 11), (0, 5)):
        parts.put(start, rows[start:stop])
        nibble_parts.put(start, rows[start:stop])
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.scales, whole.scales)
    assert torch.equal(nibble_parts.values, nibbles.values)
    assert torch.equal(nibble_parts.scales, nibbles.scales)


def test_what_cannot_be_quantised() -> None:
    for wrong in (torch.nan, torch.inf):
        rows = torch.ones(2, 32)
        rows[1, 7] = wrong
        with pytest.raises(KernelError, match="not finite"):
            quantize_int8(rows)
        with pytest.raises(KernelError, match="not finite"):
            quantize_int4(rows, 32)
    with pytest.raises(KernelError, match="48 inputs are no whole number of groups of 32"):
        quantize_int4(torch.ones(1, 48), 32)
    with pytest.raises(KernelError, match="a group of 16 inputs is none of 32, 64, 128"):
        quantize_int4(torch.ones(1, 48), 16)


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_products(kernels: Kernels, group_size: int | None, dtype: torch.dtype, activations: Activations) -> None:
    torch.manual_seed(0)
    for outputs, width in SHAPES_INT8 if group_size is None else SHAPES_INT4:
        weight, bias = random_weight(outputs, width, group_size), torch.randn(outputs).to(dtype)
        plain = kernels.quantized_product(copied(weight), None, activations, dtype)
        added = kernels.quantized_product(copied(weight), bias, activations, dtype)
        for rows in ROWS:
            x = torch.randn(rows, 2 * width).to(dtype)[:, :width]
            if activations == "int8":
                expected = in_whole_numbers(x, weight)
            else:
                expected = x.double() @ weight.dequantized().double().T
            assert plain(x).dtype == dtype
            assert plain.wide(x).dtype == torch.float32
            if activations == "float":
                # a sum of K terms in float32, in whatever order
                torch.testing.assert_close(plain.wide(x).double(), expected, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(added.wide(x).double(), expected + bias.double(), atol=1e-5, rtol=1e-5)
            else:
                close(plain.wide(x), expected, weight, x)
                close(added.wide(x), expected + bias.double(), weight, x)
            assert torch.equal(added(x), added.wide(x).to(dtype))
        ids = torch.tensor([0, outputs - 1, 0, outputs // 2])
        assert torch.equal(plain.rows(ids), weight.dequantized()[ids].to(dtype))


@pytest.mark.parametrize("group_size", [None, 32])
def test_products_of_extremes_are_exact(kernels: Kernels, group_size: int | None) -> None:
    """The largest sums that codes can make; emulations that saturate show here."""
    width = 1024
    signs = torch.tensor([1.0, -1.0]).repeat(width // 2)
    rows = torch.stack([torch.ones(width), -torch.ones(width), signs, -signs])
    weight = quantize_int8(rows) if group_size is None else quantize_int4(rows, group_size)
    product = kernels.quantized_product(copied(weight), None, "int8", torch.float32)
    x = 127 * rows
    assert torch.equal(product(x), in_whole_numbers(x, weight).float())


@pytest.mark.parametrize("group_size", [None, 32])
def test_rows_of_nothing_and_rows_that_are_not_finite(kernels: Kernels, group_size: int | None) -> None:
    torch.manual_seed(0)
    weight, bias = random_weight(70, 64, group_size), torch.randn(70)
    product = kernels.quantized_product(copied(weight), bias, "int8", torch.float32)
    x = torch.randn(7, 64)
    before = product(x)
    x[1], x[2, 5], x[3, 63], x[4, 0] = 0, torch.nan, -torch.inf, torch.inf
    x[5] = 1e-38
    found = product(x)
    assert torch.equal(found[1], bias)
    assert torch.equal(found[5], bias)
    assert found[2:5].isnan().all()
    assert torch.equal(found[[0, 6]], before[[0, 6]])


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_a_row_comes_out_the_same_whatever_is_beside_it(
    name: str, group_size: int | None, activations: Activations
) -> None:
    torch.manual_seed(0)
    product = backend(name).quantized_product(
        random_weight(200, 384, group_size), torch.randn(200), activations, torch.bfloat16
    )
    x = torch.randn(40, 384).bfloat16()
    whole = product.wide(x)
    for first, last in ((0, 1), (3, 7), (4, 10), (0, 9), (2, 17), (5, 40), (39, 40)):
        assert torch.equal(product.wide(x[first:last]), whole[first:last])


def test_every_level_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    weight, x = random_weight(130, 640, None), torch.randn(9, 640)
    expected = backend("reference").quantized_product(copied(weight), None, "int8", torch.float32)(x)
    compared: list[str] = []
    for name in BACKENDS[1:]:
        try:
            native = backend(name)
        except pytest.skip.Exception:
            continue
        compared.append(name)
        assert torch.equal(native.quantized_product(copied(weight), None, "int8", torch.float32)(x), expected)
    if not compared:
        pytest.skip("no native level runs on this processor, or there is no compiler")
