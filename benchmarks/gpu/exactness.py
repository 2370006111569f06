"""Greedy tokens of the built-in model beside those of transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import spec_of
from benchmarks.gpu.device import Device, Dtype
from quire_engine.engine import DTYPES, Engine
from quire_engine.models import KVCache, load_model
from quire_schemas.checkpoint import read_profile
from quire_schemas.wire import Generate, Sampling


def exactness(device: Device, folder: Path) -> Iterator[dict[str, Any]]:
    """Greedy tokens of a small real model, ours and those of transformers, both on the device."""
    from transformers import AutoModelForCausalLM

    rng = random.Random(5)
    prompts = [[rng.randrange(32, 1800) for _ in range(rng.randint(4, 90))] for _ in range(24)]
    length = device.scale.at_most(64, 3)
    prompts = [prompt[: device.scale.at_most(90, 8)] for prompt in prompts[: device.scale.at_most(24, 2)]]
    dtypes: tuple[Dtype, ...] = ("float32",) if device.scale.small else ("float32", "bfloat16")
    for dtype in dtypes:
        number = DTYPES[dtype]
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=number).to(device.torch).eval()
        profile = read_profile(folder)
        spec = spec_of(
            folder,
            device,
            dtype,
            seqs=device.scale.at_most(16, 3),
            tokens=device.scale.at_most(256, 32),
            length=512,
            blocks=600,
        )
        kernels = device.kernels()
        model = load_model(
            folder, profile, dtype=number, device=device.torch, kernels=kernels, on_progress=lambda *_: None
        )
        engine = Engine.assemble(spec, profile, model, KVCache.allocate(profile, 600, 16, number, device.torch))
        engine.warm_up()
        for name, prompt in enumerate(prompts):
            sampling = Sampling(max_tokens=length, temperature=0.0, ignore_eos=True)
            engine.add(Generate(str(name), list(prompt), sampling))
        ours: dict[str, list[int]] = {str(name): [] for name in range(len(prompts))}
        while engine.has_work:
            for delta in engine.step():
                ours[delta.id] += delta.token_ids
        equal = same = 0
        for name, prompt in enumerate(prompts):
            with torch.inference_mode():
                ids = torch.tensor([prompt], device=device.torch)
                found = theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=length,
                    min_new_tokens=length,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )[0, len(prompt) :].tolist()
            equal += found == ours[str(name)]
            same += sum(1 for a, b in zip(found, ours[str(name)], strict=True) if a == b)
        yield {
            "part": "exactness",
            "dtype": dtype,
            "answers": len(prompts),
            "equal": equal,
            "tokens_in_place": round(same / (length * len(prompts)), 4),
        }
        if dtype == "float32" and equal != len(prompts):
            raise RuntimeError(
                f"{len(prompts) - equal} of {len(prompts)} answers in float32 are not transformers'"
            )
