"""No ratio of the two timeouts refuses a request that SQL, or a node, could serve."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from lab import FIRST, SECOND, Lab, User, Worker, new_lab
from misbehaving import black_hole, run_together
from servers import MemcachedPool

pytestmark = pytest.mark.heavy

#: Seconds: the corners of what anybody would set, and the values by default.
TIMEOUTS: Final = [(0.05, 0.1), (0.05, 2.0), (2.0, 0.1), (2.0, 2.0), (0.25, 0.5)]

#: Who is skipped stays so: what is looked at is whom a process blames.
UNFORGIVING: Final = {
    "RESILIENT_SESSION_NODE_RETRY": 600,
    "RESILIENT_SESSION_NODE_RETRY_MAX": 600,
}


Check: TypeAlias = Callable[[], None]


def hurried(lab: Lab, timeouts: tuple[float, float], **addresses: str) -> Worker:
    """A worker with these timeouts, which finds some nodes at other addresses."""
    node_timeout, sql_timeout = timeouts
    usual = {name: server.address for name, server in lab.servers.items()}
    return lab.new_worker(
        usual | addresses,
        RESILIENT_SESSION_NODE_TIMEOUT=node_timeout,
        RESILIENT_SESSION_SQL_TIMEOUT=sql_timeout,
        **UNFORGIVING,
    )


def is_served(user: User, *hung: str) -> None:
    """Each request gets the session, and who hung is the one that is blamed."""
    worker = user.worker
    for count in range(1, 4):
        answer = user.counts()
        assert (answer.status, answer.data) == (200, count)
        assert user.sees() == {"_user_id": "7", "x": 1, "count": count}
    state = worker.state
    assert state.store.homes.cluster.suspects() == set(hung)
    assert not state.store.rows._breaker.suspect
    assert worker.stats["sql_faults"] == 0
    assert worker.stats["unavailable"] == 0


def one_frozen(lab: Lab, timeouts: tuple[float, float], _: ExitStack) -> Check:
    """One node takes requests and answers none, on connections old and new."""
    user = lab.member(x=1)
    visitor = user.at(hurried(lab, timeouts))
    assert visitor.sees() == {"_user_id": "7", "x": 1}
    hung = lab.name(user, SECOND)
    lab.servers[hung].freeze()
    return partial(is_served, visitor, hung)


def deaf(
    lab: Lab, timeouts: tuple[float, float], stack: ExitStack, *roles: str
) -> Check:
    """Some nodes do not even answer to a wish to connect."""
    user = lab.member(x=1)
    holes = {
        lab.name(user, role): stack.enter_context(black_hole())[len("inet:") :]
        for role in roles
    }
    return partial(is_served, user.at(hurried(lab, timeouts, **holes)), *holes)


@pytest.mark.parametrize("timeouts", TIMEOUTS)
def test_who_hangs_costs_nobody_a_session(
    timeouts: tuple[float, float], memcached_pool: MemcachedPool, tmp_path: Path
) -> None:
    """One node frozen, one deaf, both deaf: with SQL well each request is served."""
    with ExitStack() as stack:

        def new(name: str) -> Lab:
            (tmp_path / name).mkdir()
            nodes = stack.enter_context(memcached_pool.lend(2))
            return stack.enter_context(new_lab(nodes, tmp_path / name))

        checks = [
            one_frozen(new("frozen"), timeouts, stack),
            deaf(new("deaf"), timeouts, stack, FIRST),
            deaf(new("both"), timeouts, stack, FIRST, SECOND),
        ]
        assert run_together(*checks) == [None] * len(checks)
