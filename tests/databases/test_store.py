"""What a store promises below the requests: its uses, moves and late answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders import (
    ALICE,
    BOB,
    PREFIX,
    SECOND,
    Site,
    content,
    encoded,
    make_site,
    session_key,
    soon,
)
from flask_resilient_session.core.reading import Gone, Live
from flask_resilient_session.core.record import Tombstone
from flask_resilient_session.sql.table import Row
from servers import Memcached


@pytest.fixture
def site(nodes: list[Memcached], tmp_path: Path) -> Iterator[Site]:
    """One worker over two nodes and an SQLite file."""
    made = make_site(nodes, tmp_path)
    yield made
    made.close()


# --- how long a session lives ----------------------------------------------------


def test_a_use_is_recorded_though_sql_is_silent(site: Site) -> None:
    """Once the interval has passed the homes are told, with the sync or without it."""
    before = site.create(ALICE, page=1).record.last_use_ms
    site.clock.ahead_ms += 61 * SECOND
    site.sql.down = True
    with site.cost() as cost:
        site.touch()
    assert cost.round_trips == 2
    assert site.live(ALICE).record.last_use_ms >= before + 61 * SECOND
    with site.cost() as cost:
        site.touch()
    assert cost.round_trips == 1


@pytest.mark.parametrize(
    ("seconds", "sync_ms"),
    [
        (30, 3 * SECOND),
        (30, 0),
        (1800, 120 * SECOND),
        (1800, 0),
        (60 * 86_400, 120 * SECOND),
        (60 * 86_400, 0),
    ],
)
@pytest.mark.parametrize("parts", [0, 1, 2, 5, 9])
def test_an_idle_lifetime_is_never_cut_short(
    site: Site, seconds: int, sync_ms: int, parts: int
) -> None:
    """Whatever the interval: last use and lifetime, and at most an interval more."""
    site.timing = replace(site.timing, lifetime_ms=seconds * 1000, sync_ms=sync_ms)
    site.create(ALICE, page=1)
    slack_ms = site.timing.slack_ms
    # Used once more, some part of the interval after the last use that was recorded.
    site.clock.ahead_ms += slack_ms * parts // 10
    site.touch()
    used_ms = site.clock.now_ms()
    site.clock.ahead_ms += seconds * 1000 - 500
    assert site.seen() == {"page": 1}
    for home in range(2):
        assert site.copy(ALICE, home).last_use_ms + seconds * 1000 + slack_ms >= (
            used_ms + seconds * 1000
        )
    site.clock.ahead_ms += slack_ms + 1000
    assert site.seen() is None


def test_revoking_what_nobody_loaded(site: Site) -> None:
    """A session is ended by its key alone, also one that never had a row."""
    site.create(ALICE, required=False, page=1)
    with site.cost() as cost:
        site.store.end(site.context(ALICE), None)
    assert (cost.round_trips, cost.statements) == (1, 2)
    assert site.is_dead()


@pytest.mark.parametrize("required", [True, False])
def test_a_move(site: Site, required: bool) -> None:
    """The data goes along, the old id is dead, all in one transaction."""
    created = site.create(ALICE, required=required, page=1).record.created_ms
    with site.cost() as cost:
        live = site.live(ALICE)
        new = site.context(BOB)
        moved = site.store.move(site.context(ALICE), live, new, encoded(seen=True))
    assert cost.round_trips in (2, 3)
    assert cost.statements == 2
    assert content(moved) == {"page": 1, "seen": True}
    assert site.is_dead()
    assert site.seen(BOB) == site.in_row(BOB) == {"page": 1, "seen": True}
    assert site.live(BOB).record.created_ms == created
    assert site.reason() == "moved"


def test_a_session_that_starts_over(site: Site) -> None:
    """Moved as ended: nothing but the new data is in the new one."""
    site.create(ALICE, page=1)
    live, new = site.live(ALICE), site.context(BOB)
    change = encoded(_user_id="bob")
    site.store.move(site.context(ALICE), live, new, change, reason="ended")
    assert site.seen(BOB) == {"_user_id": "bob"}
    assert site.is_dead()


# --- concurrent requests ---------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"x": 1}])
def test_a_logout_wins_over_a_late_sync(site: Site, changes: dict[str, int]) -> None:
    """The same when the save in flight is about to write SQL first."""
    site.create(ALICE, page=1)
    site.clock.ahead_ms += 61 * SECOND
    in_flight = site.live(ALICE)
    site.store.end(site.context(ALICE), None)
    saved = site.store.save(site.context(ALICE), in_flight, encoded(**changes))
    assert isinstance(saved, Gone)
    assert site.is_dead()


def test_a_visitors_pair_that_rested_asks_sql_first(site: Site) -> None:
    """Somebody who reached SQL but no home may have ended it meanwhile."""
    site.create(ALICE, required=False, cart=1)
    context = site.context(ALICE)
    ended = Tombstone("ended", site.clock.now_ms())
    site.store.rows.put_tombstone(context, ended, None)
    assert site.seen() == {"cart": 1}
    site.clock.ahead_ms += 2 * site.timing.sync_ms + 61_000
    assert site.seen() is None


def test_a_move_carries_a_concurrent_write_over(site: Site) -> None:
    """What was acknowledged under the old id meanwhile is there under the new one."""
    site.create(ALICE, page=1, cart="empty")
    live = site.live(ALICE)
    site.change(ALICE, cart="full", page=2)
    new = site.context(BOB)
    site.store.move(site.context(ALICE), live, new, encoded(page=9))
    assert site.seen(BOB) == {"page": 9, "cart": "full"}
    assert [content(copy) for copy in site.copies(BOB)] == [site.seen(BOB)] * 2
    assert site.is_dead()


def test_a_move_that_waited_for_sql_carries_over_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is over, and what others were told is kept comes along."""
    site.create(ALICE, cart="empty")
    old, live = site.context(ALICE), site.live(ALICE)
    site.change(ALICE, cart="full")
    real = site.store.rows.move

    def slow(*args: Any) -> Any:
        moved = real(*args)
        old.patience.left = -1.0
        return moved

    monkeypatch.setattr(site.store.rows, "move", slow)
    site.store.move(old, live, replace(site.context(BOB), patience=old.patience), {})
    assert site.seen(BOB) == {"cart": "full"}
    assert site.is_dead()


