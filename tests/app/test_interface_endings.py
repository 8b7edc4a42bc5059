"""Sessions that end: cleared, emptied, expired, ended or moved by somebody else."""

from __future__ import annotations

import pytest
from flask import session

from apps import NOTHING, Site, Sites, TimeMachine, key_of


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults."""
    return sites()


# --- clear, empty ----------------------------------------------------------------


def test_clear_ends_the_session(site: Site) -> None:
    """Logout: cookie deleted, the id dead for good, in SQL too."""
    site.set(a=1)
    old = str(site.cookie())
    header = site.visit(lambda: session.clear()).headers["Set-Cookie"]
    assert "Max-Age=0" in header
    assert site.cookie() is None
    assert site.data(site.browser_with(old)) == {}
    row = site.rows()[key_of(old.split(".")[0])]
    assert row.revoked_at is not None
    assert row.record is None


def test_clear_without_a_session_costs_nothing(site: Site) -> None:
    """A visitor who is not logged in logs out."""
    assert site.cost(lambda: site.visit(lambda: session.clear())) == NOTHING


def test_clear_and_refill_is_a_new_session(site: Site) -> None:
    """Flask's tutorial logs in this way: new id, old one dead, old data gone."""
    site.set(cart=[1])
    old = site.cookie()

    def login() -> None:
        session.clear()
        session["user_id"] = 7

    assert site.visit(login).status_code == 200
    assert site.cookie() not in (None, old)
    assert site.data() == {"user_id": 7}
    assert site.data(site.browser_with(old)) == {}


def test_the_tutorials_login_works_without_a_session_before(site: Site) -> None:
    """Clearing nothing and storing something is simply a new session."""

    def login() -> None:
        session.clear()
        session["user_id"] = 7

    site.visit(login)
    assert site.data() == {"user_id": 7}


def test_taking_the_last_key_ends_the_session(site: Site) -> None:
    """Empty at save is ended, however it became empty."""
    site.set(a=1)
    old = site.cookie()
    site.visit(lambda: str(session.pop("a")))
    assert site.cookie() is None
    assert site.data(site.browser_with(old)) == {}


def test_only_permanent_stores_nothing(site: Site) -> None:
    """session.permanent alone is no session: no cookie, no copy, no row."""

    def action() -> None:
        session.permanent = True

    def call() -> None:
        assert "Set-Cookie" not in site.visit(action).headers

    assert site.cost(call) == NOTHING


def test_only_permanent_left_ends_the_session(site: Site) -> None:
    """What is left after the last real key went counts as empty."""
    site.visit(lambda: session.update(_permanent=True, a=1))
    old = site.cookie()
    site.visit(lambda: str(session.pop("a")))
    assert site.cookie() is None
    assert site.data(site.browser_with(old)) == {}


# --- ended or moved meanwhile ----------------------------------------------------


def test_ended_meanwhile_sends_no_cookie(site: Site) -> None:
    """Another request logged out between our load and save: the change is dropped."""
    site.set(a=1)
    other = site.browser_with(site.cookie())
    old = site.cookie()

    def action() -> None:
        session["b"] = 2
        site.visit(lambda: session.clear(), browser=other)

    response = site.visit(action)
    assert response.status_code == 200
    assert "Set-Cookie" not in response.headers
    assert site.state.observer.stats["dropped_changes"] == 1
    assert site.data(site.browser_with(old)) == {}


def test_ended_meanwhile_but_this_request_logs_in(site: Site) -> None:
    """A login is not lost to a logout elsewhere: a new session with the user."""
    site.set(a=1)
    other = site.browser_with(site.cookie())
    old = site.cookie()

    def action() -> None:
        session["_user_id"] = "7"
        site.visit(lambda: session.clear(), browser=other)

    assert "Set-Cookie" in site.visit(action).headers
    assert site.cookie() not in (None, old)
    assert site.data()["_user_id"] == "7"
    assert site.data(site.browser_with(old)) == {}


def test_moved_meanwhile_sends_no_cookie(site: Site) -> None:
    """Another request got the new id: ours must not overwrite its cookie."""
    site.set(a=1)
    other = site.browser_with(site.cookie())

    def action() -> None:
        session["b"] = 2
        site.set(other, _user_id="7")

    assert "Set-Cookie" not in site.visit(action).headers
    assert site.data(other)["_user_id"] == "7"


def test_moved_meanwhile_but_this_request_logs_in(site: Site) -> None:
    """Two logins at once from one browser: the second gets a session as well."""
    site.set(a=1)
    other = site.browser_with(site.cookie())

    def action() -> None:
        session["_user_id"] = "8"
        site.set(other, _user_id="7")

    assert "Set-Cookie" in site.visit(action).headers
    assert site.data() == {"a": 1, "_user_id": "8"}
    assert site.data(other) == {"a": 1, "_user_id": "7"}


# --- arrives ended or moved ------------------------------------------------------


