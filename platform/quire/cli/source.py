"""`platform source`: what a person does with a git source: look now, wait for a commit, stop, go on."""

from __future__ import annotations

import time
from functools import partial
from typing import Any
from urllib.parse import quote

import click

from quire.cli import render
from quire.cli.change import attend, conclude
from quire.cli.outcome import ExitCode, interruptible, usage_error
from quire.cli.progress import Verdict, View
from quire.cli.session import complete_objects, connect, seconds
from quire.cli.steer import me, reason, waiting

SHORTEST = 7
"""Digits of a commit that name it."""


@click.group(short_help="Look at a git source now, wait for a commit, suspend it.")
def source() -> None:
    """Look at a git source now, wait for a commit, suspend it. None of this changes a manifest or a repository."""


def _named(name: str) -> tuple[str, str]:
    """The key and the path of a source, which may be given with its kind or without."""
    bare = name.removeprefix("gitsource/")
    if not bare or "/" in bare:
        usage_error(f"{name!r} is not the name of a source", "platform get gitsources lists them")
    return f"gitsource/{bare}", f"/v1/objects/gitsource/{quote(bare, safe='')}"


def _decide(name: str, verb: str, body: dict[str, Any]) -> tuple[str, float]:
    """Have it done; the source's key, and when that was by the control plane's clock."""
    key, path = _named(name)
    with interruptible(f"interrupted while the decision was handed over. See: platform describe {key}"):
        answer = connect().post(f"{path}/{verb}", {**body, "by": me()})
    print(f"{key}  {answer['message']}", flush=True)
    return key, float(answer["at"])


def judge_commit(commit: str | None, after: float, healthy: bool, view: View | None) -> tuple[Verdict, str]:
    """The verdict on a source that is to apply `commit` (None: what its ref is at). `after`: the remote is to have
    been asked since, by the control plane's clock. `healthy`: its objects are to serve, too."""
    if view is None:
        return Verdict.WAITING, "it does not exist yet"
    if view["deleting"]:
        return Verdict.GONE, "it is being deleted"
    status = view["status"]
    ready, applied = render.condition(view, "Ready"), status.get("lastAppliedRevision") or ""
    if ready is None or ready["observedGeneration"] < view["generation"]:
        return Verdict.WAITING, "the repository is being asked"
    if ready["reason"] == "Suspended":
        return Verdict.SUPERSEDED, "it is suspended"
    if (status.get("looked") or 0.0) < after:
        return Verdict.WAITING, "the repository is being asked"
    refused = status.get("lastAttemptedRevision") or ""
    fetched = render.condition(view, "Fetched") or {"status": "True"}
    away = f"{fetched['reason']} ({fetched['message']})" if fetched["status"] == "False" else ""
    if commit is not None and not applied.startswith(commit):
        if ready["status"] != "True" and refused.startswith(commit):
            return Verdict.STALLED, f"{ready['reason']} ({ready['message']})"
        return Verdict.WAITING, f"{applied[:SHORTEST] or 'no commit'} is applied" + (away and f"; {away}")
    if commit is None and ready["status"] != "True":
        if render.is_true(view, "Stalled"):
            return Verdict.STALLED, f"{ready['reason']} ({ready['message']})"
        return Verdict.WAITING, str(ready["message"])
    if commit is None and fetched["status"] != "True":
        return Verdict.WAITING, away or "the repository is being asked"
    if healthy and not render.is_true(view, "AppliedHealthy"):
        health = render.condition(view, "AppliedHealthy") or {"message": ""}
        return Verdict.WAITING, health["message"]
    return Verdict.DONE, ""


def _follow(key: str, commit: str | None, after: float, healthy: bool, timeout: float) -> int:
    results = attend(connect(), {key: partial(judge_commit, commit, after, healthy)}, timeout)
    for verdict, _, view in results.values():
        if verdict is Verdict.DONE and view is not None:
            print(f"{key}  {view['status']['lastAppliedRevision']}")
    return conclude(results, timeout)


@source.command()
@click.argument("name", shell_complete=complete_objects)
@waiting
def sync(name: str, waits: bool, timeout: float) -> int:
    """Look at the repository now, and put everything as it is there: what was changed by hand, too.

    Waits until its commit is applied, not until all of it serves: that is source wait."""
    key, after = _decide(name, "sync", {})
    return _follow(key, None, after, False, timeout) if waits else ExitCode.OK


@source.command()
@click.argument("name", shell_complete=complete_objects)
@click.option("--commit", metavar="COMMIT", help="Until this one is applied; left out: what the repository is at.")
@click.option(
    "--for",
    "state",
    type=click.Choice(["applied", "healthy"]),
    default="healthy",
    show_default=True,
    help="applied: its objects are stored; healthy: and all of them serve.",
)
@click.option(
    "--timeout", metavar="DURATION", callback=seconds, default="30m", show_default=True, help="How long to wait."
)
def wait(name: str, commit: str | None, state: str, timeout: float) -> int:
    """Wait until a commit is applied and serves, as a pipeline does after a push. The repository is asked now.

    Ends at once with 6 when the commit is refused, and with 5 when the source is suspended."""
    if commit is not None and (len(commit) < SHORTEST or set(commit) - set("0123456789abcdef")):
        usage_error(f"{commit!r} is not a commit", f"at least {SHORTEST} of its digits: git rev-parse HEAD")
    key, path = _named(name)
    asked = float(connect().post(f"{path}/look", {"by": me()})["at"])
    return _follow(key, commit, asked if commit is None else 0.0, state == "healthy", timeout)


@source.command()
@click.argument("name", shell_complete=complete_objects)
@reason
def suspend(name: str, reason: str) -> int:
    """Apply nothing from a source, and undo nothing that is changed by hand, until it is resumed."""
    _decide(name, "suspend", {"reason": reason})
    return ExitCode.OK


@source.command()
@click.argument("name", shell_complete=complete_objects)
def resume(name: str) -> int:
    """Follow a suspended source again."""
    _decide(name, "resume", {})
    return ExitCode.OK


@source.command()
@click.argument("name", shell_complete=complete_objects)
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True)
def history(name: str, output: str) -> int:
    """List what became of a source's last commits, newest first."""
    view: View = connect().get(_named(name)[1])
    if output != "table":
        render.dump({"items": view["status"].get("history", [])}, output, "SyncList")
        return ExitCode.OK
    print("\n".join(render.syncs(view, time.time())))
    return ExitCode.OK
