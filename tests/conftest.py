"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from servers import Memcached, MemcachedPool, ServerMissing, find_program


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
