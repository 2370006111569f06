"""What is found in checkpoints that people know, by the figures of their published config.json."""

from __future__ import annotations

from typing import Any

import pytest

from quire_schemas.checkpoint import profile_from_config
from quire_schemas.findings import TextFacts, of_positions, of_text

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def yarn(factor: float, original: int) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


def config(architecture: str, positions: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        **more,
    }


QWEN_LONG = "positions are stretched (yarn, 4 × 32,768) at every length"
POSITIONS: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "Llama-2-7b": (config("Llama", 4096), 4096, []),
    "Meta-Llama-3-8B": (config("Llama", 8192, rope_theta=500000.0), 8192, []),
    "Llama-3.1-8B": (config("Llama", 131072, rope_scaling=LLAMA3), 131072, []),
    "Llama-3.2-1B": (config("Llama", 131072, rope_scaling={**LLAMA3, "factor": 32.0}), 131072, []),
    "TinyLlama-1.1B": (config("Llama", 2048), 2048, []),
    "SmolLM2-1.7B": (config("Llama", 8192, rope_theta=130000), 8192, []),
    "Yi-34B-200K": (config("Llama", 200000, rope_theta=10000000.0), 200000, []),
    "CodeLlama-7b": (config("Llama", 16384, rope_theta=1000000), 16384, []),
    "longchat, linear": (
        config("Llama", 16384, rope_scaling={"type": "linear", "factor": 8.0}), 16384, [],
    ),
    "vicuna, dynamic": (
        config("Llama", 4096, rope_scaling={"type": "dynamic", "factor": 2.0}), 4096,
        ["positions would be stretched (dynamic, 2 ×) beyond 4,096, where every context ends"],
    ),
    "Yarn-Llama-2-7b-128k": (
        config("Llama", 131072, rope_scaling=yarn(32.0, 4096)), 131072, [],
    ),
    "Yarn-Llama-2-7b-128k, short": (
        config("Llama", 131072, rope_scaling=yarn(32.0, 4096)), 4096,
        ["positions are stretched (yarn, 32 × 4,096) at every length"],
    ),
    "Qwen2.5-7B": (config("Qwen2", 32768), 32768, []),
    "Qwen2.5-7B-1M": (config("Qwen2", 1010000), 262144, []),
    "Qwen2.5-7B, stretched as its card says": (
        config("Qwen2", 32768, rope_scaling=yarn(4.0, 32768)), 32768,
        ["config.json allows 32,768 positions, and its rope parameters (yarn, 4 × 32,768) are made for 131,072",
         QWEN_LONG],
    ),
    "Qwen2.5-7B, stretched in full": (config("Qwen2", 131072, rope_scaling=yarn(4.0, 32768)), 131072, []),
    "Qwen2.5-7B, stretched in vain": (
        config("Qwen2", 131072, rope_scaling=yarn(4.0, 32768)), 16384, [QWEN_LONG],
    ),
    "Qwen2-7B with windows that are off": (
        config("Qwen2", 131072, use_sliding_window=False, sliding_window=131072), 131072, [],
    ),
    "Qwen2 with windows": (
        config("Qwen2", 32768, use_sliding_window=True, sliding_window=4096, max_window_layers=1), 32768,
        ["3 of 4 layers see the last 4,096 tokens alone, of a context of 32,768"],
    ),
    "Qwen3-8B": (config("Qwen3", 40960), 40960, []),
    "Qwen3-8B, stretched": (
        config("Qwen3", 40960, rope_scaling=yarn(4.0, 32768)), 40960,
        ["config.json allows 40,960 positions, and its rope parameters (yarn, 4 × 32,768) are made for 131,072"],
    ),
    "Mistral-7B-v0.1": (
        config("Mistral", 32768, sliding_window=4096), 32768,
        ["every layer sees the last 4,096 tokens alone, of a context of 32,768"],
    ),
    "Mistral-7B-v0.1, short": (config("Mistral", 32768, sliding_window=4096), 4096, []),
    "Mistral-7B-v0.3": (config("Mistral", 32768, sliding_window=None), 32768, []),
    "Mistral-Nemo": (config("Mistral", 131072, sliding_window=None, head_dim=16), 131072, []),
    "Mixtral-8x7B": (
        config("Mixtral", 32768, sliding_window=None, num_local_experts=8, num_experts_per_tok=2), 32768, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONS)
def test_what_is_found_of_positions(name: str) -> None:
    document, longest, expected = POSITIONS[name]
    found = of_positions(profile_from_config(document), longest)
    assert len(found) == len(expected), found
    for text, begins in zip(found, expected, strict=True):
        assert text.startswith(begins)


PLAIN = TextFacts(1000, True, ("</s>", 2))
TEXTS: dict[str, tuple[dict[str, Any], TextFacts, list[str]]] = {
    "all agree": ({"eos_token_id": 2}, PLAIN, []),
    "several ends": ({"eos_token_id": [2, 7]}, PLAIN, []),
    "a base model's end in a chat model": (
        {"eos_token_id": 3}, TextFacts(1000, True, ("<|im_end|>", 7)),
        ["answers end with token 3, as generation_config.json or config.json says, and not with the tokenizer's "
         "own end <|im_end|> (7)"],
    ),
    "no end at all": ({"eos_token_id": None}, PLAIN, ["no file names a token that ends an answer"]),
    "the tokenizer names none": ({"eos_token_id": 2}, TextFacts(1000, True, None), []),
    "no template": ({"eos_token_id": 2}, TextFacts(1000, False, ("</s>", 2)), ["there is no chat template"]),
    "a larger vocabulary": (
        {"eos_token_id": 2}, TextFacts(1003, True, ("</s>", 2)),
        ["the tokenizer has 1,003 ids and the model 1,000"],
    ),
    "a padded vocabulary": ({"eos_token_id": 2}, TextFacts(936, True, ("</s>", 2)), []),
    "advice": (
        {"eos_token_id": 2}, TextFacts(1000, True, ("</s>", 2), {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        ["requests that leave sampling out are drawn with temperature 0.6, top_p 0.95, top_k 20"],
    ),
    "greedy advice": (
        {"eos_token_id": 2}, TextFacts(1000, True, ("</s>", 2), {"temperature": 0.0}),
        ["requests that leave sampling out are greedy"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_found_of_texts(name: str) -> None:
    more, facts, expected = TEXTS[name]
    found = of_text(profile_from_config(config("Llama", 4096, **more)), facts)
    assert len(found) == len(expected), found
    for text, begins in zip(found, expected, strict=True):
        assert text.startswith(begins)
