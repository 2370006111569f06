"""Steps that stay on the device, in Triton's interpreter: it needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def passes(suite: str = "resident_cases.py", *options: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *options, suite],
        env=os.environ | {"TRITON_INTERPRET": "1"} | environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_in_the_interpreter() -> None:
    passes()


def test_memory_in_the_interpreter() -> None:
    passes("resident_memory.py")


@pytest.mark.nightly
def test_every_kernel_in_the_interpreter() -> None:
    passes("resident_cases.py", "-m", "", QUIRE_WHOLE="1")
