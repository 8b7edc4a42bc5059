"""Laws of the ring: who is home, and how little a change of nodes moves."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_resilient_session.core.ring import POINTS_PER_WEIGHT, Ring, RingNode, _points


def session_keys(count: int) -> list[str]:
    """Return this many session keys, the same ones each time."""
    return [hashlib.sha256(b"%d" % number).hexdigest() for number in range(count)]


KEYS = session_keys(20_000)
FIRST, SECOND, THIRD, FOURTH = (
    "10.0.0.1:11211",
    "10.0.0.2:11211",
    "unix:/run/m.sock",
    "kéy",
)


def plain(count: int) -> list[RingNode]:
    return [RingNode(f"node-{number}") for number in range(count)]


def weighted(count: int) -> list[RingNode]:
    weights = (0.01, 1.0, 7.5, 0.3, 20.0)
    return [RingNode(f"node-{n}", weights[n % 5]) for n in range(count)]


def zoned(count: int) -> list[RingNode]:
    return [RingNode(f"node-{n}", zone="abc"[n % 3]) for n in range(count)]


def lopsided(count: int) -> list[RingNode]:
    """One small node alone in its zone, and weights that differ by zone."""
    return [RingNode(f"node-{n}", 0.2 + n, "b" if n else "a") for n in range(count)]


LAYOUTS = (plain, weighted, zoned, lopsided)


def replaced(before: Ring, after: Ring, key: str) -> int:
    """Return how many homes of a key are homes no longer."""
    return len(set(before.homes(key)) - set(after.homes(key)))


def test_an_empty_ring_has_no_homes() -> None:
    """Without nodes nobody is home."""
    assert Ring([]).homes(KEYS[0]) == ()
    assert Ring([]).names == frozenset()


def test_there_are_never_more_homes_than_nodes() -> None:
    """Two homes, or one where there is but one node."""
    for count in range(1, 5):
        homes = Ring(plain(count)).homes(KEYS[0])
        assert len(homes) == len(set(homes)) == min(2, count)


def test_two_nodes_of_one_name_are_refused() -> None:
    """Nobody could tell them apart."""
    with pytest.raises(ValueError, match="'node-0'"):
        Ring([*plain(2), RingNode("node-0", 2.0)])


def test_names_are_those_of_the_nodes() -> None:
    """The ring tells which names it knows."""
    assert Ring(plain(3)).names == {"node-0", "node-1", "node-2"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_the_list_has_no_effect(
    layout: Callable[[int], list[RingNode]],
) -> None:
    """Shuffled nodes give the same homes."""
    nodes = layout(7)
    straight = Ring(nodes)
    random.Random(5).shuffle(nodes)
    shuffled = Ring(iter(nodes))
    assert all(straight.homes(key) == shuffled.homes(key) for key in KEYS[:2000])


def test_a_larger_weight_only_adds_points() -> None:
    """The points of a small weight are among those of a larger one."""
    small = list(_points(RingNode("a", 0.5)))
    large = list(_points(RingNode("a", 3.0, "elsewhere")))
    assert len(small) == POINTS_PER_WEIGHT // 2
    assert large[: len(small)] == small
    assert len(list(_points(RingNode("a", 0.0001)))) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_homes_are_found_by_walking_the_ring(
    layout: Callable[[int], list[RingNode]],
) -> None:
    """The table agrees with a plain walk forwards from the key's point."""
    nodes = layout(6)
    ring = Ring(nodes)
    marks = sorted((point, node.name) for node in nodes for point in _points(node))
    zones = {node.name: node.zone for node in nodes}
    for key in KEYS[:300]:
        start = int(key[:16], 16)
        order = dict.fromkeys(
            [name for point, name in marks if point > start]
            + [name for point, name in marks if point <= start]
        )
        leaders = list({zones[name]: name for name in reversed(order)}.values())[::-1]
        leaders.sort(key=list(order).index)
        expected = dict.fromkeys([*leaders, *order])
        assert ring.homes(key) == tuple(expected)[:2]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_node_leaves_every_session_a_home(
    layout: Callable[[int], list[RingNode]], count: int
) -> None:
    """Adding, and removing, any one node loses no key more than one home."""
    nodes = layout(count + 1)
    after = Ring(nodes)
    for leaver in nodes:
        before = Ring([node for node in nodes if node is not leaver])
        for key in KEYS:
            assert set(before.homes(key)) & set(after.homes(key))
            assert replaced(before, after, key) <= 1


