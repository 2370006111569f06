"""Downloads against a hub that misbehaves: what is fetched, verified, gone on from, removed, shared and pruned."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests import standin_hub
from tests.standin_hub import Hub
from tests.unit.engine.test_lying_checkpoints import CONFIG, INDEX, ONE, TWO, packed

from quire_operators.cache import HubCache, Need
from quire_operators.downloads import Downloads, Progress
from quire_operators.secrets import SecretNotFound, Secrets
from quire_schemas.checkpoint import expected_tensors, profile_from_config, read_profile
from quire_schemas.hub import FetchEvent, FetchJob
from quire_schemas.resource import Key

NAME = "acme/small"
MODEL = Key("model", "m")
WIDE = CONFIG | {"hidden_size": 256, "vocab_size": 4000}
"""Weights of a few megabytes, so that there is something to cut off."""


def files(salt: bytes = b"") -> dict[str, bytes]:
    shapes = list(expected_tensors(profile_from_config(WIDE)))
    return {
        "config.json": json.dumps(WIDE).encode() + salt,
        "tokenizer.json": b"{}",
        "model.safetensors": packed(shapes),
        "README.md": b"about",
        "consolidated.safetensors": b"a second copy" * 20_000,
        "pytorch_model.bin": b"x",
    }


def sharded_files() -> dict[str, bytes]:
    shapes = list(expected_tensors(profile_from_config(WIDE)))
    parts = {ONE: shapes[:4], TWO: shapes[4:]}
    weight_map = {tensor: name for name, part in parts.items() for tensor, _ in part}
    found = {name: packed(part) for name, part in parts.items()}
    return found | {
        "config.json": json.dumps(WIDE).encode(),
        "tokenizer.json": b"{}",
        INDEX: json.dumps({"weight_map": weight_map}).encode(),
        "model-00003-of-00003.safetensors": b"not in the index",
    }


def indexed(shard: str) -> dict[str, bytes | None]:
    """Instead of one file, an index that lists `shard`."""
    return {"model.safetensors": None, INDEX: json.dumps({"weight_map": {"x": shard}}).encode()}


def theirs(loop: Loop, cache: HubCache, more: str = "") -> None:
    """What Hugging Face's own tools do."""
    code = f"from huggingface_hub import snapshot_download as d; d({NAME!r}, cache_dir={str(cache.root)!r}{more})"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, env=loop.environment, stdout=subprocess.DEVNULL
    )


@dataclass
class Loop:
    """A process that fetches for many tests; `hub` is what it asks."""

    hub: Hub
    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def run(self, job: FetchJob) -> list[FetchEvent]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(job) + b"\n")
        self.process.stdin.flush()
        events: list[FetchEvent] = []
        while not events or events[-1].event == "progress":
            line = self.process.stdout.readline()
            assert line, "the process ended"
            events.append(msgspec.json.decode(line, type=FetchEvent))
        return events


def environment(hub: Hub, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with standin_hub.serve() as hub:
        env = environment(hub, tmp_path_factory.mktemp("home"))
        script = Path(__file__).with_name("fetch_loop.py")
        with subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        ) as process:
            yield Loop(hub, process, env)
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


@pytest.fixture
def hub(loop: Loop) -> Iterator[Hub]:
    own = loop.hub
    yield own
    own.repositories.clear()
    own.rules.clear()
    own.seen.clear()
    own.bytes_sent.clear()
    own.rate = None


@pytest.fixture
def cache(tmp_path: Path) -> HubCache:
    return HubCache(tmp_path / "hub", tmp_path / "records")


@dataclass
class Fetcher:
    """Looks and fetches into one cache."""

    loop: Loop
    cache: HubCache

    def job(self, op: Any, revision: str, **fields: Any) -> FetchJob:
        job = FetchJob(op, NAME, revision, "model", str(self.cache.root), str(self.cache.records))
        return msgspec.structs.replace(job, **fields)

    def look(self, revision: str = "main", **fields: Any) -> FetchEvent:
        return self.loop.run(self.job("look", revision, **fields))[-1]

    def fetch(self, commit: str, **fields: Any) -> FetchEvent:
        return self.loop.run(self.job("fetch", commit, **fields))[-1]


