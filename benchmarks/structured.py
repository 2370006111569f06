"""What structured output costs a step: the same batch of running requests, free and held to a JSON Schema.

Only steps in which every request generates are timed; the constraint is compiled before. It never lets the text
end, so that both write as many tokens. Public shapes come without a tokenizer: they get a vocabulary of their size
made of bytes, words and the runs of signs that JSON has.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

from quire_engine.engine import Engine
from quire_engine.vocabulary import _BYTE_OF
from quire_schemas.wire import Generate, Sampling, Structured

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 24},
            "kind": {"enum": ["river", "mountain", "city", "lake"]},
            "height": {"type": "integer", "minimum": 0, "maximum": 9000},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        },
        "required": ["name", "kind", "height", "tags"],
        "additionalProperties": False,
    },
}
CONSTRAINT = Structured("json_schema", json.dumps(SCHEMA))


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


def step_seconds(engine: Engine, batch: int, steps: int, constraint: Structured | None) -> list[float]:
    """Seconds of each of `steps` steps in which `batch` requests generate one token each."""
    rng = random.Random(0)
    vocabulary = engine.profile.vocab_size
    for number in range(batch):
        prompt = [rng.randrange(min(vocabulary, 2000)) for _ in range(16)]
        sampling = Sampling(
            max_tokens=steps + 16, temperature=0.0, seed=number, ignore_eos=True, structured=constraint
        )
        engine.add(Generate(str(number), prompt, sampling))
    begun: set[str] = set()
    while len(begun) < batch:
        begun.update(delta.id for delta in engine.step())
    took: list[float] = []
    for _ in range(steps):
        start = time.perf_counter()
        deltas = engine.step()
        took.append(time.perf_counter() - start)
        if len(deltas) != batch or any(delta.finish_reason for delta in deltas):
            raise RuntimeError("a step did not give every request one token")
    for number in range(batch):
        engine.abort(str(number))
    return took


def mask_seconds(engine: Engine, tokens: int) -> list[float]:
    """Seconds of single masks along one random text; no model."""
    rng = random.Random(0)
    matcher = engine.grammars.compile(CONSTRAINT).matcher(engine.profile.eos_token_ids)
    output: list[int] = []
    took: list[float] = []
    for _ in range(tokens):
        start = time.perf_counter()
        bits = matcher.allowed(output, may_end=False)
        took.append(time.perf_counter() - start)
        allowed = int.from_bytes(bits, "little")
        index = rng.randrange(8 * len(bits))
        above = allowed >> index
        chosen = above if above else allowed
        output.append((chosen & -chosen).bit_length() - 1 + (index if above else 0))
    return took
