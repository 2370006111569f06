"""One pass of the work over a server of ours or of llama.cpp: started, warmed up, kept busy by a client, ended.

The client is a process of its own and a little nicer than the server. All three share the processors that there
are. What is said of a pass: output tokens a second, times to the first token and between tokens, processor seconds
of the server and of the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import service
from benchmarks.client import Answered, Asked
from benchmarks.cpu.ceilings import Format
from benchmarks.cpu.child import spec
from benchmarks.cpu.ledger import peak_bytes, tree_seconds
from benchmarks.cpu.llama import ASKED, Llama, Settings
from benchmarks.rows import ROOT, Row, backend
from benchmarks.workload import Job
from quire_schemas.model import prefill_share

CONTEXT = 1024
"""Tokens of each place: the longest prompt and the longest output."""
_WARM_UP = 4


def ours(folder: Path, format: Format, threads: int, jobs: Sequence[Job], clients: int) -> Row:
    """A pass over a router and an engine with as many places as there are clients, at most 32."""
    wanted = msgspec.structs.replace(
        spec(folder, format, threads=threads, sequences=min(clients, 32), context=CONTEXT),
        max_prefill_tokens=prefill_share("auto", "cpu"),
    )
    with _ours(wanted) as (port, pids):
        return {"backend": backend(threads)} | _pass(port, pids, wanted.model, jobs, clients, {})


def theirs(llama: Llama, format: Format, settings: Settings, jobs: Sequence[Job], clients: int) -> Row:
    """A pass over llama.cpp's server with those flags."""
    with tempfile.TemporaryDirectory(prefix="qb") as folder:
        log = Path(folder) / "server.log"
        with llama.server(format, CONTEXT, settings, log) as (port, pid):
            row = _pass(port, [pid], llama.model.name, jobs, clients, ASKED)
    return {"backend": "llama.cpp", "settings": settings} | row


@contextlib.contextmanager
def _ours(wanted: Any) -> Iterator[tuple[int, list[int]]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qb")))
        endpoint, engine = stack.enter_context(service.engine(folder, wanted))
        router = stack.enter_context(service.router(folder, "router", {}))
        asyncio.run(service.connect(folder, router.name, service.route(wanted, endpoint)))
        yield router.port, [engine, router.pid]


def _pass(
    port: int, pids: Sequence[int], model: str, jobs: Sequence[Job], clients: int, more: dict[str, Any]
) -> Row:
    short = [Job(job.prompt[:64], 8) for job in jobs[:_WARM_UP]]
    _client(port, model, short, clients, more)
    spent = sum(map(tree_seconds, pids))
    answered = _client(port, model, jobs, clients, more)
    spent = sum(map(tree_seconds, pids)) - spent
    return summary(answered, sum(job.output_tokens for job in jobs)) | {
        "cpu_s_per_1000": round(spent / sum(job.output_tokens for job in jobs) * 1000, 2),
        "peak_mb": sum(map(peak_bytes, pids)) >> 20,
    }


def summary(answered: Answered, tokens: int) -> Row:
    """Speed and waits of a pass that gave so many tokens."""
    firsts = sorted(stream.first for stream in answered.streams)
    gaps = sorted(itertools.chain.from_iterable(stream.gaps for stream in answered.streams))

    def at(ordered: Sequence[float], part: float) -> float:
        return round(ordered[min(int(part * len(ordered)), len(ordered) - 1)] * 1000, 1)

    return {
        "seconds": round(answered.seconds, 2), "output_tokens": tokens,
        "tokens_per_s": round(tokens / answered.seconds, 2),
        "ttft_p50_ms": round(statistics.median(firsts) * 1000, 1), "ttft_p99_ms": at(firsts, 0.99),
        "itl_p50_ms": at(gaps, 0.5), "itl_p99_ms": at(gaps, 0.99),
        "client_cpu_s": round(answered.client_cpu_s, 2),
    }  # fmt: skip


def _client(port: int, model: str, jobs: Sequence[Job], clients: int, more: dict[str, Any]) -> Answered:
    asked = Asked(port, model, clients, [job.prompt for job in jobs], [job.output_tokens for job in jobs], more)
    done = subprocess.run(
        ["nice", "-n", "5", sys.executable, "-m", "benchmarks.client"],
        cwd=ROOT, input=msgspec.json.encode(asked), capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the client of {model}: {done.stderr.decode()[-1000:]}")
    return msgspec.json.decode(done.stdout, type=Answered)
