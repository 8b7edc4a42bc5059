"""Many requests at once for one session, and nodes that fail meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from lab import (
    DEAD,
    FIRST,
    MOVED,
    PATIENCE,
    SECOND,
    Lab,
    N,
    User,
    Worker,
    each_home,
    new_lab,
)
from lab_databases import LabDatabase
from servers import Memcached, wait_until

#: Which home it is, or how it is lost, makes no difference to a database.
pytestmark = pytest.mark.each_value

THREADS = 4
TIMES = 25

#: A change that meets concurrent ones too often is a 503. It is rare, and a client that
#: tries again gets through.
REFUSALS = 10
PATIENT_TRIES = 10


class Crowd:
    """Threads that each count up a key of their own in one session.

    :ivar acknowledged: key -> the last number that was answered with 200.
    :ivar done: key -> how many were; one that is refused is tried again.
    :ivar statuses: of the answers that were not.
    """

    def __init__(self, lab: Lab, user: User, workers: Sequence[Worker]) -> None:
        self.acknowledged = {f"k{number}": 0 for number in range(THREADS)}
        self.done = dict.fromkeys(self.acknowledged, 0)
        self.statuses: list[int] = []
        self._starting = threading.Barrier(THREADS)
        self._done = [
            lab.start(partial(self._count, key, user.at(worker)))
            for key, worker in zip(self.acknowledged, workers * THREADS, strict=False)
        ]

    def _count(self, key: str, visitor: User) -> None:
        self._starting.wait(PATIENCE)
        refused = 0
        while refused < PATIENT_TRIES and self.done[key] < TIMES:
            answer = visitor.counts(key)
            if answer.status != 200:
                self.statuses.append(answer.status)
                refused += 1
                continue
            known = self.acknowledged[key]
            # One that was refused may have reached some of the places.
            assert known < answer.data <= known + 1 + refused, "a lost update"
            self.acknowledged[key] = answer.data
            self.done[key] += 1
            refused = 0

    @property
    def total(self) -> int:
        """How many increments were acknowledged so far."""
        return sum(self.done.values())

    def reaches(self, total: int) -> None:
        """Return when this many are done."""
        wait_until(lambda: self.total >= total, 4 * PATIENCE, f"{total} increments")

    def finishes(self) -> None:
        """Wait for all threads."""
        for done in self._done:
            done.result(4 * PATIENCE)


HALF = THREADS * TIMES // 2


def _in_the_end(lab: Lab, user: User, crowd: Crowd) -> dict[str, Any]:
    """Every acknowledged increment is there for everybody, on both homes."""
    assert len(crowd.statuses) <= REFUSALS
    assert set(crowd.statuses) <= {503}
    assert crowd.total == THREADS * TIMES
    everything = {"_user_id": "7", **crowd.acknowledged}
    lab.settle()
    assert user.sees() == everything
    assert lab.copies(user) == [everything, everything]
    return everything


# --- different keys --------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_healthy(lab: Lab, workers: int) -> None:
    """Threads that count in one session lose no increment."""
    user = lab.member()
    others = [lab.new_worker() for _ in range(workers - 1)]
    crowd = Crowd(lab, user, [lab.worker, *others])
    crowd.finishes()
    _in_the_end(lab, user, crowd)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("verb", ["kill", "restart", "evict"])
@each_home
def test_home_lost_half_way(lab: Lab, home: str, verb: str, workers: int) -> None:
    """Increments go on without loss while a home is lost under them."""
    user = lab.member()
    others = [lab.new_worker() for _ in range(workers - 1)]
    crowd = Crowd(lab, user, [lab.worker, *others])
    crowd.reaches(HALF)
    getattr(lab, verb)(user, home)
    crowd.finishes()
    if verb == "kill":
        assert lab.row(user) == {"_user_id": "7", **crowd.acknowledged}
        lab.restart(user, home)
    _in_the_end(lab, user, crowd)


@each_home
def test_home_frozen_half_way(
    nodes: list[Memcached], lab_database: LabDatabase, home: str
) -> None:
    """Increments go on without loss while a home hangs and comes back."""
    config = {"RESILIENT_SESSION_NODE_TIMEOUT": 0.2}
    with new_lab(nodes, lab_database, **config) as lab:
        user = lab.member()
        crowd = Crowd(lab, user, [lab.worker])
        crowd.reaches(HALF // 2)
        lab.freeze(user, home)
        crowd.reaches(HALF)
        lab.node(user, home).thaw()
        crowd.finishes()
        _in_the_end(lab, user, crowd)


@each_home
def test_home_restarted_again_and_again(lab: Lab, home: str) -> None:
    """Increments go on without loss while a home forgets all, several times."""
    user = lab.member()
    crowd = Crowd(lab, user, [lab.worker])
    for total in range(10, THREADS * TIMES, 15):
        crowd.reaches(total)
        lab.restart(user, home)
    crowd.finishes()
    _in_the_end(lab, user, crowd)


@each_home
def test_one_worker_cut_off_half_way(lab: Lab, home: str) -> None:
    """Increments by a worker with both homes and by one with a single one all stay."""
    user = lab.member()
    worker, wires = lab.wired_worker()
    crowd = Crowd(lab, user, [lab.worker, worker])
    crowd.reaches(HALF // 2)
    wires[lab.name(user, home)].refuse()
    crowd.reaches(HALF)
    wires[lab.name(user, home)].mend()
    crowd.finishes()
    _in_the_end(lab, user, crowd)


def test_sync_due_for_all_at_once(lab: Lab) -> None:
    """Requests that all come when a sync is due do not fail."""
    user = lab.member()
    lab.pass_time(N)
    crowd = Crowd(lab, user, [lab.worker])
    crowd.finishes()
    everything = _in_the_end(lab, user, crowd)
    lab.pass_time(N)
    assert user.sees() == everything
    assert lab.row(user) == everything


def test_sql_lost_half_way(lab: Lab) -> None:
    """Increments go on in memory while SQL is gone though syncs are due."""
    user = lab.member()
    crowd = Crowd(lab, user, [lab.worker])
    crowd.reaches(HALF // 2)
    lab.pass_time(N)
    lab.sql_gone()
    crowd.reaches(HALF)
    lab.sql_back()
    crowd.finishes()
    lab.pass_time(N)
    everything = _in_the_end(lab, user, crowd)
    assert lab.row(user) == everything


def test_visitor_comes_back_several_times_at_once(lab: Lab) -> None:
    """A session without a row gets one row, whoever of a crowd inserts it."""
    user = lab.visitor(cart="a")
    crowd = Crowd(lab, user, [lab.worker])
    crowd.finishes()
    assert len(crowd.statuses) <= REFUSALS
    assert user.sees() == {"cart": "a", **crowd.acknowledged}
    lab.pass_time(N)
    assert user.sees() == {"cart": "a", **crowd.acknowledged}
    assert lab.row(user) == {"cart": "a", **crowd.acknowledged}


@each_home
def test_visitor_comes_back_while_a_home_is_lost(lab: Lab, home: str) -> None:
    """The same with a home lost before anybody came back."""
    user = lab.visitor(cart="a")
    lab.kill(user, home)
    crowd = Crowd(lab, user, [lab.worker])
    crowd.finishes()
    assert len(crowd.statuses) <= REFUSALS
    assert user.sees() == {"cart": "a", **crowd.acknowledged}
    assert lab.row(user) == {"cart": "a", **crowd.acknowledged}


def test_key_deleted_meanwhile(lab: Lab) -> None:
    """A key that one request removes stays removed, whatever others write."""
    user = lab.member(basket="full")
    request = lab.in_flight(user.twin(), lambda session: session.update(k=1))
    assert user.does(lambda session: session.pop("basket")).status == 200
    assert request.finish().status == 200
    assert lab.worker.stats["conflicts"] == 1
    everything = {"_user_id": "7", "k": 1}
    assert user.sees() == everything
    assert lab.copies(user) == [everything, everything]


@each_home
def test_key_deleted_and_a_home_back(lab: Lab, home: str) -> None:
    """A removed key does not come back with a home's old copy."""
    user = lab.member(basket="full")
    old = lab.raw(user, home) or b""
    assert user.does(lambda session: session.pop("basket")).status == 200
    lab.put(user, home, old)
    assert user.sees() == {"_user_id": "7"}
    assert lab.copies(user) == [{"_user_id": "7"}] * 2


