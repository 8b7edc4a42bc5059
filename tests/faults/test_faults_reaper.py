"""The reaper among nodes that do not answer and requests that go on."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from apps import command_runner
from lab import (
    DEAD,
    FIRST,
    HASTY,
    LIFETIME,
    OTHER,
    PATIENCE,
    SECOND,
    STRANGER,
    Lab,
    N,
    User,
    each_home,
    new_lab,
)
from lab_databases import LabDatabase
from servers import Memcached

#: Which home it is, or how it is lost, makes no difference to a database.
pytestmark = pytest.mark.each_value

MEMBER = {"_user_id": "7", "x": 1}

#: Seconds after a session's last sync until the reaper looks at its row.
DUE = LIFETIME + 2 * N + 60 + 1

#: Seconds after a session ended until its tombstone may go: the same and a day.
TOMBSTONE_DUE = DUE + 24 * 3600


@pytest.fixture
def lab(nodes: list[Memcached], lab_database: LabDatabase) -> Iterator[Lab]:
    """Two nodes, and a worker that does not wait long for either."""
    with new_lab(nodes, lab_database, **HASTY) as lab:
        yield lab


def _used_without_sql(lab: Lab) -> User:
    """A user whose last use, half a lifetime after the last sync, SQL missed."""
    user = lab.member(x=0)
    lab.pass_time(LIFETIME / 2)
    lab.sql_gone()
    assert user.changes(x=1).status == 200
    lab.sql_back()
    lab.settle()
    lab.pass_time(DUE - LIFETIME / 2)
    return user


# --- nodes that do not answer ----------------------------------------------------


@pytest.mark.parametrize("verb", ["kill", "freeze"])
@each_home
def test_keeps_what_it_cannot_check(lab: Lab, home: str, verb: str) -> None:
    """An expired row stays while one of its homes is away, and goes afterwards."""
    user = lab.member(x=1)
    lab.pass_time(DUE)
    getattr(lab, verb)(user, home)
    for _ in range(2):
        report = lab.worker.reap()
        assert (report.examined, report.reaped, report.unchecked) == (1, 0, 1)
    assert lab.row(user) == MEMBER
    lab.restart(user, home)
    lab.settle()
    report = lab.worker.reap()
    assert (report.examined, report.reaped, report.unchecked) == (1, 1, 0)
    assert lab.row(user) is None
    assert user.sees() == {}


def test_keeps_while_both_are_away(lab: Lab) -> None:
    """With no home to ask, nothing is deleted and one failure does not end the pass."""
    users = [lab.member(x=number) for number in range(5)]
    lab.pass_time(DUE)
    lab.freeze(users[0], FIRST)
    lab.kill(users[0], SECOND)
    report = lab.worker.reap(batch_size=2)
    assert (report.examined, report.reaped, report.unchecked) == (5, 0, 5)
    assert report.seconds < 5 + 5
    lab.restart(users[0], FIRST)
    lab.restart(users[0], SECOND)
    lab.settle()
    assert lab.worker.reap(batch_size=2).reaped == 5


@each_home
def test_renews_from_the_home_that_knows(lab: Lab, home: str) -> None:
    """A session that SQL takes for expired is renewed from either home's copy."""
    user = _used_without_sql(lab)
    lab.restart(user, OTHER[home])
    lab.settle()
    assert lab.row(user) == {"_user_id": "7", "x": 0}
    report = lab.worker.reap()
    assert (report.renewed, report.reaped, report.unchecked) == (1, 0, 0)
    assert lab.row(user) == MEMBER
    assert user.sees() == MEMBER
    assert lab.copies(user) == [MEMBER, MEMBER]


@each_home
def test_neither_reaps_nor_renews_while_a_home_is_away(lab: Lab, home: str) -> None:
    """A living session whose row expired is kept until both homes can be asked."""
    user = _used_without_sql(lab)
    lab.kill(user, home)
    assert lab.worker.reap().unchecked == 1
    assert lab.row(user) == {"_user_id": "7", "x": 0}
    assert user.sees() == MEMBER
    lab.restart(user, home)
    lab.settle()
    assert user.sees() == MEMBER
    report = lab.worker.reap()
    assert (report.reaped, report.unchecked) == (0, 0)
    assert user.sees() == MEMBER


