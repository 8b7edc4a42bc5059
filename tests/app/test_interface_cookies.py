"""The cookie: sent when Flask sends it, under the name that Flask gives it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from flask import session
from werkzeug.http import parse_date

from apps import Site, Sites


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults."""
    return sites()


# --- name ------------------------------------------------------------------------


def test_the_cookie_has_the_name_that_is_set(site: Site) -> None:
    """SESSION_COOKIE_NAME counts when it is set, and is read per request."""
    site.app.config["SESSION_COOKIE_NAME"] = "other"
    assert site.set(a=1).headers["Set-Cookie"].startswith("other=")
    assert site.data() == {"a": 1}


# --- permanent, refresh, modified ------------------------------------------------


def test_a_browser_session_has_no_expiry(site: Site) -> None:
    """Only a permanent session's cookie outlives the browser."""
    assert "Expires" not in site.set(a=1).headers["Set-Cookie"]


def test_a_permanent_session_expires_after_the_lifetime(site: Site) -> None:
    """The lifetime is Flask's, as it is at that moment."""
    site.app.permanent_session_lifetime = timedelta(hours=5)
    expected = datetime.now(timezone.utc) + timedelta(hours=5)

    def action() -> None:
        session.permanent = True
        session["a"] = 1

    header = site.visit(action).headers["Set-Cookie"]
    found = parse_date(header.partition("Expires=")[2].split(";")[0])
    assert found is not None
    assert abs((found - expected).total_seconds()) < 5
    assert site.data() == {"_permanent": True, "a": 1}
    assert site.visit(lambda: str(session.permanent)).text == "True"


def test_a_permanent_session_gets_its_cookie_with_every_use(site: Site) -> None:
    """SESSION_REFRESH_EACH_REQUEST is on by default and applies to every use."""
    site.visit(lambda: session.update(a=1, _permanent=True))
    assert "Expires" in site.browser.get("/").headers["Set-Cookie"]
    assert "Set-Cookie" not in site.browser.get("/plain").headers


def test_refresh_can_be_switched_off(site: Site) -> None:
    """Without SESSION_REFRESH_EACH_REQUEST only a change sends the cookie."""
    site.app.config["SESSION_REFRESH_EACH_REQUEST"] = False
    site.visit(lambda: session.update(a=1, _permanent=True))
    assert "Set-Cookie" not in site.browser.get("/").headers
    assert "Expires" in site.set(b=2).headers["Set-Cookie"]


def test_a_browser_session_gets_no_cookie_for_reading(site: Site) -> None:
    """Reading a session that is not permanent sends nothing."""
    site.set(a=1)
    assert "Set-Cookie" not in site.browser.get("/").headers


def test_a_modified_session_sends_its_cookie_again(site: Site) -> None:
    """The id stays the same over changes, and so does the cookie."""
    site.set(a=1)
    before = site.cookie()
    header = site.set(a=2).headers["Set-Cookie"]
    assert header.split(";")[0] == f"session={before}"
    assert site.data() == {"a": 2}


def test_several_set_cookie_headers_stay(site: Site) -> None:
    """A view's own cookie goes out next to the session's."""

    def action() -> Any:
        session["a"] = 1
        response = site.app.make_response("own")
        response.set_cookie("own", "1")
        return response

    names = [h.split("=")[0] for h in site.visit(action).headers.getlist("Set-Cookie")]
    assert sorted(names) == ["own", "session"]
