"""Compiles every tiling that an engine times at its start, for GPUs that need not be there: `python -m
tests.unit.kernels.triton_tilings 80 90`.

Trials are those of the kernels (`quire_kernels.tuning`) on one card of each kind. A default must fit into that
card's shared memory; a candidate that does not is named and is no failure: an engine leaves it out. They are
compiled as an engine does, several at once.

Prints one line for each failure; the exit status is 1 if there was one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from tests.unit.kernels.triton_launches import BF16, CARDS, COUNTED, F32, PLAIN, Nowhere, coded_weight, new
from triton.runtime.jit import KernelInterface

from quire_kernels.quantized import Fp8Weight
from quire_kernels.reference.bytes import E4M3
from quire_kernels.triton import attention_cuts, coded, experts, launch, product, quantized, scaled, timing
from quire_kernels.triton.attention import Chip, StepAttention
from quire_kernels.tuning import Trial

SHARED: list[int] = []
"""Bytes that the kernels share which were compiled last."""


def compile_only(kernel: Any, grid: Any) -> Callable[..., Any]:
    def launched(*args: Any, **options: Any) -> None:
        SHARED.append(kernel.run(*args, grid=grid, warmup=True, **options).metadata.shared)

    return launched


def trials(chip: Chip) -> Iterator[Trial]:
    """Of an 8B in all its formats, of attention with sinks, and of a layer of experts."""
    for kept, held in ((BF16, 128), (torch.int8, 132), (E4M3, 132)):
        yield from attention_cuts.trials(
            chip,
            lambda batch, chip: StepAttention(batch, None, chip, COUNTED),
            [new(2, 300, 16, 8, held, dtype=kept)],
            new(0, 32, 128),
            sequences=256,
            tokens=2048,
            longest=2048,
        )
    yield from attention_cuts.trials(
        chip,
        lambda batch, chip: StepAttention(batch, 128, chip, COUNTED),
        [new(2, 300, 16, 8, 64)],
        new(0, 64, 64),
        sequences=256,
        tokens=2048,
        longest=2048,
        sinks=True,
    )
    yield from product.TritonProduct(new(6144, 4096), None, chip.shared_bytes).trials(256)
    outputs, width = 4096, 14336
    for size, rounds in ((0, True), (0, False), (128, False)):
        values, scales = new(outputs, width, dtype=torch.int8), new(outputs, dtype=F32)
        if size:
            half = quantized.half_unit(size, width)
            values = new(width // (2 * half), outputs, half, dtype=torch.uint8)
            scales = new(width // size, outputs)
        weight = quantized.Packed(values, scales, size, outputs, width)
        room = quantized.Room(torch.device("cpu"))
        mine = quantized.TritonQuantizedProduct(weight, None, rounds, BF16, room, PLAIN, chip.multiprocessors)
        yield from mine.trials(256)
    blocks = Fp8Weight.empty(4096, 14336, 128)
    for rounds in (True, False):
        room = quantized.Room(torch.device("cpu"))
        made = scaled.TritonScaledProduct(blocks, None, rounds, BF16, room, PLAIN, chip.multiprocessors)
        yield from made.trials(256)
    gate, down = new(1, 768, 2048).expand(128, -1, -1), new(1, 2048, 768).expand(128, -1, -1)
    yield from experts.TritonExperts(gate, gate, down, chip.shared_bytes).trials(2048, 8)
    for codes, group in ((coded.INT8, 0), (coded.FP8, 128), (coded.INT4, 32), (coded.MXFP4, 32)):
        each = partial(coded_weight, 128, codes=codes, group=group, dtype=BF16)
        layer = experts.CodedExperts(each(768, 2048), each(768, 2048), each(2048, 768), chip.shared_bytes)
        yield from layer.trials(2048, 8)


def failures(capability: int) -> int:
    """How many candidates do not compile, or are defaults and do not fit."""
    chip, failed, seen = CARDS[capability], 0, dict[Any, tuple[Trial, Any]]()
    for trial in trials(chip):
        for tiling in trial.candidates:
            seen.setdefault((trial.family.kernel, trial.family.facts, tiling), (trial, tiling))
    timing.compile_ahead((partial(try_to, *both) for both in seen.values()), float("inf"), workers=2)
    KernelInterface.__getitem__ = compile_only
    for trial, tiling in seen.values():
        SHARED.clear()
        said = f"sm_{capability}, {trial.family.name}, {tuple(tiling)}"
        try:
            start(trial, tiling)
        except Exception as error:  # noqa: BLE001 - all that fail are to be told
            failed += 1
            print(f"{said}: {type(error).__name__}: {error}")
        if max(SHARED, default=0) > chip.shared_bytes:
            failed += tiling == trial.candidates[0]
            print(f"{said}: {max(SHARED)} of {chip.shared_bytes} bytes")
    print(f"sm_{capability}: {len(seen)} tilings")
    return failed


def start(trial: Trial, tiling: Any) -> None:
    trial.launch(trial.given(), tiling)


def try_to(trial: Trial, tiling: Any) -> None:
    with contextlib.suppress(*timing.UNFIT):  # which are told of in their turn
        start(trial, tiling)


def main() -> int:
    failed = 0
    for capability in map(int, sys.argv[1:]):
        triton.runtime.driver.set_active(Nowhere(capability))
        launch.dependent.cache_clear()  # what it says is of one GPU
        failed += failures(capability)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
