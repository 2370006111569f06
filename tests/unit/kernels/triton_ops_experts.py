"""Experts of the Triton back-end, and who is sent to them, against formulas in double precision.

`test_triton` runs this file in the interpreter; on a machine with a GPU: `pytest
tests/unit/kernels/triton_ops_experts.py`, which adds layers of real sizes.

Tolerances, as ‖found - exact‖ / ‖exact‖: 2e-6 in float32, sums of up to two hundred terms one after the other;
16-bit formats are rounded between the products, behind them and at the end: 2^-11 and 2^-8 each time.

Legend: T tokens, E experts, k of which each token goes through, W hidden width, I width inside.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire_kernels import Clamp, KernelError
from quire_kernels.reference import ReferenceKernels
from quire_kernels.triton import INTERPRETED, TritonKernels, experts

torch.set_num_threads(1)
# inf - inf is NaN, on purpose; numpy, which interprets, tells each time
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [  # T, E, k, W, I
    (1, 1, 1, 8, 6),
    (1, 6, 3, 130, 40),
    (2, 5, 5, 70, 66),
    (7, 3, 2, 96, 130),
    (20, 3, 2, 33, 35),
    (3, 17, 8, 32, 16),
]
REAL = [  # Qwen3-30B-A3B, Mixtral 8x7B
    *((tokens, 128, 8, 2048, 768) for tokens in (1, 8, 70, 300, 2048)),
    *((tokens, 8, 2, 4096, 14336) for tokens in (1, 8, 70, 300)),
]
CASES = [(shape, torch.float32) for shape in SHAPES]
if INTERPRETED:  # a case takes a second
    CASES += [(shape, torch.float16) for shape in SHAPES[::3]]
else:
    CASES += [(shape, dtype) for shape in SHAPES + REAL for dtype in (torch.float16, torch.bfloat16)]
    CASES += [(shape, torch.float32) for shape in REAL[:2]]
reference, kernels = ReferenceKernels(), TritonKernels()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    source = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=source, device=DEVICE).to(dtype)


def layer(count: int, width: int, inner: int, dtype: torch.dtype) -> experts.TritonExperts:
    gate, up = (random(count, inner, width, seed=seed) / width**0.5 for seed in (1, 2))
    down = random(count, width, inner, seed=3) / inner**0.5
    made = kernels.experts(gate.to(dtype), up.to(dtype), down.to(dtype))
    assert isinstance(made, experts.TritonExperts)
    return made


def sent(tokens: int, count: int, chosen: int) -> tuple[Tensor, Tensor]:
    shares, choice = random(tokens, count, seed=4).softmax(-1).topk(chosen)
    return choice, shares


def formula(x: Tensor, choice: Tensor, shares: Tensor, of: experts.TritonExperts) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for number in {*choice.flatten().tolist()}:
        rows, ranks = torch.where(choice == number)
        gate, up, down = (weight[number].double() for weight in (of.gate, of.up, of.down))
        gated = x[rows].double() @ gate.T
        inner = gated * gated.sigmoid() * (x[rows].double() @ up.T)
        out.index_add_(0, rows, (inner @ down.T) * shares[rows, ranks, None].double())
    return out


def close(found: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    assert (found.double() - exact).norm() <= CLOSE[found.dtype] * exact.norm()


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_a_layer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, count, chosen, width, inner = shape
    of = layer(count, width, inner, dtype)
    x = random(tokens, width + 3, dtype=dtype)[:, :width]  # rows that lie apart
    choice, shares = sent(tokens, count, chosen)
    found = of(x, choice, shares)
    assert found.dtype == dtype
    close(found, formula(x, choice, shares, of))
    # which of its experts a token names first does not matter
    assert torch.equal(of(x, choice.flip(-1).contiguous(), shares.flip(-1).contiguous()), found)


@pytest.mark.parametrize("tokens", [1, 40])
def test_biases_and_a_clamped_gate(tokens: int) -> None:
    plain, x = layer(4, 32, 24, torch.float32), random(tokens, 32)
    biases = random(4, 24, seed=7), random(4, 24, seed=8), random(4, 32, seed=9)
    choice, shares = sent(tokens, 4, 2)
    for clamp in (None, Clamp(1.7, 0.8)):
        found, expected = (
            each.experts(plain.gate, plain.up, plain.down, biases=biases, clamp=clamp)(x, choice, shares)
            for each in (kernels, reference)
        )
        close(found, expected.double())


@pytest.mark.parametrize(("tall", "halves"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("rows", [16] if INTERPRETED else [16, 32, 64, 128])
def test_every_tile(rows: int, tall: bool, halves: bool) -> None:
    """Tiles that are full, as good as full, half full, one more than that, and experts with none."""
    counts = [rows + rows // 2 + 1, 0, rows // 2, rows - 1, 0]
    choice = torch.cat([torch.full((many, 1), number) for number, many in enumerate(counts)]).to(DEVICE)
    choice = choice[torch.randperm(choice.shape[0], generator=torch.Generator().manual_seed(0)).to(DEVICE)]
    shares = random(*choice.shape).abs()
    of, x = layer(5, 24, 20, torch.float16), random(choice.shape[0], 24, dtype=torch.float16)
    tiling = experts.Tiling(rows, 32, 16, 4, 2, tall, halves)
    close(of.cut(x, choice, shares, experts.Tilings(tiling, tiling)), formula(x, choice, shares, of))


def test_some_tokens_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x = layer(3, 40, 24, torch.float32), random(7, 40)
    choice, shares = sent(7, 3, 2)
    whole = of(x, choice, shares)
    monkeypatch.setattr(experts, "AT_ONCE", 3 * 2 * (24 + 40))  # three, three and one
    found = of(x, choice, shares)
    close(found, whole.double())


@pytest.mark.parametrize("tokens", [1, 90])
def test_nobody_reads_an_expert_that_nobody_chose(tokens: int) -> None:
    of, x = layer(5, 32, 16, torch.float32), random(tokens, 32)
    choice, shares = torch.full((tokens, 1), 3, device=DEVICE), random(tokens, 1).abs()
    exact = formula(x, choice, shares, of)
    for weight in (of.gate, of.up, of.down):
        weight[[0, 1, 2, 4]] = torch.nan
    close(of(x, choice, shares), exact)


def test_many_pairs_are_sorted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a program of the plan looks at together."""
    monkeypatch.setattr(experts, "_DENSE_PAIRS", (32,))
    monkeypatch.setattr(experts, "_PAIRS", 128)
    tokens, count, chosen = 90, 3, 3
    of, x = layer(count, 16, 16, torch.float16), random(tokens, 16, dtype=torch.float16)
    choice, shares = sent(tokens, count, chosen)
    assert choice.numel() > 2 * experts._PAIRS
    tiling = experts.Tiling(64, 16, 16, 4, 2)
    close(of.cut(x, choice, shares, experts.Tilings(tiling, tiling)), formula(x, choice, shares, of))


