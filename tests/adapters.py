"""LoRA adapters for tests, as PEFT writes them, and the checkpoint that one is merged into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quire import builtin
from quire_schemas.adapters import CONFIG, TARGETS, WEIGHTS
from quire_schemas.checkpoint import expected_tensors, read_config

TINY = builtin.path()


def write_adapter(
    folder: Path,
    seed: int = 0,
    *,
    rank: int = 4,
    size: float = 0.05,
    targets: Sequence[str] = TARGETS,
    layers: Sequence[int] | None = None,
    base: Path = TINY,
    **config: Any,
) -> Path:
    """An adapter of random numbers for `base`; `config` replaces keys of its configuration. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    ranks: Mapping[str, int] = config.get("rank_pattern", {})
    tensors = {}
    for name, shape in expected_tensors(read_config(base)):
        *_, last, kind = name.split(".")
        if (
            last not in targets
            or kind != "weight"
            or (layers is not None and int(name.split(".")[2]) not in layers)
        ):
            continue
        module = name.removesuffix(".weight")
        own = next((value for key, value in ranks.items() if module.endswith(key)), config.get("r", rank))
        for part, form in (("A", (own, shape[1])), ("B", (shape[0], own))):
            numbers = torch.randn(form, generator=generator) * (1.0 if part == "A" else size)
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = numbers
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.1,
        "target_modules": list(targets), "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True, "inference_mode": True,
        "base_model_name_or_path": "somewhere/else", "peft_version": "0.17.0", "qalora_group_size": 16,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(said | config))
    save_file(tensors, folder / WEIGHTS)
    return folder


def merge(folder: Path, into: Path, *, scale: float | Mapping[str, float], base: Path = TINY) -> Path:
    """`base` in float32 with W + scale · B A in place of W, by plain torch; a folder that transformers reads."""
    shutil.copytree(base, into)
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    parts = load_file(folder / WEIGHTS)
    for name in parts:
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            own = scale if isinstance(scale, float | int) else next(v for k, v in scale.items() if k in module)
            weights[f"{module}.weight"] += own * (parts[name.replace("lora_A", "lora_B")] @ parts[name])
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((into / "config.json").read_text())
    (into / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return into
