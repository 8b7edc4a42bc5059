"""How many ask SQL at once, and who is next."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import some_gate
from flask_resilient_session.common.errors import SqlBusy
from flask_resilient_session.sql.gate import Gate
from misbehaving import in_child
from servers import wait_until

LONG = 20.0


class Queue:
    """Those who wait at a gate, in the order of asking; served in ``order``."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._threads: list[threading.Thread] = []
        self.order: list[str] = []

    def joined_by(self, name: str, *, writes: bool) -> None:
        """Somebody more waits."""
        before = self._gate.waiting

        def go() -> None:
            with self._gate.slot(LONG, writes=writes):
                self.order.append(name)

        thread = threading.Thread(target=go)
        thread.start()
        self._threads.append(thread)
        wait_until(lambda: self._gate.waiting == before + 1, LONG, "the next to wait")

    def served(self) -> list[str]:
        """Who was served, in order, when all have been."""
        for thread in self._threads:
            thread.join(LONG)
        return self.order


def test_no_more_than_there_are_places() -> None:
    """One more than that waits, and is told after his time."""
    gate = some_gate(2)
    gate._enter(0, gate._readers)
    with gate.slot(0):
        started = time.monotonic()
        error = in_thread(lambda: enter(gate, 0.1))
        assert isinstance(error, SqlBusy)
        assert "too many requests" in str(error)
        assert 0.1 <= time.monotonic() - started < LONG / 2
        assert gate.waiting == 0
    with gate.slot(0):
        pass


def test_who_writes_goes_before_who_reads() -> None:
    """A login waits for no reads that came before it; among equals nobody overtakes."""
    gate = some_gate(1)
    queue = Queue(gate)
    with gate.slot(0):
        for number in range(5):
            queue.joined_by(f"read {number}", writes=False)
        for number in range(3):
            queue.joined_by(f"write {number}", writes=True)
        assert queue.order == []
    writes = [f"write {number}" for number in range(3)]
    assert queue.served() == [*writes, *(f"read {number}" for number in range(5))]


def test_what_can_wait_takes_a_free_place_only() -> None:
    """With nobody in front of it, and no place either, it is put off at once."""
    gate = some_gate(1)
    with gate.slot(0):
        assert isinstance(in_thread(lambda: enter(gate, 0)), SqlBusy)
    assert in_thread(lambda: enter(gate, 0)) is None


def test_who_has_a_place_needs_no_other() -> None:
    """One call within another's; another gate is another matter."""
    gate, other = some_gate(1), some_gate(1)
    with gate.slot(0), gate.slot(0), other.slot(0):
        assert isinstance(in_thread(lambda: enter(gate, 0)), SqlBusy)
    assert in_thread(lambda: enter(gate, 0)) is None


def test_an_interrupted_wait_leaves_the_queue() -> None:
    """Whether its turn had come or not, the place is there for the next one."""
    gate = some_gate(1)

    class Interrupted(BaseException):
        pass

    def interrupt(wait: object, seconds: float, clock: object) -> bool:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch, gate.slot(0):
        patch.setattr("flask_resilient_session.sql.gate.wait_for", interrupt)
        error = in_thread(lambda: enter(gate, LONG))
        assert isinstance(error, Interrupted)
        assert gate.waiting == 0
    assert in_thread(lambda: enter(gate, 0)) is None


def test_a_turn_that_comes_at_the_last_moment_is_taken() -> None:
    """A last look finds it, and nothing is lost."""
    gate = some_gate(1)
    with pytest.MonkeyPatch.context() as patch:
        holding, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with gate.slot(0):
                holding.set()
                leave.wait(LONG)

        holder = threading.Thread(target=hold)
        holder.start()
        assert holding.wait(LONG)

        def too_late(wait: object, seconds: float, clock: object) -> bool:
            leave.set()
            holder.join(LONG)
            return False

        patch.setattr("flask_resilient_session.sql.gate.wait_for", too_late)
        with gate.slot(LONG):
            assert isinstance(in_thread(lambda: enter(gate, 0)), SqlBusy)
    assert in_thread(lambda: enter(gate, 0)) is None


def test_an_error_frees_a_place() -> None:
    """As a hung connection does that was hung up on."""
    gate = some_gate(1)
    with pytest.raises(OSError), gate.slot(0):  # noqa: PT011 - any will do
        raise OSError
    assert in_thread(lambda: enter(gate, 0)) is None


def test_a_child_has_places_of_its_own() -> None:
    """After ``renew``, whatever the parent's threads hold."""
    gate = some_gate(1)
    gate._enter(0, gate._readers)

    def child() -> bool:
        gate.renew()
        return enter(gate, 0) is None

    assert in_child(child)


_GREENLETS = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent
from flask_resilient_session.common.clock import SystemClock
from flask_resilient_session.common.errors import SqlBusy
from flask_resilient_session.sql.gate import Gate

gate, order, most = Gate(2, SystemClock()), [], 0
def go(name, writes, seconds=20):
    global most
    try:
        with gate.slot(seconds, writes=writes):
            most = max(most, 2 - gate._free)
            gevent.sleep(0.05)
            order.append(name)
    except SqlBusy:
        order.append("busy")
names = [("r", False)] * 6 + [("w", True)] * 2
jobs = [gevent.spawn(go, *name) for name in names]
late = gevent.spawn(go, "never", True, 0.01)
gevent.joinall([*jobs, late])
print(*order, most, gate._free)
"""


def test_greenlets_wait_their_turn() -> None:
    """In a process that gevent patched, while others go on."""
    command = [sys.executable, "-W", "error", "-c", _GREENLETS]
    folder = Path(__file__).parents[2]
    printed = subprocess.check_output(command, text=True, cwd=folder)
    assert printed.split() == ["busy", *"rrwwrrrr", "2", "2"]


def enter(gate: Gate, seconds: float) -> BaseException | None:
    """Take a place and leave it; why there was none."""
    try:
        with gate.slot(seconds):
            return None
    except BaseException as error:  # noqa: BLE001 - handed to the caller
        return error


def in_thread(call: Callable[[], BaseException | None]) -> BaseException | None:
    """What a call returns in another thread."""
    results: list[BaseException | None] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join(LONG)
    return results[0]
