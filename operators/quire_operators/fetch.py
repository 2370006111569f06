"""`python -m quire_operators.fetch`: one look at a hub, or one download, in a process of its own.

The job (`hub.FetchJob`) is the first line of standard input, so a token stands neither in the arguments nor in the
environment nor on disk. Events go to standard output, one a line. The end of standard input ends the process: it
never outlives the control plane, and a download that was cut off anywhere goes on from what lies on disk.

What huggingface_hub does here: the API of the hub, its errors, tokens, sessions and redirects, and the locks. What
its own download does not do (2.4, read and tried) is done here: what a process that was killed had fetched is gone
on from, not thrown away, and digests are compared. Each file is written to `<digest>.incomplete` under the lock of
that blob, hashed as it passes, and renamed to its digest only when it has it. Plain HTTP is used for all files,
also for those that the hub keeps in chunks (Xet), because only plain HTTP is resumed.

Control plane and router never import this module: huggingface_hub and httpx take a second to load.

Exceptions:

    FetchFailed            how every job that is not done ends
    Stopped                ends the other files of a job that failed; never leaves this module
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

import httpx2
import msgspec
from huggingface_hub import HfApi, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
)

from quire_operators.cache import COMMIT, SPARE, HubCache, Need
from quire_schemas.checkpoint import read_profile
from quire_schemas.checkpoint_files import (
    INDEX,
    CheckpointError,
    UnsupportedArchitecture,
    UnsupportedFeature,
    read_index,
)
from quire_schemas.hub import Digest, FetchEvent, FetchJob, Record, RepositoryFile, choose, small_files
from quire_schemas.quantities import format_bytes

PARALLEL = 4
"""Files at a time: one connection seldom fills a line, and more than a few annoy the hub."""
REPORT_SECONDS = 0.5
LOOK_SECONDS = 10.0
PIECE = 1024 * 1024
"""Bytes handled at a time: what a broken connection loses at most."""
READ_SECONDS = 20.0
CONNECTION_TRIES = 3


class FetchFailed(Exception):
    """The job cannot be done now. `reason` is a word of `status.Reason`, `path` the field that it is about."""

    def __init__(self, reason: str, message: str, hint: str, path: str = "spec.source") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint
        self.path = path


class Stopped(Exception):
    """Another file failed, so this one is left as it is."""


class Counter:
    """Bytes that are on disk, counted by several threads; when `stopping` is set, none of them goes on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.done = 0
        self.stopping = False

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
        if self.stopping:
            raise Stopped


class Sink:
    """The file that a download is written to: hashes and counts what passes."""

    def __init__(self, file: BinaryIO, digest: Digest, counter: Counter) -> None:
        self._file = file
        self._digest = digest
        self._counter = counter
        self.length = 0

    def take_in(self) -> None:
        """Hash what an earlier fetch left."""
        self._file.seek(0)
        while piece := self._file.read(PIECE):
            self._count(piece)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._count(data)

    def _count(self, data: bytes) -> None:
        self._digest.update(data)
        self.length += len(data)
        self._counter.add(len(data))

    def restart(self) -> None:
        """Begin anew with an empty file."""
        self._file.seek(0)
        self._file.truncate()
        self._digest.reset()
        self._counter.add(-self.length)
        self.length = 0


