"""Reading config.json and safetensors headers: real files in, a profile or an error that names the place."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.effort import examples

from quire_schemas import checkpoint
from quire_schemas.checkpoint import ARCHITECTURES, expected_tensors, profile_from_config, read_profile
from quire_schemas.checkpoint_files import (
    BadHeader,
    CheckpointError,
    InvalidConfig,
    MissingFile,
    UnsupportedArchitecture,
    UnsupportedFeature,
    WrongTensors,
    read_header,
    read_tensors,
)
from quire_schemas.fp8 import Fp8Profile

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float32",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "num_key_value_heads": 1}
GPT_OSS = {"architectures": ["GptOssForCausalLM"], "num_key_value_heads": 1}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "num_key_value_heads": 1}
MXFP4: dict[str, Any] = {"quant_method": "mxfp4"}
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2}


def safetensors(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def pack(shapes: dict[str, tuple[int, ...]], dtype: str = "F32", size: int = 4) -> bytes:
    """A well-formed file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return safetensors(header, bytes(at))


def folder(path: Path, config: dict[str, Any] = SMALL, dtype: str = "F32", size: int = 4) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    shapes = dict(expected_tensors(profile_from_config(config)))
    (path / "model.safetensors").write_bytes(pack(shapes, dtype, size))
    return path


def refused(kind: type[CheckpointError], *words: str) -> Any:
    """`pytest.raises` for that kind, whose text has all words (patterns) in order and a line with a hint."""
    return pytest.raises(kind, match=r"(?s)^(?=.*\n    hint: \S).*" + ".*".join(words))


# ── config.json ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_config_that_leaves_everything_out_has_the_defaults_of_transformers(name: str) -> None:
    import transformers

    config = {"Gemma3ForCausalLM": "Gemma3TextConfig"}.get(name, name.replace("ForCausalLM", "Config"))
    theirs = getattr(transformers, config)()
    ours = profile_from_config({"architectures": [name]})
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.hidden_size, ours.intermediate_size) == (theirs.hidden_size, theirs.intermediate_size)
    assert (ours.num_layers, ours.num_heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert (ours.vocab_size, ours.rms_norm_eps) == (theirs.vocab_size, theirs.rms_norm_eps)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    theta = getattr(theirs, "default_theta", 10_000.0)
    if isinstance(theta, dict):
        assert ours.sliding_rope == {"rope_type": "default", "rope_theta": theta["local"]}
        theta = theta["global"]
    rope = {"rope_type": "default"} if name != "GptOssForCausalLM" else theirs.rope_parameters
    assert ours.rope_parameters == {**rope, "rope_theta": theta}
    if (kinds := getattr(theirs, "layer_types", None)) is not None:
        assert [f"{kind}_attention" for kind in ours.layer_kinds] == kinds
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logit_softcap == getattr(theirs, "final_logit_softcapping", None)
    assert ours.attention_scale == getattr(theirs, "query_pre_attn_scalar", ours.head_dim) ** -0.5
    if ours.experts is None:
        assert not hasattr(theirs, "num_experts_per_tok")
        return
    assert (ours.experts.num_experts, ours.experts.num_experts_per_tok) == (
        theirs.num_local_experts,
        theirs.num_experts_per_tok,
    )
    assert ours.experts.intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert ours.experts.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
    assert ours.experts.layers == (True,) * ours.num_layers


def test_the_public_figures_of_llama_3_1_8b() -> None:
    profile = profile_from_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3",
            "use_cache": True,
            "vocab_size": 128256,
        }
    )
    assert (profile.dtype, profile.head_dim, profile.q_size, profile.kv_size) == ("bfloat16", 128, 4096, 1024)
    assert profile.num_parameters == 8_030_261_248
    assert profile.weight_bytes == 16_060_522_496
    assert profile.rope_parameters["rope_theta"] == 500000.0
    assert profile.rope_parameters["rope_type"] == "llama3"
    assert profile.eos_token_ids == (128001, 128008, 128009)
    assert profile.layer_kinds == ("full",) * 32


