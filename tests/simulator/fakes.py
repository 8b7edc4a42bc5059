"""Memcached nodes and SQL that do what the real ones do, and fail on demand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from flask_resilient_session.common.errors import SqlBusy, SqlUnavailable
from flask_resilient_session.core.answers import Ack
from flask_resilient_session.memcached.node import NodeFault
from flask_resilient_session.memcached.text_protocol import (
    Absent,
    Add,
    Cas,
    Delete,
    Get,
    Parsed,
    Request,
    Set,
    Value,
)
from flask_resilient_session.sql.table import Row

from .world import World

_Result = TypeVar("_Result")

#: Seconds that a statement waits for a database that does not answer.
SQL_TIMEOUT = 0.5

#: More seconds than these memcached takes for a Unix date.
MOST_SECONDS = 30 * 24 * 3600

#: To a date from this one on, or a past one, it answers STORED, and holds nothing.
NO_DATE = 2**31


class Item(NamedTuple):
    """One item of a node."""

    data: bytes
    cas: int
    expires_ms: int


class Server:
    """One memcached process, as all workers meet it.

    :ivar up: it accepts connections.
    :ivar hung: it accepts, and answers nobody.
    :ivar cut: workers whose packets do not arrive.
    :ivar lossy: chance that an exchange goes wrong in some way.
    :ivar full: it refuses writes.
    """

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.items: dict[str, Item] = {}
        self.generation = 0
        self.up = True
        self.hung = False
        self.cut: set[int] = set()
        self.lossy = 0.0
        self.full = False
        #: Step at which it last refused a write.
        self.refused_step = -1
        #: All that it ever held, by key.
        self.held: dict[str, list[bytes]] = {}
        self._next_cas = 1
        self._snapshot: dict[str, Item] = {}

    # --- faults ------------------------------------------------------------------

    def crash(self) -> None:
        """Down, its memory and its connections lost."""
        self.up = False
        self.items.clear()
        self._next_cas = 1
        self.generation += 1

    def restart(self) -> None:
        """Crash, and up again at once."""
        self.crash()
        self.up = True

    def snapshot(self) -> None:
        """Remember what it holds."""
        self._snapshot = dict(self.items)

    def zombie(self) -> None:
        """Restart with what was remembered."""
        self.restart()
        for key, item in self._snapshot.items():
            self._next_cas += 1
            self.items[key] = item._replace(cas=self._next_cas)

    def evict(self, key: str) -> None:
        """Lose one item."""
        self.items.pop(key, None)

    def corrupt(self, key: str) -> None:
        """Spoil one item's bytes."""
        item = self.items.get(key)
        if item is not None:
            self._store(key, item.data[:-1] + b"?", item.expires_ms)

    def heal(self) -> None:
        """No fault from now on; what it holds stays."""
        self.up = True
        self.hung = False
        self.cut.clear()
        self.lossy = 0.0
        self.full = False

    def state(self) -> str:
        """Its faults in words."""
        words = [
            "" if self.up else "down",
            "hung" if self.hung else "",
            f"cut off from {sorted(self.cut)}" if self.cut else "",
            "lossy" if self.lossy else "",
            "full" if self.full else "",
        ]
        return " ".join(word for word in words if word) or "ok"

    # --- memcached ---------------------------------------------------------------

    def find(self, key: str) -> Item | None:
        """The item, unless its time is over."""
        item = self.items.get(key)
        if item is not None and item.expires_ms <= self.world.now_ms:
            del self.items[key]
            return None
        return item

    def apply(self, request: Request) -> Parsed:
        """What memcached does and answers."""
        if isinstance(request, Get):
            item = self.find(request.key)
            return Absent() if item is None else Value(item.data, 0, item.cas)
        if isinstance(request, Delete):
            self.items.pop(request.key, None)
            return Ack.STORED
        assert isinstance(request, (Add, Cas, Set))
        item = self.find(request.key)
        if isinstance(request, Add) and item is not None:
            return Ack.CONFLICT
        if isinstance(request, Cas) and (item is None or item.cas != request.cas):
            return Ack.CONFLICT
        if self.full:
            if isinstance(request, Set):
                self.items.pop(request.key, None)
            self.refused_step = self.world.step
            return Ack.REJECTED
        expires_ms = self._expires_ms(request.exptime)
        if expires_ms > self.world.now_ms:
            self._store(request.key, request.data, expires_ms)
        else:
            self.items.pop(request.key, None)
        return Ack.STORED

    def _expires_ms(self, exptime: int) -> int:
        if exptime <= MOST_SECONDS:
            return self.world.now_ms + exptime * 1000
        return exptime * 1000 if exptime < NO_DATE else 0

    def _store(self, key: str, data: bytes, expires_ms: int) -> None:
        self._next_cas += 1
        self.items[key] = Item(data, self._next_cas, expires_ms)
        self.held.setdefault(key, []).append(data)


