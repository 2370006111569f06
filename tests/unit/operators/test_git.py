"""A clone of our own: what another process left in it, what it lost, and whom a password goes by."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.git_remote import Remote, git

from quire_operators.git import GitError, Ref, Repository, Unreachable


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    remote = Remote(tmp_path / "remote")
    yield remote
    remote.close()


async def test_a_lock_that_a_killed_fetch_left_keeps_nobody_out(remote: Remote, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "clone", f"file://{remote.bare}", None, os.environ)
    await repository.fetch(remote.push())
    (tmp_path / "clone" / "shallow.lock").touch()
    second = remote.push()
    await repository.fetch(second)
    assert await repository.has(second)


async def test_a_clone_that_lost_a_file_is_fetched_anew(remote: Remote, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    repository = Repository(clone, f"file://{remote.bare}", None, os.environ)
    remote.write(a="x: 1\n")
    commit = remote.push()
    await repository.fetch(commit)
    (entry,) = await repository.tree(commit, ".")
    (pack,) = (clone / "objects" / "pack").glob("*.pack")
    packed = pack.read_bytes()
    for file in pack.parent.iterdir():
        file.unlink()
    git(clone, "unpack-objects", "-q", given=packed)
    (clone / "objects" / entry.blob[:2] / entry.blob[2:]).unlink()
    assert await repository.has(commit)
    with pytest.raises(Unreachable, match=r"'a\.yaml' cannot be read from the clone"):
        await repository.blobs([entry])
    await repository.fetch(commit)
    assert await repository.blobs([entry]) == [b"x: 1\n"]


async def test_what_goes_by_http_to_this_machine_goes_by_no_proxy(remote: Remote, tmp_path: Path) -> None:
    dead = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    environ = {"PATH": os.environ["PATH"], **dead}
    repository = Repository(tmp_path / "clone", remote.url, "a token", environ)
    commit = remote.push()
    assert await repository.head(Ref("refs/heads/main")) == commit


async def test_nothing_that_a_user_a_repository_or_a_clone_configures_is_run(
    remote: Remote, tmp_path: Path
) -> None:
    """Hooks, filters, diff drivers, another transport, another address: none of it, and no file is checked out."""
    mark, home, hooks = tmp_path / "ran", tmp_path / "home", tmp_path / "hooks"
    for folder in (home, hooks):
        folder.mkdir()
    act = f"sh -c 'touch {mark}; cat'"
    (home / ".gitconfig").write_text(
        f'[core]\n hooksPath = {hooks}\n fsmonitor = {act}\n[filter "evil"]\n smudge = {act}\n clean = {act}\n'
        f'[diff "evil"]\n textconv = {act}\n[credential]\n helper = {act}\n'
        f'[url "http://127.0.0.1:9/"]\n insteadOf = {remote.url}\n'
    )
    clone = tmp_path / "clone"
    environ = {
        "PATH": os.environ["PATH"], "HOME": str(home), "XDG_CONFIG_HOME": str(home),
        "GIT_CONFIG_GLOBAL": str(home / ".gitconfig"), "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.hooksPath", "GIT_CONFIG_VALUE_0": str(hooks),
        "GIT_SSH_COMMAND": act, "GIT_ASKPASS": str(hooks / "post-checkout"),
        "GIT_EXEC_PATH": str(hooks), "GIT_TEMPLATE_DIR": str(hooks),
    }  # fmt: skip
    repository = Repository(clone, remote.url, None, environ)
    remote.write(a="x: 1\n")
    (remote.work / ".gitattributes").write_text("* filter=evil diff=evil\n")
    first = remote.push()
    await repository.fetch(first)
    for folder in (hooks, clone / "hooks"):
        folder.mkdir(exist_ok=True)
        for name in ("reference-transaction", "post-checkout", "post-update", "pre-auto-gc", "post-rewrite"):
            (folder / name).write_text(f"#!/bin/sh\ntouch {mark}\n")
            (folder / name).chmod(0o755)
    commit = remote.push("another")
    assert await repository.head(Ref("refs/heads/main")) == commit
    await repository.fetch(commit)
    entries = [entry for entry in await repository.tree(commit, ".") if entry.path == b"a.yaml"]
    assert await repository.blobs(entries) == [b"x: 1\n"]
    assert not mark.exists()
    assert not list(clone.rglob("a.yaml"))
    assert git(clone, "rev-parse", "--is-bare-repository") == "true"
    with pytest.raises(GitError):
        await Repository(tmp_path / "other", f"ext::{act}", None, environ).head(Ref("HEAD"))
    assert not mark.exists()
