"""Under real WSGI servers: forked workers, threads, greenlets, and a node that dies."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

import pytest
from werkzeug.http import parse_cookie

from misbehaving import in_child
from served_app import PATIENCE, Gunicorn, create_app
from servers import Memcached, wait_until

pytestmark = pytest.mark.heavy

#: What a node's statistics count besides the application's connections: the one
#: that asks for them.
OWN_CONNECTIONS: Final = 1

#: Connections that a process keeps open to a node when nothing goes on.
IDLE_CONNECTIONS: Final = 32


def listed(nodes: Sequence[Memcached]) -> str:
    """Nodes as RESILIENT_SESSION_NODES names them."""
    return ",".join(node.address for node in nodes)


class Browser:
    """A connection that is kept alive, a cookie, and what was acknowledged.

    :ivar kept: key -> the values that the server acknowledged, in order.
    """

    def __init__(self, port: int, user: str) -> None:
        self.user = user
        self.cookie: str | None = None
        self.kept: dict[str, list[str]] = {}
        self.statuses: Counter[int] = Counter()
        self._connection = http.client.HTTPConnection("127.0.0.1", port, PATIENCE)

    def send(self, method: str, path: str) -> None:
        """The first half of a request."""
        headers = {} if self.cookie is None else {"Cookie": f"session={self.cookie}"}
        self._connection.request(method, path, headers=headers)

    def receive(self) -> Any:
        """The second half: the page, or None where there is none."""
        response = self._connection.getresponse()
        body = response.read()
        self.statuses[response.status] += 1
        return self.page_of(response, body)

    def page_of(self, response: http.client.HTTPResponse, body: bytes) -> Any:
        """The page of a response, whose cookie is kept; None where there is none."""
        for header in response.headers.get_all("Set-Cookie") or ():
            self.cookie = parse_cookie(header).get("session") or None
        return json.loads(body) if response.status == 200 else None

    def ask(self, method: str, path: str) -> Any:
        """A whole request."""
        self.send(method, path)
        return self.receive()

    def logs_in(self) -> None:
        """The first request: the session knows whose it is."""
        assert self.ask("POST", f"/login/{self.user}") is not None

    def appends(self, key: str, value: str) -> None:
        """One request that appends, and a look at all that it shows."""
        self.appending(key, value)
        self.appended(key, value)

    def appending(self, key: str, value: str) -> None:
        """The first half of :meth:`appends`."""
        self.send("POST", f"/append/{key}/{self.user}-{value}")

    def appended(self, key: str, value: str) -> None:
        """The second half of :meth:`appends`."""
        page = self.receive()
        assert page is not None, f"{self.user} got {dict(self.statuses)}"
        self.kept.setdefault(key, []).append(f"{self.user}-{value}")
        self.check(page)

    def looks(self) -> None:
        """One request that changes nothing, and a look at all that it shows."""
        page = self.ask("GET", "/")
        assert page is not None, f"{self.user} got {dict(self.statuses)}"
        self.check(page)

    def check(self, page: Any) -> None:
        """A page shows this user's session, whole, and nobody else's."""
        assert page == {"_user_id": self.user, **self.kept}

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Crowd:
    """Users who all do something at once, each in a session of its own.

    :param threads: how many act at the same time, each for some users in turn.
    :ivar requests: how many were answered, in all.
    """

    def __init__(self, port: int, threads: int, users_each: int) -> None:
        self.requests = 0
        self._answered = threading.Condition()
        self._over = threading.Event()
        self._groups = [
            [Browser(port, f"user{t}x{u}") for u in range(users_each)]
            for t in range(threads)
        ]

    @property
    def browsers(self) -> list[Browser]:
        """All of them."""
        return list(itertools.chain.from_iterable(self._groups))

    def visit(self, rounds: int, meanwhile: Callable[[], None]) -> None:
        """Every user appends and looks this often, and until something else is over."""
        self._over.clear()
        with ThreadPoolExecutor(len(self._groups)) as threads:
            futures = [
                threads.submit(self._visit, group, rounds) for group in self._groups
            ]
            try:
                meanwhile()
            finally:
                self._over.set()
                for future in futures:
                    future.result(PATIENCE * 2)

    def await_requests(self, more: int) -> None:
        """Return when this many more requests were answered."""
        with self._answered:
            target = self.requests + more
            assert self._answered.wait_for(lambda: self.requests >= target, PATIENCE)

    def await_everybody(self) -> None:
        """Return when every session was read once from now on."""
        with self._answered:
            # The first of the two may have been under way already.
            targets = [(b, b.statuses.total() + 2) for b in self.browsers]
            assert self._answered.wait_for(
                lambda: all(b.statuses.total() >= target for b, target in targets),
                PATIENCE,
            )

    def close(self) -> None:
        """Close every connection."""
        for browser in self.browsers:
            browser.close()

    def _visit(self, group: list[Browser], rounds: int) -> None:
        for number in itertools.count():
            if number >= rounds and self._over.is_set():
                break
            for browser in group:
                if browser.cookie is None:
                    browser.logs_in()
                # A few values per key: pages stay short.
                turn = sum(map(len, browser.kept.values()))
                self._count(browser.appends, f"list{turn // 4}", str(turn))
                if number % 2:
                    self._count(browser.looks)
        for browser in group:
            self._count(browser.looks)

    def _count(self, request: Callable[..., None], *arguments: str) -> None:
        request(*arguments)
        with self._answered:
            self.requests += 1
            self._answered.notify_all()


def connections(node: Memcached) -> int:
    """Connections that applications have to a node."""
    return int(node.stats()["curr_connections"]) - OWN_CONNECTIONS


def break_each(
    server: Gunicorn, nodes: Sequence[Memcached], crowd: Crowd
) -> Callable[[], None]:
    """Kill and restart one node after the other, while the crowd goes on.

    Between two faults every worker uses every node again, and all sessions are read,
    as the guarantees suppose.
    """

    def run() -> None:
        for node in nodes:
            crowd.await_requests(20)
            node.kill()
            crowd.await_requests(60)
            node.start()
            server.settle(crowd.browsers[0].cookie)
            crowd.await_everybody()

    return run


def finish_in_flight(
    server: Gunicorn, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop the server while it answers; the answer still comes and is kept."""
    with socket.create_server(("127.0.0.1", 0)) as gate:
        gate.settimeout(PATIENCE)
        browser.send("POST", f"/wait/{gate.getsockname()[1]}/last")
        inside, _ = gate.accept()
        with inside:
            server.terminate()
            wait_until(server.deaf, PATIENCE, "the server to close its port")
            inside.sendall(b".")
        page = browser.receive()
    browser.close()
    assert page["last"] == "waited"
    assert server.ended() == 0, server.log
    assert "Traceback" not in server.log
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    app = create_app()
    client = app.test_client(use_cookies=False)
    headers = {"Cookie": f"session={browser.cookie}"}
    assert client.get("/", headers=headers).json == page
    app.extensions["resilient_session"].close()


