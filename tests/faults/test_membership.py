"""Nodes come and go: restarted in turn, added, removed, replaced, half rolled out."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

import pytest

from lab import NAMES, PATIENCE, Lab, N, User, Worker, each_home, new_lab
from lab_databases import LabDatabase
from servers import Memcached, MemcachedPool, wait_until

USERS: Final = 40

#: The node that is added to the others.
NEW: Final = "delta"


class Counting:
    """Users who count, each alone in a session of its own: no step may be missing.

    :ivar steps: how far each has counted.
    """

    def __init__(self, lab: Lab, count: int = USERS) -> None:
        self.users = [lab.member(name=f"user{number}") for number in range(count)]
        self.steps = [0] * count

    def __len__(self) -> int:
        return len(self.users)

    def step(self, number: int, worker: Worker) -> None:
        """One user counts, and sees that nothing before was lost."""
        user = self.users[number]
        user.worker = worker
        answer = user.counts()
        assert answer.status == 200, answer
        self.steps[number] += 1
        assert answer.data == self.steps[number], f"at {worker.nodes}"  # type: ignore[attr-defined]

    def everybody(self, *workers: Worker) -> None:
        """Everybody counts at each of these workers in turn."""
        for worker in workers:
            for number in range(len(self)):
                self.step(number, worker)

    def everybody_sees(self, worker: Worker) -> None:
        """Everybody looks, and sees their own session and all of it."""
        for number, user in enumerate(self.users):
            expected: dict[str, Any] = {"_user_id": "7", "name": f"user{number}"}
            if self.steps[number]:
                expected["count"] = self.steps[number]
            assert user.at(worker).sees() == expected


class Load:
    """Everybody counts again and again, in threads, until this is left."""

    def __init__(
        self, counting: Counting, workers: Sequence[Worker], threads: int = 4
    ) -> None:
        self._counting = counting
        self._workers = itertools.cycle(workers)
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(range(t, len(counting), threads),))
            for t in range(threads)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        if self._errors:
            raise self._errors[0]

    def await_everybody(self) -> None:
        """Return when everybody has begun and finished a request from now on."""
        # The first of the two may have been under way already.
        targets = [step + 2 for step in self._counting.steps]

        def done() -> bool:
            steps = self._counting.steps
            return bool(self._errors) or all(
                step >= target for step, target in zip(steps, targets, strict=True)
            )

        wait_until(done, PATIENCE, "everybody to count")

    def _run(self, numbers: Sequence[int]) -> None:
        try:
            while not self._over.is_set():
                for number in numbers:
                    with self._turn:
                        worker = next(self._workers)
                    self._counting.step(number, worker)
        except BaseException as error:  # noqa: BLE001 - raised where the load is left
            self._errors.append(error)


@pytest.fixture
def servers(memcached_pool: MemcachedPool) -> Iterator[list[Memcached]]:
    """Four memcached: one more than the lab's."""
    with memcached_pool.lend(4) as servers:
        yield servers


@pytest.fixture
def lab(servers: list[Memcached], lab_database: LabDatabase) -> Iterator[Lab]:
    """Three nodes, a database, and one worker."""
    with new_lab(servers[:3], lab_database) as lab:
        yield named(lab)


def named(lab: Lab) -> Lab:
    """Let messages tell the first worker from those made here."""
    lab.worker.nodes = tuple(lab.servers)  # type: ignore[attr-defined]
    return lab


def worker_on(lab: Lab, nodes: dict[str, Memcached], **config: Any) -> Worker:
    """A worker that is configured with these nodes."""
    addresses = {name: server.address for name, server in nodes.items()}
    worker = lab.new_worker(addresses, **config)
    worker.nodes = tuple(nodes)  # type: ignore[attr-defined]
    return worker


def one_more(lab: Lab, servers: list[Memcached]) -> Worker:
    """A worker that knows the new node as well."""
    return worker_on(lab, {**lab.servers, NEW: servers[3]})


def moved_to(lab: Lab, worker: Worker, user: User) -> bool:
    """Whether the session has other homes in this worker's configuration."""
    homes = worker.state.store.homes.ring.homes(user.session_key)
    return set(homes) != set(lab.worker.state.store.homes.ring.homes(user.session_key))


def test_restarting_every_node_in_turn_logs_nobody_out(lab: Lab) -> None:
    """Empty restarts one by one, under load on two workers, with one sync at most."""
    other = worker_on(lab, lab.servers)
    counting = Counting(lab)
    with Load(counting, [lab.worker, other]) as load:
        for name in NAMES:
            load.await_everybody()
            lab.servers[name].restart()
            # The next one goes only when both workers use this one again, and every
            # session is back on it.
            lab.settle()
            load.await_everybody()
    counting.everybody_sees(lab.worker)
    counting.everybody_sees(other)


def test_a_node_is_added_used_and_removed(lab: Lab, servers: list[Memcached]) -> None:
    """Each step of the way every session is seen with its last change."""
    wide = one_more(lab, servers)
    counting = Counting(lab)
    counting.everybody(lab.worker)
    moved = [user for user in counting.users if moved_to(lab, wide, user)]
    assert 0 < len(moved) < len(counting)
    counting.everybody(wide, wide)
    assert servers[3].keys(), "the new node is used"
    counting.everybody(lab.worker, lab.worker)
    # It was not restarted: what it holds is old.
    counting.everybody(wide)
    counting.everybody_sees(wide)
    counting.everybody_sees(lab.worker)


