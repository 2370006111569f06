"""The operations a model is made of, as a Protocol with shapes; `load` and `best` give what carries them out.

Models call these and never know which back-end answers. `reference` is obvious torch and the oracle for the
others; `cpu` is our own C++; `triton` is for NVIDIA GPUs.

Legend: T new tokens of a step, H query heads, K key/value heads (H is a multiple of K), D head size,
N blocks, P slots a block, W hidden width, I width between the two halves of an MLP, E experts of a layer, k of
which each token goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quire_kernels.errors import BackendUnavailable, KernelError, UnknownBackend
from quire_kernels.mxfp4 import Mxfp4Weight
from quire_kernels.paging import PagedBatch
from quire_kernels.quantized import Activations, Fp8Weight, Int4Weight, Int8Weight, QuantizedWeight

__all__ = [
    "BACKENDS",
    "Activations",
    "BackendUnavailable",
    "Body",
    "Clamp",
    "Experts",
    "Fp8Weight",
    "HeadNorms",
    "Int4Weight",
    "Int8Weight",
    "KernelError",
    "Kernels",
    "Mxfp4Weight",
    "PagedAttention",
    "PagedBatch",
    "Product",
    "QuantizedWeight",
    "UnknownBackend",
    "best",
    "load",
]

BACKENDS = ("reference", "cpu", "triton")


@dataclass(slots=True, frozen=True)
class HeadNorms:
    """RMS norms of each head's queries and keys before they are rotated (QK-norm, as in Qwen3)."""

    query: Tensor
    """[D], of the dtype of what is normed or float32."""
    key: Tensor
    """[D], likewise."""
    eps: float


@dataclass(slots=True, frozen=True)
class Clamp:
    """A gate of experts that is clamped (gpt-oss): (1 + up) · gate · sigmoid(alpha · gate), of min(gate, limit)
    and of up within ±limit."""

    alpha: float
    limit: float


Body = Callable[[Tensor, Sequence[PagedBatch]], Tensor]
"""A model's layers: of token ids [T] int64 and the batch of each kind of layer, the final states of the rows that
are wanted."""


class Product(Protocol):
    """Matrix products with one weight, in the order that the back-end reads it in."""

    def __call__(self, x: Tensor) -> Tensor:
        """x · weightᵀ + bias: [T, K] to [T, N], in the dtype of x."""

    def wide(self, x: Tensor) -> Tensor:
        """The same in float32: [T, K] to [T, N]."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] int64 of the weight, [T, K], in the dtype of the activations: an embedding."""

    def parameters(self) -> Iterator[Tensor]:
        """Every tensor it holds, once: all bytes of the weight, in whatever order."""


class Experts(Protocol):
    """The gated MLPs of one layer, of which each token goes through a few."""

    def __call__(self, x: Tensor, choice: Tensor, shares: Tensor) -> Tensor:
        """Σ_r shares[t, r] · down(silu(gate(x[t])) · up(x[t])) of the experts choice[t, r]; or clamped (`Clamp`).

        `x` [T, W]; `choice` [T, k] int64, numbers below E, none twice for a token; `shares` [T, k] float32.
        Returns [T, W] in the dtype of x. Sums are float32, their terms in the order of the experts' numbers.
        """

    def parameters(self) -> Iterator[Tensor]:
        """Every tensor it holds, once."""


