"""Where a session lives and how a request came by it, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .events import short
from .record import Corrupt, Hit, Miss, Tombstone
from .replication import Gone, Live
from .store import Store
from .visit import RequestVisit

HomeState: TypeAlias = Literal["current", "outdated", "missing", "unreachable"]
CopyState: TypeAlias = Literal["copy", "tombstone", "nothing", "corrupt", "unreachable"]


@dataclass(frozen=True, slots=True)
class SessionTrace:
    """A session as one request found it.

    :ivar digest: the short digest that names it; None while nothing is stored.
    :ivar homes: the nodes that it belongs on.
    :ivar standing: what was found: ``agreed`` the homes settled it, ``confirmed`` SQL
        did, ``unverified`` SQL could not be asked, ``gone`` a genuine cookie of a
        session that ended.
    :ivar found: what each home held when it was loaded.
    :ivar repairs: nodes whose copy is rewritten when this request is saved.
    :ivar synced_ms: when SQL was last written, in Unix milliseconds; 0 for never.
    :ivar writes: changes since then, which only memory holds.
    """

    digest: str | None
    homes: tuple[str, ...]
    standing: Literal["new", "agreed", "confirmed", "unverified", "unavailable", "gone"]
    found: Mapping[str, HomeState] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    synced_ms: int = 0
    writes: int = 0


def trace(store: Store, visit: RequestVisit, *, unavailable: bool) -> SessionTrace:
    """How this visit came by its session."""
    if visit.access is None:
        return SessionTrace(None, (), "new")
    digest = short(visit.access.session_key)
    homes = store.homes.names(visit.access)
    live = visit.found
    if unavailable:
        return SessionTrace(digest, homes, "unavailable")
    if isinstance(live, Gone):
        return SessionTrace(digest, homes, "gone")
    if not isinstance(live, Live):
        return SessionTrace(None, (), "new")
    found = {name: _home_state(live, name) for name in homes}
    return SessionTrace(
        digest,
        homes,
        live.standing.value,
        found,
        live.repairs,
        live.record.synced_ms,
        live.record.writes,
    )


def _home_state(live: Live, name: str) -> HomeState:
    if name not in live.places:
        return "unreachable"
    if live.places[name] is None:
        return "missing"
    return "outdated" if name in live.repairs else "current"


def copies(
    store: Store, visit: RequestVisit, names: tuple[str, ...]
) -> dict[str, CopyState]:
    """What these nodes hold for the session right now; asks them."""
    if visit.access is None:
        return dict.fromkeys(names, "nothing")
    replies = store.peek(visit.access_for_saving(), names)
    states: dict[str, CopyState] = {}
    for name, reply in replies.items():
        if isinstance(reply, Hit):
            dead = isinstance(reply.copy, Tombstone)
            states[name] = "tombstone" if dead else "copy"
        elif isinstance(reply, Miss):
            states[name] = "nothing"
        else:
            states[name] = "corrupt" if isinstance(reply, Corrupt) else "unreachable"
    return states
