"""The database of a lab: a file of SQLite, or a table on a real server.

Both have the same verbs, so that a scenario does not know which one it runs on. Rows
are looked at, saved and spoiled over connections of our own, which are not the
workers'. A server that is gone was killed, and is started again with what it had; one
that is locked has another client that holds the table.

Servers are shared by all labs, and each lab has a table of its own on one of them.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import sqlalchemy as sa

from database_servers import DatabaseServer, new_table_name
from flask_resilient_session.sql.table import define_table
from servers import wait_until

#: Seconds until what is to happen in a database has happened.
PATIENCE: Final = 20.0

#: Every kind, by the names that tests show.
NAMES: Final = ("sqlite", "postgresql", "mariadb")

#: For what can happen in a process that uses SQLite only; say why.
only_sqlite = pytest.mark.parametrize("lab_database", ["sqlite"], indirect=True)

Rows = Sequence[dict[str, Any]]


class LabDatabase(ABC):
    """What a lab does to its database, and what it sees there.

    :ivar table: where the rows are.
    :ivar is_file: whether it is one that stays there for who has it open.
    """

    is_file: bool

    def __init__(self, url: sa.URL, engine: sa.Engine) -> None:
        self._url = url
        self._engine = engine
        self.table = define_table(sa.MetaData(), new_table_name(), None)

    @property
    def dialect(self) -> str:
        """SQLAlchemy's name for its kind."""
        return self._engine.dialect.name

    @property
    def config(self) -> dict[str, Any]:
        """What a worker has to know to find it."""
        return {
            "SQLALCHEMY_DATABASE_URI": self._url.render_as_string(hide_password=False),
            "RESILIENT_SESSION_TABLE": self.table.name,
        }

    def row(self, session_key: str) -> dict[str, Any] | None:
        """The columns of a row."""
        query = sa.select(self.table).where(self.table.c.session_key == session_key)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return None if found is None else dict(found)

    def spoiled(self) -> None:
        """Put bytes that are no record into every row."""
        with self._engine.connect() as connection:
            connection.execute(self.table.update().values(record=b"\0"))

    @abstractmethod
    def gone(self) -> None:
        """Take it away."""

    @abstractmethod
    def back(self) -> None:
        """Put it back as it was; harmless where it is there."""

    @abstractmethod
    def locked(self, *, readable: bool = False) -> None:
        """Let another client hold the table, and keep others from reading it too."""

    @abstractmethod
    def unlocked(self) -> None:
        """Let that client give up; harmless where there is none."""

    @abstractmethod
    def saved(self) -> Any:
        """A copy of all rows, for :meth:`restored`."""

    @abstractmethod
    def restored(self, backup: Any) -> None:
        """Put all rows back as they were."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind for the next lab."""


class LinkedFile:
    """A file that is opened by a link, so that it vanishes and comes back at once.

    In between SQLite would make a new, empty one of a file that was only moved away.

    :param folder: where both are.
    :ivar link: what is opened.
    :ivar real: where the file is.
    """

    def __init__(self, folder: Path) -> None:
        self.link = folder / "sessions.sqlite"
        self.real = folder / "real.sqlite"
        self._nowhere = folder / "nowhere" / "real.sqlite"
        self.back()

    def gone(self) -> None:
        """From now on it cannot be opened."""
        self._point_to(self._nowhere)

    def back(self) -> None:
        """It is where it was."""
        self._point_to(self.real)

    def _point_to(self, target: Path) -> None:
        link = self.link.with_suffix(".link")
        link.symlink_to(target)
        link.replace(self.link)


