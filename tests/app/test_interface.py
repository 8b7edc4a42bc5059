"""What Flask promises about sessions stays as Flask has it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from flask import (
    Flask,
    abort,
    copy_current_request_context,
    flash,
    get_flashed_messages,
    request,
    session,
    stream_with_context,
)

from apps import NOTHING, Site, Sites
from flask_resilient_session import ResilientSession, ResilientSessionInterface


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults."""
    return sites()


# --- Vary, and requests that leave the session alone -----------------------------


def test_a_request_that_uses_the_session_varies_by_cookie(site: Site) -> None:
    """Whatever reads or writes the session answers with Vary: Cookie."""
    assert site.browser.get("/").headers["Vary"] == "Cookie"
    assert site.set(a=1).headers["Vary"] == "Cookie"
    assert site.visit(lambda: str(session.get("a"))).headers["Vary"] == "Cookie"


def test_a_request_that_leaves_the_session_alone_does_not_vary(site: Site) -> None:
    """No use, no Vary and no cookie, also with a cookie in the request."""
    site.set(a=1)
    response = site.browser.get("/plain")
    assert "Vary" not in response.headers
    assert "Set-Cookie" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/plain", 200),
        ("GET", "/static/page.txt", 200),
        ("GET", "/missing", 404),
        ("OPTIONS", "/", 200),
        ("DELETE", "/", 405),
    ],
)
def test_a_request_that_leaves_the_session_alone_costs_nothing(
    site: Site, method: str, path: str, status: int
) -> None:
    """Pages, static files, errors and OPTIONS do no session I/O."""
    site.set(a=1)
    site.data()

    def call() -> None:
        with site.browser.open(path, method=method) as response:
            assert response.status_code == status

    assert site.cost(call) == NOTHING


def test_a_visitor_without_a_session_costs_nothing(site: Site) -> None:
    """Looking into an empty session without a cookie does no I/O and sets none."""
    response = None

    def call() -> None:
        nonlocal response
        response = site.browser.get("/")

    assert site.cost(call) == NOTHING
    assert response is not None
    assert "Set-Cookie" not in response.headers


def test_a_read_is_one_round_trip_and_no_sql(site: Site) -> None:
    """A healthy read asks both nodes at once and nobody else."""
    site.set(a=1)
    site.data()
    assert site.cost(site.data) == (1, 0)


def test_a_change_is_a_read_and_a_write(site: Site) -> None:
    """A change in between two syncs costs two round trips and no SQL."""
    site.set(a=1)
    site.data()
    assert site.cost(lambda: site.set(b=2)) == (2, 0)


# --- around requests -------------------------------------------------------------


def test_session_transaction_reads_writes_and_clears(site: Site) -> None:
    """Flask's test helper works as with Flask's own sessions."""
    with site.browser.session_transaction() as transaction:
        assert dict(transaction) == {}
        transaction["a"] = 1
    assert site.data() == {"a": 1}
    with site.browser.session_transaction() as transaction:
        assert transaction["a"] == 1
        transaction["b"] = 2
    assert site.data() == {"a": 1, "b": 2}
    with site.browser.session_transaction() as transaction:
        transaction.clear()
    assert site.cookie() is None
    assert site.data() == {}


def test_session_transaction_keeps_what_it_does_not_touch(site: Site) -> None:
    """Writing one key without reading first leaves the others."""
    site.set(a=1)
    with site.browser.session_transaction() as transaction:
        transaction["b"] = 2
    assert site.data() == {"a": 1, "b": 2}


def test_flashed_messages_arrive_once(site: Site) -> None:
    """flash() in one request, the messages in the next, none in the third."""

    def action() -> None:
        flash("one")
        flash("two", "warning")

    def read() -> str:
        return repr(get_flashed_messages(with_categories=True))

    site.visit(action)
    assert site.visit(read).text == "[('message', 'one'), ('warning', 'two')]"
    assert site.visit(read).text == "[]"


def test_a_streamed_response_reads_the_session(site: Site) -> None:
    """Under stream_with_context the session is readable while the body is sent."""
    site.set(a="streamed")

    def generate() -> Iterator[str]:
        yield session["a"]

    response = site.visit(
        lambda: site.app.response_class(stream_with_context(generate()))
    )
    assert response.text == "streamed"


def test_a_copied_request_context_has_the_session(site: Site) -> None:
    """copy_current_request_context shares the session with its copy."""
    site.set(a="copied")

    def action() -> str:
        copied = copy_current_request_context(lambda: str(session["a"]))
        return copied()

    assert site.visit(action).text == "copied"


