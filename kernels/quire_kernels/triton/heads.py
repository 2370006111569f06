"""Between the projection and attention, in one pass: QK-norm, rotation, and what goes into the cache.

    x     = head / sqrt(mean(head²) + eps) · weight           queries and keys, where a model norms them
    out   = x · cos + partner(x) · sin                        queries and keys; partner swaps a head's halves
    cache[side][slot // P, k, slot % P] = out or the value    keys and values, cast to the cache's dtype

A program takes a few heads of one token, whatever they are: queries, keys and values lie side by side in the
projection's output, and what differs between them is selected. The halves of a head are loaded apart, so that a
number and its partner are in one thread.

A block of the cache holds [K, P, D]: the slots of one head lie side by side. In 8 bits scales follow, and in e4m3
the halves of a head share words (`bytes`).

Legend: T tokens, H query heads, K key/value heads, D head size, N blocks, P slots a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.reference.bytes import E4M3, LARGEST
from quire_kernels.triton.bytes import code_of, e4m3_of, scale_of
from quire_kernels.triton.launch import dependent, wait

if TYPE_CHECKING:
    from quire_kernels import HeadNorms

_HEADS = 4
"""Heads a program."""


# slots are a part of some larger tensor: where it begins must not decide what is compiled
@triton.jit(do_not_specialize_on_alignment=["slots"])
def _place_heads(
    out,
    qkv,
    query_weight,
    key_weight,
    eps,
    cos,
    sin,
    cache,
    scales,
    slots,
    num_heads,
    kv_heads,
    token_stride,
    head_stride,
    side_stride,
    NORM: tl.constexpr,
    BYTES: tl.constexpr,
    WORDS: tl.constexpr,
    P: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, BLOCK_HALF)
    there = dims < HALF
    inside = (heads < num_heads + 2 * kv_heads)[:, None] & there[None, :]
    # [HEADS, 1]: what kind of head it is
    is_query = (heads < num_heads)[:, None]
    is_value = (heads >= num_heads + kv_heads)[:, None]

    here = qkv + token * token_stride + (heads * head_stride)[:, None] + dims[None, :]
    wait(DEPENDENT)
    first = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(here + HALF, mask=inside, other=0.0).to(tl.float32)
    x, y = first, second
    if NORM:
        square = (tl.sum(x * x, 1) + tl.sum(y * y, 1)) / (2 * HALF)
        scale = tl.rsqrt(square + eps)[:, None]
        query_x = tl.load(query_weight + dims, mask=there, other=0.0).to(tl.float32)[None, :]
        query_y = tl.load(query_weight + HALF + dims, mask=there, other=0.0).to(tl.float32)[None, :]
        key_x = tl.load(key_weight + dims, mask=there, other=0.0).to(tl.float32)[None, :]
        key_y = tl.load(key_weight + HALF + dims, mask=there, other=0.0).to(tl.float32)[None, :]
        x = x * scale * tl.where(is_query, query_x, key_x)
        y = y * scale * tl.where(is_query, query_y, key_y)
    angle = token * 2 * HALF + dims
    cos_x = tl.load(cos + angle, mask=there, other=0.0)[None, :]
    cos_y = tl.load(cos + HALF + angle, mask=there, other=0.0)[None, :]
    sin_x = tl.load(sin + angle, mask=there, other=0.0)[None, :]
    sin_y = tl.load(sin + HALF + angle, mask=there, other=0.0)[None, :]
    turned_x = tl.where(is_value, first, x * cos_x + y * sin_x)
    turned_y = tl.where(is_value, second, y * cos_y + x * sin_y)

    found = out + (token * num_heads + heads)[:, None] * (2 * HALF) + dims[None, :]
    tl.store(found, turned_x.to(out.dtype.element_ty), mask=inside & is_query)
    tl.store(found + HALF, turned_y.to(out.dtype.element_ty), mask=inside & is_query)

    slot = tl.load(slots + token)
    if slot >= 0:
        side = tl.where(heads >= num_heads + kv_heads, 1, 0).to(tl.int64)
        kept = heads - num_heads - side * kv_heads
        row = kept * P + slot % P
        stored = inside & (heads >= num_heads)[:, None]
        if BYTES or WORDS:
            block = slot // P * kv_heads * P
            # what the model's own format makes of it is what is rounded
            x, y = (
                turned_x.to(out.dtype.element_ty).to(tl.float32),
                turned_y.to(out.dtype.element_ty).to(tl.float32),
            )
            x, y = tl.where(there[None, :], x, 0.0), tl.where(there[None, :], y, 0.0)
            finite = (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
            x, y = tl.where(finite, x, 0.0), tl.where(finite, y, 0.0)
            most = tl.max(tl.maximum(tl.abs(x), tl.abs(y)), 1)
            inverse, unit = scale_of(most, tl.max(tl.where(finite, 0, 1), 1), 448.0 if WORDS else 127.0)
            x, y = x * inverse[:, None], y * inverse[:, None]
            if WORDS:
                place = block * (HALF + 2) + row * HALF + side * (side_stride // 2)
                held = cache + place[:, None] + dims[None, :]
                tl.store(held, (e4m3_of(x) | e4m3_of(y) << 8).to(tl.int16), mask=stored)
            else:
                place = block * (2 * HALF + 4) + row * (2 * HALF) + side * side_stride
                held = cache + place[:, None] + dims[None, :]
                tl.store(held, code_of(x).to(tl.int8), mask=stored)
                tl.store(held + HALF, code_of(y).to(tl.int8), mask=stored)
            beside = block * (2 * HALF + 4) // 4 + kv_heads * P * (2 * HALF) // 4 + row + side * (side_stride // 4)
            tl.store(scales + beside, unit, mask=(heads >= num_heads) & (heads < num_heads + 2 * kv_heads))
        else:
            place = (slot // P * kv_heads * P + row) * (2 * HALF) + side * side_stride
            held = cache + place[:, None] + dims[None, :]
            tl.store(held, turned_x.to(cache.dtype.element_ty), mask=stored)
            tl.store(held + HALF, turned_y.to(cache.dtype.element_ty), mask=stored)


def place_heads(
    qkv: Tensor,
    num_heads: int,
    norms: HeadNorms | None,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """See `Kernels.place_heads`. Each side of `cache` is dense."""
    tokens, every, head = qkv.shape
    half = head // 2
    block = triton.next_power_of_2(half)
    out = torch.empty((tokens, num_heads, head), dtype=qkv.dtype, device=qkv.device)
    _place_heads[(tokens, triton.cdiv(every, _HEADS))](
        out,
        qkv,
        qkv if norms is None else norms.query,
        qkv if norms is None else norms.key,
        0.0 if norms is None else norms.eps,
        cos,
        sin,
        cache.view(torch.int16) if cache.dtype == E4M3 else cache,
        cache.view(torch.float32) if cache.dtype in LARGEST else cache,
        slots,
        num_heads,
        cache.shape[3],
        qkv.stride(0),
        qkv.stride(1),
        cache.stride(0),
        NORM=norms is not None,
        BYTES=cache.dtype == torch.int8,
        WORDS=cache.dtype == E4M3,
        P=cache.shape[2],
        HALF=half,
        BLOCK_HALF=block,
        HEADS=_HEADS,
        # eight numbers a thread
        num_warps=max(1, _HEADS * block // 128),
        **dependent(),
    )
    return out
