"""What a review says before anything is written: where a refusal lies, and what does not fit together."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.adapters import write_adapter

from quire import builtin
from quire.controlplane.wiring import text_facts
from quire_operators.admission import Admission
from quire_operators.cache import HubCache
from quire_operators.devices import Inventory
from quire_operators.nvml import Gpu
from quire_operators.overrides import Kind, Override
from quire_operators.review import Review
from quire_operators.rollout import Goal, Row
from quire_operators.sources import Sources
from quire_operators.store import Store
from quire_schemas import manifest
from quire_schemas.adapters import TARGETS
from quire_schemas.checkpoint import expected_tensors, read_config
from quire_schemas.keys import Digest, new_key
from quire_schemas.resource import Key
from quire_schemas.update import UpdateClass

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
        text_facts,
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


def together(admission: Admission, *specs: str) -> list[Review]:
    reviews = review(admission, *specs)
    admission.together(reviews)
    return reviews


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
    first, second, third = together(admission, half, half, small)
    assert first.notes == third.notes == []
    assert second.notes == ["fits alone; together with model/m0 it will wait as InsufficientMemory"]
    (alone,) = together(admission, half)
    assert alone.notes == []


def test_priority_decides_who_of_those_that_do_not_fit_together_waits(admission: Admission) -> None:
    half = "engine: {maxModelLen: 256, kvCache: {size: 8Gi}}"
    first, second = together(admission, half, half + ", placement: {priority: 1}")
    assert second.notes == []
    assert first.notes == ["fits alone; together with model/m1 it will wait as InsufficientMemory"]


def test_replicas_that_do_not_fit_beside_others_are_counted(admission: Admission) -> None:
    four = "engine: {maxModelLen: 256, kvCache: {size: 4Gi}}, replicas: 3"
    first, second = together(admission, "engine: {maxModelLen: 256, kvCache: {size: 4Gi}}", four)
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


# ── all models together ───────────────────────────────────────────────────────────────────────────────────


def apply(store: Store, admission: Admission, *specs: str) -> None:
    store.apply(admission.changes(review(admission, *specs)))


SIZED = "engine: {maxModelLen: 256, kvCache: {size: SIZEGi}}"


def test_the_machine_is_accounted_for_with_all_models_on_it(store: Store, admission: Admission) -> None:
    apply(store, admission, SIZED.replace("SIZE", "2"))
    reviews = review(admission, SIZED.replace("SIZE", "2"), SIZED.replace("SIZE", "3") + ", replicas: 2")
    room = admission.together(reviews)
    (device,) = room["devices"]
    assert (device["device"], device["total"], device["foreign"]) == ("cpu", MACHINE.memory, 0)
    models = {item["key"]: item for item in device["models"]}
    assert {key: item["replicas"] for key, item in models.items()} == {"model/m0": 1, "model/m1": 2}
    placements = [found.placement for found in reviews]
    assert all(placement is not None for placement in placements)
    assert [item["memory"] for item in models.values()] == [
        placement.memory for placement in placements if placement
    ]
    assert models["model/m1"]["kv"] == 3 * GIB
    taken = sum(item["replicas"] * item["memory"] for item in models.values())
    assert device["free"] == device["limit"] - taken > 0
    assert room["waiting"] == room["onDemand"] == []


def test_of_what_does_not_fit_together_the_new_ones_wait_and_guests_take_nothing(
    store: Store, admission: Admission
) -> None:
    apply(store, admission, SIZED.replace("SIZE", "8"))
    reviews = review(
        admission,
        SIZED.replace("SIZE", "8"),
        SIZED.replace("SIZE", "8"),
        SIZED.replace("SIZE", "2") + ", residency: onDemand",
    )
    room = admission.together(reviews)
    (device,) = room["devices"]
    assert [item["key"] for item in device["models"]] == ["model/m0"]
    assert room["waiting"] == [{"key": "model/m1", "replicas": 1, "reason": "InsufficientMemory"}]
    (guest,) = room["onDemand"]
    assert (guest["key"], guest["replicas"]) == ("model/m2", 1)


def test_who_is_there_goes_before_who_is_new_whatever_of_it_changes(store: Store, admission: Admission) -> None:
    for number in range(2):  # m1 is there, m0 is not yet
        apply(store, admission, *[SIZED.replace("SIZE", "8")] * 2)
        store.mark_deleting(Key("model", "m0"))
        store.remove(Key("model", "m0"))
        changed = SIZED.replace("256", str(300 + number)).replace("SIZE", "8")
        reviews = review(admission, SIZED.replace("SIZE", "8"), changed)
        assert reviews[1].changes[0].update is UpdateClass.ROLLING
        after = admission.together(reviews)
        assert [item["key"] for item in after["waiting"]] == ["model/m0"]
        assert reviews[0].notes == ["fits alone; together with model/m1 it will wait as InsufficientMemory"]
        assert reviews[1].notes == []
        (row,) = [Row("r", "m1", 0, 1, "old", Goal.RUN, 0.0, memory=8 * GIB)]
        if not number:
            store.create_replica(row)


def test_a_declared_machine_without_a_replicas_device_finds_another_place_for_it(
    store: Store, admission: Admission
) -> None:
    text = (
        "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\n"
        "spec: {source: 'builtin://tiny', engine: {device: cuda, maxModelLen: 256, kvCache: {size: 30Gi}}}"
    )
    gpus = tuple(Gpu(index, "NVIDIA H100", 80 * GIB, 80 * GIB) for index in (0, 1))
    machine = Inventory(64 * GIB, 64 * GIB, 8, gpus)
    store.apply(admission.changes(admission.review(manifest.load([("m.yaml", text)]).resources, machine)))
    (model,) = store.objects("model")
    (revision,) = store.revisions(model.uid)
    store.create_replica(
        Row("r", "m", 0, 1, revision.template_hash, Goal.RUN, 0.0, memory=31 * GIB, device="cuda:1")
    )
    assert [device["device"] for device in admission.together([], machine)["devices"]] == ["cuda:1"]
    smaller = replace(machine, gpus=gpus[:1])
    (device,) = admission.together([], smaller)["devices"]
    assert (device["device"], device["models"][0]["key"]) == ("cuda:0", "model/m")
    none = admission.together([], replace(machine, gpus=()))
    assert (none["devices"], [item["reason"] for item in none["waiting"]]) == ([], ["InsufficientDevices"])


def test_what_is_paused_deleted_or_replaced_is_not_counted(store: Store, admission: Admission) -> None:
    apply(store, admission, *[SIZED.replace("SIZE", "2")] * 3)
    first, second, _ = store.objects("model")
    store.set_override(first.uid, Override(Kind.PAUSE, "a person", 1.0))
    store.mark_deleting(second.key)
    for number in range(3):  # of a template that nothing asks for any more
        store.create_replica(Row(f"r{number}", "m2", number, 1, "old", Goal.RUN, 0.0, memory=3 * GIB))
    (device,) = admission.together([])["devices"]
    assert [(item["key"], item["replicas"]) for item in device["models"]] == [("model/m2", 1)]


def test_what_others_hold_of_a_gpu_is_no_room_whoever_leaves_it(store: Store, admission: Admission) -> None:
    gpu = Gpu(0, "NVIDIA H100", 80 * GIB, 40 * GIB)
    machine = Inventory(64 * GIB, 64 * GIB, 8, (gpu,))
    # of the 40 GiB that are in use, a replica that leaves has 30
    store.create_replica(Row("r", "gone", 0, 1, "t", Goal.DRAIN, 0.0, memory=30 * GIB, device="cuda:0"))
    text = (
        "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\n"
        "spec: {source: 'builtin://tiny', replicas: 2, "
        "engine: {device: cuda, maxModelLen: 256, kvCache: {size: 30Gi}}}"
    )
    reviews = admission.review(manifest.load([("m.yaml", text)]).resources, machine)
    room = admission.together(reviews, machine)
    (device,) = room["devices"]
    assert (device["foreign"], device["limit"]) == (10 * GIB, 70 * GIB)
    assert device["models"][0]["replicas"] == 2


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


STEPS = "rollout: {strategy: Canary, canary: {steps: [{weight: 10, hold: 5m}, {weight: 50}]}}"


def test_a_canary_is_told_with_its_steps_and_refused_where_one_replica_more_never_fits(
    store: Store, admission: Admission
) -> None:
    def sized(replicas: int, length: int) -> str:
        return f"engine: {{maxModelLen: {length}, kvCache: {{size: 4Gi}}}}, replicas: {replicas}, {STEPS}"

    (first,) = review(admission, sized(2, 256))
    assert first.rollout == "2 replicas to start", "nothing is stable yet"
    apply(store, admission, sized(2, 256))
    (stored,) = store.objects("model")
    store.mark_stable(stored.uid, 1)
    for index in range(2):
        template = store.revisions(stored.uid)[0].template_hash
        row = Row(f"m0-r1-{index}", "m0", index, 1, template, Goal.RUN, 0.0, memory=first_memory(first))
        store.create_replica(row)
    (found,) = review(admission, sized(2, 512))
    assert found.refusal is None
    assert found.rollout == "Canary beside 2 replicas: 10 % for 5m00s, 50 % of the requests, then it replaces them"
    assert found.replaces == 2
    assert found.warnings == []
    asked = STEPS.replace("}}", ", analysis: {maxDrift: 5%}}, autoRollback: false}")
    (with_exam,) = review(admission, sized(2, 512).replace(STEPS, asked))
    first_line, exam, stays = with_exam.rollout.splitlines()
    assert first_line == found.rollout
    assert exam.startswith(
        "before any request its exam: drift from revision 1's answers to 8 prompts of Quire's own"
    )
    assert stays == "if it fails it stays, without requests, until you decide: autoRollback is false"
    store.create_replica(Row("r", "big", 0, 1, "t", Goal.RUN, 0.0, memory=6 * GIB, device="cpu"))
    (later,) = review(admission, sized(2, 512))
    assert any("it begins when there is room" in warning for warning in later.warnings)
    (refused,) = review(admission, sized(3, 512))
    assert refused.refusal is not None
    assert refused.refusal.path == "spec.rollout.strategy"
    assert "beside the 3 that serve; 3 fit on this machine" in refused.refusal.message


def first_memory(found: Review) -> int:
    assert found.placement is not None
    return found.placement.memory


def templated(admission: Admission, file: Path) -> Review:
    (found,) = review(admission, f"tokenizer: {{chatTemplateFile: '{file}'}}")
    return found


def put(store: Store, admission: Admission, found: Review) -> str:
    assert found.refusal is None, found.refusal
    (applied,) = store.apply(admission.changes([found]))
    return f"{applied.result} {applied.generation} {applied.revision}"


def test_another_text_in_the_file_of_a_chat_template_is_another_revision(
    store: Store, admission: Admission, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}")
    assert put(store, admission, templated(admission, file)) == "created 1 1"
    again = templated(admission, file)
    assert again.action == "unchanged"
    assert put(store, admission, again) == "unchanged 1 1"
    key = Key("model", "m0")
    old = store.get(key)
    assert old is not None
    store.set_override(old.uid, Override(Kind.QUARANTINE, "platform", 0.0, revision=1))

    file.write_text("Answer: {{ messages[0].content }}")
    found = templated(admission, file)
    (change,) = found.changes
    assert found.action == "update"
    assert (change.path, change.update) == ("spec.tokenizer.chatTemplateFile", UpdateClass.ROLLING)
    assert change.old != change.new
    assert found.placement is not None
    assert found.placement.chat_template == "Answer: {{ messages[0].content }}"
    (differs,) = admission.differences([found.located])
    assert [each.path for each in differs.changes] == ["spec.tokenizer.chatTemplateFile"]
    assert put(store, admission, found) == "updated 2 2"
    assert not store.overrides(old.uid), "what was given up is tried with the other template"
    assert put(store, admission, templated(admission, file)) == "unchanged 2 2"

    file.write_text("{{ messages[0].content }}")
    found = templated(admission, file)
    assert "takes up revision 1 again, with what was resolved then" in found.notes
    assert put(store, admission, found) == "updated 3 3"
    first, *_, last = sorted(store.revisions(old.uid), key=lambda each: each.n)
    assert first.template_hash == last.template_hash
    assert first.placement == last.placement


def test_a_revision_that_did_not_keep_its_template_stays_with_the_file(
    store: Store, admission: Admission, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}")
    found = templated(admission, file)
    assert found.revision is not None
    placement = {name: value for name, value in found.revision.placement.items() if name != "chat_template"}
    found.revision = replace(found.revision, placement=placement)
    assert put(store, admission, found) == "created 1 1"
    file.write_text("Answer: {{ messages[0].content }}")
    assert put(store, admission, templated(admission, file)) == "unchanged 1 1"
    (other,) = review(admission, "engine: {dtype: float32}")
    assert put(store, admission, other).endswith(" 2")
    assert put(store, admission, templated(admission, file)).endswith(" 3"), "with the text that it has by now"


def test_a_template_that_cannot_be_read_is_told_of_where_it_is_named(
    store: Store, admission: Admission, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% if %}")
    refusal = templated(admission, file).refusal
    assert refusal is not None
    assert (refusal.path, refusal.reason) == ("spec.tokenizer.chatTemplateFile", "ModelUnusable")
    assert str(file) in refusal.message
    assert refusal.hint == "mend the template, or leave it out"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not a file"),
        (b"\xff", "is not UTF-8"),
        (b"a" * (1 << 20 | 1), "is larger than 1 MiB"),
        (b"a\0", "zero byte"),
    ],
)
def test_a_file_that_is_no_chat_template_is_refused_though_the_manifest_is_the_same(
    store: Store, admission: Admission, tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}")
    put(store, admission, templated(admission, file))
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    found = templated(admission, file)
    assert [each.action for each in admission.differences([found.located])] == ["unchanged"], "it writes nothing"
    assert found.refusal is not None
    assert found.refusal.path == "spec.tokenizer.chatTemplateFile"
    assert said in found.refusal.message


def with_adapters(*folders: Path, more: str = "") -> str:
    entries = ", ".join(f"{{name: {folder.name}, source: 'file://{folder}'}}" for folder in folders)
    return f"engine: {{maxModelLen: 256, kvCache: {{size: 64Mi}}}}, lora: {{adapters: [{entries}]{more}}}"


def test_adapters_are_counted_to_the_byte(admission: Admission, tmp_path: Path) -> None:
    (plain,) = review(admission, with_adapters())
    (found,) = review(
        admission, with_adapters(write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b", rank=3))
    )
    assert found.refusal is None, found.refusal
    assert plain.placement is not None
    assert found.placement is not None
    assert [each.name for each in found.placement.adapters] == ["a", "b"]
    assert found.fit is not None
    assert plain.fit is not None
    sizes = [shape[0] + shape[1] for name, shape in expected_tensors(read_config(builtin.path("tiny")))
             if name.split(".")[-2] in TARGETS]  # fmt: skip
    assert found.fit.adapters == 2 * (4 + 4) * sum(sizes)
    assert found.placement.memory > plain.placement.memory + found.fit.adapters
    assert any("adapters" in line for line in found.fit.lines())
    assert not any("adapters" in line for line in plain.fit.lines())


@pytest.mark.parametrize(
    ("config", "more", "path", "said"),
    [
        ({"use_dora": True}, "", "spec.lora.adapters[1].source", "use_dora: True"),
        ({"r": 8, "rank": 8}, ", maxRank: 4", "spec.lora.adapters[1].source", "rank 8, above maxRank 4"),
    ],
)
def test_an_adapter_that_is_not_served_is_refused_at_its_place(
    admission: Admission, tmp_path: Path, config: dict[str, Any], more: str, path: str, said: str
) -> None:
    good, bad = write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b", **config)
    (found,) = review(admission, with_adapters(good, bad, more=more))
    assert found.refusal is not None
    assert (found.refusal.path, found.refusal.reason) == (path, "ConfigRejected")
    assert said in found.refusal.message
    (found,) = review(admission, with_adapters(good, tmp_path / "nowhere"))
    assert found.refusal is not None
    assert (found.refusal.path, found.refusal.reason) == ("spec.lora.adapters[1].source", "NotFound")


def test_adapters_on_a_machine_whose_model_goes_to_its_gpu_are_refused(
    admission: Admission, tmp_path: Path
) -> None:
    gpu = Gpu(0, "NVIDIA", 16 * GIB, 16 * GIB)
    resources = manifest.load([("m.yaml", (
        "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\n"
        f"spec: {{source: 'builtin://tiny', {with_adapters(write_adapter(tmp_path / 'a'))}}}\n"
    ))]).resources  # fmt: skip
    (found,) = admission.review(resources, replace(MACHINE, gpus=(gpu,)))
    assert found.refusal is not None
    assert (found.refusal.path, found.refusal.reason) == ("spec.lora.adapters", "ConfigRejected")


def test_a_folder_that_holds_something_else_is_a_rolling_update(
    admission: Admission, store: Store, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", 1)
    spec = with_adapters(folder)
    (first,) = review(admission, spec)
    store.apply(admission.changes([first]))
    (again,) = review(admission, spec)
    assert (again.action, again.revision) == ("unchanged", None)
    write_adapter(folder, 2)
    (changed,) = review(admission, spec)
    assert changed.action == "update"
    assert [(c.path, c.update) for c in changed.changes] == [("spec.lora.adapters[a].source", UpdateClass.ROLLING)]
    assert changed.revision is not None
    assert first.revision is not None
    assert changed.revision.template_hash != first.revision.template_hash
    store.apply(admission.changes([changed]))
    write_adapter(folder, 1)
    (back,) = review(admission, spec)
    assert back.revision is not None
    assert back.revision.template_hash == first.revision.template_hash
    (without,) = review(admission, with_adapters())
    assert [(c.path, c.update) for c in without.changes] == [("spec.lora.adapters[a]", UpdateClass.ROLLING)]


def test_the_names_of_adapters_are_claimed_like_others(admission: Admission, tmp_path: Path) -> None:
    spec = with_adapters(write_adapter(tmp_path / "a"))
    named = {"m": spec, "n": "servedModelNames: ['m:a']"}
    documents = [
        (
            f"{name}.yaml",
            f"apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {{name: {name}}}\n"
            f"spec: {{source: 'builtin://tiny', {rest}}}\n",
        )
        for name, rest in named.items()
    ]
    (problem,) = manifest.load(documents).problems
    assert "'m:a'" in problem.message
    one, other = (admission.review(manifest.load([each]).resources)[0] for each in documents)
    found = admission.review([other.located, one.located])
    assert [each.refusal is None for each in found] == [True, False]
    refusal = found[1].refusal
    assert refusal is not None
    assert (refusal.path, refusal.reason) == ("spec.lora.adapters[0].name", "NameConflict")


def test_a_route_to_an_adapter_that_there_is_not_is_warned_of(admission: Admission, tmp_path: Path) -> None:
    spec = with_adapters(write_adapter(tmp_path / "a"))
    documents = [
        (
            "m.yaml",
            "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\n"
            f"spec: {{source: 'builtin://tiny', {spec}}}\n",
        ),
        (
            "r.yaml",
            "apiVersion: quire.dev/v1alpha1\nkind: Route\nmetadata: {name: r}\nspec:\n  match: {modelNames: [r]}\n"
            "  backends: [{model: m}, {model: m, adapter: a, weight: 3}, {model: m, adapter: c}]\n",
        ),
    ]
    loaded = manifest.load(documents)
    assert not loaded.problems
    _, route = admission.review(loaded.resources)
    assert route.warnings == ["spec.backends[2].adapter: there is no adapter 'c' of model/m yet"]
    twice = documents[1][1].replace("adapter: c", "adapter: a")
    (problem,) = manifest.load([documents[0], ("r.yaml", twice)]).problems
    assert "model 'm' with adapter 'a' stands here twice" in problem.message


def test_a_gateway_for_others_that_would_turn_them_all_away_is_warned_of(admission: Admission) -> None:
    def warnings(spec: str) -> list[str]:
        document = "apiVersion: quire.dev/v1alpha1\nkind: {}\nmetadata: {{name: {}}}\nspec: {}\n"
        key = "{name: k, hash: 'sha256:" + "0" * 64 + "'}"
        policy = document.format("AccessPolicy", "team", f"{{keys: [{key}], allow: {{models: [m]}}}}")
        gateway = document.format("Gateway", "default", f"{{insecurePlaintext: true, {spec}}}")
        loaded = manifest.load([("g.yaml", gateway), ("p.yaml", policy)])
        assert not loaded.problems, loaded.problems
        found = admission.review(loaded.resources)
        assert not any(each.refusal for each in found)
        return next(each.warnings for each in found if each.key.kind == "gateway")

    for bind in ("0.0.0.0", "'::'"):
        (warning,) = warnings(f"bind: {bind}")
        assert warning.startswith(f"spec.bind: {bind.strip(chr(39))} is every address")
        assert "spec.hosts" in warning
        assert warnings(f"bind: {bind}, hosts: [llm.example.org]") == []
    assert warnings("bind: 192.0.2.7") == [], "requests that name it are answered"


def test_what_policies_are_to_one_another_and_to_names_is_said_before(store: Store, admission: Admission) -> None:
    key = Digest.of(new_key())
    texts = [
        f"apiVersion: quire.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: {name}}}\n"
        f"spec: {{keys: [{{name: k, hash: '{line}'}}], allow: {{models: [m0, alias, none]}}}}\n"
        for name, line in (("b", str(key)), ("a", f"sha256:{key.sha256}"))
    ]
    head = "apiVersion: quire.dev/v1alpha1\nkind: %s\nmetadata: {name: %s}\nspec: %s\n"
    model = head % ("Model", "m0", "{source: 'builtin://tiny'}")
    route = head % ("Route", "r", "{match: {modelNames: [alias]}, backends: [{model: m0}]}")
    sets = [("m", model), ("r", route), *zip("ba", texts, strict=True)]
    *_, first, second = admission.review(manifest.load(sets).resources)
    assert first.refusal is None
    assert first.warnings == ["spec.allow.models[2]: nothing is served as 'none' yet"]
    assert second.refusal is not None
    assert second.refusal.reason == "KeyTaken"


def test_a_policy_of_the_same_set_that_has_expired_keeps_no_key(admission: Admission) -> None:
    key = Digest.of(new_key())
    head = "apiVersion: quire.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: %s}\n"
    head += "spec: {keys: [%s], allow: {models: [m0]}%s}\n"
    declared = f"{{name: k, hash: '{key}'}}"
    expired = ", expiresAt: '2001-01-01T00:00:00Z'"
    for old, refused in ((expired, False), ("", True)):
        sets = [
            ("a", head % ("a", declared, old)),
            ("b", head % ("b", declared.replace("name: k", "name: l"), "")),
        ]
        loaded = manifest.load(sets)
        assert not loaded.problems
        _, new = admission.review(loaded.resources)
        assert (new.refusal is not None) is refused
