"""The locks: every package that Quire runs on, by version and the SHA-256 of each of its published files.

uv resolves `pyproject.toml` once for all machines and versions of Python that Quire runs on. Two files come of it:
torch is published in several builds under one version, and which of them a machine needs is for its owner to say.

    requirements.txt         all but torch; nothing in it needs torch
    requirements-torch.txt   torch as the package index has it, and what that build alone brings: triton, CUDA

A machine takes both, or the first one and a torch of its owner's choice. Nothing younger than `COOLING` is pinned:
what a thief publishes is usually found out within days. No file names an index, an address or a path.

    python -m release.locks           write both
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uv

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = Path(__file__).resolve().parent
RUNTIME: Final = FOLDER / "requirements.txt"
TORCH: Final = FOLDER / "requirements-torch.txt"
COOLING: Final = "7 days"
OLDEST_PYTHON: Final = "3.11"
_PIN: Final = re.compile(r"([a-z0-9][a-z0-9._-]*)==(\S+)(?: ; (.+))?")
_HASH: Final = re.compile(r"--hash=sha256:([0-9a-f]{64})")
HEADS: Final[Mapping[Path, str]] = {
    RUNTIME: """\
# What Quire runs on but for torch, by version and hash. Written by `make lock`; see docs/releases.md.
#     pip install --require-hashes -r requirements.txt
""",
    TORCH: """\
# torch as the package index has it, and what it alone brings. Written by `make lock`; see docs/releases.md.
#     pip install --require-hashes -r requirements.txt -r requirements-torch.txt
""",
}


class BadLock(Exception):
    """A line that no lock has."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One package. `via`: who needs it, `quire` among them. `marker`: on which machines; empty for all."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]
    via: frozenset[str]

    def lines(self) -> str:
        """As pip reads it."""
        head = f"{self.name}=={self.version}" + (f" ; {self.marker}" if self.marker else "")
        hashes = "".join(f" \\\n    --hash=sha256:{each}" for each in self.hashes)
        return f"{head}{hashes}\n    # via {', '.join(sorted(self.via))}\n"


def read(text: str) -> list[Pin]:
    """The pins of a lock, of uv's or of ours. Raises `BadLock` for any line that is none of a pin's: an option
    such as `--index-url`, an address, a path, a requirement without version or hash."""
    pins: list[Pin] = []
    for entry in re.split(r"\n(?=[^ \n#])", "\n" + text)[1:]:
        lines = entry.splitlines()
        pin = _PIN.fullmatch(lines[0].removesuffix("\\").strip())
        if pin is None:
            raise BadLock(f"no pin: {lines[0]}")
        hashes: list[str] = []
        via: set[str] = set()
        for line in (each.strip().removesuffix("\\").strip() for each in lines[1:]):
            if found := _HASH.fullmatch(line):
                hashes.append(found[1])
            elif line.startswith("#"):
                words = re.split(r"[ ,]+", line.strip("# ").removeprefix("via"))
                via |= {each for each in words if each[:1].isalnum()}
            elif line:
                raise BadLock(f"{pin[1]}: {line}")
        if not hashes:
            raise BadLock(f"{pin[1]} has no hash")
        pins.append(Pin(pin[1], pin[2], pin[3] or "", tuple(hashes), frozenset(via)))
    return pins


def of_torch(pins: Iterable[Pin]) -> set[str]:
    """torch, triton, and what nobody but these brings."""
    all_of_them = list(pins)
    found = {"torch", "triton"}
    while more := {pin.name for pin in all_of_them if pin.via and pin.via <= found} - found:
        found |= more
    return found


def resolved() -> list[Pin]:
    """What uv makes of `pyproject.toml` now. Raises `subprocess.CalledProcessError`."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "lock.txt"
        subprocess.run(
            [
                uv.find_uv_bin(), "pip", "compile", "pyproject.toml", "-o", str(lock), "--quiet",
                "--universal", "--python-version", OLDEST_PYTHON, "--generate-hashes", "--no-header",
                "--exclude-newer", COOLING,
            ],
            cwd=ROOT,
            check=True,
        )  # fmt: skip
        return read(lock.read_text())


def write(pins: Iterable[Pin]) -> None:
    """Both files."""
    every = sorted(pins, key=lambda pin: (pin.name, pin.marker))
    apart = of_torch(every)
    for path, head in HEADS.items():
        mine = [pin for pin in every if (pin.name in apart) == (path == TORCH)]
        path.write_text(head + "".join(pin.lines() for pin in mine))


if __name__ == "__main__":
    write(resolved())
