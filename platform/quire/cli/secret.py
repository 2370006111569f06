"""`platform secret`: values that manifests refer to by name, kept in the state directory, mode 0600."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import quote

import click

from quire.cli import render
from quire.cli.outcome import ExitCode, usage_error
from quire.cli.session import connect, notice


@click.group(short_help="Keep tokens that manifests refer to by name.")
def secret() -> None:
    """Tokens that manifests refer to by name, as in spec.sourceAuth: {secretRef: NAME}. A value is never shown."""


@secret.command("set")
@click.argument("name")
@click.option("--from-env", metavar="VARIABLE", help="Take the value of a variable of this shell.")
@click.option("--from-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Or of a file.")
def set_(name: str, from_env: str | None, from_file: Path | None) -> int:
    """Keep a secret.

    It is asked for on a terminal, else read from standard input."""
    if from_env is not None and from_file is not None:
        usage_error("--from-env and --from-file exclude each other", "give only one of them")
    if from_env is not None:
        value = os.environ.get(from_env, "")
        if not value:
            usage_error(f"{from_env} is not set in this shell", f"export {from_env}=..., or leave --from-env out")
    elif from_file is not None:
        try:
            value = from_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            usage_error(f"{from_file} cannot be read: {error}", "give a file of text that you may read")
    elif sys.stdin.isatty():
        value = click.prompt(name, hide_input=True, err=True)
    else:
        value = sys.stdin.buffer.read().decode(errors="replace")
    connect().post(_path(name), {"value": value})
    print(f"secret {name}  set")
    return ExitCode.OK


@secret.command("list")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def list_(output: str) -> int:
    """List the names, and which models refer to them."""
    answer = connect().get("/v1/secrets")
    if output == "json":
        render.dump(answer, output, "SecretList")
    elif answer["items"]:
        rows = [[i["name"], str(i["set"]), ", ".join(i["usedBy"]) or "-"] for i in answer["items"]]
        print("\n".join(render.table(("NAME", "SET", "USED BY"), rows)))
    else:
        print("no secrets: platform secret set NAME", file=sys.stderr)
    return ExitCode.OK


@secret.command()
@click.argument("name")
def delete(name: str) -> int:
    """Forget a secret."""
    answer = connect().delete(_path(name))
    print(f"secret {name}  deleted", flush=True)
    if users := answer.get("usedBy"):
        notice(f"warning: {', '.join(users)} refers to it, and finds nothing there from now on")
    return ExitCode.OK


def _path(name: str) -> str:
    """A secret's path in the API. What cannot be a part of one is no name either."""
    if not name or "/" in name:
        usage_error(f"{name!r} is no name of a secret", "use lower-case letters, digits, dots and dashes")
    return f"/v1/secrets/{quote(name, safe='')}"
