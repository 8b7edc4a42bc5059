"""For how long a lone copy is trusted after SQL has vouched for it.

Off by default. While a home is down every request asks SQL about its sessions; with
``RESILIENT_SESSION_OUTAGE_TRUST`` a process asks once in that time, at the price of
serving state, and sessions that were ended elsewhere, up to that old. No clock and no
I/O here: ``now`` is passed in.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final, NamedTuple

from .record import Hit, Record, Reply, Stamp, Unreachable

#: Sessions remembered per process: at about 200 bytes each, a few megabytes.
_REMEMBERED: Final = 20_000


class _Vouched(NamedTuple):
    """What SQL vouched for, and until when (monotonic seconds)."""

    row_version: int
    newest: Stamp
    until: float


#: What stands for a session that has been ended: no answer vouches for it that is still
#: on its way, and after this many seconds none is.
_NOTHING: Final = _Vouched(1 << 63, (0, 0), 0.0)
_ON_ITS_WAY: Final = 60.0


class Trust:
    """Remembers which states SQL vouched for; shared by a process's threads.

    :param seconds: how long one is trusted; 0: never.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._vouched: OrderedDict[str, _Vouched] = OrderedDict()
        self._lock = threading.Lock()

    def vouch(self, session_key: str, record: Record, now: float) -> None:
        """SQL says, or has committed, that this is the session.

        :param now: when SQL was asked, and not when it answered.
        """
        if not self._seconds:
            return
        vouched = _Vouched(record.row_version, _newest(record), now + self._seconds)
        with self._lock:
            known = self._vouched.get(session_key)
            if (
                known is None
                or known.until <= now
                or (known.row_version <= vouched.row_version)
            ):
                self._remember(session_key, vouched)

    def forget(self, session_key: str, now: float) -> None:
        """The session is being ended, or is found to have been."""
        if self._seconds:
            with self._lock:
                self._remember(session_key, _NOTHING._replace(until=now + _ON_ITS_WAY))

    def _remember(self, session_key: str, vouched: _Vouched) -> None:
        self._vouched[session_key] = vouched
        self._vouched.move_to_end(session_key)
        if len(self._vouched) > _REMEMBERED:
            self._vouched.popitem(last=False)

    def renew(self) -> None:
        """Start anew in a forked child."""
        self._lock = threading.Lock()
        self._vouched.clear()

    def trusted(
        self, session_key: str, replies: Mapping[str, Reply], now: float
    ) -> Record | None:
        """The lone copy's record, if it is exactly what SQL vouched for.

        Only while its other home is down: one that answers and holds nothing, or
        something else, is a reason to ask.
        """
        if not self._seconds:
            return None
        vouched = self._vouched.get(session_key)
        if vouched is None or now >= vouched.until:
            return None
        copies = [reply for reply in replies.values() if isinstance(reply, Hit)]
        silent = sum(isinstance(reply, Unreachable) for reply in replies.values())
        if len(copies) != 1 or len(copies) + silent != len(replies):
            return None
        record = copies[0].copy
        if not isinstance(record, Record) or record.unverified:
            return None
        same = (record.row_version, _newest(record)) == vouched[:2]
        return record if same else None


def _newest(record: Record) -> Stamp:
    # Every change has a stamp above all others, so that the highest names the state.
    return max((entry.stamp for entry in record.entries.values()), default=record.floor)
