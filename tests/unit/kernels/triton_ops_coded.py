"""Experts in few bits of the Triton back-end, against formulas of what their codes stand for in double precision.

`test_triton` runs this file in the interpreter, by night but for one case; on a machine with a GPU: `pytest -m ''
tests/unit/kernels/triton_ops_coded.py`.

Tolerances are those of `triton_ops_experts`: codes are numbers of every format exactly, and sums float32, so
nothing more is rounded than with weights in floats.

Legend: T tokens, E experts, k of which each token goes through, W hidden width, I width inside.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest
import torch
from tests.unit.kernels.ptx_by_hand import by_hand
from torch import Tensor

from quire_kernels import Clamp, KernelError, QuantizedWeight
from quire_kernels.mxfp4 import Mxfp4Weight
from quire_kernels.quantized import quantize_fp8, quantize_int4, quantize_int8, shared_outputs
from quire_kernels.triton import INTERPRETED, TritonKernels, coded, experts

torch.set_num_threads(1)
# inf - inf is NaN, on purpose; numpy, which interprets, tells each time
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
Format = int | Literal["mxfp4", "fp8"]
FORMATS: list[Format] = [0, 32, 64, 128, "mxfp4", "fp8"]
"""Sizes of a group in 4 bits, 0 is 8 bits; or MXFP4, or fp8."""
SHAPES = [  # T, E, k, W, I: whole units of 128 inputs, what is left of one, less than one
    (1, 6, 3, 128, 384),
    (2, 3, 2, 160, 96),
    (7, 3, 2, 224, 352),
    (20, 4, 2, 64, 192),
]
GPT_OSS = Clamp(1.702, 7.0)
REAL = [(tokens, 128, 8, 2048, 768) for tokens in (1, 8, 300, 2048)]
kernels = TritonKernels()
Three = tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    source = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=source, device=DEVICE).to(dtype)


def weights(count: int, width: int, inner: int, group: Format) -> Three:
    def made(outputs: int, inputs: int, seed: int) -> QuantizedWeight:
        if group == "mxfp4":
            source = torch.Generator(DEVICE).manual_seed(seed)
            least = 123 - inputs.bit_length() // 2
            draw = partial(torch.randint, dtype=torch.uint8, device=DEVICE, generator=source)
            powers = draw(least, least + 4, (count * outputs, inputs // 32))
            return Mxfp4Weight(draw(256, (count * outputs, inputs // 2)), powers)
        rows = random(count * outputs, inputs, seed=seed) / inputs**0.5
        if group == "fp8":
            return quantize_fp8(rows, shared_outputs(outputs))
        return quantize_int4(rows, group) if group else quantize_int8(rows)

    return made(inner, width, 1), made(inner, width, 2), made(width, inner, 3)


def layer(three: Three, count: int, dtype: torch.dtype, **more: Any) -> experts.CodedExperts:
    made = kernels.quantized_experts(*three, count, "float", dtype, **more)
    assert isinstance(made, experts.CodedExperts)
    return made


def sent(tokens: int, count: int, chosen: int) -> tuple[Tensor, Tensor]:
    shares, choice = random(tokens, count, seed=4).softmax(-1).topk(chosen)
    return choice, shares


def formula(
    x: Tensor,
    choice: Tensor,
    shares: Tensor,
    numbers: list[Tensor],
    biases: tuple[Tensor, ...] | None = None,
    clamp: Clamp | None = None,
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for number in {*choice.flatten().tolist()}:
        rows, ranks = torch.where(choice == number)
        gate, up, down = (weight[number] for weight in numbers)
        first, second, third = (0.0,) * 3 if biases is None else (bias[number].double() for bias in biases)
        gated, beside = x[rows].double() @ gate.T + first, x[rows].double() @ up.T + second
        if clamp is None:
            inner = gated * gated.sigmoid() * beside
        else:
            gated, beside = gated.clamp(max=clamp.limit), beside.clamp(-clamp.limit, clamp.limit)
            inner = gated * (gated * clamp.alpha).sigmoid() * (beside + 1)
        out.index_add_(0, rows, (inner @ down.T + third) * shares[rows, ranks, None].double())
    return out


def stood_for(three: Three, count: int) -> list[Tensor]:
    """Before they are taken over."""
    return [weight.dequantized().double().view(count, -1, weight.shape[1]) for weight in three]


def close(found: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    assert (found.double() - exact).norm() <= CLOSE[found.dtype] * exact.norm()


def check(shape: tuple[int, ...], group: Format, dtype: torch.dtype, clamp: Clamp | None = None) -> None:
    """With a `clamp` there are biases, too, as of gpt-oss."""
    tokens, count, chosen, width, inner = shape
    sizes = (count, inner), (count, inner), (count, width)
    biases = None if clamp is None else tuple(random(*size, dtype=dtype, seed=9) for size in sizes)
    three = weights(count, width, inner, group)
    numbers, held = stood_for(three, count), sum(part.values.nbytes + part.scales.nbytes for part in three)
    of = layer(three, count, dtype, biases=biases, clamp=clamp)
    assert sum(part.nbytes for part in of.parameters()) == held + sum(bias.nbytes for bias in biases or ())
    x = random(tokens, width + 8, dtype=dtype)[:, :width]  # rows that lie apart
    choice, shares = sent(tokens, count, chosen)
    found = of(x, choice, shares)
    assert found.dtype == dtype
    close(found, formula(x, choice, shares, numbers, biases, clamp))
    # which of its experts a token names first does not matter
    assert torch.equal(of(x, choice.flip(-1).contiguous(), shares.flip(-1).contiguous()), found)


@pytest.mark.parametrize(("group", "clamp"), [(0, None), (32, None), ("mxfp4", GPT_OSS), ("fp8", None)])
def test_a_small_layer(group: Format, clamp: Clamp | None) -> None:
    check((2, 2, 1, 160, 32), group, torch.float16, clamp)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer(shape: tuple[int, ...], group: Format, dtype: torch.dtype) -> None:
    if isinstance(group, int) and group and any(inputs % group for inputs in shape[3:]):
        pytest.skip("its widths have no such groups, on a GPU neither")
    check(shape, group, dtype)
    check(shape, group, dtype, GPT_OSS)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [2, 34, 130, 254])
@pytest.mark.parametrize("group", [0, "fp8"])
def test_any_even_number_of_inputs_in_8_bits(group: Format, inputs: int, dtype: torch.dtype) -> None:
    check((3, 3, 2, inputs, 66), group, dtype)


@pytest.mark.skipif(INTERPRETED, reason="takes hours in the interpreter; benchmarks/gpu_check.sh runs it on a GPU")
@pytest.mark.parametrize("group", FORMATS)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_a_layer_of_real_size(shape: tuple[int, ...], group: Format) -> None:
    check(shape, group, torch.bfloat16)


@pytest.mark.skipif(INTERPRETED, reason="takes hours in the interpreter; benchmarks/gpu_check.sh runs it on a GPU")
@pytest.mark.parametrize("tokens", [1, 8, 300, 2048])
def test_a_layer_of_gpt_oss(tokens: int) -> None:
    check((tokens, 32, 4, 2880, 2880), "mxfp4", torch.bfloat16, GPT_OSS)


@pytest.mark.nightly
@pytest.mark.parametrize("group", [0, 32, "mxfp4", "fp8"])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("rows", [16] if INTERPRETED else [16, 32, 64, 128])
def test_every_tile(rows: int, halves: bool, group: Format) -> None:
    """Tiles that are full, as good as full, half full, one more than that, and experts with none."""
    counts = [rows + rows // 2 + 1, 0, rows // 2, rows - 1, 0]
    choice = torch.cat([torch.full((many, 1), number) for number, many in enumerate(counts)]).to(DEVICE)
    choice = choice[torch.randperm(choice.shape[0], generator=torch.Generator().manual_seed(0)).to(DEVICE)]
    shares = random(*choice.shape).abs()
    three = weights(5, 160, 96, group)
    numbers, of = stood_for(three, 5), layer(three, 5, torch.float16)
    x, tiling = (
        random(choice.shape[0], 160, dtype=torch.float16),
        experts.Tiling(rows, 64, 128, 4, 2, halves=halves),
    )
    close(of.cut(x, choice, shares, experts.Tilings(tiling, tiling)), formula(x, choice, shares, numbers))


@pytest.mark.nightly
@pytest.mark.parametrize("group", [0, 32, "fp8"])
@pytest.mark.parametrize("tokens", [1, 30])
def test_nobody_reads_an_expert_that_nobody_chose(tokens: int, group: Format) -> None:
    three, x = weights(5, 64, 32, group), random(tokens, 64)
    numbers, of = stood_for(three, 5), layer(three, 5, torch.float32)
    choice, shares = torch.full((tokens, 1), 3, device=DEVICE), random(tokens, 1).abs()
    for weight in (of.gate, of.up, of.down):
        weight.scales[[0, 1, 2, 4]] = torch.nan
    close(of(x, choice, shares), formula(x, choice, shares, numbers))


@pytest.mark.nightly
@pytest.mark.parametrize("group", [0, 32, "mxfp4", "fp8"])
def test_a_token_that_is_not_finite_spoils_no_other(group: Format) -> None:
    of, x = layer(weights(3, 96, 32, group), 3, torch.float32), random(9, 96)
    choice, shares = sent(9, 3, 2)
    whole = of(x, choice, shares)
    x[4, 3], shares[6] = torch.nan, torch.nan
    found = of(x, choice, shares)
    assert found[[4, 6]].isnan().all()
    others = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(found[others], whole[others])


def test_mxfp4_has_every_power_there_is() -> None:
    """Of the lowest one the number is subnormal in float32; what is inside is as large as that needs."""
    three = weights(1, 32, 32, "mxfp4")
    for part, power in zip(three, (120, 246, 0), strict=True):
        part.scales.fill_(power)
    x, choice, shares = random(2, 32), *sent(2, 1, 1)
    numbers, of = stood_for(three, 1), layer(three, 1, torch.float32)
    exact = formula(x, choice, shares, numbers)
    assert 1e-6 < exact.abs().max() < 1e6
    close(of(x, choice, shares), exact)


def test_what_cannot_be_a_layer_is_refused() -> None:
    eight, four = weights(2, 32, 64, 0), weights(2, 32, 64, 32)
    with pytest.raises(KernelError, match="by floating-point activations"):
        kernels.quantized_experts(*eight, 2, "int8", torch.float16)
    with pytest.raises(KernelError, match="experts differ"):
        kernels.quantized_experts(eight[0], four[1], eight[2], 2, "float", torch.float16)
    odd = quantize_int8(random(6, 3))
    with pytest.raises(KernelError, match="whole words of inputs, and 3 are none"):
        kernels.quantized_experts(odd, odd, odd, 2, "float", torch.float16)
    blocks = quantize_fp8(random(64, 32))
    gate, down = (quantize_fp8(random(64, 32), shared) for shared in (32, 16))
    with pytest.raises(KernelError, match="experts differ"):
        kernels.quantized_experts(gate, quantize_fp8(random(64, 32), 16), down, 2, "float", torch.float16)
    with pytest.raises(KernelError, match="32 outputs of an expert are no whole blocks of 64"):
        kernels.quantized_experts(blocks, blocks, blocks, 2, "float", torch.float16)
    with pytest.raises(KernelError, match="float32"):
        layer(weights(2, 32, 64, 0), 2, torch.float16)(random(2, 32), *sent(2, 2, 1))


WORDS = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
"""Every word there is."""


@pytest.mark.parametrize(
    ("program", "dtype"),
    [(coded.INT8_TO_BFLOAT16, torch.bfloat16), (coded.INT8_TO_FLOAT16, torch.float16)],
)
def test_the_instructions_that_unpack_8_bits_by_hand(program: Any, dtype: torch.dtype) -> None:
    words = torch.stack((WORDS.int(), WORDS.int().roll(77)), -1).to(torch.uint16)  # of which two are one register
    found = by_hand(program.value, words.view(torch.int32).flatten(), dtype)
    for name, side in (("$0", 0), ("$1", 1)):
        expected = words.view(torch.int8).view(-1, 2)[:, side].to(dtype)
        assert torch.equal(found[name].view(dtype), expected), name


@pytest.mark.parametrize(
    ("program", "dtype"),
    [(coded.INT4_TO_BFLOAT16, torch.bfloat16), (coded.INT4_TO_FLOAT16, torch.float16)],
)
def test_the_instructions_that_unpack_4_bits_by_hand(program: Any, dtype: torch.dtype) -> None:
    words = torch.stack((WORDS.int(), WORDS.int().roll(77)), -1)
    found = by_hand(program.value, words.to(torch.uint16).view(torch.int32).flatten(), dtype, "$4")
    for quarter in range(4):
        expected = ((words.flatten() >> 4 * quarter & 15) - 8).to(dtype)
        assert torch.equal(found[f"${quarter}"].view(dtype), expected), quarter


NUMBERS = [sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
"""What the codes of MXFP4 stand for."""


@pytest.mark.parametrize(
    ("program", "dtype"),
    [(coded.MXFP4_TO_BFLOAT16, torch.bfloat16), (coded.MXFP4_TO_FLOAT16, torch.float16)],
)
def test_the_instructions_that_unpack_mxfp4_by_hand(program: Any, dtype: torch.dtype) -> None:
    words = torch.stack((WORDS.int(), WORDS.int().roll(77)), -1)
    found = by_hand(program.value, words.to(torch.uint16).view(torch.int32).flatten(), dtype, "$4")
    for quarter in range(4):
        codes = (words.flatten() >> 4 * quarter & 15).to(torch.uint8)
        expected = torch.tensor(NUMBERS)[codes.int()].to(dtype)
        # by the bits: there is a zero of either sign
        assert torch.equal(found[f"${quarter}"].view(torch.int16), expected.view(torch.int16)), quarter
