"""Several control planes on one state directory, with the store on PostgreSQL: one acts, another takes over.

What may never happen: an acknowledged manifest is lost, two processes live for one replica, whoever was deposed
changes anything.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from tests.effort import EFFORT, bound, times
from tests.figures import quantile, record
from tests.integration.forked import Forked, ForkedPlane
from tests.integration.plane import GATEWAY, model
from tests.integration.test_acknowledged import Applier, number_of
from tests.postgres import Postgres
from tests.waiting import eventually

from quire.client import Client, ClientError, Refused, Unreachable, _UnixConnection
from quire_operators.fleet.local import SHIM
from quire_operators.lease import LEASE_SECONDS

KILLS = times(4, 50)
SECRET = "hunter2secret"
TAKEOVER_SECONDS = 20.0


class Planes(ForkedPlane):
    """A state directory whose store is a database, with one control plane that leads and one that stands by."""

    def __init__(self, folder: Path, postgres: Postgres) -> None:
        super().__init__(folder)
        self.url = postgres.database()
        # the server asks for none, and it must get nowhere all the same
        self.env["QUIRE_DATABASE"] = self.url.set(password=SECRET).render_as_string(hide_password=False)
        self.env["PGPASSWORD"] = SECRET
        self.all: list[Forked] = []

    def add(self) -> Forked:
        """One more that stands by, or leads if nobody does."""
        self.all.append(self.stand_by())
        return self.all[-1]

    def begin(self) -> None:
        self.add()
        self.leader()
        self.add()
        eventually(self.stands_by, "one stands by")

    def stands_by(self) -> bool:
        return "standing by, pid" in self.log().rpartition("leading: epoch")[2]

    def leader(self, other_than: int | None = None) -> Forked:
        """The control plane that answers, once it is another one than the process `other_than`."""

        def who() -> Forked | None:
            try:
                pid = Client(self.state, start=False, timeout=2).get("/v1/ping")["pid"]
            except ClientError:
                return None
            return next((each for each in self.all if each.pid == pid != other_than), None)

        found = eventually(who, "somebody leads", logs=self.log)
        assert isinstance(found, Forked)
        return found

    def log(self) -> str:
        path = self.state.log("controlplane")
        return path.read_text() if path.exists() else ""

    def ask(self, statement: str) -> list[tuple[Any, ...]]:
        address = self.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(address, autocommit=True) as db:
            done = db.execute(statement.encode())
            return done.fetchall() if done.description is not None else []

    def nothing_knows_the_password(self) -> None:
        """Neither what was started nor any file or answer."""
        leaders = {each.pid for each in self.all}
        for pid in set(self.ours()) - leaders:
            assert SECRET not in Path(f"/proc/{pid}/environ").read_text(errors="replace")
        told = [self.client.get("/v1/ping"), self.client.get("/v1/objects"), self.client.get("/v1/events")]
        assert SECRET not in json.dumps(told)
        for folder in (self.state.root, self.state.runtime):
            for path in folder.rglob("*"):
                if path.is_file():
                    assert SECRET not in path.read_text(errors="replace"), path

    def down(self) -> None:
        for each in self.all:
            if each.poll() is None and each.pid is not None:
                os.kill(each.pid, signal.SIGCONT)
        if all(each.poll() is not None for each in self.all):
            self.add()
        self.leader()
        self.client.post("/v1/down", {"grace": 0.2})
        for each in self.all:
            each.wait(60)


@pytest.fixture
def planes(tmp_path: Path, postgres: Postgres) -> Iterator[Planes]:
    planes = Planes(tmp_path, postgres)
    planes.begin()
    planes.apply(GATEWAY)
    yield planes
    planes.nothing_knows_the_password()
    planes.down()
    assert planes.ours() == []


class Watcher(threading.Thread):
    """Looks again and again whether more than one shim lives for a replica."""

    def __init__(self, planes: Planes) -> None:
        super().__init__()
        self.mark = str(planes.state.replicas).encode()
        self.ended = threading.Event()
        self.looks, self.doubles = 0, 0
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            self.looks += 1
            lives: dict[bytes, set[bytes]] = defaultdict(set)
            for entry in os.listdir("/proc"):
                if not entry.isdigit():
                    continue
                try:
                    words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if str(SHIM).encode() in words and self.mark in words[-2]:
                    replica, incarnation = words[-2].split(b"/")[-3:-1]
                    lives[replica].add(incarnation)
            # a shim that finds itself deposed, or taken the place of, starts no child and ends at once
            self.doubles += sum(len(each) > 1 for each in lives.values())


@pytest.mark.nightly
def test_the_leader_is_killed_again_and_again_and_nothing_that_was_acknowledged_is_lost(planes: Planes) -> None:
    appliers = [Applier(planes, own) for own in range(2)]
    watcher = Watcher(planes)
    rng = random.Random(5)
    took = []
    planes.apply(model("rolled", "  replicas: 2\n"))
    for applier in appliers:
        applier.start()
    try:
        for number in range(KILLS):
            leader = planes.leader()
            planes.apply(model("rolled", "  replicas: 2\n", MARK=number))
            time.sleep(rng.uniform(0.0, 1.0))
            assert leader.pid is not None
            began = time.monotonic()
            os.kill(leader.pid, signal.SIGKILL)
            planes.leader(other_than=leader.pid)
            took.append(time.monotonic() - began)
            planes.add()
    finally:
        for applier in appliers:
            applier.ended.set()
        for applier in appliers:
            applier.join(60)
        watcher.ended.set()
        watcher.join(10)
    assert [applier.problem for applier in appliers] == [None, None]
    found = {item["name"]: item for item in planes.client.get("/v1/objects", kind="model")["items"]}
    acknowledged = {name: number for applier in appliers for name, number in applier.acknowledged.items()}
    assert acknowledged
    for name, number in acknowledged.items():
        assert number_of(found[name]) >= number, name
    planes.wait_served("rolled")
    epochs = [int(epoch) for epoch in re.findall(r"leading: epoch (\d+)", planes.log())]
    assert epochs == sorted(set(epochs)), "an epoch is one leader's"
    assert planes.ask("SELECT epoch FROM leases") == [(epochs[-1],)]
    assert watcher.looks > KILLS
    assert watcher.doubles == 0
    assert max(took) < bound(TAKEOVER_SECONDS) if EFFORT == 1 else max(took) <= TAKEOVER_SECONDS
    record(
        {
            "system": "leader killed: another one leads",
            "repeat": KILLS,
            "acknowledged": sum(each.count for each in appliers),
            "lost": 0,
            "p50_s": round(quantile(took, 0.5), 2),
            "max_s": round(max(took), 2),
            "epoch": epochs[-1],
        }
    )


def paused(planes: Planes, leader: Forked) -> None:
    """Stop the leader where it is, and have its lease expire."""
    assert leader.pid is not None
    os.kill(leader.pid, signal.SIGSTOP)
    if EFFORT == 1:
        planes.ask("UPDATE leases SET expires = expires - 3600")


@pytest.mark.nightly
def test_a_leader_that_cannot_keep_its_lease_says_why_it_ends(planes: Planes) -> None:
    leader = planes.leader()
    planes.ask("ALTER TABLE leases RENAME COLUMN holder TO odd")
    try:
        assert leader.wait(20) == 1
    finally:
        planes.ask("ALTER TABLE leases RENAME COLUMN odd TO holder")
    assert "the lease cannot be renewed" in planes.log()
    planes.add()
    planes.leader(other_than=leader.pid)


def asked(planes: Planes, name: str) -> http.client.HTTPConnection:
    """An apply on its way to whoever leads now, unanswered."""
    connection = _UnixConnection(planes.state.admin_socket, 60)
    body = {"files": [{"name": "m.yaml", "text": model(name)}]}
    connection.request("POST", "/v1/apply", json.dumps(body).encode(), {"content-type": "application/json"})
    return connection


def test_a_leader_that_was_paused_finds_that_it_was_deposed_and_changes_nothing(planes: Planes) -> None:
    planes.apply(model("m"))
    planes.wait_served("m")
    old = planes.leader()
    planes.apply(model("m", MARK=2))  # a rollout is under way
    time.sleep(0.3)
    began = time.monotonic()
    paused(planes, old)
    with_it = asked(planes, "late")
    new = planes.leader(other_than=old.pid)
    assert time.monotonic() - began < bound(LEASE_SECONDS + 10)
    planes.wait_served("m")
    before = planes.ask("SELECT id, incarnation, nonce FROM replicas ORDER BY id")
    objects = planes.ask("SELECT name, resource_version FROM objects ORDER BY name")
    processes = planes.ours()
    table = planes.ask("SELECT value FROM meta WHERE key = 'routingVersion'")
    assert old.pid is not None
    os.kill(old.pid, signal.SIGCONT)
    answer = with_it.getresponse()
    said = json.loads(answer.read())
    with_it.close()
    assert (answer.status, said["error"]["code"]) == (503, "deposed"), said
    assert "another control plane leads" in said["error"]["message"]
    eventually(
        lambda: f"standing by, pid {old.pid}" in planes.log().rpartition("stood down")[2], "it stands by again"
    )
    assert planes.ask("SELECT id, incarnation, nonce FROM replicas ORDER BY id") == before
    assert planes.ask("SELECT name, resource_version FROM objects ORDER BY name") == objects
    assert planes.ask("SELECT value FROM meta WHERE key = 'routingVersion'") == table
    assert set(planes.ours()) == set(processes)
    assert not planes.exists("late")
    assert planes.complete("m").status_code == 200
    process, said_ = planes.spawn()
    process.wait(20)
    assert (process.poll(), said_) == (5, ""), "one that does not stand by leaves"
    began = time.monotonic()
    new.send_signal(signal.SIGTERM)
    assert planes.leader(other_than=new.pid) is old, "it may lead once more"
    assert time.monotonic() - began < bound(5)
    new.wait(20)


@pytest.mark.nightly
def test_a_database_that_is_away_for_longer_than_the_lease_changes_nothing_that_is_served(
    planes: Planes, postgres: Postgres
) -> None:
    planes.apply(model("m"))
    planes.wait_served("m")
    url, processes = planes.base_url, set(planes.ours())
    body = {"model": "m", "prompt": "hi", "max_tokens": 3}
    postgres.stop()
    try:
        with pytest.raises(Refused) as refused:
            planes.apply(model("n"))
        assert (refused.value.status, refused.value.code) in ((503, "store_unavailable"), (503, "deposed"))
        ends = time.monotonic() + LEASE_SECONDS + 3
        while time.monotonic() < ends:
            assert httpx.post(f"{url}/completions", json=body, timeout=30).status_code == 200
            time.sleep(0.2)
        assert set(planes.ours()) == processes, "and nobody took over, or ended"
    finally:
        postgres.start()

    def applied() -> bool:
        try:
            planes.apply(model("n"))
        except (Refused, Unreachable):
            return False
        return True

    eventually(applied, "it is written again", 30, logs=planes.log)
    planes.wait_served("n")
    assert processes <= set(planes.ours())
    assert [each.poll() for each in planes.all] == [None, None]
