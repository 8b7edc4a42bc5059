"""Two homes and SQL: break one thing, act, and look at each of the three."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builders import (
    ALICE,
    BOB,
    NAMESPACE,
    PREFIX,
    SECOND,
    Site,
    content,
    encoded,
    make_site,
    session_key,
    soon,
)
from flask_resilient_session.common.errors import SessionUnavailable
from flask_resilient_session.core.envelope import CorruptBytes, Keyring, UnknownFormat
from flask_resilient_session.core.reading import Gone, Standing, Unknown
from flask_resilient_session.sql.table import Row
from servers import Memcached, ServerError

HOMES = pytest.mark.parametrize("broken", [0, 1], ids=["first_home", "second_home"])
LARGE = "x" * 50_000


@pytest.fixture
def site(nodes: list[Memcached], tmp_path: Path) -> Iterator[Site]:
    """One worker over two nodes and an SQLite file."""
    made = make_site(nodes, tmp_path)
    yield made
    made.close()


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


# --- one home --------------------------------------------------------------------


@HOMES
def test_one_home_is_down(site: Site, broken: int) -> None:
    """Two copies -> one home dies -> read and change -> it returns, empty."""
    site.create(ALICE, page=1)
    home = site.homes(ALICE)[broken]
    site.change(ALICE, page=2)
    home.kill()
    assert site.seen() == {"page": 2}
    with site.cost() as cost:
        site.change(ALICE, page=3)
    assert (cost.round_trips, cost.statements) == (2, 2)  # asked, and told at once
    assert site.in_row() == {"page": 3}
    home.start()
    assert site.seen() == {"page": 3}
    site.touch()
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
    assert site.seen() == {"page": 2}
    with site.cost() as cost:
        site.touch()
    assert (cost.round_trips, cost.statements) == (2, 1)
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 2}] * 2
    assert site.observer.stats["repaired"] == 1


@HOMES
def test_one_home_dies_between_load_and_save(site: Site, broken: int) -> None:
    """The other home and SQL have the change before it is acknowledged."""
    site.create(ALICE, page=1)
    live = site.live(ALICE)
    site.homes(ALICE)[broken].kill()
    site.store.save(site.context(ALICE), live, encoded(page=2))
    assert site.in_row() == {"page": 2}
    assert content(site.copy(ALICE, 1 - broken)) == {"page": 2}
    assert site.seen() == {"page": 2}


@HOMES
def test_an_old_copy_comes_back(site: Site, broken: int) -> None:
    """A home that returns with what it held long ago loses, and is repaired."""
    site.create(ALICE, page=1, cart="full")
    home, key = site.homes(ALICE)[broken], PREFIX + session_key(ALICE)
    old = home.raw_get(key)
    site.change(ALICE, page=2, cart=None)
    assert old is not None
    home.raw_set(key, old)
    assert site.seen() == {"page": 2}
    site.touch()
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 2}] * 2


@HOMES
def test_one_copy_is_corrupt(site: Site, broken: int) -> None:
    """Garbage is not used, and replaced."""
    site.create(ALICE, page=1)
    site.homes(ALICE)[broken].raw_set(PREFIX + session_key(ALICE), b"garbage")
    assert CorruptBytes() in site.copies(ALICE)
    assert site.seen() == {"page": 1}
    assert site.observer.stats["corrupt_copies"] == 1
    site.touch()
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
    site.touch()
    assert home.raw_get(key) == sealed
    assert site.seen() == site.in_row() == {"page": 2}
    site.keyring = ahead
    assert site.seen() == {"page": 2}


# --- both homes ------------------------------------------------------------------


def test_both_homes_were_restarted_empty(site: Site) -> None:
    """What SQL has is still there; later changes are lost, no login is."""
    site.create(ALICE, page=1)
    site.change(ALICE, page=2)
    for home in site.homes(ALICE):
        home.restart()
    assert site.seen() == {"page": 1}
    site.touch()
    assert [content(copy) for copy in site.copies(ALICE)] == [{"page": 1}] * 2


def test_a_visitor_lost_with_both_homes(site: Site) -> None:
    """Without row and copies the session is gone; with one copy it is not."""
    site.create(ALICE, required=False, page=1)
    site.create(BOB, required=False, page=1)
    site.homes(ALICE)[0].restart()
    assert site.seen(ALICE) == site.in_row(ALICE) == {"page": 1}
    site.homes(ALICE)[1].restart()
    assert site.reason(BOB) == "missing"


def test_a_session_that_sql_has_never_heard_of(site: Site) -> None:
    """A genuine id without a session costs one round trip and one read each time."""
    for _ in range(2):
        with site.cost() as cost:
            assert site.reason() == "missing"
        assert (cost.round_trips, cost.statements) == (1, 1)
    assert (site.copies(ALICE), site.row(ALICE)) == ([None, None], None)


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


def test_with_its_row_comes_all_that_memory_held(forgotten: tuple[Site, Row]) -> None:
    """A database that was empty for a moment ends nobody's session for good."""
    site, row = forgotten
    assert site.sql.table.insert(row, soon())
    assert site.seen() == {"page": 2}
    site.change(ALICE, page=4)
    assert site.seen() == site.in_row() == {"page": 4}
    with site.cost() as cost:
        site.touch()
    assert (cost.round_trips, cost.statements) == (1, 0)


