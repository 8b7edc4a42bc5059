"""Sessions that live for over 30 days, which memcached takes for a date.

A node's clock cannot be moved. It is told dates by a worker's clock, so a session that
is made by a worker whose clock is behind is, for the node, as old as that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apps import Sites, TimeMachine, item_of
from builders import (
    ALICE,
    DAY,
    HOUR,
    NOW,
    PREFIX,
    SECOND,
    Site,
    ask,
    content,
    make_site,
    real_node,
    session_key,
    timing,
)
from flask_resilient_session.core.answers import Ack
from flask_resilient_session.core.lifetimes import exptime_seconds
from flask_resilient_session.memcached.text_protocol import Add, Cas, Get, Set, Value
from reaping import counts, reap
from servers import Memcached

TIMING = timing(lifetime_ms=60 * DAY)
#: What a copy outlives its session by on a node: the grace and a day.
MARGIN = DAY + HOUR

DAYS = 24 * 3600
#: The last date that memcached takes.
LAST = 2**31 - 1
LAST_MS = LAST * SECOND

#: Seconds that a slow machine, and a sync interval, may add.
SLACK = 200


@pytest.fixture
def site(nodes: list[Memcached], tmp_path: Path) -> Iterator[Site]:
    """One worker whose sessions live for 60 days."""
    made = make_site(nodes, tmp_path, timing=TIMING)
    yield made
    made.close()


def left(site: Site, name: str = ALICE) -> list[int | None]:
    """Seconds that each home will hold its copy still, as itself says."""
    return [home.raw_ttl(PREFIX + session_key(name)) for home in site.homes(name)]


# --- what memcached does ---------------------------------------------------------


@pytest.mark.parametrize("verb", ["add", "set", "cas"])
@pytest.mark.parametrize(
    ("seconds", "date", "held"),
    [
        (30 * DAYS, None, True),
        (30 * DAYS + 1, None, False),
        (60 * DAYS, None, False),
        (None, -60 * DAYS, False),
        (None, 60 * DAYS, True),
        (None, 400 * DAYS, True),
        (LAST, None, True),
        (LAST + 1, None, False),
        (2**32 - 1, None, False),
    ],
    ids=[
        "30 days",
        "a second more",
        "60 days",
        "a past date",
        "the date in 60 days",
        "the date in 400 days",
        "the last date",
        "the next one",
        "the last 32 bits",
    ],
)
def test_what_memcached_holds_of_what_it_stores(
    memcached: Memcached, verb: str, seconds: int | None, date: int | None, held: bool
) -> None:
    """It answers STORED to each; what it cannot take for a date to come is gone."""
    exptime = seconds or round(time.time()) + (date or 0)
    node = real_node(memcached)
    request: Add | Set | Cas = Set("k", b"data", exptime)
    if verb == "add":
        request = Add("k", b"data", exptime)
    elif verb == "cas":
        assert ask(node, Set("k", b"before", 100)) is Ack.STORED
        exchange = node.send(Get("k", 100), time.monotonic() + 10)
        found = exchange.receive()
        assert isinstance(found, Value)
        request = Cas("k", b"data", exptime, found.cas, exchange.read_at)
    assert ask(node, request) is Ack.STORED
    assert memcached.raw_get("k") == (b"data" if held else None)


@pytest.mark.parametrize(
    ("clock_ms", "until_ms", "days"),
    [
        (None, 28 * DAY, 29),
        (None, 29 * DAY, 30),
        (None, 60 * DAY, 61),
        (None, 400 * DAY, 401),
        (None, 36500 * DAY, None),
        (LAST_MS - 40 * DAY, 60 * DAY, None),
        (LAST_MS - 20 * DAY, 60 * DAY, 30),
        (LAST_MS, 60 * DAY, 30),
        (LAST_MS + 900 * DAY, 60 * DAY, 30),
    ],
)
def test_a_real_node_holds_what_it_is_given(
    memcached: Memcached, clock_ms: int | None, until_ms: int, days: int | None
) -> None:
    """For as long as it was meant, or until the last date; after that for 30 days."""
    now_ms = clock_ms or time.time_ns() // 1_000_000
    exptime = exptime_seconds(now_ms + until_ms, timing(reap_grace_ms=0), now_ms)
    assert ask(real_node(memcached), Set("k", b"data", exptime)) is Ack.STORED
    ttl = memcached.raw_ttl("k")
    assert ttl is not None
    expected = LAST - time.time() if days is None else days * DAYS
    assert abs(ttl - expected) < SLACK


@pytest.mark.parametrize(
    ("until_ms", "expected"),
    [
        (NOW, MARGIN // SECOND),
        (NOW + DAY, (DAY + MARGIN) // SECOND),
        (NOW - MARGIN, 1),
        (NOW - MARGIN + 999, 1),
        (0, 1),
        (NOW + 30 * DAY - MARGIN, 30 * DAYS),
        (NOW + 30 * DAY - MARGIN + 999, 30 * DAYS),
        (NOW + 30 * DAY - MARGIN + 1000, NOW // SECOND + 30 * DAYS + 1),
        (NOW + 60 * DAY, (NOW + 60 * DAY + MARGIN) // SECOND),
        (LAST_MS - MARGIN - 1000, LAST - 1),
        (LAST_MS, LAST),
        (NOW + 100_000 * DAY, LAST),
    ],
)
def test_expiry_is_seconds_or_a_date(until_ms: int, expected: int) -> None:
    """Never 0, for ever; seconds up to 30 days, then a date that memcached takes."""
    assert exptime_seconds(until_ms, TIMING, NOW) == expected


# --- what users keep -------------------------------------------------------------


def test_a_session_outlives_31_days_without_a_row(site: Site) -> None:
    """Made 31 days ago and never seen by SQL, it is on both nodes, for 30 days more."""
    site.clock.ahead_ms = -31 * DAY
    site.create(ALICE, required=False, page=1)
    site.clock.ahead_ms = 0
    expected = (60 * DAY - 31 * DAY + MARGIN) // SECOND
    for seconds in left(site):
        assert seconds is not None
        assert abs(seconds - expected) < SLACK
    assert site.row(ALICE) is None
    assert site.seen() == {"page": 1}


def test_a_change_outlives_31_days_without_a_sync(site: Site) -> None:
    """What was changed after the last sync is on both nodes as long as the session."""
    site.create(ALICE, page=1)
    site.change(ALICE, page=2)
    for days in (31, 59):
        site.clock.ahead_ms = days * DAY
        assert site.in_row() == {"page": 1}
        assert site.seen() == {"page": 2}
    for seconds in left(site):
        assert seconds is not None
        assert abs(seconds - (60 * DAY + MARGIN) // SECOND) < SLACK
    site.clock.ahead_ms = 61 * DAY
    assert site.reason() == "expired"


def test_a_session_that_is_over_leaves_the_nodes_by_itself(site: Site) -> None:
    """A copy that was made longer ago than it lives is not held any more."""
    site.clock.ahead_ms = -62 * DAY
    site.create(ALICE, required=False, page=1)
    assert left(site) == [None, None]


def test_an_end_stays_on_the_nodes_for_as_long(site: Site) -> None:
    """No copy that a node may still hold outlives the session's tombstone."""
    site.create(ALICE, page=1)
    site.store.end(site.context(ALICE), site.live(ALICE))
    assert site.is_dead()
    for seconds in left(site):
        assert seconds is not None
        assert seconds > (60 * DAY + MARGIN) // SECOND


