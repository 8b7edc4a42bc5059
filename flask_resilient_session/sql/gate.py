"""How many of this process ask SQL at once, and who is next.

One gate for all uses together: as many places as there are connections. Who writes,
as at a login, a logout or a change, goes before who reads; among equals the first to
come is the first to go.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from ..common.clock import Clock
from ..common.errors import SqlBusy
from ..common.patience import wait_for

#: The gate in which whoever runs here has a place.
_inside: ContextVar[Gate | None] = ContextVar("gate", default=None)

#: A lock that is held until its owner's turn has come.
_Turn: TypeAlias = "threading.Lock"


class Gate:
    """The places from which SQL can be asked.

    :param slots: how many there are.
    """

    def __init__(self, slots: int, clock: Clock) -> None:
        self.slots = slots
        self._clock = clock
        self.renew()

    def renew(self) -> None:
        """Start anew in a forked child: its parent's places and locks stay taken."""
        self._lock = threading.Lock()
        self._free = self.slots
        self._writers: deque[_Turn] = deque()
        self._readers: deque[_Turn] = deque()

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._writers) + len(self._readers)

    @contextmanager
    def slot(self, seconds: float, *, writes: bool = False) -> Iterator[None]:
        """A place; whoever has one already keeps it.

        :param seconds: to wait at most; 0: only where one is free.
        :param writes: go before those who read.
        :raises SqlBusy: there was none.
        """
        if _inside.get() is self:
            yield
            return
        self._enter(seconds, self._writers if writes else self._readers)
        inside = _inside.set(self)
        try:
            yield
        finally:
            _inside.reset(inside)
            self._leave()

    def _enter(self, seconds: float, queue: deque[_Turn]) -> None:
        with self._lock:
            # Where one is free nobody waits: it would have been handed on.
            if self._free:
                self._free -= 1
                return
            if seconds > 0:
                turn = threading.Lock()
                turn.acquire()
                queue.append(turn)
        if seconds <= 0:
            raise SqlBusy(_TOO_MANY)
        try:
            has_come = wait_for(turn.acquire, seconds, self._clock)
        except BaseException:
            if not self._withdraws(turn, queue):
                self._leave()
            raise
        if not has_come and self._withdraws(turn, queue):
            raise SqlBusy(_TOO_MANY)

    def _withdraws(self, turn: _Turn, queue: deque[_Turn]) -> bool:
        """Wait no more; False where the turn has come meanwhile."""
        with self._lock:
            if turn not in queue:
                return False
            queue.remove(turn)
            return True

    def _leave(self) -> None:
        with self._lock:
            queue = self._writers or self._readers
            if queue:
                queue.popleft().release()
            else:
                self._free += 1


_TOO_MANY = "too many requests are asking SQL already"
