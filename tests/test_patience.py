"""What counts as waiting, and what was this process's own time."""

from __future__ import annotations

import pytest

from flask_resilient_session.patience import Patience, wait_for


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


def test_a_busy_process_goes_on_waiting() -> None:
    """It has waited for less than it may, when its time is up by the clock."""
    clock = HandClock()
    asked: list[float] = []

    def happens(seconds: float) -> bool:
        asked.append(seconds)
        clock.busy += seconds
        return len(asked) == 4

    assert wait_for(happens, 0.5, clock)
    assert asked == [0.5] * 4


def test_what_never_happens_is_given_up() -> None:
    """After its time, with a last look; at some point though the process is busy."""
    clock = HandClock()
    asked: list[float] = []

    def idle(seconds: float) -> bool:
        asked.append(seconds)
        clock.idle += seconds
        return False

    assert not wait_for(idle, 0.5, clock)
    assert asked == [0.5, 0]
    asked.clear()

    def busy(seconds: float) -> bool:
        asked.append(seconds)
        clock.busy += seconds
        return False

    assert not wait_for(busy, 0.5, clock)
    assert len(asked) < 20


def test_a_last_look_finds_what_has_happened() -> None:
    """However late it is."""
    clock = HandClock()

    def happens(seconds: float) -> bool:
        clock.idle += seconds
        return seconds == 0

    assert wait_for(happens, 0.5, clock)
