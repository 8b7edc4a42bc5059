"""A node that stays away, or SQL that does: what it costs, and nobody is logged out."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import pytest

from builders import Statements
from lab import HASTY_WITH_SQL, LIFETIME, NAMES, PATIENCE, Answer, Lab, User, new_lab
from lab_databases import LabDatabase
from servers import Memcached, wait_until

USERS: Final = 40
THREADS: Final = 4

#: For tests that count: on a busy machine, too, nobody takes a node for silent, and no
#: sync is due.
PATIENT: Final = {
    "RESILIENT_SESSION_NODE_TIMEOUT": 3.0,
    "RESILIENT_SESSION_SYNC_INTERVAL": 3600,
}

#: The node that stays away.
AWAY: Final = NAMES[1]

#: SQL statements by their first word.
Cost = Counter[str]


def looks(user: User) -> Answer:
    """One request that changes nothing."""
    return user.does(lambda session: session.get("count", 0))


class Served:
    """A worker that serves one request at a time, so that the cost of each is known.

    :param nodes: those that it is configured with.
    """

    def __init__(self, lab: Lab, nodes: Sequence[str]) -> None:
        addresses = {name: lab.servers[name].address for name in nodes}
        self.worker = lab.new_worker(addresses)
        # It has reached all of them, and knows the table.
        self.worker.settle()
        self._statements = Statements()
        self._statements.watch(self.worker.state.sql.engine)

    def homes(self, user: User) -> set[str]:
        """Where the session lives by this worker's configuration."""
        return set(self.worker.state.store.homes.ring.homes(user.session_key))

    def serve(self, user: User, *, changing: bool) -> tuple[Answer, Cost]:
        """The user counts or looks here; the answer, and what SQL was sent for it."""
        user.worker = self.worker
        self._statements.texts.clear()
        answer = user.counts() if changing else looks(user)
        return answer, Counter(text.split()[0] for text in self._statements.texts)


class Visitor:
    """A user of the traffic, who counts.

    :ivar homes: where the worker that served the last request keeps the session.
    :ivar count: how far the user has counted, as was acknowledged.
    :ivar ahead: the nodes hold changes that SQL has not been told.
    :ivar requests: how many were answered.
    :ivar cost: what they cost since :meth:`Traffic.take`.
    """

    def __init__(self, user: User, homes: set[str]) -> None:
        self.user = user
        self.homes = homes
        self.count = 0
        self.ahead = False
        self.requests = 0
        self.cost: Cost = Counter()


