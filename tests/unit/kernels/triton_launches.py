"""Compiles every Triton kernel for GPUs that need not be there: `python triton_launches.py 80 90 [--every]`.

`LAUNCHES` calls the launchers as an engine does, on tensors nobody reads, so that what is compiled is what would
be launched: the same dtypes, alignments and constants. A launch compiles and goes no further, and fails if it asks
for more shared memory than cards of that capability have.

Prints one line for each failure; the exit status is 1 if there was one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

from quire_kernels import Clamp, Fp8Weight, HeadNorms
from quire_kernels.paging import PagedBatch
from quire_kernels.reference.bytes import E4M3, LARGEST
from quire_kernels.triton import (
    coded,
    experts,
    gate,
    heads,
    launch,
    norm,
    product,
    quantized,
    rotation,
    rounding,
    sample,
    scaled,
    step,
    tokens,
)
from quire_kernels.triton.attention import COUNTERS, Chip, StepAttention

BF16, F32 = torch.bfloat16, torch.float32
PLAIN, ROUNDED, IN_FLOATS = rounding.Rounding(), rounding.Rounding(), rounding.Rounding()
ROUNDED.want(1, 1 << 30)
IN_FLOATS.want(rounding.FLOATS, 1 << 30)
H200, A100 = Chip(132, 227 * 1024), Chip(108, 163 * 1024)
CARDS = {
    80: A100,
    86: Chip(72, 99 * 1024),  # A10
    89: Chip(58, 99 * 1024),  # L4
    90: H200,
    100: Chip(148, 227 * 1024),
    120: Chip(84, 99 * 1024),  # RTX 5080
}
"""One of each capability."""
ROOMIEST = Chip(1 << 10, 1 << 30)
here = H200
"""The card that is compiled for."""
COUNTED = torch.zeros(COUNTERS, dtype=torch.int32)


def new(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def on_this(chip: Chip) -> Chip:
    """No launch is told of more than its card has."""
    return Chip(min(chip.multiprocessors, here.multiprocessors), min(chip.shared_bytes, here.shared_bytes))


def place_heads(
    num_heads: int, kv_heads: int, head: int, normed: bool, kept: torch.dtype = BF16, norm: torch.dtype = BF16
) -> None:
    norms = HeadNorms(new(head, dtype=norm), new(head, dtype=norm), 1e-6) if normed else None
    angles = new(3, 1, head, dtype=F32)
    held = head + 4 if kept in LARGEST else head
    cache, slots = new(2, 9, 16, kv_heads, held, dtype=kept), new(3, dtype=torch.int64)
    heads.place_heads(new(3, num_heads + 2 * kv_heads, head), num_heads, norms, angles, angles, cache, slots)


def draw(rows: int, vocabulary: int, dtype: torch.dtype, cap: float | None = None) -> None:
    table = sample.DrawTable(
        new(9, dtype=F32),
        new(9, dtype=torch.int32),
        new(9, dtype=F32),
        new(9, dtype=F32),
        new(9, dtype=torch.int64),
    )
    slots, out, last = (new(rows, dtype=torch.int32) for _ in range(3))
    room = sample.scratch(rows, vocabulary, "cpu")
    sample.draw(
        new(rows, vocabulary, dtype=dtype), slots, new(rows, dtype=torch.int32), table, out, last, room, cap
    )


def multiply(
    rows: int, outputs: int, width: int, tiling: product.Tiling | None = None, dtype: torch.dtype = BF16
) -> None:
    x, weight = new(rows, width, dtype=dtype), new(outputs, width, dtype=dtype)
    bias = new(outputs, dtype=dtype) if rows > 1 else None
    default = product.default_for(rows, outputs, width, dtype.itemsize, here.shared_bytes)
    if default == product.CUBLAS:
        default = product.tiling_for(rows, outputs, width)
    product.multiply(x, weight, bias, tiling or default)


def multiply_quantized(
    rows: int, outputs: int, width: int, group_size: int, planes: int, dtype: torch.dtype = BF16
) -> None:
    """`group_size` 0 is 8 bits."""
    values, scales = new(outputs, width, dtype=torch.int8), new(outputs, dtype=F32)
    if group_size:
        half = quantized.half_unit(group_size, width)
        values = new(width // (2 * half), outputs, half, dtype=torch.uint8)
        scales = new(width // group_size, outputs)
    weight = quantized.Packed(values, scales, group_size, outputs, width)
    room, bias = quantized.Room(torch.device("cpu")), new(outputs, dtype=F32)
    codes, x_scales = rounding.round_rows(new(rows, width, dtype=dtype), planes)
    if codes.shape[0] == 1:
        quantized.multiply_row(codes, x_scales, weight, None, dtype, quantized.line_for(outputs, width))
    tiling = quantized.tiling_for(codes.shape[0], weight, 132)
    quantized.multiply(codes, x_scales, weight, bias, dtype, tiling, room)
    if planes == 2:
        quantized.unpack(weight, new(rows, width, dtype=dtype), 0)
        quantized.unpack(weight, new(rows, width, dtype=dtype), 0, new(rows, dtype=torch.int64))


def multiply_scaled(
    rows: int, outputs: int, width: int, *, rounds: bool, shared: int = 128, dtype: torch.dtype = BF16
) -> None:
    weight = Fp8Weight(new(outputs, width, dtype=torch.uint8), new(1, 1, dtype=F32), shared)
    x = new(rows, width, dtype=dtype)
    given = rounding.round_rows(x, rounding.FLOATS) if rounds else x
    tiling, room = (
        scaled.tiling_for(rows, outputs, width, 132, rounded=rounds),
        quantized.Room(torch.device("cpu")),
    )
    scaled.native.cache_clear()  # what it says is of one GPU
    scaled.multiply(given, weight, new(outputs, dtype=F32), dtype, tiling, room, by_chip=scaled.native())
    scaled.unpack(weight, x, 0)
    scaled.unpack(weight, x, 0, new(rows, dtype=torch.int64))


def through_experts(
    tokens: int,
    count: int,
    chosen: int,
    width: int,
    inner: int,
    dtype: torch.dtype = BF16,
    tilings: experts.Tilings | None = None,
    clamp: Clamp | None = None,
) -> None:
    choice, shares = experts.route(new(tokens, count, dtype=F32), chosen, over_chosen=True)
    # of one expert alone: nobody reads them, but they are allocated
    layer = experts.TritonExperts(
        new(1, inner, width, dtype=dtype).expand(count, -1, -1),
        new(1, inner, width, dtype=dtype).expand(count, -1, -1),
        new(1, width, inner, dtype=dtype).expand(count, -1, -1),
        here.shared_bytes,
        None if clamp is None else (new(count, inner), new(count, inner), new(count, width)),
        clamp,
    )
    layer.cut(new(tokens, width, dtype=dtype), choice, shares, tilings or layer.tilings(tokens, chosen))


def coded_weight(count: int, outputs: int, width: int, codes: int, group: int, dtype: torch.dtype) -> coded.Coded:
    bits = 8 if codes in (coded.INT8, coded.FP8) else 4
    words = new(1, outputs, width * bits // 16, dtype=torch.int16).expand(count, -1, -1)
    if codes == coded.INT8:
        scales = new(count, outputs, dtype=F32)
    elif codes == coded.FP8:
        scales = new(count, outputs // group, -(-width // 128), dtype=F32)
    else:
        scales = new(count, width // group, outputs, dtype=torch.uint8 if codes == coded.MXFP4 else BF16)
    return coded.Coded(words, scales, codes, group, dtype, (count, outputs, width))


FORMS = ((coded.INT8, 0), (coded.FP8, 128), *((coded.INT4, group) for group in (32, 64, 128)))
GPT_OSS = 32, 4, 2880, 2880, coded.MXFP4, 32


def through_coded_experts(
    tokens: int,
    count: int,
    chosen: int,
    width: int,
    inner: int,
    codes: int,
    group: int = 0,
    dtype: torch.dtype = BF16,
    clamp: Clamp | None = None,
) -> None:
    """With a `clamp` there are biases."""
    choice, shares = experts.route(new(tokens, count, dtype=F32), chosen, over_chosen=True)
    each = partial(coded_weight, count, codes=codes, group=group, dtype=dtype)
    layer = experts.CodedExperts(
        each(inner, width),
        each(inner, width),
        each(width, inner),
        here.shared_bytes,
        None if clamp is None else (new(count, inner), new(count, inner), new(count, width)),
        clamp,
    )
    layer.cut(new(tokens, width, dtype=dtype), choice, shares, layer.tilings(tokens, chosen))


def grouped(tiling: experts.Tiling, gated: bool) -> None:
    choice, weight = new(300, 8, dtype=torch.int64), new(1, 768, 2048).expand(128, -1, -1)
    plan = experts.Plan.of(choice, 128, tiling.rows)
    experts.grouped(new(2400, 2048), weight, weight if gated else None, choice, plan, tiling)


def attend(
    counts: list[int],
    cached: int,
    kv_heads: int,
    group: int,
    head: int,
    chip: Chip,
    window: int | None,
    kept: torch.dtype = BF16,
    softcap: float | None = None,
    sinks: bool = False,
    number: torch.dtype = BF16,
) -> None:
    blocks = -(-(cached + max(counts)) // 16)
    batch = PagedBatch.build(
        starts=[cached] * len(counts),
        query_lens=counts,
        block_tables=[range(blocks)] * len(counts),
        logits=[1] * len(counts),
        block_size=16,
    )
    held = head + 4 if kept in LARGEST else head
    cache, query = (
        new(2, blocks, 16, kv_heads, held, dtype=kept),
        new(sum(counts), kv_heads * group, head, dtype=number),
    )
    of_heads = new(kv_heads * group, dtype=F32) if sinks else None
    StepAttention(batch, window, on_this(chip), COUNTED, softcap)(query, cache, 1.0, of_heads)


def prepare(groups: int) -> None:
    tables = new(groups, 8, 64, dtype=torch.int32)
    buffers = step.StepBuffers.allocate(4, tables, 16, 1024, torch.device("cpu"))
    step.prepare(buffers, tables, new(8, dtype=torch.int32))
    mixed = step.MixedBuffers.allocate(100, 5, tables, 16, 1024)
    step.prepare_mixed(mixed, tables, new(8, dtype=torch.int32))
    attention = StepAttention(mixed.batches[0], None, here, COUNTED)
    attention(new(100, 8, 64), new(2, 9, 16, 2, 64), 1.0)


LAUNCHES: list[Callable[[], Any]] = [
    lambda: norm.rms_norm(new(3, 4096), new(4096), 1e-6, PLAIN),
    lambda: norm.add_rms_norm(new(3, 4096), new(3, 4096), new(4096), 1e-6, PLAIN),
    lambda: place_heads(32, 8, 128, normed=False),
    lambda: place_heads(16, 8, 128, normed=True),
    lambda: place_heads(16, 8, 128, normed=True, kept=torch.int8),
    lambda: place_heads(16, 8, 128, normed=True, kept=E4M3),
    lambda: gate.silu_mul(new(3, 2 * 14336), PLAIN),
    lambda: gate.gelu_mul(new(3, 2 * 9216), PLAIN),
    lambda: gate.gelu_mul(new(3, 2 * 9216), ROUNDED),
    lambda: norm.add_rms_norm(new(3, 2304), new(3, 2304), new(2304, dtype=F32), 1e-6, PLAIN),
    lambda: tokens.cap_logits(new(3, 256000, dtype=F32), 30.0),
    lambda: draw(8, 256000, BF16, 30.0),
    lambda: rotation.turns(new(3, dtype=torch.int64), new(64, dtype=F32), 1.0),
    lambda: tokens.largest(new(3, 151936, dtype=F32)),
    lambda: tokens.mask_tokens(
        new(3, 151936, dtype=F32), new(2, dtype=torch.int64), new(2, 18992, dtype=torch.uint8)
    ),
    lambda: draw(8, 151936, BF16),
    lambda: multiply(1, 4096, 4096),
    lambda: multiply(7, 4096, 4096),
    lambda: multiply(7, 1024, 1024, dtype=F32),
    lambda: norm.add_rms_norm(new(3, 4096), new(3, 4096), new(4096), 1e-6, ROUNDED),
    lambda: gate.silu_mul(new(3, 2 * 14336), ROUNDED),
    lambda: multiply_quantized(1, 4096, 4096, 0, 1),
    lambda: multiply_quantized(8, 4096, 4096, 32, 2),
    lambda: norm.add_rms_norm(new(3, 4096), new(3, 4096), new(4096), 1e-6, IN_FLOATS),
    lambda: gate.silu_mul(new(3, 2 * 14336), IN_FLOATS),
    lambda: multiply_scaled(8, 4096, 4096, rounds=True),
    lambda: multiply_scaled(8, 4096, 4096, rounds=False),
    lambda: attend([1] * 2, 999, 8, 4, 128, H200, None),
    lambda: attend([1] * 64, 999, 8, 2, 128, H200, None),
    lambda: attend([1, 40], 99, 8, 4, 128, A100, None),
    lambda: attend([1, 40], 99, 8, 4, 128, H200, None, torch.int8),
    lambda: in_words(partial(attend, [1] * 64, 999, 8, 4, 128, H200, None, torch.int8)),
    lambda: attend([1, 40], 99, 8, 4, 128, A100, None, E4M3),
    lambda: in_words(partial(attend, [1] * 64, 999, 8, 4, 128, H200, None, E4M3)),
    lambda: attend([1, 40], 99, 8, 2, 256, H200, None, softcap=50.0),  # Gemma 2
    lambda: attend([1, 40], 99, 8, 8, 64, H200, 128, sinks=True),  # gpt-oss
    lambda: attend([1, 40], 99, 2, 4, 256, H200, None, F32, number=F32),
    lambda: prepare(1),
    lambda: through_experts(32, 128, 8, 2048, 768),
    lambda: through_experts(32, 32, 4, 2880, 2880, clamp=Clamp(1.702, 7.0)),
    lambda: unpacked(partial(through_coded_experts, 32, 128, 8, 2048, 768, coded.INT8), 16),
    lambda: unpacked(partial(through_coded_experts, 32, 128, 8, 2048, 768, coded.FP8, 128), 16),
    lambda: unpacked(partial(through_coded_experts, 32, 128, 8, 2048, 768, coded.INT4, 32), 8),
    lambda: unpacked(partial(through_coded_experts, 32, *GPT_OSS, clamp=Clamp(1.702, 7.0)), 8),
]
MORE: list[Callable[[], Any]] = [
    lambda: norm.rms_norm(new(3, 80), new(80), 1e-6, PLAIN),
    lambda: norm.rms_norm(new(3, 16384, dtype=F32), new(16384, dtype=F32), 1e-6, PLAIN),
    lambda: norm.add_rms_norm(new(3, 896), new(3, 896), new(896), 1e-6, PLAIN),
    lambda: place_heads(14, 2, 64, normed=False),
    lambda: place_heads(5, 1, 96, normed=True),
    lambda: place_heads(8, 8, 256, normed=True),
    lambda: place_heads(4, 1, 256, normed=True, norm=F32),
    lambda: gate.silu_mul(new(3, 130), PLAIN),
    lambda: tokens.largest(new(3, 1001, dtype=F32)),
    lambda: draw(1, 1001, F32),
    lambda: draw(256, 128256, F32),
    lambda: multiply(1, 1000, 900),
    lambda: multiply(16, 151936, 1024),
    *(
        partial(multiply_quantized, rows, outputs, width, size, planes, dtype)
        for rows, outputs, width, dtype in (
            (1, 28672, 4096, BF16),
            (32, 4096, 14336, BF16),
            (256, 28672, 4096, BF16),
            (20, 1001, 896, torch.float16),
        )
        for size, planes in ((0, 1), (0, 2), (32, 2), (64, 2), (128, 2))
    ),
    *(
        partial(multiply_scaled, rows, outputs, width, rounds=rounds, shared=shared, dtype=dtype)
        for rows, outputs, width, shared, dtype in (
            (1, 28672, 4096, 128, BF16),
            (32, 4096, 14336, 128, BF16),
            (64, 6144, 4096, 128, BF16),
            (128, 28672, 4096, 128, BF16),
            (256, 28672, 4096, 128, BF16),
            (20, 1001, 900, 1, torch.float16),
        )
        for rounds in (True, False)
    ),
    lambda: norm.rms_norm(new(3, 80), new(80), 1e-6, IN_FLOATS),
    *(
        partial(attend, counts, 999, *heads, chip, window)
        for counts in ([1], [1] * 64, [1, 40])
        for heads in ((8, 4, 128), (2, 7, 64), (1, 8, 256), (3, 1, 80))
        for chip in (H200, A100)
        for window in (None, 100)
    ),
    *(
        partial(attend, counts, 999, *heads, H200, window, E4M3)
        for counts in ([1], [1, 40])
        for heads in ((2, 7, 64), (1, 8, 256), (3, 1, 80))
        for window in (None, 100)
    ),
    *(
        partial(attend, counts, 999, *heads, chip, window, kept, *bent)
        for counts in ([1], [1, 40])
        for heads, window, *bent in (
            ((4, 2, 256), 4096, 50.0, False),
            ((16, 2, 128), None, 50.0, False),
            ((8, 8, 64), None, None, True),
            ((2, 7, 80), 100, 50.0, True),
        )
        for chip, kept in ((H200, BF16), (A100, torch.int8), (H200, E4M3))
    ),
    partial(prepare, 3),
    *(partial(through_experts, tokens, 128, 8, 2048, 768) for tokens in (1, 256, 2048)),
    *(partial(through_experts, tokens, 8, 2, 4096, 14336) for tokens in (1, 8, 32, 64, 256, 2048)),
    *(partial(through_experts, tokens, 5, 3, 100, 70, F32) for tokens in (1, 64)),
]
CANDIDATES: list[Callable[[], Any]] = [
    *(partial(through_coded_experts, tokens, *GPT_OSS, clamp=Clamp(1.702, 7.0)) for tokens in (1, 64, 2048)),
    *(
        partial(through_coded_experts, tokens, 8, 2, 4096, 14336, *form)
        for tokens in (1, 64, 2048)
        for form in FORMS
    ),
    *(
        partial(through_coded_experts, tokens, 5, 3, 96, 352, *form, dtype)
        for tokens in (1, 64)
        for form in ((coded.INT8, 0), (coded.FP8, 32), (coded.INT4, 32), (coded.MXFP4, 32))
        for dtype in (F32, torch.float16)
    ),
    *(
        partial(grouped, tiling, gated)
        for gated in (True, False)
        for tiling in (experts.DOWN, experts.GATED)[gated]
    ),
    *(partial(multiply, 1, 6144, 4096, tiling) for tiling in product.ONE_ROW),
    *(partial(multiply, 16, 6144, 4096, tiling) for tiling in product.FEW_ROWS),
]
"""Tilings that are tried where somebody sweeps: one that does not fit a card is left out."""


class Nowhere:
    """A driver for one GPU of the given compute capability, on which nothing runs."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


