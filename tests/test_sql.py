"""The durable row on SQLite, statement by statement."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateTable

from builders import (
    NOW,
    in_child,
    row,
    run_together,
    session_key,
    sqlite_table,
    tombstone_row,
)
from flask_resilient_session.errors import SqlUnavailable
from flask_resilient_session.sql import (
    Row,
    SqlTable,
    define_table,
    is_in_memory,
    own_engine,
    plain_engine,
)

KEY, OTHER = session_key("alice"), session_key("bob")
NAME = "flask_resilient_session"


def soon(seconds: float = 30.0) -> float:
    """A deadline that no healthy call meets."""
    return time.monotonic() + seconds


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


# --- one row ---------------------------------------------------------------------


def test_what_is_inserted_is_read_back(table: SqlTable) -> None:
    """Every column comes back as it was, the record byte for byte."""
    written = row(KEY, record=bytes(range(256)) * 300, user_id="Bob", expires_at=2**62)
    assert table.insert(written, soon())
    assert table.read(KEY, soon()) == written
    assert table.read(OTHER, soon()) is None


def test_homes_may_be_none(table: SqlTable) -> None:
    """A session of an application without nodes has no homes."""
    table.insert(row(KEY, homes=()), soon())
    found = table.read(KEY, soon())
    assert found is not None
    assert found.homes == ()


def test_a_second_insert_changes_nothing(table: SqlTable) -> None:
    """The row that stands there is left alone."""
    table.insert(row(KEY), soon())
    assert not table.insert(row(KEY, record=b"late", version=9), soon())
    assert table.read(KEY, soon()) == row(KEY)


def test_an_update_needs_the_version_it_saw(table: SqlTable) -> None:
    """Of two writers that saw the same version one gets through."""
    table.insert(row(KEY), soon())
    first = row(KEY, version=2, record=b"first", synced_at=NOW + 5)
    assert table.update(first, 1, soon())
    assert not table.update(row(KEY, version=2, record=b"second"), 1, soon())
    assert table.read(KEY, soon()) == first


def test_an_update_keeps_the_time_of_creation(table: SqlTable) -> None:
    """Whatever a later writer believes, the row was created once."""
    table.insert(row(KEY, created_at=7), soon())
    table.update(row(KEY, version=2, created_at=8), 1, soon())
    assert table.read(KEY, soon()) == row(KEY, version=2, created_at=7)


def test_an_update_never_creates_or_revives(table: SqlTable) -> None:
    """A missing row stays missing, a dead one dead."""
    assert not table.update(row(KEY, version=2), 1, soon())
    assert table.read(KEY, soon()) is None
    table.insert(tombstone_row(KEY), soon())
    assert not table.update(row(KEY, version=3), 2, soon())
    assert table.read(KEY, soon()) == tombstone_row(KEY)


@pytest.mark.parametrize("has_row", [True, False])
def test_burying_a_live_row(table: SqlTable, has_row: bool) -> None:
    """Whatever its version, expected or not, the record is gone."""
    table.insert(row(KEY, version=41, user_id="bob", created_at=7), soon())
    assert table.bury(tombstone_row(KEY), soon(), has_row=has_row)
    assert table.read(KEY, soon()) == tombstone_row(KEY, version=42, created_at=7)


@pytest.mark.parametrize("has_row", [True, False])
def test_burying_what_has_no_row(table: SqlTable, has_row: bool) -> None:
    """The tombstone stands where the row would be, so that no insert succeeds."""
    assert table.bury(tombstone_row(KEY), soon(), has_row=has_row)
    assert not table.insert(row(KEY), soon())
    assert table.read(KEY, soon()) == tombstone_row(KEY)


@pytest.mark.parametrize("has_row", [True, False])
def test_burying_the_dead_changes_nothing(table: SqlTable, has_row: bool) -> None:
    """The first end of a session is the one that counts."""
    table.insert(tombstone_row(KEY), soon())
    late = tombstone_row(KEY, reason="moved", revoked_at=NOW + 99)
    assert not table.bury(late, soon(), has_row=has_row)
    assert table.read(KEY, soon()) == tombstone_row(KEY)


# --- moving ----------------------------------------------------------------------


def test_a_move_does_both(table: SqlTable) -> None:
    """The old row is dead and the new one is there."""
    table.insert(row(KEY, version=5), soon())
    dead = tombstone_row(KEY, version=6, reason="moved")
    assert table.move(dead, row(OTHER), soon(), seen_version=5)
    assert table.read(KEY, soon()) == dead
    assert table.read(OTHER, soon()) == row(OTHER)


def test_a_move_of_what_has_no_row(table: SqlTable) -> None:
    """The old id gets a tombstone all the same."""
    assert table.move(tombstone_row(KEY), row(OTHER), soon(), seen_version=None)
    assert table.read(KEY, soon()) == tombstone_row(KEY)
    assert table.read(OTHER, soon()) == row(OTHER)


@pytest.mark.parametrize(
    ("old", "seen"),
    [
        (None, 1),
        (row(KEY, version=2), 1),
        (row(KEY), None),
        (tombstone_row(KEY), 2),
        (tombstone_row(KEY), None),
    ],
)
def test_a_move_that_does_not_fit_does_nothing(
    table: SqlTable, old: Row | None, seen: int | None
) -> None:
    """Another version, a row that was not expected, or none: neither half is done."""
    if old is not None:
        table.insert(old, soon())
    dead = tombstone_row(KEY, reason="moved")
    assert not table.move(dead, row(OTHER), soon(), seen_version=seen)
    assert table.read(KEY, soon()) == old
    assert table.read(OTHER, soon()) is None


@pytest.mark.parametrize("seen", [1, None])
def test_a_move_to_a_taken_id_does_nothing(table: SqlTable, seen: int | None) -> None:
    """The old row stays alive when the new one cannot be inserted."""
    table.insert(row(OTHER, version=3), soon())
    if seen:
        table.insert(row(KEY), soon())
    assert not table.move(tombstone_row(KEY), row(OTHER), soon(), seen_version=seen)
    assert table.read(KEY, soon()) == (row(KEY) if seen else None)
    assert table.read(OTHER, soon()) == row(OTHER, version=3)
    assert table.update(row(OTHER, version=4), 3, soon())


def test_a_move_that_fails_in_the_middle_does_nothing(table: SqlTable) -> None:
    """An error after the first half undoes it, and the connection is usable."""
    table.insert(row(KEY), soon())
    broken = row(OTHER, expires_at=None)
    with pytest.raises(SqlUnavailable, match="NOT NULL"):
        table.move(tombstone_row(KEY), broken, soon(), seen_version=1)
    assert table.read(KEY, soon()) == row(KEY)
    assert table.insert(row(OTHER), soon())


# --- the reaper's pages ----------------------------------------------------------


def keys(count: int) -> list[str]:
    """Session keys in ascending order."""
    return sorted(session_key(f"user {number}") for number in range(count))


def all_pages(
    page: Callable[..., list[Row]], column: str, before: int, limit: int
) -> list[str]:
    """The keys of every page, each starting where the last one ended."""
    found: list[str] = []
    after = (0, "")
    while rows := page(before, after, limit, soon()):
        assert len(rows) <= limit
        found += [one.session_key for one in rows]
        after = (getattr(rows[-1], column), rows[-1].session_key)
    return found


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_pages_of_expired_rows(table: SqlTable, limit: int) -> None:
    """Every row before the limit once, by time and then key, tombstones too."""
    expected = []
    for number, key in enumerate(keys(7)):
        table.insert(row(key, expires_at=NOW + number // 3), soon())
        expected.append(key)
    table.insert(row(session_key("later"), expires_at=NOW + 3), soon())
    table.bury(tombstone_row(expected[0], expires_at=NOW), soon(), has_row=True)
    assert all_pages(table.page_expired, "expires_at", NOW + 3, limit) == expected
    assert table.count_expired(NOW + 3, soon()) == 7


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_pages_of_unsynced_rows(table: SqlTable, limit: int) -> None:
    """Live rows that were not synced for long, by time and then key."""
    alive = keys(6)
    for number, key in enumerate(alive):
        table.insert(row(key, synced_at=NOW + number // 2), soon())
    dead = alive.pop(1)
    table.bury(tombstone_row(dead, synced_at=NOW), soon(), has_row=True)
    table.insert(row(session_key("fresh"), synced_at=NOW + 3), soon())
    assert all_pages(table.page_unsynced, "synced_at", NOW + 3, limit) == alive
    assert table.newest_sync(soon()) == NOW + 3


def test_an_empty_table_has_no_newest_sync(table: SqlTable) -> None:
    """Nothing was ever synced: 0."""
    assert table.newest_sync(soon()) == 0
    assert table.count_expired(NOW, soon()) == 0


@pytest.mark.parametrize(
    "now_there",
    [
        row(KEY, version=2),
        row(KEY, version=1, synced_at=NOW + 1),
        tombstone_row(KEY, version=2),
        tombstone_row(KEY, version=1),
    ],
)
def test_only_an_unchanged_row_is_deleted(table: SqlTable, now_there: Row) -> None:
    """A row that was written, or made anew, since it was read stays."""
    table.insert(now_there, soon())
    assert not table.delete(row(KEY), soon())
    assert table.read(KEY, soon()) == now_there
    assert table.delete(now_there, soon())
    assert table.read(KEY, soon()) is None
    assert not table.delete(now_there, soon())


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


def test_a_budget_that_is_used_up_asks_nothing(path: Path) -> None:
    """Past its deadline a call fails at once and opens no file."""
    table = sqlite_table(path)
    with pytest.raises(SqlUnavailable, match="no time left"):
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
    wanted = keys(8)
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
    table = SqlTable(
        define_table(sa.MetaData(), NAME, None),
        lambda: own_engine(app, 0.2),
        create_table=True,
        sql_timeout=0.2,
        monotonic=time.monotonic,
    )
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
        own = own_engine(app, 1.0)
        with own.connect() as ours:
            assert not sa.inspect(ours).has_table("cart")
        connection.rollback()
        assert connection.exec_driver_sql("SELECT * FROM cart").all() == []
    own.dispose()
    app.dispose()


def test_our_connections_are_made_the_applications_way(path: Path) -> None:
    """What the application's engine does on connecting is done for ours too."""
    app = sa.create_engine(f"sqlite:///{path}", creator=lambda: sqlite3.connect(path))
    own = own_engine(app, 1.0)
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
    assert plain_engine(sa.make_url("sqlite://"), 1.0).hide_parameters
