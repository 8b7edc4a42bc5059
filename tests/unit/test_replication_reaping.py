"""When a row may go, and how long everything is kept."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from answers import (
    ANSWERS,
    DEAD,
    ROWS,
    SAME,
    TIMING,
    TOKENS,
    joined,
    live_copies,
    replies,
)
from builders import (
    DAY,
    FIRST_HOME,
    HOUR,
    NOW,
    SECOND,
    SECOND_HOME,
    record,
    timing,
)
from flask_resilient_session.core.answers import Hit, RowLive
from flask_resilient_session.core.lifetimes import (
    expires_ms,
    row_expires_ms,
    tombstone_expires_ms,
    touch_due,
)
from flask_resilient_session.core.reaping import (
    Keep,
    PutTombstone,
    Reap,
    Renew,
    apart_from_database,
    may_reap,
    written_ahead,
)
from flask_resilient_session.core.record import Tombstone

BOTH = list(itertools.product(ANSWERS, repeat=2))


# --- reaping ---------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("first", "second"), BOTH)
def test_what_becomes_of_a_row_past_its_time(first: str, second: str, row: str) -> None:
    """It goes only when every home answered and none has anything newer to say."""
    verdict = may_reap(ROWS[row], replies(first, second), TIMING, NOW, NOW)
    copies = live_copies(first, second)
    in_use = [copy for copy in copies if copy.last_use_ms > NOW - DAY]
    if "unreachable" in (first, second) or row == "silent":
        assert isinstance(verdict, Keep)
    elif row == "dead":
        assert isinstance(verdict, Keep if in_use else Reap)
    elif "dead" in (first, second):
        assert verdict == PutTombstone(DEAD)
    elif row in ("live", "ahead"):
        assert isinstance(verdict, Renew)  # this row itself is not past its time
        expected = joined(*copies, ROWS[row].record)  # type: ignore[union-attr]
        assert verdict.record.payload() == expected.payload()
        assert verdict.record.row_version == expected.row_version
    elif not in_use:
        assert verdict == Reap()
    else:
        assert isinstance(verdict, Renew)
        expected = joined(*copies)
        version = 8 if row == "corrupt" else expected.row_version
        renewed = replace(
            expected, row_version=version, never_synced=False, unverified=False
        )
        assert verdict.record == renewed


@pytest.mark.parametrize(
    ("first", "second", "renewed"),
    [
        ("miss", "miss", False),
        ("expired", "corrupt", False),
        ("miss", "same", True),
        ("other", "expired", True),
    ],
)
def test_an_expired_row_asks_the_homes(first: str, second: str, renewed: bool) -> None:
    """A newer use on a home renews the row; without one it may go."""
    row = RowLive(replace(SAME, last_use_ms=NOW - 2 * DAY))
    verdict = may_reap(row, replies(first, second), TIMING, NOW, NOW)
    assert isinstance(verdict, Renew if renewed else Reap)


@pytest.mark.parametrize(
    ("first", "age", "verdict"),
    [
        ("miss", TIMING.lifetime_ms, Reap),
        ("miss", TIMING.lifetime_ms - 1, Keep),
        ("same", TIMING.lifetime_ms, Keep),
    ],
)
def test_an_unreadable_row_goes_in_the_end(
    first: str, age: int, verdict: type[Reap | Keep]
) -> None:
    """A whole lifetime after its end nobody can come back for a row of a lost key."""
    found = may_reap(ROWS["silent"], replies(first, "miss"), TIMING, NOW, NOW - age)
    assert isinstance(found, verdict)


def test_the_row_learns_that_a_debt_is_paid() -> None:
    """The tombstone that goes to SQL owes SQL nothing any more."""
    owing = {FIRST_HOME: Hit(replace(DEAD, debt=True), TOKENS[FIRST_HOME])}
    assert may_reap(ROWS["live"], owing, TIMING, NOW, NOW) == PutTombstone(DEAD)


def test_a_silent_home_is_named() -> None:
    """The reason says which home did not answer."""
    verdict = may_reap(ROWS["live"], replies("miss", "unreachable"), TIMING, NOW, NOW)
    assert verdict == Keep(f"no answer from {SECOND_HOME}")


# --- clocks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead_ms", "said"),
    [
        (0, None),
        (5 * 60 * SECOND, None),
        (-5 * 60 * SECOND, None),
        (5 * 60 * SECOND + 1, "this host's clock is 300 s ahead of the database's"),
        (-5 * 60 * SECOND - 1, "this host's clock is 300 s behind the database's"),
        (40 * DAY, "this host's clock is 3456000 s ahead of the database's"),
    ],
)
def test_a_clock_and_the_databases(ahead_ms: int, said: str | None) -> None:
    """Five minutes are near enough; more are not, in either direction."""
    assert apart_from_database(NOW + ahead_ms, NOW) == said


def test_a_database_without_a_clock_of_its_own() -> None:
    """There is nothing to compare with."""
    assert apart_from_database(NOW, None) is None


def test_rows_written_until_now() -> None:
    """The past says nothing about a clock, nor does the near future."""
    written = {"a": NOW - DAY, "b": NOW, "c": NOW + 5 * 60 * SECOND}
    assert written_ahead(NOW, written) is None
    assert written_ahead(NOW, {}) is None


def test_a_row_from_the_future() -> None:
    """It is named, with how far ahead it is."""
    written = {"a": NOW, "b": NOW + 5 * 60 * SECOND + 1}
    said = "the row of session b was written 300 s in this host's future"
    assert written_ahead(NOW, written) == said


# --- time ------------------------------------------------------------------------


def test_expiry_is_idle_or_absolute_whichever_is_first() -> None:
    """Use extends the idle time, never the absolute one."""
    used = record(created_ms=NOW, last_use_ms=NOW + HOUR)
    assert expires_ms(used, TIMING) == NOW + HOUR + DAY + TIMING.slack_ms
    assert expires_ms(used, timing(absolute_ms=2 * HOUR)) == NOW + 2 * HOUR


def test_rows_and_tombstones_outlive_their_session() -> None:
    """The row by one sync interval, the tombstone by a full lifetime and more."""
    used = record()
    late = TIMING.slack_ms
    assert row_expires_ms(used, TIMING) == expires_ms(used, TIMING) + late
    ended = Tombstone("ended", NOW)
    # The day is for clocks that differ.
    assert tombstone_expires_ms(ended, TIMING) == NOW + 2 * DAY + 2 * late


def test_the_absolute_lifetime_has_no_margin() -> None:
    """However late the row may hear of a use."""
    limited = timing(absolute_ms=2 * HOUR)
    used = record(created_ms=NOW, last_use_ms=NOW + HOUR)
    assert expires_ms(used, limited) == row_expires_ms(used, limited) == NOW + 2 * HOUR


def test_a_use_is_recorded_once_an_interval() -> None:
    """The homes are told of it no more often than that."""
    assert not touch_due(record(last_use_ms=NOW - 60 * SECOND + 1), TIMING, NOW)
    assert touch_due(record(last_use_ms=NOW - 60 * SECOND), TIMING, NOW)
