"""An engine that is killed under the streams of every client: each throws its own error, none ends as if whole.

All stream at once from one engine, which is killed once, when all have begun.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Final

import anthropic
import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from tests.clients.node import Running
from tests.clients.server import ENDLESS, LENGTHY, Server
from tests.effort import times

SAY: Final[list[Any]] = [{"role": "user", "content": "Say it"}]
Begin = Callable[[], None]


def through_openai(server: Server, begin: Begin) -> None:
    with (
        openai.OpenAI(base_url=server.url, api_key="none") as client,
        client.chat.completions.create(model="doomed", messages=SAY, stream=True, extra_body=ENDLESS) as stream,
    ):
        for chunk in stream:
            if chunk.choices[0].delta.content:
                begin()


def through_langchain(server: Server, begin: Begin) -> None:
    key = SecretStr("none")
    with httpx.Client() as http:
        model = ChatOpenAI(model="doomed", base_url=server.url, api_key=key, http_client=http, extra_body=ENDLESS)
        for chunk in model.stream("Say it"):
            if chunk.content:
                begin()


def through_anthropic(server: Server, begin: Begin) -> None:
    with (
        anthropic.Anthropic(base_url=server.world.url, api_key="none") as client,
        client.messages.stream(
            model="doomed", max_tokens=1000, messages=[{"role": "user", "content": LENGTHY}]
        ) as stream,
    ):
        for _ in stream.text_stream:
            begin()


class Failed(Exception):
    """What a stream of the Responses API says of its end: its events are for the program to read."""


def through_responses(server: Server, begin: Begin) -> None:
    fields = {name: value for name, value in ENDLESS.items() if name != "max_tokens"}
    with (
        openai.OpenAI(base_url=server.url, api_key="none") as client,
        client.responses.create(
            model="doomed",
            input="Say it",
            max_output_tokens=ENDLESS["max_tokens"],
            stream=True,
            extra_body=fields,
        ) as stream,
    ):
        for event in stream:
            if event.type == "response.output_text.delta":
                begin()
            if event.type in ("error", "response.failed"):
                raise Failed(event.to_json())


CLIENTS: Final[Mapping[str, tuple[Callable[[Server, Begin], None], type[Exception]]]] = {
    "openai": (through_openai, openai.APIError),
    "openai responses": (through_responses, Failed),
    "langchain": (through_langchain, openai.APIError),
    "anthropic": (through_anthropic, anthropic.APIError),
}
IN_NODE: Final[Mapping[str, int]] = {"deaths: openai and ai": 2, "deaths: anthropic": 1}
"""Scenarios, with how many streams each has."""


@pytest.fixture(scope="module", params=range(times(1, 10)))
def fates(server: Server, node_packages: None) -> Mapping[str, BaseException | None]:
    """What each stream ended in."""
    server.doom()
    begun = {name: threading.Event() for name in CLIENTS}
    fates: dict[str, BaseException | None] = {}
    with ExitStack() as stack:
        nodes = {name: stack.enter_context(Running(server, name)) for name in IN_NODE}
        pool = stack.enter_context(ThreadPoolExecutor(len(CLIENTS)))
        stack.callback(server.kill, "doomed")  # so that no stream goes on, whatever happens
        ends = {name: pool.submit(through, server, begun[name].set) for name, (through, _) in CLIENTS.items()}
        for name, running in nodes.items():
            for _ in range(IN_NODE[name]):
                running.until("begun")
        for name, event in begun.items():
            assert event.wait(20), (name, ends[name])
        server.kill("doomed")
        for name, end in ends.items():
            fates[name] = end.exception(timeout=20)
        for name, running in nodes.items():
            last = list(running.lines())[-1]
            fates[name] = None if last["ok"] else AssertionError(last["error"])
    return fates


@pytest.mark.parametrize("name", CLIENTS)
def test_a_stream_whose_engine_dies_raises_the_client_s_own_error(
    fates: Mapping[str, BaseException | None], name: str
) -> None:
    error = fates[name]
    assert isinstance(error, CLIENTS[name][1]), error
    assert "engine" in str(error) + json.dumps(getattr(error, "body", None))


@pytest.mark.parametrize("name", IN_NODE)
def test_so_it_is_in_node(fates: Mapping[str, BaseException | None], name: str) -> None:
    if (error := fates[name]) is not None:
        raise error
