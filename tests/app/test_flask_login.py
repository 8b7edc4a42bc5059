"""Flask-Login on top: logins, remembering, protection, and a node that is down."""

from __future__ import annotations

from typing import Any

import pytest
from flask import session
from flask.testing import FlaskClient
from flask_login import (
    LoginManager,
    UserMixin,
    confirm_login,
    current_user,
    fresh_login_required,
    login_fresh,
    login_required,
    login_user,
    logout_user,
)

from apps import NOTHING, Site, Sites, key_of

# Flask-Login 0.6.3 computes its remember cookie's expiry with utcnow().
pytestmark = pytest.mark.filterwarnings("ignore:.*utcnow:DeprecationWarning")


class User(UserMixin):
    """Somebody who may log in."""

    def __init__(self, user_id: str) -> None:
        self.id = user_id


@pytest.fixture
def site(sites: Sites) -> Site:
    """An application with Flask-Login."""
    return with_login(sites())


def with_login(site: Site) -> Site:
    """The site with Flask-Login and three pages."""
    manager = LoginManager(site.app)
    manager.user_loader(User)

    @site.app.get("/me")
    def me() -> str:
        return current_user.get_id() or "nobody"

    @site.app.get("/private")
    @login_required
    def private() -> str:
        return "private"

    @site.app.get("/fresh")
    @fresh_login_required
    def fresh() -> str:
        return "fresh"

    return site


@pytest.fixture(params=["healthy", "first down", "second down", "one node", "no node"])
def weathered(request: pytest.FixtureRequest, sites: Sites) -> Site:
    """An application in any weather that must not be noticed."""
    weather = request.param
    sites.nodes = sites.nodes[: {"one node": 1, "no node": 0}.get(weather, 2)]
    site = with_login(sites())
    if weather.endswith("down"):
        site.nodes[weather.startswith("second")].kill()
    return site


def log_in(
    site: Site, user_id: str = "7", *, browser: FlaskClient | None = None, **kwargs: Any
) -> None:
    """Log in."""
    response = site.visit(
        lambda: str(login_user(User(user_id), **kwargs)), browser=browser
    )
    assert (response.status_code, response.text) == (200, "True")


def me(site: Site, browser: FlaskClient | None = None) -> str:
    """Who is logged in."""
    response = (browser or site.browser).get("/me")
    assert response.status_code == 200, response.text
    return response.text


# --- login, logout ---------------------------------------------------------------


def test_login_and_logout(weathered: Site) -> None:
    """The user is known from login to logout, and private pages are private."""
    site = weathered
    assert me(site) == "nobody"
    assert site.browser.get("/private").status_code == 401
    log_in(site)
    assert me(site) == "7"
    assert site.browser.get("/private").text == "private"
    site.visit(lambda: str(logout_user()))
    assert me(site) == "nobody"
    assert site.browser.get("/private").status_code == 401


def test_login_gives_a_new_id_and_kills_the_old(weathered: Site) -> None:
    """Nobody who knew the visitor's id is logged in with it; the cart is kept."""
    site = weathered
    site.set(cart=["book"])
    before = site.cookie()
    log_in(site)
    assert site.cookie() not in (None, before)
    assert site.visit(lambda: str(session["cart"])).text == "['book']"
    known = site.browser_with(before)
    assert me(site, known) == "nobody"
    assert site.visit(lambda: str(dict(session)), browser=known).text == "{}"


def test_logout_kills_the_id(weathered: Site) -> None:
    """A copy of the cookie of a user who logged out is worth nothing."""
    site = weathered
    site.set(cart=["book"])
    log_in(site)
    before = site.cookie()
    assert me(site, site.browser_with(before)) == "7"
    site.visit(lambda: str(logout_user()))
    assert me(site, site.browser_with(before)) == "nobody"
    assert site.visit(lambda: str(session["cart"])).text == "['book']"


def test_a_login_survives_each_node_in_turn(site: Site) -> None:
    """One dies, comes back empty, then the other: the user notices nothing."""
    log_in(site)
    for node in site.nodes:
        node.kill()
        assert me(site) == "7"
        site.visit(lambda: session.update(seen=1))
        node.start()
        assert me(site) == "7"
    for node in site.nodes:
        node.restart()
    assert me(site) == "7"


