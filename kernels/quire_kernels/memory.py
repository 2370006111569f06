"""Memory of the machine for what is read whole in every step."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

_HUGE = 1 << 21


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
