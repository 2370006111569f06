"""`platform backup` and `platform restore`: the store in one file, and back.

They speak to the store itself, not to a control plane: a backup is possible while none runs, and a restore only
then. Which store it is says the environment, as for a control plane."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quire.cli import render
from quire.cli.outcome import CommandFailed, ExitCode
from quire.client import display
from quire_operators.paths import StateDir, StateDirError

if TYPE_CHECKING:
    import sqlalchemy as sa


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def backup(file: Path) -> int:
    """Write what the store holds to FILE, and try it.

    It is restored into a fresh database and compared. The control plane may run meanwhile. Secrets, and what the
    router keeps, are not in it."""
    from quire_operators import backup as portable
    from quire_operators import whereabouts
    from quire_operators.sqlite import StoreError

    state = StateDir.default()
    if file.exists():
        raise CommandFailed(f"{file} is there already", "name another file", ExitCode.CONFLICT)
    try:
        taken = portable.take(whereabouts.find(state, os.environ, moving=True), version("quire"))
        portable.verify(taken)
        size = portable.write(taken, file)
    except StoreError as error:
        raise CommandFailed(error.message, error.hint, ExitCode.FAILED) from error
    except OSError as error:
        raise CommandFailed(
            f"cannot write {file}: {error.strerror or error}", "name another place", ExitCode.FAILED
        ) from error
    print(f"{taken.store}: {_content(taken.counts())}")
    print("verified: restored into a fresh database, every row is the same")
    print(f"{file}  {render.size(size)}")
    return ExitCode.OK


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--replace", is_flag=True, help="Put what the store has into a backup beside it, and replace it.")
def restore(file: Path, replace: bool) -> int:
    """Have the store hold what FILE does.

    On SQLite or PostgreSQL, whichever it came from. No control plane may run, and the store has to be empty.
    Engines that run go on, and are found again."""
    from quire.controlplane.seat import Seat
    from quire_operators import backup as portable
    from quire_operators.sqlite import StoreError

    state = StateDir.default()
    seat = None
    try:
        content = portable.read(file)
    except portable.BadBackup as error:
        raise CommandFailed(error.message, error.hint, ExitCode.FAILED) from error
    except OSError as error:
        why = f"cannot read {file}: {error.strerror or error}"
        raise CommandFailed(why, "name a file that platform backup wrote", ExitCode.FAILED) from error
    try:
        state.create()
        seat = Seat(state, os.environ, moving=True)
        lease = seat.take()
        if lease is None or seat.place is None:
            raise CommandFailed(
                f"a control plane runs on {display(state.root)}: nothing was restored",
                "platform daemon stop, or stop its service; what is served goes on",
                ExitCode.CONFLICT,
            )
        try:
            if replace:
                _put_aside(state, seat.place)
            portable.restore(content, seat.place, lease, replace=replace)
            seat.settle()
        finally:
            seat.give_up(lease)
    except (StoreError, StateDirError) as error:
        code = ExitCode.CONFLICT if isinstance(error, portable.NotEmpty) else ExitCode.FAILED
        raise CommandFailed(error.message, error.hint, code) from error
    except OSError as error:
        raise CommandFailed(
            f"cannot restore {file}: {error.strerror or error}", "platform doctor", ExitCode.FAILED
        ) from error
    finally:
        if seat is not None:
            seat.close()
    print(f"restored from {content.store}, {content.taken_at}: {_content(content.counts())}")
    print("verified: every row was read back before it was kept. platform up starts what was applied")
    return ExitCode.OK


def _put_aside(state: StateDir, place: Path | sa.URL) -> None:
    """A backup of what is there now, beside the store."""
    from quire_operators import backup as portable

    try:
        taken = portable.take(place, version("quire"))
    except portable.NothingStored:
        return
    if not taken.lines:
        return
    stamp = taken.taken_at.replace(":", "").replace("+0000", "Z")
    aside = state.root / f"before-restore-{stamp}.backup"
    portable.write(taken, aside)
    print(f"what was there is in {display(aside)}")


def _content(found: Mapping[str, int]) -> str:
    named = [("objects", "object"), ("revisions", "revision"), ("replicas", "replica"), ("events", "event")]
    return ", ".join(render.count(found.get(table, 0), word) for table, word in named)
