"""One node: real memcached, and servers that misbehave."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from builders import (
    FakeServer,
    answering,
    close_nodes,
    in_child,
    new_node,
    real_node,
    run_together,
)
from flask_resilient_session.node import IDLE_CONNECTIONS, Node, NodeFault
from flask_resilient_session.wire import (
    Absent,
    Ack,
    Add,
    Cas,
    Delete,
    Get,
    Parsed,
    Request,
    Set,
    Value,
)
from servers import Memcached, find_program, wait_until

LIMIT = 10_000


@pytest.fixture(autouse=True)
def _no_connection_is_left() -> Iterator[None]:
    """What a test's nodes have open is closed with it."""
    yield
    close_nodes()


def ask(node: Node, request: Request, seconds: float = 10.0) -> Parsed:
    """One exchange, whole."""
    return node.send(request, time.monotonic() + seconds).receive()


def get(node: Node, key: str = "k", seconds: float = 10.0) -> bytes | None:
    """What the node holds."""
    found = ask(node, Get(key, LIMIT), seconds)
    return found.data if isinstance(found, Value) else None


def read(node: Node, key: str = "k") -> tuple[int, int]:
    """The cas number of an item, and when it was read."""
    exchange = node.send(Get(key, LIMIT), time.monotonic() + 10)
    found = exchange.receive()
    assert isinstance(found, Value)
    return found.cas, exchange.read_at


def connections(server: Memcached) -> int:
    """Connections that the server has, this question's own apart."""
    return int(server.stats()["curr_connections"]) - 1


# --- what a healthy node does ----------------------------------------------------


def test_an_item_from_first_to_last(memcached: Memcached) -> None:
    """Added, read, replaced, overwritten, removed, and each step is seen."""
    node = real_node(memcached)
    assert ask(node, Get("k", LIMIT)) == Absent()
    assert ask(node, Add("k", b"one", 60)) is Ack.STORED
    assert ask(node, Add("k", b"two", 60)) is Ack.CONFLICT
    assert get(node) == b"one"
    assert ask(node, Cas("k", b"three", 60, *read(node))) is Ack.STORED
    assert ask(node, Set("k", b"four", 60)) is Ack.STORED
    assert memcached.raw_get("k") == b"four"
    assert ask(node, Delete("k")) is Ack.STORED
    assert ask(node, Delete("k")) is Ack.STORED
    assert memcached.raw_get("k") is None


def test_a_cas_meets_a_concurrent_write(memcached: Memcached) -> None:
    """What was written or removed since the read is not overwritten."""
    node = real_node(memcached)
    memcached.raw_set("k", b"one")
    token = read(node)
    memcached.raw_set("k", b"concurrent")
    assert ask(node, Cas("k", b"late", 60, *token)) is Ack.CONFLICT
    token = read(node)
    memcached.raw_delete("k")
    assert ask(node, Cas("k", b"late", 60, *token)) is Ack.CONFLICT
    assert memcached.raw_get("k") is None


def test_an_item_expires(memcached: Memcached) -> None:
    """The time to live reaches the server."""
    ask(real_node(memcached), Set("k", b"one", 60))
    assert memcached.raw_ttl("k") in range(50, 61)


def test_a_large_item_comes_back_whole(memcached: Memcached) -> None:
    """Many reads of the socket make one reply."""
    node, large = real_node(memcached), bytes(range(256)) * 3000
    assert ask(node, Set("k", large, 60)) is Ack.STORED
    found = ask(node, Get("k", len(large)))
    assert isinstance(found, Value)
    assert found.data == large


def test_what_the_server_refuses(memcached: Memcached) -> None:
    """Over the server's item size: refused, and the connection goes on."""
    node = real_node(memcached)
    memcached.raw_set("k", b"old")
    answer = ask(node, Cas("k", bytes(2_000_000), 60, *read(node)))
    assert answer is Ack.REFUSED
    assert ask(node, Add("other", b"fits", 60)) is Ack.STORED
    assert connections(memcached) == 1


def test_an_item_over_the_limit_is_not_read(memcached: Memcached) -> None:
    """Its connection is closed with the rest of it, and the next one is clean."""
    node = real_node(memcached)
    memcached.raw_set("k", bytes(500_000))
    found = ask(node, Get("k", 100))
    assert isinstance(found, Value)
    assert found.data is None
    assert not node.has_idle()
    memcached.raw_set("k", b"short")
    assert get(node) == b"short"


def test_flags_come_with_the_item(memcached: Memcached) -> None:
    """Whoever asked decides what to think of them; nothing is decoded here."""
    memcached.raw_set("k", b"\x80\x04N.", flags=1)
    found = ask(real_node(memcached), Get("k", LIMIT))
    assert isinstance(found, Value)
    assert (found.data, found.flags) == (b"\x80\x04N.", 1)


# --- connections -----------------------------------------------------------------


def test_one_connection_serves_one_request_after_another(memcached: Memcached) -> None:
    """Nothing is opened while one is idle."""
    node = real_node(memcached)
    assert not node.has_idle()
    for _ in range(20):
        get(node)
    assert node.has_idle()
    assert connections(memcached) == 1


