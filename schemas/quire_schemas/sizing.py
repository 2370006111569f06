"""The one arithmetic of memory: weights, KV cache and activations of a model on a device. Pure, no I/O.

`platform plan` prints what `fit` says and an engine allocates by it, so what was shown is what is taken.

    limit   = min(share × device, what is free, the declared memory limit)
    KV room = limit − weights − activations − overhead
    blocks  = ⌊KV budget / bytes of a block⌋
    a block = block size × layers of a group × 2 × max(1, KV heads / tensor parallel) × bytes of a head

A head of a key or value takes its size times the bytes of a number; in int8 and fp8 that is 1, and 4 more are its
scale.

Layers that see the same keys form a group, and a block holds some tokens of one group (`kv_groups`). A model whose
layers are of one kind is one group, so that a block holds all layers. A group whose layers see only a window keeps
no more blocks of a sequence than the window and one step touch (`blocks_held`).

The KV budget is `kv_size` if declared; else on a GPU all the room; else, on a CPU, where other programs live, the
least of the room, 4 GiB, what `max_num_seqs` sequences of full length need, and a quarter of the free memory.

Activations are the peak over the stages of one forward pass, counted from the code of `quire_engine` and
`quire_kernels.reference`, or on a GPU from `quire_kernels.triton` and `quire_engine.resident`
(`quire_schemas.gpu_sizing`); the bounds are tested against the bytes that torch really allocates. Legend of that
part: T tokens of a step, R rows that get logits, e bytes of a number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from quire_schemas.adapters import AdapterProfile, even
from quire_schemas.checkpoint import DTYPE_BYTES, ExpertsProfile, ModelProfile, expected_tensors
from quire_schemas.gpu_sizing import CONTEXT, SLACK, gpu_parts
from quire_schemas.quantities import format_bytes
from quire_schemas.quantization import (
    FLOATS,
    GROUP_SIZES,
    QUANTIZED_AT_A_TIME,
    experts_misfit,
    has_coded_experts,
    is_quantized,
    is_wide,
    misfit,
    tensor_bytes,
    widened,
)
from quire_schemas.wire import Quantization, RunnerKind

GIB = 1 << 30
MIB = 1 << 20

GATHER_BYTES = 64 * MIB
"""What the reference kernels copy out of the cache at a time (`quire_kernels.reference.GATHER_BYTES`)."""

MASK_BYTES = 4 * MIB
"""One tile of a prefill's mask, unless 16 rows of it need more."""

KV_SCALE_BYTES = 4
"""Of a head of a key or value in int8 or fp8 (`quire_kernels.reference.bytes.SCALE_BYTES`)."""
KV_BYTES_NUMBERS = 4
"""A head in int8 or fp8 has a multiple of so many numbers, for a scale behind them lies as a float32 does."""
KV_IN_BYTES = ("int8", "fp8")
"""Formats of a byte a number and a scale a head."""

SPLIT_TOKENS = 1024
SPLITS_BYTES = 16 * MIB
"""Keys that native attention takes in one go, and what the results of several such splits take at most until they
are merged (`kSplit` and `kPartials` of `quire_kernels/cpu/native/attention.cpp`)."""

CPU_KV_CAP = 4 * GIB
MIN_AUTO_LEN = 256
"""`maxModelLen: auto` never resolves below this (or the checkpoint's own maximum, if that is smaller)."""

WIDENED = 1 << 22
"""Numbers of a quantized weight that the reference kernels widen at a time (`quire_kernels.reference.product`)."""
_WIDENED_BYTES = 10
"""Of each: float32, and what it is unpacked from."""
_QUANTIZING_BYTES = 24
"""Of each number that is quantized: as the file has it, and some copies in float32."""

_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 32
_SAMPLER_BYTES = 52
"""Per logit, at the widest point of the sampler: float32 copies and the double-precision cumulative sum."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a back-end takes whatever the model is."""

    overhead: int
    why: str


FOOTPRINT: dict[str, Footprint] = {
    "cpu": Footprint(
        384 * MIB, "interpreter, torch's libraries (225 MiB, torch 2.13), kept grammars (64 MiB), allocator slack"
    ),
    "cuda": Footprint(
        CONTEXT + SLACK,
        "CUDA context, libraries and kernels (832 MiB), slack of torch's allocator (448 MiB)",
    ),
}
"""By kind of device."""


