"""The statements of the durable row, the same on every database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from builders import (
    NOW,
    row,
    session_key,
    soon,
    sqlite_table,
    tombstone_row,
)
from database_servers import DatabaseServer, server_table
from flask_resilient_session.common.errors import SqlUnavailable
from flask_resilient_session.sql.statements import SqlTable
from flask_resilient_session.sql.table import Row
from misbehaving import run_together

KEY, OTHER = session_key("alice"), session_key("bob")


@pytest.fixture(params=["sqlite", "memory", "postgresql", "mariadb"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlTable]:
    """An empty table on each database."""
    if request.param == "sqlite":
        made = sqlite_table(tmp_path / "sessions.sqlite")
    elif request.param == "memory":
        made = sqlite_table(":memory:")
    else:
        made = server_table(request.getfixturevalue(request.param))
    yield made
    made.dispose()


# --- one row ---------------------------------------------------------------------


def test_what_is_inserted_is_read_back(table: SqlTable) -> None:
    """Every column comes back as it was, the record byte for byte."""
    written = row(KEY, record=bytes(range(256)) * 300, user_id="Bob", expires_at=2**62)
    assert table.insert(written, soon())
    assert table.read(KEY, soon()) == written
    assert table.read(OTHER, soon()) is None


def test_a_record_of_a_megabyte(table: SqlTable) -> None:
    """The largest session that can be allowed fits, on the way in and out."""
    large = row(KEY, record=bytes(range(256)) * 4096)
    assert table.insert(large, soon())
    assert table.read(KEY, soon()) == large
    larger = row(KEY, version=2, record=b"'\\\0" * 400_000)
    assert table.update(larger, 1, soon())
    assert table.read(KEY, soon()) == larger


@pytest.mark.parametrize(
    "text",
    ["Bob", "bob", "bob ", "Ünïcode 日本 🍪", "O'Brien \\ %s :name ?", "x" * 191],
)
def test_user_ids_are_kept_as_they_are(table: SqlTable, text: str) -> None:
    """Any script, quotes, and spaces at the end."""
    table.insert(row(KEY, user_id=text), soon())
    assert table.read(KEY, soon()) == row(KEY, user_id=text)
    assert table.page_live(text, "", 9, soon()) == [row(KEY, user_id=text)]


def test_users_are_told_apart(table: SqlTable) -> None:
    """Capital letters and accents make another user."""
    names = ["Bob", "bob", "BOB", "bób"]
    for name in names:
        table.insert(row(session_key(name), user_id=name), soon())
    for name in names:
        (found,) = table.page_live(name, "", 9, soon())
        assert found.session_key == session_key(name)


def test_session_keys_are_told_apart(table: SqlTable) -> None:
    """A key in capital letters is another key."""
    table.insert(row(KEY), soon())
    assert table.read(KEY.upper(), soon()) is None
    assert table.insert(row(KEY.upper()), soon())
    assert not table.update(row(KEY.upper(), version=2), 9, soon())


def test_homes_of_any_script(table: SqlTable) -> None:
    """Names of nodes are the operator's; none at all are allowed too."""
    table.insert(row(KEY, homes=()), soon())
    table.insert(row(OTHER, homes=("knoten-ü", "節点")), soon())
    assert table.read(KEY, soon()) == row(KEY, homes=())
    assert table.read(OTHER, soon()) == row(OTHER, homes=("knoten-ü", "節点"))


def test_a_second_insert_changes_nothing(table: SqlTable) -> None:
    """The row that stands there is left alone."""
    table.insert(row(KEY), soon())
    assert not table.insert(row(KEY, record=b"late", version=9), soon())
    assert not table.insert(row(KEY), soon()), "not even when it is the same"
    assert table.read(KEY, soon()) == row(KEY)


def test_of_many_inserts_at_once_one_succeeds(table: SqlTable) -> None:
    """Whoever comes second is told that a row stands there."""
    jobs = [
        partial(table.insert, row(KEY, record=bytes([n])), soon()) for n in range(8)
    ]
    assert sorted(run_together(*jobs)) == [False] * 7 + [True]


@pytest.mark.parametrize("column", ["version", "created_at", "expires_at"])
def test_an_insert_that_fails_is_no_conflict(table: SqlTable, column: str) -> None:
    """A row that does not fit is an error, never taken for one that stands there."""
    broken = row(KEY, **{column: None})
    with pytest.raises(SqlUnavailable):
        table.insert(broken, soon())
    assert table.read(KEY, soon()) is None


