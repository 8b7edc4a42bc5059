"""The durable row: one table, short conditional statements, a connection of its own.

The application's transaction is never touched: the calls have connections of their
own. Every statement commits by itself, except the two of a move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from .calls import SqlCalls, transaction
from .connections import MYSQL, POSTGRESQL, SQLITE
from .errors import is_duplicate
from .table import UPDATED, Row, columns_of, row_of

_CLOCK: Final = sa.select(sa.extract("epoch", sa.func.clock_timestamp()))

#: In whole seconds. ``NOW(3)`` would have more, but by way of a local time, and in
#: autumn one hour of that comes twice.
_MYSQL_CLOCK: Final = sa.select(sa.func.unix_timestamp())

_Result = TypeVar("_Result")


class SqlTable:
    """The statements of the durable row.

    Every method takes a monotonic deadline in seconds and raises
    :class:`SqlUnavailable` when SQL did not do what was asked in time. On PostgreSQL
    and MariaDB the deadline holds whatever the server does, and what concerns one
    session takes no longer than ``sql_timeout``.

    :param calls: makes them on its table.
    """

    def __init__(self, calls: SqlCalls) -> None:
        self._calls = calls
        self.use(calls.table)

    def use(self, table: sa.Table) -> None:
        """Work on another table of the same columns, such as the application's own."""
        self.table = self._calls.table = table
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

        return self._calls.run(call, deadline)

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

    def put_tombstone(self, tombstone: Row, deadline: float, *, has_row: bool) -> bool:
        """Put a tombstone where the row is or would be.

        :param has_row: whether a row is expected; decides which statement is first.
        :returns: False if a tombstone stood there already.
        """

        def call(connection: sa.Connection) -> bool:
            if has_row and self._end_row(connection, tombstone):
                return True
            # A row may be inserted between the two statements, so that the update
            # comes last in any case.
            return self._insert(connection, tombstone) or self._end_row(
                connection, tombstone
            )

        return self._calls.run(call, deadline)

    def move(
        self, tombstone: Row, new: Row, deadline: float, *, seen_version: int | None
    ) -> bool:
        """Bury one row and insert another, both or neither.

        :param seen_version: the version that the buried row must have; None: it must
            have no row yet.
        :returns: False, with nothing done, where it is otherwise.
        """

        def call(connection: sa.Connection) -> bool:
            with transaction(connection) as undo:
                if seen_version is None:
                    ended = self._insert(connection, tombstone)
                else:
                    ended = self._replace(connection, tombstone, seen_version)
                if ended and self._insert(connection, new):
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
            with transaction(connection):
                # In one order, so that two that delete the same do not meet crosswise.
                for index in sorted(
                    range(len(rows)), key=lambda i: rows[i].session_key
                ):
                    deleted[index] = delete_one(connection, rows[index])
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

    def clock_ms(self, deadline: float) -> int | None:
        """The database's clock in Unix milliseconds; None on SQLite, which has ours."""

        def call(connection: sa.Connection) -> int | None:
            if connection.dialect.name in SQLITE:
                return None
            clock = _MYSQL_CLOCK if connection.dialect.name in MYSQL else _CLOCK
            return int(connection.execute(clock).scalar_one() * 1000)

        return self._patiently(call, deadline)

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

    def _end_row(self, connection: sa.Connection, tombstone: Row) -> bool:
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

        return self._calls.run(once, deadline)

    def _patiently(
        self, call: Callable[[sa.Connection], _Result], deadline: float
    ) -> _Result:
        """A call that no request waits for: it may take until its deadline."""
        return self._calls.run(call, deadline, patient=True)

    def dispose(self) -> None:
        """Close the connections; the next call opens new ones."""
        self._calls.dispose()

    @property
    def engine(self) -> sa.Engine:
        """The engine in use, for counting statements and the like."""
        return self._calls.engine
