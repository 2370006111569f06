"""Where the files of a source lie on this machine.

    builtin://tiny           a folder of the installed product
    file:///abs/path         that folder
    hf://org/name            the local Hugging Face cache, at the branch, tag or commit of spec.revision

A branch or tag is resolved to the commit that the cache holds for it, and the commit is recorded: what a name
means later changes no running model. Nothing is downloaded here.

Exceptions:

    SourceError            has reason (a word of `status.Reason`), message and hint
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{4,40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[\w][\w./-]*")


class SourceError(Exception):
    """A source does not lead to a folder."""

    def __init__(self, reason: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.path = "spec.source"
        """The field that names the source; whoever asks for another field's source changes it."""
        self.reason = reason
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Located:
    """A folder with the files of a source; `commit` for sources that have one."""

    folder: Path
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """Resolves sources. `builtin` maps the names of shipped models to their folders."""

    builtin: Mapping[str, Path]
    hf_cache: Path

    @classmethod
    def of_environment(cls, builtin: Mapping[str, Path], environ: Mapping[str, str] = os.environ) -> Sources:
        """The Hugging Face cache where its own tools look for it."""
        if cache := environ.get("HF_HUB_CACHE"):
            return cls(builtin, Path(cache).expanduser())
        cache_home = environ.get("XDG_CACHE_HOME")
        base = Path(cache_home) if cache_home else Path.home() / ".cache"
        home = environ.get("HF_HOME")
        return cls(builtin, (Path(home).expanduser() if home else base / "huggingface") / "hub")

    def locate(self, source: str, revision: str | None = None) -> Located:
        """The folder of `source`, which holds a config.json or at least a tokenizer. Raises `SourceError`."""
        scheme, _, rest = source.partition("://")
        if scheme == "builtin":
            return self._builtin(rest)
        if scheme == "file":
            return self._file(rest)
        if scheme == "hf":
            return self._hf(rest, revision)
        raise SourceError(
            "InvalidReference",
            f"{source}: sources of this kind are not honoured by this version",
            "use builtin://tiny, file:///absolute/path or hf://organisation/name",
        )

    def _builtin(self, name: str) -> Located:
        folder = self.builtin.get(name)
        if folder is None:
            known = ", ".join(f"builtin://{known}" for known in sorted(self.builtin))
            raise SourceError(
                "NotFound", f"builtin://{name} is not a built-in model", f"built-in models are: {known}"
            )
        if not folder.is_dir():
            raise SourceError(
                "NotFound", f"the files of builtin://{name} are not in {folder}", "the installation is incomplete"
            )
        return Located(folder)

    def _file(self, rest: str) -> Located:
        folder = Path(rest)
        if not folder.is_absolute():
            raise SourceError(
                "InvalidReference", f"file://{rest} is not an absolute path", "write file:///home/me/models/name"
            )
        if not folder.is_dir():
            raise SourceError("NotFound", f"{folder} is not a folder", "give the folder that holds config.json")
        return Located(folder)

    def _hf(self, repository: str, revision: str | None) -> Located:
        revision = revision or "main"
        if not _REPOSITORY.fullmatch(repository) or not _REVISION.fullmatch(revision) or ".." in revision:
            raise SourceError(
                "InvalidReference",
                f"hf://{repository} at {revision!r} does not name a repository and a revision",
                "write hf://organisation/name, and a branch, tag or commit in spec.revision",
            )
        home = self.hf_cache / f"models--{repository.replace('/', '--')}"
        missing = SourceError(
            "NotFound",
            f"hf://{repository} at {revision} is not in the local cache ({self.hf_cache})",
            f"download it first: hf download {repository} --revision {revision}; or use file:///path/to/the/folder",
        )
        reference = home / "refs" / revision
        if reference.is_file():
            commit = reference.read_text().strip()
        elif _COMMIT.fullmatch(revision):
            snapshots = home / "snapshots"
            found = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
            matching = [name for name in found if name.startswith(revision)]
            if len(matching) != 1:
                raise missing
            commit = matching[0]
        else:
            raise missing
        folder = home / "snapshots" / commit
        if not (_COMMIT.fullmatch(commit) and folder.is_dir()):
            raise missing
        return Located(folder, commit)
