"""What the tests of several rooms build alike: records, replies, whole stores."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, settings

from flask_resilient_session.common.breaker import Breaker
from flask_resilient_session.common.clock import SystemClock
from flask_resilient_session.common.errors import SqlUnavailable
from flask_resilient_session.common.events import Observer
from flask_resilient_session.common.patience import Patience
from flask_resilient_session.core.envelope import Keyring
from flask_resilient_session.core.lifetimes import Timing
from flask_resilient_session.core.reading import Gone, Live
from flask_resilient_session.core.record import Entry, Record, Tombstone
from flask_resilient_session.core.ring import Ring, RingNode
from flask_resilient_session.core.values import decode, encode_value
from flask_resilient_session.memcached.cluster import Cluster
from flask_resilient_session.memcached.node import Node
from flask_resilient_session.memcached.text_protocol import Get, Parsed, Request, Value
from flask_resilient_session.sql.calls import SqlCalls
from flask_resilient_session.sql.connections import plain_engine
from flask_resilient_session.sql.gate import Gate
from flask_resilient_session.sql.statements import SqlTable
from flask_resilient_session.sql.table import Row, define_table
from flask_resilient_session.store.context import SessionContext
from flask_resilient_session.store.replicas import Homes
from flask_resilient_session.store.row import RowRepository
from flask_resilient_session.store.store import Store
from servers import Memcached

# A busy machine is no reason for a law to fail.
settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machine")

#: A moment in 2026, in Unix milliseconds.
NOW = 1_770_000_000_000
SECOND = 1000
HOUR = 3600 * SECOND
DAY = 24 * HOUR

#: The homes' names in tests that have no ring.
FIRST_HOME, SECOND_HOME = "first_home", "second_home"
PAIR = (FIRST_HOME, SECOND_HOME)

#: Connections to SQL.
PLACES = 8

#: Names of sessions.
ALICE, BOB = "alice", "bob"

NAMESPACE = "frs:\0flask_resilient_session"
PREFIX = "frs:"
KEYRING = Keyring(["test secret"], NAMESPACE)


def session_key(name: str) -> str:
    """The key of a session that the test knows by a name."""
    return hashlib.sha256(name.encode()).hexdigest()


def timing(**changes: Any) -> Timing:
    """A lifetime of a day, a sync every minute."""
    usual = Timing(
        lifetime_ms=DAY,
        absolute_ms=None,
        sync_ms=60 * SECOND,
        sync_writes=None,
        reap_grace_ms=HOUR,
    )
    return replace(usual, **changes)


def record(entries: dict[str, Entry] | None = None, **fields: Any) -> Record:
    """A record that was created, used and synced now, at home on ``PAIR``."""
    usual: dict[str, Any] = {
        "created_ms": NOW,
        "last_use_ms": NOW,
        "synced_ms": NOW,
        "row_version": 1,
        "homes": PAIR,
    }
    if entries is None:
        entries = {"name": Entry(NOW, 1, b"value")}
    return Record(entries=entries, **(usual | fields))


def soon(seconds: float = 30.0) -> float:
    """A deadline that no healthy call meets."""
    return time.monotonic() + seconds


def patient(seconds: float = 30.0) -> Patience:
    """Patience that no healthy exchange tries."""
    return Patience(SystemClock(), seconds)


def some_gate(places: int = PLACES) -> Gate:
    """A gate of so many places."""
    return Gate(places, SystemClock())


def row(key: str, **fields: Any) -> Row:
    """A live row."""
    usual: dict[str, Any] = {
        "session_key": key,
        "version": 1,
        "record": b"sealed",
        "user_id": None,
        "homes": PAIR,
        "created_at": NOW,
        "synced_at": NOW,
        "expires_at": NOW + DAY,
    }
    return Row(**(usual | fields))


def tombstone_row(key: str, **fields: Any) -> Row:
    """A row that says that the session was ended."""
    usual = {"version": 2, "record": None, "revoked_at": NOW, "reason": "ended"}
    return row(key, **(usual | fields))


class TestClock(SystemClock):
    """The system's clock, whose Unix time a test can put forward."""

    __test__ = False

    def __init__(self) -> None:
        self.ahead_ms = 0

    def now_ms(self) -> int:
        """Unix time in milliseconds."""
        return super().now_ms() + self.ahead_ms


_made: list[Node] = []