def test_changing_the_user_moves_the_session(site: Site) -> None:
    """Logging in as somebody else without logging out first."""
    log_in(site, "7")
    before = site.cookie()
    log_in(site, "8")
    assert me(site) == "8"
    assert me(site, site.browser_with(before)) == "nobody"
    assert site.rows()[key_of(site.sid())].user_id == "8"


def test_logging_in_again_keeps_the_user(site: Site) -> None:
    """The same user once more: still logged in, data kept."""
    log_in(site)
    site.set(cart=["book"])
    log_in(site)
    assert me(site) == "7"
    assert site.visit(lambda: str(session["cart"])).text == "['book']"


# --- remember --------------------------------------------------------------------


def test_the_remember_cookie_logs_in_again(weathered: Site) -> None:
    """With the session gone its cookie brings the user back, in a new session."""
    site = weathered
    log_in(site, remember=True)
    first = site.cookie()
    assert site.browser.get_cookie("remember_token") is not None
    site.browser.delete_cookie("session")
    assert me(site) == "7"
    assert site.cookie() not in (None, first)
    assert site.visit(lambda: str(login_fresh())).text == "False"
    assert me(site, site.browser_with(site.cookie())) == "7"


def test_logout_forgets_the_remembered(site: Site) -> None:
    """logout_user() takes the remember cookie away as well."""
    log_in(site, remember=True)
    site.visit(lambda: str(logout_user()))
    assert site.browser.get_cookie("remember_token") is None
    assert me(site) == "nobody"


def test_clear_alone_leaves_the_remember_cookie(site: Site) -> None:
    """It is Flask-Login's and not the session's: documented, and seen here."""
    log_in(site, remember=True)
    site.visit(lambda: session.clear())
    assert me(site) == "7"


def test_a_remembered_login_has_to_be_confirmed(weathered: Site) -> None:
    """fresh_login_required refuses it until confirm_login()."""
    site = weathered
    log_in(site, remember=True)
    assert site.browser.get("/fresh").text == "fresh"
    site.browser.delete_cookie("session")
    assert site.browser.get("/fresh").status_code == 401
    assert site.browser.get("/private").text == "private"
    site.visit(lambda: confirm_login())
    assert site.browser.get("/fresh").text == "fresh"


# --- session protection ----------------------------------------------------------

OTHER_BROWSER = {"User-Agent": "another browser"}


def test_strong_protection_ends_a_stolen_session(sites: Sites) -> None:
    """Another browser with the cookie is not logged in."""
    site = sites()
    site.app.config["SESSION_PROTECTION"] = "strong"
    with_login(site)
    log_in(site)
    assert me(site) == "7"
    thief = site.browser_with(site.cookie())
    assert thief.get("/me", headers=OTHER_BROWSER).text == "nobody"
    assert me(site, thief) == "nobody"


def test_basic_protection_makes_a_session_stale(site: Site) -> None:
    """Another browser with the cookie is logged in, but not freshly."""
    log_in(site)
    thief = site.browser_with(site.cookie())
    assert thief.get("/me", headers=OTHER_BROWSER).text == "7"
    assert thief.get("/fresh", headers=OTHER_BROWSER).status_code == 401


# --- cost ------------------------------------------------------------------------


def test_a_stranger_costs_nothing(site: Site) -> None:
    """Flask-Login looks at every response, but without a cookie there is no I/O."""
    browser = site.app.test_client()
    assert site.cost(lambda: browser.get("/plain")) == NOTHING
    assert site.cost(lambda: browser.get("/missing")) == NOTHING
    assert site.cookie(browser) is None


def test_a_user_costs_one_round_trip(site: Site) -> None:
    """Every page loads the session then, once, and writes nothing."""
    log_in(site)
    me(site)
    assert site.cost(lambda: me(site)) == (1, 0)
    assert site.cost(lambda: site.browser.get("/plain")) == (1, 0)