def test_a_lost_row_is_no_news_while_sql_is_silent(
    forgotten: tuple[Site, Row],
) -> None:
    """Two copies that agree are served, as always when SQL does not answer."""
    site, _ = forgotten
    site.sql.down = True
    assert site.seen() == {"page": 2}


def test_both_homes_refuse_the_change(tmp_path: Path) -> None:
    """Full, both of them: SQL takes it, and of two old copies that agree one goes."""
    extra = {"memory_megabytes": 2, "extra": ["-M"]}
    with Memcached(**extra) as first, Memcached(**extra) as second:  # type: ignore[arg-type]
        site = make_site([first, second], tmp_path)
        site.create(ALICE, page=1)
        for home in site.homes(ALICE):
            fill(home)
        site.change(ALICE, page=LARGE)
        assert site.in_row() == {"page": LARGE}
        assert [content(copy) for copy in site.copies(ALICE) if copy] == [{"page": 1}]
        assert site.seen() == {"page": LARGE}
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
        assert site.seen() == site.in_row() == {"page": LARGE}
        assert {"page": LARGE} in [content(copy) for copy in site.copies(ALICE)]
        site.close()


# --- SQL is down -----------------------------------------------------------------


def test_a_logout_with_sql_down_leaves_a_debt(site: Site) -> None:
    """Both homes take it, and the next reader tells SQL."""
    site.create(ALICE, page=1)
    live = site.live(ALICE)
    site.sql.down = True
    site.store.end(site.context(ALICE), live)
    assert [copy.debt for copy in site.copies(ALICE)] == [True, True]
    assert isinstance(site.store.load(site.context(ALICE)), Gone)
    site.sql.down = False
    assert site.in_row() == {"page": 1}
    assert isinstance(site.store.load(site.context(ALICE)), Gone)
    assert site.is_dead()


@HOMES
def test_a_logout_with_sql_and_a_home_down(site: Site, broken: int) -> None:
    """Not acknowledged: the session might come back."""
    site.create(ALICE, page=1)
    live = site.live(ALICE)
    site.sql.down = True
    site.homes(ALICE)[broken].kill()
    with pytest.raises(SessionUnavailable, match="not changed"):
        site.store.end(site.context(ALICE), live)


def test_changes_with_sql_down(site: Site) -> None:
    """Two homes are two places; a due sync waits; what needs SQL is refused."""
    site.create(ALICE, page=1)
    site.clock.ahead_ms += 61 * SECOND
    site.sql.down = True
    site.change(ALICE, page=2)
    assert site.observer.stats["syncs_put_off"] == 1
    assert site.seen() == {"page": 2}
    live = site.live(ALICE)
    with pytest.raises(SessionUnavailable):
        site.store.save(site.context(ALICE), live, encoded(_user_id=1), required=True)
    with pytest.raises(SessionUnavailable):
        site.store.move(site.context(ALICE), live, site.context(BOB), {})
    with pytest.raises(SessionUnavailable):
        site.create(BOB, page=1)
    site.create("visitor", required=False, page=1)
    site.sql.down = False
    site.touch()
    assert site.seen() == site.in_row() == {"page": 2}


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
        site.store.save(site.context(ALICE), live, encoded(page=2))
    site.store.save(site.context(ALICE), live, {})
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
    assert site.seen() == site.in_row() == {"page": 3}
    assert site.live(ALICE).standing is Standing.AGREED


def test_nobody_answers(site: Site) -> None:
    """An error is not an absence."""
    site.create(ALICE, page=1)
    site.sql.down = True
    for home in site.homes(ALICE):
        home.kill()
    assert site.store.load(site.context(ALICE)) == Unknown()
