"""An application on PostgreSQL and MariaDB: all it does, and all they do to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from apps import command_runner
from builders import Statements
from database_servers import new_table_name
from lab import DEAD, FIRST, LIFETIME, MOVED, SECOND, Answer, Lab, N, User, Worker
from lab_databases import LabDatabase, ServerTable, lent_database
from servers import Memcached, wait_until

#: For a database that may hang. Requests may be late by what a busy machine adds.
NODE_TIMEOUT, SQL_TIMEOUT, SLACK = 0.7, 0.3, 2.0

MEMBER = {"_user_id": "7", "x": 1}

DAY_MS = 24 * 3600 * 1000


class DatabaseLab(Lab):
    """A lab whose sessions have their rows on a database server.

    :ivar server: what a test stops, kills and freezes.
    """

    def __init__(self, nodes: list[Memcached], table: ServerTable, **config: Any):
        super().__init__(nodes, table, **config)
        self.server = table.server

    def database_gone(self, end: str) -> None:
        """Stop, kill or freeze the server."""
        getattr(self.server, end)()

    def database_back(self) -> None:
        """Let it run again, and return when the workers use it."""
        self.server.heal()
        self.settle()


@pytest.fixture(params=["postgresql", "mariadb"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LabDatabase]:
    """A table on each server in turn."""
    yield from lent_database(request, request.param, tmp_path)


@pytest.fixture
def lab(nodes: list[Memcached], table: ServerTable) -> Iterator[DatabaseLab]:
    """Two nodes, one worker that has patience, and each database in turn."""
    with opened(DatabaseLab(nodes, table)) as lab:
        yield lab


@pytest.fixture
def hasty(nodes: list[Memcached], table: ServerTable) -> Iterator[DatabaseLab]:
    """The same with a worker that has none, and has used SQL before."""
    config = {
        "RESILIENT_SESSION_NODE_TIMEOUT": NODE_TIMEOUT,
        "RESILIENT_SESSION_SQL_TIMEOUT": SQL_TIMEOUT,
    }
    with opened(DatabaseLab(nodes, table, **config)) as lab:
        yield lab


@contextmanager
def opened(lab: DatabaseLab) -> Iterator[DatabaseLab]:
    """Close it at the end."""
    try:
        yield lab
    finally:
        lab.server.thaw()
        lab.close()


def member(lab: DatabaseLab) -> User:
    """A user who is logged in, however long a busy machine takes for it."""
    user = User(lab.worker)
    wait_until(lambda: user.changes(_user_id="7", x=0).status == 200, 20.0, "a login")
    return user


def in_time(answer: Answer) -> Answer:
    """An answer that came when all that a request may wait for was over."""
    assert answer.seconds < 2 * (NODE_TIMEOUT + SQL_TIMEOUT) + SLACK
    return answer


# --- the whole path --------------------------------------------------------------


def test_a_session_from_login_to_its_end(lab: DatabaseLab) -> None:
    """Log in, change, lose all memory, read back, move, log out, reap."""
    user = lab.visitor(x=0)
    assert lab.row(user) is None
    stranger = user.twin()
    assert user.logs_in("7").status == 200
    assert lab.row(stranger) == MOVED
    lab.pass_time(N + 1)
    assert user.changes(x=1).status == 200
    assert lab.row(user) == MEMBER
    for home in (FIRST, SECOND):
        lab.restart(user, home)
    assert user.sees() == MEMBER
    assert lab.copies(user) == [MEMBER, MEMBER]
    before = user.twin()
    assert user.regenerates().status == 200
    assert lab.row(before) == MOVED
    assert lab.row(user) == MEMBER
    last = user.twin()
    assert user.logs_out().status == 200
    assert lab.row(last) == DEAD
    for home in (FIRST, SECOND):
        lab.restart(last, home)
    assert last.sees() == {}
    assert lab.worker.reap().examined == 0
    lab.pass_time(3 * LIFETIME)
    assert lab.worker.reap().reaped == 3
    assert lab.raw_row(last) is None


def test_the_reaper_renews_what_is_alive(lab: DatabaseLab) -> None:
    """A row that is past its time but whose session was used since is kept."""
    user, gone = lab.member(x=1), lab.member(x=2)
    lab.pass_time(LIFETIME - 60)
    lab.database_gone("stop")
    assert user.sees() == MEMBER
    lab.database_back()
    lab.pass_time(N + 600)
    report = lab.worker.reap()
    assert (report.renewed, report.reaped, report.failed) == (1, 1, None)
    assert user.sees() == MEMBER
    assert gone.sees() == {}


def reaped_with_a_clock(
    lab: DatabaseLab, apart_ms: int, *options: str
) -> tuple[int, str]:
    """Exit code and errors of the command on a host whose clock is so far ahead."""
    worker = lab.new_worker()
    worker.state.clock.now_ms = lambda: lab.now_ms() + apart_ms
    result = command_runner(worker.app).invoke(args=["reap-sessions", *options])
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("apart_ms", "where"),
    [(6 * 60_000, "ahead of"), (-6 * 60_000, "behind"), (30 * DAY_MS, "ahead of")],
)
def test_a_reaper_whose_clock_is_wrong(
    lab: DatabaseLab, apart_ms: int, where: str
) -> None:
    """It deletes nothing, whatever it takes for over, and says which clocks differ."""
    user = lab.member(x=1)
    lab.pass_time(LIFETIME - 60)
    gone = lab.member(x=2)
    lab.pass_time(59)
    for options in ([], ["--without-nodes"]):
        code, said = reaped_with_a_clock(lab, apart_ms, *options)
        assert code == 4
        assert "Aborted: clocks are apart" in said
        assert f"{where} the database's" in said
    assert user.sees() == MEMBER
    assert lab.row(gone) == MEMBER | {"x": 2}


@pytest.mark.parametrize("apart_ms", [-4 * 60_000, 4 * 60_000])
def test_a_reaper_whose_clock_is_nearly_right(lab: DatabaseLab, apart_ms: int) -> None:
    """Minutes are allowed for: the dead go, the living stay."""
    gone = lab.member(x=2)
    lab.pass_time(LIFETIME)
    user = lab.member(x=1)
    lab.pass_time(N + 600)
    assert reaped_with_a_clock(lab, apart_ms, "--quiet") == (0, "")
    assert lab.row(gone) is None
    assert user.sees() == MEMBER


def test_what_a_pass_asks_of_the_database(lab: DatabaseLab) -> None:
    """Its clock, one statement, and then pages along an index: nothing for each row."""
    for number in range(5):
        lab.member(x=number)
    statements = Statements()
    statements.watch(lab.worker.state.sql.engine)
    assert lab.worker.reap().examined == 0
    assert len(statements.texts) == 2
    lab.pass_time(3 * LIFETIME)
    assert lab.worker.reap(batch_size=5).reaped == 5
    # The clock, two pages, and one deletion for each row that is dead.
    assert len(statements.texts) == 2 + 3 + 5


def test_a_user_is_revoked(lab: DatabaseLab) -> None:
    """All of one user's sessions end, and nobody else's."""
    users = [lab.member(x=n) for n in range(3)]
    other = User(lab.worker)
    other.changes(_user_id="77", x=1)
    with lab.worker.app.app_context():
        assert len(lab.worker.sessions.sessions_of(7)) == 3
        assert lab.worker.sessions.revoke_user(7) == 3
        assert lab.worker.sessions.sessions_of(7) == []
    assert [user.sees() for user in users] == [{}] * 3
    assert other.sees() == {"_user_id": "77", "x": 1}


def test_two_workers_and_one_session(lab: DatabaseLab) -> None:
    """Changes of different keys survive each other, with a sync in each request."""
    user = lab.member(x=0)
    other = user.at(lab.new_worker())
    for number in range(5):
        lab.pass_time(N + 1)
        jobs = [
            lab.start(lambda n=number: user.changes(left=n)),
            lab.start(lambda n=number: other.changes(right=n)),
        ]
        assert [job.result().status for job in jobs] == [200, 200]
    assert user.sees() == {"_user_id": "7", "x": 0, "left": 4, "right": 4}


# --- the application's transaction -----------------------------------------------


@pytest.mark.parametrize("level", ["READ COMMITTED", "SERIALIZABLE"])
@pytest.mark.parametrize("action", ["save", "log in", "log out"])
def test_the_applications_transaction_is_its_own(
    nodes: list[Memcached], table: ServerTable, level: str, action: str
) -> None:
    """A view that leaves its work uncommitted: ours is committed, its is not."""
    options = {"isolation_level": level}
    lab = DatabaseLab(nodes, table, SQLALCHEMY_ENGINE_OPTIONS=options)
    with opened(lab):
        db = lab.worker.app.extensions["sqlalchemy"]
        cart = sa.Table(new_table_name(), db.metadata, sa.Column("item", sa.String(20)))
        with lab.worker.app.app_context():
            cart.create(db.engine)
        user = lab.member(x=0) if action != "log in" else lab.visitor(x=0)

        def view(session: Any) -> int:
            db.session.execute(cart.insert(), {"item": "unpaid"})
            session["x"] = 1
            if action == "save":
                session.sync()
            elif action == "log in":
                session["_user_id"] = "7"
            else:
                session.clear()
            return int(db.session.scalar(sa.select(sa.func.count()).select_from(cart)))

        before = user.twin()
        answer = user.does(view)
        assert (answer.status, answer.data) == (200, 1)
        assert lab.row(before if action == "log out" else user) == (
            DEAD if action == "log out" else MEMBER
        )
        with lab.worker.app.app_context():
            assert db.session.execute(sa.select(cart)).all() == []
            for engine in db.engines.values():
                db.session.remove()
                engine.dispose()


# --- the database goes away ------------------------------------------------------


def test_a_hung_database_costs_a_few_timeouts(hasty: DatabaseLab) -> None:
    """Many requests that are due to write SQL, and only the first of them wait."""
    users = [member(hasty) for _ in range(12)]
    hasty.worker.state.store.rows._breaker = _patient_prober(hasty.worker)
    hasty.pass_time(N + 1)
    hasty.database_gone("freeze")
    answers = [in_time(user.changes(x=1)) for user in users]
    assert [answer.status for answer in answers] == [200] * 12
    waited = [answer for answer in answers if answer.seconds > SQL_TIMEOUT * 0.9]
    # Requests that were slow for another reason are possible, on a busy machine.
    assert len(waited) <= 6
    hasty.server.thaw()


def test_a_restart_in_mid_traffic(hasty: DatabaseLab) -> None:
    """The database is killed and started again, twice, under syncing requests."""
    users = [member(hasty) for _ in range(4)]
    over = threading.Event()
    counted, refused = [0] * len(users), [0] * len(users)

    def visits(index: int) -> list[Answer]:
        answers = []
        while not over.is_set():
            answers.append(users[index].counts())
            counted[index] += answers[-1].status == 200
        return answers

    def everybody_counted() -> bool:
        hasty.pass_time(N + 1)
        return all(now > before for now, before in zip(counted, then, strict=True))

    jobs = [hasty.start(lambda n=index: visits(n)) for index in range(len(users))]
    try:
        for step in ("kill", "heal", "kill", "heal", "freeze", "thaw"):
            then = list(counted)
            wait_until(everybody_counted, 20.0, "a change of each user")
            getattr(hasty.server, step)()
    finally:
        over.set()
    for index, job in enumerate(jobs):
        answers = [in_time(answer) for answer in job.result()]
        refused[index] = [answer.status for answer in answers].count(503)
        assert len(answers) == counted[index] + refused[index]
        # One may have met a write of its own that it had no answer to.
        assert refused[index] <= 6
    hasty.database_back()
    for user, acknowledged, lost in zip(users, counted, refused, strict=True):
        found = user.sees()["count"]
        assert acknowledged <= found <= acknowledged + lost


@pytest.mark.parametrize("slots", [1, 3])
def test_sql_concurrency_is_the_number_of_connections(
    nodes: list[Memcached], table: ServerTable, slots: int
) -> None:
    """However many requests need SQL at once; each of them has its turn."""
    config = {
        "RESILIENT_SESSION_SQL_CONCURRENCY": slots,
        "RESILIENT_SESSION_SQL_TIMEOUT": 20.0,
    }
    with opened(DatabaseLab(nodes, table, **config)) as lab:
        users = [lab.member() for _ in range(50)]
        for node in nodes:
            node.flush()
        lab.worker.state.sql.dispose()
        gate = lab.worker.state.store.rows._gate
        answers: list[Answer] = []
        threads = [
            threading.Thread(target=lambda user=user: answers.append(user.does(dict)))
            for user in users
        ]
        # The server takes its time to end those that were closed.
        wait_until(lambda: table.connections() == 0, 20.0, "no connection to be left")
        with table.held():
            for thread in threads:
                thread.start()
            wait_until(lambda: gate.waiting == 50 - slots, 20.0, "the others to wait")
            wait_until(lambda: table.connections() == slots, 20.0, "the connections")
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, table.connections())
        assert most <= slots
        assert [answer.status for answer in answers] == [200] * 50


def test_a_reaper_whose_database_goes_away(hasty: DatabaseLab) -> None:
    """The pass ends with a report and deletes nothing more; the next one does all."""
    for _ in range(3):
        member(hasty)
    hasty.pass_time(3 * LIFETIME)
    hasty.database_gone("kill")
    report = hasty.worker.reap()
    assert report.failed is not None
    assert hasty.server.uri not in report.failed
    hasty.database_back()
    assert hasty.worker.reap().reaped == 3


def test_the_database_is_away_when_the_application_starts(
    hasty: DatabaseLab,
) -> None:
    """Pages that need no SQL work, and the table is made when it is back."""
    user = member(hasty)
    hasty.database_gone("stop")
    late = hasty.new_worker(connected=False, RESILIENT_SESSION_TABLE=new_table_name())
    assert in_time(user.at(late).does(dict)).status in (200, 503)
    hasty.database_back()
    visitor = User(late)
    wait_until(lambda: visitor.logs_in("8").status == 200, 20.0, "a login")
    assert visitor.sees() == {"_user_id": "8"}


def _patient_prober(worker: Worker) -> Any:
    """A breaker as it is by default, whose probes are a second apart."""
    breaker = type(worker.state.store.rows._breaker)
    return breaker(first_pause=30.0, longest_pause=30.0)