def new_node(address: str, name: str = FIRST_HOME) -> Node:
    """A node whose connections :func:`close_nodes` closes."""
    node = Node(name, address, SystemClock())
    _made.append(node)
    return node


def real_node(server: Memcached, name: str = FIRST_HOME) -> Node:
    """A node of a real server."""
    host = f"[{server.host}]" if ":" in server.host else server.host
    family = "inet6" if ":" in server.host else "inet"
    return new_node(f"{family}:{host}:{server.port}", name)


def ask(node: Node, request: Request, seconds: float = 10.0) -> Parsed:
    """One exchange with a node, whole."""
    return node.send(request, time.monotonic() + seconds).receive()


def get(node: Node, key: str = "k", seconds: float = 10.0) -> bytes | None:
    """The bytes of an item; None where there is none."""
    found = ask(node, Get(key, 10_000), seconds)
    return found.data if isinstance(found, Value) else None


def close_nodes() -> None:
    """Close what the nodes made since the last call have open."""
    while _made:
        _made.pop().drop_idle()


def patient_breaker() -> Breaker:
    """A breaker that lets every caller through, so that each fault is met anew."""
    return Breaker(
        first_pause=0.0001, longest_pause=0.0001, tolerated_timeouts=1_000_000
    )


def usual_breaker() -> Breaker:
    """A breaker that keeps skipping what it suspects for the rest of a test."""
    return Breaker(first_pause=600.0, longest_pause=600.0, tolerated_timeouts=3)


def make_cluster(nodes: dict[str, Node], **changes: Any) -> Cluster:
    """A cluster of these nodes."""
    usual: dict[str, Any] = {
        "new_breaker": patient_breaker,
        "node_timeout": 2.0,
        "key_prefix": PREFIX,
        "max_bytes": 100_000,
        "clock": SystemClock(),
        "random": random.Random(1),
        "observer": Observer(None),
    }
    return Cluster(nodes, **(usual | changes))


