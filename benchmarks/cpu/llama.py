"""llama.cpp, built from source by `make bench-peers`: its batched bench and its server, on the same weights.

The checkpoint becomes a GGUF file in bfloat16 (`write_gguf.py`), and llama.cpp's own tool makes the others of it,
as its users have them: Q8_0 and Q4_0.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import client, service
from benchmarks.cpu.ceilings import Format
from benchmarks.rows import Row

FILES: dict[Format, str] = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""What llama.cpp calls the format of as many bits."""
START_SECONDS = 180.0

Settings = dict[str, str]
"""Flags of a program of llama.cpp."""


def candidates(clients: int) -> list[Settings]:
    """Flags of the server worth a try at so many clients."""
    slots = sorted({clients, min(clients, 16)})
    return [
        {"-fa": attention, "-np": str(places), "-ub": batch}
        for places, attention, batch in itertools.product(slots, ("on", "off"), ("512", "2048"))
        if batch == "512" or clients > 1
    ]


@dataclass(frozen=True, slots=True)
class Llama:
    """What `make bench-peers` built under `home`, and one model of ours."""

    home: Path
    model: Path
    """The checkpoint's folder."""
    cache: Path
    """Where its GGUF files lie."""
    threads: int

    def __post_init__(self) -> None:
        if not (self.home / "llama/bin/llama-server").exists():
            raise FileNotFoundError(
                f"{self.home}: llama.cpp is not there\n    hint: make bench-peers, or run with --no-peers"
            )

    def file(self, format: Format) -> Path:
        """The model as GGUF in that format, made if it is not there yet."""
        path = self.cache / f"{self.model.name}-{FILES[format]}.gguf"
        if path.exists():
            return path
        made = path.with_suffix(".part")
        command: list[str | Path]
        if format == "bf16":
            script = Path(__file__).with_name("write_gguf.py")
            command = [self.home / "bin/python", script, self.model, made]
        else:
            command = [self._program("quantize"), self.file("bf16"), made, FILES[format]]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{path.name} cannot be made: {done.stderr[-500:]}")
        made.replace(path)
        return path

    def batched_bench(
        self, format: Format, prompt: int, output: int, sequences: int, repeats: int, settings: Settings
    ) -> Row:
        """Tokens a second of prompts and of generation, each the best of the repeats.

        It does one sequence more, for nothing: what it says last may be lost when it ends.
        """
        command = [
            self._program("batched-bench"), "-m", self.file(format), "-c", sequences * (prompt + output),
            "-npp", prompt, "-ntg", output, "-npl", ",".join(map(str, [sequences] * repeats + [1])),
            "-t", self.threads, "-tb", self.threads, "--output-format", "jsonl",
            *itertools.chain.from_iterable(settings.items()),
        ]  # fmt: skip
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or len(rows) < repeats:
            raise RuntimeError(f"llama-batched-bench gave {len(rows)} of {repeats} rows: {done.stderr[-500:]}")
        return best_of(rows[:repeats])

    @contextlib.contextmanager
    def server(self, format: Format, context: int, settings: Settings, log: Path) -> Iterator[tuple[int, int]]:
        """A server that is ready: its port and the number of its process. Each slot has `context` tokens."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            self._program("server"), "-m", self.file(format), "--port", port, "-c",
            int(settings["-np"]) * context, "-t", self.threads, "-tb", self.threads, "--no-webui",
            "--alias", self.model.name, *itertools.chain.from_iterable(settings.items()),
        ]  # fmt: skip
        with service.running([str(word) for word in command], log, stdout=subprocess.DEVNULL) as process:
            _wait_for(port, process, log)
            yield port, process.pid

    def first_tokens(self, prompts: Sequence[Sequence[int]], tokens: int, log: Path) -> list[list[int]]:
        """The first so many tokens of each answer, greedily, in bfloat16."""
        answers = []
        with self.server("bf16", 1024, {"-np": "1"}, log) as (port, _):
            for prompt in prompts:
                asked = {**ASKED, "prompt": prompt, "n_predict": tokens, "ignore_eos": True, "return_tokens": True}
                body = asyncio.run(client.fetch(port, "POST", "/completion", json.dumps(asked).encode()))
                answers.append(json.loads(body)["tokens"])
        return answers

    def _program(self, name: str) -> Path:
        return self.home / f"llama/bin/llama-{name}"


ASKED: dict[str, Any] = {"cache_prompt": False, "samplers": ["top_k"], "top_k": 1}
"""What a request says to llama.cpp's server beside the rest: nothing is reused, and the largest logit is taken the
fastest way it has."""


def best_of(rows: list[Row]) -> Row:
    """Of what llama-batched-bench printed as JSON lines, the best speeds: tokens a second."""
    return {
        "prefill_tokens_per_s": round(max(row["speed_pp"] for row in rows), 2),
        "decode_tokens_per_s": round(max(row["speed_tg"] for row in rows), 2),
    }


def _wait_for(port: int, process: subprocess.Popen[str], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError, RuntimeError):  # not listening, or still loading
            asyncio.run(client.fetch(port, "GET", "/health"))
            return
        time.sleep(0.2)
    raise RuntimeError(f"llama-server is not ready: {log.read_text()[-500:]}")
