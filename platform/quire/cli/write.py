"""Commands that write manifests: init, convert, export. What they print can be applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quire.cli.outcome import CommandFailed, ExitCode, usage_error
from quire.cli.session import complete_objects, connect, notice, object_path

INIT = """\
# yaml-language-server: $schema={schema}
#
# Which fields there are: platform explain model.spec
# What applying it would do, and whether it fits: platform plan {file}
apiVersion: quire.dev/v1alpha1
kind: Model
metadata:
  name: {name}
spec:
  source: {source} # or hf://OWNER/NAME, or file:///absolute/path
"""


@click.command()
@click.argument("name")
@click.option("--source", default="builtin://tiny", show_default=True, help="Where the weights come from.")
@click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write it; left out: NAME.yaml here, - for standard output.",
)
def init(name: str, source: str, path: Path | None) -> int:
    """Write the manifest of a model to begin with. A file that is there already is left alone."""
    from quire_schemas.explain import SCHEMA_ID
    from quire_schemas.manifest import load

    path = path or Path(f"{name}.yaml")
    text = INIT.format(schema=SCHEMA_ID, file=path, name=name, source=source)
    for problem in load([(str(path), text)]).problems:
        raise CommandFailed(f"{problem.path}: {problem.message}", problem.hint or None, ExitCode.INVALID)
    if str(path) == "-":
        print(text, end="")
        return ExitCode.OK
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        usage_error(f"{path} is there already", "choose another name, or --file")
    except OSError as error:
        usage_error(f"cannot write {path}: {error.strerror or error}", "--file names a file you may write")
    notice(f"wrote {path}: platform plan {path}")
    return ExitCode.OK


@click.command(short_help="Make a manifest of another server's command line.")
@click.option("--from", "server", type=click.Choice(["vllm"]), required=True, help="Whose command line it is.")
@click.argument("command")
def convert(server: str, command: str) -> int:
    """Print the manifest that does what another server's command line does: "serve NAME --max-model-len 4096".

    What cannot be converted, or is not honoured, is named on standard error, and the exit code is 3."""
    from quire_schemas.convert import READERS, BadCommand

    try:
        converted = READERS[server](command)
    except BadCommand as error:
        usage_error(str(error), error.hint)
    print(converted.text, end="")
    for line in converted.left_out:
        notice(f"not converted: {line}")
    return ExitCode.INVALID if converted.left_out else ExitCode.OK


@click.command()
@click.argument("references", nargs=-1, required=True, metavar="KIND/NAME...", shell_complete=complete_objects)
@click.option("--resolved", is_flag=True, help="With every default, as it was frozen when it was applied.")
def export(references: tuple[str, ...], resolved: bool) -> int:
    """Print objects as manifests: what was applied, without status."""
    import yaml

    client = connect()
    documents = []
    for reference in references:
        view = client.get(object_path(reference)[1])
        if not view["generation"]:
            raise CommandFailed(
                f"{reference} has no manifest: it has its defaults",
                "platform describe shows them",
                ExitCode.NOT_FOUND,
            )
        documents.append(_manifest(view, resolved=resolved))
    print("---\n".join(yaml.safe_dump(each, sort_keys=False, allow_unicode=True) for each in documents), end="")
    return ExitCode.OK


def _manifest(view: dict[str, Any], *, resolved: bool) -> dict[str, Any]:
    from quire_schemas.resource import API_VERSION

    intent = view["intent"]
    spec = intent.get("spec", {})
    if resolved:
        spec = _without_gaps(
            {name: value for name, value in view["resolved"].items() if name != "defaultsVersion"}
        )
    head = {"apiVersion": intent.get("apiVersion", API_VERSION), "kind": intent["kind"]}
    document = {**head, "metadata": intent["metadata"], "spec": spec}
    return _without_refused(document) if resolved else document


def _without_refused(document: dict[str, Any]) -> dict[str, Any]:
    """Without defaults that this version would refuse if they were written: nothing acts on them."""
    import yaml

    from quire_schemas.manifest import load

    for problem in load([("resolved", yaml.safe_dump(document))]).problems:
        *sections, name = problem.path.split(".")
        section: Any = document
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(name, None)
    return document


def _without_gaps(value: Any) -> Any:
    """Without fields that have no value: a manifest leaves those out."""
    if isinstance(value, dict):
        return {name: _without_gaps(inner) for name, inner in value.items() if inner is not None}
    return [_without_gaps(inner) for inner in value] if isinstance(value, list) else value
