"""A small cluster to break: real nodes, an SQLite file, workers and users.

A :class:`Lab` runs applications (:class:`Worker`) on the same nodes and the same
file, each with its own connections and its own idea of what is down. A
:class:`User` is a cookie; what a user does is a function of the session, so that a
test can say what happens in the middle of a request. What is stored is looked at
from outside: a raw connection to each node, an own connection to the file.

Nodes are called by their role for the session at hand: ``first_home``,
``second_home``, and ``stranger`` for the third where there is one.

Time passes when a test says so: the workers' Unix clock is the lab's. Only deadlines
and the pauses of breakers are real.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from flask import Flask, jsonify, session
from flask_sqlalchemy import SQLAlchemy
from werkzeug.http import parse_cookie

from flask_resilient_session import ResilientSession
from flask_resilient_session.codec import decode
from flask_resilient_session.record import Copy, Record, Tombstone, Unreachable
from flask_resilient_session.replication import SqlSilent
from servers import Memcached, ServerError, free_port, wait_until

NAMES: Final = ("alpha", "beta", "gamma")
PREFIX: Final = "session:"

FIRST, SECOND, STRANGER = "first_home", "second_home", "stranger"
OTHER: Final = {FIRST: SECOND, SECOND: FIRST}

#: Every scenario that breaks one home is run for each of them.
each_home = pytest.mark.parametrize("home", [FIRST, SECOND])

#: How the lab shows what is no live record.
DEAD, MOVED, CORRUPT = "dead", "moved", "corrupt"

#: The sync interval, in seconds of the lab's clock.
N: Final = 120

LIFETIME: Final = 24 * 3600

#: Patient, so that a slow machine is not taken for a fault; quick to try again.
CONFIG: Final[Mapping[str, Any]] = {
    "SECRET_KEY": "a secret of the lab " * 2,
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_SAMESITE": "Lax",
    "PERMANENT_SESSION_LIFETIME": LIFETIME,
    "RESILIENT_SESSION_SYNC_INTERVAL": N,
    "RESILIENT_SESSION_NODE_TIMEOUT": 1.0,
    "RESILIENT_SESSION_NODE_RETRY": 0.05,
    "RESILIENT_SESSION_NODE_RETRY_MAX": 0.05,
    "RESILIENT_SESSION_REQUEST_BUDGET": 8.0,
    "RESILIENT_SESSION_SQL_TIMEOUT": 3.0,
}

#: For tests in which something hangs.
HASTY: Final[Mapping[str, Any]] = {
    "RESILIENT_SESSION_NODE_TIMEOUT": 0.2,
    "RESILIENT_SESSION_REQUEST_BUDGET": 2.0,
    "RESILIENT_SESSION_SQL_TIMEOUT": 0.2,
}

#: Seconds for everything that is waited for.
PATIENCE: Final = 20.0

Action = Callable[[Any], Any]


@dataclass(frozen=True)
class Answer:
    """A response, as far as these tests look at it."""

    status: int
    data: Any
    set_cookie: str | None
    retry_after: str | None
    seconds: float


class Worker:
    """One application process, as far as one process can be several."""

    def __init__(self, lab: Lab, addresses: Mapping[str, str], config: Any) -> None:
        self.lab = lab
        self._actions: dict[str, Action] = {}
        self._numbers = itertools.count()
        self.app = app = Flask(__name__)
        app.config.update(CONFIG)
        app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{lab.file}"
        app.config["RESILIENT_SESSION_NODES"] = [
            {"name": name, "address": address} for name, address in addresses.items()
        ]
        app.config.update(config)
        db = SQLAlchemy(app)
        self.sessions = ResilientSession(app, db)
        self.state = app.extensions["resilient_session"]
        self.state.clock.now_ms = lab.now_ms
        app.add_url_rule("/<number>", "act", self._act, methods=["POST"])

    @property
    def stats(self) -> Mapping[str, int]:
        """Its counters."""
        return self.state.observer.stats

    def _act(self, number: str) -> Any:
        return jsonify(self._actions.pop(number)(session))

    def request(self, cookie: str | None, action: Action) -> Answer:
        """One request with this cookie that does this with its session."""
        number = str(next(self._numbers))
        self._actions[number] = action
        headers = {} if cookie is None else {"Cookie": f"session={cookie}"}
        client = self.app.test_client(use_cookies=False)
        started = time.monotonic()
        response = client.post(f"/{number}", headers=headers)
        return Answer(
            response.status_code,
            response.get_json(silent=True),
            response.headers.get("Set-Cookie"),
            response.headers.get("Retry-After"),
            time.monotonic() - started,
        )

    def reap(self, **options: Any) -> Any:
        """One pass of the reaper."""
        with self.app.app_context():
            return self.sessions.reap(**options)

    def settle(self) -> None:
        """Return when this worker uses every node and SQL again."""
        wait_until(self._is_well, PATIENCE, "every node and SQL to be used again")

    def _is_well(self) -> bool:
        state = self.state
        deadline = state.clock.monotonic() + 2
        access = state.keys.access(self.app, "nobody", deadline)
        homes = state.store.homes
        replies = homes.read(access, sorted(homes.cluster.names))
        row = state.store.durable.read(access)
        return not isinstance(row, SqlSilent) and not any(
            isinstance(reply, Unreachable) for reply in replies.values()
        )

    def close(self) -> None:
        """Close its connections."""
        self.state.close()


class User:
    """A browser: one cookie, sent to whichever worker is asked."""

    def __init__(self, worker: Worker, cookie: str | None = None) -> None:
        self.worker = worker
        self.cookie = cookie

    @property
    def session_key(self) -> str:
        """What the stores know the session by."""
        assert self.cookie is not None, "this user has no cookie"
        sid = self.cookie.rsplit(".", 1)[0]
        return hashlib.sha256(sid.encode()).hexdigest()

    def does(self, action: Action) -> Answer:
        """One request; the cookie is kept, replaced or deleted as it says."""
        answer = self.worker.request(self.cookie, action)
        if answer.set_cookie is not None:
            self.cookie = parse_cookie(answer.set_cookie).get("session") or None
        return answer

    def sees(self) -> Any:
        """The session as a page sees it; the status where there is no page."""
        answer = self.does(dict)
        return answer.data if answer.status == 200 else answer.status

    def changes(self, **values: Any) -> Answer:
        """One request that sets these keys."""
        return self.does(lambda session: session.update(values))

    def counts(self, key: str = "count") -> Answer:
        """One request that reads a number, adds 1 and writes it."""

        def action(session: Any) -> int:
            session[key] = session.get(key, 0) + 1
            return int(session[key])

        return self.does(action)

    def logs_in(self, user: str) -> Answer:
        """One request that sets the user."""
        return self.changes(_user_id=user)

    def logs_out(self) -> Answer:
        """One request that ends the session."""
        return self.does(lambda session: session.clear())

    def regenerates(self) -> Answer:
        """One request that asks for a new id."""
        return self.does(lambda session: session.regenerate())

    def at(self, worker: Worker) -> User:
        """The same cookie, sent to another worker; from here on its own."""
        return User(worker, self.cookie)

    def twin(self) -> User:
        """A copy of the cookie, which this user's later answers do not change."""
        return User(self.worker, self.cookie)


