"""What commands print for programs has the documented shapes: every field there, and no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
import pytest
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import is_typeddict

from quire.cli import render, shapes
from quire.cli.program import COMMANDS, cli
from quire_schemas.resource import API_VERSION

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

ELSEWHERE = {"doctor": "docs/doctor.md"}
MANIFEST = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {{name: m}}
spec:
  source: builtin://tiny
  engine: {{maxModelLen: {length}, kvCache: {{size: 16Mi}}}}
"""


@pytest.fixture(scope="module", autouse=True)
def _exact() -> None:
    for shape in vars(shapes).values():
        if is_typeddict(shape):
            shape.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)


def commands(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def test_every_command_that_prints_json_has_a_shape() -> None:
    printing = {
        name
        for name, command in commands(cli)
        for option in command.params
        if isinstance(option.type, click.Choice) and {"json"} <= set(option.type.choices)
    }
    assert printing == {name for name in shapes.ANSWERS if name.split(" ")[-1].islower()} - {
        "get replicas", "get revisions",
    } | set(ELSEWHERE)  # fmt: skip
    assert set(COMMANDS) >= {name.split(" ")[0] for name in shapes.ANSWERS}
    assert render.OUTPUT_VERSION == API_VERSION


def held_to(shape: type, answer: Any) -> None:
    TypeAdapter(shape).validate_python(answer)
    assert answer["apiVersion"] == API_VERSION


def test_answers_have_their_shapes(platform: Platform) -> None:
    platform.write("m.yaml", MANIFEST.format(length=1024))
    platform.write("changed.yaml", MANIFEST.format(length=512))
    platform.write("bad.yaml", "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\nspec: {}\n")

    def check(shape: type, *command: str, code: int = 0) -> Any:
        answer = json.loads(platform.run(*command, "-o", "json", code=code).stdout)
        held_to(shape, answer)
        return answer

    check(shapes.Validation, "validate", "bad.yaml", code=3)
    check(shapes.ObjectList, "get", "gateway")
    check(shapes.DifferenceList, "diff", "m.yaml", code=10)
    check(shapes.Plan, "plan", "m.yaml")
    platform.run("apply", "gateway.yaml", "m.yaml")
    models = check(shapes.ObjectList, "get")
    assert models["items"][0]["replicas"][0]["state"] == "Ready"
    check(shapes.ReplicaList, "get", "replicas")
    check(shapes.RevisionList, "get", "revisions")
    check(shapes.Object, "get", "model/m")
    check(shapes.Object, "get", "gateway/default")
    described = check(shapes.Object, "describe", "model/m")
    assert described["events"]
    check(shapes.DifferenceList, "diff", "changed.yaml", code=10)
    assert check(shapes.Plan, "plan", "changed.yaml")["items"][0]["budget"]
    platform.write("too-long.yaml", MANIFEST.format(length=1_000_000))
    assert check(shapes.Plan, "plan", "too-long.yaml", code=3)["items"][0]["problem"]
    events = check(shapes.EventList, "events", "--for", "model/m")
    assert events["items"]
    check(shapes.RolloutStatus, "rollout", "status", "model/m", "--no-watch")
    check(shapes.RevisionList, "rollout", "history", "model/m")
    check(shapes.LoadList, "top", "--interval", "100ms")
    check(shapes.Cache, "cache", "list")
    check(shapes.CachePrune, "cache", "prune", "--dry-run")
    platform.environment["TOKEN"] = "xyzzy-1234"
    platform.run("secret", "set", "token", "--from-env", "TOKEN")
    check(shapes.SecretList, "secret", "list")
    check(shapes.UsageList, "usage", "--by", "day")
    made = check(shapes.NewKey, "key", "create", "ci")
    entry = f"{{name: ci, hash: '{made['hash']}'}}"
    platform.write("access.yaml", MANIFEST.split("spec:")[0].format().replace("Model", "AccessPolicy")
                   + f"spec: {{keys: [{entry}]}}\n")  # fmt: skip
    platform.run("apply", "access.yaml")
    assert check(shapes.ObjectList, "get", "accesspolicies")["items"][0]["status"]["keys"][0]["works"]
    check(shapes.Object, "describe", "accesspolicy/m")
    check(shapes.LoadList, "top", "--interval", "100ms")
    platform.run("pause", "model/m", "--for", "2h", "--reason", "training")
    assert check(shapes.Object, "get", "model/m")["status"]["overrides"][0]["until"]
    as_yaml = yaml.safe_load(platform.run("get", "-o", "yaml").stdout)
    held_to(shapes.ObjectList, as_yaml)


def test_a_field_too_many_or_too_few_is_found() -> None:
    """The check itself can fail."""
    good = {"apiVersion": API_VERSION, "kind": "Validation", "valid": True, "problems": []}
    held_to(shapes.Validation, good)
    for wrong in ({**good, "more": 1}, {k: v for k, v in good.items() if k != "valid"}, {**good, "valid": "yes"}):
        with pytest.raises(ValidationError):
            held_to(shapes.Validation, wrong)
