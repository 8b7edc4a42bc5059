"""Several nodes at once: what is parallel, who is blamed, what replies mean."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from builders import (
    FIRST_HOME,
    KEYRING,
    NOW,
    PAIR,
    PREFIX,
    SECOND_HOME,
    FakeServer,
    answering,
    close_nodes,
    make_cluster,
    new_node,
    real_node,
    record,
    session_key,
    usual_breaker,
)
from flask_resilient_session.cluster import Cluster
from flask_resilient_session.events import Observer, node_down, node_up
from flask_resilient_session.health import Breaker
from flask_resilient_session.node import Node
from flask_resilient_session.record import (
    Corrupt,
    CorruptBytes,
    Hit,
    Keyring,
    Miss,
    Reply,
    Tombstone,
    Unreachable,
)
from flask_resilient_session.wire import Ack, Request
from servers import Memcached

KEY = session_key("alice")
STORED_KEY = PREFIX + KEY
SEALED = KEYRING.seal(KEY, record())


@pytest.fixture(autouse=True)
def _no_connection_is_left() -> Iterator[None]:
    """What a test's nodes have open is closed with it."""
    yield
    close_nodes()


def pair_of(first: Node, second: Node, **changes: Any) -> Cluster:
    """A cluster of two nodes."""
    return make_cluster({FIRST_HOME: first, SECOND_HOME: second}, **changes)


def real_pair(nodes: list[Memcached], **changes: Any) -> Cluster:
    """A cluster of two real servers."""
    return pair_of(real_node(nodes[0]), real_node(nodes[1], SECOND_HOME), **changes)


def read(cluster: Cluster, seconds: float = 20.0) -> dict[str, Reply]:
    """What both nodes hold."""
    return cluster.read(PAIR, KEY, KEYRING, time.monotonic() + seconds)


def write(cluster: Cluster, request: Request) -> list[Ack]:
    """The same request to both nodes."""
    requests = [(name, request) for name in PAIR]
    return cluster.write(requests, time.monotonic() + 20)


@contextmanager
def signals() -> Iterator[list[tuple[str, str]]]:
    """The names of the nodes that went down or came up, as listeners hear of it."""
    heard: list[tuple[str, str]] = []

    def down(_sender: object, node: str, reason: str) -> None:
        assert reason
        heard.append(("down", node))

    def up(_sender: object, node: str) -> None:
        heard.append(("up", node))

    with node_down.connected_to(down), node_up.connected_to(up):
        yield heard


def hang(server: FakeServer, connection: socket.socket) -> None:
    """Takes requests and answers none."""
    while server.request(connection):
        pass


# --- parallel --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read", "write"])
def test_both_requests_are_sent_before_either_is_answered(kind: str) -> None:
    """Two servers that answer only once both were asked: one round trip."""
    both_asked = threading.Barrier(2)
    reply = b"END\r\n" if kind == "read" else b"STORED\r\n"

    def serve(server: FakeServer, connection: socket.socket) -> None:
        while server.request(connection):
            both_asked.wait(20)
            connection.sendall(reply)

    with FakeServer(serve) as first, FakeServer(serve) as second:
        cluster = pair_of(
            new_node(first.address), new_node(second.address), node_timeout=20.0
        )
        for _ in range(2):  # with new connections, then with idle ones
            if kind == "read":
                assert read(cluster) == dict.fromkeys(PAIR, Miss())
            else:
                request = cluster.place(KEY, SEALED, 60, None)
                assert write(cluster, request) == [Ack.STORED, Ack.STORED]
        assert cluster._observer.stats["round_trips"] == 2


def test_answers_are_in_the_order_of_the_requests(nodes: list[Memcached]) -> None:
    """Which node is asked first, because it is connected, does not matter."""
    cluster = real_pair(nodes)
    nodes[1].raw_set(STORED_KEY, b"there")
    cluster.read([SECOND_HOME], KEY, KEYRING, time.monotonic() + 20)
    add = cluster.place(KEY, SEALED, 60, None)
    assert write(cluster, add) == [Ack.STORED, Ack.CONFLICT]


