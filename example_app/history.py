"""What happened lately in this process, as the extension's signals tell it."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from flask import Flask

from flask_resilient_session import (
    node_down,
    node_up,
    session_conflict,
    session_created,
    session_recovered,
    session_regenerated,
    session_revoked,
)

_NAME: Final = "example_app_history"
_LENGTH: Final = 8


@dataclass(frozen=True)
class Event:
    """Something that happened, perhaps several times in a row.

    :ivar at: when it happened last.
    """

    at: datetime
    text: str
    times: int = 1


class History:
    """The latest events of one application, newest first."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=_LENGTH)
        self._lock = threading.Lock()

    def listen_to(self, app: Flask) -> None:
        """Hear the application's signals as long as it lives."""
        app.extensions[_NAME] = self
        # blinker keeps weak references; as methods these live as long as self.
        node_down.connect(self._node_down, app)
        node_up.connect(self._node_up, app)
        session_created.connect(self._created, app)
        session_recovered.connect(self._recovered, app)
        session_regenerated.connect(self._regenerated, app)
        session_revoked.connect(self._revoked, app)
        session_conflict.connect(self._conflict, app)

    def latest(self) -> list[Event]:
        """The latest events, newest first."""
        with self._lock:
            return list(self._events)

    def _add(self, text: str) -> None:
        event = Event(datetime.now(), text)
        with self._lock:
            if self._events and self._events[0].text == text:
                event = replace(event, times=self._events.popleft().times + 1)
            self._events.appendleft(event)

    def _node_down(self, app: Flask, node: str, reason: str) -> None:
        self._add(f"{node} is skipped for a while: {reason}")

    def _node_up(self, app: Flask, node: str) -> None:
        self._add(f"{node} answers again")

    def _created(self, app: Flask, session: str) -> None:
        self._add(f"Session {session} was stored for the first time")

    def _recovered(self, app: Flask, session: str) -> None:
        self._add(f"SQL settled session {session}")

    def _regenerated(self, app: Flask, session: str, previous: str) -> None:
        self._add(f"Session {previous} became {session}")

    def _revoked(self, app: Flask, session: str) -> None:
        self._add(f"Session {session} was ended")

    def _conflict(self, app: Flask, session: str) -> None:
        self._add(f"Two requests changed session {session} at once; both are kept")


def history_of(app: Flask) -> History:
    """The application's history."""
    history: Any = app.extensions[_NAME]
    assert isinstance(history, History)
    return history
