"""Whole sessions on two real nodes and SQLite: break one thing, look everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders import (
    NAMESPACE,
    PREFIX,
    SECOND,
    Site,
    encoded,
    make_site,
    session_key,
)
from flask_resilient_session.codec import decode
from flask_resilient_session.errors import SessionTooLarge, SessionUnavailable
from flask_resilient_session.record import (
    CorruptBytes,
    Keyring,
    Record,
    Tombstone,
    UnknownFormat,
)
from flask_resilient_session.replication import Gone, Live, Standing, Unknown
from servers import Memcached, ServerError

HOMES = pytest.mark.parametrize("broken", [0, 1], ids=["first_home", "second_home"])
ALICE, BOB = "alice", "bob"
LARGE = "x" * 50_000


@pytest.fixture
def site(nodes: list[Memcached], tmp_path: Path) -> Iterator[Site]:
    """One worker over two nodes and an SQLite file."""
    made = make_site(nodes, tmp_path)
    yield made
    made.close()


def content(found: Any) -> dict[str, Any] | None:
    """What the user sees of a record; None where there is none."""
    if isinstance(found, Live):
        found = found.record
    return decode(found.payload()) if isinstance(found, Record) else None


def in_row(site: Site, name: str = ALICE) -> dict[str, Any] | None:
    """What SQL would show of a session."""
    payload = site.row_content(name)
    return None if payload is None else decode(payload)


def seen(site: Site, name: str = ALICE) -> dict[str, Any] | None:
    """What the next request sees."""
    return content(site.store.load(site.access(name)))


def reason(site: Site, name: str = ALICE) -> str | None:
    """Why the next request sees no session."""
    found = site.store.load(site.access(name))
    return found.reason if isinstance(found, Gone) else None


def touch(site: Site, name: str = ALICE, **how: Any) -> Any:
    """A request that only reads the session."""
    return site.store.save(site.access(name), site.live(name, **how), {})


def is_dead(site: Site, name: str = ALICE) -> bool:
    """Whether every home and SQL hold a tombstone that owes nothing."""
    row = site.row(name)
    buried = [copy for copy in site.copies(name) if isinstance(copy, Tombstone)]
    return (
        row is not None
        and row.revoked_at is not None
        and row.record is None
        and len(buried) == 2
        and not any(tombstone.debt for tombstone in buried)
    )


def fill(server: Memcached) -> None:
    """Fill a server that refuses rather than evicts, so that ``LARGE`` is refused."""
    for number in range(1000):
        try:
            # Of about the same size: memcached keeps items of each size apart, and
            # one page for each size that was never used.
            server.raw_set(f"filler-{number}", b"x" * (len(LARGE) + 200))
        except ServerError:
            return
    raise AssertionError("the server is never full")


# --- what it costs ---------------------------------------------------------------


def test_a_visitors_session(site: Site) -> None:
    """Stored in one round trip; its row comes with the second request."""
    with site.cost() as cost:
        site.create(ALICE, required=False, page=1)
    assert (cost.round_trips, cost.statements) == (1, 0)
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 1}] * 2
    assert site.row(ALICE) is None
    with site.cost() as cost:
        touch(site)
    assert (cost.round_trips, cost.statements) == (1, 1)
    assert in_row(site) == {"page": 1}
    with site.cost() as cost:
        touch(site)
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
    assert in_row(site) == {"page": 1}


def test_a_sync_that_is_due(site: Site) -> None:
    """Changed or only read, the next request after the interval writes SQL once."""
    site.create(ALICE, page=1)
    site.change(ALICE, page=2)
    site.clock.ahead_ms += 61 * SECOND
    with site.cost() as cost:
        touch(site)
    assert (cost.round_trips, cost.statements) == (1, 1)
    assert in_row(site) == {"page": 2}
    assert site.live(ALICE).record.row_version == 2
    site.clock.ahead_ms += 61 * SECOND
    with site.cost() as cost:
        site.change(ALICE, page=3)
    assert (cost.round_trips, cost.statements) == (2, 1)
    assert in_row(site) == {"page": 3}
    with site.cost() as cost:
        touch(site)
    assert (cost.round_trips, cost.statements) == (1, 0)


def test_a_refresh_that_is_due(site: Site) -> None:
    """The homes are told of the use, and nobody waits for it."""
    before = site.create(ALICE, page=1).record.last_use_ms
    site.clock.ahead_ms += 11 * SECOND
    with site.cost() as cost:
        touch(site)
    assert (cost.round_trips, cost.statements) == (1, 0)
    assert site.observer.stats["one_way_writes"] == 1
    assert site.live(ALICE).record.last_use_ms >= before + 11 * SECOND
    touch(site)
    assert site.observer.stats["one_way_writes"] == 1


@pytest.mark.parametrize("required", [True, False])
def test_a_logout(site: Site, required: bool) -> None:
    """SQL first, then both homes; nothing of the session is left anywhere."""
    site.create(ALICE, required=required, page=1)
    with site.cost() as cost:
        site.store.end(site.access(ALICE), site.live(ALICE))
    assert cost.round_trips == 2
    assert cost.statements <= 2
    assert is_dead(site)
    assert isinstance(site.store.load(site.access(ALICE)), Gone)


def test_revoking_what_nobody_loaded(site: Site) -> None:
    """A session is ended by its key alone, also one that never had a row."""
    site.create(ALICE, required=False, page=1)
    with site.cost() as cost:
        site.store.end(site.access(ALICE), None)
    assert (cost.round_trips, cost.statements) == (1, 2)
    assert is_dead(site)


@pytest.mark.parametrize("required", [True, False])
def test_a_move(site: Site, required: bool) -> None:
    """The data goes along, the old id is dead, all in one transaction."""
    created = site.create(ALICE, required=required, page=1).record.created_ms
    with site.cost() as cost:
        live = site.live(ALICE)
        new = site.access(BOB)
        moved = site.store.move(site.access(ALICE), live, new, encoded(seen=True))
    assert cost.round_trips in (2, 3)
    assert cost.statements == 2
    assert content(moved) == {"page": 1, "seen": True}
    assert is_dead(site)
    assert seen(site, BOB) == in_row(site, BOB) == {"page": 1, "seen": True}
    assert site.live(BOB).record.created_ms == created
    assert reason(site) == "moved"


def test_a_session_that_starts_over(site: Site) -> None:
    """Moved as ended: nothing but the new data is in the new one."""
    site.create(ALICE, page=1)
    live, new = site.live(ALICE), site.access(BOB)
    change = encoded(_user_id="bob")
    site.store.move(site.access(ALICE), live, new, change, reason="ended")
    assert seen(site, BOB) == {"_user_id": "bob"}
    assert is_dead(site)


# --- one home --------------------------------------------------------------------


@HOMES
def test_one_home_is_down(site: Site, broken: int) -> None:
    """Two copies -> one home dies -> read and change -> it returns, empty."""
    site.create(ALICE, page=1)
    home = site.homes(ALICE)[broken]
    site.change(ALICE, page=2)
    home.kill()
    assert seen(site) == {"page": 2}
    with site.cost() as cost:
        site.change(ALICE, page=3)
    assert (cost.round_trips, cost.statements) == (2, 2)  # asked, and told at once
    assert in_row(site) == {"page": 3}
    home.start()
    assert seen(site) == {"page": 3}
    touch(site)
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 3}] * 2
    with site.cost() as cost:
        assert site.live(ALICE).standing is Standing.AGREED
    assert (cost.round_trips, cost.statements) == (1, 0)


@HOMES
def test_one_home_was_restarted_empty(site: Site, broken: int) -> None:
    """A miss is no logout, and the next request repairs the copy."""
    site.create(ALICE, page=1)
    site.change(ALICE, page=2)
    site.homes(ALICE)[broken].restart()
    assert seen(site) == {"page": 2}
    with site.cost() as cost:
        touch(site)
    assert (cost.round_trips, cost.statements) == (2, 1)
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 2}] * 2
    assert site.observer.stats["repaired"] == 1


@HOMES
def test_one_home_dies_between_load_and_save(site: Site, broken: int) -> None:
    """The other home and SQL have the change before it is acknowledged."""
    site.create(ALICE, page=1)
    live = site.live(ALICE)
    site.homes(ALICE)[broken].kill()
    site.store.save(site.access(ALICE), live, encoded(page=2))
    assert in_row(site) == {"page": 2}
    assert content(site.copy(ALICE, 1 - broken)) == {"page": 2}
    assert seen(site) == {"page": 2}


@HOMES
def test_an_old_copy_comes_back(site: Site, broken: int) -> None:
    """A home that returns with what it held long ago loses, and is repaired."""
    site.create(ALICE, page=1, cart="full")
    home, key = site.homes(ALICE)[broken], PREFIX + session_key(ALICE)
    old = home.raw_get(key)
    site.change(ALICE, page=2, cart=None)
    assert old is not None
    home.raw_set(key, old)
    assert seen(site) == {"page": 2}
    touch(site)
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 2}] * 2


@HOMES
def test_one_copy_is_corrupt(site: Site, broken: int) -> None:
    """Garbage is not used, and replaced."""
    site.create(ALICE, page=1)
    site.homes(ALICE)[broken].raw_set(PREFIX + session_key(ALICE), b"garbage")
    assert CorruptBytes() in site.copies(ALICE)
    assert seen(site) == {"page": 1}
    assert site.observer.stats["corrupt_copies"] == 1
    touch(site)
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 1}] * 2


@HOMES
def test_one_copy_is_of_another_key(site: Site, broken: int) -> None:
    """A worker ahead in a rotation wrote it: changes go around it, never over it."""
    site.create(ALICE, page=1)
    home, key = site.homes(ALICE)[broken], PREFIX + session_key(ALICE)
    ahead = Keyring(["next secret", "test secret"], NAMESPACE)
    sealed = ahead.seal(session_key(ALICE), site.live(ALICE).record)
    home.raw_set(key, sealed)
    assert UnknownFormat() in site.copies(ALICE)
    site.change(ALICE, page=2)
    touch(site)
    assert home.raw_get(key) == sealed
    assert seen(site) == in_row(site) == {"page": 2}
    site.keyring = ahead
    assert seen(site) == {"page": 2}


# --- both homes ------------------------------------------------------------------


def test_both_homes_were_restarted_empty(site: Site) -> None:
    """What SQL has is still there; later changes are lost, no login is."""
    site.create(ALICE, page=1)
    site.change(ALICE, page=2)
    for home in site.homes(ALICE):
        home.restart()
    assert seen(site) == {"page": 1}
    touch(site)
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 1}] * 2


def test_a_visitor_lost_with_both_homes(site: Site) -> None:
    """Without row and copies the session is gone; with one copy it is not."""
    site.create(ALICE, required=False, page=1)
    site.create(BOB, required=False, page=1)
    site.homes(ALICE)[0].restart()
    assert seen(site, ALICE) == in_row(site, ALICE) == {"page": 1}
    site.homes(ALICE)[1].restart()
    assert reason(site, BOB) == "missing"


def test_both_homes_refuse_the_change(tmp_path: Path) -> None:
    """Full, both of them: SQL takes it and the old copies, which agree, must go."""
    extra = {"memory_megabytes": 2, "extra": ["-M"]}
    with Memcached(**extra) as first, Memcached(**extra) as second:  # type: ignore[arg-type]
        site = make_site([first, second], tmp_path)
        site.create(ALICE, page=1)
        for home in site.homes(ALICE):
            fill(home)
        site.change(ALICE, page=LARGE)
        assert in_row(site) == {"page": LARGE}
        assert site.copies(ALICE) == [None, None]
        assert seen(site) == {"page": LARGE}
        site.close()


@HOMES
def test_one_home_refuses_the_change(tmp_path: Path, broken: int) -> None:
    """Its old copy disagrees with the other's new one, so that SQL is asked."""
    options: list[dict[str, Any]] = [{}, {"memory_megabytes": 2, "extra": ["-M"]}]
    with Memcached(**options[broken]) as one, Memcached(**options[1 - broken]) as two:
        site = make_site([one, two], tmp_path)
        site.create(ALICE, page=1)
        fill((one, two)[1 - broken])
        site.change(ALICE, page=LARGE)
        assert seen(site) == in_row(site) == {"page": LARGE}
        assert {"page": LARGE} in [content(copy) for copy in site.copies(ALICE)]
        site.close()


