"""SQL that is gone, locked or older: what goes on, what is refused, what is made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab import (
    DEAD,
    FIRST,
    HASTY_SECONDS,
    HASTY_WITH_SQL,
    MOVED,
    OTHER,
    SECOND,
    Answer,
    Lab,
    N,
    User,
    each_home,
    new_lab,
)
from lab_databases import LabDatabase
from servers import Memcached

MEMBER = {"_user_id": "7", "x": 1}
OLD = {"_user_id": "7", "x": 0}


@pytest.fixture
def lab(nodes: list[Memcached], lab_database: LabDatabase) -> Iterator[Lab]:
    """Two nodes, and a worker that does not wait long for SQL."""
    with new_lab(nodes, lab_database, **HASTY_WITH_SQL) as lab:
        # The database and its table are there before anybody takes them away.
        lab.member()
        yield lab


class Trouble:
    """One way for SQL not to answer."""

    def __init__(self, lab: Lab, kind: str) -> None:
        self._lab = lab
        self._kind = kind

    def begins(self) -> None:
        """From now on SQL does not answer."""
        if self._kind == "gone":
            self._lab.sql_gone()
        else:
            self._lab.sql_locked()

    def ends(self) -> None:
        """SQL is back, and the worker has noticed."""
        if self._kind == "gone":
            self._lab.sql_back()
        else:
            self._lab.sql_unlocked()
        self._lab.settle()


@pytest.fixture(params=["gone", "locked"])
def sql(lab: Lab, request: pytest.FixtureRequest) -> Trouble:
    """SQL's two kinds of trouble, in turn."""
    return Trouble(lab, request.param)


def refused(answer: Answer) -> bool:
    """Whether this is a 503 that sends no cookie and says when to come back."""
    return (
        answer.status == 503
        and answer.set_cookie is None
        and answer.retry_after is not None
    )


def all_over(lab: Lab, user: User) -> list[Any]:
    """Both copies and the row."""
    return [*lab.copies(user), lab.row(user)]


# --- two copies, no SQL ----------------------------------------------------------


def test_reads_and_changes_go_on(lab: Lab, sql: Trouble) -> None:
    """With both homes there, pages read and write without SQL, and quickly."""
    user = lab.member(x=0)
    sql.begins()
    for number in range(5):
        answer = user.changes(x=number)
        assert answer.status == 200
        assert answer.seconds < 1
        assert user.sees() == {"_user_id": "7", "x": number}
    assert lab.worker.stats["sql_faults"] == 0, "nobody had to ask"
    assert lab.copies(user) == [{"_user_id": "7", "x": 4}] * 2
    sql.ends()
    assert lab.row(user) == OLD
    assert user.sees() == {"_user_id": "7", "x": 4}


@pytest.mark.each_value
@pytest.mark.parametrize("changing", [True, False], ids=["change", "read"])
def test_due_sync_is_put_off_and_made_up_for(
    lab: Lab, sql: Trouble, changing: bool
) -> None:
    """A sync that SQL cannot take is no error, takes a bounded time and comes later."""
    user = lab.member(x=0)
    user.changes(x=1)
    sql.begins()
    lab.pass_time(N)
    for number in range(6):
        answer = user.changes(y=number) if changing else user.does(dict)
        assert answer.status == 200
        assert answer.seconds < HASTY_SECONDS + 1
    assert lab.worker.stats["syncs_put_off"] > 0
    everything = MEMBER | ({"y": 5} if changing else {})
    assert lab.copies(user) == [everything, everything]
    sql.ends()
    assert lab.row(user) == OLD
    assert user.sees() == everything
    assert lab.row(user) == everything
    lab.restart(user, FIRST)
    lab.restart(user, SECOND)
    assert user.sees() == everything


