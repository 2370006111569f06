"""The models that benchmarks run: the built-in one, and public shapes with random weights.

Random weights cost the same to compute as trained ones and need no download. They are written as a Hugging Face
checkpoint so that every system loads the same file.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quire import builtin
from quire_engine.vocabulary import _BYTE_OF

CACHE = Path.home() / ".cache/quire/benchmarks"
"""Where random weights are kept."""

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "use_sliding_window": False,
    },
}


def model_dir(name: str, cache: Path) -> Path:
    """Folder of the named model's checkpoint; random weights are made once under `cache` (seed 0)."""
    if name == "tiny":
        return builtin.path()
    config = SHAPES[name]
    folder = cache / name
    weights = folder / "model.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        save_file(_random_qwen2(config), weights, metadata={"format": "pt"})
    return folder


def write_vocabulary(folder: Path, size: int, special: dict[str, int]) -> None:
    """A byte-level tokenizer.json of so many tokens besides `special`, the same each time."""
    rng = random.Random(0)
    spell = {byte: char for char, byte in _BYTE_OF.items()}
    texts = dict.fromkeys(bytes([byte]) for byte in range(256))
    free = size - len(special)
    while len(texts) < free:
        if rng.random() < 0.02:
            token = "".join(rng.choices('"{}[],: \n\t', k=rng.randint(2, 5)))
        else:
            token = rng.choice(["", "", " "]) + "".join(
                rng.choices("etaoinshrdlucmfwypvbgkqjxz", k=rng.randint(2, 9))
            )
            if rng.random() < 0.05:
                token += rng.choice(['"', '",', '":', "."])
        texts[token.encode()] = None
    ids = (index for index in range(size) if index not in special.values())
    described = {
        "model": {
            "type": "BPE",
            "vocab": {"".join(spell[b] for b in text): at for text, at in zip(texts, ids, strict=False)},
        },
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": at, "content": name, "special": True} for name, at in special.items()],
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))


def _random_qwen2(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)

    hidden, inter = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = normal(rows, hidden)
            tensors[f"{at}self_attn.{name}_proj.bias"] = normal(rows)
        tensors[f"{at}self_attn.o_proj.weight"] = normal(hidden, hidden)
        tensors[f"{at}mlp.gate_proj.weight"] = normal(inter, hidden)
        tensors[f"{at}mlp.up_proj.weight"] = normal(inter, hidden)
        tensors[f"{at}mlp.down_proj.weight"] = normal(hidden, inter)
        tensors[f"{at}input_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        tensors[f"{at}post_attention_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors
