"""Calls on SQL: one connection, one deadline, and what is done when it breaks.

The engine here has its own pool of connections, see ``connections``; one for each
process, opened when it is first needed, with the table made where it is missing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import sqlalchemy as sa

from ..common.clock import Clock
from ..common.errors import SqlBusy, SqlUnavailable
from ..common.patience import wait_for
from .connections import POSTGRESQL, SQLITE, is_in_memory
from .errors import MIGRATE, explain, was_undone
from .gate import Gate
from .watchdog import NoTimeLeft, TimeLimit, TooLate, time_limit

#: How often a statement is sent again that the database undid for the sake of another.
_MOST_DEADLOCKS: Final = 5

_Result = TypeVar("_Result")


class SqlCalls:
    """Makes calls on the connections of one table.

    :param table: has to be there before the first call.
    :param new_engine: makes the engine; called on first use and in each process.
    :param create_table: create the table where it is missing.
    :param sql_timeout: longest wait for a lock, a connection or an answer, in seconds.
    :param gate: has as many places as the engine has connections.
    :param clock: the one that deadlines are read on.
    """

    def __init__(
        self,
        table: sa.Table,
        new_engine: Callable[[], sa.Engine],
        *,
        create_table: bool,
        sql_timeout: float,
        gate: Gate,
        clock: Clock,
    ) -> None:
        self.table = table
        self._new_engine = new_engine
        self._create_table = create_table
        self._sql_timeout = sql_timeout
        self._gate = gate
        self._clock = clock
        self._processes: dict[int, _Process] = {}
        _in_this_process.add(self)

    def run(
        self,
        call: Callable[[sa.Connection], _Result],
        deadline: float,
        *,
        patient: bool = False,
    ) -> _Result:
        """Make a call on a connection, within the time that is left.

        :param deadline: monotonic time at which the request has to be over.
        :param patient: no request waits: it may take until its deadline.
        :raises SqlUnavailable: SQL did not do it.
        """
        with self._gate.slot(self._remaining(deadline, patient)):
            remaining = self._remaining(deadline, patient)
            with time_limit(remaining) as limit:
                return self._make(call, limit)

    def _remaining(self, deadline: float, patient: bool) -> float:
        remaining = deadline - self._clock.monotonic()
        if remaining <= 0:
            raise SqlBusy("no time is left to ask SQL")
        return remaining if patient else min(remaining, self._sql_timeout)

    def _make(
        self, call: Callable[[sa.Connection], _Result], limit: TimeLimit
    ) -> _Result:
        failed = deadlocks = 0
        late = False
        while True:
            try:
                limit.asks()
                engine = self._ready_engine(limit.remaining)
                result = self._once(engine, call, limit)
                self._here.has_answered = True
                return result
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
            except NoTimeLeft as error:
                raise SqlBusy(str(error)) from None
            except (TooLate, OSError) as error:
                failure = _LATE if limit.hung_up else str(error)
                late = type(error) is TooLate
                break
        # Out here no driver's error hangs on to it: those quote the row.
        if (late or limit.hung_up) and not self._here.has_answered:
            # Connecting, and perhaps making the table, takes longer than any call.
            raise SqlBusy(failure)
        raise SqlUnavailable(failure)

    def _once(
        self,
        engine: sa.Engine,
        call: Callable[[sa.Connection], _Result],
        limit: TimeLimit,
    ) -> _Result:
        with engine.connect() as connection:
            remaining = limit.remaining
            if not remaining:
                raise TooLate("connecting took all the time")
            self._limit_lock_wait(connection, remaining)
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
            if not wait_for(here.lock.acquire, remaining, self._clock):
                raise SqlBusy("SQL is still being connected to for the first time")
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
                with transaction(connection) if whole else _NOTHING:
                    self.table.create(connection, checkfirst=True)
            except sa.exc.DBAPIError as error:
                if error.connection_invalidated:
                    raise
                # Another process may have created it in between.
                known = sa.inspect(connection)
                if not known.has_table(self.table.name, self.table.schema):
                    raise

    def _limit_lock_wait(self, connection: sa.Connection, remaining: float) -> None:
        if connection.dialect.name not in SQLITE:
            return
        wait_ms = int(min(self._sql_timeout, remaining) * 1000)
        # The driver's own five seconds would be longer than anybody waits.
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


@contextlib.contextmanager
def transaction(connection: sa.Connection) -> Iterator[Callable[[], None]]:
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
            except (sa.exc.SQLAlchemyError, NoTimeLeft):
                connection.invalidate(error)
        raise


#: Those whose idle connections no child process may inherit.
_in_this_process: Final[weakref.WeakSet[SqlCalls]] = weakref.WeakSet()


def _close_before_fork() -> None:
    """Close what is idle: a child that inherits an open SQLite file takes no locks.

    SQLite believes there that the parent's locks are its own, so that what the child
    commits to a file in WAL mode is lost once the parent closes it.
    """
    for calls in list(_in_this_process):
        calls.close_file()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_before_fork)


class _Process:
    """What one process has of a table: an engine, and what is known of it.

    :ivar has_answered: a call was answered once.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engine: sa.Engine | None = None
        self.table_is_there = False
        self.has_answered = False


_NOTHING: Final = contextlib.nullcontext()

_LATE: Final = "SQL did not answer in time"
