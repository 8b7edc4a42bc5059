"""The end of a session is final, whatever was cut off, asleep or under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from flask_resilient_session.core.reading import MOVE_AT_WORK_MS
from lab import (
    DEAD,
    FIRST,
    HASTY,
    HASTY_WITH_SQL,
    LIFETIME,
    MOVED,
    OTHER,
    PATIENCE,
    SECOND,
    STRANGER,
    Answer,
    Lab,
    N,
    Proxy,
    User,
    Worker,
    each_home,
    new_lab,
)
from lab_databases import LabDatabase
from servers import Memcached, wait_until

#: Which home it is, or how it is lost, makes no difference to a database.
pytestmark = pytest.mark.each_value

MEMBER = {"_user_id": "7", "x": 1}


def _logs_out(user: User) -> Answer:
    return user.logs_out()


def _regenerates(user: User) -> Answer:
    return user.regenerates()


def _logs_in(user: User) -> Answer:
    return user.logs_in("8")


#: What ends an id, and what stands in its place afterwards.
each_end = pytest.mark.parametrize(
    ("end", "remains"),
    [(_logs_out, DEAD), (_regenerates, MOVED), (_logs_in, MOVED)],
    ids=["logout", "regenerate", "login"],
)

End = Callable[[User], Answer]

#: Seconds after which nobody takes a move for one still at work. Only then do readers
#: bury what it missed.
MOVED_LONG_AGO = MOVE_AT_WORK_MS / 1000 + 1


def all_over(lab: Lab, user: User) -> list[Any]:
    """Both copies and the row."""
    return [*lab.copies(user), lab.row(user)]


def dead_everywhere(lab: Lab, user: User, remains: str) -> None:
    """Nobody is served this id, and its readers make that known to all places."""
    assert user.sees() == {}
    lab.pass_time(MOVED_LONG_AGO)
    assert user.sees() == {}
    assert all_over(lab, user) == [remains] * 3


def ended(end: End, user: User) -> User:
    """End the user's session; who still sends the old cookie."""
    late = user.twin()
    answer = end(user)
    assert answer.status == 200
    assert answer.set_cookie is not None
    assert user.cookie != late.cookie
    return late


# --- nothing broken --------------------------------------------------------------


@each_end
def test_everywhere(lab: Lab, end: End, remains: str) -> None:
    """An id that ended is dead on both homes and in SQL before the answer comes."""
    user = lab.member(x=1)
    late = ended(end, user)
    assert all_over(lab, late) == [remains] * 3
    assert late.sees() == {}
    if remains is MOVED:
        expected = MEMBER | ({"_user_id": "8"} if end is _logs_in else {})
        assert user.sees() == expected
        assert all_over(lab, user) == [expected] * 3


@each_end
def test_a_change_under_an_ended_id(lab: Lab, end: End, remains: str) -> None:
    """A later change under an ended id never lands there."""
    late = ended(end, lab.member(x=1))
    sender = late.twin()
    answer = sender.changes(y=2)
    assert answer.status == 200
    assert sender.cookie == late.cookie or remains is DEAD
    assert all_over(lab, late) == [remains] * 3
    assert late.sees() == {}


@each_end
def test_both_memories_lost_afterwards(lab: Lab, end: End, remains: str) -> None:
    """SQL knows of the end when both memories are gone."""
    late = ended(end, lab.member(x=1))
    lab.restart(late, FIRST)
    lab.restart(late, SECOND)
    dead_everywhere(lab, late, remains)


@each_end
@each_home
def test_old_copy_comes_back(lab: Lab, home: str, end: End, remains: str) -> None:
    """An old copy on either home does not win over an end, however it came there."""
    user = lab.member(x=1)
    copy = lab.raw(user, home) or b""
    late = ended(end, user)
    lab.put(late, home, copy)
    dead_everywhere(lab, late, remains)
    lab.put(late, home, copy)
    lab.restart(late, OTHER[home])
    dead_everywhere(lab, late, remains)


# --- one home away ---------------------------------------------------------------


@each_end
@each_home
def test_one_home_killed(lab: Lab, home: str, end: End, remains: str) -> None:
    """An end without one home is acknowledged, and stays when the other restarts."""
    user = lab.member(x=1)
    lab.kill(user, home)
    late = ended(end, user)
    assert lab.row(late) == remains
    assert lab.copy(late, OTHER[home]) == remains
    assert late.sees() == {}
    lab.restart(late, home)
    lab.restart(late, OTHER[home])
    lab.settle()
    dead_everywhere(lab, late, remains)


