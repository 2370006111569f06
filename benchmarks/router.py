"""What a router adds to a request, and how many it can take: the real one on a core of its own.

Clients and the engines behind it are one process on another core; `standin.py` says what its times include.
Engines compute nothing and give each request a token a step, all requests of a step in one frame.

    open      500 requests a second that come by chance, answered whole: what is added, p50 and p99
    stream    the same, answered as streams
    closed    as many requests as it takes, 32 at a time, whole answers that are ready in one step
    streams   300 streams at 10,000 chunks a second in all: processor seconds per 1,000 chunks

    here      this checkout, twice: `again` is another process of the same, so that their ratio is the noise
    told      this checkout, telling a collector traces and metrics (`--telemetry`): its teller is on the core of
              the stand-in, as it would be on any that has time. `told-here`: on the router's, which has none
    dead      the same as told, to a collector that nobody runs
    FOLDER    the router of another checkout, by its folder's name (`--against`, once or more)
    litellm   LiteLLM's proxy before the same engine as an OpenAI server (`make bench-litellm`, `--litellm`)
    direct    that server with nothing before it: what the measuring itself takes

What is added is taken twice. From outside, by the clock of the stand-in (`inward`, `outward`, `added`): with
sockets, and with all that waits in them while the router is at something else. And inside, by the router's own
`quire_router_added_seconds`: from a body that was received to its Generate written, and from Deltas that were read
to their bytes written. `inside` is the sum of the two percentiles.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import msgspec
import psutil

from benchmarks import service
from benchmarks.cpu.ledger import Watch
from benchmarks.rounds import in_turns
from benchmarks.rows import NO_KERNELS, RESULTS, ROOT, Row, commit_of, provenance, write
from benchmarks.standin import Case, Measured, Ready, Setup
from benchmarks.tracing import NOBODY, spans, told
from quire import builtin
from quire.text import Tokenizer
from quire_schemas import signals, wire

CASES: Final[dict[str, dict[str, Any]]] = {
    "open": {"rate": 500.0, "clients": 256, "pace": 0.01},
    "stream": {"rate": 500.0, "clients": 256, "pace": 0.01, "stream": True},
    "closed": {"clients": 32, "pace": 0.0, "whole": True},
    "streams": {"clients": 300, "pace": 0.03, "stream": True, "shortest": 100, "longest": 300, "warm": 3.0},
}
ADDED: Final = {"added_p50_ms": 1.0, "added_p99_ms": 5.0, "inside_p50_ms": 1.0, "inside_p99_ms": 5.0}
BARS: Final[dict[str, dict[str, float]]] = {
    "open": ADDED,
    "stream": ADDED,
    "closed": {"requests_per_s": 2000.0},
    "streams": {"cpu_s_per_1000_chunks": 0.08},
}
"""What is asked of `here`; of `requests_per_s` at least so much, of all others at most."""
FIGURE: Final = {
    "open": "added_p50_ms",
    "stream": "added_p50_ms",
    "closed": "requests_per_s",
    "streams": "cpu_s_per_1000_chunks",
}
"""By what systems are compared."""
SPENT: Final = ("cpu_ms_per_request", "cpu_s_per_1000_chunks")
FOLDERS: Final = ("schemas", "platform", "operators", "kernels", "engine")
START_SECONDS: Final = 60.0
T = TypeVar("T")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=10.0, help="that each measurement counts")
    parser.add_argument("--warm", type=float, help="seconds before those that count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, help="requests a second of open and stream")
    parser.add_argument("--clients", type=int, help="of closed and streams")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--words", type=int, default=40, help="of each prompt")
    parser.add_argument("--against", type=Path, action="append", default=[], help="another checkout")
    parser.add_argument("--telemetry", action="store_true", help="also routers that tell a collector")
    parser.add_argument("--alone", action="store_true", help="routers only")
    parser.add_argument("--litellm", type=Path, default=ROOT / ".venv-litellm", help="environment that has it")
    parser.add_argument("--out", type=Path, default=RESULTS / "router.jsonl")


@dataclass(frozen=True, slots=True)
class System:
    """Something that takes requests."""

    name: str
    port: int
    pids: tuple[int, ...]
    router: service.Router | None = None
    """If it is one of ours."""
    tellers: tuple[int, ...] = ()
    """Processes that tell its collector, whose processor time is `teller_cpu_s_per_1000_requests` and in no other
    figure."""


def run(args: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("error: the router and what measures it need a core each\n    hint: free a second one")
    its_core, ours = cores[-1], cores[0]
    os.sched_setaffinity(0, {ours})
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qb")))
        standin = stack.enter_context(standin_running(folder, args.engines))
        checkouts = {"here": ROOT, "again": ROOT} | {each.name: each for each in args.against}
        systems = [_router(stack, folder, name, each, its_core, standin) for name, each in checkouts.items()]
        if args.telemetry:
            url = stack.enter_context(service.collector(folder))
            systems += [
                _router(stack, folder, name, ROOT, its_core, standin, told(where, "otlp"))
                for name, where in (("told", url), ("told-here", url), ("dead", NOBODY))
            ]
            for each in systems:
                for pid in each.tellers:
                    pin(pid, its_core if each.name == "told-here" else ours)
        if not args.alone:
            systems += _litellm(stack, folder, args, its_core, standin)
            systems.append(System("direct", standin.http_port, ()))
        common = provenance(NO_KERNELS) | {
            "benchmark": "router", "engines": args.engines, "words": args.words, "rounds": args.rounds, "seed": 0,
        }  # fmt: skip
        if args.against:
            common["against"] = {each.name: commit_of(each) for each in args.against}
        rows: list[Row] = []
        for name in args.cases:
            rows += _measured(name, args, systems, standin, common)
        for row in rows:
            print(_line(row))
    write(args.out, rows)


def _measured(
    name: str, args: argparse.Namespace, systems: Sequence[System], standin: Standin, common: Row
) -> Iterator[Row]:
    """A case by all systems in turns: a row of each with its medians, and its ratios to `here`."""
    changes = dict(CASES[name])
    if args.rate is not None and "rate" in changes:
        changes["rate"] = args.rate
    if args.clients is not None and "rate" not in changes:
        changes["clients"] = args.clients
    if args.warm is not None:
        changes["warm"] = args.warm

    def measure(system: System) -> Row:
        watch = Watch()
        case = Case(
            f"{name} by {system.name}", system.port, "tiny", list(system.pids), args.seconds, words=args.words,
            beside=list(system.tellers), **changes,
        )  # fmt: skip
        before = _own_counts(system)
        measured = standin.measure(case)
        after = _own_counts(system)
        own = inside(before, after) | told_of(before, after)
        return figures(measured) | own | {key: watch.row()[key] for key in ("steal_s", "spin")}

    figure = FIGURE[name]
    taken = in_turns(
        {system.name: partial(measure, system) for system in systems},
        args.rounds,
        lambda row: f"{row.get(figure, '-')}",
    )
    for system in systems:
        passes = taken[system.name]
        row = {
            key: round(statistics.median(each[key] for each in passes), 4)
            for key in passes[0]
            if all(key in each for each in passes)
        }
        for spent in SPENT:
            if spent in row:  # what others do on the machine only ever adds to it
                row[f"{spent}_least"] = min(each[spent] for each in passes)
        ratios = [
            each[figure] / one[figure]
            for each, one in zip(passes, taken["here"], strict=True)
            if figure in each and one.get(figure)
        ]
        columns: Row = {"part": name, "system": system.name, **changes, "count_s": args.seconds}
        if ratios and system.name != "here":
            columns |= {
                f"{figure}_to_here": round(statistics.median(ratios), 4),
                f"{figure}_to_here_min": round(min(ratios), 4),
                f"{figure}_to_here_max": round(max(ratios), 4),
            }
        if system.name in ("here", "again"):
            columns["missed"] = [
                key
                for key, bar in BARS[name].items()
                if row["unasked"] or is_missed(key, row.get(key, math.inf), bar)
            ]
        yield common | columns | row


def figures(measured: Measured) -> Row:
    """The columns of one measurement."""
    row: Row = {
        "requests_per_s": round(measured.requests / measured.seconds, 1),
        "chunks_per_s": round(measured.chunks / measured.seconds, 1),
        "cpu_share": round(measured.cpu_s / measured.seconds, 4),
        "standin_cpu_share": round(measured.own_cpu_s / measured.seconds, 4),
        "late_share": round(measured.late_share, 4),
        "unasked": measured.unasked,
    }
    if measured.cpu_s:
        if measured.requests:
            row["cpu_ms_per_request"] = round(1000 * measured.cpu_s / measured.requests, 4)
            row["teller_cpu_s_per_1000_requests"] = round(1000 * measured.beside_cpu_s / measured.requests, 4)
        if measured.chunks:
            row["cpu_s_per_1000_chunks"] = round(1000 * measured.cpu_s / measured.chunks, 5)
    for kind in ("inward", "outward", "added"):
        spread = getattr(measured, kind)
        if spread is not None:
            row |= {f"{kind}_{part}_ms": getattr(spread, part) for part in ("p50", "p90", "p99")}
    return row


def _own_counts(system: System) -> Mapping[str, float]:
    return {} if system.router is None else asyncio.run(system.router.counts())


def inside(before: Mapping[str, float], after: Mapping[str, float]) -> Row:
    """The columns of what a router itself counted between two looks at its series, its warm-up included."""
    row: Row = {}
    series = f"{signals.ROUTER_ADDED_TIME}_bucket"
    for part in ("request", "answer"):
        mark = f'{signals.LABEL_PART}="{part}"'
        buckets: dict[float, float] = {}
        for name, value in after.items():
            if name.startswith(series) and mark in name:
                edge = math.inf if 'le="+Inf"' in name else float(name.split('le="')[1].split('"')[0])
                buckets[edge] = buckets.get(edge, 0.0) + value - before.get(name, 0.0)
        if buckets.get(math.inf):
            row |= {f"inside_{part}_p{share}_ms": round(1000 * _quantile(buckets, share), 4) for share in (50, 99)}
    for share in (50, 99):
        if all(f"inside_{part}_p{share}_ms" in row for part in ("request", "answer")):
            row[f"inside_p{share}_ms"] = round(
                row[f"inside_request_p{share}_ms"] + row[f"inside_answer_p{share}_ms"], 4
            )
    return row


def told_of(before: Mapping[str, float], after: Mapping[str, float]) -> Row:
    """The share of spans that did not get to the collector; nothing where there were none."""
    exported, lost = (b - a for a, b in zip(spans(before), spans(after), strict=True)) if before else (0.0, 0.0)
    return {"spans_lost_share": round(lost / (exported + lost), 4)} if exported + lost else {}


def _quantile(buckets: Mapping[float, float], percent: int) -> float:
    """Of a cumulative histogram; within a bucket as if all were spread evenly, as Prometheus does."""
    edges = sorted(buckets)
    rank = buckets[edges[-1]] * percent / 100
    lower, below = 0.0, 0.0
    for edge in edges:
        if buckets[edge] >= rank:
            return lower if math.isinf(edge) else lower + (edge - lower) * (rank - below) / (buckets[edge] - below)
        lower, below = edge, buckets[edge]
    raise AssertionError("the last bucket holds all")


def is_missed(figure: str, value: float, bar: float) -> bool:
    return value < bar if figure == "requests_per_s" else value > bar


def _line(row: Row) -> str:
    shown = [
        "requests_per_s", "chunks_per_s", "added_p50_ms", "added_p99_ms", "inside_p50_ms", "inside_p99_ms",
        "outward_p50_ms", "outward_p99_ms",
        "teller_cpu_s_per_1000_requests", "spans_lost_share",
        "cpu_share", *SPENT, *(f"{spent}_least" for spent in SPENT), "standin_cpu_share", "late_share", "unasked",
    ]  # fmt: skip
    missed = row.get("missed", [])
    told = "  ".join(f"{key} {row[key]}{'!' if key in missed else ''}" for key in shown if key in row)
    ratio = next((f"  to here {value}" for key, value in row.items() if key.endswith("_to_here")), "")
    return f"{row['part']:8} {row['system']:8} {told}{ratio}"


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────


class Standin:
    """The process of `standin.py`."""

    def __init__(self, process: subprocess.Popen[str], sockets: Sequence[Path]) -> None:
        self._process = process
        self.sockets = sockets
        self.http_port = self._answer(Ready).http_port

    def measure(self, case: Case) -> Measured:
        """Raises if an answer was not whole; the process is of no use then."""
        tell(self._process, case)
        return self._answer(Measured)

    def _answer(self, kind: type[T]) -> T:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise RuntimeError("the stand-in has ended: see what it said above")
        return msgspec.json.decode(line, type=kind)


def tell(process: subprocess.Popen[str], message: msgspec.Struct) -> None:
    if process.stdin is None:
        raise RuntimeError("no pipe")
    process.stdin.write(msgspec.json.encode(message).decode() + "\n")
    process.stdin.flush()


@contextlib.contextmanager
def standin_running(folder: Path, engines: int) -> Iterator[Standin]:
    """Clients and engines, on the core of this process."""
    tokenizer = Tokenizer.load(builtin.path("tiny"))
    letters = [tokenizer.encode(chr(97 + at), add_special_tokens=False) for at in range(26)]
    if any(len(ids) != 1 for ids in letters):
        raise RuntimeError("a letter is not one token")
    sockets = [folder / f"e{number}" for number in range(engines)]
    command = [sys.executable, "-m", "benchmarks.standin"]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(ROOT)
    ) as process:
        try:
            tell(
                process, Setup([str(each) for each in sockets], [ids[0] for ids in letters], tokenizer.vocab_size)
            )
            yield Standin(process, sockets)
        finally:
            process.terminate()


def environment(checkout: Path) -> dict[str, str]:
    """Variables of a process that runs the packages of `checkout`."""
    paths = [str(ROOT), *(str(checkout / name) for name in FOLDERS)]
    given = os.environ.get("PYTHONPATH")
    return {**service.plain_environment(), "PYTHONPATH": ":".join([*paths, *([given] if given else [])])}


def _router(
    stack: contextlib.ExitStack,
    folder: Path,
    name: str,
    checkout: Path,
    core: int,
    standin: Standin,
    more: Mapping[str, str] = MappingProxyType({}),
) -> System:
    """One that serves the stand-in's engines, on its core; `more` are variables of its own."""
    router = stack.enter_context(service.router(folder, name, environment(checkout) | dict(more)))
    pin(router.pid, core)
    endpoints = tuple(
        wire.ReplicaEndpoint(f"standin-{number}", 1, str(path)) for number, path in enumerate(standin.sockets)
    )
    table = wire.ModelRoute(
        model="tiny",
        names=("tiny",),
        revision=1,
        template_hash="",
        tokenizer_dir=str(builtin.path("tiny")),
        chat_template_file=None,
        max_model_len=4096,
        kv_tokens=1 << 20,
        max_queue_length=4096,
        max_queue_wait=60.0,
        created=0,
        replicas=endpoints,
        prefix_caching=True,
    )
    asyncio.run(service.connect(folder, name, table))
    below = psutil.Process(router.pid).children(recursive=True)
    tellers = tuple(each.pid for each in below if "quire.teller" in each.cmdline())
    return System(name, router.port, (router.pid,), router, tellers)


