"""The durable copy as the protocol sees it: records in, answers out.

Between the store's records and SQL's rows: seals and versions, a breaker, and a turn
at the gate of those who ask SQL.
"""

from __future__ import annotations

import contextlib
import hashlib
import random as random_module
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from ..common.breaker import Breaker
from ..common.clock import Clock
from ..common.errors import SqlBusy, SqlUnavailable
from ..common.events import Observer, logger, short
from ..common.patience import Patience
from ..core.answers import (
    RowAnswer,
    RowCorrupt,
    RowDead,
    RowLive,
    RowMissing,
    SqlSilent,
)
from ..core.envelope import CorruptBytes, Keyring, UnknownFormat
from ..core.lifetimes import row_expires_ms, synced_at, tombstone_expires_ms
from ..core.record import EndReason, Record, Tombstone
from ..core.values import decode_value
from ..sql.gate import Gate
from ..sql.statements import SqlTable
from ..sql.table import USER_ID_LENGTH, Row
from .context import SessionContext

_Result = TypeVar("_Result")

#: The version of a row that was just inserted.
_FIRST_VERSION: Final = 1

#: Seconds that make no difference between two durations.
_MOMENT: Final = 0.001

#: The deadline of a call that has SQL's whole timeout, which begins when it is made.
_NEVER: Final = float("inf")

#: Ends that a process remembers while SQL does not answer; about 300 bytes each.
_MOST_DEBTS: Final = 1000


