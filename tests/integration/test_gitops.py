"""A git source from a commit to what is served, over a real control plane and a real repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.git_remote import Remote, git
from tests.integration.plane import Plane, model
from tests.waiting import eventually

from quire.client import Refused

ROUTE = (
    "apiVersion: quire.dev/v1alpha1\nkind: Route\nmetadata: {name: %s}\nspec: {match: {modelNames: [%s]}, %s}\n"
)
LEADS = "backends: [{model: m, weight: 1}]"


def route(name: str, alias: str | None = None) -> str:
    return ROUTE % (name, alias or f"{name}-name", LEADS)


def source(remote: Remote, name: str = "prod", more: str = "") -> str:
    return (
        f"apiVersion: quire.dev/v1alpha1\nkind: GitSource\nmetadata: {{name: {name}}}\n"
        f"spec: {{url: '{remote.url}', interval: 1s, ref: {{branch: main}}{more}}}\n"
    )


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    remote = Remote(tmp_path / "remote")
    yield remote
    remote.close()


def status(plane: Plane, name: str = "prod") -> dict[str, Any]:
    return dict(plane.client.get(f"/v1/objects/gitsource/{name}")["status"])


def condition(plane: Plane, type_: str, name: str = "prod") -> dict[str, Any]:
    return next((c for c in status(plane, name).get("conditions", ()) if c["type"] == type_), {"reason": ""})


def applied(plane: Plane, commit: str, name: str = "prod") -> dict[str, Any]:
    def look() -> bool:
        return status(plane, name).get("lastAppliedRevision") == commit

    eventually(look, f"{commit[:7]} is applied", 20, logs=lambda: str(status(plane, name)))
    return status(plane, name)


def names(plane: Plane, kind: str = "route") -> set[str]:
    return {item["name"] for item in plane.client.get("/v1/objects", kind=kind)["items"] if not item["deleting"]}


def drop(plane: Plane, *keys: str) -> None:
    """Delete what a test left, whoever has it."""
    for key in keys:
        plane.client.delete(f"/v1/objects/{key}?takeOwnership=true")

        def gone(key: str = key) -> bool:
            try:
                plane.client.get(f"/v1/objects/{key}")
            except Refused:
                return True
            return False

        eventually(gone, f"{key} is gone")


def test_a_commit_is_served_and_a_bad_one_changes_nothing_and_says_where(plane: Plane, remote: Remote) -> None:
    remote.write(models__m=model("m", "  replicas: 1\n"), routes__r=route("r", "alias"))
    first = remote.push("first of all")
    plane.apply(source(remote))
    applied(plane, first)
    plane.wait_served("m")
    eventually(lambda: plane.complete("alias").status_code == 200, "the route serves")
    view = plane.client.get("/v1/objects/model/m")
    assert view["managedBy"] == {"source": "gitsource/prod", "commit": first, "file": "models/m.yaml"}
    assert view["revisions"][0]["cause"] == f"prod@{first[:7]}: first of all"
    eventually(lambda: condition(plane, "AppliedHealthy")["status"] == "True", "all of it is healthy")

    remote.write(models__m=model("m", "  replicas: 0\n  enginee: {}\n"), routes__q=route("q"))
    bad = remote.push("bad")
    eventually(lambda: condition(plane, "Ready")["reason"] == "ValidationFailed", "the commit is refused")
    found = status(plane)
    assert found["lastAppliedRevision"] == first
    assert found["lastAttemptedRevision"] == bad
    [problem] = found["problems"]
    assert (problem["file"], problem["line"], problem["col"]) == ("models/m.yaml", 8, 3)
    assert "models/m.yaml:8:3: spec.enginee: unknown field" in condition(plane, "Ready")["message"]
    assert condition(plane, "Stalled")["status"] == "True"
    assert names(plane) == {"r"}
    assert plane.complete("alias").status_code == 200
    assert [entry["result"] for entry in found["history"]] == ["Refused", "Applied"]

    git(remote.work, "revert", "--no-edit", "HEAD")
    good = remote.push("good again")
    found = applied(plane, good)
    assert found["problems"] == []
    assert found["history"][0]["changed"] == []
    assert plane.client.get("/v1/objects/model/m")["generation"] == 1

    with pytest.raises(Refused) as caught:
        plane.apply(route("r", "other"))
    assert (caught.value.status, caught.value.exit_code) == (409, 5)
    assert "gitsource/prod, from routes/r.yaml" in caught.value.message
    with pytest.raises(Refused):
        plane.client.delete("/v1/objects/route/r")
    drop(plane, "gitsource/prod")
    assert names(plane) == {"r"}, "what a source applied outlives it"
    drop(plane, "route/r", "model/m")
