"""Commands that decide about a model beside its manifest: scale, pause, resume. `rollout` has the rest."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from typing import Any, TypeVar

import click

from quire.cli.change import attend, conclude
from quire.cli.outcome import ExitCode, interruptible, usage_error
from quire.cli.progress import Judge, settled
from quire.cli.session import complete_objects, connect, model_path, seconds
from quire.client import Client

Function = TypeVar("Function", bound=Callable[..., Any])


def waiting(command: Function) -> Function:
    """--wait/--no-wait and --timeout, as `apply` has them."""
    command = click.option(
        "--timeout",
        metavar="DURATION",
        callback=seconds,
        default="30m",
        show_default=True,
        help="How long to wait.",
    )(command)
    return click.option("--wait/--no-wait", "waits", default=True, help="Wait until it is so (the default).")(
        command
    )


def reason(command: Function) -> Function:
    """--reason: kept with the decision, and shown with it."""
    return click.option("--reason", default="", metavar="TEXT", help="Why; shown by describe.")(command)


def decide(reference: str, verb: str, body: dict[str, Any], timeout: float | None, judge: Judge = settled) -> int:
    """Have the control plane carry a decision out, say what it was, and wait so long until it is so."""
    key, path = model_path(reference)
    client = connect()
    with interruptible("interrupted while the decision was handed over. See: platform describe " + key):
        answer = client.post(f"{path}/{verb}", {**body, "by": me()})
    print(f"{key}  {answer['message']}", flush=True)
    return ExitCode.OK if timeout is None else follow(client, key, timeout, judge)


def follow(client: Client, key: str, timeout: float, judge: Judge) -> int:
    """Wait until what is wanted of a model now is so. Returns the exit code."""
    return conclude(attend(client, {key: judge}, timeout), timeout)


def me() -> str:
    """Who decides, for the record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return "the command line"


@click.command(short_help="Run another number of replicas than the manifest says.")
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@click.argument("replicas", type=click.IntRange(min=0), required=False)
@click.option("--reset", is_flag=True, help="As many as the manifest says.")
@reason
@waiting
def scale(reference: str, replicas: int | None, reset: bool, reason: str, waits: bool, timeout: float) -> int:
    """Run another number of replicas than the manifest says.

    It stays so when the manifest is applied again, until spec.replicas in it changes or --reset."""
    if reset == (replicas is not None):
        usage_error("give either a number of replicas or --reset", f"platform scale {reference} 2")
    body = {"replicas": replicas, "reason": reason}
    return decide(reference, "scale", body, timeout if waits else None)


@click.command(short_help="Stop a model for a while.")
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@click.option("--for", "span", metavar="DURATION", help="Start it again by itself after that time.")
@reason
@waiting
@click.pass_context
def pause(ctx: click.Context, reference: str, span: str | None, reason: str, waits: bool, timeout: float) -> int:
    """Stop a model for a while: its replicas drain and end, their memory is free, requests for it are refused.

    Applying its manifest meanwhile does not start it; platform resume does."""
    option = next(each for each in ctx.command.params if each.name == "span")
    body = {"seconds": None if span is None else seconds(ctx, option, span), "reason": reason}
    return decide(reference, "pause", body, timeout if waits else None)


@click.command()
@click.argument("reference", metavar="model/NAME", shell_complete=complete_objects)
@waiting
def resume(reference: str, waits: bool, timeout: float) -> int:
    """Start a paused model again."""
    return decide(reference, "resume", {}, timeout if waits else None)
