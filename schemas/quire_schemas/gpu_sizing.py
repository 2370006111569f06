"""What an engine holds on a GPU besides weights and cache, part by part. Pure, no I/O.

    table        the request table and the room that draws need: `resident.table`, `triton.sample`
    buffers      the inputs of each shape of step that is a program, from its first use on: `resident.program`
    workspaces   cuBLAS's own, one for the stream of launched steps and one for that of captures
    step         the widest moment of the widest launched step
    general      what a step by way of the host takes more than that, where it does
    graphs       what captured steps share, and keep: the widest of them
    loading      what quantizing a weight takes more than all of these, which are not there yet then

A launched step gives its memory back to torch's allocator and the next one takes it again, so what counts is the
moment at which most is alive at once. The order of things is that of `models.decoder`: the residual, the normed
input, cosines and sines lie there all through; the results of a layer's heads until the next layer has its own.

    attention    queries, keys and values as projected; the queries, rotated; the results
    mlp          both halves of the gate beside their product, or that beside what comes out
    experts      of each token's experts what is inside beside what comes out and the sums
    head         of R rows the logits in the model's number format, and nothing of the layers any more

A step by way of the host (`runner`: penalties, grammars, log-probabilities and the like) has the layers of a
launched one, and then of R rows the logits in float32, with all that the torch sampler makes of them.

`graphs` counts each kind of tensor once at its full size, as if nothing could take its place: memory that is
captured is given out anew to the next shape, but in pieces that need not suit.

What goes into a product with a quantized weight may have its codes beside it from the start (`triton.rounding`).
Such a product has, besides its input and what comes out (`triton.quantized`): the codes of its
input, and partial sums, if it is cut into splits; or some outputs of the weight unpacked for cuBLAS. In fp8 it is
the same (`triton.scaled`), but that an input which is not rounded has no codes.

Legend: T tokens of a step, R rows that get logits, S seats (the most sequences), X groups of layers, V vocabulary,
e bytes of a number.
"""

from __future__ import annotations

import functools

from quire_schemas.checkpoint import ExpertsProfile, ModelProfile, expected_tensors
from quire_schemas.fp8 import BLOCK
from quire_schemas.quantization import QUANTIZED_AT_A_TIME, is_quantized, quantized_bytes
from quire_schemas.wire import Quantization

MIB = 1 << 20
CONTEXT = 832 * MIB
"""Outside of torch's allocator: the CUDA context, libraries, the kernels that they and we load. On an H200 with
torch 2.11 for CUDA 13 812 to 818 MiB: `device_used_mib` less `reserved_mib` in benchmarks/results/gpu.jsonl."""
SLACK = 448 * MIB
"""Inside it: pieces too small for what comes next."""
WORKSPACE = 32 * MIB
"""Of cuBLAS for a stream, on a Hopper; less on others."""

CAPTURED_TOKENS = 2048
"""T of the largest mixed step that is a program (`quire_engine.resident.program.MIXED_TOKENS`)."""
DECODE_SHAPES = 40
"""At least the number of decode shapes."""
MIXED_SHAPES = 32
"""At least the number of mixed shapes: sizes by tokens times sizes by items."""
HEAD_ROWS = 64
"""Rows that have logits at a time in a step that goes by way of the host."""
SPLIT_PAIRS = 768
"""Pairs of a sequence and a key/value head times splits, when there is more than one split: no more than 4 for
each multiprocessor (`quire_kernels.triton.attention.num_splits`), of which no GPU yet has more than 192."""

SCRATCH_BYTES, ROOM_BYTES, MANY_ROWS, MOST_TILES = 32 * MIB, 16 * MIB, 1024, 4096
"""Of `quire_kernels.triton.quantized`."""
_QUANTIZING_BYTES = 24
"""Of each number that is quantized: as the file has it, and some copies in float32."""

_TILE, _LANES, _LIST, _PROGRAMS = 4096, 1024, 4096, 1024
"""Of `quire_kernels.triton.sample`."""
LEAST_ROWS, AT_ONCE = 16, 1 << 27
"""Of `quire_kernels.triton.experts`."""
_TABLE_ROW = 4 + 4 + 4 + 4 + 4 + 8
"""Last token and how it is drawn, for each row of the request table."""
_SAMPLER_BYTES = 72
"""Per logit, at the widest point of the torch sampler: what it takes on a CPU, and what CUDA's sorts take more."""
_ALLOCATION = 512
"""Every tensor is rounded up to it."""