# --- concurrent requests ---------------------------------------------------------


def test_two_requests_change_different_keys(site: Site) -> None:
    """Two loads, two saves: both changes are on both homes."""
    site.create(ALICE, page=1)
    first, second = site.live(ALICE), site.live(ALICE)
    site.store.save(site.access(ALICE), first, encoded(cart="full"))
    saved = site.store.save(site.access(ALICE), second, encoded(name="Alice"))
    both = {"page": 1, "cart": "full", "name": "Alice"}
    assert content(saved) == both
    assert [content(copy) for copy in site.copies(ALICE)] == [both] * 2
    assert site.observer.stats["conflicts"] == 1


def test_two_due_syncs_at_once(site: Site) -> None:
    """The second finds another version in SQL, joins and writes again."""
    site.create(ALICE, page=1)
    site.clock.ahead_ms += 61 * SECOND
    first, second = site.live(ALICE), site.live(ALICE)
    site.store.save(site.access(ALICE), first, encoded(cart="full"))
    site.store.save(site.access(ALICE), second, encoded(name="Alice"))
    both = {"page": 1, "cart": "full", "name": "Alice"}
    assert [content(copy) for copy in site.copies(ALICE)] == [both] * 2


def test_a_logout_wins_over_a_save_in_flight(site: Site) -> None:
    """The save that was under way finds the session gone, and nothing revives it."""
    site.create(ALICE, page=1)
    in_flight = site.live(ALICE)
    site.store.end(site.access(ALICE), site.live(ALICE))
    assert isinstance(
        site.store.save(site.access(ALICE), in_flight, encoded(x=1)), Gone
    )
    assert is_dead(site)


