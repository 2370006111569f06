"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for GPUs that are not there.

Either needs a process of its own: whether a kernel is interpreted is decided when Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.effort import times

HERE = Path(__file__).parent
COMPILING = ["80", "90", "100"]
SMALL = ["86", "89", "120"]
"""Of which cards have less than half as much shared memory as those above."""
BY_NIGHT = {"triton_ops_experts.py", "triton_ops_quantized.py", "triton_ops_scaled.py"}
"""Suites that take the interpreter longest; CI has those that every model needs, without their longest cases."""
TOGETHER = {"triton_ops.py": ("triton_ops_coded.py", "triton_ops_tilings.py")}
"""Suites that are short: a process takes longer to start than they do."""


def passes(arguments: list[str], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, cwd=HERE
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "suite",
    [
        pytest.param(name, marks=[pytest.mark.nightly] if name in BY_NIGHT else [])
        for name in sorted(path.name for path in HERE.glob("triton_ops*.py"))
        if not any(name in others for others in TOGETHER.values())
    ],
)
def test_in_the_interpreter(suite: str) -> None:
    which = times("not nightly", "")
    suites = [suite, *TOGETHER.get(suite, ())]
    passes(
        ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", which, *suites], TRITON_INTERPRET="1"
    )


@pytest.mark.nightly
def test_where_triton_cannot_compile_what_it_needs_the_backend_says_so(tmp_path: Path) -> None:
    """As in an image with a driver and without a compiler: else an engine would end by whatever Triton raised."""
    program = """
import torch
torch.cuda.is_available = lambda: True
from quire_kernels import BackendUnavailable, load
try:
    load("triton")
except BackendUnavailable as error:
    assert "/nowhere/cc" in str(error), error
    assert "needs libcuda.so.1, and once a C compiler" in str(error), error
else:
    raise AssertionError
"""
    nowhere = {"CC": "/nowhere/cc", "TRITON_LIBCUDA_PATH": "/nowhere", "TRITON_CACHE_DIR": str(tmp_path)}
    passes(["-c", program], TRITON_INTERPRET="0", **nowhere)


@pytest.mark.nightly
@pytest.mark.parametrize("capability", COMPILING + SMALL)
def test_every_launch_compiles_and_fits(capability: str, tmp_path: Path) -> None:
    passes(["triton_launches.py", capability], TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


@pytest.mark.nightly
@pytest.mark.parametrize("capability", COMPILING)
def test_every_tiling_that_is_timed_compiles(capability: str, tmp_path: Path) -> None:
    passes(
        ["-m", "tests.unit.kernels.triton_tilings", capability],
        TRITON_CACHE_DIR=str(tmp_path),
        TRITON_INTERPRET="0",
        PYTHONPATH=str(HERE.parents[2]),
    )


@pytest.mark.nightly
@pytest.mark.parametrize("capability", COMPILING)
def test_every_variant_compiles(capability: str, tmp_path: Path) -> None:
    passes(["triton_launches.py", capability, "--every"], TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
