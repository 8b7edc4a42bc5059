"""What creating, saving, ending and moving have in common."""

from __future__ import annotations

import random as random_module
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from ..common.clock import Clock
from ..common.errors import SessionTooLarge, SessionUnavailable, SqlUnavailable
from ..common.events import Observer, logger, short
from ..common.queue import KeyedQueue
from ..core.record import NONCE_BITS, Record, apply_changes
from .context import SessionContext
from .replicas import Homes
from .row import RowRepository

#: What a request did to a session: key -> encoded value, or None to delete it.
Changes: TypeAlias = Mapping[str, bytes | None]

#: A write that meets a concurrent one is read, joined and tried again this often.
#: Each round some request gets through, but not the same one's turn comes for sure:
#: eight threads of two workers that did nothing else needed up to 14. A round takes
#: about a millisecond, so that the deadline bounds them as well.
MAX_ATTEMPTS: Final = 40

#: Why a change was not kept.
NOBODY: Final = "neither its nodes nor SQL answer"
TOO_MANY: Final = "too many requests change it at once"


@dataclass(frozen=True)
class Steps:
    """The parts that every step works with, and the small steps they share.

    :ivar homes: the copies of sessions.
    :ivar rows: their rows.
    :ivar queue: lines up requests of this process that have met in a session.
    :ivar max_bytes: largest encoded session.
    :ivar random: nonces of stamps.
    """

    homes: Homes
    rows: RowRepository
    queue: KeyedQueue
    max_bytes: int
    clock: Clock
    random: random_module.Random
    observer: Observer

    def changed(self, record: Record, changes: Changes, now_ms: int) -> Record:
        """The record with the changes under a new stamp.

        :raises SessionTooLarge: it is too large, and larger than before.
        """
        if not changes:
            return record
        nonce = self.random.getrandbits(NONCE_BITS)
        changed = apply_changes(record, changes, now_ms, nonce)
        size = changed.size()
        # One that is over a lowered limit may still shrink.
        if size > self.max_bytes and size > record.size():
            raise SessionTooLarge(size, self.max_bytes)
        return changed

    def not_kept(self, context: SessionContext, why: object) -> SessionUnavailable:
        """The error of a change that is not acknowledged.

        :param why: ends the sentence "Session … was not changed: …".
        """
        self.observer.count("unavailable")
        if isinstance(why, SqlUnavailable):
            # A driver's words name hosts and users: for the log, not for visitors.
            name = short(context.session_key)
            logger.warning("Session %s was not changed: %s", name, why)
            why = "SQL does not answer"
        return SessionUnavailable(
            f"Session {short(context.session_key)} was not changed: {why}."
        )