class Lab:
    """Nodes, one SQLite file, and any number of workers.

    :param servers: the nodes, named alpha, beta and gamma in this order.
    :param folder: for the file.
    """

    def __init__(
        self, servers: Sequence[Memcached], folder: Path, **config: Any
    ) -> None:
        self.servers = dict(zip(NAMES, servers, strict=False))
        #: What workers open: a link, so that the file vanishes and comes back at
        #: once; in between SQLite would make a new, empty one.
        self.file = folder / "sessions.sqlite"
        self._real_file = folder / "real.sqlite"
        self._nowhere = folder / "nowhere" / "real.sqlite"
        self._link(self._real_file)
        self._offset_ms = 0
        self._writer: sqlite3.Connection | None = None
        self._config = config
        self._workers: list[Worker] = []
        self._proxies: list[Proxy] = []
        self._threads = ThreadPoolExecutor(8, "user")
        self.worker = self.new_worker()

    # --- who is there ------------------------------------------------------------

    def new_worker(
        self, addresses: Mapping[str, str] | None = None, **config: Any
    ) -> Worker:
        """Another worker.

        :param addresses: name -> address; by default the nodes' own.
        """
        if addresses is None:
            addresses = {name: s.address for name, s in self.servers.items()}
        worker = Worker(self, addresses, {**self._config, **config})
        self._workers.append(worker)
        return worker

    def wired_worker(self, **config: Any) -> tuple[Worker, dict[str, Proxy]]:
        """A worker that reaches each node by a wire of its own, and the wires."""
        wires = {name: Proxy(server) for name, server in self.servers.items()}
        self._proxies.extend(wires.values())
        addresses = {name: wire.address for name, wire in wires.items()}
        return self.new_worker(addresses, **config), wires

    def member(self, **values: Any) -> User:
        """A user who is logged in: two copies and a row."""
        user = User(self.worker)
        assert user.changes(_user_id="7", **values).status == 200
        return user

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
        return InFlight(self, user, action)

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
        if not self._real_file.exists():
            return None  # nobody has needed SQL yet
        with contextlib.closing(sqlite3.connect(self._real_file)) as connection:
            connection.row_factory = sqlite3.Row
            found = connection.execute(
                "SELECT * FROM resilient_sessions WHERE session_key = ?",
                (user.session_key,),
            ).fetchone()
        return None if found is None else dict(found)

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
        """Take the database away, from open connections too: it cannot be opened."""
        self._link(self._nowhere)
        for worker in self._workers:
            worker.state.sql.dispose()

    def sql_back(self) -> None:
        """Put the database back as it was."""
        self._link(self._real_file)

    def sql_locked(self, mode: str = "IMMEDIATE") -> None:
        """Let another writer hold the file: EXCLUSIVE keeps readers out too."""
        assert self._writer is None
        self._writer = sqlite3.connect(self._real_file, PATIENCE, isolation_level=None)
        self._writer.execute(f"BEGIN {mode}")

    def sql_unlocked(self) -> None:
        """Let the other writer give up."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def sql_saved(self) -> Path:
        """A copy of the file as it is now, for :meth:`sql_restored`."""
        backup = self.file.with_suffix(".backup")
        shutil.copy(self._real_file, backup)
        return backup

    def sql_restored(self, backup: Path) -> None:
        """Go back to an older state of the database."""
        for worker in self._workers:
            worker.state.sql.dispose()
        shutil.copy(backup, self._real_file)

    def _link(self, target: Path) -> None:
        link = self.file.with_suffix(".link")
        link.symlink_to(target)
        link.replace(self.file)

    def settle(self) -> None:
        """Return when every worker uses every node and SQL again."""
        for worker in self._workers:
            worker.settle()

    # --- time --------------------------------------------------------------------

    def now_ms(self) -> int:
        """The workers' clock: the real one and what a test added."""
        return time.time_ns() // 1_000_000 + self._offset_ms

    def pass_time(self, seconds: float) -> None:
        """Let the workers' clock go forward."""
        self._offset_ms += round(seconds * 1000)

    def close(self) -> None:
        """End all that was started."""
        self.sql_unlocked()
        self._threads.shutdown()
        for worker in self._workers:
            worker.close()
        for proxy in self._proxies:
            proxy.close()


