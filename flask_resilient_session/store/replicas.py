"""The copies of a session: which nodes hold them, and how they get there.

Between the store's records and the cluster's bytes: placement, seals, times to live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.answers import Ack, Reply, Token
from ..core.lifetimes import expires_ms, exptime_seconds, tombstone_expires_ms
from ..core.record import Copy, Tombstone
from ..core.ring import Ring
from ..core.writing import to_remove
from ..memcached.cluster import Cluster
from ..memcached.text_protocol import Request
from .context import SessionContext


class Homes:
    """Reads and writes the copies of sessions on their homes.

    :param ring: gives each session its homes.
    :param cluster: the nodes.
    """

    def __init__(self, ring: Ring, cluster: Cluster) -> None:
        self.ring = ring
        self.cluster = cluster

    def names(self, context: SessionContext) -> tuple[str, ...]:
        """The session's homes by configuration, whatever their health."""
        return self.ring.homes(context.session_key)

    def read(
        self, context: SessionContext, names: Sequence[str] | None = None
    ) -> dict[str, Reply]:
        """What each home holds, in one round trip.

        :param names: other nodes to ask instead.
        """
        if names is None:
            names = self.names(context)
        if not names:
            return {}
        return self.cluster.read(
            names, context.session_key, context.keyring, context.patience
        )

    def requests(
        self,
        context: SessionContext,
        copy: Copy,
        writable: Mapping[str, Token | None],
        now_ms: int,
    ) -> list[tuple[str, Request]]:
        """The writes that put a copy where ``writable`` were read."""
        data, exptime = self._sealed(context, copy, now_ms)
        swap, key = self.cluster.swap, context.session_key
        return [
            (name, swap(key, data, exptime, token)) for name, token in writable.items()
        ]

    def write(
        self,
        context: SessionContext,
        copy: Copy,
        writable: Mapping[str, Token | None],
        now_ms: int,
    ) -> dict[str, Ack]:
        """Put a copy where ``writable`` were read; answers by node."""
        if not writable:
            return {}
        requests = self.requests(context, copy, writable, now_ms)
        answers = self.cluster.write(requests, context.patience)
        return dict(zip(writable, answers, strict=True))

    def write_in_turn(
        self,
        context: SessionContext,
        copy: Copy,
        writable: Mapping[str, Token | None],
        now_ms: int,
    ) -> dict[str, Ack]:
        """Like :meth:`write`, but one home after the other, up to the first conflict.

        Two that write both homes at once may each win one, again and again. Here who
        wins the first home has won.
        """
        acks: dict[str, Ack] = {}
        # In the same order for everybody: the homes' on the ring.
        for name in self.names(context):
            if name in writable and Ack.CONFLICT not in acks.values():
                acks |= self.write(context, copy, {name: writable[name]}, now_ms)
        return acks

    def put_tombstones(
        self, context: SessionContext, tombstone: Tombstone, names: Sequence[str]
    ) -> dict[str, Ack]:
        """Put a tombstone over whatever these homes hold; answers by home."""
        if not names:
            return {}
        data, exptime = self._sealed(context, tombstone, tombstone.ended_ms)
        request = self.cluster.put_tombstone(context.session_key, data, exptime)
        answers = self.cluster.write([(n, request) for n in names], context.patience)
        acks = dict(zip(names, answers, strict=True))
        # One that refuses has dropped the old copy, by memcached's rule for a failed
        # set; it is removed all the same, since not every version keeps to that.
        self._remove(context, [n for n, ack in acks.items() if ack is Ack.REJECTED])
        return acks

    def remove_rejected(
        self,
        context: SessionContext,
        acks: Mapping[str, Ack],
        writable: Mapping[str, Token | None],
    ) -> None:
        """Remove old copies that still agree, after SQL took a change.

        :param acks: answers of the nodes that were written.
        :param writable: what stood there, as in :class:`Live`.
        """
        self._remove(context, to_remove(acks, writable))

    def _remove(self, context: SessionContext, names: Sequence[str]) -> None:
        if names:
            request = self.cluster.remove(context.session_key)
            self.cluster.write([(name, request) for name in names], context.patience)

    def _sealed(
        self, context: SessionContext, copy: Copy, now_ms: int
    ) -> tuple[bytes, int]:
        if isinstance(copy, Tombstone):
            until_ms = tombstone_expires_ms(copy, context.timing)
        else:
            until_ms = expires_ms(copy, context.timing)
        exptime = exptime_seconds(until_ms, context.timing, now_ms)
        return context.keyring.seal(context.session_key, copy), exptime
