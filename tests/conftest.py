"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from apps import Sites, TimeMachine
from builders import close_nodes
from database_servers import DatabaseServer, MariaDB, PostgreSQL, only_session
from grouping import (
    ALONE,
    HEAVY,
    LONG,
    SERVERS,
    among_others,
    mark_by_servers,
    permit_servers,
)
from lab_databases import NAMES, LabDatabase, lent_database
from selection import EACH_VALUE, without_needless_combinations
from servers import Memcached, MemcachedPool, ServerMissing, find_program


def pytest_configure(config: pytest.Config) -> None:
    """Make our own markers known."""
    for marker in (EACH_VALUE, SERVERS, LONG, HEAVY, ALONE):
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out what would take long and say nothing new; mark what needs servers."""
    needed = without_needless_combinations(items)
    left_out = set(items).difference(needed)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = needed
    mark_by_servers(items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Keep a test alone that has to be, before its time begins to count."""
    with among_others(item):
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that needs no server starts none."""
    permit_servers(item)


@pytest.fixture(scope="session")
def memcached_pool() -> Iterator[MemcachedPool]:
    """Real servers for all tests; without memcached they fail, never skip."""
    try:
        find_program("memcached")
    except ServerMissing as exc:
        pytest.fail(str(exc), pytrace=False)
    pool = MemcachedPool()
    yield pool
    pool.close()


@pytest.fixture
def memcached(memcached_pool: MemcachedPool) -> Iterator[Memcached]:
    """One memcached, running and empty."""
    with memcached_pool.lend(1) as (server,):
        yield server


@pytest.fixture
def nodes(memcached_pool: MemcachedPool) -> Iterator[list[Memcached]]:
    """Two memcached, running and empty."""
    with memcached_pool.lend(2) as servers:
        yield servers


@pytest.fixture
def three_nodes(memcached_pool: MemcachedPool) -> Iterator[list[Memcached]]:
    """Three memcached, running and empty."""
    with memcached_pool.lend(3) as servers:
        yield servers


@pytest.fixture
def sites(nodes: list[Memcached], tmp_path: Path) -> Iterator[Sites]:
    """Makes applications on two nodes, and closes them."""
    with Sites(nodes, tmp_path) as made:
        yield made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> TimeMachine:
    """Time that a test moves."""
    return TimeMachine(monkeypatch)


@pytest.fixture(scope="session")
def one_postgresql() -> Iterator[DatabaseServer]:
    """A real PostgreSQL for all tests."""
    yield from only_session(PostgreSQL)


@pytest.fixture(scope="session")
def one_mariadb() -> Iterator[DatabaseServer]:
    """A real MariaDB for all tests."""
    yield from only_session(MariaDB)


@pytest.fixture
def postgresql(one_postgresql: DatabaseServer) -> Iterator[DatabaseServer]:
    """A PostgreSQL that answers, whatever the last test did to it."""
    one_postgresql.heal()
    yield one_postgresql
    one_postgresql.thaw()


@pytest.fixture
def mariadb(one_mariadb: DatabaseServer) -> Iterator[DatabaseServer]:
    """A MariaDB that answers, whatever the last test did to it."""
    one_mariadb.heal()
    yield one_mariadb
    one_mariadb.thaw()


@pytest.fixture(params=["postgresql", "mariadb"])
def database(request: pytest.FixtureRequest) -> DatabaseServer:
    """Each database server in turn."""
    server: DatabaseServer = request.getfixturevalue(request.param)
    return server


@pytest.fixture(params=NAMES)
def lab_database(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[LabDatabase]:
    """Each database in turn, for a lab: a file of SQLite, and a table on servers."""
    yield from lent_database(request, request.param, tmp_path)


@pytest.fixture
def nodes_are_closed() -> Iterator[None]:
    """What a test's nodes have open is closed with it."""
    yield
    close_nodes()