def gpu_parts(
    profile: ModelProfile,
    groups: int,
    *,
    number: int,
    tokens: int,
    seats: int,
    width: int,
    captures: bool,
    quantization: Quantization | None = None,
) -> dict[str, int]:
    """Bytes of each part. `number` is e; `tokens` and `seats` bound a step; `width` is blocks of the longest
    sequence; `captures`: whether steps are captured.
    """
    # a decode step is filled up to all seats, a mixed one to a size that is captured
    captured = min(CAPTURED_TOKENS, _filled(tokens))
    widest = max(tokens, seats, captured)
    inputs = groups * ((2 * widest + seats) * 8 + seats * (width + 2) * 4) + widest * 8 + seats * 24
    # experts have room of their own, whatever they are kept in
    linear = None if quantization is None or quantization.method == "mxfp4" else quantization
    step = _peak(profile, number, widest, seats, linear)
    graphs = _each(profile, number, max(captured, seats), seats, linear) if captures else 0
    parts = {
        "table": groups * 2 * seats * width * 4 + 2 * seats * _TABLE_ROW + _scratch(profile, seats),
        "buffers": _buffers(groups, captured, seats),
        "workspaces": (2 if captures else 1) * WORKSPACE,
        "step": inputs + step,
        "general": max(_general(profile, number, tokens, min(tokens, seats, HEAD_ROWS), linear) - step, 0),
        "graphs": graphs,
    }
    if linear is not None:
        parts["table"] += MOST_TILES * 4
    if quantization is not None:
        parts["loading"] = max(loading_bytes(profile, quantization) - sum(parts.values()), 0)
    return parts