def test_the_public_figures_of_models_with_experts() -> None:
    qwen = profile_from_config(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151936,
        }
    )
    assert qwen.num_parameters == 30_532_122_624
    assert qwen.experts is not None
    assert qwen.experts.norm_topk_prob
    mixtral = profile_from_config(
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rope_theta": 1000000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        }
    )
    assert mixtral.num_parameters == 46_702_792_704
    names = [name for name, _ in expected_tensors(mixtral)]
    assert "model.layers.31.block_sparse_moe.experts.7.w2.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


def test_which_layers_have_experts() -> None:
    qwen = SMALL | {"architectures": ["Qwen3MoeForCausalLM"], "num_key_value_heads": 2, "num_hidden_layers": 6}

    def layers(**changes: Any) -> list[int]:
        experts = profile_from_config(qwen | changes).experts
        return [] if experts is None else [at for at, routed in enumerate(experts.layers) if routed]

    assert layers() == [0, 1, 2, 3, 4, 5]
    assert layers(decoder_sparse_step=2) == [1, 3, 5]
    assert layers(decoder_sparse_step=2, mlp_only_layers=[3]) == [1, 5]
    assert layers(mlp_only_layers=[0, 1, 2, 3, 4, 5]) == layers(num_experts=0) == []
    small = profile_from_config(qwen | {"num_local_experts": 9, "num_experts_per_tok": 9})
    assert small.experts is not None
    assert small.experts.num_experts == 9
    sliding = profile_from_config(qwen | {"use_sliding_window": True, "sliding_window": 9})
    assert (sliding.sliding_window, set(sliding.layer_kinds)) == (9, {"sliding"})


def test_gemmas_rope_parameters_in_all_spellings() -> None:
    scaled, local = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "default", "rope_theta": 1e4}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaled}
    new = {"rope_parameters": {"full_attention": {**scaled, "rope_theta": 1e6}, "sliding_attention": local}}
    for spelling in (old, new, {"rope_scaling": scaled}):
        profile = profile_from_config(SMALL | GEMMA3 | spelling)
        assert profile.rope_parameters == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
        assert profile.sliding_rope == local
    alike = profile_from_config(SMALL | GEMMA3 | {"rope_theta": 1e4})
    assert (alike.rope_parameters, alike.sliding_rope) == (local, None)


@pytest.mark.parametrize(
    ("architecture", "figures", "count"),
    [
        ("Gemma2ForCausalLM", {"num_hidden_layers": 26}, 2_614_341_888),  # gemma-2-2b
        (
            "Gemma3ForCausalLM",  # gemma-3-1b
            {
                "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
                "vocab_size": 262_144,
            },
            999_885_952,
        ),
        ("GptOssForCausalLM", {"num_hidden_layers": 24, "num_local_experts": 32}, 20_914_757_184),  # gpt-oss-20b
    ],
)  # fmt: skip
def test_public_sizes(architecture: str, figures: dict[str, Any], count: int) -> None:
    assert profile_from_config({"architectures": [architecture], **figures}).num_parameters == count


def test_old_and_new_spelling_of_rope_parameters_are_one() -> None:
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    new = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}
    both = [profile_from_config(SMALL | spelling).rope_parameters for spelling in (old, new)]
    assert both[0] == both[1]
    assert both[0]["original_max_position_embeddings"] == 64
    assert both[0]["truncate"] is True


