"""Memory of the machine for what is read whole in every step."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_HUGE = 1 << 21

_SLAB = 1 << 26
"""Bytes of a slab. What is a quarter of it or more stands alone: nearly all of it lies on large pages anyway."""

_SMALL = 1 << 16
"""What has fewer bytes is read from a cache."""


def large_pages(tensor: Tensor) -> Tensor:
    """`tensor`, whose memory has not been touched, on large pages if it lies in the machine's memory.

    A step that reads all weights looks up each of their pages. It is a wish: where it is not heard, that costs
    time and nothing else.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if tensor.device.type == "cpu" and advice is not None and tensor.nbytes >= _HUGE:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(advice))
    return tensor


class Slabs:
    """Memory for weights of some megabytes, side by side: large pages hold them whole.

    Alone, each would begin and end in small pages, which for most of a small model's weights is all of them. What
    is a part of something large, as an expert's weight, lies on large pages already. A slab is there as long as
    something in it is.
    """

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def settle(self, tensor: Tensor) -> Tensor:
        """`tensor` in a slab, or itself if it would gain nothing. The given one's memory can then be freed."""
        large = tensor.untyped_storage().nbytes() >= _SLAB // 4
        if tensor.device.type != "cpu" or tensor.nbytes < _SMALL or large:
            return tensor
        if self._left.nbytes < tensor.nbytes:
            memory = torch.empty(_SLAB + _HUGE, dtype=torch.uint8)
            self._left = large_pages(memory[-memory.data_ptr() % _HUGE :][:_SLAB])
        place, self._left = self._left[: tensor.nbytes], self._left[-(-tensor.nbytes // 64) * 64 :]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
