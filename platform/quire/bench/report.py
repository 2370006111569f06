"""Results as lines of text: what was measured, and how two results compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LATENCIES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "E2E"}
COLUMNS = ("mean", "p50", "p90", "p99", "max")
LATE = 0.01
"""Seconds of lateness at p99 above which it is said that the client was late."""
BUSY = 0.8
"""Share of a processor above which it is said that the client may be what is measured."""
OFF = 0.02
"""By how much prompts may miss the length that was asked for without a word."""
View = Mapping[str, Any]


def milliseconds(seconds: float | None) -> str:
    """A latency with three digits or so: 0.42, 12.3, 1,234."""
    if seconds is None:
        return "-"
    value = seconds * 1000
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def lines(result: View) -> list[str]:
    """All runs, and where there are several a table of them at the end."""
    shown: list[str] = []
    for run in result["runs"]:
        shown += [*_run(run, result), ""]
    if len(result["runs"]) > 1:
        shown += _overview(result["runs"])
    return shown if not shown or shown[-1] else shown[:-1]


def _run(run: View, result: View) -> Iterator[str]:
    ended = [f"{run['answered']:,} answered"]
    ended += [f"{run['failed']:,} failed"] if run["failed"] else []
    ended += [f"{run['unfinished']:,} cut by the interruption"] if run["unfinished"] else []
    yield f"{run['load']}: {_count(run['requests'], 'request')} in {run['seconds']:.2f} s, {', '.join(ended)}"
    yield (
        f"  Throughput  {run['requestsPerSecond']:,.2f} requests/s, {run['outputTokensPerSecond']:,.1f} output "
        f"tokens/s, {run['totalTokensPerSecond']:,.1f} tokens/s in all"
    )
    cached = "" if not run["cachedTokens"] else f" ({run['cachedTokens']:,} of them cached)"
    yield f"  Tokens      {run['inputTokens']:,} in{cached}, {run['outputTokens']:,} out"
    if (goodput := run["goodput"]) is not None:
        bounds = ", ".join(
            f"{name} {milliseconds(bound)} ms" for name, bound in result["parameters"]["goodput"].items()
        )
        share = f"{goodput['share']:.1%} within {bounds}"
        yield f"  Goodput     {goodput['requestsPerSecond']:,.2f} requests/s, {share}"
    measured = {title: run[name] for name, title in LATENCIES.items() if run[name] is not None}
    if run["concurrency"] is None and run["lateness"] is not None:
        measured["sent late"] = run["lateness"]
    if measured:
        rows = [[title, *(milliseconds(found[name]) for name in COLUMNS)] for title, found in measured.items()]
        yield from (f"  {line}" for line in _right(("ms", *COLUMNS), rows))
    for error in run["errors"]:
        yield f"  Failed      {error['count']:,} × {error['kind']}: {error['message']}"
    yield from (f"  Note        {note}" for note in notes(run))


def notes(run: View) -> Iterator[str]:
    """What to know before believing the figures."""
    if run["concurrency"] is None and run["lateness"] is not None and run["lateness"]["p99"] > LATE:
        yield (
            f"the client sent 1 % of the requests {milliseconds(run['lateness']['p99'])} ms or more behind the "
            "schedule; latencies count from the schedule, so that is in them"
        )
    if run["clientCpu"] > BUSY:
        yield f"the client was busy for {run['clientCpu']:.0%} of the time, and may be what was measured"
    for name, asked, word in (
        ("inputTokens", "inputTokensAsked", "prompts"),
        ("outputTokens", "outputTokensAsked", "answers"),
    ):
        if run[asked] and abs(run[name] / run[asked] - 1) > OFF:
            yield f"{word} came to {run[name] / run[asked]:.0%} of the tokens that were asked for"


def _overview(runs: Sequence[View]) -> list[str]:
    header = (
        "LOAD",
        "REQ/S",
        "OUT TOK/S",
        "TTFT P50",
        "TTFT P99",
        "ITL P50",
        "ITL P99",
        "E2E P50",
        "E2E P99",
        "FAILED",
    )
    rows = []
    for run in runs:
        found = [
            milliseconds(run[name] and run[name][share])
            for name in ("ttft", "itl", "e2e")
            for share in ("p50", "p99")
        ]
        speed = [f"{run['requestsPerSecond']:,.2f}", f"{run['outputTokensPerSecond']:,.1f}"]
        rows.append([run["load"], *speed, *found, f"{run['failed']:,}"])
    return _right(header, rows)


def _right(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose columns but the first are numbers, which end below each other."""
    everything = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in everything) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in everything
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def compare(a: View, b: View) -> dict[str, Any]:
    """What of `b` is how many times that of `a`, run by run, in the form of `quire.cli.shapes.BenchComparison`."""
    parameters = [
        {"name": name, "a": a["parameters"].get(name), "b": b["parameters"].get(name)}
        for name in {**a["parameters"], **b["parameters"]}
        if a["parameters"].get(name) != b["parameters"].get(name)
    ]
    if a["model"] != b["model"]:
        parameters.insert(0, {"name": "model", "a": a["model"], "b": b["model"]})
    others = {run["load"]: run for run in b["runs"]}
    pairs = [(run, others.pop(run["load"])) for run in a["runs"] if run["load"] in others]
    paired = {run["load"] for run, _ in pairs}
    return {
        "differences": parameters,
        "runs": [{"load": x["load"], "figures": list(_ratios(x, y))} for x, y in pairs],
        "onlyA": [run["load"] for run in a["runs"] if run["load"] not in paired],
        "onlyB": list(others),
    }