@pytest.mark.parametrize(
    "too_much",
    [{"homes": ("x" * 256,)}, {"user_id": "u" * 192}, {"version": 2**63}],
    ids=["homes", "user", "version"],
)
def test_nothing_is_cut_short(
    database: DatabaseServer, too_much: dict[str, Any]
) -> None:
    """What is too long or too large is an error, and nothing is stored."""
    table = server_table(database)
    with database.session() as cursor:
        if database.dialect == "mysql":
            # As a database may be that was set up long ago.
            cursor.execute("SET GLOBAL sql_mode = ''")
    try:
        with pytest.raises(SqlUnavailable):
            table.insert(row(KEY, **too_much), soon())
        assert table.insert(row(KEY), soon())
        with pytest.raises(SqlUnavailable):
            table.update(row(KEY, **({"version": 2} | too_much)), 1, soon())
        assert table.read(KEY, soon()) == row(KEY)
    finally:
        with database.session() as cursor:
            if database.dialect == "mysql":
                cursor.execute("SET GLOBAL sql_mode = DEFAULT")
        table.dispose()


def test_an_update_needs_the_version_it_saw(table: SqlTable) -> None:
    """Of two writers that saw the same version one gets through."""
    table.insert(row(KEY), soon())
    first = row(KEY, version=2, record=b"first", synced_at=NOW + 5)
    assert table.update(first, 1, soon())
    assert not table.update(row(KEY, version=2, record=b"second"), 1, soon())
    assert table.read(KEY, soon()) == first


def test_an_update_to_the_same_values_counts(table: SqlTable) -> None:
    """A row that was found is a success, whether or not anything is different."""
    table.insert(row(KEY), soon())
    assert table.update(row(KEY), 1, soon())


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


def test_writers_of_one_hot_row(table: SqlTable) -> None:
    """Eight threads that change one row: no error, and no change is lost."""
    table.insert(row(KEY, version=1), soon())

    def write() -> int:
        done = 0
        while done < 10:
            found = table.read(KEY, soon())
            assert found is not None
            version = found.version + 1
            done += table.update(row(KEY, version=version), found.version, soon())
        return done

    assert run_together(*[write] * 8) == [10] * 8
    assert table.read(KEY, soon()) == row(KEY, version=81)


@pytest.mark.parametrize("has_row", [True, False])
def test_burying_a_live_row(table: SqlTable, has_row: bool) -> None:
    """Whatever its version, expected or not, the record is gone."""
    table.insert(row(KEY, version=41, user_id="bob", created_at=7), soon())
    assert table.put_tombstone(tombstone_row(KEY), soon(), has_row=has_row)
    assert table.read(KEY, soon()) == tombstone_row(KEY, version=42, created_at=7)


@pytest.mark.parametrize("has_row", [True, False])
def test_burying_what_has_no_row(table: SqlTable, has_row: bool) -> None:
    """The tombstone stands where the row would be, so that no insert succeeds."""
    assert table.put_tombstone(tombstone_row(KEY), soon(), has_row=has_row)
    assert not table.insert(row(KEY), soon())
    assert table.read(KEY, soon()) == tombstone_row(KEY)


@pytest.mark.parametrize("has_row", [True, False])
def test_burying_the_dead_changes_nothing(table: SqlTable, has_row: bool) -> None:
    """The first end of a session is the one that counts."""
    table.insert(tombstone_row(KEY), soon())
    late = tombstone_row(KEY, reason="moved", revoked_at=NOW + 99)
    assert not table.put_tombstone(late, soon(), has_row=has_row)
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
    with pytest.raises(SqlUnavailable, match=r"(?i)not.null|cannot be null"):
        table.move(tombstone_row(KEY), broken, soon(), seen_version=1)
    assert table.read(KEY, soon()) == row(KEY)
    assert table.insert(row(OTHER), soon())


def test_of_many_moves_of_one_session_one_succeeds(table: SqlTable) -> None:
    """It goes on under one id, and no other id has a row."""
    table.insert(row(KEY), soon())
    new = keys(8)
    jobs = [
        partial(table.move, tombstone_row(KEY), row(key), soon(), seen_version=1)
        for key in new
    ]
    moved = run_together(*jobs)
    assert sorted(moved) == [False] * 7 + [True]
    assert [table.read(key, soon()) is not None for key in new] == moved


def test_moves_that_cross(table: SqlTable) -> None:
    """Two transactions over the same two rows: the database's deadlock is no error."""
    first, second = sorted([KEY, OTHER])
    for _ in range(3):
        table.insert(row(first), soon())
        table.insert(row(second), soon())
        jobs = [
            partial(table.move, tombstone_row(old), row(new), soon(), seen_version=1)
            for old, new in [(first, second), (second, first)]
        ]
        assert run_together(*jobs) == [False, False]
        assert table.read(first, soon()) == row(first)
        assert table.read(second, soon()) == row(second)