def _filled(tokens: int) -> int:
    """T of the mixed shape that so many tokens are put into, at most."""
    grain = 64 if tokens <= 512 else 128 if tokens <= 1024 else 256
    return -(-tokens // grain) * grain


def _scratch(profile: ModelProfile, seats: int) -> int:
    programs = min(seats * -(-profile.vocab_size // _TILE), max(seats, _PROGRAMS))
    return programs * (3 * 4 + 2 * 4 + _LANES * 4) + seats * _LIST * 8


def _buffers(groups: int, captured: int, seats: int) -> int:
    decode = seats * (32 + 12 + groups * (8 + 8 + 12)) + 8 * _ALLOCATION
    mixed = captured * (20 + groups * 8) + seats * 44 + 12 * _ALLOCATION
    return DECODE_SHAPES * decode + MIXED_SHAPES * mixed


def _split_parts(profile: ModelProfile) -> int:
    """Of decode attention, in float32: results of each split, with maximum and sum."""
    members = profile.num_heads // profile.num_kv_heads
    return SPLIT_PAIRS * members * (profile.head_dim + 2) * 4


@functools.lru_cache(maxsize=32)  # as `sizing.weight_bytes`: no context changes it
def loading_bytes(profile: ModelProfile, quantization: Quantization) -> int:
    """A piece that is quantized; or a weight in 4 bits beside itself in the order of the kernels, and a piece on
    its way there. Experts in MXFP4 are put in order where they lie."""
    if quantization.method == "mxfp4":
        return 32 * MIB
    shapes = [
        shape for name, shape in expected_tensors(profile) if is_quantized(profile, name, shape, quantization)
    ]
    least = BLOCK if quantization.method == "fp8" else 1
    piece = max(QUANTIZED_AT_A_TIME, least * max((inputs for _, inputs in shapes), default=1)) * _QUANTIZING_BYTES
    if quantization.group_size is None:
        return piece
    # outputs of projections that are fused lie in one weight
    largest = max(quantized_bytes(quantization, *shape) for shape in [*shapes, *_fused(profile)])
    return largest + max(piece, 32 * MIB)


def _fused(profile: ModelProfile) -> list[tuple[int, int]]:
    hidden = profile.hidden_size
    return [(profile.q_size + 2 * profile.kv_size, hidden), (2 * profile.intermediate_size, hidden)]


def _codes(quantization: Quantization | None, rows: int, inputs: int) -> int:
    """Of rows that go into a product with a quantized weight: one plane, or two of rows that are not many. With
    weights in fp8 a row that is not rounded has none."""
    if quantization is None:
        return 0
    if quantization.method == "fp8":
        return rows * (inputs + 4 * -(-inputs // BLOCK)) if quantization.activations == "fp8" else 0
    if quantization.activations == "int8":
        return rows * (inputs + 4)
    return min(rows, MANY_ROWS) * (2 * inputs + 4)


def _multiplying(quantization: Quantization | None, e: int, rows: int, inputs: int) -> int:
    """What a product of `rows` rows holds besides them and its result."""
    if quantization is None:
        return 0
    # a tile is given to at most twice the multiprocessors, and has 128 outputs and up to 128 rows of codes
    sums = min(ROOM_BYTES, 384 * 128 * min(max(4 * rows, 16), 128) * 4)
    coded = _codes(quantization, rows, inputs) + sums
    return coded if quantization.activations in ("int8", "fp8") else max(coded, SCRATCH_BYTES, 256 * inputs * e)


def _peak(profile: ModelProfile, e: int, tokens: int, rows: int, quantization: Quantization | None) -> int:
    """The most that a forward pass and what follows it hold at once."""
    hidden, inner, q, kv = profile.hidden_size, _dense_size(profile), profile.q_size, profile.kv_size
    through = tokens * (2 * hidden * e + profile.num_ropes * 2 * profile.head_dim * 4)
    attention = tokens * (4 * q + 2 * kv) * e + _split_parts(profile)
    attention = max(attention, tokens * (2 * q + 2 * kv) * e + _multiplying(quantization, e, tokens, hidden))
    output = tokens * (q + 2 * hidden) * e + _multiplying(quantization, e, tokens, q)
    up = 2 * inner * e * tokens + _multiplying(quantization, e, tokens, hidden)
    down = (inner + hidden) * e * tokens + _multiplying(quantization, e, tokens, inner)
    gate = 3 * inner * e * tokens + _codes(quantization, tokens, inner)
    mlp = tokens * q * e + max(gate, tokens * 2 * hidden * e + _codes(quantization, tokens, hidden), up, down)
    rotary = tokens * profile.head_dim * 6  # before there is anything else of a layer
    if profile.experts is not None:
        chosen, routed, products = _routed(profile, profile.experts, e, tokens)
        # the norm before them rounds for whoever may want it
        coded = _codes(quantization, tokens, hidden)
        some = tokens * q * e + coded + max(routed, chosen + tokens * hidden * e + products)
        mlp = max(mlp if inner else 0, some)
    layer = through + max(attention, output, mlp, rotary)
    states = rows * 3 * hidden * e
    return max(layer, states + rows * profile.vocab_size * e + _multiplying(quantization, e, rows, hidden))


def _general(profile: ModelProfile, e: int, tokens: int, rows: int, quantization: Quantization | None) -> int:
    """The most that is there after the layers when the host draws. Of prompts that are scored all rows have
    states.
    """
    states = (2 * tokens + rows) * profile.hidden_size * e + _codes(quantization, tokens, profile.hidden_size)
    return states + rows * profile.vocab_size * (e + _SAMPLER_BYTES)


def _each(profile: ModelProfile, e: int, tokens: int, rows: int, quantization: Quantization | None) -> int:
    """Every kind of tensor of a forward pass and its head, each once."""
    hidden, inner, q, kv = profile.hidden_size, _dense_size(profile), profile.q_size, profile.kv_size
    numbers = (8 if profile.post_norms else 6) * hidden + (q + 2 * kv) + 3 * q + 3 * inner
    rotary = profile.num_ropes * tokens * profile.head_dim * 14
    last = rows * (q + 2 * hidden) * e  # the rows that go on from the last attention
    products = sum(_multiplying(quantization, e, tokens, inputs) for inputs in (hidden, q, inner))
    products += _multiplying(quantization, e, rows, hidden)
    if profile.experts is not None:
        products += sum(_routed(profile, profile.experts, e, tokens))
    return tokens * numbers * e + rotary + last + _split_parts(profile) + rows * profile.vocab_size * e + products


def _dense_size(profile: ModelProfile) -> int:
    """Width inside of the MLPs that are no experts; 0 if there are none."""
    return 0 if profile.experts is not None and all(profile.experts.layers) else profile.intermediate_size


def _routed(profile: ModelProfile, experts: ExpertsProfile, e: int, tokens: int) -> tuple[int, int, int]:
    """Of a layer of experts: choices and shares; logits, and these; who goes where, and the products of as many
    tokens as are there at once."""
    inner, count = experts.intermediate_size + profile.hidden_size, experts.num_experts_per_tok
    chosen = tokens * count * (8 + 4)
    logits = tokens * experts.num_experts * (e + (4 if e < 4 else 0))
    pairs = min(tokens, max(1, AT_ONCE // (count * inner))) * count
    tiles = pairs // LEAST_ROWS + experts.num_experts
    return chosen, chosen + logits, tiles * 12 + pairs * (4 + 4) + pairs * inner * e + 5 * _ALLOCATION
