"""What a soak asks of a whole platform, and what it looks at meanwhile.

`Traffic` is a few clients that ask everything the API has, never twice in the same words: what is remembered by
what a client chooses (a schema, a stop string, a user, a name nobody serves) grows for as long as they do. One
request in ten is left in the middle, one in twenty is one that fails.

`Watch` reads the memory of every process, and from within the Python ones (`LOOK`) what no metric tells: their
tasks and how many objects of which type there are.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import signal
import string
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from tests.waiting import eventually

LOOK = """\
import gc, json, os, signal, sys, threading
def _look(*_):
    told = {"threads": threading.active_count(), "tasks": {}, "objects": {}, "traced": []}
    if "asyncio" in sys.modules:
        import asyncio
        try:
            for task in asyncio.all_tasks():
                name = getattr(task.get_coro(), "__qualname__", "?")
                told["tasks"][name] = told["tasks"].get(name, 0) + 1
        except RuntimeError:
            pass
    gc.collect()
    for each in gc.get_objects():
        name = f"{type(each).__module__}.{type(each).__qualname__}"
        told["objects"][name] = told["objects"].get(name, 0) + 1
    import _tracemalloc
    if _tracemalloc.is_tracing():
        import tracemalloc
        shot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
        told["traced"] = [[str(line.traceback[0]), line.size] for line in shot.statistics("lineno")[:4000]]
    path = os.path.join(os.environ["TEST_LOOK"], str(os.getpid()))
    with open(path + ".new", "w") as file:
        json.dump(told, file)
    os.replace(path + ".new", path)
