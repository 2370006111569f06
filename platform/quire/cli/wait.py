"""`platform wait`: until an object is ready, rolled out or gone; it need not be there yet."""

from __future__ import annotations

from functools import partial

import click

from quire.cli.change import attend, conclude
from quire.cli.progress import Verdict, View, judge
from quire.cli.render import condition, is_true
from quire.cli.session import complete_objects, connect, object_path, seconds


def judge_for(state: str, view: View | None) -> tuple[Verdict, str]:
    """The verdict on `ready`, `rolledout` or `deleted`. What can come about only by somebody's hand is not waited
    for."""
    if state == "deleted":
        return (Verdict.DONE, "") if view is None else (Verdict.WAITING, view["status"].get("summary", ""))
    if view is None:
        return Verdict.WAITING, "it does not exist yet"
    if view["deleting"]:
        return Verdict.GONE, "it is being deleted"
    if state == "rolledout":
        return judge(view, view["generation"])
    if is_true(view, "Ready"):
        return Verdict.DONE, ""
    paused = next((item for item in view["status"].get("overrides", ()) if item["kind"] == "pause"), None)
    if paused is not None and not paused.get("until"):
        return Verdict.SUPERSEDED, f"it is paused by {paused['by']}"
    if is_true(view, "Stalled"):
        stalled = condition(view, "Stalled") or {}
        return Verdict.STALLED, f"{stalled['reason']} ({stalled['message']})"
    return Verdict.WAITING, view["status"].get("summary", "")


@click.command()
@click.argument("references", nargs=-1, required=True, metavar="KIND/NAME...", shell_complete=complete_objects)
@click.option(
    "--for",
    "state",
    type=click.Choice(["ready", "rolledout", "deleted"]),
    default="rolledout",
    show_default=True,
    help="ready: requests are served; rolledout: by the current revision alone.",
)
@click.option(
    "--timeout", metavar="DURATION", callback=seconds, default="30m", show_default=True, help="How long to wait."
)
def wait(references: tuple[str, ...], state: str, timeout: float) -> int:
    """Wait until objects are what they should be. They need not exist yet.

    Ends at once with 6 when one is stalled: nothing but a person would change that."""
    targets = {object_path(reference)[0]: partial(judge_for, state) for reference in references}
    results = attend(connect(), targets, timeout)
    for key, (verdict, _, _) in results.items():
        if verdict is Verdict.DONE:
            print(f"{key}  {state}")
    return conclude(results, timeout)
