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


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="q-") as name:
        yield Path(name) / "r"
