"""One server for all tests of clients. No client may need anything else: every other address is cut off."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import openai
import pytest
from tests.clients.node import fetched, installed
from tests.clients.server import Server, server_running

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")


def pytest_collection_finish(session: pytest.Session) -> None:
    """The packages for Node come while other tests run: that waits for the network, not for a processor."""
    if any("node_packages" in getattr(item, "fixturenames", ()) for item in session.items):
        threading.Thread(target=fetched, name="npm", daemon=True).start()


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
