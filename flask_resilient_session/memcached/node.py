"""One memcached node: its connections, and one exchange in three steps.

Connecting, sending and receiving are separate, so that a caller can connect to two
nodes at once, and send to both before it reads from either. The connections come from
python-memcached's host objects, one per connection; of its reading and writing nothing
is used, because its timeout is per ``recv`` and it never compares the returned key with
the asked one.

A connection is either idle in the pool, with nothing sent and nothing to read, or
owned by one exchange. Whatever interrupts an exchange, a foreign ``Timeout`` raised
by a greenlet included, closes its connection: a reply must never meet the wrong
request.
"""

from __future__ import annotations

import errno
import itertools
import math
import operator
import os
import select
import socket
import threading
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any, Final

import memcache

from ..common.clock import Clock
from ..common.patience import Stopwatch
from ..core.answers import Ack
from .text_protocol import Cas, Parsed, ProtocolError, Request

#: Idle connections kept per node and process. More are opened when more requests
#: run at once, and closed when these many already idle.
IDLE_CONNECTIONS: Final = 32

#: One read takes a whole session of common size.
_READ_BYTES: Final = 64 * 1024

#: Seconds in which the rest of a reply that has begun to come has time to follow, and
#: a reply where connecting has taken all the time that there was.
_READING_SECONDS: Final = 0.05

#: Reads, of what is there, after the deadline: more than the largest reply takes.
_MOST_LATE_READS: Final = 100


class NodeFault(Exception):
    """The node did not answer as a node does.

    :ivar refused: it is known to be down, rather than slow or out of reach.
    """

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class _Stale(Exception):
    """A pooled connection turned out to be closed before it answered anything."""


class _Connection:
    """A socket that enforces deadlines; it may be connecting still.

    :ivar opened_at: when it was connected; 0 while it is not.
    :ivar reused: it has carried an exchange before.
    """

    __slots__ = ("_clock", "_late_reads", "host", "opened_at", "reused", "socket")

    def __init__(self, address: str, clock: Clock) -> None:
        self.opened_at = 0
        self.reused = False
        self._clock = clock
        self._late_reads = 0
        self.host: Any = memcache.Client([address]).servers[0]
        connecting = socket.socket(self.host.family, socket.SOCK_STREAM)
        try:
            connecting.setblocking(False)
            error = connecting.connect_ex(self.host.address)
            if error not in (0, errno.EINPROGRESS):
                raise OSError(error, os.strerror(error))
            if self.host.family != socket.AF_UNIX:
                connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            connecting.close()
            raise
        self.host.socket = self.socket = connecting

    def is_connected(self) -> bool:
        """Whether it is by now, without waiting.

        :raises OSError: it never will be.
        """
        error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        try:
            self.socket.getpeername()
        except OSError:
            return False
        return True

    def send(self, data: bytes, seconds: float) -> None:
        self.socket.settimeout(seconds)
        self.socket.sendall(data)

    def receive(self, request: Request, deadline: float) -> Parsed:
        """The reply, whole and alone, or an exception that closes the connection."""
        self._late_reads = 0
        data = self._read(deadline)
        if not data:
            raise _Stale
        # It was answered, however late that is noticed, and a large reply comes in
        # pieces: there is no room for all of it before it is read.
        deadline = max(deadline, self._clock.monotonic() + _READING_SECONDS)
        while (parsed := request.parse(data)) is None:
            data += self._read_on(deadline)
        reply, length = parsed
        excess = len(data) - length
        while excess < 0:
            # An item too long to keep: skipped, so that the connection, on which its
            # token is good, need not be closed.
            excess += len(self._read_on(deadline))
        if excess:
            raise ProtocolError("more bytes than the reply has")
        return reply

    def _read(self, deadline: float) -> bytes:
        remaining = deadline - self._clock.monotonic()
        if remaining > 0:
            self.socket.settimeout(remaining)
            try:
                return self.socket.recv(_READ_BYTES)
            except TimeoutError:
                pass  # it may have come all the same, before this process was back
        self._late_reads += 1
        if self._late_reads > _MOST_LATE_READS:
            raise TimeoutError("the reply is still incomplete at its deadline")
        self.socket.settimeout(0)
        try:
            return self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            raise TimeoutError("nothing came in time") from None

    def _read_on(self, deadline: float) -> bytes:
        """More of a reply that has begun."""
        received = self._read(deadline)
        if not received:
            raise ConnectionError("closed in a reply")
        return received

    def close(self) -> None:
        self.host.close_socket()

    def __del__(self) -> None:
        # An application that is dropped, as in a test, closes what it had open.
        if hasattr(self, "socket"):
            self.close()


