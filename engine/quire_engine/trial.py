"""A child process in which a grammar from a request is tried before the engine itself compiles it.

The compiler is fast and checks much, but it recurses: some thousand rules that lead to each other overflow its
stack, and that ends the process it runs in. So it first runs here, where a grammar may end nothing but a process
made for it: on a stack smaller than that of the engine's threads, with bounds on memory and processor time that
the kernel keeps (`setrlimit`, `setitimer`), and with one token for each byte in place of the vocabulary. Some text
is then written by it, because not all that costs too much shows at the beginning.

Run as `python -P -m quire_engine.trial` it reads a JSON object a line, forks for each, and answers with what the
fork said or died of; it ends with its input. A fork costs some milliseconds, so a hostile grammar costs what it is
allowed to and little more. `Trial` is the engine's side of it; a child that says nothing in time is replaced by
the next try.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llguidance

QUICK_SECONDS, CPU_SECONDS = 0.025, 0.3
"""Processor time that a grammar may take to compile: at first, and when it is tried again. What is usual takes a
third of the first.
"""
WALL_SECONDS = 3.0
"""The same by the clock: on a machine with other work a process gets only a part of the time."""
START_SECONDS = 30.0
"""Until a new child has to be ready, which it is in a tenth of a second where nothing else runs."""
MEMORY = 1 << 30
"""Bytes of address space of the child."""
STACK = 1 << 20
"""Bytes of stack on which the child compiles. Threads of the engine have at least twice as much."""

NICENESS = 5
"""Of the child and of the engine's threads that compile: a running request goes before one that is to begin."""
WALK = 64
"""Bytes of text that the child writes by a grammar."""

LIMITS = llguidance.LLParserLimits(
    max_items_in_row=10_000,  # an object takes four for each property that may be absent
    max_lexer_states=20_000,  # a state takes up to 2 kB, and each running request may have its own
    step_lexer_fuel=100_000,
    verbose_errors=False,  # what the model wrote so far is not for logs
)
"""What a compiled grammar may take, in the compiler's own units: about 10 ms for one mask."""


def stand_back() -> None:
    """Let the threads that compute go before this one."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class TrialFailed(Exception):
    """A grammar could not be tried; which says nothing about it."""


class TakesTooLong(Exception):
    """A grammar took all the time it was given."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wrong` says in words for the author what is wrong with a grammar; empty if nothing is. `size` is the bytes
    that it takes.
    """

    wrong: str
    size: int = 0


class Trial:
    """Tries grammars, one at a time; the child starts with the first."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def check(
        self, source: str, size: int, special: Mapping[str, int], eos_token_ids: tuple[int, ...], seconds: float
    ) -> Verdict:
        """Try a grammar for so many seconds of processor time.

        Raises `TakesTooLong`; `TrialFailed` where the machine, and not the grammar, is to blame.
        """
        asked = json.dumps(
            {
                "source": source,
                "size": size,
                "special": dict(special),
                "eos": eos_token_ids,
                "seconds": seconds,
                "wall": WALL_SECONDS,
            }
        )
        with self._lock:
            child = self._started()
            try:
                _send(child, asked.encode() + b"\n")
                answer = _line(child, WALL_SECONDS)
            except BrokenPipeError:
                answer = b""
            except TimeoutError:
                self._end()
                raise TrialFailed("the machine is too busy") from None
            if not answer:
                self._end()
                raise TrialFailed("the process that tries them was killed")
        said = json.loads(answer)
        match said["died"]:
            case None:
                return Verdict(said["error"], said["size"])
            case signal.SIGPROF:
                raise TakesTooLong
            case signal.SIGALRM:
                raise TrialFailed("the machine is too busy")
            case signal.SIGKILL:
                raise TrialFailed("the process that tries them was killed")
            case _:
                return Verdict("it is too large or too deeply nested to compile")

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._end()
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "quire_engine.trial"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            try:
                _line(self._child, START_SECONDS)
            except TimeoutError:
                self._end()
                raise TrialFailed("the process that tries them does not start") from None
        return self._child

    def _end(self) -> int:
        """Kill the child, or find it dead; its exit code."""
        child, self._child = self._child, None
        if child is None:
            return 0
        if child.poll() is None:
            child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what it did not read is of no use any more
                    pipe.close()
        return child.wait()


def _send(child: subprocess.Popen[bytes], line: bytes) -> None:
    if child.stdin is not None:
        child.stdin.write(line)
        child.stdin.flush()


