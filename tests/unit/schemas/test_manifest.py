"""YAML to resources: values by the type of their field, every mistake with its place and remedy."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import effort
from tests.effort import examples

from quire_schemas import manifest_files
from quire_schemas.fields import fields_of
from quire_schemas.keys import new_key
from quire_schemas.kinds import KINDS
from quire_schemas.manifest import (
    MAX_PROBLEMS,
    Manifest,
    ManifestInvalid,
    Problem,
    intent_hash,
    is_newer,
    load,
    load_paths,
    parse_intent,
    read_paths,
)
from quire_schemas.model import Model, ModelSpec
from quire_schemas.problem_words import ERROR_WORDS

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "manifests").glob("*.yaml"))
HEAD = "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\n"
GOOD = HEAD + "spec: {source: builtin://tiny}\n"


def one(text: str) -> Model:
    manifest = load([("f.yaml", text)])
    assert manifest.problems == []
    [located] = manifest.resources
    assert isinstance(located.resource, Model)
    return located.resource


def problems(text: str, file: str = "f.yaml") -> list[Problem]:
    manifest = load([(file, text)])
    assert manifest.problems, text
    assert all(p.hint for p in manifest.problems), manifest.problems
    return manifest.problems


def spec(body: str) -> str:
    """A Model whose spec is the built-in source and this, its first line at line 6, indented by two."""
    return HEAD + "spec:\n  source: builtin://tiny\n" + "".join(f"  {line}\n" for line in body.splitlines())


def only(body: str) -> Problem:
    [problem] = problems(spec(body))
    return problem


# ── values ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_manifests_are_valid(path: Path) -> None:
    manifest = load_paths([path])
    assert manifest.problems == []
    assert manifest.resources


def test_bare_scalars_become_what_their_field_needs() -> None:
    model = one(
        HEAD
        + "spec:\n"
        + "  source: hf://a/b\n  revision: 1234567\n  replicas: 0x10\n"
        + "  servedModelNames: [1, 'true', 2024-01-01]\n"
        + "  engine: {enforceEager: TRUE, maxModelLen: 4096, seed: 0o17}\n"
        + "  quantization: {method: none}\n"
        + "  env: [{name: A, value: 1:30}, {name: B, value: ''}, {name: C, value: no}, {name: D, value: .5}]\n"
    )
    assert model.spec.revision == "1234567"
    assert model.spec.replicas == 16
    assert model.spec.served_model_names == ("1", "true", "2024-01-01")
    assert model.spec.engine.enforce_eager is True
    assert model.spec.engine.max_model_len == 4096
    assert model.spec.engine.seed == 15
    assert [(e.name, e.value) for e in model.spec.env] == [("A", "1:30"), ("B", ""), ("C", "no"), ("D", ".5")]


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "y", "N"])
def test_yaml_1_1_booleans_are_text(word: str) -> None:
    problem = only(f"batching:\n  chunkedPrefill: {word}")
    assert (problem.line, problem.col) == (7, 21)
    assert "boolean" in problem.message
    assert ("true" if word in ("yes", "on", "y") else "false") in problem.hint


@pytest.mark.parametrize(
    ("written", "read"), [("auto", "auto"), ("true", True), ("FALSE", False), ("'auto'", "auto")]
)
def test_a_switch_that_can_be_left_to_the_device(written: str, read: bool | str) -> None:
    model = one(HEAD + f"spec: {{source: 'builtin://tiny', batching: {{asyncScheduling: {written}}}}}\n")
    assert model.spec.batching.async_scheduling == read
    assert type(model.spec.batching.async_scheduling) is type(read)


@pytest.mark.parametrize("word", ["0", "'64'", "many", "1048577", "1.5"])
def test_tokens_that_can_be_left_to_the_device_are_auto_or_a_number(word: str) -> None:
    problem = only(f"batching:\n  maxPrefillTokens: {word}")
    assert "should be 'auto' or a whole number from 1 to 1048576" in problem.message


@pytest.mark.parametrize("word", ["yes", "1", "'true'", "0.5"])
def test_a_switch_is_auto_true_or_false_and_nothing_else(word: str) -> None:
    problem = only(f"batching:\n  asyncScheduling: {word}")
    assert "should be 'auto', true or false" in problem.message


def test_json_is_read_as_the_yaml_it_is() -> None:
    assert (
        one(
            '{"apiVersion": "quire.dev/v1alpha1", "kind": "Model", "metadata": {"name": "m"},'
            ' "spec": {"source": "builtin://tiny", "replicas": 2, "batching": {"chunkedPrefill": false}}}'
        ).spec.replicas
        == 2
    )


def test_anchors_repeat_what_they_stand_for() -> None:
    manifest = load(
        [
            (
                "f",
                HEAD
                + "spec: &s\n  source: builtin://tiny\n---\n"
                + HEAD.replace("m}", "n}")
                + "spec: {source: builtin://tiny, env: &e [{name: A, value: &v x}, {name: B, value: *v}]}\n",
            )
        ]
    )
    assert manifest.problems == []
    second = manifest.resources[1].intent["spec"]
    assert second["env"] == [{"name": "A", "value": "x"}, {"name": "B", "value": "x"}]


def test_resources_say_where_they_stand_and_empty_documents_do_not_count() -> None:
    text = "---\n# nothing\n---\n" + spec("") + "---\n" + spec("").replace("name: m", "name: n")
    first, second = load([("f.yaml", text)]).resources
    assert (first.file, first.line, first.document, str(first.key)) == ("f.yaml", 4, 0, "model/m")
    assert (second.line, second.document, str(second.key)) == (10, 1, "model/n")


# ── mistakes ──────────────────────────────────────────────────────────────────────────────────────────────


def test_row_17_one_run_reports_all_mistakes_of_all_files() -> None:
    first = spec(
        "paralelism: {tensor: 1}\nengine:\n  max_model_len: 3\n  dtype: floot16\nbatching: {}\nbatching: {}"
    )
    second = spec("batching:\n  maxQueueWait: 30").replace("name: m}", "name: n}")
    manifest = load([("bad.yml", first), ("bad2.yml", second)])
    assert [str(p) for p in manifest.problems] == [
        "bad.yml:6:3: error: spec.paralelism: unknown field\n    hint: did you mean 'parallelism'?",
        "bad.yml:8:5: error: spec.engine.max_model_len: unknown field\n"
        "    hint: that is the engine flag spelling; here it is spec.engine.maxModelLen",
        "bad.yml:9:12: error: spec.engine.dtype: should be 'auto', 'float16', 'bfloat16' or 'float32', "
        "not 'floot16'\n"
        "    hint: did you mean 'float16'?",
        "bad.yml:11:3: error: spec.batching: duplicate key (first at line 10)\n    hint: remove one of them",
        "bad2.yml:7:19: error: spec.batching.maxQueueWait: '30' is not a duration\n"
        "    hint: durations need a unit, for example '30s'",
    ]
    assert manifest.resources == []


@pytest.mark.parametrize(
    ("body", "line", "col", "path", "message", "hint"),
    [
        ("replicas: two", 6, 13, "spec.replicas", "should be a whole number, not", "whole number"),
        ("replicas: '2'", 6, 13, "spec.replicas", "should be a whole number, not", "remove the quotes: 2"),
        ("replicas: 2.0", 6, 13, "spec.replicas", "should be a whole number, not", "whole number"),
        ("replicas: -1", 6, 13, "spec.replicas", "should be 0 or more, not -1", "explain"),
        ("replicas: 99999999999999999999", 6, 13, "spec.replicas", "or less, not 9999", "explain"),
        ("replicas:", 6, 3, "spec.replicas", "has no value", "remove the line"),
        ("replicas: ~", 6, 3, "spec.replicas", "has no value", "remove the line"),
        ("replicas: [1]", 6, 13, "spec.replicas", "a single value, not a list", "int"),
        ("engine: fast", 6, 11, "spec.engine", "a mapping of fields, not 'fast'", "maxModelLen"),
        ("servedModelNames: a", 6, 21, "spec.servedModelNames", "a list", "[one, two]"),
        ("servedModelNames: [a b]", 6, 22, "spec.servedModelNames[0]", "form", "letters"),
        ("servedModelNames: [a, a]", 6, 25, "spec.servedModelNames[1]", "twice", "remove"),
        ("engine: {memory: 0.9}", 6, 20, "spec.engine.memory", "percentage", "'90%'"),
        ("engine: {memory: 0%}", 6, 20, "spec.engine.memory", "no memory", "90%"),
        ("engine: {maxModelLen: 0}", 6, 25, "spec.engine.maxModelLen", "'auto' or a whole number", "8192"),
        ("engine: {maxModelLen: true}", 6, 25, "spec.engine.maxModelLen", "'auto' or a whole number", "8192"),
        ("engine: {kvCache: {size: 40GB}}", 6, 28, "spec.engine.kvCache.size", "byte quantity", "'40Gi'"),
        ("engine: {kvCache: {blockSize: 17}}", 6, 33, "spec.engine.kvCache.blockSize", "8, 16 or 32", "8, 16, 32"),
        ("engine: {dtype: bf16}", 6, 19, "spec.engine.dtype", "should be", "did you mean 'bfloat16'?"),
        ("tensor_parallel_size: 2", 6, 3, "spec.tensor_parallel_size", "unknown", "spec.parallelism.tensor"),
        ("--gpu-memory-utilization: 1", 6, 3, "spec.--gpu-memory-utilization", "unknown", "spec.engine.memory"),
        ("maxNumSeqs: 2", 6, 3, "spec.maxNumSeqs", "unknown", "spec.batching.maxNumSeqs"),
        ("Engine: {}", 6, 3, "spec.Engine", "unknown", "did you mean 'engine'?"),
        ("drain_timeout: 3s", 6, 3, "spec.drain_timeout", "unknown", "did you mean 'drainTimeout'?"),
        ("xyzzy: 1", 6, 3, "spec.xyzzy", "unknown", "platform explain model.spec"),
        ("env: {A: b}", 6, 8, "spec.env", "a list, not a mapping", "write [{name: …}], one mapping for each"),
        ("engine: {stepTime: -1ms}", 6, 22, "spec.engine.stepTime", "'-1ms' is not", "cannot be negative"),
        ("batching: {policy: slo}", 6, 22, "spec.batching.policy", "by a declared latency yet", "fcfs, priority"),
        ("env: [{name: 1A, value: x}]", 6, 16, "spec.env[0].name", "form", "digits"),
        ("env: [{name: A}]", 6, 9, "spec.env[0]", "no value", "value: ''"),
        ("env: [{value: A}]", 6, 9, "spec.env[0].name", "is required", "add it"),
        ("env: [{name: QUIRE_X, value: y}]", 6, 16, "spec.env[0].name", "QUIRE_", "only QUIRE_SCHEDULE_TRACE"),
        ("env: [{name: QUIRE_SCHEDULE_TRACE, value: a}]", 6, 45, "spec.env[0].value", "names a file", "absolute"),
        ("env: [{name: A, value: 1}, {name: A, value: 2}]", 6, 30, "spec.env[1]", "twice", "remove"),
        ("revision: main", 6, 3, "spec.revision", "hf://", "remove it"),
        ("drainTimeout: 10", 6, 17, "spec.drainTimeout", "duration", "'10s'"),
        ("batching: {maxNumBatchedTokens: 8}", 6, 35, "spec.batching.maxNumBatchedTokens", "maxNumSeqs", "64"),
        (
            "batching: {chunkedPrefill: false, maxPrefillTokens: 9}",
            6,
            55,
            "spec.batching.maxPrefillTokens",
            "computed whole",
            "chunkedPrefill on",
        ),
        ("batching: {maxNumSeqs: 513}", 6, 26, "spec.batching.maxNumSeqs", "(512) is below", "513"),
        ("rollout: {strategy: RollingUpdate, maxSurge: 0}", 6, 48, "spec.rollout.maxSurge", "never begin", "Auto"),
        ("restartPolicy: {backoffBase: 10m}", 6, 32, "spec.restartPolicy.backoffBase", "longer", "shorter one"),
        ("tokenizer: {chatTemplateFile: ./a.jinja}", 6, 33, "spec.tokenizer.chatTemplateFile", "relative", "path"),
        ("tokenizer: {source: s3://a/b}", 6, 23, "spec.tokenizer.source", "not honoured", "download"),
        ("engine: {device: cpu}\nplacement: {deviceIds: [0]}", 7, 15, "spec.placement.deviceIds", "cpu", "cuda"),
        ("quantization: {groupSize: 32}", 6, 18, "spec.quantization.groupSize", "with method none", "int4"),
        ("quantization: {method: int8, groupSize: 32}", 6, 32, "spec.quantization.groupSize", "each output", ""),
        ("quantization: {activations: int8}", 6, 18, "spec.quantization.activations", "method none", "int8"),
        (
            "quantization: {activations: bf16}\nengine: {device: cpu}",
            *(6, 18, "spec.quantization.activations", "method none on a CPU", "int8"),
        ),
        (
            "quantization: {activations: bf16}\nengine: {runner: scripted}",
            *(6, 18, "spec.quantization.activations", "method none", "remove activations"),
        ),
        (
            "quantization: {activations: bf16}\nengine: {dtype: float16}",
            *(6, 31, "spec.quantization.activations", "are float16, by engine.dtype", "activations: auto"),
        ),
        (
            "quantization: {method: int4}\nengine: {runner: scripted}",
            *(6, 26, "spec.quantization.method", "no weights", "runner"),
        ),
        (
            "quantization: {method: int4, activations: bf16}\nengine: {dtype: float32}",
            *(6, 45, "spec.quantization.activations", "are float32, by engine.dtype", "activations: auto"),
        ),
        ("engine: {stepTime: 9ms}", 6, 12, "spec.engine.stepTime", "scripted runner", "runner scripted"),
        ("engine: {runner: scripted, stepTime: 30s}", 6, 40, "spec.engine.stepTime", "stalled", "20ms"),
        ("engine: {runner: scripted, device: cuda}", 6, 38, "spec.engine.device", "no GPU", "cpu"),
        ("engine: {runner: scripted}\nplacement: {deviceIds: [0]}", 7, 15, "spec.placement.deviceIds", "GPU", ""),
        ("status: {}", 6, 3, "spec.status", "unknown", "explain"),
    ],
)  # fmt: skip
def test_mistakes_name_their_place_and_remedy(
    body: str, line: int, col: int, path: str, message: str, hint: str
) -> None:
    problem = only(body)
    assert (problem.line, problem.col, problem.path) == (line, col, path)
    assert message in problem.message
    assert hint in problem.hint


def test_a_prompt_that_cannot_be_split_must_fit_a_step() -> None:
    problem = only("engine: {maxModelLen: 1024}\nbatching: {chunkedPrefill: false}")
    assert (problem.line, problem.path) == (7, "spec.batching.chunkedPrefill")
    one(spec("engine: {maxModelLen: 512}\nbatching: {chunkedPrefill: false}"))


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("meta-llama/Llama-3.1-8B", "did you mean 'hf://meta-llama/Llama-3.1-8B'?"),
        ("/models/llama", "file:///"),
        ("./models", "file:///"),
        ("file://models/llama", "file:///models/llama"),
        ("builtin://huge", "builtin://tiny"),
        ("hf://a/b/c", "hf://organisation/name"),
        ("hf://a/b@v1", "revision: v1"),
        ("https://huggingface.co/a/b", "hf://a/b"),
        ("HF://a/b", "hf://a/b"),
        ("ftp://x", "sources are"),
        ("s3://bucket/x", "download the files"),
        ("oci://registry/x", "download the files"),
    ],
)
def test_bad_sources(source: str, hint: str) -> None:
    [problem] = problems(HEAD + f"spec: {{source: '{source}'}}")
    assert (problem.line, problem.col, problem.path) == (4, 16, "spec.source")
    assert hint in problem.hint


@pytest.mark.parametrize(
    ("auth", "path", "words"),
    [
        ("{}", "spec.sourceAuth", "nothing is given"),
        ("{secretRef: a, env: B}", "spec.sourceAuth", "secretRef and env are given"),
        ("{file: token}", "spec.sourceAuth.file", "relative path"),
        ("{env: not-a-name}", "spec.sourceAuth.env", "does not have the form"),
        ("{secretRef: ../x}", "spec.sourceAuth.secretRef", "does not have the form"),
        ("hf_abc", "spec.sourceAuth", "mapping of fields"),
    ],
)
def test_a_token_is_referred_to_in_one_way(auth: str, path: str, words: str) -> None:
    [problem] = problems(HEAD + f"spec: {{source: 'hf://a/b', sourceAuth: {auth}}}")
    assert problem.path == path
    assert words in problem.message


def test_only_a_hub_needs_a_token() -> None:
    assert not load([("f.yaml", HEAD + "spec: {source: 'hf://a/b', sourceAuth: {secretRef: hf-token}}")]).problems
    [problem] = problems(HEAD + "spec: {source: 'builtin://tiny', sourceAuth: {secretRef: hf-token}}")
    assert "only an hf:// source" in problem.message


@pytest.mark.parametrize(
    "body",
    [
        "trustRemoteCode: true",
        "engine: {device: cpu, kvCache: {dtype: fp8}}",
        "engine: {kvCache: {swapSpace: 8Gi}}",
        "engine: {extraArgs: [--fast]}",
        "parallelism: {tensor: 2}",
        "parallelism: {pipeline: 2}",
        "parallelism: {data: 2}",
        "parallelism: {expert: true}",
        "quantization: {method: awq}",
        "quantization: {method: gptq}",
        "quantization: {method: fp8}\nengine: {device: cpu}",
        "quantization: {method: fp8, activations: int8}",
        "quantization: {method: int8, activations: fp8}",
        "quantization: {method: int4, groupSize: 48}",
        "quantization: {method: int4, activations: int8}\nengine: {device: cuda}",
        "batching: {policy: slo}",
        "batching: {slo: {ttftP95: 500ms}}",
        "speculative: {method: ngram}",
        "lora: {adapters: [{name: a, source: 'hf://o/a'}]}",
        "lora: {adapters: [{name: a, source: 'file:///a'}]}\nengine: {device: cuda}",
        "lora: {maxLoaded: 1, adapters: [{name: a, source: 'file:///a'}, {name: b, source: 'file:///b'}]}",
        "determinism: batchInvariant\nengine: {device: cuda}",
        "resources: {accelerator: {type: nvidia-h100}}",
        "resources: {accelerator: {countPerReplica: 2}}",
        "placement: {backend: ray}",
        "probes: {readiness: {period: 1s}}",
        "probes: {liveness: {period: 5s}}",
        "env: [{name: A, valueFrom: {secretRef: t}}]",
    ],
)
def test_what_is_not_honoured_is_refused_by_name(body: str) -> None:
    problem = only(body)
    assert problem.message.startswith("not honoured by this version: ")
    assert problem.path.startswith("spec.")
    assert problem.line == 6


@pytest.mark.parametrize(
    "body",
    [
        "trustRemoteCode: false",
        "parsers: {tools: hermes, reasoning: think}",
        "parsers: {tools: none, reasoning: harmony}",
        "parsers: {tools: harmony}",
        "engine: {kvCache: {dtype: bfloat16, swapSpace: 0Gi}, extraArgs: [], runner: model}",
        "parallelism: {tensor: 1, pipeline: 1, data: 1, expert: false}",
        "quantization: {method: none, format: auto, activations: auto}",
        "quantization: {activations: bf16}",
        "quantization: {method: none, activations: fp8}\nengine: {device: cuda}",
        "quantization: {method: int8, activations: int8}",
        "quantization: {method: int8, activations: bf16}\nengine: {device: cpu, dtype: bfloat16}",
        "quantization: {method: int4, groupSize: 128, activations: bf16}",
        "batching: {prefixCaching: false, policy: priority}",
        "placement: {backend: local}",
        "resources: {accelerator: {type: any, countPerReplica: 1}}",
        "rollout: {strategy: Recreate, autoRollback: false}",
        "rollout: {autoRollback: true}\nrestartPolicy: {maxRestartsBeforeRollback: 1}",
        "residency: always\ndeterminism: none",
        "residency: onDemand\nreplicas: 2",
        "determinism: batchInvariant",
        "determinism: batchInvariant\nengine: {device: cpu, kvCache: {dtype: int8}}",
        "engine: {device: cuda, kvCache: {dtype: fp8}}",
    ],
)
def test_declaring_what_happens_anyway_is_fine(body: str) -> None:
    one(spec(body))


@pytest.mark.parametrize(
    ("parsers", "path", "words"),
    [
        ("{tools: hermse}", "spec.parsers.tools", "not 'hermse'"),
        ("{reasoning: hermes}", "spec.parsers.reasoning", "or 'harmony'"),
        ("{tools: hermes, reasoning: harmony}", "spec.parsers", "exclude each other"),
        ("{tools: harmony, reasoning: none}", "spec.parsers", "exclude each other"),
    ],
)
def test_dialects_are_chosen_by_their_names(parsers: str, path: str, words: str) -> None:
    problem = only(f"parsers: {parsers}")
    assert problem.path == path
    assert words in problem.message


def test_a_context_has_room_for_a_prompt_and_an_answer() -> None:
    (problem,) = load([("f.yaml", spec("engine: {maxModelLen: 1}"))]).problems
    assert problem.path == "spec.engine.maxModelLen"
    assert not load([("f.yaml", spec("engine: {maxModelLen: 2}"))]).problems


def test_bounds_themselves_are_inside() -> None:
    one(spec("batching: {maxNumSeqs: 512, maxNumBatchedTokens: 512}"))
    one(spec("restartPolicy: {backoffBase: 5m, backoffMax: 5m}"))
    one(spec("rollout: {strategy: Auto, maxSurge: 0, maxUnavailable: 0}"))
    one(spec("replicas: 0\nengine: {memory: 100%}"))


@pytest.mark.parametrize("share", ["0%", "0.0%"])
def test_a_share_of_nothing_is_no_target(share: str) -> None:
    problem = only(f"autoscaling: {{maxReplicas: 2, target: {{kvCacheUsage: {share}}}}}")
    assert problem.path == "spec.autoscaling.target.kvCacheUsage"
    assert "0% would call for replicas without end" in problem.message


def test_a_typo_does_not_hide_contradictions() -> None:
    found = problems(spec("engin: {}\nreplicas: 1\nautoscaling: {maxReplicas: 1}\nbatching: {maxNumSeqs: 600}"))
    assert [(p.line, p.path) for p in found] == [
        (6, "spec.engin"),
        (8, "spec.autoscaling"),
        (9, "spec.batching.maxNumSeqs"),
    ]


def test_rules_do_not_guess_about_values_that_did_not_parse() -> None:
    problem = only("batching: {maxNumSeqs: x, maxNumBatchedTokens: 1}")
    assert problem.path == "spec.batching.maxNumSeqs"


@pytest.mark.parametrize(
    ("text", "line", "col", "path", "message", "hint"),
    [
        (GOOD.partition("\n")[2], 1, 1, "apiVersion", "required", "add"),
        (HEAD.replace("v1alpha1", "v0"), 1, 13, "apiVersion", "not known", "quire.dev/v1alpha1"),
        (HEAD.replace("v1alpha1", "v2"), 1, 13, "apiVersion", "newer than this version of Quire (", "upgrade"),
        (HEAD.replace("kind: Model\n", ""), 1, 1, "kind", "required", "Model"),
        (HEAD.replace("Model", "Modle"), 2, 7, "kind", "not a kind", "did you mean 'Model'?"),
        (HEAD.replace("Model", "Replica"), 2, 7, "kind", "not a kind", "written by the platform"),
        (HEAD, 1, 1, "spec", "required", "add"),
        (GOOD.replace("m}", "Llama_70B}"), 3, 18, "metadata.name", "form", "llama-70b"),
        (GOOD + "status: {}", 5, 1, "status", "unknown", "written by the platform"),
        (GOOD + "<<: {}", 5, 1, "", "merge keys", "spell"),
        (GOOD + "[a]: {}", 5, 1, "", "word", "remove"),
        ("- 1", 1, 1, "", "mapping", "apiVersion"),
        ("just text", 1, 1, "", "mapping", "apiVersion"),
        ("a:\n\tb: 1", 2, 1, "", "tab in the indentation", "spaces"),
        ("a: [1,\n\t2]", 2, 1, "", "tab in the indentation", "spaces"),
        ("a: !!python/object:os.system x", 1, 4, "", "tags", "remove the tag"),
        ("a: !!str x", 1, 4, "", "tags", "remove the tag"),
        ("a: &x [*x]", 1, 8, "", "alias", "anchor"),
        ("a: {b: 1\nc: 2", 2, 2, "", "not YAML", "bracket"),
        ("a: 'x", 1, 6, "", "not YAML", "quote"),
        ("a: b: c", 1, 5, "", "not YAML", "quotes"),
        ("a: \x00", 1, 4, "", "U+0000", "UTF-8"),
        ("a: \ud800", 1, 4, "", "U+D800", "UTF-8"),
        ("%YAML 1.1\n---\na: 1", 1, 1, "", "YAML 1.2", "%YAML"),
        ("a: " + "[" * 70 + "]" * 70, 1, 67, "", "64 levels", "needs"),
        ("---\na: 1\n" * 257, 513, 1, "", "256 documents", "split"),
        ("#" * (1 << 20) + "#", 1, 1, "", "1 MiB", "split"),
    ],
)  # fmt: skip
def test_broken_documents(text: str, line: int, col: int, path: str, message: str, hint: str) -> None:
    found = problems(text)
    matching = [p for p in found if message in p.message and hint in p.hint]
    assert matching, found
    assert (matching[0].line, matching[0].col, matching[0].path) == (line, col, path)


def test_documents_before_a_syntax_error_are_still_checked() -> None:
    found = problems(spec("replicas: x") + "---\na: [")
    assert [p.line for p in found] == [6, 8]  # an open bracket shows at the end of the text


def test_a_bomb_of_aliases_is_counted_and_not_expanded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    started = time.perf_counter()
    [problem] = problems("\n".join(lines))
    assert "100,000 values" in problem.message
    assert time.perf_counter() - started < min(effort.bound(0.05), 1)
    assert problem.line == 6


@pytest.mark.parametrize("hostile", ["[" * 1_000_000, "{a: " * 250_000, "[],\n" * 200_000, "? " * 500_000])
def test_hostile_nesting_and_counts_end_soon(hostile: str) -> None:
    started = time.perf_counter()
    problems(hostile)
    assert time.perf_counter() - started < 5


def test_thousands_of_mistakes_are_cut_off() -> None:
    started = time.perf_counter()
    found = load([("f", HEAD + "spec:\n" + "".join(f"  unknownField{n}: 1\n" for n in range(20_000)))]).problems
    assert len(found) == MAX_PROBLEMS + 1
    assert "more problems" in found[-1].message
    assert time.perf_counter() - started < 5


def test_a_wrong_version_does_not_hide_what_else_is_wrong() -> None:
    text = spec("paralelism: {}\nreplicas: two\nxyzzy: 1")
    for version, hint in (("v1beta1", "a newer version may have it"), ("v0", "see: platform explain")):
        found = problems(text.replace("v1alpha1", version))
        assert [(p.line, p.path) for p in found] == [
            (1, "apiVersion"),
            (6, "spec.paralelism"),
            (7, "spec.replicas"),
            (8, "spec.xyzzy"),
        ]
        assert hint in found[3].hint
        assert "did you mean 'parallelism'" in found[1].hint
    [version_problem, kind] = problems(HEAD.replace("v1alpha1", "v1").replace("Model", "Fleet"))
    assert (kind.path, "newer version may have it" in kind.hint) == ("kind", True)
    assert "upgrade Quire" in version_problem.hint


@pytest.mark.parametrize(
    ("version", "newer"),
    [
        ("v1alpha1", False),
        ("v1alpha2", True),
        ("v1beta1", True),
        ("v1", True),
        ("v2alpha1", True),
        ("v0", False),
        ("v1alpha", False),
        ("v99999999999999999999", False),
    ],
)
def test_versions_are_ordered_as_they_come_out(version: str, newer: bool) -> None:
    assert is_newer(f"quire.dev/{version}") is newer
    assert not is_newer(f"other.dev/{version}")


ERRORS_OF = {
    "model": {"model_type"},
    "model-fields": {"missing", "extra_forbidden"},
    "model-field": set(),
    "literal": {"literal_error"},
    "str": {"string_type", "string_unicode"},
    "str.min_length": {"string_too_short"},
    "str.max_length": {"string_too_long"},
    "str.pattern": {"string_pattern_mismatch"},
    "int": {"int_type", "int_from_float", "int_parsing_size", "finite_number"},
    "int.ge": {"greater_than_equal"},
    "int.le": {"less_than_equal"},
    "bool": {"bool_type"},
    "tuple": {"tuple_type"},
    "dict": {"dict_type"},
    "tuple.min_length": {"too_short"},
    "tuple.max_length": {"too_long"},
    "dict.min_length": {"too_short"},
    "dict.max_length": {"too_long"},
    "function-before": {"value_error"},
    "function-after": {"value_error"},
    "no-info": set(),
    "default": set(),
    "nullable": set(),
    "union": set(),
}
"""What each kind of Pydantic's core schema, and each bound on one, can find wrong with plain YAML values in strict
mode. A union reports what its members find."""
BOUNDS = {"gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern", "allow_inf_nan"}


def core_schemas(value: Any) -> Iterator[dict[str, Any]]:
    """Every core schema inside a core schema."""
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value
        for name, inner in value.items():
            if not (name == "metadata" and "type" in value):  # Pydantic's own notes; a field may have that name
                yield from core_schemas(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from core_schemas(inner)


def test_every_error_that_pydantic_can_find_in_a_manifest_has_words_of_ours() -> None:
    found: set[str] = set()
    for kind in KINDS.values():
        for schema in core_schemas(kind.__pydantic_core_schema__):
            for name in [schema["type"], *(f"{schema['type']}.{bound}" for bound in BOUNDS & schema.keys())]:
                assert name in ERRORS_OF, f"{name}: which errors does it find? They need words in ERROR_WORDS"
                found |= ERRORS_OF[name]
    assert found == set(ERROR_WORDS)


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFhC"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        *((f"url: '{url}'", "spec.url") for url in (
            "file:///srv/r.git", "/srv/r.git", "git@example.org:r.git", "ssh://example.org/r.git", "ext::sh -c x",
            "http://example.org/r.git", "https://u:p@example.org/r.git", "https://example.org/r.git?x", "https://",
            "git://127.0.0.1/r.git", "https://example.org/r git", "https://example.org:0/r.git", "-u https://x",
        )),
        ("url: 'https://x.org/r', ref: {branch: a, tag: b}", "spec.ref"),
        ("url: 'https://x.org/r', ref: {branch: --upload-pack=x}", "spec.ref.branch"),
        ("url: 'https://x.org/r', ref: {branch: 'a..b'}", "spec.ref.branch"),
        ("url: 'https://x.org/r', ref: {tag: 'v*'}", "spec.ref.tag"),
        ("url: 'https://x.org/r', ref: {commit: abc}", "spec.ref.commit"),
        ("url: 'https://x.org/r', ref: {semver: '>1'}", "spec.ref.semver"),
        ("url: 'https://x.org/r', path: ../a", "spec.path"),
        ("url: 'https://x.org/r', path: /a", "spec.path"),
        ("url: 'https://x.org/r', interval: 500ms", "spec.interval"),
        ("url: 'https://x.org/r', verify: {signedBy: [0xABCD]}", "spec.verify.signedBy[0]"),
        ("url: 'https://x.org/r', sync: {retryInterval: 0s}", "spec.sync.retryInterval"),
        *((f"url: 'https://x.org/r', sync: {{windows: [{{kind: Deny, {text}}}]}}", f"spec.sync.windows[0].{name}")
          for text, name in (
            ("schedule: '0 18 * *', duration: 1h", "schedule"),
            ("schedule: '0 24 * * *', duration: 1h", "schedule"),
            ("schedule: '0 0 30 2 *', duration: 1h", "schedule"),
            ("schedule: '0 0 31 4,6,9,11 */2', duration: 1h", "schedule"),
            ("schedule: '0 18 * * 5', duration: 8d", "duration"),
            ("schedule: '0 18 * * 5', duration: 1h, timeZone: Mars/Base", "timeZone"),
        )),
    ],
)  # fmt: skip
def test_a_git_source_that_leads_nowhere_is_refused_where_it_is_written(spec: str, path: str) -> None:
    head = "apiVersion: quire.dev/v1alpha1\nkind: GitSource\nmetadata: {name: r}\n"
    assert [p.path for p in problems(f"{head}spec: {{{spec}}}")] == [path]


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("url: 'https://x.org/r', ref: {tag: v1 2}", "for example v1.2"),
        ("url: 'git@github.com:a/b.git'", "https://github.com/a/b.git, with a token"),
        ("url: 'ssh://git@x.org:22/a/b'", "https://x.org/a/b, with a token"),
        ("url: 'git://x.org/a'", "https://x.org/a, with a token"),
        (
            "url: 'https://x.org/r', sync: {windows: [{kind: Deny, schedule: '* * *', duration: 1h}]}",
            "minute, hour,",
        ),
        ("url: 'https://x.org/r', sync: {windows: [{kind: Deny, schedule: '', duration: 1h}]}", "cannot be empty"),
    ],
)
def test_the_hint_of_a_git_source_is_about_what_is_wrong(spec: str, hint: str) -> None:
    [problem] = problems(
        f"apiVersion: quire.dev/v1alpha1\nkind: GitSource\nmetadata: {{name: r}}\nspec: {{{spec}}}"
    )
    assert hint in problem.hint


def test_a_git_source_may_have_all_of_it() -> None:
    head = "apiVersion: quire.dev/v1alpha1\nkind: GitSource\nmetadata: {name: r}\n"
    for spec in (
        "url: 'https://example.org/a/b.git'",
        "url: 'http://127.0.0.1:8080/b', ref: {branch: release/1.2}, path: ./clusters/prod, interval: 5s",
        f"url: 'http://localhost/b', ref: {{tag: v1.2}}, verify: {{signedBy: ['{KEY}', '{KEY} me@home']}}",
        f"url: 'http://[::1]/b', ref: {{commit: {'0a' * 20}}}, auth: {{secretRef: token}}",
        *(
            f"url: 'https://x.org/r', sync: {{windows: [{{kind: Allow, schedule: '{schedule}', duration: 8h}}]}}"
            for schedule in ("*/5 1-5,9 * * 1-5", "0 0 29 2 *", "0 0 30 2,3 *", "0 0 30 2 1")
        ),
    ):
        assert load([("g", f"{head}spec: {{{spec}}}")]).problems == []


def test_an_address_that_others_reach_is_to_be_encrypted() -> None:
    head = "apiVersion: quire.dev/v1alpha1\nkind: Gateway\nmetadata: {name: default}\n"
    assert load([("g", head + "spec: {bind: '::1', port: 0}")]).problems == []
    assert load([("g", head)]).problems == []
    for address in ("0.0.0.0", "192.168.0.1", "::", "example.org"):
        [problem] = problems(head + f"spec: {{bind: '{address}'}}")
        assert problem.path == "spec.bind"
    tls = "tls: {certFile: /c.pem, keyFile: /k.pem}"
    for more in ("insecurePlaintext: true", tls):
        assert load([("g", head + f"spec: {{bind: 0.0.0.0, {more}}}")]).problems == []
    [problem] = problems(head + f"spec: {{bind: example.org, {tls}}}")
    assert problem.path == "spec.bind"
    [problem] = problems(head + "spec: {hosts: [llm.example.org, 'x:80']}")
    assert problem.path == "spec.hosts[1]"
    [problem] = problems(head.replace("default", "mine"))
    assert problem.path == "metadata.name"


ZERO = "'sha256:" + "0" * 64 + "'"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("{keys: [{name: a}]}", "spec.keys[0]"),
        (f"{{keys: [{{name: a, hash: {ZERO}, valueFrom: {{env: A}}}}]}}", "spec.keys[0]"),
        ("{keys: [{name: a, hash: 'sha256:00'}]}", "spec.keys[0].hash"),
        ("{keys: [{name: a, hash: qk_abc}]}", "spec.keys[0].hash"),
        ("{keys: [{name: a, valueFrom: {}}]}", "spec.keys[0].valueFrom"),
        ("{keys: [{name: a, valueFrom: {env: A, file: /a}}]}", "spec.keys[0].valueFrom"),
        ("{keys: [{name: a, valueFrom: {file: a}}]}", "spec.keys[0].valueFrom.file"),
        ("{keys: [{name: a, valueFrom: {env: A}}, {name: a, valueFrom: {env: B}}]}", "spec.keys[1]"),
        (f"{{keys: [{{name: a, hash: {ZERO}}}, {{name: b, hash: {ZERO}}}]}}", "spec.keys[1]"),
        ("{keys: [], allow: {operations: [rerank]}}", "spec.allow.operations[0]"),
        ("{keys: [], limits: [{}]}", "spec.limits[0]"),
        ("{keys: [], limits: [{requests: 1}]}", "spec.limits[0]"),
        ("{keys: [], limits: [{requests: 1, tokens: 1, per: 1m}]}", "spec.limits[0]"),
        ("{keys: [], limits: [{concurrency: 1, per: 1m}]}", "spec.limits[0].per"),
        ("{keys: [], limits: [{tokens: 1, per: 1ms}]}", "spec.limits[0].per"),
        ("{keys: [], limits: [{tokens: 0, per: 1m}]}", "spec.limits[0].tokens"),
        ("{keys: [], budgets: [{name: b, per: day}]}", "spec.budgets[0]"),
        ("{keys: [], budgets: [{name: b, per: day, tokens: 1, cost: '1'}]}", "spec.budgets[0]"),
        (
            "{keys: [], budgets: [{name: b, per: day, tokens: 1}, {name: b, per: week, tokens: 1}]}",
            "spec.budgets[1]",
        ),
        ("{keys: [], budgets: [{name: b, per: day, tokens: 0}]}", "spec.budgets[0].tokens"),
        ("{keys: [], budgets: [{name: b, per: year, tokens: 1}]}", "spec.budgets[0].per"),
        ("{keys: [], budgets: [{name: b, per: 90m, tokens: 1}]}", "spec.budgets[0].per"),
        ("{keys: [], budgets: [{name: b, per: 32d, tokens: 1}]}", "spec.budgets[0].per"),
        ("{keys: [], budgets: [{name: b, per: 5, tokens: 1}]}", "spec.budgets[0].per"),
        ("{keys: [], budgets: [{name: b, per: day, cost: 1e3}]}", "spec.budgets[0].cost"),
        ("{keys: [], budgets: [{name: b, per: day, cost: '0.00001'}]}", "spec.budgets[0].cost"),
        ("{keys: [], budgets: [{name: b, per: day, cost: '0.00'}]}", "spec.budgets[0].cost"),
        ("{keys: [], budgets: [{name: b, per: day, cost: '-1'}]}", "spec.budgets[0].cost"),
        ("{keys: [], budgets: [{name: b, per: day, cost: '1', cached: free}]}", "spec.budgets[0].cached"),
        ("{keys: [], budgets: [{name: b, per: day, cost: '1', counts: prompt}]}", "spec.budgets[0].counts"),
        (
            "{keys: [], budgets: [{name: b, per: day, tokens: 1, counts: completion, cached: free}]}",
            "spec.budgets[0].cached",
        ),
        ("{keys: [], budgets: [{name: b, per: day, tokens: 1, warnAt: 0%}]}", "spec.budgets[0].warnAt"),
        ("{keys: [], expiresAt: '2027-13-01T00:00:00Z'}", "spec.expiresAt"),
        ("{keys: [], expiresAt: tomorrow}", "spec.expiresAt"),
        ("{keys: [], allow: {models: ['*']}}", "spec.allow.models[0]"),
        ("{keys: [], allow: {models: [chat, t*]}}", "spec.allow.models[1]"),
    ],
)
def test_what_an_access_policy_must_not_say(spec: str, path: str) -> None:
    head = "apiVersion: quire.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: p}\nspec: "
    [problem] = problems(head + spec)
    assert problem.path == path
    assert problem.hint


def test_what_is_refused_of_keys_is_never_shown() -> None:
    ours, brought = new_key(), "a-string-of-the-Users-own"
    head = "apiVersion: quire.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: %s}\nspec:\n  keys:\n"
    forms = ("{name: a, hash: %s}", "%s", "{name: %s, valueFrom: {env: K}}", "{name: b, valueFrom: %s}",
        "{name: c, valueFrom: {secretRef: %s}}", "{name: d, %s: x}", "{name: e, key: %s}", "[%s]")  # fmt: skip
    for key in (ours, ours[:40], brought):
        found = problems(head % "p" + "".join(f"    - {form % key}\n" for form in forms))
        assert {index for p in found for index in range(8) if f"keys[{index}]" in p.path} == set(range(8))
        assert brought.lower() not in str(found).lower()
        assert ours[17:40] not in str(found)
        assert ("that is the key itself" in found[0].hint) == (key != brought)
        assert "hash" in found[0].hint
    [named] = problems(head % "p" + f"    - {{name: a, valueFrom: {{env: {ours}}}}}\n")
    assert named.path == "spec.keys[0].valueFrom.env"
    assert "is the key itself" in named.message
    for path in ("name", "uid"):
        misplaced = problems((head % ours + "    []\n").replace("name", path))
        assert misplaced
        assert ours[17:30] not in str(misplaced)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("prices: {input: 1e3}", "spec.prices.input"),
        ("prices: {output: '1,5'}", "spec.prices.output"),
        ("prices: {output: '20000000'}", "spec.prices.output"),
        ("probes: {breaker: {openFor: 0s}}", "spec.probes.breaker.openFor"),
        ("probes: {breaker: {openFor: 10s, maxOpenFor: 5s}}", "spec.probes.breaker.maxOpenFor"),
        ("probes: {breaker: {openFor: 10m}}", "spec.probes.breaker.openFor"),
        ("probes: {breaker: {errorShare: 0%}}", "spec.probes.breaker.errorShare"),
        ("probes: {breaker: {window: 0s}}", "spec.probes.breaker.window"),
        ("probes: {breaker: {consecutiveFailures: 0}}", "spec.probes.breaker.consecutiveFailures"),
    ],
)
def test_what_prices_and_breakers_must_not_be(text: str, path: str) -> None:
    [problem] = problems(spec(text))
    assert problem.path == path
    assert problem.hint


def test_an_adoption_window_is_a_second_at_least() -> None:
    head = "apiVersion: quire.dev/v1alpha1\nkind: Gateway\nmetadata: {name: default}\n"
    for window in ("1s", "2m", "1h30m"):
        assert load([("g", head + f"spec: {{adoptionWindow: {window}}}")]).problems == []
    for window in ("999ms", "0s", "120"):
        [problem] = problems(head + f"spec: {{adoptionWindow: {window}}}")
        assert problem.path == "spec.adoptionWindow"
        assert problem.hint


# ── sets ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_object_declared_twice() -> None:
    found = load([("a.yaml", spec("")), ("b.yaml", spec("replicas: 2"))])
    [problem] = found.problems
    assert (problem.file, problem.line, problem.path) == ("b.yaml", 3, "metadata.name")
    assert "model/m is declared twice (first at a.yaml:1)" in problem.message
    assert [r.file for r in found.resources] == ["a.yaml"]


def test_two_models_that_claim_one_name() -> None:
    other = spec("servedModelNames: [x, m]").replace("name: m}", "name: n}")
    [problem] = load([("a.yaml", spec("")), ("b.yaml", other)]).problems
    assert (problem.file, problem.line, problem.col, problem.path) == ("b.yaml", 6, 25, "spec.servedModelNames[1]")
    assert "'m' is declared twice (first at a.yaml:1)" in problem.message


# ── identity ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_intent_hash_sees_content_and_not_layout() -> None:
    one_way = one(spec("replicas: 2\nbatching: {maxNumSeqs: 8}"))
    other_way = one(
        "# a comment\nspec:\n  batching: {'maxNumSeqs': 8}\n  replicas: 0x2\n  source: \"builtin://tiny\"\n"
        "metadata:\n  name: m\nkind: Model\napiVersion: quire.dev/v1alpha1\n"
    )
    assert intent_hash(one_way) == intent_hash(other_way) == intent_hash(one_way.intent())
    assert intent_hash(one(spec("replicas: 3\nbatching: {maxNumSeqs: 8}"))) != intent_hash(one_way)
    # Spelling out a default is another document, even if nothing will change by it.
    assert intent_hash(one(spec("replicas: 1"))) != intent_hash(one(spec("")))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_stored_intents_come_back_as_the_same_resource(path: Path) -> None:
    for located in load_paths([path]).resources:
        again = parse_intent(located.intent)
        assert again == located.resource
        assert again.intent() == located.intent
        assert intent_hash(again) == intent_hash(located.intent)


def test_a_stored_intent_that_is_no_longer_valid_is_reported() -> None:
    intent: dict[str, Any] = one(spec("")).intent()
    intent["spec"]["gone"] = 1
    with pytest.raises(ManifestInvalid, match=r"spec\.gone"):
        parse_intent(intent)
    with pytest.raises(ManifestInvalid, match="unknown kind"):
        parse_intent({"kind": "Nothing"})


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_of_everything_is_named_soon_and_hidden_ones_are_not_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    for number in range(9):
        (tmp_path / ".git" / f"{number}.yaml").write_text("")
    (tmp_path / "a.yaml").write_text("")
    monkeypatch.setattr(manifest_files, "MAX_ENTRIES", 3)
    assert load_paths([str(tmp_path)]).problems == []
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("")
    (problem,) = load_paths([str(tmp_path)]).problems
    assert (problem.file, problem.message) == (str(tmp_path), "there are more than 3 files in it and below")
    assert problem.hint == "name the manifests, or a folder that holds only them"


def test_folders_are_read_in_order_and_all_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.yml").write_text(spec("").replace("name: m", "name: two"))
    (tmp_path / "a.yaml").write_text("\ufeff" + spec(""), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not a manifest")
    assert [name for name, _ in read_paths([tmp_path])] == [
        str(tmp_path / "a.yaml"),
        str(tmp_path / "b" / "two.yml"),
    ]
    assert load_paths([str(tmp_path)]).problems == []

    (tmp_path / "c.yaml").write_bytes(b"# fine\nname: caf\xe9\n")
    (tmp_path / "d.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    (tmp_path / "e.yaml").write_text("a: ]")
    (tmp_path / "empty").mkdir()
    manifest = load_paths([tmp_path, tmp_path / "missing.yaml", tmp_path / "empty"])
    places = {(Path(p.file).name, p.line, p.col) for p in manifest.problems}
    assert places == {
        ("c.yaml", 2, 10),
        ("d.yaml", 1, 1),
        ("e.yaml", 1, 4),
        ("missing.yaml", 1, 1),
        ("empty", 1, 1),
    }
    with pytest.raises(ManifestInvalid) as caught:
        read_paths([tmp_path, tmp_path / "missing.yaml"])
    assert len(caught.value.problems) == 3
    assert "missing.yaml:1:1: error: cannot be read: No such file" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_files_without_permission_are_problems(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x")
    (tmp_path / "a.yaml").chmod(0)
    assert "cannot be read" in load_paths([tmp_path]).problems[0].message


# ── anything ──────────────────────────────────────────────────────────────────────────────────────────────

TOKENS = "null ~ true no [] {} *a &a !x | > - : << ' \" { ] -1 1e999 .nan 0x % # ? --- ... é ,"
WORDS = st.sampled_from([*TOKENS.split(), "- ", ": ", "\t", "9" * 70, "\x00", "\u2028", "\ud800"])


def _sound(manifest: Manifest, texts: list[tuple[str, str]]) -> None:
    lines = {name: text.count("\n") + text.count("\r") + 2 + text.count("\u2028") for name, text in texts}
    for problem in manifest.problems:
        assert 1 <= problem.line <= lines[problem.file]
        assert problem.col >= 1
        assert problem.message
        assert str(problem).startswith(f"{problem.file}:{problem.line}:{problem.col}: error: ")
    for located in manifest.resources:
        assert parse_intent(located.intent) == located.resource


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_manifests_give_problems_and_never_raise(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([path.read_text() for path in EXAMPLES]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 20)))
        text = text[:start] + data.draw(st.one_of(WORDS, st.text(max_size=5), st.just(""))) + text[end:]
    texts = [("f.yaml", text)]
    _sound(load(texts), texts)


JUNK: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted(fields_of(ModelSpec).keys() - {"source"}))


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(FIELDS, JUNK, min_size=1, max_size=4))
def test_any_value_in_any_field_is_taken_or_refused(fields: dict[str, Any]) -> None:
    document = {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": "m"},
        "spec": {"source": "builtin://tiny", **fields},
    }
    texts = [("f.json", json.dumps(document))]
    manifest = load(texts)
    _sound(manifest, texts)
    assert len(manifest.resources) + bool(manifest.problems) == 1


@pytest.mark.parametrize(
    ("metadata", "spec", "path"),
    [
        ("{name: 1.5}", "", "metadata.name"),
        ("{name: true}", "", "metadata.name"),
        ("{name: m}", ", servedModelNames: [m, 1.5]", "spec.servedModelNames[1]"),
        ("{name: m}", ", servedModelNames: [true]", "spec.servedModelNames[0]"),
    ],
)
def test_a_name_that_yaml_reads_as_a_boolean_or_a_fraction_needs_quotes(
    metadata: str, spec: str, path: str
) -> None:
    head = "apiVersion: quire.dev/v1alpha1\nkind: Model\n"
    text = f"{head}metadata: {metadata}\nspec: {{source: 'builtin://tiny'{spec}}}\n"
    (problem,) = load([("m.yaml", text)]).problems
    assert problem.path == path
    assert "put it in quotes" in problem.hint
    quoted = text.replace("1.5", "'1.5'").replace("true", "'true'")
    assert not load([("m.yaml", quoted)]).problems


def test_a_name_or_revision_of_digits_is_text() -> None:
    text = (
        "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: 70}\n"
        "spec: {source: 'hf://a/b', revision: 1234567, servedModelNames: [70]}\n"
    )
    assert not load([("m.yaml", text)]).problems


@pytest.mark.parametrize(
    ("body", "path", "said"),
    [
        ("rollout: {strategy: Canary}", "spec.rollout.strategy", "needs steps"),
        ("rollout: {strategy: Canary, canary: {steps: []}}", "spec.rollout.canary", "needs steps"),
        (
            "rollout: {strategy: Canary, canary: {steps: [{weight: 30}, {weight: 30, hold: 1m}]}}",
            "spec.rollout.canary.steps[1].weight",
            "30 comes after 30",
        ),
        ("rollout: {canary: {steps: [{weight: 30}]}}", "spec.rollout.canary", "has no effect"),
        (
            "rollout: {strategy: Canary, canary: {steps: [{weight: 30}], analysis: {smokePrompts: "
            "[{prompt: a, expectContains: b}, {prompt: c}]}}}",
            "spec.rollout.canary.analysis.smokePrompts[1]",
            "asks for nothing",
        ),
    ],
)
def test_a_canary_has_steps_that_rise_and_prompts_that_count(body: str, path: str, said: str) -> None:
    problem = only(body)
    assert problem.path == path
    assert said in problem.message


def test_a_prompt_that_expects_nothing_is_asked_for_drift() -> None:
    analysis = "{maxDrift: 5%, smokePrompts: [{prompt: c}]}"
    canary = f"{{steps: [{{weight: 30}}], analysis: {analysis}}}"
    asked = one(spec(f"rollout: {{strategy: Canary, canary: {canary}}}")).spec.rollout.canary
    assert asked is not None
    assert asked.analysis.smoke_prompts[0].expect_contains is None


def test_fields_are_held_against_each_other_beside_what_is_wrong_with_others() -> None:
    text = spec(
        "rollout: {strategy: Canary, canary: {steps: [{weight: 50}, {weight: 25}, {weight: x}, {weight: 20}],\n"
        "  analysis: {maxErrorRate: '1.5', smokePrompts: [{prompt: a}, {prompt: [7]}]}}}\n"
        "autoscaling: {minReplicas: 1, maxReplicas: x, idleTimeout: 5m}\n"
        "probes: {breaker: {openFor: x, errorShare: 0%}, startup: {timeout: x}, liveness: {timeout: 0s}}"
    )
    assert {p.path.removeprefix("spec.") for p in load([("m.yaml", text)]).problems} == {
        "rollout.canary.steps[1].weight",
        "rollout.canary.steps[2].weight",
        "rollout.canary.steps[3].weight",
        "rollout.canary.analysis.maxErrorRate",
        "rollout.canary.analysis.smokePrompts[0]",
        "rollout.canary.analysis.smokePrompts[1].prompt",
        "autoscaling.maxReplicas",
        "autoscaling.idleTimeout",
        "probes.breaker.openFor",
        "probes.breaker.errorShare",
        "probes.startup.timeout",
        "probes.liveness.timeout",
    }
    head = "apiVersion: quire.dev/v1alpha1\nkind: GitSource\nmetadata: {name: r}\n"
    window = "{kind: Sometimes, schedule: '0 0 31 2 *', duration: x, timeZone: Mars}"
    text = f"{head}spec: {{url: 'https://x.org/r', interval: x, sync: {{retryInterval: 0s, windows: [{window}]}}}}"
    assert {p.path.removeprefix("spec.") for p in problems(text)} == {
        "interval",
        "sync.retryInterval",
        *(f"sync.windows[0].{name}" for name in ("kind", "schedule", "duration", "timeZone")),
    }


def test_what_is_wrong_in_lists_comes_in_one_run() -> None:
    """A bad entry hides neither those behind it nor what two others have in common."""
    text = (
        "apiVersion: quire.dev/v1alpha1\nkind: Route\nmetadata: {name: r}\nspec:\n"
        "  match: {modelNames: [a, {x: 1}, ' ', a], headers: [5, {name: x}, {name: X, exact: y},\n"
        "    {name: 'a b', exact: zürich 1}, {name: c, exact: \"y\\nz\"}, {name: d, exact: ' y'}]}\n"
        "  timeouts: {firstToken: soon, request: 0s}\n"
        "  backends: [b, {model: m}, {model: m, weight: -1}, {model: N}]\n"
        "  fallbacks: [{model: c}, {model: D, when: [Timeout, Timeout]}]\n"
    )
    assert {p.path for p in load([("m.yaml", text)]).problems} == {
        "spec.match.modelNames[1]",
        "spec.match.modelNames[2]",
        "spec.match.modelNames[3]",
        "spec.match.headers[0]",
        "spec.match.headers[1].exact",
        "spec.match.headers[2].name",
        "spec.match.headers[3].name",
        "spec.match.headers[4].exact",
        "spec.match.headers[5].exact",
        "spec.timeouts.firstToken",
        "spec.timeouts.request",
        "spec.backends[0]",
        "spec.backends[2].model",
        "spec.backends[2].weight",
        "spec.backends[3].model",
        "spec.fallbacks[0].when",
        "spec.fallbacks[1].model",
        "spec.fallbacks[1].when[1]",
    }
    text = (
        "apiVersion: quire.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: p}\nspec:\n"
        f"  keys: [7, {{name: A, hash: 'sha256:{'0' * 64}'}}, {{name: b, hash: 'sha256:{'0' * 64}'}},\n"
        "    {name: c}]\n"
        "  budgets: [x, {name: m, tokens: 1, cost: '1', per: day}, {name: m, per: day}]\n"
        "  limits: [{requests: y}, {tokens: 1}]\n"
    )
    assert {p.path for p in load([("m.yaml", text)]).problems} == {
        "spec.keys[0]",
        "spec.keys[1].name",
        "spec.keys[2]",
        "spec.keys[3]",
        "spec.budgets[0]",
        "spec.budgets[1]",
        "spec.budgets[2]",
        "spec.limits[0].requests",
        "spec.limits[1]",
    }


def test_a_name_is_claimed_beside_one_that_is_bad() -> None:
    head = "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: %s}\n"
    one = head % "m" + "spec: {source: 'builtin://tiny', servedModelNames: [' ', shared]}\n"
    other = head % "n" + "spec: {source: 'builtin://tiny', servedModelNames: [shared]}\n"
    found = [p.path for p in load([("m.yaml", f"{one}---\n{other}")]).problems]
    assert found == ["spec.servedModelNames[0]", "spec.servedModelNames[0]"]
