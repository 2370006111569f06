"""The Triton back-end's operations against the reference: in the interpreter where there is no GPU, or on one.

`test_triton` runs this file in a process of its own, because Triton decides at its import whether it interprets.
On a machine with a GPU: `pytest -m '' tests/unit/kernels/triton_ops.py`.

The interpreter rounds bfloat16 by cutting it off, so float32 and float16 are what is compared there. Tolerances,
as ‖found - expected‖ / ‖expected‖: 1e-6 in float32 is some roundings of 6e-8; 16-bit formats are computed in
float32 and rounded once, where the reference may round twice.

Legend: T tokens, H query heads, K key/value heads, D head size, V vocabulary, R rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire_kernels import BackendUnavailable, HeadNorms
from quire_kernels.reference import ReferenceKernels
from quire_kernels.triton import INTERPRETED, TritonKernels, product, require, tokens

torch.set_num_threads(1)
# exp(1000) is inf, on purpose; numpy, which interprets, tells each time
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
CLOSE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
reference, kernels = ReferenceKernels(), TritonKernels()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source).to(DEVICE, dtype)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < CLOSE[expected.dtype]


# ── around attention ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 1000, 16384])
def test_norms(width: int, dtype: torch.dtype) -> None:
    wide, weight, added = (
        random(6, width + 8, dtype=dtype),
        random(width, dtype=dtype),
        random(6, width, dtype=dtype),
    )
    x = wide[:, :width]
    close(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(kernels.rms_norm(x, weight.float(), 1e-5), kernels.rms_norm(x, weight, 1e-5))
    found, expected = added.clone(), added.clone()
    close(kernels.add_rms_norm(x, found, weight, 1e-5), reference.add_rms_norm(x, expected, weight, 1e-5))
    assert torch.equal(found, expected)
    assert torch.equal(wide, random(6, width + 8, dtype=dtype))


@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "head", "normed"),
    [
        (4, 2, 64, False),
        (5, 1, 80, True),
        (2, 2, 96, False),
        (8, 1, 128, True),
        (3, 3, 256, True),
        (7, 1, 16, False),
    ],
)
def test_heads_are_placed(num_heads: int, kv_heads: int, head: int, normed: bool) -> None:
    for dtype in DTYPES:
        for cache_dtype in {dtype, torch.float16}:
            qkv = random(5, num_heads + 2 * kv_heads + 1, head, dtype=dtype)[:, :-1]
            angles = random(5, 1, head // 2)
            cos, sin = (torch.cat(pair, -1) for pair in ((angles.cos(),) * 2, (-angles.sin(), angles.sin())))
            norms = None
            if normed:
                kept = torch.float32 if num_heads == kv_heads else dtype
                norms = HeadNorms(random(head, dtype=kept, seed=1), random(head, dtype=kept, seed=2), 1e-6)
            found, expected = (
                torch.full((2, 3, 4, kv_heads, head), 7.0, dtype=cache_dtype, device=DEVICE) for _ in range(2)
            )
            # padding in the middle writes nowhere; nobody else has ever its queries
            slots = torch.tensor([3, 8, -1, 11, 0], device=DEVICE)
            real = torch.tensor([0, 1, 3, 4], device=DEVICE)
            query = kernels.place_heads(qkv, num_heads, norms, cos, sin, found, slots)
            assert query.is_contiguous()
            wanted = reference.place_heads(
                qkv[real], num_heads, norms, cos[real], sin[real], expected, slots[real]
            )
            close(query[real], wanted)
            close(found.view(2, 3, kv_heads, 4, head).transpose(2, 3).contiguous(), expected)


@pytest.mark.parametrize("half", [1, 40, 64])
def test_turns(half: int) -> None:
    positions = torch.tensor([0, 1, 7, 4000, 131_071, 3, 9, 10, 11], device=DEVICE)
    frequencies = (10_000.0 ** -(torch.arange(half) / half)).to(DEVICE)
    for found, expected in zip(
        kernels.turns(positions, frequencies, 1.3), reference.turns(positions, frequencies, 1.3), strict=True
    ):
        close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 100, 1024, 2050])
def test_the_gate(width: int, dtype: torch.dtype) -> None:
    both = 3 * random(3, 2 * width + 6, dtype=dtype)[:, : 2 * width]
    close(kernels.silu_mul(both), reference.silu_mul(both))
    close(kernels.gelu_mul(both), reference.gelu_mul(both))
    for act in (kernels.silu_mul, kernels.gelu_mul):
        assert act(torch.full((1, 2), -1e4, device=DEVICE)).abs() < 1e-30


@pytest.mark.nightly  # draws of capped logits (`triton_ops_draws`) are by the same kernel
def test_soft_caps_and_factors() -> None:
    logits = 20 * random(2, 2100)
    logits[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    found, expected = logits.clone(), logits.clone()
    kernels.cap_logits(found, 30.0)
    reference.cap_logits(expected, 30.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6, equal_nan=True)
    x = random(3, 40, dtype=torch.float16)
    assert torch.equal(kernels.multiply(x.clone(), 48.1), reference.multiply(x, 48.1))


# ── products ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "width"), [(1, 1, 2), (1, 9, 2100), (2, 65, 129), (16, 40, 66)])
def test_products_of_a_few_rows(rows: int, outputs: int, width: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, width + 3, dtype=dtype)[:, :width], random(outputs, width, dtype=dtype, seed=1)
    bias = random(outputs, dtype=dtype, seed=2)
    expected = x.double() @ weight.double().T
    for tiling in (product.tiling_for(rows, outputs, width), product.Tiling(16, 64, 4, 2)):
        close(product.multiply(x, weight, None, tiling), expected.to(dtype))
        close(product.multiply(x, weight, bias, tiling), (expected + bias.double()).to(dtype))


def test_a_product_gives_rows_logits_and_its_tensors() -> None:
    weight, bias = random(50, 32), random(50, seed=1)
    mine = kernels.product(weight, bias)
    for rows in (1, 3, 20):
        x = random(rows, 32, seed=rows)
        for found in (mine(x), mine.wide(x)):
            close(found, torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(mine.rows(torch.tensor([3, 0], device=DEVICE)), weight[[3, 0]])
    assert [part.data_ptr() for part in mine.parameters()] == [weight.data_ptr(), bias.data_ptr()]


def test_tilings_leave_no_multiprocessor_idle_and_fit() -> None:
    for outputs in (1024, 4096, 6144, 28672, 151936):
        tiling = product.tiling_for(1, outputs, 4096)
        assert outputs / tiling.block_n >= (264 if outputs >= 16 * 264 else 64)


@pytest.mark.parametrize(
    ("rows", "outputs", "width", "own"),
    [(1, 28672, 4096, True), (16, 4096, 1024, True), (17, 4096, 1024, False), (8, 1024, 3072, False),
     (8, 28672, 4096, False)],
)  # fmt: skip
def test_few_rows_are_our_own_where_a_weight_is_light(rows: int, outputs: int, width: int, own: bool) -> None:
    assert product.is_own(rows, outputs, width) == own


# ── over logits ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("width", "programs"), [(1, 99), (5, 99), (2048, 99), (2049, 99), (20001, 99), (20001, 12)]
)
def test_the_largest_number_is_the_first_of_equals(
    width: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_PROGRAMS", programs)
    logits = random(6, width + 3)[:, :width]
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


@pytest.mark.parametrize("width", [1, 7, 70, 5001])
def test_masks_set_nothing_but_what_they_forbid(width: int) -> None:
    found, expected = random(3, width), random(3, width)
    bits = torch.randint(0, 256, (2, width // 8 + 3), dtype=torch.uint8).to(DEVICE)
    rows = torch.tensor([0, 2], device=DEVICE)
    kernels.mask_tokens(found, rows, bits)
    reference.mask_tokens(expected, rows, bits)
    assert torch.equal(found, expected)


def test_of_no_product_more_is_on_its_way_than_fits_a_small_card() -> None:
    wide = product.default_for(8, 1024, 1024, 4, 99 * 1024)
    assert (wide.block_n + 16) * wide.block_k * 4 * wide.num_stages <= 99 * 1024
    assert product.default_for(8, 1024, 1024, 4, 227 * 1024) == product.tiling_for(8, 1024, 1024)
    assert product.default_for(8, 1024, 1024, 2, 99 * 1024) == product.tiling_for(8, 1024, 1024)


def test_a_card_that_is_too_old_is_refused_by_name() -> None:
    require("NVIDIA A100", (8, 0))
    with pytest.raises(BackendUnavailable, match=r"Tesla T4 has compute capability 7\.5.* hint: "):
        require("Tesla T4", (7, 5))
