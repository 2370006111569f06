"""A layer of experts by torch, one expert after the other.

    out[t] = Σ_r shares[t, r] · down_e(silu(gate_e(x[t])) · up_e(x[t])),   e = choice[t, r]

A clamped gate (`Clamp`) is (1 + up) · gate · sigmoid(alpha · gate) in place of silu(gate) · up.

A token's terms are added in the order of the experts' numbers, in float32; silu(gate) · up is rounded to the dtype
of x before it goes down.

Legend: T tokens, E experts, k of which a token goes through, n tokens of one expert, W hidden width, I width
inside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from quire_kernels import Clamp, Product, QuantizedWeight

Weight = TypeVar("Weight")


class GatedProducts(NamedTuple):
    """Of one expert, down(silu(gate(x)) · up(x))."""

    gate: Product
    """[I, W]."""
    up: Product
    """[I, W]."""
    down: Product
    """[W, I]."""


def each_product(
    make: Callable[[Weight], Product], gate: Iterable[Weight], up: Iterable[Weight], down: Iterable[Weight]
) -> list[GatedProducts]:
    """The products of each expert, of its weights."""
    return [GatedProducts(*map(make, three)) for three in zip(gate, up, down, strict=True)]


def each_biased(
    gate: Iterable[Weight],
    up: Iterable[Weight],
    down: Iterable[Weight],
    biases: tuple[Tensor, Tensor, Tensor] | None,
) -> Iterator[list[tuple[Weight, Tensor | None]]]:
    """Of gate, up and down the weights of each expert with their biases."""
    for number, weight in enumerate((gate, up, down)):
        yield list(zip(weight, itertools.repeat(None) if biases is None else biases[number], strict=False))


def gated(gate: Tensor, up: Tensor, clamp: Clamp | None) -> Tensor:
    """What goes down, float32; `gate` and `up` are changed."""
    if clamp is None:
        return F.silu(gate).mul_(up)
    gate.clamp_(max=clamp.limit)
    return up.clamp_(-clamp.limit, clamp.limit).add_(1.0).mul_(gate).mul_(torch.sigmoid(clamp.alpha * gate))


def each_part(weight: QuantizedWeight, count: int) -> list[QuantizedWeight]:
    """The weights of `count` experts that lie one after the other along the outputs."""
    outputs = weight.shape[0] // count
    return [weight.part(slice(first, first + outputs)) for first in range(0, outputs * count, outputs)]


@dataclass(slots=True, frozen=True)
class EachExpert:
    """`Experts` of whatever products."""

    experts: Sequence[GatedProducts]
    clamp: Clamp | None = None

    def __call__(self, x: Tensor, choice: Tensor, shares: Tensor) -> Tensor:
        out_TW = torch.zeros(x.shape, device=x.device)
        for number, (gate, up, down) in enumerate(self.experts):
            tokens_n, ranks_n = torch.where(choice == number)
            if tokens_n.shape[0] == 0:
                continue
            x_nW = x[tokens_n]
            inner_nI = gated(gate.wide(x_nW), up.wide(x_nW), self.clamp).to(x.dtype)
            out_TW.index_add_(0, tokens_n, down.wide(inner_nI) * shares[tokens_n, ranks_n, None])
        return out_TW.to(x.dtype)

    def parameters(self) -> Iterator[Tensor]:
        for product in itertools.chain.from_iterable(self.experts):
            yield from product.parameters()


def route(logits: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
    """See `Kernels.route`."""
    chances_TE = logits.softmax(-1)
    choice_Tk = logits.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()
    shares_Tk = chances_TE.gather(1, choice_Tk)
    if over_chosen:
        shares_Tk = shares_Tk / shares_Tk.sum(-1, keepdim=True)
    return choice_Tk, shares_Tk
