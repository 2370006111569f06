"""The local cache of hub repositories: the standard one, so that Quire and Hugging Face's own tools share files.

    <root>/models--org--name/blobs/<digest>               the bytes, named by what they are
    <root>/models--org--name/blobs/<digest>.incomplete    what has arrived so far; a later fetch goes on from there
    <root>/models--org--name/snapshots/<commit>/<file>    links to blobs
    <root>/models--org--name/refs/<branch or tag>         the commit it stood for when it was asked last
    <root>/.locks/models--org--name/<digest>.lock         held by whoever downloads that blob
    <records>/models--org--name@<commit>.<part>.json      ours, in the state directory: see `hub.Record`

A part of a commit is *whole* when every file of its record is there with the size and time of change that it had
when its digest was verified. Nothing else is ever loaded: a file appears in a snapshot only after its digest was
right, and an engine starts only when all files are there. What other tools put into the cache has no record; it is
verified (read once, in full) before its first use.

`usage` and `prune` are what `platform cache` shows and does. Files that Quire did not bring are never removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from quire_schemas.checkpoint_files import INDEX, CheckpointError, read_index
from quire_schemas.hub import MODEL_FILES, SINGLE, TEXT_FILES, Part, Record, RepositoryFile

COMMIT = re.compile(r"[0-9a-f]{40}")
SPARE = 64 * 1024 * 1024
"""Bytes that a download leaves free on the disk of the cache."""
_records = msgspec.json.Decoder(Record)


@dataclass(frozen=True, slots=True, order=True)
class Need:
    """A part of one commit of a repository."""

    repository: str
    commit: str
    part: Part

    def __str__(self) -> str:
        return f"hf://{self.repository} at {self.commit[:12]}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One snapshot in the cache. Sizes are bytes on disk; a file that two snapshots share counts in both.

    `ours` are the bytes that Quire brought, which `prune` may free. `last_used` is unix seconds, or None.
    """

    repository: str
    commit: str
    size: int
    ours: int
    incomplete: int
    last_used: float | None
    refs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HubCache:
    """`root` is the folder that Hugging Face calls HF_HUB_CACHE, `records` a folder of the state directory."""

    root: Path
    records: Path

    def home(self, repository: str) -> Path:
        return self.root / f"models--{repository.replace('/', '--')}"

    def blob(self, repository: str, digest: str) -> Path:
        return self.home(repository) / "blobs" / digest

    def snapshot(self, repository: str, commit: str) -> Path:
        return self.home(repository) / "snapshots" / commit

    def lock(self, repository: str, digest: str) -> Path:
        """The lock that Hugging Face's own tools take for this blob."""
        return self.root / ".locks" / self.home(repository).name / f"{digest}.lock"

    # ── names of commits ──────────────────────────────────────────────────────────────────────────────────

    def commit_of(self, repository: str, revision: str) -> str | None:
        """The commit that a branch, a tag or the beginning of a commit stands for here, if it does."""
        reference = self.home(repository) / "refs" / revision
        if reference.is_file():
            commit = reference.read_text().strip()
            return commit if COMMIT.fullmatch(commit) else None
        if not re.fullmatch(r"[0-9a-f]{4,40}", revision):
            return None
        found = {path.name for path in self._snapshots(repository) if path.name.startswith(revision)}
        found |= {need.commit for need in self.recorded(repository) if need.commit.startswith(revision)}
        return found.pop() if len(found) == 1 else None

    def set_ref(self, repository: str, revision: str, commit: str) -> None:
        """Remember what a branch or tag stood for. A commit needs no remembering."""
        if COMMIT.fullmatch(revision):
            return
        path = self.home(repository) / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, commit.encode())

    # ── records ───────────────────────────────────────────────────────────────────────────────────────────

    def _record_path(self, need: Need) -> Path:
        return self.records / f"{self.home(need.repository).name}@{need.commit}.{need.part}.json"

    def record(self, need: Need) -> Record | None:
        """What is known of `need`; None before anybody looked. A damaged record is as none."""
        return _decoded(self._record_path(need))

    def write(self, record: Record) -> None:
        need = Need(record.repository, record.commit, record.part)
        self.records.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(self._record_path(need), msgspec.json.format(msgspec.json.encode(record)))

    def recorded(self, repository: str | None = None) -> list[Need]:
        """All that there are records of."""
        found = []
        for path in sorted(self.records.glob("*.json")) if self.records.is_dir() else ():
            record = _decoded(path)
            if record is not None and repository in (None, record.repository):
                found.append(Need(record.repository, record.commit, record.part))
        return found

    def brought(self, repository: str) -> set[str]:
        """Digests of the blobs of a repository that Quire downloaded, for whichever commit."""
        records = (self.record(need) for need in self.recorded(repository))
        return {digest for record in records if record is not None for digest in record.brought}

    def used(self, need: Need) -> None:
        """Note that an engine starts from these files."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._record_path(need))

    # ── what is there ─────────────────────────────────────────────────────────────────────────────────────

    def stamp(self, need: Need, file: RepositoryFile) -> tuple[int, int] | None:
        """Size and time of change of a file of a snapshot; None when it is not there."""
        try:
            found = os.stat(self.snapshot(need.repository, need.commit) / file.path)
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def is_whole(self, need: Need) -> bool:
        """Whether every file is there as it was when its digest was right."""
        record = self.record(need)
        if record is None or not record.files:  # of a look that broke off nothing is known but what it got
            return False
        return all(
            (stamp := self.stamp(need, file)) is not None and record.verified.get(file.path) == stamp
            for file in record.files
        )

    def present(self, need: Need) -> int:
        """Bytes of `need` that are on disk, half-fetched files included."""
        record = self.record(need)
        return sum(self._present(need, file) for file in record.files) if record is not None else 0

    def _present(self, need: Need, file: RepositoryFile) -> int:
        stamp = self.stamp(need, file)
        if stamp is not None:
            return min(stamp[0], file.size)
        blob = self.blob(need.repository, file.digest)
        for path in (blob, blob.with_name(f"{file.digest}.incomplete")):
            with contextlib.suppress(FileNotFoundError):
                return min(path.stat().st_size, file.size)
        return 0

    def missing(self, need: Need) -> int:
        """Bytes of `need` that a fetch has to download still."""
        record = self.record(need)
        return record.size - self.present(need) if record is not None else 0

    def free(self) -> int:
        """Bytes that may still be written below the root, which need not exist yet."""
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def found(self, need: Need) -> tuple[RepositoryFile, ...] | None:
        """The files of `need` by what lies in the snapshot alone, for a commit that another tool fetched; None
        when not all of it is there. A link's name among the blobs is the digest that the hub told."""
        folder = self.snapshot(need.repository, need.commit)
        wanted = MODEL_FILES if need.part == "model" else TEXT_FILES
        names = [name for name in wanted if (folder / name).exists()]
        if need.part == "tokenizer":
            whole = "tokenizer.json" in names
        else:
            whole = "config.json" in names
            if (folder / SINGLE).exists():
                names = [*(name for name in names if name != INDEX), SINGLE]
            else:
                try:
                    names += sorted(set(read_index(folder / INDEX).values()))
                except CheckpointError:
                    return None
        if not whole or not all((folder / name).exists() for name in names):
            return None
        files = []
        for name in names:
            path = folder / name
            digest = Path(os.readlink(path)).name if path.is_symlink() else ""
            try:
                files.append(RepositoryFile(name, path.stat().st_size, digest))
            except ValueError:
                return None  # a copy, not a link: nothing here says what it should be
        return tuple(files)

    def _snapshots(self, repository: str) -> list[Path]:
        folder = self.home(repository) / "snapshots"
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    # ── usage ─────────────────────────────────────────────────────────────────────────────────────────────

    def usage(self) -> list[Entry]:
        """Every snapshot of a model in the cache, and every commit of which a part has arrived."""
        pairs = {(need.repository, need.commit) for need in self.recorded()}
        for home in sorted(self.root.glob("models--*--*")):
            repository = home.name.removeprefix("models--").replace("--", "/", 1)
            pairs |= {(repository, path.name) for path in self._snapshots(repository)}
        entries = (self._entry(repository, commit) for repository, commit in sorted(pairs))
        return [entry for entry in entries if entry is not None]

    def _entry(self, repository: str, commit: str) -> Entry | None:
        folder = self.snapshot(repository, commit)
        size = sum(path.stat().st_size for path in _files(folder))
        ours = incomplete = 0
        used: list[float] = []
        for need in self.recorded(repository):
            record = self.record(need) if need.commit == commit else None
            if record is None:
                continue
            used.append(self._record_path(need).stat().st_mtime)
            for digest in record.brought:
                with contextlib.suppress(FileNotFoundError):
                    ours += self.blob(repository, digest).stat().st_size
            incomplete += sum(path.stat().st_size for path in self._incomplete(record))
        if not folder.is_dir() and not ours + incomplete:
            return None
        refs = self.home(repository) / "refs"
        names = [
            str(path.relative_to(refs))
            for path in sorted(refs.rglob("*"))
            if path.is_file() and path.read_text().strip() == commit
        ]
        return Entry(repository, commit, size, ours, incomplete, max(used, default=None), tuple(names))

    def _incomplete(self, record: Record) -> list[Path]:
        paths = (self.blob(record.repository, f"{file.digest}.incomplete") for file in record.files)
        return [path for path in dict.fromkeys(paths) if path.is_file()]

    def prune(self, repository: str, commit: str, *, dry_run: bool) -> int:
        """Remove what Quire brought of one commit, but for blobs that another snapshot or record has too; gives
        the bytes freed. A blob that is being downloaded stays. With `dry_run` nothing is removed."""
        needs = [need for need in self.recorded(repository) if need.commit == commit]
        records = [record for need in needs if (record := self.record(need)) is not None]
        kept = self._digests_elsewhere(repository, commit)
        freed = 0
        for digest in dict.fromkeys(digest for record in records for digest in record.brought):
            if digest not in kept:
                freed += self._remove(repository, digest, self.blob(repository, digest), dry_run)
        for record in records:
            for path in self._incomplete(record):
                digest = path.name.removesuffix(".incomplete")
                if digest not in kept:
                    freed += self._remove(repository, digest, path, dry_run)
        if not dry_run:
            self._remove_links(repository, commit, {digest for record in records for digest in record.brought})
            for need in needs:
                self._record_path(need).unlink(missing_ok=True)
        return freed

    def _digests_elsewhere(self, repository: str, commit: str) -> set[str]:
        links = [
            path for other in self._snapshots(repository) if other.name != commit for path in other.rglob("*")
        ]
        found = {Path(os.readlink(path)).name for path in links if path.is_symlink()}
        for need in self.recorded(repository):
            record = self.record(need) if need.commit != commit else None
            found |= {file.digest for file in record.files} if record is not None else set()
        return found

    def _remove(self, repository: str, digest: str, path: Path, dry_run: bool) -> int:
        with _held(self.lock(repository, digest)) as ours:
            if not ours or not path.is_file():
                return 0
            size = path.stat().st_size
            if not dry_run:
                path.unlink()
            return size

    def _remove_links(self, repository: str, commit: str, brought: set[str]) -> None:
        """Links to what Quire brought; then the snapshot, its names and the repository's folder, if empty."""
        folder, home = self.snapshot(repository, commit), self.home(repository)
        for path in folder.rglob("*"):
            if path.is_symlink() and (Path(os.readlink(path)).name in brought or not path.exists()):
                path.unlink()
        if folder.is_dir() and not _files(folder):
            shutil.rmtree(folder)
            for path in (home / "refs").rglob("*"):
                if path.is_file() and path.read_text().strip() == commit:
                    path.unlink()
        if home.is_dir() and not self._snapshots(repository) and not _files(home / "blobs"):
            shutil.rmtree(home)  # its locks stay: a lock that is removed while somebody waits for it locks nothing


def sizes(entries: list[Entry], users: Mapping[tuple[str, str], object]) -> tuple[int, int]:
    """Bytes of all entries, and of those that nobody uses and `prune` may free."""
    unused = [entry for entry in entries if (entry.repository, entry.commit) not in users]
    return sum(e.size + e.incomplete for e in entries), sum(e.ours + e.incomplete for e in unused)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether the lock could be taken at once; held inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []


def _decoded(path: Path) -> Record | None:
    try:
        return _records.decode(path.read_bytes())
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _replace(path: Path, content: bytes) -> None:
    """Write atomically; readers see the old or the new."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    temporary.write_bytes(content)
    os.replace(temporary, path)