class Fetch:
    """One job. `say` gets its events."""

    def __init__(self, job: FetchJob, say: Callable[[FetchEvent], None]) -> None:
        self._job = job
        self._say = say
        self._cache = HubCache(Path(job.cache), Path(job.records))
        self._api = HfApi(token=job.token)
        self._name = f"hf://{job.repository}"
        self._counter = Counter()

    def run(self) -> str:
        """Do the job; gives the commit. Raises `FetchFailed`."""
        with self._explained():
            if self._job.op == "commit":
                return self._list()[0]
            return self._look() if self._job.op == "look" else self._fetch()

    # ── what the hub says ─────────────────────────────────────────────────────────────────────────────────

    def _list(self) -> tuple[str, list[RepositoryFile]]:
        """The commit of the revision, and all its files."""
        info = self._api.model_info(
            self._job.repository, revision=self._job.revision, files_metadata=True, timeout=LOOK_SECONDS
        )
        files = []
        for sibling in info.siblings or ():
            digest = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
            try:
                files.append(RepositoryFile(sibling.rfilename, sibling.size or 0, digest or ""))
            except ValueError as error:
                raise FetchFailed(
                    "HubUnreachable", f"{self._name}: the hub gives no digest: {error}", "check HF_ENDPOINT"
                ) from error
        if info.sha is None or not COMMIT.fullmatch(info.sha):  # it becomes a part of paths
            raise FetchFailed("HubUnreachable", f"{self._name}: the hub names no commit", "check HF_ENDPOINT")
        return info.sha, files

    def _look(self) -> str:
        """The commit of the revision, its small files, and a record of all that its part needs."""
        commit, files = self._list()
        need = Need(self._job.repository, commit, self._job.part)
        record = self._cache.record(need) or Record(need.repository, commit, need.part, ())
        small = small_files(files, need.part)
        record = self._bring(need, record, small)
        index = self._cache.snapshot(need.repository, commit) / INDEX
        shards = read_index(index).values() if any(file.path == INDEX for file in small) else None
        chosen = choose(self._name, files, need.part, shards)
        self._cache.write(msgspec.structs.replace(record, files=chosen))
        self._cache.set_ref(need.repository, self._job.revision, commit)
        return commit

    # ── what is on disk ───────────────────────────────────────────────────────────────────────────────────

    def _fetch(self) -> str:
        need = Need(self._job.repository, self._job.revision, self._job.part)
        record = self._cache.record(need)
        if record is None or not record.files:
            found = self._cache.found(need)  # another tool's download: needs no network, only a look at each byte
            if found is None:
                self._look()
                record = self._cache.record(need)
            else:
                record = Record(need.repository, need.commit, need.part, found)
        if record is None:
            raise FetchFailed("FetchFailed", f"{need}: nothing is known of it", "apply it again")
        self._check_space(need, record)
        self._bring(need, record, record.files)
        if need.part == "model":
            read_profile(self._cache.snapshot(need.repository, need.commit))
        return need.commit

    def _check_space(self, need: Need, record: Record) -> None:
        self._cache.write(record)
        missing, free = self._cache.missing(need), self._cache.free()
        if missing and missing + SPARE > free:
            raise FetchFailed(
                "DiskFull",
                f"{need}: {format_bytes(missing)} are still to come, and {self._cache.root} has "
                f"{format_bytes(free)} free",
                "platform cache prune, or set HF_HUB_CACHE to a folder on a larger disk",
            )

    def _bring(self, need: Need, record: Record, files: Sequence[RepositoryFile]) -> Record:
        """Have `files` in the snapshot, their digests verified, and gives the record that says so."""
        total = sum(file.size for file in files)
        ours = self._cache.brought(need.repository)
        lock = threading.Lock()
        current = record

        def one(file: RepositoryFile) -> None:
            nonlocal current
            brought = self._bring_file(need, record, file) or file.digest in ours
            stamp = self._cache.stamp(need, file)
            if stamp is None:
                raise OSError(errno.ENOENT, "vanished", file.path)
            with lock:
                current = msgspec.structs.replace(
                    current,
                    verified={**current.verified, file.path: stamp},
                    brought=tuple(dict.fromkeys((*current.brought, *((file.digest,) if brought else ())))),
                )
                self._cache.write(current)

        with ThreadPoolExecutor(PARALLEL) as pool:
            pending = {pool.submit(one, file) for file in files}
            try:
                while pending:
                    done, pending = wait(pending, REPORT_SECONDS, FIRST_EXCEPTION)
                    self._say(FetchEvent("progress", self._counter.done, total))
                    for future in done:
                        future.result()
            except BaseException:
                self._counter.stopping = True
                for future in pending:
                    future.cancel()
                raise
        return current

    def _bring_file(self, need: Need, record: Record, file: RepositoryFile) -> bool:
        """Have one file in the snapshot; gives whether it was downloaded. Raises `FetchFailed`."""
        stamp = self._cache.stamp(need, file)
        if stamp is not None and record.verified.get(file.path) == stamp:
            self._counter.add(file.size)
            return False
        blob = self._cache.blob(need.repository, file.digest)
        lock = self._cache.lock(need.repository, file.digest)
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        brought = False
        with WeakFileLock(lock):
            if not blob.exists() or not self._is_right(blob, file):
                self._download(need, file, blob)
                brought = True
            self._link(need, file, blob)
        return brought

    def _is_right(self, blob: Path, file: RepositoryFile) -> bool:
        """Whether a blob that lies there already is what its name says. One that is not is removed."""
        digest = Digest(file)
        with blob.open("rb") as content:
            sink = Sink(content, digest, self._counter)
            sink.take_in()
        if digest.matches():
            return True
        self._counter.add(-sink.length)
        if _offline():
            raise _mismatch(blob, "it cannot be fetched anew while HF_HUB_OFFLINE is set")
        blob.unlink()
        return False

    def _download(self, need: Need, file: RepositoryFile, blob: Path) -> None:
        """Fetch one file, going on from what an earlier fetch left. Wrong bytes are fetched anew once."""
        partial = blob.with_name(f"{file.digest}.incomplete")
        for last in (False, True):
            digest = Digest(file)
            # Unbuffered: what has arrived is in the file whenever this process is killed.
            with open(partial, "a+b", buffering=0) as content:
                sink = Sink(content, digest, self._counter)
                sink.take_in()
                if not digest.matches():
                    if sink.length >= file.size:
                        sink.restart()
                    self._transfer(need, file, sink)
            if digest.matches():
                os.replace(partial, blob)
                return
            self._counter.add(-sink.length)
            partial.unlink()
            if last:
                raise _mismatch(blob, "it was fetched twice, and removed")

    def _transfer(self, need: Need, file: RepositoryFile, sink: Sink) -> None:
        """Have the hub send what `sink` lacks; a connection that breaks is made again while it brings bytes."""
        url = hf_hub_url(need.repository, file.path, revision=need.commit, endpoint=self._api.endpoint)
        failures = 0
        while sink.length < file.size:
            self._counter.add(0)
            before = sink.length
            try:
                self._stream(url, file, sink)
            except httpx2.TransportError:
                failures = failures + 1 if sink.length <= before else 1
                if failures > CONNECTION_TRIES:
                    raise
                time.sleep(1.0)

    def _stream(self, url: str, file: RepositoryFile, sink: Sink) -> None:
        """One request. It may end with more or other bytes than asked for: the digest tells."""
        # Compressed, a range would be one of other bytes.
        headers = {**build_hf_headers(token=self._job.token), "Accept-Encoding": "identity"}
        if sink.length:
            headers["Range"] = f"bytes={sink.length}-"
        with get_session().stream("GET", url, headers=headers, timeout=READ_SECONDS) as response:
            hf_raise_for_status(response)
            if sink.length and response.status_code != 206:
                sink.restart()  # a server that knows no ranges
            before = sink.length
            for piece in response.iter_bytes(PIECE):
                sink.write(piece)
                if sink.length > file.size:
                    return
            if sink.length == before:
                raise FetchFailed("HubUnreachable", f"{url}: the hub sends nothing", "it is tried again by itself")

    def _link(self, need: Need, file: RepositoryFile, blob: Path) -> None:
        """The file's place in the snapshot, made in one step."""
        path = self._cache.snapshot(need.repository, need.commit) / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.samefile(blob):
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.symlink_to(os.path.relpath(blob, path.parent))
        os.replace(temporary, path)

    # ── what went wrong ───────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever goes wrong as a `FetchFailed`."""
        name, revision, endpoint = self._name, self._job.revision, self._api.endpoint
        again = "it is tried again by itself, and goes on where it stopped"
        try:
            yield
        except CheckpointError as error:
            unsupported = isinstance(error, UnsupportedArchitecture | UnsupportedFeature)
            reason = "UnsupportedArchitecture" if unsupported else "InvalidReference"
            raise FetchFailed(reason, f"{name}: {error.message}", error.hint) from error
        except OfflineModeIsEnabled as error:
            raise FetchFailed(
                "NotFound",
                f"{name} at {revision} is not whole in the cache ({self._cache.root}), and HF_HUB_OFFLINE is set",
                "unset HF_HUB_OFFLINE and platform down, or bring the files here by other means",
            ) from error
        except RevisionNotFoundError as error:
            raise FetchFailed(
                "NotFound",
                f"{name} has no branch, tag or commit {revision!r}",
                f"see {endpoint}/{self._job.repository}/branches",
                "spec.revision",
            ) from error
        except GatedRepoError as error:
            raise self._unauthorized(
                "is gated", f"accept its terms at {endpoint}/{self._job.repository}, then "
            ) from error
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401 or self._has_token():
                raise self._unauthorized("does not exist, or is private", "check the name, or ") from error
            raise FetchFailed("NotFound", f"{name} is not on {endpoint}", "check the name") from error
        except HFValidationError as error:
            raise FetchFailed("InvalidReference", f"{name}: {error}", "write hf://organisation/name") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                what = "is not given out" if self._has_token() else "does not exist, or is private"
                raise self._unauthorized(what, "check the name, or ") from error
            if status == 404:
                raise FetchFailed(
                    "NotFound", f"{name} at {revision}: a file of it is gone from {endpoint}", "apply it again"
                ) from error
            raise FetchFailed("HubUnreachable", f"{endpoint} answers {status}", again) from error
        except httpx2.HTTPError as error:
            why = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
            raise FetchFailed("HubUnreachable", f"{endpoint} cannot be reached: {why}", again) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FetchFailed(
                    "DiskFull",
                    f"no space is left in {self._cache.root}",
                    "platform cache prune, or set HF_HUB_CACHE to a folder on a larger disk",
                ) from error
            raise FetchFailed(
                "FetchFailed",
                f"{error.filename or self._cache.root}: {error.strerror}",
                "check the folder's owner",
            ) from error

    def _has_token(self) -> bool:
        return (self._job.token or get_token()) is not None

    def _unauthorized(self, what: str, first: str) -> FetchFailed:
        sent = "the token was not accepted" if self._has_token() else "no token was sent"
        return FetchFailed(
            "Unauthorized",
            f"{self._name} {what}; {sent}",
            f"{first}give a token that may read it: hf auth login; or platform secret set hf-token and "
            "spec.sourceAuth: {secretRef: hf-token}",
        )


