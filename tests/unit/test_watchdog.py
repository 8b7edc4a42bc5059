"""Deadlines that hold although nobody answers."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from flask_resilient_session.sql import watchdog
from flask_resilient_session.sql.watchdog import (
    MOST_GIVEN_UP,
    NoTimeLeft,
    TooLate,
    connect_within,
    current_limit,
    time_limit,
)
from misbehaving import in_child, run_together
from servers import wait_until

#: Seconds in which nothing that is awaited here fails to happen.
LONG = 20.0

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of a connection; nobody writes to it."""
    ours, theirs = socket.socketpair()
    ours.settimeout(LONG)
    with ours, theirs:
        yield ours, theirs


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def given_up() -> int:
    """How many attempts to connect are waiting although they were given up."""
    return watchdog._watchdog().given_up.total()


def test_whoever_waits_too_long_finds_an_end_of_file(pair: Pair) -> None:
    """The call ends in its own thread, soon after its time and not before."""
    started = time.monotonic()
    with time_limit(0.2) as limit:
        limit.watch(pair[0].fileno())
        assert pair[0].recv(1) == b""
        assert limit.hung_up
        assert limit.remaining == 0
    assert 0.2 <= time.monotonic() - started < LONG / 2


def test_a_call_that_ends_in_time_is_left_alone(pair: Pair) -> None:
    """Its connection lives on after the limit."""
    with time_limit(0.05) as limit:
        limit.watch(pair[0].fileno())
        pair[1].send(b"x")
        assert pair[0].recv(1) == b"x"
    with time_limit(0.1) as later:
        other, end = socket.socketpair()
        with other, end:
            later.watch(other.fileno())
            assert other.recv(1) == b""
    assert not limit.hung_up
    pair[1].send(b"y")
    assert pair[0].recv(1) == b"y"


def test_a_shorter_limit_overtakes_a_longer_one(pair: Pair) -> None:
    """The timekeeper is woken for a call whose time is up first."""
    with time_limit(LONG) as longer:
        longer.watch(pair[1].fileno())
        ours, theirs = socket.socketpair()
        with ours, theirs, time_limit(0.05) as shorter:
            ours.settimeout(LONG)
            shorter.watch(ours.fileno())
            assert ours.recv(1) == b""
        assert not longer.hung_up


def test_who_has_answered_is_not_hung_up_on(pair: Pair) -> None:
    """Its answer waits to be read; once it is read, the time begins anew."""
    with time_limit(0.1) as limit:
        limit.watch(pair[0].fileno())
        first = limit.deadline
        pair[1].send(b"x")
        wait_until(lambda: limit.deadline > first, LONG)
        assert pair[0].recv(1) == b"x"
        assert pair[0].recv(1) == b""
        assert limit.hung_up


def test_an_answer_that_nobody_ever_reads_is_no_way_to_hang(pair: Pair) -> None:
    """It helps for some time only."""
    with time_limit(0.01) as limit:
        limit.watch(pair[0].fileno())
        pair[1].send(b"x")
        wait_until(lambda: limit.hung_up, LONG)


def test_a_connection_that_broke_before_is_no_answer(pair: Pair) -> None:
    """Of those of a call the last is in use."""
    ours, theirs = socket.socketpair()
    with ours, time_limit(0.1) as limit:
        limit.watch(ours.fileno())
        theirs.close()
        limit.watch(pair[0].fileno())
        assert pair[0].recv(1) == b""
        assert limit.hung_up


def test_a_busy_process_is_given_time_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not have come to reading; who hangs then is hung up on all the same."""
    monkeypatch.setattr(watchdog._clock, "process_time", time.monotonic)
    started = time.monotonic()
    with time_limit(0.1) as limit:
        limit.watch(pair[0].fileno())
        assert pair[0].recv(1) == b""
        assert limit.hung_up
    assert 0.2 <= time.monotonic() - started < LONG / 2


def test_between_two_statements_the_time_stands_still(pair: Pair) -> None:
    """What this process does there is not the server's fault, what it waited is."""
    with time_limit(0.2) as limit:
        limit.watch(pair[0].fileno())
        limit.asks()
        time.sleep(0.05)
        limit.answered()
        left = limit.remaining
        assert 0 < left < 0.16
        with time_limit(0.3) as other:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                other.watch(ours.fileno())
                assert ours.recv(1) == b""
        assert not limit.hung_up
        assert limit.remaining == left
        started = time.monotonic()
        limit.asks()
        assert pair[0].recv(1) == b""
        assert limit.hung_up
        assert left - 0.01 < time.monotonic() - started < LONG / 2
        with pytest.raises(NoTimeLeft):
            limit.asks()