# --- many rows -------------------------------------------------------------------


def keys(count: int) -> list[str]:
    """Session keys in ascending order."""
    return sorted(session_key(f"user {number}") for number in range(count))


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_pages_of_expired_rows(table: SqlTable, limit: int) -> None:
    """Every row before the limit once, by time and then key, tombstones too."""
    expected = []
    for number, key in enumerate(keys(7)):
        table.insert(row(key, expires_at=NOW + number // 3), soon())
        expected.append(key)
    table.insert(row(session_key("later"), expires_at=NOW + 3), soon())
    table.put_tombstone(
        tombstone_row(expected[0], expires_at=NOW), soon(), has_row=True
    )
    found: list[str] = []
    after = (0, "")
    while rows := table.page_expired(NOW + 3, after, limit, soon()):
        assert len(rows) <= limit
        found += [one.session_key for one in rows]
        after = (rows[-1].expires_at, rows[-1].session_key)
    assert found == expected
    assert table.count_expired(NOW + 3, soon()) == 7


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_pages_of_live_rows(table: SqlTable, limit: int) -> None:
    """A user's, or everybody's, by key; the dead are left out."""
    everybody = keys(6)
    for number, key in enumerate(everybody):
        table.insert(row(key, user_id=["bob", "Bob"][number % 2]), soon())
    table.put_tombstone(tombstone_row(everybody[0]), soon(), has_row=True)

    def all_of(user: str | None) -> list[str]:
        found: list[str] = []
        while rows := table.page_live(user, found[-1] if found else "", limit, soon()):
            found += [one.session_key for one in rows]
        return found

    assert all_of(None) == everybody[1:]
    assert all_of("bob") == everybody[2::2]
    assert all_of("Bob") == everybody[1::2]
    assert all_of("nobody") == []


def test_an_empty_table(table: SqlTable) -> None:
    """Nothing is over."""
    assert table.count_expired(NOW, soon()) == 0


def test_the_databases_clock(table: SqlTable) -> None:
    """It is told in Unix time, whatever the server's time zone; SQLite has ours."""
    dialect = table.engine.dialect.name
    if dialect == "sqlite":
        assert table.clock_ms(soon()) is None
        return
    zone = "SET TIME ZONE 9" if dialect == "postgresql" else "SET time_zone = '+09:00'"
    with table.engine.connect() as connection:
        connection.exec_driver_sql(zone)
    told = table.clock_ms(soon())
    assert told is not None
    assert abs(told - time.time() * 1000) < 60_000


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
    assert table.delete([row(KEY)], soon()) == [False]
    assert table.read(KEY, soon()) == now_there
    assert table.delete([row(KEY), now_there, now_there], soon()) == [
        False,
        True,
        False,
    ]
    assert table.read(KEY, soon()) is None


def test_two_reapers_that_delete_the_same_rows(table: SqlTable) -> None:
    """In whatever order they come, each row is deleted once, without an error."""
    rows = [row(key) for key in keys(20)]
    for one in rows:
        table.insert(one, soon())
    forward, backward = run_together(
        partial(table.delete, rows, soon()), partial(table.delete, rows[::-1], soon())
    )
    assert [a + b for a, b in zip(forward, backward[::-1], strict=True)] == [1] * 20


# --- errors ----------------------------------------------------------------------


def test_no_parameter_is_in_an_errors_text(table: SqlTable) -> None:
    """Neither the record nor the user nor the key, in the text nor in its causes'."""
    private = {"record": b"private bytes", "user_id": "Robert"}
    jobs: list[Callable[[], Any]] = [
        lambda: table.insert(row(KEY, version=None, **private), soon()),
        lambda: table.insert(row(KEY, version="Robert", **private), soon()),
    ]
    if table.engine.dialect.name == "sqlite":
        # It takes any text for a number; the read after it would fail instead.
        jobs.pop()
    for job in jobs:
        with pytest.raises(SqlUnavailable) as caught:
            job()
        error: BaseException | None = caught.value
        while error is not None:
            for word in ("private", b"private".hex(), "Robert", KEY):
                assert word not in str(error)
            error = error.__cause__ or error.__context__


def test_a_missing_table_is_asked_for(table: SqlTable) -> None:
    """Without CREATE_TABLE the error says what to do; with it the table is made."""
    table.read(KEY, soon())
    table._create_table = False
    table.table.drop(table.engine)
    with pytest.raises(SqlUnavailable, match="run your migrations") as caught:
        table.read(KEY, soon())
    assert "RESILIENT_SESSION_CREATE_TABLE" in str(caught.value)
    table._create_table = True
    assert table.read(KEY, soon()) is None
