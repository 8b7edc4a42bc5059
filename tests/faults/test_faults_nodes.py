"""Nodes that die, hang, forget, refuse and lie: the user notices none of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lab import (
    DEAD,
    FIRST,
    HASTY,
    HASTY_SECONDS,
    LIFETIME,
    OTHER,
    SECOND,
    STRANGER,
    Lab,
    N,
    User,
    each_home,
    fill,
    new_lab,
)
from lab_databases import LabDatabase
from servers import Memcached

#: Which home it is, or how it is lost, makes no difference to a database.
pytestmark = pytest.mark.each_value

MEMBER = {"_user_id": "7", "x": 1}


def test_both_homes_hold_a_session_and_the_stranger_does_not(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """A session lives on its two homes and nowhere else, and SQL has the login."""
    with new_lab(three_nodes, lab_database) as lab:
        user = lab.member(x=1)
        assert user.sees() == MEMBER
        assert lab.copies(user) == [MEMBER, MEMBER]
        assert lab.copy(user, STRANGER) is None
        assert lab.row(user) == MEMBER


# --- killed ----------------------------------------------------------------------


@each_home
def test_killed(lab: Lab, home: str) -> None:
    """With one home killed the session and its unsynced change are still there."""
    user = lab.member(x=0)
    user.changes(x=1)
    lab.kill(user, home)
    assert user.sees() == MEMBER
    assert lab.copy(user, OTHER[home]) == MEMBER


@each_home
def test_change_while_killed_goes_to_sql(lab: Lab, home: str) -> None:
    """What one home cannot take is in SQL when the answer comes."""
    user = lab.member(x=0)
    lab.kill(user, home)
    assert user.changes(x=1).status == 200
    assert lab.copy(user, OTHER[home]) == MEMBER
    assert lab.row(user) == MEMBER
    assert user.sees() == MEMBER


@each_home
def test_one_home_after_the_other(lab: Lab, home: str) -> None:
    """Homes that die in turn, with one read in between, take nothing along."""
    user = lab.member(x=0)
    user.changes(x=1)
    for broken in (home, OTHER[home], home):
        lab.restart(user, broken)
        assert user.sees() == MEMBER
        assert lab.copies(user) == [MEMBER, MEMBER]
    assert lab.row(user) == {"_user_id": "7", "x": 0}, "no sync was due"


@each_home
def test_killed_and_restarted_after_changes(lab: Lab, home: str) -> None:
    """A node that comes back empty gets what it missed with the next request."""
    user = lab.member(x=0)
    lab.kill(user, home)
    assert user.changes(x=1).status == 200
    lab.restart(user, home)
    lab.settle()
    assert user.sees() == MEMBER
    assert lab.copies(user) == [MEMBER, MEMBER]


@pytest.mark.parametrize("new", [True, False], ids=["first request", "later"])
@each_home
def test_visitor_and_login_while_killed(lab: Lab, home: str, new: bool) -> None:
    """Sessions are made and users log in while one home is down."""
    user = lab.member()
    lab.kill(user, home)
    users = [User(lab.worker) for _ in range(4)]
    for user in users:
        if not new:
            assert user.changes(cart="a").status == 200
        assert user.logs_in("8").status == 200
        assert user.sees()["_user_id"] == "8"
        assert lab.row(user)["_user_id"] == "8"


# --- frozen ----------------------------------------------------------------------


@each_home
def test_frozen(nodes: list[Memcached], lab_database: LabDatabase, home: str) -> None:
    """A hung node costs a bounded time, three times, and is skipped from then on."""
    config = HASTY | {
        "RESILIENT_SESSION_NODE_RETRY": 60.0,
        "RESILIENT_SESSION_NODE_RETRY_MAX": 60.0,
    }
    with new_lab(nodes, lab_database, **config) as lab:
        user = lab.member(x=0)
        user.changes(x=1)
        lab.freeze(user, home)
        for _ in range(3):
            answer = user.does(dict)
            assert (answer.status, answer.data) == (200, MEMBER)
            assert answer.seconds < 2 * 0.2 + 1
        faults = lab.worker.stats["node_faults"]
        assert faults <= 3
        for number in range(10):
            assert user.changes(y=number).status == 200
        assert user.sees() == MEMBER | {"y": 9}
        assert lab.worker.stats["node_faults"] == faults
        assert lab.copy(user, OTHER[home]) == MEMBER | {"y": 9}
        assert lab.row(user) == MEMBER | {"y": 9}


@each_home
def test_thawed(hasty: Lab, home: str) -> None:
    """The old copy of a node that hung is never served and is brought up to date."""
    user = hasty.member(x=0)
    hasty.freeze(user, home)
    assert user.changes(x=1).status == 200
    hasty.node(user, home).thaw()
    hasty.settle()
    assert user.sees() == MEMBER
    assert hasty.copies(user) == [MEMBER, MEMBER]


@each_home
def test_frozen_between_read_and_write(hasty: Lab, home: str) -> None:
    """A home that hangs after it was read keeps no change from being stored."""
    user = hasty.member(x=0)

    def action(session: Any) -> None:
        value = session["x"]
        hasty.freeze(user, home)
        session["x"] = value + 1

    answer = user.does(action)
    assert answer.status == 200
    assert answer.seconds < HASTY_SECONDS + 1
    assert hasty.row(user) == MEMBER
    assert hasty.copy(user, OTHER[home]) == MEMBER
    hasty.node(user, home).thaw()
    hasty.settle()
    assert user.sees() == MEMBER
    assert hasty.copies(user) == [MEMBER, MEMBER]


# --- empty -----------------------------------------------------------------------


@each_home
def test_restarted_empty(lab: Lab, home: str) -> None:
    """A home that restarted empty is repaired by the next request, a reading one."""
    user = lab.member(x=0)
    user.changes(x=1)
    lab.restart(user, home)
    assert user.sees() == MEMBER
    assert lab.copies(user) == [MEMBER, MEMBER]
    assert lab.worker.stats["repaired"] == 1
    asked = lab.worker.stats["loaded_from_sql"]
    assert user.sees() == MEMBER
    assert lab.worker.stats["loaded_from_sql"] == asked


@each_home
def test_evicted(lab: Lab, home: str) -> None:
    """A copy that memory pressure took is put back by the next request."""
    user = lab.member(x=0)
    user.changes(x=1)
    lab.evict(user, home)
    assert user.sees() == MEMBER
    assert lab.copies(user) == [MEMBER, MEMBER]


@each_home
def test_evicted_before_a_change(lab: Lab, home: str) -> None:
    """A change from a single copy is in SQL and on both homes."""
    user = lab.member(x=0)
    lab.evict(user, home)
    assert user.changes(x=1).status == 200
    assert lab.copies(user) == [MEMBER, MEMBER]
    assert lab.row(user) == MEMBER


# --- between read and write ------------------------------------------------------


@pytest.mark.parametrize("verb", ["kill", "restart", "evict"])
@each_home
def test_lost_between_read_and_write(lab: Lab, home: str, verb: str) -> None:
    """A home lost in the middle of a request takes no change along."""
    user = lab.member(x=0)

    def action(session: Any) -> None:
        value = session["x"]
        getattr(lab, verb)(user, home)
        session["x"] = value + 1

    assert user.does(action).status == 200
    assert lab.copy(user, OTHER[home]) == MEMBER
    assert lab.row(user) == MEMBER
    if verb != "kill":
        assert lab.copy(user, home) == MEMBER
    assert user.sees() == MEMBER


@each_home
def test_restarted_and_filled_by_another_between_read_and_write(
    lab: Lab, home: str
) -> None:
    """A token of the server's former life never lets a change overwrite another."""
    # A token as it may come again in a server that has not seen much yet.
    lab.count_up_tokens(30)
    user = lab.member(x=0)
    second = user.at(lab.new_worker())
    other = lab.member()

    def action(session: Any) -> None:
        session["x"] += 1
        token = lab.token(user, home)
        lab.restart(user, home)
        assert second.changes(y=2).status == 200
        while lab.token(user, home) < token:
            lab.put(user, home, lab.raw(user, home) or b"")
        assert lab.token(user, home) == token
        # This worker has connections to the new server when it saves.
        for _ in range(3):
            assert other.changes(z=1).status == 200

    assert user.does(action).status == 200
    everything = MEMBER | {"y": 2}
    assert user.sees() == second.sees() == everything
    assert lab.copies(user) == [everything, everything]


