"""Programmatic dependent launch: on Hopper and later a kernel may begin while the one before it ends.

Its programs come up, compute addresses and load what no kernel before it writes (weights); `wait` then holds them
until everything before is done and visible. A small step is hundreds of kernels of a few microseconds, of which
one or two are the coming up.

Every program of a kernel launched so must call `wait` before it returns, on every path: a kernel that ended
without having waited would let the next one run beside what it should have waited for.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import cuda

_HOPPER = 90


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Hold until all kernels before this one are done, and let the next one come up."""
    if DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@functools.cache
def dependent() -> dict[str, bool]:
    """Options of a launch whose kernel takes `DEPENDENT` and calls `wait`, for the GPU of this process."""
    if knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().arch < _HOPPER:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