def _ratios(a: View, b: View) -> Iterator[dict[str, Any]]:
    for name in ("requestsPerSecond", "outputTokensPerSecond", "totalTokensPerSecond"):
        yield _ratio(name, a[name], b[name])
    if a["goodput"] is not None and b["goodput"] is not None:
        yield _ratio("goodput", a["goodput"]["requestsPerSecond"], b["goodput"]["requestsPerSecond"])
    for name in LATENCIES:
        if a[name] is not None and b[name] is not None:
            for share in ("mean", "p50", "p90", "p99"):
                yield _ratio(f"{name} {share}", a[name][share], b[name][share])


def _ratio(name: str, a: float, b: float) -> dict[str, Any]:
    return {"name": name, "a": a, "b": b, "ratio": round(b / a, 4) if a else None}


def comparison_lines(compared: View) -> list[str]:
    """The comparison for people."""
    shown = []
    for run in compared["runs"]:
        rows = []
        for found in run["figures"]:
            is_time = found["name"].split(" ")[0] in LATENCIES
            values = [milliseconds(found[side]) if is_time else f"{found[side]:,.2f}" for side in ("a", "b")]
            ratio = "-" if found["ratio"] is None else f"×{found['ratio']:.2f}"
            rows.append([f"{_title(found['name'])}{' ms' if is_time else ''}", *values, ratio])
        shown += [*_right((run["load"], "A", "B", "B/A"), rows), ""]
    for side, loads in (("A", compared["onlyA"]), ("B", compared["onlyB"])):
        if loads:
            shown.append(f"only in {side}: {', '.join(loads)}")
    for found in compared["differences"]:
        shown.append(f"not alike: {found['name']} is {found['a']} in A and {found['b']} in B")
    return shown if not shown or shown[-1] else shown[:-1]


def _title(name: str) -> str:
    first, _, rest = name.partition(" ")
    words = {
        "requestsPerSecond": "requests/s",
        "outputTokensPerSecond": "output tokens/s",
        "totalTokensPerSecond": "tokens/s",
        "goodput": "goodput requests/s",
    }
    return words[name] if name in words else f"{LATENCIES[first]} {rest}"
