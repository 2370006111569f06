"""A process that works beside the one that starts it, on descriptors that it inherits, and ends with it.

It stays in its starter's process group, so that what is sent to that reaches both, and writes to the same log.
A starter that is gone is seen in two ways, however it went: the kernel kills the sibling, if it asked for that
(`die_with_starter`), and its end of their socket pair reads the end.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1


def start(argv: Sequence[str], env: Mapping[str, str], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start it with these descriptors open, by their numbers. Raises `OSError`."""
    return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, pass_fds=descriptors, close_fds=True)


def die_with_starter() -> None:
    """Have this process killed when the one that started it is gone. One that was gone before is seen by the
    socket pair alone. Raises `OSError`."""
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError("the kernel does not tell of a parent's end")
