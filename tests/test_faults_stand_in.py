"""A home is down and another node stands in: less SQL, and nothing else to notice."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab import (
    DEAD,
    HASTY,
    MOVED,
    OTHER,
    PATIENCE,
    STRANGER,
    Lab,
    N,
    User,
    Worker,
    each_home,
    new_lab,
)
from lab_databases import LabDatabase
from servers import Memcached

MEMBER = {"_user_id": "7", "x": 0}
CHANGED = {"_user_id": "7", "x": 1}


@pytest.fixture
def lab(three_nodes: list[Memcached], lab_database: LabDatabase) -> Iterator[Lab]:
    """Three nodes, one worker."""
    with new_lab(three_nodes, lab_database) as lab:
        yield lab


def asked(worker: Worker, does: Callable[[], Any]) -> int:
    """How often SQL had to settle what the nodes could not."""
    before = worker.stats["loaded_from_sql"]
    does()
    return worker.stats["loaded_from_sql"] - before


def stood_in_for(lab: Lab, home: str) -> User:
    """A user whose stand-in has taken over from this home, which is dead."""
    user = lab.member(x=0)
    lab.kill(user, home)
    assert user.sees() == MEMBER  # the worker learns of it
    assert user.sees() == MEMBER
    assert lab.copy(user, STRANGER) == MEMBER
    return user


def cut_worker(lab: Lab, user: User, home: str) -> User:
    """The user at a worker that is refused by this home, and knows it."""
    worker, wires = lab.wired_worker()
    wires[lab.name(user, home)].refuse()
    there = user.at(worker)
    for _ in range(3):
        assert there.sees() == MEMBER
    assert asked(worker, there.sees) == 0
    return there


# --- what it saves ---------------------------------------------------------------


@each_home
def test_the_stand_in_saves_the_reads(lab: Lab, home: str) -> None:
    """From the third page on nobody asks SQL, and what is changed is in SQL at once."""
    user = stood_in_for(lab, home)
    for _ in range(5):
        assert asked(lab.worker, lambda: user.sees()) == 0
    assert asked(lab.worker, lambda: user.changes(x=1)) == 0
    assert lab.row(user) == CHANGED
    assert lab.copy(user, OTHER[home]) == lab.copy(user, STRANGER) == CHANGED
    assert asked(lab.worker, lambda: user.sees()) == 0
    assert user.sees() == CHANGED


@each_home
def test_round_trips(lab: Lab, home: str) -> None:
    """The stand-in is asked and told together with the home that is left."""
    user = stood_in_for(lab, home)
    for does, most in ((user.sees, 1), (lambda: user.changes(x=1), 2)):
        before = lab.worker.stats["round_trips"]
        does()
        assert lab.worker.stats["round_trips"] - before == most


@each_home
def test_a_sync_keeps_it_going(lab: Lab, home: str) -> None:
    """A session in use is synced every N, and SQL is still not asked."""
    user = stood_in_for(lab, home)
    for _ in range(6):
        lab.pass_time(N)
        assert asked(lab.worker, lambda: user.sees()) == 0
    version = lab.raw_row(user)
    assert version is not None
    assert version["version"] == 7


@each_home
def test_after_a_rest_sql_is_asked(lab: Lab, home: str) -> None:
    """What has not heard of SQL for twice the interval and a minute is not believed."""
    user = stood_in_for(lab, home)
    lab.pass_time(2 * N + 60)
    assert asked(lab.worker, lambda: user.sees()) == 1
    assert asked(lab.worker, lambda: user.sees()) == 0


@each_home
def test_its_copy_does_not_stay(lab: Lab, home: str) -> None:
    """memcached forgets it as soon as nobody would believe it any more."""
    user = stood_in_for(lab, home)
    server = lab.node(user, STRANGER)
    with socket.create_connection((server.host, server.port), PATIENCE) as connection:
        connection.sendall(f"mg {lab.item(user)} t\r\n".encode())
        answer = connection.recv(100).decode().split()
    assert answer[0] == "HD"
    assert 0 < int(answer[1].removeprefix("t")) <= 2 * N + 60


@each_home
def test_switched_off(
    three_nodes: list[Memcached], lab_database: LabDatabase, home: str
) -> None:
    """Without it SQL is asked at every page, and the stranger holds nothing."""
    with new_lab(three_nodes, lab_database, RESILIENT_SESSION_STAND_IN=False) as lab:
        user = lab.member(x=0)
        lab.kill(user, home)
        for _ in range(4):
            assert asked(lab.worker, lambda: user.sees()) == 1
        assert lab.copy(user, STRANGER) is None


@each_home
def test_a_worker_without_tells_the_others(
    three_nodes: list[Memcached], lab_database: LabDatabase, home: str
) -> None:
    """Workers that differ while it is switched off, or on, miss nothing."""
    with new_lab(three_nodes, lab_database, **HASTY) as lab:
        user = lab.member(x=0)
        lab.freeze(user, home)
        for _ in range(5):
            assert user.sees() == MEMBER
        assert lab.copy(user, STRANGER) == MEMBER
        without = user.at(lab.new_worker(RESILIENT_SESSION_STAND_IN=False))
        assert without.changes(x=1).status == 200
        assert lab.copy(user, STRANGER) == CHANGED
        assert user.sees() == CHANGED
        late = user.twin()
        assert without.logs_out().status == 200
        assert lab.copy(late, STRANGER) == DEAD
        lab.node(late, home).thaw()
        lab.kill(late, OTHER[home])
        assert late.sees() == {}


@each_home
def test_a_hung_home_is_stood_in_for(
    three_nodes: list[Memcached], lab_database: LabDatabase, home: str
) -> None:
    """As soon as it is skipped; nobody waits for it any more."""
    long = {
        "RESILIENT_SESSION_NODE_RETRY": 60.0,
        "RESILIENT_SESSION_NODE_RETRY_MAX": 60.0,
    }
    with new_lab(three_nodes, lab_database, **HASTY, **long) as lab:
        user = lab.member(x=0)
        lab.freeze(user, home)
        for _ in range(4):
            assert user.sees() == MEMBER
        assert asked(lab.worker, lambda: user.sees()) == 0


# --- what it must not do ---------------------------------------------------------


@each_home
def test_the_home_comes_back_with_what_it_held(
    three_nodes: list[Memcached], lab_database: LabDatabase, home: str
) -> None:
    """A node that was frozen meanwhile is out of date, and is brought up to date."""
    with new_lab(three_nodes, lab_database, **HASTY) as lab:
        user = lab.member(x=0)
        lab.freeze(user, home)
        for _ in range(4):
            user.sees()
        assert user.changes(x=1).status == 200
        lab.node(user, home).thaw()
        lab.settle()
        assert user.sees() == CHANGED
        assert lab.copies(user) == [CHANGED, CHANGED]
        assert asked(lab.worker, lambda: user.sees()) == 0


@each_home
def test_an_old_stand_in_misleads_nobody(lab: Lab, home: str) -> None:
    """The other home fails next: the copy from the first outage is out of date."""
    user = stood_in_for(lab, home)
    lab.restart(user, home)
    lab.settle()
    assert user.changes(x=1).status == 200
    assert lab.copies(user) == [CHANGED, CHANGED]
    assert lab.copy(user, STRANGER) == MEMBER
    lab.kill(user, OTHER[home])
    assert user.sees() == CHANGED
    assert user.sees() == CHANGED
    assert lab.copy(user, STRANGER) == CHANGED


@each_home
@pytest.mark.parametrize(
    ("end", "remains"), [("logs_out", DEAD), ("regenerates", MOVED)]
)
def test_an_end_is_told_to_an_old_stand_in(
    lab: Lab, home: str, end: str, remains: str
) -> None:
    """Both homes are well again and were told, and the stand-in was, too."""
    user = stood_in_for(lab, home)
    lab.restart(user, home)
    lab.settle()
    assert user.sees() == MEMBER
    late = user.twin()
    assert getattr(user, end)().status == 200
    assert lab.copies(late) == [remains, remains]
    assert lab.copy(late, STRANGER) == remains


@each_home
@pytest.mark.parametrize("fault", ["kill", "restart", "evict", "freeze"])
def test_the_stand_in_fails_as_well(
    three_nodes: list[Memcached], lab_database: LabDatabase, home: str, fault: str
) -> None:
    """Then SQL is asked as it is without one."""
    with new_lab(three_nodes, lab_database, **HASTY) as lab:
        user = stood_in_for(lab, home)
        user.changes(x=1)
        getattr(lab, fault)(user, STRANGER)
        for _ in range(2):
            assert user.sees() == CHANGED
        assert user.changes(x=0).status == 200
        assert user.sees() == MEMBER
        assert lab.row(user) == MEMBER


@each_home
def test_with_sql_gone_too(lab: Lab, home: str) -> None:
    """The session is served as before; a change cannot be kept."""
    user = stood_in_for(lab, home)
    lab.sql_gone()
    assert user.sees() == MEMBER
    answer = user.changes(x=1)
    assert (answer.status, answer.set_cookie) == (503, None)
    lab.sql_back()
    lab.restart(user, home)
    lab.settle()
    assert user.sees() == MEMBER
    assert user.changes(x=1).status == 200
    assert user.sees() == CHANGED


@each_home
def test_the_node_is_taken_out_for_good(lab: Lab, home: str) -> None:
    """The stand-in becomes a home: its copy is not believed as one of those."""
    user = stood_in_for(lab, home)
    left = {
        name: server.address
        for name, server in lab.servers.items()
        if name != lab.name(user, home)
    }
    after = user.at(lab.new_worker(left))
    assert asked(after.worker, lambda: after.sees()) == 1
    assert asked(after.worker, lambda: after.sees()) == 0
    assert after.changes(x=1).status == 200
    assert lab.copy(user, OTHER[home]) == lab.copy(user, STRANGER) == CHANGED


# --- workers that see different nodes --------------------------------------------


@each_home
def test_a_change_elsewhere_is_seen(lab: Lab, home: str) -> None:
    """One worker is cut off from a home; what others write there is not missed."""
    user = lab.member(x=0)
    there = cut_worker(lab, user, home)
    assert user.changes(x=1).status == 200
    assert there.sees() == CHANGED
    assert there.changes(x=0).status == 200
    assert user.sees() == MEMBER
    assert asked(there.worker, lambda: there.sees()) == 0


@each_home
@pytest.mark.parametrize("end", ["logs_out", "regenerates"])
def test_an_end_elsewhere_is_final(lab: Lab, home: str, end: str) -> None:
    """And so it is where both homes were told, and the stand-in still holds a copy."""
    user = lab.member(x=0)
    there = cut_worker(lab, user, home)
    assert getattr(user, end)().status == 200
    assert there.sees() == {}


@each_home
@pytest.mark.parametrize(
    ("end", "remains"), [("logs_out", DEAD), ("regenerates", MOVED)]
)
def test_an_end_by_a_worker_cut_off_from_the_other_home(
    lab: Lab, home: str, end: str, remains: str
) -> None:
    """Each of two workers misses another home: the stand-in is where they meet."""
    user = lab.member(x=0)
    there = cut_worker(lab, user, home)
    ending = cut_worker(lab, user, OTHER[home])
    late = user.twin()
    assert getattr(ending, end)().status == 200
    assert lab.copy(late, home) == remains
    assert lab.copy(late, OTHER[home]) == MEMBER
    assert lab.copy(late, STRANGER) == remains
    assert there.sees() == {}


@each_home
def test_a_change_by_a_worker_cut_off_from_the_other_home(lab: Lab, home: str) -> None:
    """It is on one home, the stand-in and in SQL, and the other worker sees it."""
    user = lab.member(x=0)
    there = cut_worker(lab, user, home)
    changing = cut_worker(lab, user, OTHER[home])
    assert changing.changes(x=1).status == 200
    assert there.sees() == CHANGED


@each_home
def test_a_cut_that_is_not_known_yet(lab: Lab, home: str) -> None:
    """The first request that meets it tells the stand-in as well."""
    user = lab.member(x=0)
    there = cut_worker(lab, user, home)
    worker, wires = lab.wired_worker(RESILIENT_SESSION_NODE_TIMEOUT=0.2)
    changing = user.at(worker)
    changing.sees()
    wire = wires[lab.name(user, OTHER[home])]

    def action(session: Any) -> None:
        session["x"] = 1
        wire.refuse()

    assert changing.does(action).status == 200
    assert lab.copy(user, OTHER[home]) == MEMBER
    assert lab.copy(user, STRANGER) == CHANGED
    assert there.sees() == CHANGED
