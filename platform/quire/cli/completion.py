"""`platform completion`: the script that has a shell complete commands, options and names of objects."""

from __future__ import annotations

import click

from quire.cli.outcome import ExitCode


@click.command(short_help="Print a script for shell completion.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print a script for shell completion, as in: eval "$(platform completion bash)"."""
    from click.shell_completion import get_completion_class

    from quire.cli.program import cli

    found = get_completion_class(shell)
    if found is None:
        raise LookupError(shell)
    print(found(cli, {}, "platform", "_PLATFORM_COMPLETE").source())
    return ExitCode.OK
