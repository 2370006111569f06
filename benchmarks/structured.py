"""What structured output costs a step: the same batch of running requests, free and held to a JSON Schema.

Only steps in which every request generates are timed; the constraint is compiled before. It never lets the text
end, so that both write as many tokens. Public shapes come without a tokenizer: they get a vocabulary of their size
made of bytes, words and the runs of signs that JSON has.

The other part is what hostile grammars cost others: the time between the tokens of streams beside them, and what
an ordinary schema waits behind them. They are aborted with the round, so that each begins alike but for what is
still being compiled.
"""

from __future__ import annotations

import itertools
import json
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from quire_engine.driver import Died, Driver, Loaded, Output
from quire_engine.engine import Engine
from quire_engine.vocabulary import _BYTE_OF
from quire_schemas.wire import Delta, EngineSpec, Generate, Sampling, Structured

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


# ── hostile grammars ──────────────────────────────────────────────────────────────────────────────────────


def hostile_grammars() -> Iterator[Structured]:
    """Distinct ones without end: refused after all the time they may take, or followed at a great cost."""
    for number in itertools.count():
        yield Structured("regex", f"((a{{0,100}}){{0,100}}){{0,{101 + number}}}")
        yield Structured("json_schema", json.dumps({"type": "integer", "multipleOf": 1_000_000_007 + number}))
        chain = "".join(f"r{i}: r{i + 1}\n" for i in range(3000))
        yield Structured("grammar", f"start: r0\n{chain}r3000: /{number}/")
        yield Structured("regex", f"([ab]*a[ab]{{18}}){{1,20}}{number}")


class Streams:
    """An engine in its own thread, as a server drives it, and when each token of it came."""

    def __init__(self, spec: EngineSpec) -> None:
        self._heard: queue.SimpleQueue[tuple[float, list[Delta]]] = queue.SimpleQueue()
        self._loaded = threading.Event()
        self.driver = Driver(spec, self._out)
        self.driver.start()
        if not self._loaded.wait(600):
            raise RuntimeError("the engine does not start")

    def _out(self, said: Loaded | Output | Died) -> None:
        if isinstance(said, Output):
            self._heard.put((time.perf_counter(), said.deltas))
        elif isinstance(said, Died):
            raise said.error
        self._loaded.set()

    def gaps(self, streams: int, tokens: int, hostile: Iterator[Structured] | None, every: int) -> list[float]:
        """Seconds between tokens of `streams` requests until each has `tokens`; something hostile comes each
        `every` steps.
        """
        free = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        names = [f"s{time.monotonic_ns()}-{number}" for number in range(streams)]
        for name in names:
            self.driver.add(Generate(name, [5, 6, 7, 8], free), time.time())
        last: dict[str, float] = {}
        found: list[float] = []
        sent: list[str] = []
        steps = 0
        while names:
            now, deltas = self._heard.get(timeout=60)
            steps += bool(deltas)
            for delta in deltas:
                if delta.id not in names or not delta.token_ids:
                    continue
                if delta.id in last:
                    found.append(now - last[delta.id])
                last[delta.id] = now
                if delta.finish_reason:
                    names.remove(delta.id)
            if hostile is not None and steps % every == 0 and deltas:
                sent.append(f"h{time.monotonic_ns()}")
                bound = Sampling(max_tokens=200, temperature=1.0, structured=next(hostile))
                self.driver.add(Generate(sent[-1], [5], bound), time.time())
        for name in sent:
            self.driver.abort(name)
        return sorted(found)

    def wait(self, many: int, hostile: Iterator[Structured], number: int) -> float:
        """Seconds to the first token of an ordinary JSON Schema behind `many` hostile grammars."""
        sent = [f"w{time.monotonic_ns()}-{at}" for at in range(many)]
        for name in sent:
            bound = Sampling(max_tokens=1, structured=next(hostile))
            self.driver.add(Generate(name, [5], bound), time.time())
        usual = {"type": "object", "properties": {f"p{number}": {"type": "string"}}, "required": [f"p{number}"]}
        name = f"u{time.monotonic_ns()}"
        began = time.perf_counter()
        asked = Sampling(max_tokens=2, structured=Structured("json_schema", json.dumps(usual)))
        self.driver.add(Generate(name, [5], asked), time.time())
        while True:
            now, deltas = self._heard.get(timeout=120)
            for delta in deltas:
                if delta.id == name and delta.token_ids:
                    for other in sent:
                        self.driver.abort(other)
                    return now - began
