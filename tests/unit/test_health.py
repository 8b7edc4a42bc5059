"""The rules of the breaker, one by one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from flask_resilient_session.common.breaker import Breaker

#: The largest jitter: pauses are then as good as their nominal length.
WHOLE = 1 - 2**-40


def breaker(first: float = 1.0, longest: float = 30.0, timeouts: int = 3) -> Breaker:
    return Breaker(
        first_pause=first, longest_pause=longest, tolerated_timeouts=timeouts
    )


def suspect(now: float = 0.0, first: float = 1.0, longest: float = 30.0) -> Breaker:
    """Return a breaker that became suspect just now, with a pause of ``first``."""
    made = breaker(first, longest)
    assert made.failed(now, refused=True, jitter=WHOLE)
    return made


def test_it_is_healthy_at_first() -> None:
    """Everybody is admitted, and a success is nothing new."""
    made = breaker()
    assert not made.suspect
    assert made.retry_at is None
    assert made.admits(0.0)
    assert made.admits(0.0)
    assert made.succeeded(0.0) is False


def test_a_refusal_makes_it_suspect_at_once() -> None:
    """One refused connection is enough, and is reported as the change."""
    made = breaker()
    assert made.failed(10.0, refused=True, jitter=0.0) is True
    assert made.suspect
    assert not made.admits(10.0)


def test_timeouts_count_only_in_a_row() -> None:
    """Two timeouts are tolerated, and a success in between starts anew."""
    made = breaker()
    for _ in range(3):
        assert made.failed(0.0, refused=False, jitter=0.0) is False
        assert made.failed(0.0, refused=False, jitter=0.0) is False
        assert made.admits(0.0)
        assert made.succeeded(0.0) is False
    results = [made.failed(0.0, refused=False, jitter=0.0) for _ in range(3)]
    assert results == [False, False, True]
    assert made.suspect


def test_timeouts_start_anew_after_a_suspicion() -> None:
    """What led to a suspicion is forgotten when it ends."""
    made = breaker(timeouts=2)
    made.failed(0.0, refused=False, jitter=0.0)
    made.failed(0.0, refused=True, jitter=0.0)
    assert made.succeeded(1.0) is True
    assert made.failed(1.0, refused=False, jitter=0.0) is False


def test_one_tolerated_timeout_means_the_first() -> None:
    """With a limit of 1 the first timeout makes it suspect."""
    assert breaker(timeouts=1).failed(0.0, refused=False, jitter=0.0) is True


def test_the_first_pause_is_jittered() -> None:
    """The pause is from a half to the whole of the nominal one."""
    for jitter, pause in ((0.0, 1.0), (0.5, 1.5), (WHOLE, 2.0)):
        made = breaker(first=2.0)
        made.failed(100.0, refused=True, jitter=jitter)
        assert made.retry_at == pytest.approx(100.0 + pause)


def test_one_prober_after_the_pause() -> None:
    """At the retry time exactly one caller is admitted."""
    made = suspect()
    assert not made.admits(0.99)
    assert made.admits(1.0)
    assert not made.admits(1.0)
    assert made.suspect


def test_a_prober_that_never_reports_does_not_end_the_probing() -> None:
    """One pause after the grant the next prober is admitted, pause unchanged."""
    made = suspect()
    assert made.admits(5.0)
    assert not made.admits(5.99)
    assert made.admits(6.0)
    assert made.retry_at == pytest.approx(7.0)


def test_the_pause_doubles_with_each_failed_probe_up_to_the_longest() -> None:
    """1, 2, 4, 5, 5 seconds, for refusals and timeouts alike."""
    made = suspect(longest=5.0)
    now = 1.0
    for number, pause in enumerate((2.0, 4.0, 5.0, 5.0)):
        assert made.admits(now)
        refused = bool(number % 2)
        assert made.failed(now, refused=refused, jitter=WHOLE) is False
        assert made.retry_at == pytest.approx(now + pause)
        now += pause


def test_requests_in_flight_do_not_lengthen_the_pause() -> None:
    """Failures without a grant change nothing, and one grant doubles once."""
    made = suspect()
    before = made.retry_at
    for refused in (True, False):
        assert made.failed(0.5, refused=refused, jitter=WHOLE) is False
    assert made.retry_at == before
    assert made.admits(1.0)
    for _ in range(5):
        made.failed(1.0, refused=False, jitter=WHOLE)
    assert made.retry_at == pytest.approx(3.0)


def test_a_success_resets_everything() -> None:
    """It is healthy at once, and the next suspicion starts at the first pause."""
    made = suspect()
    assert made.admits(1.0)
    made.failed(1.0, refused=True, jitter=WHOLE)
    assert made.admits(3.0)
    assert made.succeeded(3.1) is True
    assert made.succeeded(3.1) is False
    assert not made.suspect
    assert made.admits(3.1)
    assert made.admits(3.1)
    assert made.failed(4.0, refused=True, jitter=WHOLE) is True
    assert made.retry_at == pytest.approx(5.0)


def test_a_success_in_flight_ends_the_suspicion() -> None:
    """An answer is an answer, also without a grant."""
    assert suspect().succeeded(0.1) is True


def test_the_healthy_path_takes_no_lock() -> None:
    """Admitting and succeeding go through while another thread holds the lock."""
    made = breaker()
    with made._lock:
        assert made.admits(0.0)
        assert made.succeeded(0.0) is False


@pytest.mark.parametrize(
    ("first", "longest", "timeouts"),
    [(0.0, 1.0, 3), (-1.0, 1.0, 3), (2.0, 1.0, 3), (1.0, 1.0, 0)],
)
def test_senseless_arguments_are_refused(
    first: float, longest: float, timeouts: int
) -> None:
    """Pauses must be above 0 and in order, and one timeout must count."""
    with pytest.raises(ValueError, match=r"first pause|At least 1"):
        breaker(first, longest, timeouts)


def test_many_threads_at_once_are_one_prober() -> None:
    """Of 32 threads that ask at the same time one is admitted, in every round."""
    made = suspect()
    start = threading.Barrier(32)

    def ask(now: float) -> bool:
        start.wait(10)
        return made.admits(now)

    now = 1.0
    with ThreadPoolExecutor(32) as pool:
        for _ in range(30):
            assert sum(pool.map(ask, [now] * 32)) == 1
            made.failed(now, refused=True, jitter=0.5)
            assert made.retry_at is not None
            now = made.retry_at


def test_many_threads_at_once_are_one_change() -> None:
    """Becoming suspect, and healthy, is reported to one of many threads."""
    made = breaker()
    start = threading.Barrier(16)

    def fail(_: int) -> bool:
        start.wait(10)
        return made.failed(0.0, refused=False, jitter=0.0)

    def succeed(_: int) -> bool:
        start.wait(10)
        return made.succeeded(0.0)

    with ThreadPoolExecutor(16) as pool:
        for _ in range(30):
            assert sum(pool.map(fail, range(16))) == 1
            assert sum(pool.map(succeed, range(16))) == 1
