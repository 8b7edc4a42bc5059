"""What SQL has to bear while a node is down, and that it is never more."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import pytest
import sqlalchemy as sa

from lab import FIRST, NAMES, PATIENCE, SECOND, Answer, Lab, N, User, Worker, new_lab
from lab_databases import LabDatabase, only_sqlite
from servers import Memcached, wait_until

#: Sessions on the ring: a number at which every pair of homes has many. On servers,
#: which are to get the same statements, a number at which each pair has some.
SESSIONS: Final = {"sqlite": 1000, "postgresql": 300, "mysql": 300}

#: For tests that count: on a busy machine, too, nobody gives up and asks SQL instead.
PATIENT: Final = {
    "RESILIENT_SESSION_NODE_TIMEOUT": 10.0,
    "RESILIENT_SESSION_SQL_TIMEOUT": 10.0,
}

#: For tests that fill the places for SQL.
FEW_PLACES: Final = {"RESILIENT_SESSION_SQL_CONCURRENCY": 2}
NO_PATIENCE: Final = {**FEW_PLACES, "RESILIENT_SESSION_SQL_TIMEOUT": 0.5}


class Statements:
    """The SQL statements of one worker, by session.

    :ivar hold: while this is set, statements for these sessions wait.
    :ivar verbs: of all statements, in order.
    """

    def __init__(self, worker: Worker) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.verbs: list[str] = []
        self.by_key_only = True
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self.held = 0
        self._go_on = threading.Event()
        sql = worker.state.sql
        self._by_primary_key = f"WHERE {sql.table.name}.session_key = "
        self._engine = sql.engine
        sa.event.listen(self._engine, "before_cursor_execute", self._note)

    def take(self) -> Counter[tuple[str, str]]:
        """Those since the last call: (verb, session key) -> how many."""
        with self._lock:
            counts, self.counts = self.counts, Counter()
        return counts

    @contextlib.contextmanager
    def holding(self, *users: User) -> Iterator[None]:
        """Statements for these users' sessions wait until this is left."""
        self._go_on.clear()
        self._held = {user.session_key for user in users}
        try:
            yield
        finally:
            self._held = set()
            self.held = 0
            self._go_on.set()

    def _note(self, *event: Any) -> None:
        statement, parameters = event[2], event[3]
        verb = statement.split()[0]
        # Some drivers take them by name.
        values = parameters.values() if isinstance(parameters, dict) else parameters
        keys = [value for value in values if _is_key(value)]
        if not keys:
            return
        with self._lock:
            self.verbs.append(verb)
            self.counts[verb, keys[0]] += 1
            if verb == "SELECT" and self._by_primary_key not in statement:
                self.by_key_only = False
            waits = keys[0] in self._held
            self.held += waits
        if waits:
            assert self._go_on.wait(PATIENCE)


def _is_key(parameter: object) -> bool:
    return isinstance(parameter, str) and len(parameter) == 64


def everybody(
    lab: Lab, users: Sequence[User], does: Callable[[User], Answer]
) -> list[Answer]:
    """Everybody does something, eight at a time."""
    futures = [lab.start(lambda user=user: does(user)) for user in users]
    answers = [future.result(PATIENCE) for future in futures]
    assert {answer.status for answer in answers} == {200}
    return answers


def one_by_one(users: Sequence[User], does: Callable[[User], Answer]) -> None:
    """Everybody does something, each when the last is done.

    Among concurrent writers one may find no connection that is older than what it
    read; it reads again then, and SQL is asked once more.
    """
    assert {does(user).status for user in users} == {200}


def reads(user: User) -> Answer:
    """One request that changes nothing."""
    return user.does(dict)


def writes(user: User) -> Answer:
    """One request that changes something."""
    return user.counts()


def homes(lab: Lab, user: User) -> set[str]:
    """The names of the session's homes."""
    return {lab.name(user, FIRST), lab.name(user, SECOND)}


