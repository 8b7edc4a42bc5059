"""A small cluster to break: real nodes, a database, workers and users.

A :class:`Lab` runs applications (:class:`Worker`) on the same nodes and the same
table, each with its own connections and its own idea of what is down. A
:class:`User` is a cookie; what a user does is a function of the session, so that a
test can say what happens in the middle of a request. What is stored is looked at
from outside: a raw connection to each node, an own connection to the database.

A test that takes its database from the fixture ``lab_database`` runs on each of them,
and does not know on which: a lab has verbs for what happens to SQL.

Nodes are called by their role for the session at hand: ``first_home``,
``second_home``, and ``stranger`` for the third where there is one.

Time passes when a test says so: the Unix clocks of the workers and the database are the
lab's. Only deadlines and the pauses of breakers are real.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from flask_resilient_session.core.record import Copy, Record, Tombstone
from flask_resilient_session.core.values import decode
from lab_databases import LabDatabase, SqliteFile
from lab_workers import (
    HASTY,
    HASTY_SECONDS,
    HASTY_WITH_SQL,
    LIFETIME,
    PATIENCE,
    Action,
    Answer,
    InFlight,
    N,
    User,
    Worker,
)
from proxy import Proxy
from servers import Memcached, ServerError, wait_until

NAMES: Final = ("alpha", "beta", "gamma")
PREFIX: Final = "session:"

FIRST, SECOND, STRANGER = "first_home", "second_home", "stranger"
OTHER: Final = {FIRST: SECOND, SECOND: FIRST}

#: Every scenario that breaks one home is run for each of them.
each_home = pytest.mark.parametrize("home", [FIRST, SECOND])

#: How the lab shows what is no live record.
DEAD, MOVED, CORRUPT = "dead", "moved", "corrupt"


class Lab:
    """Nodes, one database, and any number of workers.

    :param servers: the nodes, named alpha, beta and gamma in this order.
    :param database: where the rows are; a folder stands for a file of SQLite in it.
    """

    def __init__(
        self, servers: Sequence[Memcached], database: LabDatabase | Path, **config: Any
    ) -> None:
        self.servers = dict(zip(NAMES, servers, strict=False))
        self.database = SqliteFile(database) if isinstance(database, Path) else database
        self._offset_ms = 0
        self._config = config
        self._workers: list[Worker] = []
        self._proxies: list[Proxy] = []
        self._threads = ThreadPoolExecutor(8, "user")
        self.worker = self.new_worker()

    # --- who is there ------------------------------------------------------------

    def new_worker(
        self,
        addresses: Mapping[str, str] | None = None,
        *,
        connected: bool = True,
        **config: Any,
    ) -> Worker:
        """Another worker.

        :param addresses: name -> address; by default the nodes' own.
        :param connected: it has used its database before, where that is a server.
        """
        if addresses is None:
            addresses = {name: s.address for name, s in self.servers.items()}
        config = {**self.database.config, **self._config, **config}
        worker = Worker(addresses, config, self.now_ms)
        worker.state.sql.clock_ms = partial(
            self._database_ms, worker.state.sql.clock_ms
        )
        self._workers.append(worker)
        if connected and not self.database.is_file:
            worker.connect()
        return worker

    def wired_worker(self, **config: Any) -> tuple[Worker, dict[str, Proxy]]:
        """A worker that reaches each node by a wire of its own, and the wires."""
        wires = {name: Proxy(server) for name, server in self.servers.items()}
        self._proxies.extend(wires.values())
        addresses = {name: wire.address for name, wire in wires.items()}
        return self.new_worker(addresses, **config), wires

    def member(self, **values: Any) -> User:
        """A user who is logged in: two copies and a row.

        A worker in a hurry may refuse that on a busy machine, and is asked again.
        """

        def logged_in() -> User | None:
            user = User(self.worker)
            status = user.changes(_user_id="7", **values).status
            assert status in (200, 503)
            return user if status == 200 else None

        return wait_until(logged_in, PATIENCE, "a login")

    def visitor(self, **values: Any) -> User:
        """A user who stored something and has not come back: two copies, no row."""
        user = User(self.worker)
        assert user.changes(**values).status == 200
        return user

    def start(self, call: Callable[[], Any]) -> Future[Any]:
        """Do something in another thread."""
        return self._threads.submit(call)

    def in_flight(self, user: User, action: Action) -> InFlight:
        """A request that has loaded the session and waits before it goes on."""
        return InFlight(self.start, user, action)

    # --- roles -------------------------------------------------------------------

    def name(self, user: User, role: str) -> str:
        """The name of the node in this role for the user's session."""
        homes = self.worker.state.store.homes.ring.homes(user.session_key)
        if role == STRANGER:
            (stranger,) = set(self.servers) - set(homes)
            return stranger
        return homes[(FIRST, SECOND).index(role)]

    def node(self, user: User, role: str) -> Memcached:
        """The node in this role for the user's session."""
        return self.servers[self.name(user, role)]

    # --- what is stored ----------------------------------------------------------

    def raw(self, user: User, role: str) -> bytes | None:
        """The bytes of a copy."""
        return self.node(user, role).raw_get(self.item(user))

    def item(self, user: User) -> str:
        """The memcached key of the user's session."""
        return PREFIX + user.session_key

    def copy(self, user: User, role: str) -> Any:
        """The data in a copy; DEAD or MOVED for a tombstone, None for nothing."""
        data = self.raw(user, role)
        return None if data is None else self._shown(self._unsealed(user, data))

    def copies(self, user: User) -> list[Any]:
        """What both homes hold, the first home's first."""
        return [self.copy(user, FIRST), self.copy(user, SECOND)]

    def record(self, user: User, role: str) -> Record:
        """The live record in a copy."""
        data = self.raw(user, role)
        assert data is not None, f"the {role} holds nothing"
        copy = self._unsealed(user, data)
        assert isinstance(copy, Record), copy
        return copy

    def token(self, user: User, role: str) -> int:
        """The compare-and-swap token of a copy."""
        server = self.node(user, role)
        address = (server.host, server.port)
        with socket.create_connection(address, PATIENCE) as connection:
            connection.sendall(f"mg {self.item(user)} c\r\n".encode())
            answer = connection.recv(100).decode()
        assert answer.startswith("HD c"), answer
        return int(answer.removeprefix("HD c"))

    def row(self, user: User) -> Any:
        """The data in the row, shown as a copy is."""
        found = self.raw_row(user)
        if found is None:
            return None
        if found["revoked_at"] is not None:
            return MOVED if found["reason"] == "moved" else DEAD
        return self._shown(self._unsealed(user, found["record"]))

    def raw_row(self, user: User) -> dict[str, Any] | None:
        """The columns of the row, read over a connection of our own."""
        return self.database.row(user.session_key)

    def _unsealed(self, user: User, data: bytes) -> Any:
        keyring = self.worker.state.keys.of(self.worker.app).keyring
        return keyring.unseal(user.session_key, data)

    def _shown(self, copy: Copy) -> Any:
        if isinstance(copy, Tombstone):
            return MOVED if copy.reason == "moved" else DEAD
        return decode(copy.payload()) if isinstance(copy, Record) else CORRUPT

    # --- what is done to it ------------------------------------------------------

    def kill(self, user: User, role: str) -> None:
        """Kill a node like the power switch."""
        self.node(user, role).kill()

    def freeze(self, user: User, role: str) -> None:
        """Let a node accept connections but answer nothing."""
        self.node(user, role).freeze()

    def restart(self, user: User, role: str) -> None:
        """Restart a node, empty, whatever its state."""
        self.node(user, role).restart()

    def evict(self, user: User, role: str) -> None:
        """Take the session out of a node, as memory pressure would."""
        self.node(user, role).evict(self.item(user))

    def put(self, user: User, role: str, data: bytes) -> None:
        """Put other bytes where the session's are."""
        self.node(user, role).raw_set(self.item(user), data)

    def count_up_tokens(self, count: int) -> None:
        """Let the nodes give away tokens, which are numbered for each server."""
        for server in self.servers.values():
            for _ in range(count):
                server.raw_set("of-nobody", b"")

    def sql_gone(self) -> None:
        """Take the database away, from open connections too."""
        self.database.gone()
        self._let_go_of_files()

    def sql_back(self) -> None:
        """Put the database back as it was."""
        self.database.back()

    def sql_locked(self, *, readable: bool = False) -> None:
        """Let somebody else hold the table, so that nobody gets at it.

        :param readable: only those who write have to wait.
        """
        self.database.locked(readable=readable)

    def sql_unlocked(self) -> None:
        """Let them give up; nothing that waited for it is done any more."""
        self.database.unlocked()

    def sql_saved(self) -> Any:
        """A copy of all rows as they are now, for :meth:`sql_restored`."""
        return self.database.saved()

    def sql_restored(self, backup: Any) -> None:
        """Go back to an older state of the database."""
        self._let_go_of_files()
        self.database.restored(backup)

    def sql_spoiled(self) -> None:
        """Put bytes that are no record into every row."""
        self.database.spoiled()

    def _let_go_of_files(self) -> None:
        # A file that was taken away or replaced is still there for who has it open.
        if self.database.is_file:
            for worker in self._workers:
                worker.state.sql.dispose()

    def settle(self) -> None:
        """Return when every worker uses every node and SQL again."""
        for worker in self._workers:
            worker.settle()

    # --- time --------------------------------------------------------------------

    def now_ms(self) -> int:
        """The workers' clock: the real one and what a test added."""
        return time.time_ns() // 1_000_000 + self._offset_ms

    def pass_time(self, seconds: float) -> None:
        """Let the clocks of the workers and the database go forward."""
        self._offset_ms += round(seconds * 1000)

    def _database_ms(
        self, ask: Callable[[float], int | None], deadline: float
    ) -> int | None:
        """The database's own clock, and what a test added."""
        told = ask(deadline)
        return None if told is None else told + self._offset_ms

    def close(self) -> None:
        """End all that was started."""
        self.sql_unlocked()
        self._threads.shutdown()
        for worker in self._workers:
            worker.close()
        for proxy in self._proxies:
            proxy.close()


