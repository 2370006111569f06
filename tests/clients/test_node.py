"""The client packages for Node: `openai`, `@anthropic-ai/sdk` and the AI SDK (`ai`, `@ai-sdk/…`).

The scenarios are in `scenarios.mjs`, where they also say what must come of them; here is which of them there are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from tests.clients.node import LOCK, Running, listed, outcomes
from tests.clients.server import FREED, Server

SCENARIOS: Final = (
    "openai: chat, whole and as a stream",
    "openai: the stream helper",
    "openai: completions",
    "openai: embeddings",
    "openai: models",
    "openai: structured output",
    "openai: errors",
    "openai: a crowd is a rate limit, and its headers are obeyed",
    "openai: tools, whole and as a stream",
    "openai: responses",
    "openai: what helpers parsed goes back",
    "ai: generateText and streamText",
    "ai: structured output",
    "ai: embedMany and errors",
    "ai: tools",
    "ai: responses",
    "anthropic: messages, whole and as a stream",
    "anthropic: errors",
    "anthropic: tools",
    "anthropic: the tool runner",
)
"""Every scenario that needs nobody to watch."""
WATCHED: Final = {
    "openai: aborting a stream",
    "ai: aborting a stream",
    "deaths: openai and ai",
    "deaths: anthropic",
}


@pytest.fixture(scope="session")
def results(server: Server, node_packages: None) -> Mapping[str, dict[str, Any]]:
    """What became of all of them, which are run once."""
    return outcomes(server, SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(results: Mapping[str, dict[str, Any]], name: str) -> None:
    assert name in results, "Node ended before it"
    assert results[name]["ok"], results[name]["error"]


@pytest.mark.parametrize("name", sorted(name for name in WATCHED if "aborting" in name))
def test_aborting_frees_the_engine(server: Server, node_packages: None, name: str) -> None:
    with Running(server, name) as running:
        running.until("aborted")
        assert server.seconds_until_idle("parrot", since=time.monotonic()) < FREED
        running.go_on()
        last = list(running.lines())[-1]
        assert last["ok"], last["error"]


def test_every_scenario_of_the_script_is_run_by_a_test(node_packages: None) -> None:
    assert set(listed()) == set(SCENARIOS) | WATCHED


@pytest.mark.parametrize("lockfile", [LOCK, LOCK.parents[1] / "e2e" / "axe" / LOCK.name], ids=["clients", "axe"])
def test_the_lockfile_names_no_registry(lockfile: Path) -> None:
    packages = json.loads(lockfile.read_text())["packages"]
    assert not [name for name, package in packages.items() if "resolved" in package]
    assert all(package.get("integrity") for name, package in packages.items() if name)