@pytest.mark.parametrize("home", [0, 1])
def test_a_move_brings_no_deleted_key_back(site: Site, home: int) -> None:
    """Not from a home that was silent when it began, and came back with an old copy."""
    site.create(ALICE, page=1, cart="full")
    server, key = site.homes(ALICE)[home], PREFIX + session_key(ALICE)
    old_copy = server.raw_get(key)
    assert old_copy is not None
    site.change(ALICE, cart=None)
    site.store.save(site.context(ALICE), site.live(ALICE), {}, required=True)
    server.kill()
    live = site.live(ALICE)
    server.start()
    server.raw_set(key, old_copy)
    site.store.move(site.context(ALICE), live, site.context(BOB), {})
    assert site.seen(BOB) == {"page": 1}
    assert site.is_dead()


def test_a_move_of_the_dead(site: Site) -> None:
    """There is no new session for one that was ended meanwhile."""
    site.create(ALICE, page=1)
    live = site.live(ALICE)
    site.store.end(site.context(ALICE), None)
    moved = site.store.move(site.context(ALICE), live, site.context(BOB), {})
    assert isinstance(moved, Gone)
    assert site.row(BOB) is None
    assert site.copies(BOB) == [None, None]
    assert site.is_dead()


def test_saving_again_what_was_just_created(site: Site) -> None:
    """The second save of the same request reaches both homes as well."""
    created = site.create(ALICE, page=1)
    site.store.save(site.context(ALICE), created, encoded(page=2))
    assert site.seen() == {"page": 2}
    moved = site.store.move(
        site.context(ALICE), site.live(ALICE), site.context(BOB), {}
    )
    assert isinstance(moved, Live)
    saved = site.store.save(site.context(BOB), moved, encoded(page=3))
    assert isinstance(saved, Live)
    site.store.save(site.context(BOB), saved, encoded(page=4))
    assert site.seen(BOB) == {"page": 4}


# --- limits ----------------------------------------------------------------------


def test_an_expired_session(site: Site) -> None:
    """Gone for the reader, and no tombstone is written on a clock's word."""
    site.timing = replace(site.timing, lifetime_ms=3600 * SECOND)
    site.create(ALICE, page=1)
    site.clock.ahead_ms += 3661 * SECOND
    assert site.reason() == "expired"
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 1}] * 2
    assert site.in_row() == {"page": 1}


# --- a row that is lost ----------------------------------------------------------


@pytest.fixture
def forgotten(site: Site) -> tuple[Site, Row]:
    """A session whose row is lost, as a sync found out, and the row."""
    site.create(ALICE, page=1)
    site.change(ALICE, page=2)
    row = site.row(ALICE)
    assert row is not None
    assert site.sql.table.delete([row], soon()) == [True]
    site.clock.ahead_ms += site.timing.sync_ms
    saved = site.change(ALICE, page=3)
    assert saved == Gone("missing", held=True)
    return site, row


def test_a_session_whose_row_is_lost_is_gone_each_time(
    forgotten: tuple[Site, Row],
) -> None:
    """From the sync that finds it out; its copies are not believed meanwhile."""
    site, _ = forgotten
    for _ in range(3):
        with site.cost() as cost:
            assert site.reason() == "missing"
        assert (cost.round_trips, cost.statements) == (1, 1)
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 2}] * 2


def test_a_lost_row_is_no_news_while_sql_is_silent(
    forgotten: tuple[Site, Row],
) -> None:
    """Two copies that agree are served, as always when SQL does not answer."""
    site, _ = forgotten
    site.sql.down = True
    assert site.seen() == {"page": 2}
