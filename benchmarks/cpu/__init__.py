"""Ours against llama.cpp, oneDNN and transformers on this machine's processors, and all against the machine.

    agreement      ours and llama.cpp's answer with the same tokens; where llama.cpp takes part
    ceilings       what memory and instructions can do, by plain loops; every run has them
    gemm           products alone, ours and oneDNN's
    attention      decode over long contexts, ours and torch's
    experts        a layer of experts, beside dense layers of the same bytes and rows
    host           what of a step of one sequence is not in the native kernels
    tune           flags of llama.cpp, to find its best; the parts behind use what this run found
    neighbours     two engines of ours at once on the same cores, beside one alone
    engine         engines without servers: decode of 1, 16 and 32 sequences, a prompt of 512 tokens
    servers        64 requests over each one's own OpenAI server at 1, 8 and 32 clients
    transformers   the same requests without a server, in three ways

Systems that are compared run in blocks there and back (A B B A): each half of a block is a pair. A row is written
when it is measured; `--resume` goes on with the file's last run, whatever parts are asked for then, and `--report`
prints it. The peers are built once by `make bench-peers`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.cpu import ceilings, child, operations, servers
from benchmarks.cpu.ceilings import Ceilings, Format
from benchmarks.cpu.ledger import Ledger, read
from benchmarks.cpu.llama import FILES, Llama, Settings, candidates
from benchmarks.cpu.report import report
from benchmarks.models import CACHE, SHAPES, model_dir
from benchmarks.rows import RESULTS, ROOT, Row, backend, provenance
from quire_kernels import load
from quire_kernels.cpu import build
from quire_schemas.checkpoint import read_profile

PARTS = ("gemm", "attention", "experts", "host", "neighbours", "tune", "engine", "servers", "transformers")
_WITH_LLAMA = {"tune", "engine", "servers"}
FORMATS: tuple[Format, ...] = ("bf16", "int8", "int4")
GEMM_ROWS = (1, 8, 32, 256)
EXPERT_TOKENS = (1, 16, 256)
ATTENTION = {"qwen2.5-0.5b": (14, 2, 64), "llama-3.2-1b": (32, 8, 64)}
CONTEXT = 8192
SEQUENCES = (1, 16, 32)
CLIENTS = (1, 8, 32)
STATIC_BATCHES = (16, 32)
AGREEMENT = 0.75
"""Share of first greedy tokens that must be the same in bfloat16. The weights are random: a close call that falls
the other way changes all tokens behind it.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=FORMATS)
    parser.add_argument("--models", nargs="*", choices=[*SHAPES, "tiny"], default=["qwen2.5-0.5b"])
    parser.add_argument("--sequences", nargs="*", type=int, default=SEQUENCES, help="of the part engine")
    parser.add_argument("--clients", nargs="*", type=int, default=CLIENTS, help="of tune and servers")
    parser.add_argument("--requests", type=int, help="of tune, servers and transformers, instead of their own")
    parser.add_argument("--blocks", type=int, default=2, help="A B B A each, so two pairs")
    parser.add_argument("--quick", action="store_true", help="less work, one pair of each: a look, not a figure")
    parser.add_argument("--resume", action="store_true", help="go on with the last run of the file")
    parser.add_argument("--report", action="store_true", help="print the last run of the file, measure nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--limit", type=float, default=1200.0, help="seconds for transformers' continuous batching"
    )
    parser.add_argument("--no-peers", action="store_true", help="ours alone, without llama.cpp")
    parser.add_argument(
        "--peers", type=Path, default=ROOT / ".venv-peers", help="where make bench-peers built them"
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.jsonl")


def run(args: argparse.Namespace) -> None:
    if args.report:
        rows = read(args.out)
        print(report([row for row in rows if row["run"] == rows[-1]["run"]]))
        return
    torch.set_num_threads(args.threads)
    common = provenance(backend(args.threads)) | {
        "benchmark": "cpu", "level": build.best_level(build.cpu_flags()).name, "threads": args.threads, "seed": 0,
        "quick": args.quick,
    }  # fmt: skip
    ledger = Ledger(args.out, common, args.resume)
    bench = _Bench(args, ledger)
    for part in args.parts:
        print(f"\n── {part}", flush=True)
        getattr(bench, f"run_{part}")()
    print("\n" + report(ledger.rows))
    print(f"\nrun {ledger.run}: {len(ledger.rows)} rows in {args.out}")


def _at_once(count: int, words: Row) -> Row:
    """So many engines that begin and end their steps together."""
    with tempfile.TemporaryDirectory() as gate, ThreadPoolExecutor(count) as pool:
        children = [pool.submit(child.run, "paced", gate=gate, **words) for _ in range(count)]
        while len(os.listdir(gate)) < count and not any(each.done() for each in children):
            time.sleep(0.05)
        (Path(gate) / "go").touch()
        each = [one.result()["tokens_per_s"] for one in children]
    return {"each_tokens_per_s": each, "tokens_per_s": round(sum(each), 2)}


class _Bench:
    """The parts of a run."""

    def __init__(self, args: argparse.Namespace, ledger: Ledger) -> None:
        self.args = args
        self.ledger = ledger
        row = ledger.measured(
            lambda: {name: round(value) for name, value in asdict(ceilings.measure(args.threads)).items()},
            part="ceilings",
        )
        self.ceilings = Ceilings.of(row)
        self.folders = {name: model_dir(name, args.cache) for name in args.models}
        peers = not args.no_peers and not _WITH_LLAMA.isdisjoint(args.parts)
        self.llamas = {
            name: Llama(args.peers, folder, args.cache, args.threads)
            for name, folder in self.folders.items()
            if peers and name in SHAPES
        }
        self.served = [format for format in args.formats if format in child.SERVED]
        for llama in self.llamas.values():
            for format in self.served:
                llama.file(format)

        for model in self.llamas:
            row = ledger.measured(partial(self._agreement, model), part="agreement", model=model, format="bf16")
            if row["equal"] < AGREEMENT * row["tokens"]:
                raise RuntimeError(f"ours and llama.cpp's are not the same model: {row}")

    def _agreement(self, model: str) -> Row:
        """How many of the first tokens of some answers ours and llama.cpp's have in common."""
        llama, tokens = self.llamas[model], 4
        prompts = [list(job.prompt[:24]) for job in child.jobs(SHAPES[model]["vocab_size"], 8)]
        ours = child.run(
            "first_tokens", folder=str(llama.model), threads=self.args.threads, prompts=prompts, tokens=tokens
        )["answers"]
        with tempfile.TemporaryDirectory() as folder:
            theirs = llama.first_tokens(prompts, tokens, Path(folder) / "server.log")
        pairs = zip(itertools.chain.from_iterable(ours), itertools.chain.from_iterable(theirs), strict=True)
        return {"tokens": tokens * len(prompts), "equal": sum(a == b for a, b in pairs)}

    def run_gemm(self) -> None:
        kernels = load("cpu", self.args.threads)
        rounds, least = (2, 0.05) if self.args.quick else (5, 0.3)
        formats: list[Format] = ["fp32", *self.args.formats]
        for format in formats:
            for rows in GEMM_ROWS:
                action = partial(operations.product, kernels, self.ceilings, format, rows, rounds, least)
                self.ledger.measured(action, part="gemm", format=format, rows=rows, rounds=rounds)

    def run_attention(self) -> None:
        kernels = load("cpu", self.args.threads)
        rounds, least = (2, 0.05) if self.args.quick else (5, 0.3)
        for model, shape in ATTENTION.items():
            for sequences in (1, 8):
                action = partial(
                    operations.attention, kernels, self.ceilings, shape, CONTEXT, sequences, rounds, least
                )
                self.ledger.measured(
                    action, part="attention", format="bf16", model=model, context=CONTEXT, sequences=sequences,
                    rounds=rounds,
                )  # fmt: skip

    def run_experts(self) -> None:
        kernels = load("cpu", self.args.threads)
        rounds, least = (2, 0.05) if self.args.quick else (5, 0.3)
        for format in self.args.formats:
            layers = operations.ExpertLayers(kernels, format)
            for tokens in EXPERT_TOKENS:
                action = partial(layers.measured, tokens, rounds, least)
                self.ledger.measured(action, part="experts", format=format, tokens=tokens, rounds=rounds)

    def run_host(self) -> None:
        steps = 32 if self.args.quick else 200
        for model, folder in self.folders.items():
            for format in self.served:
                action = partial(
                    child.run, "host", folder=str(folder), format=format, threads=self.args.threads, steps=steps
                )
                self.ledger.measured(action, part="host", model=model, format=format)

    def run_neighbours(self) -> None:
        """Decode alone, eight sequences each, over the same seconds."""
        seconds, blocks = (2.0, 1) if self.args.quick else (8.0, self.args.blocks)
        for model, folder in self.folders.items():
            for format in self.served:
                words = {
                    "folder": str(folder), "format": format, "threads": self.args.threads, "sequences": 8,
                    "seconds": seconds,
                }  # fmt: skip
                for block in range(blocks):
                    for half, order in enumerate(((1, 2), (2, 1))):
                        for count in order:
                            self.ledger.measured(
                                partial(_at_once, count, words), part="neighbours", model=model, format=format,
                                engines=count, block=block, half=half,
                            )  # fmt: skip

    def run_tune(self) -> None:
        for model, llama in self.llamas.items():
            for format in self.served:
                for flags in ({"-fa": "on"}, {"-fa": "off"}):
                    bench = partial(llama.batched_bench, format, 128, 32, 16, 1, flags)
                    self.ledger.measured(bench, part="tune", model=model, format=format, settings=flags)
                for clients in self.args.clients:
                    requests = self.args.requests or (4 if clients == 1 else clients)
                    jobs = child.jobs(SHAPES[model]["vocab_size"], requests)
                    for flags in candidates(clients):
                        action = partial(servers.theirs, llama, format, flags, jobs, clients)
                        self.ledger.measured(
                            action, part="tune", model=model, format=format, clients=clients,
                            requests=len(jobs), settings=flags,
                        )  # fmt: skip

    def run_engine(self) -> None:
        output, repeats = (32, 1) if self.args.quick else (128, 2)
        for model in self.folders:
            for format in self.served:
                for sequences in self.args.sequences:
                    self._contest(
                        self._engines("decode", model, [format], 128, output, sequences, repeats),
                        part="engine", kind="decode", model=model, sequences=sequences, format=format,
                    )  # fmt: skip
            self._contest(
                self._engines("prefill", model, self.served, 512, 2, 1, 1 if self.args.quick else 3),
                part="engine", kind="prefill", model=model, prompt=512,
            )  # fmt: skip

    def run_servers(self) -> None:
        for model, folder in self.folders.items():
            for clients in self.args.clients:
                jobs = child.jobs(read_profile(folder).vocab_size, self._requests(clients))
                for format in self.served:
                    systems: dict[str, Callable[[], Row]] = {
                        f"quire {format}": partial(servers.ours, folder, format, self.args.threads, jobs, clients)
                    }
                    if model in self.llamas:
                        flags = self._best("tokens_per_s", model, format, clients, candidates(clients)[0])
                        systems[f"llama.cpp {FILES[format]}"] = partial(
                            servers.theirs, self.llamas[model], format, flags, jobs, clients
                        )
                    self._contest(
                        systems, part="servers", model=model, format=format, clients=clients, requests=len(jobs)
                    )

    def run_transformers(self) -> None:
        """One pass each, between two of ours with the same requests: they take long, and the ratios are large."""
        for model, folder in self.folders.items():
            requests = self._requests(32)
            jobs = child.jobs(read_profile(folder).vocab_size, requests)
            theirs = [("sequential", 1), *(("static", size) for size in STATIC_BATCHES), ("continuous", 0)]
            ours = [(format, 32) for format in self.served if format != "int4"]
            key: Row = {"part": "transformers", "model": model, "requests": requests, "block": 0}
            for half in range(1 if self.args.quick else 2):
                for format, clients in [*ours, ("bf16", 1)] if half == 0 else ours:
                    action = partial(servers.ours, folder, format, self.args.threads, jobs, clients)
                    self.ledger.measured(action, **key, system=f"quire {format} at {clients}", half=half)
                for way, batch in theirs if half == 0 else ():
                    action = partial(
                        child.run, "transformers", folder=str(folder), way=way, threads=self.args.threads,
                        requests=requests, limit=self.args.limit, batch=batch,
                    )  # fmt: skip
                    self.ledger.measured(action, **key, system=f"transformers {way}", batch=batch, half=half)

    def _engines(
        self,
        kind: str,
        model: str,
        formats: list[Format],
        prompt: int,
        output: int,
        sequences: int,
        repeats: int,
    ) -> dict[str, Callable[[], Row]]:
        systems: dict[str, Callable[[], Row]] = {}
        for format in formats:
            systems[f"quire {format}"] = partial(
                child.run, "engine", folder=str(self.folders[model]), format=format, threads=self.args.threads,
                sequences=sequences, prompt=prompt, output=output, repeats=repeats,
            )  # fmt: skip
        for format in formats if model in self.llamas else ():
            flags = self._best(f"{kind}_tokens_per_s", model, format, None, {"-fa": "on"})
            systems[f"llama.cpp {FILES[format]}"] = partial(
                self._batched_bench, model, format, prompt, output, sequences, repeats, flags
            )
        return systems

    def _batched_bench(
        self, model: str, format: Format, prompt: int, output: int, sequences: int, repeats: int, flags: Settings
    ) -> Row:
        found = self.llamas[model].batched_bench(format, prompt, output, sequences, repeats, flags)
        return {"backend": "llama.cpp", "settings": flags} | found

    def _contest(self, systems: dict[str, Callable[[], Row]], **key: object) -> None:
        """All systems there and back, block after block."""
        for block in range(1 if self.args.quick else self.args.blocks):
            for half, order in enumerate((list(systems), list(reversed(systems)))[: 1 if self.args.quick else 2]):
                for system in order:
                    self.ledger.measured(systems[system], **key, system=system, block=block, half=half)

    def _best(self, speed: str, model: str, format: Format, clients: int | None, default: Settings) -> Settings:
        """The flags that `tune` found the fastest in this run, by the column `speed`: for this model and format,
        else for another format of the model, else for another model, else `default`.
        """
        tried = [row for row in self.ledger.find_all(part="tune") if row.get("clients") == clients]
        tried = [row for row in tried if row["model"] == model] or tried
        found = [row for row in tried if row["format"] == format] or tried
        best: Settings = max(found, key=lambda row: float(row[speed]))["settings"] if found else default
        return best

    def _requests(self, clients: int) -> int:
        if self.args.requests:
            return int(self.args.requests)
        if self.args.quick:
            return {1: 4, 8: 16}.get(clients, 32)
        return 64