def test_a_home_that_it_cannot_reach_alone(lab: Lab) -> None:
    """A reaper that is cut off from a node that others reach deletes nothing."""
    user = _used_without_sql(lab)
    worker, wires = lab.wired_worker()
    wires[lab.name(user, FIRST)].refuse()
    wires[lab.name(user, SECOND)].hold()
    report = worker.reap()
    assert (report.reaped, report.renewed, report.unchecked) == (0, 0, 1)
    assert user.sees() == MEMBER


def test_a_copy_of_a_newer_version(lab: Lab) -> None:
    """A copy that this version cannot read is no leave to delete."""
    user = lab.member(x=1)
    data = lab.raw(user, FIRST) or b""
    lab.put(user, FIRST, b"frs\x63" + data[4:])
    lab.pass_time(DUE)
    assert lab.worker.reap().unchecked == 1
    assert lab.row(user) == MEMBER


def test_command_says_that_rows_were_kept(lab: Lab) -> None:
    """The command ends with 3 while a node is away, and with 0 when all is done."""
    user = lab.member(x=1)
    lab.pass_time(DUE)
    lab.kill(user, FIRST)
    runner = command_runner(lab.worker.app)
    result = runner.invoke(args=["reap-sessions", "--json"])
    assert result.exit_code == 3
    assert json.loads(result.stdout)["unchecked"] == 1
    lab.restart(user, FIRST)
    lab.settle()
    result = runner.invoke(args=["reap-sessions", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["reaped"] == 1


def test_sql_lost_on_the_way(lab: Lab) -> None:
    """A pass that loses SQL says so; the next one does the rest."""
    users = [lab.member(x=number) for number in range(6)]
    lab.pass_time(DUE)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:
            lab.sql_gone()
        return False

    first = lab.worker.reap(should_stop=stop, batch_size=2)
    assert first.failed is not None
    lab.sql_back()
    lab.settle()
    second = lab.worker.reap()
    assert second.failed is None
    assert first.reaped + second.reaped == 6
    assert [lab.row(user) for user in users] == [None] * 6


# --- ended sessions --------------------------------------------------------------


@each_home
def test_tombstone_on_nodes_only(lab: Lab, home: str) -> None:
    """A logout that SQL never heard of is passed on, not reaped away."""
    user = lab.member(x=1)
    late = user.twin()
    lab.sql_gone()
    assert user.logs_out().status == 200
    lab.sql_back()
    lab.settle()
    lab.restart(late, home)
    lab.settle()
    lab.pass_time(DUE)
    report = lab.worker.reap()
    assert (report.renewed, report.unchecked) == (0, 0)
    assert lab.row(late) in (DEAD, None)
    lab.restart(late, OTHER[home])
    assert late.sees() == {}


@each_home
def test_old_copy_of_an_ended_session(lab: Lab, home: str) -> None:
    """An old copy on a node keeps the tombstone's row, and revives nothing."""
    user = lab.member(x=1)
    copy = lab.raw(user, home) or b""
    late = user.twin()
    assert user.logs_out().status == 200
    lab.restart(late, OTHER[home])
    lab.put(late, home, copy)
    lab.settle()
    lab.pass_time(LIFETIME - 60)
    assert lab.worker.reap().renewed == 0
    assert lab.row(late) == DEAD
    assert late.sees() == {}


def test_tombstone_goes_in_the_end(lab: Lab) -> None:
    """A tombstone's row is deleted when no copy can be alive any more, not before."""
    user = lab.member(x=1)
    late = user.twin()
    assert user.logs_out().status == 200
    lab.pass_time(DUE)
    assert lab.worker.reap().examined == 0
    assert lab.row(late) == DEAD
    lab.pass_time(TOMBSTONE_DUE - DUE)
    assert lab.worker.reap().reaped == 1
    assert late.sees() == {}


def _between_asking_and_doing(lab: Lab, act: Callable[[], Any]) -> None:
    """Do something once, after the reaper asked the homes and before it acts."""
    store = lab.worker.state.store
    read_copies = store.read_copies
    done = False

    def peek_then_act(*args: Any) -> Any:
        nonlocal done
        replies = read_copies(*args)
        if not done:
            done = True
            act()
        return replies

    store.read_copies = peek_then_act


@pytest.mark.parametrize("forgetful", [False, True], ids=["homes know", "homes forget"])
def test_logout_while_it_renews(lab: Lab, forgetful: bool) -> None:
    """A logout that comes between the reaper's question and its write is final."""
    user = _used_without_sql(lab)
    late = user.twin()

    def act() -> None:
        assert user.logs_out().status == 200
        if forgetful:
            lab.restart(late, FIRST)
            lab.restart(late, SECOND)

    _between_asking_and_doing(lab, act)
    report = lab.worker.reap()
    assert (report.renewed, report.reaped) == (0, 0)
    assert lab.row(late) == DEAD
    assert late.sees() == {}
    assert [*lab.copies(late), lab.row(late)] == [DEAD] * 3


def test_change_while_it_renews(lab: Lab) -> None:
    """A change that syncs between the question and the write is not undone."""
    user = _used_without_sql(lab)
    _between_asking_and_doing(lab, lambda: user.changes(x=2))
    assert lab.worker.reap().renewed == 0
    assert lab.row(user) == MEMBER | {"x": 2}
    assert user.sees() == MEMBER | {"x": 2}


def test_unsynced_change_while_it_renews(lab: Lab) -> None:
    """A change in memory only, between the question and the write, is not undone."""
    user = _used_without_sql(lab)

    def act() -> None:
        lab.sql_gone()
        assert user.changes(x=2).status == 200
        lab.sql_back()

    _between_asking_and_doing(lab, act)
    assert lab.worker.reap().renewed == 1
    assert lab.row(user) == MEMBER
    assert user.sees() == MEMBER | {"x": 2}
    lab.pass_time(N)
    assert user.changes(y=1).status == 200
    assert lab.row(user) == MEMBER | {"x": 2, "y": 1}


# --- at the same time ------------------------------------------------------------


def test_with_requests_at_the_same_time(
    nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """Reaping without a pause disturbs no living session and removes the dead ones."""
    with new_lab(nodes, lab_database) as lab:
        _reap_and_use(lab)


def _reap_and_use(lab: Lab) -> None:
    dead = [lab.member(x=number) for number in range(30)]
    lab.pass_time(LIFETIME / 2)
    living = [lab.member() for _ in range(4)]
    lab.pass_time(DUE - LIFETIME / 2)
    over = threading.Event()

    def reap(worker: Any) -> int:
        reaped = 0
        while True:
            last = over.is_set()
            report = worker.reap(batch_size=7)
            assert report.failed is None
            reaped += report.reaped
            if last:
                return reaped

    def use(user: User) -> None:
        for number in range(1, 31):
            answer = user.counts()
            assert (answer.status, answer.data) == (200, number)
            # Every second request has a sync to make.
            lab.pass_time(N / 2)

    reapers = [lab.start(lambda w=w: reap(w)) for w in (lab.worker, lab.new_worker())]
    uses = [lab.start(lambda u=u: use(u)) for u in living]
    for use_ in uses:
        use_.result(4 * PATIENCE)
    over.set()
    assert sum(reaper.result(4 * PATIENCE) for reaper in reapers) == len(dead)
    for user in living:
        assert user.sees() == {"_user_id": "7", "count": 30}
    assert [lab.row(user) for user in dead] == [None] * len(dead)
    assert [user.sees() for user in dead] == [{}] * len(dead)


# --- the ring --------------------------------------------------------------------


def test_row_that_names_a_removed_node(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """A row whose home is no longer configured stays until that home is forgotten."""
    with new_lab(three_nodes, lab_database) as lab:
        user = _used_without_sql(lab)
        gone = lab.name(user, SECOND)
        addresses = {
            name: server.address for name, server in lab.servers.items() if name != gone
        }
        worker = lab.new_worker(addresses)
        # Only the removed node has what the session's owner did last.
        lab.restart(user, FIRST)
        assert worker.reap().unchecked == 1
        assert lab.row(user) == {"_user_id": "7", "x": 0}
        assert lab.copy(user, STRANGER) is None
        assert lab.worker.reap().renewed == 1
        assert lab.row(user) == MEMBER
        lab.pass_time(2 * LIFETIME)
        assert worker.reap().unchecked == 1
        assert worker.reap(forgotten=frozenset({gone})).reaped == 1
        assert lab.row(user) is None


def test_host_without_the_rows_nodes(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """A reaper that knows none of the rows' nodes refuses, and deletes nothing."""
    with new_lab(three_nodes[:2], lab_database) as lab:
        user = lab.member(x=1)
        lab.pass_time(DUE)
        worker = lab.new_worker({"elsewhere": three_nodes[2].address})
        report = worker.reap()
        assert report.aborted is not None
        assert report.reaped == 0
        assert lab.row(user) == MEMBER
