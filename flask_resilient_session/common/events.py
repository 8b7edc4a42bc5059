"""What happened, for those who listen: signals, counters and the log.

Sessions are named by the first characters of their key, a digest; the id itself
never gets here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any, Final

from blinker import Namespace

logger = logging.getLogger("flask_resilient_session")

_signals = Namespace()

#: Sent with ``session`` (short digest) when a session is stored for the first time.
session_created = _signals.signal("session-created")
#: Sent with ``session`` and ``previous`` (short digests).
session_regenerated = _signals.signal("session-regenerated")
#: Sent with ``session`` when a session is ended for good: logout or revocation.
session_revoked = _signals.signal("session-revoked")
#: Sent by the reaper with ``session`` and ``data``, the final content (None where it
#: cannot be read), when a session is removed because its time was over.
session_expired = _signals.signal("session-expired")
#: Sent with ``session`` when SQL had to settle what the nodes could not.
session_recovered = _signals.signal("session-recovered")
#: Sent with ``session`` when a write is read again, joined and tried again: another
#: request wrote first, or a node was restarted.
session_conflict = _signals.signal("session-conflict")
#: Sent with ``node`` and ``reason`` when this process starts to skip a node.
node_down = _signals.signal("node-down")
#: Sent with ``node`` when this process uses a node again.
node_up = _signals.signal("node-up")

#: Every counter and what it counts.
COUNTERS: Final[Mapping[str, str]] = {
    "round_trips": "exchanges with nodes that a request waited for, parallel ones once",
    "loaded_from_memory": "sessions settled by the nodes alone",
    "loaded_from_sql": "sessions that SQL had to settle",
    "loaded_unverified": "sessions served from one copy while SQL was unreachable",
    "unavailable": "sessions that nobody could vouch for, and changes refused (503)",
    "created": "sessions stored for the first time",
    "regenerated": "sessions moved to a new id",
    "revoked": "sessions ended",
    "synced": "writes to SQL",
    "syncs_put_off": "due writes to SQL that had to wait",
    "repaired": "copies brought up to date",
    "corrupt_copies": "copies that were no record of their session",
    "corrupt_rows": "rows that were no record of their session",
    "conflicts": "writes that were read, joined and tried again",
    "dropped_changes": "changes dropped because the session had ended meanwhile",
    "node_faults": "exchanges with a node that failed",
    "sql_faults": "SQL calls that failed",
}

#: Characters of the session key that stand for it in messages.
_SHORT: Final = 12


def short(session_key: str) -> str:
    """The short digest that names a session in logs, errors and signals."""
    return session_key[:_SHORT]


class Stats(Mapping[str, int]):
    """Counters of this process; reading one never blocks a request."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._lock = threading.Lock()

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter.

        :raises KeyError: there is no such counter.
        """
        with self._lock:
            self._counts[name] += amount

    def renew(self) -> None:
        """Take a lock of its own in a forked child; the counts go on."""
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def __iter__(self) -> Any:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)


class Observer:
    """Counts, signals and logs on behalf of one application.

    :param sender: what listeners get as the sender: the application.
    """

    def __init__(self, sender: object) -> None:
        self.stats = Stats()
        self._sender = sender

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        self.stats.count(name, amount)

    def send(self, signal: Any, **fields: object) -> None:
        """Tell the listeners; one that fails is logged and hurts nobody else."""
        if not signal.receivers:
            return
        for listener in signal.receivers_for(self._sender):
            try:
                listener(self._sender, **fields)
            except Exception:  # a listener's bug must not lose a session
                logger.exception("A listener of %s failed.", signal.name)
