"""Weights in fp8, and products with them: torch's own conversions are the other side, in double precision.

Legend: N outputs, K inputs, T rows of the input, b outputs of a block.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from tests.unit.kernels.test_backends import BACKENDS, backend
from torch import Tensor

from quire_kernels import Fp8Weight, KernelError, load
from quire_kernels.mxfp4 import Mxfp4Weight
from quire_kernels.quantized import FP8, quantize_fp8, quantize_int8, shared_outputs
from quire_kernels.reference.bytes import quantize_groups

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFERENCE = load("reference")


def blockwise(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K] double, and what each is multiplied by, block by block."""
    codes, scales = torch.zeros(rows.shape, dtype=torch.double), torch.zeros(rows.shape, dtype=torch.double)
    for top in range(0, rows.shape[0], size):
        for left in range(0, rows.shape[1], 128):
            here = slice(top, top + size), slice(left, left + 128)
            scale = rows[here].abs().max() / 448
            codes[here] = (rows[here] / (scale if scale > 0 else 1)).to(FP8).double()
            scales[here] = scale.double()
    return codes, scales


def rounded(x: Tensor) -> Tensor:
    """What the rows of an input stand for in fp8, 128 numbers at a time, double."""
    codes, scales = blockwise(x.float(), 1)
    return codes * scales


@pytest.mark.parametrize(
    ("outputs", "width", "shared"), [(256, 128, 128), (48, 200, 16), (3, 5, 1), (130, 300, 2)]
)
def test_a_block_is_rounded_by_its_largest_number(outputs: int, width: int, shared: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(outputs, width) * torch.logspace(-3, 3, outputs)[:, None]
    rows[:shared, :128] = 0
    weight = quantize_fp8(rows)
    assert (weight.shape, weight.shared) == ((outputs, width), shared)
    codes, scales = blockwise(rows, shared)
    # a number in the middle of two codes may go to either, as the quotient was rounded
    assert (weight.values.view(FP8).double() != codes).float().mean() < 1e-3
    assert torch.allclose(weight.dequantized().double(), codes * scales, rtol=2**-3, atol=0)
    assert weight.values.view(FP8).float().abs().max() == 448
    step = (codes.abs() * 2**-4).clamp_min(2**-10)
    assert ((weight.dequantized().double() - rows.double()).abs() <= step * scales * (1 + 1e-5)).all()
    assert not weight.dequantized()[:shared, :128].any()


def test_every_code_is_what_its_bits_say() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits[(bits & 127) != 127]
    weight = Fp8Weight.empty(len(numbers), 1, 1)
    weight.put_codes(0, numbers[:, None])
    weight.put_scales(0, len(numbers), torch.full((2, 1), 0.5))
    for code, found in zip(numbers.tolist(), weight.dequantized()[:, 0].tolist(), strict=True):
        exponent, mantissa = code >> 3 & 15, code & 7
        size = Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(mantissa, 512)
        assert Fraction(found) == (-size if code > 127 else size) / 2


def test_parts_that_do_not_line_up_keep_the_scales_of_their_own_blocks() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(size, 200) * 10**power for power, size in enumerate((192, 96, 96))]
    shared = shared_outputs(*map(len, parts))
    assert shared == 32
    fused, at = Fp8Weight.empty(384, 200, shared), 0
    expected = []
    for rows in parts:
        codes, scales = blockwise(rows, 128)
        grid = scales.float()[::128, ::128]
        fused.put_scales(at, len(rows), grid)
        for start in range(0, len(rows), 50):  # pieces of a file know nothing of blocks
            fused.put_codes(at + start, codes[start : start + 50].to(FP8).view(torch.uint8))
        expected.append((codes * scales).float())
        at += len(rows)
    assert torch.equal(fused.dequantized(), torch.cat(expected))
    assert torch.equal(fused.part(slice(100, 300)).dequantized(), torch.cat(expected)[100:300])
    assert torch.equal(fused.part(torch.tensor([383, 0, 191])).dequantized(), torch.cat(expected)[[383, 0, 191]])


