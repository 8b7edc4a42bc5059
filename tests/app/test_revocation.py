"""Ending a user's sessions from outside of their requests."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from flask import session
from flask.testing import FlaskClient

from apps import Site, Sites, TimeMachine, item_of, key_of
from flask_resilient_session import SessionUnavailable
from flask_resilient_session.common.events import session_revoked
from flask_resilient_session.store.row import user_id_column

LONG = "https://id.example/" + "x" * 300
#: Users whose ids are easily taken for one another.
ALIKE = ["bob", "Bob", "bob ", "BOB", "b%b", "b_b", "'; --", "böb", "7", LONG, LONG[1:]]


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults."""
    return sites()


def login(site: Site, user: object, **data: Any) -> FlaskClient:
    """A browser in which this user has logged in."""
    browser = site.browser_with(None)
    site.set(browser, _user_id=user, **data)
    return browser


def inside(site: Site) -> AbstractContextManager[Any]:
    """The application's context."""
    return site.app.app_context()


# --- by code ---------------------------------------------------------------------


def test_revoking_ends_all_sessions_of_a_user_at_once(site: Site) -> None:
    """Every browser of theirs is logged out with the next request, nobody else."""
    theirs = [login(site, "alice") for _ in range(3)]
    other = login(site, "bob", a=1)
    with inside(site):
        assert site.sessions.revoke_user("alice") == 3
        assert site.sessions.revoke_user("alice") == 0
    assert [site.data(browser) for browser in theirs] == [{}] * 3
    assert site.data(other) == {"_user_id": "bob", "a": 1}


def test_revoking_is_final_in_sql_and_in_both_homes(site: Site) -> None:
    """A tombstone stands in all three places, also after a node lost its memory."""
    browser = login(site, "alice")
    sid = site.sid(browser)
    with inside(site):
        site.sessions.revoke_user("alice")
    row = site.rows()[key_of(sid)]
    assert (row.record, row.user_id) == (None, None)
    assert row.revoked_at
    for node in site.nodes:
        assert node.raw_get(item_of(sid)) is not None
        node.flush()
    assert site.data(browser) == {}


@pytest.mark.parametrize("user", ALIKE)
def test_only_exactly_this_user_is_revoked(site: Site, user: str) -> None:
    """Case, blanks, wildcards and length all count."""
    browsers = {name: login(site, name) for name in ALIKE}
    with inside(site):
        assert len(site.sessions.sessions_of(user)) == 1
        assert site.sessions.revoke_user(user) == 1
    for name, browser in browsers.items():
        assert site.data(browser) == ({} if name == user else {"_user_id": name})


@pytest.mark.parametrize("given", [42, "42"])
@pytest.mark.parametrize("stored", [42, "42"])
def test_numbers_and_their_texts_are_one_user(
    site: Site, stored: object, given: object
) -> None:
    """An app may hold an int where another place has its text."""
    browser = login(site, stored)
    with inside(site):
        assert site.sessions.revoke_user(given) == 1
    assert site.data(browser) == {}


@pytest.mark.parametrize("user", ["nul\0l", "lone \ud800", "tab\t", "a\nb", ""])
def test_odd_ids_can_log_in_and_be_revoked(site: Site, user: str) -> None:
    """What SQL cannot hold as it is stands there as its digest."""
    browser = login(site, user)
    with inside(site):
        assert site.sessions.revoke_user(user) == 1
    assert site.data(browser) == {}


def test_a_long_id_is_stored_as_its_digest() -> None:
    """Up to the column's width as it is, over it as SHA-256."""
    assert user_id_column("x" * 191) == "x" * 191
    digest = hashlib.sha256(("x" * 192).encode()).hexdigest()
    assert user_id_column("x" * 192) == digest


def test_nobody_is_not_everybody(site: Site) -> None:
    """An anonymous user's id, None, ends and shows nothing: only --all means all."""
    browser = login(site, "alice")
    with inside(site):
        with pytest.raises(ValueError, match="None"):
            site.sessions.revoke_user(None)
        with pytest.raises(ValueError, match="None"):
            site.sessions.sessions_of(None)
    assert site.data(browser) == {"_user_id": "alice"}


