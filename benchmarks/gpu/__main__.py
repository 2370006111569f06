"""The command: which parts there are, and rows of those that are asked for. See the package.

A part that fails is told with its traceback and does not keep others from running; the command ends with 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_STARTED = time.perf_counter()
EVERY = (
    "attention", "tune", "products", "experts", "0.6b", "0.6b-int8-kv", "0.6b-fp8-kv", "8b", "8b-int8",
    "8b-int8-fp8-kv", "8b-int4", "8b-fp8", "against-0.6b", "batched-0.6b", "against-8b", "batched-8b",
)  # fmt: skip
"""Parts of a whole check, besides `exactness`, in their order."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--parts", default=",".join(("exactness", *EVERY)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown", help="of what is measured, for the rows")
    parser.add_argument("--sweep", action="store_true", help="try every tile of attention, products and experts")
    parser.add_argument("--kinds", default="", help="of products, separated by commas; default: all")
    parser.add_argument("--rows", default="", help="of products, separated by commas; default: 1 to 2048")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path, default=Path("platform/quire/builtin/tiny"), help="for exactness")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds of a part against transformers")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, small; rows are no figures")
    parser.add_argument("--list", action="store_true", help="the parts of a whole check, and nothing else")
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Run:
    """What all parts are given."""

    device: Any
    card: Any
    readings: Any
    options: argparse.Namespace
    used_before: int | None
    began: float = _STARTED
    """When this part did; the first one with the process."""

    @property
    def quick(self) -> bool:
        return bool(self.options.quick)


def main() -> None:
    """See the module."""
    options = _arguments()
    if options.list:
        print(" ".join(EVERY))
        return
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    parts = _parts()
    unknown = [name for name in options.parts.split(",") if name not in parts]
    if unknown:
        print(f"error: no part is called {', '.join(unknown)}\nhint: {' '.join(parts)}", file=sys.stderr)
        raise SystemExit(2)
    from benchmarks.gpu.device import Gpu, Readings, Rehearsal, used_bytes

    used_before = used_bytes()  # before this process touches the device
    device = Rehearsal() if options.rehearse else Gpu()
    readings = Readings()
    try:
        card = device.measure()
        about = {
            **device.facts(options.commit),
            "copy_tb_s": round(card.bandwidth / 1e12, 3),
            "bf16_tflops": round(card.bf16 / 1e12, 1),
        }
        print(about, flush=True)
        failed = _rows(parts, Run(device, card, readings, options, used_before), about)
    finally:
        readings.close()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _rows(parts: dict[str, Callable[[Run], Iterator[Row]]], run: Run, about: Row) -> list[str]:
    """Takes the rows of all that are asked for, as they come; returns what failed."""
    failed = list[str]()
    for number, part in enumerate(run.options.parts.split(",")):
        began = time.perf_counter()
        run = replace(run, began=began) if number else run
        try:
            for row in parts[part](run):
                print(json.dumps(row), flush=True)
                if run.options.out is not None:
                    dated = {**row, **about, "at": run.device.facts("")["at"]}
                    with run.options.out.open("a") as file:
                        file.write(json.dumps(dated) + "\n")
        except Exception:  # noqa: BLE001 - the other parts are worth having
            traceback.print_exc()
            failed.append(part)
        run.device.release()
        print(f"{part}: {time.perf_counter() - began:.1f} s", flush=True)
    return failed


# ── the parts ─────────────────────────────────────────────────────────────────────────────────────────────


def _parts() -> dict[str, Callable[[Run], Iterator[Row]]]:
    """By name. Imports what they need."""
    from benchmarks.gpu import models

    return {
        "exactness": _exactness,
        "attention": _attention,
        "tune": _tune,
        "products": _products,
        "experts": _experts,
        "0.6b": models.small,
        "8b": models.large,
        "30b-a3b": models.experts,
        "profile-0.6b": partial(models.profiled, name="qwen3-0.6b"),
        "profile-8b": partial(models.profiled, name="llama-3.1-8b"),
        **{name: partial(models.small_kept, kept=kept) for name, kept in models.SMALL_KEPT.items()},
        **{name: partial(models.large_coded, part=name) for name in models.LARGE_CODED},
        "against-0.6b": partial(_against, name="qwen3-0.6b", kinds=("static", "sequential")),
        "batched-0.6b": partial(_against, name="qwen3-0.6b", kinds=("continuous",)),
        "against-8b": partial(_against, name="llama-3.1-8b", kinds=("static", "sequential")),
        "batched-8b": partial(_against, name="llama-3.1-8b", kinds=("continuous",)),
    }


def _exactness(run: Run) -> Iterator[Row]:
    from benchmarks.gpu.exactness import exactness

    yield from exactness(run.device, run.options.model)


def _attention(run: Run) -> Iterator[Row]:
    from benchmarks.gpu.alone import attention_rows, prompt_rows

    yield from attention_rows(run.device, run.card, sweep=run.options.sweep)
    yield from prompt_rows(run.device, run.card, sweep=run.options.sweep)


def _tune(run: Run) -> Iterator[Row]:
    from benchmarks.gpu.tune import tuning_rows

    yield from tuning_rows(run.device, run.card, run.readings, quick=run.quick)


def _products(run: Run) -> Iterator[Row]:
    from benchmarks.gpu.products import product_rows

    options = run.options
    yield from product_rows(run.device, run.card, sweep=options.sweep, kinds=options.kinds, rows_of=options.rows)


def _experts(run: Run) -> Iterator[Row]:
    from benchmarks.gpu.experts import experts_rows

    yield from experts_rows(run.device, run.card, sweep=run.options.sweep, quick=run.quick)


def _against(run: Run, name: str, kinds: tuple[str, ...]) -> Iterator[Row]:
    from benchmarks.gpu.against import Rounds
    from benchmarks.gpu.workloads import nano_lengths, sharegpt_lengths

    whole = nano_lengths() if name == "qwen3-0.6b" else sharegpt_lengths(1000)
    # half of what a card has is for the peer, which stands beside it
    left = run.device.memory().free - (4 << 30 if name == "qwen3-0.6b" else 36 << 30)
    rounds = Rounds(
        run.device,
        name,
        run.readings,
        whole,
        limit=run.options.limit - (time.perf_counter() - run.began),
        kv_bytes=min(40 << 30, max(left // 2, 1 << 30)),
        seqs=256 if name == "qwen3-0.6b" else 1000,
    )
    try:
        yield from rounds.rows(kinds)
    finally:
        rounds.close()


if __name__ == "__main__":
    main()
