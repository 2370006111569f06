"""What a review says before anything is written: where a refusal lies, and what does not fit together."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire import builtin
from quire.controlplane.wiring import text_problem
from quire_operators.admission import Admission
from quire_operators.cache import HubCache
from quire_operators.devices import Inventory
from quire_operators.review import Review
from quire_operators.rollout import Goal, Row
from quire_operators.sources import Sources
from quire_operators.store import Store
from quire_schemas import manifest

GIB = 1 << 30
MACHINE = Inventory(16 * GIB, 16 * GIB, 4)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "s.db")
    yield store
    store.close()


@pytest.fixture
def admission(store: Store, tmp_path: Path) -> Admission:
    return Admission(
        store,
        Sources({"tiny": builtin.path("tiny")}, HubCache(tmp_path / "hub", tmp_path / "records")),
        lambda: MACHINE,
        text_problem,
    )


def review(admission: Admission, *specs: str) -> list[Review]:
    texts = [
        (
            f"{number}.yaml",
            f"apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {{name: m{number}}}\n"
            f"spec: {{source: 'builtin://tiny', {spec}}}\n",
        )
        for number, spec in enumerate(specs)
    ]
    loaded = manifest.load(texts)
    assert not loaded.problems, loaded.problems
    return admission.review(loaded.resources)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("tokenizer: {source: 'hf://nobody/nothing'}", "spec.tokenizer.source"),
        ("placement: {deviceIds: [0]}", "spec.placement.deviceIds"),
        ("engine: {device: cuda}", "spec.engine.device"),
    ],
)
def test_a_refusal_names_the_field_it_is_about(admission: Admission, spec: str, path: str) -> None:
    (found,) = review(admission, spec)
    assert found.refusal is not None
    assert found.refusal.path == path
    assert found.refusal.hint


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "{}", "tokenizer.json cannot be read (Model missing"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read (EOF while parsing"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json is not a JSON object"),
        ("chat_template.jinja", "{% if %}", "the chat template"),
    ],
)
def test_a_tokenizer_or_template_that_the_router_could_not_load_is_refused(
    admission: Admission, tmp_path: Path, name: str, text: str, said: str
) -> None:
    folder = shutil.copytree(builtin.path("tiny"), tmp_path / "model")
    (folder / name).write_text(text)
    manifests = {
        "spec.source": f"source: 'file://{folder}'",
        "spec.tokenizer.source": f"source: 'builtin://tiny', tokenizer: {{source: 'file://{folder}'}}",
    }
    for path, spec in manifests.items():
        document = f"apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {{name: m}}\nspec: {{{spec}}}\n"
        (found,) = admission.review(manifest.load([("m.yaml", document)]).resources)
        assert found.refusal is not None
        assert (found.refusal.path, found.refusal.reason) == (path, "ModelUnusable")
        assert said in found.refusal.message


def test_models_that_fit_alone_and_not_together_say_so(admission: Admission) -> None:
    half = "engine: {maxModelLen: 256, kvCache: {size: 8Gi}}"
    small = "engine: {maxModelLen: 256, kvCache: {size: 1Gi}}"
    first, second, third = review(admission, half, half, small)
    assert first.notes == third.notes == []
    assert second.notes == ["fits alone; together with model/m0 it will wait as InsufficientMemory"]
    (alone,) = review(admission, half)
    assert alone.notes == []


def test_replicas_that_do_not_fit_beside_others_are_counted(admission: Admission) -> None:
    four = "engine: {maxModelLen: 256, kvCache: {size: 4Gi}}, replicas: 3"
    first, second = review(admission, "engine: {maxModelLen: 256, kvCache: {size: 4Gi}}", four)
    assert first.notes == []
    assert second.notes == [
        "fits alone; together with model/m0 1 of its 3 replicas will wait as InsufficientMemory"
    ]


def test_more_replicas_than_the_machine_could_ever_hold_are_refused_with_the_largest_number(
    admission: Admission,
) -> None:
    four = "engine: {maxModelLen: 256, kvCache: {size: 4Gi}}, replicas: "
    (refused,) = review(admission, four + "500")
    assert refused.refusal is not None
    assert refused.refusal.path == "spec.replicas"
    assert refused.refusal.hint == "at most 3 fit: set spec.replicas to 3 or less"
    (most,) = review(admission, four + "3")
    assert most.refusal is None
    assert most.warnings == []


def test_replicas_that_others_leave_no_room_for_are_warned_of_by_their_holder(
    store: Store, admission: Admission
) -> None:
    store.create_replica(Row("r", "big", 0, 1, "t", Goal.RUN, 0.0, memory=6 * GIB, device="cpu"))
    (found,) = review(admission, "engine: {maxModelLen: 256, kvCache: {size: 4Gi}}, replicas: 3")
    assert found.refusal is None
    assert found.warnings == [
        "1 of 3 replicas fit now: model/big holds 6.0 GiB; the rest waits until there is room"
    ]
    (alone,) = review(admission, "engine: {maxModelLen: 256, kvCache: {size: 4Gi}}")
    assert alone.warnings == []


def test_a_context_above_the_checkpoints_positions_is_said_without_a_word_of_memory(admission: Admission) -> None:
    (found,) = review(admission, "engine: {maxModelLen: 1000000}")
    assert found.refusal is not None
    assert found.refusal.path == "spec.engine.maxModelLen"
    assert found.refusal.message.startswith("1,000,000 is above the checkpoint's ")
    assert "memory" not in found.refusal.message + found.refusal.hint
    assert found.fit is None


def test_an_absurd_cache_is_answered_with_a_size_and_not_with_a_device(admission: Admission) -> None:
    (found,) = review(admission, "engine: {maxModelLen: 256, kvCache: {size: 500Gi}}")
    assert found.refusal is not None
    assert "spec.engine.kvCache.size: " in found.refusal.hint
    assert "device" not in found.refusal.hint


# ── models without weights ────────────────────────────────────────────────────────────────────────────────


def test_a_scripted_model_needs_no_weights_and_no_memory_for_them(admission: Admission, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin.path("tiny") / name, tmp_path)
    text = (
        "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\n"
        f"spec: {{source: 'file://{tmp_path}', engine: {{runner: RUNNER, kvCache: {{size: 1Mi}}}}}}\n"
    )
    loaded = manifest.load([("m.yaml", text.replace("RUNNER", "scripted"))])
    (found,) = admission.review(loaded.resources)
    assert found.refusal is None
    assert found.fit is not None
    assert found.placement is not None
    assert (found.fit.weights, found.fit.activations, found.fit.kv) == (0, 0, 0)
    assert found.placement.memory == found.fit.overhead
    assert any("no weights are loaded" in line for line in found.fit.lines())
    spec = found.placement.engine_spec("m", "m-0", 1, "s", found.resolved, "h", adoption_window=1.0)
    assert spec.runner == "scripted"
    (model,) = admission.review(manifest.load([("m.yaml", text.replace("RUNNER", "model"))]).resources)
    assert model.refusal is not None
    assert "safetensors" in model.refusal.message


def test_a_scripted_model_has_the_blocks_that_the_model_would_have(admission: Admission) -> None:
    size = "kvCache: {size: 64Mi}, maxModelLen: 256"
    scripted, model = review(
        admission, f"engine: {{runner: scripted, stepTime: 250ms, {size}}}", f"engine: {{{size}}}"
    )
    assert scripted.placement is not None
    assert model.placement is not None
    assert scripted.placement.num_blocks == model.placement.num_blocks
    assert scripted.placement.kv_tokens == model.placement.kv_tokens
    assert (scripted.placement.device, scripted.placement.step_time) == ("cpu", 0.25)
    (small,) = review(admission, "engine: {runner: scripted, maxModelLen: 2048, kvCache: {size: 64Ki}}")
    assert small.refusal is not None
    assert "one sequence of 2,048 tokens needs 128" in small.refusal.message
    (auto,) = review(admission, "engine: {runner: scripted}")
    assert auto.placement is not None
    assert auto.placement.max_model_len == auto.placement.kv_tokens // 64
