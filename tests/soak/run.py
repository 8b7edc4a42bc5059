"""One soak from beginning to end."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from lab import NAMES, Proxy
from served_app import PATIENCE, Gunicorn
from servers import Memcached, wait_until

from .clients import Account, Client, Crowd
from .databases import Database
from .history import History, Life
from .nemesis import Nemesis
from .nodes import NodeFaults
from .report import Report
from .witness import Witness

CLIENTS: Final = 6

#: A cookie that is looked at again at the end, of those whose sessions have ended.
GHOSTS: Final = 150

#: Seconds that a request may wait for its session, with the timeouts below.
LONGEST_WAIT: Final = 2.5

#: Seconds between two syncs of a session.
INTERVAL: Final = 2

#: Seconds in which nodes that were too slow may become quick again.
CALM: Final = 10.0

#: The package's defaults where they matter. Quicker to try again; more patient with
#: nodes, which share a machine with all the rest here.
SETTINGS: Final = {
    "RESILIENT_SESSION_NODE_TIMEOUT": "0.5",
    "RESILIENT_SESSION_NODE_RETRY": "0.1",
    "RESILIENT_SESSION_NODE_RETRY_MAX": "0.5",
    "RESILIENT_SESSION_SQL_TIMEOUT": "0.5",
    "RESILIENT_SESSION_SYNC_INTERVAL": str(INTERVAL),
}


def soak(
    seconds: float,
    seed: int,
    folder: Path,
    database: Database,
    *,
    name: str,
    accounts: int = 18,
) -> Report:
    """Run for so long, bring everything back, and look at every session.

    Then all nodes lose their memory, and every session is looked at once more. Breaking
    goes on until the database was broken in every way, also where that takes longer.

    :param name: of the database, for the report.
    :param accounts: how many sessions there are at a time.
    """
    history = History()
    try:
        with ExitStack() as stack:
            _Soak(stack, seed, folder, database, history, accounts).run(seconds)
    except AssertionError as error:
        # Something that was awaited did not come about.
        history.violate(str(error))
    return Report.of(history, seed, name)


class _Soak:
    """Everything that takes part."""

    def __init__(
        self,
        stack: ExitStack,
        seed: int,
        folder: Path,
        database: Database,
        history: History,
        accounts: int,
    ) -> None:
        self._history = history
        self._buried = 0
        self._over = threading.Event()
        self._nodes = [stack.enter_context(Memcached()) for _ in NAMES]
        wires = [Proxy(node) for node in self._nodes]
        for wire in wires:
            stack.callback(wire.close)
        self._workers = _workers(stack, self._nodes, wires, database, folder)
        database.serve(self._workers)
        ports = [worker.port for worker in self._workers]
        self._accounts = [Account(number) for number in range(accounts)]
        self._witness = Witness(CLIENTS, ports, history, seed)
        stack.callback(self._witness.close)
        dice = random.Random(f"{seed}/nemesis")
        self._nemesis = Nemesis(
            len(self._nodes),
            NodeFaults(self._nodes, wires, history, dice),
            database,
            self._workers,
            witness=self._witness,
            settle=self._settle_ended,
            heal=self._heal,
            history=history,
            random=dice,
            over=self._over,
        )
        clients = [Client(n, ports, history, seed) for n in range(CLIENTS)]
        self._crowd = Crowd(clients, self._accounts, self._over)

    def run(self, seconds: float) -> None:
        """Break one thing after the other; then look at everything."""
        deadline = time.monotonic() + seconds
        try:
            # The table is there once somebody has logged in.
            wait_until(self._somebody_is_there, PATIENCE, "a login")
            while time.monotonic() < deadline or not self._nemesis.met_all_of_sql:
                self._nemesis.strike()
                self._heal()
        finally:
            self._over.set()
            self._crowd.join()
        self._heal()
        self._lose_all_memory()
        for cookie in self._history.ended[-GHOSTS:]:
            self._look_for_ghost(cookie, range(len(self._workers)))
        self._no_tracebacks()

    def _lose_all_memory(self) -> None:
        """SQL alone shows everything, once it was told."""
        self._sync_everything()
        for node, name in zip(self._nodes, NAMES, strict=True):
            self._history.breaks(name)
            node.restart()
        self._heal()

    def _somebody_is_there(self) -> bool:
        return any(account.life is not None for account in self._accounts)

    def _heal(self) -> None:
        """Every worker uses every node and SQL again, and has read every session.

        This is what the guarantees suppose between two faults.
        """
        self._settle()
        self._history.mended()
        self._read_everything()
        patience = time.monotonic() + CALM
        while self._history.strained and time.monotonic() < patience:
            strains = self._history.strains
            self._sync_everything()
            self._history.strained = self._history.strains > strains

    def _read_everything(self) -> None:
        for account in self._accounts:
            self._look(account.life)
        self._look(self._witness.kept)
        self._look_for_ghosts()

    def _sync_everything(self) -> None:
        """Read everything an interval later, so that SQL knows all of it."""
        due = time.monotonic() + INTERVAL
        wait_until(lambda: time.monotonic() > due, PATIENCE, "syncs to be due")
        self._read_everything()

    def _settle(self) -> None:
        """Every worker uses every node and SQL again, and nobody waits any more."""
        self._crowd.finish_what_began()
        cookie = None
        for account in self._accounts:
            life = account.life
            if life is not None and not life.ending:
                cookie = life.cookie
        for worker in self._workers:
            worker.settle(cookie)
        # What began meanwhile may still have skipped a node.
        self._crowd.finish_what_began()

    def _settle_ended(self) -> None:
        """The same, and both homes know of every session that has ended."""
        self._settle()
        self._history.mended()
        self._look_for_ghosts()

    def _look_for_ghosts(self) -> None:
        """Those that ended without SQL are read, too: that pays their debt."""
        fresh = self._history.ended[self._buried :]
        for cookie in fresh:
            self._look_for_ghost(cookie, [1])
        if not self._history.strained:
            self._buried += len(fresh)

    def _look(self, life: Life | None) -> None:
        if life is not None:
            for number in range(len(self._workers)):
                _insist(lambda n=number: self._witness.look(life, n))

    def _look_for_ghost(self, cookie: str, workers: range | list[int]) -> None:
        for number in workers:
            _insist(lambda n=number: self._witness.look_for_ghost(cookie, n))

    def _no_tracebacks(self) -> None:
        for worker in self._workers:
            log = worker.log
            if "Traceback" in log:
                start = max(log.index("Traceback") - 500, 0)
                said = log[start : start + 3000]
                self._history.violate(f"a worker's log has a traceback:\n{said}")


def _insist(call: Callable[[], bool]) -> None:
    wait_until(call, PATIENCE, "an answer, with nothing broken")


def _workers(
    stack: ExitStack,
    nodes: list[Memcached],
    wires: list[Proxy],
    database: Database,
    folder: Path,
) -> list[Gunicorn]:
    """Three processes; the first one reaches the nodes by wires that can be cut."""
    workers = []
    for number, ends in enumerate((wires, nodes, nodes)):
        configured = [
            {"name": name, "address": end.address}
            for name, end in zip(NAMES, ends, strict=True)
        ]
        worker = Gunicorn(
            json.dumps(configured),
            database.uri(number),
            *("--worker-class", "gthread", "--threads", "8"),
            folder=folder,
            settings=SETTINGS,
        )
        stack.callback(worker.kill)
        worker.launch()
        workers.append(worker)
    for worker in workers:
        worker.await_ready()
    return workers