@each_end
@each_home
def test_one_home_frozen(hasty: Lab, home: str, end: End, remains: str) -> None:
    """A home that slept through the end awakes with a copy that nobody believes."""
    user = hasty.member(x=1)
    hasty.freeze(user, home)
    late = ended(end, user)
    assert late.sees() == {}
    hasty.node(late, home).thaw()
    hasty.restart(late, OTHER[home])
    hasty.settle()
    assert late.sees() == {}
    assert late.changes(y=1).status == 200
    assert late.sees() in ({}, {"y": 1})


@each_end
@pytest.mark.parametrize("cut", ["refuse", "hold", "drip", "reset"])
@each_home
def test_one_home_cut_off(
    hasty: Lab, home: str, cut: str, end: End, remains: str
) -> None:
    """An end by a worker without one home holds for a worker that has both."""
    user = hasty.member(x=1)
    worker, wires = hasty.wired_worker()
    wire = wires[hasty.name(user, home)]
    remote = user.at(worker)
    assert remote.sees() == MEMBER
    getattr(wire, cut)()
    late = ended(end, remote)
    local = User(hasty.worker, late.cookie)
    assert local.twin().sees() == {}
    assert all_over(hasty, local) == [remains] * 3
    wire.mend()
    hasty.restart(late, OTHER[home])
    hasty.settle()
    assert local.sees() == late.sees() == {}


@each_end
@each_home
def test_one_home_cut_off_and_the_other_restarted_first(
    hasty: Lab, home: str, end: End, remains: str
) -> None:
    """A healed home's old copy is not believed when the home that knew is empty."""
    user = hasty.member(x=1)
    worker, wires = hasty.wired_worker()
    remote = user.at(worker)
    assert remote.sees() == MEMBER
    wires[hasty.name(user, home)].refuse()
    late = ended(end, remote)
    hasty.restart(late, OTHER[home])
    local = User(hasty.worker, late.cookie)
    assert hasty.copy(local, home) == MEMBER
    dead_everywhere(hasty, local, remains)


# --- both homes away -------------------------------------------------------------


@each_end
@pytest.mark.parametrize("verb", ["kill", "freeze"])
def test_both_homes_away(hasty: Lab, verb: str, end: End, remains: str) -> None:
    """With no home to be told SQL alone makes the end final where homes forgot."""
    user = hasty.member(x=1)
    getattr(hasty, verb)(user, FIRST)
    getattr(hasty, verb)(user, SECOND)
    late = ended(end, user)
    assert hasty.row(late) == remains
    assert late.sees() == {}
    hasty.restart(late, FIRST)
    hasty.restart(late, SECOND)
    hasty.settle()
    dead_everywhere(hasty, late, remains)


@each_end
def test_both_homes_cut_off(hasty: Lab, end: End, remains: str) -> None:
    """Workers that still reach both homes learn of an end within N."""
    user = hasty.member(x=1)
    worker, wires = hasty.wired_worker()
    remote = user.at(worker)
    assert remote.sees() == MEMBER
    for wire in wires.values():
        wire.refuse()
    late = ended(end, remote)
    local = User(hasty.worker, late.cookie)
    assert late.sees() == {}
    assert local.sees() == MEMBER, "the documented limit"
    hasty.pass_time(N)
    assert local.twin().changes(y=1).status == 200
    dead_everywhere(hasty, local, remains)


# --- without SQL -----------------------------------------------------------------


def test_debt(hasty: Lab) -> None:
    """A logout without SQL is on both homes, and the next reader tells SQL."""
    user = hasty.member(x=1)
    hasty.sql_gone()
    late = ended(_logs_out, user)
    assert hasty.copies(late) == [DEAD, DEAD]
    for _ in range(2):
        assert late.sees() == {}
    hasty.worker.state.store.rows._debts.clear()  # as if its process had ended
    hasty.sql_back()
    hasty.settle()
    assert hasty.row(late) == MEMBER, "not told yet"
    assert late.sees() == {}
    assert all_over(hasty, late) == [DEAD] * 3
    hasty.restart(late, FIRST)
    hasty.restart(late, SECOND)
    assert late.sees() == {}