def test_two_exchanges_at_once_do_not_meet(memcached: Memcached) -> None:
    """Each has its own connection, whatever the order of reading."""
    node = real_node(memcached)
    memcached.raw_set("a", b"for a")
    memcached.raw_set("b", b"for b")
    deadline = time.monotonic() + 10
    first = node.send(Get("a", LIMIT), deadline)
    second = node.send(Get("b", LIMIT), deadline)
    answers = [second.receive(), first.receive()]
    assert [a.data for a in answers if isinstance(a, Value)] == [b"for b", b"for a"]


def test_many_threads_each_get_their_own(memcached: Memcached) -> None:
    """No reply goes astray, and no more connections are open than threads ran."""
    node = real_node(memcached)
    for number in range(8):
        memcached.raw_set(f"k{number}", b"v%d" % number)

    def work(number: int) -> set[bytes | None]:
        return {get(node, f"k{number}") for _ in range(100)}

    results = run_together(*(partial(work, number) for number in range(8)))
    assert results == [{b"v%d" % number} for number in range(8)]
    assert connections(memcached) <= 8


def test_idle_connections_are_bounded(memcached: Memcached) -> None:
    """What a burst opened beyond the bound is closed again."""
    node = real_node(memcached)
    deadline = time.monotonic() + 20
    burst = [node.send(Get("k", LIMIT), deadline) for _ in range(IDLE_CONNECTIONS + 8)]
    assert all(exchange.receive() == Absent() for exchange in burst)
    wait_until(lambda: connections(memcached) == IDLE_CONNECTIONS)


def test_a_read_after_one_way_writes_sees_them(memcached: Memcached) -> None:
    """Nobody waits for the writes, and the next read on the connection is no reply
    to any of them.
    """
    node = real_node(memcached)
    for number in range(50):
        data = b"%d" % number
        exchange = node.send(Set("k", data, 60), time.monotonic() + 10, one_way=True)
        exchange.release_unanswered()
        assert get(node) == data
    # One that the server refuses is not answered either.
    too_large = Set("k", bytes(2_000_000), 60)
    node.send(too_large, time.monotonic() + 10, one_way=True).release_unanswered()
    assert get(node) is None
    assert connections(memcached) == 1


def test_a_child_and_its_parent_read_their_own(memcached: Memcached) -> None:
    """A fork with an open connection: neither ever reads the other's reply."""
    node = real_node(memcached)
    memcached.raw_set("parent", b"for the parent")
    memcached.raw_set("child", b"for the child")
    assert get(node, "parent") == b"for the parent"

    def child() -> bool:
        assert not node.has_idle()
        return all(get(node, "child") == b"for the child" for _ in range(200))

    stop = threading.Event()
    seen: set[bytes | None] = set()

    def parent() -> None:
        while not stop.is_set():
            seen.add(get(node, "parent"))

    parents_thread = threading.Thread(target=parent)
    # The node's lock must not be held by the thread at the moment of the fork
    # for the child to be able to go on: that is part of what is tested.
    parents_thread.start()
    try:
        assert in_child(child)
    finally:
        stop.set()
        parents_thread.join(10)
    assert seen == {b"for the parent"}


def test_an_interrupted_exchange_closes_its_connection(memcached: Memcached) -> None:
    """A foreign timeout between send and receive: the next read gets its own value."""

    class ForeignTimeout(BaseException):
        pass

    node = real_node(memcached)
    memcached.raw_set("mine", b"mine")
    memcached.raw_set("theirs", b"theirs")
    get(node)
    exchange = node.send(Get("theirs", LIMIT), time.monotonic() + 10)

    class Interrupting(Get):
        def parse(self, data: bytes) -> tuple[Parsed, int] | None:
            raise ForeignTimeout

    exchange._request = Interrupting("theirs", LIMIT)
    with pytest.raises(ForeignTimeout):
        exchange.receive()
    assert not node.has_idle()
    assert get(node, "mine") == b"mine"
    # The same for one that is given up by whoever holds it.
    node.send(Get("theirs", LIMIT), time.monotonic() + 10).abandon()
    assert get(node, "mine") == b"mine"


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
    assert not node.has_idle()


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
        assert not node.has_idle()
    memcached.thaw()
    assert get(node) is None


def test_a_black_hole_is_held_to_the_deadline() -> None:
    """Where not even connecting is answered, the deadline counts for that too."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = listener.getsockname()[1]
    # The queue of waiting connections is filled, so that the next one is ignored.
    waiting = []
    for _ in range(3):
        waiting.append(socket.socket())
        waiting[-1].setblocking(False)
        waiting[-1].connect_ex(("127.0.0.1", port))
    node = new_node(f"inet:127.0.0.1:{port}")
    with held(0.29, 2.0):
        get(node, seconds=0.3)
    for one in (*waiting, listener):
        one.close()


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
        assert not node.has_idle()


def test_a_deadline_long_past_still_reads_what_is_there(memcached: Memcached) -> None:
    """The time may have been spent on another node: a reply that came is read."""
    node = real_node(memcached)
    memcached.raw_set("k", b"there")
    exchange = node.send(Get("k", LIMIT), time.monotonic() + 10)
    wait_until(lambda: memcached.stats()["get_hits"] == "1")
    exchange.deadline = time.monotonic() - 5
    answer = exchange.receive()
    assert isinstance(answer, Value)
    assert answer.data == b"there"


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
        assert not node.has_idle()


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
