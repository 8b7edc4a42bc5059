"""What the page shows of its own session, and of the nodes that hold it.

An ordinary application needs none of this: it looks behind the curtain.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from flask import Flask, current_app

from flask_resilient_session import (
    COUNTERS,
    NodeCopy,
    Session,
    SessionInspection,
)

from .extensions import sessions
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

    :ivar address: as configured; empty where it is the node's name.
    :ivar home: this session's copies belong here.
    :ivar copy: what it holds of this session.
    """

    name: str
    address: str
    home: bool
    copy: NodeCopy


@dataclass(frozen=True)
class Panel:
    """All that the page shows.

    :ivar public_id: what names the session in logs; its id is in the cookie alone.
    :ivar kept: what SQL has of it.
    :ivar counters: name, count and meaning.
    :ivar demo: the page runs under ``make demo``, whose commands it may name.
    """

    public_id: str | None
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
    seen = sessions.inspect(session)
    origin = _origin(seen)
    return Panel(
        public_id=seen.public_id,
        origin=origin,
        title=_TITLES[origin],
        text=_text(origin, seen),
        kept=_kept(seen, time.time_ns() // 1_000_000),
        nodes=_nodes(seen, _addresses(app)),
        counters=[(name, n, COUNTERS[name]) for name, n in sessions.stats.items()],
        events=history_of(app).latest(),
        demo=bool(app.config.get("DEMO")),
    )


def _nodes(seen: SessionInspection, addresses: Mapping[str, str]) -> list[NodeView]:
    return [
        NodeView(name, addresses.get(name, ""), name in seen.homes, copy)
        for name, copy in seen.nodes.items()
    ]


def _addresses(app: Flask) -> dict[str, str]:
    """The addresses of the nodes that have a name besides."""
    nodes = app.config.get("RESILIENT_SESSION_NODES", ())
    named = [node for node in nodes if isinstance(node, dict) and "name" in node]
    return {node["name"]: node["address"] for node in named}


def _origin(seen: SessionInspection) -> Origin:
    if seen.standing == "unverified":
        return "unverified"
    if seen.standing == "agreed":
        return "memory"
    if seen.standing != "confirmed":
        return "new"
    if not seen.homes:
        return "sql"
    if _homes_found(seen, "nothing", "outdated"):
        return "repaired"
    return "recovered" if _homes_found(seen, "unreachable") else "checked"


def _text(origin: Origin, seen: SessionInspection) -> str:
    if origin == "new":
        before = "Your former session has ended. " if seen.standing == "gone" else ""
        return f"{before}This page stores one, with what its forms need."
    if origin == "memory":
        return f"{_names(seen.homes)} held the same state. SQL was not asked."
    if origin == "checked":
        return f"{_names(seen.homes)} agree. After its rest SQL was asked as well."
    if origin == "sql":
        return "No nodes are configured, so that SQL is asked each time."
    silent = _homes_found(seen, "unreachable")
    behind = _homes_found(seen, "nothing", "outdated")
    said = []
    if silent:
        said.append(f"{_names(silent)} did not answer.")
    if behind:
        said.append(f"{_names(behind)} had no current copy.")
    if origin == "unverified":
        said.append("SQL could not be asked, so that nobody confirmed what is left.")
        return " ".join(said)
    said.append("SQL was asked and settled it.")
    if behind:
        said.append(f"This page rewrites the copy on {_names(behind)}.")
    return " ".join(said)


def _homes_found(seen: SessionInspection, *states: str) -> list[str]:
    """The homes that were found so when the session was loaded."""
    return [name for name in seen.homes if seen.nodes[name].found in states]


def _kept(seen: SessionInspection, now_ms: int) -> str:
    row = seen.row
    changes = "1 change" if row.writes == 1 else f"{row.writes} changes"
    if row.holds == "nothing":
        gone = seen.standing == "gone"
        return "SQL has no row of it" + ("." if gone else " yet; this page adds it.")
    if row.holds == "unreachable":
        lacking = f" It may lack {changes}." if row.writes else ""
        return f"SQL does not answer just now.{lacking}"
    if row.holds != "live":
        return f"SQL holds a {row.holds}."
    seconds = max(0, (now_ms - row.synced_ms) // 1000)
    since = f"{changes} since" if row.writes else "nothing changed since"
    return f"SQL was told {seconds} s ago; {since}."


def _names(names: Sequence[str]) -> str:
    return " and ".join(names)
