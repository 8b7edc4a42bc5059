"""The reaper deletes what is dead, renews what is alive, and revives nothing."""

from __future__ import annotations

from typing import Any

import pytest
from flask import session

from apps import Site, Sites, TimeMachine, item_of, key_of
from flask_resilient_session import session_expired
from reaping import LIFETIME, PAST, change_row, counts, reap, succeeded
from servers import wait_until


@pytest.fixture
def site(sites: Sites, clock: TimeMachine) -> Site:
    """One application whose sessions live an hour; one visitor is logged in."""
    site = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
    site.set(_user_id="1")
    return site


# --- what is dead ----------------------------------------------------------------


def test_nothing_is_looked_at_before_its_time(site: Site, clock: TimeMachine) -> None:
    """A row outlives its session by the sync interval and the grace."""
    assert counts(reap(site)) == (0, 0, 0, 0)
    row = site.rows()[key_of(site.sid())]
    assert row.expires_at > clock.now_ms() + LIFETIME * 1000
    clock.forward((row.expires_at - clock.now_ms()) / 1000 + 55)
    assert counts(reap(site)) == (0, 0, 0, 0)
    clock.forward(10)
    assert counts(reap(site)) == (1, 0, 1, 0)
    assert site.rows() == {}


def test_the_dead_are_announced_with_their_data(site: Site, clock: TimeMachine) -> None:
    """session_expired carries the newest data, also what only memory had."""
    site.data()
    site.set(late=(1, 2))
    told: list[dict[str, Any]] = []

    def listener(sender: object, **fields: Any) -> None:
        told.append(fields)

    clock.forward(PAST)
    with session_expired.connected_to(listener, site.app):
        reap(site)
    assert told == [
        {
            "session": key_of(site.sid())[:12],
            "data": {"_user_id": "1", "late": (1, 2)},
        }
    ]


def test_a_living_neighbour_stays(site: Site, clock: TimeMachine) -> None:
    """Only what is past its time goes."""
    clock.forward(PAST)
    neighbour = site.app.test_client()
    site.set(neighbour, _user_id="2")
    assert counts(reap(site)) == (1, 0, 1, 0)
    assert site.data(neighbour) == {"_user_id": "2"}
    assert site.data() == {}


def test_a_reaped_session_stays_dead(site: Site, clock: TimeMachine) -> None:
    """What a node still holds of it does not count."""
    clock.forward(PAST)
    reap(site)
    assert site.data() == {}
    assert site.set(a=1).status_code == 200
    assert site.data() == {"a": 1}


def test_a_dry_run_changes_nothing(site: Site, clock: TimeMachine) -> None:
    """It counts what would be done."""
    clock.forward(PAST)
    before = site.rows()
    report = reap(site, dry_run=True)
    assert counts(report) == (1, 0, 1, 0)
    assert report.dry_run
    assert site.rows() == before


# --- what is alive ---------------------------------------------------------------


def test_what_is_alive_in_memory_is_renewed(site: Site, clock: TimeMachine) -> None:
    """SQL was away while the session was used: the row learns of it, and its data."""
    with pytest.MonkeyPatch.context() as patch:
        site.break_sql(patch)
        for step in range(4):
            clock.forward(LIFETIME * 0.6)
            site.set(step=step)
    # This process skips SQL for a moment still.
    report = wait_until(lambda: succeeded(site))
    assert counts(report) == (1, 1, 0, 0)
    row = site.rows()[key_of(site.sid())]
    assert row.expires_at > clock.now_ms() + LIFETIME * 1000
    for node in site.nodes:
        node.flush()
    assert site.data() == {"_user_id": "1", "step": 3}
    assert counts(reap(site)) == (0, 0, 0, 0)


def test_a_raised_lifetime_renews(site: Site, clock: TimeMachine) -> None:
    """Expiry is judged by the lifetime as it is now."""
    clock.forward(PAST)
    site.app.config["PERMANENT_SESSION_LIFETIME"] = 10 * LIFETIME
    assert counts(reap(site)) == (1, 1, 0, 0)
    assert site.data() == {"_user_id": "1"}


def test_a_lowered_lifetime_ends_sessions_at_once(
    site: Site, clock: TimeMachine
) -> None:
    """For readers; the row goes when its own time comes."""
    site.app.config["PERMANENT_SESSION_LIFETIME"] = LIFETIME / 10
    clock.forward(LIFETIME / 5)
    assert site.data() == {}
    assert counts(reap(site)) == (0, 0, 0, 0)
    clock.forward(PAST)
    assert counts(reap(site)) == (1, 0, 1, 0)


def test_renewing_a_session_is_no_use_of_it(site: Site, clock: TimeMachine) -> None:
    """The reaper's visits must not keep a session alive for ever."""
    site.app.config["PERMANENT_SESSION_LIFETIME"] = 10 * LIFETIME
    for _ in range(3):
        clock.forward(3 * LIFETIME)
        change_row(site, expires_at=1)
        assert counts(reap(site)) == (1, 1, 0, 0)
    clock.forward(LIFETIME + 121)
    assert site.data() == {}


# --- what was ended --------------------------------------------------------------


def test_a_logged_out_session_never_comes_back(site: Site, clock: TimeMachine) -> None:
    """While a node holds an old copy the tombstone stays; then it goes too."""
    sid, cookie = site.sid(), site.cookie()
    copies = [node.raw_get(item_of(sid)) for node in site.nodes]
    site.visit(lambda: session.clear())
    for node, data in zip(site.nodes, copies, strict=True):
        assert data is not None
        node.raw_set(item_of(sid), data)
    change_row(site, expires_at=1)
    assert counts(reap(site)) == (1, 0, 0, 1)
    assert site.rows()[key_of(sid)].revoked_at is not None
    clock.forward(PAST)
    change_row(site, expires_at=1)
    assert counts(reap(site)) == (1, 0, 1, 0)
    assert site.data(site.browser_with(cookie)) == {}


def test_a_debt_is_paid(site: Site) -> None:
    """Logged out while SQL was away: the row becomes a tombstone, not a session."""
    sid, cookie = site.sid(), site.cookie()
    with pytest.MonkeyPatch.context() as patch:
        site.break_sql(patch)
        assert site.visit(lambda: session.clear()).status_code == 200
    assert site.rows()[key_of(sid)].revoked_at is None
    change_row(site, expires_at=1)
    report = reap(site)
    assert (report.examined, report.renewed, report.unchecked) == (1, 0, 0)
    assert site.rows()[key_of(sid)].revoked_at is not None
    for node in site.nodes:
        node.flush()
    assert site.data(site.browser_with(cookie)) == {}
