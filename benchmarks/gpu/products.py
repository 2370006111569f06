"""Products with quantized weights on a GPU, beside cuBLAS in bfloat16: the part `products` of `benchmarks.gpu`.

Each is replayed from a graph that goes round enough copies of its weight that none is in the L2 cache when its
turn comes. `bandwidth_share` is bytes of the weight over time, of a large copy's rate; `peak_share` operations
over time, of a large bfloat16 product's. Kernels are compiled ahead, in as many processes as there are cores.

With a sweep every tiling worth trying is timed; rows that have one say which, and the best of each are printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.jit import KernelInterface

from benchmarks.gpu.device import Card, Device
from quire_engine.engine import DTYPES
from quire_kernels import Fp8Weight
from quire_kernels.quantized import FP8_BLOCK
from quire_kernels.triton import INTERPRETED, quantized, scaled
from quire_kernels.triton.attention import Chip
from quire_kernels.triton.quantized import Line, Packed, Room, Tiling, TritonQuantizedProduct
from quire_kernels.triton.rounding import FLOATS, Rounding, round_rows
from quire_kernels.triton.scaled import TritonScaledProduct

BF16 = torch.bfloat16
SHAPES = {
    "qkv": (6144, 4096),
    "out": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
"""Outputs and width of the products of an 8B."""
ROWS = (1, 8, 32, 128, 256, 2048)
COLD = 200 << 20
"""Bytes of weights that lie between two uses of one."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A number format of weights, and what becomes of the input."""

    name: str
    group_size: int
    rounds: bool
    scaled: bool = False
    """In fp8."""


KINDS = (
    Kind("int8", 0, True),
    Kind("int8 weights", 0, False),
    Kind("int4 g128", 128, False),
    Kind("int4 g32", 32, False),
    Kind("fp8", 0, True, scaled=True),
    Kind("fp8 weights", 0, False, scaled=True),
)


def tilings(kind: Kind, rows: int) -> list[Tiling | Line]:
    """Those worth trying."""
    if kind.scaled:
        return list(_scaled(rows))
    columns = rows if kind.rounds else 2 * rows
    if columns == 1:
        words = ((1, 512), (1, 1024), (2, 256), (2, 512), (2, 1024), (4, 256), (4, 512), (8, 128), (8, 256))
        return [Line(n, w, warps, stages) for n, w in words for warps in (2, 4) for stages in (1, 3)]
    return list(_tensor_cores(kind, columns))


def _scaled(rows: int) -> Iterator[Tiling]:
    narrow = (16,) if rows <= 16 else (32,) if rows <= 32 else (64,) if rows <= 64 else (64, 128)
    for block_n, block_m, warps, stages in product((32, 64, 128), narrow, (4, 8), (3, 4, 6)):
        if block_n * block_m <= 128 * warps * 32 and block_n * 4 >= 64 * warps // 2:
            for splits in (1, 2, 4, 8) if rows <= 32 else (1, 2, 4) if rows < 1024 else (1,):
                yield Tiling(block_n, block_m, FP8_BLOCK, splits, warps, stages)


def _tensor_cores(kind: Kind, columns: int) -> Iterator[Tiling]:
    if columns <= 32:
        narrow = (8, 16) if columns <= 8 else (16,) if columns <= 16 else (32,)
        for block_n, block_m, block_k, stages in product((32, 64, 128), narrow, (128, 256, 512), (3, 5, 8)):
            size = block_n * block_k * (4 if kind.group_size else 8) // 8 + block_m * block_k
            if stages * size <= 160 << 10:
                for splits in (1, 2, 4, 8):
                    yield Tiling(block_n, block_m, block_k, splits, 4, stages)
        return
    wide = (128, 256) if columns > 128 else (64, 128) if columns > 64 else (64,)
    deep = (256,) if kind.group_size else (64,)
    for block_n, block_m, block_k, warps, stages in product((64, 128, 256), wide, (128, *deep), (4, 8), (3, 4)):
        size = block_n * block_k // (2 if kind.group_size else 1) + block_m * block_k
        if block_n * block_m <= 128 * warps * 32 and stages * size <= 220 << 10 and block_n * 4 >= 64 * warps // 2:
            for splits in (1, 2, 4) if columns < 1024 else (1,):
                yield Tiling(block_n, block_m, block_k, splits, warps, stages)


# ── compiling ─────────────────────────────────────────────────────────────────────────────────────────────


