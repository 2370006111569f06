"""What an apply has acknowledged is there, however often and whenever the control plane is killed meanwhile."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.effort import times
from tests.integration.disk import SYNC, WRITE, Disk, recorder, records, whole_until
from tests.integration.forked import ForkedPlane
from tests.integration.plane import GATEWAY, Plane

from quire.client import Client, ClientError
from quire_operators.store import Store

APPLIERS, OBJECTS = 4, 50
MODEL = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {{name: {name}, annotations: {{quire.dev/change-cause: 'number {number}'}}}}
spec: {{source: 'builtin://tiny', replicas: 0}}
"""


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    plane = ForkedPlane(tmp_path)
    plane.start()
    plane.apply(GATEWAY)
    yield plane
    plane.end()
    assert plane.ours() == []


class Applier(threading.Thread):
    """Applies its own objects over and over, each time with a higher number, and notes what was acknowledged."""

    def __init__(self, plane: Plane, own: int) -> None:
        super().__init__()
        self.client = Client(plane.state, start=False, timeout=20)
        self.names = [f"m{own}-{number}" for number in range(OBJECTS)]
        self.tried: dict[str, int] = {}
        self.acknowledged: dict[str, int] = {}
        self.count = 0
        self.at: list[tuple[int, str, int]] = []
        """Each acknowledgement, with how long the trace of the disk was then."""
        self.trace: Path | None = None
        self.ended = threading.Event()
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            for number in itertools.count(1):
                for name in self.names:
                    if self.ended.is_set():
                        return
                    self.apply(name, number)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.problem = error

    def apply(self, name: str, number: int) -> None:
        self.tried[name] = number
        text = MODEL.format(name=name, number=number)
        try:
            self.client.post("/v1/apply", {"files": [{"name": "m.yaml", "text": text}]})
        except (ClientError, OSError) as error:
            if getattr(error, "status", 503) not in (409, 503):
                raise
            time.sleep(0.01)  # it was killed, or is not back yet: taken or not, nobody said
        else:
            self.acknowledged[name] = number
            self.count += 1
            if self.trace is not None:
                self.at.append((self.trace.stat().st_size, name, number))


def number_of(stored: dict[str, Any]) -> int:
    cause = stored["intent"]["metadata"]["annotations"]["quire.dev/change-cause"]
    return int(cause.removeprefix("number "))


