"""The extension object, which several modules of the shop use."""

from __future__ import annotations

from flask_resilient_session import ResilientSession

sessions = ResilientSession()