def fill(server: Memcached, like: bytes) -> None:
    """Fill a node that was started with ``-M``, for items about this long."""
    for size in (len(like), int(len(like) * 0.8), int(len(like) * 1.25)):
        for number in itertools.count():
            key = f"filler-{size}-{number}".ljust(len(PREFIX) + 64, "-")
            try:
                server.raw_set(key, b"x" * size)
            except ServerError:
                break


@contextlib.contextmanager
def new_lab(
    servers: Sequence[Memcached], database: LabDatabase | Path, **config: Any
) -> Iterator[Lab]:
    """A lab that is closed at the end, whatever the test did.

    :param database: as for :class:`Lab`.
    """
    lab = Lab(servers, database, **config)
    try:
        yield lab
    finally:
        lab.close()


__all__ = [
    "CORRUPT",
    "DEAD",
    "FIRST",
    "HASTY",
    "HASTY_SECONDS",
    "HASTY_WITH_SQL",
    "LIFETIME",
    "MOVED",
    "NAMES",
    "OTHER",
    "PATIENCE",
    "SECOND",
    "STRANGER",
    "Action",
    "Answer",
    "InFlight",
    "Lab",
    "N",
    "Proxy",
    "User",
    "Worker",
    "each_home",
    "fill",
    "new_lab",
]