class Exchange:
    """One request to a server and its reply."""

    unsent = False
    hopeless = False

    def __init__(self, node: FakeNode, request: Request, deadline: float) -> None:
        self.node = node
        self.request = request
        self.deadline = deadline
        self.read_at = 0
        self.reused = False
        self.generation = -1
        self.opened_at = 0
        self._done = False
        self._fault: NodeFault | None = None
        self._reply: Parsed | None = None

    def process(self) -> None:
        """What the server does, or what goes wrong on the way."""
        self._done = True
        server, world = self.node.server, self.node.world
        if self.generation < 0:
            self._reply = Ack.CONFLICT
            return
        if not server.up:
            self._fail("connection refused", refused=True)
        elif server.hung or self.node.worker in server.cut:
            self._time_out()
        elif self.generation != server.generation and not self._again():
            return
        elif server.lossy and world.rng.random() < server.lossy:
            self._go_wrong()
        else:
            self._reply = server.apply(self.request)

    def _again(self) -> bool:
        """The connection was closed by a restart: one reconnect, where allowed."""
        if not self.reused:
            self._fail("closed without an answer", refused=True)
            return False
        if not self.request.repeatable:
            self._reply = Ack.CONFLICT
            self.generation = -1
            return False
        self.node.reconnect(self)
        return True

    def _go_wrong(self) -> None:
        server, request, world = self.node.server, self.request, self.node.world
        kind = world.rng.randrange(6)
        if kind == 1 or (kind == 3 and world.rng.random() < 0.5):
            server.apply(request)
        if kind in (2, 5) and not isinstance(request, Get):
            world.later(
                f"{server.name} {self.node.what(request)}",
                lambda: None if not server.up else _ignore(server.apply(request)),
            )
        if kind == 3:
            self._fail("not memcached's grammar", refused=False)
        elif kind == 4:
            self._fail("connection reset", refused=True)
        else:
            self._time_out()

    def _time_out(self) -> None:
        world = self.node.world
        world.spend(max(self.deadline - world.now, 0.001))
        self._fail("no answer in time", refused=False)

    def _fail(self, reason: str, *, refused: bool) -> None:
        self.node.faults += 1
        self._fault = NodeFault(reason, refused=refused)
        self.generation = -1

    def receive(self) -> Parsed:
        """The reply, or the fault."""
        world = self.node.world
        world.pause()
        if not self._done:
            self.process()
            if world.rng.random() < 0.3:
                world.pause()
        self.node.report(self.request, self._fault or self._reply)
        if self._fault is not None:
            raise self._fault
        self.node.give(self)
        assert self._reply is not None
        return self._reply

    def abandon(self) -> None:
        """Close the connection."""
        self.generation = -1


def _ignore(_: object) -> None:
    return None


class FakeNode:
    """One server as one worker reaches it: a pool of connections and their ages.

    :ivar faults: exchanges that went wrong.
    """

    def __init__(self, server: Server, worker: int) -> None:
        self.server = server
        self.world = server.world
        self.worker = worker
        self.faults = 0
        self._ticks = 0
        self._idle: list[tuple[int, int]] = []

    def drop_idle(self) -> None:
        """Nothing idles here."""

    def send(self, request: Request, deadline: float) -> Exchange:
        """Send a request."""
        world = self.world
        world.pause()
        exchange = Exchange(self, request, deadline)
        self._take(exchange)
        if world.rng.random() < 0.5:
            exchange.process()
        return exchange

    # --- connections -------------------------------------------------------------

    def _take(self, exchange: Exchange) -> None:
        request = exchange.request
        before = request.read_at if isinstance(request, Cas) else None
        for index in range(len(self._idle) - 1, -1, -1):
            opened_at, generation = self._idle[index]
            if before is None or opened_at < before:
                del self._idle[index]
                exchange.opened_at, exchange.generation = opened_at, generation
                exchange.reused = True
                break
        else:
            if before is None:
                self.reconnect(exchange)
                exchange.reused = False
        self._ticks += 1
        exchange.read_at = self._ticks

    def reconnect(self, exchange: Exchange) -> None:
        """A new connection."""
        if exchange.reused:
            self._idle.clear()
        self._ticks += 1
        exchange.opened_at = self._ticks
        exchange.generation = self.server.generation
        self._ticks += 1
        exchange.read_at = self._ticks

    def give(self, exchange: Exchange) -> None:
        """Back into the pool."""
        if exchange.generation >= 0:
            self._idle.append((exchange.opened_at, exchange.generation))
            exchange.generation = -1

    # --- words -------------------------------------------------------------------

    def what(self, request: Request) -> str:
        """A request in words."""
        return f"{type(request).__name__.lower()} {request.key[:6]}"  # type: ignore[attr-defined]

    def report(self, request: Request, result: object) -> None:
        """Tell the trace."""
        if self.world.trace is not None and "000000" not in self.what(request):
            if isinstance(result, Value):
                result = f"cas {result.cas}"
            self.world.log(
                "      w{} {} {} -> {}",
                self.worker,
                self.server.name,
                self.what(request),
                getattr(result, "value", None) or result,
            )


