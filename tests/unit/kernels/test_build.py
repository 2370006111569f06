"""The native library: built once, found again, and what is said where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.waiting import alive, eventually

from quire_kernels import BackendUnavailable, best, load
from quire_kernels.cpu import build

ROOT = Path(__file__).parents[3]
AVX2 = frozenset({"avx2", "fma", "f16c"})
Compiler = Callable[[str], Path]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Makes a shell script the compiler, and the cache an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def use(script: str) -> Path:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return path

    return use


WRITES = 'while [ "$1" != -o ]; do shift; done; echo made >"$2"'


def test_the_best_level_is_the_one_whose_instructions_are_all_there() -> None:
    avx512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert build.best_level(AVX2 | {"sse4_2"}).name == "avx2"
    assert build.best_level(avx512 - {"avx512vl"}).name == "avx2"
    assert build.best_level(avx512).name == "avx512"
    assert build.best_level(avx512 | {"avx512_vnni"}).name == "avx512_vnni"
    assert build.best_level(avx512 | {"avx512_vnni", "avx512_bf16"}).name == "avx512_bf16"
    with pytest.raises(BackendUnavailable, match="lacks fma"):
        build.best_level(AVX2 - {"fma"})
    with pytest.raises(BackendUnavailable, match="lacks avx2, f16c, fma"):
        build.best_level(frozenset())


def test_of_two_who_need_it_at_once_one_builds_it(compiler: Compiler, tmp_path: Path) -> None:
    compiler(f'echo "$@" >>{tmp_path}/calls; sleep 0.3; {WRITES}')
    ask = "from quire_kernels.cpu import build; print(build.library(build.LEVELS[-1], own=True))"
    both = [subprocess.Popen([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=60)[0] for process in both)
    assert first == second != ""
    sources = len(list(build.SOURCES.glob("*.cpp")))
    assert len((tmp_path / "calls").read_text().splitlines()) == sources + 1


def test_a_library_is_built_once_and_then_needs_no_compiler(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(WRITES)
    level = build.LEVELS[-1]
    path = build.library(level)
    assert path.read_text() == "made\n"
    assert [other.name for other in path.parent.iterdir()] == [path.name], "nothing is left beside it"
    compiler("exit 1")
    assert build.library(level) == path
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert build.library(level) == path
    assert _fails(build.LEVELS[0]).startswith("CXX names /nowhere/c++")


def test_what_a_wheel_brings_is_taken_first(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(WRITES)
    level = build.LEVELS[-1]
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    brought = build.put(level, tmp_path / "prebuilt")
    compiler("exit 1")
    assert build.library(level) == brought
    # another release's is not taken
    brought.rename(brought.with_name("quire-avx2-0123456789abcdef.so"))
    assert "failed" in _fails(level)


def test_a_wheel_of_another_system_is_passed_over(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler(WRITES)
    level = build.LEVELS[-1]
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    brought = build.put(level, tmp_path / "prebuilt")
    compiler('while [ "$1" != -o ]; do shift; done; exec cc -shared -o "$2" -x c /dev/null')
    assert build.opened(level)._name != str(brought)
    assert f"{brought} cannot be loaded" in caplog.text
    compiler("exit 1")
    assert build.opened(level)._name != str(brought), "it is there now"


@pytest.mark.nightly
def test_a_wheel_brings_every_level(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("quire-*-py3-none-linux_x86_64.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    brought = {path.name for path in (tmp_path / "site/quire_kernels/cpu/prebuilt").iterdir()}
    assert brought == {build._name(level) for level in build.LEVELS}
    alone = {"PYTHONPATH": str(tmp_path / "site"), "CXX": "/nowhere/c++", "XDG_CACHE_HOME": str(tmp_path)}
    script = "from quire_kernels.cpu import build; print(build.load(build.library())._name)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | alone, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path / "site"))


def test_other_sources_or_flags_are_another_library(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(WRITES)
    first = build.library(build.LEVELS[-1])
    sources = tmp_path / "native"
    sources.mkdir()
    for source in build.SOURCES.iterdir():
        (sources / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.library(build.LEVELS[-1]) == first
    with (sources / "simd.h").open("a") as file:
        file.write("// another comment\n")
    assert build.library(build.LEVELS[-1]) != first
    assert build.library(build.LEVELS[0]).name.startswith("quire-avx512_bf16-")


def test_what_the_compiler_says_is_told_and_nothing_stays_behind(compiler: Compiler, tmp_path: Path) -> None:
    compiler("echo 'error: no such instruction' >&2; exit 1")
    assert "compiler failed: error: no such instruction" in _fails(build.LEVELS[-1])
    compiler("exit 3")
    assert "compiler failed: exit 3" in _fails(build.LEVELS[-1])
    assert list((tmp_path / "cache/quire/kernels").iterdir()) == []


def test_a_compiler_may_be_named_with_words_behind_it(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiler(f'[ "$1" = --wrapped ] || exit 1; {WRITES}')
    monkeypatch.setenv("CXX", f"{path} --wrapped")
    assert build.library(build.LEVELS[-1]).exists()


def test_of_what_the_compiler_says_the_error_is_told(compiler: Compiler) -> None:
    compiler("echo 'In file included from a.h:1,'; echo 'b.h:2: error: no such thing'; exit 1")
    assert _fails(build.LEVELS[-1]).endswith("failed: b.h:2: error: no such thing")


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert "XDG_CACHE_HOME names one" in _fails(build.LEVELS[-1])


def test_a_cache_that_cannot_be_written_is_told(compiler: Compiler, tmp_path: Path) -> None:
    compiler(WRITES)
    (tmp_path / "cache").write_text("a file")
    assert f"cannot be built in {tmp_path}/cache/quire/kernels" in _fails(build.LEVELS[-1])


def test_a_compiler_that_hangs_is_ended(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler("exec sleep 60")
    monkeypatch.setattr(build, "BUILD_SECONDS", 0.2)
    assert "not done after" in _fails(build.LEVELS[-1])


def ended(pid: int) -> bool:
    return not alive(pid)


def test_what_a_compiler_has_started_is_ended_with_it(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    compiler(f"sleep 60 & echo $! >> {started}; wait")
    monkeypatch.setattr(build, "BUILD_SECONDS", 2.0)
    assert "not done after" in _fails(build.LEVELS[-1])
    for number in started.read_text().split():
        eventually(partial(ended, int(number)), "it is ended", seconds=10)


def test_a_file_that_is_no_library_is_told(compiler: Compiler) -> None:
    compiler(WRITES)
    path = build.library(build.LEVELS[-1])
    with pytest.raises(BackendUnavailable, match="cannot be loaded"):
        build.load(path)


def test_without_a_compiler_the_reference_kernels_serve_and_say_why(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    kernels, lacking = best("cpu", 1)
    assert kernels.name == "reference"
    assert lacking == "CXX names /nowhere/c++, which is not there"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_reference_kernels_serve_one_and_say_why() -> None:
    with pytest.raises(BackendUnavailable, match="torch sees no CUDA device"):
        load("triton")
    kernels, lacking = best("cuda", 1)
    assert (kernels.name, lacking) == ("reference", "torch sees no CUDA device")


def _fails(level: build.Level) -> str:
    with pytest.raises(BackendUnavailable) as caught:
        build.library(level)
    return str(caught.value)
