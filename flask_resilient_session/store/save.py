"""Creating and saving: the order of the steps that keep a request's changes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

from ..common.errors import SqlUnavailable
from ..common.events import session_conflict, session_created, short
from ..core.answers import Ack
from ..core.lifetimes import touch_due
from ..core.reading import Gone, Live, Standing, Unknown
from ..core.record import Record, drop_markers
from ..core.ring import PAIR
from ..core.writing import Outcome, SqlNeed, judge_acks, must_be_read, sql_need
from .context import SessionContext
from .load import Loader
from .steps import MAX_ATTEMPTS, NOBODY, TOO_MANY, Changes, Steps


class _Conflict(Exception):
    """Somebody else wrote in between.

    :ivar ask_sql: it was noticed in SQL, so that the homes' word is not enough.
    """

    def __init__(self, *, ask_sql: bool) -> None:
        super().__init__()
        self.ask_sql = ask_sql


class Saver:
    """Creates sessions and keeps what requests change in them."""

    def __init__(self, steps: Steps, loader: Loader) -> None:
        self._steps = steps
        self._loader = loader
        self._homes = steps.homes
        self._rows = steps.rows
        self._clock = steps.clock
        self._observer = steps.observer
        self._queue = steps.queue

    # --- create ------------------------------------------------------------------

    def create(
        self, context: SessionContext, changes: Changes, *, required: bool
    ) -> Live:
        """Store a session under a new id.

        :param required: write SQL before anything is acknowledged; without it a
            session gets its row when its cookie comes back.
        :raises SessionTooLarge: nothing is stored.
        """
        now_ms = self._clock.now_ms()
        homes = self._homes.names(context)
        empty = Record(
            created_ms=now_ms, last_use_ms=now_ms, never_synced=True, homes=homes
        )
        record = self._steps.changed(empty, changes, now_ms)
        in_sql = required or len(homes) < PAIR
        if in_sql:
            record = self._insert_new(context, record)
        acks = self._homes.write(context, record, dict.fromkeys(homes), now_ms)
        outcome = judge_acks(acks, homes=homes, in_sql=in_sql)
        if not in_sql and outcome is not Outcome.ACKNOWLEDGED:
            record = self._insert_new(context, record)
        self._observer.count("created")
        self._observer.send(session_created, session=short(context.session_key))
        return Live(record, Standing.AGREED)

    def _insert_new(self, context: SessionContext, record: Record) -> Record:
        try:
            inserted = self._rows.insert(context, record)
        except SqlUnavailable as error:
            raise self._steps.not_kept(context, error) from error
        if inserted is None:
            raise self._steps.not_kept(context, "its new id is taken")
        return inserted

    # --- save --------------------------------------------------------------------

    def save(
        self,
        context: SessionContext,
        live: Live,
        changes: Changes,
        *,
        required: bool = False,
    ) -> Live | Gone:
        """Keep one request's changes, or only the fact that it used the session.

        :param live: what the request loaded.
        :param changes: key -> encoded value, or None to delete it.
        :param required: acknowledge only what SQL has committed.
        :returns: the session as it is kept, or Gone: it was ended meanwhile and the
            changes are dropped.
        :raises SessionTooLarge: nothing was changed.
        """
        with contextlib.ExitStack() as turn:
            return self._save(context, live, changes, required, turn)

    def _save(
        self,
        context: SessionContext,
        live: Live,
        changes: Changes,
        required: bool,
        turn: contextlib.ExitStack,
    ) -> Live | Gone:
        courtesy = not changes and not required
        for attempt in range(MAX_ATTEMPTS):
            try:
                in_turn = attempt > 0
                return self._attempt(context, live, changes, required, in_turn)
            except _Conflict as conflict:
                self._observer.count("conflicts")
                self._observer.send(
                    session_conflict, session=short(context.session_key)
                )
                ask_sql = conflict.ask_sql
            if context.patience.is_over:
                break
            if attempt == 0:
                wait = context.patience.left
                with context.patience.waiting(wait):
                    turn.enter_context(self._queue.take(context.session_key, wait))
            verdict = self._loader.load(context, ask_sql=ask_sql)
            if isinstance(verdict, Gone):
                return verdict
            if isinstance(verdict, Unknown):
                if courtesy:
                    return live
                raise self._steps.not_kept(context, NOBODY)
            live = verdict
        if courtesy:
            return live
        raise self._steps.not_kept(context, TOO_MANY)

    def _attempt(
        self,
        context: SessionContext,
        live: Live,
        changes: Changes,
        required: bool,
        in_turn: bool,
    ) -> Live:
        now_ms = self._clock.now_ms()
        homes = self._homes.names(context)
        if must_be_read(live, homes):
            raise _Conflict(ask_sql=False)
        need = sql_need(
            live,
            changed=bool(changes),
            required=required,
            homes=len(homes),
            timing=context.timing,
            now_ms=now_ms,
        )
        record, in_sql = self._to_store(context, live, changes, need, now_ms)
        if not changes:
            self._keep_times(context, live, record, in_sql=in_sql, now_ms=now_ms)
            return replace(live, record=record)
        write = self._homes.write_in_turn if in_turn else self._homes.write
        acks = write(context, record, live.writable, now_ms)
        self._count_repaired(live, acks)
        outcome = judge_acks(acks, homes=homes, in_sql=in_sql)
        if outcome is Outcome.CONFLICT:
            # What SQL took has a stamp that the homes may not show: ask it, so that
            # the next one is higher.
            raise _Conflict(ask_sql=in_sql)
        if outcome is Outcome.SQL_NOW:
            record = self._write_row_now(context, live, record)
        self._homes.remove_rejected(context, acks, live.writable)
        return replace(live, record=record)

    def _to_store(
        self,
        context: SessionContext,
        live: Live,
        changes: Changes,
        need: SqlNeed,
        now_ms: int,
    ) -> tuple[Record, bool]:
        """The record to write to the homes, and whether SQL has it already."""
        base = replace(
            live.record,
            homes=self._homes.names(context),
            unverified=live.standing is Standing.UNVERIFIED,
        )
        if need is SqlNeed.NONE:
            return self._steps.changed(base, changes, now_ms), False
        for_sql = replace(base, last_use_ms=max(base.last_use_ms, now_ms))
        if live.standing is Standing.AGREED:
            # Before the changes are applied: the floor may only cover what was seen
            # on both homes.
            for_sql = drop_markers(for_sql)
        for_sql = self._steps.changed(for_sql, changes, now_ms)
        try:
            return self._write_row(context, for_sql, need), True
        except SqlUnavailable as error:
            if need is SqlNeed.REQUIRED:
                raise self._steps.not_kept(context, error) from error
            self._observer.count("syncs_put_off")
            # With its markers: nobody knows whether SQL dropped them too.
            return self._steps.changed(base, changes, now_ms), False

    def _write_row(
        self, context: SessionContext, record: Record, need: SqlNeed
    ) -> Record:
        """Write the row; a row that is not as the record knows it is a conflict."""
        can_wait = need is SqlNeed.DUE
        if record.never_synced:
            synced = self._rows.insert(context, record, can_wait=can_wait)
        else:
            synced = self._rows.update(context, record, can_wait=can_wait)
        if synced is None:
            raise _Conflict(ask_sql=True)
        return synced

    def _write_row_now(
        self, context: SessionContext, live: Live, record: Record
    ) -> Record:
        """SQL takes a change that too few homes took."""
        if live.standing is Standing.UNVERIFIED:
            raise self._steps.not_kept(
                context, "SQL and one of its nodes do not answer"
            )
        try:
            return self._write_row(context, record, SqlNeed.REQUIRED)
        except SqlUnavailable as error:
            raise self._steps.not_kept(context, error) from error

    def _keep_times(
        self,
        context: SessionContext,
        live: Live,
        record: Record,
        *,
        in_sql: bool,
        now_ms: int,
    ) -> None:
        """Tell the homes that an unchanged session was used, and repair them.

        A conflict is dropped: who wrote meanwhile has used it later.
        """
        writable = {name: live.writable[name] for name in live.repairs}
        if in_sql or touch_due(record, context.timing, now_ms):
            record = replace(record, last_use_ms=max(record.last_use_ms, now_ms))
            writable = dict(live.writable)
        if live.standing is Standing.UNVERIFIED:
            # Nothing is repaired on a guess, but a use during an outage of SQL counts.
            record = replace(record, homes=live.record.homes)
            writable = {n: t for n, t in writable.items() if t is not None}
        acks = self._homes.write(context, record, writable, now_ms)
        self._count_repaired(live, acks)

    def _count_repaired(self, live: Live, acks: Mapping[str, Ack]) -> None:
        repaired = sum(acks.get(name) is Ack.STORED for name in live.repairs)
        if repaired:
            self._observer.count("repaired", repaired)