signal.signal(signal.SIGUSR2, _look)
"""
"""A `sitecustomize` that tells at SIGUSR2 what a process is made of."""

CHATTER = "The quire is bound, the page is turned, the block is full and the lamp has burned. "
WORDS = 12_000
"""More than the ten thousand that a tokenizer remembers."""
PATHS = 1_100
"""More than the 1,024 that the web framework remembers."""
CROWD = 64
"""Of scrapes at once, each of which takes a thread: more than a pool has."""
IN_PARTS = ("chat", "completion", "messages")
"""Kinds of requests that may be left in the middle."""


@dataclass
class Traffic:
    """Clients of the models `steady` and `moving` and the route `either`, in the name of two policies."""

    base_url: str
    keys: tuple[str, ...]
    clients: int = 6
    pause: float = 0.5
    """Mean seconds between an answer and the next question of a client."""
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    told: Counter[str] = field(default_factory=Counter)
    """`kind status` -> how often."""
    wrong: list[str] = field(default_factory=list)
    """Answers that should have been others."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def run(self, seconds: float) -> None:
        """Ask for so long; every connection is closed in the end."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._client(until) for _ in range(self.clients)), self._batches(until))

    async def each_once(self) -> None:
        """Every kind of request, some at a time."""
        async with self._http() as http:
            for _ in range(3):
                await asyncio.gather(*(kind(self, http) for kind in KINDS))
            await self._batch(http)
            # a tokenizer remembers words: all that it ever will, now, and not a few with each request for an hour
            for model in ("steady", "moving"):
                for _ in range(WORDS // 100):
                    words = ("".join(self.rng.choices(string.ascii_lowercase, k=9)) for _ in range(100))
                    body = {"model": model, "prompt": " ".join(words)}
                    (await http.post("/tokenize", json=body, headers=self._headers())).raise_for_status()
            # so does the web framework paths, each of which has the name of something that somebody keeps
            for first in range(0, PATHS, 50):
                paths = (f"/responses/resp_{number}" for number in range(first, first + 50))
                asked = (http.get(path, headers=self._headers()) for path in paths)
                for answer in await asyncio.gather(*asked):
                    self._note("nobody's", answer, 404)
            # a pool gets a thread whenever all it has are at work: now, and not in some busy second an hour later
            url = self.base_url.removesuffix("/v1") + "/metrics"
            for answer in await asyncio.gather(*(http.get(url) for _ in range(CROWD))):
                answer.raise_for_status()

    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.base_url, timeout=60)

    async def _client(self, until: float) -> None:
        kinds, weights = zip(*KINDS.items(), strict=True)
        async with self._http() as http:
            while time.monotonic() < until:
                (kind,) = self.rng.choices(kinds, weights)
                await kind(self, http)
                await asyncio.sleep(self.rng.expovariate(1 / self.pause))

    async def _batches(self, until: float) -> None:
        async with self._http() as http:
            while time.monotonic() < until:
                await self._batch(http)
                await asyncio.sleep(min(20.0, max(until - time.monotonic(), 0)))

    # ── one request of each kind ──────────────────────────────────────────────────────────────────────────

    def _headers(self) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self.rng.choice(self.keys)}",
            "x-request-id": f"soak-{next(self._numbers)}",
        }

    def _model(self) -> str:
        return self.rng.choice(("steady", "steady", "moving", "either"))

    def _prompt(self) -> str:
        """Words of its own behind a beginning that others share, or behind none."""
        shared = CHATTER * self.rng.choice((0, 1, 3))
        return f"{shared}Page {next(self._numbers)}: {self.rng.random()}"

    def _options(self) -> dict[str, Any]:
        """What a client may add, each a new value."""
        number = next(self._numbers)
        every: dict[str, Any] = {
            "stop": [f"#{number}"],
            "seed": number,
            "user": f"user-{number}",
            "temperature": 0.8,
            "logit_bias": {str(number % 2000): -1},
            "frequency_penalty": 0.1,
        }
        return {name: every[name] for name in self.rng.sample(sorted(every), 2)}

    def _body(self, kind: str) -> tuple[str, dict[str, Any]]:
        tokens = self.rng.randrange(4, 48)
        model = self._model()
        if kind == "completion":
            return "/completions", {
                "model": model, "prompt": self._prompt(), "max_tokens": tokens, **self._options(),
            }  # fmt: skip
        messages = [{"role": "user", "content": self._prompt()}]
        body = {"model": model, "messages": messages, "max_tokens": tokens}
        return ("/messages", body) if kind == "messages" else ("/chat/completions", {**body, **self._options()})

    async def _ask(self, http: httpx.AsyncClient, kind: str, path: str, body: Any, *wanted: int) -> Any:
        """The JSON of an answer whose status is one of `wanted`, of none 200."""
        answer = await http.post(path, json=body, headers=self._headers())
        return self._note(kind, answer, *wanted)

    def _note(self, kind: str, answer: httpx.Response, *wanted: int) -> Any:
        self.told[f"{kind} {answer.status_code}"] += 1
        if answer.status_code not in (wanted or (200,)):
            self.wrong.append(f"{kind}: {answer.status_code} {answer.text[:300]}")
            return {}
        return answer.json() if answer.headers.get("content-type", "").startswith("application/json") else {}

    async def _stream(self, http: httpx.AsyncClient, kind: str, *, leave: bool = False) -> None:
        path, body = self._body(kind)
        lines = self.rng.randrange(0, 12) if leave else -1
        async with http.stream("POST", path, json={**body, "stream": True}, headers=self._headers()) as answer:
            self.told[f"{kind} {'left' if leave else answer.status_code}"] += 1
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
                if lines == 0:
                    return
                lines -= 1
        if not leave and last not in ("data: [DONE]", 'data: {"type":"message_stop"}'):
            self.wrong.append(f"{kind}: ended in {last[:300]}")

    async def chat_stream(self, http: httpx.AsyncClient) -> None:
        await self._stream(http, "chat")

    async def completion_stream(self, http: httpx.AsyncClient) -> None:
        await self._stream(http, "completion")

    async def messages_stream(self, http: httpx.AsyncClient) -> None:
        await self._stream(http, "messages")

    async def left_stream(self, http: httpx.AsyncClient) -> None:
        await self._stream(http, self.rng.choice(IN_PARTS), leave=True)

    async def left_whole(self, http: httpx.AsyncClient) -> None:
        """An answer that is no stream, and a client that does not wait for it."""
        path, body = self._body("chat")
        asked = asyncio.create_task(http.post(path, json={**body, "max_tokens": 200}, headers=self._headers()))
        await asyncio.wait([asked], timeout=self.rng.uniform(0, 0.2))
        asked.cancel()
        await asyncio.wait([asked])
        self.told["chat left whole"] += 1

    async def whole(self, http: httpx.AsyncClient) -> None:
        path, body = self._body("chat")
        await self._ask(http, "whole", path, {**body, "n": 2, "logprobs": True, "top_logprobs": 2})

    async def structured(self, http: httpx.AsyncClient) -> None:
        """A schema that nobody has sent before."""
        _, body = self._body("chat")
        name = f"field_{next(self._numbers)}"
        schema = {"type": "object", "properties": {name: {"enum": ["yes", "no"]}}, "required": [name]}
        body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}
        await self._ask(http, "structured", "/chat/completions", {**body, "max_tokens": 40})

    async def tools(self, http: httpx.AsyncClient) -> None:
        _, body = self._body("chat")
        name = f"tool_{next(self._numbers)}"
        tool = {"name": name, "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
        await self._ask(
            http, "tools", "/chat/completions", {**body, "tools": [{"type": "function", "function": tool}]}
        )

    async def embeddings(self, http: httpx.AsyncClient) -> None:
        await self._ask(http, "embeddings", "/embeddings", {"model": "steady", "input": [self._prompt()]})

    async def kept(self, http: httpx.AsyncClient) -> None:
        """A response that is kept, asked for, followed by another one, and deleted."""
        body = {"model": self._model(), "input": self._prompt(), "max_output_tokens": 16}
        headers = self._headers()
        first = self._note("response", await http.post("/responses", json=body, headers=headers))
        if "id" not in first:
            return
        more = {**body, "previous_response_id": first["id"]}
        second = self._note("response", await http.post("/responses", json=more, headers=headers))
        self._note("response", await http.get(f"/responses/{first['id']}", headers=headers))
        for each in (first, second):
            if "id" in each:
                self._note("response", await http.delete(f"/responses/{each['id']}", headers=headers))

    async def behind(self, http: httpx.AsyncClient) -> None:
        """A response in the background, until it is there, or given up at once."""
        body = {
            "model": self._model(), "input": self._prompt(), "max_output_tokens": 16, "background": True,
        }  # fmt: skip
        headers = self._headers()
        made = self._note("background", await http.post("/responses", json=body, headers=headers))
        if "id" not in made:
            return
        path = f"/responses/{made['id']}"
        if self.rng.random() < 0.3:
            self._note("background", await http.post(f"{path}/cancel", headers=headers), 200, 400)
        for _ in range(300):
            now = self._note("background", await http.get(path, headers=headers))
            if now.get("status") not in ("queued", "in_progress"):
                break
            await asyncio.sleep(0.1)
        self._note("background", await http.delete(path, headers=headers))

    async def tokens(self, http: httpx.AsyncClient) -> None:
        await self._ask(http, "tokenize", "/tokenize", {"model": "steady", "prompt": self._prompt()})

    async def looks(self, http: httpx.AsyncClient) -> None:
        self._note("models", await http.get("/models", headers=self._headers()))
        root = self.base_url.removesuffix("/v1")
        for path in ("/metrics", "/readyz"):
            self._note(path, await http.get(root + path))
        self._note("/health", await http.get(f"{root}/health", headers=self._headers()))

    async def fails(self, http: httpx.AsyncClient) -> None:
        """One of the ways to be refused."""
        number = next(self._numbers)
        _, body = self._body("chat")
        bodies: list[tuple[dict[str, Any], tuple[int, ...]]] = [
            ({**body, f"field_{number}": 1}, (400,)),
            ({**body, "model": f"nobody-{number}"}, (404,)),
            ({**body, "max_tokens": 5000}, (400,)),
            ({**body, "timeout": 0.001}, (504,)),
            ({**body, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, (400,)),
            ({**body, "messages": f"{number}"}, (400,)),
        ]
        sent, wanted = self.rng.choice(bodies)
        match self.rng.randrange(8):
            case 0:
                headers = {**self._headers(), "Content-Type": "application/json"}
                answer = await http.post("/chat/completions", content=b'{"model":', headers=headers)
                self._note("refused", answer, 400)
            case 1:
                answer = await http.get(f"/nowhere/{number}", headers=self._headers())
                self._note("refused", answer, 404)
            case 2:
                wrong = {"Authorization": f"Bearer wrong-key-{number:020}"}
                self._note("refused", await http.post("/chat/completions", json=body, headers=wrong), 401)
            case _:
                await self._ask(http, "refused", "/chat/completions", sent, *wanted)

    async def _batch(self, http: httpx.AsyncClient) -> None:
        """A file of lines, their answers, and everything gone again."""
        headers = self._headers()
        lines = [
            json.dumps({"custom_id": str(line), "method": "POST", "url": "/v1/completions", "body": {
                "model": "steady", "prompt": self._prompt(), "max_tokens": 8,
            }})
            for line in range(5)
        ]  # fmt: skip
        files = {"file": ("lines.jsonl", "\n".join(lines).encode())}
        sent = self._note(
            "file", await http.post("/files", files=files, data={"purpose": "batch"}, headers=headers)
        )
        if "id" not in sent:
            return
        asked = {"input_file_id": sent["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = self._note("batch", await http.post("/batches", json=asked, headers=headers))
        if "id" not in batch:
            return
        for _ in range(300):
            batch = self._note("batch", await http.get(f"/batches/{batch['id']}", headers=headers))
            if batch.get("status") in ("completed", "failed"):
                break
            await asyncio.sleep(0.2)
        if batch.get("status") != "completed" or batch["request_counts"]["completed"] != 5:
            self.wrong.append(f"batch: {batch}")
        for name in ("input_file_id", "output_file_id"):
            if batch.get(name):
                self._note("file", await http.delete(f"/files/{batch[name]}", headers=headers))


KINDS: dict[Callable[[Traffic, httpx.AsyncClient], Awaitable[None]], float] = {
    Traffic.chat_stream: 25,
    Traffic.completion_stream: 14,
    Traffic.messages_stream: 6,
    Traffic.whole: 12,
    Traffic.structured: 5,
    Traffic.tools: 5,
    Traffic.embeddings: 4,
    Traffic.kept: 4,
    Traffic.behind: 2,
    Traffic.tokens: 4,
    Traffic.looks: 4,
    Traffic.left_stream: 7,
    Traffic.left_whole: 3,
    Traffic.fails: 5,
}
"""Kind of request -> how many of a hundred are such."""


# ── what is looked at ─────────────────────────────────────────────────────────────────────────────────────

PARTS = {"quire.controlplane": "control plane", "quire.router": "router", "quire_engine": "engine"}
LOOKS = 6
SHIM = re.compile(r"/shim\.py$")


@dataclass(frozen=True, slots=True)
class Shape:
    """What must be the same whenever the platform rests."""

    pid: int
    descriptors: int
    threads: int
    tasks: dict[str, int]
    objects: dict[str, int]
    traced: dict[str, int]
    resident: int


@dataclass
class Watch:
    """The processes of one platform, by names that stay when a replica is replaced."""

    processes: Callable[[], list[psutil.Process]]
    folder: Path
    """Where those that are asked leave what they say."""
    started_at: float = field(default_factory=time.monotonic)
    memory: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=dict)
    """(name, pid) -> seconds and resident bytes."""

    def named(self) -> list[tuple[str, psutil.Process]]:
        """`router`, `router: shim`, `engine of steady-0`, … and its process; of a replica that is replaced two."""
        found = []
        for process in self.processes():
            try:
                words = process.cmdline()
                part = next((PARTS[word] for word in words if word in PARTS), None)
                if part is None:
                    continue
                if part == "engine":
                    unit = process.environ()["QUIRE_UNIT"].rpartition("/")[2]
                    part = f"engine of {re.sub(r'-r[0-9]+-', '-', unit)}"
                found.append((part, process))
                parent = process.parent()
                if parent is not None and any(SHIM.search(word) for word in parent.cmdline()):
                    found.append((f"{part}: shim", parent))
            except psutil.NoSuchProcess:
                continue
        return found

    def note_memory(self) -> None:
        """One more reading of each process."""
        for name, process in self.named():
            try:
                reading = process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self.memory.setdefault((name, process.pid), []).append((time.monotonic() - self.started_at, reading))

    def shapes(self) -> dict[str, Shape]:
        """What every process is made of now, each asked in turn. For when nothing is replaced."""
        found = self.named()
        assert len(dict(found)) == len(found), f"two of a kind: {[name for name, _ in found]}"
        return {name: self._at_rest(name, process) for name, process in found}

    def _at_rest(self, name: str, process: psutil.Process) -> Shape:
        """The least of several looks: now and then somebody at rest looks after another, too."""
        looks = []
        for _ in range(LOOKS):
            looks.append(self._shape(name, process))
            time.sleep(0.3)
        return min(looks, key=lambda each: (sum(each.tasks.values()), each.descriptors, each.threads))

    def _shape(self, name: str, process: psutil.Process) -> Shape:
        told: dict[str, Any] = {"tasks": {}, "objects": {}, "traced": []}
        if not name.endswith("shim"):  # which are started without `site`
            path = self.folder / str(process.pid)
            path.unlink(missing_ok=True)
            os.kill(process.pid, signal.SIGUSR2)
            eventually(path.exists, f"{name} tells of itself")
            told = json.loads(path.read_text())
        return Shape(
            pid=process.pid,
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            tasks=told["tasks"],
            objects=told["objects"],
            traced=dict(told["traced"]),
            resident=process.memory_info().rss,
        )


def grown(before: dict[str, int], after: dict[str, int], least: int) -> list[str]:
    """What there is more of, by at least so much, most first."""
    more = Counter({name: count - before.get(name, 0) for name, count in after.items()})
    return [f"{name} +{count}" for name, count in more.most_common(25) if count >= least]
