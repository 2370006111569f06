"""Commands that look: get, describe, logs, events. `get` imports nothing beyond click and the client."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import click

from quire.cli import render
from quire.cli.outcome import CommandFailed, ExitCode, interruptible, usage_error
from quire.cli.session import complete_objects, connect, object_path, seconds
from quire.client import Client

POLL_SECONDS = 0.5
TAIL = 200
LISTS = {
    "models": ("model", render.models),
    "model": ("model", render.models),
    "replicas": ("model", render.replicas),
    "revisions": ("model", render.revisions),
    "routes": ("route", render.routes),
    "route": ("route", render.routes),
    "gateway": ("gateway", render.gateways),
    "accesspolicies": ("accesspolicy", render.policies),
    "accesspolicy": ("accesspolicy", render.policies),
    "gitsources": ("gitsource", render.sources),
    "gitsource": ("gitsource", render.sources),
}
"""What `get` lists: the kind of object it asks for, and how it shows it."""
SHOWN_ALONE = {
    "gateway": render.gateways,
    "route": render.routes,
    "accesspolicy": render.policies,
    "gitsource": render.sources,
}
"""How one object is shown, by its kind; all others as models are."""


@click.command()
@click.argument(
    "what",
    default="models",
    metavar="[models|replicas|revisions|routes|gateway|accesspolicies|gitsources|KIND/NAME]",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "name", "json", "yaml"]),
    default="table",
    show_default=True,
)
@click.option("-w", "--watch", is_flag=True, help="Go on printing what changes.")
def get(what: str, output: str, watch: bool) -> int:
    """List what is served. With KIND/NAME, one object."""
    if watch:
        if output == "yaml":
            usage_error("--watch prints one line a change, which YAML has no form for", "use -o json")
        _watch(what, output)
    views, formatter, answer, kind = _found(connect(), what, output)
    if output in ("json", "yaml"):
        render.dump(answer, output, kind)
        return ExitCode.OK
    if not views:
        models = LISTS.get(what, ("",))[0] == "model"
        print(f"nothing here yet{': platform apply manifests/quickstart.yaml' * models}", file=sys.stderr)
        return ExitCode.OK
    for line in formatter(views, time.time()):
        print(line)
    return ExitCode.OK


Views = Sequence[Mapping[str, Any]]
Formatter = Callable[[Views, float], list[str]]


def _found(client: Client, what: str, output: str) -> tuple[Views, Formatter, Any, str | None]:
    """What was asked for: the objects, how they are shown, and the answer for a program with its kind."""
    shape = None
    if "/" in what:
        view = client.get(object_path(what)[1])
        formatter = SHOWN_ALONE.get(view["kind"].lower(), render.models)
        views: Views = [view]
        answer = view
    else:
        if what not in LISTS:
            usage_error(
                f"unknown list {what!r}", f"one of {', '.join(LISTS)}, or an object such as model/quickstart"
            )
        kind, formatter = LISTS[what]
        answer = client.get("/v1/objects", kind=kind)
        views, shape = answer["items"], "ObjectList"
        if what in ("replicas", "revisions"):
            answer, shape = _nested(what, views), {"replicas": "ReplicaList", "revisions": "RevisionList"}[what]
    if output == "name":
        formatter = render.names
    elif output == "wide" and formatter is render.models:
        formatter = render.models_wide
    return views, formatter, answer, shape


def _watch(what: str, output: str) -> NoReturn:
    """Print each line that is new or reads otherwise than before, until interrupted; of tables the head once."""
    client, head = connect(), None
    shown: dict[str, str] = {}
    with interruptible("no longer watching; the control plane goes on"):
        while True:
            views, formatter, _, _ = _found(client, what, output)
            for view in views:
                if shown.get(render.key_of(view)) == (now := _still(view)):
                    continue
                shown[render.key_of(view)] = now
                if output == "json":
                    print(json.dumps(render.versioned(view, None), ensure_ascii=False))
                    continue
                lines = formatter([view], time.time())
                if output != "name" and lines[0].split() != head:
                    head = lines[0].split()
                    print(lines[0])
                print("\n".join(lines if output == "name" else lines[1:]))
            gone = [key for key in shown if key not in {render.key_of(view) for view in views}]
            for key in gone:
                del shown[key]
                gone_ = render.versioned({"deleted": key}, "Deleted")
                print(json.dumps(gone_) if output == "json" else f"{key}  deleted")
            sys.stdout.flush()
            time.sleep(POLL_SECONDS)


def _still(view: Mapping[str, Any]) -> str:
    """What of an object is news when it changes."""
    return json.dumps({name: view[name] for name in ("generation", "deleting", "status", "replicas")})


def _nested(what: str, views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The replicas or revisions of all models, each with its model's name."""
    return {"items": [{"model": view["name"], **item} for view in views for item in view.get(what, ())]}


@click.command(short_help="Tell everything about one object.")
@click.argument("reference", metavar="KIND/NAME", shell_complete=complete_objects)
@click.option("-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text", show_default=True)
def describe(reference: str, output: str) -> int:
    """Tell everything about one object: conditions, replicas, what auto became, events, what you can do."""
    key, path = object_path(reference)
    client = connect()
    view = client.get(path)
    events = client.get("/v1/events", **{"for": key})["items"]
    if output != "text":
        render.dump({**view, "events": events}, output, None)
        return ExitCode.OK
    for line in render.describe(view, events[-5:], time.time()):
        print(line)
    return ExitCode.OK


