"""`platform key`: API keys for access policies. A key is made here and shown once; nothing keeps it."""

from __future__ import annotations

import re
import sys

import click

from quire.cli import render
from quire.cli.outcome import ExitCode, usage_error
from quire_schemas.keys import Digest, new_key

NAME = r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"


@click.group(short_help="Make API keys for access policies.")
def key() -> None:
    """API keys for access policies (kind AccessPolicy)."""


@key.command()
@click.argument("name")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def create(name: str, output: str) -> int:
    """Make a key of 256 random bits and print it, once, with the entry that lets it in.

    The entry goes into spec.keys of an AccessPolicy and tells nothing of the key, which is kept nowhere: whoever
    loses it makes another. No control plane is needed."""
    if not re.fullmatch(NAME, name):
        usage_error(f"{name!r} is no name of a key", "use lower-case letters, digits, dots and dashes")
    made = new_key()
    digest = Digest.of(made)
    if output == "json":
        render.dump({"name": name, "key": made, "id": digest.id, "hash": str(digest)}, output, "NewKey")
        return ExitCode.OK
    print(f"key:   {made}")
    print(f"entry: {{name: {name}, hash: '{digest}'}}")
    print("the key is shown this once; the entry goes into spec.keys of an AccessPolicy", file=sys.stderr)
    return ExitCode.OK
