"""The whole house in seconds, in one process: manifest, sizing, engine, text. Run this first after any change."""

from __future__ import annotations

from pathlib import Path

from quire import LLM, SamplingParams
from quire_schemas import manifest
from quire_schemas.model import Model, resolve_defaults
from quire_schemas.update import template_hash

ROOT = Path(__file__).resolve().parent.parent


def test_a_manifest_becomes_an_answer() -> None:
    loaded = manifest.load_paths([ROOT / "manifests/quickstart.yaml"])
    assert not loaded.problems
    (model,) = [located.resource for located in loaded.resources]
    assert isinstance(model, Model)
    resolved = resolve_defaults(model)
    assert len(template_hash(resolved)) >= 12

    llm = LLM(resolved["source"], dtype="float32", max_num_seqs=4, threads=1)
    assert llm.fit.fits, llm.fit.lines()
    prompt = llm.tokenizer.render([{"role": "user", "content": "What is PagedAttention?"}])
    brief, ample = (SamplingParams(max_tokens=most, temperature=0) for most in (8, 48))
    (short,), (long,) = (output.outputs for output in llm.generate([prompt, prompt], [brief, ample]))

    assert long.text.startswith(short.text or "?")
    assert "cache" in long.text.lower() or "block" in long.text.lower()
    assert short.finish_reason == "length"
    assert llm.engine.stats().blocks_used == 0
