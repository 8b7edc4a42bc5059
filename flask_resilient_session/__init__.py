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
from .interface import ResilientSessionInterface
from .reaper import ReapOptions, ReapReport
from .revocation import SessionInfo
from .session import Session
from .trace import SessionTrace

__all__ = [
    "ConfigurationError",
    "ReapOptions",
    "ReapReport",
    "ResilientSession",
    "ResilientSessionError",
    "ResilientSessionInterface",
    "Session",
    "SessionInfo",
    "SessionTooLarge",
    "SessionTrace",
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