# --- one key ---------------------------------------------------------------------


def _insists(visitor: User, name: object) -> int:
    """Write one key again and again, each time until it is kept; the refusals."""
    refused = 0
    for turn in range(TIMES):
        while visitor.changes(key=[name, turn]).status != 200:
            refused += 1
            assert refused <= REFUSALS
    return refused


@pytest.mark.parametrize("workers", [1, 2])
def test_same_key(lab: Lab, workers: int) -> None:
    """Requests that race for one key leave one of their last values, everywhere."""
    user = lab.member()
    others = [lab.new_worker() for _ in range(workers - 1)]
    starting = threading.Barrier(THREADS)

    def race(number: int, visitor: User) -> int:
        starting.wait(PATIENCE)
        return _insists(visitor, number)

    places = ([lab.worker, *others] * THREADS)[:THREADS]
    runs = [lab.start(partial(race, n, user.at(w))) for n, w in enumerate(places)]
    assert sum(run.result(4 * PATIENCE) for run in runs) <= REFUSALS
    value = user.sees()["key"]
    assert value[1] == TIMES - 1
    assert [copy["key"] for copy in lab.copies(user)] == [value, value]
    for worker in others:
        assert user.at(worker).sees()["key"] == value


@each_home
def test_same_key_by_workers_that_see_different_homes(lab: Lab, home: str) -> None:
    """A race between a worker with one home and one with both has one outcome."""
    user = lab.member()
    worker, wires = lab.wired_worker()
    wires[lab.name(user, home)].refuse()
    remote = user.at(worker)
    starting = threading.Barrier(2)

    def race(name: str, visitor: User) -> int:
        starting.wait(PATIENCE)
        return _insists(visitor, name)

    runs = [
        lab.start(lambda: race("local", user.twin())),
        lab.start(lambda: race("remote", remote)),
    ]
    assert sum(run.result(4 * PATIENCE) for run in runs) <= REFUSALS
    value = user.sees()["key"]
    assert value[1] == TIMES - 1
    assert remote.sees()["key"] == value
    assert [copy["key"] for copy in lab.copies(user)] == [value, value]


