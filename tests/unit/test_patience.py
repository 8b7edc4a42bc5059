"""What counts as waiting, and what was this process's own time."""

from __future__ import annotations

import pytest

from flask_resilient_session.common.patience import Patience, wait_for


class HandClock:
    """A clock that a test moves.

    :ivar idle: seconds in which the process had nothing to do.
    :ivar busy: seconds in which it had.
    """

    def __init__(self) -> None:
        self.idle = 0.0
        self.busy = 0.0

    def now_ms(self) -> int:
        """Unix milliseconds."""
        return 0

    def monotonic(self) -> float:
        """Seconds."""
        return self.idle + self.busy

    def process_time(self) -> float:
        """Seconds of them in which it was busy."""
        return self.busy


@pytest.mark.parametrize(
    ("idle", "busy", "counted"),
    [(0.25, 0, 0.25), (0.25, 5, 0.25), (0, 5, 0), (3, 1, 0.5), (0, 0, 0)],
)
def test_what_counts_of_a_wait(idle: float, busy: float, counted: float) -> None:
    """Time of others only, and no more than they were given."""
    clock = HandClock()
    patience = Patience(clock, 2.0)
    with patience.waiting(0.5):
        clock.idle += idle
        clock.busy += busy
    assert patience.left == 2.0 - counted


def test_a_wait_that_is_interrupted_counts() -> None:
    """Whatever ends it."""
    clock = HandClock()
    patience = Patience(clock, 0.5)

    def interrupted() -> None:
        with patience.waiting(0.5):
            clock.idle += 0.5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert patience.is_over


def test_time_between_two_waits_does_not_count() -> None:
    """A view may take as long as it likes."""
    clock = HandClock()
    patience = Patience(clock, 0.5)
    clock.idle += 100
    with patience.waiting(0.5):
        pass
    assert patience.left == 0.5


class Lock:
    """One that is got at some look, if ever.

    :ivar asked: the seconds of each look; -1 where it did not wait.
    """

    def __init__(self, clock: HandClock, *, busy: bool, got_at: int = 0) -> None:
        self._clock = clock
        self._busy = busy
        self._got_at = got_at
        self.asked: list[float] = []

    def acquire(self, wait: bool, seconds: float) -> bool:
        """As a lock's."""
        assert wait == (seconds >= 0)
        self.asked.append(seconds)
        if wait and self._busy:
            self._clock.busy += seconds
        elif wait:
            self._clock.idle += seconds
        return len(self.asked) == self._got_at


def test_a_busy_process_goes_on_waiting() -> None:
    """It has waited for less than it may, when its time is up by the clock."""
    clock = HandClock()
    lock = Lock(clock, busy=True, got_at=4)
    assert wait_for(lock.acquire, 0.5, clock)
    assert lock.asked == [0.5] * 4


def test_what_never_happens_is_given_up() -> None:
    """After its time, with a last look; at some point though the process is busy."""
    clock = HandClock()
    lock = Lock(clock, busy=False)
    assert not wait_for(lock.acquire, 0.5, clock)
    assert lock.asked == [0.5, -1]
    lock = Lock(clock, busy=True)
    assert not wait_for(lock.acquire, 0.5, clock, rounds=3)
    assert lock.asked == [0.5, 0.5, 0.5, -1]


def test_a_last_look_finds_what_has_happened() -> None:
    """However late it is."""
    clock = HandClock()
    assert wait_for(Lock(clock, busy=False, got_at=2).acquire, 0.5, clock)