@pytest.mark.parametrize("verb", ["kill", "restart"])
def test_both_lost_between_read_and_write(lab: Lab, verb: str) -> None:
    """A change goes to SQL when both homes are lost under it."""
    user = lab.member(x=0)

    def action(session: Any) -> None:
        session["x"] += 1
        getattr(lab, verb)(user, FIRST)
        getattr(lab, verb)(user, SECOND)

    assert user.does(action).status == 200
    assert lab.row(user) == MEMBER
    assert user.sees() == MEMBER


# --- both ------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["kill", "restart"])
def test_both_lost(lab: Lab, verb: str) -> None:
    """Losing all memory costs what came since the last sync, and no login."""
    user = lab.member(x=0)
    user.changes(x=1)
    getattr(lab, verb)(user, FIRST)
    getattr(lab, verb)(user, SECOND)
    assert user.sees() == {"_user_id": "7", "x": 0}
    if verb == "restart":
        assert lab.copies(user) == [{"_user_id": "7", "x": 0}] * 2


@pytest.mark.parametrize("verb", ["kill", "restart"])
@pytest.mark.parametrize("how", ["asked for", "due at a change", "due at a read"])
def test_both_lost_after_a_sync(lab: Lab, verb: str, how: str) -> None:
    """What was synced survives the loss of all memory."""
    user = lab.member(x=0)
    if how == "asked for":

        def action(session: Any) -> None:
            session["x"] = 1
            session.sync()

        assert user.does(action).status == 200
    elif how == "due at a change":
        lab.pass_time(N)
        user.changes(x=1)
    else:
        user.changes(x=1)
        lab.pass_time(N)
        assert user.sees() == MEMBER
    getattr(lab, verb)(user, FIRST)
    getattr(lab, verb)(user, SECOND)
    assert user.sees() == MEMBER
    assert lab.row(user) == MEMBER