@pytest.mark.parametrize("changes", [{}, {"x": 1}])
def test_a_logout_wins_over_a_late_sync(site: Site, changes: dict[str, int]) -> None:
    """The same when the save in flight is about to write SQL first."""
    site.create(ALICE, page=1)
    site.clock.ahead_ms += 61 * SECOND
    in_flight = site.live(ALICE)
    site.store.end(site.access(ALICE), None)
    saved = site.store.save(site.access(ALICE), in_flight, encoded(**changes))
    assert isinstance(saved, Gone)
    assert is_dead(site)


def test_a_late_visitors_row_does_not_revive(site: Site) -> None:
    """A logout before the first sync: the insert that was due finds a tombstone."""
    site.create(ALICE, required=False, page=1)
    in_flight = site.live(ALICE)
    site.store.end(site.access(ALICE), site.live(ALICE))
    assert isinstance(site.store.save(site.access(ALICE), in_flight, {}), Gone)
    assert is_dead(site)


def test_a_move_carries_a_concurrent_write_over(site: Site) -> None:
    """What was acknowledged under the old id meanwhile is there under the new one."""
    site.create(ALICE, page=1, cart="empty")
    live = site.live(ALICE)
    site.change(ALICE, cart="full", page=2)
    new = site.access(BOB)
    site.store.move(site.access(ALICE), live, new, encoded(page=9))
    assert seen(site, BOB) == {"page": 9, "cart": "full"}
    assert [content(copy) for copy in site.copies(BOB)] == [seen(site, BOB)] * 2
    assert is_dead(site)


