"""Batches on a whole platform: whatever is killed meanwhile, each line is answered, and once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import openai
import psutil
import pytest
from tests.waiting import eventually

from quire.client import Client

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

MODEL = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {name: parrot}
spec:
  source: builtin://tiny
  engine: {runner: scripted, stepTime: 20ms, maxModelLen: 512, kvCache: {size: 8Mi}}
  batching: {maxNumSeqs: 8}
  restartPolicy: {backoffBase: 100ms, backoffMax: 200ms}
  resources: {cpu: 1}
"""
ENDS = ("completed", "failed", "expired", "cancelled")


MODULES = {"engine": "quire_engine", "router": "quire.router", "control plane": "quire.controlplane"}
"""What each kind of process runs; `engine shim` and `router shim` are the parents of theirs."""


def kill(platform: Platform, name: str) -> None:
    """Kill the process of that name, once there is one."""
    module = MODULES[name.removesuffix(" shim")]

    def found() -> psutil.Process | None:
        ours = platform.processes()
        try:
            process = next((each for each in ours if module in each.cmdline()), None)
            if process is None or not name.endswith(" shim"):
                return process
            return next((each for each in ours if each.pid == process.ppid()), None)
        except psutil.NoSuchProcess:
            return None

    victim: psutil.Process = eventually(found, f"there is a {name}")
    victim.kill()
    psutil.wait_procs([victim], timeout=10)
    if name == "control plane":
        Client(platform.state).get("/v1/ping")  # the next command starts the next one


def persistent(ask: Callable[[], Any]) -> Any:
    """What `ask` gives once somebody answers: no router may be there for a moment."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return ask()
        except (openai.APIConnectionError, openai.InternalServerError):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def survive(platform: Platform, count: int, victims: Iterator[str], every: int) -> list[str]:
    """Have a batch of `count` lines answered while the next of `victims` is killed after each `every` lines; which
    were killed."""
    platform.run("apply", platform.gateway, platform.write("parrot.yaml", MODEL))
    killed: list[str] = []
    lines = [
        {
            "custom_id": f"line {number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "parrot",
                "messages": [{"role": "user", "content": f"Number {number}?"}],
                "script": f"It is {number}, and nothing else than {number}.",
            },
        }
        for number in range(count)
    ]
    with openai.OpenAI(base_url=platform.base_url("parrot"), api_key="none", timeout=20) as client:
        content = b"\n".join(json.dumps(line).encode() for line in lines)
        file = client.files.create(file=("lines.jsonl", content), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        done, until = 0, time.monotonic() + 900
        while True:
            assert time.monotonic() < until, f"{done} lines after {killed}\n{platform.logs()}"
            batch = persistent(lambda: client.batches.retrieve(made.id))
            if batch.status in ENDS:
                break
            assert batch.request_counts.completed >= done, "what is answered stays answered"
            done = batch.request_counts.completed
            if done >= every * (len(killed) + 1) - every // 2 and (name := next(victims, None)) is not None:
                kill(platform, name)
                killed.append(name)
            time.sleep(0.02)
        assert (batch.status, batch.error_file_id) == ("completed", None)
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (count, count, 0)
        answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    for number, answer in enumerate(answers):
        (choice,) = answer["response"]["body"]["choices"]
        assert choice["message"]["content"] == f"It is {number}, and nothing else than {number}."
    return killed


# in CI: tests/integration/test_router_batches.py, where engines and routers die
@pytest.mark.nightly
def test_each_line_is_answered_once_whoever_is_killed_meanwhile(platform: Platform) -> None:
    victims = ["router", "engine", "router", "control plane"]
    assert survive(platform, 100, iter(victims), 12) == victims


@pytest.mark.nightly
def test_a_thousand_lines_survive_the_death_of_every_process_in_turn(platform: Platform) -> None:
    victims = 4 * ["router", "engine", "control plane", "engine shim", "router shim"]
    assert survive(platform, 1000, iter(victims), 45) == victims