@pytest.fixture
def fetcher(loop: Loop, hub: Hub, cache: HubCache) -> Fetcher:
    return Fetcher(loop, cache)


def need(commit: str) -> Need:
    return Need(NAME, commit, "model")


# ── what is fetched ───────────────────────────────────────────────────────────────────────────────────────


def test_a_look_fetches_the_small_files_and_a_fetch_the_weights(fetcher: Fetcher, hub: Hub) -> None:
    commit = hub.repository(NAME).commit(files())
    assert fetcher.look().commit == commit
    folder = fetcher.cache.snapshot(NAME, commit)
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json"}
    assert fetcher.cache.commit_of(NAME, "main") == fetcher.cache.commit_of(NAME, commit[:8]) == commit
    assert fetcher.cache.missing(need(commit)) == len(files()["model.safetensors"])
    assert not fetcher.cache.is_whole(need(commit))
    assert fetcher.fetch(commit).event == "done"
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert fetcher.cache.is_whole(need(commit))
    assert read_profile(folder).hidden_size == 256
    asked = len(hub.seen)
    assert fetcher.fetch(commit).event == "done"
    assert len(hub.seen) == asked, "what is whole needs no network"


def test_of_shards_exactly_those_that_the_index_lists(fetcher: Fetcher, hub: Hub) -> None:
    commit = hub.repository(NAME).commit(sharded_files())
    fetcher.look()
    assert fetcher.fetch(commit).event == "done"
    found = {path.name for path in fetcher.cache.snapshot(NAME, commit).iterdir()}
    assert found == {"config.json", "tokenizer.json", INDEX, ONE, TWO}


def test_a_tokenizer_alone_brings_no_weights(fetcher: Fetcher, hub: Hub) -> None:
    commit = hub.repository(NAME).commit(files())
    fetcher.look(part="tokenizer")
    assert fetcher.fetch(commit, part="tokenizer").event == "done"
    assert fetcher.cache.is_whole(Need(NAME, commit, "tokenizer"))
    assert {path.name for path in fetcher.cache.snapshot(NAME, commit).iterdir()} == {"tokenizer.json"}


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"model.safetensors": None}, "UnsupportedArchitecture", "pytorch_model.bin is of a format"),
        ({"model.safetensors": None, "pytorch_model.bin": None}, "InvalidReference", "has neither"),
        ({"config.json": None}, "InvalidReference", "no config.json"),
        (indexed("../../x.safetensors"), "InvalidReference", "not the name of a file"),
        (indexed("gone.safetensors"), "InvalidReference", "no gone.safetensors"),
    ],
)  # fmt: skip
def test_a_repository_without_what_is_read_is_refused_by_a_look(
    change: dict[str, bytes | None], reason: str, words: str, fetcher: Fetcher, hub: Hub
) -> None:
    content = {name: data for name, data in (files() | change).items() if data is not None}
    hub.repository(NAME).commit(content)
    said = fetcher.look()
    assert (said.event, said.reason) == ("failed", reason)
    assert words in said.message
    assert said.hint


def test_weights_that_lie_are_refused_after_they_came(fetcher: Fetcher, hub: Hub) -> None:
    """Right by their digest, wrong by their header: the publisher's fault, found before an engine starts."""
    commit = hub.repository(NAME).commit(files() | {"model.safetensors": packed([("x", (9,))])})
    fetcher.look()
    said = fetcher.fetch(commit)
    assert said.reason == "InvalidReference"
    assert "embed_tokens" in said.message


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────────────────


def test_a_connection_that_breaks_is_made_again_from_where_it_broke(fetcher: Fetcher, hub: Hub) -> None:
    commit = hub.repository(NAME).commit(files())
    fetcher.look()
    hub.rules.append(standin_hub.cut("/cdn/", 1_500_000))
    assert fetcher.fetch(commit).event == "done"
    ranges = [seen.range for seen in hub.seen if "/cdn/" in seen.path]
    assert ranges == [None, "bytes=1048576-"]


