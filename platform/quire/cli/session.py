"""What every command that speaks to the control plane shares: which one, notices, and names of objects."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from urllib.parse import urlsplit

import click

from quire.cli.outcome import usage_error
from quire.client import Client, ClientError
from quire_operators.paths import StateDir

KINDS = {
    "model": "model",
    "models": "model",
    "gateway": "gateway",
    "gateways": "gateway",
    "route": "route",
    "routes": "route",
    "accesspolicy": "accesspolicy",
    "accesspolicies": "accesspolicy",
    "gitsource": "gitsource",
    "gitsources": "gitsource",
}
"""Kinds that are stored as objects, in the spellings a command takes."""


def notice(line: str) -> None:
    """Tell the person something that is not the command's data."""
    print(line, file=sys.stderr, flush=True)


def connect(*, start: bool = True, wakes: bool = False) -> Client:
    """The client of this user's control plane; nothing is connected yet. `wakes`: also after `platform down`."""
    client = Client(StateDir.default(), start=start, wakes=wakes, notice=notice)
    if os.environ.get("QUIRE_DATABASE"):
        _tell_of_another_store(client)
    return client


def _tell_of_another_store(client: Client) -> None:
    """Say, once a command, that QUIRE_DATABASE is not what the control plane that runs goes by."""
    context = click.get_current_context(silent=True)
    if context is None or context.meta.get("quire.database.told") or not client.is_running():
        return
    context.meta["quire.database.told"] = True
    if _is_plainly_noted(client.state, os.environ["QUIRE_DATABASE"]):
        return
    from quire_operators import whereabouts
    from quire_operators.sqlite import UnusableStore

    try:
        why = whereabouts.otherwise(client.state, os.environ)
    except UnusableStore:  # what is kept of it cannot be read: for whoever is started next to say
        return
    if why is not None:
        notice(f"control plane  {why}. The variable counts for one that is started, not for this one")


def _is_plainly_noted(state: StateDir, address: str) -> bool:
    """Whether a state directory keeps to the database of this address, where that can be told without the library
    that knows all of an address: its import would cost every command."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept, parts = json.loads(state.database.read_text())["database"], urlsplit(address.strip())
        port = f":{parts.port}" if parts.port else ""
        return bool(kept == f"postgresql://{parts.hostname}{port}{parts.path}")
    return False


def asks_for_traces() -> bool:
    """Whether this shell may ask for traces. Costs nothing to find out; `quire.tracing` knows for certain."""
    return any(name.startswith("OTEL_") for name in os.environ)


def seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Option callback: a duration with its unit, as manifests spell it, in seconds; None where none is given."""
    from quire_schemas.quantities import BadQuantity, parse_duration

    if value is None:
        return None
    try:
        return parse_duration(value)
    except BadQuantity as error:
        raise click.BadParameter(f"{error}\nhint: {error.hint}", ctx, param) from error


def complete_objects(ctx: object, param: object, incomplete: str) -> list[str]:
    """Names of objects for a shell that completes a word; none while no control plane answers."""
    try:
        items = Client(StateDir.default(), start=False).get("/v1/objects")["items"]
    except ClientError:
        return []
    names = [f"{item['kind'].lower()}/{item['name']}" for item in items]
    return [name for name in names if name.startswith(incomplete)]


def model_path(reference: str) -> tuple[str, str]:
    """As `object_path`, of a model alone: other kinds have no replicas."""
    key, path = object_path(reference)
    if not key.startswith("model/"):
        usage_error(f"{key} is no model", "name one, for example model/quickstart: platform get")
    return key, path


def object_path(reference: str) -> tuple[str, str]:
    """`model/quickstart` -> (its key, its path in the API). A bare or unknown kind is a bad command line."""
    kind, slash, name = reference.partition("/")
    if not slash or not name or "/" in name:
        usage_error(f"{reference!r} does not name an object", f"write it as kind/name, for example model/{kind}")
    known = KINDS.get(kind.lower())
    if known is None:
        usage_error(f"unknown kind {kind!r}", f"kinds with objects are {', '.join(sorted(set(KINDS.values())))}")
    from urllib.parse import quote

    return f"{known}/{name}", f"/v1/objects/{known}/{quote(name, safe='')}"
