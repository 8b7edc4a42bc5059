"""The copies of a session: which nodes hold them, and how they get there.

Between the store's records and the cluster's bytes: placement, seals, times to live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .access import Access
from .cluster import Cluster
from .record import Copy, Reply, Token, Tombstone
from .replication import to_remove
from .ring import Ring
from .times import expires_ms, exptime_seconds, tombstone_expires_ms
from .wire import Ack, Request


class Homes:
    """Reads and writes the copies of sessions on their homes.

    :param ring: gives each session its homes.
    :param cluster: the nodes.
    """

    def __init__(self, ring: Ring, cluster: Cluster) -> None:
        self.ring = ring
        self.cluster = cluster

    def names(self, access: Access) -> tuple[str, ...]:
        """The session's homes by configuration, whatever their health."""
        return self.ring.homes(access.session_key)

    def read(
        self, access: Access, names: Sequence[str] | None = None
    ) -> dict[str, Reply]:
        """What each home holds, in one round trip.

        :param names: other nodes to ask instead.
        """
        if names is None:
            names = self.names(access)
        if not names:
            return {}
        return self.cluster.read(
            names, access.session_key, access.keyring, access.patience
        )

    def requests(
        self,
        access: Access,
        copy: Copy,
        places: Mapping[str, Token | None],
        now_ms: int,
    ) -> list[tuple[str, Request]]:
        """The writes that put a copy where ``places`` were read."""
        data, exptime = self._sealed(access, copy, now_ms)
        place, key = self.cluster.place, access.session_key
        return [
            (name, place(key, data, exptime, token)) for name, token in places.items()
        ]

    def write(
        self,
        access: Access,
        copy: Copy,
        places: Mapping[str, Token | None],
        now_ms: int,
    ) -> dict[str, Ack]:
        """Put a copy where ``places`` were read; answers by node."""
        if not places:
            return {}
        requests = self.requests(access, copy, places, now_ms)
        answers = self.cluster.write(requests, access.patience)
        return dict(zip(places, answers, strict=True))

    def write_in_turn(
        self,
        access: Access,
        copy: Copy,
        places: Mapping[str, Token | None],
        now_ms: int,
    ) -> dict[str, Ack]:
        """Like :meth:`write`, but one home after the other, up to the first conflict.

        Two that write both homes at once may each win one, again and again. Here who
        wins the first home has won.
        """
        acks: dict[str, Ack] = {}
        # In the same order for everybody: the homes' on the ring.
        for name in self.names(access):
            if name in places and Ack.CONFLICT not in acks.values():
                acks |= self.write(access, copy, {name: places[name]}, now_ms)
        return acks

    def bury(
        self, access: Access, tombstone: Tombstone, names: Sequence[str]
    ) -> dict[str, Ack]:
        """Put a tombstone over whatever these homes hold; answers by home."""
        if not names:
            return {}
        data, exptime = self._sealed(access, tombstone, tombstone.ended_ms)
        request = self.cluster.bury(access.session_key, data, exptime)
        answers = self.cluster.write([(n, request) for n in names], access.patience)
        acks = dict(zip(names, answers, strict=True))
        # One that refuses has dropped the old copy, by memcached's rule for a failed
        # set; it is removed all the same, since not every version keeps to that.
        self._remove(access, [n for n, ack in acks.items() if ack is Ack.REFUSED])
        return acks

    def remove_refused(
        self,
        access: Access,
        acks: Mapping[str, Ack],
        places: Mapping[str, Token | None],
    ) -> None:
        """Remove old copies that still agree, after SQL took a change.

        :param acks: answers of the nodes that were written.
        :param places: what stood there, as in :class:`Live`.
        """
        self._remove(access, to_remove(acks, places))

    def _remove(self, access: Access, names: Sequence[str]) -> None:
        if names:
            request = self.cluster.remove(access.session_key)
            self.cluster.write([(name, request) for name in names], access.patience)

    def _sealed(self, access: Access, copy: Copy, now_ms: int) -> tuple[bytes, int]:
        if isinstance(copy, Tombstone):
            until_ms = tombstone_expires_ms(copy, access.timing)
        else:
            until_ms = expires_ms(copy, access.timing)
        exptime = exptime_seconds(until_ms, access.timing, now_ms)
        return access.keyring.seal(access.session_key, copy), exptime