def test_kinds_of_layers() -> None:
    qwen = SMALL | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1, "sliding_window": 9}
    assert profile_from_config(qwen).sliding_window is None
    sliding = profile_from_config(qwen | {"use_sliding_window": True, "max_window_layers": 1})
    assert (sliding.sliding_window, sliding.layer_kinds) == (9, ("full", "sliding"))
    listed = qwen | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    assert profile_from_config(listed).layer_kinds == ("sliding", "full")
    mistral = SMALL | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    assert profile_from_config(mistral).layer_kinds == ("sliding", "sliding")
    assert profile_from_config(mistral | {"sliding_window": None}).layer_kinds == ("full", "full")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "8"}, ["config.json: hidden_size", "'8'"]),
        ({"hidden_size": 0}, ["config.json: hidden_size"]),
        ({"num_hidden_layers": 10**9}, ["config.json: num_hidden_layers"]),
        ({"vocab_size": True}, ["config.json: vocab_size"]),
        ({"rms_norm_eps": math.nan}, ["config.json: rms_norm_eps"]),
        ({"rms_norm_eps": -1.0}, ["config.json: rms_norm_eps"]),
        ({"hidden_size": 9}, ["hidden_size: 9 is no multiple"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads: 3 does not divide"]),
        ({"head_dim": 7}, ["head_dim: 7 is odd"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor: is missing"]),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, ["rope_scaling.factor: expected a positive number"]),
        ({"rope_parameters": {"rope_theta": 0}}, ["rope_parameters.rope_theta"]),
        ({"eos_token_id": "two"}, ["config.json: eos_token_id"]),
        (
            {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "layer_types": ["full_attention"]},
            ["layer_types: has 1 entries for 2 layers"],
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "num_key_value_heads": 2,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            ["no sliding window is in use"],
        ),
        (GEMMA2 | {"sliding_window": None}, ["sliding_window: is null"]),
        (GPT_OSS | {"sliding_window": None}, ["sliding_window: is null"]),
        (
            GEMMA2 | {"sliding_window": None, "layer_types": ["full_attention", "sliding_attention"]},
            ["layer_types: names sliding layers"],
        ),
        (
            GPT_OSS | {"quantization_config": MXFP4 | {"modules_to_not_convert": [5]}},
            ["quantization_config.modules_to_not_convert: expected names"],
        ),
        (GEMMA2 | {"final_logit_softcapping": 0}, ["final_logit_softcapping", "got 0"]),
        (GEMMA2 | {"query_pre_attn_scalar": -1}, ["query_pre_attn_scalar", "got -1"]),
        (GEMMA2 | {"layer_types": ["full_attention"]}, ["layer_types: has 1 entries for 2 layers"]),
        (
            GEMMA3 | {"rope_parameters": {"rope_theta": 1e4}},
            ["rope_parameters", "full_attention and sliding_attention"],
        ),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_theta": 0}}},
            ["rope_parameters.sliding_attention.rope_theta"],
        ),
        (MIXTRAL | {"num_experts_per_tok": 9}, ["num_experts_per_tok: 9 of 8 experts"]),
        (MIXTRAL | {"num_experts_per_tok": 0}, ["num_experts_per_tok"]),
        (GPT_OSS | {"num_local_experts": 0}, ["num_local_experts: is 0"]),
        (GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}, ["hidden_size: 8 is no whole", "of 32"]),
        (GPT_OSS | {"swiglu_limit": 0.0}, ["swiglu_limit", "got 0.0"]),
        (MIXTRAL | {"num_local_experts": 0}, ["num_local_experts: is 0"]),
        (MIXTRAL | {"num_local_experts": 8, "num_experts": 4}, ["num_local_experts: 8, but num_experts is 4"]),
        (MIXTRAL | {"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 0}, ["decoder_sparse_step"]),
    ],
)
def test_config_values_that_make_no_sense(change: dict[str, Any], words: list[str]) -> None:
    with refused(InvalidConfig, *words):
        profile_from_config(SMALL | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act: gelu"]),
        ({"dtype": "float64"}, ["dtype: float64"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantised by gptq"]),
        ({"quantization_config": {"quant_method": "mxfp4"}}, ["quantised by mxfp4", "in bfloat16"]),
        (GPT_OSS | {"quantization_config": {"quant_method": "awq"}}, ["quantised by awq"]),
        (GPT_OSS | {"quantization_config": FP8}, ["GptOssForCausalLM in fp8"]),
        (
            GPT_OSS | {"quantization_config": MXFP4 | {"dequantize": True}},
            ["quantization_config.dequantize: True"],
        ),
        (GPT_OSS | {"quantization_config": MXFP4 | {"group": 16}}, ["quantization_config.group is not known"]),
        *(
            (
                GPT_OSS | {"quantization_config": MXFP4 | {"modules_to_not_convert": ["lm_head", kept]}},
                [f"modules_to_not_convert: {kept}: experts in floats"],
            )
            for kept in ("model.layers.1", "mlp", "model.layers.*.mlp.experts", "experts")
        ),
        (GPT_OSS | {"hidden_act": "gelu"}, ["hidden_act: gelu", "silu only"]),
        ({"quantization_config": [1]}, ["quantised by unnamed"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["weight_block_size: None"]),
        ({"quantization_config": FP8 | {"weight_block_size": [1, 128]}}, ["weight_block_size:"]),
        ({"quantization_config": FP8 | {"weight_block_size": [128.0, 128]}}, ["weight_block_size:", "128.0, 128"]),
        (
            {"quantization_config": FP8 | {"activation_scheme": "static"}},
            ["activation_scheme: 'static'", "dynamic"],
        ),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, ["fmt: 'e5m2'"]),
        ({"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}, ["scale_fmt: 'ue8m0'"]),
        ({"quantization_config": FP8 | {"dequantize": 0}}, ["dequantize: 0"]),
        ({"quantization_config": FP8 | {"modules_to_convert": ["lm_head"]}}, ["modules_to_convert:"]),
        ({"quantization_config": FP8 | {"kv_cache_scheme": {}}}, ["quantization_config.kv_cache_scheme"]),
        ({"auto_map": {"AutoModel": "m.M"}}, ["auto_map"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor: 0.5"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["rope type 'longrope'", "default, linear, dynamic"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["per kind of layer"]),
        (GEMMA2 | {"hidden_activation": "gelu"}, ["hidden_activation: gelu", "gelu_pytorch_tanh only"]),
        (GEMMA2 | {"use_bidirectional_attention": True}, ["use_bidirectional_attention: true"]),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping: 50"]),
        (GEMMA3 | {"rope_scaling": {"rope_type": "longrope"}}, ["rope_scaling: rope type 'longrope'"]),
        (
            {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "layer_types": ["a", "b"]},
            ["layer_types"],
        ),
    ],
)
def test_known_architectures_with_unknown_features(change: dict[str, Any], words: list[str]) -> None:
    with refused(UnsupportedFeature, *words):
        profile_from_config(SMALL | change)


def test_a_gpt_oss_as_it_is_published_keeps_what_is_in_floats_anyway() -> None:
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    shape = SMALL | GPT_OSS | {"hidden_size": 32, "intermediate_size": 64}
    full = MXFP4 | {"modules_to_not_convert": kept, "dequantize": False}
    profile = profile_from_config(shape | {"quantization_config": full})
    assert replace(profile, raw={}) == replace(profile_from_config(shape | {"quantization_config": MXFP4}), raw={})
    assert profile.experts is not None
    assert profile.experts.packed
    assert profile.weight_bytes < profile_from_config(shape).weight_bytes


def test_what_a_checkpoint_in_fp8_takes_is_known_from_its_config() -> None:
    """As it is published, before the weights are there."""
    full = FP8 | {
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", "mlp.up_proj"],
    }
    profile, plain = profile_from_config(SMALL | {"quantization_config": full}), profile_from_config(SMALL)
    assert profile.fp8 is not None
    coded = [(n, s) for n, s in expected_tensors(plain) if n.endswith("_proj.weight") and "up_proj" not in n]
    assert coded == [(name, shape) for name, shape in expected_tensors(profile) if profile.fp8.holds(name, shape)]
    assert plain.dtype == "float32"
    saved = sum(3 * math.prod(shape) - 4 * math.prod(-(-n // 128) for n in shape) for _, shape in coded)
    assert profile.weight_bytes == plain.weight_bytes - saved


@pytest.mark.parametrize("names", ["lm_head", [3], [""], {}])
def test_modules_that_are_kept_are_a_list_of_names(names: object) -> None:
    with refused(InvalidConfig, "quantization_config.modules_to_not_convert"):
        profile_from_config(SMALL | {"quantization_config": FP8 | {"modules_to_not_convert": names}})


def test_modules_that_are_kept_have_two_spellings_that_may_not_differ() -> None:
    names = ["lm_head", "mlp.down_proj"]
    for keys in (["modules_to_not_convert"], ["ignored_layers"], ["modules_to_not_convert", "ignored_layers"]):
        found = profile_from_config(SMALL | {"quantization_config": FP8 | dict.fromkeys(keys, names)})
        assert found.fp8 == Fp8Profile(frozenset(names))
    both = {"modules_to_not_convert": names, "ignored_layers": ["lm_head"]}
    with refused(InvalidConfig, "ignored_layers: has other names"):
        profile_from_config(SMALL | {"quantization_config": FP8 | both})


@pytest.mark.parametrize("value", [["GPT2LMHeadModel"], ["LlamaModel"], [], None, "LlamaForCausalLM", [3]])
def test_an_unsupported_architecture_lists_those_there_are(value: object) -> None:
    found = "is missing" if value is None else ""
    with refused(
        UnsupportedArchitecture, "architectures", found, "hint: this version runs .*LlamaForCausalLM, Mistral"
    ):
        profile_from_config(SMALL | {"architectures": value})


# ── the folder ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_folder(tmp_path: Path) -> None:
    profile = read_profile(folder(tmp_path, SMALL | {"tie_word_embeddings": True}, "BF16", 2))
    assert profile.weight_bytes == profile.num_parameters * 2
    assert profile.dtype == "float32"  # config.json's word: what the engine computes in unless told otherwise


def test_without_a_dtype_the_tensors_decide(tmp_path: Path) -> None:
    config = {key: value for key, value in SMALL.items() if key != "dtype"}
    assert read_profile(folder(tmp_path, config, "BF16", 2)).dtype == "bfloat16"


def test_generation_config_names_the_ids_that_end_a_text(tmp_path: Path) -> None:
    folder(tmp_path, SMALL | {"eos_token_id": 5})
    assert read_profile(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_profile(tmp_path).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with refused(InvalidConfig, r"generation_config\.json: eos_token_id"):
        read_profile(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with refused(MissingFile, "not a folder"):
        read_profile(tmp_path / "nothing")
    with refused(MissingFile, r"no config\.json"):
        read_profile(tmp_path)
    folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with refused(MissingFile, r"no model\.safetensors"):
        read_profile(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.gguf"])
def test_formats_that_can_carry_code_are_refused(name: str, tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with refused(UnsupportedFeature, name.replace(".", r"\."), "only safetensors"):
        read_profile(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"a": ' * 100_000, "\xff"])
def test_config_json_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "config.json").write_text(text, "latin-1")
    with refused(InvalidConfig, r"config\.json"):
        read_profile(tmp_path)


def test_tensors_must_be_those_of_the_config(tmp_path: Path) -> None:
    shapes = dict(expected_tensors(profile_from_config(SMALL)))
    folder(tmp_path)
    path = tmp_path / "model.safetensors"

    path.write_bytes(pack({name: shape for name, shape in shapes.items() if "k_proj" not in name}))
    with refused(WrongTensors, r"layers\.0\.self_attn\.k_proj\.weight is in none"):
        read_profile(tmp_path)
    path.write_bytes(pack(shapes | {"model.norm.weight": (9,)}))
    with refused(WrongTensors, r"model\.norm\.weight has shape \[9\], expected \[8\]"):
        read_profile(tmp_path)
    path.write_bytes(pack(shapes | {"model.layers.0.self_attn.q_proj.bias": (8,)}))
    with refused(WrongTensors, r"q_proj\.bias has no place in LlamaForCausalLM"):
        read_profile(tmp_path)
    path.write_bytes(pack(shapes, "I32"))
    with refused(WrongTensors, "stored as I32"):
        read_profile(tmp_path)
    path.write_bytes(pack(shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}))
    assert read_profile(tmp_path).weight_bytes == sum(math.prod(shape) * 4 for shape in shapes.values())


def test_experts_that_are_stored_together_are_parts_of_one_tensor(tmp_path: Path) -> None:
    config = SMALL | MIXTRAL | {"num_local_experts": 3}
    profile = profile_from_config(config)
    shapes = {name: shape for name, shape in expected_tensors(profile) if "block_sparse_moe" not in name}
    for layer in (0, 1):
        at = f"model.layers.{layer}.mlp"
        shapes |= {
            f"{at}.gate.weight": (3, 8),
            f"{at}.experts.gate_up_proj": (3, 24, 8),
            f"{at}.experts.down_proj": (3, 8, 12),
        }
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(shapes))
    assert read_profile(tmp_path).weight_bytes == profile.weight_bytes
    stored = read_tensors(tmp_path)
    found = checkpoint.each_expert(profile, stored)
    assert {name: tensor.shape for name, tensor in found.items()} == dict(expected_tensors(profile))
    whole = stored["model.layers.1.mlp.experts.gate_up_proj"]
    up = found["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert (up.offset, up.nbytes) == (whole.offset + 5 * 12 * 8 * 4, 12 * 8 * 4)
    path.write_bytes(pack(shapes | {"model.layers.1.mlp.experts.down_proj": (3, 8, 13)}))
    with refused(WrongTensors, r"layers\.1\.block_sparse_moe\.experts\.0\.w2\.weight is in none"):
        read_profile(tmp_path)


# ── shards ────────────────────────────────────────────────────────────────────────────────────────────────


def sharded(path: Path) -> dict[str, Any]:
    """Two shards and their index; returns the index."""
    folder(path)
    (path / "model.safetensors").unlink()
    shapes = list(expected_tensors(profile_from_config(SMALL)))
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate((shapes[:7], shapes[7:]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        (path / name).write_bytes(pack(dict(part)))
        index["weight_map"] |= {tensor: name for tensor, _ in part}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_give_the_same_profile_as_one_file(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    sharded(tmp_path / "two")
    assert read_profile(folder(tmp_path / "one")) == read_profile(tmp_path / "two")
    assert len({tensor.file for tensor in read_tensors(tmp_path / "two").values()}) == 2


def test_an_index_that_contradicts_its_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    first = "model.embed_tokens.weight"
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

    def put(weight_map: object) -> None:
        path.write_text(json.dumps({"weight_map": weight_map}))

    good = index["weight_map"]
    put(good | {first: two})
    with refused(InvalidConfig, first, f"{two} holds no such tensor"):
        read_profile(tmp_path)
    put({name: file for name, file in good.items() if name != first})
    with refused(InvalidConfig, first, f"in {one}, but the index does not list it"):
        read_profile(tmp_path)
    put(good | {first: "../" + one})
    with refused(InvalidConfig, first, "not the name of a file"):
        read_profile(tmp_path)
    put(good | {first: 3})
    with refused(InvalidConfig, first):
        read_profile(tmp_path)
    put([])
    with refused(InvalidConfig, "weight_map"):
        read_profile(tmp_path)
    put(good)
    read_profile(tmp_path)
    (tmp_path / two).write_bytes(pack(dict(list(expected_tensors(profile_from_config(SMALL)))[6:])))
    with refused(InvalidConfig, "but the index places it in"):
        read_profile(tmp_path)
    (tmp_path / two).unlink()
    with refused(MissingFile, f"{two}: listed in"):
        read_profile(tmp_path)


# ── headers ───────────────────────────────────────────────────────────────────────────────────────────────


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["too few"]),
        (b"1234567", ["too few"]),
        (struct.pack("<Q", 2**63) + b"{}", ["announces a header"]),
        (struct.pack("<Q", 100_000_001), ["announces a header"]),
        (struct.pack("<Q", 3) + b"{}", ["announces a header of 3 bytes in a file of 10"]),
        (safetensors(b"[]", b""), ["not a JSON object"]),
        (safetensors(b"\xff\xfe", b""), ["header is not valid"]),
        (safetensors(b"[" * 100_000, b""), ["header is not valid"]),
        (safetensors(b'{"a": {}, "a": {}}', b""), ["'a' occurs twice"]),
        (safetensors({"a": 3}, b""), ["tensor 'a'"]),
        (safetensors({"a": {"dtype": "F32"}}, b""), ["expected dtype, shape and data_offsets"]),
        (safetensors({"a": entry(0, 4, dtype="F33")}, bytes(4)), ["unknown dtype 'F33'"]),
        (safetensors({"a": entry(0, 4, dtype=["F32"])}, bytes(4)), ["unknown dtype"]),
        (safetensors({"a": entry(0, 4, [-1])}, bytes(4)), [r"shape \[-1\]"]),
        (safetensors({"a": entry(0, 4, [True])}, bytes(4)), ["shape"]),
        (safetensors({"a": entry(0, 4, [1.0])}, bytes(4)), ["shape"]),
        (safetensors({"a": entry(0, 4, 1)}, bytes(4)), ["shape"]),
        (safetensors({"a": entry(0, 4, [2**40, 2**40])}, bytes(4)), ["4 bytes for shape"]),
        (safetensors({"a": entry(0, 8)}, bytes(4)), ["bytes 0 to 8 of 4"]),
        (safetensors({"a": entry(4, 0, [1])}, bytes(4)), ["bytes 4 to 0"]),
        (safetensors({"a": entry(-4, 0, [1])}, bytes(4)), ["not two positions"]),
        (safetensors({"a": {**entry(0, 4), "data_offsets": [0]}}, bytes(4)), ["not two positions"]),
        (safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), ["'b' overlaps"]),
        (safetensors({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), ["overlaps"]),
        (safetensors({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), ["'b' leaves a hole"]),
        (safetensors({"a": entry(4, 8)}, bytes(8)), ["'a' leaves a hole"]),
        (safetensors({"a": entry(0, 4)}, bytes(9)), ["5 bytes at the end"]),
    ],
)
def test_headers_that_are_wrong(data: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with refused(BadHeader, r"x\.safetensors: ", *words):
        read_header(path)


def test_a_good_header_gives_places_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"b": (2, 3), "empty": (0, 5), "a": (4,), "scalar": ()}, "BF16", 2))
    found = read_header(path)
    start = path.stat().st_size - 22
    assert [(t.name, t.shape, t.offset - start, t.nbytes) for t in found.values()] == [
        ("b", (2, 3), 0, 12),
        ("empty", (0, 5), 12, 0),
        ("a", (4,), 12, 8),
        ("scalar", (), 20, 2),
    ]


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = pack({"a": (3,), "b": (2, 2)})
    path = tmp_path / "x.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BadHeader):
            read_header(path)


@settings(max_examples=examples(300), deadline=None)
@given(data=st.data())
@example(data=None)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject | None
) -> None:
    whole = bytearray(pack({"a": (3,), "b": (2, 2), "c": (0,)}))
    if data is not None:
        for _ in range(data.draw(st.integers(1, 4))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(whole)
    try:
        tensors = read_header(path)
    except BadHeader:
        return
    size = path.stat().st_size
    assert all(0 < tensor.offset <= tensor.offset + tensor.nbytes <= size for tensor in tensors.values())


def test_the_module_does_not_load_torch() -> None:
    import subprocess
    import sys

    code = "import sys, quire_schemas.checkpoint, quire_schemas.sizing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    assert checkpoint.DTYPE_BYTES.keys() == {"float32", "bfloat16", "float16"}
