"""The durable row: one table, short conditional statements, a connection of its own.

The application's transaction is never touched: the engine here has its own pool of
connections, see ``connections``. Every statement commits by itself, except the two of
a move.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from .connections import (
    MYSQL,
    POOL_OVERFLOW,
    POOL_SIZE,
    POSTGRESQL,
    SQLITE,
    is_in_memory,
    own_engine,
    plain_engine,
)
from .deadline import TimeLimit, TooLate, time_limit
from .errors import SqlBusy, SqlUnavailable
from .rows import UPDATED, USER_ID_LENGTH, Row, columns_of, define_table, row_of
from .sql_errors import MIGRATE, explain, is_duplicate, was_undone

#: How often a statement is sent again that the database undid for the sake of another.
_MOST_DEADLOCKS: Final = 5

_Result = TypeVar("_Result")


class SqlTable:
    """The statements of the durable row.

    Every method takes a monotonic deadline in seconds and raises
    :class:`SqlUnavailable` when SQL did not do what was asked in time. On PostgreSQL
    and MariaDB the deadline holds whatever the server does, and what concerns one
    session takes no longer than ``sql_timeout``, so that a request has time left for
    its nodes.

    :param table: from :func:`define_table`.
    :param new_engine: makes the engine; called on first use and in each process.
    :param create_table: create the table where it is missing.
    :param sql_timeout: longest wait for a lock, a connection or an answer, in seconds.
    :param monotonic: the clock that deadlines are read on.
    """

    def __init__(
        self,
        table: sa.Table,
        new_engine: Callable[[], sa.Engine],
        *,
        create_table: bool,
        sql_timeout: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._new_engine = new_engine
        self._create_table = create_table
        self._sql_timeout = sql_timeout
        self._monotonic = monotonic
        self._processes: dict[int, _Process] = {}
        self.use(table)
        _in_this_process.add(self)

    def use(self, table: sa.Table) -> None:
        """Work on another table of the same columns, such as the application's own."""
        self.table = table
        columns = table.c
        self._read = sa.select(table).where(columns.session_key == sa.bindparam("key"))
        self._update = (
            sa.update(table)
            .where(
                columns.session_key == sa.bindparam("key"),
                columns.version == sa.bindparam("seen"),
                columns.revoked_at.is_(None),
            )
            .values(
                {
                    name: sa.bindparam(f"new_{name}", type_=columns[name].type)
                    for name in UPDATED
                }
            )
        )

    # --- one session -------------------------------------------------------------

    def read(self, session_key: str, deadline: float) -> Row | None:
        """The row, by primary key."""

        def call(connection: sa.Connection) -> Row | None:
            return self._find(connection, session_key)

        return self._call(call, deadline)

    def insert(self, row: Row, deadline: float) -> bool:
        """Insert a row; False where one stands already, which is left alone."""
        return self._write(
            lambda connection: self._insert(connection, row), row, deadline
        )

    def update(self, row: Row, seen_version: int, deadline: float) -> bool:
        """Replace a live row of exactly this version; False where there is none."""
        return self._write(
            lambda connection: self._replace(connection, row, seen_version),
            row,
            deadline,
        )

    def bury(self, tombstone: Row, deadline: float, *, has_row: bool) -> bool:
        """Put a tombstone where the row is or would be.

        :param has_row: whether a row is expected; decides which statement is first.
        :returns: False if a tombstone stood there already.
        """

        def call(connection: sa.Connection) -> bool:
            if has_row and self._bury(connection, tombstone):
                return True
            # A row may be inserted between the two statements, so that the update
            # comes last in any case.
            return self._insert(connection, tombstone) or self._bury(
                connection, tombstone
            )

        return self._call(call, deadline)

    def move(
        self, tombstone: Row, new: Row, deadline: float, *, seen_version: int | None
    ) -> bool:
        """Bury one row and insert another, both or neither.

        :param seen_version: the version that the buried row must have; None: it must
            have no row yet.
        :returns: False, with nothing done, where it is otherwise.
        """

        def call(connection: sa.Connection) -> bool:
            with self._transaction(connection) as undo:
                if seen_version is None:
                    buried = self._insert(connection, tombstone)
                else:
                    buried = self._replace(connection, tombstone, seen_version)
                if buried and self._insert(connection, new):
                    return True
                undo()
                return False

        return self._write(call, new, deadline)

    # --- many sessions ----------------------------------------------------------

    def page_expired(
        self, before_ms: int, after: tuple[int, str], limit: int, deadline: float
    ) -> list[Row]:
        """Rows whose time was over before then, in index order.

        :param after: (expires_at, session_key) of the last row seen.
        """
        columns = self.table.c
        query = (
            sa.select(self.table)
            .where(
                columns.expires_at < before_ms,
                # Both halves: the first lets every database use the index range.
                columns.expires_at >= after[0],
                sa.or_(
                    columns.expires_at > after[0],
                    columns.session_key > after[1],
                ),
            )
            .order_by(columns.expires_at, columns.session_key)
            .limit(limit)
        )
        return self._page(query, deadline)

    def page_unsynced(
        self,
        before_ms: int,
        expired_ms: int,
        after: tuple[int, str],
        limit: int,
        deadline: float,
    ) -> list[Row]:
        """Live rows that were last synced before ``before_ms``, in index order.

        :param expired_ms: rows whose time was over before this are left out: they
            are :meth:`page_expired`'s.
        :param after: (synced_at, session_key) of the last row seen.
        """
        columns = self.table.c
        query = (
            sa.select(self.table)
            .where(
                columns.synced_at < before_ms,
                columns.synced_at >= after[0],
                sa.or_(columns.synced_at > after[0], columns.session_key > after[1]),
                columns.expires_at >= expired_ms,
                columns.revoked_at.is_(None),
            )
            .order_by(columns.synced_at, columns.session_key)
            .limit(limit)
        )
        return self._page(query, deadline)

    def page_live(
        self, user_id: str | None, after: str, limit: int, deadline: float
    ) -> list[Row]:
        """Live rows of a user, or of everybody, in the order of their keys.

        :param after: session_key of the last row seen.
        """
        columns = self.table.c
        query = sa.select(self.table).where(
            columns.session_key > after, columns.revoked_at.is_(None)
        )
        if user_id is not None:
            query = query.where(columns.user_id == user_id)
        return self._page(query.order_by(columns.session_key).limit(limit), deadline)

    def delete(self, rows: Sequence[Row], deadline: float) -> list[bool]:
        """Delete those rows that are exactly as they were read, in one transaction.

        :returns: for each row whether it was deleted.
        """
        columns = self.table.c

        def call(connection: sa.Connection) -> list[bool]:
            deleted = [False] * len(rows)
            with self._transaction(connection):
                # In one order, so that two that delete the same do not meet crosswise.
                for place in sorted(
                    range(len(rows)), key=lambda i: rows[i].session_key
                ):
                    deleted[place] = delete_one(connection, rows[place])
            return deleted

        def delete_one(connection: sa.Connection, row: Row) -> bool:
            # The version alone could be that of a row inserted since.
            statement = sa.delete(self.table).where(
                columns.session_key == row.session_key,
                columns.version == row.version,
                columns.synced_at == row.synced_at,
                columns.revoked_at.is_not_distinct_from(row.revoked_at),
            )
            return connection.execute(statement).rowcount == 1

        return self._patiently(call, deadline)

    def count_expired(self, before_ms: int, deadline: float) -> int:
        """How many rows' time was over before then."""
        query = sa.select(sa.func.count()).where(self.table.c.expires_at < before_ms)
        return self._patiently(lambda c: int(c.execute(query).scalar_one()), deadline)

    def newest_sync(self, deadline: float) -> int:
        """The largest ``synced_at``; 0 in an empty table."""
        query = sa.select(sa.func.max(self.table.c.synced_at))
        return self._patiently(lambda c: int(c.execute(query).scalar() or 0), deadline)

    # --- statements --------------------------------------------------------------

    def _find(self, connection: sa.Connection, session_key: str) -> Row | None:
        found = connection.execute(self._read, {"key": session_key}).first()
        return None if found is None else row_of(found)

    def _insert(self, connection: sa.Connection, row: Row) -> bool:
        dialect = connection.dialect.name
        if dialect in MYSQL:
            # INSERT IGNORE would let other errors pass too, and with ON DUPLICATE KEY
            # the number of rows is the same whether one stood there or not.
            try:
                connection.execute(sa.insert(self.table), columns_of(row))
            except sa.exc.IntegrityError as error:
                if is_duplicate(error):
                    return False
                raise
            return True
        make = postgresql.insert if dialect in POSTGRESQL else sqlite.insert
        # Some drivers forget the number of rows when their cursor is closed.
        statement = make(self.table).on_conflict_do_nothing()
        kept = {"preserve_rowcount": True}
        done = connection.execute(statement, columns_of(row), execution_options=kept)
        return done.rowcount == 1

    def _replace(self, connection: sa.Connection, row: Row, seen: int) -> bool:
        values = {f"new_{name}": v for name, v in columns_of(row).items()}
        del values["new_session_key"], values["new_created_at"]
        values |= {"key": row.session_key, "seen": seen}
        return connection.execute(self._update, values).rowcount == 1

    def _bury(self, connection: sa.Connection, tombstone: Row) -> bool:
        columns = self.table.c
        values = columns_of(tombstone)
        del values["session_key"], values["created_at"]
        statement = (
            sa.update(self.table)
            .where(
                columns.session_key == tombstone.session_key,
                columns.revoked_at.is_(None),
            )
            .values(values | {"version": columns.version + 1})
        )
        return connection.execute(statement).rowcount == 1

    def _page(self, query: Any, deadline: float) -> list[Row]:
        return self._patiently(
            lambda connection: [row_of(found) for found in connection.execute(query)],
            deadline,
        )

    @contextlib.contextmanager
    def _transaction(self, connection: sa.Connection) -> Iterator[Callable[[], None]]:
        """One transaction; the value undoes what it did so far.

        In words of SQL: the connection itself stays in the mode in which each
        statement commits, since changing it costs round trips.
        """
        on_sqlite = connection.dialect.name in SQLITE
        # An immediate one waits for its lock at the start, where nothing is done.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if on_sqlite else "BEGIN")
        undone = False

        def undo() -> None:
            nonlocal undone
            undone = True
            connection.exec_driver_sql("ROLLBACK")

        try:
            yield undo
            if not undone:
                connection.exec_driver_sql("COMMIT")
        except BaseException as error:
            if not undone and not connection.invalidated:
                try:
                    undo()
                except sa.exc.SQLAlchemyError:
                    connection.invalidate(error)
            raise

    # --- connections -------------------------------------------------------------

    def _write(
        self, call: Callable[[sa.Connection], bool], row: Row, deadline: float
    ) -> bool:
        """A call that writes this row.

        When it is made again after its connection broke, it may find what it did
        itself the first time; then it is done.
        """
        broke = False

        def once(connection: sa.Connection) -> bool:
            nonlocal broke
            try:
                if call(connection):
                    return True
            except sa.exc.DBAPIError as error:
                broke = broke or error.connection_invalidated
                raise
            if not broke:
                return False
            found = self._find(connection, row.session_key)
            # An update leaves the time of creation as it is.
            return found is not None and row == replace(
                found, created_at=row.created_at
            )

        return self._call(once, deadline)

    def _patiently(
        self, call: Callable[[sa.Connection], _Result], deadline: float
    ) -> _Result:
        """A call that no request waits for: it may take until its deadline."""
        return self._call(call, deadline, patient=True)

    def _call(
        self,
        call: Callable[[sa.Connection], _Result],
        deadline: float,
        *,
        patient: bool = False,
    ) -> _Result:
        """Make a call on a connection, within the time that is left."""
        remaining = deadline - self._monotonic()
        if remaining <= 0:
            raise SqlBusy("no time left for SQL in this request's budget")
        if not patient:
            remaining = min(remaining, self._sql_timeout)
        with time_limit(remaining) as limit:
            failed = deadlocks = 0
            while True:
                try:
                    engine = self._ready_engine(remaining)
                    return self._once(engine, call, limit)
                except sa.exc.TimeoutError as error:
                    raise SqlBusy("every connection to SQL is in use") from error
                except sa.exc.SQLAlchemyError as error:
                    broken = getattr(error, "connection_invalidated", False)
                    failed += broken
                    undone = was_undone(error)
                    deadlocks += undone
                    if (
                        (not broken or failed > 1)
                        and (not undone or deadlocks > _MOST_DEADLOCKS)
                    ) or not limit.remaining:
                        failure = self._failed(error, limit)
                        break
                except (TooLate, OSError) as error:
                    failure = _LATE if limit.hung_up else str(error)
                    break
        # Out here no driver's error hangs on to it: those quote the row.
        raise SqlUnavailable(failure)

    def _once(
        self,
        engine: sa.Engine,
        call: Callable[[sa.Connection], _Result],
        limit: TimeLimit,
    ) -> _Result:
        if engine.dialect.name in SQLITE:
            with engine.connect() as connection:
                self._limit_lock_wait(connection, limit.remaining)
                return call(connection)
        with self._here.place(limit), engine.connect() as connection:
            return call(connection)

    def _failed(self, error: sa.exc.SQLAlchemyError, limit: TimeLimit) -> str:
        """What to say of an error that stands."""
        here = self._here
        if here.engine is None or here.engine.dialect.name in SQLITE:
            # The file may be another one the next time.
            here.table_is_there = False
        text = explain(error)
        if MIGRATE in text:
            here.table_is_there = False
        return _LATE if limit.hung_up else text

    @property
    def _here(self) -> _Process:
        """What belongs to this process.

        A child must neither share its parent's connections nor close them, and its
        parent's locks may be held for ever: it starts anew, and its parent's things
        are kept untouched.
        """
        process = os.getpid()
        here = self._processes.get(process)
        return here or self._processes.setdefault(process, _Process())

    def _ready_engine(self, remaining: float) -> sa.Engine:
        here = self._here
        engine = here.engine
        if engine is None or not here.table_is_there:
            if not here.lock.acquire(timeout=remaining):
                raise TooLate("SQL is still being connected to for the first time")
            try:
                engine = here.engine = here.engine or self._new_engine()
                if self._create_table and not here.table_is_there:
                    self._create(engine, remaining)
                here.table_is_there = True
            finally:
                here.lock.release()
        return engine

    def _create(self, engine: sa.Engine, remaining: float) -> None:
        with engine.connect() as connection:
            self._limit_lock_wait(connection, remaining)
            # Where it can be, the table comes with its indexes or not at all.
            whole = connection.dialect.name in POSTGRESQL
            try:
                with self._transaction(connection) if whole else _NOTHING:
                    self.table.create(connection, checkfirst=True)
            except sa.exc.DBAPIError as error:
                if error.connection_invalidated:
                    raise
                # Another process may have created it in between. One that holds the
                # file has been waited for, and is not waited for again.
                self._limit_lock_wait(connection, 0)
                known = sa.inspect(connection)
                if not known.has_table(self.table.name, self.table.schema):
                    raise

    def _limit_lock_wait(self, connection: sa.Connection, remaining: float) -> None:
        if connection.dialect.name not in SQLITE:
            return
        wait_ms = int(min(self._sql_timeout, remaining) * 1000)
        # The driver's own five seconds would be over the budget of a request.
        driver: Any = connection.connection.dbapi_connection
        driver.execute(f"PRAGMA busy_timeout = {wait_ms}").close()

    def dispose(self) -> None:
        """Close the connections; the next call opens new ones."""
        engine = self._here.engine
        if engine is not None:
            engine.dispose()

    def close_file(self) -> None:
        """Close the connections to an SQLite file; a database in memory stays."""
        engine = self._here.engine
        if engine is None or engine.dialect.name not in SQLITE:
            return
        if not is_in_memory(engine.url):
            engine.dispose()

    @property
    def engine(self) -> sa.Engine:
        """The engine in use, for counting statements and the like."""
        with time_limit(self._sql_timeout):
            return self._ready_engine(self._sql_timeout)


