"""`platform rollout`: where a model's rollout stands, what was before, and what a person decides about it."""

from __future__ import annotations

import time

import click

from quire.cli import render
from quire.cli.outcome import ExitCode
from quire.cli.progress import View, rolled_out, succeeded
from quire.cli.session import complete_objects, connect, model_path, seconds
from quire.cli.steer import decide, follow, reason, waiting


@click.group(short_help="Follow a rollout, stop it, undo it, try it again.")
def rollout() -> None:
    """Follow a rollout, stop it, undo it, try it again. None of this changes a manifest."""


@rollout.command()
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@click.option("--watch/--no-watch", "watches", default=True, help="Wait until it is done (the default).")
@click.option(
    "--timeout", metavar="DURATION", callback=seconds, default="30m", show_default=True, help="How long to wait."
)
@click.option("-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text", show_default=True)
def status(reference: str, watches: bool, timeout: float, output: str) -> int:
    """Tell where a model's rollout stands, and wait for its end.

    Exits with 6 when it failed or was rolled back, with 5 when a pin or a pause keeps it away, with 4 when it goes
    on after the timeout."""
    key, path = model_path(reference)
    client = connect()
    view: View = client.get(path)
    if output != "text":
        shown = {name: view["status"].get(name) for name in SHOWN}
        render.dump({"key": key, "generation": view["generation"], **shown}, output, "RolloutStatus")
    else:
        print("\n".join(render.rollout(view)), flush=True)
    return follow(client, key, timeout, rolled_out) if watches else ExitCode.OK


SHOWN = ("summary", "servedRevision", "stableRevision", "rollout", "replicas", "overrides", "conditions")


@rollout.command()
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True)
def history(reference: str, output: str) -> int:
    """List a model's revisions, newest first, with what became of each and why."""
    view: View = connect().get(model_path(reference)[1])
    if output != "table":
        render.dump({"items": view["revisions"]}, output, "RevisionList")
        return ExitCode.OK
    print("\n".join(render.history(view, time.time())))
    return ExitCode.OK


@rollout.command()
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@click.option("--skip-exam", is_flag=True, help="Even if it has not passed its exam.")
@reason
@waiting
def promote(reference: str, skip_exam: bool, reason: str, waits: bool, timeout: float) -> int:
    """Have a canary take over now, whatever its steps say.

    One that has not passed its exam yet takes over with --skip-exam alone."""
    body = {"reason": reason, **({"skipExam": True} if skip_exam else {})}
    return decide(reference, "promote", body, timeout if waits else None, succeeded)


@rollout.command()
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@reason
@waiting
def abort(reference: str, reason: str, waits: bool, timeout: float) -> int:
    """Give a canary up, until the manifest changes or it is retried. The revision beside it serves on."""
    return decide(reference, "abort", {"reason": reason}, timeout if waits else None)


@rollout.command()
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@click.option(
    "--to-revision", type=int, metavar="N", help="Which one; left out: the last that was rolled out before."
)
@reason
@waiting
def undo(reference: str, to_revision: int | None, reason: str, waits: bool, timeout: float) -> int:
    """Go back to an earlier revision, until the manifest changes.

    The manifest stays as it is: applying it again changes nothing, applying another one ends the pin."""
    return decide(reference, "undo", {"revision": to_revision, "reason": reason}, timeout if waits else None)


@rollout.command()
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@waiting
def retry(reference: str, waits: bool, timeout: float) -> int:
    """Try again what failed: a revision that was given up, replicas that failed, a download.

    Ends a pin, too: what the manifest says is rolled out."""
    return decide(reference, "retry", {}, timeout if waits else None, succeeded)


@rollout.command()
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@reason
def pause(reference: str, reason: str) -> int:
    """Let no rollout begin or go on. What serves goes on serving, and is started again if it crashes."""
    return decide(reference, "rollout-pause", {"reason": reason}, None)


@rollout.command()
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@waiting
def resume(reference: str, waits: bool, timeout: float) -> int:
    """Let rollouts go on."""
    return decide(reference, "rollout-resume", {}, timeout if waits else None, succeeded)


@rollout.command()
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@reason
@waiting
def restart(reference: str, reason: str, waits: bool, timeout: float) -> int:
    """Replace all replicas by new ones of the same revision, within the budget of a rollout."""
    return decide(reference, "restart", {"reason": reason}, timeout if waits else None)
