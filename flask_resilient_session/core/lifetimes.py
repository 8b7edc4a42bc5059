"""How long sessions, rows, tombstones and copies live, and when what is due.

All times are Unix milliseconds, and none is read here: now is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .record import Record, Tombstone

DAY_MS: Final = 24 * 60 * 60 * 1000

#: 30 days: memcached takes more seconds than these for a Unix date.
_MOST_SECONDS: Final = 30 * DAY_MS // 1000

#: The last such date. One after it, or one that is past for the node, memcached answers
#: with STORED, and holds nothing.
_LAST_DATE: Final = 2**31 - 1

#: Tombstones and copies outlive what they stand for by this: more than clocks differ.
_MARGIN_MS: Final = DAY_MS

#: Clocks that differ by more are apart: one of them is wrong, and says nothing.
CLOCKS_APART_MS: Final = 5 * 60_000

#: The shortest rest after which SQL is asked first, where every change is synced.
_REST_MS: Final = 60_000


#: The longest time in which uses are not recorded, where every change is synced.
_LONGEST_SLACK_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Timing:
    """The durations that depend on the session lifetime, in whole milliseconds.

    :param lifetime_ms: idle lifetime of a session.
    :param absolute_ms: longest life of a session however busy; None: no limit.
    :param sync_ms: least time between two SQL writes of a session; 0: every
        change is written.
    :param sync_writes: changes after which SQL is written whatever the time
        (a count); None: time alone decides.
    :param reap_grace_ms: how long after its expiry a row is left alone.
    """

    lifetime_ms: int
    absolute_ms: int | None
    sync_ms: int
    sync_writes: int | None
    reap_grace_ms: int

    @property
    def slack_ms(self) -> int:
        """How often a session in use has its idle time extended.

        With each sync; where every change is synced, once a minute or a tenth of the
        lifetime, whichever is less.
        """
        return self.sync_ms or max(1, min(_LONGEST_SLACK_MS, self.lifetime_ms // 10))


def expires_ms(record: Record, timing: Timing, *, slacks: int = 1) -> int:
    """When the session ends unless it is used again, in Unix milliseconds.

    Later uses are recorded once the slack has passed: they may be as much younger.

    :param slacks: how many of them the last use may have been unheard of.
    """
    idle = record.last_use_ms + timing.lifetime_ms + slacks * timing.slack_ms
    if timing.absolute_ms is None:
        return idle
    return min(idle, record.created_ms + timing.absolute_ms)


def row_expires_ms(record: Record, timing: Timing) -> int:
    """When the row may be looked at by the reaper: never before the session ends.

    The row hears of uses when it is synced, so it waits for one slack more.
    """
    return expires_ms(record, timing, slacks=2)


def tombstone_expires_ms(tombstone: Tombstone, timing: Timing) -> int:
    """When no copy of the session that it stands for can still be alive."""
    return tombstone.ended_ms + timing.lifetime_ms + 2 * timing.slack_ms + _MARGIN_MS


def exptime_seconds(until_ms: int, timing: Timing, now_ms: int) -> int:
    """memcached's expiry for something that matters until then; never 0.

    :returns: seconds from now up to 30 days, beyond that the Unix date in seconds.
    """
    remaining_ms = until_ms - now_ms + timing.reap_grace_ms + _MARGIN_MS
    seconds, now = max(1, remaining_ms // 1000), now_ms // 1000
    if seconds <= _MOST_SECONDS:
        return seconds
    date = min(now + seconds, _LAST_DATE)
    # In the last month before that date, and after it, seconds reach further.
    return date if date - now > _MOST_SECONDS else _MOST_SECONDS


def synced_at(before_ms: int, now_ms: int) -> int:
    """The time of a sync that is made now, after one that was made before.

    A clock that is a little behind does not undo the last one; one that was far ahead
    must not keep everybody from syncing until its time has come.
    """
    return now_ms if before_ms - now_ms > CLOCKS_APART_MS else max(before_ms, now_ms)


def touch_due(record: Record, timing: Timing, now_ms: int) -> bool:
    """Whether a use has to be recorded, or the session would end too early."""
    return now_ms - record.last_use_ms >= timing.slack_ms


def overdue(record: Record, timing: Timing, now_ms: int) -> bool:
    """Whether a pair has not heard of SQL for so long that SQL is asked first.

    The session may have been ended by somebody who reached SQL but no home. In use it
    meets that at its next sync. One that comes back from a long rest would be served
    once more before: for twice the interval it may, and no longer.
    """
    return since_sync_ms(record, now_ms) >= 2 * timing.sync_ms + _REST_MS


def since_sync_ms(record: Record, now_ms: int) -> int:
    """How long ago SQL heard of the session; what it never heard of, since creation."""
    synced_ms = record.created_ms if record.never_synced else record.synced_ms
    return now_ms - synced_ms
