"""The tables of a run, made of its rows.

A ratio is the geometric mean over pairs, with its 95 % interval by bootstrap where there is more than one pair.
Pairs of which a row was measured while others used the machine are left out if there are quiet ones; if there are
none they count, and a `~` stands before the ratio. Beside it stands the floor that was set for it, and `!` if it
is missed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.cpu.ceilings import Ceilings
from benchmarks.cpu.ledger import is_quiet
from benchmarks.cpu.llama import FILES
from benchmarks.models import Parameters, config_of, parameters
from benchmarks.rounds import interval
from benchmarks.rows import Row
from benchmarks.workload import SCENARIOS

SERVER_FLOORS = {
    "bf16": {1: 1.25, 8: 2.0, 32: 3.0},
    "int8": {1: 1.9, 8: 5.0, 32: 8.0},
    "int4": {1: 1.8, 8: 3.8, 32: 5.5},
}
WAIT_CEILING = 0.7
"""Of times to the first token and between tokens, ours to the peer's, at 8 and 32 clients."""
DECODE_FLOORS = {
    "bf16": {1: 1.25, 16: 1.4, 32: 1.7},
    "int8": {1: 1.8, 16: 4.0, 32: 5.0},
    "int4": {1: 1.8, 16: 3.0, 32: 3.5},
}
PREFILL_FLOORS = {"bf16": 1.3, "int8": 2.0}
TRANSFORMERS_FLOORS = {
    ("bf16", 1, "sequential"): 3.0,
    ("bf16", 32, "sequential"): 20.0, ("bf16", 32, "static"): 5.5, ("bf16", 32, "continuous"): 5.0,
    ("int8", 32, "sequential"): 40.0, ("int8", 32, "static"): 12.0, ("int8", 32, "continuous"): 10.0,
}  # fmt: skip
GEMM_FLOORS = {
    "bf16": {8: 0.30 / 0.87, 32: 0.60 / 0.87, 256: 0.75 / 0.87},
    "int8": {8: 0.55 / 1.87, 32: 1.2 / 1.87, 256: 1.55 / 1.87},
}
"""As shares of the instruction's peak, which differs from machine to machine."""
ROOFLINE_FLOOR = 0.8
DECODE_ONE_FLOOR = 0.85
ATTENTION_FLOOR = 0.8
OUTSIDE_CEILING = 0.05

Table = list[tuple[str, ...]]


class Ratios:
    """One system's rows against another's, pair by pair: those of the same half of the same block."""

    def __init__(self, ours: Sequence[Row], theirs: Sequence[Row], column: str) -> None:
        pairs = [(a, b) for a in ours for b in theirs if (a["block"], a["half"]) == (b["block"], b["half"])]
        quiet = [(a, b) for a, b in pairs if is_quiet(a) and is_quiet(b)]
        self.loaded = not quiet
        self.values = [a[column] / b[column] for a, b in quiet or pairs]

    def __str__(self) -> str:
        if not self.values:
            return "-"
        mean, low, high = interval(self.values)
        shown = f"{'~' if self.loaded else ''}{mean:.2f}"
        return f"{shown} [{low:.2f}, {high:.2f}]" if len(self.values) > 1 else shown

    @property
    def mean(self) -> float:
        """The geometric mean; not a number without pairs."""
        return statistics.geometric_mean(self.values) if self.values else math.nan