class Exchange:
    """A request to a node whose reply has not been read yet.

    Its time begins when it is made, and what was waited for the connection counts.
    That this process was busy with something else until it could send does not.
    """

    __slots__ = (
        *("_clock", "_connection", "_data", "_fault", "_node", "_request"),
        *("_sent", "_timeout", "_watch", "deadline", "read_at"),
    )

    def __init__(self, node: Node, request: Request, deadline: float) -> None:
        self._node = node
        self._clock = node.clock
        self._request = request
        self._data = b""
        self._connection: _Connection | None = None
        self._fault: NodeFault | None = None
        self._watch: Stopwatch | None = None
        self._sent = False
        self._timeout = deadline - self._clock.monotonic()
        #: Monotonic time.
        self.deadline = deadline
        #: The moment of the node's life at which tokens in the reply count as read:
        #: before the request was sent, so that no later connection passes for older.
        self.read_at = 0

    @property
    def unsent(self) -> bool:
        """Whether its request is not sent yet; see :func:`send_all`."""
        return self._connection is not None and not self._sent

    @property
    def hopeless(self) -> bool:
        """Whether no connection can carry its request."""
        return self._connection is None and self._fault is None

    @property
    def seconds_left(self) -> float:
        """How long it may take; below 0 when its time is over."""
        return self.deadline - self._clock.monotonic()

    def fileno(self) -> int:
        """The number of its socket."""
        assert self._connection is not None
        return self._connection.socket.fileno()

    def begin(self) -> None:
        """Take a connection, or begin to make one; nothing is sent yet.

        A fault is kept for :meth:`receive`.
        """
        self._data = self._request.encode()
        with _Faults(self):
            self._connection = self._node.take(self._request)
            if self.unsent:
                self._watch = Stopwatch(self._clock)

    def give_up(self) -> None:
        """Leave the request unsent; a conflict for :meth:`receive`."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.opened_at:
            self._node.give(connection)
        elif connection is not None:
            connection.close()

    def go_on(self) -> bool:
        """Send the request if it is connected by now; whether that is settled."""
        with _Faults(self):
            if not self._send_if_connected():
                if self.seconds_left <= 0:
                    raise TimeoutError
                return False
        return True

    def _send_if_connected(self) -> bool:
        connection, watch = self._connection, self._watch
        assert connection is not None
        assert watch is not None
        if connection.opened_at:
            self._send(connection, self._timeout)
            return True
        if not connection.is_connected():
            return False
        connection.opened_at = self._node.tick()
        left = self._timeout - watch.waited
        self._send(connection, max(left, min(self._timeout, _READING_SECONDS)))
        return True

    def _send(self, connection: _Connection, seconds: float) -> None:
        self._sent = True
        self.read_at = self._node.tick()
        try:
            connection.send(self._data, seconds)
        except (BrokenPipeError, ConnectionResetError):
            self._again_if_stale()
        else:
            # Only now is it asked: this process may have come back late from sending.
            self.deadline = self._clock.monotonic() + seconds

    def receive(self) -> Parsed:
        """The reply; a conflict where no connection could carry the request.

        :raises NodeFault: the node did not answer as a node does.
        """
        if self.unsent:
            send_all([self])
        if self._fault is not None:
            raise self._fault
        if self._connection is None:
            return Ack.CONFLICT
        with _Faults(self):
            reply = self._receive_or_again()
            self._release()
            return reply
        raise self._fault or NodeFault("no reply")

    def abandon(self) -> None:
        """Close the connection, whatever is on its way."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._node.give(connection)

    def _receive_or_again(self) -> Parsed:
        assert self._connection is not None
        try:
            return self._connection.receive(self._request, self.deadline)
        except (_Stale, ConnectionResetError, BrokenPipeError):
            self._again_if_stale()
            send_all([self])
            if self._fault is not None:
                raise self._fault from None
            if self._connection is None:
                return Ack.CONFLICT
            return self._connection.receive(self._request, self.deadline)

    def _again_if_stale(self) -> None:
        """One reconnect for a pooled connection that its server had closed.

        A server that restarted closed all the connections it had. What may not be
        repeated becomes a conflict: the caller reads again and sees what happened.
        """
        assert self._connection is not None
        if not self._connection.reused:
            raise ConnectionResetError("closed without an answer")
        self.abandon()
        self.read_at = 0
        self._node.drop_idle()
        if self._request.repeatable:
            # That may have been noticed late, after a wait for another node.
            self.deadline = self._clock.monotonic() + self._timeout
            self._watch = Stopwatch(self._clock)
            self._sent = False
            self._connection = self._node.connect()


