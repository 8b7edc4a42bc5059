"""Every combination of answers, judged by the rules as a reader would state them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from answers import (
    ANSWERS,
    COPIES,
    DEAD,
    OTHER,
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
    HOUR,
    NOW,
    PAIR,
    SECOND,
    timing,
)
from flask_resilient_session.core.answers import (
    Ack,
    Hit,
    RowCorrupt,
    RowDead,
    RowLive,
    Token,
)
from flask_resilient_session.core.reading import (
    AskSql,
    Gone,
    InsertFirst,
    Live,
    ReadAgain,
    Standing,
    Unknown,
    confirmed,
    judge_copies,
    judge_read,
    judge_row,
)
from flask_resilient_session.core.record import Tombstone, same_state
from flask_resilient_session.core.writing import (
    Outcome,
    SqlNeed,
    judge_acks,
    sql_need,
    to_remove,
)


def writable(*answers: str) -> dict[str, Token | None]:
    """Where can be written: everywhere but at an unreachable home."""
    return {
        home: None if answer == "miss" else TOKENS[home]
        for home, answer in zip(PAIR, answers, strict=False)
        if answer != "unreachable"
    }


def without_tombstone(*answers: str) -> tuple[str, ...]:
    """The homes that a tombstone has to be copied to."""
    return tuple(
        home
        for home, answer in zip(PAIR, answers, strict=False)
        if answer not in ("dead", "unreachable")
    )


BOTH = list(itertools.product(ANSWERS, repeat=2))
ACK_PAIRS = list(itertools.product(Ack, repeat=2))


# --- reading ---------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_what_the_homes_settle(first: str, second: str) -> None:
    """A tombstone always does; two copies only if nothing speaks against them."""
    verdict = judge_copies(replies(first, second), TIMING, NOW)
    agree = (
        {"same"},
        {"other"},
        {"never"},
        # Times may differ, and the later use counts.
        {"same", "never"},
        {"same", "expired"},
        {"never", "expired"},
    )
    if "dead" in (first, second):
        propagate_to = without_tombstone(first, second)
        assert verdict == Gone("ended", DEAD.ended_ms, DEAD, propagate_to)
    elif {first, second} in agree:
        record_ = joined(*live_copies(first, second))
        places_ = writable(first, second)
        assert verdict == Live(record_, Standing.AGREED, places_, ())
    else:
        assert verdict is None


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("first", "second"), BOTH)
def test_what_sql_settles(first: str, second: str, row: str) -> None:
    """Every combination that the homes did not settle, whatever the row."""
    if "dead" in (first, second):
        return  # settled by the homes, never asked
    verdict = judge_row(replies(first, second), ROWS[row], TIMING, NOW)
    copies = live_copies(first, second)
    if row == "dead":
        dead = ROWS["dead"].tombstone  # type: ignore[union-attr]
        propagate_to = without_tombstone(first, second)
        assert verdict == Gone("moved", dead.ended_ms, dead, propagate_to)
    elif row == "silent":
        if not copies or {first, second} <= {"expired", *ANSWERS[-3:]}:
            assert verdict == Unknown()
        else:
            record_ = replace(joined(*copies), unverified=True)
            assert verdict == Live(
                record_, Standing.UNVERIFIED, writable(first, second)
            )
    elif row == "missing":
        if not copies or any(not copy.never_synced for copy in copies):
            over = {first, second} <= {"expired", "miss", "corrupt"}
            assert verdict == Gone("missing", held=not over)
        else:
            assert verdict == InsertFirst(joined(*copies))
    elif row == "corrupt" and not copies:
        held = "unreachable" in (first, second)
        assert verdict == Gone("missing", held=held)
    elif row == "corrupt" and all(copy.last_use_ms < NOW - DAY for copy in copies):
        assert verdict == Gone("expired")
    else:
        assert isinstance(verdict, Live)
        check_confirmed(verdict, row, first, second)


def check_confirmed(verdict: Live, row: str, first: str, second: str) -> None:
    """A session that SQL vouches for: its record, places and repairs."""
    known = live_copies(first, second)
    if row == "corrupt":
        expected = replace(joined(*known), row_version=8)
    else:
        expected = joined(ROWS[row].record, *known)  # type: ignore[union-attr]
    expected = replace(expected, unverified=False, never_synced=False)
    if row == "corrupt" or not same_state(expected, ROWS[row].record):  # type: ignore[union-attr]
        # The row is behind, and has to hear of at least one write.
        expected = replace(expected, writes=max(expected.writes, 1))
    assert verdict.record == expected
    assert verdict.standing is Standing.CONFIRMED
    assert verdict.writable == writable(first, second)
    # A home is fine only with a verified copy of this very state, of this
    # configuration, that has heard of the last sync.
    stamp = expected.entries["name"].counter
    fine = set()
    if row == "live":
        fine = {"other"} if stamp == NOW + 1 else {"same", "expired"}
    behind = tuple(
        home
        for home, answer in zip(PAIR, (first, second), strict=True)
        if answer != "unreachable" and answer not in fine
    )
    assert verdict.repairs == behind


def test_a_move_at_work_buries_its_old_copies_itself() -> None:
    """For a minute it may still find there what others had acknowledged."""
    for age_ms, propagate_to in ((59_999, ()), (60_000, PAIR)):
        row = RowDead(Tombstone("moved", NOW - age_ms))
        verdict = judge_row(replies("same", "miss"), row, TIMING, NOW)
        assert isinstance(verdict, Gone)
        assert verdict.propagate_to == propagate_to


RESTED = replace(SAME, synced_ms=NOW - 2 * TIMING.sync_ms - 60 * SECOND)
AGAIN, ASK = ReadAgain(), AskSql()
READS = [
    # (first home, second home, a conflict in SQL, may read again, verdict)
    ("dead", "dead", False, True, Gone),
    ("dead", "same", False, True, Gone),
    ("dead", "unreachable", True, True, Gone),
    ("same", "same", False, True, Live),
    ("same", "same", False, False, Live),
    ("same", "same", True, True, "agreed"),
    ("rested", "rested", False, True, "otherwise"),
    ("rested", "rested", True, True, "agreed"),
    ("same", "other", False, True, AGAIN),
    ("same", "other", False, False, ASK),
    ("same", "other", True, True, ASK),
    ("same", "miss", False, True, ASK),
    ("same", "unreachable", False, True, ASK),
    ("same", "corrupt", False, True, ASK),
    ("same", "unverified", False, True, ASK),
    ("same", "elsewhere", False, True, ASK),
    ("expired", "expired", False, True, AGAIN),
    ("expired", "expired", False, False, ASK),
    ("miss", "miss", False, True, ASK),
    ("unreachable", "unreachable", False, True, ASK),
]


@pytest.mark.parametrize(("first", "second", "conflict", "again", "verdict"), READS)
def test_what_a_read_amounts_to(
    first: str, second: str, conflict: bool, again: bool, verdict: Any
) -> None:
    """A tombstone, an agreed pair, once more, SQL: the first that applies counts."""
    found = replies(*(["same"] * 2 if first == "rested" else [first, second]))
    if first == "rested":
        found = {name: replace(hit, copy=RESTED) for name, hit in found.items()}  # type: ignore[type-var]
    for swapped in (found, dict(reversed(found.items()))):
        judged = judge_read(
            swapped, TIMING, NOW, ask_sql=conflict, may_read_again=again
        )
        if isinstance(verdict, type):
            assert isinstance(judged, verdict)
        elif isinstance(verdict, str):
            assert isinstance(judged, AskSql)
            assert isinstance(judged.agreed, Live)
            assert (judged.otherwise is not None) == (verdict == "otherwise")
        else:
            assert judged == verdict


def test_of_two_tombstones_the_final_one_counts() -> None:
    """Whichever home it is on, and a debt is paid once one of them says so."""
    ended, moved = replace(DEAD, debt=False), Tombstone("moved", NOW, debt=True)
    for copies in ((ended, moved), (moved, ended)):
        answers = {h: Hit(c, TOKENS[h]) for h, c in zip(PAIR, copies, strict=True)}
        verdict = judge_copies(answers, TIMING, NOW)
        assert verdict == Gone("ended", NOW, Tombstone("ended", NOW), ())


@pytest.mark.parametrize("answer", [a for a in ANSWERS if a != "dead"])
def test_one_home_alone_settles_nothing(answer: str) -> None:
    """With one node configured SQL is always asked."""
    assert judge_copies(replies(answer), TIMING, NOW) is None
    assert judge_copies({}, TIMING, NOW) is None


@pytest.mark.parametrize("row", [ROWS["live"], ROWS["ahead"]])
def test_a_row_past_its_expiry_never_overrules_a_live_copy(row: RowLive) -> None:
    """The row hears of uses late; a copy that was used since keeps it alive."""
    old = RowLive(replace(row.record, last_use_ms=NOW - 2 * DAY))
    verdict = judge_row(replies("same", "miss"), old, TIMING, NOW)
    assert isinstance(verdict, Live)
    assert judge_row(replies("miss", "miss"), old, TIMING, NOW) == Gone("expired")


def test_a_row_that_was_set_back_is_written_at_its_own_version() -> None:
    """Copies that know a later version are from before SQL was restored."""
    ahead = replace(OTHER, row_version=9, synced_ms=NOW + HOUR)
    answers = {home: Hit(ahead, TOKENS[home]) for home in PAIR}
    verdict = judge_row(answers, RowLive(SAME), TIMING, NOW)
    assert isinstance(verdict, Live)
    assert verdict.record.payload() == OTHER.payload()
    assert (verdict.record.row_version, verdict.record.synced_ms) == (1, NOW)
    assert verdict.record.writes == 1
    assert verdict.repairs == PAIR


def test_no_tombstone_is_written_on_a_clocks_word() -> None:
    """An expired session is gone for the reader, and for nobody else."""
    for row in (RowLive(COPIES["expired"]), RowCorrupt(3)):  # type: ignore[arg-type]
        verdict = judge_row(replies("expired", "expired"), row, TIMING, NOW)
        assert verdict == Gone("expired", 0, None, ())


def test_after_an_insert_every_home_is_told() -> None:
    """Copies that say never synced have to hear of their row."""
    inserted = replace(SAME, row_version=1)
    live = confirmed(inserted, replies("never", "never"))
    assert live.repairs == PAIR


# --- writing ---------------------------------------------------------------------


def live(standing: Standing = Standing.AGREED, **fields: int | bool) -> Live:
    """A loaded session whose record has these fields."""
    return Live(replace(SAME, **fields), standing)  # type: ignore[arg-type]


NONE, DUE, LATE, REQUIRED = SqlNeed
FRESH = live()
OLD_VISITOR = live(never_synced=True, created_ms=NOW - 120 * SECOND)
STALE = live(synced_ms=NOW - 60 * SECOND)
NEEDS = [
    # (live, changed, required, homes, changes of the timing, need)
    (FRESH, False, False, 2, {}, NONE),
    (FRESH, True, False, 2, {}, NONE),
    (FRESH, False, True, 2, {}, REQUIRED),
    (STALE, False, False, 2, {}, DUE),
    (STALE, True, False, 2, {}, DUE),
    (live(synced_ms=NOW - 120 * SECOND), False, False, 2, {}, LATE),
    (live(synced_ms=NOW - 120 * SECOND), True, False, 2, {}, LATE),
    (live(synced_ms=NOW - 60 * SECOND + 1), True, False, 2, {}, NONE),
    (live(never_synced=True), False, False, 2, {}, DUE),
    (OLD_VISITOR, False, False, 2, {}, LATE),
    (live(Standing.CONFIRMED), True, False, 2, {}, REQUIRED),
    (live(Standing.CONFIRMED), False, False, 2, {}, NONE),
    (live(Standing.UNVERIFIED), True, False, 2, {}, NONE),
    (live(Standing.UNVERIFIED), True, True, 2, {}, REQUIRED),
    (live(Standing.UNVERIFIED, synced_ms=0), False, False, 2, {}, NONE),
    (FRESH, True, False, 1, {}, REQUIRED),
    (FRESH, True, False, 0, {}, REQUIRED),
    (FRESH, False, False, 1, {}, NONE),
    (STALE, False, False, 1, {}, DUE),
    (FRESH, True, False, 2, {"sync_ms": 0}, LATE),
    (FRESH, False, False, 2, {"sync_ms": 0}, NONE),
    (STALE, False, False, 2, {"sync_ms": 0}, DUE),
    (live(writes=1), False, False, 2, {"sync_ms": 0}, LATE),
    (live(writes=1), False, False, 1, {}, LATE),
    (live(writes=1), False, False, 2, {}, NONE),
    (live(writes=3), True, False, 2, {"sync_writes": 5}, NONE),
    (live(writes=4), True, False, 2, {"sync_writes": 5}, DUE),
    (live(writes=4), False, False, 2, {"sync_writes": 5}, NONE),
]


@pytest.mark.parametrize(
    ("loaded", "changed", "required", "homes", "terms", "need"), NEEDS
)
def test_whether_a_save_writes_sql(
    loaded: Live,
    changed: bool,
    required: bool,
    homes: int,
    terms: dict[str, int],
    need: SqlNeed,
) -> None:
    """Required for logins and degraded changes, due by time, else not at all."""
    found = sql_need(
        loaded,
        changed=changed,
        required=required,
        homes=homes,
        timing=timing(**terms),
        now_ms=NOW,
    )
    assert found is need


@pytest.mark.parametrize("in_sql", [False, True])
@pytest.mark.parametrize(("first", "second"), ACK_PAIRS)
def test_when_a_change_is_safe(first: Ack, second: Ack, in_sql: bool) -> None:
    """On both homes or in SQL, and a conflict always counts as one."""
    outcome = judge_acks({"a": first, "b": second}, homes=("a", "b"), in_sql=in_sql)
    if Ack.CONFLICT in (first, second):
        assert outcome is Outcome.CONFLICT
    elif in_sql or first is second is Ack.STORED:
        assert outcome is Outcome.ACKNOWLEDGED
    else:
        assert outcome is Outcome.SQL_NOW


def test_fewer_homes_than_two_are_never_enough() -> None:
    """One home, or one of two that could be written, is no second place."""
    stored = {"a": Ack.STORED}
    for acks, homes in ((stored, ("a", "b")), (stored, ("a",)), ({}, ())):
        assert judge_acks(acks, homes=homes, in_sql=False) is Outcome.SQL_NOW
        assert judge_acks(acks, homes=homes, in_sql=True) is Outcome.ACKNOWLEDGED


@pytest.mark.parametrize(("first", "second"), ACK_PAIRS)
def test_which_old_copies_must_go(first: Ack, second: Ack) -> None:
    """One that refused, unless the other home's new copy disagrees anyway."""
    acks = {"a": first, "b": second}
    refused = [name for name, ack in acks.items() if ack is Ack.REJECTED]
    if Ack.STORED in (first, second):
        refused = []
    token = Token(1, 1)
    assert to_remove(acks, {"a": token, "b": token}) == refused[:1]
    # What stands nowhere need not go, and who has read it would not notice.
    assert to_remove(acks, {"a": None, "b": token}) == refused[-1:]
