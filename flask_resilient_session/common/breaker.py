"""When a node, or SQL, is skipped for a while, and who may ask it again.

No I/O and no clock: the caller passes the time and the random jitter in. Times
are monotonic seconds.
"""

from __future__ import annotations

from threading import Lock


class Breaker:
    """Judges one node (or SQL) from what this process has seen of it.

    It is healthy at first. A refused connection makes it suspect at once, a
    timeout after several in a row. While it is suspect one caller at a time is
    admitted as prober, after a pause that doubles with each failed probe. Any
    success makes it healthy.

    Safe to share between threads. A process that was forked needs a new one:
    a thread that does not exist there may have held the lock.

    :param first_pause: seconds until a node that became suspect is probed.
    :param longest_pause: seconds that no pause is longer than.
    :param tolerated_timeouts: this many timeouts in a row make it suspect.
    :raises ValueError: a pause is not above 0, the longest is below the first,
        or the number of timeouts is below 1.
    """

    def __init__(
        self,
        *,
        first_pause: float,
        longest_pause: float,
        tolerated_timeouts: int = 3,
    ) -> None:
        if not 0 < first_pause <= longest_pause:
            raise ValueError("A first pause must be above 0 and not over the longest.")
        if tolerated_timeouts < 1:
            raise ValueError("At least 1 timeout has to make a node suspect.")
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._tolerated_timeouts = tolerated_timeouts
        self._lock = Lock()
        self._timeouts = 0
        self._retry_at: float | None = None
        self._pause = first_pause
        self._probing = False

    @property
    def suspect(self) -> bool:
        """Whether it is being skipped."""
        return self._retry_at is not None

    @property
    def retry_at(self) -> float | None:
        """When the next prober is admitted, in monotonic seconds; None: healthy."""
        return self._retry_at

    def renew(self) -> None:
        """Start anew in a forked child, with no suspicion and a lock of its own."""
        self.__init__(  # type: ignore[misc]
            first_pause=self._first_pause,
            longest_pause=self._longest_pause,
            tolerated_timeouts=self._tolerated_timeouts,
        )

    def admits(self, now: float) -> bool:
        """Return whether the caller may use it.

        A caller that is admitted reports the outcome by :meth:`succeeded` or
        :meth:`failed`. While it is suspect, that caller is the prober: nobody
        else is admitted until the prober failed and the next pause is over, or
        until one full pause has passed without a report, so that a prober that
        vanished does not end the probing.

        :param now: monotonic seconds.
        """
        # Reading one attribute needs no lock. A caller that just misses the
        # change to suspect is one more request in flight.
        if self._retry_at is None:
            return True
        with self._lock:
            if self._retry_at is None:
                return True
            if now < self._retry_at:
                return False
            self._retry_at = now + self._pause
            self._probing = True
            return True

    def succeeded(self, now: float) -> bool:
        """Report that it answered, whoever asked; everything starts anew.

        :param now: monotonic seconds; no rule depends on it today.
        :returns: whether this made a suspect healthy.
        """
        # The healthy path of every request: nothing to reset, no lock.
        if self._retry_at is None and not self._timeouts:
            return False
        with self._lock:
            was_suspect = self._retry_at is not None
            self._timeouts = 0
            self._retry_at = None
            self._probing = False
            return was_suspect

    def failed(self, now: float, *, refused: bool, jitter: float) -> bool:
        """Report that it did not answer.

        Requests that were in flight when it became suspect fail as well and
        say nothing new: each admitted prober lengthens the pause at most once.

        :param now: monotonic seconds.
        :param refused: the connection was refused or broken, so that waiting
            for more of the same is pointless; otherwise a timeout.
        :param jitter: a random number, 0 <= jitter < 1. The pause taken is from
            a half (0) to the whole (1) of the nominal one, so that the
            processes that saw the same failure do not probe in step.
        :returns: whether this made it suspect.
        """
        with self._lock:
            if self._retry_at is None:
                if not refused:
                    self._timeouts += 1
                    if self._timeouts < self._tolerated_timeouts:
                        return False
                self._pause_from(now, self._first_pause, jitter)
                return True
            if self._probing:
                pause = min(self._pause * 2, self._longest_pause)
                self._pause_from(now, pause, jitter)
            return False

    def _pause_from(self, now: float, pause: float, jitter: float) -> None:
        """Start a pause of this nominal length; the lock is held."""
        self._timeouts = 0
        self._probing = False
        self._pause = pause
        self._retry_at = now + pause * (0.5 + jitter / 2)
