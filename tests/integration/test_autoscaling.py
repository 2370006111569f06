"""Replicas that follow the load: up, down, to none and back, whatever is applied meanwhile and whoever dies.

A control plane process, the real router, and the stand-in for engines.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tests.integration.plane import Plane, Stream, model
from tests.waiting import eventually

from quire.controlplane.plane import ControlPlane
from quire_operators.paths import StateDir
from quire_operators.records import Change
from quire_schemas import manifest
from quire_schemas.resource import Key

SPEC = """\
  autoscaling:
    minReplicas: 0
    maxReplicas: 3
    target: {inFlightPerReplica: 2}
    scaleDownDelay: 1s
    idleTimeout: 1s
"""


def counts(plane: Plane, name: str = "m") -> dict[str, int]:
    return dict(plane.view(name)["status"]["replicas"])


def events(plane: Plane, name: str = "m") -> list[dict[str, Any]]:
    return list(plane.client.get("/v1/events", **{"for": f"model/{name}"})["items"])


def test_a_model_whose_load_cannot_be_followed_keeps_no_other_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDir(tmp_path / "state")
    state.create()
    own = ControlPlane(state, {})
    loaded = manifest.load([("m.yaml", model("m", SPEC))])
    spec = loaded.resources[0].resource.model_dump(mode="json", by_alias=True)["spec"]
    # no revision is on record, as nothing that was admitted could be
    own.store.apply([Change(Key("model", name), {}, "h", spec, None) for name in "ab"])
    assert own.models.demand.settle_scaling() is not None
    assert [name for name in ("model/a", "model/b") if f"{name}: its load is not followed" in caplog.text] == [
        "model/a",
        "model/b",
    ]
    own.store.close()


def test_replicas_follow_the_load_to_none_and_back(plane: Plane) -> None:
    text = model("m", SPEC)
    plan = plane.plan(text)
    assert plan["rollout"] == "1 replica to start"
    plane.apply(text)
    plane.wait_served("m")
    streams = [Stream(plane.base_url, "m", 250) for _ in range(5)]
    eventually(lambda: counts(plane)["ready"] == 3, "five requests are for three replicas")
    assert plane.apply(text)["model/m"]["result"] == "unchanged", "what the load decided is no drift"
    assert plane.plan(text)["changes"] == []
    assert counts(plane)["desired"] == 3
    plane.kill()
    plane.start()
    assert counts(plane)["desired"] == 3, "who comes back goes on with what was decided"
    for stream in streams:
        stream.finish()
    eventually(lambda: plane.condition("m", "Ready")["reason"] == "ScaledToZero", "nobody asks any more")
    ready = plane.condition("m", "Ready")
    assert ready["status"] == "True", "it may be asked for"
    eventually(lambda: plane.view("m")["replicas"] == [], "no replica is left")
    answer = plane.complete("m")
    assert answer.status_code == 200, answer.text
    found = events(plane)
    scaled = [(event["reason"], event["message"]) for event in found if event["reason"].startswith("Scaled")]
    assert any(reason == "ScaledUp" and "→ 3 replicas: 5 requests in flight" in text for reason, text in scaled), (
        scaled
    )
    assert any(reason == "ScaledDown" and "→ 0 replicas: nobody asked for 1 s" in text for reason, text in scaled)
    assert any(reason == "ScaledUp" and "0 → 1 replicas: it is asked for" in text for reason, text in scaled)
    plane.delete("m")


def test_a_person_s_number_stays_until_it_is_reset_and_a_new_range_holds(plane: Plane) -> None:
    plane.apply(
        model("steered", SPEC.replace("minReplicas: 0", "minReplicas: 1").replace("    idleTimeout: 1s\n", ""))
    )
    plane.wait_served("steered")
    said = plane.client.post("/v1/objects/model/steered/scale", {"replicas": 2})
    assert said["message"] == "2 replicas, where the manifest says 1 to 3, by the load"
    eventually(lambda: counts(plane, "steered")["ready"] == 2, "as many as were asked for")
    streams = [Stream(plane.base_url, "steered", 60) for _ in range(6)]
    for stream in streams:
        stream.finish()
    assert counts(plane, "steered")["desired"] == 2
    assert not any(event["reason"] == "ScaledUp" for event in events(plane, "steered"))
    plane.client.post("/v1/objects/model/steered/scale", {"replicas": None})
    eventually(lambda: counts(plane, "steered")["desired"] == 1, "the load decides again")
    plane.apply(
        model("steered", SPEC.replace("minReplicas: 0", "minReplicas: 2").replace("    idleTimeout: 1s\n", ""))
    )
    eventually(lambda: counts(plane, "steered")["ready"] == 2, "the least of the new range")
    plane.apply(model("steered", "  replicas: 1\n"))
    eventually(
        lambda: counts(plane, "steered") | {"live": 1, "draining": 0} == counts(plane, "steered"),
        "a fixed number is one",
    )
    assert counts(plane, "steered")["desired"] == 1
    assert plane.view("steered")["status"]["overrides"] == []
    plane.delete("steered")


def test_who_cannot_wait_for_a_start_is_told_how_long_the_last_one_took(plane: Plane) -> None:
    text = SPEC + "  batching: {maxQueueWait: 200ms}\n"
    plane.apply(model("far", text, LOAD="2"))
    plane.wait_served("far")
    eventually(lambda: plane.condition("far", "Ready")["reason"] == "ScaledToZero", "nobody asks for it")
    begun = time.monotonic()
    answer = plane.complete("far")
    assert answer.status_code == 503, answer.text
    assert 2 <= int(answer.headers["retry-after"]) <= 5, answer.headers
    eventually(lambda: plane.complete("far").status_code == 200, "who asked has had it started")
    assert time.monotonic() - begun > 1.5
    plane.delete("far")


def test_who_never_was_ready_is_waited_for(plane: Plane) -> None:
    plane.apply(model("late", SPEC, LOAD="2"))
    plane.wait_served("late")
    served_at = time.monotonic()
    eventually(lambda: plane.condition("late", "Ready")["reason"] == "ScaledToZero", "nobody asks for it")
    assert time.monotonic() - served_at > 0.5, "its time without a request begins when it serves"
    plane.delete("late")
