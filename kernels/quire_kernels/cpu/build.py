"""The native library: which level of instructions this processor has, and a library built for it, once.

A library is found by what it is made of: the sources, the level and the flags. A wheel that was built where there
is a compiler brings one for every level. Else it lies in the user's cache and is put there in one move; of two
engines that start at once one builds it, and the other waits. A compiler is needed only where it is not there yet.

    avx2          256 bits, fused products                        (x86-64-v3)
    avx512        512 bits                                        (x86-64-v4)
    avx512_vnni   and sums of four products of bytes
    avx512_bf16   and products of bfloat16 pairs

Nothing is asked at run time: a library holds one level.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from quire_kernels import cache
from quire_kernels.errors import BackendUnavailable, KernelError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
PREBUILT = Path(__file__).parent / "prebuilt"
"""What a wheel brings; there is no such folder beside the sources."""
BUILD_SECONDS = 100.0
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-pthread", "-fno-math-errno", "-w")


@dataclass(frozen=True, slots=True)
class Level:
    """A set of instructions: what the kernel calls it in /proc/cpuinfo, and what the compiler does."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_NEEDS_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c"})
LEVELS = (
    Level(
        "avx512_bf16",
        _NEEDS_AVX512 | {"avx512_vnni", "avx512_bf16"},
        (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    ),
    Level("avx512_vnni", _NEEDS_AVX512 | {"avx512_vnni"}, (*_AVX512, "-mavx512vnni")),
    Level("avx512", _NEEDS_AVX512, _AVX512),
    Level("avx2", frozenset({"avx2", "fma", "f16c"}), _AVX2),
)
"""The best first."""


def best_level(cpu_flags: frozenset[str]) -> Level:
    """The best level whose instructions are all among `cpu_flags`. Raises `BackendUnavailable` if none is."""
    best = next((level for level in LEVELS if level.needs <= cpu_flags), LEVELS[-1])
    check(best, cpu_flags)
    return best


def check(level: Level, cpu_flags: frozenset[str]) -> None:
    """Raises `BackendUnavailable` with the instructions of `level` that are not among `cpu_flags`."""
    if missing := level.needs - cpu_flags:
        raise BackendUnavailable(f"the processor lacks {', '.join(sorted(missing))}")


def cpu_flags() -> frozenset[str]:
    """What this processor can do, in the kernel's words; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def library(level: Level | None = None, *, own: bool = False) -> Path:
    """The file of the library for `level`, or for this processor's best; built if it is not there. `own`: not one
    that a wheel brought.

    Raises `BackendUnavailable`, saying why: the processor, no compiler, or what the compiler said.
    """
    if platform.machine() != "x86_64":
        raise BackendUnavailable(f"there is no native code for {platform.machine()}")
    level = level or best_level(cpu_flags())
    name = _name(level)
    if not own and (brought := PREBUILT / name).exists():
        return brought
    made = _cache() / name
    if made.exists():
        return made
    # where no lock can be had each builds its own; of a folder that cannot be the build says what is wrong with it
    with cache.alone(made.parent):
        return made if made.exists() else put(level, made.parent)


def put(level: Level, folder: Path) -> Path:
    """Builds the library for `level`, whatever this processor can do, and puts it in `folder`.

    Raises `BackendUnavailable`: no compiler, or what it said.
    """
    target = folder / _name(level)
    _build(compiler(), (*_FLAGS, *level.flags), target)
    return target


def _name(level: Level) -> str:
    digest = hashlib.sha256(repr((*_FLAGS, *level.flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"quire-{level.name}-{digest.hexdigest()[:16]}.so"


def opened(level: Level | None = None) -> ctypes.CDLL:
    """The library for `level`, loaded; built here where a wheel's is for another system. Raises as `library`."""
    path = library(level)
    try:
        return load(path)
    except BackendUnavailable as error:
        if path.parent != PREBUILT:
            raise
        log.warning("%s; it is built here instead", error)
    return load(library(level, own=True))


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`. Raises `BackendUnavailable` if it cannot be loaded."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"{path} cannot be loaded: {error}") from error


def _cache() -> Path:
    try:
        return cache.folder("kernels")
    except KernelError as error:
        raise BackendUnavailable(f"there is no place for the library: {error}") from error


def compiler() -> list[str]:
    """How a C++ compiler is called: as CXX says, or the first that is there."""
    named = os.environ.get("CXX", "")
    for words in [shlex.split(named)] if named.strip() else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(words[0]) is not None:
            return words
    raise BackendUnavailable(
        f"CXX names {named}, which is not there"
        if named.strip()
        else "no C++ compiler is installed (c++, g++ or clang++)"
    )


def _build(compiler: list[str], flags: tuple[str, ...], target: Path) -> None:
    """Each source by a compiler of its own, all at once; then one library."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            sources = sorted(SOURCES.glob("*.cpp"))
            objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
            parts = zip(sources, objects, strict=True)
            _all_of([[*compiler, *flags, "-c", "-o", out, str(source)] for source, out in parts])
            _all_of([[*compiler, *flags, "-shared", "-o", str(made), *objects]])
            made.replace(target)
    except OSError as error:
        raise BackendUnavailable(f"the library cannot be built in {target.parent}: {error}") from error


def _all_of(commands: list[list[str]]) -> None:
    """Runs all at once. Raises `BackendUnavailable` with what one of them complains of."""
    until = time.monotonic() + BUILD_SECONDS
    running: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            running.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
        for command, process in zip(commands, running, strict=True):
            said, _ = process.communicate(timeout=max(until - time.monotonic(), 0.0))
            if process.returncode != 0:
                lines = [*filter(None, map(str.strip, said.splitlines())), f"exit {process.returncode}"]
                wrong = next((line for line in lines if "error" in line), lines[0])
                raise BackendUnavailable(f"{command[0]} failed: {wrong[:300]}")
    except subprocess.TimeoutExpired as error:
        raise BackendUnavailable(f"the compiler was not done after {BUILD_SECONDS:.0f} s") from error
    finally:
        for process in running:
            with process:
                if process.poll() is None:  # what a compiler starts would go on without it
                    os.killpg(process.pid, signal.SIGKILL)