@pytest.fixture
def crowded() -> Iterator[Callable[[Gunicorn, int, int], Crowd]]:
    """Makes crowds; closes their connections at the end."""
    with ExitStack() as stack:

        def make(server: Gunicorn, threads: int, users_each: int) -> Crowd:
            crowd = Crowd(server.port, threads, users_each)
            stack.callback(crowd.close)
            return crowd

        yield make


def test_preloaded_workers_share_no_connection(
    nodes: list[Memcached],
    tmp_path: Path,
    crowded: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes forked with open connections; every user sees their own data."""
    database = tmp_path / "sync.sqlite"
    with Gunicorn(listed(nodes), database, workers=2, preload=True) as server:
        with closing(Browser(server.port, "nobody")) as browser:
            page = browser.ask("GET", "/about")
        assert page["preloaded"]["process"] == server.pid != page["process"]
        assert page["preloaded"]["nodes"] >= len(nodes)
        crowd = crowded(server, 6, 4)
        crowd.visit(18, break_each(server, nodes, crowd))
        assert crowd.requests >= 600
        for node in nodes:
            # One for each process, the master's included.
            assert connections(node) <= 3
        finish_in_flight(server, crowd.browsers[0], monkeypatch)


def test_threads_share_a_pool_of_connections(
    nodes: list[Memcached],
    tmp_path: Path,
    crowded: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes of eight threads need no more connections than that."""
    arguments = ("--worker-class", "gthread", "--threads", "8")
    with Gunicorn(
        listed(nodes), tmp_path / "threads.sqlite", *arguments, workers=2
    ) as server:
        crowd = crowded(server, 16, 3)
        crowd.visit(14, break_each(server, nodes, crowd))
        assert crowd.requests >= 1000
        for node in nodes:
            assert connections(node) <= 2 * 8
        finish_in_flight(server, crowd.browsers[0], monkeypatch)


def test_greenlets_share_a_pool_of_connections(
    nodes: list[Memcached], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bursts of 400 greenlets leave no more connections than the pool keeps."""
    arguments = ("--worker-class", "gevent", "--worker-connections", "1000")
    with (
        Gunicorn(listed(nodes), tmp_path / "greenlets.sqlite", *arguments) as server,
        ExitStack() as stack,
    ):
        browsers = [
            stack.enter_context(closing(Browser(server.port, f"user{number}")))
            for number in range(400)
        ]
        for browser in browsers:
            browser.logs_in()
        busiest = 0
        for burst in range(5):
            if burst == 2:
                nodes[0].kill()
            if burst == 3:
                nodes[0].start()
                server.settle(browsers[0].cookie)
            for browser in browsers:
                browser.appending("list", str(burst))
            for browser in browsers:
                browser.appended("list", str(burst))
            alive = [node for node in nodes if node.alive]
            busiest = max(busiest, *map(connections, alive))
        assert busiest <= IDLE_CONNECTIONS
        # This server would wait for those that are kept alive.
        for browser in browsers[1:]:
            browser.close()
        finish_in_flight(server, browsers[0], monkeypatch)


def test_a_childs_commits_outlive_the_parents_connection(
    nodes: list[Memcached], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child forked with an open SQLite file takes locks of its own there."""
    database = tmp_path / "forked.sqlite"
    server = Gunicorn(listed(nodes), database)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    app = create_app()
    state = app.extensions["resilient_session"]
    assert app.test_client().post("/login/parent").status_code == 200

    def count() -> int:
        """Rows, as another process sees them; the last to close takes the log."""
        script = (
            "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1]);"
            "query = 'SELECT count(*) FROM resilient_sessions';"
            "print(connection.execute(query).fetchone()[0]); connection.close()"
        )
        command = [sys.executable, "-c", script, str(database)]
        return int(subprocess.check_output(command))

    parent_is_done, tell = os.pipe()
    told, child_has_written = os.pipe()

    def child() -> bool:
        statuses = [app.test_client().post("/login/child").status_code]
        os.write(child_has_written, b".")
        os.read(parent_is_done, 1)
        for _ in range(2):
            count()
            statuses.append(app.test_client().post("/login/child").status_code)
        return statuses == [200, 200, 200]

    def close_meanwhile() -> None:
        os.read(told, 1)
        state.close()
        os.write(tell, b".")

    closing_thread = threading.Thread(target=close_meanwhile)
    closing_thread.start()
    try:
        assert in_child(child)
    finally:
        closing_thread.join(PATIENCE)
        state.close()
    assert count() == 4