def report(rows: Sequence[Row]) -> str:
    """All tables for which there are rows."""
    (measured,) = _of(rows, part="ceilings")
    ceilings = Ceilings.of(measured)
    first, loaded = rows[0], "" if is_quiet(measured) else " (measured under load)"
    text = [
        f"{first['machine']}, {ceilings.threads} threads, kernels {first['backend']} ({first['level']}), "
        f"run {first['run']}{', quick' if first['quick'] else ''}",
        f"ceilings{loaded}: read {ceilings.read / 1e9:.1f} GB/s (one thread {ceilings.read_one / 1e9:.1f}); "
        f"TOPS vfmadd {ceilings.fma / 1e12:.3f}, vdpbf16ps {ceilings.dpbf16 / 1e12:.3f}, "
        f"vpdpbusd {ceilings.dpbusd / 1e12:.3f}",
        *(
            f"{row['model']}: {row['equal']} of {row['tokens']} first tokens are llama.cpp's"
            for row in _of(rows, part="agreement")
        ),
    ]  # fmt: skip
    for title, make in (
        ("products, N = K = 4096; shares of the peak and of the roofline", _gemm),
        ("attention, one new token", _attention),
        ("experts, 32 of 2048 × 768, 8 a token; time beside dense layers of the same bytes and rows", _experts),
        ("a step of one sequence", _host),
        ("two engines on the same cores, decode of 8 sequences each", _neighbours),
        ("engine alone, decode", _decode),
        ("engine alone, prompt of 512 tokens", _prefill),
        ("servers", _servers),
        ("transformers", _transformers),
    ):
        if len(table := make(rows, ceilings)) > 1:
            text += ["", title, aligned(table)]
    return "\n".join(text)


