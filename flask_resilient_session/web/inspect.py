"""What nodes and SQL hold of a session right now, for people and tests to look at.

Looking changes nothing: no copy is repaired and no tombstone is passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias, cast

from ..common.events import short
from ..core.answers import (
    Corrupt,
    Miss,
    Reply,
    RowAnswer,
    RowDead,
    RowLive,
    RowMissing,
    SqlSilent,
    Unreachable,
)
from ..core.reading import Gone, Live, Unknown, hits_of
from ..core.record import Copy, Record, Tombstone, join, same_state
from ..store.store import Store
from .request import RequestVisit
from .session import Session

CopyState: TypeAlias = Literal[
    "current", "outdated", "nothing", "tombstone", "corrupt", "unreachable"
]
RowState: TypeAlias = Literal["live", "tombstone", "nothing", "corrupt", "unreachable"]
SessionStanding: TypeAlias = Literal[
    "new", "agreed", "confirmed", "unverified", "unavailable", "gone"
]


@dataclass(frozen=True, slots=True)
class NodeCopy:
    """What one node holds of a session.

    :ivar holds: what it holds right now; ``outdated`` differs from the newest state
        that any node, SQL or this request knows.
    :ivar found: what a home held when this request loaded the session, ``outdated``
        being all that a repair replaces; None for other nodes, and where loading found
        no session.
    :ivar reason: why it is ``unreachable``; ``ended`` or ``moved`` for a tombstone.
    """

    holds: CopyState
    found: CopyState | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRow:
    """What SQL holds of a session.

    :ivar holds: what it holds right now.
    :ivar version: the row's version, which every sync raises; 0 without a live row.
    :ivar synced_ms: when SQL was last written, in Unix milliseconds, as far as is
        known where there is no live row; 0 for never.
    :ivar writes: how many changes are not in the row.
    :ivar reason: why SQL is ``unreachable``, as in the log; ``ended`` or ``moved``
        for a tombstone.
    """

    holds: RowState
    version: int = 0
    synced_ms: int = 0
    writes: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SessionInspection:
    """A session as it is right now, and how this request came by it.

    :ivar public_id: the short digest that names it in logs; None while it has no id.
    :ivar standing: what loading found: ``new`` no session came with the request;
        ``agreed`` the homes settled it; ``confirmed`` SQL did; ``unverified`` SQL
        could not be asked; ``unavailable`` nobody could say; ``gone`` a genuine
        cookie of a session that has ended.
    :ivar homes: names of the nodes that it belongs on.
    :ivar nodes: every configured node by its name.
    :ivar repairs: the nodes whose copy is brought up to date when this request is
        saved.
    """

    public_id: str | None
    standing: SessionStanding
    homes: tuple[str, ...]
    nodes: Mapping[str, NodeCopy]
    row: SessionRow
    repairs: tuple[str, ...] = ()


def inspect_session(session: Session, store: Store) -> SessionInspection:
    """Ask every node and SQL what they hold of a session.

    Loads the session if that was not done yet. Silence is an answer, not an error.
    """
    unavailable = session.unavailable
    visit = cast(RequestVisit, session.visit)
    loaded = Unknown() if unavailable else visit.found
    names = sorted(store.homes.cluster.names)
    # A first store or a move has given it an id that it did not come with.
    stored_sid = session._sid if visit.saved else None
    if stored_sid is not None:
        context = visit.context_to(stored_sid)
    elif visit.context is not None:
        context = visit.context_for_saving()
    else:
        nothing: dict[str, Reply] = dict.fromkeys(names, Miss())
        return judge_inspection(None, (), loaded, nothing, RowMissing())
    return judge_inspection(
        short(context.session_key),
        store.homes.names(context),
        loaded,
        store.read_copies(context, names),
        store.rows.read(context),
        loaded_elsewhere=context.session_key != visit.session_key(),
    )


def judge_inspection(
    public_id: str | None,
    homes: tuple[str, ...],
    loaded: Live | Gone | Unknown | None,
    replies: Mapping[str, Reply],
    row: RowAnswer,
    *,
    loaded_elsewhere: bool = False,
) -> SessionInspection:
    """What to show of a session; pure.

    :param loaded: what loading found; None where the request brought no session.
    :param replies: node -> reply, for every configured node.
    :param loaded_elsewhere: loading looked at another id, which it had before.
    """
    live = loaded if isinstance(loaded, Live) and not loaded_elsewhere else None
    known = [hit.copy for _, hit in hits_of(replies)]
    if live is not None:
        known.append(live.record)
    if isinstance(row, RowLive):
        known.append(row.record)
    elif isinstance(row, RowDead):
        known.append(row.tombstone)
    newest = reduce(join, known) if known else None
    return SessionInspection(
        public_id,
        _standing(loaded),
        homes,
        {
            name: _node_copy(reply, newest, _found(live, name, homes))
            for name, reply in replies.items()
        },
        _session_row(row, newest),
        () if live is None else live.repairs,
    )


def _standing(loaded: Live | Gone | Unknown | None) -> SessionStanding:
    if isinstance(loaded, Live):
        return loaded.standing.value
    if loaded is None:
        return "new"
    return "gone" if isinstance(loaded, Gone) else "unavailable"


def _found(live: Live | None, name: str, homes: tuple[str, ...]) -> CopyState | None:
    """What a home held when the session was loaded."""
    if live is None or name not in homes:
        return None
    if name not in live.writable:
        return "unreachable"
    if live.writable[name] is None:
        return "nothing"
    return "outdated" if name in live.repairs else "current"


def _node_copy(reply: Reply, newest: Copy | None, found: CopyState | None) -> NodeCopy:
    if isinstance(reply, Miss):
        return NodeCopy("nothing", found)
    if isinstance(reply, Corrupt):
        return NodeCopy("corrupt", found)
    if isinstance(reply, Unreachable):
        return NodeCopy("unreachable", found, reply.reason)
    if isinstance(reply.copy, Tombstone):
        return NodeCopy("tombstone", found, reply.copy.reason)
    current = isinstance(newest, Record) and same_state(reply.copy, newest)
    return NodeCopy("current" if current else "outdated", found)


def _session_row(row: RowAnswer, newest: Copy | None) -> SessionRow:
    if isinstance(row, RowDead):
        return SessionRow("tombstone", reason=row.tombstone.reason)
    record = newest if isinstance(newest, Record) else Record()
    synced_ms, writes = record.synced_ms, record.writes
    if isinstance(row, SqlSilent):
        return SessionRow("unreachable", 0, synced_ms, writes, row.reason)
    if isinstance(row, RowLive):
        synced_ms = row.record.synced_ms
        # The bookkeeping of a row's own sync does not say that the row is behind.
        writes = 0 if same_state(row.record, record) else max(writes, 1)
        return SessionRow("live", row.record.row_version, synced_ms, writes)
    writes = max(writes, 1) if record.entries else 0
    holds: RowState = "nothing" if isinstance(row, RowMissing) else "corrupt"
    return SessionRow(holds, 0, synced_ms, writes)
