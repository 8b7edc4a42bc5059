"""What time it is: the only place that asks the operating system."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Three readings of time."""

    def now_ms(self) -> int:
        """Unix time in milliseconds, comparable between workers."""

    def monotonic(self) -> float:
        """Seconds that only go forward, for deadlines within this process."""

    def process_time(self) -> float:
        """Seconds for which this process has been busy, all its threads together."""


class SystemClock:
    """The operating system's clock."""

    def now_ms(self) -> int:
        """Unix time in milliseconds."""
        return time.time_ns() // 1_000_000

    # As they are: they are asked several times in each exchange.
    monotonic = staticmethod(time.monotonic)
    process_time = staticmethod(time.process_time)
