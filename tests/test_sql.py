"""The durable row on SQLite, statement by statement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from flask_resilient_session.errors import SqlUnavailable
from flask_resilient_session.sql import (
    Row,
    SqlTable,
)

KEY, OTHER = session_key("alice"), session_key("bob")


@pytest.fixture(params=["file", "memory"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlTable]:
    """The table in a file, and in memory."""
    place = tmp_path / "sessions.sqlite" if request.param == "file" else ":memory:"
    made = sqlite_table(place)
    yield made
    made.dispose()


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
    expired = row(session_key("expired"), synced_at=NOW, expires_at=NOW - 1)
    table.insert(expired, soon())

    def page(before: int, *rest: Any) -> list[Row]:
        return table.page_unsynced(before, NOW, *rest)

    assert all_pages(page, "synced_at", NOW + 3, limit) == alive
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
    assert table.delete([row(KEY)], soon()) == [False]
    assert table.read(KEY, soon()) == now_there
    assert table.delete([row(KEY), now_there], soon()) == [False, True]
    assert table.read(KEY, soon()) is None
    assert table.delete([now_there], soon()) == [False]


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_pages_of_live_rows(table: SqlTable, limit: int) -> None:
    """Those of one user, or everybody's, by key; a tombstone has no user."""
    bobs = keys(5)
    for key in bobs:
        table.insert(row(key, user_id="bob"), soon())
    others = row(session_key("other"), user_id="Bob")
    table.insert(others, soon())
    table.bury(tombstone_row(bobs.pop(2)), soon(), has_row=True)

    def walk(user: str | None) -> list[str]:
        found, after = [], ""
        while rows := table.page_live(user, after, limit, soon()):
            assert len(rows) <= limit
            found += [one.session_key for one in rows]
            after = rows[-1].session_key
        return found

    assert walk("bob") == bobs
    assert walk("Bob") == [others.session_key]
    assert walk("nobody") == []
    assert walk(None) == sorted([*bobs, others.session_key])