def _compile_only(kernel: Any, grid: Any) -> Callable[..., Any]:
    return lambda *args, **options: kernel.run(*args, grid=grid, warmup=True, **options)


def _compile(task: tuple[Kind, tuple[int, int], int, Tiling | Line | None]) -> str:
    """One product, on tensors nobody reads; what is wrong with it, if anything is."""
    kind, shape, rows, tiling = task
    KernelInterface.__getitem__ = _compile_only
    try:
        mine, x = _product(_weight(kind, shape, "cpu"), kind), torch.empty(rows, shape[1], dtype=BF16)
        if tiling is None and _choice(kind, shape, rows) is None:
            mine._unpack(x, 0)
        else:
            _launch(mine, x, tiling)
    except Exception as error:  # noqa: BLE001 - a tiling that does not fit is only left out
        return f"{task}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def _compile_all(tasks: Sequence[tuple[Kind, tuple[int, int], int, Tiling | Line | None]]) -> None:
    # shapes, and numbers of splits above one, differ in nothing that a kernel is compiled for
    seen: dict[Any, Any] = {}
    for task in tasks:
        kind, shape, rows, tiling = task
        cut = tiling or _choice(kind, shape, rows)
        if isinstance(cut, Tiling):
            cut = cut._replace(splits=min(cut.splits, 2))
        seen.setdefault((kind, rows == 1, rows % 16 == 0, cut), task)
    context = get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(seen), 14), mp_context=context) as pool:
        for said in pool.map(_compile, seen.values()):
            if said:
                print(f"not compiled: {said}", flush=True)


def _choice(kind: Kind, shape: tuple[int, int], rows: int) -> Tiling | Line | None:
    """What a product chooses for itself; None: to unpack the weight."""
    mine = _product(_weight(kind, shape, "meta"), kind)
    if mine.unpacks(rows):
        return None
    if isinstance(mine, TritonScaledProduct):
        return scaled.tiling_for(rows, *shape, mine.multiprocessors, rounded=kind.rounds)
    columns = rows if kind.rounds else 2 * rows
    return (
        quantized.line_for(*shape)
        if columns == 1
        else quantized.tiling_for(columns, mine.weight, mine.multiprocessors)
    )


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────


