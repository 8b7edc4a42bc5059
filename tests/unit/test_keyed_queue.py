"""One at a time, for those who met in the same place."""

from __future__ import annotations

import threading

from flask_resilient_session.common.queue import KeyedQueue
from servers import wait_until

LONG = 20.0


def test_they_go_in_the_order_of_asking() -> None:
    """Each starts when the one before has finished."""
    queue, order = KeyedQueue(), []
    done = threading.Event()
    threads = []
    with queue.take("session", LONG):
        for number in range(5):
            last = queue._last["session"]

            def go(number: int = number) -> None:
                with queue.take("session", LONG):
                    order.append(number)

            thread = threading.Thread(target=go)
            thread.start()
            threads.append(thread)
            wait_until(
                lambda last=last: queue._last["session"] is not last,  # type: ignore[misc]
                what="the next in the queue",
            )
        assert order == []
    done.set()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]
    assert queue._last == {}


def test_other_sessions_do_not_wait() -> None:
    """A queue belongs to one session."""
    queue = KeyedQueue()
    with queue.take("session", LONG), queue.take("another", 0):
        assert len(queue._last) == 2
    assert queue._last == {}


def test_nobody_waits_longer_than_he_can() -> None:
    """The turn is taken all the same: it only spares a collision."""
    queue = KeyedQueue()
    with queue.take("session", LONG), queue.take("session", 0.01):
        pass
    assert queue._last == {}


def test_an_error_ends_a_turn() -> None:
    """The next one goes on."""
    queue = KeyedQueue()
    try:
        with queue.take("session", LONG):
            raise OSError
    except OSError:
        pass
    with queue.take("session", 0):
        pass
