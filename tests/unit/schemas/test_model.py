"""Kind Model: every field is documented and classed, defaults are filled, declared values are kept."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from quire_schemas.explain import explain
from quire_schemas.fields import default_of, dotted, walk
from quire_schemas.kinds import KINDS
from quire_schemas.manifest import load
from quire_schemas.model import DEFAULTS_VERSION, Model, resolve_defaults
from quire_schemas.resource import HONOURED, UPDATE_CLASSES, Invalid, Key, honoured_values, support

ALL_FIELDS = [(name, path, field) for name, kind in KINDS.items() for path, field in walk(kind)]


def model(**spec: Any) -> Model:
    return Model.model_validate(
        {
            "apiVersion": "quire.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": "m"},
            "spec": {"source": "builtin://tiny", **spec},
        }
    )


@pytest.mark.parametrize(("kind", "path", "field"), ALL_FIELDS, ids=[f"{k}.{dotted(p)}" for k, p, _ in ALL_FIELDS])
def test_every_field_states_its_meaning_update_class_and_support(kind: str, path: Any, field: Any) -> None:
    extra = field.info.json_schema_extra
    assert field.info.description
    assert field.info.description.endswith(".")
    assert extra["x-quire-update"] in UPDATE_CLASSES
    assert extra["x-quire-support"]
    text = explain(f"{kind}.{dotted(path)}")
    assert "Support: " in text
    assert f"update: {extra['x-quire-update']}" in text


def test_every_default_is_honoured() -> None:
    for name, path, field in ALL_FIELDS:
        default = default_of(field)
        if support(field.info) == HONOURED or default is None or field.shape.section is not None:
            continue
        inside_refused = any(
            support(f.info) != HONOURED and not honoured_values(f.info)
            for k, p, f in ALL_FIELDS
            if k == name and p == path[: len(p)]
        )
        assert inside_refused or default in honoured_values(field.info), dotted(path)


def test_a_declared_default_is_no_problem() -> None:
    for name, path, field in ALL_FIELDS:
        default = default_of(field)
        if name != "Model" or path[0] != "spec" or default in (None, [], {}) or not honoured_values(field.info):
            continue
        spec: dict[str, Any] = {"source": "builtin://tiny"}
        inner = spec
        for part in path[1:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = default
        if any(part in ("env", "valueFrom") for part in path):
            continue
        text = f"{{apiVersion: quire.dev/v1alpha1, kind: Model, metadata: {{name: m}}, spec: {_flow(spec)}}}"
        assert load([("m", text)]).problems == []


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    return (
        str(value).lower() if isinstance(value, bool) else f"'{value}'" if isinstance(value, str) else str(value)
    )


def test_resolved_defaults_have_a_value_for_every_field_and_keep_auto() -> None:
    resolved = resolve_defaults(model())
    assert resolved["defaultsVersion"] == DEFAULTS_VERSION
    assert resolved["servedModelNames"] == ["m"]
    assert resolved["replicas"] == 1
    assert resolved["engine"]["maxModelLen"] == "auto"
    assert resolved["batching"] == {
        "maxNumSeqs": 64,
        "maxNumBatchedTokens": 512,
        "maxPrefillTokens": "auto",
        "chunkedPrefill": True,
        "prefixCaching": True,
        "asyncScheduling": "auto",
        "policy": "fcfs",
        "slo": None,
        "maxQueueLength": 512,
        "maxQueueWait": "60s",
    }
    expected = {path[1] for path, _ in walk(Model) if path[0] == "spec" and len(path) == 2}
    assert set(resolved) == expected | {"defaultsVersion"}


def test_declared_values_survive_defaulting_in_their_own_spelling() -> None:
    declared = model(
        servedModelNames=["a", "b"], replicas=0, drainTimeout="1m30s", engine={"kvCache": {"size": "64Mi"}}
    )
    resolved = resolve_defaults(declared)
    assert resolved["servedModelNames"] == ["a", "b"]
    assert resolved["replicas"] == 0
    assert resolved["drainTimeout"] == "1m30s"
    assert resolved["engine"]["kvCache"] == {"dtype": "auto", "blockSize": 16, "size": "64Mi", "swapSpace": "0"}
    assert declared.intent()["spec"] == {
        "source": "builtin://tiny",
        "servedModelNames": ["a", "b"],
        "replicas": 0,
        "drainTimeout": "1m30s",
        "engine": {"kvCache": {"size": "64Mi"}},
    }


def test_models_are_strict_and_frozen() -> None:
    with pytest.raises(ValidationError):
        model(replicas="1")
    with pytest.raises(ValidationError):
        model(served_model_names=["a"])
    with pytest.raises(ValidationError):
        model().spec.replicas = 2


def test_keys_read_as_they_print() -> None:
    key = Key.of(model())
    assert str(key) == "model/m"
    assert Key.parse("Model/m") == key
    for text in ("model", "/m", "model/", ""):
        with pytest.raises(Invalid) as caught:
            Key.parse(text)
        assert "model/quickstart" in caught.value.hint
