"""A PostgreSQL server for tests: of Debian's `postgresql` package, on a Unix socket of its own, with nothing
durable.

Without the package (`apt-get install postgresql`) tests that need it are skipped by name. The server refuses to be
root, so that root runs it as the user of the package.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

MISSING = "needs Debian's package postgresql"
_numbers = itertools.count(1)


def binaries() -> Path | None:
    """The folder of the newest installed server; None without one, or without the driver."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class Postgres:
    """One running server; `database` makes a new empty database in it."""

    def __init__(self) -> None:
        found = binaries()
        if found is None:
            pytest.skip(MISSING)
        pytest.importorskip("psycopg", reason="needs the extra quire[postgres]")
        self.folder = Path(tempfile.mkdtemp(prefix="qpg"))  # short: a Unix socket's path has 107 bytes
        self._words: list[str] = []
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
            self._words = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
        data = str(self.folder / "data")
        self._run(
            str(found / "initdb"), "-D", data, "-U", "quire", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"
        )
        self._server = [str(found / "postgres"), "-D", data, "-k", str(self.folder), "-h", "", "-F"]
        self.process = self.start()

    def _run(self, *words: str) -> None:
        done = subprocess.run([*self._words, *words], cwd="/", capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server and wait until it answers."""
        log = open(self.folder / "log", "ab")  # noqa: SIM115 - the server's own
        with log:
            self.process = subprocess.Popen(
                [*self._words, *self._server], cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                self._maintain("SELECT 1")
            except sa.exc.OperationalError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
                continue
            return self.process

    def stop(self) -> None:
        """End the server at once; what it has stays."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(20)

    def url(self, database: str) -> sa.URL:
        return sa.URL.create(
            "postgresql+psycopg", username="quire", database=database, query={"host": str(self.folder)}
        )

    def _maintain(self, statement: str) -> None:
        engine = sa.create_engine(self.url("postgres"), poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as db:
            db.exec_driver_sql(statement)

    def database(self) -> sa.URL:
        """A new database."""
        name = f"d{next(_numbers)}"
        self._maintain(f"CREATE DATABASE {name} STRATEGY file_copy")
        return self.url(name)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)
