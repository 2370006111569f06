"""Layers of experts alone: their time beside what reading the chosen experts and multiplying takes at least.

A call is the choice of experts and all that follows it, launched from a graph. Calls that follow each other choose
differently, so that weights come from memory each time. `parts_us` has each kernel by itself.
`weights` are numbers or codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Card, Device
from quire_engine.engine import DTYPES
from quire_kernels import QuantizedWeight
from quire_kernels.mxfp4 import Mxfp4Weight
from quire_kernels.quantized import quantize_fp8, quantize_int4, quantize_int8, shared_outputs
from quire_kernels.triton import experts


def _any_mxfp4(rows: Tensor) -> Mxfp4Weight:
    """Any codes, of about the size of `rows`: nothing here makes them of numbers."""
    weight = Mxfp4Weight.empty(rows.shape[0], rows.shape[1], rows.device)
    weight.values.random_()
    weight.scales.random_(116, 121)
    return weight


LAYERS = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "gpt-oss-20b": (32, 4, 2880, 2880),
}
"""Experts, of which each token goes through so many; hidden width, width inside."""
Make = Callable[[Tensor, int], QuantizedWeight]
"""Of rows of all experts, and how many each has."""
WEIGHTS: dict[str, Make | None] = {
    "bf16": None,
    "int8": lambda rows, _: quantize_int8(rows),
    "fp8": lambda rows, each: quantize_fp8(rows, shared_outputs(each)),
    "int4/32": lambda rows, _: quantize_int4(rows, 32),
    "int4/128": lambda rows, _: quantize_int4(rows, 128),
    "mxfp4": lambda rows, _: _any_mxfp4(rows),
}
"""How those that are no numbers are made."""
TOKENS = (1, 8, 32, 128, 256, 2048)
Replayed = Callable[[Callable[[], object], int], float]
"""Seconds of one call of so many that a graph holds."""


def experts_rows(device: Device, card: Card, *, sweep: bool, quick: bool) -> Iterator[dict[str, Any]]:
    """Rows of all layers, their weights, and steps."""
    replayed, small = device.replayed, device.scale.small
    bandwidth, rate = card.bandwidth, card.bf16
    layers = {"small": (4, 2, 128, 128)} if small else LAYERS
    for (name, (count, chosen, width, inner)), (weights, make) in itertools.product(
        layers.items(), WEIGHTS.items()
    ):
        if weights == "int4/128" and width % 128:
            continue
        layer = _layer(device, count, width, inner, make)
        each = sum(part.nbytes for part in layer.parameters()) / count
        for tokens in (1, 8) if small else TOKENS[::2] if quick else TOKENS:
            x, logits = _numbers(device, tokens, width), _logits(device, tokens, count, chosen)
            routed = [experts.route(one, chosen, over_chosen=True) for one in logits]
            used = sum(len({*choice.flatten().tolist()}) for choice, _ in routed) / len(routed)
            size, operations = each * used, 6 * width * inner * tokens * chosen
            floor = max(size / bandwidth, operations / rate)
            whole = partial(_whole, layer, x, chosen)
            seconds = replayed(_each(whole, [(one,) for one in logits]), len(logits))
            tilings = layer.tilings(tokens, chosen)
            row: dict[str, Any] = {
                "part": "experts",
                "layer": name,
                "weights": weights,
                "tokens": tokens,
                "used": round(used, 1),
                "us": round(seconds * 1e6, 1),
                "roofline_share": round(floor / seconds, 3),
                "bound": "bytes" if size / bandwidth >= operations / rate else "operations",
            }
            yield row | {"tilings": tilings, "parts_us": _parts(layer, x, logits, routed, tilings, replayed)}
            if sweep and make is None:  # those of codes are timed where an engine starts
                yield from _sweep(row, layer, x, routed, replayed)


def _layer(device: Device, count: int, width: int, inner: int, make: Make | None) -> experts.ExpertLayer[Any]:
    shapes = ((count, inner, width), (count, inner, width), (count, width, inner))
    kernels, dtype = device.kernels(), DTYPES[device.dtype]
    gate, up, down = (_numbers(device, *shape).mul_(shape[2] ** -0.5) for shape in shapes)
    if make is None:
        layer = kernels.experts(gate, up, down)
    else:
        first, second, third = (make(weight.flatten(0, 1), weight.shape[1]) for weight in (gate, up, down))
        layer = kernels.quantized_experts(first, second, third, count, "float", dtype)
    assert isinstance(layer, experts.ExpertLayer)
    return layer


def _whole(layer: experts.ExpertLayer[Any], x: Tensor, chosen: int, logits: Tensor) -> Tensor:
    return layer(x, *experts.route(logits, chosen, over_chosen=True))


def _parts(
    layer: experts.ExpertLayer[Any],
    x: Tensor,
    logits: Sequence[Tensor],
    routed: Sequence[tuple[Tensor, Tensor]],
    tilings: experts.Tilings,
    replayed: Replayed,
) -> dict[str, float]:
    count, chosen = layer.gate.shape[0], routed[0][0].shape[1]
    planned = [(choice, shares, _plan(choice, count, tilings.gated.rows)) for choice, shares in routed]
    inner = experts.grouped(x, layer.gate, layer.up, planned[0][0], planned[0][2], tilings.gated)
    parts = experts.grouped(inner, layer.down, None, planned[0][0], planned[0][2], tilings.down)
    out = torch.empty_like(x)
    works: dict[str, Callable[..., object]] = {
        "route": lambda logits, *_: experts.route(logits, chosen, over_chosen=True),
        "plan": lambda _, choice, *__: _plan(choice, count, tilings.gated.rows),
        "gated": lambda _, choice, __, plan: experts.grouped(x, layer.gate, layer.up, choice, plan, tilings.gated),
        "down": lambda _, choice, __, plan: experts.grouped(inner, layer.down, None, choice, plan, tilings.down),
        "join": lambda _, choice, shares, plan: experts.join(out, parts, choice, shares, plan),
    }
    if x.shape[0] == 1:
        del works["plan"]
    given = [(one, *rest) for one, rest in zip(logits, planned, strict=True)]
    return {name: round(replayed(_each(work, given), len(logits)) * 1e6, 1) for name, work in works.items()}


def _sweep(
    row: dict[str, Any],
    layer: experts.ExpertLayer[Any],
    x: Tensor,
    routed: Sequence[tuple[Tensor, Tensor]],
    replayed: Replayed,
) -> Iterator[dict[str, Any]]:
    """Each product by each tiling that may suit: the best three, and the slowest."""
    count, (tokens, chosen) = layer.gate.shape[0], routed[0][0].shape
    mean = tokens * chosen / count
    places = torch.randn(tokens * chosen, layer.gate.shape[1], dtype=x.dtype, device=x.device)
    for product, every in (("gated", experts.GATED), ("down", experts.DOWN)):
        found: list[tuple[float, experts.Tiling]] = []
        for tiling in every:
            if not min(mean / 2, 64) <= tiling.rows <= max(16, min(4 * mean, 2 * tokens)):
                continue
            given = [(choice, _plan(choice, count, tiling.rows)) for choice, _ in routed]
            work = partial(_product, layer, x, places, product, tiling)
            found.append((replayed(_each(work, given), len(given)), tiling))
        found.sort()
        told = found if len(found) < 5 else [*found[:3], found[-1]]
        yield row | {
            "part": "experts sweep",
            "product": product,
            "best": [(round(seconds * 1e6, 1), *tiling) for seconds, tiling in told],
        }


def _product(
    layer: experts.ExpertLayer[Any],
    x: Tensor,
    places: Tensor,
    product: str,
    tiling: experts.Tiling,
    choice: Tensor,
    plan: experts.Plan | None,
) -> Tensor:
    if product == "gated":
        return experts.grouped(x, layer.gate, layer.up, choice, plan, tiling)
    return experts.grouped(places, layer.down, None, choice, plan, tiling)


def _plan(choice: Tensor, count: int, rows: int) -> experts.Plan | None:
    return experts.Plan.of(choice, count, rows) if choice.shape[0] > 1 else None


def _each(work: Callable[..., object], given: Sequence[tuple[Any, ...]]) -> Callable[[], object]:
    """Calls `work` with one after the other."""
    turns = itertools.cycle(given)
    return lambda: work(*next(turns))


def _logits(device: Device, tokens: int, count: int, chosen: int) -> list[Tensor]:
    """Routers' logits of several steps; of single tokens such that one after the other they choose all experts."""
    steps = max(4, count // chosen if tokens == 1 else 0)
    logits = [torch.randn(tokens, count, device=device.torch) for _ in range(steps)]
    if tokens == 1:
        order = torch.randperm(count, device=device.torch)
        for step, one in enumerate(logits):
            one[0, order[torch.arange(chosen, device=device.torch) + step * chosen % count]] += 100.0
    return logits


def _numbers(device: Device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPES[device.dtype], device=device.torch)
