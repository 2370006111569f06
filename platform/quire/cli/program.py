"""The `platform` command, put together.

A click group whose commands are imported only when called, so that `platform get` pays for nothing it does not
use. Every command is thin: it speaks to the control plane through `quire.client` (validate, schema and explain
need no control plane), shows the answer through the pure functions of `quire.cli.render`, and returns an exit
code of `quire.cli.outcome.ExitCode`. Data goes to stdout; progress, notices and errors go to stderr. An error is
one line that begins with `error:` and, where there is something to do about it, one that begins with `hint:`.
Ctrl-C ends any command with exit code 130 and one line on what goes on without it: nothing that was started stops.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

import click

from quire.cli.outcome import CommandFailed, ExitCode, Interrupted, ReaderLeft, report, spelled
from quire.client import ClientError, InvalidManifest
from quire_operators.paths import StateDirError

COMMANDS = {
    "quickstart": "quickstart",
    "plan": "change",
    "diff": "change",
    "apply": "change",
    "delete": "change",
    "rollout": "rollout",
    "scale": "steer",
    "pause": "steer",
    "resume": "steer",
    "source": "source",
    "wait": "wait",
    "get": "show",
    "top": "top",
    "chat": "chat",
    "bench": "bench",
    "console": "console",
    "describe": "show",
    "logs": "show",
    "events": "show",
    "init": "write",
    "convert": "write",
    "export": "write",
    "validate": "offline",
    "schema": "offline",
    "explain": "offline",
    "reference": "reference",
    "doctor": "doctor",
    "monitoring": "monitoring",
    "cache": "cache",
    "secret": "secret",
    "key": "key",
    "usage": "usage",
    "backup": "backup",
    "restore": "backup",
    "down": "daemon",
    "up": "daemon",
    "daemon": "service",
    "version": "daemon",
    "completion": "completion",
}
"""Each command's name, and the module of this package that holds a function of the same name."""


UNCHANGED = "interrupted: nothing was changed, and nothing that runs was stopped"


class LazyGroup(click.Group):
    """Finds a command by importing its module at the moment of use."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            # click would make it exit code 1, which here means an unexpected error.
            raise ReaderLeft from error
        except KeyboardInterrupt as error:
            raise Interrupted(UNCHANGED) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(importlib.import_module(f"quire.cli.{module}"), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"\nhint: did you mean '{close[0]}'?" if close else ""
            raise click.UsageError(f"no such command: {args[0]}{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(None, "-V", "--version", package_name="quire", message="platform %(version)s")
def cli() -> None:
    """Serve large language models from manifests.

    Start with: platform apply manifests/quickstart.yaml
    """


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Nothing a user can cause ends in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a replacement, not an error.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    try:
        for argument in sys.argv[1:] if args is None else args:
            argument.encode()
        result = cli.main(args=args, prog_name="platform", standalone_mode=False)
        sys.stdout.flush()
    except Interrupted as error:
        return interrupted(error.goes_on)
    except (click.Abort, KeyboardInterrupt):
        return interrupted(UNCHANGED)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return error.exit_code
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "platform"
        message, _, hint = error.format_message().partition("\nhint: ")
        report(message, hint or f"{command} --help")
        return error.exit_code
    except ClientError as error:
        report_client(error)
        return error.exit_code
    except CommandFailed as error:
        report(error.message, error.hint)
        return error.exit_code
    except StateDirError as error:
        report(error.message, error.hint)
        return ExitCode.UNREACHABLE
    except UnicodeEncodeError as error:
        if not isinstance(error.object, str) or error.reason != "surrogates not allowed":
            raise
        report(f"{error.object!r} is not UTF-8", "write names and texts as UTF-8")
        return ExitCode.USAGE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        report(f"cannot write the output: {error.strerror}", "make room where it goes")
        return ExitCode.UNEXPECTED
    except (ReaderLeft, BrokenPipeError):
        # What Python flushes at exit must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    return result if isinstance(result, int) else ExitCode.OK


def interrupted(goes_on: str) -> int:
    """Say what goes on without this command. The line begins anew: a terminal has just shown `^C`."""
    print(f"\n^C {spelled(goes_on)}", file=sys.stderr)
    return ExitCode.INTERRUPTED


def report_client(error: ClientError) -> None:
    """Print what the control plane said, or why it could not be asked."""
    if isinstance(error, InvalidManifest):
        from quire.cli.render import problem_lines

        for line in problem_lines(error.problems):
            print(line, file=sys.stderr)
        print(error.message, file=sys.stderr)
        return
    report(error.message, error.hint)
