"""Who is alive: decisions on what was read, from answers to one whole verdict.

Two homes and SQL hold a session. What two live copies agree on needs no SQL; anything
else does, since a copy alone may be old, and a miss alone may be a restart. Nothing
here reads a clock, rolls dice or does I/O, so that each rule can be read, tested and
switched off on its own.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from .answers import (
    Corrupt,
    Hit,
    Miss,
    Reply,
    RowAnswer,
    RowCorrupt,
    RowDead,
    RowMissing,
    SqlSilent,
    Token,
    Unreachable,
)
from .lifetimes import Timing, expires_ms, overdue
from .record import (
    EndReason,
    Record,
    Tombstone,
    join_records,
    join_tombstones,
    same_state,
)
from .ring import PAIR

#: A request that moves a session has ended after this, whatever it waited for.
MOVE_AT_WORK_MS: Final = 60_000


class Standing(enum.Enum):
    """What a loaded session rests on."""

    #: Both homes hold the same state.
    AGREED = "agreed"
    #: SQL settled what the homes could not.
    CONFIRMED = "confirmed"
    #: SQL could not be asked; this is what the reachable copies hold.
    UNVERIFIED = "unverified"


@dataclass(frozen=True, slots=True)
class Live:
    """The session exists.

    :ivar record: the join of all that was found.
    :ivar writable: the homes that can be written, each with the token of what stands
        there, or None where nothing does.
    :ivar repairs: those whose copy is missing, corrupt, behind or not yet verified.
    """

    record: Record
    standing: Standing
    writable: Mapping[str, Token | None] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gone:
    """The session does not exist, on the word of a tombstone or of SQL.

    :ivar reason: ``missing`` is a session that SQL has never heard of or has reaped.
    :ivar ended_ms: when it was ended or moved; 0 otherwise.
    :ivar tombstone: what to write to the homes named in ``propagate_to``; None where
        no home needs to be told, or may be.
    :ivar held: a home holds, or may hold, a live copy of what SQL does not know. Should
        the row come back, as after a wrong backup, so does the session.
    """

    reason: EndReason | Literal["expired", "missing"]
    ended_ms: int = 0
    tombstone: Tombstone | None = None
    propagate_to: tuple[str, ...] = ()
    held: bool = False


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nobody can say whether the session exists."""


@dataclass(frozen=True, slots=True)
class InsertFirst:
    """The session was never synced: it lives once its row is inserted."""

    record: Record


@dataclass(frozen=True, slots=True)
class ReadAgain:
    """The homes were perhaps read between another request's two writes."""


@dataclass(frozen=True, slots=True)
class AskSql:
    """The homes do not settle it, or must not by themselves.

    :ivar agreed: what the homes agree on all the same.
    :ivar otherwise: what counts where SQL is silent.
    """

    agreed: Live | None = None
    otherwise: Live | None = None


# --- reading ---------------------------------------------------------------------


def judge_read(
    replies: Mapping[str, Reply],
    timing: Timing,
    now_ms: int,
    *,
    ask_sql: bool = False,
    may_read_again: bool = True,
) -> Live | Gone | ReadAgain | AskSql:
    """What one read of the homes amounts to; the first line that applies counts.

    :param replies: home -> reply, for all of the session's homes.
    :param ask_sql: SQL had a conflict, so that the homes' word is not enough.
    :param may_read_again: there is time for it, and it was not done yet.
    """
    settled = judge_copies(replies, timing, now_ms)
    if isinstance(settled, Gone):
        return settled
    if settled is not None and ask_sql:
        return AskSql(agreed=settled)
    if settled is not None and overdue(settled.record, timing, now_ms):
        return AskSql(agreed=settled, otherwise=settled)
    if settled is not None:
        return settled
    if may_read_again and not ask_sql and torn(replies):
        return ReadAgain()
    return AskSql()