class InFlight:
    """A request that stops after loading its session until it is told to go on."""

    def __init__(self, lab: Lab, user: User, action: Action) -> None:
        self._loaded = threading.Event()
        self._go_on = threading.Event()

        def slowly(session: Any) -> Any:
            dict(session)
            self._loaded.set()
            assert self._go_on.wait(PATIENCE)
            return action(session)

        self._answer = lab.start(lambda: user.does(slowly))
        assert self._loaded.wait(PATIENCE)

    def finish(self) -> Answer:
        """Let it go on, and return its answer."""
        self._go_on.set()
        answer = self._answer.result(PATIENCE)
        assert isinstance(answer, Answer)
        return answer


class Proxy:
    """A wire to one node that can be cut in several ways.

    ``refuse``  closes everything; connecting is refused.
    ``hold``    keeps what is sent to the node, until ``release`` or ``drop``.
    ``drip``    hands on the node's answers a byte at a time.
    ``reset``   resets a connection as soon as something is sent on it.
    ``mend``    ends all of these; what is held goes nowhere.
    """

    def __init__(self, server: Memcached) -> None:
        self._server = server
        self._port = free_port()
        self._mode = "pass"
        self._lock = threading.Lock()
        self._wires: list[_Wire] = []
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._listen()

    @property
    def address(self) -> str:
        """Where a worker connects to."""
        return f"127.0.0.1:{self._port}"

    @property
    def mode(self) -> str:
        """How it is cut at the moment; ``pass`` where it is not."""
        return self._mode

    def refuse(self) -> None:
        """Refuse connections and reset those that exist."""
        self._mode = "refuse"
        self._deafen()
        self._cut()

    def hold(self) -> None:
        """Keep from now on what is sent to the node."""
        self._mode = "hold"

    def drip(self) -> None:
        """Hand on answers from now on so slowly that none is ever complete."""
        self._mode = "drip"

    def reset(self) -> None:
        """Reset each connection that is used from now on."""
        self._mode = "reset"

    def release(self) -> int:
        """Deliver what was held, also of connections that were given up since.

        :returns: how many bytes the node got late.
        """
        self._mode = "pass"
        return sum(wire.deliver() for wire in self._all())

    def mend(self) -> None:
        """Be a wire again; what was held is lost."""
        self._mode = "pass"
        self._cut()
        if self._listener is None:
            self._listen()

    def close(self) -> None:
        """Close everything."""
        self._mode = "refuse"
        self._deafen()
        self._cut()

    # --- how it is done ----------------------------------------------------------

    def _all(self) -> list[_Wire]:
        with self._lock:
            return list(self._wires)

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._acceptor = threading.Thread(
            target=self._accept, args=(self._listener,), daemon=True
        )
        self._acceptor.start()

    def _deafen(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None and self._acceptor is not None:
            # Closing alone would not wake the thread that waits in accept.
            listener.shutdown(socket.SHUT_RDWR)
            self._acceptor.join(PATIENCE)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                address = (self._server.host, self._server.port)
                upstream = socket.create_connection(address, PATIENCE)
            except OSError:
                _reset(client)
                continue
            with self._lock:
                self._wires.append(_Wire(self, client, upstream))

    def _cut(self) -> None:
        with self._lock:
            wires, self._wires = self._wires, []
        for wire in wires:
            wire.close()


class _Wire:
    """One connection through a :class:`Proxy`."""

    def __init__(
        self, proxy: Proxy, client: socket.socket, upstream: socket.socket
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._upstream = upstream
        self._held = b""
        self._lock = threading.Lock()
        for end in (client, upstream):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pumps = [
            threading.Thread(target=pump, daemon=True)
            for pump in (self._requests, self._replies)
        ]
        for pump in self._pumps:
            pump.start()

    def deliver(self) -> int:
        with self._lock:
            held, self._held = self._held, b""
            if held:
                self._upstream.sendall(held)
        return len(held)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._upstream.shutdown(socket.SHUT_RDWR)
        _reset(self._client, close=False)
        for pump in self._pumps:
            pump.join(PATIENCE)
        self._client.close()
        self._upstream.close()

    def _requests(self) -> None:
        while data := _received(self._client):
            with self._lock:
                if self._proxy.mode == "hold":
                    self._held += data
                    continue
                if self._proxy.mode == "reset":
                    _reset(self._client, close=False)
                    return
                try:
                    self._upstream.sendall(data)
                except OSError:
                    return
        with self._lock:
            if not self._held:
                with contextlib.suppress(OSError):
                    self._upstream.shutdown(socket.SHUT_WR)

    def _replies(self) -> None:
        while data := _received(self._upstream):
            dripping = self._proxy.mode == "drip"
            # The last byte of an answer that drips comes never.
            pieces = [data[i : i + 1] for i in range(len(data) - 1)]
            try:
                for piece in pieces if dripping else [data]:
                    self._client.sendall(piece)
                    if dripping:
                        time.sleep(0.02)
            except OSError:
                return
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)


def _received(end: socket.socket) -> bytes:
    try:
        return end.recv(65536)
    except OSError:
        return b""


def _reset(end: socket.socket, *, close: bool = True) -> None:
    with contextlib.suppress(OSError):
        # A linger of no time at all makes a close a reset.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
    if close:
        end.close()


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
def new_lab(servers: Sequence[Memcached], folder: Path, **config: Any) -> Iterator[Lab]:
    """A lab that is closed at the end, whatever the test did."""
    lab = Lab(servers, folder, **config)
    try:
        yield lab
    finally:
        lab.close()
