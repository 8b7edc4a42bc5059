"""The durable row's table and connections, and SQLite in trouble."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateTable

from builders import (
    PLACES,
    row,
    session_key,
    some_gate,
    soon,
    sqlite_table,
    tombstone_row,
)
from flask_resilient_session.common.clock import SystemClock
from flask_resilient_session.common.errors import SqlUnavailable
from flask_resilient_session.sql.calls import SqlCalls
from flask_resilient_session.sql.connections import (
    is_in_memory,
    own_engine,
    plain_engine,
)
from flask_resilient_session.sql.statements import SqlTable
from flask_resilient_session.sql.table import define_table
from misbehaving import in_child, run_together

KEY, OTHER = session_key("alice"), session_key("bob")
NAME = "flask_resilient_session"


@pytest.fixture(params=["file", "memory"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlTable]:
    """The table in a file, and in memory."""
    place = tmp_path / "sessions.sqlite" if request.param == "file" else ":memory:"
    made = sqlite_table(place)
    yield made
    made.dispose()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test's SQLite file is."""
    return tmp_path / "sessions.sqlite"


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """Somebody else holds the file's write lock, as a flushed view does."""
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        yield other
        other.execute("ROLLBACK")
    finally:
        other.close()


# --- trouble ---------------------------------------------------------------------


def test_a_locked_file_is_waited_for_no_longer_than_allowed(path: Path) -> None:
    """Another writer holds the file: an error in time, with advice in it."""
    table = sqlite_table(path, sql_timeout=0.2)
    table.insert(row(KEY), soon())
    with writing(path):
        for call in (
            lambda: table.update(row(KEY, version=2), 1, soon()),
            lambda: table.move(tombstone_row(KEY), row(OTHER), soon(), seen_version=1),
            lambda: table.update(row(KEY, version=2), 1, soon(0.1)),
        ):
            started = time.monotonic()
            with pytest.raises(SqlUnavailable, match="RESILIENT_SESSION_BIND_KEY"):
                call()
            assert time.monotonic() - started < 2
        assert table.read(KEY, soon()) == row(KEY)
    assert table.update(row(KEY, version=2), 1, soon())
    table.dispose()


def test_creating_the_table_waits_no_longer_either(path: Path) -> None:
    """The first call of all has the same bound when another writer holds the file."""
    table = sqlite_table(path, sql_timeout=0.2)
    with writing(path):
        started = time.monotonic()
        with pytest.raises(SqlUnavailable, match="locked"):
            table.insert(row(KEY), soon())
        assert time.monotonic() - started < 2
    assert table.insert(row(KEY), soon())
    table.dispose()


def test_connecting_waits_no_longer_either(path: Path) -> None:
    """A hook that needs the file on each new connection, while the file is locked."""
    table = sqlite_table(path, sql_timeout=0.2)
    engine = table.engine
    engine.dispose()
    table.dispose()
    sa.event.listen(engine, "connect", _use_the_file)
    with writing(path) as other:
        other.execute("ROLLBACK")
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        with pytest.raises(SqlUnavailable, match="locked"):
            table.read(KEY, soon())
        assert time.monotonic() - started < 3


def _use_the_file(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA journal_mode = DELETE").close()


def test_a_deadline_that_is_over_asks_nothing(path: Path) -> None:
    """Past its deadline a call fails at once and opens no file."""
    table = sqlite_table(path)
    with pytest.raises(SqlUnavailable, match="no time is left"):
        table.read(KEY, time.monotonic() - 0.001)
    assert not path.exists()


def test_no_parameter_is_in_an_errors_text(table: SqlTable) -> None:
    """Neither the record nor the user, in the text nor in its causes'."""
    broken = row(KEY, record=b"private", user_id="Robert", version=None)
    with pytest.raises(SqlUnavailable, match="NOT NULL") as caught:
        table.insert(broken, soon())
    error: BaseException | None = caught.value
    while error is not None:
        for private in ("private", "Robert", KEY):
            assert private not in str(error)
        error = error.__cause__ or error.__context__


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    """The driver's own error becomes ours."""
    table = sqlite_table(tmp_path / "no such directory" / "x.sqlite")
    with pytest.raises(SqlUnavailable, match="unable to open"):
        table.read(KEY, soon())


# --- the table -------------------------------------------------------------------


def test_without_create_table_the_error_says_what_to_do(path: Path) -> None:
    """A table that migrations should have made is asked for, not made."""
    table = sqlite_table(path, create_table=False)
    with pytest.raises(SqlUnavailable, match="run your migrations") as caught:
        table.read(KEY, soon())
    assert "RESILIENT_SESSION_CREATE_TABLE" in str(caught.value)
    maker = sqlite_table(path)
    maker.insert(row(KEY), soon())
    assert table.read(KEY, soon()) == row(KEY)
    table.dispose()
    maker.dispose()


def test_two_that_create_the_table_at_once(tmp_path: Path) -> None:
    """Whoever comes second finds the table and goes on."""
    for attempt in range(10):
        path = tmp_path / f"{attempt}.sqlite"
        tables = [sqlite_table(path) for _ in range(2)]
        first, second = tables
        assert run_together(
            partial(first.insert, row(KEY), soon()),
            partial(second.insert, row(OTHER), soon()),
        ) == [True, True]
        for one in tables:
            one.dispose()


def test_threads_share_one_table_in_memory() -> None:
    """The single connection is lent to one thread after another."""
    table = sqlite_table(":memory:")
    wanted = [session_key(f"user {number}") for number in range(8)]
    jobs = [partial(table.insert, row(key), soon()) for key in wanted]
    assert run_together(*jobs) == [True] * 8
    assert table.count_expired(2**62, soon()) == 8
    table.dispose()


def test_a_table_that_the_metadata_has_is_used() -> None:
    """The application's migrations and this package see the same table."""
    metadata = sa.MetaData()
    made = define_table(metadata, NAME, None)
    assert define_table(metadata, NAME, None) is made
    assert define_table(metadata, NAME, "private").schema == "private"


def test_columns_on_mysql() -> None:
    """A record over 64 KB fits, and keys and users are compared byte by byte."""
    text = ddl(mysql.dialect())
    assert "record MEDIUMBLOB" in text
    assert "session_key CHAR(64) CHARACTER SET ascii COLLATE ascii_bin" in text
    assert "user_id VARCHAR(191) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin" in text
    assert text.count("BIGINT") == 5


def test_columns_on_postgresql() -> None:
    """Bytes are bytes, and times have 64 bits."""
    text = ddl(postgresql.dialect())
    assert "record BYTEA" in text
    assert "session_key CHAR(64)" in text
    assert text.count("BIGINT") == 5


def ddl(dialect: Any) -> str:
    """How the table is created there."""
    table = define_table(sa.MetaData(), NAME, None)
    return str(CreateTable(table).compile(dialect=dialect))


# --- connections -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite://", True),
        ("sqlite:///:memory:", True),
        ("sqlite:///file::memory:?cache=shared&uri=true", True),
        ("sqlite:///file:name?mode=memory&cache=shared&uri=true", True),
        ("sqlite+pysqlite:///:memory:", True),
        ("sqlite:///app.sqlite", False),
        ("sqlite:////var/lib/app.sqlite", False),
        ("postgresql://localhost/app", False),
        ("mysql+pymysql://localhost/app", False),
    ],
)
def test_what_lives_in_memory(url: str, expected: bool) -> None:
    """SQLite without a file, however that is written."""
    assert is_in_memory(sa.make_url(url)) is expected


