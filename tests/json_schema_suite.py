"""The official JSON-Schema-Test-Suite. It is not kept here: the source distribution of `jsonschema` brings it.

pip fetches it by version and hash into a cache of the user's; what is there already is used if it is the same.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

VERSION = "4.26.0"
SHA256 = "0c26707e2efad8aa1bfc5b7ce170f3fccc2e4918ff85989ba9ffa9facb2be326"
CACHE = Path.home() / ".cache/quire/tests"
ARCHIVE = CACHE / f"jsonschema-{VERSION}.tar.gz"
FOLDER = f"jsonschema-{VERSION}/json/tests/draft2020-12/"


@dataclass(frozen=True, slots=True)
class Case:
    """One instance of a group."""

    description: str
    data: Any
    valid: bool


@dataclass(frozen=True, slots=True)
class Group:
    """A schema and its instances. `file` is without folder of the draft and ending, `optional/format/date`."""

    file: str
    description: str
    schema: Any
    exact: Any
    """The schema with its numbers as decimals."""
    cases: tuple[Case, ...]


def is_here() -> bool:
    """Whether the archive is in the cache, and the one that is meant."""
    return ARCHIVE.is_file() and hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() == SHA256


def fetch() -> None:
    """Have the archive in the cache. Raises `subprocess.CalledProcessError` where pip cannot get it."""
    if is_here():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    wanted = CACHE / "requirements.txt"
    wanted.write_text(f"jsonschema=={VERSION} --hash=sha256:{SHA256}\n")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"),
            *("--no-binary", "jsonschema", "--require-hashes", "-r", str(wanted), "-d", str(CACHE)),
        ],
        check=True,
    )
    assert is_here()


def groups() -> Iterator[Group]:
    """All groups of draft 2020-12: what is required, then what is optional."""
    with tarfile.open(ARCHIVE) as archive:
        names = sorted(name for name in archive.getnames() if name.startswith(FOLDER) and name.endswith(".json"))
        for name in sorted(names, key=lambda name: "/optional/" in name):
            opened = archive.extractfile(name)
            assert opened is not None
            text = opened.read().decode()
            for group, exact in zip(json.loads(text), json.loads(text, parse_float=Decimal), strict=True):
                cases = tuple(Case(case["description"], case["data"], case["valid"]) for case in group["tests"])
                file = name.removeprefix(FOLDER).removesuffix(".json")
                yield Group(file, group["description"], group["schema"], exact["schema"], cases)
