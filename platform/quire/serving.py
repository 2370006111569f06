"""uvicorn in a process that decides by itself what a signal means."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn


class Server(uvicorn.Server):
    """Uvicorn without signal handlers of its own, so that several may serve in one process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
