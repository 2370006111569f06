"""Experts and who is sent to them, against formulas in double precision, at each level of instructions.

What a token gets must not depend on its company, so the same rows in other steps are compared bit by bit.

Tolerances, relative to the sum of the terms without their signs. float32: 2^-17, some sums of up to two hundred
terms in a row, each rounded to 2^-24. bfloat16 and float16: one rounding between the products and one of the
result, 2^-9 (2^-12) each; four times both, as an error inside is spread by all that follows. Where rows are
rounded to 8 bits, a number that is off by a bit may be rounded the other way: there the formula is that of the
back-end's own products, which have tests of their own, and what is left are the last sums.

Legend: T tokens, E experts, k of which each token goes through, W hidden width, I width inside.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.unit.kernels.test_backends import BACKENDS, backend
from torch import Tensor

from quire_kernels import Activations, Clamp, Experts, KernelError, Kernels, Product, QuantizedWeight
from quire_kernels.quantized import quantize_int4, quantize_int8

SHAPES = [  # T, E, k, W, I
    (1, 1, 1, 8, 6),
    (1, 8, 2, 64, 96),
    (1, 8, 8, 130, 64),
    (2, 5, 5, 70, 66),
    (7, 4, 2, 96, 130),
    (33, 6, 3, 128, 40),
    (250, 3, 2, 64, 64),
    (40, 64, 8, 32, 16),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
Three = tuple[Tensor, Tensor, Tensor]
Weights = list[Three]


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return backend(request.param)


def random_weights(experts: int, width: int, inner: int, dtype: torch.dtype) -> Weights:
    def weight(outputs: int, inputs: int) -> Tensor:
        wide: Tensor = torch.randn(outputs, inputs) / inputs**0.5
        return wide.to(dtype)

    return [(weight(inner, width), weight(inner, width), weight(width, inner)) for _ in range(experts)]


def each(three: Three, change: Callable[[Tensor], Tensor]) -> Three:
    gate, up, down = three
    return change(gate), change(up), change(down)


def plain(kernels: Kernels, weights: Weights) -> Experts:
    return kernels.experts(*map(torch.stack, zip(*weights, strict=True)))


def in_bits(weight: Tensor, bits: int) -> QuantizedWeight:
    return quantize_int8(weight) if bits == 8 else quantize_int4(weight, 32)


def quantized(
    kernels: Kernels, weights: Weights, bits: int, activations: Activations, dtype: torch.dtype
) -> Experts:
    gate, up, down = (in_bits(torch.cat(three), bits) for three in zip(*weights, strict=True))
    return kernels.quantized_experts(gate, up, down, len(weights), activations, dtype)


def rounded(weights: Weights, bits: int) -> Weights:
    """What quantised weights stand for."""
    return [each(three, lambda weight: in_bits(weight, bits).dequantized()) for three in weights]


def sent(tokens: int, experts: int, count: int) -> tuple[Tensor, Tensor]:
    """Random choices and shares, as a router makes them."""
    chances = torch.randn(tokens, experts).softmax(-1)
    shares, choice = chances.topk(count)
    return choice, shares


def formula(x: Tensor, choice: Tensor, shares: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """In double precision; and the size of the terms that are added."""
    out, size = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for expert, share in zip(choice[row].tolist(), shares[row].double(), strict=True):
            gate, up, down = (weight.double() for weight in weights[expert])
            gated = gate @ x[row].double()
            inner = gated / (1 + (-gated).exp()) * (up @ x[row].double())
            out[row] += share * (down @ inner)
            size[row] += share * (down.abs() @ inner.abs())
    return out, size


def close(found: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    exact, size = expected
    assert ((found.double() - exact).abs() <= BITS[found.dtype] * size + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_of_floats(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, experts, count, width, inner = shape
    torch.manual_seed(0)
    weights = random_weights(experts, width, inner, dtype)
    x = torch.randn(tokens, width + 3).to(dtype)[:, :width]  # rows that lie apart
    choice, shares = sent(tokens, experts, count)
    layer = plain(kernels, weights)
    found = layer(x, choice, shares)
    assert found.dtype == dtype
    close(found, formula(x, choice, shares, weights))
    assert sum(parameter.numel() for parameter in layer.parameters()) == 3 * experts * width * inner


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clamp", [None, Clamp(1.7, 0.8)], ids=["silu", "clamped"])
def test_experts_with_biases_and_a_clamped_gate(kernels: Kernels, clamp: Clamp | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count, width, inner = 4, 96, 70
    weights, x = random_weights(count, width, inner, dtype), torch.randn(11, width).to(dtype)
    biases = [torch.randn(count, outputs).to(dtype) for outputs in (inner, inner, width)]
    x[7, 2] = torch.nan
    choice, shares = sent(11, count, 2)
    stacked = [torch.stack(three) for three in zip(*weights, strict=True)]
    layer = kernels.experts(*stacked, biases=(biases[0], biases[1], biases[2]), clamp=clamp)
    assert sum(parameter.nbytes for parameter in layer.parameters()) == sum(t.nbytes for t in [*stacked, *biases])
    found = layer(x, choice, shares)
    exact, size = biased(x, choice, shares, weights, biases, clamp)
    assert found[7].isnan().all()
    rest = [row for row in range(11) if row != 7]
    close(found[rest], (exact[rest], size[rest]))


def biased(
    x: Tensor, choice: Tensor, shares: Tensor, weights: Weights, biases: list[Tensor], clamp: Clamp | None
) -> tuple[Tensor, Tensor]:
    """`formula` with biases, and a gate that may be clamped."""
    exact, size = torch.zeros(2, *x.shape, dtype=torch.float64)
    for row, wide in enumerate(x.double()):
        for expert, share in zip(choice[row].tolist(), shares[row].double(), strict=True):
            (gate, up, down), at = weights[expert], [bias[expert].double() for bias in biases]
            gated, other = gate.double() @ wide + at[0], up.double() @ wide + at[1]
            if clamp is not None:
                gated, other = gated.clamp(max=clamp.limit), other.clamp(-clamp.limit, clamp.limit) + 1
            inside = gated / (1 + (-(1.0 if clamp is None else clamp.alpha) * gated).exp()) * other
            exact[row] += share * (down.double() @ inside + at[2])
            size[row] += share * (down.double().abs() @ inside.abs() + at[2].abs())
    return exact, size


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("clamp", [None, Clamp(1.7, 0.8)], ids=["silu", "clamped"])
def test_experts_of_integers_have_biases_and_a_clamped_gate_too(
    kernels: Kernels, clamp: Clamp | None, bits: int
) -> None:
    torch.manual_seed(0)
    count, width, inner = 4, 96, 64
    weights, x = random_weights(count, width, inner, torch.float32), torch.randn(11, width)
    first, second, third = (torch.randn(count, outputs) for outputs in (inner, inner, width))
    choice, shares = sent(11, count, 2)
    gate, up, down = (in_bits(torch.cat(three), bits) for three in zip(*weights, strict=True))
    layer = kernels.quantized_experts(
        gate, up, down, count, "float", torch.float32, biases=(first, second, third), clamp=clamp
    )
    expected = biased(x, choice, shares, rounded(weights, bits), [first, second, third], clamp)
    close(layer(x, choice, shares), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("shape", [(1, 4, 2, 64, 96), (5, 3, 3, 96, 160), (130, 4, 2, 64, 32)], ids=str)
def test_experts_of_integers(
    kernels: Kernels, shape: tuple[int, ...], activations: Activations, bits: int
) -> None:
    tokens, experts, count, width, inner = shape
    torch.manual_seed(0)
    weights, x = random_weights(experts, width, inner, torch.float32), torch.randn(tokens, width)
    choice, shares = sent(tokens, experts, count)
    found = quantized(kernels, weights, bits, activations, torch.float32)(x, choice, shares)
    if activations == "float":
        close(found, formula(x, choice, shares, rounded(weights, bits)))
        return
    expected = torch.zeros(x.shape, dtype=torch.float64)

    def product(weight: Tensor) -> Product:
        return kernels.quantized_product(in_bits(weight, bits), None, activations, torch.float32)

    for expert, (gate, up, down) in enumerate(map(product, three) for three in weights):
        every = down.wide(kernels.silu_mul(torch.cat((gate(x), up(x)), -1))).double()
        expected += every * torch.where(choice == expert, shares, 0.0).sum(-1, keepdim=True).double()
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


def test_all_to_one_and_none_to_the_others(kernels: Kernels) -> None:
    torch.manual_seed(0)
    weights, x = random_weights(5, 64, 96, torch.float32), torch.randn(300, 64)
    only = [each(three, lambda weight: torch.full_like(weight, torch.nan)) for three in weights]
    only[3] = weights[3]
    choice, shares = torch.full((300, 1), 3), torch.rand(300, 1)
    found = plain(kernels, only)(x, choice, shares)
    close(found, formula(x, choice, shares, weights))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "int8 float", "int4 float"])
def test_a_token_gets_the_same_in_any_company(kernels: Kernels, kind: str) -> None:
    if kernels.name == "reference":
        pytest.skip("torch's own products keep no such promise")
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    weights, x = random_weights(6, 64, 96, dtype), torch.randn(150, 64).to(dtype)
    choice, shares = sent(150, 6, 3)
    if kind.startswith("int"):
        layer = quantized(kernels, weights, int(kind[3]), "float" if kind.endswith("float") else "int8", dtype)
    else:
        layer = plain(kernels, weights)
    whole = layer(x, choice, shares)
    for rows in ([0], [7], [149], [3, 4, 5, 6], list(range(20, 120)), [9, 2, 70]):
        assert torch.equal(layer(x[rows], choice[rows], shares[rows]), whole[rows])
    # which of its experts a token names first does not matter either
    turned = layer(x, choice.flip(-1).contiguous(), shares.flip(-1).contiguous())
    assert torch.equal(turned, whole)


def test_a_token_that_is_not_finite_spoils_no_other(kernels: Kernels) -> None:
    torch.manual_seed(0)
    weights, x = random_weights(3, 32, 32, torch.float32), torch.randn(9, 32)
    choice, shares = sent(9, 3, 2)
    layer = plain(kernels, weights)
    whole = layer(x, choice, shares)
    x[4, 3], shares[6] = torch.nan, torch.nan
    found = layer(x, choice, shares)
    assert found[[4, 6]].isnan().all()
    others = [0, 1, 2, 3, 5, 7, 8]
    torch.testing.assert_close(found[others], whole[others], atol=1e-6, rtol=0)


def test_an_odd_width_is_for_torch(kernels: Kernels) -> None:
    torch.manual_seed(0)
    weights, x = random_weights(3, 12, 7, torch.float32), torch.randn(5, 12)
    choice, shares = sent(5, 3, 2)
    close(plain(kernels, weights)(x, choice, shares), formula(x, choice, shares, weights))


def test_experts_that_differ_are_refused() -> None:
    kernels = backend(BACKENDS[1])
    weights = random_weights(2, 32, 64, torch.float32)
    gate, up, down = map(torch.stack, zip(*weights, strict=True))
    for differs in (up.bfloat16(), up[:, :32].contiguous()):
        with pytest.raises(KernelError, match="experts differ"):
            kernels.experts(gate, differs, down)
    mixed = (
        quantize_int8(gate.flatten(0, 1)),
        quantize_int8(up.flatten(0, 1)),
        quantize_int4(down.flatten(0, 1), 32),
    )
    with pytest.raises(KernelError, match="experts differ"):
        kernels.quantized_experts(*mixed, 2, "int8", torch.float32)
    layer = plain(kernels, weights)
    with pytest.raises(KernelError, match="float64"):
        layer(torch.randn(2, 32).double(), *sent(2, 2, 1))


# ── routes ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("over_chosen", [False, True])
@pytest.mark.parametrize("experts", [1, 3, 8, 16, 21, 128])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_routes(kernels: Kernels, tokens: int, experts: int, over_chosen: bool) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(tokens, experts + 2) * 4)[:, :experts]
    chances = logits.double().softmax(-1)
    for count in range(1, min(experts, 8) + 1):
        choice, shares = kernels.route(logits, count, over_chosen)
        assert choice.dtype == torch.int64
        assert torch.equal(choice, logits.topk(count).indices)
        expected = chances.gather(1, choice)
        if over_chosen:
            expected /= expected.sum(-1, keepdim=True)
        torch.testing.assert_close(shares.double(), expected, atol=1e-7, rtol=2e-6)


def test_of_equal_experts_the_first(kernels: Kernels) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0], [0.0] * 6])
    choice, shares = kernels.route(logits, 4, True)
    assert choice.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    torch.testing.assert_close(shares[1], torch.full((4,), 0.25))


def test_a_route_that_is_not_a_number(kernels: Kernels) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 12)
    logits[0, 3], logits[2, 0], logits[3] = torch.nan, torch.inf, torch.nan
    choice, shares = kernels.route(logits, 3, False)
    assert ((choice >= 0) & (choice < 12)).all()
    assert shares[[0, 2, 3]].isnan().all()
    assert torch.equal(choice[[1, 4]], logits[[1, 4]].topk(3).indices)
    assert shares[[1, 4]].isfinite().all()
