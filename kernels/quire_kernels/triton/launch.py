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


@triton.jit
def fetch(places):
    """Bring the cache lines of the pointers `places` nearer, so that a load after `wait` finds them in L2. Only
    where kernels are dependent: the interpreter knows no assembly.
    """
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l",
        [places.to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@functools.cache
def dependent() -> dict[str, bool]:
    """Options of a launch whose kernel takes `DEPENDENT` and calls `wait`, for the GPU of this process."""
    if knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().arch < _HOPPER:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
