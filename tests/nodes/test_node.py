"""One node of real memcached, and its connections."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from builders import (
    ask,
    get,
    real_node,
)
from flask_resilient_session.core.answers import Ack
from flask_resilient_session.memcached.node import IDLE_CONNECTIONS
from flask_resilient_session.memcached.text_protocol import (
    Absent,
    Add,
    Cas,
    Delete,
    Get,
    Parsed,
    Set,
    Value,
)
from items import LIMIT, connections, read
from misbehaving import in_child, run_together
from servers import Memcached, wait_until

pytestmark = pytest.mark.usefixtures("nodes_are_closed")


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
    assert answer is Ack.REJECTED
    assert ask(node, Add("other", b"fits", 60)) is Ack.STORED
    assert connections(memcached) == 1


def test_an_item_over_the_limit_is_not_read(memcached: Memcached) -> None:
    """The rest of it is skipped, so that its token stays good on the connection."""
    node = real_node(memcached)
    memcached.raw_set("k", bytes(500_000))
    found = ask(node, Get("k", 100))
    assert isinstance(found, Value)
    assert found.data is None
    assert node._idle
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
    assert not node._idle
    for _ in range(20):
        get(node)
    assert node._idle
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


def test_after_a_burst_the_oldest_stay(memcached: Memcached) -> None:
    """Who has read something can write it back on them, whoever comes meanwhile."""
    node = real_node(memcached)
    memcached.raw_set("k", b"old")
    deadline = time.monotonic() + 20
    reader = node.send(Get("k", LIMIT), deadline)
    burst = [node.send(Get("k", LIMIT), deadline) for _ in range(IDLE_CONNECTIONS + 8)]
    for exchange in burst:
        exchange.receive()
    found = reader.receive()
    assert isinstance(found, Value)
    place = Cas("k", b"new", 60, found.cas, reader.read_at)
    assert ask(node, place) is Ack.STORED


def test_a_child_and_its_parent_read_their_own(memcached: Memcached) -> None:
    """A fork with an open connection: neither ever reads the other's reply."""
    node = real_node(memcached)
    memcached.raw_set("parent", b"for the parent")
    memcached.raw_set("child", b"for the child")
    assert get(node, "parent") == b"for the parent"

    def child() -> bool:
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
    assert not node._idle
    assert get(node, "mine") == b"mine"
    # The same for one that is given up by whoever holds it.
    node.send(Get("theirs", LIMIT), time.monotonic() + 10).abandon()
    assert get(node, "mine") == b"mine"