def test_a_move_of_the_dead(site: Site) -> None:
    """There is no new session for one that was ended meanwhile."""
    site.create(ALICE, page=1)
    live = site.live(ALICE)
    site.store.end(site.access(ALICE), None)
    moved = site.store.move(site.access(ALICE), live, site.access(BOB), {})
    assert isinstance(moved, Gone)
    assert site.row(BOB) is None
    assert site.copies(BOB) == [None, None]
    assert is_dead(site)


def test_saving_again_what_was_just_created(site: Site) -> None:
    """The second save of the same request reaches both homes as well."""
    created = site.create(ALICE, page=1)
    site.store.save(site.access(ALICE), created, encoded(page=2))
    assert seen(site) == {"page": 2}
    moved = site.store.move(site.access(ALICE), site.live(ALICE), site.access(BOB), {})
    assert isinstance(moved, Live)
    saved = site.store.save(site.access(BOB), moved, encoded(page=3))
    assert isinstance(saved, Live)
    site.store.save(site.access(BOB), saved, encoded(page=4))
    assert seen(site, BOB) == {"page": 4}


# --- SQL is down -----------------------------------------------------------------


def test_a_logout_with_sql_down_leaves_a_debt(site: Site) -> None:
    """Both homes take it, and the next reader tells SQL."""
    site.create(ALICE, page=1)
    live = site.live(ALICE)
    site.sql.down = True
    site.store.end(site.access(ALICE), live)
    assert [copy.debt for copy in site.copies(ALICE)] == [True, True]
    assert isinstance(site.store.load(site.access(ALICE)), Gone)
    site.sql.down = False
    assert in_row(site) == {"page": 1}
    assert isinstance(site.store.load(site.access(ALICE)), Gone)
    assert is_dead(site)


