"""One question at a time: concurrent callers with the same question share an answer.

When a popular session's copies are lost, all its requests ask SQL at once. One of
them does; the others wait for its answer, for a bounded time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Answer = TypeVar("_Answer")


class _Flight(Generic[_Answer]):
    """A question under way."""

    __slots__ = ("answer", "landed")

    def __init__(self) -> None:
        self.landed = threading.Event()
        self.answer: _Answer | None = None


class Flights(Generic[_Answer]):
    """The questions that this process is asking at the moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, _Flight[_Answer]] = {}

    def share(
        self, question: str, ask: Callable[[], _Answer], *, wait: float
    ) -> _Answer | None:
        """The answer to a question, asked by this caller or by one before it.

        :param ask: asks; called by one caller at a time for one question.
        :param wait: seconds to wait for another caller's answer.
        :returns: None where the other caller got none in time.
        """
        with self._lock:
            flight = self._under_way.get(question)
            first = flight is None
            if flight is None:
                flight = self._under_way[question] = _Flight()
        if not first:
            flight.landed.wait(max(wait, 0))
            return flight.answer
        try:
            flight.answer = ask()
            return flight.answer
        finally:
            self.leave(question, flight)
            flight.landed.set()

    def leave(self, question: str, flight: _Flight[_Answer] | None = None) -> None:
        """Let later callers ask for themselves: the answer under way may be old."""
        with self._lock:
            if flight is None or self._under_way.get(question) is flight:
                self._under_way.pop(question, None)
