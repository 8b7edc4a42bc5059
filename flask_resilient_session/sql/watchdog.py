"""Deadlines that hold although nobody answers: whoever is late is hung up on.

A database server that is frozen, or cut off, keeps its connections open. Its own
timeouts are frozen with it, and drivers wait without an end: libpq polls its socket
with no timeout, and a timeout per ``recv`` is none for the whole answer. So each call
is watched from outside. One thread per process shuts down the socket of a call whose
time is up; the driver finds an end of file there and raises as for any connection
that broke, in the thread that made the call. Nothing is left behind, and a call that
is answered in time pays some three microseconds: two locks, and a duplicate of the
socket's number, so that what is shut down is this connection and never another one
that got its number since. (Were each call made by one thread while another waits, it
would pay ten times that, and a thread would stay behind in each that is given up.)

Whoever has answered is not late. Where an answer waits to be read when the time is up
it is this process that is slow, and the time begins anew; so it does, once, where this
process was busy for most of it. Between two statements of a call it stands still.

Only connecting cannot be watched so, for there is no socket yet that is known. It is
rare, and done by a thread of its own, which closes what it gets too late. Not many
such threads may be waiting for one database at once.

In a process that gevent has patched the watching thread is a real one all the same,
since a driver written in C blocks every greenlet while it waits.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any, Final

from ..common.clock import SystemClock
from ..common.patience import Stopwatch, wait_for

#: Attempts to reach one database that may be waiting although they were given up.
MOST_GIVEN_UP: Final = 8

#: Seconds after an attempt in which no further one is made past that number. Those that
#: hang for minutes must not keep a database out that has come back.
_TRY_AGAIN: Final = 5.0

_clock: Final = SystemClock()
_monotonic = _clock.monotonic

_NEVER: Final = float("inf")

#: How often one statement's time begins anew while its answer waits to be read.
_MOST_SPARED: Final = 10


class TooLate(Exception):
    """The time was up before a connection was there."""


class NobodyAnswers(TooLate):
    """So many earlier attempts have not got one yet that no further one is made."""


class NoTimeLeft(TooLate):
    """Earlier statements of a call have taken all of its time."""


class TimeLimit:
    """The time that one call may take, and the connections that it uses.

    It is the server's time: it runs from the beginning of the call, and anew from each
    statement, less what was waited before, and stands still once that was answered.

    :param seconds: for the whole call.
    :ivar deadline: when its connections are hung up on, unless there is an answer.
    :ivar hung_up: whether they were.
    """

    __slots__ = (
        *("_left", "_lines", "_spared", "_watchdog", "_watch"),
        *("deadline", "hung_up"),
    )

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._watch: Stopwatch | None = Stopwatch(_clock)
        self._spared = 0
        self.deadline = _monotonic() + seconds
        self.hung_up = False
        self._lines: list[int] = []
        self._watchdog: _Watchdog | None = None

    @property
    def remaining(self) -> float:
        """Seconds that are left; not below 0."""
        if self.hung_up:
            return 0.0
        waited = 0.0 if self._watch is None else self._watch.waited
        return max(self._left - waited, 0.0)

    def watch(self, fileno: int) -> None:
        """Hang up on this connection if it is used when the time is up."""
        if self._watchdog is None:
            self._watchdog = _watchdog()
        line = os.dup(fileno)
        with self._watchdog.mutex:
            self._lines.append(line)
            self._watchdog.watch(self)

    def asks(self) -> None:
        """The server is asked something from now on.

        :raises NoTimeLeft: there is none for it.
        """
        left = self.remaining
        if not left:
            raise NoTimeLeft("no time is left for a further statement")
        self._count(left, Stopwatch(_clock), _monotonic() + left)

    def answered(self) -> None:
        """The server has answered, and it is our turn."""
        self._count(self.remaining, None, _NEVER)

    def _count(self, left: float, watch: Stopwatch | None, deadline: float) -> None:
        if self._watchdog is None:
            self._left, self._watch, self.deadline = left, watch, deadline
            return
        with self._watchdog.mutex:
            self._left, self._watch, self.deadline = left, watch, deadline
            self._spared = 0
            if watch is not None and not self.hung_up:
                self._watchdog.watch(self)

    def is_spared(self, now: float) -> bool:
        """Whether it is this process that is slow; for the timekeeper, as below.

        Its time begins anew then.
        """
        busy = self._watch is not None and self._watch.waited < self._left / 2
        most = _MOST_SPARED if self._has_answer() else int(busy)
        if self._spared >= most:
            return False
        self._spared += 1
        self.deadline = now + self._left
        return True

    def _has_answer(self) -> bool:
        select = original("select")
        poll = select.poll()
        # The last is in use: one before it may be broken, and looks as if it had.
        poll.register(self._lines[-1], select.POLLIN)
        return bool(poll.poll(0))

    def hang_up(self) -> None:
        """Shut down every connection; for the timekeeper, who holds its mutex."""
        self.hung_up = True
        for line in self._lines:
            # The module behind socket, which gevent leaves as it is.
            end = _socket.socket(fileno=line)
            with contextlib.suppress(OSError):
                end.shutdown(_socket.SHUT_RDWR)
            end.detach()

    def over(self) -> None:
        """The call has ended, in time or not."""
        if self._watchdog is None:
            return
        with self._watchdog.mutex:
            self._watchdog.limits.discard(self)
            for line in self._lines:
                os.close(line)
            self._lines.clear()


_socket: Any = importlib.import_module("_socket")

_current: ContextVar[TimeLimit | None] = ContextVar("time limit", default=None)


def current_limit() -> TimeLimit | None:
    """The limit of the call that is being made here."""
    return _current.get()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[TimeLimit]:
    """A call that may take this long."""
    limit = TimeLimit(seconds)
    token = _current.set(limit)
    try:
        yield limit
    finally:
        _current.reset(token)
        limit.over()


def connect_within(
    seconds: float,
    connect: Callable[[], Any],
    close: Callable[[Any], None],
    *,
    whom: Hashable,
    blocks: bool,
) -> Any:
    """Connect, or give up in time.

    :param close: closes a connection that came too late.
    :param whom: what names the database.
    :param blocks: the driver waits in C, so that no greenlet could run meanwhile.
    :raises TooLate: it was given up, or not even tried.
    """
    timekeeper = _watchdog()
    threads = original("_thread") if blocks else importlib.import_module("_thread")
    attempt = _Attempt(connect, close, whom, timekeeper, threads.allocate_lock())
    with timekeeper.mutex:
        now = _monotonic()
        if timekeeper.given_up[whom] >= MOST_GIVEN_UP and now < timekeeper.try_again_at:
            raise NobodyAnswers("earlier attempts to connect are still waiting")
        timekeeper.try_again_at = now + _TRY_AGAIN
    threads.start_new_thread(attempt.run, ())
    return attempt.result(seconds)


class _Attempt:
    """One connection that is being made in a thread."""

    def __init__(
        self,
        connect: Callable[[], Any],
        close: Callable[[Any], None],
        whom: Hashable,
        timekeeper: _Watchdog,
        done: Any,
    ) -> None:
        self._connect = connect
        self._close = close
        self._whom = whom
        self._watchdog = timekeeper
        self._done = done
        self._done.acquire()
        self._finished = self._given_up = False
        self._connection: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Connect; close what nobody waits for any more."""
        try:
            self._connection = self._connect()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
        with self._watchdog.mutex:
            self._finished = True
            if self._given_up:
                self._watchdog.no_longer_waits(self._whom)
        if self._given_up and self._connection is not None:
            with contextlib.suppress(Exception):
                self._close(self._connection)
        self._done.release()

    def result(self, seconds: float) -> Any:
        """The connection, or why there is none."""
        try:
            wait_for(self._done.acquire, seconds, _clock, rounds=2)
        finally:
            with self._watchdog.mutex:
                self._given_up = not self._finished
                if self._given_up:
                    self._watchdog.given_up[self._whom] += 1
        if self._given_up:
            raise TooLate("no connection was made in time")
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None
        return self._connection


