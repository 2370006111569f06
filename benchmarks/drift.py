"""What a canary's exam says of changes whose size is known, so that a bound (`analysis.maxDrift`) can be chosen.

One engine process is the stable revision, the model as it is in bfloat16. Beside it stands one changed revision
after the other, an engine process as well, and the router's own examiner compares the two: by Quire's own prompts,
as where a manifest has no smoke prompts. So a row is what `platform rollout status` would show of such a canary.

    tokens     of the stable revision's answers
    others     share of them that the changed revision would have written otherwise
    kl         mean divergence KL(stable || changed), nats a token, as a lower bound
    passes at  the least `maxDrift`, in tenths of a percent, that this drift is within
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from benchmarks import service
from benchmarks.models import CACHE, model_dir
from benchmarks.quire_systems import Dtype, engine_spec
from benchmarks.rows import RESULTS, Row, backend, provenance, write
from quire.router.exams import Examiner
from quire.router.fleet import Fleet
from quire_operators.exam import NOISE, Drift, Paper
from quire_schemas import wire

PATIENCE = 120.0
"""Seconds for one comparison, the start of its engine included."""
TURN = "<|im_start|>assistant\\n' -}}\n    {%- if enable_thinking"
"""Of the built-in template: what stands before an answer."""
OTHER_FAMILY = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


@dataclass(frozen=True, slots=True)
class Change:
    """A changed revision: other files than the stable one's, another chat template, another arithmetic."""

    files: Callable[[Path], None] | None = None
    """Changes a copy of the checkpoint."""
    template: Callable[[str], str] | None = None
    dtype: Dtype = "bfloat16"
    quantization: wire.Quantization | None = None


def noise(spreads: float, name: str = "model.layers.2.mlp.down_proj.weight") -> Callable[[Path], None]:
    """Noise in one matrix, of so many of its own standard deviations."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        matrix, seeded = weights[name].float(), torch.Generator().manual_seed(7)
        added = torch.randn(matrix.shape, generator=seeded) * spreads * matrix.std()
        weights[name] = (matrix + added).to(weights[name].dtype)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def rope_base(base: float) -> Callable[[Path], None]:
    """Another base of the rotary positions."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rope_theta": base}))

    return change


def replaced(old: str, new: str) -> Callable[[str], str]:
    """A template with one piece changed. Raises `ValueError` if it does not have it."""

    def change(template: str) -> str:
        if template.count(old) != 1:
            raise ValueError(f"the template has {template.count(old)} times {old!r}")
        return template.replace(old, new)

    return change


CHANGES = {
    "the same weights": Change(),
    "float32": Change(dtype="float32"),
    "int8": Change(quantization=wire.Quantization("int8")),
    "int4, groups of 32": Change(quantization=wire.Quantization("int4", group_size=32)),
    "rope base 9,000 for 10,000": Change(rope_base(9_000.0)),
    "rope base 20,000 for 10,000": Change(rope_base(20_000.0)),
    "one matrix, noise of 0.3 sigma": Change(noise(0.3)),
    "one matrix, noise of 1.0 sigma": Change(noise(1.0)),
    "template without its last newline": Change(template=replaced(TURN, TURN.replace("\\n", "", 1))),
    "template of another family": Change(template=lambda _: OTHER_FAMILY),
    "template that forgets tools": Change(template=replaced("{%- if tools -%}", "{%- if false -%}")),
}
"""Of the built-in model."""


def bound(drift: Drift) -> float:
    """The least `maxDrift` that a drift is within, in steps of a tenth of a percent; above 1 none is."""
    least = max(drift.share, 0.0 if drift.kl <= NOISE else math.sqrt(drift.kl / 2))
    steps = math.ceil(round(1000 * least, 6))
    while drift.beyond(steps / 1000):  # what the square root has lost
        steps += 1
    return steps / 1000


def measure(folder: Path, changes: dict[str, Change], *, threads: int) -> list[Row]:
    """A row for each change of the checkpoint in `folder`."""
    with tempfile.TemporaryDirectory(prefix="qd") as name:  # short: a Unix socket's path has 107 bytes
        home = Path(name)
        spec = _spec(folder, Change(), threads)
        with service.engine(home, spec, "stable") as (stable, _):
            return [
                _measured(home / str(number), folder, label, change, service.route(spec, stable), threads)
                for number, (label, change) in enumerate(changes.items())
            ]


