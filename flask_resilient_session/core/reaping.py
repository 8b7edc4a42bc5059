"""Whether a row that is past its time may go: from answers to one verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from .answers import (
    Reply,
    RowAnswer,
    RowCorrupt,
    RowDead,
    RowLive,
    SqlSilent,
    Unreachable,
)
from .lifetimes import CLOCKS_APART_MS, Timing, expires_ms
from .reading import join_all, live_copies, tombstone_of
from .record import Record, Tombstone


@dataclass(frozen=True, slots=True)
class Reap:
    """The row may be deleted."""


@dataclass(frozen=True, slots=True)
class Renew:
    """The session is alive: the row is to hold this."""

    record: Record


@dataclass(frozen=True, slots=True)
class PutTombstone:
    """The session was ended while SQL could not be told."""

    tombstone: Tombstone


@dataclass(frozen=True, slots=True)
class Keep:
    """The row stays as it is, since it cannot be checked now."""

    reason: str


ReapVerdict: TypeAlias = Reap | Renew | PutTombstone | Keep


def apart_from_database(now_ms: int, database_ms: int | None) -> str | None:
    """What is wrong between this host's clock and its database's; None: nothing.

    A host that is ahead would delete what is alive. Which of the two clocks is the
    wrong one cannot be seen, so that either direction counts.

    :param database_ms: the database's clock; None where it has none of its own.
    """
    ahead_ms = 0 if database_ms is None else now_ms - database_ms
    if abs(ahead_ms) <= CLOCKS_APART_MS:
        return None
    where = "ahead of" if ahead_ms > 0 else "behind"
    return f"this host's clock is {abs(ahead_ms) // 1000} s {where} the database's"


def written_ahead(now_ms: int, written_ms: Mapping[str, int]) -> str | None:
    """Which row was written too far in this host's future; None: none of them.

    :param written_ms: short digest of a session -> when its row was written.
    """
    for session, then_ms in written_ms.items():
        if then_ms - now_ms > CLOCKS_APART_MS:
            return (
                f"the row of session {session} was written"
                f" {(then_ms - now_ms) // 1000} s in this host's future"
            )
    return None


def may_reap(
    row: RowAnswer,
    replies: Mapping[str, Reply],
    timing: Timing,
    now_ms: int,
    row_expires_at: int,
) -> ReapVerdict:
    """What to do with a row that is past its time.

    :param replies: the reply of every home that the session may live on.
    :param row_expires_at: the row's own word on its time, for one that cannot be read.
    """
    silent = [n for n, reply in replies.items() if isinstance(reply, Unreachable)]
    if silent:
        return Keep(f"no answer from {', '.join(sorted(silent))}")
    copies = live_copies(replies)
    if isinstance(row, SqlSilent):
        # Sealed under a key that is not known here: perhaps not yet, and then some
        # worker uses it, or no more, and then nobody ever will.
        forgotten = row_expires_at + timing.lifetime_ms <= now_ms
        return Reap() if forgotten and not copies else Keep(row.reason)
    if isinstance(row, RowDead):
        # A copy that could still be served is the reason to keep the tombstone.
        alive = any(expires_ms(copy, timing) > now_ms for copy in copies)
        return Keep("a node still holds a copy") if alive else Reap()
    tombstone = tombstone_of(replies)
    if tombstone is not None:
        return PutTombstone(replace(tombstone, debt=False))
    if isinstance(row, RowLive):
        copies.append(row.record)
    if not copies:
        return Reap()
    record = join_all(copies)
    if expires_ms(record, timing) <= now_ms:
        return Reap()
    if isinstance(row, RowCorrupt):
        record = replace(record, row_version=row.version)
    return Renew(replace(record, never_synced=False, unverified=False))
