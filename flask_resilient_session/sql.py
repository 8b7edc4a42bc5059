"""The durable row: one table, short conditional statements, a connection of its own.

The application's transaction is never touched: the engine here has its own pool of
connections, made by the application's engine's way of connecting. Every statement
commits by itself, except the two of a move. The only importer of SQLAlchemy.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite

from .errors import SqlUnavailable

#: Longest names of homes stored with a row: two names of 100 characters and a comma.
_HOMES_LENGTH: Final = 255

#: Longest user id that is indexed as it is. MySQL indexes at most 767 bytes of a
#: column in its older formats, at 4 bytes a character.
USER_ID_LENGTH: Final = 191

#: Connections that stay open, and how many more may be opened under load.
_POOL_SIZE: Final = 5
_POOL_OVERFLOW: Final = 15

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Row:
    """One row; times are Unix milliseconds.

    :ivar record: sealed bytes; None in a tombstone.
    :ivar homes: names of the nodes that held the session at the last sync.
    :ivar revoked_at: None while the session is live.
    :ivar reason: of a tombstone: ``ended`` or ``moved``.
    """

    session_key: str
    version: int
    record: bytes | None
    user_id: str | None
    homes: tuple[str, ...]
    created_at: int
    synced_at: int
    expires_at: int
    revoked_at: int | None = None
    reason: str | None = None


def define_table(metadata: sa.MetaData, name: str, schema: str | None) -> sa.Table:
    """The table in a metadata; the one that is there already if it has one.

    :param name: ``RESILIENT_SESSION_TABLE``.
    """
    known = metadata.tables.get(f"{schema}.{name}" if schema else name)
    if known is not None:
        return known
    digest = sa.CHAR(64).with_variant(
        mysql.CHAR(64, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )
    # Compared byte by byte: MySQL's default collation takes Bob and bob for one.
    user_id = sa.String(USER_ID_LENGTH).with_variant(
        mysql.VARCHAR(USER_ID_LENGTH, charset="utf8mb4", collation="utf8mb4_bin"),
        "mysql",
        "mariadb",
    )
    # LargeBinary alone is a BLOB of 64 KB on MySQL.
    blob = sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")
    time = sa.BigInteger
    return sa.Table(
        name,
        metadata,
        sa.Column("session_key", digest, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("record", blob, nullable=True),
        sa.Column("user_id", user_id, nullable=True),
        sa.Column("homes", sa.String(_HOMES_LENGTH), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("synced_at", time, nullable=False),
        sa.Column("expires_at", time, nullable=False),
        sa.Column("revoked_at", time, nullable=True),
        sa.Column("reason", sa.String(8), nullable=True),
        sa.Index(f"ix_{name}_user_id", "user_id"),
        sa.Index(f"ix_{name}_synced_at", "synced_at"),
        sa.Index(f"ix_{name}_expires_at", "expires_at", "session_key"),
        schema=schema,
    )


def is_in_memory(url: sa.URL) -> bool:
    """Whether this is an SQLite database that lives in its connection only."""
    if url.get_backend_name() != "sqlite":
        return False
    database = url.database or ""
    return database in ("", ":memory:") or (
        ":memory:" in database or url.query.get("mode") == "memory"
    )


def own_engine(engine: sa.Engine, sql_timeout: float) -> sa.Engine:
    """An engine on the same database as another, with connections of its own.

    In-memory SQLite has no second connection to the same database: sessions get a
    private in-memory database there.

    :param engine: the application's.
    :param sql_timeout: longest wait for a lock or a connection, in seconds.
    """
    if is_in_memory(engine.url):
        return plain_engine(sa.make_url("sqlite://"), sql_timeout)
    connect = engine.pool._creator
    return _new_engine(engine.url, sql_timeout, creator=connect)


def plain_engine(url: sa.URL, sql_timeout: float) -> sa.Engine:
    """An engine on a database that the application has no engine for."""
    return _new_engine(url, sql_timeout)


def _new_engine(url: sa.URL, sql_timeout: float, **options: Any) -> sa.Engine:
    alone = is_in_memory(url)
    if alone:
        options["connect_args"] = {"check_same_thread": False}
    return sa.create_engine(
        url,
        poolclass=sa.QueuePool,
        pool_size=1 if alone else _POOL_SIZE,
        max_overflow=0 if alone else _POOL_OVERFLOW,
        pool_timeout=sql_timeout,
        pool_use_lifo=True,
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,
        **options,
    )


class SqlTable:
    """The statements of the durable row.

    Every method takes a monotonic deadline in seconds and raises
    :class:`SqlUnavailable` when SQL did not do what was asked in time.

    :param table: from :func:`define_table`.
    :param new_engine: makes the engine; called on first use and in each process.
    :param create_table: create the table where it is missing.
    :param sql_timeout: longest wait for a lock or a connection, in seconds.
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
        self.table = table
        self._new_engine = new_engine
        self._create_table = create_table
        self._sql_timeout = sql_timeout
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._engine: sa.Engine | None = None
        self._table_is_there = False
        self._process = os.getpid()
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
                    for name in _UPDATED
                }
            )
        )

    # --- one session -------------------------------------------------------------

    def read(self, session_key: str, deadline: float) -> Row | None:
        """The row, by primary key."""

        def call(connection: sa.Connection) -> Row | None:
            found = connection.execute(self._read, {"key": session_key}).first()
            return None if found is None else _row(found)

        return self._call(call, deadline)

    def insert(self, row: Row, deadline: float) -> bool:
        """Insert a row; False where one stands already, which is left alone."""
        return self._call(lambda connection: self._insert(connection, row), deadline)

    def update(self, row: Row, seen_version: int, deadline: float) -> bool:
        """Replace a live row of exactly this version; False where there is none."""
        return self._call(
            lambda connection: self._replace(connection, row, seen_version), deadline
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

        return self._call(call, deadline)

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
        self, before_ms: int, after: tuple[int, str], limit: int, deadline: float
    ) -> list[Row]:
        """Live rows that were last synced before then, in index order.

        :param after: (synced_at, session_key) of the last row seen.
        """
        columns = self.table.c
        query = (
            sa.select(self.table)
            .where(
                columns.synced_at < before_ms,
                columns.synced_at >= after[0],
                sa.or_(columns.synced_at > after[0], columns.session_key > after[1]),
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

    def delete(self, row: Row, deadline: float) -> bool:
        """Delete a row if it is exactly as it was read."""
        columns = self.table.c
        # The version alone could be that of a row inserted since.
        statement = sa.delete(self.table).where(
            columns.session_key == row.session_key,
            columns.version == row.version,
            columns.synced_at == row.synced_at,
            columns.revoked_at.is_not_distinct_from(row.revoked_at),
        )
        return self._call(lambda c: c.execute(statement).rowcount == 1, deadline)

    def count_expired(self, before_ms: int, deadline: float) -> int:
        """How many rows' time was over before then."""
        query = sa.select(sa.func.count()).where(self.table.c.expires_at < before_ms)
        return self._call(lambda c: int(c.execute(query).scalar_one()), deadline)

    def newest_sync(self, deadline: float) -> int:
        """The largest ``synced_at``; 0 in an empty table."""
        query = sa.select(sa.func.max(self.table.c.synced_at))
        return self._call(lambda c: int(c.execute(query).scalar() or 0), deadline)

    # --- statements --------------------------------------------------------------

    def _insert(self, connection: sa.Connection, row: Row) -> bool:
        dialect = connection.dialect.name
        statement: Any
        if dialect == "postgresql":
            statement = postgresql.insert(self.table).on_conflict_do_nothing()
        elif dialect == "sqlite":
            statement = sqlite.insert(self.table).on_conflict_do_nothing()
        else:
            statement = sa.insert(self.table).prefix_with("IGNORE")
        return connection.execute(statement, _columns(row)).rowcount == 1

    def _replace(self, connection: sa.Connection, row: Row, seen: int) -> bool:
        values = {f"new_{name}": v for name, v in _columns(row).items()}
        del values["new_session_key"], values["new_created_at"]
        values |= {"key": row.session_key, "seen": seen}
        return connection.execute(self._update, values).rowcount == 1

    def _bury(self, connection: sa.Connection, tombstone: Row) -> bool:
        columns = self.table.c
        values = _columns(tombstone)
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
        return self._call(
            lambda connection: [_row(found) for found in connection.execute(query)],
            deadline,
        )

    @contextlib.contextmanager
    def _transaction(self, connection: sa.Connection) -> Iterator[Callable[[], None]]:
        """One transaction; the value undoes what it did so far."""
        if connection.dialect.name == "sqlite":
            # An immediate one waits for its lock at the start, where nothing is done.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection = connection.execution_options(isolation_level="READ COMMITTED")
        undone = False

        def undo() -> None:
            nonlocal undone
            undone = True
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("ROLLBACK")
            else:
                connection.rollback()

        try:
            yield undo
            if not undone and connection.dialect.name == "sqlite":
                connection.exec_driver_sql("COMMIT")
            elif not undone:
                connection.commit()
        except BaseException:
            if not undone:
                undo()
            raise

    # --- connections -------------------------------------------------------------

    def _call(
        self, call: Callable[[sa.Connection], _Result], deadline: float
    ) -> _Result:
        remaining = deadline - self._monotonic()
        if remaining <= 0:
            raise SqlUnavailable("no time left for SQL in this request's budget")
        try:
            engine = self._ready_engine(remaining)
            with engine.connect() as connection:
                self._limit_lock_wait(connection, remaining)
                return call(connection)
        except sa.exc.SQLAlchemyError as error:
            self._table_is_there = False
            raise SqlUnavailable(_explain(error)) from error

    def _ready_engine(self, remaining: float) -> sa.Engine:
        if self._process != os.getpid():
            # A child must not share the parent's connections, nor close them.
            self._lock = threading.Lock()
            # One in memory is empty again.
            self._table_is_there = False
            if self._engine is not None:
                self._engine.dispose(close=False)
            self._process = os.getpid()
        engine = self._engine
        if engine is None or not self._table_is_there:
            with self._lock:
                engine = self._engine = self._engine or self._new_engine()
                if self._create_table and not self._table_is_there:
                    self._create(engine, remaining)
                self._table_is_there = True
        return engine

    def _create(self, engine: sa.Engine, remaining: float) -> None:
        with engine.connect() as connection:
            self._limit_lock_wait(connection, remaining)
            try:
                self.table.create(connection, checkfirst=True)
            except sa.exc.DBAPIError:
                # Another process may have created it in between.
                known = sa.inspect(connection)
                if not known.has_table(self.table.name, self.table.schema):
                    raise

    def _limit_lock_wait(self, connection: sa.Connection, remaining: float) -> None:
        if connection.dialect.name != "sqlite":
            return
        wait_ms = int(min(self._sql_timeout, remaining) * 1000)
        # The driver's own five seconds would be over the budget of a request.
        driver: Any = connection.connection.dbapi_connection
        driver.execute(f"PRAGMA busy_timeout = {wait_ms}").close()

    def dispose(self) -> None:
        """Close the connections; the next call opens new ones."""
        if self._engine is not None:
            self._engine.dispose()

    @property
    def engine(self) -> sa.Engine:
        """The engine in use, for counting statements and the like."""
        return self._ready_engine(self._sql_timeout)


#: Columns that an update writes: all but the key and the time of creation.
_UPDATED: Final[Sequence[str]] = (
    "version",
    "record",
    "user_id",
    "homes",
    "synced_at",
    "expires_at",
    "revoked_at",
    "reason",
)


def _columns(row: Row) -> dict[str, Any]:
    return {
        "session_key": row.session_key,
        "version": row.version,
        "record": row.record,
        "user_id": row.user_id,
        "homes": ",".join(row.homes),
        "created_at": row.created_at,
        "synced_at": row.synced_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
        "reason": row.reason,
    }


def _row(found: Any) -> Row:
    values = dict(found._mapping)
    values["homes"] = tuple(name for name in values["homes"].split(",") if name)
    if values["record"] is not None:
        values["record"] = bytes(values["record"])
    return Row(**values)


def _explain(error: sa.exc.SQLAlchemyError) -> str:
    """What happened, without statements or parameters, and what to do."""
    cause = getattr(error, "orig", None) or error
    text = f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
    if "locked" in text:
        text += (
            " (another writer holds the SQLite file; commit before the view returns,"
            " or give sessions a file of their own with RESILIENT_SESSION_BIND_KEY)"
        )
    elif "no such table" in text or "does not exist" in text or "doesn't exist" in text:
        text += " (run your migrations, or set RESILIENT_SESSION_CREATE_TABLE)"
    return text
