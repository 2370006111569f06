"""Products, attention and experts alone: ours and torch's (oneDNN), in turns, beside what the machine can do.

Weights and caches are taken one after the other out of more memory than a cache holds, as a model takes them.
torch's product in 8 bits gets its input in 8 bits already, and in 4 bits it multiplies floats; ours gets floats
and rounds them to 8 bits itself.

Legend: M rows, N outputs, K inputs, S sequences, L tokens of each.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cpu.ceilings import Ceilings, Format
from benchmarks.rounds import in_turns, interval
from benchmarks.rows import Row
from quire_kernels import (
    Experts,
    Int4Weight,
    Int8Weight,
    Kernels,
    PagedBatch,
    Product,
    QuantizedWeight,
)
from quire_kernels.memory import large_pages
from quire_kernels.quantized import quantize_int4, quantize_int8
from quire_kernels.reference import ReferenceKernels

SIDE = 4096
"""N and K."""
GROUP = 32
"""Inputs that share a scale in 4 bits."""
BLOCK = 16
EXPERTS, CHOSEN = 32, 8
_MEMORY = 512 << 20
_DTYPES: dict[Format, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class _Cycle:
    """Calls that each use other memory, for at least `least` seconds a time; gives the seconds of one."""

    calls: Sequence[Call]
    least: float

    def __call__(self) -> float:
        began = time.perf_counter()
        for number, call in enumerate(itertools.cycle(self.calls), 1):
            call()
            took = time.perf_counter() - began
            if took > self.least and number >= len(self.calls):
                return took / number
        raise AssertionError


def product(kernels: Kernels, ceilings: Ceilings, format: Format, rows: int, rounds: int, least: float) -> Row:
    """M × N × K with N = K = `SIDE`: tera-operations a second and their shares of the ceilings."""
    measures = {
        "quire": _Cycle(_ours(kernels, format, rows), least), "torch": _Cycle(_torchs(format, rows), least)
    }  # fmt: skip
    with torch.inference_mode():
        seconds = in_turns(measures, rounds)
    operations = 2.0 * rows * SIDE * SIDE
    floor = ceilings.product_seconds(format, rows, SIDE, SIDE)
    return _row(seconds, lambda took: {"tops": round(operations / took / 1e12, 4)}) | {
        "peak_share": round(operations / min(seconds["quire"]) / ceilings.peak(format), 3),
        "roofline_share": round(floor / min(seconds["quire"]), 3),
    }


def attention(
    kernels: Kernels, ceilings: Ceilings, shape: tuple[int, int, int], context: int, sequences: int, rounds: int,
    least: float,
) -> Row:  # fmt: skip
    """One new token of each sequence over `context` keys and values in bfloat16; `shape` is query heads, key
    heads, head size.
    """
    heads, kv_heads, head = shape
    size = 2 * sequences * context * kv_heads * head * 2
    copies = max(2, -(-_MEMORY // size))
    blocks = sequences * context // BLOCK
    tables = torch.arange(blocks).view(sequences, -1).tolist()
    batch = PagedBatch.build(
        starts=[context - 1] * sequences, query_lens=[1] * sequences, block_tables=tables,
        logits=[1] * sequences, block_size=BLOCK,
    )  # fmt: skip
    query = torch.randn(sequences, heads, head).bfloat16()
    prepared, scale = kernels.paged_attention(batch, window=None), head**-0.5
    # on large pages, as an engine has them
    room = large_pages(torch.empty(copies, 2, blocks, BLOCK, kv_heads, head, dtype=torch.bfloat16))
    caches = room.copy_(torch.randn(room.shape[1:]))

    def theirs(cache: Tensor) -> Call:
        keys, values = cache.view(2, sequences, kv_heads, context, head)
        one = query.view(sequences, heads, 1, head)
        return partial(torch.nn.functional.scaled_dot_product_attention, one, keys, values, enable_gqa=True)

    measures = {
        "quire": _Cycle([partial(prepared, query, cache, scale) for cache in caches], least),
        "torch": _Cycle([theirs(cache) for cache in caches], least),
    }  # fmt: skip
    with torch.inference_mode():
        seconds = in_turns(measures, rounds)
    return _row(seconds, lambda took: {"gbs": round(size / took / 1e9, 2)}) | {
        "read_share": round(size / min(seconds["quire"]) / ceilings.read, 3)
    }


class ExpertLayers:
    """Layers of `EXPERTS` experts of the size of Qwen3-30B-A3B's, in one format: ours; in bfloat16 also by torch's
    products, one expert after the other; and `dense`, MLPs that have together the bytes of all experts.
    """

    WIDTH, INNER = 2048, 768

    def __init__(self, kernels: Kernels, format: Format) -> None:
        self._kernels, self._format = kernels, format
        self._layers = {"quire": self._experts(kernels)}
        if format == "bf16":
            self._layers["torch"] = self._experts(ReferenceKernels())
        inner = CHOSEN * self.INNER
        self._dense = [
            (self._product(kernels, (2 * inner, self.WIDTH)), self._product(kernels, (self.WIDTH, inner)))
            for _ in range(EXPERTS // CHOSEN)
        ]

    def measured(self, tokens: int, rounds: int, least: float) -> Row:
        """Milliseconds of each, and ours beside the others'. Of one token the dense layer is one, for the bytes of
        the experts that it goes through; else all are, with as many rows as an expert has in the mean.
        """
        x = torch.randn(tokens, self.WIDTH).bfloat16()
        choices = [torch.randn(tokens, EXPERTS).topk(CHOSEN).indices for _ in range(EXPERTS // CHOSEN)]
        if tokens == 1:  # one after the other it meets all
            choices = list(torch.arange(EXPERTS).view(-1, 1, CHOSEN))
        shares = torch.full((tokens, CHOSEN), 1.0 / CHOSEN)
        calls: dict[str, list[Call]] = {
            name: [partial(layer, x, choice, shares) for choice in choices] for name, layer in self._layers.items()
        }
        some = x[: max(1, tokens * CHOSEN // EXPERTS)]
        calls["dense"] = [partial(self._through, some, *one) for one in self._dense]
        with torch.inference_mode():
            seconds = in_turns({name: _Cycle(each, least) for name, each in calls.items()}, rounds)
        if tokens > 1:
            seconds["dense"] = [took * len(self._dense) for took in seconds["dense"]]
        row: Row = {f"{name}_ms": round(min(took) * 1000, 3) for name, took in seconds.items()}
        for name in calls.keys() - {"quire"}:
            ratio, low, high = interval([a / b for a, b in zip(seconds["quire"], seconds[name], strict=True)])
            row |= {f"{name}_ratio": round(ratio, 3), f"{name}_low": round(low, 3), f"{name}_high": round(high, 3)}
        return row

    def _through(self, x: Tensor, gate_up: Product, down: Product) -> Tensor:
        return down(self._kernels.silu_mul(gate_up(x)))

    def _experts(self, kernels: Kernels) -> Experts:
        inward, outward = (EXPERTS * self.INNER, self.WIDTH), (EXPERTS * self.WIDTH, self.INNER)
        shapes = (inward, inward, outward)
        if self._format in _DTYPES:
            return kernels.experts(*(self._floats(shape).view(EXPERTS, -1, shape[1]) for shape in shapes))
        gate, up, down = map(self._integers, shapes)
        return kernels.quantized_experts(gate, up, down, EXPERTS, "int8", torch.bfloat16)

    def _product(self, kernels: Kernels, shape: tuple[int, int]) -> Product:
        if self._format in _DTYPES:
            return kernels.product(self._floats(shape), None)
        return kernels.quantized_product(self._integers(shape), None, "int8", torch.bfloat16)

    def _floats(self, shape: tuple[int, int]) -> Tensor:
        weight: Tensor = torch.randn(shape) / shape[1] ** 0.5
        return weight.to(_DTYPES[self._format])

    def _integers(self, shape: tuple[int, int]) -> QuantizedWeight:
        weight = torch.randn(shape) / shape[1] ** 0.5
        return quantize_int8(weight) if self._format == "int8" else quantize_int4(weight, GROUP)


def _row(seconds: dict[str, list[float]], figure: Callable[[float], Row]) -> Row:
    """The best of the rounds of each, and the ratio within rounds."""
    ratio, low, high = interval([b / a for a, b in zip(seconds["quire"], seconds["torch"], strict=True)])
    best = {
        f"{system}_{name}": value for system, took in seconds.items() for name, value in figure(min(took)).items()
    }
    return best | {"ratio": round(ratio, 3), "ratio_low": round(low, 3), "ratio_high": round(high, 3)}


def _ours(kernels: Kernels, format: Format, rows: int) -> list[Call]:
    x = torch.randn(rows, SIDE).to(_DTYPES.get(format, torch.bfloat16))
    made: list[Product] = []
    if format in _DTYPES:
        weights = _copies(torch.randn(SIDE, SIDE).to(_DTYPES[format]))
        made += [kernels.product(weight, None) for weight in weights]
    elif format == "int8":
        eight = quantize_int8(torch.randn(SIDE, SIDE))
        for values in _copies(eight.values):
            weight: QuantizedWeight = Int8Weight(values, eight.scales.clone())
            made.append(kernels.quantized_product(weight, None, "int8", torch.bfloat16))
    else:
        four = quantize_int4(torch.randn(SIDE, SIDE), GROUP)
        for values in _copies(four.values):
            weight = Int4Weight(values, four.scales.clone(), GROUP)
            made.append(kernels.quantized_product(weight, None, "int8", torch.bfloat16))
    return [partial(each, x) for each in made]


def _torchs(format: Format, rows: int) -> list[Call]:
    x = torch.randn(rows, SIDE).to(_DTYPES.get(format, torch.bfloat16))
    if format in _DTYPES:
        weights = _copies(torch.randn(SIDE, SIDE).to(_DTYPES[format]))
        return [partial(torch.nn.functional.linear, x, weight) for weight in weights]
    if format == "int8":
        eights = _copies(torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8))
        packed = [torch.ops.onednn.qlinear_prepack(weight, [rows, SIDE]) for weight in eights]
        scales, zeros = torch.full((SIDE,), 0.01), torch.zeros(SIDE, dtype=torch.int64)
        bytes_in = torch.randint(0, 255, (rows, SIDE), dtype=torch.uint8)
        multiply = torch.ops.onednn.qlinear_pointwise
        return [
            partial(
                multiply, bytes_in, 0.01, 128, weight, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )
            for weight in packed
        ]  # fmt: skip
    codes = torch.randint(0, 16, (SIDE, SIDE), dtype=torch.int32)
    fours = _copies(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
    groups = torch.randn(SIDE // GROUP, SIDE, 2).bfloat16()
    return [partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, weight, GROUP, groups) for weight in fours]


def _copies(weight: Tensor) -> list[Tensor]:
    """On large pages, as an engine's weights are."""
    copies = [large_pages(torch.empty_like(weight)) for _ in range(max(2, _MEMORY // weight.nbytes))]
    return [copy.copy_(weight) for copy in copies]