def judge_copies(
    replies: Mapping[str, Reply], timing: Timing, now_ms: int
) -> Live | Gone | None:
    """What the homes settle by themselves; None: SQL has to be asked.

    :param replies: home -> reply, for all of the session's homes.
    """
    tombstone = tombstone_of(replies)
    if tombstone is not None:
        return _gone_at_home(tombstone, replies, now_ms)
    copies, names = live_copies(replies), frozenset(replies)
    if len(copies) != len(replies) or len(copies) < PAIR:
        return None
    for copy in copies:
        if not counts_for(copy, names) or not same_state(copy, copies[0]):
            return None
    record = join_all(copies)
    if expires_ms(record, timing) <= now_ms:
        return None
    return Live(record, Standing.AGREED, writable_of(replies))


def torn(replies: Mapping[str, Reply]) -> bool:
    """Whether the homes may only have been read between another's two writes.

    All hold a live copy that vouches for them, and only the states differ. Reading
    once more is cheaper than asking SQL, and as good: any later read is.
    """
    names = frozenset(replies)
    return len(replies) >= PAIR and all(
        isinstance(reply, Hit)
        and isinstance(reply.copy, Record)
        and counts_for(reply.copy, names)
        for reply in replies.values()
    )


def judge_row(
    replies: Mapping[str, Reply], row: RowAnswer, timing: Timing, now_ms: int
) -> Live | Gone | InsertFirst | Unknown:
    """What homes and SQL together say, where the homes alone did not settle it."""
    copies = live_copies(replies)
    if isinstance(row, RowDead):
        return gone_by_sql(row.tombstone, replies, now_ms)
    if isinstance(row, SqlSilent):
        if row.well or not copies:
            return Unknown()
        record = replace(join_all(copies), unverified=True)
        if expires_ms(record, timing) <= now_ms:
            return Unknown()
        return Live(record, Standing.UNVERIFIED, writable_of(replies))
    if isinstance(row, RowMissing):
        if any(isinstance(r, Unreachable) and r.sealed for r in replies.values()):
            # Others can read that copy: it may be one that was never synced.
            return Unknown()
        if not copies or not all(copy.never_synced for copy in copies):
            return _missing(replies, timing, now_ms)
        record = join_all(copies)
    elif isinstance(row, RowCorrupt):
        if not copies:
            return _missing(replies, timing, now_ms)
        record = replace(join_all(copies), row_version=row.version)
        record = replace(record, writes=max(record.writes, 1))
    else:
        record = join_all([row.record, *copies])
        # The row was read last, so that a copy which knows a later version is from
        # before SQL was set back to an older state.
        record = replace(
            record,
            row_version=row.record.row_version,
            synced_ms=min(record.synced_ms, row.record.synced_ms),
        )
        if not same_state(record, row.record):
            # The row is behind, which the bookkeeping of its own sync does not say.
            record = replace(record, writes=max(record.writes, 1))
    if expires_ms(record, timing) <= now_ms:
        return Gone("expired")
    if isinstance(row, RowMissing):
        return InsertFirst(record)
    return confirmed(record, replies)


def _missing(replies: Mapping[str, Reply], timing: Timing, now_ms: int) -> Gone:
    """A session that SQL does not know."""
    held = any(
        isinstance(reply, Unreachable)
        or (
            isinstance(reply, Hit)
            and isinstance(reply.copy, Record)
            and expires_ms(reply.copy, timing) > now_ms
        )
        for reply in replies.values()
    )
    return Gone("missing", held=held)


def confirmed(record: Record, replies: Mapping[str, Reply]) -> Live:
    """A session that SQL vouches for, and the homes that must be told."""
    record = replace(record, never_synced=False, unverified=False)
    names = frozenset(replies)
    writable = writable_of(replies)
    repairs = tuple(
        name for name in writable if not holds(replies[name], record, names)
    )
    return Live(record, Standing.CONFIRMED, writable, repairs)


def hits_of(replies: Mapping[str, Reply]) -> list[tuple[str, Hit]]:
    """The nodes that hold something of the session, and what."""
    return [(name, reply) for name, reply in replies.items() if isinstance(reply, Hit)]


