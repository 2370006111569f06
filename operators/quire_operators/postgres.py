"""How a store's database on PostgreSQL is opened, and what its errors mean to whoever wanted something written.

One connection writes, through SQLAlchemy Core and psycopg, `synchronous_commit=on`: what was acknowledged survives
the end of the server. A second one listens: triggers on the tables that `database` keeps reads of notify everybody
of a write, and a notice of another connection than ours says that what was read may be old. Looking costs one poll
of a socket, no question to the server.

A transaction that stands still is ended by the server after `STANDS_STILL`, so that a control plane that was
paused in one does not keep the next one from leading. Whatever waits longer than `WAITS` for a statement fails:
the loop that calls has other things to do.

Exceptions are those of `sqlite`: `StoreUnavailable` while the server cannot be reached or refuses to write,
`UnusableStore` for an address that is none, a server that is too old and a driver that is not installed.
"""

from __future__ import annotations

import select
from importlib.util import find_spec
from typing import Any

import sqlalchemy as sa

from quire_operators.sqlite import StoreError, StoreUnavailable, UnusableStore
from quire_operators.tables import CACHED, META

CHANNEL = "quire_written"
OLDEST = 140000
"""Of PostgreSQL 14: `CREATE OR REPLACE TRIGGER`."""
CONNECT_SECONDS = 3
STANDS_STILL = 3.0
WAITS = 5.0
CONNECTION: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "tcp_user_timeout": round(WAITS * 1000)}
"""Of both connections: how long a server that is not there is waited for."""
OPENING = 0x71756972
"""Key of the advisory lock that has openings of one database follow each other."""
DRIVERS = ("postgresql", "postgresql+psycopg")
INSTALL = "install it with: pip install 'quire[postgres]'"
_PASSING = ("08", "53", "57", "25", "40", "55")
"""Classes of errors whose cause lies outside the database and can pass: the connection, room, the operator, a
server that only reads, a conflict that was resolved against us, a lock that was not to be had."""


def database_url(text: str) -> sa.URL:
    """The URL of a database. Raises `UnusableStore`; a password in it is not repeated."""
    try:
        url = sa.make_url(text.strip())
    except (sa.exc.ArgumentError, ValueError):
        raise UnusableStore("QUIRE_DATABASE is not a URL", f"like {EXAMPLE}") from None
    if url.drivername not in DRIVERS:
        raise UnusableStore(
            f"QUIRE_DATABASE names {url.drivername}: a store can be on PostgreSQL, or, without QUIRE_DATABASE, in "
            "a file of SQLite in the state directory",
            f"like {EXAMPLE}",
        )
    if not url.database:
        raise UnusableStore("QUIRE_DATABASE names no database", f"like {EXAMPLE}")
    return url.set(drivername="postgresql+psycopg")


EXAMPLE = "postgresql://quire@db.example:5432/quire?passfile=/etc/quire/pgpass"


def shown(url: sa.URL) -> str:
    """What names a database and holds no secret: no user, no password, no option."""
    host = (
        url.host or (url.query.get("host") if isinstance(url.query.get("host"), str) else None) or "local socket"
    )
    port = f":{url.port}" if url.port else ""
    return f"postgresql://{host}{port}/{url.database}"


def schema_of(url: sa.URL) -> str | None:
    """The schema of the store in a database, None where there is none yet. Raises `StoreError`."""
    server = Server(url)
    engine = server.engine()
    try:
        with engine.connect() as db:
            if not sa.inspect(db).has_table(META.name):
                return None
            found = db.scalar(sa.select(META.c.value).where(META.c.key == "schemaVersion"))
            return None if found is None else str(found)
    except sa.exc.DatabaseError as error:
        raise server.unusable(error) from error
    finally:
        engine.dispose()


