"""The schema for editors and people: it agrees with the reader on what is valid, and explains itself."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from tests.effort import examples

from quire_schemas.explain import SCHEMA_ID, UnknownField, explain, json_schema
from quire_schemas.fields import fields_of, walk
from quire_schemas.kinds import KINDS
from quire_schemas.manifest import load, load_paths
from quire_schemas.resource import UPDATE_CLASSES, Strict

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = json_schema()
VALIDATOR = Draft7Validator(SCHEMA)


def document(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": "m"},
        "spec": {"source": "builtin://tiny", **spec},
    }


OTHERS: dict[str, dict[str, Any]] = {
    "Route": {
        "match": {"modelNames": ["chat"], "headers": [{"name": "x-tenant", "exact": "beta"}]},
        "backends": [{"model": "a", "weight": 95}, {"model": "b", "weight": 5}],
        "sticky": {"by": "header:x-user"},
        "fallbacks": [{"model": "b", "when": ["Unavailable", "QueueFull"]}],
        "timeouts": {"firstToken": "30s", "request": "10m"},
        "retries": {"maxAttempts": 2, "when": ["ConnectionError", "503"]},
        "mirror": {"model": "b", "percent": 0},
    },
    "AccessPolicy": {
        "keys": [
            {"name": "ci", "valueFrom": {"file": "/run/secrets/ci"}},
            {"name": "prod", "hash": "sha256:" + "0" * 64},
        ],
        "allow": {"models": ["a"], "operations": ["chat", "completions"]},
        "limits": [{"scope": "key", "requests": 600, "per": "1m"}, {"scope": "policy", "concurrency": 64}],
        "budgets": [
            {"name": "month", "cost": "250.00", "per": "month"},
            {"name": "day", "scope": "key", "tokens": 5, "counts": "prompt", "cached": "free", "per": "24h"},
        ],
        "priority": 10,
        "expiresAt": "2027-01-01T00:00:00Z",
    },
    "GitSource": {
        "url": "https://example.org/manifests.git",
        "ref": {"branch": "main"},
        "path": "clusters/prod",
        "auth": {"secretRef": "git-token"},
        "interval": "1m",
        "webhook": {"provider": "github", "secretRef": "hook"},
        "sync": {
            "prune": True,
            "maxPrune": "50%",
            "windows": [
                {"kind": "Deny", "schedule": "0 18 * * 5", "duration": "62h", "timeZone": "Europe/Berlin"}
            ],
        },
        "verify": {"signedBy": []},
        "suspend": False,
        "deletionPolicy": "Delete",
    },
    "Gateway": {"bind": "127.0.0.1", "port": 8080},
}


def whole(kind: str) -> dict[str, Any]:
    name = "default" if kind == "Gateway" else "m"
    return {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name, "labels": {"a": "b"}},
        "spec": OTHERS[kind],
    }


def test_it_is_draft_07_and_nothing_newer() -> None:
    Draft7Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"
    text = json.dumps(SCHEMA)
    for newer in ("$defs", "prefixItems", "unevaluatedProperties", "dependentRequired", '"null"', "oneOf"):
        assert newer not in text
    assert json.loads(text) == SCHEMA


def test_the_examples_name_this_schema_on_their_first_line() -> None:
    for path in (ROOT / "manifests").glob("*.yaml"):
        assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA_ID}"


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema
        for value in schema.values():
            yield from _objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _objects(value)


def test_every_property_of_every_object_says_what_it_is_and_what_a_change_does() -> None:
    objects = list(_objects(SCHEMA["definitions"]))
    assert len(objects) > 40
    for found in objects:
        assert found["additionalProperties"] is False
        for name, prop in found["properties"].items():
            assert prop["description"], name
            assert prop["x-quire-update"] in UPDATE_CLASSES, name
            assert prop["x-quire-support"], name
            assert "$ref" not in prop, f"{name}: draft-07 ignores what stands beside a $ref"


def test_definitions_of_all_kinds_have_names_of_their_own() -> None:
    owners: dict[str, type[Strict]] = {}
    for kind in KINDS.values():
        for _, field in walk(kind):
            inner = field.shape.item if field.shape.kind == "list" and field.shape.item else field.shape
            if inner.section is not None:
                assert owners.setdefault(inner.section.__name__, inner.section) is inner.section


def test_the_examples_are_valid() -> None:
    for located in load_paths([ROOT / "manifests"]).resources:
        VALIDATOR.validate(located.intent)


@pytest.mark.parametrize("kind", OTHERS)
def test_full_documents_of_the_other_kinds_are_valid(kind: str) -> None:
    VALIDATOR.validate(whole(kind))
    found = load([("f", json.dumps(whole(kind)))]).problems
    assert found == []


FULL_SPEC: dict[str, Any] = {
    "revision": "main",
    "sourceAuth": {"secretRef": "t"},
    "tokenizer": {"source": "hf://a/b", "chatTemplateFile": "/t.jinja"},
    "trustRemoteCode": False,
    "servedModelNames": ["a", "b/c"],
    "engine": {
        "dtype": "bfloat16",
        "maxModelLen": 32768,
        "memory": "90%",
        "kvCache": {"dtype": "fp8", "blockSize": 16, "size": "40Gi", "swapSpace": "8Gi"},
        "extraArgs": ["--x"],
    },
    "parallelism": {"tensor": 4, "pipeline": 1, "data": 1, "expert": False},
    "quantization": {"method": "gptq", "format": "auto", "activations": "bf16", "groupSize": 128},
    "batching": {"policy": "slo", "slo": {"ttftP95": "500ms", "itlP95": "40ms"}, "maxQueueWait": "60s"},
    "speculative": {"method": "draft", "source": "hf://a/b", "numTokens": 4},
    "lora": {"maxRank": 64, "adapters": [{"name": "sql", "source": "hf://a/b"}]},
    "resources": {"accelerator": {"type": "nvidia-h100", "countPerReplica": 4}, "cpu": 8, "memory": "64Gi"},
    "placement": {"backend": "local", "deviceIds": []},
    "autoscaling": {"minReplicas": 0, "maxReplicas": 3, "target": {"kvCacheUsage": "80%"}, "idleTimeout": "15m"},
    "rollout": {
        "strategy": "Canary",
        "canary": {
            "steps": [{"weight": 5, "hold": "5m"}, {"weight": 100}],
            "analysis": {"maxErrorRate": "1%", "smokePrompts": [{"prompt": "2+2=", "expectContains": "4"}]},
        },
    },
    "probes": {"startup": {"timeout": "30m"}, "readiness": {"period": "2s"}, "liveness": {"failureThreshold": 3}},
    "restartPolicy": {"backoffBase": "1s", "maxRestartsBeforeRollback": 3},
    "env": [{"name": "A", "value": "x"}, {"name": "B", "valueFrom": {"secretRef": "t"}}],
}


def test_a_document_with_every_section_is_well_formed_though_refused() -> None:
    full = document(**FULL_SPEC)
    VALIDATOR.validate(full)
    messages = [p.message for p in load([("f", json.dumps(full))]).problems]
    assert messages
    assert sum(not m.startswith("not honoured by this version") for m in messages) == 1  # revision of builtin://


@pytest.mark.parametrize(
    "wrong",
    [
        document(paralelism={}),
        document(replicas="1"),
        document(replicas=-1),
        document(replicas=None),
        document(engine={"dtype": "float17"}),
        document(engine={"maxModelLen": 0}),
        document(engine={"maxModelLen": "all"}),
        document(engine={"kvCache": {"size": "40GB"}}),
        document(engine={"kvCache": {"blockSize": 17}}),
        document(drainTimeout="30"),
        document(drainTimeout=""),
        document(engine={"memory": "0.9"}),
        document(servedModelNames="a"),
        document(env=[{"value": "x"}]),
        document(rollout={"strategy": "auto"}),
        {**document(), "status": {}},
        {**document(), "metadata": {"name": "Upper"}},
        {**document(), "metadata": {"name": "m", "labels": {"a": []}}},
        {**document(), "kind": "Modle"},
        {**document(), "apiVersion": "quire.dev/v2"},
        {k: v for k, v in document().items() if k != "spec"},
        {k: v for k, v in document().items() if k != "kind"},
        {**whole("Gateway"), "spec": {"port": 70000}},
        {**whole("Route"), "spec": {"match": {"modelNames": []}, "backends": []}},
    ],
    ids=lambda d: json.dumps(d.get("spec"))[:60],
)
def test_what_the_schema_refuses_the_reader_refuses_too(wrong: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(wrong)
    assert load([("f", json.dumps(wrong))]).problems


@settings(max_examples=examples(100), deadline=None)
@given(st.data())
def test_what_the_reader_takes_the_schema_takes(data: st.DataObject) -> None:
    """Values that suit some field are put into other fields: whatever passes the reader passes the schema."""
    spec = copy.deepcopy(FULL_SPEC)
    section = data.draw(st.sampled_from(sorted(spec)))
    value = data.draw(st.sampled_from([*spec.values(), 1, "1s", "auto", True, "none", "2Gi", [], {}]))
    candidate = document(**{section: value})
    if not load([("f", json.dumps(candidate))]).problems:
        VALIDATOR.validate(candidate)


# ── explain ───────────────────────────────────────────────────────────────────────────────────────────────


def test_explain_shows_type_default_update_class_and_support() -> None:
    assert explain("model.spec.batching.chunkedPrefill") == (
        "FIELD    spec.batching.chunkedPrefill   <bool>   default true   update: hot\n"
        "  Split long prompts into chunks that share steps with running sequences. Lowers the time between\n"
        "  tokens under mixed load at a small cost in prompt throughput. Without it a whole prompt has to fit\n"
        "  into maxNumBatchedTokens.\n"
        "  Support: honoured"
    )
    assert "this version takes only 1: a replica runs on one device" in explain("model.spec.parallelism.tensor")
    assert "Support: refused: there is no speculative decoding yet" in explain("model.spec.speculative.method")
    assert "<auto | int>   default auto" in explain("model.spec.engine.maxModelLen")
    assert "<list of object>" in explain("model.spec.env")
    assert "required" in explain("model.spec.source")
    assert "Support: refused: ranges of versions" in explain("gitsource.spec.ref.semver")
    assert "Support: honoured" in explain("route.spec.backends.adapter")


@pytest.mark.parametrize("path", ["model.spec.batching", "Model.spec.batching", "MODEL.spec.batching"])
def test_explain_lists_the_fields_of_a_section(path: str) -> None:
    text = explain(path)
    batching = fields_of(KINDS["Model"])["spec"].shape.section
    assert batching is not None
    section = fields_of(batching)["batching"].shape.section
    assert section is not None
    assert all(f"\n  {name} " in text for name in fields_of(section))


def test_explain_goes_through_lists() -> None:
    assert explain("model.spec.env.name") == explain("model.spec.env[].name")


def test_explain_a_kind() -> None:
    assert "metadata" in explain("gateway")
    assert "FIELDS" in explain("GitSource")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("model.spec.batching.chunkPrefill", "model.spec.batching.chunkedPrefill"),
        ("model.spec.maxNumSeqs", "model.spec.batching.maxNumSeqs"),
        ("model.spec.max_num_seqs", "model.spec.batching.maxNumSeqs"),
        ("modle.spec.source", "model.spec.source"),
        ("spec.source", "model.spec.source"),
        ("", "model, route"),
        ("zzz", "model, route"),
        ("model.zzz", "platform explain model.spec"),
        ("model.spec.source.deeper", "platform explain"),
    ],
)
def test_explain_an_unknown_path_suggests_one(path: str, hint: str) -> None:
    with pytest.raises(UnknownField) as caught:
        explain(path)
    assert isinstance(caught.value, LookupError)
    assert hint in caught.value.hint or "did you mean" in caught.value.hint


def test_reading_manifests_loads_no_torch_and_nothing_of_the_platform() -> None:
    code = (
        "import sys, quire_schemas.manifest, quire_schemas.update;"
        "bad = {'torch', 'transformers', 'quire', 'msgspec', 'litestar'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
