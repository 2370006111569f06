"""A hub for tests: a real HTTP server that answers as huggingface.co does, and misbehaves on order.

It speaks what clients use to download: the model API (`/api/models/NAME/revision/REV?blobs=true`), `resolve` with
its headers (ETag, X-Repo-Commit, X-Linked-Etag, X-Linked-Size), a redirect of large files to another origin, and
ranges. Real processes find it through HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 100_000
"""Files of at least this size are stored and named as LFS files are."""
PIECE = 64 * 1024


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Commits, each with its files, and the names that lead to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        """Add a commit and lead `names` (default: main) to it."""
        digest = hashlib.sha1(repr(sorted((n, git_sha1(d)) for n, d in files.items())).encode()).hexdigest()
        self.commits[digest] = files
        self.refs |= dict.fromkeys(names or ("main",), digest)
        return digest


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    method: str
    path: str
    authorization: str | None
    range: str | None


Rule = Callable[["_Handler", str], bool]


class Hub:
    """`url` is the hub's, `cdn` that of the origin large files lie on. `seen` are all requests.

    `rules` misbehave: each is asked with the handler and the path; one that gives True has answered itself.
    `rate` bounds the bytes a second of each file. `bytes_sent` counts what was sent of each path.
    """

    def __init__(self, url: str, cdn: str) -> None:
        self.url = url
        self.cdn = cdn
        self.repositories: dict[str, Repository] = {}
        self.seen: list[Seen] = []
        self.rules: list[Rule] = []
        self.rate: float | None = None
        self.bytes_sent: dict[str, int] = {}

    def repository(self, name: str, **fields: Any) -> Repository:
        return self.repositories.setdefault(name, Repository(**fields))

    def downloads(self) -> list[Seen]:
        """The requests that asked for a file's bytes at their last place."""
        return [seen for seen in self.seen if seen.method == "GET" and not seen.path.startswith("/api/")]

    def blob(self, digest: str) -> bytes:
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for data in files.values():
                    if len(data) >= LARGE and hashlib.sha256(data).hexdigest() == digest:
                        return data
        raise KeyError(digest)


def fail(status: int, part: str, times: int = 10**9) -> Rule:
    """Answer `status` to requests whose path holds `part`, the first `times` times."""
    left = [times]

    def rule(handler: _Handler, path: str) -> bool:
        if part not in path or left[0] <= 0:
            return False
        left[0] -= 1
        handler.refuse(status, "made to fail")
        return True

    return rule


def cut(part: str, after: int, times: int = 1) -> Rule:
    """Send `after` bytes of a body that is announced in full, then close the connection."""
    left = [times]

    def rule(handler: _Handler, path: str) -> bool:
        if part not in path or left[0] <= 0 or handler.command != "GET":
            return False
        left[0] -= 1
        handler.cut_after = after
        return False

    return rule


def corrupt(part: str, times: int = 10**9) -> Rule:
    """Flip a bit in the middle of the bodies of files whose path holds `part`."""
    left = [times]

    def rule(handler: _Handler, path: str) -> bool:
        if part in path and left[0] > 0 and handler.command == "GET":
            left[0] -= 1
            handler.corrupt = True
        return False

    return rule


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    cut_after: int | None
    corrupt: bool

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.cut_after, self.corrupt = None, False
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(
            Seen(self.command, path, self.headers.get("authorization"), self.headers.get("range"))
        )
        if any(rule(self, path) for rule in list(self.hub.rules)):
            return
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._send_file(self.hub.blob(found[1]), path, found[1], {})
        else:
            self.refuse(404, "no such page")

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Message", message)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _open(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit, if the caller may see it; else the refusal was sent."""
        repository = self.hub.repositories.get(name)
        sent = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if repository is None:
            if sent:
                self.refuse(404, "Repository not found", "RepoNotFound")
            else:
                self.refuse(401, "Invalid username or password.")
            return None
        if repository.token is not None and sent != repository.token:
            if sent:
                self.refuse(401, "Invalid credentials in Authorization header")
            elif repository.gated:
                self.refuse(401, f"Access to model {name} is restricted.", "GatedRepo")
            else:
                self.refuse(401, "Invalid username or password.")
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def _info(self, name: str, revision: str) -> None:
        if (found := self._open(name, revision)) is None:
            return
        commit, files = found
        siblings: list[dict[str, Any]] = []
        for path, data in files.items():
            item: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
            if len(data) >= LARGE:
                digest = hashlib.sha256(data).hexdigest()
                item["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(item)
        self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        """All files of a commit, folders opened, as `recursive=true` asks for."""
        if (found := self._open(name, revision)) is None:
            return
        entries: list[dict[str, Any]] = []
        for path, data in found[1].items():
            item: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
            if len(data) >= LARGE:
                item["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(item)
        self._json(entries)

    def _json(self, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self._open(name, revision)) is None:
            return
        commit, files = found
        if path not in files:
            self.refuse(404, "Entry not found", "EntryNotFound")
            return
        data = files[path]
        headers = {"X-Repo-Commit": commit}
        if len(data) < LARGE:
            self._send_file(data, path, git_sha1(data), headers)
            return
        digest = hashlib.sha256(data).hexdigest()
        self.send_response(302)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Location", f"{self.hub.cdn}/cdn/{digest}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, data: bytes, path: str, etag: str, headers: dict[str, str]) -> None:
        begin = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        if asked and int(asked[1]) >= len(data):
            self.refuse(416, "no such range")
            return
        if asked:
            begin = int(asked[1])
        if self.corrupt:
            middle = max(begin, len(data) // 2)
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(data) if self.cut_after is None else min(len(data), begin + self.cut_after)
        try:
            while begin < end:
                piece = data[begin : min(begin + PIECE, end)]
                self.wfile.write(piece)
                begin += len(piece)
                self.hub.bytes_sent[path] = self.hub.bytes_sent.get(path, 0) + len(piece)
                if self.hub.rate is not None:
                    time.sleep(len(piece) / self.hub.rate)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if self.cut_after is not None:
            self.close_connection = True


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the middle are what some tests are about."""


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on two free ports: one for the hub, one for the origin that large files lie on."""
    servers = [_Server((host, 0), _Handler) for host in ("127.0.0.1", "127.0.0.1")]
    hub, cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    own = Hub(hub, cdn)
    for server in servers:
        server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": own})
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield own
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