class SqliteFile(LabDatabase):
    """A file of SQLite.

    :param folder: where it is.
    """

    is_file = True

    def __init__(self, folder: Path) -> None:
        self._linked = LinkedFile(folder)
        self._file = self._linked.real
        self._backups = (folder / f"{number}.backup" for number in itertools.count())
        self._writer: sqlite3.Connection | None = None
        real = sa.URL.create("sqlite", database=str(self._file))
        options = {"isolation_level": "AUTOCOMMIT", "poolclass": sa.NullPool}
        super().__init__(
            real.set(database=str(self._linked.link)),
            sa.create_engine(real, **options),
        )

    def row(self, session_key: str) -> dict[str, Any] | None:
        """See :class:`LabDatabase`."""
        # Where nobody has needed SQL yet there is no file.
        return super().row(session_key) if self._file.exists() else None

    def gone(self) -> None:
        """From now on it cannot be opened."""
        self._linked.gone()

    def back(self) -> None:
        """See :class:`LabDatabase`."""
        self._linked.back()

    def locked(self, *, readable: bool = False) -> None:
        """See :class:`LabDatabase`."""
        assert self._writer is None
        self._writer = sqlite3.connect(self._file, PATIENCE, isolation_level=None)
        self._writer.execute(f"BEGIN {'IMMEDIATE' if readable else 'EXCLUSIVE'}")

    def unlocked(self) -> None:
        """See :class:`LabDatabase`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def saved(self) -> Path:
        """A copy of the file as it is now."""
        return Path(shutil.copy(self._file, next(self._backups)))

    def restored(self, backup: Path) -> None:
        """Put the older file in its place."""
        shutil.copy(backup, self._file)

    def close(self) -> None:
        """See :class:`LabDatabase`; the file goes with its folder."""
        self.unlocked()


class ServerTable(LabDatabase):
    """A table on a server that all labs share.

    :ivar server: what a test may stop, kill and freeze.
    """

    is_file = False

    def __init__(self, server: DatabaseServer) -> None:
        super().__init__(server.quick_url, server.engine)
        self.server = server
        self._holder: sa.Connection | None = None
        # Made here, so that no worker in a hurry has to wait for it.
        self.table.create(self._engine)

    def gone(self) -> None:
        """Kill the server: connecting is refused, and open connections are reset."""
        self.server.kill()

    def back(self) -> None:
        """Start it again; what was committed is there."""
        self.server.heal()

    def locked(self, *, readable: bool = False) -> None:
        """See :class:`LabDatabase`."""
        assert self._holder is None
        self._holder = self._engine.connect()
        for statement in self._locking(readable):
            self._holder.exec_driver_sql(statement)

    def unlocked(self) -> None:
        """Let the other client give up.

        Who waited for it in the server has hung up since, or is about to. What they
        wanted done is not done late: the server is told to forget them.
        """
        if self._holder is None:
            return
        wait_until(self._nobody_waits, PATIENCE, "those that wait for the table to end")
        self._holder.exec_driver_sql(self._unlocking)
        self._holder.close()
        self._holder = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Another client locks the table, and lets those who wait for it go on."""
        with self._engine.connect() as holder:
            for statement in self._locking(readable=False):
                holder.exec_driver_sql(statement)
            try:
                yield
            finally:
                holder.exec_driver_sql(self._unlocking)

    def connections(self) -> int:
        """How many the server has, all clients' together but for our own."""
        with self._engine.connect() as connection:
            found = int(connection.exec_driver_sql(self._counting).scalar_one())
            pool = self._engine.pool
            assert isinstance(pool, sa.QueuePool)
            return found - pool.checkedin() - pool.checkedout()

    def saved(self) -> Rows:
        """A copy of the rows."""
        with self._engine.connect() as connection:
            found = connection.execute(sa.select(self.table)).mappings()
            return [dict(row) for row in found]

    def restored(self, backup: Rows) -> None:
        """Put the older rows in their place, all at once."""
        with self._engine.execution_options(
            isolation_level="READ COMMITTED"
        ).begin() as connection:
            connection.execute(self.table.delete())
            if backup:
                connection.execute(self.table.insert(), backup)

    def close(self) -> None:
        """Drop the table, on a server that answers."""
        self.back()
        self.unlocked()
        self.table.drop(self._engine)

    _unlocking: str
    _counting: str

    @abstractmethod
    def _locking(self, readable: bool) -> Sequence[str]:
        """Statements that lock the table for the connection that makes them."""

    @abstractmethod
    def _nobody_waits(self) -> bool:
        """End who waits for the table; whether there was nobody."""


class PostgresqlTable(ServerTable):
    """A table on PostgreSQL."""

    _unlocking = "ROLLBACK"
    _counting = (
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
    )

    def _locking(self, readable: bool) -> Sequence[str]:
        mode = "EXCLUSIVE" if readable else "ACCESS EXCLUSIVE"
        return "BEGIN", f"LOCK TABLE {self.table.name} IN {mode} MODE"

    def _nobody_waits(self) -> bool:
        ended = sa.text(
            "SELECT pg_terminate_backend(pid) FROM pg_locks"
            " WHERE relation = CAST(:name AS regclass) AND NOT granted"
        )
        with self._engine.connect() as connection:
            return not connection.execute(ended, {"name": self.table.name}).all()


class MariadbTable(ServerTable):
    """A table on MariaDB."""

    _unlocking = "UNLOCK TABLES"
    _counting = (
        "SELECT count(*) FROM information_schema.processlist WHERE command <> 'Daemon'"
    )

    def _locking(self, readable: bool) -> Sequence[str]:
        return (f"LOCK TABLES {self.table.name} {'READ' if readable else 'WRITE'}",)

    def _nobody_waits(self) -> bool:
        waiting = sa.text(
            "SELECT id FROM information_schema.processlist"
            " WHERE state LIKE 'Waiting for table%' AND info LIKE :name"
        )
        with self._engine.connect() as connection:
            name = f"%{self.table.name}%"
            found = connection.execute(waiting, {"name": name}).scalars().all()
            for number in found:
                # One may have ended by itself since.
                with contextlib.suppress(sa.exc.OperationalError):
                    connection.exec_driver_sql(f"KILL {number}")
        return not found


_SERVER_TABLES: Final = {"postgresql": PostgresqlTable, "mariadb": MariadbTable}


def lent_database(
    request: pytest.FixtureRequest, name: str, folder: Path
) -> Iterator[LabDatabase]:
    """A database of this name for one lab; for fixtures.

    Only the server that is needed is started.
    """
    if name == "sqlite":
        database: LabDatabase = SqliteFile(folder)
    else:
        database = _SERVER_TABLES[name](request.getfixturevalue(name))
    try:
        yield database
    finally:
        database.close()
