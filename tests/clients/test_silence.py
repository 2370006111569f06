"""Streams that have nothing to tell say that they go on, and no client takes that for an answer.

The router is in this process, where it can be told to be silent for less than the time from one token to the next:
so pings come between all of them.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anthropic
import httpx
import openai
import pytest
import uvicorn
from tests.clients.node import outcomes
from tests.clients.server import STEP, TEXT, Server

from quire.router import exchange
from quire.router.app import build
from quire.router.config import RouterConfig
from quire.router.fleet import Fleet
from quire.router.http import Protocol
from quire.router.telling import Teller
from quire_schemas import wire

THOUGHT: Final = f"<think>\n{TEXT}\n</think>\n\nDone."
WORDS: Final = "naïve 你好 🦊🙂 — done"
SAY: Final[list[Any]] = [{"role": "user", "content": "Say it"}]
SCENARIOS: Final = (
    "openai: chat, whole and as a stream",
    "openai: the stream helper",
    "openai: tools, whole and as a stream",
    "openai: responses",
    "ai: generateText and streamText",
    "ai: tools",
    "ai: responses",
    "anthropic: messages, whole and as a stream",
    "anthropic: tools",
)


@dataclass
class Here:
    """Where the router of this process is."""

    root: str

    @property
    def url(self) -> str:
        return f"{self.root}/v1"


async def _serve(
    folder: Path, routes: tuple[wire.ModelRoute, ...], server: list[uvicorn.Server], own: Any
) -> None:
    config = RouterConfig(control_socket="", snapshot_file=str(folder / "table.json"))
    fleet = Fleet(folder / "table.json")
    await fleet.apply(wire.RoutingTable(version=1, models=routes))
    while not all(served.ready for served in fleet.models.values()):
        await asyncio.sleep(0.01)
    head = build(fleet, config, Teller())
    server.append(uvicorn.Server(uvicorn.Config(head.asgi, http=Protocol, lifespan="off", log_config=None)))
    try:
        await server[0].serve(sockets=[own])
    finally:
        await head.executor.close()
        await fleet.close()


@pytest.fixture(scope="module")
def here(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A router in this process, for the models of the server."""
    own = socket.socket()
    own.bind(("127.0.0.1", 0))
    servers: list[uvicorn.Server] = []
    work = _serve(
        tmp_path_factory.mktemp("here"),
        tuple(server._route(server.specs[name]) for name in ("tiny", "parrot")),
        servers,
        own,
    )
    thread = threading.Thread(target=asyncio.run, args=(work,))
    thread.start()
    deadline = time.monotonic() + 20
    while not (servers and servers[0].started):
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield Here(f"http://127.0.0.1:{own.getsockname()[1]}")
    servers[0].should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def events(here: Here, path: str, body: Mapping[str, Any]) -> list[str]:
    """The pieces of a stream between empty lines."""
    answer = httpx.post(f"{here.root}{path}", json={"model": "parrot", "stream": True, **body}, timeout=20)
    assert answer.status_code == 200, answer.text
    return [each for each in answer.text.split("\n\n") if each]


def said(event: dict[str, Any]) -> str:
    """The words that an event of any of the APIs brings."""
    if event.get("type") == "response.output_text.delta":
        return str(event["delta"])
    if "choices" in event:
        [choice] = event["choices"]
        return str(choice.get("text") or choice.get("delta", {}).get("content") or "")
    delta = event.get("delta")
    return str(delta.get("text", "")) if isinstance(delta, dict) else ""


HIDDEN: Final[dict[str, tuple[dict[str, Any], str, str]]] = {
    "/v1/chat/completions": ({"messages": SAY, "script": THOUGHT, "include_reasoning": False}, ": ping", "Done."),
    "/v1/responses": ({"input": "Say it", "script": THOUGHT, "include_reasoning": False}, ": ping", "Done."),
    "/v1/messages": (
        {"messages": [{"role": "user", "content": THOUGHT}], "max_tokens": 400},
        'event: ping\ndata: {"type":"ping"}',
        "Done.",
    ),
    "/v1/completions": ({"prompt": "x", "script": TEXT, "max_tokens": 99}, ": ping", TEXT),
}
"""By path, a request, what its stream says meanwhile, and its text."""


@pytest.mark.parametrize("path", HIDDEN)
def test_a_stream_that_has_nothing_to_tell_says_so(here: Here, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, ping, end = HIDDEN[path]
    monkeypatch.setattr(exchange, "PING_SECONDS", STEP / 4 if path == "/v1/completions" else 4 * STEP)
    found = events(here, path, body)
    places = [place for place, each in enumerate(found) if each == ping]
    assert len(places) >= 3
    assert 0 < places[0] <= places[-1] < len(found) - 1, "it has begun before, and ends with its own end"
    told = [each.rpartition("data: ")[2] for each in found if each != ping]
    assert "".join(said(json.loads(each)) for each in told if each != "[DONE]") == end


def test_the_python_clients_pass_over_it(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PING_SECONDS", STEP / 4)
    with openai.OpenAI(base_url=here.url, api_key="none", max_retries=0, timeout=20) as client:
        asked: dict[str, Any] = {"model": "parrot", "extra_body": {"script": WORDS}}
        with client.chat.completions.stream(messages=SAY, **asked) as chat:
            assert chat.get_final_completion().choices[0].message.content == WORDS
        with client.responses.stream(input="Say it", **asked) as response:
            assert response.get_final_response().output_text == WORDS
        pieces = client.completions.create(prompt="x", stream=True, max_tokens=99, **asked)
        assert "".join(piece.choices[0].text for piece in pieces) == WORDS
    with (
        anthropic.Anthropic(base_url=here.root, api_key="none", max_retries=0, timeout=20) as claude,
        claude.messages.stream(
            model="parrot", max_tokens=99, messages=[{"role": "user", "content": WORDS}]
        ) as message,
    ):
        assert message.get_final_text() == WORDS


@pytest.mark.nightly
def test_the_clients_in_node_pass_over_it(
    here: Here, node_packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "PING_SECONDS", STEP / 4)
    found = outcomes(here, SCENARIOS)
    assert {name: line.get("error") for name, line in found.items()} == dict.fromkeys(SCENARIOS)
