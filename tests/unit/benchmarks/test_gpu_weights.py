"""The weights of benchmarks on a GPU, given out on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.gpu.weights import RandomWeights

from quire_engine.quantization import linear_method
from quire_kernels import load
from quire_schemas.checkpoint import profile_from_config
from quire_schemas.wire import Quantization

PROFILE = profile_from_config(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
)


@pytest.mark.parametrize("quantization", [None, Quantization("int8"), Quantization("fp8", "fp8")], ids=str)
def test_a_linear_with_biases_is_made_of_them(quantization: Quantization | None) -> None:
    weights: Any = RandomWeights(PROFILE, torch.device("cpu"))
    method = linear_method(weights, load("reference"), quantization)
    linear = method.linear("model.layers.0.self_attn", ("q_proj", "k_proj", "v_proj"), bias=True)
    found = linear(torch.zeros(1, 64, dtype=torch.bfloat16))
    assert found.shape == (1, 128)
    assert found.isfinite().all()
    assert found.abs().sum() > 0, "the biases"
    assert weights.stack(["model.norm.weight"], torch.float32).dtype == torch.float32
