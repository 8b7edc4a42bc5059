"""One question at a time: concurrent callers with the same question share an answer.

When a popular session's copies are lost, all its requests ask SQL at once. One of
them does; the others wait for its answer, for a bounded time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

_Answer = TypeVar("_Answer")


class Landing(Protocol):
    """What :class:`threading.Event` has, as far as it is used here."""

    def set(self) -> object:
        """Let those who wait go on."""

    def wait(self, timeout: float) -> object:
        """Wait until it is set, for so many seconds at most."""


class _Flight(Generic[_Answer]):
    """A question under way."""

    __slots__ = ("answer", "landed")

    def __init__(self, landed: Landing) -> None:
        self.landed = landed
        self.answer: _Answer | None = None


class Flights(Generic[_Answer]):
    """The questions that this process is asking at the moment.

    An answer may be as old as its question, so that only those share it who came
    before the question was put: whoever comes while one is under way waits for it to
    land and shares the next, which one of the waiting asks for all.

    :param new_landing: makes what callers wait for.
    """

    def __init__(self, new_landing: Callable[[], Landing] = threading.Event) -> None:
        self._new_landing = new_landing
        self._lock = threading.Lock()
        self._under_way: dict[str, _Flight[_Answer]] = {}
        self._next: dict[str, _Flight[_Answer]] = {}

    def share(
        self, question: str, ask: Callable[[], _Answer], *, wait: float
    ) -> _Answer | None:
        """The answer to a question that is put after this call.

        :param ask: asks.
        :param wait: seconds to wait for others.
        :returns: None where another caller got no answer in time.
        """
        with self._lock:
            current = self._under_way.get(question)
            following = self._next.get(question)
            mine = None
            if following is None:
                mine = _Flight[_Answer](self._new_landing())
            if mine is not None and current is None:
                self._under_way[question] = mine
            elif mine is not None:
                self._next[question] = mine
        if mine is None:
            assert following is not None
            following.landed.wait(max(wait, 0))
            return following.answer
        try:
            if current is not None:
                current.landed.wait(max(wait, 0))
                self._depart(question, mine)
            mine.answer = ask()
            return mine.answer
        finally:
            self._land(question, mine)

    def _depart(self, question: str, flight: _Flight[_Answer]) -> None:
        """Put the question: from here on nobody else may share its answer."""
        with self._lock:
            if self._next.get(question) is flight:
                del self._next[question]
            self._under_way[question] = flight

    def _land(self, question: str, flight: _Flight[_Answer]) -> None:
        with self._lock:
            for flights in (self._under_way, self._next):
                if flights.get(question) is flight:
                    del flights[question]
        flight.landed.set()

    def renew(self) -> None:
        """Start anew in a forked child, where nobody flies."""
        self._lock = threading.Lock()
        self._under_way.clear()
        self._next.clear()
