"""One node that goes away, does not answer, or answers wrongly."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builders import (
    ask,
    get,
    new_node,
    real_node,
)
from flask_resilient_session.core.answers import Ack
from flask_resilient_session.memcached.node import NodeFault, send_all
from flask_resilient_session.memcached.text_protocol import (
    Absent,
    Add,
    Cas,
    Delete,
    Get,
    Request,
    Set,
    Value,
)
from items import LIMIT, read
from misbehaving import FakeServer, answering, black_hole
from servers import Memcached, find_program, wait_until

pytestmark = pytest.mark.usefixtures("nodes_are_closed")


# --- a node that goes away -------------------------------------------------------


def test_a_node_that_is_down_refuses(memcached: Memcached) -> None:
    """Known to be down: no waiting, and it is said so."""
    node = real_node(memcached)
    memcached.kill()
    with pytest.raises(NodeFault) as caught:
        get(node)
    assert caught.value.refused


def test_a_node_killed_between_two_calls(memcached: Memcached) -> None:
    """The idle connection is dead, the reconnect is refused."""
    node = real_node(memcached)
    get(node)
    memcached.kill()
    with pytest.raises(NodeFault) as caught:
        get(node)
    assert caught.value.refused
    assert not node._idle


def test_a_node_restarted_between_two_calls(memcached: Memcached) -> None:
    """A read reconnects once and finds the node empty; so do set and delete."""
    node = real_node(memcached)
    for request, answer in (
        (Get("k", LIMIT), Absent()),
        (Set("k", b"new", 60), Ack.STORED),
        (Delete("k"), Ack.STORED),
    ):
        ask(node, Set("k", b"old", 60))
        memcached.restart()
        assert ask(node, request) == answer


@pytest.mark.parametrize("again", [Add("k", b"x", 60), Cas("k", b"x", 60, 1, 10**9)])
def test_what_may_not_be_repeated_is_a_conflict(
    memcached: Memcached, again: Request
) -> None:
    """After a restart nobody knows whether it was applied: read again."""
    node = real_node(memcached)
    get(node)
    memcached.restart()
    assert ask(node, again) is Ack.CONFLICT
    assert memcached.raw_get("k") is None
    assert get(node) is None


def test_a_token_from_before_a_restart_never_matches(memcached: Memcached) -> None:
    """The counter starts anew with the server; another item may have that number."""
    node = real_node(memcached)
    ask(node, Set("k", b"old", 60))
    number, read_at = read(node)
    memcached.restart()
    assert get(node) is None
    for other in range(number):
        memcached.raw_set("k", b"another %d" % other)
    assert read(node)[0] == number
    assert ask(node, Cas("k", b"late", 60, number, read_at)) is Ack.CONFLICT
    assert (memcached.raw_get("k") or b"").startswith(b"another")
    assert ask(node, Cas("k", b"in time", 60, *read(node))) is Ack.STORED


def test_a_token_is_good_on_any_older_connection(memcached: Memcached) -> None:
    """A busy pool does not turn every write into a conflict."""
    node = real_node(memcached)
    memcached.raw_set("k", b"old")
    deadline = time.monotonic() + 10
    pair = [node.send(Get("other", LIMIT), deadline) for _ in range(2)]
    for exchange in pair:
        exchange.receive()
    token = read(node)
    busy = node.send(Get("other", LIMIT), deadline)
    assert ask(node, Cas("k", b"new", 60, *token)) is Ack.STORED
    busy.receive()


# --- a node that does not answer -------------------------------------------------


@contextmanager
def held(at_least: float, at_most: float) -> Iterator[None]:
    """The block ends by a timeout, within these seconds."""
    started = time.monotonic()
    with pytest.raises(NodeFault, match="no answer in time") as caught:
        yield
    assert not caught.value.refused
    assert at_least <= time.monotonic() - started < at_most


def test_a_frozen_node_is_held_to_the_deadline(memcached: Memcached) -> None:
    """It accepts and never answers, on an idle connection and on a new one."""
    node = real_node(memcached)
    get(node)
    memcached.freeze()
    for _ in range(2):
        with held(0.29, 2.0):
            get(node, seconds=0.3)
        assert not node._idle
    memcached.thaw()
    assert get(node) is None


def test_a_black_hole_is_held_to_the_deadline() -> None:
    """Where not even connecting is answered, the deadline counts for that too."""
    with black_hole() as address:
        node = new_node(address)
        with held(0.29, 2.0):
            get(node, seconds=0.3)


def test_a_dripping_node_is_held_to_the_deadline() -> None:
    """A byte now and then does not extend the time."""

    def drip(server: FakeServer, connection: socket.socket) -> None:
        server.request(connection)
        for byte in b"VALUE k 0 1000 7\r\n" + b"x" * 1000:
            connection.sendall(bytes([byte]))
            if server.closing.wait(0.05):
                return

    with FakeServer(drip) as server:
        node = new_node(server.address)
        with held(0.59, 1.2):
            get(node, seconds=0.6)
        assert not node._idle


def test_a_deadline_long_past_still_reads_what_is_there(memcached: Memcached) -> None:
    """The time may have been spent on another node: a reply that came is read."""
    node = real_node(memcached)
    memcached.raw_set("k", b"there")
    exchange = node.send(Get("k", LIMIT), time.monotonic() + 10)
    send_all([exchange])
    wait_until(lambda: memcached.stats()["get_hits"] == "1")
    exchange.deadline = time.monotonic() - 5
    answer = exchange.receive()
    assert isinstance(answer, Value)
    assert answer.data == b"there"


def test_a_reply_that_comes_as_the_time_is_up_is_read(memcached: Memcached) -> None:
    """A wait that timed out is followed by a last look, without waiting."""
    node = real_node(memcached)
    memcached.raw_set("k", b"there")
    exchange = node.send(Get("k", LIMIT), time.monotonic() + 10)
    send_all([exchange])
    connection = exchange._connection
    assert connection is not None

    class Late:
        """A socket whose process comes back too late from its first wait."""

        def __init__(self, inner: socket.socket) -> None:
            self._inner = inner
            self._waits = False

        def settimeout(self, seconds: float) -> None:
            self._waits = seconds > 0
            self._inner.settimeout(seconds)

        def recv(self, size: int) -> bytes:
            if self._waits:
                wait_until(lambda: memcached.stats()["get_hits"] == "1")
                raise TimeoutError
            return self._inner.recv(size)

    inner = connection.socket
    connection.socket = Late(inner)  # type: ignore[assignment]
    answer = exchange.receive()
    connection.socket = inner
    assert isinstance(answer, Value)
    assert answer.data == b"there"


def test_a_connection_that_is_there_is_used_however_late_that_is_noticed() -> None:
    """Its time is over, but what it has connected to answers."""
    with FakeServer(answering(b"END\r\n")) as server, black_hole() as address:
        node = new_node(address)
        exchange = node.send(Get("k", LIMIT), time.monotonic() + 10)
        assert exchange.unsent
        # As if the network had let it through while this process was busy.
        assert exchange._connection is not None
        exchange._connection.close()
        exchange._connection = new_node(server.address).connect()
        exchange.deadline = time.monotonic() - 5
        assert exchange.receive() == Absent()


def test_time_that_connecting_took_is_not_there_for_the_reply() -> None:
    """The deadline is for the whole exchange."""
    with black_hole() as address:
        node = new_node(address)
        exchange = node.send(Get("k", LIMIT), time.monotonic() + 0.3)
        with held(0.29, 0.5):
            exchange.receive()


# --- a node that answers wrongly -------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        b"VALUE other 0 1 7\r\nx\r\nEND\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"VALUE k 0 1 7\r\nx\r\nEND\r\nEND\r\n",
        b"END\r\nSTORED\r\n",
        b"VALUE k 0 5 7\r\nx\r\nEND\r\n\r\n\r\n",
        b"SERVER_ERROR out of memory\r\n",
    ],
)
def test_a_reply_that_does_not_fit_closes_the_connection(reply: bytes) -> None:
    """Another key, another protocol, too many bytes: nothing of it is used."""
    with FakeServer(answering(reply)) as server:
        node = new_node(server.address)
        with pytest.raises(NodeFault, match="grammar") as caught:
            get(node)
        assert not caught.value.refused
        assert not node._idle


def test_a_reply_that_breaks_off() -> None:
    """Half a reply and a closed connection are not a miss."""

    def half(server: FakeServer, connection: socket.socket) -> None:
        server.request(connection)
        connection.sendall(b"VALUE k 0 100 7\r\nxxx")
        connection.close()

    with FakeServer(half) as server:
        node = new_node(server.address)
        with pytest.raises(NodeFault, match="closed"):
            get(node)
        assert server.connections == 1


def test_a_reset_of_a_new_connection_is_a_fault() -> None:
    """A connection that was never used before is not tried again."""

    def reset(server: FakeServer, connection: socket.socket) -> None:
        linger = b"\1\0\0\0\0\0\0\0"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        server.request(connection)
        connection.close()

    with FakeServer(reset) as server:
        with pytest.raises(NodeFault) as caught:
            get(new_node(server.address))
        assert caught.value.refused
        assert server.connections == 1


def test_a_server_that_closes_what_it_answered_is_asked_again_once() -> None:
    """One reconnect, with the same request, and no more."""

    def once(server: FakeServer, connection: socket.socket) -> None:
        server.request(connection)
        if server.connections < 3:
            connection.sendall(b"END\r\n")
        connection.close()

    with FakeServer(once) as server:
        node = new_node(server.address)
        assert get(node) is None
        assert get(node) is None
        with pytest.raises(NodeFault):
            get(node)
        assert server.connections == 3


# --- addresses -------------------------------------------------------------------


def test_a_node_on_a_unix_socket(tmp_path: Path) -> None:
    """The protocol is the same there."""
    path = tmp_path / "memcached.sock"
    command = [find_program("memcached"), "-s", str(path), "-u", "root", "-m", "8"]
    process = subprocess.Popen(command)
    try:
        wait_until(path.exists, 10, "the socket")
        node = new_node(f"unix:{path}")
        assert ask(node, Set("k", b"local", 60)) is Ack.STORED
        assert get(node) == b"local"
    finally:
        process.kill()
        process.wait(10)


def test_a_node_on_ipv6(memcached: Memcached) -> None:
    """The loopback's IPv6 address where there is one, its IPv4 address otherwise."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        node = real_node(memcached)
        assert ask(node, Set("k", b"old", 60)) is Ack.STORED
        return
    with Memcached("::1") as server:
        node = real_node(server)
        assert ask(node, Set("k", b"new", 60)) is Ack.STORED
        assert server.raw_get("k") == b"new"