PTX: list[str] = []
"""Of the kernels compiled so far."""


WRITES = re.compile(r"\b(?:st|atom|red)\.global\S*")


def compile_only(kernel: Any, grid: Any) -> Callable[..., Any]:
    def launched(*args: Any, **options: Any) -> None:
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        ptx = compiled.asm["ptx"]
        PTX.append(ptx)
        if compiled.metadata.shared > here.shared_bytes:
            raise RuntimeError(f"{compiled.metadata.name} shares {compiled.metadata.shared} bytes, too many here")
        if options.get("launch_pdl"):
            in_order(kernel.__name__, ptx)

    return launched


def in_order(name: str, ptx: str) -> None:
    """Raises unless a kernel that may begin while the one before it ends has waited for that before it writes,
    lets the next one begin, or returns."""
    before, waits, _ = ptx.partition("griddepcontrol.wait")
    if not waits:
        raise RuntimeError(f"{name} never waits for the kernel before it")
    early = [*WRITES.findall(before), *re.findall(r"griddepcontrol\.launch_dependents|\bret;", before)]
    if early:
        raise RuntimeError(f"{name} does not wait for the kernel before it: {early[0]}")


def in_words(start: Callable[[], Any]) -> None:
    """Raises if a kernel of this launch reads bytes from shared memory."""
    before = len(PTX)
    start()
    if len(PTX) == before or any(re.search(r"ld\.shared\S*\.[bsu]8\b", ptx) for ptx in PTX[before:]):
        raise RuntimeError("values go byte by byte")


