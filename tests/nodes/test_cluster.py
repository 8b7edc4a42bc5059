"""Several nodes at once: what is parallel, who is blamed, what replies mean."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from builders import (
    FIRST_HOME,
    KEYRING,
    NOW,
    PAIR,
    SECOND_HOME,
    make_cluster,
    new_node,
    patient,
    record,
    session_key,
)
from flask_resilient_session.core.answers import Ack, Corrupt, Hit, Miss, Unreachable
from flask_resilient_session.core.envelope import CorruptBytes, Keyring
from flask_resilient_session.core.record import Tombstone
from misbehaving import FakeServer
from pairs import KEY, SEALED, STORED_KEY, pair_of, read, real_pair, write
from servers import Memcached

pytestmark = pytest.mark.usefixtures("nodes_are_closed")


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
                request = cluster.swap(KEY, SEALED, 60, None)
                assert write(cluster, request) == [Ack.STORED, Ack.STORED]
        assert cluster._observer.stats["round_trips"] == 2


def test_answers_are_in_the_order_of_the_requests(nodes: list[Memcached]) -> None:
    """Which node is asked first, because it is connected, does not matter."""
    cluster = real_pair(nodes)
    nodes[1].raw_set(STORED_KEY, b"there")
    cluster.read([SECOND_HOME], KEY, KEYRING, patient())
    add = cluster.swap(KEY, SEALED, 60, None)
    assert write(cluster, add) == [Ack.STORED, Ack.CONFLICT]


def test_nothing_asked_is_no_round_trip() -> None:
    """Without a node to ask, nothing is counted."""
    cluster = make_cluster({})
    assert cluster.read([], KEY, KEYRING, patient()) == {}
    assert cluster._observer.stats["round_trips"] == 0


# --- what replies mean -----------------------------------------------------------


def test_what_was_placed_is_read(nodes: list[Memcached]) -> None:
    """Add, read, replace, bury and remove, on both nodes at once."""
    cluster = real_pair(nodes)
    assert read(cluster) == dict.fromkeys(PAIR, Miss())
    stored = [Ack.STORED, Ack.STORED]
    assert write(cluster, cluster.swap(KEY, SEALED, 60, None)) == stored
    replies = read(cluster)
    for name, server in zip(PAIR, nodes, strict=True):
        reply = replies[name]
        assert isinstance(reply, Hit)
        assert reply.copy == record()
        newer = KEYRING.seal(KEY, record(writes=5))
        swap = cluster.swap(KEY, newer, 60, reply.token)
        assert cluster.write([(name, swap)], patient()) == [Ack.STORED]
        assert cluster.write([(name, swap)], patient()) == [Ack.CONFLICT]
        assert server.raw_get(STORED_KEY) == newer
    dead = Tombstone("ended", NOW)
    assert (
        write(cluster, cluster.put_tombstone(KEY, KEYRING.seal(KEY, dead), 60))
        == stored
    )
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
    swap = cluster.swap(KEY, SEALED, 60, reply.token)
    answers = cluster.write([(FIRST_HOME, swap)], patient())
    assert answers == [Ack.STORED]


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


def test_homes_are_swapped_all_or_none(nodes: list[Memcached]) -> None:
    """Where one cannot be asked for want of an old connection, none is."""
    cluster = real_pair(nodes)
    write(cluster, cluster.swap(KEY, SEALED, 60, None))
    tokens = [r.token for r in read(cluster).values() if isinstance(r, Hit)]
    cluster._nodes[SECOND_HOME].drop_idle()
    newer = KEYRING.seal(KEY, record(writes=5))
    requests = [
        (name, cluster.swap(KEY, newer, 60, token))
        for name, token in zip(PAIR, tokens, strict=True)
    ]
    assert cluster.write(requests, patient()) == [Ack.CONFLICT, Ack.CONFLICT]
    assert [node.raw_get(STORED_KEY) for node in nodes] == [SEALED, SEALED]
