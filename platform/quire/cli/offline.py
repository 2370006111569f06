"""Commands that need no control plane: validate, schema, explain. They start nothing and connect to nothing;
`explain` does when it is asked about an object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from quire.cli import render
from quire.cli.outcome import CommandFailed, ExitCode, usage_error

if TYPE_CHECKING:
    from quire_schemas.manifest import Manifest


def load(paths: Sequence[str]) -> tuple[list[dict[str, str]], Manifest]:
    """Read and parse manifests: files, folders, or `-` for stdin.

    Returns the files as the admin API takes them, and the parsed manifest with all problems of all files. No
    path at all is a bad command line.
    """
    if not paths:
        usage_error("no manifest given", "name files, folders or - for stdin, such as manifests/quickstart.yaml")
    from quire_schemas import manifest

    try:
        texts = manifest.read_paths(paths)
    except manifest.ManifestInvalid:
        # Those that can be read are checked all the same; stdin cannot be read twice.
        return [], manifest.load_paths([path for path in paths if path != "-"])
    loaded = manifest.load(texts)
    if not (loaded.resources or loaded.problems):
        hint = "a manifest begins with apiVersion and kind: platform init writes one"
        loaded.problems.append(manifest.Problem(texts[0][0], 1, 1, "", "holds no manifest", hint))
    return [{"name": name, "text": text} for name, text in texts], loaded


@click.command()
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("-o", "--output", type=click.Choice(["text", "json", "github"]), default="text", show_default=True)
def validate(paths: tuple[str, ...], output: str) -> int:
    """Check manifests without a control plane. All errors of all files, each with its place, in one run."""
    files, manifest = load(paths)
    problems = [problem.as_dict() for problem in manifest.problems]
    if output == "json":
        render.dump({"valid": not problems, "problems": problems}, output, "Validation")
    elif output == "github":
        for line in render.problem_annotations(problems):
            print(line)
    else:
        for line in render.problem_lines(problems):
            print(line)
        if problems:
            print(render.count(len(problems), "error"))
        else:
            print(
                f"{render.count(len(manifest.resources), 'object')} in {render.count(len(files), 'file')}: valid"
            )
    return ExitCode.INVALID if problems else ExitCode.OK


@click.command()
def schema() -> int:
    """Print the JSON Schema of manifests.

    Draft 7, for editors and other tools."""
    from quire_schemas.manifest import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return ExitCode.OK


@click.command(short_help="Tell what a manifest field or a reason means.")
@click.argument("topic", metavar="FIELD|reason/REASON|CODE|KIND/NAME")
def explain(topic: str) -> int:
    """Tell what a field, a reason or an error of the API means: model.spec.engine, reason/CrashLoop, queue_full.

    Of an object, such as model/quickstart: every value that is in force, and where it comes from."""
    if topic == "reason" or topic.startswith("reason/"):
        for line in explain_reason(topic.partition("/")[2]):
            print(line)
        return ExitCode.OK
    if _is_reason(topic):
        print("\n".join(explain_reason(topic)))
        return ExitCode.OK
    from quire.cli import codes

    if topic in codes.MEANING:
        print("\n".join(codes.lines(topic)))
        return ExitCode.OK
    if "/" in topic:
        from quire.cli import effective
        from quire.cli.session import connect, object_path

        print("\n".join(effective.lines(connect().get(object_path(topic)[1]))))
        return ExitCode.OK
    from quire_schemas import explain as fields

    try:
        print(fields.explain(topic))
    except fields.UnknownField as error:
        raise CommandFailed(str(error), error.hint, ExitCode.NOT_FOUND) from error
    return ExitCode.OK


def _is_reason(topic: str) -> bool:
    """Whether a topic is a word that conditions and events have; no kind of object is written like one."""
    from quire_operators.status import Reason

    return topic in {reason.value for reason in Reason}


def explain_reason(word: str) -> list[str]:
    """A reason's meaning and remedies; without a word, all reasons with their meanings."""
    from quire_operators.status import ADVICE, Reason

    if not word:
        rows = [[reason.value, ADVICE[reason].meaning if reason in ADVICE else ""] for reason in Reason]
        return render.table(("REASON", "MEANING"), rows)
    by_word = {reason.value.lower(): reason for reason in Reason}
    found = by_word.get(word.lower())
    if found is None:
        import difflib

        close = difflib.get_close_matches(word.lower(), by_word, n=1)
        hint = f"did you mean reason/{by_word[close[0]].value}?" if close else "platform explain reason lists them"
        raise CommandFailed(f"there is no reason {word!r}", hint, ExitCode.NOT_FOUND)
    advice = ADVICE.get(found)
    if advice is None:
        return [f"REASON   {found.value}", "  Things are as declared, or on their way; nothing needs to be done."]
    remedies = [f"  {line.format(key='model/NAME')}" for line in advice.remedies]
    return [f"REASON   {found.value}", f"  {advice.meaning}", "", "WHAT YOU CAN DO", *remedies]
