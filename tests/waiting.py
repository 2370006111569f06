"""Waiting for what other processes do, for tests without an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def eventually(
    true: Callable[[], Any], what: str, seconds: float = 90.0, pause: float = 0.02, logs: Callable[[], str] = str
) -> Any:
    """The first answer of `true` that is one, asked every `pause` seconds; in the end an error with `logs`."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"did not happen in time: {what}\n{logs()}"
        time.sleep(pause)
    return value


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
