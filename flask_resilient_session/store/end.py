"""Ending a session for good."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..common.errors import SqlUnavailable
from ..common.events import session_revoked, short
from ..core.answers import Ack
from ..core.reading import Live
from ..core.record import Tombstone
from ..core.writing import is_ended
from .context import SessionContext
from .steps import Steps


class Ender:
    """Ends sessions: logout and revocation."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._homes = steps.homes
        self._rows = steps.rows
        self._clock = steps.clock
        self._observer = steps.observer

    def end(
        self,
        context: SessionContext,
        live: Live | None,
        also: Iterable[str] = (),
        *,
        in_debt: bool = True,
    ) -> frozenset[str]:
        """End a session for good: SQL first, then every reachable home.

        With SQL unreachable both homes have to take the tombstone, which then
        carries a debt that the next reader pays.

        :param live: what the request loaded; None: nothing is known of it.
        :param also: other nodes that may hold a copy, for who ends it from outside.
        :param in_debt: whether both homes are enough while SQL is unreachable.
        :returns: names of the nodes that did not take the tombstone.
        """
        homes = self._homes.names(context)
        names = tuple(dict.fromkeys((*homes, *also)))
        tombstone = Tombstone("ended", self._clock.now_ms())
        record = None if live is None else live.record
        try:
            self._rows.put_tombstone(context, tombstone, record)
        except SqlUnavailable as error:
            if not in_debt:
                raise self._steps.not_kept(context, error) from error
            acks = self._homes.put_tombstones(
                context, replace(tombstone, debt=True), names
            )
            if not is_ended(acks, homes=homes, names=names):
                raise self._steps.not_kept(context, error) from error
            self._rows.owe(context, tombstone, record)
        else:
            acks = self._homes.put_tombstones(context, tombstone, names)
        self._observer.count("revoked")
        self._observer.send(session_revoked, session=short(context.session_key))
        return frozenset(n for n, ack in acks.items() if ack is Ack.UNREACHABLE)