class _Watchdog:
    """The thread that hangs up; one per process.

    :ivar mutex: held for a few instructions at a time.
    :ivar limits: of the calls that use a connection now.
    :ivar given_up: attempts to connect that nobody waits for any more.
    :ivar try_again_at: when another one is made although many of them hang.
    """

    def __init__(self) -> None:
        threads = original("_thread")
        self.mutex = threads.allocate_lock()
        self.limits: set[TimeLimit] = set()
        self.given_up: Counter[Hashable] = Counter()
        self.try_again_at = 0.0
        self._alarm = threads.allocate_lock()
        self._alarm.acquire()
        self._start_thread = threads.start_new_thread
        self._started = False
        self._wakes_at = _NEVER

    def no_longer_waits(self, whom: Hashable) -> None:
        """An attempt that was given up has ended; the mutex is held."""
        self.given_up[whom] -= 1
        if not self.given_up[whom]:
            del self.given_up[whom]

    def watch(self, limit: TimeLimit) -> None:
        """Look after this call; the mutex is held.

        Most calls end long before their time, and most times are later than the
        next one that it wakes for anyway: so it is rarely woken.
        """
        self.limits.add(limit)
        if not self._started:
            self._started = True
            self._start_thread(self._run, ())
        if limit.deadline < self._wakes_at:
            self._wakes_at = limit.deadline
            if self._alarm.locked():
                self._alarm.release()

    def _run(self) -> None:
        while True:
            with self.mutex:
                now = _monotonic()
                for limit in [one for one in self.limits if one.deadline <= now]:
                    if not limit.is_spared(now):
                        self.limits.discard(limit)
                        limit.hang_up()
                self._wakes_at = min(
                    (one.deadline for one in self.limits), default=_NEVER
                )
                wait = -1.0 if self._wakes_at == _NEVER else self._wakes_at - now
            self._alarm.acquire(True, wait)


#: Process id -> its timekeeper: a child has none of its parent's threads, and a lock
#: that one of them held would never be released.
_watchdogs: dict[int, _Watchdog] = {}


def _watchdog() -> _Watchdog:
    process = os.getpid()
    found = _watchdogs.get(process)
    # Of two threads that come first, both get the one that is set.
    return found or _watchdogs.setdefault(process, _Watchdog())


class _Originals:
    """A module's functions as they were before gevent replaced them."""

    def __init__(self, module: str, get_original: Callable[[str, str], Any]) -> None:
        self._module = module
        self._get_original = get_original

    def __getattr__(self, name: str) -> Any:
        return self._get_original(self._module, name)


def original(module: str) -> Any:
    """A module's functions as they are without gevent's."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return importlib.import_module(module)
    return _Originals(module, monkey.get_original)
