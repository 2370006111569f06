"""A folder for sockets, and torch's threads as they were."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For what is compared with torch's own sums: one thread from the reference on, for the whole file."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="q-") as name:
        yield Path(name) / "r"
