"""Commands that change what is served, or say what would change: plan, apply, delete."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quire.cli import render
from quire.cli.outcome import CommandFailed, ExitCode, interruptible, report, usage_error
from quire.cli.progress import Display, Judge, Result, Verdict, View, fetch, judge, wait
from quire.cli.session import asks_for_traces, complete_objects, connect, notice, object_path, seconds
from quire.client import Client, InvalidManifest

if TYPE_CHECKING:
    from quire_schemas.manifest import Manifest

Function = TypeVar("Function", bound=Callable[..., Any])


def manifest_paths(command: Function) -> Function:
    """PATH... arguments, or the same behind -f for fingers that are used to it."""
    command = click.argument("paths", nargs=-1, metavar="PATH...")(command)
    return click.option(
        "-f", "--filename", "filenames", multiple=True, metavar="PATH", help="The same as a PATH argument."
    )(command)


def take_ownership(command: Function) -> Function:
    """--take-ownership: also of what a git source manages."""
    return click.option(
        "--take-ownership",
        is_flag=True,
        help="Also what a git source manages, against what its repository says.",
    )(command)


def read(paths: tuple[str, ...], filenames: tuple[str, ...]) -> tuple[list[dict[str, str]], Manifest]:
    """The manifests' files as the API takes them, and as parsed here: a bad file needs no control plane."""
    from quire.cli.offline import load

    files, manifest = load([*paths, *filenames])
    if manifest.problems:
        raise InvalidManifest([problem.as_dict() for problem in manifest.problems])
    return files, manifest


# ── plan ──────────────────────────────────────────────────────────────────────────────────────────────────


@click.command(short_help="Show what apply would do, and whether it fits.")
@manifest_paths
@click.option("-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text", show_default=True)
@click.option("--detailed-exitcode", is_flag=True, help="Exit with 10 when there are changes.")
@click.option(
    "--devices",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Plan for the machine that this YAML or JSON file declares, not for this one.",
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Keep the plan in a file, for: platform apply --plan FILE.",
)
@click.option(
    "--config",
    "configs",
    multiple=True,
    metavar="[MODEL=]FILE",
    help="A checkpoint's config.json, for a model whose weights are not on this machine.",
)
def plan(
    paths: tuple[str, ...],
    filenames: tuple[str, ...],
    output: str,
    detailed_exitcode: bool,
    devices: Path | None,
    save: Path | None,
    configs: tuple[str, ...],
) -> int:
    """Show what apply would do: what changes, how it rolls out, and whether it fits, with the arithmetic."""
    if save is not None and (devices is not None or configs):
        usage_error("a plan for another machine cannot be applied", "leave --save or --devices and --config out")
    files, manifest = read(paths, filenames)
    names = [item.resource.metadata.name for item in manifest.resources if item.resource.kind == "Model"]
    request = {
        "files": files,
        "devices": _document(devices) if devices else None,
        "configs": _configs(configs, names),
    }
    answer: View = connect(wakes=True).post("/v1/plan", request)
    if output == "text":
        for line in render.plan(answer):
            print(line)
    else:
        render.dump(answer, output, "Plan")
    refused = [item for item in answer["items"] if item["action"] == "refused"]
    if refused:
        report(f"{render.count(len(refused), 'object')} cannot be applied: {', '.join(i['key'] for i in refused)}")
        return ExitCode.INVALID
    if save is not None:
        _keep(save, files, answer)
    changes = any(answer["summary"].get(name, 0) for name in ("create", "update", "delete"))
    return ExitCode.CHANGES if detailed_exitcode and changes else ExitCode.OK


PLAN_FORMAT = 1


def _keep(path: Path, files: list[dict[str, str]], answer: View) -> None:
    """Write a plan with the manifests it is of, for its owner alone."""
    text = json.dumps({"quirePlan": PLAN_FORMAT, "files": files, "items": answer["items"]}, ensure_ascii=False)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
    except OSError as error:
        usage_error(f"cannot write {path}: {error.strerror or error}", "give the path of a file you may write")
    notice(f"kept in {path}: platform apply --plan {path}")