def test_changes_while_both_are_down(lab: Lab) -> None:
    """With both homes down every change is in SQL, and both get it afterwards."""
    user = lab.member(x=0)
    lab.kill(user, FIRST)
    lab.kill(user, SECOND)
    assert user.changes(x=1).status == 200
    assert lab.row(user) == MEMBER
    assert user.sees() == MEMBER
    lab.restart(user, FIRST)
    lab.restart(user, SECOND)
    lab.settle()
    assert user.sees() == MEMBER
    assert lab.copies(user) == [MEMBER, MEMBER]


@pytest.mark.parametrize("verb", ["kill", "restart", "evict"])
@each_home
def test_visitor_loses_one_home(lab: Lab, home: str, verb: str) -> None:
    """A session without a row survives one home, and gets its row by that."""
    user = lab.visitor(cart="a")
    assert lab.row(user) is None
    getattr(lab, verb)(user, home)
    assert user.sees() == {"cart": "a"}
    assert lab.row(user) == {"cart": "a"}
    assert lab.copy(user, OTHER[home]) == {"cart": "a"}


@pytest.mark.parametrize("verb", ["kill", "restart"])
def test_visitor_loses_both_homes(lab: Lab, verb: str) -> None:
    """A session that never came back has no row, and is lost with both homes."""
    user = lab.visitor(cart="a")
    getattr(lab, verb)(user, FIRST)
    getattr(lab, verb)(user, SECOND)
    assert user.sees() == {}
    assert user.changes(cart="b").status == 200
    assert user.sees() == {"cart": "b"}


def test_visitor_who_came_back_loses_both_homes(lab: Lab) -> None:
    """The second request gives a session its row, also one that only reads."""
    user = lab.visitor(cart="a")
    assert user.sees() == {"cart": "a"}
    lab.restart(user, FIRST)
    lab.restart(user, SECOND)
    assert user.sees() == {"cart": "a"}


# --- full ------------------------------------------------------------------------