# --- with an end -----------------------------------------------------------------


def _until_refused(visitor: User, ended: threading.Event) -> list[Any]:
    """Change and read, again and again, until a while after the end."""
    seen_after = []
    for number in range(10_000):
        over = ended.is_set()
        visitor.twin().changes(**{f"late{number}": number})
        seen = visitor.sees()
        if over:
            seen_after.append(seen)
        if len(seen_after) == 5:
            break
    return seen_after


@pytest.mark.parametrize("workers", [1, 2])
def test_logout_in_a_crowd(lab: Lab, workers: int) -> None:
    """Nobody is served a session after its logout was answered, however busy it is."""
    user = lab.member(x=1)
    late = user.twin()
    others = [lab.new_worker() for _ in range(workers - 1)]
    places = ([lab.worker, *others] * THREADS)[:THREADS]
    ended = threading.Event()
    runs = [lab.start(partial(_until_refused, user.at(w), ended)) for w in places]
    assert user.logs_out().status == 200
    ended.set()
    for run in runs:
        assert run.result(4 * PATIENCE) == [{}] * 5
    assert [*lab.copies(late), lab.row(late)] == [DEAD] * 3


def test_regenerate_in_a_crowd(lab: Lab) -> None:
    """What others had acknowledged before a new id was made is there under it."""
    for _ in range(10):
        user = lab.member()
        late = user.twin()
        starting = threading.Barrier(THREADS)

        def count(key: str, visitor: User, starting: Any = starting) -> int:
            starting.wait(PATIENCE)
            for number in range(TIMES):
                answer = visitor.changes(**{key: number + 1})
                if answer.status != 200 or answer.set_cookie is None:
                    # Refused; or dropped, since the id had moved.
                    return number
            return TIMES

        runs = {
            key: lab.start(partial(count, key, user.twin()))
            for key in ("k0", "k1", "k2")
        }
        starting.wait(PATIENCE)
        assert user.regenerates().status == 200
        counted = {key: run.result(4 * PATIENCE) for key, run in runs.items()}
        seen = user.sees()
        for key, number in counted.items():
            assert seen.get(key, 0) >= number, (key, counted, seen)
        assert lab.row(late) == MOVED
        assert late.sees() == {}


def test_logins_at_once(lab: Lab) -> None:
    """Of several logins at once under one id each gets a session, and the id dies."""
    user = lab.visitor(cart="a")
    late = user.twin()
    starting = threading.Barrier(THREADS)

    def logs_in(number: int) -> User:
        def action(session: Any) -> None:
            dict(session)
            # Who loads it when another login has moved it away finds nothing in it.
            starting.wait(PATIENCE)
            session["_user_id"] = str(number)

        visitor = late.twin()
        assert visitor.does(action).status == 200
        return visitor

    runs = [lab.start(partial(logs_in, n)) for n in range(THREADS)]
    users = [run.result(4 * PATIENCE) for run in runs]
    assert len({visitor.cookie for visitor in users}) == THREADS
    for number, visitor in enumerate(users):
        assert visitor.sees() == {"cart": "a", "_user_id": str(number)}
    assert late.sees() == {}
    assert lab.row(late) == MOVED


# --- bounds ----------------------------------------------------------------------


def _same_moment(lab: Lab, count: int, act: Callable[[int], int]) -> list[int]:
    starting = threading.Barrier(count)

    def run(number: int) -> int:
        starting.wait(PATIENCE)
        return act(number)

    runs = [lab.start(partial(run, n)) for n in range(count)]
    return [run.result(4 * PATIENCE) for run in runs]


def test_crowd_at_a_frozen_node(
    nodes: list[Memcached], lab_database: LabDatabase
) -> None:
    """A hung node costs a crowd three timeouts and those in flight, and no more."""
    config = {
        "RESILIENT_SESSION_NODE_TIMEOUT": 0.3,
        "RESILIENT_SESSION_NODE_RETRY": 60.0,
        "RESILIENT_SESSION_NODE_RETRY_MAX": 60.0,
    }
    with new_lab(nodes, lab_database, **config) as lab:
        user = lab.member(x=1)
        lab.freeze(user, FIRST)
        for _ in range(3):
            seen = _same_moment(lab, THREADS, lambda _: user.twin().does(dict).status)
            assert seen == [200] * THREADS
        assert lab.worker.stats["node_faults"] <= 3 + THREADS
        assert lab.copy(user, SECOND) == {"_user_id": "7", "x": 1}
