"""Flask sessions that survive their nodes: two memcached copies, and SQL behind them.

::

    sessions = ResilientSession()
    sessions.init_app(app, db)
"""

from __future__ import annotations

from .common.errors import (
    ConfigurationError,
    ResilientSessionError,
    SessionTooLarge,
    SessionUnavailable,
    SetupError,
)
from .common.events import (
    COUNTERS,
    node_down,
    node_up,
    session_conflict,
    session_created,
    session_expired,
    session_recovered,
    session_regenerated,
    session_revoked,
)
from .extension import ResilientSession
from .maintenance.reaper import ReapOptions, ReapReport
from .maintenance.revocation import SessionInfo
from .web.inspect import NodeCopy, SessionInspection, SessionRow
from .web.interface import ResilientSessionInterface
from .web.session import Session

__all__ = [
    "COUNTERS",
    "ConfigurationError",
    "NodeCopy",
    "ReapOptions",
    "ReapReport",
    "ResilientSession",
    "ResilientSessionError",
    "ResilientSessionInterface",
    "Session",
    "SessionInfo",
    "SessionInspection",
    "SessionRow",
    "SessionTooLarge",
    "SessionUnavailable",
    "SetupError",
    "node_down",
    "node_up",
    "session_conflict",
    "session_created",
    "session_expired",
    "session_recovered",
    "session_regenerated",
    "session_revoked",
]