def test_under_flasks_default_lifetime_nothing_ends_early(
    sites: Sites, clock: TimeMachine
) -> None:
    """Its 31 days are over 30: the last change is there after them, from memory."""
    flask = sites()
    flask.set(_user_id="1")
    flask.set(tail=1)
    before = flask.rows()
    clock.forward(30.9 * DAYS)
    assert counts(reap(flask)) == (0, 0, 0, 0)
    assert flask.rows() == before
    for node in flask.nodes:
        ttl = node.raw_ttl(item_of(flask.sid()))
        assert ttl is not None
        assert abs(ttl - 32 * DAYS) < 2 * SLACK
    assert flask.data() == {"_user_id": "1", "tail": 1}


# --- clocks that are wrong -------------------------------------------------------


def test_a_node_a_lifetime_ahead_of_the_workers_clock_holds_nothing(
    site: Site,
) -> None:
    """It answers STORED all the same: what SQL has is left, and no visitor is."""
    site.clock.ahead_ms = -70 * DAY
    site.create(ALICE, page=1)
    site.change(ALICE, page=2)
    assert site.copies(ALICE) == [None, None]
    assert site.seen() == {"page": 2}
    site.create("visitor", required=False, page=1)
    assert site.reason("visitor") == "missing"


def test_one_worker_whose_clock_is_behind_ends_nothing_of_the_others(
    site: Site,
) -> None:
    """A copy is kept for a lifetime after the latest use that any clock has noted."""
    site.create(ALICE, page=1)
    site.clock.ahead_ms = -70 * DAY
    site.change(ALICE, page=2)
    site.clock.ahead_ms = 0
    for seconds in left(site):
        assert seconds is not None
        assert abs(seconds - (60 * DAY + MARGIN) // SECOND) < SLACK
    assert site.seen() == {"page": 2}


def test_a_node_days_ahead_forgets_as_many_days_earlier(site: Site) -> None:
    """Less one, which copies outlive their session by; then SQL has it."""
    site.clock.ahead_ms = -5 * DAY
    site.create(ALICE, page=1)
    for seconds in left(site):
        assert seconds is not None
        assert abs(seconds - (55 * DAY + MARGIN) // SECOND) < SLACK
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 1}] * 2