@each_home
def test_debt_is_paid_from_one_home(
    nodes: list[Memcached], lab_database: LabDatabase, home: str
) -> None:
    """One of the two tombstones is enough to pay the debt."""
    with new_lab(nodes, lab_database, **HASTY_WITH_SQL) as lab:
        user = lab.member(x=1)
        lab.sql_locked()
        late = ended(_logs_out, user)
        lab.sql_unlocked()
        lab.restart(late, home)
        lab.settle()
        assert late.sees() == {}
        assert all_over(lab, late) == [DEAD] * 3


def test_debt_of_a_visitor(hasty: Lab) -> None:
    """A session without a row is ended without SQL, and never gets a live row."""
    user = hasty.visitor(x=1)
    hasty.member()
    hasty.sql_gone()
    late = ended(_logs_out, user)
    hasty.sql_back()
    hasty.settle()
    assert late.sees() == {}
    assert all_over(hasty, late) == [DEAD] * 3


@each_home
@pytest.mark.parametrize("verb", ["kill", "freeze"])
def test_logout_without_sql_and_a_home(hasty: Lab, home: str, verb: str) -> None:
    """A logout that only one home could take is a 503, and may be tried again."""
    user = hasty.member(x=1)
    hasty.sql_gone()
    getattr(hasty, verb)(user, home)
    late = user.twin()
    answer = user.logs_out()
    assert (answer.status, answer.set_cookie) == (503, None)
    hasty.sql_back()
    hasty.restart(user, home)
    hasty.settle()
    assert user.logs_out().status == 200
    assert late.sees() == {}
    assert all_over(hasty, late) == [DEAD] * 3


# --- under way -------------------------------------------------------------------


@each_end
@pytest.mark.parametrize("healthy", [True, False], ids=["healthy", "degraded"])
def test_save_after_the_end(lab: Lab, healthy: bool, end: End, remains: str) -> None:
    """A request that loaded before an end and saves after it changes nothing."""
    user = lab.member(x=1)
    if not healthy:
        lab.restart(user, FIRST)
    request = lab.in_flight(user.twin(), lambda session: session.update(y=2))
    late = ended(end, user)
    answer = request.finish()
    assert (answer.status, answer.set_cookie) == (200, None)
    assert lab.worker.stats["dropped_changes"] == 1
    assert all_over(lab, late) == [remains] * 3
    assert late.sees() == {}


@each_end
@pytest.mark.parametrize("verb", ["restart", "evict"])
@each_home
def test_save_after_the_end_and_a_loss(
    lab: Lab, home: str, verb: str, end: End, remains: str
) -> None:
    """A late save does not revive a session where a home forgot its end."""
    user = lab.member(x=1)
    second = user.at(lab.new_worker())
    request = lab.in_flight(second, lambda session: session.update(y=2))
    late = ended(end, user)
    getattr(lab, verb)(late, home)
    answer = request.finish()
    assert (answer.status, answer.set_cookie) == (200, None)
    dead_everywhere(lab, late, remains)


@each_end
def test_save_after_the_end_and_the_loss_of_all_memory(
    lab: Lab, end: End, remains: str
) -> None:
    """A late save does not revive a session where both homes forgot its end."""
    user = lab.member(x=1)
    request = lab.in_flight(user.twin(), lambda session: session.update(y=2))
    late = ended(end, user)
    lab.restart(late, FIRST)
    lab.restart(late, SECOND)
    answer = request.finish()
    assert (answer.status, answer.set_cookie) == (200, None)
    dead_everywhere(lab, late, remains)


@each_home
def test_due_sync_after_the_end(lab: Lab, home: str) -> None:
    """A sync that was due in a request under way does not revive the row."""
    user = lab.member(x=1)
    lab.pass_time(N)
    lab.restart(user, home)
    request = lab.in_flight(user.twin(), dict)
    late = ended(_logs_out, user)
    answer = request.finish()
    assert (answer.status, answer.set_cookie) == (200, None)
    assert all_over(lab, late) == [DEAD] * 3


def test_visitor_ends_under_way(lab: Lab) -> None:
    """A never-synced session that ended meanwhile gets no row from a late request."""
    user = lab.visitor(cart="a")
    requests = [
        lab.in_flight(user.twin(), dict),
        lab.in_flight(user.twin(), lambda session: session.update(cart="b")),
    ]
    late = ended(_logs_out, user)
    for request in requests:
        answer = request.finish()
        assert (answer.status, answer.set_cookie) == (200, None)
    assert all_over(lab, late) == [DEAD] * 3


