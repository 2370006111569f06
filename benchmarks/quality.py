"""What fewer bits cost a model: bits per byte of a text that it has not seen, in each arithmetic, by our engine.

The text goes through as prompts whose log-probabilities are asked for, in windows of 512 predicted tokens as in
`training/tiny/evaluate.py`; each begins with the last token of the one before. Nats over all predicted tokens are
divided by ln 2 and by the bytes of the whole text.

Beside that stand two figures of how far a model is from the one with its own weights, which no luck can hide:
how much the log-probabilities of the text's tokens move, and how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.models import CACHE, model_dir
from benchmarks.quire_systems import engine_spec
from benchmarks.rows import RESULTS, ROOT, Row, backend, provenance, write
from quire.text import Tokenizer
from quire_engine.engine import DTYPES, KV_DTYPES, Engine
from quire_engine.models import KVCache, load_model
from quire_kernels import load
from quire_schemas.checkpoint import read_profile
from quire_schemas.wire import EngineSpec, Generate, KvDtype, Quantization, Sampling, TokenLogprobs

WINDOW = 512
HELD_OUT = ROOT / "training/tiny/heldout.txt"


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a model computes with, where it is not bfloat16."""

    quantization: Quantization | None = None
    kv_dtype: KvDtype = "bfloat16"
    by_reference: bool = False
    """By the reference kernels: what CPUs are refused. It is compared with bfloat16 by the same kernels."""


ARITHMETIC = {
    "none": Arithmetic(),
    "int8": Arithmetic(Quantization("int8")),
    "int8, bf16 activations": Arithmetic(Quantization("int8", "bf16")),
    "int4 g32": Arithmetic(Quantization("int4", group_size=32)),
    "int4 g32, bf16 activations": Arithmetic(Quantization("int4", "bf16", 32)),
    "int4 g64": Arithmetic(Quantization("int4", group_size=64)),
    "int4 g128": Arithmetic(Quantization("int4", group_size=128)),
    "int8 keys and values": Arithmetic(kv_dtype="int8"),
    "none, reference": Arithmetic(by_reference=True),
    "fp8 keys and values": Arithmetic(kv_dtype="fp8", by_reference=True),
    "fp8": Arithmetic(Quantization("fp8", "fp8"), by_reference=True),
    "fp8, bf16 activations": Arithmetic(Quantization("fp8", "bf16"), by_reference=True),
}
BARS = {
    "int8": 0.005,
    "int8, bf16 activations": 0.005,
    "int4 g32": 0.03,
    "int4 g32, bf16 activations": 0.03,
    "int8 keys and values": 0.003,
    "fp8 keys and values": 0.003,
    "fp8": 0.005,
}
"""How much more bits per byte are good enough, for the built-in model and its text."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model said of each token of a text, in order."""

    logprobs: Sequence[float]
    """Natural, of the token that comes."""
    likeliest: Sequence[int]

    def bits_per_byte(self, size: int) -> float:
        """For a text of `size` bytes."""
        return -sum(self.logprobs) / math.log(2) / size

    def moved(self, other: Reading) -> float:
        """Bits a token, without their signs, by which log-probabilities differ."""
        both = zip(self.logprobs, other.logprobs, strict=True)
        return sum(abs(one - two) for one, two in both) / math.log(2) / len(self.logprobs)

    def agrees(self, other: Reading) -> float:
        """Share of the places with the same likeliest token."""
        both = zip(self.likeliest, other.likeliest, strict=True)
        return sum(one == two for one, two in both) / len(self.likeliest)


def by_reference(spec: EngineSpec) -> Engine:
    """An engine of that spec whose kernels are those of the reference."""
    folder, device = Path(spec.model_dir), torch.device("cpu")
    torch.set_num_threads(spec.threads)
    profile = read_profile(folder)
    model = load_model(
        folder,
        profile,
        dtype=DTYPES[spec.dtype],
        device=device,
        kernels=load("reference"),
        on_progress=lambda *_: None,
        quantization=spec.quantization,
    )
    kv = KVCache.allocate(profile, spec.num_blocks, spec.block_size, KV_DTYPES[spec.kv_dtype], device)
    return Engine.assemble(spec, profile, model, kv)


def read(engine: Engine, ids: Sequence[int]) -> Reading:
    """What an engine says of `ids`, all windows at once. Raises if one fails."""
    starts = range(0, len(ids) - 1, WINDOW)
    sampling = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    for start in starts:
        engine.add(Generate(str(start), list(ids[start : start + WINDOW + 1]), sampling))
    found: dict[int, list[TokenLogprobs]] = {start: [] for start in starts}
    while engine.has_work:
        for delta in engine.step():
            if delta.finish_reason not in (None, "length", "stop"):
                raise RuntimeError(f"window {delta.id} ended with {delta.finish_reason}: {delta.error}")
            found[int(delta.id)] += delta.prompt_logprobs or []
    said = [entry for start in starts for entry in found[start]]
    if [entry.token_id for entry in said] != list(ids[1:]):
        raise RuntimeError("the engine scored other tokens than those of the text")
    return Reading([entry.logprob for entry in said], [entry.top[0][0] for entry in said])


def measure(
    folder: Path, text: str, *, threads: int, names: Sequence[str] = tuple(ARITHMETIC), bars: bool = True
) -> list[Row]:
    """A row for each arithmetic in `names`, the first of which, by whichever kernels, is what the others of these
    kernels are compared with."""
    ids = Tokenizer.load(folder).encode(text, add_special_tokens=False)
    size = len(text.encode())
    rows: list[Row] = []
    firsts: dict[bool, Reading] = {}
    for name in names:
        numbers = ARITHMETIC[name]
        spec = engine_spec(
            folder, "bfloat16", threads=threads, max_num_seqs=8, quantization=numbers.quantization,
            kv_dtype=numbers.kv_dtype,
        )  # fmt: skip
        found = read(by_reference(spec) if numbers.by_reference else Engine.load(spec), ids)
        first = firsts.setdefault(numbers.by_reference, found)
        bits = found.bits_per_byte(size)
        rows.append(
            {
                "quantization": name,
                "dtype": "bfloat16",
                "bits_per_byte": round(bits, 5),
                "increase": round(bits / first.bits_per_byte(size) - 1, 5),
                "bar": BARS.get(name) if bars else None,
                "moved_bits_per_token": round(found.moved(first), 5),
                "same_likeliest": round(found.agrees(first), 5),
                "tokens": len(ids) - 1,
                "bytes": size,
                **({"backend": "reference"} if numbers.by_reference else {}),
            }
        )
    return rows


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="tiny, or the folder of a checkpoint")
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="file of a text that the model has not seen")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.jsonl")


def run(args: argparse.Namespace) -> None:
    builtin = args.model == "tiny" and args.text == HELD_OUT
    folder = model_dir("tiny", CACHE) if args.model == "tiny" else Path(args.model)
    found = measure(folder, args.text.read_text(encoding="utf-8"), threads=args.threads, bars=builtin)
    common = provenance(backend(args.threads)) | {
        "benchmark": "quality", "model": args.model, "text": args.text.name, "threads": args.threads,
    }  # fmt: skip
    for row in found:
        print(
            f"{row['quantization']:28} {row['bits_per_byte']:8.4f} bits a byte  {row['increase']:+8.2%}  moved "
            f"{row['moved_bits_per_token']:.4f} bits a token  same likeliest {row['same_likeliest']:.2%}"
        )
    write(args.out, [common | row for row in found])
