"""What SQL says about a session, and when it is not asked at all."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders import (
    HOUR,
    KEYRING,
    NAMESPACE,
    NOW,
    PAIR,
    SwitchedSql,
    TestClock,
    encoded,
    patient,
    patient_breaker,
    record,
    row,
    session_key,
    some_gate,
    sqlite_table,
    timing,
    tombstone_row,
    usual_breaker,
)
from flask_resilient_session.common.breaker import Breaker
from flask_resilient_session.common.errors import SqlUnavailable
from flask_resilient_session.common.events import Observer
from flask_resilient_session.core.answers import (
    RowCorrupt,
    RowDead,
    RowLive,
    RowMissing,
    SqlSilent,
)
from flask_resilient_session.core.envelope import Keyring
from flask_resilient_session.core.lifetimes import row_expires_ms, tombstone_expires_ms
from flask_resilient_session.core.record import Entry, Tombstone
from flask_resilient_session.store.context import SessionContext
from flask_resilient_session.store.row import RowRepository, user_id_column
from servers import wait_until

KEY, OTHER = session_key("alice"), session_key("bob")


def context(key: str = KEY, seconds: float = 30.0) -> SessionContext:
    """A session, and some time for it."""
    return SessionContext(key, KEYRING, timing(), patient(seconds))


@pytest.fixture
def sql(tmp_path: Path) -> Iterator[SwitchedSql]:
    """SQL that can be switched off."""
    table = sqlite_table(tmp_path / "sessions.sqlite")
    yield SwitchedSql(table)
    table.dispose()


def durable_on(sql: Any, **changes: Any) -> RowRepository:
    """The durable copy on this SQL."""
    usual: dict[str, Any] = {
        "breaker": patient_breaker(),
        "gate": some_gate(),
        "sql_timeout": 5.0,
        "user_key": "_user_id",
        "clock": TestClock(),
        "random": random.Random(1),
        "observer": Observer(None),
    }
    return RowRepository(sql, **(usual | changes))


def stored(sql: SwitchedSql, key: str = KEY) -> Any:
    """The row as the table has it."""
    return sql.table.read(key, time.monotonic() + 30)


def put(sql: SwitchedSql, data: bytes | None, **fields: Any) -> None:
    """A row with these bytes for a record."""
    sql.table.insert(row(KEY, record=data, **fields), time.monotonic() + 30)


# --- reading ---------------------------------------------------------------------


def test_a_missing_row(sql: SwitchedSql) -> None:
    """SQL answered, and there is none."""
    assert durable_on(sql).read(context()) == RowMissing()


def test_a_live_row_carries_its_version(sql: SwitchedSql) -> None:
    """The column decides, whatever the record inside says."""
    sealed = KEYRING.seal(KEY, record(row_version=1, never_synced=True))
    put(sql, sealed, version=7)
    assert durable_on(sql).read(context()) == RowLive(record(row_version=7))


@pytest.mark.parametrize("reason", ["ended", "moved"])
def test_a_dead_row(sql: SwitchedSql, reason: str) -> None:
    """Its reason and time, from the columns alone."""
    tombstone = tombstone_row(KEY, reason=reason, revoked_at=NOW - 5)
    sql.table.insert(tombstone, time.monotonic() + 30)
    assert durable_on(sql).read(context()) == RowDead(Tombstone(reason, NOW - 5))  # type: ignore[arg-type]


def test_a_corrupt_row_is_counted_and_logged(
    sql: SwitchedSql, caplog: pytest.LogCaptureFixture
) -> None:
    """Another session's record is none; the log names the session by its start."""
    put(sql, KEYRING.seal(OTHER, record()), version=3)
    observer = Observer(None)
    assert durable_on(sql, observer=observer).read(context()) == RowCorrupt(3)
    assert observer.stats["corrupt_rows"] == 1
    assert KEY[:12] in caplog.text
    assert KEY not in caplog.text


def test_a_row_under_an_unknown_key_says_nothing(sql: SwitchedSql) -> None:
    """A worker that is ahead in a rotation wrote it: not missing, not corrupt."""
    put(sql, Keyring(["next"], NAMESPACE).seal(KEY, record()))
    assert isinstance(durable_on(sql).read(context()), SqlSilent)