def _mismatch(blob: Path, what: str) -> FetchFailed:
    return FetchFailed(
        "ChecksumMismatch",
        f"{blob} has not the digest that the hub names: {what}",
        "look at the disk, and at what stands before the hub (HF_ENDPOINT, a proxy); then apply again",
    )


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _end_with_stdin() -> None:
    """Whoever started this process is gone, or wants it gone. What is on disk is gone on from."""
    while os.read(0, 4096):
        pass
    os._exit(0)


def main() -> int:
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=FetchJob)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    secrets = [token for token in (job.token, get_token()) if token]

    def say(event: FetchEvent) -> None:
        line = msgspec.json.encode(event)
        for secret in secrets:  # no message should hold one; one that did would be shown and logged
            line = line.replace(secret.encode(), b"[token]")
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()

    try:
        commit = Fetch(job, say).run()
    except FetchFailed as failed:
        say(FetchEvent("failed", reason=failed.reason, message=failed.message, hint=failed.hint, path=failed.path))
    else:
        say(FetchEvent("done", commit=commit))
    return 0  # what has been said is an end in order; any other status is a fault of this program


if __name__ == "__main__":
    # Threads in the middle of a read would be waited for: there is nothing of theirs that must be finished.
    code = main()
    sys.stdout.flush()
    os._exit(code)
