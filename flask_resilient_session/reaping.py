"""Whether a row that is past its time may go: from answers to one verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from .config import Timing
from .record import Record, Reply, Tombstone, Unreachable
from .replication import (
    RowAnswer,
    RowCorrupt,
    RowDead,
    RowLive,
    SqlSilent,
    join_all,
    live_copies,
    tombstone_of,
)
from .times import expires_ms


@dataclass(frozen=True, slots=True)
class Reap:
    """The row may be deleted."""


@dataclass(frozen=True, slots=True)
class Renew:
    """The session is alive: the row is to hold this."""

    record: Record


@dataclass(frozen=True, slots=True)
class Bury:
    """The session was ended while SQL could not be told."""

    tombstone: Tombstone


@dataclass(frozen=True, slots=True)
class Keep:
    """The row stays as it is, since it cannot be checked now."""

    reason: str


ReapVerdict: TypeAlias = Reap | Renew | Bury | Keep


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
        return Bury(replace(tombstone, debt=False))
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
