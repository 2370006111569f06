"""The rows of `benchmarks.gpu` as a short table beside what the best published engines reach and what is aimed at.

    python -m benchmarks.gpu.table benchmarks/results/gpu.jsonl --after 30

`--after`: rows that were in the file before, which are left out. What is below the good figure is followed by the
largest parts of its profile and by what to try next. Rows of a rehearsal stand in a table that says so.

Ends with 1 if greedy tokens in float32 are not those of transformers: then no figure counts. In bfloat16 the two
round in different places, so answers may part at a near tie, and the share that does not is shown. Nothing but the
standard library: it runs anywhere.
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
    profile: Row | None = None
    """Of a profile that says where the time went, if it is another one than that of `where`."""
    best: Callable[[Sequence[Row], str], Row] = field(default=lambda rows, figure: rows[-1])
    """Which of several rows counts."""


def _share(value: float) -> str:
    return f"{value:.0%}"


def _times(value: float) -> str:
    return f"{value:.1f}x"


def _percent(value: float) -> str:
    return f"{value:+.1f}%"


def _least(rows: Sequence[Row], figure: str) -> Row:
    """That of the strongest peer."""
    return min(rows, key=lambda row: float(row[figure]))


def _ratio(name: str, model: Row, kind: str, good: float, aim: float, workload: str) -> Aim:
    where = {"part": "against", **model, "kind": kind}
    profile = {"workload": "offline", **model, "name": workload}
    return Aim(name, where, "quire_ratio", good, aim, show=_times, profile=profile, best=_least)


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
        for tokens in (2048, 4096, 8192)
    ),
    Aim(
        "8B, 1000 requests, output tokens/s",
        {"part": "offline", **_LLAMA, "workload": "sharegpt", "requests": 1000},
        "output_per_second",
        14_000,
        16_000,
        profile={"workload": "offline", **_LLAMA},
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
        profile={"workload": "offline", **_QWEN},
    ),
    _ratio("8B, times transformers' best static batch", _LLAMA, "static", 4, 6, "sharegpt"),
    _ratio("0.6B, times transformers' best static batch", _QWEN, "static", 8, 12, "nano"),
    _ratio("8B, times generate_batch", _LLAMA, "continuous", 1.8, 2.5, "sharegpt"),
    _ratio("0.6B, times generate_batch", _QWEN, "continuous", 4, 6, "nano"),
    Aim(
        "attention, 256 at 1k, of a copy",
        {"part": "attention", "batch": 256, "group": 4, "dim": 128, "kept": "bfloat16"},
        "bandwidth_share",
        0.85,
        0.92,
        show=_share,
    ),
    *(
        Aim(
            f"{name}, device memory beside the plan",
            {"part": "memory", **model},
            "off_percent",
            2,
            2,
            show=_percent,
        )
        for name, model in (("8B", _LLAMA), ("0.6B", _QWEN))
    ),
)


NEXT = {
    "attention": "python -m benchmarks.gpu --parts attention --sweep",
    "products": "--parts tune for products of few rows; others are cuBLAS's",
    "norms, gate, rotary": "how these kernels are cut, or what else may join them",
    "draw": "how many programs survey a row of logits",
    "addresses": "what a step's first kernel does",
    "others": "which copies and fills there are: `kernels` of the row",
    "between": "launches: whether the step was captured, and host_parts_us of its row",
}
"""What to try by the largest group of a profile whose share of the roofline, if it has one, is below this."""
_NEAR = 0.9


def lines(given: Sequence[Row]) -> list[str]:
    """The table; without rows that it knows, nothing but that."""
    rows = [{"kept": "bfloat16", **row, **row.get("stands_for", {})} for row in given]
    shown: list[tuple[str, ...]] = [("", "here", "good", "aim", "", "")]
    for aim in AIMS:
        found = [row for row in rows if aim.where.items() <= row.items() and row.get(aim.figure) is not None]
        if found:
            row = aim.best(found, aim.figure)
            value, verdict = float(row[aim.figure]), _verdict(aim, float(row[aim.figure]))
            bars = [_bar(aim, bound) for bound in (aim.good, aim.aim)]
            shown.append((aim.name, aim.show(value), *bars, verdict, _note(aim, row)))
            if verdict == "below":
                shown += [("", "", "", "", "", line) for line in _why(aim, rows)]
    for row in _of(rows, "against"):
        name = f"{row['model']}, {row['kind']}: {row['peer']}"
        if "error" in row:
            shown.append((name, "", "", "", "failed", str(row["error"])[:90]))
        else:
            told = f"{row['repeats']} rounds, A/A {row['aa_ratio']:.3f}, {row['attention']}"
            told += "" if row["finished"] else ", stopped"
            shown.append((name, f"{row['tokens_per_second']:,.0f}", "", "", f"{row['quire_ratio']:.1f}x", told))
    for row in _of(rows, "peer trial"):
        if "error" in row:
            shown.append((f"{row['model']}, tried: {row['peer']}", "", "", "", "failed", str(row["error"])[:90]))
    for row in _of(rows, "profile"):
        shown.append((f"{row['model']}, {_case(row)}", f"{row['ms']} ms", "", "", "", _groups(row, len(NEXT))))
    for row in _of(rows, "exactness"):
        name = f"answers equal to transformers', {row['dtype']}"
        told = f"{row['tokens_in_place']:.0%} of tokens"
        shown.append((name, f"{row['equal']}/{row['answers']}", "", "", "", told))
    for row in _of(rows, "experts"):
        codes = "" if row.get("weights", "bf16") == "bf16" else f" in {row['weights']}"
        name = f"experts of {row['layer']}{codes}, {row['tokens']} tokens, of the roofline"
        told = f"{row['us']:,.0f} us, bound by {row['bound']}"
        shown.append((name, _share(row["roofline_share"]), "", "", "", told))
    for row in _of(rows, "tuning"):
        told = f"{row['measured']}/{row['families']} timed in {row['seconds']:.0f} s, {row['left']} left"
        shown.append((f"tilings other than the default, {row['model']}", str(row["changed"]), "", "", "", told))
    for row in _of(rows, "tuned decode"):
        name = f"{row['model']}, {row['batch']} at 1k, tilings: {row['tilings']}, tokens/s"
        shown.append((name, f"{row['tokens_per_second']:,.0f}", "", "", "", f"{row['ms']} ms"))
    for row in _of(rows, "memory"):
        shown.append((f"activations, MiB, {row['model']}", *_memory(row)))
    if len(shown) == 1:
        return ["no figures"]
    widths = [max(len(line[at]) for line in shown) for at in range(6)]
    table = [
        "  ".join(
            cell.ljust(width) if at in (0, 4, 5) else cell.rjust(width) for at, (cell, width) in pairs
        ).rstrip()
        for pairs in (list(enumerate(zip(line, widths, strict=True))) for line in shown)
    ]
    about = given[-1]
    machine = ", ".join(
        str(about[name]) for name in ("device", "torch", "triton", "commit", "at") if name in about
    )
    return [*(["REHEARSAL: no figures"] if any("rehearsal" in row for row in given) else []), machine, *table]


def right(rows: Sequence[Row]) -> bool:
    """Whether greedy tokens in float32, where they were compared, are those of transformers."""
    return all(row["equal"] == row["answers"] for row in _of(rows, "exactness") if row["dtype"] == "float32")


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row.get("part") == part]


def _bar(aim: Aim, bound: float) -> str:
    return aim.show(bound) if aim.show is not _percent else f"{bound:g}%"


def _verdict(aim: Aim, value: float) -> str:
    if aim.show is _percent:
        return "reached" if abs(value) <= aim.aim else "below"
    reached = [value >= bound if aim.least else value <= bound for bound in (aim.good, aim.aim)]
    return "reached" if reached[1] else "good" if reached[0] else "below"


def _note(aim: Aim, row: Row) -> str:
    """What belongs to a figure: how it varied, its share of the roofline, what else has to hold."""
    told = []
    if f"{aim.figure}_min" in row:
        told.append(f"{aim.show(row[f'{aim.figure}_min'])} to {aim.show(row[f'{aim.figure}_max'])}")
    if "roofline_share" in row and aim.figure != "roofline_share":
        told.append(f"{_share(row['roofline_share'])} of the roofline")
    if aim.figure == "host_us" and "host_waits_us" in row:
        told.append("hidden" if row["host_waits_us"] > 0 else "NOT HIDDEN")
    if aim.figure == "off_percent":
        told.append(f"of which a reserve of {row['planned_overhead_mib']} MiB for context and libraries")
    if aim.figure == "quire_ratio":
        told.append(row["peer"])
    return ", ".join(told)


def _why(aim: Aim, rows: Sequence[Row]) -> list[str]:
    """The profile of a figure that is below its bar, and what to try next."""
    if aim.figure == "off_percent":
        return ["next: planned_parts_mib, peak_mib and reserved_mib of the row say which part it is"]
    if aim.figure == "host_us":
        return ["next: host_parts_us of the row says which part it is"]
    if aim.where.get("part") == "attention":
        return [f"next: {NEXT['attention']}"]
    where = aim.profile or {"workload": aim.where["part"], **{k: v for k, v in aim.where.items() if k != "part"}}
    found = [row for row in _of(rows, "profile") if where.items() <= row.items()]
    if not found:
        return ["no profile: --parts profile-0.6b or profile-8b"]
    groups = found[-1]["groups"]
    slack = {name: group["us"] * (1 - group.get("roofline_share", 0.0)) for name, group in groups.items()}
    far = [name for name in slack if groups[name].get("roofline_share", 0.0) < _NEAR]
    worst = max(far or list(slack), key=slack.__getitem__)
    return [f"its step: {_groups(found[-1], 3)}", f"next: {worst}: {NEXT[worst]}"]


def _case(row: Row) -> str:
    if row["workload"] == "decode":
        return f"{row['batch']} at 1k, a step"
    return f"prompts of {row['tokens']}" if row["workload"] == "prefill" else f"{row['requests']} requests, a step"


def _groups(row: Row, most: int) -> str:
    """Shares of a step's time, and in brackets of a group's own roofline."""
    told = []
    for name, group in list(row["groups"].items())[:most]:
        own = f" ({_share(group['roofline_share'])})" if "roofline_share" in group else ""
        told.append(f"{name} {_share(group['share'])}{own}")
    return ", ".join(told)


def _memory(row: Row) -> tuple[str, str, str, str, str]:
    """Peak, plan, and what of the device is neither weights, cache nor planned."""
    planned, peak = row["planned_activations_mib"], row["peak_activations_mib"]
    if "device_used_mib" not in row:
        return str(peak), "", f"{planned} planned", "", "nobody says what the device has given"
    rest = row["device_used_mib"] - row["weights_mib"] - row["kv_mib"] - planned
    return str(peak), "", f"{planned} planned", "", f"{rest} MiB besides on the device"


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
