"""A command within its bounds, and ended beyond them with all that it started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.waiting import eventually

from quire_operators.bounded import Bounds, Exceeded, TooLong, TooMuch, run

SHELL = {"PATH": os.environ["PATH"]}


async def test_what_it_is_given_and_what_it_says(tmp_path: Path) -> None:
    done = await run(["sh", "-c", "cat; echo oh >&2; exit 3"], SHELL, tmp_path, Bounds(10, 100), b"given")
    assert done == (3, b"given", b"oh\n")


@pytest.mark.parametrize(
    ("script", "beyond"), [("sleep 60", TooLong), ("head -c 101 /dev/zero; sleep 60", TooMuch)]
)
async def test_beyond_a_bound_it_ends_with_what_it_started(
    script: str, beyond: type[Exceeded], tmp_path: Path
) -> None:
    with pytest.raises(beyond):
        await run(["sh", "-c", f"sleep 60 & echo $! > child; {script}"], SHELL, tmp_path, Bounds(0.3, 100))
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "cmdline"
    eventually(lambda: not child.exists() or not child.read_bytes(), "the child is gone", 5)


async def test_a_file_is_no_larger_than_it_may_be(tmp_path: Path) -> None:
    code, _, said = await run(
        ["sh", "-c", "sleep 0.1; head -c 9999 /dev/zero > f"], SHELL, tmp_path, Bounds(10, 100, file_bytes=1000)
    )
    assert code != 0, said
    assert (tmp_path / "f").stat().st_size == 1000
