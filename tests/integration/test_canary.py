"""Canaries of a real control plane and router, with the stand-in for engines, under clients that stream all along
and know what the answer is.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.figures import record
from tests.integration.forked import ForkedPlane
from tests.integration.plane import GATEWAY, Plane, model
from tests.integration.test_rollouts import decide, pids, reasons, states, wait_settled
from tests.waiting import eventually

from quire.client import Refused

STEPS = "[{weight: 25, hold: 300ms}, {weight: 60}]"


def canary(name: str, steps: str = STEPS, least: int = 10, **env: Any) -> str:
    ways = f"strategy: Canary, canary: {{steps: {steps}, analysis: {{minRequests: {least}}}}}"
    return model(name, f"  rollout: {{{ways}}}\n", **env)


class Oracles:
    """Clients that ask one thing after the other and know each answer, until the block ends: none may fail, and no
    answer may be another."""

    def __init__(self, base_url: str, name: str, clients: int) -> None:
        self.url, self.name = f"{base_url}/completions", name
        self.asked, self.problems = 0, list[str]()
        self._told: dict[int, str] = {}
        self._over = threading.Event()
        with httpx.Client(timeout=30) as client:
            for tokens in (3, 5, 8):
                self._told[tokens] = self._ask(client, tokens)
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Oracles:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        assert not self.problems, self.problems[:5]

    def _ask(self, client: httpx.Client, tokens: int) -> str:
        body = {"model": self.name, "prompt": "hi", "max_tokens": tokens, "stream": True}
        text, last = "", ""
        with client.stream("POST", self.url, json=body) as answer:
            for line in answer.iter_lines():
                last = line or last
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    text += event["choices"][0]["text"] if "choices" in event else f"<{line}>"
            if answer.status_code != 200 or last != "data: [DONE]":
                text += f"<{answer.status_code} {last}>"
            if answer.headers.get("x-quire-model") != self.name:
                text += "<another model>"
        return text

    def _run(self, number: int) -> None:
        with httpx.Client(timeout=30) as client:
            for tokens in itertools.islice(itertools.cycle(self._told), number, 1_000_000):
                if self._over.is_set():
                    return
                try:
                    told = self._ask(client, tokens)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is no answer
                    told = repr(error)
                self.asked += 1
                if told != self._told[tokens]:
                    self.problems.append(told)


def going(plane: Plane, name: str) -> dict[str, Any]:
    return dict(plane.view(name)["status"]["rollout"].get("canary") or {})


def failure(plane: Plane, name: str, revision: int) -> str:
    return str(next(item["failure"] for item in plane.view(name)["revisions"] if item["revision"] == revision))


def given_up(plane: Plane, name: str, revision: int) -> str:
    """Why a revision was given up, once it is."""
    eventually(lambda: states(plane.view(name)).get(revision) == "RolledBack", f"{revision} is given up")
    return failure(plane, name, revision)


def test_a_canary_that_does_as_well_takes_over_and_one_that_fails_is_given_up(plane: Plane) -> None:
    name = "steps"
    plane.apply(canary(name))
    first = plane.wait_served(name)
    assert "CanaryStep" not in reasons(plane, name), "nothing is stable yet: an ordinary first rollout"
    with Oracles(plane.base_url, name, 4) as oracles:
        second = plane.apply(canary(name, ROUND=2))["model/steps"]["revision"]
        served = plane.wait_served(name)
        assert states(served)[second] == "Current"
        assert not set(pids(served)) & set(pids(first))
        told = reasons(plane, name)
        assert told.count("CanaryStep") == 2
        assert "CanaryPromoted" in told

        third = plane.apply(canary(name, FAIL=2))["model/steps"]["revision"]
        back = wait_settled(plane, name, "RolledBack", second)
        assert pids(back) == pids(served), "the stable replica served all the time"
        assert states(back)[third] == "RolledBack"
        assert failure(plane, name, third).startswith("CanaryFailed: errors ")
    assert oracles.asked > 50
    plane.delete(name)


@pytest.mark.nightly
def test_a_canary_stands_where_it_stood_after_a_restart_and_goes_on_or_away_as_a_person_says(plane: Plane) -> None:
    name, steps = "stands", "[{weight: 20}, {weight: 60, hold: 1h}]"
    plane.apply(canary(name, steps, 5))
    first = plane.wait_served(name)
    for verb in ("promote", "abort"):
        with pytest.raises(Refused, match="has no canary now"):
            decide(plane, name, verb)
    with Oracles(plane.base_url, name, 2):
        second = plane.apply(canary(name, steps, 5, ROUND=2))["model/stands"]["revision"]
        eventually(lambda: going(plane, name).get("step") == 2, "the canary has come to its last step")
        canary_pid = (set(pids(plane.view(name))) - set(pids(first))).pop()
        decide(plane, name, "rollout-pause")
        plane.kill()
        plane.start()
        eventually(lambda: going(plane, name).get("gates"), "the canary is followed again")
        assert going(plane, name)["step"] == 2
        assert set(pids(plane.view(name))) == {*pids(first), canary_pid}
        with pytest.raises(Refused, match="paused"):
            decide(plane, name, "promote")
        decide(plane, name, "rollout-resume")
        for which in ({}, {"revision": second}):
            with pytest.raises(Refused, match="is a canary"):
                decide(plane, name, "undo", **which)
        decide(plane, name, "promote", reason="it looks well")
        assert pids(plane.wait_served(name)) == [canary_pid]

        third = plane.apply(canary(name, "[{weight: 20, hold: 1h}]", 5, ROUND=3))["model/stands"]["revision"]
        eventually(lambda: going(plane, name).get("step") == 1, "another canary has begun")
        assert plane.condition(name, "RolledOut")["reason"] == "CanaryProgressing"
        assert plane.condition(name, "Ready")["status"] == "True"
        eventually(lambda: going(plane, name).get("gates"), "it was compared")
        told = subprocess.run(
            [Path(sys.executable).parent / "platform", "rollout", "status", "--no-watch", f"model/{name}"],
            env={**os.environ, "QUIRE_STATE_DIR": str(plane.state.root)},
            capture_output=True,
            text=True,
        ).stdout
        assert re.search(r"^  GATE +STABLE +CANARY +LIMIT +STATE$", told, re.MULTILINE), told
        assert re.search(r"^  first token p95 +\d+ ms +(\d+ ms|-) +\+20% +\w+$", told, re.MULTILINE), told
        decide(plane, name, "abort", reason="second thoughts")
        back = wait_settled(plane, name, "RolledBack", second)
        assert pids(back) == [canary_pid]
        assert states(back)[third] == "RolledBack"
        assert failure(plane, name, third) == "aborted by ada: second thoughts"
    plane.delete(name)


@pytest.mark.nightly
def test_the_share_and_the_counts_are_those_of_all_processes_of_a_router(tmp_path: Path) -> None:
    plane, name = ForkedPlane(tmp_path), "several"
    plane.start()
    try:
        plane.apply(GATEWAY.replace("port: 0", "port: 0, workers: 3"))
        plane.apply(canary(name))
        plane.wait_served(name)

        def serving() -> bool:
            gateway = plane.client.get("/v1/objects/gateway/default")
            return bool(gateway["status"]["workers"]["serving"] == 3)

        eventually(serving, "all processes of the router take requests")
        with Oracles(plane.base_url, name, 6) as oracles:
            second = plane.apply(canary(name, ROUND=2))["model/several"]["revision"]
            plane.wait_served(name)
            plane.apply(canary(name, FIRST=0.3))
            wait_settled(plane, name, "RolledBack", second)
        assert oracles.asked > 50
    finally:
        plane.end()


@pytest.mark.nightly
def test_a_canary_that_nobody_asks_is_not_judged_and_says_so(plane: Plane) -> None:
    name, quiet = "quiet", "  rollout: {progressDeadline: 4s, strategy: Canary, canary: {steps: [{weight: 50}]}}\n"
    plane.apply(model(name, quiet))
    plane.wait_served(name)
    plane.apply(model(name, quiet, ROUND=2))
    assert plane.wait_stalled(name)["reason"] == "AnalysisInconclusive"
    assert plane.condition(name, "Ready")["status"] == "True"
    assert plane.complete(name).status_code == 200
    decide(plane, name, "promote")
    plane.wait_served(name)
    assert plane.condition(name, "Stalled")["status"] == "False"
    plane.delete(name)


@pytest.mark.nightly
def test_five_canaries_take_over_and_five_are_given_up_under_eight_clients(plane: Plane) -> None:
    name = "nightly"
    plane.apply(canary(name))
    plane.wait_served(name)
    worse: list[dict[str, Any]] = [{"FIRST": 0.3}, {"FAIL": 3}, {"STEP": 0.1}, {"FIRST": 0.1}, {"EXIT": 78}]
    with Oracles(plane.base_url, name, 8) as oracles:
        for number, env in enumerate(worse):
            plane.apply(canary(name, SAY=f"better {number}"))
            stable = plane.wait_served(name)["status"]["servedRevision"]
            plane.apply(canary(name, SAY=f"worse {number}", **env))
            wait_settled(plane, name, "RolledBack", stable)
    told = reasons(plane, name)
    assert (told.count("CanaryPromoted"), told.count("RolledBack"), told.count("CanaryFailed")) == (5, 5, 4)
    assert oracles.asked > 1000
    record({"system": "five canaries promoted, five given up", "asked": oracles.asked, "failed": 0, "altered": 0})
    plane.delete(name)


def examined(name: str, analysis: str, **env: Any) -> str:
    steps = "steps: [{weight: 50, hold: 200ms}]"
    ways = f"strategy: Canary, canary: {{{steps}, analysis: {{minRequests: 1, {analysis}}}}}"
    return model(name, f"  rollout: {{progressDeadline: 4s, {ways}}}\n", **env)


def smoke(expected: str) -> str:
    """The stand-in answers `bcde`, whatever it is asked."""
    return f"smokePrompts: [{{prompt: Say it, expectContains: {expected}, maxTokens: 4}}]"


def test_a_canary_that_answers_a_smoke_prompt_otherwise_never_has_a_request(plane: Plane) -> None:
    name = "smoked"
    plane.apply(examined(name, smoke("bcde")))
    first = plane.wait_served(name)["status"]["servedRevision"]
    with Oracles(plane.base_url, name, 2):
        failed = plane.apply(examined(name, smoke("bcdf"), ROUND=2))["model/smoked"]["revision"]
        wait_settled(plane, name, "RolledBack", first)
        assert failure(plane, name, failed) == "SmokePromptFailed: 'Say it' was answered 'bcde', without 'bcdf'"
        assert "CanaryStep" not in reasons(plane, name)
        plane.apply(examined(name, smoke("bcde"), ROUND=3))
        plane.wait_served(name)
        told = reasons(plane, name)
        assert told.count("CanaryExamined") == told.count("CanaryPromoted") == 1
        dull = plane.apply(examined(name, "maxDrift: 100%", ROUND=4))["model/smoked"]["revision"]
        assert "did not tell how likely the tokens are" in given_up(plane, name, dull)
    plane.delete(name)


def test_a_person_may_have_a_canary_take_over_that_has_not_passed_or_has_failed_and_is_kept(plane: Plane) -> None:
    name = "kept"

    def kept(analysis: str, **env: Any) -> str:
        return examined(name, analysis, **env).replace("rollout: {", "rollout: {autoRollback: false, ")

    plane.apply(kept(smoke("bcde")))
    first = plane.wait_served(name)["status"]["servedRevision"]
    with Oracles(plane.base_url, name, 2) as oracles:
        second = plane.apply(kept(smoke("bcdf"), ROUND=2))["model/kept"]["revision"]
        assert plane.wait_stalled(name)["reason"] == "CanaryFailed"
        failed = "SmokePromptFailed: 'Say it' was answered 'bcde', without 'bcdf'"
        assert going(plane, name)["failure"] == failed
        assert failed in plane.condition(name, "RolledOut")["message"]
        assert plane.condition(name, "RolledOut")["reason"] == "CanaryFailed"
        view = plane.view(name)
        assert states(view)[second] == "Canary", "it is there to be looked at"
        assert len(pids(view)) == 2
        before = oracles.asked
        eventually(lambda: oracles.asked > before + 20, "requests go on")
        assert going(plane, name)["total"]["new"] == 0, "none of them is its"
        assert plane.condition(name, "Ready")["status"] == "True"
        with pytest.raises(Refused, match="has failed as a canary, and is kept"):
            decide(plane, name, "retry")
        with pytest.raises(Refused, match="has not passed its exam"):
            decide(plane, name, "promote")
        said = decide(plane, name, "promote", skipExam=True)
        assert said == f"revision {second} takes over, before its steps are done, although it failed: {failed}"
        assert states(plane.wait_served(name))[first] != "Current"

    third = plane.apply(kept(smoke("bcdf"), ROUND=3))["model/kept"]["revision"]
    plane.wait_stalled(name)
    plane.apply(kept(smoke("bcdf"), ROUND=3).replace("autoRollback: false", "autoRollback: true"))
    assert given_up(plane, name, third) == failed, "the field is hot: now it is given up"

    down = plane.apply(kept(smoke("bcde"), ROUND=4, EXIT=78))["model/kept"]["revision"]
    stalled = plane.wait_stalled(name)
    assert stalled["reason"] == plane.condition(name, "RolledOut")["reason"] == "CanaryDown"
    assert plane.condition(name, "RolledOut")["message"] == stalled["message"]
    why = failure(plane, name, down)
    assert why.startswith("ConfigRejected: kept-")
    assert why in stalled["message"]
    remedies = plane.view(name)["status"]["remedies"]
    assert [line.split("   ")[0] for line in remedies if line.startswith("platform")] == [
        f"platform {what} model/kept" for what in ("logs", "rollout retry", "rollout abort")
    ]
    with pytest.raises(Refused, match="does not serve yet"):
        decide(plane, name, "promote", skipExam=True)

    decide(plane, name, "abort", reason="seen")
    assert given_up(plane, name, down) == f"aborted by ada: seen; it had failed: {why}"

    late = plane.apply(kept(smoke("bcde"), ROUND=5, LOAD=0.5, STEP=3600))["model/kept"]["revision"]
    with pytest.raises(Refused, match="does not serve yet"):
        decide(plane, name, "promote", skipExam=True)
    eventually(lambda: going(plane, name).get("exam"), "it is examined")
    with pytest.raises(Refused, match="has not passed its exam"):
        decide(plane, name, "promote")
    with pytest.raises(Refused, match="skipExam is true or false"):
        decide(plane, name, "promote", skipExam="yes")
    said = decide(plane, name, "promote", skipExam=True)
    assert said == f"revision {late} takes over, before its steps are done, and without having passed its exam"
    assert states(plane.wait_served(name))[late] == "Current"
    plane.delete(name)


@pytest.mark.nightly
def test_a_canary_that_does_worse_and_is_kept_has_no_requests(plane: Plane) -> None:
    name = "worse"

    def kept(**env: Any) -> str:
        return canary(name, **env).replace("rollout: {", "rollout: {autoRollback: false, ")

    plane.apply(kept())
    first = plane.wait_served(name)["status"]["servedRevision"]
    with Oracles(plane.base_url, name, 4) as oracles:
        plane.apply(kept(ROUND=2, FAIL=2))
        assert plane.wait_stalled(name)["reason"] == "CanaryFailed"
        assert going(plane, name)["failure"].startswith("CanaryFailed: errors ")
        before = oracles.asked
        had = going(plane, name)["total"]["new"]
        eventually(lambda: oracles.asked > before + 200, "requests go on")
        assert going(plane, name)["total"]["new"] - had <= 4, "those that were under way"
        decide(plane, name, "abort")
        wait_settled(plane, name, "RolledBack", first)
        decide(plane, name, "retry")
        eventually(lambda: going(plane, name).get("step") == 1, "it is tried from the beginning")
        eventually(lambda: going(plane, name).get("failure"), "and fails again")

    broken = plane.apply(kept(ROUND=3, EXIT=78))["model/worse"]["revision"]
    assert "ConfigRejected" in plane.wait_stalled(name)["message"], "an engine that cannot start is a failure, too"
    assert plane.complete(name).status_code == 200
    plane.apply(canary(name, ROUND=3, EXIT=78))
    assert given_up(plane, name, broken).startswith("ConfigRejected"), "the field is hot"
    plane.delete(name)


@pytest.mark.nightly
def test_a_canary_whose_exam_cannot_be_held_waits_without_requests_and_says_so(plane: Plane) -> None:
    name = "unasked"
    plane.apply(examined(name, smoke("bcde")))
    plane.wait_served(name)
    plane.apply(examined(name, smoke("bcde"), ROUND=2, STEP=3600))  # it answers, some day
    said = plane.wait_stalled(name)
    assert said["reason"] == "AnalysisInconclusive"
    assert "asked 0 of 1 questions before it has any request" in said["message"]
    assert going(plane, name)["exam"]["state"] == "Waits"
    assert going(plane, name)["step"] == 0
    with pytest.raises(Refused, match="has not passed its exam"):
        decide(plane, name, "promote")
    assert plane.complete(name).status_code == 200
    plane.apply(examined(name, "", ROUND=2, STEP=3600))  # hot: without them it begins
    eventually(lambda: going(plane, name).get("step") == 1, "it begins")
    plane.delete(name)
