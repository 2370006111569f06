"""A change of source under a model that serves: the real control plane and download, a stand-in for the engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import standin_hub
from tests.integration.forked import ForkedPlane
from tests.integration.plane import GATEWAY, Plane, model
from tests.standin_hub import Hub
from tests.waiting import eventually

from quire.builtin import path as builtin_path

TOKEN = "hf_of_the_shell"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with standin_hub.serve() as own:
        own.repository("acme/small").commit(
            {path.name: path.read_bytes() for path in builtin_path().iterdir() if path.is_file()}
        )
        yield own


@pytest.fixture
def plane(tmp_path: Path, hub: Hub) -> Iterator[Plane]:
    own = ForkedPlane(tmp_path)
    own.env = {name: value for name, value in own.env.items() if not name.startswith("HF_")}
    own.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    own.start()
    own.apply(GATEWAY)
    yield own
    own.end()
    assert own.ours() == []


def test_what_serves_goes_on_until_the_new_files_are_there(plane: Plane, hub: Hub) -> None:
    plane.apply(model("m"), model("neighbour"))
    [before] = plane.wait_served("m")["replicas"]
    hub.rate = 500_000
    plane.apply(model("m").replace("builtin://tiny", "hf://acme/small"))
    moving = eventually(
        lambda: (p := plane.view("m")["status"]["progress"]["weights"]) and p.get("rate") and p, "it moves"
    )
    assert 0 < moving["bytesDone"] < moving["bytes"]
    view = plane.view("m")
    assert view["status"]["summary"] == "Serving, Downloading"
    assert [(r["id"], r["pid"], r["state"]) for r in view["replicas"]] == [(before["id"], before["pid"], "Ready")]
    assert plane.complete("m").status_code == 200
    # Nothing waits for it: another model is changed and served meanwhile.
    plane.apply(model("neighbour", "  batching: {maxNumSeqs: 8}\n"))
    plane.wait_served("neighbour")
    # The old replica, killed in the middle, comes back as what it was.
    os.kill(before["pid"], signal.SIGKILL)

    def back() -> bool:
        replicas = plane.view("m")["replicas"]
        return [(r["id"], r["revision"], r["state"]) for r in replicas] == [(before["id"], 1, "Ready")] and (
            replicas[0]["pid"] != before["pid"]
        )

    eventually(back, "the old revision is back")
    assert plane.condition("m", "Fetched")["reason"] == "Downloading"
    hub.rate = None
    [after] = plane.wait_served("m")["replicas"]
    assert after["revision"] == 2
    assert after["pid"] != before["pid"]
    told = [path.read_text() for path in plane.state.runtime.rglob("*.json")]
    assert len(told) >= 3, "what shims were told: router and engines"
    assert not any(TOKEN in text for text in told)
    assert {seen.authorization for seen in hub.seen} == {f"Bearer {TOKEN}", None}
    assert {seen.authorization for seen in hub.seen if seen.path.startswith("/cdn/")} == {None}
    reasons = [event["reason"] for event in plane.client.get("/v1/events", **{"for": "model/m"})["items"]]
    assert reasons.index("Downloading") < reasons.index("Verified") < reasons.index("Draining")


@pytest.mark.nightly
def test_a_model_that_is_deleted_stops_its_download(plane: Plane, hub: Hub) -> None:
    hub.rate = 1_500_000
    plane.apply(model("m").replace("builtin://tiny", "hf://acme/small"))
    eventually(lambda: sum(hub.bytes_sent.values()) > 2_500_000, "it moves")
    plane.delete("m")
    sent = sum(hub.bytes_sent.values())
    hub.rate = None
    plane.apply(model("neighbour"))
    plane.wait_served("neighbour")
    assert sum(hub.bytes_sent.values()) - sent < 1_000_000, "what lay in buffers, at most"
    [item] = plane.client.get("/v1/cache")["items"]
    assert item["usedBy"] == []
    assert item["incompleteBytes"] > 0
    assert plane.client.post("/v1/cache/prune", {})["items"][0]["bytes"] == item["prunableBytes"]
    assert plane.client.get("/v1/cache")["items"] == []
