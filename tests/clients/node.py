"""The client packages for Node: installed once for each lockfile, and scenarios of theirs as processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

import pytest
from tests.clients.server import ENDLESS, LENGTHY

HERE: Final = Path(__file__).resolve().parent
LOCK: Final = HERE / "package-lock.json"
OLDEST: Final = 20
ENVIRONMENT: Final = dict(os.environ)
"""As it was before the tests cut everything but the server off."""


def lacking(reason: str) -> NoReturn:
    """Skip what needs Node; in CI, where it has to be there, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def fetched(folder: Path = HERE) -> str:
    """Have the packages of a folder's lockfile there, if they are not yet. What is in the way; empty: nothing."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        return "there is no Node on this machine, or no npm"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < OLDEST:
        return f"Node {version} is older than {OLDEST}"
    stamp, lockfile = folder / "node_modules" / ".installed", folder / LOCK.name
    wanted = hashlib.sha256(lockfile.read_bytes() + version.encode()).hexdigest()
    with lockfile.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of the run may come here at once
        if not stamp.exists() or stamp.read_text() != wanted:
            command = [npm, "ci", "--prefer-offline", "--no-audit", "--no-fund"]
            done = subprocess.run(
                command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
            )
            if done.returncode:
                return f"npm ci failed: {done.stderr[-2000:]}"
            stamp.write_text(wanted)
    return ""


def installed(folder: Path = HERE) -> None:
    """Skip where the packages cannot be had."""
    if problem := fetched(folder):
        lacking(problem)


class HasUrl(Protocol):
    """A server that clients of the OpenAI API can talk to."""

    @property
    def url(self) -> str: ...


class Running:
    """Node with the scenarios of these names."""

    def __init__(self, server: HasUrl, *names: str) -> None:
        self.child = subprocess.Popen(
            ["node", str(HERE / "scenarios.mjs"), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "QUIRE_URL": server.url,
                "QUIRE_ENDLESS": json.dumps(ENDLESS),
                "QUIRE_LENGTHY": LENGTHY,
            },
        )

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it prints, as it comes."""
        assert self.child.stdout is not None
        for line in self.child.stdout:
            yield json.loads(line)

    def until(self, said: str) -> None:
        """Wait until a scenario says that word."""
        for line in self.lines():
            if line.get("said") == said:
                return
            assert line.get("ok", True), line["error"]
        raise AssertionError(f"it ended without {said}")

    def go_on(self) -> None:
        """Let a scenario that waits end."""
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.communicate()


def outcomes(server: HasUrl, names: Sequence[str]) -> Mapping[str, dict[str, Any]]:
    """Run these scenarios in one process; what became of each, by name."""
    with Running(server, *names) as running:
        found = {line["name"]: line for line in running.lines() if "name" in line}
    print(*(f"{line['seconds']:.2f} s {name}" for name, line in found.items()), sep="\n", file=sys.stderr)
    return found


def listed() -> list[str]:
    """The names of all scenarios of the script."""
    command = ["node", str(HERE / "scenarios.mjs"), "--list"]
    environment = {**os.environ, "QUIRE_URL": "http://127.0.0.1:9/v1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    names: list[str] = json.loads(done.stdout)
    return names
