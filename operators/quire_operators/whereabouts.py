"""Where a state directory's store is: in its own file of SQLite, or in a database that `QUIRE_DATABASE` names.

A state directory keeps to one of the two. `database.json` says which database it is, without a secret, and is
written when a control plane first leads there: a command in a shell that lacks the variable would otherwise begin
an empty store, and take the engines that run for strays. `home` holds the name that the database knows this state
directory by, so that no other one's control plane takes it (`lease.Home`).
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import uuid
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from quire_operators.lease import Home
from quire_operators.paths import StateDir, sync_folder
from quire_operators.postgres import database_url, shown
from quire_operators.sqlite import UnusableStore

VARIABLE = "QUIRE_DATABASE"


def find(state: StateDir, environ: Mapping[str, str], *, moving: bool = False) -> Path | sa.URL:
    """The file or the database of a state directory's store. Raises `UnusableStore` where what the environment
    says is none, or not the one that this state directory has. `moving`: that it is to have it from now on."""
    given, kept = environ.get(VARIABLE, "").strip(), _kept(state).get("database")
    if not given:
        if kept is not None:
            raise UnusableStore(
                f"the store of {state.root} is in the database {kept}, and {VARIABLE} is not set",
                "set it as where it was set up; to go back to a file: platform backup FILE with "
                f"it, remove {state.database}, then platform restore FILE without it",
            )
        return state.store
    url = database_url(given)
    if kept is not None and kept != shown(url):
        raise UnusableStore(
            f"the store of {state.root} is in the database {kept}, and {VARIABLE} names {shown(url)}",
            f"name the one that it is in; if that has only moved, remove {state.database}",
        )
    if kept is None and not moving and (number := _objects_in(state.store)):
        raise UnusableStore(
            f"{VARIABLE} names {shown(url)}, and {state.store} has a store with {number} objects in it",
            f"to move it there: platform backup FILE without {VARIABLE}, then platform restore FILE with it; what "
            "runs goes on meanwhile",
        )
    return url


def otherwise(state: StateDir, environ: Mapping[str, str]) -> str | None:
    """Where the store of `state` is, and in which words the environment says otherwise: for whoever asks a control
    plane that runs already. None where the two agree, or nothing is said."""
    given = environ.get(VARIABLE, "").strip()
    if not given:
        return None
    kept = _kept(state).get("database", str(state.store))
    try:
        named = f"{VARIABLE} names {shown(database_url(given))}"
    except UnusableStore as error:
        return f"has its store in {kept}, and {error.message}"
    return None if named.endswith(f" {kept}") else f"has its store in {kept}, and {named}"


def home(state: StateDir) -> Home:
    """What a database knows this state directory by."""
    path = state.root / "home"
    if not path.exists():
        making = path.with_name(f"home.{os.getpid()}")
        making.write_text(uuid.uuid4().hex)
        with suppress(FileExistsError):  # two may begin at once: the first name stays
            os.link(making, path)
        making.unlink()
        sync_folder(state.root)
    return Home(path.read_text().strip(), str(state.root), socket.gethostname())


def settle(state: StateDir, place: Path | sa.URL) -> None:
    """Keep to this database from now on. Nothing has to be kept of a file."""
    if isinstance(place, Path):
        return
    content = {"database": shown(place)}
    if _kept(state) == content:
        return
    making = state.database.with_suffix(".new")
    descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    making.replace(state.database)
    sync_folder(state.root)


def _kept(state: StateDir) -> dict[str, Any]:
    try:
        return dict(json.loads(state.database.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UnusableStore(
            f"{state.database} cannot be read: {error}", f"remove it, with {VARIABLE} set to the database"
        ) from error


def _objects_in(path: Path) -> int:
    """How many objects a file of SQLite has; 0 of one that is none, or is not there."""
    found = 0
    if path.exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            (found,) = db.execute("SELECT count(*) FROM objects").fetchone()
    return int(found)