def engine_of(path: Path | str, url: str = "sqlite:///{}") -> sa.Engine:
    """An application's engine."""
    return sa.create_engine(url.format(path))


def test_the_applications_transaction_is_left_alone(path: Path) -> None:
    """What the application has not committed is neither committed nor seen."""
    app = engine_of(path)
    with app.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE cart (item TEXT)")
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    calls = SqlCalls(
        define_table(sa.MetaData(), NAME, None),
        lambda: own_engine(app, 0.2, PLACES),
        create_table=True,
        sql_timeout=0.2,
        gate=some_gate(),
        clock=SystemClock(),
    )
    table = SqlTable(calls)
    table.insert(row(KEY), soon())
    with app.connect() as connection:
        connection.exec_driver_sql("INSERT INTO cart VALUES ('unpaid')")
        assert table.read(KEY, soon()) == row(KEY)
        with pytest.raises(SqlUnavailable):
            table.insert(row(OTHER), soon())
        connection.rollback()
    with app.connect() as connection:
        assert connection.exec_driver_sql("SELECT * FROM cart").all() == []
    table.dispose()
    app.dispose()


def test_in_memory_sessions_are_apart_from_the_application() -> None:
    """The application's only connection, and its open transaction, are not ours."""
    app = engine_of("", "sqlite://")
    with app.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE cart (item TEXT)")
        connection.commit()
        connection.exec_driver_sql("INSERT INTO cart VALUES ('unpaid')")
        own = own_engine(app, 1.0, PLACES)
        with own.connect() as ours:
            assert not sa.inspect(ours).has_table("cart")
        connection.rollback()
        assert connection.exec_driver_sql("SELECT * FROM cart").all() == []
    own.dispose()
    app.dispose()


def test_our_connections_are_made_the_applications_way(path: Path) -> None:
    """What the application's engine does on connecting is done for ours too."""
    app = sa.create_engine(f"sqlite:///{path}", creator=lambda: sqlite3.connect(path))
    own = own_engine(app, 1.0, PLACES)
    with own.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE seen (x)")
    assert sa.inspect(app).has_table("seen")
    own.dispose()
    app.dispose()


def test_a_child_uses_connections_of_its_own(path: Path) -> None:
    """After a fork parent and child both read and write."""
    table = sqlite_table(path)
    table.insert(row(KEY), soon())
    assert in_child(
        lambda: table.read(KEY, soon()) == row(KEY) and table.insert(row(OTHER), soon())
    )
    assert table.read(OTHER, soon()) == row(OTHER)
    assert table.update(row(KEY, version=2), 1, soon())
    table.dispose()


def test_a_child_starts_with_an_empty_database_in_memory() -> None:
    """Memory is not shared over a fork; the first call finds a table all the same."""
    table = sqlite_table(":memory:")
    table.insert(row(KEY), soon())
    assert in_child(lambda: table.read(KEY, soon()) is None)
    assert table.read(KEY, soon()) == row(KEY)
    table.dispose()


def test_a_plain_engine_hides_parameters() -> None:
    """Nor does an error that SQLAlchemy words itself show any."""
    assert plain_engine(sa.make_url("sqlite://"), 1.0, PLACES).hide_parameters