class Traffic:
    """Everybody counts and looks at two workers, in threads, until this is left.

    Each answer must show all that was acknowledged, and SQL must have been sent exactly
    what the answer takes.

    :param nodes: what the workers are configured with at first.
    :ivar workers: those that serve now.
    """

    def __init__(self, lab: Lab, nodes: Sequence[str]) -> None:
        self._lab = lab
        self.workers = [Served(lab, nodes) for _ in range(2)]
        self._queue = [threading.RLock() for _ in self.workers]
        self.visitors = [self._visitor() for _ in range(USERS)]
        self._dead: frozenset[str] = frozenset()
        #: Odd while a node dies: what a request meets then, nobody knows.
        self._epoch = 0
        self._over = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(n,)) for n in range(THREADS)
        ]

    def _visitor(self) -> Visitor:
        user = self._lab.member()
        return Visitor(user, self.workers[0].homes(user))

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        if self._errors:
            raise self._errors[0]

    # --- what happens meanwhile --------------------------------------------------

    def kill(self, name: str) -> None:
        """Let a node die in the middle of whatever goes on."""
        self._epoch += 1
        self._lab.servers[name].kill()
        self._dead |= {name}
        self._epoch += 1

    def start(self, name: str) -> None:
        """Start a node, empty, that no worker is configured with."""
        self._lab.servers[name].start()
        self._dead -= {name}

    def rollout(self, nodes: Sequence[str]) -> None:
        """Replace both workers by others on these nodes, one after the other.

        In between they differ. What :meth:`take` gives next was spent after the last
        one was replaced.
        """
        for number, turn in enumerate(self._queue):
            new = Served(self._lab, nodes)
            with turn:
                old, self.workers[number] = self.workers[number], new
                self.take()
            old.worker.close()
            self.await_everybody()

    def look(self, number: int, user: User) -> tuple[Any, Cost]:
        """What somebody else sees at one of the workers, and what it costs."""
        with self._queue[number]:
            answer, cost = self.workers[number].serve(user, changing=False)
        return answer.data, cost

    def await_everybody(self) -> None:
        """Return when everybody has begun and finished some requests from now on."""
        targets = [visitor.requests + 4 for visitor in self.visitors]

        def done() -> bool:
            requests = [visitor.requests for visitor in self.visitors]
            pairs = zip(requests, targets, strict=True)
            return bool(self._errors) or all(so_far >= aim for so_far, aim in pairs)

        wait_until(done, PATIENCE, "everybody to be served")

    def take(self) -> list[Cost]:
        """What each session has cost since this was last asked."""
        with contextlib.ExitStack() as queue:
            for turn in self._queue:
                queue.enter_context(turn)
            costs = [visitor.cost for visitor in self.visitors]
            for visitor in self.visitors:
                visitor.cost = Counter()
        return costs

    # --- how it is done ----------------------------------------------------------

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        try:
            while not self._over.is_set() and not self._errors:
                for visitor in self.visitors[number::THREADS]:
                    self._visit(visitor, chance)
        except BaseException as error:  # noqa: BLE001 - raised where this is left
            self._errors.append(error)

    def _visit(self, visitor: Visitor, chance: random.Random) -> None:
        number, changing = chance.randrange(2), chance.random() < 0.5
        with self._queue[number]:
            served = self.workers[number]
            epoch, expected = self._epoch, self._cost(visitor, served, changing)
            answer, cost = served.serve(visitor.user, changing=changing)
            visitor.cost += cost
        visitor.count += changing
        visitor.homes = served.homes(visitor.user)
        assert (answer.status, answer.data) == (200, visitor.count)
        if epoch == self._epoch and epoch % 2 == 0:
            assert cost == expected, f"{served.homes(visitor.user)}, {self._dead} away"
        visitor.ahead = not cost["UPDATE"] and (visitor.ahead or changing)
        visitor.requests += 1

    def _cost(self, visitor: Visitor, served: Served, changing: bool) -> Cost:
        """What SQL has to be sent for a request."""
        homes = served.homes(visitor.user)
        if len(homes) == 2 and homes == visitor.homes and not homes & self._dead:
            return Counter()
        # One node alone tells SQL at once what it did not hear from a pair.
        made_up_for = len(homes) == 1 and visitor.ahead
        return Counter(SELECT=1, UPDATE=int(changing or made_up_for))


# --- a node is taken out of the configuration ------------------------------------


def assert_settles(traffic: Traffic) -> list[int]:
    """After a rollout each session costs one SELECT at most, and then none.

    :returns: how many each did cost.
    """
    costs = traffic.take()
    selects = [cost["SELECT"] for cost in costs]
    assert set(selects) <= {0, 1}
    assert all(cost["UPDATE"] <= cost["SELECT"] for cost in costs)
    traffic.await_everybody()
    assert traffic.take() == [Counter()] * USERS
    return selects