@dataclass(frozen=True, slots=True)
class SizingRequest:
    """What a model asks for and what a device has; every size in bytes or tokens. None means auto."""

    dtype: str
    kv_dtype: str
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    device: Literal["cpu", "cuda"]
    device_bytes_total: int
    device_bytes_available: int
    memory_share: float
    max_model_len: int | None = None
    kv_size: int | None = None
    memory_limit: int | None = None
    device_name: str = ""
    chunked_prefill: bool = True
    """Without it a prompt, and with it the context that auto gives, has to fit `max_num_batched_tokens`."""
    runner: RunnerKind = "model"
    """`scripted` has the blocks that the model would have, and neither they nor weights nor activations take
    memory."""
    quantization: Quantization | None = None
    """None: weights in `dtype`."""
    enforce_eager: bool = False
    """On a GPU, no step is captured."""
    adapters: tuple[AdapterProfile, ...] = ()


@dataclass(frozen=True, slots=True)
class CounterOffer:
    """A change, tried and found to fit, of one field of the manifest (or of the device)."""

    field: str
    value: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value}"


@dataclass(frozen=True, slots=True)
class FitReport:
    """The outcome. If it does not fit, the figures are those of the request and `reason` says what is wrong."""

    fits: bool
    reason: str
    request: SizingRequest
    weights: int
    activations: int
    overhead: int
    kv: int
    """Bytes of all blocks."""
    limit: int
    kv_bytes_per_token: int
    num_blocks: int
    max_model_len: int
    windows: tuple[int | None, ...] = (None,)
    """Of each group of layers."""
    adapters: int = 0
    """Bytes of all adapters."""
    notes: tuple[str, ...] = ()
    counter_offers: tuple[CounterOffer, ...] = ()

    @property
    def kv_tokens(self) -> int:
        """Tokens of the longest sequence that all blocks hold; if windows bound it, the context."""
        request, most = self.request, self.num_blocks * self.request.block_size
        if any(self.windows):
            most = min(most, self.max_model_len)
        return longest_held(
            self.windows, self.num_blocks, request.max_num_batched_tokens, request.block_size, most
        )

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks that a sequence of `max_model_len` holds at most."""
        request = self.request
        return blocks_held(self.windows, self.max_model_len, request.max_num_batched_tokens, request.block_size)

    @property
    def room(self) -> int:
        """Bytes that the limit leaves for KV; negative when it leaves none."""
        return kv_room(self.limit, self.weights + self.adapters, self.activations, self.overhead)

    @property
    def concurrency(self) -> float:
        """Sequences of `max_model_len` that the cache holds at once."""
        if any(self.windows):
            return self.num_blocks / self.blocks_per_sequence
        return self.kv_tokens / self.max_model_len

    @property
    def used(self) -> int:
        """Everything together."""
        return self.weights + self.adapters + self.activations + self.overhead + self.kv

    def _blocks(self) -> str:
        blocks = f"{self.num_blocks:,} blocks of {self.request.block_size}"
        sliding = [window for window in self.windows if window is not None]
        if not sliding:
            return f"{blocks} = {self.kv_tokens:,} tokens"
        return (
            f"{blocks}, of which {len(sliding)} of {len(self.windows)} groups of layers keep {sliding[0]:,} tokens"
        )

    def lines(self) -> list[str]:
        """The arithmetic as printable lines."""
        request = self.request
        name = request.device_name or {"cpu": "this machine's memory", "cuda": "the GPU"}[request.device]
        limit = f"{format_bytes(self.limit)} ({_limit_reason(request)}, {name})"
        numbers = "" if request.quantization is None else f" ({request.quantization})"
        parts = [
            f"weights {format_bytes(self.weights)}{numbers}",
            *([f"adapters {format_bytes(self.adapters)}"] if request.adapters else []),
            f"activations {format_bytes(self.activations)}",
            f"overhead {format_bytes(self.overhead)}",
        ]
        if not self.fits:
            taken = self.used - self.kv
            return [
                f"Memory   {' + '.join(parts)} = {format_bytes(taken)} of {limit}",
                f"         does not fit: {self.reason}",
                *(f"         instead, for example  {offer}" for offer in self.counter_offers),
            ]
        return [
            f"Memory   {' + '.join(parts)} + KV {format_bytes(self.kv)} = {format_bytes(self.used)} of {limit}",
            f"         KV {format_bytes(self.kv_bytes_per_token)} a token; {self._blocks()} = "
            f"{self.concurrency:.1f} sequences of {self.max_model_len:,}",
            *(f"         ⚠ {note}" for note in self.notes),
        ]


# ── the parts ─────────────────────────────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=32)  # experts are thousands of tensors, and a fit tries many contexts
def weight_bytes(profile: ModelProfile, dtype: str, quantization: Quantization | None = None) -> int:
    """What the engine's parameters hold, exactly: in `dtype`, but for those that are quantized."""

    def number(name: str) -> int:
        """Bytes of one, of what is not quantized."""
        wide = name.endswith(".sinks") or (profile.norms_add_one and name.endswith("norm.weight"))
        wide = wide or (quantization is not None and is_wide(profile, name, quantization))
        return 4 if wide else DTYPE_BYTES[dtype]

    return sum(
        tensor_bytes(profile, name, shape, quantization)
        if quantization is not None and is_quantized(profile, name, shape, quantization)
        else math.prod(shape) * number(name)
        for name, shape in expected_tensors(profile)
    )