def test_all_but_the_one_in_use(site: Site) -> None:
    """After a change of the password the browser that made it stays logged in."""
    mine, other = login(site, "alice", a=1), login(site, "alice")

    def action() -> str:
        return str(site.sessions.revoke_user("alice", keep=session))  # type: ignore[arg-type]

    assert site.visit(action, browser=mine).text == "1"
    assert site.data(mine) == {"_user_id": "alice", "a": 1}
    assert site.data(other) == {}


def test_all_but_the_one_in_use_with_a_new_id(site: Site) -> None:
    """Also where it takes a new id in the same request, as it should."""
    mine, other = login(site, "alice", a=1), login(site, "alice")
    old = site.cookie(mine)

    def action() -> str:
        session.regenerate()  # type: ignore[attr-defined]
        return str(site.sessions.revoke_user("alice", keep=session))  # type: ignore[arg-type]

    assert site.visit(action, browser=mine).text == "1"
    assert site.cookie(mine) != old
    assert site.data(mine) == {"_user_id": "alice", "a": 1}
    assert site.data(other) == site.data(site.browser_with(old)) == {}


def test_one_session_of_the_list_can_be_ended(site: Site) -> None:
    """A user ends one of their own sessions by the name that the list shows."""
    browsers = [login(site, "alice") for _ in range(2)]
    with inside(site):
        names = {info.session for info in site.sessions.sessions_of("alice")}
        name = key_of(site.sid(browsers[0]))[:12]
        assert name in names
        assert not site.sessions.revoke_session("mallory", name)
        assert site.sessions.revoke_session("alice", name)
        assert not site.sessions.revoke_session("alice", name)
    assert site.data(browsers[0]) == {}
    assert site.data(browsers[1]) == {"_user_id": "alice"}


def test_the_list_shows_times_and_no_ids(site: Site, clock: TimeMachine) -> None:
    """Created, synced, expires, in time zones; the id is not in it."""
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    browser = login(site, "alice", secret="of alice")
    login(site, "bob")
    with inside(site):
        (info,) = site.sessions.sessions_of("alice")
    assert before < info.created_at <= info.synced_at < info.expires_at
    assert info.user_id == "alice"
    assert sorted(info.homes) == sorted(node.address for node in site.nodes)
    assert site.sid(browser) not in repr(info)
    assert "of alice" not in repr(info)
    clock.forward(365 * 24 * 3600)
    with inside(site):
        assert site.sessions.sessions_of("alice") == []


def test_a_revoked_session_is_signalled(site: Site) -> None:
    """Listeners hear the short digest of each."""
    heard: list[Any] = []
    name = key_of(site.sid(login(site, "alice")))[:12]

    def listen(sender: Any, **fields: Any) -> None:
        heard.append(fields)

    with session_revoked.connected_to(listen), inside(site):
        site.sessions.revoke_user("alice")
    assert heard == [{"session": name}]


# --- at the same time ------------------------------------------------------------


def interfere(
    site: Site, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]
) -> None:
    """Do something once, right after the first page of sessions was read."""
    real = site.state.sql.page_live
    done: list[object] = []

    def page(*args: Any) -> Any:
        found = real(*args)
        if found and not done:
            done.append(True)
            act()
        return found

    monkeypatch.setattr(site.state.sql, "page_live", page)


