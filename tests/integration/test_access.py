"""Access policies through the control plane: secrets, rotation, doors that open only for keys."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.integration.forked import ForkedPlane
from tests.integration.plane import GATEWAY, Plane, model
from tests.integration.test_console import platform
from tests.waiting import eventually

from quire.client import InvalidManifest, Refused
from quire_schemas.keys import Digest, new_key

HEAD = "apiVersion: quire.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: %s}\nspec: %s\n"
CANARY = new_key()


def policy(name: str, *keys: str, more: str = "") -> str:
    return HEAD % (name, f"{{keys: [{', '.join(keys)}]{more}}}")


def hashed(name: str, key: str) -> str:
    return f"{{name: {name}, hash: '{Digest.of(key)}'}}"


def view(plane: Plane, name: str) -> dict[str, Any]:
    return dict(plane.client.get(f"/v1/objects/accesspolicy/{name}"))


def condition(view: dict[str, Any], type_: str) -> dict[str, Any]:
    conditions = view["status"].get("conditions", [])
    return next((c for c in conditions if c["type"] == type_), {"status": "Unknown", "reason": ""})


def ready(plane: Plane, name: str, reason: str = "Enforced") -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found = view(plane, name)
        current = found["status"].get("observedGeneration") == found["generation"]
        return found if current and condition(found, "Ready")["reason"] == reason else None

    return dict(eventually(look, f"{name} is {reason}"))


def delete(plane: Plane, kind: str, name: str) -> None:
    plane.client.delete(f"/v1/objects/{kind}/{name}")

    def gone() -> bool:
        return name not in {each["name"] for each in plane.client.get("/v1/objects", kind=kind)["items"]}

    eventually(gone, f"{kind}/{name} is gone")


def opens(plane: Plane, key: str | None = None, base: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{base or plane.base_url}/models", headers=headers, timeout=10).status_code


def opens_soon(plane: Plane, key: str | None, status: int) -> None:
    eventually(lambda: opens(plane, key) == status, f"{status} for a key")


def test_a_policy_closes_the_door_and_its_end_opens_it(plane: Plane) -> None:
    ours = new_key()
    plane.apply(model("open"))
    plane.wait_served("open")
    assert opens(plane) == 200
    plane.apply(policy("team", hashed("ci", ours), more=", allow: {models: [open]}"))
    found = ready(plane, "team")
    assert (opens(plane), opens(plane, ours), opens(plane, new_key())) == (401, 200, 401)
    (shown,) = found["status"]["keys"]
    assert shown == {"name": "ci", "id": Digest.of(ours).id, "source": "hash", "works": True, "problem": ""}
    changed = policy("team", hashed("ci", ours), more=", allow: {models: [other]}")
    report = plane.client.post("/v1/diff", {"files": [{"name": "p.yaml", "text": changed}]})
    (change,) = report["items"][0]["changes"]
    assert (change["path"], change["update"]) == ("spec.allow.models", "hot")
    body = {"model": "open", "prompt": "hi", "max_tokens": 2}
    headers = {"Authorization": f"Bearer {ours}"}
    assert httpx.post(f"{plane.base_url}/completions", json=body, headers=headers, timeout=30).status_code == 200
    told = plane.client.get("/v1/usage", since="2000-01-01", by="policy,key,model")["items"]
    assert [(each["policy"], each["key"], each["requests"], each["completionTokens"]) for each in told] == [
        ("team", "ci", 1, 2)
    ]
    with pytest.raises(Refused):
        plane.client.get("/v1/usage", since="yesterday", by="")
    plane.apply(changed)
    eventually(
        lambda: httpx.post(f"{plane.base_url}/completions", json=body, headers=headers).status_code == 403,
        "another scope",
    )
    printed = platform(plane, "delete", "accesspolicy/team")
    assert "warning: it was the last AccessPolicy: without one the API needs no key" in printed.stderr
    assert "NoAccessPolicy" in {each["reason"] for each in plane.client.get("/v1/events")["items"]}
    assert opens(plane) == 200
    assert plane.apply(policy("team", hashed("ci", ours)))["accesspolicy/team"]["result"] == "created"
    delete(plane, "accesspolicy", "team")
    plane.delete("open")


def test_keys_come_from_secrets_files_and_variables_and_never_go_anywhere(plane: Plane, tmp_path: Path) -> None:
    file = tmp_path / "key"
    wanted = policy(
        "brought",
        "{name: kept, valueFrom: {secretRef: brought}}",
        f"{{name: filed, valueFrom: {{file: {file}}}}}",
        "{name: named, valueFrom: {env: NO_SUCH_VARIABLE}}",
    )
    planned = plane.plan(wanted)
    assert len(planned["warnings"]) == 3
    plane.apply(wanted)
    found = ready(plane, "brought", "NoKeys")
    assert condition(found, "Stalled")["status"] == "True"
    assert condition(found, "KeysUsable")["reason"] == "SecretNotFound"
    assert "kept: there is no secret brought" in condition(found, "KeysUsable")["message"]
    eventually(
        lambda: condition(view(plane, "brought"), "RolledOut")["status"] == "True", "the router has taken it"
    )
    assert opens(plane) == 401, "a policy without a key that works closes the door all the same"
    for value, said in (("two\nlines", "one line"), ("schlüssel", "ASCII")):
        with pytest.raises(Refused, match=said) as refused:
            plane.client.post("/v1/secrets/brought", {"value": value})
        assert refused.value.hint
    plane.client.post("/v1/secrets/brought", {"value": CANARY})
    opens_soon(plane, CANARY, 200)
    file.write_text("a-string-of-the-users-own\n")
    opens_soon(plane, "a-string-of-the-users-own", 200)
    found = ready(plane, "brought")
    assert [key["works"] for key in found["status"]["keys"]] == [True, True, False]
    file.write_text("short")
    opens_soon(plane, "a-string-of-the-users-own", 401)
    eventually(
        lambda: view(plane, "brought")["status"]["keys"][1]["problem"].startswith("its value is below"), "why"
    )
    listed = plane.client.get("/v1/secrets")["items"]
    assert [each["usedBy"] for each in listed if each["name"] == "brought"] == [["accesspolicy/brought"]]
    told = str([view(plane, "brought"), plane.client.get("/v1/events"), plane.client.get("/v1/objects")])
    assert CANARY not in told
    kept = [path for path in plane.state.root.rglob("*") if path.is_file() and path.parent.name != "secrets"]
    kept += [path for path in plane.state.runtime.rglob("*") if path.is_file()]
    assert len(kept) > 4
    for path in kept:
        assert CANARY.encode() not in path.read_bytes(), path
    printed = platform(plane, "secret", "delete", "brought")
    assert "warning: accesspolicy/brought refers to it" in printed.stderr
    opens_soon(plane, CANARY, 401)
    delete(plane, "accesspolicy", "brought")


def test_an_old_key_and_a_new_one_overlap_and_a_router_that_dies_remembers(plane: Plane) -> None:
    old, new = new_key(), new_key()
    plane.apply(policy("rotated", hashed("old", old)))
    ready(plane, "rotated")
    plane.apply(policy("rotated", hashed("old", old), hashed("new", new)))
    opens_soon(plane, new, 200)
    assert opens(plane, old) == 200
    plane.apply(policy("rotated", hashed("new", new)))
    opens_soon(plane, old, 401)
    assert opens(plane, new) == 200
    pid = int(plane.client.get("/v1/ping")["router"]["pid"])
    os.kill(pid, 9)

    def again() -> bool:
        try:
            return opens(plane, new) == 200
        except httpx.TransportError:
            return False

    eventually(again, "the router is back")
    assert (opens(plane), opens(plane, old)) == (401, 401)
    delete(plane, "accesspolicy", "rotated")


def test_a_key_is_one_policys_alone_and_time_ends_it(plane: Plane) -> None:
    mine = new_key()
    plane.apply(policy("first", hashed("k", mine)))
    with pytest.raises(InvalidManifest) as refused:
        plane.apply(policy("second", hashed("k", mine)))
    assert refused.value.problems[0]["path"] == "spec.keys[0].hash"
    ready(plane, "first")
    plane.client.post("/v1/secrets/same", {"value": mine})
    taking = policy("earlier-by-name", "{name: s, valueFrom: {secretRef: same}}", more=", allow: {models: [none]}")
    assert plane.plan(taking)["warnings"] == [
        "key s will not work: it is that of accesspolicy/first key k, which is older",
        "spec.allow.models[0]: nothing is served as 'none' yet",
    ]
    plane.apply(taking)
    found = ready(plane, "earlier-by-name", "NoKeys")
    assert "s: it is that of accesspolicy/first key k" in condition(found, "KeysUsable")["message"]
    assert (opens(plane, mine), condition(view(plane, "first"), "Ready")["reason"]) == (200, "Enforced")
    told = plane.client.get("/v1/events", **{"for": "accesspolicy/earlier-by-name"})["items"]
    assert {each["reason"] for each in told if each["type"] == "Warning"} == {"KeyTaken", "NoKeys"}
    delete(plane, "accesspolicy", "earlier-by-name")
    plane.client.delete("/v1/secrets/same")
    end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 2))
    plane.apply(policy("first", hashed("k", mine), more=f", expiresAt: '{end}'"))
    opens_soon(plane, mine, 401)
    found = ready(plane, "first", "Expired")
    assert condition(found, "Stalled")["status"] == "True"
    assert [key["works"] for key in found["status"]["keys"]] == [False]
    assert found["status"]["keys"][0]["problem"] == f"the policy has expired, since {end}"
    assert condition(found, "KeysUsable")["reason"] == "Expired"
    assert "Expired" in {each["reason"] for each in plane.client.get("/v1/events")["items"]}
    plane.apply(policy("second", hashed("k", mine)))  # what opens nothing any more is nobody's
    opens_soon(plane, mine, 200)
    assert ready(plane, "second")["status"]["keys"][0]["works"]
    delete(plane, "accesspolicy", "second")
    delete(plane, "accesspolicy", "first")


@pytest.mark.nightly
def test_an_address_that_others_reach_needs_keys_and_never_opens(tmp_path_factory: pytest.TempPathFactory) -> None:
    plane = ForkedPlane(tmp_path_factory.mktemp("open"))
    plane.start()
    key = new_key()
    outside = GATEWAY.replace("{port: 0}", "{port: 0, bind: 0.0.0.0, insecurePlaintext: true}")
    try:
        with pytest.raises(InvalidManifest) as refused:
            plane.apply(GATEWAY.replace("{port: 0}", "{port: 0, bind: 0.0.0.0}"), policy("team", hashed("k", key)))
        assert "spec.tls" in refused.value.problems[0]["message"]
        with pytest.raises(InvalidManifest) as refused:
            plane.apply(outside)
        assert "AccessPolicy" in refused.value.problems[0]["message"]
        plane.apply(outside, policy("team", hashed("k", key)))
        ready(plane, "team")
        assert (opens(plane), opens(plane, key)) == (401, 200)
        port = plane.base_url.rsplit(":", 1)[1].removesuffix("/v1")
        named = {"Host": f"llm.example.org:{port}", "Authorization": f"Bearer {key}"}
        assert httpx.get(f"{plane.base_url}/models", headers=named).status_code == 421
        plane.apply(outside.replace("insecure", "hosts: [llm.example.org], insecure"))
        eventually(
            lambda: httpx.get(f"{plane.base_url}/models", headers=named).status_code == 200,
            "the name is answered to",
        )
        delete(plane, "accesspolicy", "team")
        assert (opens(plane), opens(plane, key)) == (401, 401)

        def told() -> bool:
            gateway = plane.client.get("/v1/objects/gateway/default")
            return bool(condition(gateway, "Protected")["reason"] == "NoAccessPolicy")

        eventually(told, "the gateway says that nobody has a key")
        with pytest.raises(Refused):
            view(plane, "team")
    finally:
        plane.end()
    assert plane.ours() == []


def test_a_budget_is_told_of_in_the_status_in_events_and_in_usage(plane: Plane) -> None:
    ours = new_key()
    plane.apply(model("paid", "  prices: {input: '1.5', output: '3'}\n"))
    plane.wait_served("paid")
    budgets = (
        ", allow: {models: [paid]}, "
        "budgets: [{name: day, tokens: %d, per: day}, {name: cost, cost: '9', per: 24h}]"
    )
    plane.apply(policy("spender", hashed("ci", ours), more=budgets % 2))
    assert condition(ready(plane, "spender"), "BudgetsCounted")["status"] == "True"
    body = {"model": "paid", "prompt": "hi", "max_tokens": 2}

    def asked() -> int:
        headers = {"Authorization": f"Bearer {ours}"}
        return httpx.post(f"{plane.base_url}/completions", json=body, headers=headers, timeout=30).status_code

    assert (asked(), asked()) == (200, 429)
    told = plane.client.get("/v1/usage", since="2000-01-01", by="policy")
    (item,) = (each for each in told["items"] if each["policy"] == "spender")
    tokens = item["promptTokens"] * 15 + item["completionTokens"] * 30
    assert item["cost"] == f"0.{-(-tokens // 1000):04d}", "by the prices of the Model"
    day, cost = told["budgets"]
    assert (day["name"], day["size"], day["left"], day["state"], day["unit"]) == ("day", 2, 0, "spent", "tokens")
    assert day["spent"] == item["promptTokens"] + item["completionTokens"]
    assert day["resetsAt"].endswith("T00:00:00.000Z")
    assert (cost["size"], cost["spent"], cost["state"], cost["resetsAt"]) == ("9.0000", item["cost"], "open", None)

    printed = platform(plane, "usage", "--by", "policy").stdout.split("\n\n")
    assert [line.split() for line in printed[1].splitlines()] == [
        ["POLICY", "KEY", "BUDGET", "UNIT", "SIZE", "SPENT", "LEFT", "STATE", "RESETS"],
        ["spender", "-", "day", "tokens", "2", str(day["spent"]), "0", "spent", day["resetsAt"]],
        ["spender", "-", "cost", "cost", "9.0000", cost["spent"], cost["left"], "open", "-"],
    ]

    def spent() -> bool:
        return str(condition(view(plane, "spender"), "BudgetsLeft")["reason"]) == "BudgetSpent"

    eventually(spent, "the control plane knows")
    (low,) = view(plane, "spender")["status"]["budgets"]
    assert low == {name: day[name] for name in ("name", "key", "unit", "size", "state", "resetsAt")}
    events = [each for each in plane.client.get("/v1/events")["items"] if each["object"] == "accesspolicy/spender"]
    assert [each["reason"] for each in events if each["type"] == "Warning"] == ["BudgetSpent"]
    plane.apply(policy("spender", hashed("ci", ours), more=budgets % 1000))
    eventually(lambda: asked() == 200, "a larger one counts at once")
    eventually(lambda: condition(view(plane, "spender"), "BudgetsLeft")["status"] == "True", "it is told")
    plane.apply(model("paid"))
    eventually(
        lambda: "paid" in condition(view(plane, "spender"), "BudgetsCounted").get("message", ""),
        "what costs nothing",
    )
    delete(plane, "accesspolicy", "spender")
    plane.delete("paid")
