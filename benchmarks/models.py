"""The models that benchmarks run: the built-in one, and public shapes with random weights.

Random weights cost the same to compute as trained ones and need no download. They are written as a Hugging Face
checkpoint so that every system loads the same file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
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
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many weights a model has, norms and biases aside. The head is the embedding, so a step reads them all
    once.
    """

    layers: int
    head: int

    @property
    def all(self) -> int:
        return self.layers + self.head


def parameters(config: Mapping[str, Any]) -> Parameters:
    """Of a config.json of the Llama family."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return Parameters(
        config["num_hidden_layers"] * (attention + 3 * hidden * inter), config["vocab_size"] * hidden
    )


def config_of(name: str) -> Mapping[str, Any]:
    """The config.json of the named model."""
    if name in SHAPES:
        return SHAPES[name]
    found: Mapping[str, Any] = json.loads((builtin.path(name) / "config.json").read_text())
    return found


def model_dir(name: str, cache: Path) -> Path:
    """Folder of the named model's checkpoint; random weights are made once under `cache` (seed 0), and a tokenizer
    that no text was seen for.
    """
    if name == "tiny":
        return builtin.path()
    config = SHAPES[name]
    folder = cache / name
    weights = folder / "model.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        made = folder / "model.part"
        save_file(_random(config), made, metadata={"format": "pt"})
        made.replace(weights)
    special = {f"<{name}>": config[f"{name}_token_id"] for name in ("bos", "eos")}
    write_vocabulary(folder, config["vocab_size"], special)
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
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    described = {
        "version": "1.0",
        "added_tokens": [
            {"id": at, "content": name, "special": True, **dict.fromkeys(flags, False)}
            for name, at in special.items()
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {"".join(spell[b] for b in text): at for text, at in zip(texts, ids, strict=False)},
            "merges": [],
        },
    }
    made = folder / "tokenizer.part"
    made.write_text(json.dumps(described))
    made.replace(folder / "tokenizer.json")


def _random(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)

    hidden, inter = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv = config["num_key_value_heads"] * head_dim
    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = normal(rows, hidden)
            if config["model_type"] == "qwen2":
                tensors[f"{at}self_attn.{name}_proj.bias"] = normal(rows)
        tensors[f"{at}self_attn.o_proj.weight"] = normal(hidden, hidden)
        tensors[f"{at}mlp.gate_proj.weight"] = normal(inter, hidden)
        tensors[f"{at}mlp.up_proj.weight"] = normal(inter, hidden)
        tensors[f"{at}mlp.down_proj.weight"] = normal(hidden, inter)
        tensors[f"{at}input_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        tensors[f"{at}post_attention_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors
