"""What users of other systems complain about, row by row of the design's list, as it goes here.

Rows that other tests cover are there, under their number: `grep -rn test_row_ tests`. Here: a control plane
process, the real router, and the stand-in for engines.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from tests.integration.plane import Plane, Stream, model
from tests.waiting import eventually


def room_for_one(plane: Plane) -> str:
    """Lines of a spec that bound replicas to a share of this machine in which one fits, and two do not."""
    (item,) = plane.client.post("/v1/plan", {"files": [{"name": "p.yaml", "text": model("probe")}]})["items"]
    need = item["resolved"]["memoryPerReplica"]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"  engine: {{memory: {150 * need / whole:.4f}%}}\n"


def test_row_01_a_rolling_update_on_a_full_machine_goes_on_and_requests_wait(plane: Plane) -> None:
    small = room_for_one(plane)
    plane.apply(model("full", small, ROUND=1))
    plane.wait_served("full")
    plan = plane.plan(model("full", small, ROUND=2))
    assert plan["budget"]["stopFirst"]
    assert "unavailable 1 (asked for 1/0; nothing more fits)" in plan["rollout"]
    plane.apply(model("full", small, ROUND=2, LOAD="0.5"))
    while plane.condition("full", "RolledOut")["reason"] != "UpToDate":
        assert plane.complete("full").status_code == 200, "requests are held while nothing serves"
    assert plane.view("full")["status"]["servedRevision"] == 2
    plane.delete("full")


def test_row_03_a_newer_control_plane_restarts_nothing_of_an_older_one(plane: Plane, tmp_path: Path) -> None:
    older = model("older", RUSH=tmp_path / "rush")
    plane.apply(older)
    before = plane.wait_served("older")
    stream = Stream(plane.base_url, "older", 1900)
    stream.wait_running()
    plane.kill()
    with closing(sqlite3.connect(plane.state.store, isolation_level=None)) as db:  # as the version before wrote it
        db.execute("ALTER TABLE revisions DROP COLUMN stable_at")
        db.execute("ALTER TABLE revisions DROP COLUMN failure")
        db.execute("DROP TABLE overrides")
        db.execute("UPDATE revisions SET resolved = json_remove(resolved, '$.rollout.autoRollback')")
        db.execute("UPDATE revisions SET resolved = json_set(resolved, '$.rollout.autoRollback', json('false'))")
        db.execute("UPDATE meta SET value = '2' WHERE key = 'schemaVersion'")
    plane.start()
    after = plane.wait_served("older")
    assert [replica["pid"] for replica in after["replicas"]] == [replica["pid"] for replica in before["replicas"]]
    assert after["generation"] == before["generation"]
    assert plane.apply(older)["model/older"]["result"] == "unchanged"
    assert plane.state.store.with_name("state.db.schema2").exists()
    assert stream.is_alive(), "it ran all the while"
    (tmp_path / "rush").touch()
    stream.finish()
    plane.delete("older")


def test_row_06_success_is_not_reported_while_the_old_version_serves(plane: Plane) -> None:
    plane.apply(model("early", ROUND=1))
    plane.wait_served("early")
    generation = plane.apply(model("early", ROUND=2, LOAD="1"))["model/early"]["generation"]
    ready, rolled = plane.condition("early", "Ready"), plane.condition("early", "RolledOut")
    assert (ready["status"], rolled["status"]) == ("True", "False")
    assert rolled["observedGeneration"] == generation
    assert plane.view("early")["status"]["servedRevision"] == 1
    assert plane.wait_served("early")["status"]["servedRevision"] == 2
    plane.delete("early")


def test_row_07_a_revert_in_the_middle_takes_down_nothing_that_serves(plane: Plane) -> None:
    plane.apply(model("middle", "  replicas: 2\n", ROUND=1))
    before = {replica["pid"] for replica in plane.wait_served("middle")["replicas"]}
    plane.apply(model("middle", "  replicas: 2\n", ROUND=2, LOAD="2"))
    eventually(lambda: len(plane.view("middle")["replicas"]) > 2, "the update has begun")
    plane.apply(model("middle", "  replicas: 2\n", ROUND=1))
    while plane.condition("middle", "RolledOut")["reason"] != "UpToDate":
        assert plane.complete("middle").status_code == 200
    assert {replica["pid"] for replica in plane.wait_served("middle")["replicas"]} == before
    plane.delete("middle")


def test_row_08_a_replica_is_ready_when_the_router_has_acknowledged_it(plane: Plane) -> None:
    plane.apply(model("other"))
    plane.wait_served("other")
    router = plane.client.get("/v1/ping")["router"]["pid"]
    os.kill(router, signal.SIGSTOP)
    try:
        plane.apply(model("unseen"))
        eventually(lambda: plane.view("unseen")["replicas"], "a replica")
        eventually(
            lambda: plane.view("unseen")["status"]["progress"]["loaded"] is not None, "the engine says it is ready"
        )
        time.sleep(1)
        assert plane.condition("unseen", "Ready")["status"] == "False"
        assert plane.view("unseen")["replicas"][0]["state"] == "Starting"
    finally:
        os.kill(router, signal.SIGCONT)
    plane.wait_served("unseen")
    plane.delete("unseen")
    plane.delete("other")


def test_row_10_a_slow_start_that_gets_on_is_waited_for_and_one_that_does_not_is_ended(plane: Plane) -> None:
    patience = "  probes: {startup: {timeout: 4s}}\n  restartPolicy: {backoffBase: 100ms}\n"
    plane.apply(model("slow", patience, LOAD="5"), model("stuck", patience, REPEAT=1))
    assert plane.wait_served("slow")["replicas"][0]["incarnation"] == 1
    view = eventually(
        lambda: (v := plane.view("stuck"))["replicas"] and v["replicas"][0]["restarts"] and v, "it is ended"
    )
    assert view["replicas"][0]["lastExit"]["reason"] == "StartupTimeout"
    plane.delete("slow")
    plane.delete("stuck")


def test_row_18_what_nobody_changed_is_no_difference(plane: Plane) -> None:
    text = model("calm", "  batching: {maxQueueWait: 60s}\n  replicas: 1\n")
    plane.apply(text)
    plane.wait_served("calm")
    plane.client.post("/v1/objects/model/calm/scale", {"replicas": 2})
    plane.wait_served("calm")
    for same in (text, text.replace("60s", "1m"), text + "  drainTimeout: 30s\n"):
        plan = plane.plan(same)
        assert plan["changes"] == [], "another spelling, a default that is written out, and a scale are no drift"
        assert plan["revision"][0] == plan["revision"][1]
    plane.delete("calm")


def test_models_on_demand_come_when_they_are_asked_for_and_leave_for_each_other(plane: Plane) -> None:
    asked = room_for_one(plane) + "  residency: onDemand\n"
    plane.apply(model("one", asked), model("two", asked))
    both = ("one", "two")
    eventually(
        lambda: all(plane.condition(name, "Ready")["reason"] == "OnDemand" for name in both),
        "both may be asked for",
    )
    for name in both:
        assert plane.condition(name, "Ready")["status"] == "True"
        assert plane.view(name)["replicas"] == []
    stream = Stream(plane.base_url, "one", 100)
    stream.wait_running()
    answer = plane.complete("two")
    assert answer.status_code == 200, answer.text
    stream.finish()
    assert plane.view("one")["replicas"] == [], "unload before load"
    eventually(lambda: plane.view("two")["replicas"][0]["state"] == "Ready", "what answers is shown to serve")
    reasons = [event["reason"] for event in plane.client.get("/v1/events", **{"for": "model/one"})["items"]]
    assert {"Loading", "Unloading"} <= set(reasons)
    plane.kill()
    plane.start()
    assert plane.complete("one").status_code == 200
    small = room_for_one(plane)
    plane.apply(model("third", small))
    plane.wait_served("third")
    assert plane.view("one")["replicas"] == [], "who is always there comes first"
    plane.delete("third")
    for name in ("one", "two"):
        plane.delete(name)