@pytest.fixture
def small(lab_database: LabDatabase) -> Iterator[Lab]:
    """Two nodes that refuse when they are full, one worker."""
    options: dict[str, Any] = {"memory_megabytes": 2, "extra": ["-M"]}
    with (
        Memcached(**options) as one,
        Memcached(**options) as two,
        new_lab([one, two], lab_database) as lab,
    ):
        yield lab


BULK = "z" * 20_000


@each_home
def test_one_home_full(small: Lab, home: str) -> None:
    """What a full node refuses is in SQL, and its old copy is not served."""
    user = small.member(x=0, bulk=BULK)
    fill(small.node(user, home), small.raw(user, home) or b"")
    for number in (1, 2, 3):
        assert user.changes(x=number).status == 200
        assert user.sees()["x"] == number
        assert small.copy(user, OTHER[home])["x"] == number
        assert small.row(user)["x"] == number
    old = small.copy(user, home)
    assert old is None or old["x"] == 0, "the node was not full"


def test_both_homes_full(small: Lab) -> None:
    """Two full nodes that hold the same old copy are not believed; one gives it up."""
    user = small.member(x=0, bulk=BULK)
    for home in (FIRST, SECOND):
        fill(small.node(user, home), small.raw(user, home) or b"")
    assert user.changes(x=0.5).status == 200
    assert small.copies(user).count(None) == 1
    for number in (1, 2, 3):
        assert user.changes(x=number).status == 200
        assert small.row(user)["x"] == number
        assert user.sees()["x"] == number


def test_logout_from_full_homes(small: Lab) -> None:
    """A full node cannot keep a session from ending."""
    user = small.member(x=0, bulk=BULK)
    for home in (FIRST, SECOND):
        fill(small.node(user, home), small.raw(user, home) or b"")
    late = user.twin()
    assert user.logs_out().status == 200
    assert late.sees() == {}
    assert small.row(late) == DEAD
    assert small.copies(late).count(None) + small.copies(late).count(DEAD) == 2


# --- wrong bytes -----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["garbage", "empty", "cut short", "swapped", "foreign", "old"]
)
@each_home
def test_wrong_bytes(lab: Lab, home: str, kind: str) -> None:
    """Bytes that are not this session's latest are replaced by those that are."""
    user = lab.member(x=0)
    old = lab.raw(user, home)
    other = lab.member(x="of somebody else")
    stranger = lab.new_worker(connected=False, RESILIENT_SESSION_TABLE="another_table")
    user.changes(x=1)
    wrong = {
        "garbage": bytes(range(256)),
        "empty": b"",
        "cut short": (lab.raw(user, home) or b"")[:-1],
        "swapped": lab.raw(other, home),
        "foreign": _sealed_by(stranger, user, lab),
        "old": old,
    }[kind]
    assert wrong is not None
    lab.put(user, home, wrong)
    assert user.sees() == MEMBER
    assert lab.copies(user) == [MEMBER, MEMBER]
    lab.put(user, home, wrong)
    assert user.changes(y=2).status == 200
    everything = MEMBER | {"y": 2}
    assert user.sees() == everything
    assert lab.copies(user) == [everything, everything]
    assert lab.row(user) == everything


def _sealed_by(worker: Any, user: User, lab: Lab) -> bytes:
    """The user's own record as an application with another table seals it."""
    keyring = worker.state.keys.of(worker.app).keyring
    data: bytes = keyring.seal(user.session_key, lab.record(user, FIRST))
    return data


@pytest.mark.parametrize("kind", ["garbage", "swapped", "old"])
def test_wrong_bytes_on_both_homes(lab: Lab, kind: str) -> None:
    """Where both homes lie SQL is believed; an old copy is at most N old."""
    user = lab.member(x=0)
    other = lab.member(x="of somebody else")
    old = {home: lab.raw(user, home) for home in (FIRST, SECOND)}
    lab.pass_time(N)
    assert user.changes(x=1).status == 200
    for home in (FIRST, SECOND):
        wrong = {
            "garbage": b"garbage",
            "swapped": lab.raw(other, home),
            # The other home's is from before a further change.
            "old": old[home] if home == FIRST else b"garbage",
        }[kind]
        lab.put(user, home, wrong or b"")
    assert user.sees() == MEMBER
    assert lab.copies(user) == [MEMBER, MEMBER]


