"""One at a time, in the order of asking, for those who met in the same place.

Correctness never rests on it. Requests of one process that write the same session at
the same moment meet in its homes and in SQL, and each round only one gets through;
those that have met once go on one after the other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol


class Signal(Protocol):
    """What :class:`threading.Event` has, as far as it is used here."""

    def set(self) -> object:
        """Let those who wait go on."""

    def wait(self, timeout: float) -> object:
        """Wait until it is set, for so many seconds at most."""


class KeyedQueue:
    """Queues, one for each key that somebody waits for.

    :param new_signal: makes what callers wait for.
    """

    def __init__(self, new_signal: Callable[[], Signal] = threading.Event) -> None:
        self._new_signal = new_signal
        self._lock = threading.Lock()
        self._last: dict[str, Signal] = {}

    @contextlib.contextmanager
    def take(self, key: str, wait: float) -> Iterator[None]:
        """Have a turn once those have had theirs who asked before.

        :param wait: seconds to wait at most; then the turn is taken all the same.
        """
        mine = self._new_signal()
        with self._lock:
            previous = self._last.get(key)
            self._last[key] = mine
        try:
            if previous is not None:
                previous.wait(max(wait, 0))
            yield
        finally:
            with self._lock:
                if self._last.get(key) is mine:
                    del self._last[key]
            mine.set()

    def renew(self) -> None:
        """Start anew in a forked child, where nobody waits."""
        self._lock = threading.Lock()
        self._last.clear()