def test_a_request_context_without_dispatch_loads_the_session(site: Site) -> None:
    """test_request_context() alone is enough to look into a session."""
    site.set(a=1)
    headers = {"Cookie": f"session={site.cookie()}"}
    with site.app.test_request_context("/", headers=headers):
        assert dict(session) == {"a": 1}
        assert request.path == "/"
    with site.app.test_request_context("/"):
        session["b"] = 2
        assert session == {"b": 2}


@pytest.mark.parametrize("status", [404, 500])
def test_an_error_page_keeps_what_the_view_stored(site: Site, status: int) -> None:
    """As with Flask's own sessions: an error of the view undoes nothing."""
    site.set(a=1)

    def action() -> None:
        session["b"] = 2
        if status == 500:
            raise RuntimeError("the view's bug")
        abort(404)

    response = site.visit(action)
    assert response.status_code == status
    assert "Set-Cookie" in response.headers
    assert site.data() == {"a": 1, "b": 2}


def test_a_visitor_that_never_comes_back_costs_no_row(site: Site) -> None:
    """The row is made when the cookie comes back for the first time."""
    assert site.cost(lambda: site.set(a=1)) == (1, 0)
    assert site.rows() == {}
    assert site.cost(site.data).statements >= 1
    assert len(site.rows()) == 1
    assert site.cost(site.data) == (1, 0)


def test_a_second_save_does_nothing(site: Site) -> None:
    """Flask calls save_session again for the answer to an error while saving."""
    with site.app.test_request_context("/"):
        session["a"] = 1
        interface = site.app.session_interface
        first, second = site.app.response_class(), site.app.response_class()
        current: Any = session._get_current_object()  # type: ignore[attr-defined]
        interface.save_session(site.app, current, first)
        cost = site.cost(lambda: interface.save_session(site.app, current, second))
    assert cost == NOTHING
    assert "Set-Cookie" in first.headers
    assert "Set-Cookie" not in second.headers


def test_the_interface_is_the_documented_one(site: Site) -> None:
    """app.session_interface is a ResilientSessionInterface, its state in extensions."""
    assert isinstance(site.app.session_interface, ResilientSessionInterface)
    assert site.state.interface is site.app.session_interface


# --- several applications --------------------------------------------------------


def test_one_extension_serves_several_applications(sites: Sites) -> None:
    """Applications with one extension object keep their sessions apart."""
    sessions = ResilientSession()
    one = sites(sessions=sessions, name="one")
    two = sites(
        sessions=sessions,
        name="two",
        RESILIENT_SESSION_KEY_PREFIX="two:",
        SECRET_KEY="another secret " * 3,
    )
    one.set(a=1)
    two.set(b=2)
    assert one.data() == {"a": 1}
    assert two.data() == {"b": 2}
    assert two.data(two.browser_with(one.cookie())) == {}


def test_two_applications_share_sessions_where_all_is_equal(sites: Sites) -> None:
    """Workers of one site: same key, nodes, prefix and database, one session."""
    one = sites()
    two = sites()
    one.set(a=1)
    assert two.data(two.browser_with(one.cookie())) == {"a": 1}


def test_another_prefix_is_another_world(sites: Sites) -> None:
    """A cookie of an application with another prefix finds no session."""
    one = sites()
    two = sites(RESILIENT_SESSION_KEY_PREFIX="two:", RESILIENT_SESSION_TABLE="two")
    one.set(a=1)
    assert two.data(two.browser_with(one.cookie())) == {}
    assert one.data() == {"a": 1}


# --- without a secret key --------------------------------------------------------


def test_without_a_secret_key_sessions_are_off(
    sites: Sites, caplog: pytest.LogCaptureFixture
) -> None:
    """Flask's NullSession: readable, a write explains itself, one line in the log."""
    site = sites(SECRET_KEY=None)
    with caplog.at_level(logging.WARNING, "flask_resilient_session"):
        assert site.data() == {}
        assert site.data() == {}
    assert len([r for r in caplog.records if "SECRET_KEY" in r.message]) == 1
    site.app.testing = True
    with pytest.raises(RuntimeError, match="secret key"):
        site.visit(lambda: session.update(a=1))


def test_the_flask_object_is_not_kept_by_the_extension() -> None:
    """The extension object knows no application."""
    sessions = ResilientSession()
    assert not [v for v in vars(sessions).values() if isinstance(v, Flask)]