def send_all(exchanges: Iterable[Exchange]) -> None:
    """Send all requests, each as soon as it is connected; that goes on at once.

    Those that are sent are left alone. A fault is kept for ``receive``.
    """
    waiting = [
        exchange for exchange in exchanges if exchange.unsent and not exchange.go_on()
    ]
    while waiting:
        seconds = min(exchange.seconds_left for exchange in waiting)
        if seconds > 0:
            poll = select.poll()
            for exchange in waiting:
                poll.register(exchange.fileno(), select.POLLOUT)
            poll.poll(math.ceil(seconds * 1000))
        waiting = [exchange for exchange in waiting if not exchange.go_on()]


class _Faults:
    """Turns what sockets raise into a fault, and closes on anything else too."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> bool:
        if error is None:
            return False
        self._exchange.abandon()
        if isinstance(error, TimeoutError):
            fault = NodeFault("no answer in time")
        elif isinstance(error, ProtocolError):
            fault = NodeFault(f"not memcached's grammar: {error}")
        elif isinstance(error, (OSError, _Stale)):
            reason = getattr(error, "strerror", None) or "closed the connection"
            fault = NodeFault(reason.lower(), refused=True)
        else:
            return False
        self._exchange._fault = fault
        return True


_opened_at = operator.attrgetter("opened_at")


class Node:
    """One memcached node and its pool of idle connections.

    :param name: the node's name, for messages.
    :param address: python-memcached's syntax, ``inet:host:port`` and so on.
    :param clock: for deadlines.
    """

    def __init__(self, name: str, address: str, clock: Clock) -> None:
        self.name = name
        self.address = address
        self.clock = clock
        self._lock = threading.Lock()
        #: The oldest first.
        self._idle: list[_Connection] = []
        self._process = os.getpid()
        #: Orders the opening of connections and the reading of tokens.
        self._ticks = itertools.count(1)

    def send(self, request: Request, deadline: float) -> Exchange:
        """Begin an exchange: :func:`send_all` sends the request, unless
        :meth:`Exchange.receive`, which reads the reply, comes first.

        :param deadline: monotonic time for the whole exchange, connecting included.
        """
        exchange = Exchange(self, request, deadline)
        exchange.begin()
        return exchange

    def tick(self) -> int:
        """The next moment in this node's life, for tokens."""
        return next(self._ticks)

    def take(self, request: Request) -> _Connection | None:
        """A connection that may carry this request, None if none can.

        The youngest is taken, so that as few stay in use as are needed, and older ones
        are left to those that need one.
        """
        opened_before = request.read_at if isinstance(request, Cas) else None
        if self._process != os.getpid():
            # A child must not share the parent's connections: drop them unread.
            self._lock = threading.Lock()
            self.drop_idle()
            # Last, or another thread would take one of them in between.
            self._process = os.getpid()
        with self._lock:
            idle = self._idle
            place = len(idle)
            if opened_before is not None:
                place = bisect_left(idle, opened_before, key=_opened_at)
            if place:
                return idle.pop(place - 1)
        return None if opened_before is not None else self.connect()

    def connect(self) -> _Connection:
        """A new connection, which is being made."""
        return _Connection(self.address, self.clock)

    def give(self, connection: _Connection) -> None:
        """Take back a connection on which nothing is outstanding."""
        connection.reused = True
        with self._lock:
            insort(self._idle, connection, key=_opened_at)
            if len(self._idle) <= IDLE_CONNECTIONS:
                return
            # Tokens are good on the older ones only: in a crowd these are needed.
            youngest = self._idle.pop()
        youngest.close()

    def drop_idle(self) -> None:
        """Close all idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