class Database:
    """The table, as all workers meet it.

    :ivar down: it answers nobody.
    :ivar lossy: chance that a statement goes wrong in some way.
    :ivar busy: chance that a worker has no connection to spare.
    :ivar behind: reads are answered from what it held at an earlier moment.
    :ivar on_insert: told of each row that appears, and whether it is live.
    :ivar on_reap: told of each live row that is deleted.
    :ivar on_fault: told of each statement that goes wrong, and whose it was.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[str, Row] = {}
        #: All live records that it ever held, by key.
        self.held: dict[str, list[bytes]] = {}
        #: Keys that it ever held a tombstone of.
        self.buried: set[str] = set()
        self.down = False
        self.lossy = 0.0
        self.busy = 0.0
        self.behind: dict[str, Row] | None = None
        self.on_insert: Callable[[str, bool], None] = lambda key, live: None
        self.on_reap: Callable[[str], None] = lambda key: None
        self.on_fault: Callable[[int], None] = lambda worker: None
        #: Step at which a call of this worker last went wrong.
        self.failed: dict[int, int] = {}
        self._away: dict[str, Row] = {}

    def forget(self, keys: Sequence[str]) -> None:
        """Rows are not there, as in a table that is still being restored."""
        for key in keys:
            self._away[key] = self.rows.pop(key)

    def remember(self) -> None:
        """They are there again, but for those that were written meanwhile."""
        for key, row in self._away.items():
            self.rows.setdefault(key, row)
        self._away.clear()

    def lag(self) -> None:
        """From now on reads show what it holds now."""
        self.behind = dict(self.rows)

    def heal(self) -> None:
        """No fault from now on; rows that are not there are another matter."""
        self.down = False
        self.lossy = 0.0
        self.busy = 0.0
        self.behind = None

    def state(self) -> str:
        """Its faults in words."""
        words = [
            "down" if self.down else "",
            "lossy" if self.lossy else "",
            "busy" if self.busy else "",
            "" if self.behind is None else "behind",
            "without some rows" if self._away else "",
        ]
        return " ".join(word for word in words if word) or "ok"

    # --- statements --------------------------------------------------------------

    def insert(self, row: Row) -> bool:
        """INSERT ... ON CONFLICT DO NOTHING."""
        if row.session_key in self.rows:
            return False
        self.rows[row.session_key] = row
        self._hold(row)
        self.on_insert(row.session_key, row.revoked_at is None)
        return True

    def replace(self, row: Row, seen_version: int) -> bool:
        """UPDATE of a live row of this version."""
        found = self.rows.get(row.session_key)
        if found is None or found.version != seen_version:
            return False
        if found.revoked_at is not None:
            return False
        self.rows[row.session_key] = dataclasses.replace(
            row, created_at=found.created_at
        )
        self._hold(row)
        return True

    def _hold(self, row: Row) -> None:
        if row.record is not None:
            self.held.setdefault(row.session_key, []).append(row.record)
        if row.revoked_at is not None:
            self.buried.add(row.session_key)

    def kill(self, tombstone: Row) -> bool:
        """UPDATE of a live row of any version into a tombstone."""
        found = self.rows.get(tombstone.session_key)
        if found is None or found.revoked_at is not None:
            return False
        self.rows[tombstone.session_key] = dataclasses.replace(
            tombstone, created_at=found.created_at, version=found.version + 1
        )
        self.buried.add(tombstone.session_key)
        return True

    def move(self, tombstone: Row, new: Row, seen_version: int | None) -> bool:
        """Both or neither."""
        before = self.rows.get(tombstone.session_key)
        if seen_version is None:
            buried = self.insert(tombstone)
        else:
            buried = self.replace(tombstone, seen_version)
        if not buried:
            return False
        if self.insert(new):
            return True
        if before is None:
            del self.rows[tombstone.session_key]
        else:
            self.rows[tombstone.session_key] = before
        return False

    def delete(self, row: Row) -> bool:
        """DELETE of the row as it was read."""
        found = self.rows.get(row.session_key)
        same = found is not None and (
            (found.version, found.synced_at, found.revoked_at)
            == (row.version, row.synced_at, row.revoked_at)
        )
        if same:
            del self.rows[row.session_key]
            if row.revoked_at is None:
                self.on_reap(row.session_key)
        return same


class FakeSql:
    """The statements of ``sql.SqlTable`` for one worker."""

    def __init__(self, database: Database, worker: int) -> None:
        self._database = database
        self._world = database.world
        self._worker = worker

    def read(self, session_key: str, deadline: float) -> Row | None:
        """The row."""
        database = self._database

        def find() -> Row | None:
            rows = database.rows if database.behind is None else database.behind
            return rows.get(session_key)

        return self._call("read", session_key, deadline, find)

    def insert(self, row: Row, deadline: float) -> bool:
        """Insert unless one stands there."""
        database = self._database
        return self._call(
            "insert", row.session_key, deadline, lambda: database.insert(row)
        )

    def update(self, row: Row, seen_version: int, deadline: float) -> bool:
        """Replace a live row of this version."""
        database = self._database
        return self._call(
            f"update v{seen_version}",
            row.session_key,
            deadline,
            lambda: database.replace(row, seen_version),
        )

    def put_tombstone(self, tombstone: Row, deadline: float, *, has_row: bool) -> bool:
        """Put a tombstone: up to three statements that commit by themselves."""
        database, key = self._database, tombstone.session_key

        def kill() -> bool:
            return self._call("bury", key, deadline, lambda: database.kill(tombstone))

        if has_row and kill():
            return True
        inserted = self._call(
            "insert dead", key, deadline, lambda: database.insert(tombstone)
        )
        return inserted or kill()

    def move(
        self, tombstone: Row, new: Row, deadline: float, *, seen_version: int | None
    ) -> bool:
        """Bury one row and insert another."""
        database = self._database
        return self._call(
            f"move v{seen_version} to {new.session_key[:6]}",
            tombstone.session_key,
            deadline,
            lambda: database.move(tombstone, new, seen_version),
        )

    # --- for the reaper ----------------------------------------------------------

    def page_expired(
        self, before_ms: int, after: tuple[int, str], limit: int, deadline: float
    ) -> list[Row]:
        """Rows whose time was over before then."""

        def rows() -> list[Row]:
            found = [
                row
                for row in self._database.rows.values()
                if row.expires_at < before_ms
                and (row.expires_at, row.session_key) > after
            ]
            found.sort(key=lambda row: (row.expires_at, row.session_key))
            return found[:limit]

        return self._call("page", "", deadline, rows)

    def delete(self, rows: Sequence[Row], deadline: float) -> list[bool]:
        """Delete the rows that are exactly as they were read."""
        database = self._database
        keys = " ".join(row.session_key for row in rows)
        return self._call(
            "delete", keys, deadline, lambda: [database.delete(row) for row in rows]
        )

    def count_expired(self, before_ms: int, deadline: float) -> int:
        """How many rows' time was over before then."""
        rows = self._database.rows.values()
        return self._call(
            "count", "", deadline, lambda: sum(r.expires_at < before_ms for r in rows)
        )

    def clock_ms(self, deadline: float) -> int | None:
        """None, as on SQLite, so that a reaper works though its clock is wrong."""
        return self._call("clock", "", deadline, lambda: None)

    def _call(
        self, what: str, key: str, deadline: float, apply: Callable[[], _Result]
    ) -> _Result:
        world, database = self._world, self._database
        world.pause()
        fault: SqlUnavailable | None = None
        if world.now >= deadline:
            fault = SqlBusy("no time left")
        elif database.down:
            world.spend(min(SQL_TIMEOUT, deadline - world.now))
            fault = SqlUnavailable("down")
        elif database.busy and world.rng.random() < database.busy:
            world.spend(min(SQL_TIMEOUT, deadline - world.now))
            fault = SqlBusy("busy")
        elif database.lossy and world.rng.random() < database.lossy:
            fault = SqlUnavailable(self._go_wrong(what, key, apply))
        if fault is not None:
            database.on_fault(self._worker)
            world.log("      w{} sql {} {} -> {}", self._worker, what, key[:6], fault)
            raise fault
        result = apply()
        if world.trace is not None and key[:6] != "000000":
            shown = f"v{result.version}" if isinstance(result, Row) else result
            world.log("      w{} sql {} {} -> {}", self._worker, what, key[:6], shown)
        world.pause()
        return result

    def _go_wrong(self, what: str, key: str, apply: Callable[[], object]) -> str:
        kind = self._world.rng.randrange(3)
        if kind == 0:
            return "lost"
        self._world.spend(SQL_TIMEOUT)
        if kind == 1:
            apply()
            # What was committed may be seen by others before anybody is told.
            self._world.pause()
            return "applied, unanswered"
        if not what.startswith(("read", "page", "delete")):
            self._world.later(f"sql {what} {key[:6]}", lambda: _ignore(apply()))
        return "late"
