"""Checkpoints in fp8, and fp8 made of others, against plain models of what the codes stand for.

What they stand for is transformers' arithmetic where blocks are whole (it knows no others), and one scale a number
where they are not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine_specs import tiny_spec
from tests.unit.engine.test_models import CPU, VOCAB
from tests.unit.engine.test_quantized import logits
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from quire_engine.engine import Engine
from quire_engine.errors import InvalidSpec
from quire_engine.models import DecoderModel, load_model
from quire_engine.quantization.fp8 import Fp8
from quire_engine.weights import Weights
from quire_kernels import load, quantized
from quire_schemas import fp8
from quire_schemas.checkpoint import read_config, read_profile
from quire_schemas.checkpoint_files import CheckpointError
from quire_schemas.sizing import weight_bytes
from quire_schemas.wire import Quantization

DECLARED: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.06,
}
WHOLE = Qwen3Config(**SIZE, hidden_size=128, intermediate_size=256, head_dim=64)
"""Of which every weight is whole blocks."""
PARTS = LlamaConfig(**SIZE, hidden_size=136, intermediate_size=200, head_dim=48, attention_bias=True)
"""Of which none is, and parts of fused weights begin within a block."""
EXPERTS = Qwen3MoeConfig(
    **SIZE,
    hidden_size=128,
    intermediate_size=64,
    head_dim=32,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
)
FILE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
MODELS: dict[Any, Any] = {
    Qwen3Config: Qwen3ForCausalLM,
    LlamaConfig: LlamaForCausalLM,
    Qwen3MoeConfig: Qwen3MoeForCausalLM,
}
FP8 = Quantization("fp8", "fp8")
AS_IT_IS = Quantization("fp8", "fp32")


def in_blocks(weight: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes, and the scales of their blocks as a file has them."""
    scales = torch.zeros([-(-size // 128) for size in weight.shape], dtype=dtype)
    codes = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    for top, left in torch.cartesian_prod(*(torch.arange(size) for size in scales.shape)).tolist():
        here = slice(128 * top, 128 * top + 128), slice(128 * left, 128 * left + 128)
        scales[top, left] = weight[here].abs().max() / 440
        codes[here] = (weight[here] / scales[top, left].float()).to(torch.float8_e4m3fn)
    return codes, scales


def stand_for(codes: Tensor, scales: Tensor) -> Tensor:
    rows, columns = (torch.arange(size) // 128 for size in codes.shape)
    return codes.float() * scales.float()[rows][:, columns]


def checkpoints(
    config: Any, folder: Path, kept: tuple[str, ...] = ("lm_head",), dtype: torch.dtype = torch.float32
) -> tuple[Path, Path]:
    """A random model in fp8, and what it stands for in float32."""
    torch.manual_seed(3)
    kind: Any = MODELS[type(config)]
    model = kind._from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder / "wide")
    shutil.copytree(folder / "wide", folder / "coded")
    wide = load_file(folder / "wide" / FILE)
    coded = dict(wide)
    for name, tensor in wide.items():
        linear = tensor.dim() == 2 and "layers" in name and not name.endswith(".gate.weight")
        if linear and not any(f".{part}." in f".{name}" for part in kept):
            coded[name], coded[f"{name}_scale_inv"] = in_blocks(tensor, dtype)
            wide[name] = stand_for(coded[name], coded[f"{name}_scale_inv"])
    save_file(wide, folder / "wide" / FILE)
    save_file(coded, folder / "coded" / FILE)
    declare(folder / "coded", modules_to_not_convert=list(kept))
    return folder / "coded", folder / "wide"


def declare(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", DECLARED) | keys
    (folder / "config.json").write_text(json.dumps(config))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)


def opened(folder: Path, quantization: Quantization | None = None, backend: str = "reference") -> DecoderModel:
    seen: list[tuple[int, int]] = []
    profile = read_profile(folder)
    model = load_model(
        folder,
        profile,
        dtype=torch.float32,
        device=CPU,
        kernels=load(backend),
        on_progress=lambda done, total: seen.append((done, total)),
        quantization=quantization,
    )
    assert seen == sorted(seen)
    assert seen[-1] == (profile.weight_bytes, profile.weight_bytes)
    assert model.bytes == weight_bytes(profile, "float32", quantization)
    return model


def weights_of(folder: Path, dtype: torch.dtype) -> Weights:
    return Weights(folder, read_config(folder), dtype=dtype, device=CPU, on_progress=lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_widened_as_transformers_does(tmp_path: Path, dtype: torch.dtype) -> None:
    coded, _ = checkpoints(WHOLE, tmp_path, dtype=torch.bfloat16)
    tensors, weights = load_file(coded / FILE), weights_of(coded, dtype)
    assert tensors[UP].dtype == torch.float8_e4m3fn
    theirs: Any = Fp8Dequantize(None)
    for name in (UP, "model.layers.0.self_attn.k_proj.weight"):
        expected = theirs._dequantize_one(tensors[name], tensors[f"{name}_scale_inv"], output_dtype=dtype)
        assert torch.equal(weights.tensor(name), expected)
    exact = stand_for(tensors[UP], tensors[f"{UP}_scale_inv"])
    error = (weights.tensor(UP).float() - exact).abs() / exact.abs().clamp_min(1e-30)
    assert error.max() <= (0 if dtype == torch.float32 else 2**-8), "what the documentation says of bfloat16"


@pytest.mark.parametrize("config", [WHOLE, PARTS], ids=["whole blocks", "parts of blocks"])
def test_a_checkpoint_in_fp8_is_what_its_codes_stand_for(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire_engine.weights.QUANTIZED_AT_A_TIME", 5 * 128)  # a few rows, and no whole blocks
    coded, wide = checkpoints(config, tmp_path)
    expected = logits(opened(wide))
    for quantization, backend in ((None, "reference"), (None, "cpu"), (AS_IT_IS, "reference")):
        found = logits(opened(coded, quantization, backend))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    rounded = logits(opened(coded, FP8))
    assert 0.001 < (rounded - expected).norm() / expected.norm() < 0.1, "its input is rounded, too"
    integers = logits(opened(coded, Quantization("int8"), "cpu"))
    assert 0.001 < (integers - expected).norm() / expected.norm() < 0.1


def test_experts_in_fp8_are_kept_or_widened_and_their_router_is_none_of_them(tmp_path: Path) -> None:
    coded, wide = checkpoints(EXPERTS, tmp_path)
    expected = logits(opened(wide, backend="cpu"))
    torch.testing.assert_close(logits(opened(coded, backend="cpu")), expected, atol=1e-4, rtol=0)
    kept = opened(coded, AS_IT_IS)
    torch.testing.assert_close(logits(kept), expected, atol=1e-4, rtol=0)
    tensors = load_file(coded / FILE)
    codes = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype == torch.float8_e4m3fn)
    assert sum(part.nbytes for part in kept.parameters() if part.dtype == torch.uint8) == codes


def test_experts_in_floats_are_made_fp8(tmp_path: Path) -> None:
    _, wide = checkpoints(EXPERTS, tmp_path)
    plain, made = logits(opened(wide)), opened(wide, AS_IT_IS)
    assert 0.001 < (logits(made) - plain).norm() / plain.norm() < 0.1
    change(wide, lambda tensors: tensors[EXPERT].__setitem__((7, 3), torch.inf))
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight: .*not finite"):
        opened(wide, AS_IT_IS)


def test_modules_that_are_not_converted_are_floats(tmp_path: Path) -> None:
    kept = ("lm_head", "model.layers.0.self_attn", "layers.1.mlp.down_proj")
    coded, wide = checkpoints(PARTS, tmp_path, kept)
    expected = logits(opened(wide))
    for quantization in (None, AS_IT_IS):
        torch.testing.assert_close(logits(opened(coded, quantization)), expected, atol=1e-4, rtol=0)
    declare(coded, modules_to_not_convert=["model.layers.0.self_attn"])
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight is stored as F32.*F8_E4M3"):
        read_profile(coded)


@pytest.mark.parametrize("config", [WHOLE, PARTS], ids=["whole blocks", "parts of blocks"])
def test_fp8_is_made_of_floats_while_they_are_read(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are those of one read; the head is rounded, too, and the embedding is not."""
    _, wide = checkpoints(config, tmp_path)
    whole = logits(opened(wide, AS_IT_IS))
    monkeypatch.setattr("quire_engine.weights.QUANTIZED_AT_A_TIME", 5 * 128)
    assert torch.equal(logits(opened(wide, AS_IT_IS)), whole)
    plain = logits(opened(wide))
    assert 0.001 < (whole - plain).norm() / plain.norm() < 0.1
    change(wide, lambda tensors: tensors["lm_head.weight"].zero_())
    assert not logits(opened(wide, FP8)).any()
    change(wide, lambda tensors: tensors[UP].__setitem__((7, 3), torch.inf))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: .*not finite"):
        opened(wide, FP8)


LIES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no_scale": (lambda t: t.pop(f"{UP}_scale_inv"), f"{UP}_scale_inv is in none"),
    "a_scale_for_each_row": (
        lambda t: t.update({f"{UP}_scale_inv": torch.ones(256, 1)}),
        r"_scale_inv has shape \[256, 1\], expected \[2, 1\]",
    ),
    "one_scale": (lambda t: t.update({f"{UP}_scale_inv": torch.ones(())}), r"_scale_inv has shape \[\]"),
    "scales_of_larger_blocks": (lambda t: t.update({f"{UP}_scale_inv": torch.ones(1, 1)}), r"shape \[1, 1\]"),
    "scales_of_no_rows": (lambda t: t.update({f"{UP}_scale_inv": torch.ones(0, 1)}), r"shape \[0, 1\]"),
    "scales_that_are_exponents": (
        lambda t: t.update({f"{UP}_scale_inv": torch.ones(2, 1).to(torch.float8_e8m0fnu)}),
        "_scale_inv is stored as F8_E8M0",
    ),
    "codes_of_another_fp8": (
        lambda t: t.update({UP: t[UP].view(torch.float8_e5m2)}),
        f"{UP} is stored as F8_E5M2",
    ),
    "bytes": (lambda t: t.update({UP: t[UP].view(torch.uint8)}), f"{UP} is stored as U8"),
    "scales_of_nothing": (lambda t: t.update({"x_scale_inv": torch.ones(1, 1)}), "x_scale_inv has no place"),
    "scales_of_the_head": (
        lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 1)}),
        "lm_head.weight_scale_inv has no place",
    ),
    "a_scale_of_inputs": (
        lambda t: t.update({UP.replace("weight", "activation_scale"): torch.ones(())}),
        "activation_scale has no place",
    ),
    "a_head_in_fp8": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
        "lm_head.weight is stored as F8_E4M3",
    ),
}
IN_THE_DATA: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "nan": (lambda t: t[UP].view(torch.uint8)[200].fill_(127), f"{UP}: a code is not a number"),
    "minus_nan": (lambda t: t[UP].view(torch.uint8)[3, :1].fill_(255), f"{UP}: a code is not a number"),
    "scale_of_nan": (lambda t: t[f"{UP}_scale_inv"][1].fill_(torch.nan), f"{UP}_scale_inv: the scale of a block"),
    "negative_scale": (lambda t: t[f"{UP}_scale_inv"][1].fill_(-1), f"{UP}_scale_inv: the scale of a block"),
    "scale_that_overflows": (
        lambda t: t[f"{UP}_scale_inv"][0].fill_(3e38),
        f"{UP} stands for numbers that float32 cannot hold",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints(WHOLE, tmp_path_factory.mktemp("good"))[0]


@pytest.mark.parametrize("name", LIES)
def test_a_lying_checkpoint_is_refused_by_its_headers(name: str, good: Path, tmp_path: Path) -> None:
    edit, words = LIES[name]
    shutil.copytree(good, tmp_path / "bad")
    change(tmp_path / "bad", edit)
    for look in (read_profile, lambda folder: weights_of(folder, torch.float32)):
        with pytest.raises(CheckpointError, match=words) as refused:
            look(tmp_path / "bad")
        assert refused.value.hint


@pytest.mark.parametrize("name", IN_THE_DATA)
def test_what_only_the_data_tells_is_refused_by_its_tensor(name: str, good: Path, tmp_path: Path) -> None:
    edit, words = IN_THE_DATA[name]
    shutil.copytree(good, tmp_path / "bad")
    change(tmp_path / "bad", edit)
    profile = read_profile(tmp_path / "bad")
    for quantization in (None, FP8):
        if quantization is None or "overflows" not in name:  # as codes they are what they are
            with pytest.raises(CheckpointError, match=words):
                opened(tmp_path / "bad", quantization)
    assert profile.fp8 is not None


def test_an_fp8_tensor_needs_to_be_declared(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "bad")
    config = json.loads((good / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"stored as F8_E4M3(.|\n)*quantization_config"):
        read_profile(tmp_path / "bad")


def test_an_engine_on_a_cpu_widens_and_multiplies_no_fp8(good: Path) -> None:
    fields: dict[str, Any] = {"model_dir": str(good), "max_model_len": 64, "dtype": "bfloat16"}
    engine = Engine.load(tiny_spec(**fields, kv_dtype="bfloat16", batch_invariant=True))
    assert engine.backend in ("cpu", "reference")
    with pytest.raises(InvalidSpec, match="fp8 weights are multiplied on a GPU alone"):
        Engine.load(tiny_spec(**fields, kv_dtype="bfloat16", quantization=FP8))


def test_parts_of_a_fused_weight_are_all_read(tmp_path: Path) -> None:
    """By the bits: each output has the codes and the scale of its own tensor."""
    coded, wide = checkpoints(PARTS, tmp_path)
    method = Fp8(weights_of(coded, torch.float32), load("reference"), FP8)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    tensors = load_file(wide / FILE)
    stacked = method._stack(names)
    assert stacked.shared == 32
    assert torch.equal(stacked.dequantized(), torch.cat([tensors[name] for name in names]))


def test_the_two_sides_agree_on_blocks() -> None:
    assert quantized.FP8_BLOCK == fp8.BLOCK
