"""What a model repository of a hub holds, which of its files are needed, and what a fetch says of itself.

`choose` is the one place that knows which files a model or a tokenizer consists of. Weights are safetensors only:
`model.safetensors`, or exactly the shards that `model.safetensors.index.json` lists, so that a second copy of the
weights in the same repository (`consolidated.safetensors`, `original/…`) is not fetched.

A file is known by its digest, which is also its name among the blobs of the cache: the SHA-256 of a large file, or
the SHA-1 of git's blob for a small one.

Exceptions are those of `checkpoint`: `MissingFile` and `UnsupportedFeature`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Literal

import msgspec

from quire_schemas.checkpoint_files import INDEX, MissingFile, UnsupportedFeature

Part = Literal["model", "tokenizer"]
"""What of a repository is wanted: all of a model, or its tokenizer alone."""

SINGLE = "model.safetensors"
TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
MODEL_FILES = ("config.json", INDEX, *TEXT_FILES)
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".h5", ".msgpack", ".ot", ".npz")
"""Endings of weights in formats that are not read; most of them can carry code."""
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class RepositoryFile(msgspec.Struct, frozen=True):
    """One file of a commit. `digest`: 64 hexadecimal digits are SHA-256, 40 are git's SHA-1 of a blob."""

    path: str
    size: int
    digest: str

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest) or self.size < 0:
            raise ValueError(f"{self.path}: {self.digest!r} with {self.size} bytes is no digest of a file")


class Digest:
    """Computes a file's digest while its bytes pass: of the kind that `file` has."""

    def __init__(self, file: RepositoryFile) -> None:
        self._file = file
        self.reset()

    def reset(self) -> None:
        if len(self._file.digest) == 64:
            self._hash = hashlib.sha256()
        else:
            self._hash = hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        self._hash.update(data)

    def matches(self) -> bool:
        return self._hash.hexdigest() == self._file.digest


class Record(msgspec.Struct, frozen=True):
    """What is known of one part of one commit: its files, and which of them were verified by their digests.

    `verified` holds the size and the time of change (ns) that a file had when its digest was right; a file that
    has others now is verified again. `brought` are the digests of the files that this platform downloaded; the
    others were in the cache already.
    """

    repository: str
    commit: str
    part: Part
    files: tuple[RepositoryFile, ...]
    verified: dict[str, tuple[int, int]] = {}
    brought: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


class FetchJob(msgspec.Struct, frozen=True):
    """What a fetch is to do. It travels over the process's standard input: `token` never stands anywhere else.

    `look` finds the commit of `revision`, and fetches its small files; `fetch` all that is needed of the commit
    `revision`; `commit` only finds the commit. `cache` is the folder of the cache, `records` that of the records.
    """

    op: Literal["look", "fetch", "commit"]
    repository: str
    revision: str
    part: Part
    cache: str
    records: str
    token: str | None = None
    """None: the token that Hugging Face's own tools would use."""


class FetchEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a fetch's standard output. `failed` and `done` are the last."""

    event: Literal["progress", "done", "failed"]
    done: int = 0
    """Bytes that are on disk."""
    total: int = 0
    commit: str = ""
    reason: str = ""
    message: str = ""
    hint: str = ""
    path: str = "spec.source"
    """The field that the failure is about."""


def small_files(files: Iterable[RepositoryFile], part: Part) -> list[RepositoryFile]:
    """The files that can be fetched before anybody decided to fetch the weights."""
    names = MODEL_FILES if part == "model" else TEXT_FILES
    return [file for file in files if file.path in names]


def choose(
    repository: str, files: Iterable[RepositoryFile], part: Part, shards: Iterable[str] | None
) -> tuple[RepositoryFile, ...]:
    """The files that `part` of a repository consists of. `shards` are the files that its index lists, None if it
    has no index. Raises `MissingFile` or `UnsupportedFeature`."""
    by_path = {file.path: file for file in files}
    small = small_files(by_path.values(), part)
    if part == "tokenizer":
        if "tokenizer.json" not in by_path:
            raise MissingFile(
                f"{repository} has no tokenizer.json", "name a repository with a fast tokenizer in its top folder"
            )
        return tuple(small)
    if "config.json" not in by_path:
        raise MissingFile(
            f"{repository} has no config.json", "name a repository of a model in the format of transformers"
        )
    if SINGLE in by_path:
        return (*(file for file in small if file.path != INDEX), by_path[SINGLE])
    if shards is None:
        unsafe = sorted(path for path in by_path if path.endswith(UNSAFE))
        if unsafe:
            raise UnsupportedFeature(
                f"{repository} has no safetensors; {unsafe[0]} is of a format that is not read",
                "only safetensors are read, because the others can carry code; "
                "choose a repository or a revision that has them",
            )
        raise MissingFile(
            f"{repository} has neither {SINGLE} nor {INDEX}", "name a repository whose weights are safetensors"
        )
    names = sorted(set(shards))
    for name in names:
        if name not in by_path:
            raise MissingFile(
                f"{repository} has no {name}, which its {INDEX} lists",
                "the repository is incomplete; choose another",
            )
    return (*small, *(by_path[name] for name in names))