class Server:
    """A store's database on a server. Raises `UnusableStore` without the driver."""

    def __init__(self, url: sa.URL) -> None:
        if find_spec("psycopg") is None:
            raise UnusableStore("the driver for PostgreSQL (psycopg) is not installed", INSTALL)
        self._url = url
        self._ears: Any = None
        self._poll = select.poll()
        self._own: set[int] = set()
        """The server's processes behind the connections that write here."""

    def __str__(self) -> str:
        return shown(self._url)

    def engine(self) -> sa.Engine:
        """With one connection, made again when it broke."""
        engine = sa.create_engine(
            self._url,
            pool_size=1,
            max_overflow=0,
            pool_timeout=WAITS,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={
                **CONNECTION,
                "application_name": "quire",
                "options": (
                    f"-c synchronous_commit=on -c statement_timeout={WAITS * 1000:.0f} "
                    f"-c lock_timeout={WAITS * 1000:.0f} "
                    f"-c idle_in_transaction_session_timeout={STANDS_STILL * 1000:.0f}"
                ),
            },
        )
        sa.event.listen(engine, "connect", self._connected)
        return engine

    def _connected(self, connection: Any, _record: Any) -> None:
        self._own.add(connection.info.backend_pid)

    def check_in_place(self) -> None:
        """Nothing: a database has no name that another could take while it is open."""

    def refusal(self, error: sa.exc.DBAPIError) -> StoreUnavailable:
        """What an error means for whoever wanted something written."""
        return self._unavailable(error.orig)

    def _unavailable(self, error: BaseException | None) -> StoreUnavailable:
        """What one of the driver means."""
        state = getattr(error, "sqlstate", None)
        full = state is not None and state.startswith("53")
        passing = state is None or state.startswith(_PASSING)
        said = str(error).strip().splitlines() or [type(error).__name__]
        return StoreUnavailable(
            f"the database {self} cannot be used now: {said[0]}. Nothing was stored; what runs goes on",
            "make room where PostgreSQL keeps its data, then try again"
            if full
            else "see that PostgreSQL runs and takes this user's connections, then try again",
            full=full,
            passing=passing,
        )

    def unusable(self, error: sa.exc.DBAPIError) -> StoreError:
        """What an error means for whoever opens it."""
        refused = self.refusal(error)
        state = getattr(error.orig, "sqlstate", None)
        if refused.passing:
            return refused
        said = str(error.orig).strip().splitlines()[0]
        return UnusableStore(
            f"{self} is not a usable store: {said}",
            f"the user needs to own an empty database, or one that quire made (error {state})",
        )

    def prepare(self, db: sa.Connection) -> None:
        """Wait for whoever else opens the database now, and see that the server is one that will do."""
        db.execute(sa.select(sa.func.pg_advisory_xact_lock(OPENING)))
        version = db.connection.driver_connection.info.server_version  # type: ignore[union-attr]
        if version < OLDEST:
            raise UnusableStore(
                f"{self} is PostgreSQL {version // 10000}, and a store needs {OLDEST // 10000} or newer",
                "use a newer server",
            )

    def hear_of_writes(self, db: sa.Connection) -> None:
        """Be able to say from now on whether somebody else has written. Raises `StoreUnavailable`."""
        import psycopg

        db.exec_driver_sql(
            f"CREATE OR REPLACE FUNCTION {CHANNEL}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN PERFORM pg_notify('{CHANNEL}', TG_TABLE_NAME); RETURN NULL; END $$"
        )
        for table in CACHED:
            db.exec_driver_sql(
                f"CREATE OR REPLACE TRIGGER {CHANNEL} AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE "
                f"ON {table.name} FOR EACH STATEMENT EXECUTE FUNCTION {CHANNEL}()"
            )
        try:
            self._listen()
        except psycopg.Error as error:
            raise self._unavailable(error) from error

    def _listen(self) -> None:
        import psycopg

        self._hang_up()
        address = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        ears = psycopg.connect(address, autocommit=True, application_name="quire: listens", **CONNECTION)
        ears.execute(f"LISTEN {CHANNEL}")
        self._ears = ears
        self._poll.register(ears.fileno(), select.POLLIN)

    def _hang_up(self) -> None:
        if self._ears is not None:
            self._poll = select.poll()
            self._ears.close()
            self._ears = None

    def written_elsewhere(self) -> bool:
        """Whether another connection has written since this was asked last, or may have: while nothing can be
        heard every look says so."""
        import psycopg

        try:
            if self._ears is None:
                self._listen()
                return True
            if not self._poll.poll(0):
                return False
            heard = {notice.pid for notice in self._ears.notifies(timeout=0)}
        except psycopg.Error:
            self._hang_up()
            return True
        return not heard <= self._own

    def keep_copy(self, db: sa.Connection, schema: int) -> None:
        """Copy an older store into a schema of its own, in the transaction that changes it: the version that
        wrote it can use the copy. An earlier copy of the same schema is kept: it is the one from before."""
        name = f"quire_schema{schema}"
        if name in sa.inspect(db).get_schema_names():
            return
        db.exec_driver_sql(f"CREATE SCHEMA {name}")
        for table in sa.inspect(db).get_table_names():
            db.exec_driver_sql(f'CREATE TABLE {name}."{table}" AS TABLE "{table}"')

    def close(self) -> None:
        """Listen no more."""
        self._hang_up()