def test_a_node_that_stays_away_is_taken_out_under_traffic(
    three_nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """One rollout of two workers; each of its sessions costs one SELECT, then none."""
    with new_lab(three_nodes, lab_database, **PATIENT) as lab:
        traffic = Traffic(lab, NAMES)
        hit = [AWAY in visitor.homes for visitor in traffic.visitors]
        assert set(hit) == {True, False}
        # Who makes no request while all of it happens.
        resting = [lab.member(count=7) for _ in range(USERS)]
        costs = [int(AWAY in traffic.workers[0].homes(user)) for user in resting]
        with traffic:
            traffic.await_everybody()
            assert traffic.take() == [Counter()] * USERS
            traffic.kill(AWAY)
            traffic.await_everybody()
            assert [cost["SELECT"] > 0 for cost in traffic.take()] == hit
            traffic.rollout([name for name in NAMES if name != AWAY])
            selects = assert_settles(traffic)
            assert any(selects)
            pairs = zip(selects, hit, strict=True)
            assert not any(count for count, is_hit in pairs if not is_hit)
            for user, cost in zip(resting, costs, strict=True):
                assert traffic.look(0, user) == (7, Counter(SELECT=cost))
                assert traffic.look(1, user) == (7, Counter())
            traffic.start(AWAY)
            traffic.rollout(NAMES)
            assert any(assert_settles(traffic))


def test_of_two_nodes_one_is_left_and_the_other_comes_back(
    nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """SQL is asked at each request meanwhile, and then once more for each session."""
    both = NAMES[:2]
    with new_lab(nodes, lab_database, **PATIENT) as lab:
        traffic = Traffic(lab, both)
        resting = [lab.member(count=7) for _ in range(USERS)]
        with traffic:
            traffic.await_everybody()
            assert traffic.take() == [Counter()] * USERS
            traffic.kill(AWAY)
            traffic.await_everybody()
            traffic.rollout([name for name in both if name != AWAY])
            traffic.await_everybody()
            # At each request, as each of them was checked for.
            assert all(cost["SELECT"] >= 4 for cost in traffic.take())
            traffic.start(AWAY)
            traffic.rollout(both)
            assert any(assert_settles(traffic))
            for user in resting:
                # Its homes are the same again, and one of them is empty.
                assert traffic.look(0, user) == (7, Counter(SELECT=1))
                assert traffic.look(1, user) == (7, Counter())


# --- SQL stays away --------------------------------------------------------------


@pytest.mark.parametrize("reaper_first", [True, False], ids=["reaper", "user"])
@pytest.mark.parametrize("kind", ["gone", "locked"])
@pytest.mark.each_value
def test_who_goes_on_reading_outlives_a_silent_sql(
    nodes: list[Memcached], lab_database: LabDatabase, kind: str, reaper_first: bool
) -> None:
    """For three lifetimes; then SQL is told what it missed, whoever comes first."""
    with new_lab(nodes, lab_database, **HASTY_WITH_SQL) as lab:
        reader, idle = lab.member(x=0), lab.member()
        assert reader.changes(x=1).status == 200
        everything = {"_user_id": "7", "x": 1}
        lab.sql_gone() if kind == "gone" else lab.sql_locked()
        for _ in range(3):
            lab.pass_time(LIFETIME - 1)
            assert reader.sees() == everything
        assert idle.twin().sees() == 503, "nobody can say"
        lab.sql_back() if kind == "gone" else lab.sql_unlocked()
        lab.settle()
        assert lab.row(reader) == {"_user_id": "7", "x": 0}
        if reaper_first:
            report = lab.worker.reap()
            assert (report.renewed, report.reaped, report.unchecked) == (1, 1, 0)
            assert lab.row(reader) == everything
        assert reader.sees() == everything
        assert idle.sees() == {}
        row = lab.raw_row(reader)
        assert row is not None
        assert row["expires_at"] > lab.now_ms() + (LIFETIME - 60) * 1000
        for server in lab.servers.values():
            server.restart()
        lab.settle()
        assert reader.sees() == everything


# --- an idle lifetime, and the reaper --------------------------------------------


@pytest.fixture
def lab_of_lifetime(
    nodes: list[Memcached],
    lab_database: LabDatabase,
    monkeypatch: pytest.MonkeyPatch,
    lifetime: int,
    interval: int,
) -> Iterator[Lab]:
    """A lab whose clock goes forward when a test says so, and not by itself."""
    config = PATIENT | {
        "PERMANENT_SESSION_LIFETIME": lifetime,
        "RESILIENT_SESSION_SYNC_INTERVAL": interval,
        "RESILIENT_SESSION_REAP_GRACE": 0,
    }
    began_ms = time.time_ns() // 1_000_000
    monkeypatch.setattr(Lab, "now_ms", lambda lab: began_ms + lab._offset_ms)
    with new_lab(nodes, lab_database, **config) as lab:
        yield lab


@pytest.mark.parametrize("lifetime", [30, 1800, 60 * 24 * 3600])
@pytest.mark.parametrize("interval", [120, 0])
def test_no_row_is_reaped_of_a_session_that_can_still_be_used(
    lab_of_lifetime: Lab, lifetime: int, interval: int
) -> None:
    """However late its uses are recorded, and if its row is all that is left of it."""
    lab = lab_of_lifetime
    unrecorded = 0.9 * lab.worker.state.settings.timing(lifetime).slack_ms / 1000
    user = lab.member()
    for _ in range(3):
        lab.pass_time(unrecorded)
        assert user.sees() == {"_user_id": "7"}
        lab.pass_time(lifetime - 0.5)
        report = lab.worker.reap()
        assert (report.aborted, report.reaped, report.unchecked) == (None, 0, 0)
        for server in lab.servers.values():
            server.restart()
        lab.settle()
        assert user.sees() == {"_user_id": "7"}
    lab.pass_time(lifetime + 2 * unrecorded)
    assert user.sees() == {}
    lab.pass_time(2 * unrecorded)
    assert lab.worker.reap().reaped == 1
