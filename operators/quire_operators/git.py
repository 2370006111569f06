"""A remote repository, read and never checked out: the git command on a bare clone of our own.

    head      which commit a branch or a tag is at (ls-remote)
    fetch     that one commit, without its history, into the clone
    tree      the files below a folder of it, by name, kind and size (ls-tree)
    blobs     their contents (cat-file --batch)
    signer    whose signature the commit bears (verify-commit, ssh keys alone)

Nothing that a repository holds is acted on: no work tree, so no filter, no hook, no link is followed, no submodule
fetched. The command sees an environment that is built here and no configuration but the clone's own, which is
ours: it asks for no password, runs no helper, follows no redirect and speaks the one protocol of the URL. Each
run is bounded in time, in what it may print and in the size of the files that it may write; what it started ends
with it. A credential goes by the environment, never on a command line, and no message holds one.

Exceptions:

    GitError                 has reason, message and hint
    ├── Unreachable          the server does not answer, or not as a repository: it may do so later
    └── Refused              it answered, or the repository is not as it must be
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from quire_operators.bounded import Bounds, TooLong, TooMuch, run
from quire_operators.status import Reason

MIB = 1 << 20
COMMIT = re.compile(r"[0-9a-f]{40}")
SUBJECT = 120
PACKS = 32
"""The clone is begun anew when it has more: it is never repacked."""
HANDED_DOWN = (
    "PATH", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY",
    "all_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH",
)  # fmt: skip
"""Variables of ours that git and what it starts may have: the way to the network, and whom to trust there. A proxy
is for https alone: what goes by http is for this machine, and any other would read it."""
SETTINGS = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.symlinks=false",
    "credential.helper=",
    "fetch.fsckObjects=false",
    "fetch.unpackLimit=1",
    "fetch.recurseSubmodules=false",
    "gc.auto=0",
    "gpg.program=/bin/false",
    "gpg.x509.program=/bin/false",
    "http.followRedirects=false",
    "http.lowSpeedLimit=100",
    "http.lowSpeedTime=20",
    "i18n.logOutputEncoding=UTF-8",
    "log.mailmap=false",
    "log.showSignature=false",
    "maintenance.auto=false",
    "protocol.allow=never",
    "submodule.recurse=false",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one repository."""

    seconds: float = 60.0
    """Of one command."""
    pack_bytes: int = 256 * MIB
    """Of one fetch."""
    files: int = 10_000
    """Below the folder that is followed."""
    listing_bytes: int = 4 * MIB
    """Of the names of those files."""
    content_bytes: int = 4 * MIB
    """Of all manifests together."""