def _kept(path: Path) -> tuple[list[dict[str, str]], list[Any]]:
    """The manifests and the items of a plan that was kept."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        usage_error(f"cannot read {path}: {error.strerror or error}", "give the path of a readable file")
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("quirePlan") != PLAN_FORMAT:
        raise CommandFailed(
            f"{path} is no plan that this version kept", "platform plan FILE... --save PLAN", ExitCode.INVALID
        )
    return found["files"], found["items"]


def _configs(given: tuple[str, ...], models: list[str]) -> dict[str, Any] | None:
    """Model name -> its config.json."""
    found = {}
    for item in given:
        model, equals, file = item.partition("=")
        if not equals:
            if len(models) != 1:
                usage_error(
                    f"--config {item} does not say for which of {len(models)} models",
                    f"write --config MODEL={item}",
                )
            model, file = models[0], item
        elif model not in models:
            usage_error(
                f"--config names the model {model!r}, which is not in the manifests",
                f"they hold {', '.join(models) or 'no model'}",
            )
        found[model] = _document(Path(file))
    return found or None


def _document(path: Path) -> Any:
    """What a JSON or YAML file holds; the file is data, so only plain values are read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        usage_error(f"cannot read {path}: {error.strerror or error}", "give the path of a readable file")
    try:
        # Not all JSON means the same as YAML: to PyYAML 1e-05 is text.
        return json.loads(content)
    except ValueError:
        import yaml

        try:
            return yaml.safe_load(content)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CommandFailed(
                f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}",
                "check it with an editor",
                ExitCode.INVALID,
            ) from error


# ── diff ──────────────────────────────────────────────────────────────────────────────────────────────────


@click.command(short_help="Show in what manifests differ from what was applied.")
@manifest_paths
@click.option("-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text", show_default=True)
def diff(paths: tuple[str, ...], filenames: tuple[str, ...], output: str) -> int:
    """Show field by field in what manifests differ from what was applied; exit with 10 if they do.

    What a manifest leaves out differs where its default does. How it would be carried out, and whether it fits,
    says plan.
    """
    files, _ = read(paths, filenames)
    items = connect(wakes=True).post("/v1/diff", {"files": files})["items"]
    if output == "text":
        for line in render.differences(items):
            print(line)
    else:
        render.dump({"items": items}, output, "DifferenceList")
    differs = any(item["action"] == "create" or item["changes"] for item in items)
    return ExitCode.CHANGES if differs else ExitCode.OK


# ── apply ─────────────────────────────────────────────────────────────────────────────────────────────────


@click.command()
@manifest_paths
@click.option(
    "--plan",
    "kept",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A plan that was kept with plan --save: refused if anything would be otherwise by now.",
)
@click.option(
    "--wait/--no-wait", "waits", default=True, help="Wait until what was applied is served (the default)."
)
@click.option(
    "--timeout", metavar="DURATION", callback=seconds, default="30m", show_default=True, help="How long to wait."
)
@click.option(
    "--watch",
    "watches",
    is_flag=True,
    help="Apply again whenever the files change, until Ctrl-C. Deletes nothing.",
)
@take_ownership
def apply(
    paths: tuple[str, ...],
    filenames: tuple[str, ...],
    kept: Path | None,
    waits: bool,
    timeout: float,
    watches: bool,
    take_ownership: bool,
) -> int:
    """Make what runs match the manifests. Files, folders, or - for stdin. Applying the same again does nothing."""
    if watches:
        if kept is not None:
            usage_error("a plan that was kept is of one moment: --watch has no files to follow", "leave one out")
        from quire.cli.watching import watch

        watch([*paths, *filenames], waits=waits, timeout=timeout, take_ownership=take_ownership)
    if kept is None:
        files, _ = read(paths, filenames)
        request: dict[str, Any] = {"files": files}
    elif paths or filenames:
        usage_error("a plan has its manifests with it", f"platform apply --plan {kept}")
    else:
        files, items = _kept(kept)
        request = {"files": files, "planned": items}
    if take_ownership:
        request["takeOwnership"] = True
    return run_apply(connect(wakes=True), request, waits=waits, timeout=timeout)


