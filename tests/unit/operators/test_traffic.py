"""Who has a name, what the router is told of Routes, and what their statuses say: all of it pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from quire_operators.records import StoredObject
from quire_operators.status import Reason
from quire_operators.traffic import Claim, View, facts, hindrances, named, owners, summary, table
from quire_schemas import wire
from quire_schemas.manifest import load
from quire_schemas.resource import Key
from quire_schemas.route import Route


def route(name: str, created: float, spec: str, *, deleted: bool = False) -> StoredObject:
    text = f"apiVersion: quire.dev/v1alpha1\nkind: Route\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    read = load([("r.yaml", text)])
    assert read.problems == []
    resource = read.resources[0].resource
    assert isinstance(resource, Route)
    spec_: dict[str, Any] = resource.model_dump(mode="json", by_alias=True)["spec"]
    at = 9.0 if deleted else None
    return StoredObject(Key("route", name), name, 1, 1, {}, "", spec_, None, created, created, at)


def model(name: str, created: float, *names: str) -> StoredObject:
    resolved = {"servedModelNames": list(names or (name,))}
    return StoredObject(Key("model", name), name, 1, 1, {}, "", resolved, 1, created, created)


TO_A = "backends: [{model: a}]"
PLAIN = wire.ModelRoute("a", ("a", "x"), 1, "t", "/t", None, 1024, 4096, 512, 60.0, 1, ())


def test_the_older_keeps_a_name_and_headers_make_it_another_claim() -> None:
    beta = "headers: [{name: X-Tenant, exact: beta}]"
    objects = [
        route("young", 3.0, f"{{match: {{modelNames: [x, y]}}, {TO_A}}}"),
        route("old", 2.0, f"{{match: {{modelNames: [x, a]}}, {TO_A}}}"),
        route("gone", 0.0, f"{{match: {{modelNames: [y]}}, {TO_A}}}", deleted=True),
        route("beta", 9.0, f"{{match: {{modelNames: [a], {beta}}}, {TO_A}}}"),
        model("a", 1.0),
        model("late", 5.0, "late", "x"),
    ]
    owned = owners(objects)
    assert {(claim.name, str(key)) for claim, key in owned.items() if not claim.headers} == {
        ("x", "route/old"),
        ("a", "model/a"),
        ("y", "route/young"),
        ("late", "model/late"),
    }
    assert owned[Claim("a", (("x-tenant", "beta"),))] == Key("route", "beta")
    assert {each.route: each.names for each in table(objects, owned)} == {
        "young": ("y",),
        "old": ("x",),
        "beta": ("a",),
    }
    late = msgspec.structs.replace(PLAIN, model="late", names=("late", "x"))
    assert [each.names for each in named([PLAIN, late], owned)] == [("a",), ("late",)]


def test_every_field_of_a_manifest_is_in_what_the_router_is_told() -> None:
    spec = """
      match: {modelNames: [x], headers: [{name: X-B, exact: '2'}, {name: X-A, exact: '1'}]}
      backends: [{model: a, weight: 3}, {model: b, adapter: s, weight: 0}]
      sticky: {by: 'header:X-User'}
      fallbacks: [{model: c, when: [Timeout, QueueFull]}, {model: c, adapter: t, when: [Unavailable]}]
      timeouts: {firstToken: 1500ms, request: 2m}
      retries: {maxAttempts: 7, when: ['503']}
      mirror: {model: d, adapter: u, percent: 4}"""
    stored = route("r", 4.9, spec)
    assert table([stored], owners([stored])) == (
        wire.TrafficRoute(
            route="r",
            names=("x",),
            created=4,
            backends=(wire.Backend("a", 3), wire.Backend("b:s", 0)),
            headers=(("x-a", "1"), ("x-b", "2")),
            sticky="header:x-user",
            fallbacks=(wire.Fallback("c", ("Timeout", "QueueFull")), wire.Fallback("c:t", ("Unavailable",))),
            first_token=1.5,
            request=120.0,
            attempts=7,
            retried=("503",),
            mirror=wire.Mirror("d:u", 4),
        ),
    )


def seen(
    spec: str = f"{{match: {{modelNames: [x, y]}}, {TO_A}}}", models: Mapping[str, str | None] | None = None,
    **changes: Any,
) -> dict[str, tuple[bool | None, Reason]]:  # fmt: skip
    fields: dict[str, Any] = {
        "lost": {},
        "routes": {"r"},
        "taken": True,
        "older": False,
        "unavailable": None,
    } | changes
    view = View(route("r", 1.0, spec), models={"a": None} if models is None else models, **fields)
    found = facts(view)
    assert summary(found, deleting=False)
    return {fact.type: (fact.status, fact.reason) for fact in found}


BOTH = "{match: {modelNames: [x]}, backends: [{model: a}, {model: b, weight: 0}]}"
STAND_IN = f"{{match: {{modelNames: [x]}}, {TO_A}, fallbacks: [{{model: b, when: [Unavailable]}}]}}"
OFF = "{match: {modelNames: [x]}, backends: [{model: a, weight: 0}]}"
LATE_STAND_IN = STAND_IN.replace("Unavailable", "Timeout")
ADAPTERS = "{match: {modelNames: [x]}, backends: [{model: a, adapter: s}, {model: a, weight: 0}]}"
ADAPTER_STEPS_IN = (
    f"{{match: {{modelNames: [x]}}, {TO_A}, fallbacks: [{{model: b, adapter: s, when: [Unavailable]}}]}}"
)
SERVING, MISSING = (True, Reason.SERVING), (False, Reason.BACKEND_NOT_FOUND)


@pytest.mark.parametrize(
    ("found", "ready", "others"),
    [
        (seen(), SERVING, {"Stalled": (False, Reason.PROGRESS_MADE), "BackendsFound": (True, Reason.VALID)}),
        (seen(BOTH), SERVING, {"BackendsFound": MISSING, "Stalled": (False, Reason.PROGRESS_MADE)}),
        (seen(models={}), MISSING, {"Stalled": (True, Reason.BACKEND_NOT_FOUND)}),
        (seen(models={"a": "CrashLoop"}), (False, Reason.BACKEND_NOT_READY), {}),
        (seen(BOTH, {"a": "Paused", "b": None}), (False, Reason.STOPPED), {}),
        (
            seen(BOTH, {"b": None}),
            MISSING,
            {"BackendsFound": MISSING, "Stalled": (True, Reason.BACKEND_NOT_FOUND)},
        ),
        (seen(OFF, {"a": None}), (False, Reason.NO_WEIGHT), {"Stalled": (False, Reason.PROGRESS_MADE)}),
        (seen(LATE_STAND_IN, {"b": None}), MISSING, {"Stalled": (True, Reason.BACKEND_NOT_FOUND)}),
        (seen(STAND_IN, {"a": "Stopped", "b": None}), SERVING, {}),
        (seen(STAND_IN, {"b": None}), SERVING, {"Stalled": (False, Reason.PROGRESS_MADE)}),
        (seen(ADAPTERS, {"a": None, "a:s": None}), SERVING, {"BackendsFound": (True, Reason.VALID)}),
        (
            seen(ADAPTERS, {"a": None}),
            MISSING,
            {"BackendsFound": MISSING, "Stalled": (True, Reason.BACKEND_NOT_FOUND)},
        ),
        (seen(ADAPTER_STEPS_IN, {"b": None, "b:s": None}), SERVING, {"BackendsFound": MISSING}),
        (seen(ADAPTER_STEPS_IN, {"b": None}), MISSING, {"Stalled": (True, Reason.BACKEND_NOT_FOUND)}),
        (
            seen(taken=False),
            (False, Reason.HOT_UPDATE_PENDING),
            {"RolledOut": (False, Reason.HOT_UPDATE_PENDING)},
        ),
        (
            seen(taken=False, unavailable="the router starts"),
            (False, Reason.ROUTER_NOT_READY),
            {"RolledOut": (False, Reason.ROUTER_NOT_READY)},
        ),
        (
            seen(lost={"x": Key("model", "m")}),
            SERVING,
            {"Accepted": (False, Reason.NAME_CONFLICT), "Stalled": (True, Reason.NAME_CONFLICT)},
        ),
        (seen(lost={"x": Key("model", "m"), "y": Key("model", "m")}), (False, Reason.NAME_CONFLICT), {}),
    ],
)  # fmt: skip
def test_conditions_say_whether_a_request_now_is_served_and_what_is_amiss(
    found: dict[str, tuple[bool | None, Reason]],
    ready: tuple[bool, Reason],
    others: dict[str, tuple[bool, Reason]],
) -> None:
    assert found["Ready"] == ready
    assert others.items() <= found.items()


def test_an_older_router_is_told_apart_from_one_that_is_about_to_take_it() -> None:
    stored = route("r", 1.0, f"{{match: {{modelNames: [x]}}, {TO_A}}}")
    view = View(stored, {}, {"a": None}, {"r"}, taken=False, older=True, unavailable=None)
    rolled_out = next(fact for fact in facts(view) if fact.type == "RolledOut")
    assert "earlier version" in rolled_out.message


def test_what_is_missing_is_named_and_a_route_is_no_model() -> None:
    spec = "{match: {modelNames: [x]}, backends: [{model: a, weight: 0}, {model: nosuch}, {model: r2, weight: 2}]}"
    view = View(route("r", 1.0, spec), {}, {"a": None}, {"r", "r2"}, taken=True, older=False, unavailable=None)
    ready = next(fact for fact in facts(view) if fact.type == "Ready")
    assert ready.message == (
        "there is no model/nosuch, model/r2 (r2 is a Route, and requests go to a Model); the weight of a is 0"
    )


def test_an_adapter_that_a_rollout_is_to_bring_is_there_and_does_not_answer_yet() -> None:
    """A canary's, for as long as it is one; those of a revision that goes away answer until it is gone."""
    spec = {"lora": {"adapters": [{"name": "new"}]}}
    assert hindrances("a", spec, None, None) == {"a": None, "a:new": None}
    assert hindrances("a", spec, PLAIN, None) == {"a": None, "a:new": "Progressing"}
    told = msgspec.structs.replace(PLAIN, adapters=(wire.AdapterRoute("old"),))
    assert hindrances("a", spec, told, None) == {"a": None, "a:new": "Progressing", "a:old": None}
    assert hindrances("a", spec, told, "Paused") == {"a": "Paused", "a:new": "Paused", "a:old": "Paused"}
    only = seen(ADAPTERS, {"a": None, "a:s": "Progressing"})
    assert only["Ready"] == (False, Reason.BACKEND_NOT_READY)
    assert only["Stalled"] == (False, Reason.PROGRESS_MADE), "an apply that brings it waits for it"