def test_silence_is_an_answer(sql: SwitchedSql) -> None:
    """SQL that is down makes no exception out of a read."""
    sql.down = True
    assert isinstance(durable_on(sql).read(context()), SqlSilent)


# --- writing ---------------------------------------------------------------------


def test_what_is_inserted(sql: SwitchedSql) -> None:
    """The record as the row holds it, sealed under the current key."""
    durable = durable_on(sql)
    before = TestClock().now_ms()
    visitor = record(never_synced=True, unverified=True, writes=4, row_version=0)
    inserted = durable.insert(context(), visitor)
    assert inserted is not None
    assert inserted.synced_ms >= before
    expected = replace(
        visitor,
        never_synced=False,
        unverified=False,
        writes=0,
        row_version=1,
        synced_ms=inserted.synced_ms,
    )
    assert inserted == expected
    assert durable.read(context()) == RowLive(inserted)
    found = stored(sql)
    assert (found.version, found.homes, found.created_at) == (1, PAIR, NOW)
    assert found.expires_at == row_expires_ms(inserted, timing())
    assert durable.insert(context(), visitor) is None


def test_an_update_needs_the_version_that_the_record_knows(sql: SwitchedSql) -> None:
    """It raises the version; who knows an older one gets nothing."""
    durable = durable_on(sql)
    first = durable.insert(context(), record())
    assert first is not None
    second = durable.update(context(), first)
    assert second is not None
    assert second.row_version == 2
    assert durable.update(context(), first) is None
    assert durable.read(context()) == RowLive(second)


@pytest.mark.parametrize(("ahead_ms", "kept"), [(1000, True), (HOUR, False)])
def test_a_sync_in_the_future(sql: SwitchedSql, ahead_ms: int, kept: bool) -> None:
    """A little ahead it stays; of a clock that is wrong it is not believed."""
    ahead = record(synced_ms=TestClock().now_ms() + ahead_ms)
    inserted = durable_on(sql).insert(context(), ahead)
    assert inserted is not None
    assert (inserted.synced_ms == ahead.synced_ms) is kept


@pytest.mark.parametrize("known", [True, False])
def test_burying(sql: SwitchedSql, known: bool) -> None:
    """Dead, without data or user, for as long as any copy could live."""
    durable = durable_on(sql)
    inserted = durable.insert(context(), record(encoded_user("bob")))
    tombstone = Tombstone("ended", NOW + HOUR)
    durable.put_tombstone(context(), tombstone, inserted if known else None)
    assert durable.read(context()) == RowDead(tombstone)
    found = stored(sql)
    assert (found.record, found.user_id) == (None, None)
    assert found.expires_at == tombstone_expires_ms(tombstone, timing())
    assert durable.update(context(), inserted or record()) is None


def test_moving_is_both_or_neither(sql: SwitchedSql) -> None:
    """The old id dead and the new one live; another version changes nothing."""
    durable = durable_on(sql)
    old = durable.insert(context(), record())
    assert old is not None
    tombstone = Tombstone("moved", NOW)
    new = context(OTHER)
    stale = replace(old, row_version=8)
    assert durable.move(context(), stale, tombstone, new, record()) is None
    assert durable.read(context()) == RowLive(old)
    assert durable.read(new) == RowMissing()
    moved = durable.move(context(), old, tombstone, new, record())
    assert durable.read(context()) == RowDead(tombstone)
    assert moved is not None
    assert durable.read(new) == RowLive(moved)


def test_writes_that_fail_say_so(sql: SwitchedSql) -> None:
    """A write cannot be taken for done."""
    sql.down = True
    durable, tombstone = durable_on(sql), Tombstone("ended", NOW)
    for call in (
        lambda: durable.insert(context(), record()),
        lambda: durable.update(context(), record()),
        lambda: durable.put_tombstone(context(), tombstone, None),
        lambda: durable.move(context(), record(), tombstone, context(OTHER), record()),
    ):
        with pytest.raises(SqlUnavailable):
            call()


# --- the user --------------------------------------------------------------------


def encoded_user(user: object) -> dict[str, Entry]:
    """Entries of a session with this user."""
    return {key: Entry(NOW, 1, value) for key, value in encoded(_user_id=user).items()}