def test_bytes_on_disk_are_gone_on_from_and_wrong_ones_are_not_trusted(fetcher: Fetcher, hub: Hub) -> None:
    commit = hub.repository(NAME).commit(files())
    weights = files()["model.safetensors"]
    digest = hashlib.sha256(weights).hexdigest()
    fetcher.look()
    partial = fetcher.cache.blob(NAME, f"{digest}.incomplete")
    partial.write_bytes(weights[:2_000_000])
    assert fetcher.cache.missing(need(commit)) == len(weights) - 2_000_000
    assert fetcher.fetch(commit).event == "done"
    assert [seen.range for seen in hub.seen if "/cdn/" in seen.path] == ["bytes=2000000-"]
    fetcher.cache.blob(NAME, digest).unlink()
    partial.write_bytes(b"wrong" + weights[5:2_000_000])
    assert fetcher.fetch(commit).event == "done"
    assert [seen.range for seen in hub.seen if "/cdn/" in seen.path][1:] == ["bytes=2000000-", None]
    assert fetcher.cache.blob(NAME, digest).read_bytes() == weights


@pytest.mark.parametrize("part", ["/cdn/", "config.json"])
def test_wrong_bytes_are_fetched_once_more_and_never_kept(part: str, fetcher: Fetcher, hub: Hub) -> None:
    hub.rules.append(standin_hub.corrupt(part, times=1))
    commit = hub.repository(NAME).commit(files())
    assert fetcher.look().event == "done"
    assert fetcher.fetch(commit).event == "done"
    hub.rules[:] = [standin_hub.corrupt(part)]
    again = hub.repository(NAME).commit(
        files(b" ") | {"model.safetensors": files()["model.safetensors"][:-1] + b"1"}
    )
    said = fetcher.look()
    said = fetcher.fetch(again) if said.event == "done" else said
    assert said.reason == "ChecksumMismatch"
    assert "fetched twice" in said.message
    assert not fetcher.cache.is_whole(need(again))
    blobs = fetcher.cache.home(NAME) / "blobs"
    for path in blobs.iterdir():
        data = path.read_bytes()
        assert path.name in (hashlib.sha256(data).hexdigest(), standin_hub.git_sha1(data))


def test_a_flipped_bit_on_disk_is_seen_and_mended(fetcher: Fetcher, hub: Hub) -> None:
    """What file:// cannot see, hf:// does: a file that changed is verified again, and fetched anew."""
    commit = hub.repository(NAME).commit(files())
    fetcher.look()
    fetcher.fetch(commit)
    path = (fetcher.cache.snapshot(NAME, commit) / "model.safetensors").resolve()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not fetcher.cache.is_whole(need(commit))
    assert fetcher.fetch(commit).event == "done"
    assert path.read_bytes() == files()["model.safetensors"]
    assert fetcher.cache.is_whole(need(commit))


@pytest.mark.parametrize(
    ("status", "reason", "field"),
    [
        (401, "Unauthorized", "spec.source"),
        (403, "Unauthorized", "spec.source"),
        (404, "NotFound", "spec.source"),
        (429, "HubUnreachable", "spec.source"),
        (503, "HubUnreachable", "spec.source"),
    ],
)
def test_what_the_hub_answers_instead_of_a_file(
    status: int, reason: str, field: str, fetcher: Fetcher, hub: Hub
) -> None:
    commit = hub.repository(NAME).commit(files())
    fetcher.look()
    hub.rules.append(standin_hub.fail(status, "/resolve/"))
    said = fetcher.fetch(commit)
    assert (said.event, said.reason, said.path) == ("failed", reason, field)
    assert said.hint
    hub.rules.clear()
    assert fetcher.fetch(commit).event == "done"


def test_a_token_goes_to_the_hub_and_to_nobody_else(fetcher: Fetcher, hub: Hub) -> None:
    repository = hub.repository(NAME, token="hf_right", gated=True)
    commit = repository.commit(files())
    said = fetcher.look()
    assert (said.reason, "no token was sent" in said.message) == ("Unauthorized", True)
    said = fetcher.look(token="hf_wrong")
    assert (said.reason, "the token was not accepted" in said.message) == ("Unauthorized", True)
    assert "hf_wrong" not in said.message + said.hint
    assert fetcher.look(token="hf_right").event == "done"
    assert fetcher.fetch(commit, token="hf_right").event == "done"
    assert {seen.authorization for seen in hub.seen if "/cdn/" in seen.path} == {None}


