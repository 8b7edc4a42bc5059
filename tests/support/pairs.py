"""Two nodes as one process sees them, and one session on them."""

from __future__ import annotations

from typing import Any

from builders import (
    FIRST_HOME,
    KEYRING,
    PAIR,
    PREFIX,
    SECOND_HOME,
    make_cluster,
    patient,
    real_node,
    record,
    session_key,
)
from flask_resilient_session.core.answers import Ack, Reply
from flask_resilient_session.memcached.cluster import Cluster
from flask_resilient_session.memcached.node import Node
from flask_resilient_session.memcached.text_protocol import Request
from servers import Memcached

KEY = session_key("alice")
STORED_KEY = PREFIX + KEY
SEALED = KEYRING.seal(KEY, record())


def pair_of(first: Node, second: Node, **changes: Any) -> Cluster:
    """A cluster of two nodes."""
    return make_cluster({FIRST_HOME: first, SECOND_HOME: second}, **changes)


def real_pair(nodes: list[Memcached], **changes: Any) -> Cluster:
    """A cluster of two real servers."""
    return pair_of(real_node(nodes[0]), real_node(nodes[1], SECOND_HOME), **changes)


def read(cluster: Cluster) -> dict[str, Reply]:
    """What both nodes hold."""
    return cluster.read(PAIR, KEY, KEYRING, patient())


def write(cluster: Cluster, request: Request) -> list[Ack]:
    """The same request to both nodes."""
    requests = [(name, request) for name in PAIR]
    return cluster.write(requests, patient())
