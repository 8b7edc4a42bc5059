"""Several nodes as this process sees them: a breaker each, and parallel exchanges.

Requests go out to all nodes before any reply is read, so that two nodes cost the
time of one. A node that a breaker suspects is skipped and counts as unreachable.
Which nodes a session belongs to, and what their replies mean, is decided elsewhere.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Callable, Mapping, Sequence

from ..common.breaker import Breaker
from ..common.clock import Clock
from ..common.events import Observer, logger, node_down, node_up
from ..common.patience import Patience
from ..core.answers import Ack, Corrupt, Hit, Miss, Reply, Token, Unreachable
from ..core.envelope import ENVELOPE_ALLOWANCE, CorruptBytes, Keyring, UnknownFormat
from .node import Exchange, Node, NodeFault, send_all
from .text_protocol import Absent, Add, Cas, Delete, Get, Parsed, Request, Set


class Cluster:
    """The configured nodes, by name.

    :param nodes: name -> node.
    :param new_breaker: makes the breaker of one node.
    :param node_timeout: seconds for one exchange with a node.
    :param key_prefix: what memcached keys start with.
    :param max_bytes: largest encoded session.
    :param random: jitter of the breakers' pauses.
    """

    def __init__(
        self,
        nodes: Mapping[str, Node],
        *,
        new_breaker: Callable[[], Breaker],
        node_timeout: float,
        key_prefix: str,
        max_bytes: int,
        clock: Clock,
        random: random_module.Random,
        observer: Observer,
    ) -> None:
        self._nodes = dict(nodes)
        self._breakers = {name: new_breaker() for name in self._nodes}
        self._node_timeout = node_timeout
        self._key_prefix = key_prefix
        self._limit = max_bytes + ENVELOPE_ALLOWANCE
        self._clock = clock
        self._random = random
        self._observer = observer

    @property
    def names(self) -> frozenset[str]:
        """Names of the configured nodes."""
        return frozenset(self._nodes)

    def suspects(self) -> frozenset[str]:
        """Names of the nodes that this process skips at the moment."""
        return frozenset(n for n, b in self._breakers.items() if b.suspect)

    def close(self) -> None:
        """Close all idle connections; the next exchange opens new ones."""
        for node in self._nodes.values():
            node.drop_idle()

    def renew(self) -> None:
        """Start anew in a forked child: it forms its own opinion of the nodes."""
        for breaker in self._breakers.values():
            breaker.renew()

    # --- requests, named by what they do to a session's copy ---------------------

    def swap(
        self, session_key: str, data: bytes, exptime: int, token: Token | None
    ) -> Request:
        """Store a copy where ``token`` was read; where nothing was, for None."""
        key = self._key_prefix + session_key
        if token is None:
            return Add(key, data, exptime)
        return Cas(key, data, exptime, token.value, token.read_at)

    def put_tombstone(self, session_key: str, data: bytes, exptime: int) -> Request:
        """Store a tombstone, whatever stands there."""
        return Set(self._key_prefix + session_key, data, exptime)

    def remove(self, session_key: str) -> Request:
        """Remove a copy, so that its home has nothing to say."""
        return Delete(self._key_prefix + session_key)

    # --- exchanges ---------------------------------------------------------------

    def read(
        self,
        names: Sequence[str],
        session_key: str,
        keyring: Keyring,
        patience: Patience,
    ) -> dict[str, Reply]:
        """What each of these nodes holds for a session, in one round trip.

        :param patience: is told how long that took.
        """
        request = Get(self._key_prefix + session_key, self._limit)
        answers = self._exchange([(name, request) for name in names], patience)
        opened: dict[bytes, Reply] = {}
        replies: dict[str, Reply] = {}
        for name, (parsed, read_at) in zip(names, answers, strict=True):
            replies[name] = self._open(parsed, read_at, session_key, keyring, opened)
        return replies

    def write(
        self, requests: Sequence[tuple[str, Request]], patience: Patience
    ) -> list[Ack]:
        """Send writes to their nodes and wait for the answers, in one round trip."""
        return [
            parsed if isinstance(parsed, Ack) else Ack.UNREACHABLE
            for parsed, _ in self._exchange(requests, patience)
        ]

    def _open(
        self,
        parsed: Parsed | Unreachable,
        read_at: int,
        session_key: str,
        keyring: Keyring,
        opened: dict[bytes, Reply],
    ) -> Reply:
        if isinstance(parsed, Absent):
            return Miss()
        if isinstance(parsed, Unreachable):
            return parsed
        if isinstance(parsed, Ack):
            return Unreachable("a read was answered as a write")
        token = Token(parsed.cas, read_at)
        if parsed.data is None or parsed.flags != 0:
            return Corrupt(token)
        # Equal copies are the rule: the second need not be verified and unpacked.
        known = opened.get(parsed.data)
        if isinstance(known, Hit):
            return Hit(known.copy, token)
        copy = keyring.unseal(session_key, parsed.data)
        if isinstance(copy, UnknownFormat):
            return Unreachable("a record under a key or format unknown here", True)
        if isinstance(copy, CorruptBytes):
            return Corrupt(token)
        opened[parsed.data] = hit = Hit(copy, token)
        return hit

    def _exchange(
        self, requests: Sequence[tuple[str, Request]], patience: Patience
    ) -> list[tuple[Parsed | Unreachable, int]]:
        """Send all, then read all; results in the order of the requests."""
        results: list[tuple[Parsed | Unreachable, int]] = [
            (Unreachable("skipped after it has failed"), 0)
        ] * len(requests)
        under_way: dict[int, Exchange] = {}
        try:
            with patience.waiting(self._node_timeout):
                for index, (name, request) in enumerate(requests):
                    node = None if name in patience.late else self._admitted(name)
                    if node is not None:
                        under_way[index] = node.send(request, self._until())
                asked = bool(under_way)
                swaps = [e for i, e in under_way.items() if _is_swap(requests[i])]
                if any(exchange.hopeless for exchange in swaps):
                    # All or none: what one home takes alone only SQL can settle.
                    for exchange in swaps:
                        exchange.give_up()
                send_all(under_way.values())
                for index in list(under_way):
                    exchange = under_way.pop(index)
                    name = requests[index][0]
                    results[index] = self._receive(name, exchange, patience)
        except BaseException:
            for exchange in under_way.values():
                exchange.abandon()
            raise
        if asked:
            self._observer.count("round_trips")
        return results

    def _until(self) -> float:
        """When an exchange that begins now has to be over."""
        return self._clock.monotonic() + self._node_timeout

    def _receive(
        self, name: str, exchange: Exchange, patience: Patience
    ) -> tuple[Parsed | Unreachable, int]:
        breaker = self._breakers[name]
        try:
            parsed = exchange.receive()
        except NodeFault as fault:
            self._observer.count("node_faults")
            if not fault.refused:
                patience.late.add(name)
            self._blame(name, breaker, fault)
            return Unreachable(str(fault)), 0
        # A conflict may be known without asking the node, which proves nothing.
        asked = exchange.read_at > 0
        if asked and breaker.succeeded(self._clock.monotonic()):
            logger.info("Node %s answers again.", name)
            self._observer.send(node_up, node=name)
        return parsed, exchange.read_at

    def _blame(self, name: str, breaker: Breaker, fault: NodeFault) -> None:
        opened = breaker.failed(
            self._clock.monotonic(),
            refused=fault.refused,
            jitter=self._random.random(),
        )
        if opened:
            # The others may be as dead, as after a firewall forgot them all.
            self._nodes[name].drop_idle()
            logger.warning(
                "Node %s is skipped for a while: %s. Sessions that live on it are"
                " served from their other home and SQL.",
                name,
                fault,
            )
            self._observer.send(node_down, node=name, reason=str(fault))

    def _admitted(self, name: str) -> Node | None:
        if self._breakers[name].admits(self._clock.monotonic()):
            return self._nodes[name]
        return None


def _is_swap(request: tuple[str, Request]) -> bool:
    return isinstance(request[1], Cas)
