"""Which tests need servers, and which of them share a process where there are several.

``make check`` runs the tests that need none, and are quick: those without the markers
``servers`` and ``long``. A test has the first by its fixtures, or says so itself where
it starts servers of its own; any other test that starts one fails.

``make test`` spreads all tests over some processes, and each process has servers of its
own. A group stays in one process: one for each kind of database server, which are slow
to make, and one for tests that work hard, so that no two of them do so at a time. What
counts how many of a crowd were served in time runs alone: while it does, the other
processes wait before their next test.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

import servers

#: The markers, as pytest lists them.
SERVERS: Final = "servers: needs memcached, PostgreSQL or MariaDB"
LONG: Final = "long: takes long without any server"
HEAVY: Final = "heavy: works hard; one of these at a time"
ALONE: Final = "alone: while it runs no other test does"

_MARKER: Final = SERVERS.partition(":")[0]
_HEAVY: Final = HEAVY.partition(":")[0]
_ALONE: Final = ALONE.partition(":")[0]
#: What the processes lock: any two files that all of them have.
_RUNNING, _WAITING = Path(__file__), Path(__file__).with_name("selection.py")
#: What starts servers, itself or by name; a fixture that uses one counts, too.
_FIXTURES: Final = {"memcached_pool", "database", "lab_database", "table"}
_DATABASES: Final = ("postgresql", "mariadb")


def mark_by_servers(items: Sequence[pytest.Item]) -> None:
    """Give each test its markers."""
    for item in items:
        database = _database(item)
        if database or not _FIXTURES.isdisjoint(_fixtures(item)):
            item.add_marker(_MARKER)
        hard = item.get_closest_marker(_HEAVY) or item.get_closest_marker(_ALONE)
        group = _HEAVY if hard else database
        # A test may have named another group itself.
        if group and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(group))


def permit_servers(item: pytest.Item) -> None:
    """From now on servers may be started if this test says that it does so."""
    servers.permitted = item.get_closest_marker(_MARKER) is not None


@contextmanager
def among_others(item: pytest.Item) -> Iterator[None]:
    """Wait for a test that runs alone, or for all others where this is one."""
    alone = item.get_closest_marker(_ALONE) is not None
    with _RUNNING.open() as running:
        # Who waits to run alone holds this one, so that nobody else starts before.
        with _WAITING.open() as waiting:
            fcntl.flock(waiting, fcntl.LOCK_EX)
            fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def _database(item: pytest.Item) -> str | None:
    """The database server that a test needs, the first of them."""
    callspec = getattr(item, "callspec", None)
    values = [] if callspec is None else callspec.params.values()
    named = {value for value in values if isinstance(value, str)}
    named.update(_fixtures(item))
    return next((name for name in _DATABASES if name in named), None)


def _fixtures(item: pytest.Item) -> Sequence[str]:
    names: Sequence[str] = getattr(item, "fixturenames", ())
    return names