def live_copies(replies: Mapping[str, Reply]) -> list[Record]:
    """The live copies among what the nodes hold."""
    return [hit.copy for _, hit in hits_of(replies) if isinstance(hit.copy, Record)]


def join_all(records: Sequence[Record]) -> Record:
    """What one or more records hold together."""
    joined = records[0]
    for record in records[1:]:
        # Copies of the same bytes are one object, and the rule.
        if record is not joined:
            joined = join_records(joined, record)
    return joined


def counts_for(copy: Record, homes: frozenset[str]) -> bool:
    """Whether a copy counts as a word on the session with these homes."""
    # A copy that names other homes was written under another configuration: its
    # writers may since have gone on elsewhere.
    return not copy.unverified and frozenset(copy.homes) == homes


def holds(reply: Reply, record: Record, homes: frozenset[str]) -> bool:
    """Whether a node holds exactly what SQL vouched for."""
    return (
        isinstance(reply, Hit)
        and isinstance(reply.copy, Record)
        and counts_for(reply.copy, homes)
        and not reply.copy.never_synced
        # One that has not heard of the last sync would try it again.
        and reply.copy.row_version == record.row_version
        and same_state(reply.copy, record)
    )


def writable_of(replies: Mapping[str, Reply]) -> dict[str, Token | None]:
    """Where a copy can be written, as in :class:`Live`."""
    writable: dict[str, Token | None] = {}
    for name, reply in replies.items():
        if isinstance(reply, (Hit, Corrupt)):
            writable[name] = reply.token
        elif isinstance(reply, Miss):
            writable[name] = None
    return writable


def tombstones_at(replies: Mapping[str, Reply]) -> list[str]:
    """The nodes that hold a tombstone already."""
    return [n for n, hit in hits_of(replies) if isinstance(hit.copy, Tombstone)]


def tombstone_of(replies: Mapping[str, Reply]) -> Tombstone | None:
    """What stands for the session where any of these nodes holds a tombstone."""
    found: Tombstone | None = None
    for _, hit in hits_of(replies):
        if isinstance(hit.copy, Tombstone):
            found = hit.copy if found is None else join_tombstones(found, hit.copy)
    return found


def being_moved(tombstone: Tombstone, now_ms: int) -> bool:
    """Whether the request that moves the session may still be at work.

    It buries the old copies by compare-and-swap, to find what others had acknowledged
    there meanwhile. Nobody else may bury one that it has still to look at.
    """
    at_work = now_ms - tombstone.ended_ms < MOVE_AT_WORK_MS
    return tombstone.reason == "moved" and at_work


def gone_by_sql(
    tombstone: Tombstone, replies: Mapping[str, Reply], now_ms: int
) -> Gone:
    """A session that is dead by the word of SQL."""
    if being_moved(tombstone, now_ms):
        return Gone(tombstone.reason, tombstone.ended_ms)
    return Gone(
        tombstone.reason, tombstone.ended_ms, tombstone, tuple(_not_dead(replies))
    )


def _gone_at_home(
    tombstone: Tombstone, replies: Mapping[str, Reply], now_ms: int
) -> Gone:
    """A session that is dead by the word of a home.

    Whoever moved it has buried that home's copy as it saw it, and what was acknowledged
    is on both homes: there is nothing left to be found on the other. That is not so
    where it was written by somebody for whom it had other homes.
    """
    propagate_to = _not_dead(replies)
    if being_moved(tombstone, now_ms):
        names = frozenset(replies)
        propagate_to = [
            name for name in propagate_to if not _foreign(replies[name], names)
        ]
    return Gone(tombstone.reason, tombstone.ended_ms, tombstone, tuple(propagate_to))


def _not_dead(replies: Mapping[str, Reply]) -> list[str]:
    return [
        name
        for name, reply in replies.items()
        if not isinstance(reply, Unreachable)
        and not (isinstance(reply, Hit) and isinstance(reply.copy, Tombstone))
    ]


def _foreign(reply: Reply, homes: frozenset[str]) -> bool:
    copy = reply.copy if isinstance(reply, Hit) else None
    return isinstance(copy, Record) and frozenset(copy.homes) != homes