MOST_GROUPS = 8
"""More groups cost more time a step than the padding that they save is worth."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers, by number, that share a block table. `window`: tokens that they see back; None for all."""

    window: int | None
    layers: tuple[int, ...]


def kv_groups(profile: ModelProfile) -> tuple[KVGroup, ...]:
    """The groups of a model's layers: equally large but for padding, each of one kind, full ones first.

    The size of a group is what wastes the fewest layers to padding, then what makes the fewest groups.
    """
    kinds = sorted(set(profile.layer_kinds), key=lambda kind: (kind != "full", kind))
    members = [[at for at, other in enumerate(profile.layer_kinds) if other == kind] for kind in kinds]

    def groups(size: int) -> int:
        return sum(-(-len(layers) // size) for layers in members)

    sizes = range(1, max(map(len, members)) + 1)
    size = min(
        (size for size in sizes if groups(size) <= max(MOST_GROUPS, len(kinds))),
        key=lambda size: (size * groups(size), groups(size)),
    )
    return tuple(
        KVGroup(profile.sliding_window if kind == "sliding" else None, tuple(layers[at : at + size]))
        for kind, layers in zip(kinds, members, strict=True)
        for at in range(0, len(layers), size)
    )


def group_size(groups: Iterable[KVGroup]) -> int:
    """Layers that a block has room for."""
    return max(len(group.layers) for group in groups)


def kv_head_bytes(head_dim: int, kv_dtype: str) -> int:
    """What the cache keeps of a key or a value of one head."""
    return head_dim + KV_SCALE_BYTES if kv_dtype in KV_IN_BYTES else head_dim * DTYPE_BYTES[kv_dtype]


def kv_misfit(profile: ModelProfile, kv_dtype: str, device: str) -> str:
    """Why keys and values of a model cannot be in that number format on `device`; empty if they can."""
    if kv_dtype == "fp8" and device == "cpu":
        return "fp8 keys and values are kept on GPUs alone, and this model runs on a CPU"
    if kv_dtype in KV_IN_BYTES and profile.head_dim % KV_BYTES_NUMBERS:
        return f"the head size {profile.head_dim} is no multiple of {KV_BYTES_NUMBERS}, as {kv_dtype} keys need"
    return ""


def kv_block_bytes(profile: ModelProfile, kv_dtype: str, block_size: int, tensor_parallel: int = 1) -> int:
    """Keys and values of `block_size` tokens in the layers of one group, on one of `tensor_parallel` ranks."""
    heads = max(1, profile.num_kv_heads // tensor_parallel)
    return block_size * group_size(kv_groups(profile)) * 2 * heads * kv_head_bytes(profile.head_dim, kv_dtype)


def kv_bytes_per_token(profile: ModelProfile, kv_dtype: str, tensor_parallel: int = 1) -> int:
    """What a token takes that all layers see, on one of `tensor_parallel` ranks."""
    return len(kv_groups(profile)) * kv_block_bytes(profile, kv_dtype, 1, tensor_parallel)


def blocks_held(windows: Iterable[int | None], num_tokens: int, chunk: int, block_size: int) -> int:
    """Blocks that a sequence of `num_tokens` holds at most if a step computes `chunk` of them.

    `windows` has the window of each group. A token sees `window - 1` before it; the block in which the first of
    them lies may have begun just before.
    """
    whole = -(-num_tokens // block_size)
    return sum(
        whole if window is None else min(whole, -(-(window - 1 + chunk) // block_size) + 1) for window in windows
    )


def longest_held(windows: Sequence[int | None], num_blocks: int, chunk: int, block_size: int, most: int) -> int:
    """Tokens, up to `most`, of the longest sequence that `num_blocks` hold."""
    low, high = 0, most
    while low < high:
        middle = -(-(low + high) // 2)
        if blocks_held(windows, middle, chunk, block_size) <= num_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def activation_bytes(
    profile: ModelProfile,
    dtype: str,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    *,
    device: str = "cpu",
    quantization: Quantization | None = None,
    block_size: int = _SMALLEST_BLOCK,
    enforce_eager: bool = False,
) -> int:
    """An upper bound of what one step holds besides weights and cache, sampling included; and of what quantizing a
    weight does, which comes before any step. `block_size` and `enforce_eager` count on a GPU alone."""
    if device == "cuda":
        parts = gpu_activations(
            profile,
            dtype,
            max_num_batched_tokens,
            max_num_seqs,
            max_model_len,
            block_size=block_size,
            enforce_eager=enforce_eager,
            quantization=quantization,
        )
        return sum(parts.values())
    tokens, e = max_num_batched_tokens, DTYPE_BYTES[dtype]
    hidden, q, kv, experts = profile.hidden_size, profile.q_size, profile.kv_size, profile.experts
    inner = 0 if experts is not None and all(experts.layers) else profile.intermediate_size
    widest = inner if experts is None else max(inner, experts.intermediate_size)
    wide = 4 if e < 4 else 0  # a float32 copy, where the number format is not float32 already
    rows = min(tokens, max_num_seqs)
    length = max_model_len + 2 * _LARGEST_BLOCK

    # all through: the residual, the normed input, cosines and sines; addresses at 8 bytes, tables twice
    base = tokens * (2 * hidden * e + (2 + 2 * profile.num_ropes) * profile.head_dim * 4 + 64)
    base += rows * (length * 12 + 64)  # blocks of one slot are the worst case
    kept = max(wide, 0 if quantization is None else 2)  # codes of a row, and where its sums begin
    scratch = tokens * max(hidden, inner, q) * kept  # what native products widen or round; it stays
    if experts is not None:
        scratch = max(scratch, _experts_scratch(profile, experts, tokens, e, quantization))
        base += tokens * (experts.num_experts * 4 + experts.num_experts_per_tok * 12)  # logits, choices, shares
    base += scratch
    if length > SPLIT_TOKENS:
        splits = -(-length // SPLIT_TOKENS)
        base += min(SPLITS_BYTES, tokens * profile.num_heads * splits * (profile.head_dim + 2) * 4)

    def product(count: int, inputs: int, outputs: int) -> int:
        """What a product of `count` rows with a quantized weight holds besides input and result."""
        if quantization is None:
            return 0
        floats = min(WIDENED, inputs * outputs) * _WIDENED_BYTES
        return count * (inputs * (3 * 4 + wide + 1) + outputs * 4 * 4) + floats

    norm = tokens * hidden * (wide + 3 * 4 + e)
    rotary = tokens * ((q + 2 * kv) * e + (q + kv) * (e + wide + 3 * 4))

    token_bytes = 2 * kv * 4
    gather = max(min(GATHER_BYTES, rows * length * token_bytes), length * 2 * profile.head_dim * 4)
    gather += gather // 4  # one of the two beside its stored form
    # what the plan of a step keeps, once for every kind of layer: masks and the places of unused slots
    grouped = min(length, GATHER_BYTES // token_bytes + 1)
    gather += len(set(profile.layer_kinds)) * rows * (grouped * 5 + (512 + length) * 8)
    if profile.attention_softcap is not None or profile.sinks:
        # such scores are written out, up to three times over, and keys or values beside them once for each head
        # that sees them. Of long sequences key heads are taken in turns: keys times key heads of one, at most
        members = profile.num_heads // profile.num_kv_heads
        turn = max(length, min(profile.num_kv_heads * length, GATHER_BYTES // (2 * 4 * profile.head_dim)))
        together = min(rows * length, GATHER_BYTES // token_bytes) * profile.num_kv_heads
        seen = members * max(turn, together)
        tile = min(max(MASK_BYTES // 4, 16 * members * turn), (tokens + 16) * members * turn)
        gather += 3 * 4 * max(seen, tile) + seen * profile.head_dim * 4
    mask = 2 * min(max(MASK_BYTES, 16 * length * 4), (tokens + 16) * length * 4)
    attend = tokens * ((q + 2 * kv) * e + (q + kv) * e + q * (2 * e + 3 * 4) + profile.num_heads * 4)
    qkv = tokens * (q + 2 * kv) * e + product(tokens, hidden, q + 2 * kv)
    attention = max(qkv, rotary, attend + gather + mask)

    mlp = tokens * (q * e + hidden * e + inner * (2 * e + wide + 4 + e))
    mlp += max(product(tokens, hidden, 2 * inner), product(tokens, inner, hidden))
    if experts is not None:
        # one expert after the other, and all tokens may go to one; before that the choice, sorted
        own = experts.intermediate_size
        each = tokens * (hidden * (2 * e + 3 * 4) + own * (3 * e + 4 * 4) + 32)
        each += max(product(tokens, hidden, own), product(tokens, own, hidden))
        routed = tokens * (q * e + hidden * (2 * e + 4))
        mlp = max(mlp, routed + max(each, tokens * experts.num_experts * 28))
    output = tokens * q * e + max(norm + tokens * hidden * e, tokens * hidden * e + product(tokens, q, hidden))
    head = rows * (profile.vocab_size * (e + _SAMPLER_BYTES) + 4 * hidden * 4)
    head = max(head, rows * profile.vocab_size * 4 + product(rows, hidden, profile.vocab_size))
    # native steps are recorded: their buffers stay while a token is drawn
    recorded = _recorded_bytes(profile, tokens, e) - tokens * 2 * hidden * e  # of which two are in `base`
    step = base + max(attention, mlp, output, norm, head, recorded + head)
    if quantization is None:
        return step
    piece = max(hidden, widest, q, min(QUANTIZED_AT_A_TIME, max(profile.vocab_size, widest, q) * hidden))
    return max(step, piece * _QUANTIZING_BYTES)


def adapter_step_bytes(
    profile: ModelProfile, dtype: str, max_num_batched_tokens: int, adapters: Sequence[AdapterProfile]
) -> int:
    """What a step with adapters holds besides, at most: it is computed beside the buffers of the recorded one, and
    its rows are gathered, multiplied twice and put back."""
    if not adapters:
        return 0
    e, tokens = DTYPE_BYTES[dtype], max_num_batched_tokens
    widest = max(profile.hidden_size, profile.q_size, profile.intermediate_size)
    rank = even(max(adapter.rank for adapter in adapters))
    return _recorded_bytes(profile, tokens, e) + tokens * (e * (2 * widest + rank) + 4 * (widest + rank) + 16)


def _recorded_bytes(profile: ModelProfile, tokens: int, e: int) -> int:
    """The buffers of a recorded step (`quire_kernels/cpu/program.py`): of each width as many as are in use at a
    time, for a multiple of 64 tokens."""
    hidden, q, kv, experts = profile.hidden_size, profile.q_size, profile.kv_size, profile.experts
    inner = 0 if experts is not None and all(experts.layers) else profile.intermediate_size
    # states, residual, what a layer gives; queries, heads, the last ones taken; both halves of a gate, and it
    row = e * (5 * hidden + 4 * q + 2 * kv + 3 * inner)
    row += len(kv_groups(profile)) * 8 + 24  # slots, ids, places, rows
    row += profile.num_ropes * 2 * profile.head_dim * 4  # cosines and sines
    if experts is not None:
        row += experts.num_experts * 4 + experts.num_experts_per_tok * 12
    return -(-tokens // 64) * 64 * row + 4096


def _experts_scratch(
    profile: ModelProfile, experts: ExpertsProfile, tokens: int, e: int, quantization: Quantization | None
) -> int:
    """What the native operation of experts keeps (`quire_kernels/cpu/native/experts.cpp`): who goes where, sums,
    and of each token and each of its experts the input and what is inside, as it is and as it is multiplied."""
    hidden, inner = profile.hidden_size, experts.intermediate_size
    pairs = tokens * experts.num_experts_per_tok
    made = 4 if quantization is None or quantization.activations != "int8" else 2
    own = pairs * (12 + inner * e + made * max(hidden, inner) + 256)  # each part of a row is filled up to 64 bytes
    return experts.num_experts * 16 + tokens * hidden * 4 + own + 512


def gpu_activations(
    profile: ModelProfile,
    dtype: str,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    *,
    block_size: int,
    enforce_eager: bool = False,
    quantization: Quantization | None = None,
) -> dict[str, int]:
    """The parts of `activation_bytes` on a GPU, by name (`gpu_sizing.gpu_parts`)."""
    return gpu_parts(
        profile,
        len(kv_groups(profile)),
        number=DTYPE_BYTES[dtype],
        tokens=max_num_batched_tokens,
        seats=max_num_seqs,
        width=-(-max_model_len // block_size),
        captures=not enforce_eager,
        quantization=quantization,
    )


def kv_room(limit: int, weights: int, activations: int, overhead: int) -> int:
    """Bytes that the limit leaves for KV; negative when it leaves none."""
    return limit - weights - activations - overhead


# ── the fit ───────────────────────────────────────────────────────────────────────────────────────────────


def fit(profile: ModelProfile, request: SizingRequest) -> FitReport:
    """Whether the request fits, with blocks and context resolved; if not, why, and up to three changes that do."""
    report = _resolve(profile, request)
    if report.fits:
        return replace(report, notes=tuple(_notes(profile, report)))
    return replace(report, counter_offers=tuple(_offers(profile, report))[:3])


def _limit(request: SizingRequest) -> int:
    shares = [int(request.device_bytes_total * request.memory_share), request.device_bytes_available]
    if request.memory_limit is not None:
        shares.append(request.memory_limit)
    return min(shares)


def _limit_reason(request: SizingRequest) -> str:
    limit = _limit(request)
    if request.memory_limit == limit:
        return "the declared memory limit"
    total = format_bytes(request.device_bytes_total)
    if limit == int(request.device_bytes_total * request.memory_share):
        return f"{request.memory_share:.0%} of {total}"
    return f"free of {total}"


def _at(profile: ModelProfile, request: SizingRequest, length: int) -> FitReport:
    """The report for one context length."""
    if request.runner == "scripted":
        return _scripted_at(profile, request, length)
    weights = weight_bytes(profile, request.dtype, request.quantization)
    adapters = sum(adapter.bytes(request.dtype) for adapter in request.adapters)
    activations = activation_bytes(
        profile,
        request.dtype,
        request.max_num_batched_tokens,
        request.max_num_seqs,
        length,
        device=request.device,
        quantization=request.quantization,
        block_size=request.block_size,
        enforce_eager=request.enforce_eager,
    ) + adapter_step_bytes(profile, request.dtype, request.max_num_batched_tokens, request.adapters)
    overhead = FOOTPRINT[request.device].overhead
    limit = _limit(request)
    per_token = kv_bytes_per_token(profile, request.kv_dtype)
    block = kv_block_bytes(profile, request.kv_dtype, request.block_size)
    windows = tuple(group.window for group in kv_groups(profile))
    room = kv_room(limit, weights + adapters, activations, overhead)
    per_sequence = blocks_held(windows, length, request.max_num_batched_tokens, request.block_size)
    if request.kv_size is not None:
        budget = request.kv_size
    elif request.device == "cpu":
        need = request.max_num_seqs * per_sequence * block
        budget = min(room, CPU_KV_CAP, need, request.device_bytes_available // 4)
    else:
        budget = room
    blocks = max(0, budget // block)
    if room < 0:
        reason = f"weights, activations and overhead alone are {format_bytes(-room)} above the limit"
    elif blocks * block > room:
        reason = f"kvCache.size {format_bytes(blocks * block)} is more than the {format_bytes(room)} that are left"
    elif blocks < per_sequence:
        reason = (
            f"the KV cache gets {format_bytes(budget)}, one sequence of {length:,} tokens needs "
            f"{format_bytes(per_sequence * block)}"
        )
    else:
        reason = ""
    return FitReport(
        fits=not reason,
        reason=reason,
        request=request,
        weights=weights,
        activations=activations,
        overhead=overhead,
        kv=blocks * block,
        limit=limit,
        kv_bytes_per_token=per_token,
        num_blocks=blocks,
        max_model_len=length,
        windows=windows,
        adapters=adapters,
    )


def _scripted_at(profile: ModelProfile, request: SizingRequest, length: int) -> FitReport:
    """As `_at`, where blocks are numbers alone: as many as the declared cache would have, else as the largest one
    of a CPU, and then enough for one sequence."""
    block = kv_block_bytes(profile, request.kv_dtype, request.block_size)
    windows = tuple(group.window for group in kv_groups(profile))
    per_sequence = blocks_held(windows, length, request.max_num_batched_tokens, request.block_size)
    if request.kv_size is not None:
        blocks = request.kv_size // block
    else:
        blocks = max(per_sequence, min(CPU_KV_CAP // block, request.max_num_seqs * per_sequence))
    overhead, limit = FOOTPRINT[request.device].overhead, _limit(request)
    reason = ""
    if blocks < per_sequence:
        reason = (
            f"kvCache.size is {blocks} blocks of {request.block_size} tokens, one sequence of {length:,} tokens "
            f"needs {per_sequence}"
        )
    elif overhead > limit:
        reason = f"overhead alone is {format_bytes(overhead - limit)} above the limit"
    return FitReport(
        fits=not reason,
        reason=reason,
        request=request,
        weights=0,
        activations=0,
        overhead=overhead,
        kv=0,
        limit=limit,
        kv_bytes_per_token=0,
        num_blocks=blocks,
        max_model_len=length,
        windows=windows,
    )


def _resolve(profile: ModelProfile, request: SizingRequest) -> FitReport:
    longest = profile.max_position_embeddings
    if request.max_model_len is not None:
        report = _at(profile, request, request.max_model_len)
        if request.max_model_len > longest:
            reason = f"maxModelLen {request.max_model_len:,} is above the checkpoint's {longest:,} positions"
            return replace(report, fits=False, reason=reason)
        return report
    if not request.chunked_prefill:
        longest = min(longest, request.max_num_batched_tokens)
    shortest = min(longest, MIN_AUTO_LEN)
    best = _largest(shortest, longest, request.block_size, lambda length: _at(profile, request, length).fits)
    if best is None:
        report = _at(profile, request, shortest)
        if report.kv > report.room > 0:  # a declared kvCache.size is the cause, not the context
            return report
        return replace(report, reason=f"{report.reason} (the least that maxModelLen auto gives)")
    return _at(profile, request, best)


def _largest(low: int, high: int, step: int, fits: Callable[[int], bool]) -> int | None:
    """The largest length from `low` to `high` that fits, a multiple of `step` unless it is one of the two."""
    if fits(high):
        return high
    if not fits(low):
        return None
    inside, outside = low // step, -(-high // step)
    while outside - inside > 1:
        middle = (inside + outside) // 2
        if fits(middle * step):
            inside = middle
        else:
            outside = middle
    return max(low, inside * step)


def _notes(profile: ModelProfile, report: FitReport) -> Iterable[str]:
    request = report.request
    if request.runner == "scripted":
        yield "engine.runner is scripted: no weights are loaded, and blocks of the cache are numbers alone"
    which = widened(profile, request.quantization)
    if which and request.runner == "model":
        device = {"cpu": "a CPU", "cuda": "a GPU"}[request.device]
        yield f"{which} are widened to {request.dtype}, for nothing on {device} multiplies them"
    rounded = request.quantization is not None and request.quantization.activations == "fp8"
    if rounded and profile.experts is not None and (profile.fp8 is None or has_coded_experts(profile)):
        yield f"experts meet their input in {request.dtype}: it is rounded to fp8 for the other layers alone"
    if request.max_model_len is None and report.max_model_len < profile.max_position_embeddings:
        whole = not request.chunked_prefill and report.max_model_len == request.max_num_batched_tokens
        yield (
            f"maxModelLen auto is {report.max_model_len:,}; the checkpoint would allow "
            f"{profile.max_position_embeddings:,}"
            + (": without chunkedPrefill a prompt has to fit maxNumBatchedTokens" if whole else "")
        )
    if report.concurrency < request.max_num_seqs:
        yield f"maxNumSeqs {request.max_num_seqs} will preempt when sequences get long"


def _offers(profile: ModelProfile, report: FitReport) -> Iterable[CounterOffer]:
    """Changes that make it fit, those that cost users least first; every one has been tried."""
    request = report.request
    longest = profile.max_position_embeddings
    if request.max_model_len is not None and request.max_model_len > longest:
        shorter = _resolve(profile, replace(request, max_model_len=None))
        if shorter.fits:
            yield CounterOffer("spec.engine.maxModelLen", str(shorter.max_model_len))
        else:
            device = _larger_device(profile, _at(profile, replace(request, max_model_len=longest), longest))
            yield CounterOffer("device", f"{device.value}, and spec.engine.maxModelLen {longest}")
        return

    def fits(changed: SizingRequest) -> bool:
        return _resolve(profile, changed).fits

    block = kv_block_bytes(profile, request.kv_dtype, request.block_size)
    one = -(-report.blocks_per_sequence * block // MIB) * MIB
    size = report.room // MIB * MIB if report.kv > report.room else one
    offered = size > 0 and size != request.kv_size and fits(replace(request, kv_size=size))
    if offered:
        yield CounterOffer("spec.engine.kvCache.size", f"{size // MIB}Mi")
    tokens = _halved(
        request.max_num_batched_tokens, 128, lambda value: fits(replace(request, max_num_batched_tokens=value))
    )
    if tokens is not None:
        yield CounterOffer("spec.batching.maxNumBatchedTokens", str(tokens))
    seqs = _halved(request.max_num_seqs, 1, lambda value: fits(replace(request, max_num_seqs=value)))
    if seqs is not None:
        yield CounterOffer("spec.batching.maxNumSeqs", str(seqs))
    if request.max_model_len is not None:
        low = min(request.max_model_len, MIN_AUTO_LEN)
        length = _largest(
            low,
            request.max_model_len,
            request.block_size,
            lambda length: fits(replace(request, max_model_len=length)),
        )
        if length is not None:
            yield CounterOffer("spec.engine.maxModelLen", str(length))
    for percent in (90, 95):
        share = percent / 100
        if share > request.memory_share and fits(replace(request, memory_share=share)):
            yield CounterOffer("spec.engine.memory", f"{percent}%")
            break
    if request.kv_dtype == "float32" and fits(replace(request, kv_dtype="bfloat16")):
        yield CounterOffer("spec.engine.kvCache.dtype", "bfloat16")
    if request.dtype == "float32" and fits(replace(request, dtype="bfloat16", kv_dtype="bfloat16")):
        yield CounterOffer("spec.engine.dtype", "bfloat16 (kvCache.dtype auto)")
    narrows = request.runner == "model" and request.kv_dtype not in KV_IN_BYTES
    if narrows and not kv_misfit(profile, "int8", request.device) and fits(replace(request, kv_dtype="int8")):
        yield CounterOffer("spec.engine.kvCache.dtype", "int8 (other numbers)")
    if request.runner == "model" and request.quantization is None:
        four = FLOATS[request.dtype] if request.device == "cuda" else "int8"
        eight = "int8" if profile.experts is None else four
        for quantization in (Quantization("int8", eight), Quantization("int4", four, GROUP_SIZES[0])):
            unfit = misfit(profile, quantization)
            unfit = unfit or experts_misfit(profile, quantization.method)
            if not unfit and fits(replace(request, quantization=quantization)):
                yield CounterOffer("spec.quantization.method", f"{quantization.method} (other numbers)")
                break
    if request.memory_limit is not None:
        need = report.weights + report.adapters + report.activations + report.overhead + (request.kv_size or one)
        limit = -(-need // MIB) * MIB
        if fits(replace(request, memory_limit=limit)):
            yield CounterOffer("spec.resources.memory", f"{limit // MIB}Mi")
    if not (offered and report.kv > report.room):  # a size of the cache that was made up needs no such machine
        yield _larger_device(profile, report)


def _halved(value: int, least: int, fits: Callable[[int], bool]) -> int | None:
    """The first of value / 2, value / 4, … not below `least` that fits."""
    while value > least:
        value = max(least, value // 2)
        if fits(value):
            return value
    return None


def _larger_device(profile: ModelProfile, report: FitReport) -> CounterOffer:
    """The memory that the request needs as it stands, with room for one sequence of its context."""
    request = report.request
    one = report.blocks_per_sequence * kv_block_bytes(profile, request.kv_dtype, request.block_size)
    fixed = report.weights + report.adapters + report.activations + report.overhead
    need = max((fixed + (request.kv_size or one)) / request.memory_share, fixed + (request.kv_size or one))
    if request.kv_size is None and request.device == "cpu":
        need = max(need, 4 * one)  # auto takes a quarter of what is free
    size = -(-int(need) // GIB) * GIB
    enough = replace(request, device_bytes_total=size, device_bytes_available=size, memory_limit=None)
    if _resolve(profile, enough).fits:
        return CounterOffer("device", f"{size // GIB} GiB free")
    return CounterOffer(
        "a device with", f"{size // GIB} GiB free, and spec.engine.kvCache.size {-(-one // MIB)}Mi"
    )
