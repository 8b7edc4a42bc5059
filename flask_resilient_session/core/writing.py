"""What a save has to do, and whether what was written is safe: pure decisions."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence

from .answers import Ack, Token
from .lifetimes import CLOCKS_APART_MS, Timing, since_sync_ms
from .reading import Live, Standing
from .ring import PAIR


class SqlNeed(enum.Enum):
    """Whether a save writes SQL."""

    NONE = "none"
    #: Put off where SQL cannot take it at once.
    DUE = "due"
    #: Waits its turn as any change does; put off where SQL does not answer.
    LATE = "late"
    #: Nothing is acknowledged without it.
    REQUIRED = "required"


def sql_need(
    live: Live,
    *,
    changed: bool,
    required: bool,
    homes: int,
    timing: Timing,
    now_ms: int,
) -> SqlNeed:
    """Whether this save writes SQL before it writes the homes.

    :param changed: the request changed the session.
    :param required: it changed the user, or asked for a sync.
    :param homes: number of homes that the session has by configuration.
    """
    if required:
        return SqlNeed.REQUIRED
    if live.standing is Standing.UNVERIFIED:
        return SqlNeed.NONE
    if changed and (live.standing is not Standing.AGREED or homes < PAIR):
        return SqlNeed.REQUIRED
    record = live.record
    if (timing.sync_ms == 0 or homes < PAIR) and (changed or record.writes > 0):
        return SqlNeed.LATE
    since_ms = since_sync_ms(record, now_ms)
    if since_ms >= 2 * timing.slack_ms:
        return SqlNeed.LATE
    due = (
        # Its cookie came back, so that one which never had a row is worth it.
        record.never_synced
        or since_ms >= timing.slack_ms
        or since_ms < -CLOCKS_APART_MS
        or (
            changed
            and timing.sync_writes is not None
            and record.writes + 1 >= timing.sync_writes
        )
    )
    return SqlNeed.DUE if due else SqlNeed.NONE


def must_be_read(live: Live, homes: Sequence[str]) -> bool:
    """Whether what stands in the homes was never read: it was just created or moved.

    :param homes: the homes that the session has by configuration.
    """
    return live.standing is Standing.AGREED and len(live.writable) < len(homes)


class Outcome(enum.Enum):
    """What the homes' answers to a write amount to."""

    #: The change is in two places, or in SQL.
    ACKNOWLEDGED = "acknowledged"
    #: Too few homes have it: SQL must take it now.
    SQL_NOW = "sql now"
    #: Somebody else wrote in between: read again and join.
    CONFLICT = "conflict"


def judge_acks(
    acks: Mapping[str, Ack], *, homes: Sequence[str], in_sql: bool
) -> Outcome:
    """Whether a change is safe.

    :param acks: answers of the nodes that were written.
    :param homes: the homes that the session has by configuration.
    :param in_sql: SQL committed the change before.
    """
    if Ack.CONFLICT in acks.values():
        return Outcome.CONFLICT
    if in_sql:
        return Outcome.ACKNOWLEDGED
    if len(homes) >= PAIR and all_stored(acks, homes):
        return Outcome.ACKNOWLEDGED
    return Outcome.SQL_NOW


def is_ended(
    acks: Mapping[str, Ack], *, homes: Sequence[str], names: Iterable[str]
) -> bool:
    """Whether an end may be acknowledged that SQL could not be told.

    :param acks: answers of the nodes to the tombstone.
    :param homes: the homes that the session has by configuration.
    :param names: all nodes that were told.
    """
    return len(homes) >= PAIR and all_stored(acks, names)


def all_stored(acks: Mapping[str, Ack], names: Iterable[str]) -> bool:
    """Whether each of these nodes took what was written."""
    return all(acks.get(name) is Ack.STORED for name in names)


def to_remove(
    acks: Mapping[str, Ack], writable: Mapping[str, Token | None]
) -> list[str]:
    """The home whose old copy must go, after SQL took a change that no home did.

    A refused write leaves the old value readable. Two such copies would still agree
    with each other, and nobody would ask SQL. One is enough, and no more: there may
    be room again, and the other home may have taken another request's write since.

    :param acks: answers of the homes that were written.
    :param writable: what stood there, as in :class:`Live`: what stood somewhere goes
        first, so that others who have read the same write in vain.
    """
    if Ack.STORED in acks.values():
        return []
    rejected = [name for name, ack in acks.items() if ack is Ack.REJECTED]
    return sorted(rejected, key=lambda name: writable.get(name) is None)[:1]
