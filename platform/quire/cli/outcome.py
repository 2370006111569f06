"""How a command ends: exit codes, and the two lines of an error.

Exceptions:

    CommandEnded
    ├── CommandFailed      has message, hint and exit_code
    ├── Interrupted        Ctrl-C; has a sentence on what goes on without this command
    └── ReaderLeft         nobody reads stdout any more
"""

from __future__ import annotations

import enum
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Self


class ExitCode(enum.IntEnum):
    """What a script may rely on. 2 is click's own code for a bad command line, so `changes exist` is 10."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "success; for `plan`, also when changes exist, unless `--detailed-exitcode`"
    UNEXPECTED = 1, "unexpected error"
    USAGE = 2, "bad command line"
    INVALID = 3, "manifest invalid, or what it asks for cannot be had here"
    TIMED_OUT = 4, "timed out, still progressing"
    CONFLICT = 5, "conflict: changed meanwhile, or owned by another manager"
    FAILED = 6, "terminal failure: stalled, or deleted meanwhile"
    UNREACHABLE = 7, "control plane unreachable, failed to start, or cannot use its store"
    NOT_FOUND = 8, "not found"
    CHANGES = 10, "`plan --detailed-exitcode`, `diff`: changes exist"
    INTERRUPTED = 130, "interrupted by the user; what was started goes on"


class CommandEnded(Exception):
    """The command is over before its last line."""


class ReaderLeft(CommandEnded):
    """Whoever read our stdout is gone, as `head` is after its last line."""


class CommandFailed(CommandEnded):
    """A command ends with this message, hint and exit code."""

    def __init__(self, message: str, hint: str | None, code: ExitCode) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = code


class Interrupted(CommandEnded):
    """The user pressed Ctrl-C."""

    def __init__(self, goes_on: str) -> None:
        super().__init__(goes_on)
        self.goes_on = goes_on


@contextmanager
def interruptible(goes_on: str) -> Iterator[None]:
    """Within this block Ctrl-C ends the command with a sentence on what goes on without it."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(goes_on) from error


def usage_error(message: str, hint: str) -> NoReturn:
    """End with exit code 2."""
    raise CommandFailed(message, hint, ExitCode.USAGE)


def program() -> str:
    """What to type for `platform`: that word where the shell finds this program by it, else this one's path."""
    invoked = Path(sys.argv[0])
    if invoked.name != "platform" or not invoked.is_file():
        return "platform"
    found = shutil.which("platform")
    if found is not None and Path(found).samefile(invoked):
        return "platform"
    here, absolute = Path.cwd(), Path(os.path.abspath(invoked))
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def spelled(text: str) -> str:
    """`text` with the commands in it as they can be typed here."""
    return re.sub(r"(?<![\w./-])platform (?=[a-z])", lambda _: f"{program()} ", text)


def report(message: str, hint: str | None = None) -> None:
    """Print an error to stderr."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {spelled(hint)}", file=sys.stderr)