def test_login_under_way_of_an_ended_session(lab: Lab) -> None:
    """A login in a request whose session ended meanwhile gets an id of its own."""
    user = lab.member(x=1)
    other = user.twin()
    request = lab.in_flight(other, lambda session: session.update(_user_id="8"))
    late = ended(_logs_out, user)
    answer = request.finish()
    assert answer.status == 200
    assert other.cookie not in (None, late.cookie)
    assert other.sees()["_user_id"] == "8"
    assert "x" not in other.sees(), "data of the ended session"
    assert late.sees() == {}


def test_two_ends_at_once(lab: Lab) -> None:
    """Of a logout and a regenerate at once the session is dead under its old id."""
    user = lab.member(x=1)
    other = user.twin()
    request = lab.in_flight(other, lambda session: session.regenerate())
    late = ended(_logs_out, user)
    answer = request.finish()
    assert (answer.status, answer.set_cookie) == (200, None)
    assert late.sees() == {}
    assert all_over(lab, late) == [DEAD] * 3


def test_logout_after_a_regenerate_under_way(lab: Lab) -> None:
    """A logout that loaded before a regenerate ends the old id, which was dead."""
    user = lab.member(x=1)
    request = lab.in_flight(user.twin(), lambda session: session.clear())
    late = ended(_regenerates, user)
    assert request.finish().status == 200
    assert late.sees() == {}


def test_answer_from_before_a_logout(lab: Lab) -> None:
    """What SQL told a request before a logout is not told to one after it."""
    user = lab.member(x=1)
    late = user.twin()
    other = user.at(lab.new_worker())
    lab.evict(user, FIRST)
    sql = lab.worker.state.sql
    read = sql.read
    reading, go_on = threading.Event(), threading.Event()

    def slow_once(*args: Any) -> Any:
        row = read(*args)
        if not reading.is_set():
            reading.set()
            assert go_on.wait(PATIENCE)
        return row

    sql.read = slow_once
    before = lab.start(late.twin().sees)
    assert reading.wait(PATIENCE)
    assert other.logs_out().status == 200
    lab.restart(late, FIRST)
    lab.restart(late, SECOND)
    assert late.twin().sees() == {}
    go_on.set()
    assert before.result(PATIENCE) == MEMBER, "it came before the logout"
    assert late.sees() == {}
    assert lab.row(late) == DEAD


# --- revoked ---------------------------------------------------------------------


def _revokes(worker: Worker, user: str = "7") -> int:
    with worker.app.app_context():
        return int(worker.sessions.revoke_user(user))


@each_home
@pytest.mark.parametrize("verb", ["kill", "freeze"])
def test_revoked_without_a_home(hasty: Lab, home: str, verb: str) -> None:
    """A user's sessions end while a node is away, and stay ended when it is back."""
    users = [hasty.member(x=1) for _ in range(4)]
    bystander = User(hasty.worker)
    assert bystander.changes(_user_id="8").status == 200
    getattr(hasty, verb)(users[0], home)
    assert _revokes(hasty.new_worker()) == 4
    assert [user.sees() for user in users] == [{}] * 4
    assert bystander.sees() == {"_user_id": "8"}
    if verb == "freeze":
        hasty.node(users[0], home).thaw()
    else:
        hasty.restart(users[0], home)
    hasty.restart(users[0], OTHER[home])
    hasty.settle()
    for user in users:
        late = user.twin()
        assert late.sees() == {}
        assert hasty.row(user) == DEAD
    assert bystander.sees() == {"_user_id": "8"}


def test_revoked_under_way(lab: Lab) -> None:
    """A request that loaded before a revocation changes nothing after it."""
    user = lab.member(x=1)
    request = lab.in_flight(user.twin(), lambda session: session.update(y=2))
    assert _revokes(lab.new_worker()) == 1
    answer = request.finish()
    assert (answer.status, answer.set_cookie) == (200, None)
    assert all_over(lab, user) == [DEAD] * 3


# --- late packets ----------------------------------------------------------------


