"""Which nodes are the homes of a session: consistent hashing, and nothing else.

Every node has points on a ring of 64-bit numbers. The homes of a session are
the first distinct nodes met after the session's own point, in distinct zones as
far as there are enough. Configuration alone decides; health moves nothing.

**Changing one node replaces at most one home of any session**, so that every session
keeps at least one. The reason: a node's points depend on its
own name and weight only, so adding a node X leaves the order in which the
others are met as it was and puts X somewhere into it. The homes are taken from
that order: first the first-met node of each zone (its leader), then the rest.

* X is met after its zone's leader, or leads a zone of its own: it is one more
  entry in the order, and pushes out at most the last home.
* X is met before the leader L of its zone: X takes the place of L, and L goes
  back among the rest. Either L is no longer a home, or it is one still and
  pushes out the last of the rest: one home is replaced, not two.

Removing X is the same read backwards. A new weight or zone of X is removing and
adding it: the homes before and after each differ from those without X by X in
place of at most one other node, so they differ from each other by at most one.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

#: The homes of a session, where there are enough nodes. With fewer there is no second
#: opinion: SQL is asked and told every time.
PAIR: Final = 2

#: Points of a node of weight 1. The share of the ring that a node gets strays
#: from its fair share by about 1 / sqrt(points): 6 % here. The cost of building
#: a ring grows with the points of all nodes, about 2 us each. Changing this
#: number moves sessions.
POINTS_PER_WEIGHT = 256


@dataclass(frozen=True, slots=True)
class RingNode:
    """A node as far as placement is concerned.

    :param name: what the node's points are computed from; unique on a ring.
    :param weight: its share relative to the other nodes', above 0.
    :param zone: homes are spread over distinct zones; the empty text is a zone
        like any other.
    """

    name: str
    weight: float = 1.0
    zone: str = ""


class Ring:
    """An immutable ring; safe to share between threads.

    :param nodes: the nodes, in any order: the order has no effect.
    :raises ValueError: two nodes have the same name.
    """

    def __init__(self, nodes: Iterable[RingNode]) -> None:
        by_name: dict[str, RingNode] = {}
        for node in nodes:
            if node.name in by_name:
                raise ValueError(f"Two nodes on the ring are named {node.name!r}.")
            by_name[node.name] = node
        self._names = frozenset(by_name)
        # Sorting by name as well settles two equal points without regard to
        # the order of the list.
        marks = sorted(
            (point, node.name) for node in by_name.values() for point in _points(node)
        )
        self._points = [point for point, _ in marks]
        self._homes = _homes_by_position([by_name[name] for _, name in marks])

    @property
    def names(self) -> frozenset[str]:
        """The names of all nodes on the ring."""
        return self._names

    def homes(self, session_key: str) -> tuple[str, ...]:
        """Return the names of the nodes that should hold a session, best first.

        :param session_key: the hex SHA-256 of the session id, 64 characters.
        :returns: :data:`PAIR` distinct names, or all where there are fewer nodes;
            nothing on an empty ring.
        :raises ValueError: the key does not begin with 16 hex characters.
        """
        return self._homes[bisect_right(self._points, int(session_key[:16], 16))]


def _points(node: RingNode) -> Iterable[int]:
    """Yield a node's points: for a larger weight the same ones and more."""
    # The number after the name has a fixed length, so that no two pairs of name
    # and number give the same bytes.
    start = hashlib.sha256(node.name.encode())
    for number in range(max(1, round(node.weight * POINTS_PER_WEIGHT))):
        digest = start.copy()
        digest.update(number.to_bytes(4, "big"))
        yield int.from_bytes(digest.digest()[:8], "big")


def _homes_by_position(order: list[RingNode]) -> list[tuple[str, ...]]:
    """Return the homes for each place between two points of the ring.

    :param order: the node of each point, points ascending.
    :returns: at index i the homes of a key that has i points at or before its
        own; one entry more than there are points, the last equal to the first.
    """
    # Walking backwards, the nodes ordered by when they were passed last are the
    # nodes in the order in which a key at this place would meet them, and the
    # same goes for zones. So each step is one move to the end, whatever the
    # number of nodes. One round fills the orders, the next one reads them.
    met: OrderedDict[str, None] = OrderedDict()
    leaders: OrderedDict[str, str] = OrderedDict()

    def pass_by(node: RingNode) -> None:
        met[node.name] = None
        met.move_to_end(node.name)
        leaders[node.zone] = node.name
        leaders.move_to_end(node.zone)

    for node in reversed(order):
        pass_by(node)
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    homes = [_nearest(met, leaders)]
    for node in reversed(order):
        pass_by(node)
        found = _nearest(met, leaders)
        # Few distinct answers and many points: keep each answer once.
        homes.append(known.setdefault(found, found))
    homes.reverse()
    return homes


def _nearest(
    met: OrderedDict[str, None], leaders: OrderedDict[str, str]
) -> tuple[str, ...]:
    """Return up to :data:`PAIR` names: the leaders of the zones, then the rest."""
    found: list[str] = []
    for name in reversed(leaders.values()):
        if len(found) == PAIR:
            return tuple(found)
        found.append(name)
    leading = set(found)
    for name in reversed(met):
        if len(found) == PAIR:
            break
        if name not in leading:
            found.append(name)
    return tuple(found)