class RowRepository:
    """Reads and writes the rows of sessions.

    :param gate: how many ask SQL at once, and who is next.
    :param user_key: the session key that holds the user.
    """

    def __init__(
        self,
        sql: SqlTable,
        *,
        breaker: Breaker,
        gate: Gate,
        sql_timeout: float,
        user_key: str,
        clock: Clock,
        random: random_module.Random,
        observer: Observer,
    ) -> None:
        self._sql = sql
        self._breaker = breaker
        self._gate = gate
        self._sql_timeout = sql_timeout
        self._debts: deque[Row] = deque(maxlen=_MOST_DEBTS)
        self._user_key = user_key
        self._clock = clock
        self._random = random
        self._observer = observer

    def read(self, context: SessionContext) -> RowAnswer:
        """What SQL says about a session; silence is an answer, not an error."""
        try:
            row = self._ask(
                partial(self._sql.read, context.session_key),
                context.patience,
                writes=False,
            )
        except SqlUnavailable as error:
            return silence(error)
        return RowMissing() if row is None else self.open_row(row, context.keyring)

    def open_row(self, row: Row, keyring: Keyring) -> RowAnswer:
        """A row as an answer: verified, its record carrying the row's version."""
        if row.revoked_at is not None or row.record is None:
            reason: EndReason = "moved" if row.reason == "moved" else "ended"
            return RowDead(Tombstone(reason, row.revoked_at or row.synced_at))
        copy = keyring.unseal(row.session_key, row.record)
        if isinstance(copy, UnknownFormat):
            return SqlSilent("its row is under a key or format unknown here")
        if isinstance(copy, Tombstone):
            return RowDead(copy)
        if isinstance(copy, CorruptBytes):
            self._observer.count("corrupt_rows")
            logger.error(
                "The row of session %s is not a record of that session.",
                short(row.session_key),
            )
            return RowCorrupt(row.version)
        return RowLive(replace(copy, row_version=row.version, never_synced=False))

    def insert(
        self, context: SessionContext, record: Record, *, can_wait: bool = False
    ) -> Record | None:
        """Insert the row of a session.

        :param can_wait: it may as well be done by a later request, so that it is not
            done while many requests ask SQL.
        :returns: the record as the row holds it; None where a row stands already.
        :raises SqlUnavailable: SQL did not answer.
        """
        synced = self._synced(record, _FIRST_VERSION)
        row = self._row(context, synced)
        inserted = self._ask(
            partial(self._sql.insert, row),
            context.patience,
            can_wait=can_wait,
        )
        return self._counted(synced) if inserted else None

    def update(
        self, context: SessionContext, record: Record, *, can_wait: bool = False
    ) -> Record | None:
        """Write a record over the row of the version that it knows.

        :param can_wait: as in :meth:`insert`.
        :returns: the record as the row holds it; None where the row is of another
            version, dead or missing.
        :raises SqlUnavailable: SQL did not answer.
        """
        seen = record.row_version
        synced = self._synced(record, seen + 1)
        row = self._row(context, synced)
        updated = self._ask(
            partial(self._sql.update, row, seen),
            context.patience,
            can_wait=can_wait,
        )
        return self._counted(synced) if updated else None

    def put_tombstone(
        self, context: SessionContext, tombstone: Tombstone, record: Record | None
    ) -> None:
        """End a session in SQL; one that is dead already stays as it is.

        :param record: what is known of it.
        :raises SqlUnavailable: SQL did not answer.
        """
        row = self._tombstone_row(context, tombstone, record)
        has_row = record is None or not record.never_synced
        self._ask(
            partial(self._sql.put_tombstone, row, has_row=has_row),
            context.patience,
        )

    def owe(
        self, context: SessionContext, tombstone: Tombstone, record: Record | None
    ) -> None:
        """Remember an end that only the homes know, until SQL answers again.

        A reader would pay the debt, but who has logged out may never come back, and
        both homes forget when they are restarted, one after the other.
        """
        self._debts.append(self._tombstone_row(context, tombstone, record))

    def move(
        self,
        old: SessionContext,
        old_record: Record,
        tombstone: Tombstone,
        new: SessionContext,
        new_record: Record,
    ) -> Record | None:
        """End one session and insert another, both or neither.

        :returns: the new record as its row holds it; None where the old row is not
            as ``old_record`` knows it.
        :raises SqlUnavailable: SQL did not answer.
        """
        synced = self._synced(new_record, _FIRST_VERSION)
        tombstone_row = self._tombstone_row(old, tombstone, old_record)
        new_row = self._row(new, synced)
        seen = None if old_record.never_synced else old_record.row_version
        moved = self._ask(
            partial(self._sql.move, tombstone_row, new_row, seen_version=seen),
            new.patience,
        )
        return self._counted(synced) if moved else None

    def renew(self) -> None:
        """Start anew in a forked child."""
        self._breaker.renew()
        self._gate.renew()

    def _counted(self, record: Record) -> Record:
        self._observer.count("synced")
        return record

    def _synced(self, record: Record, version: int) -> Record:
        return replace(
            record,
            synced_ms=synced_at(record.synced_ms, self._clock.now_ms()),
            row_version=version,
            writes=0,
            never_synced=False,
            unverified=False,
        )

    def _row(self, context: SessionContext, record: Record) -> Row:
        return Row(
            session_key=context.session_key,
            version=record.row_version,
            record=context.keyring.seal(context.session_key, record),
            user_id=self._user_id(record),
            homes=record.homes,
            created_at=record.created_ms,
            synced_at=record.synced_ms,
            expires_at=row_expires_ms(record, context.timing),
        )

    def _tombstone_row(
        self, context: SessionContext, tombstone: Tombstone, record: Record | None
    ) -> Row:
        return Row(
            session_key=context.session_key,
            version=_FIRST_VERSION if record is None else record.row_version + 1,
            record=None,
            user_id=None,
            homes=() if record is None else record.homes,
            created_at=tombstone.ended_ms if record is None else record.created_ms,
            synced_at=tombstone.ended_ms,
            expires_at=tombstone_expires_ms(tombstone, context.timing),
            revoked_at=tombstone.ended_ms,
            reason=tombstone.reason,
        )

    def _user_id(self, record: Record) -> str | None:
        entry = record.entries.get(self._user_key)
        if entry is None or entry.value is None:
            return None
        return user_id_column(decode_value(entry.value))

    def _ask(
        self,
        call: Callable[[float], _Result],
        patience: Patience,
        *,
        writes: bool = True,
        can_wait: bool = False,
    ) -> _Result:
        """Make a call when its turn has come; SQL's own time begins then.

        :param call: is given a monotonic deadline, beside SQL's own timeout.
        :param writes: it goes before those who read.
        :param can_wait: make it only where nobody else wants the place.
        """
        wait = min(self._sql_timeout, patience.left)
        if wait <= 0:
            # Not SQL's fault, so that its breaker does not hear of it.
            raise SqlBusy("this request has waited for too long to ask SQL as well")
        slot = self._gate.slot(0 if can_wait else wait, writes=writes)
        with contextlib.ExitStack() as stack:
            with patience.waiting(self._sql_timeout):
                stack.enter_context(slot)
            return self._guarded(call, patience)

    def _guarded(self, call: Callable[[float], _Result], patience: Patience) -> _Result:
        """Make a call, and let the breaker know what became of it."""
        given = patience.left
        short = given < self._sql_timeout - _MOMENT
        if given <= 0:
            raise SqlBusy("this request's time was over when its turn at SQL came")
        began = self._clock.monotonic()
        if not self._breaker.admits(began):
            raise SqlUnavailable("SQL is skipped for a while after failures")
        try:
            with patience.waiting(self._sql_timeout):
                result = call(began + given if short else _NEVER)
        except SqlBusy:
            raise
        except SqlUnavailable as error:
            if short and self._clock.monotonic() - began >= given:
                # It had less than its time, and may be well.
                raise SqlBusy(f"this request waited elsewhere, then: {error}") from None
            self._observer.count("sql_faults")
            if self._breaker.failed(
                self._clock.monotonic(),
                refused=False,
                jitter=self._random.random(),
            ):
                logger.warning("SQL is skipped for a while: %s", error)
            raise
        if self._breaker.succeeded(self._clock.monotonic()):
            logger.info("SQL answers again.")
        if self._debts:
            self._pay(patience)
        return result

    def _pay(self, patience: Patience) -> None:
        """Pay one debt with the call that has just shown that SQL answers."""
        if patience.is_over:
            return
        try:
            row = self._debts.popleft()
        except IndexError:  # another thread was faster
            return
        try:
            with patience.waiting(self._sql_timeout):
                until = self._clock.monotonic() + patience.left
                self._sql.put_tombstone(row, until, has_row=True)
        except SqlUnavailable:
            self._debts.append(row)


def silence(error: SqlUnavailable) -> SqlSilent:
    """What it means for a session that SQL was not asked, or did not answer."""
    return SqlSilent(str(error), well=isinstance(error, SqlBusy))


def user_id_column(user: object) -> str | None:
    """How a user is written in the ``user_id`` column.

    A long one becomes its SHA-256, so that it can be indexed, and so does one with
    characters that not every database stores.
    """
    if user is None:
        return None
    text = str(user)
    if len(text) > USER_ID_LENGTH or not text.isprintable():
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return text
