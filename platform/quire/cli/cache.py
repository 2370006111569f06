"""`platform cache`: what hub repositories lie on this machine, and removing those that no model uses."""

from __future__ import annotations

import time

import click

from quire.cli import render
from quire.cli.outcome import ExitCode
from quire.cli.session import connect, notice

OUTPUT = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)


@click.group(short_help="List or prune the downloaded models.")
def cache() -> None:
    """The cache of hub repositories. It is Hugging Face's own, so other tools' downloads are in it, too."""


@cache.command("list")
@OUTPUT
def list_(output: str) -> int:
    """List what is there, and who uses it.

    Size, the models that use it, when it was last used, and what prune would free."""
    answer = connect().get("/v1/cache")
    if output == "json":
        render.dump(answer, output, "Cache")
        return ExitCode.OK
    notice(f"{answer['folder']}: {render.size(answer['free'])} free")
    if answer["items"]:
        print("\n".join(render.cache(answer["items"], time.time())))
    else:
        notice("no model is in it")
    return ExitCode.OK


@cache.command()
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@OUTPUT
def prune(dry_run: bool, output: str) -> int:
    """Remove what Quire downloaded and no declared model uses. What other tools downloaded stays."""
    answer = connect().post("/v1/cache/prune", {"dryRun": dry_run})
    if output == "json":
        render.dump(answer, output, "CachePrune")
        return ExitCode.OK
    for item in answer["items"]:
        word = "would be removed" if dry_run else "removed"
        print(f"{item['source']} {item['commit'][:12]}  {word}: {render.size(item['bytes'])}")
    total = render.size(sum(item["bytes"] for item in answer["items"]))
    print(f"{total} would be freed" if dry_run else f"{total} freed")
    return ExitCode.OK