def test_a_token_that_is_not_finite_spoils_no_other() -> None:
    of, x = layer(3, 32, 32, torch.float32), random(9, 32)
    choice, shares = sent(9, 3, 2)
    whole = of(x, choice, shares)
    x[4, 3], shares[6] = torch.nan, torch.nan
    found = of(x, choice, shares)
    assert found[[4, 6]].isnan().all()
    others = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(found[others], whole[others])


@pytest.mark.skipif(INTERPRETED, reason="there are no graphs")
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_captured_layer_follows_its_choices(tokens: int) -> None:
    of, x = layer(16, 64, 32, torch.float16), random(tokens, 64, dtype=torch.float16)
    logits = random(tokens, 16)

    def work() -> Tensor:
        return of(x, *kernels.route(logits, 3, True))

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    for seed in range(5):
        logits.copy_(random(tokens, 16, seed=seed + 10))
        if seed == 3:  # all to the same ones
            logits[:] = logits[0].clone()
        graph.replay()
        expected = work()
        assert torch.equal(found, expected)
        assert torch.equal(work(), expected)


def test_the_list_of_tiles_is_long_enough_and_no_longer() -> None:
    for rows in (16, 128):
        for count in (1, 3, 128):
            for pairs in (1, 2, 15, 16, 17, 300, 5000):
                chosen = min(count, pairs)
                # as bad as can be: all but one expert with one row more than whole tiles
                spare = pairs - chosen
                worst = chosen + spare // rows
                assert experts.most_tiles(pairs, count, rows) == worst


def test_what_cannot_be_a_layer_is_refused() -> None:
    of = layer(3, 32, 16, torch.float32)
    with pytest.raises(KernelError, match="experts differ"):
        kernels.experts(of.gate, of.up.half(), of.down)
    with pytest.raises(KernelError, match="experts differ"):
        kernels.experts(of.gate, of.up, of.down.mT)
    with pytest.raises(KernelError, match="float16"):
        of(random(2, 32, dtype=torch.float16), *sent(2, 3, 1))
    assert [part.data_ptr() for part in of.parameters()] == [
        weight.data_ptr() for weight in (of.gate, of.up, of.down)
    ]


# ── routes ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("over_chosen", [False, True])
@pytest.mark.parametrize(("experts", "counts"), [(1, [1]), (3, [1, 3]), (8, [2]), (21, [5]), (128, [8])])
def test_routes(experts: int, counts: list[int], over_chosen: bool) -> None:
    logits = (4 * random(7, experts + 2))[:, :experts]
    for count in counts:
        choice, shares = kernels.route(logits, count, over_chosen)
        expected = reference.route(logits, count, over_chosen)
        assert choice.dtype == torch.int64
        assert torch.equal(choice, expected[0])
        torch.testing.assert_close(shares, expected[1], atol=1e-7, rtol=2e-6)


def test_of_equal_experts_the_first() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0], [0.0] * 6], device=DEVICE)
    choice, shares = kernels.route(logits, 4, True)
    assert choice.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    torch.testing.assert_close(shares[1], torch.full((4,), 0.25, device=DEVICE))


@pytest.mark.parametrize("over_chosen", [False, True])
def test_a_route_that_is_not_a_number(over_chosen: bool) -> None:
    logits = random(6, 12)
    logits[0, 3], logits[2, 0], logits[3], logits[5] = torch.nan, torch.inf, torch.nan, -torch.inf
    choice, shares = kernels.route(logits, 3, over_chosen)
    assert all(len({*row}) == 3 and min(row) >= 0 and max(row) < 12 for row in choice.tolist())
    assert shares[[0, 2, 3, 5]].isnan().all()
    expected = reference.route(logits, 3, over_chosen)
    assert torch.equal(choice[[1, 4]], expected[0][[1, 4]])
    torch.testing.assert_close(shares[[1, 4]], expected[1][[1, 4]])