def aligned(table: Table) -> str:
    """Columns as wide as what is in them, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def _gemm(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    table: Table = [("format", "M", "quire TOPS", "peak", "floor", "roofline", "torch TOPS", "quire/torch")]
    for row in _of(rows, part="gemm"):
        ratio = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        floor = GEMM_FLOORS.get(row["format"], {}).get(row["rows"])
        table.append(
            (row["format"], str(row["rows"]), f"{row['quire_tops']:.3f}", f"{row['peak_share']:.0%}",
             _least(row["peak_share"], floor, "{:.0%}"), f"{row['roofline_share']:.0%}",
             f"{row['torch_tops']:.3f}", ratio if is_quiet(row) else f"~{ratio}")
        )  # fmt: skip
    return table


def _attention(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    table: Table = [("heads of", "context", "sequences", "quire GB/s", "of read", "floor", "torch GB/s", "ratio")]
    for row in _of(rows, part="attention"):
        table.append(
            (row["model"], str(row["context"]), str(row["sequences"]), f"{row['quire_gbs']:.1f}",
             f"{row['read_share']:.0%}", _least(row["read_share"], ATTENTION_FLOOR, "{:.0%}"),
             f"{row['torch_gbs']:.1f}", f"{'' if is_quiet(row) else '~'}{row['ratio']:.2f}")
        )  # fmt: skip
    return table


def _experts(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    table: Table = [("format", "tokens", "quire ms", "dense ms", "quire/dense", "torch ms", "quire/torch")]
    for row in _of(rows, part="experts"):
        doubt = "" if is_quiet(row) else "~"
        beside = f"{doubt}{row['dense_ratio']:.2f} [{row['dense_low']:.2f}, {row['dense_high']:.2f}]"
        theirs = ("-", "-")
        if "torch_ms" in row:
            theirs = (f"{row['torch_ms']:.2f}", f"{doubt}{row['torch_ratio']:.2f}")
        ours = (row["format"], str(row["tokens"]), f"{row['quire_ms']:.2f}")
        table.append((*ours, f"{row['dense_ms']:.2f}", beside, *theirs))
    return table


def _host(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    table: Table = [("model", "format", "step ms", "outside ms", "share", "ceiling", "native calls")]
    for row in _of(rows, part="host"):
        table.append(
            (row["model"], row["format"], f"{row['step_ms']:.2f}", f"{row['outside_ms']:.2f}",
             f"{'' if is_quiet(row) else '~'}{row['outside_share']:.1%}",
             _most(row["outside_share"], OUTSIDE_CEILING, "{:.0%}"), str(row["native_calls"]))
        )  # fmt: skip
    return table


def _neighbours(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    table: Table = [("model", "format", "alone t/s", "two together", "ratio")]
    for model, format in _keys(rows, "model", "format", part="neighbours"):
        some = _of(rows, part="neighbours", model=model, format=format)
        alone, both = _of(some, engines=1), _of(some, engines=2)
        table.append(
            (model, format, _figure(alone, "tokens_per_s"), _figure(both, "tokens_per_s"),
             str(Ratios(both, alone, "tokens_per_s")))
        )  # fmt: skip
    return table


def _decode(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    table: Table = [
        ("model", "format", "sequences", "quire t/s", "llama.cpp t/s", "ratio", "floor", "of roofline", "floor")
    ]
    for model, format, sequences in _keys(rows, "model", "format", "sequences", part="engine", kind="decode"):
        some = _of(rows, part="engine", kind="decode", model=model, format=format, sequences=sequences)
        ours, theirs = _of(some, system=f"quire {format}"), _of(some, system=f"llama.cpp {FILES[format]}")
        ratio = Ratios(ours, theirs, "decode_tokens_per_s")
        ideal = ceilings.step_seconds(format, _shape(model), sequences)
        share = _median(ours, "decode_tokens_per_s") * ideal / sequences
        table.append(
            (model, format, str(sequences), _figure(ours, "decode_tokens_per_s"),
             _figure(theirs, "decode_tokens_per_s"), str(ratio),
             _least(ratio.mean, DECODE_FLOORS[format].get(sequences)), _percent(share),
             _least(share, DECODE_ONE_FLOOR if sequences == 1 else ROOFLINE_FLOOR, "{:.0%}"))
        )  # fmt: skip
    return table


def _prefill(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    table: Table = [("model", "format", "quire t/s", "best llama.cpp t/s", "ratio", "floor", "of roofline")]
    for (model,) in _keys(rows, "model", part="engine", kind="prefill"):
        some = _of(rows, part="engine", kind="prefill", model=model)
        for format in FILES:
            ours, theirs = _of(some, system=f"quire {format}"), _best(some, "prefill_tokens_per_s", most=True)
            if not ours:
                continue
            ratio = Ratios(ours, theirs, "prefill_tokens_per_s")
            ideal = ceilings.prefill_seconds(format, _shape(model), 512)
            share = _median(ours, "prefill_tokens_per_s") * ideal / 512
            table.append(
                (model, format, _figure(ours, "prefill_tokens_per_s"), _figure(theirs, "prefill_tokens_per_s"),
                 str(ratio), _least(ratio.mean, PREFILL_FLOORS.get(format)), _percent(share))
            )  # fmt: skip
    return table


def _servers(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    table: Table = [
        ("model", "format", "clients", "quire t/s", "llama.cpp t/s", "ratio", "floor", "of roofline", "floor",
         "as filled",
         "CPU-s/1000", "theirs", "TTFT p50 ms", "best", "ratio", "ITL p99 ms", "best", "ratio", "client CPU")
    ]  # fmt: skip
    for model, format, clients in _keys(rows, "model", "format", "clients", part="servers"):
        some = _of(rows, part="servers", model=model, format=format, clients=clients)
        ours, theirs = _of(some, system=f"quire {format}"), _of(some, system=f"llama.cpp {FILES[format]}")
        speed = Ratios(ours, theirs, "tokens_per_s")
        everyone = _of(rows, part="servers", model=model, clients=clients)
        firsts, gaps = _best(everyone, "ttft_p50_ms"), _best(everyone, "itl_p99_ms")
        first, gap = Ratios(ours, firsts, "ttft_p50_ms"), Ratios(ours, gaps, "itl_p99_ms")
        lengths = _mean_lengths(some[0]["requests"])
        ideal = ceilings.tokens_per_second(format, _shape(model), clients, *lengths)
        share = _median(ours, "tokens_per_s") / ideal
        filled = statistics.median(
            ceilings.served_seconds(format, _shape(model), _lengths(row["requests"]), clients) / row["seconds"]
            for row in ours
        )
        wait = WAIT_CEILING if clients > 1 else None
        spent = _median(ours, "client_cpu_s") / (_median(ours, "seconds") * ceilings.threads)
        table.append(
            (model, format, str(clients), _figure(ours, "tokens_per_s"), _figure(theirs, "tokens_per_s"),
             str(speed), _least(speed.mean, SERVER_FLOORS[format].get(clients)), _percent(share),
             _least(share, ROOFLINE_FLOOR, "{:.0%}"), _percent(filled), _figure(ours, "cpu_s_per_1000"),
             _figure(theirs, "cpu_s_per_1000"), _figure(ours, "ttft_p50_ms"), _figure(firsts, "ttft_p50_ms"),
             f"{first} {_most(first.mean, wait)}", _figure(ours, "itl_p99_ms"), _figure(gaps, "itl_p99_ms"),
             f"{gap} {_most(gap.mean, wait)}", f"{spent:.1%}")
        )  # fmt: skip
    return table


def _transformers(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    """Theirs ran once, between two passes of ours: the ratio is that of ours, on geometric average, to theirs."""
    table: Table = [("model", "ours", "clients", "t/s", "transformers", "t/s", "ratio", "floor")]
    for model, system in _keys(rows, "model", "system", part="transformers"):
        kind, _, rest = system.partition(" ")
        if kind != "quire":
            continue
        format, _, clients = rest.partition(" at ")
        ours = [row["tokens_per_s"] for row in _of(rows, part="transformers", model=model, system=system)]
        for way in ("sequential", "static", "continuous"):
            some = _of(rows, part="transformers", model=model, system=f"transformers {way}")
            if not some:
                continue
            best = max(some, key=lambda row: float(row["tokens_per_s"]))
            ratio = statistics.geometric_mean(ours) / best["tokens_per_s"]
            floor = TRANSFORMERS_FLOORS.get((format, int(clients), way))
            name = f"static, batch {best['batch']}" if way == "static" else way
            table.append(
                (model, format, clients, f"{statistics.median(ours):.1f}", name, f"{best['tokens_per_s']:.1f}",
                 f"{'' if is_quiet(best) else '~'}{ratio:.2f}", _least(ratio, floor))
            )  # fmt: skip
    return table


def _of(rows: Sequence[Row], **key: object) -> list[Row]:
    return [row for row in rows if key.items() <= row.items()]


def _keys(rows: Sequence[Row], *columns: str, **key: object) -> list[tuple[Any, ...]]:
    """The different values of the columns in rows of the key, in order of appearance."""
    return list(dict.fromkeys(tuple(row[column] for column in columns) for row in _of(rows, **key)))


def _median(rows: Sequence[Row], column: str) -> float:
    return statistics.median(row[column] for row in rows) if rows else math.nan


def _figure(rows: Sequence[Row], column: str) -> str:
    return f"{_median(rows, column):.1f}" if rows else "-"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def _least(value: float, floor: float | None, form: str = "{:.2f}") -> str:
    """The floor, marked if `value` is below it; empty without one."""
    return "" if floor is None or math.isnan(value) else form.format(floor) + ("!" if value < floor else " ")


def _most(value: float, ceiling: float | None, form: str = "{:.2f}") -> str:
    """As `_least`, for what is to stay below."""
    return "" if ceiling is None or math.isnan(value) else form.format(ceiling) + ("!" if value > ceiling else " ")


def _shape(model: str) -> Parameters:
    return parameters(config_of(model))


def _best(rows: Sequence[Row], column: str, most: bool = False) -> list[Row]:
    """Of the peer's rows, for each half of each block, the one with the least in the column, or the most."""
    halves: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if row["system"].startswith("llama.cpp"):
            halves.setdefault((row["block"], row["half"]), []).append(row)
    choose = max if most else min
    return [choose(some, key=lambda row: float(row[column])) for some in halves.values()]


def _lengths(requests: int) -> list[tuple[int, int]]:
    """Tokens of prompt and output of the first so many jobs."""
    return [(len(job.prompt), job.output_tokens) for job in SCENARIOS["mixed"].jobs(1000)[:requests]]


def _mean_lengths(requests: int) -> tuple[float, float]:
    prompts, outputs = zip(*_lengths(requests), strict=True)
    return statistics.fmean(prompts), statistics.fmean(outputs)
