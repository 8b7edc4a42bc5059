"""What cannot be kept is refused, and never looks as if it had been done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import session
from flask_login import LoginManager

from apps import Site, Sites, key_of
from flask_resilient_session import SessionUnavailable
from outage import Outage, assert_refused, raw, with_session
from servers import wait_until


@pytest.fixture
def site(sites: Sites) -> Site:
    """An application whose visitor has a session, in SQL too."""
    return with_session(sites())


@pytest.fixture
def outage(site: Site) -> Iterator[Outage]:
    """To be begun by the test; ended after it."""
    made = Outage(site)
    yield made
    made.end()


# --- writes ----------------------------------------------------------------------

WRITES: dict[str, Callable[[Any], object]] = {
    "set": lambda s: s.__setitem__("b", 2),
    "delete": lambda s: s.__delitem__("a"),
    "update": lambda s: s.update(b=2),
    "or": lambda s: s.__ior__({"b": 2}),
    "setdefault": lambda s: s.setdefault("b", 2),
    "clear": lambda s: s.clear(),
    "pop": lambda s: s.pop("a"),
    "pop with default": lambda s: s.pop("a", None),
    "popitem": lambda s: s.popitem(),
    "permanent": lambda s: setattr(s, "permanent", True),
    "regenerate": lambda s: s.regenerate(),
    "sync": lambda s: s.sync(),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_is_refused(site: Site, outage: Outage, how: str) -> None:
    """A logout that cannot be kept must not look like one; neither any other write."""

    def action() -> None:
        assert session.unavailable  # type: ignore[attr-defined]
        WRITES[how](raw())

    outage.begin()
    assert_refused(site.visit(action))
    outage.end()
    assert site.data() == {"a": 1}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_as_the_first_access_is_refused(
    site: Site, outage: Outage, how: str
) -> None:
    """The same without looking first."""
    outage.begin()
    assert_refused(site.visit(lambda: WRITES[how](session) and None))
    outage.end()
    assert site.data() == {"a": 1}


@pytest.mark.parametrize("how", ["set", "update", "or", "setdefault", "clear"])
def test_a_late_write_is_dropped_counted_and_logged(
    site: Site, outage: Outage, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """With a response there already an error would only spoil it."""

    @site.app.after_request
    def late(response: Any) -> Any:
        WRITES[how](raw())
        return response

    outage.begin()
    with caplog.at_level(logging.WARNING, "flask_resilient_session"):
        response = site.browser.get("/plain")
    assert (response.status_code, response.text) == (200, "plain")
    assert "Set-Cookie" not in response.headers
    assert site.state.observer.stats["dropped_changes"] == 1
    assert "dropped" in caplog.text
    site.app.after_request_funcs.clear()
    outage.end()
    assert site.data() == {"a": 1}


# --- between load and save --------------------------------------------------------


def test_an_outage_between_load_and_save_is_the_applications_503(
    site: Site, outage: Outage
) -> None:
    """The view was done; its page is replaced, and the stored session is as it was."""

    @site.app.errorhandler(503)
    def sorry(error: SessionUnavailable) -> Any:
        return f"sorry, {session['a']}", 503, {"Retry-After": "9"}

    def action() -> Any:
        session["a"] = 2
        outage.begin()
        return "done", {"Location": "/elsewhere", "Set-Cookie": "own=1"}

    response = site.visit(action)
    assert_refused(response)
    assert response.text == "sorry, 2"
    assert response.headers["Retry-After"] == "9"
    assert "Location" not in response.headers
    outage.end()
    assert site.data() == {"a": 1}


def test_an_outage_after_a_read_is_not_noticed(site: Site, outage: Outage) -> None:
    """There is nothing to save that could not wait."""

    def action() -> str:
        seen = session["a"]
        outage.begin()
        return str(seen)

    response = site.visit(action)
    assert (response.status_code, response.text) == (200, "1")


# --- the setting, Flask-Login ----------------------------------------------------


def test_on_unavailable_empty_shows_pages_without_the_session(sites: Sites) -> None:
    """The setting "empty": reading is served, writing still refused, no cookie."""
    site = with_session(sites(RESILIENT_SESSION_ON_UNAVAILABLE="empty"))
    outage = Outage(site)
    outage.begin()
    try:
        response = site.browser.get("/")
        assert (response.status_code, response.json) == (200, {})
        assert "Set-Cookie" not in response.headers
        assert (
            site.visit(
                lambda: str(session.unavailable)  # type: ignore[attr-defined]
            ).text
            == "True"
        )
        for how in WRITES:
            assert_refused(site.visit(lambda do=WRITES[how]: do(session) and None))
    finally:
        outage.end()
    assert site.data() == {"a": 1}


def test_pages_work_with_flask_login_installed(site: Site, outage: Outage) -> None:
    """It looks at the session after every response, and writes to it."""
    login = LoginManager(site.app)
    login.user_loader(lambda user_id: None)
    site.app.config["REMEMBER_COOKIE_REFRESH_EACH_REQUEST"] = True
    outage.begin()
    response = site.browser.get("/plain")
    assert (response.status_code, response.text) == (200, "plain")
    assert "Set-Cookie" not in response.headers


# --- healing ---------------------------------------------------------------------


@pytest.mark.parametrize("empty", [True, False])
def test_healing_brings_the_session_back(sites: Sites, empty: bool) -> None:
    """Same cookie, same data, once somebody can say; nodes that come back empty too."""
    site = with_session(sites(RESILIENT_SESSION_NODE_TIMEOUT=0.1))
    before = site.cookie()
    with pytest.MonkeyPatch.context() as patch:
        site.break_sql(patch)
        for node in site.nodes:
            node.kill() if empty else node.freeze()
        assert_refused(site.browser.get("/"))
    for node in site.nodes:
        node.start() if empty else node.thaw()
    assert site.data() == {"a": 1}
    assert site.cookie() == before


@pytest.mark.parametrize("dead", [1, 2])
def test_sql_alone_is_enough(site: Site, outage: Outage, dead: int) -> None:
    """With SQL there a session is served and changed, however few nodes there are."""
    outage.begin(nodes=dead, sql=False)
    assert site.data() == {"a": 1}
    site.set(b=2)
    assert site.data() == {"a": 1, "b": 2}
    outage.end()
    assert site.data() == {"a": 1, "b": 2}


def test_both_nodes_are_enough(site: Site, outage: Outage) -> None:
    """With SQL away data is kept, users are not changed, and logout is final."""
    old = str(site.cookie())
    outage.begin(nodes=0)
    assert site.data() == {"a": 1}
    site.set(b=2)
    assert site.data() == {"a": 1, "b": 2}
    for action in (
        lambda: session.update(_user_id="1"),
        lambda: session.regenerate(),  # type: ignore[attr-defined]
        lambda: session.sync(),  # type: ignore[attr-defined]
    ):
        assert_refused(site.visit(action))
    assert site.data() == {"a": 1, "b": 2}
    assert site.visit(lambda: session.clear()).status_code == 200
    assert site.cookie() is None
    assert site.data(site.browser_with(old)) == {}
    outage.end()
    # The next reader that reaches SQL pays what the logout owes.
    wait_until(lambda: site.data(site.browser_with(old)) == {} and is_dead(site, old))
    for node in site.nodes:
        node.flush()
    assert site.data(site.browser_with(old)) == {}


def is_dead(site: Site, cookie: str) -> bool:
    """Whether SQL knows that the session in a cookie has ended."""
    row = site.rows()[key_of(cookie.split(".")[0])]
    return row.revoked_at is not None


def test_one_node_without_sql_reads_only(site: Site, outage: Outage) -> None:
    """One copy is served; what cannot be kept in two places is refused."""
    outage.begin(nodes=1)
    assert site.data() == {"a": 1}
    assert_refused(site.visit(lambda: session.update(b=2)))
    assert_refused(site.visit(lambda: session.clear()))
    assert site.cookie() is not None
