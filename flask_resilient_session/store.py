"""The sessions of one application: load, create, save, end, move.

The order of the protocol's steps is in ``loading``, ``saving``, ``ending`` and
``moving``; what to do in each is decided in ``replication``. Nothing waits but in the
nodes and SQL that were given, and time and chance are arguments, so that a simulator
can run this through every interleaving.
"""

from __future__ import annotations

import random as random_module

from .clock import Clock
from .durable import Durable
from .ending import Ender
from .events import Observer
from .homes import Homes
from .loading import Loader
from .moving import Mover
from .saving import Saver
from .steps import Changes, Steps
from .turns import Turns


class Store:
    """What can be done with a session; the doors to the rooms that do it.

    Every one of them may raise :class:`SessionUnavailable`: nothing was acknowledged
    then, though a change may have reached some of the places.

    :param homes: the copies of sessions.
    :param durable: their rows.
    :param max_bytes: largest encoded session.
    :param random: nonces of stamps.
    :param turns: lines up requests of this process that have met in a session.
    """

    def __init__(
        self,
        *,
        homes: Homes,
        durable: Durable,
        max_bytes: int,
        clock: Clock,
        random: random_module.Random,
        observer: Observer,
        turns: Turns | None = None,
    ) -> None:
        self.homes = homes
        self.durable = durable
        steps = Steps(
            homes, durable, turns or Turns(), max_bytes, clock, random, observer
        )
        loader = Loader(homes, durable, clock=clock, observer=observer)
        saver = Saver(steps, loader)
        ender = Ender(steps)
        mover = Mover(steps, loader, saver)
        self.load = loader.load
        self.peek = loader.peek
        self.create = saver.create
        self.save = saver.save
        self.end = ender.end
        self.move = mover.move
        self._steps = steps

    def renew(self) -> None:
        """Start anew in a forked child: locks that others hold there stay held."""
        self.homes.cluster.renew()
        self.durable.renew()
        self._steps.turns.renew()
        self._steps.observer.stats.renew()


__all__ = ["Changes", "Store"]
