"""What breaks things: one at a time, and whole again before the next."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from lab import Proxy
from servers import Memcached


class Nemesis:
    """Breaks one node, one wire or the database for a while.

    :param wires: those by which one of the workers reaches the nodes.
    :param over: ends a fault early.
    :param record: the faults, in order.
    """

    def __init__(
        self,
        nodes: list[Memcached],
        wires: list[Proxy],
        database: Path,
        seed: int,
        over: threading.Event,
        record: list[str],
    ) -> None:
        self._record = record
        self._nodes = nodes
        self._wires = wires
        self._database = database
        self._random = random.Random(f"{seed}/nemesis")
        self._over = over
        self._kinds: list[Callable[[], None]] = []

    def strike(self) -> None:
        """One fault, from its beginning to its end; every kind has its turn."""
        if not self._kinds:
            self._kinds = [
                *(self.kill, self.freeze, self.restart, self.cut, self.hold),
                *(self.reset, self.drip, self.lock),
            ]
            self._random.shuffle(self._kinds)
        fault = self._kinds.pop()
        self._record.append(fault.__name__)
        fault()

    def kill(self) -> None:
        """A node is away for a while, and comes back empty."""
        node = self._random.choice(self._nodes)
        node.kill()
        self._last(0.2, 1.0)
        node.start()

    def freeze(self) -> None:
        """A node takes everything and answers nothing, and then all at once."""
        node = self._random.choice(self._nodes)
        node.freeze()
        self._last(0.2, 2.0)
        node.thaw()

    def restart(self) -> None:
        """A node is empty from one moment to the next."""
        self._random.choice(self._nodes).restart()

    def cut(self) -> None:
        """One worker is refused by a node that the others reach."""
        wire = self._random.choice(self._wires)
        wire.refuse()
        self._last(0.2, 1.0)
        wire.mend()

    def hold(self) -> None:
        """What one worker sends to a node gets there late, or never."""
        wire = self._random.choice(self._wires)
        wire.hold()
        self._last(0.2, 1.0)
        if self._random.random() < 0.7:
            wire.release()
        wire.mend()

    def reset(self) -> None:
        """One worker's connections to a node are reset."""
        wire = self._random.choice(self._wires)
        wire.reset()
        self._last(0.1, 0.5)
        wire.mend()

    def drip(self) -> None:
        """A node's answers to one worker are never complete."""
        wire = self._random.choice(self._wires)
        wire.drip()
        self._last(0.2, 1.0)
        wire.mend()

    def lock(self) -> None:
        """Another writer holds the database."""
        with closing(
            sqlite3.connect(self._database, 20, isolation_level=None)
        ) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            self._last(0.2, 1.0)

    def _last(self, shortest: float, longest: float) -> None:
        self._over.wait(self._random.uniform(shortest, longest))
