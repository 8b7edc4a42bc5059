"""Crowds that come at the same moment: refused only where somebody else is at fault."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from test_real_servers import Browser, listed

from database_servers import DatabaseServer, new_table_name
from served_app import PATIENCE, SECONDS_HEADER, Gunicorn
from servers import Memcached, wait_until

#: The extension's own settings, not those for slow machines.
AS_SHIPPED: Final = {
    "RESILIENT_SESSION_NODE_TIMEOUT": "0.25",
    "RESILIENT_SESSION_SQL_TIMEOUT": "0.5",
}

#: For a machine with two processors, and then some.
BUSY_PROCESSES: Final = 4

#: How the requests of a crowd are served at once, and how many they are.
GREENLETS: Final = (
    *("--worker-class", "gevent", "--worker-connections", "1000"),
    *("--backlog", "1024"),
)
THREADS: Final = ("--worker-class", "gthread", "--threads", "200", "--backlog", "1024")
each_server = pytest.mark.parametrize(
    ("arguments", "size"),
    [(GREENLETS, 800), (THREADS, 200)],
    ids=["800 greenlets", "200 threads"],
)

pytestmark = pytest.mark.alone


class Visitor(Browser):
    """A browser that keeps book: what was refused may have been kept.

    :ivar acknowledged: what the server said it had kept, in order.
    :ivar refused: what it refused.
    """

    def __init__(self, port: int, user: str) -> None:
        super().__init__(port, user)
        self.acknowledged: list[str] = []
        self.refused: set[str] = set()
        self.seconds: list[float] = []

    def receive(self) -> Any:
        """See :class:`Browser`; notes how long a refusal took the application."""
        response = self._connection.getresponse()
        body = response.read()
        self.statuses[response.status] += 1
        if response.status == 503:
            self.seconds.append(float(response.headers[SECONDS_HEADER]))
        return self.page_of(response, body)

    def changed(self, value: str) -> bool:
        """The second half of a change; whether it was acknowledged."""
        page = self.receive()
        if page is None:
            self.refused.add(value)
            return False
        self.acknowledged.append(value)
        self.agrees(page)
        return True

    def agrees(self, page: Any) -> None:
        """A page shows what was acknowledged, and nothing that was never sent."""
        assert page["_user_id"] == self.user
        found = page.get("list", [])
        assert [v for v in found if v not in self.refused] == self.acknowledged


class Crowd:
    """Visitors who are all logged in and act at the same moment."""

    def __init__(self, visitors: Sequence[Visitor]) -> None:
        self.visitors = visitors

    def changes(
        self, value: str, meanwhile: Callable[[], object] = str
    ) -> list[Visitor]:
        """Everybody appends a value; returns those who were refused.

        :param meanwhile: happens when some of them have been answered.
        """
        for visitor in self.visitors:
            visitor.send("POST", f"/append/list/{value}")
        refused = []
        for number, visitor in enumerate(self.visitors):
            if number == len(self.visitors) // 8:
                meanwhile()
            if not visitor.changed(value):
                refused.append(visitor)
        return refused

    def reads(self) -> list[Visitor]:
        """Everybody looks at their session; returns those who were refused."""
        for visitor in self.visitors:
            visitor.send("GET", "/")
        refused = []
        for visitor in self.visitors:
            page = visitor.receive()
            if page is None:
                refused.append(visitor)
            else:
                visitor.agrees(page)
        return refused


@contextmanager
def crowd_at(server: Gunicorn, size: int) -> Iterator[Crowd]:
    """So many visitors of a server, logged in one after the other."""
    with ExitStack() as stack:
        visitors = [
            stack.enter_context(closing(Visitor(server.port, f"user{number}")))
            for number in range(size)
        ]
        for visitor in visitors:
            # A busy machine may refuse that, which is not what is looked at here.
            login = partial(visitor.ask, "POST", f"/login/{visitor.user}")
            wait_until(login, PATIENCE, "a login")
            visitor.seconds.clear()
        yield Crowd(visitors)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many other processes that need a processor each."""
    burning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("arguments", "size", "busy"),
    [(GREENLETS, 800, BUSY_PROCESSES), (THREADS, 200, 0)],
    ids=["800 greenlets on a busy machine", "200 threads"],
)
def test_a_crowd_is_served_where_all_is_well(
    arguments: Sequence[str],
    size: int,
    busy: int,
    nodes: list[Memcached],
    tmp_path: Path,
) -> None:
    """All change their sessions at once, then all read them: nobody is refused."""
    with (
        Gunicorn(
            listed(nodes), tmp_path / "crowd.sqlite", *arguments, settings=AS_SHIPPED
        ) as server,
        crowd_at(server, size) as crowd,
        busy_processes(busy),
    ):
        for burst in range(2):
            assert len(crowd.changes(f"change{burst}")) == 0, server.log
            assert len(crowd.reads()) == 0, server.log


@each_server
def test_a_node_that_dies_in_the_middle_costs_nobody_a_change(
    arguments: Sequence[str],
    size: int,
    three_nodes: list[Memcached],
    postgresql: DatabaseServer,
    tmp_path: Path,
) -> None:
    """SQL has to serve all its sessions: who is refused had waited, and comes again."""
    settings = {**AS_SHIPPED, "RESILIENT_SESSION_TABLE": new_table_name()}
    with (
        Gunicorn(
            listed(three_nodes),
            postgresql.uri,
            *arguments,
            folder=tmp_path,
            settings=settings,
        ) as server,
        crowd_at(server, size) as crowd,
    ):
        for value, meanwhile in (("first", three_nodes[0].kill), ("second", str)):
            refused = crowd.changes(value, meanwhile)
            had_waited(refused)
            assert not Crowd(refused).changes(f"{value}-again"), server.log
            refused = crowd.reads()
            had_waited(refused)
            assert not Crowd(refused).reads(), server.log


def had_waited(refused: Sequence[Visitor]) -> None:
    """Nobody was refused before as long was waited for a turn as there is for SQL."""
    timeout = float(AS_SHIPPED["RESILIENT_SESSION_SQL_TIMEOUT"])
    assert all(min(visitor.seconds) >= timeout for visitor in refused)
