"""Every tiling that is timed where an engine starts computes what the default does: see `triton_ops`.

Trials are those of the kernels, launched on numbers of our own. Sums in float32 are taken in another order, before
they are rounded: once in float16, and 2^-8 each in bfloat16, which is what a GPU is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from itertools import product as product_of
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.kernels.triton_ops_attention import in_own_order
from torch import Tensor
from triton.runtime.jit import KernelInterface

from quire_kernels import Activations, QuantizedWeight
from quire_kernels.paging import PagedBatch
from quire_kernels.quantized import quantize_fp8, quantize_int4, quantize_int8
from quire_kernels.reference.bytes import E4M3, to_bytes
from quire_kernels.triton import (
    INTERPRETED,
    Served,
    TritonKernels,
    attention,
    attention_cuts,
    experts,
    product,
    quantized,
    scaled,
    timing,
)
from quire_kernels.triton.rounding import FLOATS, Codes, round_rows
from quire_kernels.triton.timing import records_of
from quire_kernels.tuning import Trial, tune

torch.set_num_threads(1)
DEVICE = "cpu" if INTERPRETED else "cuda"
NUMBER = torch.float16 if INTERPRETED else torch.bfloat16
CLOSE = 1e-3 if INTERPRETED else 8e-3
SERVED = Served(layers=(), heads=4, head_dim=32, number=NUMBER, sequences=9, tokens=20, longest=70, chosen=2)


NAMES = ["product", "experts", "attention", "int8", "int4", "fp8", "fp8 weights"]


def random(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=source, device=DEVICE).to(NUMBER)


def filled(given: Any) -> Any:
    """What a trial gives, with numbers in it."""
    if isinstance(given, Tensor):
        return random(*given.shape)
    if isinstance(given, Codes):
        planes = FLOATS if given.scales.dim() == 2 else given.planes.shape[0] // given.scales.shape[0]
        return round_rows(random(given.scales.shape[0], given.planes.shape[1]), planes)
    if isinstance(given[0], PagedBatch):
        return given[0], random(*given[1].shape), given[2]
    x, choice, shares = given
    return random(*x.shape), choice, shares


def cases(number: int) -> list[Trial]:
    kernels = TritonKernels()
    made: list[Any] = []
    layers: tuple[Any, ...] = ()
    if number == 0:
        made = [kernels.product(random(outputs, 40, seed=1), None) for outputs in (24, 700)]
    elif number == 1:
        made = [kernels.experts(*(random(3, *shape, seed=2) / 8 for shape in ((40, 64), (40, 64), (64, 40))))]
    elif number == 2:
        plain = random(2, 12, 8, 2, 32, seed=3)
        halves = in_own_order(to_bytes(plain.float().cpu(), E4M3)).to(DEVICE)
        layers = ((None, [plain]), (33, [random(2, 12, 8, 2, 32, seed=4)]), (None, [halves]))
    else:
        rows = random(48, 128, seed=5).float() / 8
        quantized_so: list[tuple[QuantizedWeight, Activations, torch.dtype]] = [
            (quantize_int8(rows), "int8", NUMBER),
            (quantize_int4(rows, 64), "float", torch.bfloat16),  # another would be unpacked
            (quantize_fp8(rows, 16), "fp8", NUMBER),
            (quantize_fp8(rows, 16), "float", NUMBER),
        ]
        weight, activations, dtype = quantized_so[number - 3]
        made = [kernels.quantized_product(weight, None, activations, dtype)]
    served = replace(SERVED, layers=layers)
    found = list(kernels.trials(served))
    if number == 2:
        found += kernels.trials(replace(served, layers=layers[:1], sinks=True))
    assert made or layers
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(7), ids=NAMES)
def test_every_candidate_computes_what_the_default_does(number: int) -> None:
    seen = set[str]()
    for trial in cases(number):
        given = filled(trial.given())
        expected: Tensor = trial.launch(given, trial.candidates[0])  # type: ignore[assignment]
        assert expected.abs().max() > 0
        for tiling in trial.candidates[1:]:
            found: Tensor = trial.launch(given, tiling)  # type: ignore[assignment]
            error = (found.double() - expected.double()).norm() / expected.double().norm()
            assert error < CLOSE, (trial.family, tiling)
        seen.add(trial.family.name)
    assert len(seen) >= 2


Timed = Callable[[], float]


def last_is_fastest(trials: list[Trial], kernels: TritonKernels) -> dict[str, Any]:
    """Chooses for every family its last candidate; which those are."""
    wanted = {trial.family.name: trial.candidates[-1] for trial in trials}
    launched: list[Any] = []

    def watched(trial: Trial) -> Trial:
        def launch(given: Any, tiling: Any) -> None:
            launched.append((trial.family.name, tiling))

        return Trial(trial.family, trial.candidates, trial.given, launch, trial.nbytes)

    def timer(launches: Any) -> Timed:
        launches[0]()
        name, tiling = launched[-1]
        return lambda: 1.0 if tiling == wanted[name] else 2.0

    chip = kernels._chip
    about: dict[str, str | int] = {"card": "none", "multiprocessors": chip.multiprocessors}
    tune(map(watched, trials), chip.choices, records_of(about), seconds=600.0, timer=timer)
    return wanted


def test_what_was_chosen_is_what_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels = TritonKernels()
    dense = kernels.product(random(24, 40), None)
    layer = kernels.experts(*(random(3, *shape) for shape in ((40, 64), (40, 64), (64, 40))))
    bytes_ = kernels.quantized_product(quantize_int8(random(48, 128).float()), None, "int8", NUMBER)
    cache = random(2, 12, 8, 2, 32)
    served = replace(SERVED, layers=[(None, [cache])])
    wanted = last_is_fastest(list(kernels.trials(served)), kernels)
    launched: list[Any] = []

    def watch(module: Any, name: str, at: int) -> None:
        work = getattr(module, name)

        def watched(*given: Any) -> Any:
            launched.append(given[at])
            return work(*given)

        monkeypatch.setattr(module, name, watched)

    watch(product.TritonProduct, "cut", 2)
    watch(quantized.TritonQuantizedProduct, "cut", 2)
    watch(experts.TritonExperts, "cut", 4)
    for rows in (1, 5, 9):
        dense(random(rows, 40))
        bytes_(random(rows, 128))
        layer(random(rows, 64), torch.arange(2, device=DEVICE).repeat(rows, 1), torch.ones(rows, 2, device=DEVICE))
    chosen = iter(launched)
    for rung, of_codes, tokens in ((1, 1, 1), (8, 8, 16), (16, 16, 16)):
        for kernel, at in (("product", rung), ("quantized", of_codes), ("experts", tokens)):
            names = [name for name in wanted if name.startswith(f"{kernel} ") and name.endswith(f" <={at}")]
            assert [wanted[name] for name in names] == [next(chosen)]
    # attention has kernels of its own for each cut
    cuts: list[dict[str, Any]] = []
    for kernel in ("_decode", "_prefill"):
        launcher = getattr(attention, kernel)
        monkeypatch.setattr(attention, kernel, Watched(launcher, cuts))
    for counts in ([1] * 3, [16]):
        batch = PagedBatch.build(
            starts=[64 - count for count in counts],
            query_lens=counts,
            block_tables=[range(8)] * len(counts),
            logits=[1] * len(counts),
            block_size=8,
            device=DEVICE,
        )
        kernels.paged_attention(batch, window=None)(random(sum(counts), 4, 32), cache, 1.0)
    multiprocessors = kernels._chip.multiprocessors
    (decode,) = (
        cut
        for name, cut in wanted.items()
        if name.startswith("attention.decode") and name.endswith(f"<={attention.rung_of(multiprocessors, 6)}")
    )
    (prompts,) = (cut for name, cut in wanted.items() if name.startswith("attention.prompts"))
    assert {**cuts[0], **decode.tuning} == cuts[0]
    assert cuts[0]["SPLITS"] == min(decode.splits, attention.num_splits(multiprocessors, 6, 64))
    assert {**cuts[1], **{name: prompts.tuning[name] for name in ("BLOCK_N", "num_warps", "num_stages")}} == cuts[
        1
    ]


@pytest.mark.skipif(
    INTERPRETED, reason="there is a time to measure on a GPU alone; benchmarks/gpu_check.sh runs this"
)
def test_on_a_gpu_they_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for used in (torch.cuda.current_stream(), stream):  # cuBLAS keeps what it takes for each
        with torch.cuda.stream(used):
            torch.nn.functional.linear(random(8, 64), random(64, 64))
    torch.cuda.synchronize()
    reports = []
    for _ in range(2):
        kernels = TritonKernels()
        weights = [random(2048, 1024, seed=seed) for seed in range(40)]
        products = [kernels.product(weight, None) for weight in weights]
        caches = [random(2, 600, 16, 8, 64, seed=seed) for seed in range(3)]
        served = Served([(None, caches)], 32, 64, NUMBER, sequences=40, tokens=512, longest=2048)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            reports.append(kernels.tune(served, 60.0, stream))
        assert torch.cuda.memory_allocated() == before
        x = random(1, 1024)
        expected = x.double() @ weights[0].double().T
        assert (products[0](x).double() - expected).norm() / expected.norm() < CLOSE
    first, second = reports
    assert not first.left
    assert len(first.measured) == first.families >= 8
    assert all(0 < after <= before < 1e-2 for *_, before, after in first.measured)
    assert (second.known, second.measured) == (first.families, [])


class Watched:
    """A kernel, and what it was launched with."""

    def __init__(self, kernel: Any, seen: list[dict[str, Any]]) -> None:
        self._kernel, self._seen = kernel, seen

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*given: Any, **options: Any) -> Any:
            self._seen.append(options)
            return self._kernel[grid](*given, **options)

        return launch


def test_a_kernel_is_what_its_file_takes_from_others_too() -> None:
    names = {kernel: {path.stem for path in timing._sources(kernel)} for kernel in ("attention", "quantized")}
    assert names["attention"] >= {"attention", "bytes", "launch"}
    assert "product" not in names["attention"]
    assert names["quantized"] >= {"quantized", "rounding", "bytes", "launch"}
    paths = {records_of({"card": card})(kernel).path for card in "ab" for kernel in ("attention", "quantized")}
    assert len(paths) == 4


class Kernel(KernelInterface[Any]):  # type: ignore[misc]
    """Says of each launch whether it was one."""

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> str:
        return "compiled" if warmup else "launched"


def test_who_compiles_ahead_keeps_nobody_else_from_launching() -> None:
    kernel, said = Kernel(), list[str]()

    def here() -> None:
        said.append(kernel[(1,)]())

    def elsewhere() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(here).result()
            # two that compile, of whom one ends first
            pool.submit(timing.compile_ahead, [here], float("inf"), 1).result()
            pool.submit(here).result()

    own = KernelInterface.__getitem__
    timing.compile_ahead([here, elsewhere, here], float("inf"), 1)
    here()
    assert said == ["compiled", "launched", "compiled", "launched", "compiled", "launched"]
    with pytest.raises(ZeroDivisionError):
        timing.compile_ahead([lambda: 1 // 0], float("inf"), 1)
    assert KernelInterface.__getitem__ is own


@pytest.mark.parametrize("multiprocessors", [8, 108, 132, 148, 192])
def test_no_candidate_takes_more_room_than_is_planned(multiprocessors: int) -> None:
    chip = attention.Chip(multiprocessors, 227 * 1024)
    for head_dim in (64, 128, 256):
        for kept in (torch.bfloat16, torch.int8):
            for below, rung in pairwise((0, *attention.rungs(multiprocessors))):
                for cut in attention_cuts.decode_candidates(chip, rung, head_dim, kept):
                    assert cut.splits & (cut.splits - 1) == 0
                    assert cut.splits <= attention.num_splits(multiprocessors, rung, 1 << 30)
                    for rows in (below + 1, rung):
                        assert attention.rung_of(multiprocessors, rows) == rung
    for outputs, width in ((64, 1024), (1024, 14336), (4096, 4096), (28672, 4096)):
        for (below, rung), rounded in product_of(pairwise((0, *scaled.RUNGS)), (True, False)):
            for tiling in scaled.candidates(rung, outputs, width, multiprocessors, rounded=rounded):
                tiles = -(-rung // tiling.block_m) * -(-outputs // tiling.block_n)
                held = tiles * tiling.splits * tiling.block_n * tiling.block_m * 4
                bound = 384 * 128 * min(max(4 * (below + 1), 16), 128) * 4  # of `gpu_sizing`
                assert tiling.splits == 1 or held <= min(quantized.ROOM_BYTES, bound)
