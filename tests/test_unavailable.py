"""Nobody can say whether the session exists: an error, and never an empty session."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import g, render_template_string, session
from flask_login import LoginManager

from apps import Site, Sites, key_of
from flask_resilient_session import ResilientSessionError, SessionUnavailable
from servers import Memcached, wait_until


class Outage:
    """Nodes, with what they hold, and SQL of a site, taken away and given back."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._patch = pytest.MonkeyPatch()

    def begin(self, *, nodes: int = 2, sql: bool = True) -> None:
        """Take away that many nodes, and SQL."""
        for node in self._site.nodes[:nodes]:
            node.kill()
        if sql:
            self._site.break_sql(self._patch)

    def end(self) -> None:
        """Give everything back."""
        self._patch.undo()
        for node in self._site.nodes:
            if not node.alive:
                node.start()


@pytest.fixture
def sites(nodes: list[Memcached], tmp_path: Path) -> Iterator[Sites]:
    """Applications on two nodes."""
    with Sites(nodes, tmp_path) as made:
        yield made


@pytest.fixture
def site(sites: Sites) -> Site:
    """An application whose visitor has a session, in SQL too."""
    return with_session(sites())


def with_session(site: Site) -> Site:
    """The site with ``{"a": 1}`` in its visitor's session."""
    site.set(a=1)
    assert site.data() == {"a": 1}
    site.app._got_first_request = False  # tests go on with setting it up
    return site


@pytest.fixture
def outage(site: Site) -> Iterator[Outage]:
    """To be begun by the test; ended after it."""
    made = Outage(site)
    yield made
    made.end()


def raw() -> Any:
    """The session object itself."""
    return session._get_current_object()  # type: ignore[attr-defined]


def assert_refused(response: Any) -> None:
    """A 503 that asks to come back, and leaves the cookie alone."""
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert "Set-Cookie" not in response.headers
    assert response.headers["Vary"] == "Cookie"


# --- the first access ------------------------------------------------------------


def test_the_first_access_in_a_view_is_503(site: Site, outage: Outage) -> None:
    """An error is not an absence: no empty session is shown."""
    outage.begin()
    assert_refused(site.browser.get("/"))


def test_the_first_access_in_before_request_is_503(site: Site, outage: Outage) -> None:
    """Also where a hook looks before the view."""
    site.app.before_request(lambda: g.setdefault("user", session.get("a")) and None)
    outage.begin()
    assert_refused(site.browser.get("/plain"))


def test_the_first_access_in_a_template_is_503(site: Site, outage: Outage) -> None:
    """Also from within a template."""
    outage.begin()
    template = "{% if session.a %}{{ session.a }}{% endif %}"
    assert_refused(site.visit(lambda: render_template_string(template)))


def test_a_page_without_the_session_works(site: Site, outage: Outage) -> None:
    """What does not use the session does not notice."""
    outage.begin()
    response = site.browser.get("/plain")
    assert (response.status_code, response.text) == (200, "plain")
    assert "Set-Cookie" not in response.headers


def test_a_stranger_is_served(site: Site, outage: Outage) -> None:
    """Without a cookie there is nothing to ask, and nothing in doubt."""
    outage.begin()
    assert site.data(site.app.test_client()) == {}


def test_the_error_names_no_secret_and_is_ours(site: Site, outage: Outage) -> None:
    """Its text is for users: what happened, without the id."""
    outage.begin()
    caught: list[SessionUnavailable] = []

    def action() -> str:
        try:
            return str(session["a"])
        except SessionUnavailable as error:
            caught.append(error)
            raise

    text = site.visit(action).text
    assert isinstance(caught[0], ResilientSessionError)
    assert site.sid() not in text + str(caught[0]) + repr(caught[0])


