"""The rows of `benchmarks.gpu` as a short table beside what the best published engines reach and what is aimed at.

    python -m benchmarks.gpu_table benchmarks/results/gpu.jsonl --after 30

`--after`: rows that were in the file before, which are left out. Ends with 1 if greedy tokens in float32 are not
those of transformers: then no figure counts. In bfloat16 the two round in different places, so answers may part
at a near tie, and the share that does not is shown. Nothing but the standard library: it runs anywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Aim:
    """One line: the rows that `where` names, their `figure`, what is as good as the best published, and the aim.

    `least` False: smaller is better.
    """

    name: str
    where: Row
    figure: str
    good: float
    aim: float
    least: bool = True
    show: Callable[[float], str] = field(default=lambda value: f"{value:,.0f}")


def _share(value: float) -> str:
    return f"{value:.0%}"


_LLAMA, _QWEN = {"model": "llama-3.1-8b"}, {"model": "qwen3-0.6b"}
AIMS = (
    Aim("8B, one sequence, tokens/s", {"part": "decode", **_LLAMA, "batch": 1}, "tokens_per_second", 225, 245),
    *(
        Aim(
            f"8B, {batch} at 1k, of the roofline",
            {"part": "decode", **_LLAMA, "batch": batch},
            "roofline_share",
            0.75,
            0.82,
            show=_share,
        )
        for batch in (32, 128, 256)
    ),
    *(
        Aim(
            f"8B, prompts of {tokens}, of the bf16 peak",
            {"part": "prefill", **_LLAMA, "tokens": tokens},
            "roofline_share",
            0.70,
            0.80,
            show=_share,
        )
        for tokens in (2048, 8192)
    ),
    Aim(
        "8B, 1000 requests, output tokens/s",
        {"part": "offline", **_LLAMA, "workload": "sharegpt", "requests": 1000},
        "output_per_second",
        14_000,
        16_000,
    ),
    Aim(
        "8B, host time of a step of 256, us",
        {"part": "decode", **_LLAMA, "batch": 256},
        "host_us",
        250,
        150,
        least=False,
    ),
    Aim("0.6B, one sequence, tokens/s", {"part": "decode", **_QWEN, "batch": 1}, "tokens_per_second", 900, 1300),
    Aim(
        "0.6B, 256 requests, output tokens/s",
        {"part": "offline", **_QWEN, "workload": "nano"},
        "output_per_second",
        23_000,
        28_000,
    ),
    Aim(
        "attention, 256 at 1k, of a copy",
        {"part": "attention", "batch": 256, "group": 4, "dim": 128},
        "bandwidth_share",
        0.85,
        0.92,
        show=_share,
    ),
)


def lines(rows: Sequence[Row]) -> list[str]:
    """The table; without rows that it knows, nothing but that."""
    shown = [("", "here", "good", "aim", "")]
    for aim in AIMS:
        found = [row for row in rows if aim.where.items() <= row.items() and row.get(aim.figure) is not None]
        if found:
            value = float(found[-1][aim.figure])
            shown.append((aim.name, aim.show(value), aim.show(aim.good), aim.show(aim.aim), _verdict(aim, value)))
    for row in _of(rows, "exactness"):
        name = f"answers equal to transformers', {row['dtype']}"
        shown.append((name, f"{row['equal']}/{row['answers']}", "", "", f"{row['tokens_in_place']:.0%} of tokens"))
    for row in _of(rows, "experts"):
        name = f"experts of {row['layer']}, {row['tokens']} tokens, of the roofline"
        shown.append(
            (name, _share(row["roofline_share"]), "", "", f"{row['us']:,.0f} us, bound by {row['bound']}")
        )
    for row in _of(rows, "tuning"):
        told = f"{row['measured']}/{row['families']} timed in {row['seconds']:.0f} s, {row['left']} left"
        shown.append((f"tilings other than the default, {row['model']}", str(row["changed"]), "", "", told))
    for row in _of(rows, "tuned decode"):
        name = f"{row['model']}, {row['batch']} at 1k, tilings: {row['tilings']}, tokens/s"
        shown.append((name, f"{row['tokens_per_second']:,.0f}", "", "", f"{row['ms']} ms"))
    for row in _of(rows, "memory"):
        shown.append((f"activations, MiB, {row['model']}", *_memory(row)))
    if len(shown) == 1:
        return ["no figures"]
    widths = [max(len(line[at]) for line in shown) for at in range(5)]
    table = [
        "  ".join(cell.ljust(width) if at in (0, 4) else cell.rjust(width) for at, (cell, width) in pairs).rstrip()
        for pairs in (list(enumerate(zip(line, widths, strict=True))) for line in shown)
    ]
    about = rows[-1]
    machine = ", ".join(
        str(about[name]) for name in ("device", "torch", "triton", "commit", "at") if name in about
    )
    return [machine, *table]


def right(rows: Sequence[Row]) -> bool:
    """Whether greedy tokens in float32, where they were compared, are those of transformers."""
    return all(row["equal"] == row["answers"] for row in _of(rows, "exactness") if row["dtype"] == "float32")


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row.get("part") == part]


def _verdict(aim: Aim, value: float) -> str:
    reached = [value >= bound if aim.least else value <= bound for bound in (aim.good, aim.aim)]
    return "reached" if reached[1] else "good" if reached[0] else "below"


def _memory(row: Row) -> tuple[str, str, str, str]:
    """Peak, plan, and what of the device is neither weights, cache nor planned."""
    planned, peak = row["planned_activations_mib"], row["peak_activations_mib"]
    rest = row["device_used_mib"] - row["weights_mib"] - row["kv_mib"] - planned
    return str(peak), "", f"{planned} planned", f"{rest} MiB besides on the device"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--after", type=int, default=0, metavar="N", help="leave the first N rows out")
    options = parser.parse_args()
    text = options.rows.read_text() if options.rows.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()[options.after :]]
    print("\n".join(lines(rows)))
    if not right(rows):
        print("WRONG: greedy tokens in float32 are not those of transformers")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
