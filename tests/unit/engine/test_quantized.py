"""Models whose weights are quantized while they load, against plain models of numbers that were rounded before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine_specs import run, tiny_spec
from tests.unit.engine.test_models import CPU, VOCAB, build
from torch import Tensor

from quire_engine import weights as weights_module
from quire_engine.attest import attest
from quire_engine.engine import Engine
from quire_engine.errors import InvalidSpec, MemoryMismatch
from quire_engine.models import DecoderModel, KVCache, load_model
from quire_kernels import PagedBatch, load
from quire_schemas import quantization as quantization_module
from quire_schemas.checkpoint import read_profile
from quire_schemas.checkpoint_files import WrongTensors
from quire_schemas.sizing import activation_bytes, kv_block_bytes, weight_bytes
from quire_schemas.wire import Generate, Quantization, Sampling

INT8, INT4 = Quantization("int8"), Quantization("int4", group_size=32)
IDS = torch.arange(40) * 7 % VOCAB


def open_model(folder: Path, quantization: Quantization | None = None, backend: str = "reference") -> DecoderModel:
    return load_model(
        folder,
        read_profile(folder),
        dtype=torch.float32,
        device=CPU,
        kernels=load(backend),
        on_progress=lambda done, total: None,
        quantization=quantization,
    )


def logits(model: DecoderModel) -> Tensor:
    """Of every token of one prompt."""
    kv = KVCache.allocate(model.profile, 16, 16, torch.float32, CPU)
    batches = [
        PagedBatch.build(
            starts=[0],
            query_lens=[len(IDS)],
            block_tables=[[at + 3, at + 1, at + 2]],
            logits=[len(IDS)],
            block_size=16,
        )
        for at in range(0, 3 * len(kv.groups), 3)
    ]
    return model.logits(model.forward(IDS, batches, kv))


def rounded(weight: Tensor, quantization: Quantization) -> Tensor:
    """What the integers stand for, worked out in double precision."""
    wide = weight.double()
    if quantization.method == "int8":
        scale = wide.abs().amax(1, keepdim=True) / 127
        return ((wide / scale).round() * scale).float()
    assert quantization.group_size is not None
    groups = wide.view(len(wide), -1, quantization.group_size)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = (largest / -8).bfloat16().double()
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(wide).float()


def round_checkpoint(source: Path, target: Path, quantization: Quantization, *, tied: bool) -> None:
    """The checkpoint in `source` with its linear layers and its head rounded, and no router of experts."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and not name.endswith(".gate.weight") and (tied or "embed_tokens" not in name):
            tensors[name] = rounded(tensor, quantization)
    save_file(tensors, target / "model.safetensors")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-tied",
        "llama-biases",
        "qwen2-tied",
        "qwen3-bias",
        "mistral-sliding",
        "mixtral",
        "qwen3-moe",
        "gemma3-capped",
    ],
)
def test_a_quantized_model_is_the_plain_one_of_rounded_weights(
    name: str, method: Any, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which tensors are rounded, fused stacks, biases, pieces. Activations stay, so nothing else differs."""
    monkeypatch.setattr(weights_module, "QUANTIZED_AT_A_TIME", 5 * 64)  # a few rows, and no whole number of them
    quantization = Quantization(method, "bf16", 32 if method == "int4" else None)
    build(name, tmp_path / "float")
    tied = read_profile(tmp_path / "float").tie_word_embeddings
    round_checkpoint(tmp_path / "float", tmp_path / "rounded", quantization, tied=tied)
    found = logits(open_model(tmp_path / "float", quantization, backend))
    expected = logits(open_model(tmp_path / "rounded"))
    # of logits around ten: products agree to 5e-7, and what is left of that behind shares of experts depends on
    # the order in which a processor adds. Unrounded weights are fifty times as far away and more
    torch.testing.assert_close(found, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    plain = logits(open_model(tmp_path / "float"))
    assert (plain - expected).abs().max() > 0.01, "rounding is what is looked at"


@pytest.mark.parametrize("quantization", [INT8, INT4], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "llama-biases",
        "qwen2-sliding",
        "qwen3-mqa-sliding",
        "llama-tied",
        "mixtral",
        pytest.param("gemma2", marks=pytest.mark.nightly),
    ],
)
def test_integers_in_and_out_give_about_the_same_and_the_same_in_any_company(
    name: str, quantization: Quantization, tmp_path: Path
) -> None:
    build(name, tmp_path)
    exact = Quantization(quantization.method, "bf16", quantization.group_size)
    rounds, keeps = (logits(open_model(tmp_path, each, "cpu")) for each in (quantization, exact))
    apart = (rounds - keeps).norm(dim=-1) / keeps.norm(dim=-1)
    assert 0 < apart.median() < 0.1, "of most tokens: one may be sent to another expert"
    for each in (quantization, exact):
        model = open_model(tmp_path, each, "cpu")
        kv = KVCache.allocate(model.profile, 40, 16, torch.float32, CPU)
        attest(model, kv, block_size=16, backend="cpu")


@pytest.mark.parametrize("quantization", [INT8, INT4], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_its_tensor(
    quantization: Quantization, number: float, tmp_path: Path
) -> None:
    build("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][50, 7] = number
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WrongTensors, match=r"layers\.1\.mlp\.up_proj\.weight.*not finite"):
        open_model(tmp_path, quantization)


def test_progress_is_of_the_whole_file(tmp_path: Path) -> None:
    build("qwen2", tmp_path)
    profile, seen = read_profile(tmp_path), []
    load_model(
        tmp_path,
        profile,
        dtype=torch.bfloat16,
        device=CPU,
        kernels=load("reference"),
        on_progress=lambda done, total: seen.append((done, total)),
        quantization=INT8,
    )
    assert seen == sorted(seen)
    assert seen[-1] == (profile.weight_bytes, profile.weight_bytes)


# ── engines ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("quantization", [INT8, INT4, Quantization("int4", group_size=128)], ids=str)
def test_an_engine_serves_what_was_planned_and_attests_it(quantization: Quantization) -> None:
    spec = tiny_spec(dtype="bfloat16", kv_dtype="bfloat16", quantization=quantization, batch_invariant=True)
    engine = Engine.load(spec)

    def ask(name: str, first: int) -> Generate:
        return Generate(name, list(range(first, 40)), Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))

    tokens = [token for delta in run(engine, ask("a", 9))["a"] for token in delta.token_ids]
    assert len(tokens) == 12
    again = Engine.load(tiny_spec(dtype="bfloat16", kv_dtype="bfloat16", quantization=quantization))
    found = run(again, *(ask(f"b{first}", first) for first in range(6)), ask("a", 9))
    assert [token for delta in found["a"] for token in delta.token_ids] == tokens


def test_the_limit_counts_the_bytes_of_the_method() -> None:
    profile = read_profile(Path(tiny_spec().model_dir))
    for quantization in (INT8, INT4):
        taken = weight_bytes(profile, "bfloat16", quantization) + 128 * kv_block_bytes(profile, "bfloat16", 16)
        taken += activation_bytes(profile, "bfloat16", 64, 8, 512, quantization=quantization)
        fields = {"dtype": "bfloat16", "kv_dtype": "bfloat16", "quantization": quantization}
        Engine.load(tiny_spec(**fields, memory_limit=taken))
        with pytest.raises(MemoryMismatch, match="above the limit"):
            Engine.load(tiny_spec(**fields, memory_limit=taken - 1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantization": Quantization("int8", group_size=32)}, "int8 weights have no groups of 32"),
        ({"quantization": Quantization("int4")}, "no groups of None"),
        ({"quantization": Quantization("int4", group_size=48)}, "no groups of 48"),
        ({"quantization": INT4, "device": "cuda"}, "int8 activations on a CPU alone"),
        ({"quantization": Quantization("int4", "fp16", 32)}, "fp16, and dtype is float32"),
        ({"quantization": INT8, "runner": "scripted"}, "no weights"),
        ({"quantization": Quantization("int8", "bf16")}, "dtype is float32"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        Engine.load(tiny_spec(**fields))


def test_a_checkpoint_without_whole_groups_is_refused_by_its_tensor(tmp_path: Path) -> None:
    build("llama", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 96
    with pytest.raises(
        InvalidSpec, match=r"96 inputs of model\.layers\.0\.mlp\.down_proj\.weight .* groups of 64"
    ):
        Engine.load(
            tiny_spec(model_dir=str(tmp_path), max_model_len=64, quantization=Quantization("int4", group_size=64))
        )


def test_the_two_sides_agree_on_groups() -> None:
    from quire_kernels.quantized import GROUP_SIZES

    assert quantization_module.GROUP_SIZES == GROUP_SIZES