def test_a_weight_made_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = torch.randn(96, 200)
    whole, parts = quantize_fp8(rows), Fp8Weight.empty(96, 200, 32)
    monkeypatch.setattr("quire_kernels.quantized._PIECE", 1)  # one block at a time
    for start, stop in ((32, 96), (0, 32)):
        parts.put(start, rows[start:stop])
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.scales, whole.scales)


def test_what_cannot_be_in_fp8() -> None:
    weight = Fp8Weight.empty(4, 8, 4)
    with pytest.raises(KernelError, match="not finite"):
        weight.put(0, torch.full((4, 8), torch.inf))
    for code in (127, 255):
        with pytest.raises(KernelError, match="not a number"):
            weight.put_codes(0, torch.full((1, 8), code, dtype=torch.uint8))
    for scale in (torch.nan, torch.inf, -1.0):
        with pytest.raises(KernelError, match="negative or not finite"):
            weight.put_scales(0, 4, torch.full((1, 1), scale))
    with pytest.raises(KernelError, match="a block of 48 outputs is no part of 128"):
        Fp8Weight.empty(48, 8, 48)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_products(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for outputs, width in ((5, 3), (192, 300)):
        weight, bias = quantize_fp8(torch.randn(outputs, width) / width**0.5), torch.randn(outputs).to(dtype)
        x = (torch.randn(7, width) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
        x[2] = 0
        stands_for = weight.dequantized().double()
        for activations, given in (("float", x.double()), ("fp8", rounded(x))):
            product = REFERENCE.quantized_product(weight, bias, activations, dtype)  # type: ignore[arg-type]
            expected = given @ stands_for.T + bias.double()
            found = product.wide(x).double()
            assert ((found - expected).norm(dim=-1) <= 1e-5 * expected.norm(dim=-1)).all()
            assert torch.equal(product(x), product.wide(x).to(dtype))
        ids = torch.tensor([outputs - 1, 0])
        assert torch.equal(product.rows(ids), weight.dequantized()[ids].to(dtype))
        assert sum(part.nbytes for part in product.parameters()) == (
            outputs * width + weight.scales.nbytes + 4 * outputs
        )


def test_an_input_is_rounded_by_128_and_what_is_not_finite_stays_that() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 300) * torch.tensor([1e-3, 1.0, 1e4]).repeat_interleave(128)[:300]
    x[1, 7], x[2, 290], x[3, :128], x[4] = torch.nan, torch.inf, 0, 1e-38
    codes, scales = quantize_groups(x)
    expected, each = blockwise(x[:1], 1)
    assert (codes.view(FP8)[0].double() != expected[0]).float().mean() < 0.01
    assert torch.allclose(scales[0].double(), each[0, ::128], rtol=1e-6)
    assert scales.isnan().nonzero().tolist() == [[1, 0], [2, 2]]
    assert not codes[3, :128].any()
    assert not codes[4].any()
    assert not scales[4].any()
    weight = quantize_fp8(torch.randn(4, 300))
    found = REFERENCE.quantized_product(weight, None, "fp8", torch.float32)(x)
    assert found.isnan().all(-1).tolist() == [False, True, True, False, False]


def test_what_has_no_product_says_so() -> None:
    eight, coded = quantize_int8(torch.ones(4, 8)), quantize_fp8(torch.ones(4, 8))
    packed = Mxfp4Weight.empty(4, 32)
    for name in BACKENDS:
        with pytest.raises(KernelError, match="Int8Weight has no products with an input in fp8"):
            backend(name).quantized_product(eight, None, "fp8", torch.float32)
        for weight in (coded, packed):
            kind = type(weight).__name__
            words = f"{kind} has no products with an input in int8"
            with pytest.raises(KernelError, match=words if name == "reference" else f"no products of {kind}"):
                backend(name).quantized_product(weight, None, "int8", torch.float32)
