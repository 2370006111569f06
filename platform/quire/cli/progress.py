"""Waiting for objects to become what was declared, with a line of progress for each.

`judge` is the decision, a pure function of one answer of the control plane. `wait` polls, shows and stops: on a
terminal each model has one line that is redrawn in place; anywhere else every finished step is one plain line, and
so is every tenth of a download.
"""

from __future__ import annotations

import enum
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from quire.cli import render
from quire.client import Client, Refused

POLL_SECONDS = 0.1
View = Mapping[str, Any]


class Verdict(enum.Enum):
    """Where an object stands on its way to the generation that was applied."""

    WAITING = "waiting"
    DONE = "done"
    STALLED = "stalled"
    FAILED = "failed"
    SUPERSEDED = "superseded"
    GONE = "gone"


DECIDED = {
    "RolledBack": Verdict.FAILED,
    "Pinned": Verdict.SUPERSEDED,
    "RolloutPaused": Verdict.SUPERSEDED,
    "Paused": Verdict.SUPERSEDED,
    "Suspended": Verdict.SUPERSEDED,
}
"""Reasons that say: what the manifest says is not what is to serve now."""


def judge(view: View | None, generation: int) -> tuple[Verdict, str]:
    """The verdict on `generation` of an object (None: it no longer exists), and a sentence on why.

    Done means that the current revision alone serves and that a request sent now is answered; a model declared
    with no replica is done when none is left. Stalled means that nothing will change without a new intent.
    """
    if view is None or view["deleting"]:
        return Verdict.GONE, "it was deleted"
    if view["generation"] > generation:
        return Verdict.SUPERSEDED, f"a newer generation, {view['generation']}, was applied meanwhile"
    stalled = render.condition(view, "Stalled")
    if stalled is not None and render.is_true(view, "Stalled"):
        return Verdict.STALLED, f"{stalled['reason']} ({stalled['message']})"
    refused = render.condition(view, "Accepted")
    if refused is not None and refused["status"] == "False" and refused["observedGeneration"] >= generation:
        return Verdict.STALLED, f"{refused['reason']} ({refused['message']})"
    instead = _decided_otherwise(view)
    if instead is not None and not (view["kind"].lower() == "gitsource" and view["resolved"]["suspend"]):
        return instead
    if instead is not None:
        return Verdict.DONE, view["status"].get("summary", "")  # its manifest says so
    fetched = render.condition(view, "Fetched")
    if fetched is not None and fetched["status"] == "False":
        return Verdict.WAITING, view["status"].get("summary", "")
    stopped = view["kind"].lower() == "model" and view["status"].get("replicas", {}).get("desired") == 0
    if view["kind"].lower() == "route":
        stopped = (render.condition(view, "Ready") or {}).get("reason") in ("NoWeight", "Stopped")
    # a control plane of an earlier version says nothing of a gateway's
    told = view["kind"].lower() == "model" or render.condition(view, "RolledOut") is not None
    if told and not render.is_true(view, "RolledOut"):
        return Verdict.WAITING, view["status"].get("summary", "")
    if not stopped and not render.is_true(view, "Ready"):
        return Verdict.WAITING, view["status"].get("summary", "")
    return Verdict.DONE, view["status"].get("summary", "")


def _decided_otherwise(view: View) -> tuple[Verdict, str] | None:
    """The verdict where somebody, or the platform itself, decided against what the manifest says."""
    for kind in ("RolledOut", "Ready"):
        found = render.condition(view, kind)
        if found is None or found["status"] == "True" or found["reason"] not in DECIDED:
            continue
        if found["observedGeneration"] < view["generation"]:
            continue
        return DECIDED[found["reason"]], f"{found['reason']} ({found['message']})"
    return None


def settled(view: View | None) -> tuple[Verdict, str]:
    """The verdict on what is wanted now of a model, whoever decided it: done when all its replicas are there."""
    if view is None or view["deleting"]:
        return Verdict.GONE, "it was deleted"
    summary = view["status"].get("summary", "")
    if render.is_true(view, "Stalled"):
        stalled = render.condition(view, "Stalled") or {}
        return Verdict.STALLED, f"{stalled['reason']} ({stalled['message']})"
    if not view["status"].get("rollout", {}).get("settled"):
        held = _decided_otherwise(view)
        if held is not None and held[1].startswith("RolloutPaused"):
            return held
        return Verdict.WAITING, summary
    if view["status"]["replicas"]["desired"] and not render.is_true(view, "Ready"):
        return Verdict.WAITING, summary
    return Verdict.DONE, summary


def succeeded(view: View | None) -> tuple[Verdict, str]:
    """As `settled`, but a rollout that was undone has failed, whatever serves instead."""
    rolled = render.condition(view, "RolledOut") if view is not None else None
    if rolled is not None and rolled["reason"] == "RolledBack":
        return Verdict.FAILED, f"RolledBack ({rolled['message']})"
    return settled(view)