class NodeDown:
    """Many users, and one of three nodes that is down.

    :ivar hit: the keys of the sessions that live on that node.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        sessions = SESSIONS[lab.database.dialect]
        self.users = [lab.member(number=number) for number in range(sessions)]
        everybody(lab, self.users, reads)
        self._down = NAMES[0]
        lab.servers[self._down].kill()
        self.hit = [u.session_key for u in self.users if self._down in homes(lab, u)]
        assert sessions // 3 < len(self.hit) < sessions
        self.statements = Statements(lab.worker)

    def each(self, *verbs: str) -> dict[tuple[str, str], int]:
        """One statement of each kind for each session that lives on the node."""
        return {(verb, key): 1 for key in self.hit for verb in verbs}

    def ends(self) -> None:
        """Everybody has what was written once, and SQL is left alone again."""
        assert self.statements.by_key_only
        for number, answer in enumerate(everybody(self._lab, self.users, reads)):
            assert answer.data == {"_user_id": "7", "number": number, "count": 1}
        self._lab.servers[self._down].start()
        self._lab.settle()
        everybody(self._lab, self.users, reads)
        self.statements.take()
        everybody(self._lab, self.users, reads)
        assert self.statements.take() == {}


def test_only_the_sessions_of_a_dead_node_cost_sql(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """One SELECT by primary key for each of their requests, one write if it changes."""
    with new_lab(three_nodes, lab_database, **PATIENT) as lab:
        outage = NodeDown(lab)
        statements = outage.statements
        everybody(lab, outage.users, reads)
        assert statements.take() == outage.each("SELECT")
        one_by_one(outage.users, writes)
        assert statements.take() == outage.each("SELECT", "UPDATE")
        everybody(lab, outage.users, reads)
        assert statements.take() == outage.each("SELECT")
        outage.ends()


def test_a_herd_is_served(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """Both copies of a popular session are lost: who comes meanwhile waits his turn."""
    with new_lab(three_nodes, lab_database, **PATIENT, **FEW_PLACES) as lab:
        user = lab.member(colour="red")
        for role in (FIRST, SECOND):
            lab.evict(user, role)
        statements = Statements(lab.worker)
        with statements.holding(user):
            herd = [lab.start(lambda: reads(user.twin())) for _ in range(8)]
            wait_until(lambda: statements.held == 2, PATIENCE, "all places to be taken")
        answers = [future.result(PATIENCE) for future in herd]
        assert [a.data for a in answers] == [{"_user_id": "7", "colour": "red"}] * 8
        assert 2 <= statements.take()["SELECT", user.session_key] <= 8
        assert lab.copies(user) == [{"_user_id": "7", "colour": "red"}] * 2
        reads(user)
        assert statements.take() == {}


# --- all places for SQL are taken, for longer than a call may last ---------------
# On SQLite only: on a server whoever is late is hung up on, and the place is free.


@contextlib.contextmanager
def places_taken(lab: Lab, statements: Statements) -> Iterator[None]:
    """Two requests ask SQL for as long as this lasts: all the places there are."""
    users = [lab.member() for _ in range(2)]
    for user in users:
        lab.evict(user, FIRST)
    with statements.holding(*users):
        waiting = [lab.start(lambda user=user: reads(user)) for user in users]
        wait_until(lambda: statements.held == 2, PATIENCE, "all places to be taken")
        yield
    assert {future.result(PATIENCE).status for future in waiting} == {200}


@only_sqlite
@pytest.mark.parametrize("lost", [[FIRST, SECOND], [FIRST]], ids=["both", "one"])
def test_past_the_bound_a_request_waits_and_is_refused(
    lost: list[str], three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """It waits for a place as long as for a lock, and is then asked to come again."""
    with new_lab(three_nodes, lab_database, **NO_PATIENCE) as lab:
        user = lab.member(colour="red")
        statements = Statements(lab.worker)
        with places_taken(lab, statements):
            for role in lost:
                lab.evict(user, role)
            answer = reads(user)
            assert answer.status == 503
            assert answer.retry_after is not None
            assert answer.set_cookie is None
            assert 0.4 < answer.seconds < 4
            assert statements.take()["SELECT", user.session_key] == 0
        assert user.sees() == {"_user_id": "7", "colour": "red"}


@only_sqlite
def test_past_the_bound_a_due_sync_is_put_off(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """A session that its homes agree on is served at once, and synced later."""
    with new_lab(three_nodes, lab_database, **NO_PATIENCE) as lab:
        user = lab.member(colour="red")
        user.changes(colour="blue")
        statements = Statements(lab.worker)
        with places_taken(lab, statements):
            lab.pass_time(N + 1)
            put_off = lab.worker.stats["syncs_put_off"]
            answer = user.changes(colour="green")
            assert answer.status == 200
            assert answer.seconds < 0.4
            assert lab.worker.stats["syncs_put_off"] == put_off + 1
            assert lab.row(user)["colour"] == "red"
        reads(user)
        assert lab.row(user)["colour"] == "green"


@only_sqlite
@pytest.mark.parametrize(
    ("interval", "after"), [(N, 2 * N + 1), (0, 0)], ids=["late", "every change"]
)
def test_past_the_bound_a_late_sync_waits_its_turn(
    interval: int,
    after: int,
    three_nodes: list[Memcached],
    lab_database: LabDatabase,
) -> None:
    """One that is late by another interval is not put off for ever by a crowd."""
    config = {**FEW_PLACES, "RESILIENT_SESSION_SQL_TIMEOUT": PATIENCE}
    config["RESILIENT_SESSION_SYNC_INTERVAL"] = interval
    with new_lab(three_nodes, lab_database, **config) as lab:
        user = lab.member(colour="red")
        statements = Statements(lab.worker)
        gate = lab.worker.state.store.rows._gate
        with places_taken(lab, statements):
            lab.pass_time(after)
            change = lab.start(lambda: user.changes(colour="blue"))
            wait_until(lambda: gate.waiting == 1, PATIENCE, "the sync to wait")
            assert lab.row(user)["colour"] == "red"
        assert change.result(PATIENCE).status == 200
        assert lab.row(user)["colour"] == "blue"
        assert lab.worker.stats["syncs_put_off"] == 0


@only_sqlite
def test_a_login_is_not_kept_waiting_by_reads(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """Of fifty reads that wait for SQL none is served before it."""
    config = {
        "RESILIENT_SESSION_SQL_CONCURRENCY": 1,
        "RESILIENT_SESSION_SQL_TIMEOUT": PATIENCE,
    }
    with new_lab(three_nodes, lab_database, **config) as lab:
        first, *readers = [lab.member() for _ in range(51)]
        visitor = lab.visitor()
        for user in (first, *readers):
            lab.evict(user, FIRST)
        statements = Statements(lab.worker)
        gate = lab.worker.state.store.rows._gate
        answers: list[Answer] = []
        threads = [
            threading.Thread(target=lambda user=user: answers.append(reads(user)))
            for user in readers
        ]
        with statements.holding(first):
            held = lab.start(lambda: reads(first))
            wait_until(lambda: statements.held == 1, PATIENCE, "the place to be taken")
            for thread in threads:
                thread.start()
            wait_until(lambda: gate.waiting == 50, PATIENCE, "the reads to wait")
            login = threading.Thread(
                target=lambda: answers.append(visitor.logs_in("9"))
            )
            threads.append(login)
            login.start()
            wait_until(lambda: gate.waiting == 51, PATIENCE, "the login to wait")
            statements.verbs.clear()
        for thread in threads:
            thread.join(PATIENCE)
        assert held.result(PATIENCE).status == 200
        assert {answer.status for answer in answers} == {200}
        assert len(answers) == 51
        # The first of all statements is the login's.
        assert statements.verbs[0] == "INSERT"
        assert set(statements.verbs[2:]) == {"SELECT"}


@only_sqlite
def test_a_session_of_its_own_is_not_held_up_by_the_bound(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """With all places taken, who needs no SQL notices nothing."""
    with new_lab(three_nodes, lab_database, **NO_PATIENCE) as lab:
        user = lab.member()
        with places_taken(lab, Statements(lab.worker)):
            before = lab.worker.stats["loaded_from_memory"]
            assert user.counts().status == 200
            assert lab.worker.stats["loaded_from_memory"] == before + 1