@each_home
def test_unknown_format_is_neither_used_nor_overwritten(lab: Lab, home: str) -> None:
    """A record of a newer version counts as out of reach and stays."""
    user = lab.member(x=0)
    newer = b"frs\x63" + (lab.raw(user, home) or b"")[4:]
    lab.put(user, home, newer)
    assert user.changes(x=1).status == 200
    assert user.sees() == MEMBER
    assert lab.raw(user, home) == newer
    assert lab.row(user) == MEMBER


@each_home
def test_another_server_at_the_address(
    nodes: list[Memcached], lab_database: LabDatabase, home: str
) -> None:
    """Another memcached at a node's address has nothing to say about sessions."""
    with Memcached() as impostor, new_lab(nodes, lab_database) as lab:
        user = lab.member(x=0)
        user.changes(x=1)
        name = lab.name(user, home)
        addresses = {n: s.address for n, s in lab.servers.items()}
        mistaken = user.at(lab.new_worker(addresses | {name: impostor.address}))
        assert mistaken.sees() == MEMBER
        assert mistaken.changes(x=2).status == 200
        assert user.sees() == MEMBER | {"x": 2}
        assert lab.copies(user) == [MEMBER | {"x": 2}] * 2


# --- cut off ---------------------------------------------------------------------

CUTS = ["refuse", "hold", "drip", "reset"]


@pytest.mark.parametrize("cut", CUTS)
@each_home
def test_cut_off(hasty: Lab, home: str, cut: str) -> None:
    """A worker cut off from one home and one that is not see the same session."""
    user = hasty.member(x=0)
    worker, wires = hasty.wired_worker()
    remote = user.at(worker)
    assert remote.sees() == {"_user_id": "7", "x": 0}
    getattr(wires[hasty.name(user, home)], cut)()
    answer = remote.changes(x=1)
    assert answer.status == 200
    assert answer.seconds < HASTY_SECONDS + 1
    assert hasty.row(user) == MEMBER
    assert hasty.copy(user, OTHER[home]) == MEMBER
    assert user.sees() == remote.sees() == MEMBER
    assert hasty.copies(user) == [MEMBER, MEMBER]
    assert user.changes(x=2).status == 200
    assert remote.sees() == user.sees() == MEMBER | {"x": 2}
    wires[hasty.name(user, home)].mend()
    hasty.settle()
    assert remote.sees() == user.sees() == MEMBER | {"x": 2}
    assert hasty.copies(user) == [MEMBER | {"x": 2}] * 2


@pytest.mark.parametrize("cut", CUTS)
@each_home
def test_each_worker_reaches_another_home(hasty: Lab, home: str, cut: str) -> None:
    """Two workers with no node in common read each other's changes, by SQL."""
    user = hasty.member(x=0)
    one, wires_of_one = hasty.wired_worker()
    two, wires_of_two = hasty.wired_worker()
    here, there = user.at(one), user.at(two)
    assert here.sees() == there.sees()
    getattr(wires_of_one[hasty.name(user, home)], cut)()
    getattr(wires_of_two[hasty.name(user, OTHER[home])], cut)()
    for number in (1, 2, 3):
        assert here.changes(x=number).status == 200
        assert there.sees()["x"] == number
        assert there.changes(y=number).status == 200
        assert here.sees()["y"] == number
    everything = {"_user_id": "7", "x": 3, "y": 3}
    assert hasty.row(user) == everything
    assert user.sees() == everything
    for wire in (*wires_of_one.values(), *wires_of_two.values()):
        wire.mend()
    hasty.settle()
    assert here.sees() == there.sees() == everything
    assert hasty.copies(user) == [everything, everything]


@pytest.mark.parametrize("cut", ["hold", "drip"])
@each_home
def test_late_write_never_undoes_a_newer_one(hasty: Lab, home: str, cut: str) -> None:
    """A write that was given up and lands later does not replace what came since."""
    user = hasty.member(x=0)
    worker, wires = hasty.wired_worker()
    remote = user.at(worker)
    wire = wires[hasty.name(user, home)]

    def action(session: Any) -> None:
        session["x"] += 1
        getattr(wire, cut)()

    assert remote.does(action).status == 200
    assert user.sees() == MEMBER
    assert user.changes(x=2).status == 200
    assert wire.release() > 0 or cut == "drip"
    hasty.settle()
    assert user.sees() == remote.sees() == MEMBER | {"x": 2}
    assert hasty.copies(user) == [MEMBER | {"x": 2}] * 2


