"""What the page shows of its own session, and of the nodes that hold it.

An ordinary application needs none of this: it looks behind the curtain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from flask import Flask, current_app

from flask_resilient_session import Session, SessionTrace
from flask_resilient_session.events import COUNTERS
from flask_resilient_session.extension import AppState
from flask_resilient_session.trace import CopyState

from .history import Event, history_of

#: How the session of this page was come by.
Origin = Literal[
    "new",
    "memory",
    "checked",
    "repaired",
    "recovered",
    "sql",
    "unverified",
]

_TITLES: Final[Mapping[Origin, str]] = {
    "new": "New session",
    "memory": "Read from memory",
    "checked": "Checked with SQL",
    "repaired": "Recovered and repaired",
    "recovered": "Recovered with SQL",
    "sql": "Read from SQL",
    "unverified": "Served unverified",
}


@dataclass(frozen=True)
class NodeView:
    """One node, as this process sees it.

    :ivar home: this session's copies belong here.
    :ivar behind: what it holds was out of date, and is brought up to date.
    :ivar skipped: this process leaves it alone for a while, after a failure.
    :ivar holds: what it holds of this session at this moment.
    """

    name: str
    address: str
    home: bool
    behind: bool
    skipped: bool
    holds: CopyState


@dataclass(frozen=True)
class Panel:
    """All that the page shows.

    :ivar digest: what names the session in logs; its id is in the cookie alone.
    :ivar kept: what SQL has of it.
    :ivar counters: name, count and meaning.
    :ivar demo: the page runs under ``make demo``, whose commands it may name.
    """

    digest: str | None
    origin: Origin
    title: str
    text: str
    kept: str
    nodes: Sequence[NodeView]
    counters: Sequence[tuple[str, int, str]]
    events: Sequence[Event]
    demo: bool


def look_inside(session: Session) -> Panel:
    """What happened to a session for the request at hand."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    state = app.extensions["resilient_session"]
    assert isinstance(state, AppState)
    trace = state.interface.trace(session)
    origin = _origin(trace)
    stats = state.observer.stats
    return Panel(
        digest=trace.digest,
        origin=origin,
        title=_TITLES[origin],
        text=_text(origin, trace),
        kept=_kept(trace, state.clock.now_ms()),
        nodes=_nodes(state, trace, state.interface.copies(session)),
        counters=[(name, stats[name], COUNTERS[name]) for name in stats],
        events=history_of(app).latest(),
        demo=bool(app.config.get("DEMO")),
    )


def _nodes(
    state: AppState, trace: SessionTrace, copies: Mapping[str, CopyState]
) -> list[NodeView]:
    suspects = state.store.homes.cluster.suspects()
    return [
        NodeView(
            name=node.name,
            address=node.address.removeprefix("inet:"),
            home=node.name in trace.homes,
            behind=node.name in trace.repairs,
            skipped=node.name in suspects,
            holds=copies[node.name],
        )
        for node in state.settings.nodes
    ]


def _origin(trace: SessionTrace) -> Origin:
    if trace.standing == "unverified":
        return "unverified"
    if trace.standing == "agreed":
        return "memory"
    if trace.standing != "confirmed":
        return "new"
    if not trace.homes:
        return "sql"
    if trace.repairs:
        return "repaired"
    return "recovered" if "unreachable" in trace.found.values() else "checked"


def _text(origin: Origin, trace: SessionTrace) -> str:
    if origin == "new":
        before = "" if trace.standing == "new" else "Your former session has ended. "
        return f"{before}This page stores one, with what its forms need."
    if origin == "memory":
        return f"{_names(trace.homes)} hold the same state. SQL was not asked."
    if origin == "checked":
        return f"{_names(trace.homes)} agree. After its rest SQL was asked as well."
    if origin == "sql":
        return "No nodes are configured, so that SQL is asked each time."
    silent = [name for name in trace.homes if trace.found[name] == "unreachable"]
    said = []
    if silent:
        said.append(f"{_names(silent)} did not answer.")
    if trace.repairs:
        said.append(f"{_names(trace.repairs)} had no current copy.")
    if origin == "unverified":
        said.append("SQL could not be asked, so that nobody confirmed what is left.")
        return " ".join(said)
    said.append("SQL was asked and settled it.")
    if trace.repairs:
        said.append(f"This page rewrites the copy on {_names(trace.repairs)}.")
    return " ".join(said)


def _kept(trace: SessionTrace, now_ms: int) -> str:
    if trace.digest is None:
        return ""
    if not trace.synced_ms:
        return "SQL has not heard of it yet: its row comes with your second page."
    seconds = max(0, (now_ms - trace.synced_ms) // 1000)
    changes = "1 change" if trace.writes == 1 else f"{trace.writes} changes"
    since = f"{changes} since" if trace.writes else "nothing changed since"
    return f"SQL was told {seconds} s ago; {since}."


def _names(names: Sequence[str]) -> str:
    return " and ".join(names)
