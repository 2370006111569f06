"""A clone of our own: what another process left in it, what it lost, and whom a password goes by."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.git_remote import Remote, git

from quire_operators.git import Ref, Repository, Unreachable


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