def run_apply(client: Client, request: Mapping[str, Any], *, waits: bool, timeout: float) -> int:
    """Submit the files, print what became of each object, and wait for all. Returns the exit code."""
    return _traced(client, "apply", lambda: _apply(client, request, waits=waits, timeout=timeout))


def _traced(client: Client, command: str, work: Callable[[], int]) -> int:
    if not asks_for_traces():
        return work()
    from quire.cli.trace import in_span

    return in_span(client, command, work)


def _apply(client: Client, request: Mapping[str, Any], *, waits: bool, timeout: float) -> int:
    return follow(client, _hand_over(client, request), waits=waits, timeout=timeout)


def hand_over(client: Client, request: Mapping[str, Any]) -> View:
    """Submit the files, and no more: what became of each object."""
    answers: list[View] = []

    def work() -> int:
        answers.append(_hand_over(client, request))
        return ExitCode.OK

    _traced(client, "apply", work)
    return answers[0]


def _hand_over(client: Client, request: Mapping[str, Any]) -> View:
    with interruptible(
        "interrupted while the manifests were handed over: they were taken as a whole or not at all. "
        "See which: platform get. Applying them again does no harm"
    ):
        answer: View = client.post("/v1/apply", request)
    return answer


def follow(client: Client, answer: View, *, waits: bool, timeout: float) -> int:
    """Print what became of each object of an answer, and wait until all are served. Returns the exit code."""
    targets = announce(answer)
    if not waits:
        return ExitCode.OK
    return finish(attend(client, targets, timeout), timeout, changed=changes(answer))


def changes(answer: View) -> bool:
    """Whether any object of an answer is otherwise than before."""
    return any(item["result"] != "unchanged" for item in answer["results"])


def announce(answer: View) -> dict[str, Judge]:
    """Print what became of each object of an answer; how to tell when each is served."""
    targets: dict[str, Judge] = {}
    for item in answer["results"]:
        revision = f" (revision {item['revision']})" if item["result"] != "unchanged" and item["revision"] else ""
        print(f"{item['key']}  {item['result']}{revision}", flush=True)
        for warning in item.get("warnings", ()):
            notice(f"  ⚠ {warning}")
        targets[item["key"]] = partial(judge, generation=item["generation"])
    return targets


def finish(results: Mapping[str, Result], timeout: float, *, changed: bool) -> ExitCode:
    """Report what did not come about, or where requests go if anything `changed`. Returns the exit code."""
    code = conclude(results, timeout)
    if changed and code == ExitCode.OK:
        for line in render.endpoint_lines([view for _, _, view in results.values() if view is not None]):
            print(line, flush=True)
    return code


def attend(client: Client, targets: Mapping[str, Judge], timeout: float) -> dict[str, Result]:
    """Wait until each object has its verdict, shown on stderr meanwhile."""
    with interruptible(f"detached: the rollout continues. Follow with: platform wait {' '.join(targets)}"):
        return wait(client, targets, timeout=timeout, display=Display.on_stderr())