def test_nothing_asked_is_no_round_trip() -> None:
    """Without a node to ask, nothing is counted."""
    cluster = make_cluster({})
    assert cluster.read([], KEY, KEYRING, time.monotonic() + 1) == {}
    assert cluster._observer.stats["round_trips"] == 0


# --- what replies mean -----------------------------------------------------------


def test_what_was_placed_is_read(nodes: list[Memcached]) -> None:
    """Add, read, replace, bury and remove, on both nodes at once."""
    cluster = real_pair(nodes)
    assert read(cluster) == dict.fromkeys(PAIR, Miss())
    stored = [Ack.STORED, Ack.STORED]
    assert write(cluster, cluster.place(KEY, SEALED, 60, None)) == stored
    replies = read(cluster)
    for name, server in zip(PAIR, nodes, strict=True):
        reply = replies[name]
        assert isinstance(reply, Hit)
        assert reply.copy == record()
        newer = KEYRING.seal(KEY, record(writes=5))
        place = cluster.place(KEY, newer, 60, reply.token)
        deadline = time.monotonic() + 20
        assert cluster.write([(name, place)], deadline) == [Ack.STORED]
        assert cluster.write([(name, place)], deadline) == [Ack.CONFLICT]
        assert server.raw_get(STORED_KEY) == newer
    dead = Tombstone("ended", NOW)
    assert write(cluster, cluster.bury(KEY, KEYRING.seal(KEY, dead), 60)) == stored
    assert [r.copy for r in read(cluster).values() if isinstance(r, Hit)] == [dead] * 2
    assert write(cluster, cluster.remove(KEY)) == stored
    assert read(cluster) == dict.fromkeys(PAIR, Miss())


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        (b"", 0),
        (b"\x80\x04N.", 0),
        (SEALED[:-1], 0),
        (SEALED, 1),
        (KEYRING.seal(session_key("bob"), record()), 0),
        (Keyring(["test secret"], "another").seal(KEY, record()), 0),
        (b"x" * 400_000, 0),
    ],
)
def test_what_is_no_record_of_this_session_is_corrupt(
    nodes: list[Memcached], data: bytes, flags: int
) -> None:
    """Garbage, foreign, flagged or far too long: not used, but replaceable."""
    cluster = real_pair(nodes)
    nodes[0].raw_set(STORED_KEY, data, flags=flags)
    reply = read(cluster)[FIRST_HOME]
    assert isinstance(reply, Corrupt)
    place = cluster.place(KEY, SEALED, 60, reply.token)
    answers = cluster.write([(FIRST_HOME, place)], time.monotonic() + 20)
    assert answers in ([Ack.STORED], [Ack.CONFLICT])
    # Reading too much cost the connection that the token was read on.
    assert (answers == [Ack.CONFLICT]) is (len(data) > 300_000)


@pytest.mark.parametrize(
    "data", [Keyring(["next"], "").seal(KEY, record()), SEALED[:3] + b"\2" + SEALED[4:]]
)
def test_a_record_of_another_key_or_format_is_unreachable(
    nodes: list[Memcached], data: bytes
) -> None:
    """Another worker may know it: it has no token, so that nothing replaces it."""
    nodes[0].raw_set(STORED_KEY, data)
    replies = read(real_pair(nodes))
    assert isinstance(replies[FIRST_HOME], Unreachable)
    assert replies[SECOND_HOME] == Miss()