def rolled_out(view: View | None) -> tuple[Verdict, str]:
    """As `succeeded`, of what the manifest says: while a pin or a pause keeps it away it is not rolled out."""
    decided = _decided_otherwise(view) if view is not None and not view["deleting"] else None
    return decided if decided is not None and not decided[1].startswith("Paused") else succeeded(view)


def _of_now(view: View) -> View:
    """The same without a status that is of an earlier generation: it would be read as the progress of this one."""
    observed = view["status"].get("observedGeneration", view["generation"])
    return view if observed >= view["generation"] else {**view, "status": {}}


Judge = Callable[[View | None], tuple[Verdict, str]]
Result = tuple[Verdict, str, View | None]
WIDE = 10_000


class Display:
    """Shows views as they change: `show` takes all of them, in the same order each time, and by key what each is
    waited for where that is not what its summary says; `finish` ends it."""

    def __init__(self, write: Callable[[str], object], *, redraw: bool, width: int) -> None:
        self._write = write
        self._redraw = redraw
        self._width = width
        self._drawn: list[str] = []
        self._seen: dict[str, set[str]] = {}
        self._summaries: dict[str, str] = {}
        self._tenths: dict[str, int] = {}

    @classmethod
    def on_stderr(cls) -> Display:
        # One column is left free: a full line would wrap and break the count of lines.
        return cls(sys.stderr.write, redraw=sys.stderr.isatty(), width=shutil.get_terminal_size().columns - 1)

    def show(self, views: Sequence[View], waits: Mapping[str, str] = MappingProxyType({})) -> None:
        views = [_of_now(view) for view in views]
        if self._redraw:
            self._draw([render.progress_line(view, self._width, waits.get(render.key_of(view))) for view in views])
        else:
            self._append(views, waits)
        sys.stderr.flush()

    def finish(self, views: Sequence[View]) -> None:
        """Show the end of it, whole: nothing is redrawn after this, so lines may wrap."""
        views = [_of_now(view) for view in views]
        self.show(views)
        if self._redraw:
            self._draw([render.progress_line(view, WIDE) for view in views])
            sys.stderr.flush()

    def release(self) -> None:
        """Something else is written now: what was drawn stays as it is, and what comes is drawn below."""
        self._drawn = []

    def _draw(self, lines: list[str]) -> None:
        if lines == self._drawn:
            return
        if self._drawn:
            self._write(f"\x1b[{len(self._drawn)}A")
        for line in lines:
            self._write(f"\x1b[2K{line}\n")
        self._drawn = lines

    def _append(self, views: Sequence[View], waits: Mapping[str, str]) -> None:
        for view in views:
            key = render.key_of(view)
            seen = self._seen.setdefault(key, set())
            if render.is_starting_again(view):
                seen.update(stage.name for stage in render.stages(view))
            for stage in render.stages(view):
                if stage.done and stage.name not in seen:
                    seen.add(stage.name)
                    self._write(f"{render.label(view)}  {stage.text()}\n")
                elif not stage.done and stage.tenths > self._tenths.get(f"{key} {stage.name}", 0):
                    self._tenths[f"{key} {stage.name}"] = stage.tenths
                    self._write(f"{render.label(view)}  {stage.text()}\n")
            summary = waits.get(key) or view["status"].get("summary", "")
            if summary and summary != self._summaries.get(key):
                self._summaries[key] = summary
                self._write(f"{render.label(view)}  {summary}\n")


def fetch(client: Client, path: str) -> View | None:
    """The object at that path of the API, or None when there is none: a default (generation 0) is no object."""
    try:
        view: View = client.get(path)
    except Refused as error:
        if error.status == 404:
            return None
        raise
    return view if view["generation"] else None


def _unsaid(result: Result) -> str:
    """What an object is waited for, where its summary does not say it."""
    verdict, why, view = result
    return "" if view is None or verdict is not Verdict.WAITING or why == view["status"].get("summary") else why


def wait(
    client: Client,
    targets: Mapping[str, Judge],
    *,
    timeout: float,
    display: Display,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Result]:
    """Poll until every object (key -> its judge) has a verdict, or `timeout` seconds have passed.

    Objects that are already as declared at the first look are not shown: applying the same manifest again is
    quiet. Returns each key's last verdict; what is still WAITING timed out.
    """
    deadline = clock() + timeout
    results: dict[str, Result] = {}
    moving: list[str] = []
    first = True
    while True:
        for key, judged in targets.items():
            if key in results and results[key][0] is not Verdict.WAITING:
                continue
            view = fetch(client, f"/v1/objects/{key}")
            results[key] = (*judged(view), view)
        if first:
            moving = [key for key in targets if results[key][0] is not Verdict.DONE]
            first = False
        shown = [view for key in moving if (view := results[key][2]) is not None]
        if clock() >= deadline or all(results[key][0] is not Verdict.WAITING for key in targets):
            display.finish(shown)
            return results
        display.show(shown, {key: why for key in moving if (why := _unsaid(results[key]))})
        sleep(POLL_SECONDS)