#: Tables whose idle connections no child process may inherit.
_in_this_process: Final[weakref.WeakSet[SqlTable]] = weakref.WeakSet()


def _close_before_fork() -> None:
    """Close what is idle: a child that inherits an open SQLite file takes no locks.

    SQLite believes there that the parent's locks are its own, so that what the child
    commits to a file in WAL mode is lost once the parent closes it.
    """
    for table in list(_in_this_process):
        table.close_file()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_before_fork)


class _Process:
    """What one process has of a table: an engine, and what is known of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engine: sa.Engine | None = None
        self.table_is_there = False
        self._places = threading.BoundedSemaphore(POOL_SIZE + POOL_OVERFLOW)

    @contextlib.contextmanager
    def place(self, limit: TimeLimit) -> Iterator[None]:
        """One of the pool's connections, waited for no longer than there is time."""
        if not self._places.acquire(timeout=limit.remaining):
            raise SqlBusy("every connection to SQL is in use")
        try:
            yield
        finally:
            self._places.release()


_NOTHING: Final = contextlib.nullcontext()

_LATE: Final = "SQL did not answer in time"

__all__ = [
    "USER_ID_LENGTH",
    "Row",
    "SqlTable",
    "define_table",
    "is_in_memory",
    "own_engine",
    "plain_engine",
]
