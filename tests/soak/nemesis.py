"""What breaks things: one at a time, or a node and the database, and whole again then.

In turn it breaks the database, the database and a node at once, and something else: a
node, a wire, a worker process. Every kind has its turn before one comes again.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from served_app import PATIENCE, Gunicorn
from servers import wait_until

from .databases import Database
from .faults import Breakage, Breakages, Fault
from .history import History
from .nodes import FORGETFUL, NodeFaults
from .witness import Witness

#: Seconds that a fault lasts; those that hold everybody up may last longer.
SHORTEST: Final = 0.2
LONGEST: Final = 1.0
LONGEST_FREEZE: Final = 2.0

#: A fault goes on until so many requests succeeded while it lasted, so that it was met
#: on a slow machine too.
ENOUGH: Final = 5


class Nemesis:
    """Breaks things, and mends them.

    :param nodes: how many there are.
    :param witness: looks for itself what a database that is away means to users.
    :param settle: returns when every worker uses everything again, and knows what has
        ended.
    :param heal: the same, and every session was read; between two nodes of a rolling
        restart.
    :param over: ends a fault early.
    """

    def __init__(
        self,
        nodes: int,
        node_faults: NodeFaults,
        database: Database,
        workers: list[Gunicorn],
        *,
        witness: Witness,
        settle: Callable[[], None],
        heal: Callable[[], None],
        history: History,
        random: random.Random,
        over: threading.Event,
    ) -> None:
        self._nodes = nodes
        self._database = database
        self._workers = workers
        self._witness = witness
        self._settle = settle
        self._heal = heal
        self._node_faults = node_faults
        self._history = history
        self._random = random
        self._over = over
        self._kinds: Breakages = {
            **node_faults.breakages,
            **database.breakages,
            "worker kill": self.kill_worker,
            "rolling restart": self.restart_nodes,
        }
        self._of_nodes = list(node_faults.breakages)
        self._of_sql = list(database.breakages)
        rest = [kind for kind in self._kinds if kind not in self._of_sql]
        self._sql = self._in_turn(self._of_sql)
        self._rest = self._in_turn(rest)
        queue = [self._strike_sql, self._strike_both, self._strike_rest]
        self._strikes = itertools.cycle(queue)

    @property
    def met_all_of_sql(self) -> bool:
        """Whether the database was broken in every way."""
        met = {kind for fault in self._history.faults for kind in fault.kinds}
        return met.issuperset(self._of_sql)

    def strike(self) -> None:
        """One fault, from its beginning to its end."""
        next(self._strikes)()

    @contextmanager
    def kill_worker(self) -> Iterator[None]:
        """A worker dies at once, and another one takes its place."""
        worker = self._random.choice(self._workers)
        worker.kill()
        try:
            yield
        finally:
            worker.launch()
            worker.await_ready()

    @contextmanager
    def restart_nodes(self) -> Iterator[None]:
        """Every node is restarted, empty, one after the other, as for an upgrade."""
        order = self._random.sample(range(self._nodes), self._nodes)
        for number in order:
            self._heal()
            self._node_faults.restart_one(number)
        yield

    def _strike_sql(self) -> None:
        self._break([next(self._sql)])

    def _strike_both(self) -> None:
        of_node = self._random.choice(self._of_nodes)
        kinds = [next(self._sql), of_node]
        self._random.shuffle(kinds)
        self._break(kinds)
        if of_node not in FORGETFUL:
            self._strike_again()

    def _strike_again(self) -> None:
        """Empty another node before the sessions were read.

        What was acknowledged is in SQL, or on both homes, and one of them still has it.
        """
        self._settle()
        if self._history.strained:
            return
        self._history.faults.append(Fault(("restart after it",)))
        self._node_faults.restart_another()

    def _strike_rest(self) -> None:
        self._break([next(self._rest)])

    def _break(self, kinds: list[str]) -> None:
        """Break these, one after the other, and mend them in any order."""
        fault = Fault(tuple(kinds))
        sql = next((kind for kind in kinds if kind in self._of_sql), None)
        if sql is not None:
            self._witness.log_in_ahead()
        self._history.faults.append(fault)
        with ExitStack() as everything:
            mendings = [_begin(everything, self._kinds[kind]) for kind in kinds]
            with self._history.lasts(fault):
                ends = time.monotonic() + self._random.uniform(
                    SHORTEST, _longest(kinds)
                )
                if sql is not None:
                    self._witness.meet(fault, silent=sql in self._database.silent)
                self._over.wait(max(ends - time.monotonic(), 0))
                wait_until(
                    lambda: fault.answered.total() >= ENOUGH,
                    PATIENCE,
                    f"anybody to be answered in spite of: {fault}",
                )
            self._random.shuffle(mendings)
            for mending in mendings:
                mending.close()

    def _in_turn(self, kinds: list[str]) -> Iterator[str]:
        while True:
            yield from self._random.sample(kinds, len(kinds))


def _begin(everything: ExitStack, breakage: Breakage) -> ExitStack:
    mending = ExitStack()
    everything.push(mending)
    mending.enter_context(breakage())
    return mending


def _longest(kinds: list[str]) -> float:
    freezes = any(kind.endswith("freeze") for kind in kinds)
    return LONGEST_FREEZE if freezes else LONGEST