def test_a_session_that_moves_meanwhile_is_ended(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id regenerated while its user is revoked does not escape."""
    browsers = [login(site, "alice") for _ in range(8)]

    def move() -> None:
        for browser in browsers:
            site.visit(lambda: session.regenerate(), browser=browser)  # type: ignore[attr-defined]

    interfere(site, monkeypatch, move)
    with inside(site):
        assert site.sessions.revoke_user("alice") >= 8
    assert [site.data(browser) for browser in browsers] == [{}] * 8


def test_a_session_created_meanwhile_is_ended(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login that was under way when the account was closed does not stay."""
    first = login(site, "alice")
    late: list[FlaskClient] = []
    interfere(
        site, monkeypatch, lambda: late.extend(login(site, "alice") for _ in range(8))
    )
    with inside(site):
        assert site.sessions.revoke_user("alice") == 9
    assert [site.data(browser) for browser in [first, *late]] == [{}] * 9


def test_a_request_in_flight_does_not_bring_it_back(site: Site) -> None:
    """What loaded the session before it was revoked cannot save it after."""
    browser = login(site, "alice")

    def action() -> None:
        session["b"] = 2
        site.sessions.revoke_user("alice")

    assert "Set-Cookie" not in site.visit(action, browser=browser).headers
    assert site.data(browser) == {}


# --- faults ----------------------------------------------------------------------


def test_a_home_that_is_down_is_told_by_sql(site: Site) -> None:
    """Revoked with one home killed: gone at once, and still when it is back."""
    browser = login(site, "alice")
    site.nodes[0].kill()
    with inside(site):
        assert site.sessions.revoke_user("alice") == 1
    assert site.data(browser) == {}
    site.nodes[0].restart()
    assert site.data(browser) == {}


def test_a_frozen_node_holds_revocation_up_for_a_bounded_time(sites: Sites) -> None:
    """Thirty sessions with a hung home take a few timeouts, not thirty."""
    retry = {"RETRY": 30, "RETRY_MAX": 30, "TIMEOUT": 0.3}
    site = sites(**{f"RESILIENT_SESSION_NODE_{k}": v for k, v in retry.items()})
    browsers = [login(site, "alice") for _ in range(30)]
    site.nodes[0].freeze()
    started = time.monotonic()
    with inside(site):
        assert site.sessions.revoke_user("alice") == 30
    assert time.monotonic() - started < 4
    assert [site.data(browser) for browser in browsers[::10]] == [{}] * 3
    site.nodes[0].thaw()
    assert [site.data(browser) for browser in browsers[1::10]] == [{}] * 3


def revoked_untold(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> tuple[Site, FlaskClient, float]:
    """A login that a host revoked which reaches neither home.

    :returns: the site, the browser, and the sync interval in seconds.
    """
    site = sites()
    browser = login(site, "alice")
    site.data(browser)
    host = sites()
    monkeypatch.setattr(host.state.store.homes.cluster, "_admitted", lambda name: None)
    with inside(host):
        assert host.sessions.revoke_user("alice") == 1
    timing = host.state.settings.timing(timedelta(days=31))
    return site, browser, timing.sync_ms / 1000


@pytest.mark.parametrize("rest", [2, 500])
def test_homes_that_could_not_be_told_serve_for_two_intervals_at_most(
    sites: Sites, clock: TimeMachine, monkeypatch: pytest.MonkeyPatch, rest: int
) -> None:
    """A worker that reaches both homes, revoked by a host that reaches neither."""
    site, browser, interval = revoked_untold(sites, monkeypatch)
    # Also the very first request after that time.
    clock.forward(rest * interval)
    clock.forward(61)
    assert site.data(browser) == {}
    assert site.data(browser) == {}


def test_a_session_in_use_meets_its_revocation_at_its_next_sync(
    sites: Sites, clock: TimeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request finds the tombstone when it syncs; the next one finds nothing."""
    site, browser, interval = revoked_untold(sites, monkeypatch)
    clock.forward(interval + 1)
    site.data(browser)
    assert site.data(browser) == {}


def test_without_sql_nothing_is_promised(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SQL down it raises, names no server, and the sessions stay."""
    browser = login(site, "alice")
    with monkeypatch.context() as broken, inside(site):
        site.break_sql(broken)
        for call in (site.sessions.revoke_user, site.sessions.sessions_of):
            with pytest.raises(SessionUnavailable) as caught:
                call("alice")
            assert "the database is away" not in str(caught.value.description)
    assert site.data(browser) == {"_user_id": "alice"}