# --- the ring --------------------------------------------------------------------


def _on(user: User, *workers: Any) -> list[User]:
    return [user.at(worker) for worker in workers]


def test_node_added_and_removed_under_rolling_workers(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """Workers of the old and the new ring serve the same sessions in between."""
    with new_lab(three_nodes, lab_database) as lab:
        addresses = {name: s.address for name, s in lab.servers.items()}
        fewer = {name: addresses[name] for name in ("alpha", "beta")}
        before = [lab.new_worker(fewer) for _ in range(2)]
        after = [lab.new_worker(addresses) for _ in range(2)]
        users = [User(before[0]) for _ in range(12)]
        for user in users:
            assert user.changes(_user_id="7", step=0).status == 200
        rollout = [before, [before[0], after[0]], after, [after[0], before[0]], before]
        step = 0
        for user in users:
            for workers in rollout:
                for _ in range(2):
                    for visit in _on(user, *workers):
                        assert visit.sees() == {"_user_id": "7", "step": step}
                        step += 1
                        assert visit.changes(step=step).status == 200
            assert user.sees() == {"_user_id": "7", "step": step}
            step = 0
            user.changes(step=0)


def test_logout_under_rolling_workers(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """A session ended under one ring is dead under the other and back again."""
    with new_lab(three_nodes, lab_database) as lab:
        addresses = {name: s.address for name, s in lab.servers.items()}
        old = lab.new_worker({name: addresses[name] for name in ("alpha", "beta")})
        new = lab.new_worker(addresses)
        for ended_by, other in ((old, new), (new, old)):
            for _ in range(6):
                user = User(old)
                user.changes(_user_id="7")
                assert [u.sees() for u in _on(user, new, old)] == [
                    {"_user_id": "7"}
                ] * 2
                late = user.twin()
                assert user.at(ended_by).logs_out().status == 200
                assert [u.sees() for u in _on(late, other, ended_by, other)] == [{}] * 3
                assert lab.row(late) == DEAD


@each_home
def test_node_replaced_under_the_same_name(
    three_nodes: list[Memcached], lab_database: LabDatabase, home: str
) -> None:
    """A name that moves to an empty server is like that server restarted."""
    with new_lab(three_nodes[:2], lab_database) as lab:
        user = lab.member(x=0)
        user.changes(x=1)
        name = lab.name(user, home)
        addresses = {n: s.address for n, s in lab.servers.items()}
        addresses[name] = three_nodes[2].address
        moved = user.at(lab.new_worker(addresses))
        assert moved.sees() == MEMBER
        assert moved.changes(x=2).status == 200
        assert user.sees() == MEMBER | {"x": 2}
        assert user.changes(x=3).status == 200
        assert moved.sees() == MEMBER | {"x": 3}
        lab.servers[name].kill()
        lab.servers[name] = three_nodes[2]
        assert moved.changes(x=4).status == 200
        assert lab.copies(user) == [MEMBER | {"x": 4}] * 2


# --- expiry ----------------------------------------------------------------------


@each_home
def test_idle_time_is_kept_by_one_home(lab: Lab, home: str) -> None:
    """A session in use does not expire because one home is down."""
    user = lab.member(x=1)
    lab.kill(user, home)
    for _ in range(5):
        lab.pass_time(LIFETIME * 0.6)
        assert user.sees() == MEMBER


@each_home
def test_expired_copy_of_a_thawed_home(hasty: Lab, home: str) -> None:
    """An expired session is not served from a home that missed its end."""
    user = hasty.member(x=1)
    hasty.freeze(user, home)
    hasty.pass_time(LIFETIME + N + 1)
    assert user.sees() == {}
    hasty.node(user, home).thaw()
    hasty.settle()
    assert user.sees() == {}