def test_a_revision_that_is_not_there_is_about_the_revision(fetcher: Fetcher, hub: Hub) -> None:
    hub.repository(NAME).commit(files())
    said = fetcher.look("v2")
    assert (said.reason, said.path) == ("NotFound", "spec.revision")


def test_a_repository_that_is_not_there_may_be_private(fetcher: Fetcher, hub: Hub) -> None:
    said = fetcher.look()
    assert said.reason == "Unauthorized"
    assert "does not exist, or is private; no token was sent" in said.message
    assert "check the name" in said.hint


# ── what others brought, and what goes ────────────────────────────────────────────────────────────────────


def test_what_hugging_faces_own_tools_fetched_is_verified_and_used_without_a_network(
    loop: Loop, fetcher: Fetcher, hub: Hub
) -> None:
    commit = hub.repository(NAME).commit(files())
    theirs(loop, fetcher.cache)
    hub.seen.clear()
    assert fetcher.fetch(commit).event == "done"
    assert fetcher.cache.is_whole(need(commit))
    assert not hub.seen
    [entry] = fetcher.cache.usage()
    assert (entry.commit, entry.ours, entry.refs) == (commit, 0, ("main",))
    assert fetcher.cache.prune(NAME, commit, dry_run=False) == 0, "what others brought stays"
    assert (fetcher.cache.snapshot(NAME, commit) / "model.safetensors").exists()
    # And the other way round: what is in our cache, their tools find.
    theirs(loop, fetcher.cache, ", local_files_only=True, allow_patterns=['*.json', 'model.safetensors']")


def test_prune_keeps_what_another_commit_shares(fetcher: Fetcher, hub: Hub) -> None:
    repository = hub.repository(NAME)
    old = repository.commit(files())
    fetcher.look()
    fetcher.fetch(old)
    new = repository.commit(files(b" "))
    fetcher.look(new)
    fetcher.fetch(new)
    sizes = {entry.commit: entry.ours for entry in fetcher.cache.usage()}
    assert set(sizes) == {old, new}
    assert fetcher.cache.prune(NAME, old, dry_run=True) == fetcher.cache.prune(NAME, old, dry_run=False)
    assert fetcher.cache.is_whole(need(new)), "the weights are shared, and stay"
    assert [entry.commit for entry in fetcher.cache.usage()] == [new]
    assert fetcher.cache.prune(NAME, new, dry_run=False) > len(files()["model.safetensors"])
    assert not fetcher.cache.home(NAME).exists()


# ── the downloads of a control plane ──────────────────────────────────────────────────────────────────────


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def downloads(loop: Loop, cache: HubCache, folder: Path, clock: Clock) -> Iterator[Downloads]:
    secrets = Secrets(folder / "secrets", {})
    yield Downloads(cache, secrets, loop.environment, lambda key: None, clock)


async def until(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.05)
    return value


async def test_failures_are_tried_again_as_their_reason_asks(
    loop: Loop, fetcher: Fetcher, hub: Hub, tmp_path: Path
) -> None:
    commit = hub.repository(NAME).commit(files())
    fetcher.look()
    clock = Clock()
    with downloads(loop, fetcher.cache, tmp_path, clock) as own:

        def demand(generation: int = 1, auth: dict[str, str] | None = None) -> Progress | None:
            return own.demand(MODEL, generation, [need(commit)], auth)

        async def failed(**fields: Any) -> Progress:
            found: Progress = await until(lambda: (p := demand(**fields)) is not None and p.failure and p)
            return found

        # A secret that is not there: stuck, looked at again after five minutes or when somebody set one.
        lacking = await failed(auth={"secretRef": "t"})
        assert lacking.failure is not None
        assert (lacking.failure.reason, lacking.failure.stuck) == ("SecretNotFound", True)
        assert lacking.failure.retry_at == clock.now + 300
        # The hub is down: not stuck, soon again, from where it was.
        hub.rules.append(standin_hub.fail(503, "/resolve/"))
        Secrets(tmp_path / "secrets", {}).put("t", "hf_x")
        own.look_again()
        down = await until(
            lambda: (
                (p := demand(auth={"secretRef": "t"})) and p.failure and p.failure.reason == "HubUnreachable" and p
            )
        )
        assert not down.failure.stuck
        assert 0.7 < down.failure.retry_at - clock.now < 1.3
        hub.rules.clear()
        await asyncio.sleep(0.1)
        waiting = demand(auth={"secretRef": "t"})
        assert waiting is not None, "not before its time"
        clock.now += 2
        await until(lambda: demand(auth={"secretRef": "t"}) is None)
        assert fetcher.cache.is_whole(need(commit))
        await own.close()


