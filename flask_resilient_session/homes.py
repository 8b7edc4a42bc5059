"""The copies of a session: which nodes hold them, and how they get there.

Between the store's records and the cluster's bytes: placement, seals, times to live.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from .access import Access
from .cluster import Cluster
from .record import Copy, Miss, Record, Reply, Token, Tombstone
from .replication import (
    PAIR,
    places_of,
    to_remove,
)
from .ring import Ring
from .stand_in import to_be_told, with_what_stands
from .times import (
    expires_ms,
    exptime_seconds,
    longest_rest_ms,
    tombstone_expires_ms,
)
from .wire import Ack, Request

#: How long the homes remember that SQL knows no such session: a genuine cookie of a
#: session that is gone costs one SQL read in this time, and not one per request.
MISSING_SECONDS: Final = 3600


#: How often the stand-in is told again, when others tell it something at the same time.
_MOST_CONFLICTS: Final = 10


class Homes:
    """Reads and writes the copies of sessions on their homes.

    :param ring: gives each session its homes.
    :param cluster: the nodes.
    :param stand_ins: whether the next node stands in for a home that is down. Without
        it a stand-in that others use still hears of what it has to.
    """

    def __init__(self, ring: Ring, cluster: Cluster, *, stand_ins: bool = True) -> None:
        self.ring = ring
        self.cluster = cluster
        self._stand_ins = stand_ins

    def names(self, access: Access) -> tuple[str, ...]:
        """The session's homes by configuration, whatever their health."""
        return self.ring.homes(access.session_key)

    def stand_in(self, access: Access) -> str | None:
        """The node that stands in for a home that is down, if there is one."""
        if self.ring.copies < PAIR:
            return None
        return self.ring.stand_in(access.session_key)

    def all_names(self, access: Access) -> tuple[str, ...]:
        """The session's homes and its stand-in: all that may hold a copy."""
        homes, stand_in = self.names(access), self.stand_in(access)
        return homes if stand_in is None else (*homes, stand_in)

    def read_all(self, access: Access) -> tuple[dict[str, Reply], dict[str, Reply]]:
        """What each home holds, and while one is skipped the stand-in, too.

        :returns: replies by home, and the stand-in's by its name, where it was asked;
            in one round trip.
        """
        homes = self.names(access)
        if self._stand_ins and self.cluster.suspects_any(homes):
            stand_in = self.stand_in(access)
            if stand_in is not None:
                replies = self.read(access, (*homes, stand_in))
                return replies, {stand_in: replies.pop(stand_in)}
        return self.read(access, homes), {}

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
            names, access.session_key, access.keyring, access.deadline
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
        exptimes = self._exptimes(access, exptime, places)
        place, key = self.cluster.place, access.session_key
        return [
            (name, place(key, data, exptimes[name], token))
            for name, token in places.items()
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
        answers = self.cluster.write(requests, access.deadline)
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
        # In the same order for everybody: the homes' on the ring, then the stand-in.
        homes = [name for name in self.names(access) if name in places]
        for name in dict.fromkeys((*homes, *places)):
            if Ack.CONFLICT not in acks.values():
                acks |= self.write(access, copy, {name: places[name]}, now_ms)
        return acks

    def tell_stand_in(
        self, access: Access, record: Record, acks: Mapping[str, Ack], now_ms: int
    ) -> None:
        """Let the stand-in know of a change that SQL has and not both homes took.

        :param acks: answers of the nodes that were written.
        """
        for name in self._untold(access, acks):
            for _ in range(_MOST_CONFLICTS):
                replies = self.read(access, (name,))
                joined = with_what_stands(record, replies[name])
                unused = not self._stand_ins and isinstance(replies[name], Miss)
                if joined is None or unused:
                    return
                told = self.write(access, joined, places_of(replies), now_ms)
                if told[name] is not Ack.CONFLICT:
                    self._remove_outdated(access, told)
                    return

    def bury_at_stand_in(
        self, access: Access, tombstone: Tombstone, acks: Mapping[str, Ack]
    ) -> None:
        """Let the stand-in know of an end that not both homes took.

        :param acks: answers of the nodes that were written.
        """
        self.bury(access, tombstone, self._untold(access, acks))

    def _untold(self, access: Access, acks: Mapping[str, Ack]) -> list[str]:
        """The stand-in, where it has to be told."""
        if not to_be_told(self.names(access), acks):
            return []
        name = self.stand_in(access)
        return [] if name is None or name in acks else [name]

    def tell(
        self,
        access: Access,
        record: Record,
        places: Mapping[str, Token | None],
        now_ms: int,
    ) -> None:
        """Like :meth:`write`, but nobody waits, nor learns what became of it."""
        if places:
            requests = self.requests(access, record, places, now_ms)
            self.cluster.tell(requests, access.deadline)

    def burials(
        self, access: Access, tombstone: Tombstone, names: Sequence[str]
    ) -> list[tuple[str, Request]]:
        """The writes that put a tombstone over whatever these homes hold."""
        data, exptime = self._sealed(access, tombstone, tombstone.ended_ms)
        exptimes = self._exptimes(access, exptime, names)
        bury, key = self.cluster.bury, access.session_key
        return [(name, bury(key, data, exptimes[name])) for name in names]

    def bury(
        self, access: Access, tombstone: Tombstone, names: Sequence[str]
    ) -> dict[str, Ack]:
        """Put a tombstone over whatever these homes hold; answers by home."""
        if not names:
            return {}
        requests = self.burials(access, tombstone, names)
        answers = self.cluster.write(requests, access.deadline)
        acks = dict(zip(names, answers, strict=True))
        # One that refuses has dropped the old copy, by memcached's rule for a failed
        # set; it is removed all the same, since not every version keeps to that.
        self._remove(access, [n for n, ack in acks.items() if ack is Ack.REFUSED])
        return acks

    def note_missing(
        self, access: Access, places: Mapping[str, Token | None], now_ms: int
    ) -> None:
        """Remember for a while that SQL knows no such session.

        Only where ``places`` were read: what was written since stays.
        """
        tombstone = Tombstone("ended", now_ms)
        data = access.keyring.seal(access.session_key, tombstone)
        requests = [
            (name, self.cluster.place(access.session_key, data, MISSING_SECONDS, token))
            for name, token in places.items()
        ]
        if requests:
            self.cluster.write(requests, access.deadline)

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
        if Ack.REFUSED not in acks.values():
            return
        homes = self.names(access)
        at_homes = {name: ack for name, ack in acks.items() if name in homes}
        others = {name: ack for name, ack in acks.items() if name not in homes}
        self._remove(access, to_remove(at_homes, places))
        self._remove_outdated(access, others)

    def _remove_outdated(self, access: Access, told: Mapping[str, Ack]) -> None:
        """Remove what a stand-in holds instead of what it has no room for."""
        self._remove(access, [n for n, ack in told.items() if ack is Ack.REFUSED])

    def _remove(self, access: Access, names: Sequence[str]) -> None:
        if names:
            request = self.cluster.remove(access.session_key)
            self.cluster.write([(name, request) for name in names], access.deadline)

    def _exptimes(
        self, access: Access, exptime: int, names: Iterable[str]
    ) -> dict[str, int]:
        """The times to live by node: on a stand-in, for as long as it is believed."""
        exptimes = dict.fromkeys(names, exptime)
        stand_in = self.stand_in(access)
        if stand_in in exptimes:
            believed = longest_rest_ms(access.timing) // 1000
            exptimes[stand_in] = min(exptime, believed)
        return exptimes

    def _sealed(self, access: Access, copy: Copy, now_ms: int) -> tuple[bytes, int]:
        if isinstance(copy, Tombstone):
            until_ms = tombstone_expires_ms(copy, access.timing)
        else:
            until_ms = expires_ms(copy, access.timing)
        exptime = exptime_seconds(until_ms, access.timing, now_ms)
        return access.keyring.seal(access.session_key, copy), exptime
