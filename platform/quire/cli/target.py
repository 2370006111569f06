"""Which server and which model a command speaks to: the local platform's router, or any server by its URL."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import click

from quire.cli.outcome import CommandFailed, ExitCode, usage_error
from quire.cli.session import connect

if TYPE_CHECKING:
    from quire.remote import RemoteError, Server
    from quire.remote.server import Card

Command = TypeVar("Command", bound=Callable[..., object])
SHOWN_NAMES = 20


def target_options(command: Command) -> Command:
    """The options `--url` and `--api-key`."""
    command = click.option(
        "--api-key",
        metavar="KEY",
        help="Key for the server. With --url, left out: $OPENAI_API_KEY.",
    )(command)
    return click.option(
        "--url",
        metavar="URL",
        help="Base URL of an OpenAI-compatible server, like http://host:8000/v1. Left out: the local platform.",
    )(command)


def open_server(url: str | None, api_key: str | None, timeout: float | None = None) -> Server:
    """The server that is meant; nothing is sent to it yet, but the local control plane is asked for the router."""
    from quire.remote import RemoteError, Server

    certificate = None
    if url is None:
        router = connect().get("/v1/ping")["router"]
        if not router["ready"]:
            raise nothing_served()
        url, certificate = router["baseUrl"], router.get("certificate")
    else:
        _check_url(url)
        api_key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY")
    if api_key and not re.fullmatch(r"[\x21-\x7e]+", api_key):
        usage_error("the API key has characters that no key has", "is there a blank or a line end in it?")
    try:
        return Server(url, api_key, certificate, timeout)
    except RemoteError as error:
        raise failed(error) from error


def _check_url(url: str) -> None:
    hint = "write it like http://host:8000/v1"
    try:
        parts = urlsplit(url)
        port_is_good = parts.port != 0
    except ValueError:
        usage_error(f"{url!r} is not a URL", hint)
    if not re.fullmatch(r"[\x21-\x7e]+", url) or parts.scheme not in ("http", "https") or not parts.hostname:
        usage_error(f"{url!r} is not a URL of http or https", hint)
    if parts.username is not None or parts.password is not None:
        usage_error("the URL has a user or a password in it", "give a key with --api-key or OPENAI_API_KEY")
    if parts.query or parts.fragment or not port_is_good:
        usage_error(f"{url!r} is not a base URL", hint)


async def choose(server: Server, model: str | None) -> str:
    """The model's name: as given, if the server has it, or the one that it serves. Raises `RemoteError` and
    `CommandFailed`."""
    return chosen(await server.models(), model)


def chosen(cards: list[Card], model: str | None) -> str:
    """As `choose`, of a server's list. Several names with one root are one model."""
    from quire.chat import harmless

    names = [card.id for card in cards]
    if not names:
        raise nothing_served()
    shown = harmless(", ".join(names[:SHOWN_NAMES])) + (", …" if len(names) > SHOWN_NAMES else "")
    if model is None:
        roots = {card.root or card.id for card in cards}
        if len(roots) == 1:
            return names[0]
        usage_error("several models are served, and none is named", f"name one of: {shown}")
    if model not in names:
        raise CommandFailed(f"no model {model!r} is served here", f"name one of: {shown}", ExitCode.NOT_FOUND)
    return model


def nothing_served() -> CommandFailed:
    return CommandFailed(
        "nothing is served now", "platform get   what there is, and why it does not serve", ExitCode.NOT_FOUND
    )


def failed(error: RemoteError) -> CommandFailed:
    """The end of a command whose request failed."""
    from quire.chat import harmless
    from quire.remote import Unreachable

    code = ExitCode.UNREACHABLE if isinstance(error, Unreachable) else ExitCode.FAILED
    return CommandFailed(harmless(error.message), error.hint and harmless(error.hint), code)
