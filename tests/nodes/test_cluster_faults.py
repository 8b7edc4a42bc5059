"""Nodes that fail, side by side with one that does not."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from builders import (
    FIRST_HOME,
    KEYRING,
    SECOND_HOME,
    new_node,
    patient,
    real_node,
    usual_breaker,
)
from flask_resilient_session.common.breaker import Breaker
from flask_resilient_session.common.events import node_down, node_up
from flask_resilient_session.core.answers import Ack, Hit, Miss, Reply, Unreachable
from flask_resilient_session.memcached import cluster as cluster_module
from flask_resilient_session.memcached.node import Exchange, _Connection
from misbehaving import FakeServer, answering, black_hole, hang
from pairs import KEY, SEALED, STORED_KEY, pair_of, read, real_pair
from servers import Memcached, wait_until

pytestmark = pytest.mark.usefixtures("nodes_are_closed")


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


# --- nodes that fail -------------------------------------------------------------


def test_a_hung_node_costs_one_request_one_timeout(nodes: list[Memcached]) -> None:
    """However often that request has to ask the nodes; the next one waits again."""
    nodes[0].freeze()
    for node in nodes[1:]:
        node.raw_set(STORED_KEY, SEALED)
    cluster = real_pair(nodes, node_timeout=0.2)
    for _ in range(2):
        patience = patient()
        for _ in range(5):
            replies = cluster.read((FIRST_HOME, SECOND_HOME), KEY, KEYRING, patience)
            assert isinstance(replies[FIRST_HOME], Unreachable)
            assert isinstance(replies[SECOND_HOME], Hit)
        # It was charged for one wait, and nothing for the others.
        assert 30 - 0.21 > patience.left - 0.01 > 30 - 0.4


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
            replies = read(cluster)
            assert isinstance(replies[FIRST_HOME], Unreachable)
            assert isinstance(replies[SECOND_HOME], Hit)
    assert not cluster.suspects()


def test_the_other_node_is_not_blamed_for_one_that_hangs_in_connect(
    nodes: list[Memcached],
) -> None:
    """A connect that nobody answers, before the other node could even be read."""
    nodes[1].raw_set(STORED_KEY, SEALED)
    with black_hole() as address:
        cluster = pair_of(
            new_node(address),
            real_node(nodes[1], SECOND_HOME),
            node_timeout=0.3,
            new_breaker=usual_breaker,
        )
        for _ in range(3):
            replies = read(cluster)
            assert isinstance(replies[FIRST_HOME], Unreachable)
            assert isinstance(replies[SECOND_HOME], Hit)
    assert cluster.suspects() == {FIRST_HOME}


def test_nodes_are_connected_to_at_once() -> None:
    """Two that do not answer to it cost the time of one, and both are to blame."""
    with black_hole() as first, black_hole() as second:
        cluster = pair_of(
            new_node(first),
            new_node(second, SECOND_HOME),
            node_timeout=0.4,
            new_breaker=usual_breaker,
        )
        for _ in range(3):
            started = time.monotonic()
            assert {type(one) for one in read(cluster).values()} == {Unreachable}
            assert time.monotonic() - started < 0.7
    assert cluster.suspects() == {FIRST_HOME, SECOND_HOME}


def test_a_node_that_connects_is_asked_while_another_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody waits for the deaf one before the request is sent."""
    looks: list[object] = []
    is_connected = _Connection.is_connected

    def not_at_once(connection: _Connection) -> bool:
        if connection not in looks:
            looks.append(connection)
            return False
        return is_connected(connection)

    monkeypatch.setattr(_Connection, "is_connected", not_at_once)
    with black_hole() as deaf, FakeServer(answering(b"END\r\n")) as server:
        cluster = pair_of(
            new_node(deaf), new_node(server.address, SECOND_HOME), node_timeout=2.0
        )
        replies: list[dict[str, Reply]] = []
        thread = threading.Thread(target=lambda: replies.append(read(cluster)))
        thread.start()
        wait_until(lambda: server.requests, 20, "the request")
        assert thread.is_alive()
        assert not replies
        thread.join(20)
        assert replies[0][SECOND_HOME] == Miss()


def test_a_node_that_answered_is_well_however_late_that_is_noticed(
    nodes: list[Memcached], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this process was busy both have answered, on connections old and new."""
    cluster = real_pair(nodes, node_timeout=0.05, new_breaker=usual_breaker)
    nodes[0].raw_set(STORED_KEY, SEALED)
    finish = cluster_module.send_all

    def late(exchanges: Iterable[Exchange]) -> None:
        finish(exchanges)
        time.sleep(0.1)

    monkeypatch.setattr(cluster_module, "send_all", late)
    for _ in range(3):
        replies = read(cluster)
        assert isinstance(replies[FIRST_HOME], Hit)
        assert replies[SECOND_HOME] == Miss()
    assert cluster._observer.stats["node_faults"] == 0


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
    late = cluster.swap(KEY, SEALED, 60, reply.token)
    deadline = time.monotonic() + 20
    while cluster.write([(FIRST_HOME, late)], patient()) == [Ack.UNREACHABLE]:
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
    assert not second._idle
    nodes[1].raw_set(STORED_KEY, SEALED)
    replies = cluster.read([SECOND_HOME], KEY, KEYRING, patient())
    assert isinstance(replies[SECOND_HOME], Hit)
