"""The databases that a soak runs on, and what can break each of them.

Nothing that was committed is lost by any of it. The servers do not wait for the disk,
but a killed process leaves what it wrote with the kernel: PostgreSQL has written a
commit there before it answers (``synchronous_commit``), and so has MariaDB
(``innodb-flush-log-at-trx-commit=2``). Only a machine that dies would lose it.
"""

from __future__ import annotations

import random
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pymysql

from database_servers import DatabaseServer, MariaDB, PostgreSQL
from lab import Proxy
from lab_databases import LinkedFile
from served_app import PATIENCE, Gunicorn, make_sqlite

from .faults import Breakages

#: Seconds between two rounds of ending every connection.
_ROUND: Final = 0.02


class Database(ABC):
    """A database under a soak.

    :ivar breakages: what can be broken.
    :ivar silent: those of them during which the first worker gets no answer from SQL.
    """

    breakages: Breakages
    silent: frozenset[str]

    def restrict(self, *kinds: str) -> None:
        """Break it in these ways only."""
        self.breakages = {kind: self.breakages[kind] for kind in kinds}
        self.silent &= frozenset(kinds)

    @abstractmethod
    def uri(self, worker: int) -> str:
        """Where a worker finds it."""

    @abstractmethod
    def serve(self, workers: Sequence[Gunicorn]) -> None:
        """Learn who uses it."""

    @abstractmethod
    def close(self) -> None:
        """End what was started for it."""


class SqliteFile(Database):
    """An SQLite file, reached by a link, so that it can be taken away."""

    def __init__(self, folder: Path) -> None:
        self._linked = LinkedFile(folder)
        make_sqlite(self._linked.real)
        self._workers: Sequence[Gunicorn] = ()
        self.breakages = {"sql lock": self.lock, "sql gone": self.gone}
        self.silent = frozenset(self.breakages)

    def uri(self, worker: int) -> str:
        """See :class:`Database`."""
        return f"sqlite:///{self._linked.link}"

    def serve(self, workers: Sequence[Gunicorn]) -> None:
        """See :class:`Database`."""
        self._workers = workers

    def close(self) -> None:
        """See :class:`Database`."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Another writer holds the file; who only reads is let in."""
        with closing(
            sqlite3.connect(self._linked.real, PATIENCE, isolation_level=None)
        ) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            yield

    @contextmanager
    def gone(self) -> Iterator[None]:
        """The file is not where it was, as that of a share that is not mounted."""
        self._linked.gone()
        try:
            for worker in self._workers:
                # An open file stays open; only who opens it finds it gone.
                worker.disconnect()
            yield
        finally:
            self._linked.back()


class Server(Database):
    """A database server; the first worker reaches it by a wire that can be cut.

    :param close: ends the server, where it is the soak's own.
    """

    def __init__(
        self,
        server: DatabaseServer,
        random: random.Random,
        close: Callable[[], None] | None = None,
    ) -> None:
        self._server = server
        self._random = random
        self._close = close
        self._wire = Proxy(SimpleNamespace(host="127.0.0.1", port=server.port))
        self.breakages = {
            "sql kill": self.kill,
            "sql freeze": self.freeze,
            "sql stop": self.stop,
            "sql lock": self.lock,
            "sql rows": self.rows,
            "sql hang up": self.hang_up,
            "sql cut": self.cut,
        }
        self.silent = frozenset(self.breakages) - {"sql rows", "sql hang up"}

    def uri(self, worker: int) -> str:
        """See :class:`Database`."""
        url = self._server.url
        if worker == 0:
            url = url.set(port=int(self._wire.address.rpartition(":")[2]))
        return url.render_as_string(hide_password=False)

    def serve(self, workers: Sequence[Gunicorn]) -> None:
        """See :class:`Database`."""

    def close(self) -> None:
        """See :class:`Database`."""
        self._wire.close()
        if self._close is not None:
            self._close()

    @contextmanager
    def kill(self) -> Iterator[None]:
        """The server dies at once, and comes back with what was committed."""
        # One that is killed in the middle of writing a page leaves half of it. Neither
        # server is set to mend that; frozen, it has ended what it was writing.
        self._server.freeze()
        self._server.kill()
        try:
            yield
        finally:
            self._server.start()

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """The server takes everything and answers nothing, and then all at once."""
        self._server.freeze()
        try:
            yield
        finally:
            self._server.thaw()

    @contextmanager
    def stop(self) -> Iterator[None]:
        """The server is shut down in good order, and started again."""
        self._server.stop()
        try:
            yield
        finally:
            self._server.start()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Somebody else's transaction holds the whole table."""
        on_postgresql = isinstance(self._server, PostgreSQL)
        with self._transaction() as cursor:
            cursor.execute(
                "LOCK TABLE resilient_sessions IN ACCESS EXCLUSIVE MODE"
                if on_postgresql
                else "LOCK TABLES resilient_sessions WRITE"
            )
            yield

    @contextmanager
    def rows(self) -> Iterator[None]:
        """Somebody else's transaction holds every row that is there."""
        with self._transaction() as cursor:
            cursor.execute("SELECT session_key FROM resilient_sessions FOR UPDATE")
            yield

    @contextmanager
    def hang_up(self) -> Iterator[None]:
        """The server ends everybody's connections, again and again."""
        over = threading.Event()

        def again() -> None:
            while not over.wait(_ROUND):
                self._end_connections()

        ended = self._end_connections()
        assert ended, "no worker is connected to SQL"
        thread = threading.Thread(target=again)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(PATIENCE)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """One worker's wire to the server breaks, in one way or another."""
        wire = self._wire
        self._random.choice([wire.refuse, wire.hold, wire.reset, wire.drip])()
        try:
            yield
        finally:
            if wire.mode == "hold" and self._random.random() < 0.7:
                wire.release()
            wire.mend()

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        with closing(self._server.connect_to(self._server.url)) as connection:
            yield connection.cursor()

    def _end_connections(self) -> int:
        """End all but our own; how many they were."""
        with self._server.session() as cursor:
            if isinstance(self._server, PostgreSQL):
                cursor.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                return int(cursor.fetchone()[0])
            cursor.execute(
                "SELECT id FROM information_schema.processlist"
                " WHERE user = SUBSTRING_INDEX(USER(), '@', 1)"
                " AND id <> CONNECTION_ID()"
            )
            numbers = [number for (number,) in cursor.fetchall()]
            for number in numbers:
                # It may have ended by itself.
                with suppress(pymysql.MySQLError):
                    cursor.execute(f"KILL {number}")
            return len(numbers)


def new_database(name: str, folder: Path, seed: int) -> Database:
    """A database of this kind, with a server of its own where it needs one."""
    if name == "sqlite":
        return SqliteFile(folder)
    server = PostgreSQL() if name == "postgresql" else MariaDB()
    server.heal()
    return server_database(server, seed, server.close)


def server_database(
    server: DatabaseServer, seed: int, close: Callable[[], None] | None = None
) -> Database:
    """A server that is there; what is broken of it depends on the seed."""
    with server.session() as cursor:
        cursor.execute("DROP TABLE IF EXISTS resilient_sessions")
    return Server(server, random.Random(f"{seed}/database"), close)