MASKS = "0x007f007f", "0x07f007f0", "0x000f000f", "0x01c001c0"
"""Of the instructions that unpack int8, fp8, int4 and MXFP4 as bfloat16."""


def unpacked(start: Callable[[], Any], copied: int) -> None:
    """Raises if weights of this launch do not come from memory in copies of so many bytes, or go byte by byte."""
    before = len(PTX)
    start()
    found = [ptx for ptx in PTX[before:] if any(mask in ptx for mask in MASKS)]
    if len(found) != 2:
        raise RuntimeError(f"{len(found)} products unpack codes")
    for ptx in found:
        if not re.search(rf"cp\.async\.\S+ \[.*\], \[.*\], {copied:#x}\b", ptx):
            raise RuntimeError(f"words do not come {copied} bytes at a time")
        if re.search(r"(ld|st)\.shared\S*\.[bsu]8\b", ptx):
            raise RuntimeError("codes go byte by byte")


def main() -> int:
    global here
    every = "--every" in sys.argv
    failed = 0
    KernelInterface.__getitem__ = compile_only
    for capability in (int(word) for word in sys.argv[1:] if word != "--every"):
        triton.runtime.driver.set_active(Nowhere(capability))
        launch.dependent.cache_clear()  # what it says is of one GPU
        defaults = LAUNCHES + MORE * every
        for number, start in enumerate(defaults + CANDIDATES * every):
            here = CARDS[capability] if number < len(defaults) else ROOMIEST
            try:
                start()
            except Exception as error:  # noqa: BLE001 - all that fail are to be told
                failed += 1
                print(f"sm_{capability}, launch {number}: {type(error).__name__}: {error}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
