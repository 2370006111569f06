"""Manifests as files: which there are, and their text, or problems."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from quire_schemas.problems import Problem
from quire_schemas.yaml_tree import MAX_BYTES

MANIFEST_SUFFIXES = (".yaml", ".yml")


def read_files(paths: Sequence[Path | str]) -> tuple[list[tuple[str, str]], list[Problem]]:
    """(name, text) of each readable file, and what is wrong with the others: see `manifest.read_paths`."""
    texts: list[tuple[str, str]] = []
    problems: list[Problem] = []
    for path in paths:
        if str(path) == "-":
            decode("<stdin>", sys.stdin.buffer.read(MAX_BYTES + 1), texts, problems)
            continue
        if not str(path):
            problems.append(Problem("''", 1, 1, "", "the path is empty", "name a file or a folder; . is this one"))
            continue
        for file in _files(Path(path), problems):
            try:
                with file.open("rb") as opened:
                    content = opened.read(MAX_BYTES + 1)
            except OSError as error:
                message = f"cannot be read: {error.strerror or error}"
                problems.append(Problem(str(file), 1, 1, "", message, "check the path and its permissions"))
                continue
            decode(str(file), content, texts, problems)
    return texts, problems


MAX_ENTRIES = 100_000


class TooMany(Exception):
    """A folder holds more than anybody would keep manifests in."""


def manifests_below(folder: Path) -> Iterator[Path]:
    """The manifests of a folder and of those below it, but of hidden ones. Raises OSError where one cannot be read
    and `TooMany` after `MAX_ENTRIES` files and folders."""

    def refuse(error: OSError) -> None:
        raise error

    seen = 0
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen += len(folders) + len(names)
        if seen > MAX_ENTRIES:
            raise TooMany(f"there are more than {MAX_ENTRIES:,} files in it and below")
        for name in names:
            path = Path(place, name)
            if not name.startswith(".") and path.suffix in MANIFEST_SUFFIXES and path.is_file():
                yield path


def _files(path: Path, problems: list[Problem]) -> list[Path]:
    if not path.is_dir():
        return [path]
    hint = "name the manifests, or a folder that holds only them"
    try:
        files = sorted(manifests_below(path))
    except TooMany as error:
        problems.append(Problem(str(path), 1, 1, "", str(error), hint))
        return []
    except OSError as error:
        message = f"cannot be read: {error.strerror or error} ({error.filename})"
        problems.append(Problem(str(path), 1, 1, "", message, hint))
        return []
    if not files:
        hint = "manifests end in .yaml or .yml"
        problems.append(Problem(str(path), 1, 1, "", "the folder holds no manifests", hint))
    return files


def decode(name: str, content: bytes, texts: list[tuple[str, str]], problems: list[Problem]) -> None:
    """Adds the text of a file to `texts`, or what is wrong with it to `problems`."""
    if len(content) > MAX_BYTES:
        problems.append(Problem(name, 1, 1, "", "the file is larger than 1 MiB", "split it"))
        return
    try:
        texts.append((name, content.decode("utf-8")))
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", "replace")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        byte = content[error.start]
        problems.append(
            Problem(name, line, column, "", f"byte 0x{byte:02x} is not UTF-8", "save the file as UTF-8 text")
        )
