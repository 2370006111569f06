"""Routes by a real control plane: applied, refused, reported, changed while they serve, and deleted."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.integration.plane import Plane, model
from tests.waiting import eventually

from quire.client import InvalidManifest, Refused


def route(name: str, spec: str, names: str = "[chat]") -> str:
    return (
        f"apiVersion: quire.dev/v1alpha1\nkind: Route\nmetadata: {{name: {name}}}\n"
        f"spec:\n  match: {{modelNames: {names}}}\n{spec}"
    )


def to(*models: str) -> str:
    return "  backends:\n" + "".join(f"    - {{model: {each}, weight: 1}}\n" for each in models)


def view(plane: Plane, name: str) -> dict[str, Any]:
    return dict(plane.client.get(f"/v1/objects/route/{name}"))


def conditions(plane: Plane, name: str) -> dict[str, tuple[str, str]]:
    told = view(plane, name)
    current = told["status"].get("observedGeneration") == told["generation"]
    return {c["type"]: (c["status"], c["reason"]) for c in told["status"]["conditions"]} if current else {}


def wait(plane: Plane, name: str, **wanted: tuple[str, str]) -> None:
    eventually(lambda: wanted.items() <= conditions(plane, name).items(), f"{name}: {wanted}")


def ask(plane: Plane, name: str, **headers: str) -> httpx.Response:
    body = {"model": name, "prompt": "hi", "max_tokens": 2}
    return httpx.post(f"{plane.base_url}/completions", json=body, headers=headers, timeout=30)


def delete(plane: Plane, name: str) -> None:
    plane.client.delete(f"/v1/objects/route/{name}")

    def gone() -> bool:
        try:
            view(plane, name)
        except Refused as error:
            return error.status == 404
        return False

    eventually(gone, f"{name} is gone")


SERVING = {"Ready": ("True", "Serving"), "RolledOut": ("True", "UpToDate"), "Accepted": ("True", "Valid")}


def test_a_route_leads_to_its_models_and_ends_with_its_deletion(plane: Plane) -> None:
    plane.apply(model("one"), model("two"), route("chat", to("one", "two")))
    wait(plane, "chat", **SERVING, BackendsFound=("True", "Valid"), Stalled=("False", "Progressing"))
    told = view(plane, "chat")
    assert told["status"]["endpoints"]["modelNames"] == ["chat"]
    assert told["status"]["summary"] == "Serving"
    plane.wait_served("one")
    plane.wait_served("two")
    found = [ask(plane, "chat").headers["x-quire-model"] for _ in range(4)]
    assert sorted(found) == ["one", "one", "two", "two"]

    item = plane.plan(route("chat", to("two"), "[chat, gpt-4o]"))
    assert item["action"] == "update"
    assert {change["path"]: change["update"] for change in item["changes"]} == {
        "spec.match.modelNames": "hot",
        "spec.backends": "hot",
    }
    plane.apply(route("chat", to("two"), "[chat, gpt-4o]"))
    wait(plane, "chat", **SERVING)
    assert ask(plane, "gpt-4o").headers["x-quire-model"] == "two"

    delete(plane, "chat")
    refused = ask(plane, "chat")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert ask(plane, "two").status_code == 200
    events = plane.client.get("/v1/events", **{"for": "route/chat"})["items"]
    assert [event["reason"] for event in events][-1] == "Deleted"


def test_a_name_has_one_owner(plane: Plane) -> None:
    plane.apply(model("one"), model("two"), route("mine", to("one"), "[shared]"))
    with pytest.raises(InvalidManifest) as refused:
        plane.apply(route("yours", to("one"), "[other, shared]"))
    (problem,) = refused.value.problems
    assert problem["path"] == "spec.match.modelNames[1]"
    assert problem["message"] == "the model name 'shared' is already served by route/mine"
    assert plane.plan(route("yours", to("one"), "[one]"))["problem"]["reason"] == "NameConflict"
    assert plane.plan(model("shared"))["problem"]["message"].endswith("already served by route/mine")
    with pytest.raises(InvalidManifest) as refused:
        plane.apply(route("a", to("one"), "[new]"), route("b", to("one"), "[new]"))
    assert "is declared twice" in refused.value.problems[0]["message"]

    header = "  match: {modelNames: [one], headers: [{name: X-Tenant, exact: beta}]}\n"
    spec = route("beta", to("two")).replace("  match: {modelNames: [chat]}\n", header)
    plane.apply(spec)
    wait(plane, "beta", **SERVING)
    plane.wait_served("two")
    plane.wait_served("one")
    assert ask(plane, "one").headers["x-quire-model"] == "one"
    assert ask(plane, "one", **{"x-tenant": "beta"}).headers["x-quire-model"] == "two"
    with pytest.raises(InvalidManifest) as refused:
        plane.apply(spec.replace("name: beta", "name: again"))
    assert refused.value.problems[0]["message"].endswith("served by route/beta with the same headers")
    delete(plane, "beta")
    delete(plane, "mine")


def test_a_model_that_is_not_there_is_told_and_its_share_goes_to_the_others(plane: Plane) -> None:
    lone = route("late", to("one", "later"), "[late]")
    plane.apply(model("one"))
    assert plane.plan(lone)["warnings"] == ["spec.backends[1].model: there is no model/later yet"]
    assert plane.apply(lone)["route/late"]["warnings"] == plane.plan(lone)["warnings"]
    wait(plane, "late", **SERVING, BackendsFound=("False", "BackendNotFound"), Stalled=("False", "Progressing"))
    assert view(plane, "late")["status"]["summary"] == "Serving, and a model is missing"
    plane.wait_served("one")
    assert {ask(plane, "late").headers["x-quire-model"] for _ in range(4)} == {"one"}
    plane.apply(model("later"))
    wait(plane, "late", **SERVING, BackendsFound=("True", "Valid"))
    plane.wait_served("later")
    assert {ask(plane, "late").headers["x-quire-model"] for _ in range(4)} == {"one", "later"}

    plane.delete("later")
    wait(plane, "late", BackendsFound=("False", "BackendNotFound"))
    plane.delete("one")
    wait(plane, "late", Ready=("False", "BackendNotFound"), Stalled=("True", "BackendNotFound"))
    told = view(plane, "late")["status"]
    assert "there is no model/one, model/later" in [c["message"] for c in told["conditions"]]
    assert any("apply a Model of that name" in line for line in told["remedies"])
    refused = ask(plane, "late")
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "No model is behind 'late' now.")
    delete(plane, "late")


def test_no_weight_and_stopped_models_are_told_apart_and_a_stand_in_makes_it_serve(plane: Plane) -> None:
    off = "  backends: [{model: one, weight: 0}]\n"
    plane.apply(model("one"), route("off", off, "[off]"))
    wait(plane, "off", Ready=("False", "NoWeight"), Stalled=("False", "Progressing"))
    assert ask(plane, "off").status_code == 503
    plane.apply(model("idle", "  replicas: 0\n"), route("off", to("idle"), "[off]"))
    wait(plane, "off", Ready=("False", "Stopped"))
    stand_in = "  fallbacks: [{model: one, when: [Unavailable]}]\n"
    plane.apply(route("off", to("idle") + stand_in, "[off]"))
    wait(plane, "off", **SERVING)
    plane.wait_served("one")
    assert ask(plane, "off").headers["x-quire-model"] == "one"
    delete(plane, "off")


@pytest.mark.nightly
def test_routes_outlive_the_control_plane(plane: Plane) -> None:
    plane.apply(model("one"), route("kept", to("one"), "[kept]"))
    wait(plane, "kept", **SERVING)
    plane.wait_served("one")
    url = plane.base_url
    plane.kill()
    body = {"model": "kept", "prompt": "hi", "max_tokens": 2}
    assert httpx.post(f"{url}/completions", json=body, timeout=30).headers["x-quire-model"] == "one"
    plane.start()
    wait(plane, "kept", **SERVING)
    assert ask(plane, "kept").status_code == 200