def test_arriving_ended_gets_a_new_session_at_once(site: Site) -> None:
    """A tab that missed the logout and stores something starts afresh."""
    site.set(a=1)
    stale = site.browser_with(site.cookie())
    old = site.cookie()
    site.visit(lambda: session.clear())
    assert site.data(stale) == {}
    assert "Set-Cookie" in site.set(stale, b=2).headers
    assert site.cookie(stale) != old
    assert site.data(stale) == {"b": 2}
    assert site.data(site.browser_with(old)) == {}


def test_arriving_moved_stores_nothing_for_a_minute(
    site: Site, clock: TimeMachine
) -> None:
    """A request sent before its browser knew the new id: no cookie, then one."""
    site.set(a=1)
    stale = site.browser_with(site.cookie())
    site.set(_user_id="7")
    for seconds in (1, 58):
        clock.forward(seconds)
        assert "Set-Cookie" not in site.set(stale, b=2).headers
        response = site.visit(lambda: session.clear(), browser=stale)
        assert "Set-Cookie" not in response.headers
    clock.forward(2)
    assert "Set-Cookie" in site.set(stale, b=2).headers
    assert site.data(stale) == {"b": 2}
    assert site.data() == {"a": 1, "_user_id": "7"}


def test_arriving_moved_and_logging_in_gets_a_session(site: Site) -> None:
    """Setting the user is worth a cookie also in that minute."""
    site.set(a=1)
    stale = site.browser_with(site.cookie())
    site.set(_user_id="7")
    assert "Set-Cookie" in site.set(stale, _user_id="8").headers
    assert site.data(stale) == {"_user_id": "8"}


# --- nobody knows it -------------------------------------------------------------


@pytest.fixture
def lost(site: Site) -> Site:
    """A genuine cookie, and neither nodes nor SQL know its session."""
    site.set(a=1)
    for node in site.nodes:
        node.flush()
    return site


def test_a_cookie_that_nobody_knows_is_deleted(lost: Site) -> None:
    """By the first page that uses the session and stores nothing."""
    assert "Set-Cookie" not in lost.browser.get("/plain").headers
    response = lost.browser.get("/")
    assert response.json == {}
    assert "Max-Age=0" in response.headers["Set-Cookie"]
    assert response.headers["Vary"] == "Cookie"
    assert lost.cookie() is None


def test_a_cookie_that_nobody_knows_is_replaced(lost: Site) -> None:
    """Where the page stores something."""
    old = lost.cookie()
    lost.set(b=2)
    assert lost.cookie() not in (None, old)
    assert lost.data() == {"b": 2}


def test_a_cookie_of_which_nobody_can_say_stays(
    lost: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQL does not answer: that is no word on the session."""
    old = lost.cookie()
    lost.break_sql(monkeypatch)
    response = lost.browser.get("/")
    assert response.status_code == 503
    assert "Set-Cookie" not in response.headers
    monkeypatch.undo()
    assert lost.cookie() == old


def test_a_cookie_of_a_session_that_ended_or_moved_stays(site: Site) -> None:
    """The browser may have its next one already."""
    site.set(a=1)
    moved = site.browser_with(site.cookie())
    site.visit(lambda: session.regenerate())
    ended = site.browser_with(site.cookie())
    site.visit(lambda: session.clear())
    for browser in (moved, ended):
        response = browser.get("/")
        assert response.json == {}
        assert "Set-Cookie" not in response.headers


def test_a_cookie_of_a_session_that_a_node_still_holds_stays(
    site: Site, clock: TimeMachine
) -> None:
    """SQL lost the row, and may find it again."""
    site.set(_user_id="7", a=1)
    with site.state.sql.engine.begin() as connection:
        connection.execute(site.state.sql.table.delete())
    clock.forward(1000)
    response = site.browser.get("/")
    assert response.json == {}
    assert "Set-Cookie" not in response.headers


# --- time ------------------------------------------------------------------------


def test_an_expired_session_is_gone(site: Site, clock: TimeMachine) -> None:
    """An interval past it there is an empty session, and a new id if it stores."""
    site.set(a=1)
    old = site.cookie()
    lifetime = site.app.permanent_session_lifetime.total_seconds()
    clock.forward(lifetime - 100)
    assert site.data() == {"a": 1}
    clock.forward(lifetime + 121)
    assert site.data() == {}
    site.set(b=2)
    assert site.cookie() != old
    assert site.data() == {"b": 2}


def test_the_absolute_lifetime_ends_a_busy_session(
    sites: Sites, clock: TimeMachine
) -> None:
    """However busy: it ends this long after its creation."""
    site = sites(RESILIENT_SESSION_ABSOLUTE_LIFETIME=3600)
    site.set(a=1)
    for _ in range(3):
        clock.forward(1000)
        assert site.data() == {"a": 1}
    clock.forward(601)
    assert site.data() == {}
