"""The `platform` command. Its parts are in `program`; this is the door, and it loads nothing before it is open."""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Ctrl-C while the command is still being loaded ends as
    quietly as later on: imports are a good part of what a short command does."""
    try:
        from quire.cli.program import run

        return run(args)
    except KeyboardInterrupt:
        return 130
