"""How long is waited for others, and what of it counts.

Each wait has a timeout of its own. What a request waits in all is looked at before it
tries something once more. A process that serves a crowd comes back late from a wait
although it was answered long ago: the time for which it was busy meanwhile is nobody's
fault, and does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from .clock import Clock

#: Seconds, with less than which left nobody waits again.
_MOMENT: Final = 0.001


class Stopwatch:
    """Measures from now on how long somebody waits."""

    __slots__ = ("_began", "_busy", "_clock")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.monotonic()
        self._busy = clock.process_time()

    @property
    def waited(self) -> float:
        """Seconds in which this process had nothing to do; not below 0."""
        elapsed = self._clock.monotonic() - self._began
        return max(elapsed - (self._clock.process_time() - self._busy), 0.0)


class Patience:
    """What one request may wait for nodes and SQL: one for loading, one for saving.

    :param seconds: for all waits together.
    :ivar left: seconds of them that are left; below 0 after a last wait.
    :ivar late: names of nodes that did not answer in time; they are not waited for once
        more, or one of them would take all the time that there is.
    """

    __slots__ = ("_clock", "_seconds", "late", "left")

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self.left = seconds
        self.late: set[str] = set()

    def renewed(self) -> Patience:
        """As much once more, for what has to be done although the time is over."""
        return Patience(self._clock, self._seconds)

    @property
    def is_over(self) -> bool:
        """Whether there should be no further try."""
        return self.left <= 0

    @contextmanager
    def waiting(self, timeout: float) -> Iterator[None]:
        """Count what the block waits.

        :param timeout: what it may wait, in seconds: more was not the fault of whoever
            was waited for.
        """
        watch = Stopwatch(self._clock)
        try:
            yield
        finally:
            self.left -= min(watch.waited, timeout)


def wait_for(
    acquire: Callable[[bool, float], bool],
    seconds: float,
    clock: Clock,
    *,
    rounds: int = 10,
) -> bool:
    """Wait for a lock, on and on while this process is busy with something else.

    :param acquire: the lock's.
    :param rounds: how often at most it is waited for so long.
    :returns: whether it was got, at the latest by a last look without waiting.
    """
    for _ in range(rounds):
        watch = Stopwatch(clock)
        if acquire(True, seconds):
            return True
        seconds -= watch.waited
        if seconds < _MOMENT:
            break
    return acquire(False, -1)