class PagedAttention(Protocol):
    """Attention prepared for one step; every layer of the same kind calls the same object."""

    def __call__(self, query: Tensor, cache: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        """Causal attention of this step's tokens over their sequences' cached keys and values.

        `query` [T, H, D]; `cache` (keys, values) as of `place_heads`, this step's tokens already written; `scale`
        multiplies the products of queries and keys. Over an int8 cache each head's query is rounded as its keys
        are, and whole numbers are multiplied exactly; over an fp8 cache queries stay as they are. Returns
        [T, H, D] in the query's dtype. Whatever lies in slots that hold no token of the sequence itself cannot
        reach the result.

        `sinks` [H] float32, dense, a parameter of the layer: e^sinks[h] is added once to what each softmax of head
        h divides by, as a key would be that every token sees and whose value is zero. They are neither scaled nor
        capped nor hidden by a window. -inf is a head without one; other numbers that are not finite mean nothing.
        """


class Kernels(Protocol):
    """One back-end. All operations accept float32, bfloat16 and float16 and compute in float32 inside."""

    name: str

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        """Takes over `weight` [N, K] and `bias` [N], dense and of one dtype: they are nobody else's any more."""

    def quantized_product(
        self, weight: QuantizedWeight, bias: Tensor | None, activations: Activations, dtype: torch.dtype
    ) -> Product:
        """Takes over `weight` and `bias` [N] float. Its input and its results are of `dtype`.

        `activations` "int8" rounds each row of the input by a scale of its own, so that its largest number becomes
        127, and multiplies whole numbers exactly; a row with a number that is not finite comes out as NaN. "fp8",
        for weights in fp8 alone, rounds 128 inputs at a time to e4m3, by a scale of their own that makes the
        largest 448, and adds up in float32. "float" multiplies what the weight stands for, in float32.

        Raises `KernelError` for what this back-end has no product for.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight. `x` [T, W], `weight` [W], of its dtype or float32; a new tensor."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds `x` to `residual` in place, then gives the norm of the sum. All [T, W]."""

    def turns(self, positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """By how much `place_heads` turns: of `positions` [T] int64 and `frequencies` [D / 2] float32 the cosines
        and signed sines of position · frequency, times `factor`, as it takes them."""

    def place_heads(
        self,
        qkv: Tensor,
        num_heads: int,
        norms: HeadNorms | None,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """Norms and rotates queries and keys, stores keys and values, and returns the queries [T, H, D].

        `qkv` [T, H + 2·K, D], with `num_heads` H: queries, keys, values; there and in what is returned each
        token's numbers are dense. Rotation turns the pairs (x[d], x[d + D/2]) of each head: `cos` and `sin`
        [T, 1, D] float32, where `sin` carries the sign, its first half negated. Keys and values go to `slots` [T]
        int64 of `cache` [2, N, P, K, D], cast to its dtype; within a block their order is the back-end's own. An
        int8 or fp8 (e4m3) cache, where D is a multiple of 4, is [2, N, P, K, D + 4]: each head of a token is
        rounded by a float32 scale of its own, so that its largest number becomes 127 or 448, and the scale is kept
        beside it. A head with a number that is not finite reads as NaN. `cpu` has no fp8 caches. A token with a
        negative slot is padding of a captured graph, and nothing is stored for it: batches for `triton` alone may
        have such tokens.
        """

    def paged_attention(
        self, batch: PagedBatch, *, window: int | None, softcap: float | None = None
    ) -> PagedAttention:
        """Prepares a step for layers of one kind.

        `window` w limits token p to keys p - w + 1 to p; None means all before it. `softcap` c > 0 makes
        c · tanh(s / c) of each scaled product s, in float32 and before anything is hidden; None leaves it alone.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) · up. `gate_up` [T, 2·I], gate first; returns [T, I]."""

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        """The same with gelu as tanh approximates it: g / 2 · (1 + tanh(√(2 / π) · (g + 0.044715 · g³)))."""

    def experts(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        biases: tuple[Tensor, Tensor, Tensor] | None = None,
        clamp: Clamp | None = None,
    ) -> Experts:
        """Takes over weights of all experts, dense and of one dtype: `gate` and `up` [E, I, W], `down` [E, W, I];
        and their `biases`, [E, I], [E, I] and [E, W]. Without a `clamp` the gate is silu's.

        Raises `KernelError` if they differ.
        """

    def quantized_experts(
        self,
        gate: QuantizedWeight,
        up: QuantizedWeight,
        down: QuantizedWeight,
        count: int,
        activations: Activations,
        dtype: torch.dtype,
        *,
        biases: tuple[Tensor, Tensor, Tensor] | None = None,
        clamp: Clamp | None = None,
    ) -> Experts:
        """Takes over weights of `count` experts, one after the other along the outputs: `gate` and `up`
        [E · I, W], `down` [E · W, I]. `activations` and `dtype` as of `quantized_product`, `biases` and `clamp` as
        of `experts`.

        Raises `KernelError` if they differ, or if this back-end has none.
        """

    def route(self, logits: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
        """The `count` experts of each token with the largest `logits` [T, E] float32, and their shares.

        [T, k] int64, largest first, of equal ones the lower number first; and [T, k] float32, the softmax over all
        experts, or, `over_chosen`, over those that are chosen. A row with NaN has shares of NaN, and no particular
        experts.
        """

    def route_of(self, router: Product, x: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
        """`route` of what `router.wide(x)` would give, which need not be there at any time."""

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rows `rows` [T] int64 of `x` [any, W], [T, W]."""

    def multiply(self, x: Tensor, factor: float) -> Tensor:
        """Multiplies `x` [T, W] in place by `factor`, which is rounded to its dtype before, and returns it."""

    def recorded(self, body: Body) -> Body:
        """What computes `body` in the way that this back-end likes best.

        A body hands what it is given, views of it and results to operations of these kernels, does nothing else
        with them, and neither looks at numbers nor depends on how many rows there are. What is returned takes
        what the body takes and gives the same; the tensor that it gives may be another's from the next call on.
        """

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row of `logits` [R, V] float32 its largest number and the lowest place of it.

        [R] float32 and [R] int64. A row with NaN has NaN, and no particular place.
        """

    def largest_of(self, product: Product, x: Tensor) -> tuple[Tensor, Tensor]:
        """`largest` of what `product.wide(x)` would give, which need not be there at any time."""

    def cap_logits(self, logits: Tensor, cap: float) -> None:
        """cap · tanh(x / cap) of each of `logits` [R, V] float32, dense, in place. NaN stays NaN."""

    def mask_tokens(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        """-inf, in place, wherever a bit is not set: `bits` [M, B] uint8, bit v % 8 of byte v // 8 for token v,
        are those of the rows `rows` [M] int64 of `logits` [R, V] float32; 8 · B is at least V.
        """


def load(name: str, threads: int = 1) -> Kernels:
    """The back-end of that name. `threads` is for those that have their own.

    Raises `UnknownBackend` with those there are, `BackendUnavailable` with what is in the way on this machine.
    """
    if name == "reference":
        from quire_kernels.reference import ReferenceKernels

        return ReferenceKernels()
    if name == "cpu":
        from quire_kernels.cpu import CpuKernels

        return CpuKernels(threads)
    if name == "triton":
        try:
            from quire_kernels.triton import TritonKernels
        except ImportError as error:
            raise BackendUnavailable(f"triton cannot be imported: {error}") from error
        return TritonKernels()
    raise UnknownBackend(f"no kernel back-end is called {name!r}\n    hint: one of {', '.join(BACKENDS)}")


def best(device: str, threads: int) -> tuple[Kernels, str]:
    """The back-end for a device as torch names it, and, if it is not the one made for it, what was in the way."""
    made_for = "cpu" if device == "cpu" else "triton"
    try:
        return load(made_for, threads), ""
    except BackendUnavailable as error:
        return load("reference"), str(error)