class Statements:
    """Counts the statements that SQL is sent, those about transactions apart."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def watch(self, engine: sa.Engine) -> None:
        """Count what this engine sends from now on."""
        sa.event.listen(engine, "before_cursor_execute", self._note)

    def _note(self, _c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        apart = ("BEGIN", "COMMIT", "ROLLBACK", "PRAGMA")
        if not statement.lstrip().upper().startswith(apart):
            self.texts.append(statement)


def sqlite_table(path: Path | str, **changes: Any) -> SqlTable:
    """The table in an SQLite file, or ``:memory:``."""
    usual: dict[str, Any] = {
        "create_table": True,
        "sql_timeout": 5.0,
        "gate": some_gate(),
        "clock": SystemClock(),
    }
    url = sa.make_url(f"sqlite:///{path}")
    table = define_table(sa.MetaData(), "flask_resilient_session", None)
    timeout = changes.get("sql_timeout", 5.0)
    calls = SqlCalls(
        table, lambda: plain_engine(url, timeout, PLACES), **(usual | changes)
    )
    return SqlTable(calls)


class SwitchedSql:
    """SQL that a test can switch off; what runs before a statement can be set."""

    def __init__(self, table: SqlTable) -> None:
        self.table = table
        self.down = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.table, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.down:
                raise SqlUnavailable("switched off by the test")
            return method(*args, **kwargs)

        return call


@dataclass
class Cost:
    """What a piece of work cost."""

    round_trips: int = 0
    statements: int = 0


@dataclass
class Site:
    """One worker over real nodes and an SQLite file."""

    servers: Sequence[Memcached]
    store: Store
    sql: SwitchedSql
    clock: TestClock
    observer: Observer
    keyring: Keyring = KEYRING
    timing: Timing = field(default_factory=timing)
    statements: Statements = field(default_factory=Statements)

    def close(self) -> None:
        """Close the connections to nodes and SQL."""
        close_nodes()
        self.sql.table.dispose()

    def context(self, name: str) -> SessionContext:
        """One session on this site's usual terms."""
        return SessionContext(session_key(name), self.keyring, self.timing, patient())

    def server(self, home: str) -> Memcached:
        """The server behind a node's name."""
        return self.servers[int(home.removeprefix("node"))]

    def homes(self, name: str) -> list[Memcached]:
        """The servers that are a session's homes, best first."""
        names = self.store.homes.names(self.context(name))
        return [self.server(home) for home in names]

    def copy(self, name: str, home: int) -> Any:
        """What one home holds: a record, a tombstone, a verdict on bytes, None."""
        key = session_key(name)
        data = self.homes(name)[home].raw_get(PREFIX + key)
        return None if data is None else self.keyring.unseal(key, data)

    def copies(self, name: str) -> list[Any]:
        """What each home holds, the first home first."""
        return [self.copy(name, home) for home in range(len(self.homes(name)))]

    def row(self, name: str) -> Row | None:
        """What SQL holds."""
        return self.sql.table.read(session_key(name), self.clock.monotonic() + 30)

    def in_row(self, name: str = ALICE) -> dict[str, Any] | None:
        """What SQL would show of a session; None without a live row."""
        found = self.row(name)
        if found is None or found.record is None:
            return None
        return content(self.keyring.unseal(session_key(name), found.record))

    def seen(self, name: str = ALICE) -> dict[str, Any] | None:
        """What the next request sees."""
        return content(self.store.load(self.context(name)))

    def reason(self, name: str = ALICE) -> str | None:
        """Why the next request sees no session."""
        found = self.store.load(self.context(name))
        return found.reason if isinstance(found, Gone) else None

    def touch(self, name: str = ALICE) -> Any:
        """A request that only reads the session."""
        return self.store.save(self.context(name), self.live(name), {})

    def is_dead(self, name: str = ALICE) -> bool:
        """Whether every home and SQL hold a tombstone that owes nothing."""
        row = self.row(name)
        copies = self.copies(name)
        return (
            row is not None
            and row.revoked_at is not None
            and row.record is None
            and all(isinstance(copy, Tombstone) and not copy.debt for copy in copies)
        )

    def live(self, name: str, **how: Any) -> Live:
        """Load a session that has to be alive."""
        loaded = self.store.load(self.context(name), **how)
        assert isinstance(loaded, Live), loaded
        return loaded

    def create(self, name: str, *, required: bool = True, **values: object) -> Live:
        """Store a session under a new id."""
        return self.store.create(
            self.context(name), encoded(**values), required=required
        )

    def change(self, name: str, **values: object) -> Any:
        """Load a session and save changes to it, as one request does."""
        return self.store.save(self.context(name), self.live(name), encoded(**values))

    @contextmanager
    def cost(self) -> Iterator[Cost]:
        """What the block costs in round trips and statements."""
        cost = Cost()
        trips = self.observer.stats["round_trips"]
        statements = len(self.statements.texts)
        yield cost
        cost.round_trips = self.observer.stats["round_trips"] - trips
        cost.statements = len(self.statements.texts) - statements


def content(found: Any) -> dict[str, Any] | None:
    """What the user sees of a record; None where there is none."""
    if isinstance(found, Live):
        found = found.record
    return decode(found.payload()) if isinstance(found, Record) else None


def encoded(**values: object) -> dict[str, bytes | None]:
    """Changes as the store takes them; None deletes."""
    return {k: None if v is None else encode_value(k, v) for k, v in values.items()}


def make_site(servers: Sequence[Memcached], path: Path, **changes: Any) -> Site:
    """A worker over these servers; ``changes`` are fields of ``Site``."""
    clock = changes.pop("clock", None) or TestClock()
    node_timeout = changes.pop("node_timeout", 2.0)
    observer = Observer(None)
    dice = random.Random(7)
    nodes: dict[str, Node] = {
        f"node{index}": real_node(server, f"node{index}")
        for index, server in enumerate(servers)
    }
    common: dict[str, Any] = {"clock": clock, "random": dice, "observer": observer}
    cluster = make_cluster(nodes, node_timeout=node_timeout, **common)
    ring = Ring(RingNode(name) for name in nodes)
    homes = Homes(ring, cluster)
    sql = SwitchedSql(sqlite_table(path / "sessions.sqlite"))
    durable = RowRepository(
        sql,
        breaker=patient_breaker(),
        gate=some_gate(),
        sql_timeout=5.0,
        user_key="_user_id",
        **common,
    )
    store = Store(homes=homes, rows=durable, max_bytes=100_000, **common)
    site = Site(servers, store, sql, clock, observer, **changes)
    sql.table.count_expired(0, clock.monotonic() + 30)
    site.statements.watch(sql.table.engine)
    return site
