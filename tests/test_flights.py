"""One question at a time: who shares whose answer."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from flask_resilient_session.flights import Flights
from servers import wait_until

LONG = 20.0


class Oracle:
    """Answers with the number of the question, once it may."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = threading.Event()

    def __call__(self) -> int:
        self.asked += 1
        number = self.asked
        assert self.may_answer.wait(LONG)
        return number


class Caller(threading.Thread):
    """Asks from a thread of its own, and keeps the answer."""

    def __init__(self, flights: Flights[int], ask: Callable[[], int]) -> None:
        super().__init__()
        self.answer: int | None = None
        self._flights, self._ask = flights, ask
        self.start()

    def run(self) -> None:
        """Ask."""
        self.answer = self._flights.share("question", self._ask, wait=LONG)


def waiting_callers(flights: Flights[int], oracle: Oracle, count: int) -> list[Caller]:
    """One caller that asks, and others that came while it did."""
    first = Caller(flights, oracle)
    wait_until(lambda: oracle.asked == 1, what="the first question")
    others = [Caller(flights, oracle) for _ in range(count)]
    wait_until(lambda: "question" in flights._next, what="the next question")
    return [first, *others]


def test_who_comes_meanwhile_shares_the_next_answer() -> None:
    """An answer may be as old as its question, and theirs is younger."""
    flights, oracle = Flights[int](), Oracle()
    callers = waiting_callers(flights, oracle, 8)
    oracle.may_answer.set()
    for caller in callers:
        caller.join()
    assert callers[0].answer == 1
    # Those that came late may have had to ask once more, but none got the first.
    assert all(caller.answer != 1 for caller in callers[1:])
    assert oracle.asked < len(callers)


def test_one_after_the_other_asks_for_itself() -> None:
    """Nothing is remembered once it was answered."""
    flights, oracle = Flights[int](), Oracle()
    oracle.may_answer.set()
    answers = [flights.share("question", oracle, wait=LONG) for _ in range(3)]
    assert answers == [1, 2, 3]


def test_different_questions_do_not_meet() -> None:
    """Another session's question is asked at once."""
    flights, oracle = Flights[int](), Oracle()
    caller = Caller(flights, oracle)
    wait_until(lambda: oracle.asked == 1, what="the first question")
    assert flights.share("another", lambda: 7, wait=LONG) == 7
    oracle.may_answer.set()
    caller.join()


def test_an_error_is_its_own_callers() -> None:
    """The next one asks anew, and nobody waits for ever."""
    flights = Flights[int]()

    def fail() -> int:
        raise OSError("no answer")

    with pytest.raises(OSError, match="no answer"):
        flights.share("question", fail, wait=LONG)
    assert flights.share("question", lambda: 1, wait=LONG) == 1


def test_the_wait_is_bounded() -> None:
    """Who waited long enough asks, or has no answer, but goes on."""
    flights, oracle = Flights[int](), Oracle()
    callers = waiting_callers(flights, oracle, 1)
    assert flights.share("question", lambda: 7, wait=0.01) is None
    oracle.may_answer.set()
    for caller in callers:
        caller.join()
