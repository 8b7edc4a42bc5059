"""One simulated worker process: the package's own store over fakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias

from flask_resilient_session.common.breaker import Breaker
from flask_resilient_session.common.events import Observer
from flask_resilient_session.common.patience import Patience
from flask_resilient_session.common.queue import KeyedQueue
from flask_resilient_session.core.record import Record, Tombstone
from flask_resilient_session.core.ring import Ring, RingNode
from flask_resilient_session.memcached.cluster import Cluster
from flask_resilient_session.sql.gate import Gate
from flask_resilient_session.store.context import SessionContext
from flask_resilient_session.store.replicas import Homes
from flask_resilient_session.store.row import RowRepository
from flask_resilient_session.store.store import Store

from .fakes import SQL_TIMEOUT, FakeNode, FakeSql
from .more import LAYOUTS
from .rollout import SECRETS, keyring
from .world import Signal, WorkerClock

if TYPE_CHECKING:
    from .site import Site

USER = "_user_id"

_KEYRING = keyring(SECRETS)
_NODE_TIMEOUT = 0.25
LONGEST_PAUSE = 2.0
_PATIENCE = _NODE_TIMEOUT + SQL_TIMEOUT


@lru_cache(maxsize=64)
def ring_of(names: frozenset[str], layout: int = 0) -> Ring:
    """The ring of these nodes in a layout."""
    zones = LAYOUTS[layout]
    nodes = []
    for name in sorted(names):
        zone, weight = zones.get(name, (name, 1.0))
        nodes.append(RingNode(name, weight, zone))
    return Ring(nodes)


def holds(
    copies: Sequence[bytes], key: str, wanted: Mapping[str, bytes | None]
) -> bool:
    """Whether one of the sealed copies, the latest first, has these values."""
    for data in reversed(copies):
        # Sealed is not encrypted: most can be ruled out at a glance.
        if not all(v is not None and v in data for v in wanted.values()):
            continue
        copy = _KEYRING.unseal(key, data)
        if isinstance(copy, Record):
            entries = copy.entries
            if all(k in entries and entries[k].value == v for k, v in wanted.items()):
                return True
    return False


def holds_tombstone(copies: Sequence[bytes], key: str) -> bool:
    """Whether one of the sealed copies is a tombstone."""
    return any(
        isinstance(_KEYRING.unseal(key, data), Tombstone) for data in reversed(copies)
    )


#: Of each home: exchanges that went wrong, and whether it is skipped.
Faults: TypeAlias = tuple[tuple[int, bool], ...]


class Worker:
    """One worker process: everything the extension would build."""

    def __init__(
        self, site: Site, index: int, names: frozenset[str], secrets: tuple[str, ...]
    ) -> None:
        world, clock = site.world, WorkerClock(site.world, site.skews[index])
        observer = Observer(self)

        def new_breaker() -> Breaker:
            return Breaker(
                first_pause=0.5, longest_pause=LONGEST_PAUSE, tolerated_timeouts=3
            )

        self.nodes = {n: FakeNode(site.servers[n], index) for n in sorted(names)}
        cluster = Cluster(
            dict(self.nodes),
            new_breaker=new_breaker,
            node_timeout=_NODE_TIMEOUT,
            key_prefix="",
            max_bytes=100_000,
            clock=clock,
            random=world.rng,
            observer=observer,
        )
        self.observer = observer
        self.index = index
        self.process = site.new_process()
        self.names = names
        self.ring = ring_of(names, site.plan.layout)
        self.secrets = secrets
        self.keyring = keyring(self.secrets)
        self.clock = clock
        self.sql = FakeSql(site.database, index)
        durable = RowRepository(
            self.sql,
            breaker=new_breaker(),
            gate=Gate(100, clock),
            sql_timeout=_PATIENCE,
            user_key=USER,
            clock=clock,
            random=world.rng,
            observer=observer,
        )
        self.store = Store(
            homes=Homes(self.ring, cluster),
            rows=durable,
            max_bytes=100_000,
            clock=clock,
            random=world.rng,
            observer=observer,
            queue=KeyedQueue(partial(Signal, world)),
        )
        self.timing = site.plan.timing_of(index)
        self._database = site.database

    def context(self, session_key: str) -> SessionContext:
        """The terms of one request."""
        patience = Patience(self.clock, _PATIENCE)
        return SessionContext(session_key, self.keyring, self.timing, patience)

    def homes_of(self, session_key: str) -> tuple[str, ...]:
        """The session's homes, as it is configured."""
        return self.ring.homes(session_key)

    def faults(self, session_key: str) -> Faults:
        """What it has met at each of the session's homes."""
        suspects = self.store.homes.cluster.suspects()
        return tuple(
            (self.nodes[name].faults, name in suspects)
            for name in self.homes_of(session_key)
        )

    def cannot_reach(self, name: str) -> bool:
        """Whether nothing that it says to this node arrives."""
        server = self.nodes[name].server
        return not server.up or server.hung or self.index in server.cut

    def missed_all(
        self, session_key: str, faults: Faults, full: Sequence[bool] = ()
    ) -> bool:
        """Whether it missed each of the session's homes since there were these faults.

        :param full: those that would have refused anyway.
        """
        homes = self.homes_of(session_key)
        suspects = self.store.homes.cluster.suspects()
        return all(
            name in suspects or self.nodes[name].faults > before or (full and full[i])
            for i, (name, (before, _)) in enumerate(zip(homes, faults, strict=True))
        )

    def doubts_sql(self, since: int = 1 << 60) -> bool:
        """Whether it skips SQL, or a call of its failed since this step."""
        failed = self._database.failed.get(self.index, -1)
        return self.store.rows._breaker.suspect or failed >= since

    def reaches_none(self, session_key: str, faults: Faults) -> bool:
        """Whether it could tell none of the session's homes anything."""
        full = [self.nodes[n].server.full for n in self.homes_of(session_key)]
        return all(full) or self.missed_all(session_key, faults, full)
