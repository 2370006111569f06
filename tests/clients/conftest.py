"""One server for all tests of clients. No client may need anything else: every other address is cut off."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from tests.clients.node import installed
from tests.clients.server import Server, server_running

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A client that wants more than the server (a vocabulary, a place to report to) finds nobody there."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PROXIES:
            patch.setenv(name, "http://127.0.0.1:9")
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with server_running() as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture(scope="session")
def node_packages() -> None:
    """The packages of the lockfile; skips where there is no Node."""
    installed()
