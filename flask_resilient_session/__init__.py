"""Flask sessions that survive their nodes: two memcached copies, and SQL behind them.

::

    sessions = ResilientSession()
    sessions.init_app(app, db)
"""

from __future__ import annotations

from .errors import (
    ConfigurationError,
    ResilientSessionError,
    SessionTooLarge,
    SessionUnavailable,
    SetupError,
)
from .events import (
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
from .inspection import NodeCopy, SessionInspection, SessionRow
from .interface import ResilientSessionInterface
from .reaper import ReapOptions, ReapReport
from .revocation import SessionInfo
from .session import Session

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