def test_a_removed_node_that_is_gone_takes_nothing_along(
    lab: Lab, servers: list[Memcached]
) -> None:
    """The node is taken out of the configuration because it is dead."""
    wide = one_more(lab, servers)
    counting = Counting(lab)
    counting.everybody(wide, wide)
    servers[3].kill()
    counting.everybody(lab.worker)
    counting.everybody_sees(lab.worker)


def test_who_logged_out_meanwhile_stays_out(lab: Lab, servers: list[Memcached]) -> None:
    """A node that was away during a logout brings nobody back with its old copies."""
    wide = one_more(lab, servers)
    users = [lab.member() for _ in range(USERS)]
    for user in users:
        assert user.at(wide).counts().status == 200
    cookies = [user.twin() for user in users]
    for user in users:
        # The new node holds copies, and is not told.
        assert user.logs_out().status == 200
    for worker in (wide, lab.worker, wide):
        assert [cookie.at(worker).sees() for cookie in cookies] == [{}] * USERS


def test_a_node_is_replaced_at_another_address(
    lab: Lab, servers: list[Memcached]
) -> None:
    """The same name, another server: its copies are missing, and no change is."""
    counting = Counting(lab)
    counting.everybody(lab.worker)
    replaced = worker_on(lab, {**lab.servers, NAMES[0]: servers[3]})
    # While it is rolled out, both servers are in use under one name.
    counting.everybody(replaced, lab.worker, replaced)
    servers[0].kill()
    counting.everybody(replaced)
    counting.everybody_sees(replaced)


def test_the_order_of_nodes_means_nothing(lab: Lab) -> None:
    """A worker with the nodes listed backwards agrees without asking SQL."""
    backwards = worker_on(lab, dict(reversed(lab.servers.items())))
    counting = Counting(lab)
    # The first request of a process makes the table known.
    counting.step(0, backwards)
    before = dict(backwards.stats)
    counting.everybody(backwards, lab.worker, backwards)
    assert backwards.stats["loaded_from_sql"] == before["loaded_from_sql"]
    assert backwards.stats["synced"] == before["synced"]
    assert lab.worker.stats["loaded_from_sql"] == 0


def test_a_worker_behind_in_configuration_loses_nothing(
    lab: Lab, servers: list[Memcached]
) -> None:
    """Two configurations at once, under load: slower for some, wrong for nobody."""
    wide = one_more(lab, servers)
    counting = Counting(lab)
    with Load(counting, [lab.worker, wide]) as load:
        for _ in range(3):
            load.await_everybody()
    counting.everybody(lab.worker, wide, lab.worker)
    counting.everybody_sees(wide)


def test_a_sync_keeps_what_the_other_configuration_wrote(
    lab: Lab, servers: list[Memcached]
) -> None:
    """Changes that only nodes hold are found again when N has passed elsewhere."""
    wide = one_more(lab, servers)
    counting = Counting(lab)
    counting.everybody(lab.worker, lab.worker)
    lab.pass_time(N + 1)
    counting.everybody_sees(wide)
    counting.everybody(lab.worker, lab.worker, wide)
    counting.everybody_sees(lab.worker)


@each_home
def test_a_move_keeps_what_the_new_nodes_were_told(
    lab: Lab, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new id made with the old nodes takes along a change made with the new ones."""
    user = lab.member(x=0)
    gone = lab.name(user, home)
    without = {name: s for name, s in lab.servers.items() if name != gone}
    other = user.at(worker_on(lab, without))
    assert other.changes(x=1).status == 200

    homes = lab.worker.state.store.homes
    read = homes.read

    def read_late(*args: Any) -> Any:
        # Somebody looks at the session in the middle of the move.
        other.sees()
        return read(*args)

    def action(session: Any) -> None:
        assert session["x"] == 1
        # Both of its new homes take this, and SQL does not hear of it.
        assert other.changes(x=2).status == 200
        assert lab.row(user)["x"] == 1
        monkeypatch.setattr(homes, "read", read_late)
        session.regenerate()

    late = user.twin()
    assert user.does(action).status == 200
    monkeypatch.undo()
    assert user.sees() == {"_user_id": "7", "x": 2}
    assert late.sees() == {}


def test_two_configurations_at_once_are_logged(
    lab: Lab, servers: list[Memcached], caplog: pytest.LogCaptureFixture
) -> None:
    """One line says that workers differ, however many sessions show it."""
    wide = one_more(lab, servers)
    counting = Counting(lab)
    counting.everybody(lab.worker)
    with caplog.at_level(logging.WARNING, "flask_resilient_session"):
        counting.everybody(wide, lab.worker, wide)
    lines = [r.getMessage() for r in caplog.records if "_NODES" in r.getMessage()]
    # Each worker says it once.
    assert len(lines) == 2
    assert all(NEW in line for line in lines)


def test_one_configuration_alone_logs_nothing(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    """Restarts and lost copies are no reason to doubt the configuration."""
    counting = Counting(lab, 8)
    with caplog.at_level(logging.WARNING, "flask_resilient_session"):
        for name in NAMES:
            counting.everybody(lab.worker)
            lab.servers[name].flush()
            counting.everybody(lab.worker)
    assert [record.getMessage() for record in caplog.records] == []
