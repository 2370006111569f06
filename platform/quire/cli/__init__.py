"""The `platform` command. Its parts are in `program`; this is the door, and it loads nothing before it is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Ctrl-C while the command is still being loaded ends as
    quietly as later on: imports are a good part of what a short command does."""
    try:
        return _loaded()(args)
    except KeyboardInterrupt:
        return 130


def _loaded() -> Callable[[Sequence[str] | None], int]:
    """`program.run`. Until it is there Ctrl-C ends the process by itself: an exception in the middle of an import
    may be one that Python prints, and goes on, for it ignores what callbacks of its import locks raise."""
    import os
    import signal

    def end(*_: Any) -> None:
        os._exit(130)

    ours = False
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        try:
            signal.signal(signal.SIGINT, end)
            ours = True
        except ValueError:
            pass  # only the main thread hears of signals
    try:
        from quire.cli.program import run
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return run
