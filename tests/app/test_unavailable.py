"""Nobody can say whether the session exists: an error, and never an empty session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import g, render_template_string, session

from apps import Site, Sites
from flask_resilient_session import ResilientSessionError, SessionUnavailable
from outage import Outage, assert_refused, with_session


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