def conclude(results: Mapping[str, Result], timeout: float) -> ExitCode:
    """Report what did not come about; the gravest end gives the exit code."""
    code = ExitCode.OK
    for key, (verdict, why, _) in results.items():
        if verdict is Verdict.STALLED:
            report(f"{key}  Stalled: {why}", f"platform describe {key}")
            code = ExitCode.FAILED
        elif verdict is Verdict.FAILED:
            report(f"{key}  {why}", f"platform describe {key}")
            code = ExitCode.FAILED
        elif verdict is Verdict.GONE:
            report(f"{key}  {why} while this command waited", "apply it again")
            code = ExitCode.FAILED
        elif verdict is Verdict.SUPERSEDED and code is not ExitCode.FAILED:
            report(f"{key}  {why}", f"platform describe {key}")
            code = ExitCode.CONFLICT
        elif verdict is Verdict.WAITING and code is ExitCode.OK:
            report(
                f"{key}  not ready after {timeout:g} s: {why or 'no status yet'}; it goes on",
                f"platform describe {key}; --timeout gives it longer",
            )
            code = ExitCode.TIMED_OUT
    return code


# ── delete ────────────────────────────────────────────────────────────────────────────────────────────────


@click.command()
@click.argument("references", nargs=-1, required=True, metavar="KIND/NAME...", shell_complete=complete_objects)
@click.option(
    "--wait/--no-wait", "waits", default=True, help="Wait until everything of it has stopped (the default)."
)
@click.option(
    "--timeout", metavar="DURATION", callback=seconds, default="30m", show_default=True, help="How long to wait."
)
@take_ownership
@click.option(
    "--prune",
    is_flag=True,
    help="With a git source of deletionPolicy: Delete also more objects than its sync.maxPrune.",
)
def delete(references: tuple[str, ...], waits: bool, timeout: float, take_ownership: bool, prune: bool) -> int:
    """Stop serving objects.

    Running requests finish first, within drainTimeout. The objects of a git source stay, unless its
    deletionPolicy is Delete: then they are deleted with it."""
    named = [object_path(reference) for reference in references]
    client = connect(wakes=True)
    given = {"takeOwnership": take_ownership, "prune": prune}
    query = "".join(f"{'&' if n else '?'}{name}=true" for n, name in enumerate(k for k in given if given[k]))
    return _traced(client, "delete", lambda: _delete(client, named, query, waits=waits, timeout=timeout))


def _delete(client: Client, named: list[tuple[str, str]], query: str, *, waits: bool, timeout: float) -> int:
    with interruptible("interrupted: what was named as deleting so far is deleted. See: platform get"):
        for _, path in named:
            client.get(path)  # a name that does not exist is found before anything is deleted
        for key, path in named:
            answer = client.delete(f"{path}{query}")
            print(f"{key}  deleting", flush=True)
            for warning in answer.get("warnings", ()):
                notice(f"warning: {warning}")
            departing = answer.get("objects") or {"deleted": (), "stay": {}}
            for other in departing["deleted"]:
                print(f"{other}  deleting, with {key}", flush=True)
            for other, why in departing["stay"].items():
                print(f"{other}  stays: {why}", flush=True)
    if not waits:
        return ExitCode.OK
    with interruptible("detached: the deletion continues. Follow with: platform get"):
        left = _wait_gone(client, named, timeout)
    for key in left:
        report(f"{key}  still draining after {timeout:g} s; it goes on", f"platform describe {key}")
    return ExitCode.TIMED_OUT if left else ExitCode.OK


def _wait_gone(client: Client, named: list[tuple[str, str]], timeout: float) -> list[str]:
    """Keys of the objects that are still there after `timeout` seconds; says what they wait for meanwhile."""
    import time

    deadline = time.monotonic() + timeout
    left = dict(named)
    said: dict[str, str] = {}
    while left:
        for key, path in list(left.items()):
            view = fetch(client, path)
            if view is None:
                del left[key]
                print(f"{key}  deleted", flush=True)
                continue
            summary = view["status"].get("summary", "")
            if summary and said.get(key) != summary:
                said[key] = summary
                notice(f"{key}  {summary}")
        if left and time.monotonic() > deadline:
            break
        if left:
            time.sleep(0.1)
    sys.stdout.flush()
    return list(left)