def _weight(kind: Kind, shape: tuple[int, int], device: str, *, filled: bool = False) -> Packed | Fp8Weight:
    outputs, width = shape
    size = kind.group_size
    made = partial(torch.empty, device=device)
    if kind.scaled:
        coded = Fp8Weight.empty(outputs, width, FP8_BLOCK, device)
        if filled:
            coded.values.random_(0, 126)
            coded.scales.fill_(0.01)
        return coded
    if size:
        half = quantized.half_unit(size, width)
        values = made((width // (2 * half), outputs, half), dtype=torch.uint8)
        scales = made((width // size, outputs), dtype=BF16)
    else:
        values, scales = made((outputs, width), dtype=torch.int8), made(outputs)
    if filled:
        values.random_()
        scales.fill_(0.01)
    return Packed(values, scales, size, outputs, width)


def _product(
    weight: Packed | Fp8Weight, kind: Kind, number: torch.dtype = BF16
) -> TritonQuantizedProduct | TritonScaledProduct:
    room, chip = Room(weight.values.device), 8 if INTERPRETED else Chip.current().multiprocessors
    if isinstance(weight, Fp8Weight):
        return TritonScaledProduct(weight, None, kind.rounds, number, room, Rounding(), chip)
    return TritonQuantizedProduct(weight, None, kind.rounds, number, room, Rounding(), chip)


def _launch(mine: TritonQuantizedProduct | TritonScaledProduct, x: Tensor, tiling: Tiling | Line | None) -> Tensor:
    if tiling is None:
        return mine(x)
    if isinstance(mine, TritonScaledProduct):
        given = round_rows(x, FLOATS) if mine.rounds else x
        if not isinstance(tiling, Tiling):
            raise TypeError("no product in fp8 is cut into lines")
        return scaled.multiply(given, mine.weight, None, BF16, tiling, mine.room, by_chip=scaled.native())
    codes, scales = round_rows(x, 1 if mine.rounds else 2)
    if isinstance(tiling, Line):
        return quantized.multiply_row(codes, scales, mine.weight, None, BF16, tiling)
    return quantized.multiply(codes, scales, mine.weight, None, BF16, tiling, mine.room)


def _fills(tiling: Tiling | Line, columns: int, outputs: int) -> bool:
    """Whether a tiling gives a chip of some 132 multiprocessors about enough to do: what splits are for."""
    if isinstance(tiling, Line):
        return True
    tiles = -(-columns // tiling.block_m) * -(-outputs // tiling.block_n)
    return tiles >= 64 if tiling.splits == 1 else 100 <= tiles * tiling.splits <= 800


def _copies(size: int) -> int:
    return max(2, -(-COLD // size))


def product_rows(
    device: Device, card: Card, *, sweep: bool, kinds: str = "", rows_of: str = ""
) -> Iterator[dict[str, Any]]:
    """Rows of the part. `kinds` and `rows_of`, separated by commas, narrow a sweep down."""
    chosen = [kind for kind in KINDS if not kinds or kind.name in kinds.split(",")]
    counts = [int(word) for word in rows_of.split(",")] if rows_of else list(ROWS)
    shapes = {name: shape for name, shape in SHAPES.items() if not sweep or name != "head"}
    small, number, place = device.scale.small, DTYPES[device.dtype], device.torch.type
    if small:
        shapes, counts, sweep = {"out": (128, 128)}, [1, 8], False
    tried: dict[tuple[Kind, int], list[Tiling | Line]] = {
        (kind, rows): tilings(kind, rows) if sweep else [] for kind in chosen for rows in counts
    }
    if not small:  # the interpreter compiles nothing
        _compile_all(
            [
                *((kind, shape, rows, None) for kind, rows in tried for shape in shapes.values()),
                *(
                    (kind, SHAPES["out"], rows, tiling)
                    for (kind, rows), given in tried.items()
                    for tiling in given
                ),
            ]
        )
    plain = {(name, rows): seconds for name in shapes for rows, seconds in _cublas(device, shapes[name], counts)}
    for kind in chosen:
        for name, shape in shapes.items():
            first = _weight(kind, shape, place, filled=True)
            size = first.values.nbytes + first.scales.nbytes
            copies = device.scale.at_most(_copies(size), 2)
            products = [_product(first, kind, number)]
            products += [
                _product(_weight(kind, shape, place, filled=True), kind, number) for _ in range(copies - 1)
            ]
            for rows in counts:
                x = torch.randn(rows, shape[1], dtype=number, device=device.torch)
                found: list[tuple[float, Tiling | Line | None]] = []
                worth = [
                    tiling
                    for tiling in tried[kind, rows]
                    if _fills(tiling, rows if kind.rounds or kind.scaled else 2 * rows, shape[0])
                ]
                for tiling in [None, *worth]:
                    work = _in_turns(products, partial(_launch, x=x, tiling=tiling))
                    try:
                        seconds = device.replayed(work, max(len(products), 4 if rows > 256 else 10))
                    except Exception as error:
                        if tiling is None:
                            raise  # others need more shared memory than there is
                        print(f"{kind.name} {name} {rows} {tiling}: {type(error).__name__}", flush=True)
                        continue
                    found.append((seconds, tiling))
                shown = found[:1] + sorted(found[1:], key=lambda pair: pair[0])[:3]
                for seconds, tiling in shown:
                    yield {
                        "part": "products",
                        "kind": kind.name,
                        "shape": name,
                        "rows": rows,
                        "us": round(seconds * 1e6, 1),
                        "bandwidth_share": round(size / seconds / card.bandwidth, 3),
                        "peak_share": round(2 * rows * shape[0] * shape[1] / seconds / card.bf16, 3),
                        "of_cublas": round(plain[name, rows] / seconds, 2),
                        **({} if tiling is None else {"tiling": list(tiling)}),
                    }
            del products, first
            device.release()


def _cublas(device: Device, shape: tuple[int, int], counts: list[int]) -> Iterator[tuple[int, float]]:
    outputs, width = shape
    made = partial(torch.randn, dtype=DTYPES[device.dtype], device=device.torch)
    weights = [made(outputs, width) for _ in range(device.scale.at_most(_copies(2 * outputs * width), 2))]
    for rows in counts:
        work = _in_turns(weights, partial(F.linear, made(rows, width)))
        yield rows, device.replayed(work, max(len(weights), 4 if rows > 256 else 10))


def _in_turns(things: Sequence[Any], work: Callable[[Any], object]) -> Callable[[], object]:
    """Does `work` with one after the other."""
    turns = cycle(things)
    return lambda: work(next(turns))