async def test_a_deleted_model_takes_its_download_along_and_another_keeps_it(
    loop: Loop, fetcher: Fetcher, hub: Hub, tmp_path: Path
) -> None:
    commit = hub.repository(NAME).commit(files())
    fetcher.look()
    hub.rate = 400_000
    other = Key("model", "other")
    with downloads(loop, fetcher.cache, tmp_path, Clock()) as own:
        own.demand(MODEL, 1, [need(commit)], None)
        own.demand(other, 1, [need(commit)], None)
        moving = await until(
            lambda: (p := own.demand(MODEL, 1, [need(commit)], None)) is not None and p.rate > 0 and p
        )
        assert 0 < moving.done < moving.total
        assert moving.rate < 10_000_000
        own.forget(MODEL)
        before = sum(hub.bytes_sent.values())
        await until(lambda: sum(hub.bytes_sent.values()) > before)
        own.forget(other)
        await asyncio.sleep(0.3)
        stopped = sum(hub.bytes_sent.values())
        await asyncio.sleep(0.5)
        assert sum(hub.bytes_sent.values()) == stopped
        assert fetcher.cache.present(need(commit)) > len(files()["config.json"]), "what came stays, to go on from"
        await own.close()


async def test_a_close_waits_for_the_workers_of_what_was_just_forgotten(
    loop: Loop, fetcher: Fetcher, hub: Hub, tmp_path: Path
) -> None:
    commit = hub.repository(NAME).commit(files())
    fetcher.look()
    hub.rate = 400_000
    before = set(psutil.Process().children())
    with downloads(loop, fetcher.cache, tmp_path, Clock()) as own:
        own.demand(MODEL, 1, [need(commit)], None)
        await until(lambda: set(psutil.Process().children()) - before)
        own.forget(MODEL)
        await own.close()
        assert not set(psutil.Process().children()) - before


async def test_two_at_once_fetch_once(loop: Loop, fetcher: Fetcher, hub: Hub, tmp_path: Path) -> None:
    """Two control planes share the cache of one user: the second waits for the first one's lock."""
    commit = hub.repository(NAME).commit(files())
    fetcher.look()
    hub.rate = 6_000_000
    with (
        downloads(loop, fetcher.cache, tmp_path, Clock()) as one,
        downloads(loop, HubCache(fetcher.cache.root, tmp_path / "other"), tmp_path, Clock()) as two,
    ):
        await until(
            lambda: (
                one.demand(MODEL, 1, [need(commit)], None) is None
                and two.demand(MODEL, 1, [need(commit)], None) is None
            )
        )
        weights = len(files()["model.safetensors"])
        assert sum(sent for path, sent in hub.bytes_sent.items() if "/cdn/" in path) == weights
        await one.close()
        await two.close()


# ── secrets ───────────────────────────────────────────────────────────────────────────────────────────────


def test_secrets_are_files_of_their_owner_and_errors_never_hold_one(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "secrets", {"SET": " hf_env \n", "EMPTY": ""})
    secrets.put("t", "hf_kept")
    path = tmp_path / "secrets" / "t"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    (tmp_path / "token").write_text("hf_file\n")
    (tmp_path / "two").write_text("hf_one\nhf_two\n")
    assert secrets.value({"secretRef": "t"}) == "hf_kept"
    assert secrets.value({"file": str(tmp_path / "token"), "env": None}) == "hf_file"
    assert secrets.value({"env": "SET"}) == "hf_env"
    for reference in (
        {"secretRef": "no"},
        {"secretRef": "../t"},
        {"file": str(tmp_path / "two")},
        {"env": "EMPTY"},
    ):
        with pytest.raises(SecretNotFound) as wrong:
            secrets.value(reference)
        assert "hf_" not in wrong.value.message + wrong.value.hint
    assert secrets.names() == ["t"]
    assert secrets.remove("t")
    assert not secrets.remove("t")
