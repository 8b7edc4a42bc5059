"""The reaper: crawl what is past its time, ask the nodes, and only then delete.

One bounded pass over the rows whose time is over, in pages along an index. For each
row every home that the session may live on is asked for its latest copy. A row goes
only if all of them answered, none holds a newer live copy, and the row is exactly as
it was read. A row that cannot be checked is kept, and the pass goes on with the next:
one failure never stops the rest. Running it twice, or killing it, loses nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from ..common.clock import Clock
from ..common.errors import SqlUnavailable
from ..common.events import Observer, logger, session_expired, short
from ..common.patience import Patience
from ..core.answers import Reply, RowAnswer, RowLive, Unreachable
from ..core.envelope import Keyring
from ..core.lifetimes import Timing
from ..core.reading import live_copies
from ..core.reaping import (
    Keep,
    Reap,
    Renew,
    apart_from_database,
    may_reap,
    written_ahead,
)
from ..core.values import decode
from ..sql.statements import SqlTable
from ..sql.table import Row
from ..store.context import SessionContext
from ..store.row import RowRepository
from ..store.store import Store

DEFAULT_BATCH_SIZE: Final = 500

#: Seconds for one statement of the reaper: nobody waits for it as for a page.
STATEMENT_SECONDS: Final = 30.0


class AbortReason(enum.Enum):
    """Why a pass was not started, or not carried on."""

    CLOCKS_APART = "clocks are apart; set them right and run it again"
    FOREIGN_NODES = (
        "none of the nodes that the rows name is configured on this host"
        " (RESILIENT_SESSION_NODES); run it where they are, or with --without-nodes"
    )


@dataclass
class ReapReport:
    """What one pass did.

    :ivar examined: rows looked at.
    :ivar renewed: rows whose session turned out to be alive.
    :ivar reaped: rows deleted, or that would be in a dry run.
    :ivar unchecked: rows kept because a home, or the row itself, could not be read.
    :ivar batches: pages read.
    :ivar seconds: duration.
    :ivar stopped: it ended early, by a limit or on request.
    :ivar aborted: why nothing was done, or nothing more.
    :ivar detail: which clocks were apart, and how far.
    :ivar failed: what SQL said when it failed.
    :ivar reasons: why rows were kept: reason -> rows.
    """

    examined: int = 0
    renewed: int = 0
    reaped: int = 0
    unchecked: int = 0
    batches: int = 0
    seconds: float = 0.0
    dry_run: bool = False
    stopped: bool = False
    aborted: AbortReason | None = None
    detail: str | None = None
    failed: str | None = None
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def abort_reason(self) -> str | None:
        """Why it was aborted, in full; None where it was not."""
        if self.aborted is None:
            return None
        return self.aborted.value + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class ReapOptions:
    """How a pass is bounded, and what it may assume.

    :ivar limit: rows to examine at most.
    :ivar max_seconds: time to take at most.
    :ivar forgotten: nodes that are gone for good and need not be asked.
    :ivar without_nodes: ask only the nodes configured here, whatever the rows name.
    :ivar archive: called with each dead session before its row is deleted.
    :ivar progress: called with the rows that each batch examined.
    :ivar should_stop: asked between rows.
    """

    batch_size: int = DEFAULT_BATCH_SIZE
    limit: int | None = None
    max_seconds: float | None = None
    dry_run: bool = False
    forgotten: frozenset[str] = frozenset()
    without_nodes: bool = False
    archive: Callable[[dict[str, Any]], None] | None = None
    progress: Callable[[int], None] = lambda rows: None
    should_stop: Callable[[], bool] = lambda: False


class _Dead(NamedTuple):
    """A row that may go, and the last that is known of its session."""

    row: Row
    data: dict[str, Any] | None


class Reaper:
    """Runs passes over one application's table."""

    def __init__(
        self,
        sql: SqlTable,
        store: Store,
        *,
        keyring: Keyring,
        timing: Timing,
        clock: Clock,
        observer: Observer,
        statement_seconds: float = STATEMENT_SECONDS,
    ) -> None:
        self._statement_seconds = statement_seconds
        self._sql = sql
        self._store = store
        self._rows: RowRepository = store.rows
        self._keyring = keyring
        self._timing = timing
        self._clock = clock
        self._observer = observer

    def count(self) -> int:
        """How many rows are past their time and grace.

        :raises SqlUnavailable: SQL did not answer.
        """
        before_ms = self._clock.now_ms() - self._timing.reap_grace_ms
        return self._sql.count_expired(before_ms, self._until())

    def run(self, options: ReapOptions) -> ReapReport:
        """One pass; never raises for what SQL or nodes do, but reports it."""
        report = ReapReport(dry_run=options.dry_run)
        started = self._clock.monotonic()
        try:
            self._pass(options, report, started)
        except SqlUnavailable as error:
            report.failed = str(error)
        report.seconds = self._clock.monotonic() - started
        return report

    def _pass(self, options: ReapOptions, report: ReapReport, started: float) -> None:
        database_ms = self._sql.clock_ms(self._until())
        if self._apart(apart_from_database(self._clock.now_ms(), database_ms), report):
            return
        for batch in self._batches(options):
            written_ms = {short(row.session_key): _written_ms(row) for row in batch}
            if self._apart(written_ahead(self._clock.now_ms(), written_ms), report):
                return
            if not report.examined and self._foreign(batch, options):
                report.aborted = AbortReason.FOREIGN_NODES
                return
            report.batches += 1
            examined = report.examined
            try:
                report.stopped = self._batch(batch, options, report, started)
            finally:
                options.progress(report.examined - examined)
            if report.stopped:
                return

    def _batch(
        self,
        batch: Iterable[Row],
        options: ReapOptions,
        report: ReapReport,
        started: float,
    ) -> bool:
        """One page: look at each row, then delete the dead ones together.

        :returns: whether the pass is to stop.
        """
        dead: list[_Dead] = []
        stopping = False
        for row in batch:
            stopping = self._must_stop(options, report, started)
            if stopping:
                break
            report.examined += 1
            self._row(row, options, report, dead)
        self._remove(dead, options, report)
        return stopping

    def _batches(self, options: ReapOptions) -> Iterator[list[Row]]:
        """Pages of rows that are past their time and grace."""
        size = options.batch_size
        before_ms = self._clock.now_ms() - self._timing.reap_grace_ms
        after = (0, "")
        while batch := self._sql.page_expired(before_ms, after, size, self._until()):
            yield batch
            after = (batch[-1].expires_at, batch[-1].session_key)

    def _apart(self, detail: str | None, report: ReapReport) -> bool:
        """Abort the pass where clocks are apart."""
        if detail is None:
            return False
        report.aborted, report.detail = AbortReason.CLOCKS_APART, detail
        return True

    def _must_stop(
        self, options: ReapOptions, report: ReapReport, started: float
    ) -> bool:
        if options.limit is not None and report.examined >= options.limit:
            return True
        spent = self._clock.monotonic() - started
        if options.max_seconds is not None and spent >= options.max_seconds:
            return True
        return options.should_stop()

    def _foreign(self, batch: Iterable[Row], options: ReapOptions) -> bool:
        named = {name for row in batch for name in row.homes} - options.forgotten
        if options.without_nodes or not named:
            return False
        return named.isdisjoint(self._store.homes.cluster.names)

    # --- one row -----------------------------------------------------------------

    def _row(
        self, row: Row, options: ReapOptions, report: ReapReport, dead: list[_Dead]
    ) -> None:
        """Look at one row; the pass goes on whatever becomes of it."""
        context = SessionContext(
            row.session_key, self._keyring, self._timing, self._patience()
        )
        answer = self._rows.open_row(row, self._keyring)
        replies = self._ask(context, row, options)
        now_ms = self._clock.now_ms()
        verdict = may_reap(answer, replies, self._timing, now_ms, row.expires_at)
        if isinstance(verdict, Keep):
            report.unchecked += 1
            report.reasons[verdict.reason] = report.reasons.get(verdict.reason, 0) + 1
        elif isinstance(verdict, Reap):
            dead.append(_Dead(row, self._final_data(row, answer, replies)))
        elif isinstance(verdict, Renew):
            try:
                report.renewed += options.dry_run or self._renew(context, row, verdict)
            except ValueError as error:
                # Written by another version, with a user of a type unknown here.
                report.unchecked += 1
                report.reasons[str(error)] = report.reasons.get(str(error), 0) + 1
        elif not options.dry_run:
            record = answer.record if isinstance(answer, RowLive) else None
            self._rows.put_tombstone(context, verdict.tombstone, record)

    def _ask(
        self, context: SessionContext, row: Row, options: ReapOptions
    ) -> dict[str, Reply]:
        """What every home holds that the session may live on."""
        configured = self._store.homes.cluster.names
        homes = set(row.homes) | set(self._store.homes.names(context))
        homes -= options.forgotten - configured
        if options.without_nodes:
            homes &= configured
        replies: dict[str, Reply] = {
            name: Unreachable("not configured on this host")
            for name in sorted(homes - configured)
        }
        replies |= self._store.read_copies(context, sorted(homes & configured))
        return replies

    def _renew(self, context: SessionContext, row: Row, verdict: Renew) -> bool:
        """Write what is alive; False where the row changed meanwhile."""
        homes = self._store.homes.names(context) or row.homes
        record = replace(verdict.record, homes=homes, row_version=row.version)
        return self._rows.update(context, record) is not None

    def _remove(
        self, dead: Sequence[_Dead], options: ReapOptions, report: ReapReport
    ) -> None:
        """Delete a page's dead rows: archived first, those that changed excepted."""
        if options.dry_run or not dead:
            report.reaped += len(dead)
            return
        sessions = [one for one in dead if one.row.revoked_at is None]
        if options.archive is not None:
            for one in sessions:
                options.archive(_for_archive(one.row, one.data))
        rows = [one.row for one in dead]
        deleted = self._sql.delete(rows, self._until())
        report.reaped += sum(deleted)
        for one, gone in zip(dead, deleted, strict=True):
            if gone and one.row.revoked_at is None:
                self._observer.send(
                    session_expired, session=short(one.row.session_key), data=one.data
                )

    def _final_data(
        self, row: Row, answer: RowAnswer, replies: dict[str, Reply]
    ) -> dict[str, Any] | None:
        """The last that is known of a dead session."""
        if row.revoked_at is not None:
            return None
        records = [answer.record] if isinstance(answer, RowLive) else []
        records += live_copies(replies)
        if not records:
            return None
        newest = max(records, key=lambda record: record.last_use_ms)
        try:
            return decode(newest.payload())
        except ValueError as error:
            logger.warning("The data of an expired session cannot be read: %s", error)
            return None

    def _patience(self) -> Patience:
        return Patience(self._clock, self._statement_seconds)

    def _until(self) -> float:
        return self._clock.monotonic() + self._statement_seconds


def _written_ms(row: Row) -> int:
    return max(row.synced_at, row.revoked_at or 0)


def _for_archive(row: Row, data: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "session": short(row.session_key),
        "user_id": row.user_id,
        "created_at": row.created_at,
        "synced_at": row.synced_at,
        "expires_at": row.expires_at,
        "data": data,
    }