def _held_up(
    lab: Lab,
    home: str,
    action: Callable[[Any], Any],
    before: Callable[[User], None] = lambda user: None,
) -> tuple[User, Worker, Proxy]:
    """Who acts by a worker in a hurry, whose write to this home is held on its way.

    On a busy machine that worker may give up the home, or SQL, when it loads. It has
    nothing to write there then, and another user tries again.

    :param action: what the request does before the wire holds what is sent.
    :param before: what is done before the request.
    :returns: the user, at a patient worker; the worker in a hurry; the wire.
    """
    worker, wires = lab.wired_worker(**HASTY)

    def held_up() -> tuple[User, Worker, Proxy] | None:
        worker.settle()
        user = lab.member(x=1)
        wire, written = wires[lab.name(user, home)], lab.item(user)

        def acts(session: Any) -> None:
            action(session)
            wire.hold()

        before(user)
        remote = user.at(worker)
        status = remote.does(acts).status
        assert status in (200, 503)
        if status == 200 and wire.holds(written):
            return User(lab.worker, remote.cookie), worker, wire
        wire.mend()
        return None

    return wait_until(held_up, PATIENCE, "a write that is held on its way")


@each_end
@each_home
def test_late_change(lab: Lab, home: str, end: End, remains: str) -> None:
    """A write that is held on its way until after the end does not land."""
    user, worker, wire = _held_up(lab, home, lambda session: session.update(x=2))
    late = ended(end, user)
    assert wire.release() > 0
    worker.settle()
    dead_everywhere(lab, late, remains)


@each_home
def test_late_repair(lab: Lab, home: str) -> None:
    """A repair that lands after a logout, on a home that forgot, revives nothing."""
    user, _, wire = _held_up(lab, home, dict, lambda user: lab.evict(user, home))
    late = ended(_logs_out, user)
    lab.evict(late, home)
    assert wire.release() > 0
    wait_until(lambda: lab.copy(late, home) == MEMBER, PATIENCE, "the late repair")
    lab.restart(late, OTHER[home])
    assert late.sees() == {}
    assert all_over(lab, late) == [DEAD] * 3


@each_home
def test_late_tombstone(lab: Lab, home: str) -> None:
    """The tombstone of an old id that lands late does not touch the new one."""
    olds: list[User] = []
    user, worker, wire = _held_up(
        lab,
        home,
        lambda session: session.regenerate(),
        lambda user: olds.append(user.twin()),
    )
    assert wire.release() > 0
    worker.settle()
    assert user.sees() == MEMBER
    assert olds[-1].sees() == {}


# --- the ring, and time ----------------------------------------------------------


@each_end
def test_copy_on_a_former_home(
    three_nodes: list[Memcached], lab_database: LabDatabase, end: End, remains: str
) -> None:
    """A copy that a former home kept through the end is not served by a later ring."""
    with new_lab(three_nodes, lab_database) as lab:
        user = lab.member(x=1)
        addresses = {name: s.address for name, s in lab.servers.items()}
        gone = lab.name(user, SECOND)
        stranger = lab.name(user, STRANGER)
        fewer = lab.new_worker({n: a for n, a in addresses.items() if n != gone})
        small = user.at(fewer)
        assert small.sees() == MEMBER
        late = ended(end, small)
        lab.servers[stranger].restart()
        lab.node(late, FIRST).restart()
        lab.settle()
        assert lab.copy(late, SECOND) == MEMBER
        assert User(lab.worker, late.cookie).sees() == {}
        assert late.sees() == {}


@each_home
def test_late_in_the_lifetime(lab: Lab, home: str) -> None:
    """An ended session stays dead for as long as a copy of it could be alive."""
    user = lab.member(x=1)
    copy = lab.raw(user, home) or b""
    late = ended(_logs_out, user)
    lab.restart(late, OTHER[home])
    lab.put(late, home, copy)
    lab.pass_time(LIFETIME - 1)
    assert lab.worker.reap().reaped == 0
    assert late.sees() == {}
    lab.restart(late, OTHER[home])
    lab.put(late, home, copy)
    lab.pass_time(30 * LIFETIME)
    lab.worker.reap()
    assert late.sees() == {}


def test_a_logout_that_sql_missed_is_made_up_for(
    nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """SQL hears of it from whoever needs SQL next, and not only from a reader."""
    with new_lab(nodes, lab_database, **HASTY_WITH_SQL) as lab:
        user, other = lab.member(), lab.member()
        cookie = user.twin()
        lab.sql_locked(readable=True)
        assert user.logs_out().status == 200
        lab.sql_unlocked()
        assert lab.row(cookie) != DEAD
        other.logs_in("8")
        assert lab.row(cookie) == DEAD
        for role in (FIRST, SECOND):
            lab.restart(cookie, role)
        assert cookie.sees() == {}