@click.command(short_help="Print the log of a model's engines, the control plane or the router.")
@click.argument("name", metavar="KIND/NAME|controlplane|router")
@click.option("-f", "--follow", is_flag=True, help="Go on printing what is written.")
@click.option(
    "--tail", type=click.IntRange(min=0), help=f"How many last lines; {TAIL} if neither this nor --since is given."
)
@click.option("--since", callback=seconds, help="Only what was written within this time, such as 10m.")
@click.option("--replica", help="Only this replica (its id, as in: platform get replicas).")
@click.option(
    "-p", "--previous", is_flag=True, help="Of the process before this one: what it said before it ended."
)
def logs(
    name: str, follow: bool, tail: int | None, since: float | None, replica: str | None, previous: bool
) -> int:
    """Print a log: a model's engines', the control plane's or the router's."""
    if previous and (follow or name == "controlplane"):
        usage_error("--previous is for engines and the router, and nothing follows there", "leave one of them out")
    if replica is not None and name in ("controlplane", "router"):
        usage_error(f"{name} has no replicas", "--replica is for a model's engines: leave it out")
    if "/" not in name and name not in ("controlplane", "router"):
        usage_error(f"{name!r} has no log", f"model/{name} for that of a model, or one of controlplane and router")
    asked = name if "/" not in name else object_path(name)[0]
    client = connect()
    begin = None if since is None else time.time() - since
    if tail is None:
        tail = TAIL if since is None else sys.maxsize
    wanted = {"tail": tail, "previous": "true" if previous else None, "since": begin}
    sources = client.get("/v1/logs", name=asked, replica=replica, **wanted)["sources"]
    if not sources and previous:
        raise CommandFailed(
            f"{asked} has had no process before this one", f"platform logs {name}", ExitCode.NOT_FOUND
        )
    if not sources and not follow:
        hint = {
            "router": "it starts with the first model: platform get gateway",
            "controlplane": "platform version shows whether it runs",
        }.get(asked, f"platform describe {asked}")
        raise CommandFailed(f"{asked} has written no log", hint, ExitCode.NOT_FOUND)
    offsets: dict[str, int] = {}
    prefixed = len(sources) > 1
    for source in sources:
        _print_log(source, prefixed)
        offsets[source["name"]] = source["offset"]
    with interruptible("no longer following; what writes the log goes on"):
        while follow:
            _follow(client, asked, replica, offsets)
            time.sleep(POLL_SECONDS)
    return ExitCode.OK


def _follow(client: Client, asked: str, replica: str | None, offsets: dict[str, int]) -> None:
    """Print what was written since `offsets`, and bring them up to date. New replicas join."""
    listing = client.get("/v1/logs", name=asked, replica=replica, tail=0)["sources"]
    for found in listing:
        start = offsets.get(found["name"], 0)
        if found["offset"] == start:
            continue
        # A smaller size than before is a log that was rotated: it is read from its beginning.
        start = start if found["offset"] > start else 0
        single = replica if asked in ("controlplane", "router") else found["name"]
        for source in client.get("/v1/logs", name=asked, replica=single, offset=start)["sources"]:
            if source["name"] == found["name"]:
                _print_log(source, len(listing) > 1)
                offsets[source["name"]] = source["offset"]


def _print_log(source: Mapping[str, Any], prefixed: bool) -> None:
    """Print a piece of a log; with several sources each line says whose it is."""
    for line in source["text"].splitlines():
        print(f"[{source['name']}] {line}" if prefixed else line)
    sys.stdout.flush()


@click.command()
@click.option(
    "--for",
    "reference",
    metavar="KIND/NAME|controlplane",
    help="Only those of one object, or of the control plane.",
)
@click.option("-w", "--watch", is_flag=True, help="Go on printing as they happen.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True)
def events(reference: str | None, watch: bool, output: str) -> int:
    """Print what the control plane decided and saw, oldest first."""
    if reference == "controlplane":
        key: str | None = "controlplane/default"
    else:
        key = object_path(reference)[0] if reference else None
    if watch and output == "yaml":
        usage_error("--watch prints one line an event, which YAML has no form for", "use -o json")
    client = connect()
    items = client.get("/v1/events", **{"for": key})["items"]
    if not watch:
        if output != "table":
            render.dump({"items": items}, output, "EventList")
        elif items:
            print("\n".join(render.event_lines(items, time.time())))
        else:
            print("no events", file=sys.stderr)
        return ExitCode.OK
    shown: dict[Any, int] = {}
    with interruptible("no longer watching; the control plane goes on"):
        while True:
            _print_new(items, shown, output)
            time.sleep(POLL_SECONDS)
            items = client.get("/v1/events", **{"for": key})["items"]


def _print_new(items: Sequence[Mapping[str, Any]], shown: dict[Any, int], output: str) -> None:
    """Print the events that are new or were counted again since the last look."""
    for event in items:
        if shown.get(event["id"]) == event["count"]:
            continue
        shown[event["id"]] = event["count"]
        if output == "json":
            print(json.dumps(render.versioned(event, None), ensure_ascii=False))
        else:
            print(render.event_line(event, time.time()))
    sys.stdout.flush()