@HOMES
def test_a_logout_with_sql_and_a_home_down(site: Site, broken: int) -> None:
    """Not acknowledged: the session might come back."""
    site.create(ALICE, page=1)
    live = site.live(ALICE)
    site.sql.down = True
    site.homes(ALICE)[broken].kill()
    with pytest.raises(SessionUnavailable, match="not changed"):
        site.store.end(site.access(ALICE), live)


def test_changes_with_sql_down(site: Site) -> None:
    """Two homes are two places; a due sync waits; what needs SQL is refused."""
    site.create(ALICE, page=1)
    site.clock.ahead_ms += 61 * SECOND
    site.sql.down = True
    site.change(ALICE, page=2)
    assert site.observer.stats["syncs_put_off"] == 1
    assert seen(site) == {"page": 2}
    live = site.live(ALICE)
    with pytest.raises(SessionUnavailable):
        site.store.save(site.access(ALICE), live, encoded(_user_id=1), required=True)
    with pytest.raises(SessionUnavailable):
        site.store.move(site.access(ALICE), live, site.access(BOB), {})
    with pytest.raises(SessionUnavailable):
        site.create(BOB, page=1)
    site.create("visitor", required=False, page=1)
    site.sql.down = False
    touch(site)
    assert seen(site) == in_row(site) == {"page": 2}


@HOMES
def test_one_place_is_not_enough(site: Site, broken: int) -> None:
    """With SQL and a home down sessions are read, unverified, but not changed."""
    site.create(ALICE, page=1)
    site.sql.down = True
    site.homes(ALICE)[broken].kill()
    live = site.live(ALICE)
    assert live.standing is Standing.UNVERIFIED
    assert content(live) == {"page": 1}
    with pytest.raises(SessionUnavailable):
        site.store.save(site.access(ALICE), live, encoded(page=2))
    site.store.save(site.access(ALICE), live, {})
    with pytest.raises(SessionUnavailable):
        site.create(BOB, required=False, page=1)


def test_a_change_from_an_unverified_copy_is_checked_later(site: Site) -> None:
    """Both homes take it, marked; SQL is asked as soon as it answers."""
    site.create(ALICE, page=1)
    site.homes(ALICE)[0].restart()
    site.sql.down = True
    site.change(ALICE, page=2)
    assert [copy.unverified for copy in site.copies(ALICE)] == [True, True]
    site.sql.down = False
    assert site.live(ALICE).standing is Standing.CONFIRMED
    site.change(ALICE, page=3)
    assert seen(site) == in_row(site) == {"page": 3}
    assert site.live(ALICE).standing is Standing.AGREED


def test_nobody_answers(site: Site) -> None:
    """An error is not an absence."""
    site.create(ALICE, page=1)
    site.sql.down = True
    for home in site.homes(ALICE):
        home.kill()
    assert site.store.load(site.access(ALICE)) == Unknown()


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
    site.clock.ahead_ms += 3601 * SECOND
    assert reason(site) == "expired"
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 1}] * 2
    assert in_row(site) == {"page": 1}
