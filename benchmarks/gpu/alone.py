"""Paged attention by itself, launched from graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu.device import Card, Device
from quire_engine.engine import DTYPES
from quire_kernels.paging import PagedBatch
from quire_kernels.triton import attention


def attention_rows(device: Device, card: Card, *, sweep: bool) -> Iterator[dict[str, Any]]:
    """Paged decode attention: bytes of keys and values over time, beside a copy."""
    bf16, int8, fp8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
    shapes = [(8, 4, 128, 1, 8192, bf16), (8, 4, 128, 32, 1024, bf16), (8, 4, 128, 128, 1024, bf16)]
    shapes += [(8, 4, 128, 256, 1024, bf16), (8, 2, 128, 256, 1024, bf16), (8, 4, 128, 8, 8192, bf16)]
    shapes += [(8, 4, 128, 1, 32768, bf16), (2, 7, 64, 256, 1024, bf16)]
    for kept in (int8, fp8):
        shapes += [(8, 4, 128, 1, 8192, kept), (8, 4, 128, 32, 1024, kept), (8, 2, 128, 256, 1024, kept)]
        shapes += [(8, 4, 128, 256, 1024, kept)]
    kernels = device.kernels()
    own = attention.decode_tuning
    tunings: list[dict[str, int]] = [{}]
    if sweep:
        tunings += [
            {"BLOCK_N": n, "num_warps": w, "num_stages": s} for n in (64, 128) for w in (2, 4) for s in (2, 3, 4)
        ]
    for kv_heads, group, dim, batch, context, kept in shapes[3:4] + shapes[-1:] if device.scale.small else shapes:
        many, seen = device.scale.at_most(batch, 2), device.scale.at_most(context, 40)
        step, cache, query = _attention_case(device, kv_heads, group, dim, [1] * many, seen - 1, kept)
        moved = 2 * many * seen * kv_heads * cache.shape[-1] * cache.element_size()
        for tuning in tunings:
            attention.decode_tuning = partial(_given, tuning) if tuning else own
            seconds = device.replayed(
                partial(kernels.paged_attention(step, window=None), query, cache, dim**-0.5), 10
            )
            attention.decode_tuning = own
            yield {
                "part": "attention",
                "kv_heads": kv_heads,
                "group": group,
                "dim": dim,
                "kept": str(kept).removeprefix("torch."),
                "batch": many,
                "context": seen,
                **device.scale.stands_for(batch=batch, context=context),
                "us": round(seconds * 1e6, 1),
                "bandwidth_share": round(moved / seconds / card.bandwidth, 3),
                **tuning,
            }


def prompt_rows(device: Device, card: Card, *, sweep: bool) -> Iterator[dict[str, Any]]:
    """Paged attention of prompts: operations over time, beside a large product. The last case is a step of 512
    sequences that decode and three prompts, whose time is in microseconds alone.
    """
    kernels, number = device.kernels(), DTYPES[device.dtype]
    own = attention.prefill_tuning
    cases: list[tuple[list[int], int]] = [
        ([2048], 0), ([8192], 0), ([2048] * 4, 0), ([512], 7680), ([1] * 512 + [216] * 3, 300),
    ]  # fmt: skip
    tunings: list[dict[str, int]] = [{}]
    if sweep:
        tunings += [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s, "PROGRAMS": p}
            for m, n, w, s, p in (
                (256, 64, 8, 2, 1), (256, 64, 8, 4, 1), (256, 128, 8, 2, 1), (256, 128, 8, 3, 1),
                (128, 64, 8, 3, 1), (128, 64, 4, 3, 2), (128, 64, 4, 2, 2), (128, 128, 8, 3, 1),
                (128, 128, 8, 2, 1),
            )
        ]  # fmt: skip
    for counts, cached in [([20], 0), ([1, 1, 9], 12)] if device.scale.small else cases:
        step, cache, query = _attention_case(device, 8, 4, 128, counts, cached, number)
        pairs = sum(count * cached + count * (count + 1) / 2 for count in counts)
        for tuning in tunings:
            attention.prefill_tuning = partial(_given, tuning) if tuning else own
            try:
                seconds = device.replayed(
                    partial(kernels.paged_attention(step, window=None), query, cache, 128**-0.5), 4
                )
            except triton.runtime.errors.OutOfResources:
                continue
            finally:
                attention.prefill_tuning = own
            rate = 4 * pairs * query.shape[1] * query.shape[2] / seconds
            yield {
                "part": "prompts",
                "counts": counts if len(counts) < 9 else f"{counts.count(1)} and {[n for n in counts if n > 1]}",
                "cached": cached,
                "us": round(seconds * 1e6, 1),
                "tflops": round(rate / 1e12, 1),
                "roofline_share": round(rate / card.bf16, 3),
                **tuning,
            }


def _given(tuning: dict[str, int], *_: object) -> dict[str, int]:
    return tuning


def _attention_case(
    device: Device, kv_heads: int, group: int, dim: int, counts: Sequence[int], cached: int, kept: torch.dtype
) -> tuple[Any, Tensor, Tensor]:
    """A step of sequences with `counts` new tokens behind `cached` ones, in shuffled blocks that are `kept` so."""
    held = [-(-(cached + count) // 16) for count in counts]
    order = torch.randperm(sum(held)).tolist()
    step = PagedBatch.build(
        starts=[cached] * len(counts),
        query_lens=counts,
        block_tables=[[order.pop() for _ in range(count)] for count in held],
        logits=[1] * len(counts),
        block_size=16,
        device=device.torch,
    )
    if kept.itemsize == 1:
        # whatever the codes: any byte is a number in either format as the kernels read them
        codes = torch.randint(
            -127, 128, (2, sum(held), 16, kv_heads, dim + 4), device=device.torch, dtype=torch.int8
        )
        cache = codes.view(kept)
        # scales lie behind the codes of a block
        cache.view(2, sum(held), -1)[..., 16 * kv_heads * dim :].view(torch.float32).fill_(0.01)
    else:
        number = DTYPES[device.dtype]
        cache = torch.randn(2, sum(held), 16, kv_heads, dim, device=device.torch, dtype=number)
    query = torch.randn(sum(counts), kv_heads * group, dim, device=device.torch, dtype=DTYPES[device.dtype])
    return step, cache, query
