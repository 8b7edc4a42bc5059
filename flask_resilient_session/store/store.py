"""The sessions of one application: load, create, save, end, move.

The order of the protocol's steps is in ``loading``, ``saving``, ``ending`` and
``moving``; what to do in each is decided in ``replication``. Nothing waits but in the
nodes and SQL that were given, and time and chance are arguments, so that a simulator
can run this through every interleaving.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Iterable, Sequence

from ..common.clock import Clock
from ..common.events import Observer
from ..common.queue import KeyedQueue
from ..core.answers import Reply
from ..core.reading import Gone, Live, Unknown
from ..core.record import EndReason
from .context import SessionContext
from .end import Ender
from .load import Loader
from .move import Mover
from .replicas import Homes
from .row import RowRepository
from .save import Saver
from .steps import Changes, Steps


class Store:
    """What can be done with a session.

    Every method may raise :class:`SessionUnavailable`: nothing was acknowledged then,
    though a change may have reached a node or SQL.

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
        self._loader = Loader(homes, rows, clock=clock, observer=observer)
        self._saver = Saver(steps, self._loader)
        self._ender = Ender(steps)
        self._mover = Mover(steps, self._loader, self._saver)
        self._steps = steps

    def load(
        self, context: SessionContext, *, ask_sql: bool = False
    ) -> Live | Gone | Unknown:
        """What is known of a session; see :meth:`.load.Loader.load`."""
        return self._loader.load(context, ask_sql=ask_sql)

    def read_copies(
        self, context: SessionContext, names: Sequence[str]
    ) -> dict[str, Reply]:
        """What these nodes hold for a session; changes nothing."""
        return self.homes.read(context, names)

    def create(
        self, context: SessionContext, changes: Changes, *, required: bool
    ) -> Live:
        """Store a session under a new id; see :meth:`.save.Saver.create`."""
        return self._saver.create(context, changes, required=required)

    def save(
        self,
        context: SessionContext,
        live: Live,
        changes: Changes,
        *,
        required: bool = False,
    ) -> Live | Gone:
        """Keep what one request changed; see :meth:`.save.Saver.save`."""
        return self._saver.save(context, live, changes, required=required)

    def end(
        self,
        context: SessionContext,
        live: Live | None,
        also: Iterable[str] = (),
        *,
        in_debt: bool = True,
    ) -> frozenset[str]:
        """End a session for good; see :meth:`.end.Ender.end`."""
        return self._ender.end(context, live, also, in_debt=in_debt)

    def move(
        self,
        old: SessionContext,
        live: Live,
        new: SessionContext,
        changes: Changes,
        *,
        reason: EndReason = "moved",
        renew_created: bool = False,
    ) -> Live | Gone:
        """Give a session a new id; see :meth:`.move.Mover.move`."""
        return self._mover.move(
            old, live, new, changes, reason=reason, renew_created=renew_created
        )

    def renew(self) -> None:
        """Start anew in a forked child: locks that others hold there stay held."""
        self.homes.cluster.renew()
        self.rows.renew()
        self._steps.queue.renew()
        self._steps.observer.stats.renew()


__all__ = ["Changes", "Store"]
