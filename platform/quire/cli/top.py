"""`platform top`: what each model does now, from two looks at the router's own metrics."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import click

from quire import endpoint
from quire.cli.outcome import CommandFailed, ExitCode, interruptible
from quire.cli.render import table, versioned
from quire.cli.session import connect, seconds
from quire.series import Series, rate, read
from quire_schemas import signals

RATES = {"out": f"{signals.GENERATION_TOKENS}_total", "in": f"{signals.PROMPT_TOKENS}_total"}
GAUGES = {
    "in_flight": signals.REQUESTS_IN_FLIGHT,
    "running": signals.NUM_REQUESTS_RUNNING,
    "waiting": signals.NUM_REQUESTS_WAITING,
    "kv": signals.KV_CACHE_USAGE,
    "up": signals.REPLICA_UP,
}


def rows(before: Series, after: Series, span: float, models: list[str]) -> list[dict[str, Any]]:
    """One row a model: tokens a second over `span` seconds, and what is now."""
    shown = []
    for model in models:
        row: dict[str, Any] = {"model": model}
        for name, metric in RATES.items():
            then, now = before.get((metric, model), 0.0), after.get((metric, model), 0.0)
            row[f"{name}TokensPerSecond"] = round(rate(then, now, span), 1)
        for name, metric in GAUGES.items():
            row[name] = after.get((metric, model), 0.0)
        row["kv"] = round(row["kv"] / max(row["up"], 1.0), 4)
        shown.append(row)
    return shown


def _lines(found: list[dict[str, Any]]) -> list[str]:
    cells = [
        [
            row["model"], f"{row['up']:.0f}",
            f"{row['outTokensPerSecond']:.1f}", f"{row['inTokensPerSecond']:.1f}",
            f"{row['in_flight']:.0f}", f"{row['running']:.0f}", f"{row['waiting']:.0f}", f"{row['kv']:.1%}",
        ]
        for row in found
    ]  # fmt: skip
    return table(("MODEL", "REPLICAS", "TOK/S", "PROMPT TOK/S", "REQUESTS", "RUNNING", "WAITING", "KV"), cells)


def _look(router: Mapping[str, Any]) -> Series:
    url = router["baseUrl"]
    try:
        asked = endpoint.connection(url, 10, router.get("certificate"))
    except OSError as error:
        raise _silent(url, error) from error
    try:
        asked.request("GET", "/metrics")
        answer = asked.getresponse()
        text = answer.read().decode()
        if answer.status != 200:
            raise CommandFailed(
                f"the router answered {answer.status} to /metrics", "platform logs router", ExitCode.UNEXPECTED
            )
        return read(text)
    except (OSError, http.client.HTTPException) as error:
        raise _silent(url, error) from error
    finally:
        asked.close()


def _silent(url: str, error: Exception) -> CommandFailed:
    if isinstance(error, endpoint.NoCertificate):
        return CommandFailed(f"the router was not asked: {error}", "put the file back", ExitCode.UNREACHABLE)
    text = f"the router at {urlsplit(url).netloc} does not answer: {error}"
    return CommandFailed(text, "platform get gateway", ExitCode.UNREACHABLE)


@click.command(short_help="Show what each model does now.")
@click.option("-w", "--watch", is_flag=True, help="Go on, one table an interval.")
@click.option(
    "--interval", metavar="DURATION", callback=seconds, default="1s", show_default=True, help="Time to count over."
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def top(watch: bool, interval: float, output: str) -> int:
    """Show what each model does now: tokens a second, requests, and how full its cache is."""
    client = connect()
    ping = client.get("/v1/ping")
    models = [view["name"] for view in client.get("/v1/objects", kind="model")["items"]]
    if not models or not ping["router"]["ready"]:
        raise CommandFailed(
            "nothing is served now", "platform get   what there is, and why it does not serve", ExitCode.NOT_FOUND
        )
    with interruptible("no longer watching; what is served goes on"):
        before, then = _look(ping["router"]), time.monotonic()
        while True:
            time.sleep(interval)
            after, now = _look(ping["router"]), time.monotonic()
            found = rows(before, after, now - then, models)
            if output == "json":
                print(json.dumps(versioned({"items": found}, "LoadList")))
            else:
                print("\n".join(_lines(found)))
            sys.stdout.flush()
            if not watch:
                return ExitCode.OK
            before, then = after, now
