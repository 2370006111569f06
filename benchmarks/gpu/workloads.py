"""Models by their shapes, lengths of requests, and how much of all that is run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.workload import Lengths

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "use_sliding_window": False,
        "attention_bias": False,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "use_sliding_window": False,
        "attention_bias": False,
    },
}

Pairs = Sequence[tuple[int, int]]
"""Tokens of each request's prompt, and of its answer."""
_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run: all of it, or, in a rehearsal, the least that goes the same way."""

    small: bool = False

    def shape(self, name: str) -> dict[str, Any]:
        """The config.json of a model."""
        shape = SHAPES[name]
        if not self.small:
            return shape
        return shape | _SMALL | (_SMALL_EXPERTS if "num_experts" in shape else {})

    def at_most(self, number: int, least: int) -> int:
        """`number`, of which a rehearsal does no more than `least`."""
        return min(number, least) if self.small else number

    def pairs(self, pairs: Pairs) -> Pairs:
        return [(min(prompt, 9), min(output, 6)) for prompt, output in pairs[:4]] if self.small else pairs

    def stands_for(self, **figures: Any) -> dict[str, Any]:
        """What a row of a rehearsal says besides: the workload that it stands for."""
        return {"stands_for": figures} if self.small else {}


def nano_lengths() -> Pairs:
    """256 requests, prompts and outputs uniform in 100 … 1024, as published with seed 0."""
    rng = random.Random(0)
    # the ids are drawn between the lengths there, so they are here: 142,827 tokens in, 133,966 out
    prompts = [len([rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))]) for _ in range(256)]
    return [(length, rng.randint(100, 1024)) for length in prompts]


def sharegpt_lengths(count: int) -> Pairs:
    """Lognormal around the means of filtered ShareGPT (216 in, 196 out), clipped as its filters do."""
    rng, found = random.Random(0), list[tuple[int, int]]()
    prompts, outputs = (Lengths(mean=mean, low=4, high=1024) for mean in (216, 196))
    while len(found) < count:
        found.append((prompts.draw(rng), outputs.draw(rng)))
    return found
