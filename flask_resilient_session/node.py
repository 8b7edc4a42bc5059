"""One memcached node: its connections, and one exchange in two halves.

Sending and receiving are separate, so that a caller can send to two nodes before
it reads from either. The connections come from python-memcached's host objects,
one per connection; of its reading and writing nothing is used, because its timeout
is per ``recv`` and it never compares the returned key with the asked one.

A connection is either idle in the pool, with nothing sent and nothing to read, or
owned by one exchange. Whatever interrupts an exchange, a foreign ``Timeout`` raised
by a greenlet included, closes its connection: a reply must never meet the wrong
request.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import memcache

from .wire import Ack, Cas, Parsed, ProtocolError, Request

#: Idle connections kept per node and process. More are opened when more requests
#: run at once, and closed when these many already idle.
IDLE_CONNECTIONS: Final = 32

#: One read takes a whole session of common size.
_READ_BYTES: Final = 64 * 1024

#: Reads and writes that are already possible get this long even when the deadline
#: has passed, since the time may have been spent waiting for another node.
_LAST_CHANCE_SECONDS: Final = 0.001


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
    """A connected socket that enforces deadlines, and when it was opened."""

    __slots__ = ("_clock", "host", "opened_at", "reused", "socket")

    def __init__(
        self,
        address: str,
        opened_at: int,
        deadline: float,
        clock: Callable[[], float],
    ) -> None:
        self.opened_at = opened_at
        self.reused = False
        self._clock = clock
        self.host: Any = memcache.Client([address]).servers[0]
        connected = socket.socket(self.host.family, socket.SOCK_STREAM)
        try:
            connected.settimeout(max(deadline - clock(), _LAST_CHANCE_SECONDS))
            connected.connect(self.host.address)
            if self.host.family != socket.AF_UNIX:
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            connected.close()
            raise
        self.host.socket = self.socket = connected

    def send(self, data: bytes, deadline: float) -> None:
        self.socket.settimeout(max(deadline - self._clock(), _LAST_CHANCE_SECONDS))
        self.socket.sendall(data)

    def receive(self, request: Request, deadline: float) -> Parsed:
        """The reply, whole and alone, or an exception that closes the connection."""
        data = self._read(deadline)
        if not data:
            raise _Stale
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
        self.socket.settimeout(max(deadline - self._clock(), _LAST_CHANCE_SECONDS))
        return self.socket.recv(_READ_BYTES)

    def _read_on(self, deadline: float) -> bytes:
        """More of a reply that has begun."""
        if self._clock() >= deadline:
            raise TimeoutError("the reply is still incomplete at its deadline")
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
    """A request sent to a node whose reply has not been read yet."""

    __slots__ = ("_connection", "_fault", "_node", "_request", "deadline", "read_at")

    def __init__(self, node: Node, request: Request, deadline: float) -> None:
        self._node = node
        self._request = request
        self._connection: _Connection | None = None
        self._fault: NodeFault | None = None
        #: Monotonic time; may be put off by whoever made this exchange wait.
        self.deadline = deadline
        #: The moment of the node's life at which tokens in the reply count as read:
        #: before the request was sent, so that no later connection passes for older.
        self.read_at = 0

    def send(self) -> None:
        """Send the request; a fault is kept for :meth:`receive`."""
        data = self._request.encode()
        with _Faults(self):
            self._connection = self._node.take(self._request, self.deadline)
            if self._connection is not None:
                self.read_at = self._node.tick()
                try:
                    self._connection.send(data, self.deadline)
                except (BrokenPipeError, ConnectionResetError):
                    self._again_if_stale(data)

    def receive(self) -> Parsed:
        """The reply; a conflict where no connection could carry the request.

        :raises NodeFault: the node did not answer as a node does.
        """
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
            self._again_if_stale(self._request.encode())
            if self._connection is None:
                return Ack.CONFLICT
            return self._connection.receive(self._request, self.deadline)

    def _again_if_stale(self, data: bytes) -> None:
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
            self._connection = self._node.connect(self.deadline)
            self.read_at = self._node.tick()
            self._connection.send(data, self.deadline)


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


class Node:
    """One memcached node and its pool of idle connections.

    :param name: the node's name, for messages.
    :param address: python-memcached's syntax, ``inet:host:port`` and so on.
    :param clock: monotonic seconds.
    """

    def __init__(self, name: str, address: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.address = address
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._process = os.getpid()
        #: Orders the opening of connections and the reading of tokens.
        self._ticks = itertools.count(1)

    def send(self, request: Request, deadline: float) -> Exchange:
        """Send a request; :meth:`Exchange.receive` reads the reply.

        :param deadline: monotonic time for the whole exchange, connecting included.
        """
        exchange = Exchange(self, request, deadline)
        exchange.send()
        return exchange

    def has_idle(self) -> bool:
        """Whether a request can be sent without connecting first."""
        return bool(self._idle) and self._process == os.getpid()

    def tick(self) -> int:
        """The next moment in this node's life, for tokens."""
        return next(self._ticks)

    def take(self, request: Request, deadline: float) -> _Connection | None:
        """A connection that may carry this request, None if none can.

        The last used is taken first, so that as few stay in use as are needed.
        """
        opened_before = request.read_at if isinstance(request, Cas) else None
        if self._process != os.getpid():
            # A child must not share the parent's connections: drop them unread.
            self._lock = threading.Lock()
            self.drop_idle()
            # Last, or another thread would take one of them in between.
            self._process = os.getpid()
        with self._lock:
            for index in range(len(self._idle) - 1, -1, -1):
                if opened_before is None or self._idle[index].opened_at < opened_before:
                    return self._idle.pop(index)
        return None if opened_before is not None else self.connect(deadline)

    def connect(self, deadline: float) -> _Connection:
        """A new connection."""
        return _Connection(self.address, next(self._ticks), deadline, self._clock)

    def give(self, connection: _Connection) -> None:
        """Take back a connection on which nothing is outstanding."""
        connection.reused = True
        with self._lock:
            if len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def drop_idle(self) -> None:
        """Close all idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