def pin(pid: int, core: int) -> None:
    """Every thread of the process runs on this core alone, as do those that they start."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), {core})


def _litellm(
    stack: contextlib.ExitStack, folder: Path, args: argparse.Namespace, core: int, standin: Standin
) -> list[System]:
    """LiteLLM's proxy, if it is installed."""
    program = args.litellm / "bin/litellm"
    if not program.exists():
        print(f"litellm is left out: {program} is not there (make bench-litellm)")
        return []
    settings = folder / "litellm.yaml"
    settings.write_text(
        "model_list:\n"
        "  - model_name: tiny\n"
        "    litellm_params:\n"
        f"      {{model: openai/tiny, api_base: 'http://127.0.0.1:{standin.http_port}/v1', api_key: none}}\n"
        "general_settings: {dangerously_permit_weak_or_unset_master_key: true}\n"
        "litellm_settings: {telemetry: false, request_timeout: 60, num_retries: 0}\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(program), "--config", str(settings), "--port", str(port), "--host", "127.0.0.1",
        "--telemetry", "False",
    ]  # fmt: skip
    variables = {
        name: value for name, value in service.plain_environment().items() if not name.startswith("PYTHON")
    } | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    log = folder / "litellm.log"
    process = stack.enter_context(
        service.running(command, log, env=variables, stdout=subprocess.DEVNULL, cwd=folder)
    )
    deadline = time.monotonic() + 3 * START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError(f"litellm does not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.5)
    pin(process.pid, core)
    return [System("litellm", port, (process.pid,))]