@pytest.mark.parametrize(
    ("user", "column"),
    [
        ("bob", "bob"),
        ("Bob", "Bob"),
        (42, "42"),
        ("", ""),
        ("ü" * 191, "ü" * 191),
        ("x" * 192, hashlib.sha256(b"x" * 192).hexdigest()),
    ],
)
def test_the_users_column(sql: SwitchedSql, user: object, column: str) -> None:
    """The user as text, a long one as its digest."""
    durable_on(sql).insert(context(), record(encoded_user(user)))
    assert stored(sql).user_id == column
    assert user_id_column(user) == column


@pytest.mark.parametrize("entries", [{}, {"_user_id": Entry(NOW, 1, None)}])
def test_no_user(sql: SwitchedSql, entries: dict[str, Entry]) -> None:
    """A visitor, and somebody whose user was removed."""
    durable_on(sql).insert(context(), record(entries))
    assert stored(sql).user_id is None
    assert user_id_column(None) is None


# --- bounds ----------------------------------------------------------------------


def test_sql_is_skipped_after_three_failures_and_used_again(
    sql: SwitchedSql, caplog: pytest.LogCaptureFixture
) -> None:
    """Afterwards nothing is sent until a probe succeeds; both changes are logged."""
    observer = Observer(None)
    breaker = Breaker(first_pause=0.05, longest_pause=0.05)
    durable = durable_on(sql, breaker=breaker, observer=observer)
    sql.down = True
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert durable.read(context()) == SqlSilent("switched off by the test")
        assert breaker.suspect
        sql.down = False
        wait_until(lambda: durable.read(context()) == RowMissing())
    assert observer.stats["sql_faults"] == 3
    assert [line.levelname for line in caplog.records] == ["WARNING", "INFO"]
    assert not breaker.suspect


def test_a_skipped_sql_is_not_asked(sql: SwitchedSql) -> None:
    """Neither reads nor writes reach it."""
    breaker = usual_breaker()
    durable = durable_on(sql, breaker=breaker)
    sql.down = True
    for _ in range(3):
        durable.read(context())
    sql.down = False
    assert durable.read(context()) == SqlSilent(
        "SQL is skipped for a while after failures"
    )
    with pytest.raises(SqlUnavailable, match="skipped"):
        durable.insert(context(), record())
    assert stored(sql) is None


def test_patience_that_is_used_up_is_not_sqls_fault(sql: SwitchedSql) -> None:
    """Requests that a hung node slowed do not make this process skip SQL."""
    breaker, observer = usual_breaker(), Observer(None)
    durable = durable_on(sql, breaker=breaker, observer=observer)
    for _ in range(5):
        assert isinstance(durable.read(context(seconds=-1)), SqlSilent)
    assert not breaker.suspect
    assert observer.stats["sql_faults"] == 0
    assert durable.read(context()) == RowMissing()


def test_sql_that_was_left_no_time_is_busy(sql: SwitchedSql) -> None:
    """It had less than SQL_TIMEOUT and may be well; with all of it, it is silent."""

    class Hung:
        def read(self, key: str, deadline: float) -> None:
            time.sleep(max(min(deadline - time.monotonic(), 0.1), 0))
            raise SqlUnavailable("SQL did not answer in time")

    breaker = usual_breaker()
    durable = durable_on(Hung(), breaker=breaker, sql_timeout=0.1)
    for _ in range(3):
        answer = durable.read(context(seconds=0.05))
        assert isinstance(answer, SqlSilent)
        assert answer.well
    assert not breaker.suspect
    for _ in range(3):
        answer = durable.read(context())
        assert isinstance(answer, SqlSilent)
        assert not answer.well
    assert breaker.suspect


def test_reads_at_once_are_bounded(sql: SwitchedSql) -> None:
    """One place, taken: the next reader waits as long as it may, then gets silence."""
    entered, leave = threading.Event(), threading.Event()

    class Slow:
        def read(self, key: str, deadline: float) -> None:
            entered.set()
            leave.wait(20)

    durable = durable_on(Slow(), gate=some_gate(1))
    holder = threading.Thread(target=durable.read, args=(context(),))
    holder.start()
    assert entered.wait(20)
    for late in (0.1, -1.0):
        answer = durable.read(context(OTHER, late))
        assert isinstance(answer, SqlSilent)
        assert answer.well
    leave.set()
    holder.join(20)
    assert durable.read(context()) == RowMissing()