def test_equal_copies_are_opened_once(
    nodes: list[Memcached], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second copy is the rule, and need not be verified again."""
    opened: list[bytes] = []
    unseal = Keyring.unseal

    def counting(self: Keyring, key: str, data: bytes) -> Any:
        opened.append(data)
        return unseal(self, key, data)

    monkeypatch.setattr(Keyring, "unseal", counting)
    cluster = real_pair(nodes)
    for server in nodes:
        server.raw_set(STORED_KEY, SEALED)
    replies = read(cluster)
    assert opened == [SEALED]
    tokens = {reply.token for reply in replies.values() if isinstance(reply, Hit)}
    assert [type(reply) for reply in replies.values()] == [Hit, Hit]
    assert tokens
    newer = KEYRING.seal(KEY, record(writes=9))
    nodes[1].raw_set(STORED_KEY, newer)
    replies = read(cluster)
    assert opened[1:] == [SEALED, newer]
    # Equal garbage stays garbage.
    for server in nodes:
        server.raw_set(STORED_KEY, b"garbage")
    assert all(isinstance(reply, Corrupt) for reply in read(cluster).values())
    assert unseal(KEYRING, KEY, b"garbage") == CorruptBytes()


# --- nodes that fail -------------------------------------------------------------


def test_a_hung_node_costs_three_timeouts_and_is_then_skipped(
    nodes: list[Memcached], caplog: pytest.LogCaptureFixture
) -> None:
    """Afterwards nothing waits for it, and the other node answers all the time."""
    nodes[0].raw_set(STORED_KEY, SEALED)
    cluster = real_pair(nodes, new_breaker=usual_breaker, node_timeout=0.2)
    read(cluster)
    nodes[1].freeze()
    slow = 0
    with signals() as heard, caplog.at_level(logging.INFO):
        for _ in range(20):
            started = time.monotonic()
            replies = read(cluster)
            slow += time.monotonic() - started >= 0.2
            assert isinstance(replies[FIRST_HOME], Hit)
            assert isinstance(replies[SECOND_HOME], Unreachable)
    assert slow >= 3
    assert cluster._observer.stats["node_faults"] == 3
    assert heard == [("down", SECOND_HOME)]
    assert cluster.suspects() == {SECOND_HOME}
    assert [line.levelname for line in caplog.records] == ["WARNING"]
    assert SECOND_HOME in caplog.text
    assert KEY not in caplog.text


def test_a_refused_node_is_skipped_at_once_and_used_again_later(
    nodes: list[Memcached], caplog: pytest.LogCaptureFixture
) -> None:
    """Down with the first refusal, up with the first probe that succeeds."""

    def breaker() -> Breaker:
        return Breaker(first_pause=0.05, longest_pause=0.05)

    cluster = real_pair(nodes, new_breaker=breaker)
    nodes[0].kill()
    with signals() as heard, caplog.at_level(logging.INFO):
        assert isinstance(read(cluster)[FIRST_HOME], Unreachable)
        assert heard == [("down", FIRST_HOME)]
        nodes[0].start()
        deadline = time.monotonic() + 20
        while cluster.suspects() and time.monotonic() < deadline:
            read(cluster)
        assert heard == [("down", FIRST_HOME), ("up", FIRST_HOME)]
    assert read(cluster)[FIRST_HOME] == Miss()
    assert [line.levelname for line in caplog.records] == ["WARNING", "INFO"]


def test_the_other_node_is_not_blamed_for_one_that_hangs(
    nodes: list[Memcached],
) -> None:
    """Waiting for the hung node takes all of the time, and the reply is still read."""
    nodes[1].raw_set(STORED_KEY, SEALED)
    with FakeServer(hang) as hung:
        cluster = pair_of(
            new_node(hung.address), real_node(nodes[1], SECOND_HOME), node_timeout=0.3
        )
        for _ in range(3):
            replies = read(cluster, seconds=0.3)
            assert isinstance(replies[FIRST_HOME], Unreachable)
            assert isinstance(replies[SECOND_HOME], Hit)
    assert not cluster.suspects()


def test_the_other_node_is_not_blamed_for_one_that_hangs_in_connect(
    nodes: list[Memcached],
) -> None:
    """A connect that nobody answers, before the other node could even be read."""
    nodes[1].raw_set(STORED_KEY, SEALED)
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    waiting = [socket.socket() for _ in range(3)]
    for one in waiting:
        one.setblocking(False)
        one.connect_ex(listener.getsockname())
    cluster = pair_of(
        new_node(f"inet:127.0.0.1:{listener.getsockname()[1]}"),
        real_node(nodes[1], SECOND_HOME),
        node_timeout=0.3,
        new_breaker=usual_breaker,
    )
    for _ in range(3):
        replies = read(cluster)
        assert isinstance(replies[FIRST_HOME], Unreachable)
        assert isinstance(replies[SECOND_HOME], Hit)
    assert cluster.suspects() == {FIRST_HOME}
    for one in (*waiting, listener):
        one.close()


def test_a_budget_that_runs_out_is_nobodys_fault(nodes: list[Memcached]) -> None:
    """A node that had hardly any time is not suspected for not answering in it."""
    with FakeServer(hang) as slow:
        cluster = pair_of(
            new_node(slow.address),
            real_node(nodes[1], SECOND_HOME),
            new_breaker=usual_breaker,
            node_timeout=5.0,
        )
        for _ in range(5):
            assert isinstance(read(cluster, 0.05)[FIRST_HOME], Unreachable)
        assert not cluster.suspects()


def test_what_never_reached_a_node_is_no_sign_of_life(nodes: list[Memcached]) -> None:
    """A write that no connection may carry leaves a dead node suspected."""

    def breaker() -> Breaker:
        return Breaker(first_pause=0.01, longest_pause=0.01)

    cluster = real_pair(nodes, new_breaker=breaker)
    nodes[0].raw_set(STORED_KEY, SEALED)
    reply = read(cluster)[FIRST_HOME]
    assert isinstance(reply, Hit)
    nodes[0].kill()
    assert isinstance(read(cluster)[FIRST_HOME], Unreachable)
    late = cluster.place(KEY, SEALED, 60, reply.token)
    deadline = time.monotonic() + 20
    while cluster.write([(FIRST_HOME, late)], deadline) == [Ack.UNREACHABLE]:
        assert time.monotonic() < deadline
    assert cluster.suspects() == {FIRST_HOME}


def test_a_server_of_another_kind_is_unreachable() -> None:
    """A web server at the node's address says nothing about a session."""
    reply = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with FakeServer(answering(reply)) as web, FakeServer(answering(b"END\r\n")) as good:
        cluster = pair_of(new_node(web.address), new_node(good.address))
        replies = read(cluster)
        assert isinstance(replies[FIRST_HOME], Unreachable)
        assert replies[SECOND_HOME] == Miss()


def test_an_interruption_leaves_no_reply_behind(nodes: list[Memcached]) -> None:
    """Whatever interrupts one exchange, the other's connection is closed too."""

    class ForeignTimeout(BaseException):
        pass

    class Interrupted(random.Random):
        def random(self) -> float:
            raise ForeignTimeout

    first, second = real_node(nodes[0]), real_node(nodes[1], SECOND_HOME)
    cluster = pair_of(first, second, random=Interrupted())
    read(cluster)
    nodes[0].kill()
    with pytest.raises(ForeignTimeout):
        read(cluster)
    assert not second.has_idle()
    nodes[1].raw_set(STORED_KEY, SEALED)
    replies = cluster.read([SECOND_HOME], KEY, KEYRING, time.monotonic() + 20)
    assert isinstance(replies[SECOND_HOME], Hit)


# --- one way ---------------------------------------------------------------------


def test_what_is_told_is_seen_by_the_next_read(nodes: list[Memcached]) -> None:
    """Nobody waits, yet a read on the same connection comes after it."""
    observer = Observer(None)
    cluster = real_pair(nodes, observer=observer)
    requests = [(name, cluster.place(KEY, SEALED, 60, None)) for name in PAIR]
    cluster.tell(requests, time.monotonic() + 20)
    assert observer.stats["round_trips"] == 0
    assert observer.stats["one_way_writes"] == 1
    assert all(isinstance(reply, Hit) for reply in read(cluster).values())


def test_telling_a_dead_node_hurts_nobody(nodes: list[Memcached]) -> None:
    """It is skipped, or fails silently, and the other one is told."""
    cluster = real_pair(nodes, new_breaker=usual_breaker)
    nodes[0].kill()
    for _ in range(2):
        requests = [(name, cluster.bury(KEY, SEALED, 60)) for name in PAIR]
        cluster.tell(requests, time.monotonic() + 20)
        replies = read(cluster)
        assert isinstance(replies[FIRST_HOME], Unreachable)
        assert isinstance(replies[SECOND_HOME], Hit)
