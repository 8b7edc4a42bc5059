"""Items of one real node, seen from both sides."""

from __future__ import annotations

import time

from flask_resilient_session.memcached.node import Node
from flask_resilient_session.memcached.text_protocol import Get, Value
from servers import Memcached

#: Longest item that the tests read, in bytes.
LIMIT = 10_000


def read(node: Node, key: str = "k") -> tuple[int, int]:
    """The cas number of an item, and when it was read."""
    exchange = node.send(Get(key, LIMIT), time.monotonic() + 10)
    found = exchange.receive()
    assert isinstance(found, Value)
    return found.cas, exchange.read_at


def connections(server: Memcached) -> int:
    """Connections that the server has, this question's own apart."""
    return int(server.stats()["curr_connections"]) - 1
