"""Connections to the database: our own, prepared, checked, and given up in time.

An engine of ours connects the way the application's engine does, so that credentials,
TLS and the like hold for it too, but shares nothing with it: neither connections nor
isolation level. On PostgreSQL and MariaDB each new connection is told to wait for locks
no longer than we do, and one that its server closed while it was idle, by a restart
for instance, is replaced before anything is sent on it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa

from ..common.errors import SetupError
from ..common.events import logger
from .watchdog import connect_within, current_limit, original

#: The names of SQLAlchemy's dialects.
POSTGRESQL: Final = frozenset({"postgresql"})
MYSQL: Final = frozenset({"mysql", "mariadb"})
SQLITE: Final = frozenset({"sqlite"})

#: Seconds after which a server ends a statement that nobody waits for any more: as
#: long as the most patient caller, the reaper, waits for one.
_ABANDONED: Final = 30

#: Seconds after which a connection is replaced. Firewalls forget quiet ones, often
#: after five minutes, without telling either end.
_RECYCLE: Final = 240

#: Drivers that wait in C, where no greenlet runs meanwhile.
_BLOCKING_DRIVERS: Final = frozenset({"psycopg2", "mysqldb", "mariadbconnector"})

#: The setting for how long a driver's ``connect`` may take, in whole seconds. It ends
#: the threads of attempts that were given up.
_CONNECT_TIMEOUT: Final[dict[str, dict[str, Any]]] = {
    "psycopg2": {"connect_timeout": 2},
    "psycopg": {"connect_timeout": 2},
    "pymysql": {"connect_timeout": 2},
    "mysqldb": {"connect_timeout": 2},
}

#: Without it a ROLLBACK is sent after each statement, although there is no transaction.
_SPARE_ROLLBACKS: Final[dict[str, Any]] = (
    {"skip_autocommit_rollback": True}
    if "skip_autocommit_rollback"
    in inspect.signature(sa.engine.default.DefaultDialect.__init__).parameters
    else {}
)


def is_in_memory(url: sa.URL) -> bool:
    """Whether this is an SQLite database that lives in its connection only."""
    if url.get_backend_name() != "sqlite":
        return False
    database = url.database or ""
    return database in ("", ":memory:") or (
        ":memory:" in database or url.query.get("mode") == "memory"
    )


def own_engine(engine: sa.Engine, sql_timeout: float, size: int) -> sa.Engine:
    """An engine on the same database as another, with connections of its own.

    In-memory SQLite has no second connection to the same database: sessions get a
    private in-memory database there.

    :param engine: the application's.
    :param sql_timeout: longest wait for a lock or a connection, in seconds.
    :param size: the most connections.
    :raises SetupError: it is a database that sessions cannot be kept in.
    """
    if engine.dialect.name not in SQLITE:
        return _server_engine(engine, sql_timeout, size)
    if is_in_memory(engine.url):
        return plain_engine(sa.make_url("sqlite://"), sql_timeout, size)
    return _sqlite_engine(engine.url, sql_timeout, size, like=engine)


def plain_engine(url: sa.URL, sql_timeout: float, size: int) -> sa.Engine:
    """An engine on a database that the application has no engine for."""
    if url.get_backend_name() in SQLITE:
        return _sqlite_engine(url, sql_timeout, size)
    timeout = _CONNECT_TIMEOUT.get(url.get_driver_name(), {})
    connecting = sa.create_engine(url, connect_args=timeout, poolclass=sa.NullPool)
    return _server_engine(connecting, sql_timeout, size)


def _sqlite_engine(
    url: sa.URL, sql_timeout: float, size: int, like: sa.Engine | None = None
) -> sa.Engine:
    """An engine on SQLite, which connects like another one where there is one."""
    alone = is_in_memory(url)
    connecting = like or sa.create_engine(
        url,
        connect_args={"check_same_thread": False} if alone else {},
        poolclass=sa.NullPool,
    )

    def connect(record: Any) -> Any:
        connection = connecting.pool._invoke_creator(record)
        # What prepares a new connection, the application's hooks among it, may need
        # the file. The driver would wait five seconds for it.
        wait_ms = int(sql_timeout * 1000)
        connection.execute(f"PRAGMA busy_timeout = {wait_ms}").close()
        return connection

    return sa.create_engine(
        url,
        poolclass=sa.QueuePool,
        pool_size=1 if alone else size,
        max_overflow=0,
        pool_timeout=sql_timeout,
        pool_use_lifo=True,
        creator=connect,
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,
    )


def _server_engine(like: sa.Engine, sql_timeout: float, size: int) -> sa.Engine:
    """An engine on PostgreSQL or MariaDB that connects like another one."""
    dialect = like.dialect
    if dialect.name not in POSTGRESQL | MYSQL:
        raise SetupError(
            f"Sessions cannot be kept in {dialect.name}: give them PostgreSQL,"
            " MariaDB, MySQL or SQLite, by RESILIENT_SESSION_BIND_KEY for instance."
        )

    def connect(record: Any) -> Any:
        limit = current_limit()
        seconds = sql_timeout if limit is None else limit.remaining
        connection = connect_within(
            seconds,
            lambda: like.pool._invoke_creator(record),
            dialect.do_close,
            whom=id(like),
            blocks=_blocks(dialect),
        )
        try:
            _watch(connection, None)
            _prepare(connection, dialect, sql_timeout)
        except BaseException:
            with contextlib.suppress(Exception):
                dialect.do_close(connection)
            raise
        return connection

    engine = sa.create_engine(
        like.url,
        creator=connect,
        poolclass=sa.QueuePool,
        pool_size=size,
        max_overflow=0,
        pool_timeout=sql_timeout,
        pool_use_lifo=True,
        pool_recycle=_RECYCLE,
        # Each statement commits by itself, and a move ends its own transaction.
        pool_reset_on_return=None,
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,
        **_SPARE_ROLLBACKS,
    )
    sa.event.listen(engine, "checkout", _check)
    sa.event.listen(engine, "checkout", _watch)
    sa.event.listen(engine, "before_cursor_execute", _asks)
    sa.event.listen(engine, "after_cursor_execute", _answered)
    return engine


def _blocks(dialect: sa.Dialect) -> bool:
    """Whether the driver waits in C; psycopg2 can be made to wait elsewhere."""
    if dialect.driver not in _BLOCKING_DRIVERS:
        return False
    extensions = getattr(dialect.loaded_dbapi, "extensions", None)
    waits: Callable[[], Any] = getattr(extensions, "get_wait_callback", lambda: None)
    return waits() is None


def _prepare(connection: Any, dialect: sa.Dialect, sql_timeout: float) -> None:
    """Set what the server is to do for us, whatever the database's defaults are.

    None of this holds a deadline: that a frozen server cannot do. It ends waits and
    statements in the server that nobody is interested in any more.
    """
    if dialect.name in POSTGRESQL:
        connection.autocommit = True
        # A little before we hang up, so that the connection is kept.
        lock_ms = max(int(sql_timeout * 900), 1)
        statements = [
            f"SET lock_timeout = {lock_ms};"
            f" SET statement_timeout = {_ABANDONED * 1000};"
            f" SET idle_in_transaction_session_timeout = {_ABANDONED * 1000};"
            " SET default_transaction_isolation = 'read committed'"
        ]
    else:
        seconds = max(math.ceil(sql_timeout), 1)
        statements = [
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
            f"SET SESSION innodb_lock_wait_timeout = {seconds},"
            f" SESSION lock_wait_timeout = {seconds},"
            # Otherwise a value that is too long is cut short without an error.
            " SESSION sql_mode = CONCAT(@@sql_mode, ',STRICT_ALL_TABLES')"
            # Read by MariaDB only; MySQL knows no such setting.
            f" /*M!100101 , SESSION max_statement_time = {_ABANDONED} */",
        ]
    cursor = connection.cursor()
    try:
        for statement in statements:
            cursor.execute(statement)
    finally:
        cursor.close()


def _check(connection: Any, _record: Any, _proxy: Any) -> None:
    """Replace a connection that its server closed while it was idle.

    Nothing is to be read from a healthy one. This costs no round trip, and is certain:
    nothing has been sent, so that nothing can have been done.
    """
    fileno = _fileno(connection)
    if fileno is None:
        return
    select = original("select")
    poll = select.poll()
    poll.register(fileno, select.POLLIN)
    if poll.poll(0):
        raise sa.exc.InvalidatePoolError("the server closed this connection")


def _watch(connection: Any, _record: Any, _proxy: Any = None) -> None:
    """Let the call that is being made hang up on this connection when it is late."""
    limit, fileno = current_limit(), _fileno(connection)
    if limit is not None and fileno is not None:
        limit.watch(fileno)


def _asks(*_: Any) -> None:
    """Let the time of the call that is being made run from here."""
    limit = current_limit()
    if limit is not None:
        limit.asks()


def _answered(*_: Any) -> None:
    """Let it stand still."""
    limit = current_limit()
    if limit is not None:
        limit.answered()


def _fileno(connection: Any) -> int | None:
    """The number of the connection's socket; None where the driver hides it."""
    for end in (
        connection,
        getattr(connection, "_usock", None),  # pg8000, whose _sock is no socket
        getattr(connection, "_sock", None),  # PyMySQL
    ):
        fileno = getattr(end, "fileno", None)
        if fileno is not None:
            return int(fileno())
    kind = f"{type(connection).__module__}.{type(connection).__qualname__}"
    if kind not in _hiding:
        _hiding.add(kind)
        logger.warning(
            "The database driver hides its socket (%s): a server that is frozen will"
            " hold requests for longer than RESILIENT_SESSION_SQL_TIMEOUT.",
            kind,
        )
    return None


#: Kinds of connections that a warning was given about.
_hiding: set[str] = set()
