"""Loading a session: ask the homes, and SQL where they cannot settle the matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from ..common.clock import Clock
from ..common.errors import SqlUnavailable
from ..common.events import Observer, logger, session_recovered, short
from ..core.answers import Corrupt, Reply, RowAnswer, RowMissing, SqlSilent
from ..core.reading import (
    AskSql,
    Gone,
    InsertFirst,
    Live,
    ReadAgain,
    Standing,
    Unknown,
    confirmed,
    judge_read,
    judge_row,
    live_copies,
)
from ..core.record import Record
from .context import SessionContext
from .replicas import Homes
from .row import RowRepository, silence

#: The log says at most this often that workers differ in their nodes.
_NOTICE_SECONDS: Final = 60.0


class Loader:
    """Finds out what is known of a session.

    :param homes: its copies.
    :param rows: its row.
    """

    def __init__(
        self, homes: Homes, rows: RowRepository, *, clock: Clock, observer: Observer
    ) -> None:
        self._homes = homes
        self._rows = rows
        self._next_notice = clock.monotonic()
        self._clock = clock
        self._observer = observer

    def load(
        self, context: SessionContext, *, ask_sql: bool = False
    ) -> Live | Gone | Unknown:
        """What is known of a session.

        :param ask_sql: ask SQL even where the homes agree.
        """
        replies, verdict = self._read_homes(context, ask_sql)
        self._count_corrupt(replies)
        if isinstance(verdict, AskSql):
            return self._ask_sql(context, replies, verdict)
        if isinstance(verdict, Gone):
            return self._propagate(context, verdict)
        self._observer.count("loaded_from_memory")
        return verdict

    def _read_homes(
        self, context: SessionContext, ask_sql: bool
    ) -> tuple[dict[str, Reply], Live | Gone | AskSql]:
        """What the homes hold, read at most twice, and what it amounts to."""
        may_read_again = True
        while True:
            replies = self._homes.read(context)
            verdict = judge_read(
                replies,
                context.timing,
                self._clock.now_ms(),
                ask_sql=ask_sql,
                may_read_again=may_read_again and not context.patience.is_over,
            )
            if not isinstance(verdict, ReadAgain):
                return replies, verdict
            may_read_again = False

    def _ask_sql(
        self, context: SessionContext, replies: Mapping[str, Reply], verdict: AskSql
    ) -> Live | Gone | Unknown:
        """What SQL says of what the homes did not settle."""
        if verdict.agreed is None:
            self._notice_other_homes(context, replies)
        row = self._rows.read(context)
        if verdict.otherwise is not None and isinstance(row, SqlSilent):
            self._observer.count("loaded_from_memory")
            return verdict.otherwise
        found = self._judge_row(context, replies, row)
        missing = isinstance(found, Gone) and found.reason == "missing"
        if verdict.agreed is not None and verdict.otherwise is None and missing:
            self._doubt(context, verdict.agreed)
        return found

    def _doubt(self, context: SessionContext, agreed: Live) -> None:
        """Let SQL be asked before this pair is believed again.

        SQL does not know the session, and the pair would go on to serve it until its
        next sync. No tombstone is put: the row may come back.
        """
        record = replace(agreed.record, synced_ms=0)
        self._homes.write(context, record, agreed.writable, self._clock.now_ms())

    def _judge_row(
        self, context: SessionContext, replies: Mapping[str, Reply], row: RowAnswer
    ) -> Live | Gone | Unknown:
        """What homes and row say together, and what has to be done about it."""
        verdict = judge_row(replies, row, context.timing, self._clock.now_ms())
        if isinstance(verdict, InsertFirst):
            verdict = self._insert_first(context, replies, verdict.record)
        if isinstance(verdict, Gone):
            return self._propagate(context, verdict)
        if isinstance(verdict, Unknown):
            self._observer.count("unavailable")
        elif verdict.standing is Standing.UNVERIFIED:
            self._observer.count("loaded_unverified")
        else:
            self._observer.count("loaded_from_sql")
            self._observer.send(session_recovered, session=short(context.session_key))
        return verdict

    def _insert_first(
        self, context: SessionContext, replies: Mapping[str, Reply], record: Record
    ) -> Live | Gone | Unknown:
        """Give a session its row that never had one; only then is it live."""
        record = replace(record, homes=self._homes.names(context))
        try:
            inserted = self._rows.insert(context, record)
        except SqlUnavailable as error:
            row: RowAnswer = silence(error)
        else:
            if inserted is not None:
                return confirmed(inserted, replies)
            # Somebody inserted it meanwhile, and that row has the last word.
            row = self._rows.read(context)
            if isinstance(row, RowMissing):
                return Gone("missing", held=True)
        verdict = judge_row(replies, row, context.timing, self._clock.now_ms())
        assert not isinstance(verdict, InsertFirst)
        return verdict

    def _propagate(self, context: SessionContext, gone: Gone) -> Gone:
        """Tell the nodes that a session is gone, and pay a tombstone's debt to SQL."""
        tombstone, names = gone.tombstone, gone.propagate_to
        if tombstone is None:
            return gone
        if tombstone.debt:
            paid = replace(tombstone, debt=False)
            try:
                self._rows.put_tombstone(context, paid, None)
            except SqlUnavailable:
                # The debt stays with the homes, for the next reader.
                self._observer.count("syncs_put_off")
            else:
                tombstone, names = paid, self._homes.names(context)
        self._homes.put_tombstones(context, tombstone, names)
        return gone

    def _notice_other_homes(
        self, context: SessionContext, replies: Mapping[str, Reply]
    ) -> None:
        """Say now and then that other workers put sessions on other nodes."""
        now = self._clock.monotonic()
        if now < self._next_notice:
            return
        for copy in live_copies(replies):
            if set(copy.homes) != set(replies):
                self._next_notice = now + _NOTICE_SECONDS
                logger.warning(
                    "Session %s was written for the nodes %s; here it belongs on %s."
                    " Right after a change of RESILIENT_SESSION_NODES that is as it"
                    " should be. If it goes on, some worker runs with other nodes.",
                    short(context.session_key),
                    ", ".join(copy.homes) or "(none)",
                    ", ".join(replies),
                )
                return

    def _count_corrupt(self, replies: Mapping[str, Reply]) -> None:
        corrupt = sum(isinstance(reply, Corrupt) for reply in replies.values())
        if corrupt:
            self._observer.count("corrupt_copies", corrupt)
