"""Rollouts that fail, and what a person decides beside a manifest: a control plane, the real router, and the
stand-in for engines, which fails on demand.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.integration.plane import Plane, Stream, model
from tests.waiting import eventually

from quire.client import Refused

FAST = "  restartPolicy: {backoffBase: 100ms}\n"


def decide(plane: Plane, name: str, verb: str, **body: Any) -> str:
    return str(plane.client.post(f"/v1/objects/model/{name}/{verb}", {"by": "ada", **body})["message"])


def wait_settled(plane: Plane, name: str, reason: str, revision: int) -> dict[str, Any]:
    """Until the condition RolledOut has that reason, and that revision alone serves."""

    def so() -> dict[str, Any] | None:
        view = plane.view(name)
        going = view["status"]["rollout"]
        there = going["settled"] and going["revision"] == revision
        return view if there and plane.condition(name, "RolledOut")["reason"] == reason else None

    return dict(eventually(so, f"{name} has settled at revision {revision}, {reason}"))


def states(view: dict[str, Any]) -> dict[int, str]:
    return {item["revision"]: item["state"] for item in view["revisions"]}


def pids(view: dict[str, Any]) -> list[int]:
    return [replica["pid"] for replica in view["replicas"]]


def reasons(plane: Plane, name: str) -> list[str]:
    return [event["reason"] for event in plane.client.get("/v1/events", **{"for": f"model/{name}"})["items"]]


@pytest.mark.parametrize(
    ("spec", "env", "said"),
    [
        pytest.param(FAST, {"EXIT": 78}, "ConfigRejected: ", id="an engine that refuses its configuration"),
        pytest.param(
            "  restartPolicy: {backoffBase: 100ms, maxRestartsBeforeRollback: 2}\n",
            {"EXIT": 1, "REASON": "none"},
            "CrashLoop: ",
            id="an engine that keeps ending",
            marks=pytest.mark.nightly,  # in CI: tests/e2e/test_changes_under_load.py
        ),
        pytest.param(
            "  rollout: {progressDeadline: 1s}\n",
            {"REPEAT": 1},
            "ProgressDeadlineExceeded: ",
            id="an engine that does not get on",
            marks=pytest.mark.nightly,  # in CI: tests/unit/operators/test_rollout.py, where a deadline is missed
        ),
    ],
)
def test_row_09_a_revision_that_fails_is_rolled_back_and_stays_so_until_the_intent_changes(
    plane: Plane, spec: str, env: dict[str, object], said: str
) -> None:
    name = "back"
    good = plane.apply(model(name))["model/back"]
    before = plane.wait_served(name)
    stream = Stream(plane.base_url, name, 300)
    bad = model(name, spec, **env)
    revision = plane.apply(bad)["model/back"]["revision"]
    view = wait_settled(plane, name, "RolledBack", good["revision"])
    assert pids(view) == pids(before), "the old replica served all the time"
    assert states(view) == {**states(view), revision: "RolledBack", good["revision"]: "Stable"}
    failed = next(item for item in view["revisions"] if item["revision"] == revision)
    assert failed["failure"].startswith(said)
    assert view["status"]["stableRevision"] == good["revision"]
    assert plane.condition(name, "Ready")["status"] == "True"
    assert plane.condition(name, "Stalled")["status"] == "False"
    assert said in plane.condition(name, "RolledOut")["message"]
    assert "platform rollout retry model/back" in " ".join(view["status"]["remedies"])
    assert "RolledBack" in reasons(plane, name)

    assert plane.apply(bad)["model/back"]["result"] == "unchanged"
    time.sleep(1.5)
    assert pids(wait_settled(plane, name, "RolledBack", good["revision"])) == pids(before), "I9: launched again"
    stream.join()
    assert stream.problem is None

    plan = plane.plan(bad + "  drainTimeout: 31s\n")
    assert any("given up" in note for note in plan["notes"])
    assert (plan["ends"], plan["replaces"]) == (["quarantine"], 1), "what failed would be tried again"
    assert "RollingUpdate" in plan["rollout"]
    plane.apply(model(name, ROUND=1))
    served = plane.wait_served(name)
    assert pids(served) != pids(before)
    assert plane.complete(name).status_code == 200
    plane.delete(name)


def test_a_stop_first_update_that_fails_brings_the_old_revision_back(plane: Plane) -> None:
    plane.apply(model("only", "  rollout: {strategy: Recreate}\n"))
    plane.wait_served("only")
    plane.apply(model("only", "  rollout: {strategy: Recreate}\n", EXIT=78))
    wait_settled(plane, "only", "RolledBack", 1)
    assert plane.complete("only").status_code == 200
    plane.delete("only")


def test_without_auto_rollback_and_without_a_revision_to_go_back_to_a_failure_stalls(plane: Plane) -> None:
    plane.apply(model("first", EXIT=78))
    assert plane.wait_stalled("first")["reason"] == "ConfigRejected"
    plane.apply(model("first"))
    plane.wait_served("first")
    plane.apply(model("first", "  rollout: {autoRollback: false}\n", EXIT=78))
    assert plane.wait_stalled("first")["reason"] == "ConfigRejected"
    assert plane.condition("first", "RolledOut")["reason"] == "Progressing"
    newest, before = plane.view("first")["revisions"][:2]
    assert newest["state"] == "Current"
    assert newest["failure"].startswith("ConfigRejected: first-r"), "nothing was rolled back, and it has failed"
    assert before["failure"] is None
    plane.delete("first")


def test_retry_tries_a_revision_that_was_given_up_and_a_replica_that_failed(plane: Plane) -> None:
    plane.apply(model("again"))
    plane.wait_served("again")
    plane.apply(model("again", EXIT=78))
    wait_settled(plane, "again", "RolledBack", 1)
    assert decide(plane, "again", "retry") == "revision 2 is rolled out once more"
    eventually(lambda: reasons(plane, "again").count("Started") > 1 or None, "it was started once more")
    wait_settled(plane, "again", "RolledBack", 1)
    plane.apply(model("again", "  rollout: {autoRollback: false}\n", EXIT=78))
    plane.wait_stalled("again")
    (failed,) = [item for item in plane.view("again")["replicas"] if item["state"] == "Failed"]
    assert decide(plane, "again", "retry") == "what failed is tried now; replicas that had: 1"
    eventually(
        lambda: {item["id"] for item in plane.view("again")["replicas"]} - {"again-r1-0", failed["id"]},
        "another one in the place of the failed replica",
    )
    plane.delete("again")


def test_row_16_undo_pins_an_earlier_revision_and_only_another_manifest_ends_that(plane: Plane) -> None:
    one, two = model("pin", ROUND=1), model("pin", ROUND=2)
    plane.apply(one)
    plane.wait_served("pin")
    with pytest.raises(Refused, match="no revision of model/pin before 1"):
        decide(plane, "pin", "undo")
    plane.apply(two)
    plane.wait_served("pin")
    stream = Stream(plane.base_url, "pin", 200)
    assert decide(plane, "pin", "undo", reason="slower than before") == (
        "pinned to revision 1 until the manifest changes, which it was not"
    )
    view = wait_settled(plane, "pin", "Pinned", 1)
    stream.join()
    assert stream.problem is None
    assert states(view) == {1: "Pinned", 2: "Current"}
    (override,) = view["status"]["overrides"]
    assert {name: override[name] for name in ("kind", "by", "reason", "revision")} == {
        "kind": "pin", "by": "ada", "reason": "slower than before", "revision": 1,
    }  # fmt: skip
    assert plane.apply(two)["model/pin"]["result"] == "unchanged"
    plane.kill()
    plane.start()
    pinned = pids(wait_settled(plane, "pin", "Pinned", 1))

    plane.client.post("/v1/objects/model/pin/scale", {"replicas": 2})
    view = wait_settled(plane, "pin", "Pinned", 1)
    assert len(view["replicas"]) == 2
    assert set(pinned) < set(pids(view))
    with pytest.raises(Refused, match="no revision 9 on record"):
        decide(plane, "pin", "undo", revision=9)
    assert any("ends the pin" in note for note in plane.plan(model("pin", ROUND=3))["notes"])
    plane.apply(model("pin", ROUND=3))
    view = plane.wait_served("pin")
    assert view["status"]["servedRevision"] == 3
    assert [each["kind"] for each in view["status"]["overrides"]] == ["scale"]
    plane.delete("pin")


def test_undo_to_what_the_manifest_says_ends_the_pin(plane: Plane) -> None:
    plane.apply(model("forth", ROUND=1))
    plane.wait_served("forth")
    plane.apply(model("forth", ROUND=2))
    plane.wait_served("forth")
    decide(plane, "forth", "undo", revision=1)
    wait_settled(plane, "forth", "Pinned", 1)
    decide(plane, "forth", "undo", revision=2)
    assert wait_settled(plane, "forth", "UpToDate", 2)["status"]["overrides"] == []
    plane.delete("forth")


def test_a_paused_rollout_waits_and_what_serves_is_kept_alive(plane: Plane) -> None:
    plane.apply(model("held", FAST, ROUND=1))
    old = plane.wait_served("held")
    decide(plane, "held", "rollout-pause", reason="a demo")
    plane.apply(model("held", FAST, ROUND=2))
    eventually(lambda: plane.condition("held", "RolledOut")["reason"] == "RolloutPaused", "it is held")
    assert "a demo" in plane.condition("held", "RolledOut")["message"]
    os.kill(pids(old)[0], signal.SIGKILL)
    eventually(lambda: plane.condition("held", "Ready")["status"] == "False", "it is gone")
    eventually(lambda: plane.condition("held", "Ready")["status"] == "True", "it is back")
    (replica,) = plane.view("held")["replicas"]
    assert (replica["revision"], replica["incarnation"]) == (1, 2)
    with pytest.raises(Refused, match="rollouts of model/held are paused by ada") as refused:
        decide(plane, "held", "undo", revision=1)
    assert refused.value.exit_code == 5
    assert "none before its rollouts are resumed" in plane.plan(model("held", FAST, ROUND=3))["rollout"]
    decide(plane, "held", "pause")
    eventually(lambda: plane.view("held")["replicas"] == [], "a pause is a pause, held or not")
    decide(plane, "held", "resume")
    eventually(lambda: plane.condition("held", "Ready")["status"] == "True", "it serves again")
    assert plane.view("held")["replicas"][0]["revision"] == 1, "what served when the rollouts were paused"
    assert decide(plane, "held", "rollout-resume") == "rollouts go on"
    assert plane.wait_served("held")["status"]["servedRevision"] == 2
    plane.delete("held")


def test_a_restart_replaces_every_replica_under_load(plane: Plane) -> None:
    plane.apply(model("fresh", "  replicas: 2\n"))
    before = plane.wait_served("fresh")
    streams = [Stream(plane.base_url, "fresh", 200) for _ in range(4)]
    decide(plane, "fresh", "restart")

    def replaced() -> bool:
        view = plane.view("fresh")
        return bool(view["status"]["rollout"]["settled"]) and not set(pids(view)) & set(pids(before))

    eventually(replaced, "every replica is another process")
    for stream in streams:
        stream.join()
        assert stream.problem is None
    view = plane.wait_served("fresh")
    assert view["status"]["servedRevision"] == 1, "no new revision"
    time.sleep(0.5)
    assert pids(plane.view("fresh")) == pids(view), "once is once"
    plane.delete("fresh")


def test_a_scale_outlasts_the_same_manifest_and_ends_with_another_number_in_it(plane: Plane) -> None:
    text = model("many", "  replicas: 1\n")
    plane.apply(text)
    plane.wait_served("many")
    assert decide(plane, "many", "scale", replicas=3) == "3 replicas, where the manifest says 1"
    assert len(wait_settled(plane, "many", "UpToDate", 1)["replicas"]) == 3
    assert plane.apply(text)["model/many"]["result"] == "unchanged"
    plane.apply(text + "  drainTimeout: 7s\n")
    assert len(plane.wait_served("many")["replicas"]) == 3, "another field is no other number"
    plan = plane.plan(text + "  drainTimeout: 8s\n")
    assert any("stays scaled to 3" in note for note in plan["notes"])
    assert plan["rollout"] == "no replica restarts"
    plane.apply(text.replace("replicas: 1", "replicas: 2") + "  drainTimeout: 7s\n")
    assert len(plane.wait_served("many")["replicas"]) == 2
    decide(plane, "many", "scale", replicas=0)
    plane.wait_stopped("many")
    assert decide(plane, "many", "scale") == "as many replicas as the manifest says: 2"
    assert len(plane.wait_served("many")["replicas"]) == 2
    with pytest.raises(Refused, match="replicas do not fit on this machine"):
        decide(plane, "many", "scale", replicas=1000)
    with pytest.raises(Refused, match="whole number"):
        decide(plane, "many", "scale", replicas="3")
    plane.delete("many")


def test_a_paused_model_stops_refuses_requests_and_comes_back_when_its_time_is_over(plane: Plane) -> None:
    text = model("rest")
    plane.apply(text)
    plane.wait_served("rest")
    assert decide(plane, "rest", "pause", reason="training") == "it stops until it is resumed"
    eventually(lambda: plane.view("rest")["replicas"] == [], "nothing of it runs")
    ready = plane.condition("rest", "Ready")
    assert (ready["status"], ready["reason"], ready["message"]) == ("False", "Paused", "paused by ada: training")
    assert plane.view("rest")["status"]["summary"] == "Paused"
    refused = plane.complete("rest")
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == "The model 'rest' is paused."
    assert plane.apply(text)["model/rest"]["result"] == "unchanged"
    assert plane.view("rest")["replicas"] == []
    assert decide(plane, "rest", "resume") == "it starts again"
    plane.wait_served("rest")
    decide(plane, "rest", "pause", seconds=1.5)
    eventually(lambda: plane.view("rest")["replicas"] == [], "nothing of it runs")
    plane.kill()
    plane.start()
    plane.wait_served("rest")
    plane.delete("rest")


def test_decisions_are_for_models_that_exist_and_by_verbs_that_there_are(plane: Plane) -> None:
    for path, status in (
        ("/v1/objects/model/nobody/undo", 404),
        ("/v1/objects/gateway/default/restart", 404),
        ("/v1/objects/model/nobody/dance", 404),
    ):
        with pytest.raises(Refused) as refused:
            plane.client.post(path, {})
        assert refused.value.status == status
    plane.apply(model("odd", "  replicas: 0\n"))
    for verb, body, text in (
        ("restart", {}, "has no replicas to restart"),
        ("pause", {"seconds": -1}, "seconds is a number above 0"),
        ("pause", {"reason": "x" * 501}, "reason is a text of at most 500 characters"),
    ):
        with pytest.raises(Refused, match=text):
            decide(plane, "odd", verb, **body)
    plane.delete("odd")


def test_a_revision_keeps_its_chat_template_whatever_the_file_holds_later(plane: Plane, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}")
    manifest = model("spoken", f"  tokenizer: {{chatTemplateFile: {file}}}\n")
    alias = (
        "apiVersion: quire.dev/v1alpha1\nkind: Route\nmetadata: {name: alias}\n"
        "spec: {match: {modelNames: [alias]}, backends: [{model: spoken, weight: 1}]}\n"
    )

    def asked(name: str) -> int:
        body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        answer = httpx.post(f"{plane.base_url}/chat/completions", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    plane.apply(manifest)
    plane.wait_served("spoken")
    short = asked("spoken")
    file.write_text("Answer like a king: {{ messages[0].content }}")
    plane.apply(alias)  # the router hears of something else
    eventually(lambda: "alias" in httpx.get(f"{plane.base_url}/models").text, "the router has it")
    assert asked("alias") == short

    assert plane.apply(manifest)["model/spoken"]["result"] == "updated"
    plane.wait_served("spoken")
    assert asked("spoken") > short
    file.unlink()
    decide(plane, "spoken", "undo", revision=1)
    wait_settled(plane, "spoken", "Pinned", 1)
    assert asked("spoken") == short
    plane.client.delete("/v1/objects/route/alias")
    plane.delete("spoken")