def test_hung_sql_costs_a_few_timeouts(
    nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """After three timeouts nobody waits for SQL until a probe is due."""
    config = HASTY_WITH_SQL | {
        "RESILIENT_SESSION_NODE_RETRY": 60.0,
        "RESILIENT_SESSION_NODE_RETRY_MAX": 60.0,
    }
    with new_lab(nodes, lab_database, **config) as lab:
        users = [lab.member(x=number) for number in range(6)]
        lab.sql_locked()
        lab.pass_time(N)
        for user in users:
            assert user.does(dict).status == 200
        assert lab.worker.stats["sql_faults"] == 3
        assert lab.worker.stats["syncs_put_off"] == 6


def test_locked_by_a_writer_that_lets_others_read(lab: Lab) -> None:
    """A writer of the application keeps reads by SQL going, and refuses changes."""
    user = lab.member(x=0)
    lab.restart(user, FIRST)
    lab.restart(user, SECOND)
    lab.sql_locked(readable=True)
    assert user.sees() == OLD
    assert lab.copies(user) == [OLD, OLD]
    assert user.changes(x=1).status == 200, "both homes have it"
    lab.evict(user, FIRST)
    assert refused(user.changes(x=2))
    lab.sql_unlocked()
    lab.settle()
    assert user.changes(x=3).status == 200
    assert all_over(lab, user) == [{"_user_id": "7", "x": 3}] * 3


def test_visitor_without_sql(lab: Lab, sql: Trouble) -> None:
    """A first store needs both homes and no SQL; its row comes when SQL is back."""
    sql.begins()
    user = lab.visitor(cart="a")
    assert user.sees() == {"cart": "a"}
    assert user.changes(cart="b").status == 200
    assert lab.copies(user) == [{"cart": "b"}] * 2
    sql.ends()
    assert lab.row(user) is None
    assert user.sees() == {"cart": "b"}
    assert lab.row(user) == {"cart": "b"}


@each_home
def test_visitor_without_sql_and_one_home(lab: Lab, sql: Trouble, home: str) -> None:
    """A first store that only one home could take is not acknowledged."""
    sample = lab.member()
    sql.begins()
    lab.kill(sample, home)
    user = User(lab.worker)
    assert refused(user.changes(cart="a"))
    assert user.cookie is None
    lab.restart(sample, home)
    sql.ends()
    assert user.changes(cart="a").status == 200
    assert user.sees() == {"cart": "a"}


# --- what must be in SQL ---------------------------------------------------------


def _logs_in(user: User) -> Answer:
    return user.logs_in("8")


def _regenerates(user: User) -> Answer:
    return user.regenerates()


def _asks_for_a_sync(user: User) -> Answer:
    def action(session: Any) -> None:
        session["x"] = 2
        session.sync()

    return user.does(action)


def _is_cleared_and_filled(user: User) -> Answer:
    def action(session: Any) -> None:
        session.clear()
        session["_user_id"] = "8"

    return user.does(action)


@pytest.mark.parametrize(
    "act", [_logs_in, _regenerates, _asks_for_a_sync, _is_cleared_and_filled]
)
def test_refused_without_sql(
    lab: Lab, sql: Trouble, act: Callable[[User], Answer]
) -> None:
    """A login, a new id or a sync that SQL cannot take is a 503 and changes nothing."""
    user = lab.member(x=0)
    user.changes(x=1)
    cookie = user.cookie
    sql.begins()
    assert refused(act(user))
    assert user.cookie == cookie
    assert lab.copies(user) == [MEMBER, MEMBER]
    assert user.sees() == MEMBER
    sql.ends()
    assert lab.row(user) == OLD
    assert act(user).status == 200
    assert user.sees() != 503


def test_login_of_a_visitor_without_sql(lab: Lab, sql: Trouble) -> None:
    """A refused login leaves the visitor's session as it was."""
    user = lab.visitor(cart="a")
    sql.begins()
    assert refused(user.logs_in("8"))
    assert user.sees() == {"cart": "a"}
    assert refused(User(lab.worker).logs_in("8"))
    sql.ends()
    before = user.twin()
    assert user.logs_in("8").status == 200
    assert user.sees() == {"cart": "a", "_user_id": "8"}
    assert before.sees() == {}
    assert all_over(lab, before) == [MOVED] * 3


def test_login_under_the_same_id_without_sql(
    nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """Without a new id at login a login needs SQL all the same."""
    config = HASTY_WITH_SQL | {"RESILIENT_SESSION_REGENERATE_ON_LOGIN": False}
    with new_lab(nodes, lab_database, **config) as lab:
        user = lab.visitor(cart="a")
        assert user.sees() == {"cart": "a"}
        lab.sql_gone()
        assert refused(user.logs_in("8"))
        assert lab.copies(user) == [{"cart": "a"}] * 2
        lab.sql_back()
        lab.settle()
        assert user.logs_in("8").status == 200
        assert all_over(lab, user) == [{"cart": "a", "_user_id": "8"}] * 3


# --- no SQL and fewer homes ------------------------------------------------------


@pytest.mark.each_value
@each_home
def test_one_home_without_sql(lab: Lab, sql: Trouble, home: str) -> None:
    """The last copy is served as it is; a change is refused and sends no cookie."""
    user = lab.member(x=0)
    user.changes(x=1)
    sql.begins()
    lab.kill(user, home)
    for _ in range(2):
        assert user.sees() == MEMBER
    assert lab.worker.stats["loaded_unverified"] >= 2
    assert refused(user.changes(x=2))
    assert refused(user.logs_out())
    lab.restart(user, home)
    sql.ends()
    assert user.sees() in (MEMBER, MEMBER | {"x": 2}, {})


@pytest.mark.each_value
@each_home
def test_restarted_home_without_sql(lab: Lab, sql: Trouble, home: str) -> None:
    """A copy that SQL could not vouch for is not spread by reads, but takes changes."""
    user = lab.member(x=0)
    user.changes(x=1)
    sql.begins()
    lab.restart(user, home)
    assert user.sees() == MEMBER
    assert lab.copy(user, home) is None, "repaired without SQL's word"
    lab.pass_time(61)
    assert user.sees() == MEMBER
    assert lab.copy(user, home) is None, "repaired by a use"
    assert user.changes(y=2).status == 200
    everything = MEMBER | {"y": 2}
    assert lab.copies(user) == [everything, everything]
    assert all(lab.record(user, h).unverified for h in (FIRST, SECOND))
    assert user.sees() == everything
    sql.ends()
    assert lab.row(user) == OLD
    assert user.sees() == everything
    assert lab.copies(user) == [everything, everything]
    assert not any(lab.record(user, h).unverified for h in (FIRST, SECOND))


@pytest.mark.each_value
@each_home
def test_ended_before_the_trouble_and_unverified_now(
    lab: Lab, sql: Trouble, home: str
) -> None:
    """A change onto an ended session, without SQL's word, dies when SQL is back."""
    user = lab.member(x=0)
    copy = lab.raw(user, home)
    late = user.twin()
    user.logs_out()
    # The logout is known to SQL alone; one old copy came back.
    lab.restart(late, OTHER[home])
    lab.put(late, home, copy or b"")
    sql.begins()
    assert late.sees() == OLD, "served unverified: the price of going on"
    assert late.changes(x=1).status == 200
    sql.ends()
    assert late.sees() == {}
    assert all_over(lab, late) == [DEAD] * 3


def test_everything_gone_and_back(lab: Lab, sql: Trouble) -> None:
    """With nobody left to ask it is a 503; the same session is there afterwards."""
    worker = lab.new_worker(RESILIENT_SESSION_NODE_TIMEOUT=0.2)
    worker.connect()
    user = lab.member(x=0).at(worker)
    cookie = user.cookie
    lab.freeze(user, FIRST)
    lab.freeze(user, SECOND)
    sql.begins()
    for act in (dict, lambda session: session.clear(), lambda s: s.update(x=5)):
        assert refused(user.does(act))
    assert user.does(lambda session: None).status == 200, "a page without a session"
    assert user.cookie == cookie
    lab.node(user, FIRST).thaw()
    lab.node(user, SECOND).thaw()
    sql.ends()
    assert user.sees() == OLD
    assert all_over(lab, user) == [OLD] * 3


def test_all_memory_and_sql_gone(lab: Lab, sql: Trouble) -> None:
    """Two empty homes prove nothing while SQL is silent."""
    user = lab.member(x=1)
    visitor = lab.visitor(cart="a")
    sql.begins()
    lab.restart(user, FIRST)
    lab.restart(user, SECOND)
    assert user.sees() == 503
    assert visitor.sees() == 503
    assert user.does(lambda session: session.unavailable).data is True
    sql.ends()
    assert user.sees() == MEMBER
    assert lab.copies(user) == [MEMBER, MEMBER]
    assert visitor.sees() == {}


def test_empty_page_instead_of_an_error(
    nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """Where the setting says so, an unavailable session is empty and read-only."""
    config = HASTY_WITH_SQL | {"RESILIENT_SESSION_ON_UNAVAILABLE": "empty"}
    with new_lab(nodes, lab_database, **config) as lab:
        user = lab.member(x=1)
        lab.sql_gone()
        lab.restart(user, FIRST)
        lab.restart(user, SECOND)
        answer = user.does(dict)
        assert (answer.status, answer.data, answer.set_cookie) == (200, {}, None)
        assert refused(user.changes(x=2))
        lab.sql_back()
        lab.settle()
        assert user.sees() == MEMBER


# --- between read and write ------------------------------------------------------


@each_home
def test_sql_and_a_home_lost_between_read_and_write(
    lab: Lab, sql: Trouble, home: str
) -> None:
    """A change that one home took and SQL did not is refused, not acknowledged."""
    user = lab.member(x=0)

    def action(session: Any) -> None:
        session["x"] += 1
        lab.kill(user, home)
        sql.begins()

    assert refused(user.does(action))


@each_home
def test_sql_back_between_read_and_write(lab: Lab, home: str) -> None:
    """A copy that was served unverified is judged again before SQL is written."""
    user = lab.member(x=0)
    second = user.at(lab.new_worker())
    lab.sql_gone()
    lab.restart(user, home)

    def action(session: Any) -> None:
        session["x"] += 1
        lab.sql_back()
        lab.settle()
        assert second.changes(y=2).status == 200

    assert user.does(action).status == 200
    everything = MEMBER | {"y": 2}
    assert user.sees() == second.sees() == everything
    assert lab.copies(user) == [everything, everything]


# --- an older SQL ----------------------------------------------------------------


def test_restored_to_an_older_state(lab: Lab) -> None:
    """After SQL went back in time a session in memory goes on, and syncs again."""
    user = lab.member(x=0)
    backup = lab.sql_saved()
    for number in (1, 2):
        lab.pass_time(N)
        assert user.changes(x=number).status == 200
    lab.sql_restored(backup)
    assert lab.row(user) == OLD
    assert user.sees()["x"] == 2
    lab.pass_time(N)
    assert user.changes(x=3).status == 200
    assert all_over(lab, user) == [{"_user_id": "7", "x": 3}] * 3
    lab.restart(user, FIRST)
    assert user.changes(x=4).status == 200
    assert all_over(lab, user) == [{"_user_id": "7", "x": 4}] * 3


def test_restored_to_before_the_session(lab: Lab) -> None:
    """A session younger than the backup ends at its next sync, for good."""
    backup = lab.sql_saved()
    user = lab.member(x=1)
    lab.sql_restored(backup)
    lab.pass_time(N)
    assert user.sees() in ({}, MEMBER)
    assert user.sees() == {}
    assert lab.row(user) is None


def test_restored_and_put_right(lab: Lab) -> None:
    """A wrong backup for a moment: with the row comes all that the homes held."""
    backup = lab.sql_saved()
    user = lab.member(x=0)
    right = lab.sql_saved()
    assert user.changes(x=1).status == 200
    lab.sql_restored(backup)
    lab.pass_time(N)
    assert user.sees() in ({}, MEMBER)
    for _ in range(3):
        assert user.sees() == {}
    lab.sql_restored(right)
    assert user.sees() == MEMBER
    assert lab.row(user) == MEMBER
    assert user.changes(x=3).status == 200
    assert user.sees() == MEMBER | {"x": 3}


def test_corrupt_row(lab: Lab) -> None:
    """A row that is no record is replaced by what the homes hold, or is gone."""
    user = lab.member(x=1)
    bare = lab.member(x=2)
    lab.sql_spoiled()
    lab.pass_time(N)
    assert user.sees() == MEMBER
    assert lab.row(user) == MEMBER
    lab.restart(bare, FIRST)
    lab.restart(bare, SECOND)
    assert bare.sees() == {}
