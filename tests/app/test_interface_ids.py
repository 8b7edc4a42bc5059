"""Which ids are believed, and when a session gets another."""

from __future__ import annotations

from typing import Any

import pytest
from flask import session
from itsdangerous import Signer, TimestampSigner, URLSafeTimedSerializer

from apps import NOTHING, Site, Sites, key_of


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults."""
    return sites()


# --- cookies of strangers --------------------------------------------------------

SID = "A" * 43
FORGED = [
    "",
    ".",
    "x",
    "null",
    SID,
    f"{SID}.",
    f".{SID}",
    f"{SID}.{SID}",
    f"{SID}{SID}{SID}",
    f"{'é' * 43}.{SID}",
    f"{SID}.{'é' * 43}",
    "\x00" * 87,
    "x" * 8000,
    Signer("another key").sign(SID).decode(),
    TimestampSigner("another key").sign(SID).decode(),
    URLSafeTimedSerializer("another key").dumps({"a": 1}),
    "../../../../etc/passwd",
    "%00%0d%0aSet-Cookie: a=b",
    '"quoted"',
]


# Two of them have the time in them, and a name has to stay.
@pytest.mark.parametrize("cookie", FORGED, ids=range(len(FORGED)))
def test_a_cookie_that_is_not_ours_is_a_stranger(site: Site, cookie: str) -> None:
    """Forged, malformed, ancient or huge: anonymous, no I/O, no error, no cookie."""

    def call() -> None:
        headers = {"Cookie": f"session={cookie}"}
        response = site.app.test_client().get("/", headers=headers)
        assert (response.status_code, response.json) == (200, {})
        assert "Set-Cookie" not in response.headers

    assert site.cost(call) == NOTHING


@pytest.mark.parametrize("position", [0, 42, 43, 44, 86])
def test_one_changed_character_makes_a_stranger(site: Site, position: int) -> None:
    """Every character of id and signature counts."""
    site.set(a=1)
    good = str(site.cookie())
    other = "A" if good[position] != "A" else "Q"
    bad = good[:position] + other + good[position + 1 :]
    assert site.cost(lambda: site.data(site.browser_with(bad))) == NOTHING
    assert site.data(site.browser_with(bad)) == {}


def test_a_stranger_that_stores_something_gets_an_id_of_ours(site: Site) -> None:
    """An id is never taken from a cookie that we did not sign."""
    browser = site.browser_with(f"{SID}.{SID}")
    site.set(browser, a=1)
    assert site.sid(browser) != SID
    assert site.data(browser) == {"a": 1}


def test_a_signed_value_that_is_no_id_is_a_stranger(site: Site) -> None:
    """A good signature over something that is not an id of ours is not enough."""
    signer = site.signer
    for value in ("é" * 21 + "x", "a.b" * 14 + "x", " " * 43, "a" * 42, "a" * 44):
        browser = site.browser_with(signer._signer.sign(value).decode())
        assert site.cost(lambda b=browser: site.data(b)) == NOTHING


# --- user key --------------------------------------------------------------------


@pytest.mark.parametrize(
    "action",
    [
        lambda: session.update(_user_id="2"),
        lambda: session.pop("_user_id") and None,
        lambda: session.update(_user_id=3),
    ],
)
def test_a_change_of_the_user_moves_the_session(site: Site, action: Any) -> None:
    """Changing or removing the user gives a new id with the rest of the data."""
    site.set(_user_id="1", cart=[1])
    old = site.cookie()
    site.visit(action)
    assert site.cookie() not in (None, old)
    assert site.data()["cart"] == [1]
    assert site.data(site.browser_with(old)) == {}


def test_login_moves_the_session_and_syncs(site: Site) -> None:
    """A visitor's id dies at login; the row of the new one names the user."""
    site.set(cart=[1])
    old = site.cookie()
    site.set(_user_id=42)
    assert site.cookie() != old
    assert site.data() == {"_user_id": 42, "cart": [1]}
    assert site.rows()[key_of(site.sid())].user_id == "42"
    assert site.data(site.browser_with(old)) == {}


def test_setting_the_same_user_again_changes_nothing(site: Site) -> None:
    """Only a change of the value counts."""
    site.set(_user_id="1")
    old = site.cookie()
    site.set(_user_id="1", b=2)
    assert site.cookie() == old


def test_without_regenerate_on_login_the_id_stays_and_sql_hears(sites: Sites) -> None:
    """The setting off keeps the id; the change is synced all the same."""
    site = sites(RESILIENT_SESSION_REGENERATE_ON_LOGIN=False)
    site.set(cart=[1])
    site.data()
    old = site.cookie()
    for user in ("1", "2", None):
        if user is None:
            site.visit(lambda: session.pop("_user_id") and None)
        else:
            site.set(_user_id=user)
        assert site.cookie() == old
        assert site.rows()[key_of(site.sid())].user_id == user


def test_another_user_key_can_be_named(sites: Sites) -> None:
    """RESILIENT_SESSION_USER_KEY names the key that holds the user."""
    site = sites(RESILIENT_SESSION_USER_KEY="uid")
    site.set(a=1)
    old = site.cookie()
    site.set(_user_id="9")
    assert site.cookie() == old
    site.set(uid="9")
    assert site.cookie() != old


# --- regenerate ------------------------------------------------------------------


@pytest.mark.parametrize("by_interface", [False, True])
def test_regenerate_moves_the_session(site: Site, by_interface: bool) -> None:
    """New id, same data; the old id is dead."""
    site.set(a=1)
    old = site.cookie()
    seen: list[str] = []

    def action() -> None:
        if by_interface:
            current: Any = session
            site.state.interface.regenerate(current._get_current_object())
        else:
            session.regenerate()  # type: ignore[attr-defined]
        seen.append(session.sid)  # type: ignore[attr-defined]

    site.visit(action)
    assert site.sid() == seen[0]
    assert site.cookie() != old
    assert site.data() == {"a": 1}
    assert site.data(site.browser_with(old)) == {}


def test_regenerating_nothing_stores_nothing(site: Site) -> None:
    """There is no session to move: no cookie and no row."""

    def call() -> None:
        response = site.visit(lambda: session.regenerate())  # type: ignore[attr-defined]
        assert "Set-Cookie" not in response.headers

    assert site.cost(call) == NOTHING


def test_sync_writes_sql_at_once(site: Site) -> None:
    """session.sync() does not wait for the interval."""
    site.set(a=1)
    site.data()
    version = site.rows()[key_of(site.sid())].version
    site.visit(lambda: session.sync())  # type: ignore[attr-defined]
    assert site.rows()[key_of(site.sid())].version == version + 1
