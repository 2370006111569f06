"""Where the files of a source lie on this machine.

    builtin://tiny           a folder of the installed product
    file:///abs/path         that folder
    hf://org/name            a snapshot in the Hugging Face cache, at the branch, tag or commit of spec.revision

A branch or tag is resolved to the commit that the cache holds for it, and the commit is recorded: what a name
means later changes no running model. Nothing is downloaded here: a repository of which the cache knows nothing is
`NotLocal`, and whoever may ask the hub asks it (`downloads.look`) and comes again. Then its small files are there,
and `missing` says how many bytes are still to come.

Exceptions:

    SourceError            has path of the field, reason (a word of `status.Reason`), message and hint
    └── NotLocal           only the hub can say more
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quire_operators.cache import HubCache, Need
from quire_schemas.hub import Part

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[\w][\w./-]*")


class SourceError(Exception):
    """A source does not lead to a folder."""

    def __init__(self, reason: str, message: str, hint: str, path: str = "spec.source") -> None:
        super().__init__(message)
        self.path = path
        """The field that names the source; whoever asks for another field's source changes it."""
        self.reason = reason
        self.message = message
        self.hint = hint


class NotLocal(SourceError):
    """The cache knows nothing of a repository at this revision."""

    def __init__(self, repository: str, revision: str, part: Part, cache: Path) -> None:
        super().__init__(
            "NotFound",
            f"hf://{repository} at {revision} is not in the local cache ({cache})",
            f"bring the files here: hf download {repository} --revision {revision}; or, where HF_HUB_OFFLINE "
            "keeps the hub from being asked, unset it and platform down",
        )
        self.repository = repository
        self.revision = revision
        self.part = part


@dataclass(frozen=True, slots=True)
class Located:
    """A folder with the files of a source; `commit` for sources that have one.

    `need` is what a fetch has to bring or verify before an engine may use the folder, and `missing` the bytes of
    it that are not on this machine: with any, config.json and the tokenizer are all that can be read yet.
    """

    folder: Path
    commit: str | None = None
    need: Need | None = None
    missing: int = 0


@dataclass(frozen=True, slots=True)
class Sources:
    """Resolves sources. `builtin` maps the names of shipped models to their folders."""

    builtin: Mapping[str, Path]
    cache: HubCache

    @classmethod
    def of_environment(
        cls, builtin: Mapping[str, Path], records: Path, environ: Mapping[str, str] = os.environ
    ) -> Sources:
        """The Hugging Face cache where its own tools look for it; `records` is a folder of ours."""
        if cache := environ.get("HF_HUB_CACHE"):
            return cls(builtin, HubCache(Path(cache).expanduser(), records))
        cache_home = environ.get("XDG_CACHE_HOME")
        base = Path(cache_home) if cache_home else Path.home() / ".cache"
        home = environ.get("HF_HOME")
        root = (Path(home).expanduser() if home else base / "huggingface") / "hub"
        return cls(builtin, HubCache(root, records))

    def locate(self, source: str, revision: str | None = None, part: Part = "model") -> Located:
        """The folder of `source`, which holds a config.json or at least a tokenizer. Raises `SourceError`."""
        scheme, _, rest = source.partition("://")
        if scheme == "builtin":
            return self._builtin(rest)
        if scheme == "file":
            return self._file(rest)
        if scheme == "hf":
            return self._hf(rest, revision, part)
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
            what = "is not a folder" if folder.exists() else "is not there"
            raise SourceError("NotFound", f"{folder} {what}", "give the folder that holds config.json")
        if not os.access(folder, os.R_OK | os.X_OK):
            raise SourceError("NotFound", f"{folder} may not be read by this user", f"chmod u+rx {folder}")
        return Located(folder)

    def _hf(self, repository: str, revision: str | None, part: Part) -> Located:
        revision = revision or "main"
        if not _REPOSITORY.fullmatch(repository) or not _REVISION.fullmatch(revision) or ".." in revision:
            raise SourceError(
                "InvalidReference",
                f"hf://{repository} at {revision!r} does not name a repository and a revision",
                "write hf://organisation/name, and a branch, tag or commit in spec.revision",
            )
        commit = self.cache.commit_of(repository, revision)
        if commit is None:
            raise NotLocal(repository, revision, part, self.cache.root)
        need = Need(repository, commit, part)
        record = self.cache.record(need)
        if (record is None or not record.files) and self.cache.found(need) is None:
            raise NotLocal(repository, revision, part, self.cache.root)
        return Located(self.cache.snapshot(repository, commit), commit, need, self.cache.missing(need))