class GitError(Exception):
    """A repository cannot be read. `reason` is what its source's condition says."""

    def __init__(self, reason: Reason, message: str, hint: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint


class Unreachable(GitError):
    """No answer that a repository gives; it is tried again."""


class Refused(GitError):
    """The answer is no, or what is there cannot be taken."""


@dataclass(frozen=True, slots=True)
class Ref:
    """What is followed. `name` is a full name of git (refs/heads/main), or a commit, or HEAD."""

    name: str

    @classmethod
    def of(cls, declared: Mapping[str, str | None]) -> Ref:
        """From a resolved `spec.ref`."""
        if (commit := declared.get("commit")) is not None:
            return cls(commit)
        if (tag := declared.get("tag")) is not None:
            return cls(f"refs/tags/{tag}")
        branch = declared.get("branch")
        return cls("HEAD" if branch is None else f"refs/heads/{branch}")

    def __str__(self) -> str:
        if COMMIT.fullmatch(self.name):
            return f"commit {self.name[:12]}"
        kind, _, name = self.name.removeprefix("refs/").partition("/")
        return {"heads": f"branch {name}", "tags": f"tag {name}"}.get(kind, "the default branch")


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit, by what is shown of it: one printable line each."""

    id: str
    author: str
    subject: str
    time: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a commit. `mode` is git's: 100644 and 100755 are files, 120000 a link, 160000 a submodule."""

    mode: str
    blob: str
    size: int
    path: bytes

    @property
    def is_file(self) -> bool:
        return self.mode.startswith("100")

    @property
    def is_link(self) -> bool:
        return self.mode == "120000"

    @property
    def is_submodule(self) -> bool:
        return self.mode == "160000"


class Repository:
    """A clone of `url` in `folder`, which is made when it is needed. `credential` is a token or user:token."""

    def __init__(
        self,
        folder: Path,
        url: str,
        credential: str | None,
        environ: Mapping[str, str],
        limits: Limits | None = None,
    ) -> None:
        self._folder = folder
        self._url = url
        self.credential = credential
        """May be set anew before each question to the remote."""
        self._environ = environ
        self._limits = limits or Limits()

    # ── what is asked of the remote ───────────────────────────────────────────────────────────────────────

    async def head(self, ref: Ref) -> str:
        """The commit that the remote's `ref` is at now. A commit is its own answer, and nobody is asked."""
        if COMMIT.fullmatch(ref.name):
            return ref.name
        await self._make()
        said = await self._remote("ls-remote", "--quiet", "--", self._url, ref.name, f"{ref.name}^{{}}")
        lines = [line.partition("\t") for line in said.decode(errors="replace").splitlines()]
        found = {name: commit for commit, _, name in lines}
        commit = found.get(f"{ref.name}^{{}}") or found.get(ref.name)
        if commit is None or not COMMIT.fullmatch(commit):
            hint = "push it, or name another in spec.ref; what was applied stays as it is"
            raise Refused(Reason.REF_NOT_FOUND, f"the repository has no {ref}", hint)
        return commit

    async def fetch(self, commit: str) -> None:
        """Have that commit here, without what came before it."""
        await self._make()
        if await self.has(commit):
            return
        packs = self._folder / "objects" / "pack"
        if packs.is_dir() and sum(path.suffix == ".pack" for path in packs.iterdir()) >= PACKS:
            self.discard()
            await self._make()
        for lock in self._folder.rglob("*.lock"):  # of one that was killed: nobody else uses the clone
            lock.unlink(missing_ok=True)
        try:
            await self._remote(
                "fetch", "--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head",
                "--no-auto-maintenance", "--", self._url, commit,
            )  # fmt: skip
        finally:
            for left in packs.glob("tmp_*") if packs.is_dir() else ():
                left.unlink(missing_ok=True)
        if not await self.has(commit):
            raise Refused(Reason.REF_NOT_FOUND, f"{commit[:12]} is no commit of the repository", "name another")

    # ── what is here ──────────────────────────────────────────────────────────────────────────────────────

    async def has(self, commit: str) -> bool:
        """Whether the commit is here with all that belongs to it."""
        if not (self._folder / "HEAD").is_file():
            return False
        code, _, _ = await self._run("cat-file", "-e", f"{commit}^{{tree}}")
        return code == 0

    async def about(self, commit: str) -> Commit:
        """Who made the commit, when and what for."""
        said = await self._local("log", "-1", "--no-show-signature", "--format=%an%x00%ct%x00%s", commit)
        author, time, subject = [*said.decode(errors="replace").strip("\n").split("\0", 2), "", "", ""][:3]
        return Commit(commit, _line(author), _line(subject), int(time) if time.isdigit() else 0)

    async def signer(self, commit: str, keys: Sequence[str]) -> str:
        """The comment or the end of the one of `keys` that signed the commit. Raises `Refused` for any other
        signature, and for none."""
        signers = self._folder / "signers"
        lines = [" ".join(key.split()[:2]) for key in keys]
        signers.write_text("".join(f'key{n} namespaces="git" {line}\n' for n, line in enumerate(lines)))
        checks = (f"gpg.ssh.allowedSignersFile={signers}", "gpg.ssh.program=ssh-keygen", "gpg.minTrustLevel=fully")
        code, _, said = await self._run("verify-commit", "--raw", commit, settings=checks)
        found = re.search(rb'Good "git" signature for key(\d+) with', said)
        if code != 0 or found is None or int(found[1]) >= len(keys):
            signed = b"signature" in said and b"No principal" not in said
            why = (
                "its signature does not hold" if signed else "it bears no signature of one of spec.verify.signedBy"
            )
            hint = "git commit --amend -S signs it; a key is added in spec.verify.signedBy"
            raise Refused(Reason.NOT_VERIFIED, f"commit {commit[:12]} is not applied: {why}", hint)
        key = keys[int(found[1])].split()
        return _line(key[2]) if len(key) > 2 else f"{key[0]} …{key[1][-8:]}"

    async def tree(self, commit: str, path: str) -> list[Entry]:
        """All files below a folder of the commit; their paths are relative to it."""
        folder = "/".join(part for part in path.split("/") if part not in ("", "."))
        kind = "tree"
        if folder:
            code, out, _ = await self._run("cat-file", "-t", f"{commit}:{folder}")
            kind = out.decode(errors="replace").strip() if code == 0 else "nothing"
        if kind != "tree":
            what = "is no folder" if kind != "nothing" else "does not exist"
            hint = "spec.path names the folder of manifests; what was applied stays as it is"
            raise Refused(Reason.PATH_NOT_FOUND, f"{folder} {what} in commit {commit[:12]}", hint)
        try:
            said = await self._local(
                "ls-tree", "-r", "-z", "-l", "--full-tree", f"{commit}:{folder}", most=self._limits.listing_bytes
            )
        except Refused as error:
            if error.reason is Reason.TOO_LARGE:
                raise self._too_many(folder) from error
            raise
        entries = [_entry(line) for line in said.split(b"\0") if line]
        if len(entries) > self._limits.files:
            raise self._too_many(folder)
        return entries

    def _too_many(self, folder: str) -> Refused:
        where = folder or "the repository"
        return Refused(
            Reason.TOO_LARGE,
            f"{where} has more than {self._limits.files} files, or {self._limits.listing_bytes // MIB} MiB of "
            f"names",
            "spec.path names a folder that holds the manifests alone",
        )

    async def blobs(self, entries: Sequence[Entry]) -> list[bytes]:
        """The contents of these files, in order."""
        whole = sum(entry.size for entry in entries)
        if whole > self._limits.content_bytes:
            text = (
                f"the manifests are {whole // MIB} MiB together, and at most {self._limits.content_bytes // MIB} "
                f"are read"
            )
            raise Refused(Reason.TOO_LARGE, text, "spec.path names a folder that holds the manifests alone")
        if not entries:
            return []
        names = "".join(f"{entry.blob}\n" for entry in entries).encode()
        said = await self._local("cat-file", "--batch", given=names, most=whole + 128 * len(entries))
        contents, at = [], 0
        for entry in entries:
            line = said.find(b"\n", at)
            head = said[at:line].split()
            if line < 0 or len(head) != 3 or head[1] != b"blob" or int(head[2]) != entry.size:
                self.discard()
                text = f"{os.fsdecode(entry.path)!r} cannot be read from the clone"
                raise Unreachable(Reason.REMOTE_UNREACHABLE, text, "it is fetched again")
            contents.append(said[line + 1 : line + 1 + entry.size])
            at = line + 2 + entry.size
        return contents

    def discard(self) -> None:
        """Remove the clone; the next fetch begins it anew."""
        shutil.rmtree(self._folder, ignore_errors=True)

    # ── running git ───────────────────────────────────────────────────────────────────────────────────────

    async def _make(self) -> None:
        if (self._folder / "HEAD").is_file():
            return
        self.discard()
        self._folder.mkdir(mode=0o700, parents=True)
        await self._local("init", "--quiet", "--bare", "--template=", str(self._folder))

    async def _remote(self, *arguments: str) -> bytes:
        """A command that speaks with the remote: its output."""
        scheme = urlsplit(self._url).scheme
        code, out, said = await self._run(*arguments, settings=(f"protocol.{scheme}.allow=always",), secret=True)
        if code != 0:
            raise self._failure(code, said.decode(errors="replace"))
        return out

    async def _local(self, *arguments: str, given: bytes = b"", most: int = MIB) -> bytes:
        """A command on the clone alone: its output. A clone in which one fails is begun anew."""
        code, out, said = await self._run(*arguments, given=given, most=most)
        if code != 0:
            self.discard()
            raise Refused(
                Reason.REPOSITORY_UNREADABLE,
                f"git {arguments[0]} failed: {_line(said.decode(errors='replace'))}",
                "it is fetched anew at the next try; if that fails as well, git fsck in the repository says why",
            )
        return out

    async def _run(
        self,
        *arguments: str,
        settings: Sequence[str] = (),
        given: bytes = b"",
        most: int = MIB,
        secret: bool = False,
    ) -> tuple[int, bytes, bytes]:
        """Run git to its end: exit code, output, and the beginning of what it said on stderr."""
        options = [part for each in (*SETTINGS, *settings) for part in ("-c", each)]
        bounds = Bounds(self._limits.seconds, most, self._limits.pack_bytes)
        argv = ["git", "--no-replace-objects", *options, *arguments]
        try:
            return await run(argv, self._environment(with_credential=secret), self._folder, bounds, given)
        except FileNotFoundError as error:
            if not self._folder.is_dir():
                text = f"the clone {self._folder} is gone"
                raise Unreachable(Reason.REMOTE_UNREACHABLE, text, "it is fetched again") from error
            hint = "install git 2.34 or later on this machine, and platform daemon restart"
            raise Unreachable(Reason.GIT_MISSING, "there is no git command in PATH", hint) from error
        except TooLong as error:
            text = f"git {arguments[0]} took longer than {self._limits.seconds:g} s"
            raise Unreachable(Reason.REMOTE_UNREACHABLE, text, "it is tried again") from error
        except TooMuch as error:
            text = f"git's answer is larger than {most // MIB} MiB"
            raise Refused(Reason.TOO_LARGE, text, "follow less of it") from error

    def _environment(self, *, with_credential: bool) -> dict[str, str]:
        scheme = urlsplit(self._url).scheme
        kept = {
            name: self._environ[name]
            for name in HANDED_DOWN
            if name in self._environ and (scheme != "http" or "proxy" not in name.lower())
        }
        closed = {
            "GIT_DIR": str(self._folder),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_PROTOCOL_FROM_USER": "0",
            "GIT_ALLOW_PROTOCOL": scheme,
            "HOME": os.devnull,
            "LC_ALL": "C",
        }
        if with_credential and self.credential is not None:
            pair = self.credential if ":" in self.credential else f"git:{self.credential}"
            closed |= {
                "GIT_CONFIG_COUNT": "1",
                "GIT_CONFIG_KEY_0": "http.extraHeader",
                "GIT_CONFIG_VALUE_0": f"Authorization: Basic {base64.b64encode(pair.encode()).decode()}",
            }
        return kept | closed

    def _failure(self, code: int, said: str) -> GitError:
        """What git's words mean for whoever follows the repository."""
        low, line = said.lower(), _line(said.replace("fatal: ", ""))
        if any(
            word in low
            for word in ("authentication failed", "could not read username", "error: 401", "error: 403")
        ):
            known = "its credential is refused" if self.credential is not None else "it asks for a credential"
            hint = (
                "platform secret set NAME, and spec.auth: {secretRef: NAME}: a token that may read the repository"
            )
            return Refused(Reason.UNAUTHORIZED, f"the repository does not open: {known}", hint)
        if "file too large" in low or "signal 25" in low or "invalid index-pack output" in low:
            text = f"the commit is larger than {self._limits.pack_bytes // MIB} MiB"
            return Refused(Reason.TOO_LARGE, text, "follow a repository that holds the manifests alone")
        if "redirect" in low or re.search(r"error: 30[12378]", low):
            hint = "write the address that it leads to in spec.url"
            return Refused(Reason.REMOTE_UNREACHABLE, "the server redirects to another address", hint)
        if "not found" in low and "could not resolve" not in low:
            hint = "check spec.url; to those who may not read it some servers say that there is none"
            return Refused(Reason.NOT_FOUND, f"there is no such repository: {line}", hint)
        if "not our ref" in low or "unadvertised object" in low or "no such remote ref" in low:
            return Refused(
                Reason.REF_NOT_FOUND, f"the repository does not give that commit: {line}", "name another"
            )
        hint = "check the network and spec.url; what was applied goes on as it is"
        return Unreachable(Reason.REMOTE_UNREACHABLE, line or f"git ended with {code}", hint)


def _entry(line: bytes) -> Entry:
    head, _, path = line.partition(b"\t")
    mode, _, blob, size = head.split()
    return Entry(mode.decode(), blob.decode(), int(size) if size.isdigit() else 0, path)


def below(entry: Entry, folder: str) -> Entry:
    """The entry by its path from the repository's root."""
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    return replace(entry, path=b"/".join([*(os.fsencode(part) for part in parts), entry.path]))


def _line(text: str) -> str:
    """Text of others as one short, printable line."""
    words = " ".join(text.split())
    words = "".join(c if c.isprintable() else "?" for c in words)
    return words if len(words) <= SUBJECT else f"{words[: SUBJECT - 1]}…"
