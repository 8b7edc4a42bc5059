"""For how long, and when, a lone copy is trusted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builders import record, session_key
from flask_resilient_session.record import (
    Corrupt,
    Entry,
    Hit,
    Miss,
    Record,
    Reply,
    Token,
    Tombstone,
    Unreachable,
)
from flask_resilient_session.trust import Trust

KEY = session_key("alice")
KNOWN = record()
LATER = replace(KNOWN, entries={**KNOWN.entries, "more": Entry(2**50, 1, b"\xa1x")})
DOWN = Unreachable("down")


def hit(copy: Record | Tombstone = KNOWN) -> Hit:
    """A home that holds this."""
    return Hit(copy, Token(1, 1))


def trusting(seconds: float = 10) -> Trust:
    """SQL has vouched for KNOWN at 100."""
    trust = Trust(seconds)
    trust.vouch(KEY, KNOWN, 100.0)
    return trust


def test_a_vouched_copy_is_trusted_for_its_time() -> None:
    """From the moment SQL spoke, and no longer."""
    replies: dict[str, Reply] = {"a": hit(), "b": DOWN}
    assert trusting().trusted(KEY, replies, 109.9) == KNOWN
    assert trusting().trusted(KEY, replies, 110.0) is None
    assert trusting().trusted(session_key("bob"), replies, 101) is None


def test_off_by_default() -> None:
    """With 0 seconds nothing is remembered."""
    trust = trusting(0)
    assert trust.trusted(KEY, {"a": hit(), "b": DOWN}, 100.0) is None
    assert not trust._vouched


@pytest.mark.parametrize(
    "replies",
    [
        {"a": hit(), "b": Miss()},
        {"a": hit(), "b": Corrupt(Token(1, 1))},
        {"a": hit(), "b": hit(LATER)},
        {"a": hit(LATER), "b": DOWN},
        {"a": hit(replace(KNOWN, row_version=KNOWN.row_version + 1)), "b": DOWN},
        {"a": hit(replace(KNOWN, unverified=True)), "b": DOWN},
        {"a": hit(Tombstone("ended", 1)), "b": DOWN},
        {"a": DOWN, "b": DOWN},
    ],
)
def test_anything_else_is_a_reason_to_ask(replies: dict[str, Reply]) -> None:
    """Another state, or another home that answers."""
    assert trusting().trusted(KEY, replies, 101.0) is None


def test_what_ended_is_forgotten() -> None:
    """A process does not trust what it ended itself."""
    trust = trusting()
    trust.forget(KEY, 100.0)
    replies: dict[str, Reply] = {"a": hit(), "b": DOWN}
    assert trust.trusted(KEY, replies, 101.0) is None
    # An answer that was on its way does not count, and a later one does: the end may
    # have been refused.
    trust.vouch(KEY, KNOWN, 101.0)
    assert trust.trusted(KEY, replies, 102.0) is None
    trust.vouch(KEY, KNOWN, 161.0)
    assert trust.trusted(KEY, replies, 162.0) == KNOWN


def test_an_older_answer_undoes_nothing() -> None:
    """What was asked for before this process wrote does not count any more."""
    trust = trusting()
    newer = replace(LATER, row_version=KNOWN.row_version + 1)
    trust.vouch(KEY, newer, 100.0)
    trust.vouch(KEY, KNOWN, 100.5)
    assert trust.trusted(KEY, {"a": hit(), "b": DOWN}, 101.0) is None
    assert trust.trusted(KEY, {"a": hit(newer), "b": DOWN}, 101.0) == newer


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sessions that were vouched for longest ago go first."""
    monkeypatch.setattr("flask_resilient_session.trust._REMEMBERED", 3)
    trust = Trust(10)
    names = [session_key(name) for name in "abcd"]
    for name in names:
        trust.vouch(name, KNOWN, 100.0)
    assert list(trust._vouched) == names[1:]
