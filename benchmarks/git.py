"""From a commit to its being served: the time from `git add` until what the commit says is there. The commit and
the push are in it.

A real bare repository behind git's own HTTP server, a real control plane, router and scripted engine in a folder
of their own, and a GitSource. Commits come one by one, each after the last one is served.

    poll        the source asks every `--interval`; each push comes at a moment of it that the seed draws
    hint        the server says so by a signed notification right after the push; the source would ask in an hour

    route       the commit gives a Route another name: until a completion by that name is answered
    model       the commit changes a Model's template: until the revision that it made is rolled out

Notifications that come close to one another are one look (`HINT_SECONDS`), so commits keep that distance here: the
row is of one that comes alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
from tests.integration.git_remote import Remote

from benchmarks.rows import NO_KERNELS, RESULTS, Row, provenance, write
from quire.client import Client, Refused
from quire_operators.gitops import HINT_SECONDS
from quire_operators.paths import StateDir

PATIENCE = 120.0
"""Seconds after which a commit that is not served ends the run."""
HEAD = "apiVersion: quire.dev/v1alpha1\n"
GATEWAY = HEAD + "kind: Gateway\nmetadata: {name: default}\nspec: {port: 0}\n"
MODEL = HEAD + (
    "kind: Model\nmetadata: {name: m}\n"
    "spec: {source: 'builtin://tiny', engine: {runner: scripted, maxModelLen: 256, kvCache: {size: 4Mi}},\n"
    "  resources: {cpu: 1}, env: [{name: ROUND, value: 'ROUND_'}]}\n"
)
ROUTE = HEAD + (
    "kind: Route\nmetadata: {name: r}\n"
    "spec: {match: {modelNames: [name-ROUND_]}, backends: [{model: m, weight: 1}]}\n"
)
SECRET = "a secret of the benchmark"


@dataclass(slots=True)
class World:
    """A control plane, what it serves, and the repository that it follows."""

    client: Client
    remote: Remote
    port: int
    base_url: str
    round: int = 0

    def commit(self, change: str) -> str:
        """Push a commit that changes the route or the model; its digits."""
        self.round += 1
        text = {"route": ROUTE, "model": MODEL}[change].replace("ROUND_", str(self.round))
        self.remote.write(**{change: text})
        return self.remote.push(f"round {self.round}")

    def notify(self) -> None:
        """Say that there is something new, as a git server does."""
        digest = hmac.new(SECRET.encode(), b"{}", "sha256").hexdigest()
        url = f"http://127.0.0.1:{self.port}/hooks/bench"
        httpx.post(url, content=b"{}", headers={"X-Hub-Signature-256": f"sha256={digest}"}).raise_for_status()

    def name_is_served(self) -> bool:
        body = {"model": f"name-{self.round}", "prompt": "hi", "max_tokens": 1}
        return httpx.post(f"{self.base_url}/completions", json=body, timeout=30).status_code == 200

    def is_rolled_out(self, commit: str) -> bool:
        try:
            view = self.client.get("/v1/objects/model/m")
        except Refused:  # not stored yet
            return False
        found = view["status"].get("conditions", ())
        true = {
            each["type"]
            for each in found
            if each["status"] == "True" and each["observedGeneration"] == view["generation"]
        }
        newest = view["revisions"][0]["cause"].startswith(f"bench@{commit[:7]}")
        return newest and {"Ready", "RolledOut"} <= true


def until(true: Callable[[], bool], what: str) -> None:
    """Wait until it is true, looked at every 5 ms."""
    began = time.perf_counter()
    while not true():
        if time.perf_counter() - began > PATIENCE:
            sys.exit(f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(0.005)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextlib.contextmanager
def standing(folder: Path) -> Iterator[World]:
    """Everything but the source, and nothing of it afterwards."""
    state = StateDir(folder / "state")
    readable, writable = os.pipe()
    command = [sys.executable, "-P", "-m", "quire.controlplane", "--state-dir", str(state.root)]
    process = subprocess.Popen(
        [*command, "--ready-fd", str(writable)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(writable,),
        start_new_session=True,
    )  # fmt: skip
    os.close(writable)
    client, remote = Client(state, start=False), Remote(folder / "remote")
    try:
        with open(readable) as pipe:
            if not (said := pipe.readline()).startswith("ready "):
                sys.exit(f"the control plane does not start: {said}")
        try:
            client.post("/v1/secrets/hook", {"value": SECRET})
            client.post("/v1/apply", {"files": [{"name": "g.yaml", "text": GATEWAY}]})
            yield World(client, remote, free_port(), "")
        finally:
            client.post("/v1/down", {"grace": 0.2})
            process.wait(60)
    finally:
        remote.close()


def declare(world: World, mode: str, interval: float) -> None:
    """The source, and its first commit served."""
    more = f", webhook: {{provider: github, secretRef: hook, port: {world.port}}}" if mode == "hint" else ""
    every = "1h" if mode == "hint" else f"{interval:g}s"
    text = (
        f"{HEAD}kind: GitSource\nmetadata: {{name: bench}}\n"
        f"spec: {{url: '{world.remote.url}', interval: {every}, ref: {{branch: main}}{more}}}\n"
    )
    world.client.post("/v1/apply", {"files": [{"name": "s.yaml", "text": text}]})
    conditions = {"AppliedHealthy"} | ({"WebhookListening"} if mode == "hint" else set())

    def follows() -> bool:
        view = world.client.get("/v1/objects/gitsource/bench")
        true = {each["type"] for each in view["status"].get("conditions", ()) if each["status"] == "True"}
        return view["status"].get("observedGeneration") == view["generation"] and conditions <= true

    until(follows, f"the source follows by {mode}")
    world.base_url = str(world.client.get("/v1/ping")["router"]["baseUrl"])


def measure(world: World, mode: str, change: str, commits: int, interval: float, rng: random.Random) -> Row:
    """Commits of one kind, one by one."""
    took = []
    for _ in range(commits):
        time.sleep(HINT_SECONDS + 0.1 if mode == "hint" else rng.uniform(0, interval))
        began = time.perf_counter()
        commit = world.commit(change)
        if mode == "hint":
            world.notify()
        until(
            world.name_is_served if change == "route" else partial(world.is_rolled_out, commit),
            f"{change} by {mode}",
        )
        took.append(time.perf_counter() - began)
    took.sort()
    return {
        "benchmark": "git", "mode": mode, "change": change, "commits": commits,
        "interval_s": interval if mode == "poll" else None,
        "p50_ms": round(statistics.median(took) * 1000, 1),
        "p90_ms": round(took[math.ceil(0.9 * commits) - 1] * 1000, 1),
        "max_ms": round(took[-1] * 1000, 1),
    }  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--commits", type=int, default=30, help="of each change, by each mode")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two looks of mode poll")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "git.jsonl")


def run(args: argparse.Namespace) -> None:
    rows: list[Row] = []
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="qb") as folder, standing(Path(folder)) as world:
        world.commit("model")
        world.commit("route")
        try:
            for mode in ("poll", "hint"):
                declare(world, mode, args.interval)
                for change in ("route", "model"):
                    row = measure(world, mode, change, args.commits, args.interval, rng)
                    rows.append(provenance(NO_KERNELS) | {"seed": args.seed} | row)
                    print(
                        f"{change} by {mode}: p50 {row['p50_ms']:.0f} ms, p90 {row['p90_ms']:.0f}, "
                        f"worst {row['max_ms']:.0f} of {args.commits} commits",
                        flush=True,
                    )
        finally:
            write(args.out, rows)
