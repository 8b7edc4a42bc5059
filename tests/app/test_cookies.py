"""The cookie's flags: what is sent, what is warned of, what caches are told."""

from __future__ import annotations

import logging
from http.cookies import SimpleCookie
from typing import Any

import pytest
from flask import redirect, session
from werkzeug.exceptions import Forbidden

from apps import Site, Sites

#: The strictest cookie: one that nobody else can set, read or send along.
STRICT = {
    "SESSION_COOKIE_NAME": "__Host-id",
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_SAMESITE": "Strict",
}
#: All that the warnings ask for.
SOUND = {"SESSION_COOKIE_SECURE": True, "SESSION_COOKIE_SAMESITE": "Lax"}


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults."""
    return sites()


# --- caches ----------------------------------------------------------------------


def test_a_response_with_a_new_id_is_not_stored(site: Site) -> None:
    """An id in a cache would be handed to others."""
    response = site.set(a=1)
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Vary"] == "Cookie"


@pytest.mark.parametrize(
    "action",
    [
        lambda: session.regenerate(),  # type: ignore[attr-defined]
        lambda: session.update(_user_id="7"),
        lambda: session.clear() or session.update(b=2),
    ],
)
def test_each_new_id_is_not_stored(site: Site, action: Any) -> None:
    """Login, regenerate and a fresh start send new ids as well."""
    site.set(a=1)
    old = site.cookie()
    response = site.visit(action)
    assert site.cookie() != old
    assert response.headers["Cache-Control"] == "no-store"


def test_the_same_id_says_nothing_about_caches(site: Site) -> None:
    """Reading, changing and looking at other pages leave Cache-Control alone."""
    site.set(a=1)
    for response in (site.browser.get("/"), site.set(b=2), site.browser.get("/plain")):
        assert "Cache-Control" not in response.headers


def test_a_permanent_session_sent_again_says_nothing_about_caches(site: Site) -> None:
    """A cookie whose date moves is no new id."""
    site.visit(lambda: session.update(_permanent=True, a=1))
    response = site.browser.get("/")
    assert "Set-Cookie" in response.headers
    assert "Cache-Control" not in response.headers


@pytest.mark.parametrize("own", ["private, max-age=60", "public", "no-cache"])
def test_the_applications_own_cache_control_stays(site: Site, own: str) -> None:
    """What the view decided is never overridden, not even for a new id."""

    def action() -> Any:
        session["a"] = 1
        return "mine", {"Cache-Control": own}

    response = site.visit(action)
    assert "Set-Cookie" in response.headers
    assert response.headers.getlist("Cache-Control") == [own]


def test_a_redirect_after_login_is_not_stored(site: Site) -> None:
    """The usual answer to a login carries the new id and is not to be kept."""

    def action() -> Any:
        session["_user_id"] = "7"
        return redirect("/")

    response = site.visit(action)
    assert response.status_code == 302
    assert response.headers["Cache-Control"] == "no-store"


def test_an_error_page_with_a_new_id_is_not_stored(site: Site) -> None:
    """An id sent with a 403 is an id."""

    def action() -> None:
        session["attempts"] = 1
        raise Forbidden

    response = site.visit(action)
    assert response.status_code == 403
    assert "Set-Cookie" in response.headers
    assert response.headers["Cache-Control"] == "no-store"


# --- attributes ------------------------------------------------------------------


def morsel(header: str) -> tuple[str, dict[str, Any]]:
    """Name and attributes of a Set-Cookie header, its dates apart."""
    # The standard library knows Partitioned since 3.14 only.
    partitioned = "; Partitioned" in header
    ((name, found),) = SimpleCookie(header.replace("; Partitioned", "")).items()
    attributes = {k: v for k, v in found.items() if v}
    for date in ("expires", "max-age"):
        attributes.pop(date, None)
    return name, attributes | ({"partitioned": True} if partitioned else {})


#: Settings, and what they add to the usual attributes.
SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"SESSION_COOKIE_HTTPONLY": False}, {"httponly": None}),
    (
        {"SESSION_COOKIE_SECURE": True, "SESSION_COOKIE_PARTITIONED": True},
        {"secure": True, "partitioned": True},
    ),
    (
        {"SESSION_COOKIE_SECURE": True, "SESSION_COOKIE_SAMESITE": "None"},
        {"secure": True, "samesite": "None"},
    ),
    (
        {"SESSION_COOKIE_DOMAIN": "example.org", "SESSION_COOKIE_PATH": "/shop"},
        {"domain": "example.org", "path": "/shop"},
    ),
    ({"APPLICATION_ROOT": "/root"}, {"path": "/root"}),
    (
        {"SESSION_COOKIE_NAME": "__Secure-id", "SESSION_COOKIE_SECURE": True},
        {"secure": True},
    ),
    (STRICT, {"secure": True, "samesite": "Strict"}),
]


@pytest.mark.parametrize(("settings", "added"), SETTINGS)
def test_deleting_repeats_every_attribute(
    sites: Sites, settings: dict[str, Any], added: dict[str, Any]
) -> None:
    """Flask's settings count, and a browser deletes only what has the attributes set.

    They count also where they are made after the set-up.
    """
    site = sites()
    site.app.config.update(settings)
    root = settings.get("APPLICATION_ROOT", "/")
    path = settings.get("SESSION_COOKIE_PATH", root).rstrip("/")
    domain = settings.get("SESSION_COOKIE_DOMAIN", "localhost")
    site.app.add_url_rule(f"{path}/page", "page", site._view)

    def request(action: Any) -> str:
        site._action = action
        url = f"https://{domain}{path}/page"
        return site.browser.get(url).headers["Set-Cookie"]

    was_set = request(lambda: session.update(a=1))
    deleted = request(lambda: session.clear())
    name, attributes = morsel(was_set)
    assert name == settings.get("SESSION_COOKIE_NAME", "session")
    expected = {"path": "/", "httponly": True} | added
    assert attributes == {k: v for k, v in expected.items() if v}
    assert morsel(deleted) == morsel(was_set)
    assert "Max-Age=0" in deleted
    assert "01 Jan 1970" in deleted


def test_the_strictest_cookie_works(
    sites: Sites, caplog: pytest.LogCaptureFixture
) -> None:
    """With three settings: Secure, HttpOnly, SameSite=Strict, host-only, no warning."""
    site = sites(**STRICT)
    site.browser.environ_base["wsgi.url_scheme"] = "https"
    header = site.set(a=1, browser=None).headers["Set-Cookie"]
    name, attributes = morsel(header)
    assert name == "__Host-id"
    strict = {"path": "/", "secure": True, "httponly": True, "samesite": "Strict"}
    assert attributes == strict
    assert caplog.messages == []


def test_a_cookie_is_small(sites: Sites) -> None:
    """Browsers keep 4096 bytes; name, value and attributes take a tenth of it."""
    site = sites(**STRICT)
    site._action = lambda: session.update(a="x" * 100_000, _permanent=True)
    header = site.browser.get("https://localhost/visit").headers["Set-Cookie"]
    assert len(header) < 400


def test_http_only_is_the_default(site: Site) -> None:
    """Scripts do not see the id unless the application says so."""
    assert "HttpOnly" in site.set(a=1).headers["Set-Cookie"]


def test_the_id_is_in_the_cookie_header_alone(site: Site) -> None:
    """Neither the page nor another header has the id."""
    response = site.set(_user_id="7")
    others = [h for h in response.headers if h[0] != "Set-Cookie"]
    assert site.sid() not in repr(others) + response.text


# --- warnings --------------------------------------------------------------------

SECURE, HTTPONLY = "SESSION_COOKIE_SECURE", "SESSION_COOKIE_HTTPONLY"
SAMESITE, PARTITIONED = "SESSION_COOKIE_SAMESITE", "SESSION_COOKIE_PARTITIONED"
NAME, PATH, DOMAIN = (f"SESSION_COOKIE_{word}" for word in ("NAME", "PATH", "DOMAIN"))

WARNED: list[tuple[dict[str, Any], list[str]]] = [
    (SOUND, []),
    ({}, [f"{SECURE} is not set", f"{SAMESITE} is not set"]),
    (SOUND | {SECURE: False}, [f"{SECURE} is not set"]),
    (SOUND | {HTTPONLY: False}, [f"{HTTPONLY} is off"]),
    (SOUND | {SAMESITE: None}, [f"{SAMESITE} is not set"]),
    (SOUND | {SAMESITE: "None"}, []),
    (SOUND | {SAMESITE: "None", SECURE: False}, [f"{SECURE} is not", "'None' needs"]),
    (SOUND | {SAMESITE: "none", SECURE: False}, [f"{SECURE} is not", "'None' needs"]),
    (SOUND | {PARTITIONED: True}, []),
    (
        SOUND | {PARTITIONED: True, SECURE: False},
        [f"{SECURE} is not", f"{PARTITIONED} needs {SECURE}"],
    ),
    (SOUND | {NAME: "__Secure-id"}, []),
    (
        SOUND | {NAME: "__Secure-id", SECURE: False},
        [f"{SECURE} is not", "named __Secure-id needs"],
    ),
    (STRICT, []),
    (
        STRICT | {SECURE: False},
        [f"{SECURE} is not", f"named __Host-id needs {SECURE}"],
    ),
    (STRICT | {PATH: "/shop"}, [f"named __Host-id needs {PATH} = '/'"]),
    (STRICT | {DOMAIN: "example.org"}, [f"named __Host-id needs {PATH} = '/'"]),
    (STRICT | {NAME: "__host-id", PATH: "/a"}, [f"named __host-id needs {PATH}"]),
    (
        SOUND | {HTTPONLY: False, SAMESITE: None, SECURE: False},
        [f"{SECURE} is not", f"{HTTPONLY} is off", f"{SAMESITE} is not set"],
    ),
]


@pytest.mark.parametrize(("settings", "expected"), WARNED)
def test_what_is_doubtful_is_said_at_the_first_request(
    sites: Sites,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    expected: list[str],
) -> None:
    """One line for each missing flag, at the first request and never again."""
    site = sites(**settings)
    assert caplog.messages == []
    site.browser.get("/plain")
    assert len(caplog.messages) == len(expected), caplog.messages
    for message, part in zip(caplog.messages, expected, strict=True):
        assert part in message
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    site.browser.get("/plain")
    assert len(caplog.messages) == len(expected)


@pytest.mark.parametrize("setting", ["DEBUG", "TESTING"])
def test_development_is_not_warned(
    sites: Sites, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    """On a developer's machine there is no HTTPS."""
    site = sites(**{setting: True})
    site.browser.get("/plain")
    assert caplog.messages == []


def test_settings_made_after_init_app_are_the_ones_that_count(
    sites: Sites, caplog: pytest.LogCaptureFixture
) -> None:
    """Flask's settings are read at the first request, as they are then."""
    site = sites()
    site.app.config.update(SOUND)
    site.browser.get("/plain")
    assert caplog.messages == []