def test_no_acknowledged_manifest_is_lost_and_the_store_stays_whole(plane: Plane) -> None:
    appliers = [Applier(plane, own) for own in range(APPLIERS)]
    for applier in appliers:
        applier.start()
    rng = random.Random(7)
    try:
        for _ in range(times(10, 500)):
            time.sleep(rng.uniform(0.0, 0.3))
            plane.kill()
            plane.start()
        time.sleep(0.5)
    finally:
        for applier in appliers:
            applier.ended.set()
        for applier in appliers:
            applier.join(60)
    assert [applier.problem for applier in appliers] == [None] * APPLIERS
    found = {item["name"]: number_of(item) for item in plane.client.get("/v1/objects", kind="model")["items"]}
    total = 0
    for applier in appliers:
        for name, number in applier.acknowledged.items():
            assert number <= found[name] <= applier.tried[name], name
        total += len(applier.acknowledged)
    assert total > 0
    with closing(sqlite3.connect(plane.state.store)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_r02_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """The control plane's writes are cut off anywhere: what was not synced is there, or is not, or is torn."""
    plane = Plane(tmp_path)
    trace, environ = recorder(tmp_path, plane.state.store)
    plane.env |= environ
    plane.start()
    appliers = [Applier(plane, own) for own in range(2)]
    try:
        plane.apply(GATEWAY)
        for applier in appliers:
            applier.trace = trace
            applier.start()
        for _ in range(times(2, 6)):
            time.sleep(1.5)
            plane.kill()  # the next one finds a log of writes, and starts a new one
            os.truncate(trace, whole_until(trace.read_bytes()))
            plane.start()
    finally:
        for applier in appliers:
            applier.ended.set()
        for applier in appliers:
            applier.join(60)
        plane.end()
    assert [applier.problem for applier in appliers] == [None, None]
    acknowledged = sorted(each for applier in appliers for each in applier.at)
    tried = {name: number for applier in appliers for name, number in applier.tried.items()}
    # shared memory is no file that is synced, or read after a boot
    whole = [record for record in records(trace.read_bytes()) if not record.path.endswith("-shm")]
    assert {record.operation for record in whole} >= {WRITE, SYNC}
    rng = random.Random(2)
    cuts = sorted(rng.sample(range(len(whole)), times(25, 1000)))
    disk, played, unsynced = Disk(), 0, 0
    for number, cut in enumerate(cuts):
        for record in whole[played:cut]:
            disk.play(record)
        played = cut
        folder = tmp_path / f"cut{number}"
        folder.mkdir()
        unsynced += any(file.pending for file in disk.files.values())
        for path, content in disk.after_power_cut(rng).items():
            (folder / Path(path).name).write_bytes(content)
        with closing(Store(folder / plane.state.store.name)) as store:
            found = {each.key.name: number_of({"intent": each.intent}) for each in store.objects("model")}
        reached = whole[cut - 1].end if cut else 0
        promised = {name: number for at, name, number in acknowledged if at <= reached}
        for name, least in promised.items():
            assert least <= found.get(name, 0) <= tried[name], (name, cut)
        with closing(sqlite3.connect(folder / plane.state.store.name)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        shutil.rmtree(folder)
    assert promised, "something was acknowledged before the last cut"
    assert unsynced > len(cuts) / 4, "a cut between syncs is what this is about"


def test_r34_two_who_write_one_object_have_one_history(plane: Plane) -> None:
    """Each acknowledgement has a generation of its own, and the object is what the last of them said."""
    rounds, said, problems = times(40, 1000), [], []

    def write(own: int) -> None:
        client = Client(plane.state, start=False, timeout=20)
        try:
            for number in range(own, own + 2 * rounds, 2):
                files = [{"name": "m.yaml", "text": MODEL.format(name="both", number=number)}]
                (result,) = client.post("/v1/apply", {"files": files})["results"]
                said.append((result["generation"], number))
        except BaseException as error:  # noqa: BLE001 - shown by the test
            problems.append(error)

    writers = [threading.Thread(target=write, args=(own,)) for own in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert problems == []
    generations = [generation for generation, _ in said]
    assert sorted(generations) == list(range(1, 2 * rounds + 1)), "no two are told the same, and none is left out"
    view = plane.view("both")
    assert (view["generation"], number_of(view)) == max(said)
    own = [number for _, number in sorted(said)]
    for first in (1, 2):
        mine = [number for number in own if number % 2 == first % 2]
        assert mine == sorted(mine), "and nobody's older word came after a newer one"


def test_r35_who_follows_events_over_kills_misses_none_and_hears_none_twice(plane: Plane) -> None:
    heard: list[int] = []
    ended, problems = threading.Event(), []

    def follow() -> None:
        client = Client(plane.state, start=False, timeout=20)
        try:
            while True:
                last = ended.is_set()  # what came before it is asked for once more
                try:
                    after = max(heard, default=0)
                    heard.extend(item["id"] for item in client.get("/v1/events", after=after)["items"])
                except ClientError:
                    time.sleep(0.01)
                    continue
                if last:
                    return
        except BaseException as error:  # noqa: BLE001 - shown by the test
            problems.append(error)

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        for number in range(times(4, 50)):
            plane.apply(MODEL.format(name=f"seen{number}", number=number))
            plane.kill()
            plane.start()
    finally:
        ended.set()
        follower.join(60)
    assert problems == []
    there = [item["id"] for item in plane.client.get("/v1/events")["items"]]
    assert len(heard) == len(set(heard))
    assert set(heard) == set(there)
    assert len(there) >= times(4, 50)
