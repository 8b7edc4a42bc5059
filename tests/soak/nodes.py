"""What can break a node, or the wire by which one worker reaches it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from lab import NAMES, Proxy
from servers import Memcached

from .faults import Breakages
from .history import History

#: What a node does not remember anything after.
FORGETFUL: Final = frozenset({"kill", "restart"})


class NodeFaults:
    """Breaks one node or one wire at a time.

    :param wires: those by which one of the workers reaches the nodes, in their order.
    """

    def __init__(
        self,
        nodes: list[Memcached],
        wires: list[Proxy],
        history: History,
        random: random.Random,
    ) -> None:
        self._nodes = nodes
        self._wires = wires
        self._history = history
        self._random = random
        self._last = 0
        self.breakages: Breakages = {
            "kill": self.kill,
            "freeze": self.freeze,
            "restart": self.restart,
            "cut": partial(self.broken, Proxy.refuse),
            "hold": self.hold,
            "reset": partial(self.broken, Proxy.reset),
            "drip": partial(self.broken, Proxy.drip),
        }

    @contextmanager
    def kill(self) -> Iterator[None]:
        """A node is away for a while, and comes back empty."""
        node = self._node()
        node.kill()
        try:
            yield
        finally:
            node.start()

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """A node takes everything and answers nothing, and then all at once."""
        node = self._node()
        node.freeze()
        try:
            yield
        finally:
            node.thaw()

    @contextmanager
    def restart(self) -> Iterator[None]:
        """A node is empty from one moment to the next."""
        self._node().restart()
        yield

    @contextmanager
    def hold(self) -> Iterator[None]:
        """What one worker sends to a node gets there late, or never."""
        wire = self._wire()
        wire.hold()
        try:
            yield
        finally:
            if self._random.random() < 0.7:
                wire.release()
            wire.mend()

    @contextmanager
    def broken(self, how: Callable[[Proxy], None]) -> Iterator[None]:
        """One worker's wire to a node is broken like this."""
        wire = self._wire()
        how(wire)
        try:
            yield
        finally:
            wire.mend()

    def restart_another(self) -> None:
        """A node is empty at once that is not the one which was broken last."""
        others = set(range(len(self._nodes))) - {self._last}
        self.restart_one(self._random.choice(sorted(others)))

    def restart_one(self, number: int) -> None:
        """This node is empty at once."""
        self._history.breaks(NAMES[number])
        self._nodes[number].restart()

    def _node(self) -> Memcached:
        return self._nodes[self._pick()]

    def _wire(self) -> Proxy:
        return self._wires[self._pick()]

    def _pick(self) -> int:
        self._last = self._random.randrange(len(self._nodes))
        self._history.breaks(NAMES[self._last])
        return self._last
