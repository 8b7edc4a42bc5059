"""The sessions of one application: load, create, save, end, move.

The order of the protocol's steps is in ``loading``, ``saving``, ``ending`` and
``moving``; what to do in each is decided in ``replication``. Nothing waits but in the
nodes and SQL that were given, and time and chance are arguments, so that a simulator
can run this through every interleaving.
"""

from __future__ import annotations

import random as random_module

from ..common.clock import Clock
from ..common.events import Observer
from ..common.queue import KeyedQueue
from .end import Ender
from .load import Loader
from .move import Mover
from .replicas import Homes
from .row import RowRepository
from .save import Saver
from .steps import Changes, Steps


class Store:
    """What can be done with a session; the doors to the rooms that do it.

    Every one of them may raise :class:`SessionUnavailable`: nothing was acknowledged
    then, though a change may have reached some of the places.

    :param homes: the copies of sessions.
    :param rows: their rows.
    :param max_bytes: largest encoded session.
    :param random: nonces of stamps.
    :param queue: lines up requests of this process that have met in a session.
    """

    def __init__(
        self,
        *,
        homes: Homes,
        rows: RowRepository,
        max_bytes: int,
        clock: Clock,
        random: random_module.Random,
        observer: Observer,
        queue: KeyedQueue | None = None,
    ) -> None:
        self.homes = homes
        self.rows = rows
        steps = Steps(
            homes, rows, queue or KeyedQueue(), max_bytes, clock, random, observer
        )
        loader = Loader(homes, rows, clock=clock, observer=observer)
        saver = Saver(steps, loader)
        ender = Ender(steps)
        mover = Mover(steps, loader, saver)
        self.load = loader.load
        self.read_copies = loader.read_copies
        self.create = saver.create
        self.save = saver.save
        self.end = ender.end
        self.move = mover.move
        self._steps = steps

    def renew(self) -> None:
        """Start anew in a forked child: locks that others hold there stay held."""
        self.homes.cluster.renew()
        self.rows.renew()
        self._steps.queue.renew()
        self._steps.observer.stats.renew()


__all__ = ["Changes", "Store"]
