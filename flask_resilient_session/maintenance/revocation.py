"""Ending the sessions of a user, or of everybody, from outside of their requests.

SQL is told first, then the nodes, session by session, exactly as a logout does it. It
is final at once where the homes could be told; a home that could not keeps serving a
worker that still reaches both of them until the next sync at the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final

from ..common.clock import Clock
from ..common.errors import SessionUnavailable, SqlUnavailable
from ..common.events import logger, short
from ..common.patience import Patience
from ..core.envelope import Keyring
from ..core.lifetimes import Timing
from ..sql.statements import SqlTable
from ..sql.table import Row
from ..store.context import SessionContext
from ..store.row import user_id_column
from ..store.store import Store

#: Rows read at once.
_PAGE: Final = 200

#: A session that gets a new id while the pass is under way may slip through it, so that
#: it is repeated until it finds nothing more, this often at most.
_PASSES: Final = 10

#: Seconds for one step: nobody waits for it as for a page.
STEP_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A stored session, as far as it may be shown.

    :ivar session: the short digest that names it in logs.
    :ivar user_id: its user, as in the table.
    :ivar created_at: when it was created.
    :ivar synced_at: when SQL last heard of it.
    :ivar expires_at: when its row's time is over, unless it is used again.
    :ivar homes: names of the nodes that held it then.
    """

    session: str
    user_id: str | None
    created_at: datetime
    synced_at: datetime
    expires_at: datetime
    homes: tuple[str, ...]


@dataclass(slots=True)
class RevokeReport:
    """What was ended.

    :ivar ended: sessions ended; final in SQL.
    :ivar untold: those of them of which a home could not be told.
    :ivar foreign: those whose row names nodes that are not configured on this host.
    :ivar failed: what SQL said when it failed; the rest was not ended.
    """

    ended: int = 0
    untold: int = 0
    foreign: int = 0
    failed: str | None = None


class Revoker:
    """Lists and ends sessions of one application's table."""

    def __init__(
        self,
        sql: SqlTable,
        store: Store,
        *,
        keyring: Keyring,
        timing: Timing,
        clock: Clock,
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        self._step_seconds = step_seconds
        self._sql = sql
        self._store = store
        self._keyring = keyring
        self._timing = timing
        self._clock = clock

    def sessions_of(self, user_id: object) -> list[SessionInfo]:
        """The live sessions of a user, as SQL knows them.

        :raises SessionUnavailable: SQL did not answer.
        """
        now_ms = self._clock.now_ms()
        try:
            rows = [row for row in self._rows(user_id) if row.expires_at > now_ms]
        except SqlUnavailable as error:
            logger.error("Sessions were not listed: %s", error)
            raise SessionUnavailable(
                "Sessions were not listed, since SQL does not answer."
            ) from error
        return [_info(row) for row in rows]

    def count(self, user_id: object | None) -> int:
        """How many sessions :meth:`revoke` would end.

        :param user_id: None: everybody's.
        :raises SqlUnavailable: SQL did not answer.
        """
        return sum(1 for _ in self._rows(user_id))

    def revoke(
        self,
        user_id: object | None,
        chosen: Callable[[str], bool] = lambda session_key: True,
    ) -> RevokeReport:
        """End the sessions of a user.

        :param user_id: None: everybody's.
        :param chosen: session key -> whether to end it.
        :returns: what was ended; never raises for what SQL or nodes do.
        """
        report = RevokeReport()
        try:
            for _ in range(_PASSES):
                ended = report.ended
                for row in self._rows(user_id):
                    if chosen(row.session_key):
                        self._end(row, report)
                if report.ended == ended:
                    break
        except (SqlUnavailable, SessionUnavailable) as error:
            report.failed = str(error)
        return report

    def _end(self, row: Row, report: RevokeReport) -> None:
        configured = self._store.homes.cluster.names
        named = configured.intersection(row.homes)
        # Who reads the report acts on it: it counts what SQL has committed.
        context = self._access(row)
        untold = self._store.end(context, None, also=named, in_debt=False)
        report.ended += 1
        report.untold += bool(untold)
        report.foreign += not configured.issuperset(row.homes)

    def _rows(self, user_id: object | None) -> Iterator[Row]:
        """Live rows, page by page in the order of their keys."""
        column = None if user_id is None else user_id_column(user_id)
        after = ""
        while page := self._sql.page_live(column, after, _PAGE, self._until()):
            # Some collations take "bob" and "bob " for one user; we do not.
            yield from (row for row in page if column in (None, row.user_id))
            after = page[-1].session_key

    def _access(self, row: Row) -> SessionContext:
        patience = Patience(self._clock, self._step_seconds)
        return SessionContext(row.session_key, self._keyring, self._timing, patience)

    def _until(self) -> float:
        return self._clock.monotonic() + self._step_seconds


def _info(row: Row) -> SessionInfo:
    return SessionInfo(
        session=short(row.session_key),
        user_id=row.user_id,
        created_at=_moment(row.created_at),
        synced_at=_moment(row.synced_at),
        expires_at=_moment(row.expires_at),
        homes=row.homes,
    )


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
