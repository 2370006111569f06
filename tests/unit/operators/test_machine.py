"""Devices, sources, placements and the state directory: what is worked out about this machine and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire_operators.cache import HubCache
from quire_operators.devices import Inventory, InventoryError, declared, detect, free_places, held
from quire_operators.models import device_env, due_in, log_owner
from quire_operators.nvml import Gpu
from quire_operators.paths import StateDir, StateDirError, check_private, private_dir
from quire_operators.placement import (
    NoDevice,
    NoSuchNumbers,
    NoSuchPromise,
    Placement,
    PlacementError,
    TooLarge,
    place,
)
from quire_operators.rollout import Goal, Row
from quire_operators.sources import SourceError, Sources
from quire_schemas.checkpoint import profile_from_config
from quire_schemas.model import Model, resolve_defaults
from quire_schemas.sizing import kv_block_bytes, kv_misfit, weight_bytes
from quire_schemas.update import template_hash
from quire_schemas.wire import EngineSpec, Quantization

GIB = 1 << 30
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "dtype": "bfloat16",
}


# ── devices ───────────────────────────────────────────────────────────────────────────────────────────────


def test_this_machine_has_memory_and_cores() -> None:
    here = detect()
    assert 0 < here.available <= here.memory
    assert here.cores >= 1


def test_an_inventory_can_be_declared_and_is_checked() -> None:
    found = declared(
        {
            "devices": [{"kind": "cuda", "name": "NVIDIA H100", "memory": "80Gi", "index": 3}],
            "cpu": {"memory": "64Gi", "cores": 16},
        }
    )
    assert found == Inventory(64 * GIB, 64 * GIB, 16, (Gpu(3, "NVIDIA H100", 80 * GIB, 80 * GIB),))
    assert found.total("cuda:3") == 80 * GIB
    assert found.total("cuda:0") == 0


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "keys devices and cpu"),
        ({"gpus": []}, "keys devices and cpu"),
        ({"cpu": {"cores": 0}}, "cpu.cores"),
        ({"cpu": {"memory": "64"}}, "cpu.memory"),
        ({"devices": {}}, "a list"),
        ({"devices": [{"kind": "tpu", "memory": "1Gi"}]}, r"devices\[0\].kind"),
        ({"devices": [{"kind": "cuda"}]}, r"devices\[0\].memory is missing"),
        ({"devices": [{"kind": "cuda", "memory": 80}]}, r"devices\[0\].memory"),
        ({"devices": [{"kind": "cuda", "memory": "1Gi", "index": 0}] * 2}, "same index"),
    ],
)
def test_a_wrong_inventory_is_refused_by_name(document: Any, words: str) -> None:
    with pytest.raises(InventoryError, match=words):
        declared(document)


def row(name: str, device: str, memory: int, **more: Any) -> Row:
    return replace(Row(name, "m", 0, 1, "t", Goal.RUN, 0.0, memory=memory, device=device), **more)


def test_memory_is_held_by_every_row_that_runs_or_will_and_by_orphans() -> None:
    rows = [
        row("a", "cpu", 10),
        row("b", "cpu", 5, goal=Goal.DRAIN),
        row("c", "cpu", 7, failed_generation=1),
        row("d", "cuda:0", 3),
    ]
    assert held(rows, {"cpu": 100}) == {"cpu": 115, "cuda:0": 3}


def test_places_never_exceed_what_there_is_and_take_the_emptiest_device_first() -> None:
    machine = Inventory(100, 100, 4, (Gpu(0, "g", 50, 50), Gpu(1, "g", 50, 50)))
    assert free_places(machine, {"cpu": 30}, "cpu", 20, 0.9) == ["cpu"] * 3
    assert free_places(machine, {"cpu": 71}, "cpu", 20, 0.9) == []
    assert free_places(machine, {"cuda:0": 20}, "cuda", 20, 0.9) == ["cuda:1", "cuda:0", "cuda:1"]
    # half of a GPU beside a tenth of it, whoever comes first
    assert free_places(machine, {"cuda:0": 5, "cuda:1": 30}, "cuda", 25, 0.5) == ["cuda:0"]
    assert free_places(machine, {"cuda:0": 25, "cuda:1": 50}, "cuda", 5, 0.1) == ["cuda:0"] * 5
    assert free_places(machine, {}, "cuda", 40, 0.9, [0]) == ["cuda:0"]
    assert free_places(machine, {}, "cuda", 10, 0.9, [7]) == []
    assert len(free_places(machine, {}, "cpu", 1, 1.0)) == 100


# ── placement ─────────────────────────────────────────────────────────────────────────────────────────────


def spec(**given: Any) -> dict[str, Any]:
    document = {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": "m"},
        "spec": {"source": "builtin://tiny", **given},
    }
    return resolve_defaults(Model.model_validate(document))


def placed(machine: Inventory, config: dict[str, Any] = TINY, **given: Any) -> Placement:
    resolved = spec(**given)
    return place(
        resolved, profile_from_config(config), ("/m", "/t"), None, machine, {}, {}, template_hash(resolved)
    ).placement


CPU = Inventory(16 * GIB, 8 * GIB, 4)


def test_every_auto_is_resolved_and_kept_through_json() -> None:
    found = placed(CPU)
    assert (found.device, found.dtype, found.kv_dtype) == ("cpu", "bfloat16", "bfloat16")
    assert (found.threads, found.max_model_len) == (4, 1024)
    assert Placement.from_dict(found.as_dict()) == found
    resolved = found.resolved(spec())
    assert resolved["kvTokensPerReplica"] == found.num_blocks * 16
    engine = found.engine_spec("m", "m-r1-0", 3, "/s", spec(), "hot", adoption_window=90.0)
    assert (engine.memory_limit, engine.num_blocks, engine.hot_hash) == (found.memory, found.num_blocks, "hot")
    assert engine.adoption_window == 90.0


@pytest.mark.parametrize(
    ("machine", "declared", "shown"),
    [("cpu", "auto", 64), ("cpu", 100, 100), ("gpu", "auto", 700), ("gpu", 50, 50)],
)
def test_the_share_of_prompts_is_told(machine: str, declared: Any, shown: int) -> None:
    batching = {"maxPrefillTokens": declared, "maxNumBatchedTokens": 700}
    found = placed(CPU if machine == "cpu" else WITH_GPU, batching=batching)
    assert found.resolved(spec(batching=batching))["maxPrefillTokens"] == shown
    # it is hot: what is told is what is declared now
    assert found.resolved(spec(batching=batching | {"maxPrefillTokens": 33}))["maxPrefillTokens"] == 33


def test_an_engine_starts_with_the_declared_hot_values_and_the_blocks_of_the_bounds() -> None:
    found = placed(CPU, batching={"maxNumSeqs": 64, "maxNumBatchedTokens": 512})
    lowered = spec(batching={"maxNumSeqs": 4, "maxNumBatchedTokens": 128})
    engine = found.engine_spec("m", "m-r1-0", 2, "/s", lowered, "hot", adoption_window=90.0)
    assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (4, 128)
    assert engine.max_prefill_tokens == 64, "what auto is on a CPU"
    assert (engine.num_blocks, engine.memory_limit) == (found.num_blocks, found.memory)


def test_an_engine_sees_its_own_gpu_alone_by_the_number_that_the_ledger_has() -> None:
    assert device_env("cuda:3") == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "3"}
    assert device_env("cpu") == {}


def test_a_time_that_passed_during_its_own_pass_is_due_at_once_and_not_forgotten() -> None:
    assert due_in((105.0, None, 103.0), 100.0) == 3.0
    assert due_in((99.9, 200.0), 100.0) == 0.0
    assert due_in((None, None), 100.0) is None


def test_a_log_is_told_by_its_name() -> None:
    assert log_owner("a.b-r12-3.log", "a.b") == ("a.b-r12-3", 12)
    assert log_owner("a.b-r12-3.log.2", "a.b") == ("a.b-r12-3", 12)
    for other in ("axb-r1-0.log", "a.b-r1-0.log.gz", "notes.txt", "a.b-r1-0"):
        assert log_owner(other, "a.b") is None


def test_what_a_device_cannot_honour_is_refused_at_its_field() -> None:
    with_gpu = replace(CPU, gpus=(Gpu(0, "g", 80 * GIB, 80 * GIB),))
    with pytest.raises(PlacementError, match="host memory") as refused:
        placed(with_gpu, resources={"memory": "8Gi"})
    assert refused.value.path == "spec.resources.memory"
    assert placed(with_gpu, resources={"memory": "8Gi"}, engine={"device": "cpu"}).memory <= 8 * GIB
    with pytest.raises(NoDevice, match="names GPUs") as missing:
        placed(CPU, placement={"deviceIds": [0]})
    assert missing.value.path == "spec.placement.deviceIds"


def test_a_gpu_is_taken_when_there_is_one_and_required_when_asked_for() -> None:
    with_gpus = replace(CPU, gpus=(Gpu(0, "busy", 80 * GIB, 10 * GIB), Gpu(1, "free", 80 * GIB, 79 * GIB)))
    assert placed(with_gpus).device == "cuda"
    assert placed(with_gpus).memory > 70 * GIB, "the cache takes what engine.memory leaves on the emptier one"
    assert placed(with_gpus, engine={"device": "cpu"}).device == "cpu"
    with pytest.raises(NoDevice, match="no GPU"):
        placed(CPU, engine={"device": "cuda"})
    with pytest.raises(NoDevice, match="deviceIds"):
        placed(with_gpus, placement={"deviceIds": [5]})


def test_a_card_that_is_too_old_is_given_nothing_and_refused_by_name_where_it_is_alone() -> None:
    old, new = Gpu(0, "Tesla T4", 80 * GIB, 80 * GIB, capability=(7, 5)), Gpu(1, "L4", 80 * GIB, 10 * GIB)
    new = replace(new, capability=(8, 9))
    both = replace(CPU, gpus=(old, new))
    assert placed(both).memory <= 10 * GIB, "the older one has more room"
    assert free_places(both, {}, "cuda", 5 * GIB, 0.9) == ["cuda:1"] * 2
    for machine, asked in ((replace(CPU, gpus=(old,)), {}), (both, {"placement": {"deviceIds": [0]}})):
        with pytest.raises(NoDevice, match=r"8\.0 or later.*Tesla T4 \(GPU 0, 7\.5\)") as refused:
            placed(machine, **asked)
        assert "Ampere" in refused.value.hint
    assert placed(replace(CPU, gpus=(old,)), engine={"device": "cpu"}).device == "cpu"


WITH_GPU = replace(CPU, gpus=(Gpu(0, "g", 80 * GIB, 80 * GIB),))


@pytest.mark.parametrize(
    ("machine", "batching", "ahead"),
    [
        (CPU, {}, False),
        (WITH_GPU, {}, True),
        (WITH_GPU, {"asyncScheduling": "auto"}, True),
        (WITH_GPU, {"asyncScheduling": False}, False),
        (CPU, {"asyncScheduling": True}, True),
    ],
)
def test_steps_are_planned_ahead_where_the_host_would_hold_up_the_device(
    machine: Inventory, batching: dict[str, Any], ahead: bool
) -> None:
    found = placed(machine, batching=batching)
    assert found.resolved(spec(batching=batching))["asyncScheduling"] is ahead
    engine = found.engine_spec("m", "m-r1-0", 1, "/s", spec(batching=batching), "hot", adoption_window=90.0)
    assert engine.async_scheduling is ahead


def test_a_placement_from_before_auto_plans_ahead_as_it_was_declared() -> None:
    stored = {name: value for name, value in placed(CPU).as_dict().items() if name != "async_scheduling"}
    older = Placement.from_dict(stored)
    for declared_then in (True, False):
        resolved = spec(batching={"asyncScheduling": declared_then})
        engine = older.engine_spec("m", "m-r1-0", 1, "/s", resolved, "hot", adoption_window=90.0)
        assert engine.async_scheduling is declared_then


def test_no_graphs_where_none_are_wanted() -> None:
    for eager in (False, True):
        found = placed(WITH_GPU, engine={"enforceEager": eager})
        engine = found.engine_spec("m", "m-r1-0", 1, "/s", spec(), "hot", adoption_window=90.0)
        assert engine.enforce_eager is eager


def test_batch_invariance_is_refused_on_a_gpu_by_name() -> None:
    with pytest.raises(NoSuchPromise, match="on CPUs alone") as refused:
        placed(WITH_GPU, determinism="batchInvariant")
    assert refused.value.path == "spec.determinism"
    assert placed(WITH_GPU, determinism="batchInvariant", engine={"device": "cpu"}).device == "cpu"


def test_a_neighbour_on_the_gpu_keeps_what_it_holds_and_the_plan_says_so() -> None:
    def plan(gpu: Gpu, ours: int = 0) -> tuple[Placement, str]:
        machine, held_by_us = replace(CPU, gpus=(gpu,)), {"cuda:0": ours} if ours else {}
        found = place(spec(), profile_from_config(TINY), ("/m", "/t"), None, machine, {}, held_by_us, "t")
        return found.placement, " ".join(found.notes)

    alone, nothing = plan(Gpu(0, "g", 80 * GIB, 79 * GIB, GIB))
    assert nothing == ""
    beside, said = plan(Gpu(0, "g", 80 * GIB, 39 * GIB, GIB))
    assert beside.memory <= 39 * GIB < alone.memory
    assert "none of Quire's hold 40.0 GiB of g (GPU 0)" in said
    _, said = plan(Gpu(0, "g", 80 * GIB, 39 * GIB, GIB), 30 * GIB)
    assert "none of Quire's hold 10.0 GiB" in said


def test_what_never_fits_is_refused_with_offers_and_what_does_not_fit_now_waits() -> None:
    with pytest.raises(TooLarge) as refused:
        placed(CPU, engine={"kvCache": {"size": "20Gi"}})
    assert refused.value.fit is not None
    assert "spec.engine.kvCache.size" in refused.value.hint
    resolved = spec(engine={"kvCache": {"size": "6Gi"}})
    profile = profile_from_config(TINY)
    full = replace(CPU, available=2 * GIB)
    waiting = place(resolved, profile, ("/m", "/t"), None, full, {}, {"cpu": 6 * GIB}, "t")
    assert not waiting.fits_now
    assert any("starts when they have left" in note for note in waiting.notes)
    with pytest.raises(TooLarge):
        place(resolved, profile, ("/m", "/t"), None, full, {}, {}, "t")
    assert place(resolved, profile, ("/m", "/t"), None, full, {"cpu": 6 * GIB}, {"cpu": 6 * GIB}, "t").fits_now


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"method": "int8"}, Quantization("int8")),
        ({"method": "int4", "groupSize": 64, "activations": "bf16"}, Quantization("int4", "bf16", 64)),
    ],
)
def test_a_quantization_reaches_the_engine(declared: dict[str, Any], expected: Quantization) -> None:
    found, plain = placed(CPU, quantization=declared), placed(CPU)
    assert found.template != plain.template, "other numbers, other engines"
    assert (found.quantization, plain.quantization) == (expected, None)
    assert found.weights == weight_bytes(profile_from_config(TINY), "bfloat16", expected) < plain.weights
    stored = json.loads(json.dumps(found.as_dict()))
    assert Placement.from_dict(stored) == found
    assert Placement.from_dict({k: v for k, v in plain.as_dict().items() if k != "quantization"}) == plain
    assert found.resolved(spec())["quantization"] == str(expected)
    assert "quantization" not in plain.resolved(spec())
    engine = found.engine_spec("m", "m-r1-0", 1, "/s", spec(quantization=declared), "hot", adoption_window=90.0)
    assert msgspec.json.decode(msgspec.json.encode(engine), type=EngineSpec).quantization == expected


def test_a_checkpoint_in_fp8_runs_on_either_device() -> None:
    coded = TINY | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    with_gpu = replace(CPU, gpus=(Gpu(0, "g", 80 * GIB, 80 * GIB),))
    found, wide = placed(with_gpu, coded), placed(CPU, coded)
    assert (found.device, str(found.quantization)) == ("cuda", "fp8, fp8 activations")
    assert found.weights == weight_bytes(profile_from_config(coded), "bfloat16", found.quantization)
    assert wide.quantization is None
    assert wide.weights == placed(CPU).weights > found.weights
    assert Placement.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    with pytest.raises(NoSuchNumbers, match="on a GPU alone") as refused:
        placed(CPU, coded, quantization={"method": "fp8"})
    assert refused.value.path == "spec.quantization.method"
    experts = coded | {"architectures": ["MixtralForCausalLM"], "num_key_value_heads": 4}
    some, all_of_it = placed(with_gpu, experts), placed(CPU, experts)
    assert str(some.quantization) == "fp8, fp8 activations"
    assert 0.5 * all_of_it.weights < some.weights < 0.6 * all_of_it.weights, "experts stay as they are, too"
    assert str(placed(with_gpu, experts, quantization={"method": "int8"}).quantization) == "int8, bf16 activations"


def test_a_quantization_that_cannot_be_is_refused_at_its_field() -> None:
    with_gpu = replace(CPU, gpus=(Gpu(0, "g", 80 * GIB, 80 * GIB),))
    with pytest.raises(NoSuchNumbers, match="runs on a GPU") as refused:
        placed(with_gpu, quantization={"method": "int4", "activations": "int8"})
    assert (refused.value.path, refused.value.reason) == ("spec.quantization.activations", "ConfigRejected")
    four = placed(with_gpu, quantization={"method": "int4"})
    assert str(four.quantization) == "int4 in groups of 32, bf16 activations"
    assert (
        str(placed(CPU, quantization={"method": "int4"}).quantization) == "int4 in groups of 32, int8 activations"
    )
    with pytest.raises(NoSuchNumbers, match=r"64 inputs of .* groups of 128") as refused:
        placed(CPU, quantization={"method": "int4", "groupSize": 128})
    assert refused.value.path == "spec.quantization.groupSize"
    assert "groupSize: 32" in refused.value.hint


def test_keys_and_values_in_8_bits_are_placed_or_refused_at_their_field() -> None:
    eight = {"kvCache": {"dtype": "int8", "size": "4Mi"}}
    found = placed(CPU, engine=eight)
    assert found.kv_dtype == "int8"
    assert Placement.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    assert found.num_blocks == (4 << 20) // kv_block_bytes(profile_from_config(TINY), "int8", 16)
    engine = found.engine_spec("m", "m-r1-0", 1, "/s", spec(engine=eight), "hot", adoption_window=90.0)
    assert msgspec.json.decode(msgspec.json.encode(engine), type=EngineSpec).kv_dtype == "int8"
    with_gpu = replace(CPU, gpus=(Gpu(0, "g", 80 * GIB, 80 * GIB),))
    for dtype in ("int8", "fp8"):
        on_gpu = placed(with_gpu, engine={"kvCache": {"dtype": dtype, "size": "4Mi"}})
        assert (on_gpu.device, on_gpu.kv_dtype, on_gpu.num_blocks) == ("cuda", dtype, found.num_blocks)
        odd = profile_from_config(TINY | {"head_dim": 18})
        assert "head size 18 is no multiple of 4" in kv_misfit(odd, dtype, "cuda")
    with pytest.raises(NoSuchNumbers, match="on GPUs alone, and this model runs on a CPU") as refused:
        placed(CPU, engine={"kvCache": {"dtype": "fp8"}})
    assert (refused.value.path, refused.value.reason) == ("spec.engine.kvCache.dtype", "ConfigRejected")
    assert "int8" in refused.value.hint


def test_experts_run_on_a_gpu_in_fewer_bits_too() -> None:
    mixtral = TINY | {"architectures": ["MixtralForCausalLM"], "num_key_value_heads": 4}
    with_gpu = replace(CPU, gpus=(Gpu(0, "g", 80 * GIB, 80 * GIB),))
    for machine in (CPU, with_gpu):
        assert placed(machine, mixtral).weights == profile_from_config(mixtral).weight_bytes
    assert placed(with_gpu, mixtral).device == "cuda"
    for method in ("int8", "int4"):
        found = placed(with_gpu, mixtral, quantization={"method": method})
        assert found.quantization is not None
        assert (found.device, found.quantization.activations) == ("cuda", "bf16")
        assert found.weights == weight_bytes(profile_from_config(mixtral), "bfloat16", found.quantization)
        on_cpu = placed(CPU, mixtral, quantization={"method": method})
        assert (on_cpu.weights, str(on_cpu.quantization)[-16:]) == (found.weights, "int8 activations")
    with pytest.raises(NoSuchNumbers, match="experts in int8 meet int8 activations on a CPU alone") as refused:
        placed(with_gpu, mixtral, quantization={"method": "int8", "activations": "int8"})
    assert (refused.value.path, refused.value.reason) == ("spec.quantization.activations", "ConfigRejected")
    assert "activations: auto" in refused.value.hint


def test_without_chunked_prefill_the_context_is_one_step_long() -> None:
    found = placed(CPU, batching={"chunkedPrefill": False, "maxNumBatchedTokens": 512})
    assert found.max_model_len == 512


# ── sources ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    home = tmp_path / "hub" / "models--acme--small"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for name, digest in (("config.json", "a" * 40), ("model.safetensors", "b" * 64)):
        (home / "blobs" / digest).write_bytes(b"{}")
        (snapshot / name).symlink_to(Path("../../blobs") / digest)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    (tmp_path / "tiny").mkdir()
    return Sources(
        {"tiny": tmp_path / "tiny", "broken": tmp_path / "broken"}, HubCache(tmp_path / "hub", tmp_path / "r")
    )


def test_sources_lead_to_folders_and_branches_to_commits(sources: Sources, tmp_path: Path) -> None:
    assert sources.locate("builtin://tiny").folder == tmp_path / "tiny"
    assert sources.locate(f"file://{tmp_path}").folder == tmp_path
    for revision in (None, "main", "01234567"):
        found = sources.locate("hf://acme/small", revision)
        assert found.commit == "0123456789abcdef0123456789abcdef01234567"
        assert found.folder.name == found.commit


@pytest.mark.parametrize(
    ("source", "revision", "reason"),
    [
        ("builtin://huge", None, "NotFound"),
        ("builtin://broken", None, "NotFound"),
        ("file:///nowhere/at/all", None, "NotFound"),
        ("file://relative", None, "InvalidReference"),
        ("hf://acme/other", None, "NotFound"),
        ("hf://acme/small", "v2", "NotFound"),
        ("hf://acme/small", "fedcba98", "NotFound"),
        ("hf://../../etc", None, "InvalidReference"),
        ("hf://acme/small", "../../../etc", "InvalidReference"),
        ("s3://bucket/key", None, "InvalidReference"),
    ],
)
def test_a_source_that_leads_nowhere_says_why(
    sources: Sources, source: str, revision: str | None, reason: str
) -> None:
    with pytest.raises(SourceError) as wrong:
        sources.locate(source, revision)
    assert wrong.value.reason == reason
    assert wrong.value.hint


def test_the_cache_is_where_its_own_tools_look(tmp_path: Path) -> None:
    def root(**environ: str) -> Path:
        return Sources.of_environment({}, tmp_path, environ).cache.root

    assert root(HF_HUB_CACHE="/a") == Path("/a")
    assert root(HF_HOME="/b") == Path("/b/hub")
    assert root(XDG_CACHE_HOME="/c") == Path("/c/huggingface/hub")


# ── paths ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_socket_paths_fit_and_folders_are_closed_to_others(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    state = StateDir(deep)
    longest = state.replica_dir("m" * 63 + "-r1000-1000") / "1000000" / "engine.sock"
    assert len(str(longest).encode()) <= 107
    assert state.runtime != StateDir(tmp_path).runtime
    state.create()
    try:
        assert state.root.stat().st_mode & 0o777 == 0o700
        assert state.runtime.stat().st_mode & 0o777 == 0o700
        state.create()
    finally:
        for folder in (state.replicas, state.gateway, state.runtime):
            folder.rmdir()


def test_a_folder_that_others_may_enter_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "link"):
        with pytest.raises(StateDirError, match="mode 0700"):
            private_dir(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        check_private(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_the_state_directory_follows_the_environment() -> None:
    assert StateDir.default({"QUIRE_STATE_DIR": "/q"}).root == Path("/q")
    assert StateDir.default({"XDG_STATE_HOME": "/s"}).root == Path("/s/quire")
    assert StateDir.default({}).root == Path.home() / ".local/state/quire"