NODE = st.builds(
    RingNode,
    name=st.text(max_size=4),
    weight=st.sampled_from([0.01, 0.05, 0.2, 1.0]),
    zone=st.sampled_from(["", "a", "b", "c"]),
)


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.lists(NODE, max_size=7, unique_by=lambda node: node.name),
    one=NODE,
    other=NODE,
)
def test_any_change_of_one_node_replaces_at_most_one_home(
    nodes: list[RingNode], one: RingNode, other: RingNode
) -> None:
    """Adding, removing, and another weight and zone, on any layout."""
    rest = [node for node in nodes if node.name != one.name]
    without = Ring(rest)
    before = Ring([*rest, one])
    after = Ring([*rest, RingNode(one.name, other.weight, other.zone)])
    for key in KEYS[:300]:
        assert replaced(without, before, key) <= 1
        assert replaced(before, without, key) <= 1
        assert replaced(before, after, key) <= 1


def test_zones_are_distinct_as_far_as_there_are_enough() -> None:
    """Homes lie in two zones where there are two."""
    nodes = [RingNode(f"node-{n}", zone="b" if n == 5 else "") for n in range(6)]
    zones = {node.name: node.zone for node in nodes}
    ring = Ring(nodes)
    for key in KEYS[:5000]:
        assert {zones[name] for name in ring.homes(key)} == {"", "b"}


def test_a_new_node_takes_its_share_and_no_more() -> None:
    """One node more takes about 1/(n+1) of the copies; nothing else moves."""
    before, after = Ring(plain(5)), Ring(plain(6))
    moved = 0
    for key in KEYS:
        new = set(after.homes(key)) - set(before.homes(key))
        assert new <= {"node-5"}
        moved += len(new)
    assert moved / (2 * len(KEYS)) == pytest.approx(1 / 6, rel=0.15)


def test_the_load_follows_the_weights() -> None:
    """Equal nodes hold equally much; first homes are in proportion to weight."""
    eight = Ring(plain(8))
    equal = Counter(name for key in KEYS for name in eight.homes(key))
    assert max(equal.values()) / min(equal.values()) < 1.3
    ring = Ring([RingNode("a", 4.0), RingNode("b", 2.0), RingNode("c", 2.0)])
    firsts = Counter(ring.homes(key)[0] for key in KEYS)
    assert firsts["a"] / len(KEYS) == pytest.approx(0.5, rel=0.1)
    assert firsts["b"] / len(KEYS) == pytest.approx(0.25, rel=0.15)


def test_placement_is_the_same_in_every_release() -> None:
    """Homes of fixed keys: if this fails, an upgrade would move all sessions."""
    names = {FIRST: 1.0, SECOND: 2.0, THIRD: 0.5, FOURTH: 1.0}
    one_zone = Ring(RingNode(*item) for item in names.items())
    two_zones = Ring(
        RingNode(*item, "b" if item[0] == SECOND else "a") for item in names.items()
    )
    zero, one, two, three = session_keys(4)
    assert one_zone.homes("0" * 64) == (FIRST, SECOND)
    assert one_zone.homes("f" * 64) == (FIRST, SECOND)
    assert one_zone.homes(zero) == (SECOND, FOURTH)
    assert one_zone.homes(one) == (FIRST, FOURTH)
    assert one_zone.homes(two) == (FIRST, SECOND)
    assert one_zone.homes(three) == (FOURTH, THIRD)
    assert two_zones.homes(zero) == (SECOND, FOURTH)
    assert two_zones.homes(one) == (FIRST, SECOND)
    assert two_zones.homes(two) == (FIRST, SECOND)
    assert two_zones.homes(three) == (FOURTH, SECOND)