def _spec(folder: Path, change: Change, threads: int) -> wire.EngineSpec:
    return engine_spec(folder, change.dtype, threads=threads, max_num_seqs=4, quantization=change.quantization)


def _measured(home: Path, folder: Path, label: str, change: Change, stable: wire.ModelRoute, threads: int) -> Row:
    home.mkdir(0o700)  # an engine's socket is to be its user's alone
    checkpoint = folder
    if change.files is not None:
        checkpoint = home / folder.name
        shutil.copytree(folder, checkpoint)
        change.files(checkpoint)
    template = None
    if change.template is not None:
        described = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = home / "template.jinja"
        template.write_text(change.template(described["chat_template"]), encoding="utf-8")
    spec = _spec(checkpoint, change, threads)
    with service.engine(home, spec, "new") as (new, _):
        told = asyncio.run(_examined(home, stable, service.route(spec, new), template))
    drift = Drift.of(told)
    return {
        "change": label,
        "tokens": drift.tokens,
        "others": round(drift.share, 5),
        "kl": round(drift.kl, 6),
        "passes_at": bound(drift),
    }


async def _examined(
    home: Path, stable: wire.ModelRoute, new: wire.ModelRoute, template: Path | None
) -> tuple[wire.Drifted, ...]:
    """What the examiner tells of two revisions. Raises if it cannot compare them."""
    canary = msgspec.structs.replace(
        new,
        model=stable.model + wire.CANARY_MARK,
        names=(),
        canary_of=stable.model,
        chat_template_file=None if template is None else str(template),
        exam=Paper((), 1.0).exam,
    )
    fleet, deadline = Fleet(None), time.monotonic() + PATIENCE
    examiner = Examiner(fleet)
    examiner.start()
    try:
        await fleet.apply(wire.RoutingTable(1, (stable, canary)))
        while (told := fleet.canaries.told()[stable.model].examined) is None or len(told.drift) < len(
            told.exam.drift
        ):
            if time.monotonic() > deadline:
                waits, said = told.waits if told is not None else "", (home / "new.log").read_text()[-1000:]
                raise RuntimeError(f"the comparison has not ended: {waits}\n{said}")
            await asyncio.sleep(0.05)
        if problems := [each.problem for each in told.drift if each.problem]:
            raise RuntimeError(problems[0])
        return told.drift
    finally:
        await examiner.close()
        await fleet.close()


def table(rows: Sequence[Row]) -> list[str]:
    """Rows as a table in Markdown, as docs/canaries.md has it."""
    lines = ["| changed | other tokens | divergence, nats a token | passes at `maxDrift` |", "|---|---|---|---|"]
    for row in rows:
        least = f"{row['passes_at']:.1%}" if row["passes_at"] <= 1 else "none"
        lines.append(f"| {row['change']} | {row['others']:.1%} | {row['kl']:.4f} | {least} |")
    return lines


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="tiny, or the folder of a checkpoint")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="compare with this checkpoint, and nothing else"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "drift.jsonl")


def run(args: argparse.Namespace) -> None:
    folder = model_dir("tiny", CACHE) if args.model == "tiny" else Path(args.model)
    changes = CHANGES
    if args.against is not None:
        changes = {str(args.against): Change(lambda copy: _become(copy, args.against))}
    elif args.model != "tiny":  # of whose template and matrices nothing is known
        changes = {name: each for name, each in CHANGES.items() if each.files is None and each.template is None}
    found = measure(folder, changes, threads=args.threads)
    print("\n".join(table(found)))
    common = provenance(backend(args.threads)) | {
        "benchmark": "drift", "model": args.model, "dtype": "bfloat16", "threads": args.threads,
    }  # fmt: skip
    write(args.out, [common | row for row in found])


def _become(copy: Path, other: Path) -> None:
    shutil.rmtree(copy)
    copy.symlink_to(other.resolve())