def test_the_applications_handler_may_use_the_session(
    site: Site, outage: Outage
) -> None:
    """Its page may show the visitor's name, which then is unknown."""

    @site.app.errorhandler(SessionUnavailable)
    def sorry(error: SessionUnavailable) -> Any:
        name = session.get("a", "stranger")
        return f"sorry, {name}", error.code, {"Retry-After": "7"}

    outage.begin()
    response = site.browser.get("/")
    assert_refused(response)
    assert response.text == "sorry, stranger"
    assert response.headers["Retry-After"] == "7"


def test_the_error_is_raised_once(site: Site, outage: Outage) -> None:
    """Who handles it goes on with a read-only empty session."""
    seen: list[object] = []

    def action() -> str:
        with pytest.raises(SessionUnavailable):
            session.get("a")
        seen.extend([dict(session), session.get("a"), len(session), "a" in session])
        seen.append(session.unavailable)  # type: ignore[attr-defined]
        return "went on"

    outage.begin()
    response = site.visit(action)
    assert (response.status_code, response.text) == (200, "went on")
    assert seen == [{}, None, 0, False, True]
    assert "Set-Cookie" not in response.headers


def test_asking_whether_it_is_unavailable_raises_nothing(
    site: Site, outage: Outage
) -> None:
    """A page can decide for itself, and then finds the session empty."""

    def action() -> str:
        if session.unavailable:  # type: ignore[attr-defined]
            return f"limited {dict(session)}"
        return "full"

    assert site.visit(action).text == "full"
    outage.begin()
    assert site.visit(action).text == "limited {}"


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


# --- where it is too late for an error -------------------------------------------


def test_after_request_sees_it_empty(site: Site, outage: Outage) -> None:
    """A hook that looks at every response must not break those of other pages."""
    seen: list[object] = []

    @site.app.after_request
    def look(response: Any) -> Any:
        seen.append((dict(session), session.unavailable))  # type: ignore[attr-defined]
        return response

    outage.begin()
    assert site.browser.get("/plain").status_code == 200
    assert site.browser.get("/missing").status_code == 404
    assert_refused(site.browser.get("/"))
    assert seen == [({}, True)] * 3


def test_an_error_handler_sees_it_empty(site: Site, outage: Outage) -> None:
    """First access while Flask handles an error: that error stays the answer."""

    @site.app.errorhandler(404)
    def missing(error: Any) -> Any:
        return f"missing {dict(session)}", 404

    @site.app.errorhandler(ZeroDivisionError)
    def division(error: Any) -> Any:
        return f"division {dict(session)}", 400

    outage.begin()
    assert site.browser.get("/missing").text == "missing {}"
    assert site.visit(lambda: 1 / 0).text == "division {}"


def test_the_500_handler_sees_it_empty(site: Site, outage: Outage) -> None:
    """Also where the error was nobody's."""

    @site.app.errorhandler(500)
    def crashed(error: Any) -> Any:
        return f"crashed {dict(session)}", 500

    outage.begin()
    response = site.visit(lambda: 1 / 0)
    assert (response.status_code, response.text) == (500, "crashed {}")


def test_teardown_sees_it_empty(site: Site, outage: Outage) -> None:
    """The last place to look."""
    seen: list[object] = []
    site.app.teardown_request(lambda error: seen.append(dict(session)))
    outage.begin()
    assert site.browser.get("/plain").status_code == 200
    assert seen == [{}]


def test_a_views_own_except_block_is_no_error_handler(
    site: Site, outage: Outage
) -> None:
    """There a response can still be chosen."""

    def action() -> Any:
        try:
            return 1 / 0
        except ZeroDivisionError:
            return str(session["a"])

    outage.begin()
    assert_refused(site.visit(action))


def test_session_transaction_raises(site: Site, outage: Outage) -> None:
    """A test helper outside of a request gets the error too."""
    outage.begin()
    with pytest.raises(SessionUnavailable), site.browser.session_transaction() as s:
        s["b"] = 2
    outage.end()
    assert site.data() == {"a": 1}


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
