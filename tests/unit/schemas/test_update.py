"""What a change means: its class, and hashes that move exactly when they should and never by a release.

`golden_hashes.json` pins the hashes of resolved specs. A change to that file restarts every running model of
those who upgrade: it needs an entry in the changelog. To write it anew:

    python tests/unit/schemas/test_update.py
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire_schemas.fields import dotted, walk
from quire_schemas.manifest import intent_hash, load
from quire_schemas.model import Model, ModelSpec, prefill_share, resolve_defaults
from quire_schemas.resource import Strict, update_tag
from quire_schemas.update import (
    ENGINE_HOT,
    EngineLimits,
    FieldChange,
    UpdateClass,
    beyond_limits,
    diff,
    diff_metadata,
    hot_hash,
    template_hash,
)

GOLDEN = Path(__file__).with_name("golden_hashes.json")
LIMITS = EngineLimits(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=2048)


def model(**spec: Any) -> Model:
    return Model.model_validate(
        {
            "apiVersion": "quire.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": "m"},
            "spec": {"source": "builtin://tiny", **spec},
        }
    )


def resolved(**spec: Any) -> dict[str, Any]:
    return resolve_defaults(model(**spec))


# ── golden hashes ─────────────────────────────────────────────────────────────────────────────────────────


def computed(spec: dict[str, Any]) -> dict[str, str]:
    text = yaml.safe_dump(
        {"apiVersion": "quire.dev/v1alpha1", "kind": "Model", "metadata": {"name": "m"}, "spec": spec}
    )
    manifest = load([("golden", text)])
    assert manifest.problems == []
    resource = manifest.resources[0].resource
    assert isinstance(resource, Model)
    full = resolve_defaults(resource)
    return {"intent": intent_hash(resource), "template": template_hash(full), "hot": hot_hash(full)}


ENTRIES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("entry", ENTRIES, ids=[e["name"] for e in ENTRIES])
def test_no_release_moves_a_hash(entry: dict[str, Any]) -> None:
    assert computed(entry["spec"]) == entry["hashes"]


def test_golden_manifests_differ_in_their_templates_where_they_should() -> None:
    by_template: dict[str, list[str]] = {}
    for entry in ENTRIES:
        by_template.setdefault(entry["hashes"]["template"], []).append(entry["name"])
    assert [names for names in by_template.values() if len(names) > 1] == [
        ["minimal", "defaults spelled out", "hot fields", "scale fields"]
    ]


# ── hashes ────────────────────────────────────────────────────────────────────────────────────────────────

ROLLING = [
    {"source": "file:///models/x"},
    {"revision": "abc"},
    {"tokenizer": {"source": "file:///models/y"}},
    {"engine": {"dtype": "float32"}},
    {"quantization": {"method": "int8"}},
    {"engine": {"maxModelLen": 512}},
    {"engine": {"memory": "50%"}},
    {"engine": {"kvCache": {"size": "1Gi"}}},
    {"engine": {"kvCache": {"blockSize": 32}}},
    {"engine": {"seed": 1}},
    {"resources": {"cpu": 2}},
    {"resources": {"memory": "1Gi"}},
    {"env": [{"name": "A", "value": "1"}]},
    {"placement": {"deviceIds": [1]}},
]
HOT = [
    {"servedModelNames": ["x"]},
    {"batching": {"maxNumSeqs": 8}},
    {"batching": {"maxNumBatchedTokens": 256}},
    {"batching": {"chunkedPrefill": False}},
    {"batching": {"maxQueueLength": 1}},
    {"batching": {"maxQueueWait": "1s"}},
    {"rollout": {"maxSurge": 3}},
    {"drainTimeout": "1s"},
    {"maxMigrations": 2},
    {"prices": {"input": "0.15"}},
    {"probes": {"startup": {"timeout": "1m"}}},
    {"restartPolicy": {"backoffMax": "1m"}},
    {"revisionHistoryLimit": 3},
]


@pytest.mark.parametrize("change", ROLLING, ids=str)
def test_rolling_fields_move_the_template_hash(change: dict[str, Any]) -> None:
    assert template_hash(resolved(**change)) != template_hash(resolved())
    assert hot_hash(resolved(**change)) == hot_hash(resolved())
    [found] = diff(resolved(), resolved(**change))
    assert found.update is UpdateClass.ROLLING


@pytest.mark.parametrize("change", [*HOT, {"replicas": 3}], ids=str)
def test_hot_and_scale_fields_do_not(change: dict[str, Any]) -> None:
    assert template_hash(resolved(**change)) == template_hash(resolved())
    [found] = diff(resolved(), resolved(**change))
    assert found.update is (UpdateClass.SCALE if "replicas" in change else UpdateClass.HOT)
    assert (hot_hash(resolved(**change)) != hot_hash(resolved())) is (
        found.path.removeprefix("spec.") in ENGINE_HOT
    )


def test_another_spelling_of_an_amount_changes_nothing() -> None:
    one = resolved(engine={"memory": "90.0%", "kvCache": {"size": "1Gi"}}, drainTimeout="1m")
    other = resolved(engine={"memory": "90%", "kvCache": {"size": "1024Mi"}}, drainTimeout="60s")
    assert diff(one, other) == ()
    assert template_hash(one) == template_hash(other)


def test_the_order_of_variables_changes_nothing() -> None:
    a, b = {"name": "A", "value": "1"}, {"name": "B", "value": "2"}
    assert template_hash(resolved(env=[a, b])) == template_hash(resolved(env=[b, a]))
    assert diff(resolved(env=[a, b]), resolved(env=[b, a])) == ()


def test_a_field_that_an_older_release_did_not_know_changes_no_hash() -> None:
    older = copy.deepcopy(resolved())
    for section, name in (("tokenizer", "chatTemplateFile"), ("quantization", "groupSize"), ("resources", "cpu")):
        del older[section][name]
    del older["lora"]
    assert template_hash(older) == template_hash(resolved())


def test_engines_that_must_grow_have_another_template() -> None:
    spec = resolved(batching={"maxNumSeqs": 128})
    assert beyond_limits(spec, LIMITS) == ("spec.batching.maxNumSeqs",)
    raised = EngineLimits(128, 512, 2048)
    assert template_hash(spec, raised) != template_hash(spec)
    assert beyond_limits(spec, raised) == ()


# ── classes ───────────────────────────────────────────────────────────────────────────────────────────────

TABLE = {
    "hot": [
        "servedModelNames", "batching.maxNumSeqs", "batching.maxNumBatchedTokens", "batching.maxPrefillTokens",
        "batching.chunkedPrefill", "batching.policy", "batching.slo", "batching.maxQueueLength",
        "batching.maxQueueWait", "placement.priority",
        "rollout", "drainTimeout", "maxMigrations", "probes", "restartPolicy", "revisionHistoryLimit", "parsers",
        "prices",
    ],
    "scale": ["replicas", "autoscaling", "residency"],
    "rolling": [
        "source", "revision", "tokenizer", "trustRemoteCode", "engine", "parallelism", "quantization",
        "batching.prefixCaching", "batching.asyncScheduling", "speculative", "lora",
        "resources", "env", "sourceAuth", "placement.deviceIds", "determinism",
    ],
    "immutable": ["placement.backend"],
}  # fmt: skip


def test_every_leaf_has_the_class_of_the_design_table() -> None:
    expected = {path: tag for tag, paths in TABLE.items() for path in paths}
    for path, field in walk(ModelSpec):
        inner = field.shape.item if field.shape.kind == "list" and field.shape.item else field.shape
        if inner.section is not None and issubclass(inner.section, Strict):
            continue
        text = dotted(path)
        tags = [tag for prefix, tag in expected.items() if text == prefix or text.startswith(prefix + ".")]
        assert tags == [update_tag(field.info)], text


def test_a_section_is_as_strong_as_its_strongest_field() -> None:
    tags = {dotted(path): update_tag(field.info) for path, field in walk(ModelSpec)}
    assert tags["batching"] == "rolling"
    assert tags["rollout"] == "hot"
    assert tags["placement"] == "immutable"


@pytest.mark.parametrize(
    ("batching", "update", "note"),
    [
        ({"maxNumSeqs": 64}, None, ""),
        ({"maxNumSeqs": 32}, UpdateClass.HOT, ""),
        ({"maxNumSeqs": 65}, UpdateClass.ROLLING, "engine allocated for 64"),
        ({"maxNumBatchedTokens": 128}, UpdateClass.HOT, ""),
        ({"maxNumBatchedTokens": 1024}, UpdateClass.ROLLING, "engine allocated for 512"),
        ({"maxPrefillTokens": 4096}, UpdateClass.HOT, ""),
        ({"chunkedPrefill": False}, UpdateClass.ROLLING, "whole prompts of 2048 tokens need a larger step"),
    ],
)
def test_hot_is_what_the_running_engine_can_take(
    batching: dict[str, Any], update: UpdateClass | None, note: str
) -> None:
    changes = diff(resolved(), resolved(batching=batching), LIMITS)
    assert [(c.update, c.note) for c in changes] == ([] if update is None else [(update, note)])
    without = diff(resolved(), resolved(batching=batching), None)
    assert [(c.update, c.note) for c in without] == [(UpdateClass.HOT, "")] * len(changes)


# ── differences ───────────────────────────────────────────────────────────────────────────────────────────


def test_differences_come_field_by_field_in_schema_order() -> None:
    old = resolved(env=[{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], replicas=1)
    new = resolved(
        env=[{"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
        replicas=2,
        engine={"kvCache": {"size": "1Gi"}},
        servedModelNames=["m", "n"],
    )
    variable = {"valueFrom": None, "restartOnChange": False}
    assert diff(old, new) == (
        FieldChange("spec.servedModelNames", ["m"], ["m", "n"], UpdateClass.HOT),
        FieldChange("spec.engine.kvCache.size", "auto", "1Gi", UpdateClass.ROLLING),
        FieldChange("spec.replicas", 1, 2, UpdateClass.SCALE),
        FieldChange("spec.env[A]", {"name": "A", "value": "1", **variable}, None, UpdateClass.ROLLING),
        FieldChange(
            "spec.env[B]",
            {"name": "B", "value": "2", **variable},
            {"name": "B", "value": "3", **variable},
            UpdateClass.ROLLING,
        ),
        FieldChange("spec.env[C]", None, {"name": "C", "value": "4", **variable}, UpdateClass.ROLLING),
    )


def test_a_revision_that_is_older_than_a_field_keeps_its_engines_as_they_are() -> None:
    older = resolved()
    del older["batching"]["maxPrefillTokens"]
    assert hot_hash(older) != hot_hash(resolved())
    named = {
        "batching.maxNumSeqs": 64, "batching.maxNumBatchedTokens": 512, "batching.chunkedPrefill": True,
        "batching.policy": "fcfs", "batching.maxQueueLength": 512,
    }  # fmt: skip
    text = json.dumps(named, sort_keys=True, separators=(",", ":"))
    assert hot_hash(older) == hashlib.sha256(text.encode()).hexdigest(), "what the release before made of it"
    assert prefill_share(older["batching"].get("maxPrefillTokens"), "cpu") is None


def test_a_spec_does_not_differ_from_itself() -> None:
    for entry in ENTRIES:
        spec = resolved(**entry["spec"])
        assert diff(spec, copy.deepcopy(spec), LIMITS) == ()


def test_differences_of_labels_are_hot() -> None:
    old = {"name": "m", "labels": {"a": "1", "b": "2"}}
    new = {"name": "m", "labels": {"b": "3"}, "annotations": {"c": "4"}}
    assert diff_metadata(old, new) == (
        FieldChange("metadata.labels[a]", "1", None, UpdateClass.HOT),
        FieldChange("metadata.labels[b]", "2", "3", UpdateClass.HOT),
        FieldChange("metadata.annotations[c]", None, "4", UpdateClass.HOT),
    )


if __name__ == "__main__":
    for stored in ENTRIES:
        stored["hashes"] = computed(stored["spec"])
    GOLDEN.write_text(json.dumps(ENTRIES, indent=2) + "\n")
