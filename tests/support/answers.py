"""What homes and SQL may answer, and what their copies join to."""

from __future__ import annotations

from dataclasses import replace

from builders import DAY, FIRST_HOME, HOUR, NOW, PAIR, SECOND_HOME, record, timing
from flask_resilient_session.core.answers import (
    Corrupt,
    Hit,
    Miss,
    Reply,
    RowAnswer,
    RowCorrupt,
    RowDead,
    RowLive,
    RowMissing,
    SqlSilent,
    Token,
    Unreachable,
)
from flask_resilient_session.core.record import Entry, Record, Tombstone, join_records

TIMING = timing()
DEAD = Tombstone("ended", NOW - HOUR)
SAME = record({"name": Entry(NOW, 1, b"same")})
OTHER = record({"name": Entry(NOW + 1, 1, b"other")})

COPIES: dict[str, Record | Tombstone] = {
    "same": SAME,
    "other": OTHER,
    "elsewhere": replace(SAME, homes=(FIRST_HOME, "stranger")),
    "unverified": replace(SAME, unverified=True),
    "never": replace(SAME, never_synced=True, row_version=0, synced_ms=0),
    "expired": replace(SAME, last_use_ms=NOW - DAY - TIMING.slack_ms),
    "dead": DEAD,
}
ANSWERS = (*COPIES, "miss", "unreachable", "corrupt")
ROWS: dict[str, RowAnswer] = {
    "live": RowLive(SAME),
    "ahead": RowLive(record({"name": Entry(NOW + 9, 1, b"from sql")}, row_version=2)),
    "dead": RowDead(replace(DEAD, reason="moved")),
    "missing": RowMissing(),
    "corrupt": RowCorrupt(version=8),
    "silent": SqlSilent("down"),
}
TOKENS = {FIRST_HOME: Token(11, 1), SECOND_HOME: Token(22, 2)}


def reply(answer: str, home: str) -> Reply:
    """What a home of this name answers."""
    if answer == "miss":
        return Miss()
    if answer == "unreachable":
        return Unreachable("down")
    if answer == "corrupt":
        return Corrupt(TOKENS[home])
    return Hit(COPIES[answer], TOKENS[home])


def replies(*answers: str) -> dict[str, Reply]:
    """What the homes answer, the first home first."""
    return {
        home: reply(answer, home) for home, answer in zip(PAIR, answers, strict=False)
    }


def live_copies(*answers: str) -> list[Record]:
    """The live copies among these answers."""
    copies = [COPIES[answer] for answer in answers if answer in COPIES]
    return [copy for copy in copies if isinstance(copy, Record)]


def joined(*copies: Record) -> Record:
    """The join of some copies."""
    whole = copies[0]
    for copy in copies[1:]:
        whole = join_records(whole, copy)
    return whole
