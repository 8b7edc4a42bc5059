"""Whole sessions on two real nodes and SQLite: break one thing, look everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
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
)
from flask_resilient_session.common.errors import SessionTooLarge
from flask_resilient_session.core.reading import Gone, Live, Standing
from flask_resilient_session.core.record import Tombstone
from misbehaving import run_together
from servers import Memcached


@pytest.fixture
def site(nodes: list[Memcached], tmp_path: Path) -> Iterator[Site]:
    """One worker over two nodes and an SQLite file."""
    made = make_site(nodes, tmp_path)
    yield made
    made.close()


# --- what it costs ---------------------------------------------------------------


def test_a_visitors_session(site: Site) -> None:
    """Stored in one round trip; its row comes with the second request."""
    with site.cost() as cost:
        site.create(ALICE, required=False, page=1)
    assert (cost.round_trips, cost.statements) == (1, 0)
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 1}] * 2
    assert site.row(ALICE) is None
    with site.cost() as cost:
        site.touch()
    assert (cost.round_trips, cost.statements) == (2, 1)
    assert site.in_row() == {"page": 1}
    with site.cost() as cost:
        site.touch()
    assert (cost.round_trips, cost.statements) == (1, 0)


def test_a_login(site: Site) -> None:
    """Required: SQL and both homes have it before it is acknowledged."""
    with site.cost() as cost:
        site.create(ALICE, _user_id="alice")
    assert (cost.round_trips, cost.statements) == (1, 1)
    row = site.row(ALICE)
    assert row is not None
    assert row.user_id == "alice"
    with site.cost() as cost:
        assert site.live(ALICE).standing is Standing.AGREED
    assert (cost.round_trips, cost.statements) == (1, 0)


def test_a_change(site: Site) -> None:
    """Read both, write both, and no SQL before a sync is due."""
    site.create(ALICE, page=1)
    with site.cost() as cost:
        site.change(ALICE, page=2)
    assert (cost.round_trips, cost.statements) == (2, 0)
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 2}] * 2
    assert site.in_row() == {"page": 1}


def test_a_sync_that_is_due(site: Site) -> None:
    """Changed or only read, the next request after the interval writes SQL once."""
    site.create(ALICE, page=1)
    site.change(ALICE, page=2)
    site.clock.ahead_ms += 61 * SECOND
    with site.cost() as cost:
        site.touch()
    assert (cost.round_trips, cost.statements) == (2, 1)
    assert site.in_row() == {"page": 2}
    assert site.live(ALICE).record.row_version == 2
    site.clock.ahead_ms += 61 * SECOND
    with site.cost() as cost:
        site.change(ALICE, page=3)
    assert (cost.round_trips, cost.statements) == (2, 1)
    assert site.in_row() == {"page": 3}
    with site.cost() as cost:
        site.touch()
    assert (cost.round_trips, cost.statements) == (1, 0)


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


@pytest.mark.parametrize("required", [True, False])
def test_a_logout(site: Site, required: bool) -> None:
    """SQL first, then both homes; nothing of the session is left anywhere."""
    site.create(ALICE, required=required, page=1)
    with site.cost() as cost:
        site.store.end(site.context(ALICE), site.live(ALICE))
    assert cost.round_trips == 2
    assert cost.statements <= 2
    assert site.is_dead()
    assert isinstance(site.store.load(site.context(ALICE)), Gone)


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


def test_two_requests_change_different_keys(site: Site) -> None:
    """Two loads, two saves: both changes are on both homes."""
    site.create(ALICE, page=1)
    first, second = site.live(ALICE), site.live(ALICE)
    site.store.save(site.context(ALICE), first, encoded(cart="full"))
    saved = site.store.save(site.context(ALICE), second, encoded(name="Alice"))
    both = {"page": 1, "cart": "full", "name": "Alice"}
    assert content(saved) == both
    assert [content(copy) for copy in site.copies(ALICE)] == [both] * 2
    assert site.observer.stats["conflicts"] == 1


def test_many_requests_of_two_workers_at_once(
    nodes: list[Memcached], tmp_path: Path
) -> None:
    """Six requests change six keys, over and over: no change is lost anywhere."""
    sites = [make_site(nodes, tmp_path) for _ in range(2)]
    sites[0].create(ALICE, page=1)

    def requests(number: int) -> None:
        for turn in range(15):
            sites[number % 2].change(ALICE, **{f"key{number}": turn})

    results = run_together(*(partial(requests, number) for number in range(6)))
    assert results == [None] * 6
    expected = {"page": 1} | {f"key{number}": 14 for number in range(6)}
    assert sites[0].seen() == expected
    sites[1].touch()
    assert [content(copy) for copy in sites[1].copies(ALICE)] == [expected] * 2
    for site in sites:
        site.close()


def test_two_due_syncs_at_once(site: Site) -> None:
    """The second finds another version in SQL, joins and writes again."""
    site.create(ALICE, page=1)
    site.clock.ahead_ms += 61 * SECOND
    first, second = site.live(ALICE), site.live(ALICE)
    site.store.save(site.context(ALICE), first, encoded(cart="full"))
    site.store.save(site.context(ALICE), second, encoded(name="Alice"))
    both = {"page": 1, "cart": "full", "name": "Alice"}
    assert [content(copy) for copy in site.copies(ALICE)] == [both] * 2


def test_a_logout_wins_over_a_save_in_flight(site: Site) -> None:
    """The save that was under way finds the session gone, and nothing revives it."""
    site.create(ALICE, page=1)
    in_flight = site.live(ALICE)
    site.store.end(site.context(ALICE), site.live(ALICE))
    assert isinstance(
        site.store.save(site.context(ALICE), in_flight, encoded(x=1)), Gone
    )
    assert site.is_dead()


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


def test_a_late_visitors_row_does_not_revive(site: Site) -> None:
    """A logout before the first sync: the insert that was due finds a tombstone."""
    site.create(ALICE, required=False, page=1)
    in_flight = site.live(ALICE)
    site.store.end(site.context(ALICE), site.live(ALICE))
    assert isinstance(site.store.save(site.context(ALICE), in_flight, {}), Gone)
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


def test_a_session_that_is_too_large(site: Site) -> None:
    """Nothing is stored of it, and what was stored stays."""
    with pytest.raises(SessionTooLarge):
        site.create(ALICE, page="x" * 100_001)
    assert (site.copies(ALICE), site.row(ALICE)) == ([None, None], None)
    site.create(ALICE, page=1)
    with pytest.raises(SessionTooLarge) as caught:
        site.change(ALICE, page="x" * 100_001)
    assert caught.value.limit == 100_000
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 1}] * 2


def test_an_expired_session(site: Site) -> None:
    """Gone for the reader, and no tombstone is written on a clock's word."""
    site.timing = replace(site.timing, lifetime_ms=3600 * SECOND)
    site.create(ALICE, page=1)
    site.clock.ahead_ms += 3661 * SECOND
    assert site.reason() == "expired"
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 1}] * 2
    assert site.in_row() == {"page": 1}