def test_many_calls_at_once(pair: Pair) -> None:
    """Each is hung up on at its own time."""

    def call(seconds: float) -> float:
        ours, theirs = socket.socketpair()
        started = time.monotonic()
        with ours, theirs, time_limit(seconds) as limit:
            limit.watch(ours.fileno())
            assert ours.recv(1) == b""
        return time.monotonic() - started

    limits = [0.05 + 0.02 * (n % 7) for n in range(20)]
    took = run_together(*[partial(call, seconds) for seconds in limits])
    assert all(t >= s for t, s in zip(took, limits, strict=True))


def test_a_number_that_was_given_away_again_is_not_hung_up_on(pair: Pair) -> None:
    """A connection that was closed in the call is gone, whoever has its number."""
    ours, theirs = socket.socketpair()
    with theirs, time_limit(0.05) as limit:
        number = ours.fileno()
        limit.watch(number)
        ours.close()
        os.dup2(pair[0].fileno(), number)
        with socket.socket(fileno=number) as heir:
            wait_until(lambda: limit.hung_up, LONG)
            pair[1].send(b"x")
            assert heir.recv(1) == b"x"


def test_a_limit_leaves_no_descriptors() -> None:
    """In time or not, watched once or twice."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = open_descriptors()
        for _ in range(3):
            with time_limit(LONG) as limit:
                limit.watch(ours.fileno())
                limit.watch(ours.fileno())
        with time_limit(0.01) as limit:
            limit.watch(ours.fileno())
            wait_until(lambda: limit.hung_up, LONG)
        assert open_descriptors() == before


def test_a_limit_is_known_in_its_own_thread_only() -> None:
    """Limits nest, and other threads have their own."""
    assert current_limit() is None
    with time_limit(LONG) as outer:
        assert current_limit() is outer
        with time_limit(LONG) as inner:
            assert current_limit() is inner
        assert current_limit() is outer
        assert run_together(current_limit) == [None]
    assert current_limit() is None


def test_a_child_has_its_own_timekeeper(pair: Pair) -> None:
    """After a fork deadlines hold in the child too."""

    def call() -> bool:
        with time_limit(0.05) as limit:
            limit.watch(pair[0].fileno())
            return pair[0].recv(1) == b""

    with time_limit(LONG) as limit:
        limit.watch(pair[1].fileno())
        assert in_child(call)


# --- connecting ------------------------------------------------------------------


def connect(seconds: float, make: Any, close: Any = str, whom: str = "a") -> Any:
    """Connect to something."""
    return connect_within(seconds, make, close, whom=whom, blocks=True)


def test_a_connection_that_comes_in_time() -> None:
    """It is returned, and an error is raised, where it was waited for."""
    assert connect(LONG, lambda: "connection") == "connection"
    with pytest.raises(ZeroDivisionError):
        connect(LONG, lambda: 1 / 0)
    with pytest.raises(SystemExit):
        connect(LONG, lambda: (_ for _ in ()).throw(SystemExit))


def test_a_connection_that_comes_too_late_is_closed() -> None:
    """Nobody waits for it any more, and it does not stay open."""
    go = threading.Event()
    closed: list[str] = []

    def slow() -> str:
        go.wait(LONG)
        return "late"

    started = time.monotonic()
    with pytest.raises(TooLate, match="in time"):
        connect(0.05, slow, closed.append)
    assert time.monotonic() - started < LONG / 2
    assert given_up() == 1
    go.set()
    wait_until(lambda: closed == ["late"], LONG)
    assert given_up() == 0


def test_few_attempts_stay_behind() -> None:
    """Past the bound nothing is tried any more, but elsewhere."""
    go = threading.Event()
    threads = []

    def hang() -> None:
        threads.append(threading.get_ident())
        go.wait(LONG)

    for _ in range(MOST_GIVEN_UP):
        with pytest.raises(TooLate):
            connect(0.01, hang)
    with pytest.raises(TooLate, match="still waiting"):
        connect(LONG, hang)
    assert len(threads) == MOST_GIVEN_UP
    assert connect(LONG, lambda: 1, whom="b") == 1
    # One that has come back is found, however long those still hang.
    timekeeper = watchdog._watchdog()
    timekeeper.try_again_at = time.monotonic()
    assert connect(LONG, lambda: 1) == 1
    go.set()
    wait_until(lambda: given_up() == 0, LONG)
    assert connect(LONG, lambda: 1) == 1