def _line(child: subprocess.Popen[bytes], patience: float) -> bytes:
    """The child's next line; empty if it died. Raises `TimeoutError`."""
    until = time.monotonic() + patience
    got = bytearray()
    while child.stdout is not None and not got.endswith(b"\n"):
        ready, _, _ = select.select([child.stdout], [], [], max(until - time.monotonic(), 0.0))
        if not ready:
            raise TimeoutError
        part = os.read(child.stdout.fileno(), 65536)
        if not part:
            return b""
        got += part
    return bytes(got)


# ── in the child ──────────────────────────────────────────────────────────────────────────────────────────


class _Bytes:
    """A tokenizer as the compiler wants it: special tokens in their places, and a token for each byte above."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, size: int, special: Mapping[str, int], eos_token_ids: list[int]) -> None:
        self.tokens = [b""] * size + [bytes([byte]) for byte in range(256)]
        for name, index in special.items():
            self.tokens[index] = name.encode()
        self.special_token_ids = sorted({*special.values(), *eos_token_ids})
        self.eos_token_id = eos_token_ids[0]
        self._size = size

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._size + byte for byte in (text.encode() if isinstance(text, str) else text)]


def _tried(asked: Mapping[str, Any], tokenizer: llguidance.LLTokenizer) -> dict[str, Any]:
    before = _own_memory()
    matcher = llguidance.LLMatcher(tokenizer, asked["source"], log_level=0, limits=LIMITS)
    choose = random.Random(0)  # noqa: S311 - which text is written is no secret
    first = asked["size"]
    for _ in range(WALK):
        if matcher.is_stopped():  # also when it is in error
            break
        bits = int.from_bytes(matcher.compute_bitmask()[first // 8 :], "little") >> first % 8
        allowed = [index for index in range(256) if bits >> index & 1]
        if not allowed or matcher.is_error():
            break
        matcher.consume_token(first + choose.choice(allowed))
    return {"died": None, "error": explain(matcher), "size": _own_memory() - before}


def _own_memory() -> int:
    """Bytes that this process has of its own: not of files, which a fork reads anew."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * resource.getpagesize()


def explain(matcher: llguidance.LLMatcher) -> str:
    """Why a matcher is in error, in few words; empty if it is not."""
    if not matcher.is_error():
        return ""
    said = matcher.get_error()
    if said.startswith("NoExtensionBias"):
        return "no text satisfies it"
    lines = (line.strip() for line in re.split(r"\n<(?:state|non-verbose)", said)[0].split("\n"))
    # an excerpt of what is the compiler's notation, not the author's, and a caret below it
    kept = " ".join(line for line in lines if line and not re.match(r"\d+ \||[\^~]+$", line))
    kept = re.sub(r"^at (\d+)\((\d+)\): ", r"line \1, column \2: ", kept)
    return kept if len(kept) <= 300 else kept[:150] + " … " + kept[-149:]


def _tokenizer(asked: Mapping[str, Any], made: dict[str, llguidance.LLTokenizer]) -> llguidance.LLTokenizer:
    """The tokenizer of a vocabulary, made once: for a large one that takes longer than most grammars."""
    key = json.dumps([asked["size"], asked["special"], asked["eos"]])
    if key not in made:
        made.clear()
        wrapped: Any = _Bytes(asked["size"], asked["special"], asked["eos"])
        made[key] = llguidance.LLTokenizer(wrapped, eos_token=asked["eos"])
    return made[key]


def _in_a_fork(asked: Mapping[str, Any], tokenizer: llguidance.LLTokenizer) -> bytes:
    """What a process of its own says of a grammar, or what that died of."""
    reader, writer = os.pipe()
    fork = os.fork()
    if not fork:
        signal.setitimer(signal.ITIMER_REAL, asked["wall"])
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        thread = threading.Thread(target=lambda: os.write(writer, json.dumps(_tried(asked, tokenizer)).encode()))
        thread.start()
        thread.join()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(fork, 0)
    return said or json.dumps({"died": os.WTERMSIG(status)}).encode()


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    threading.stack_size(STACK)
    out = sys.stdout.buffer
    out.write(b"{}\n")
    out.flush()
    made: dict[str, llguidance.LLTokenizer] = {}
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        out.write(_in_a_fork(asked, _tokenizer(asked, made)) + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
