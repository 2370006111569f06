"""What an apply has acknowledged is there, however often and whenever the control plane is killed meanwhile."""

from __future__ import annotations

import itertools
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.effort import times
from tests.integration.plane import GATEWAY, Plane

from quire.client import Client, ClientError

APPLIERS, OBJECTS = 4, 50
MODEL = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {{name: {name}, annotations: {{quire.dev/change-cause: 'number {number}'}}}}
spec: {{source: 'builtin://tiny', replicas: 0}}
"""


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    plane = Plane(tmp_path)
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


def number_of(stored: dict[str, Any]) -> int:
    cause = stored["intent"]["metadata"]["annotations"]["quire.dev/change-cause"]
    return int(cause.removeprefix("number "))


def test_no_acknowledged_manifest_is_lost_and_the_store_stays_whole(plane: Plane) -> None:
    appliers = [Applier(plane, own) for own in range(APPLIERS)]
    for applier in appliers:
        applier.start()
    rng = random.Random(7)
    try:
        for _ in range(times(12, 500)):
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
