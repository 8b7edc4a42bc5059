"""What a session knows of itself: new, modified, its id, the types of its values."""

from __future__ import annotations

import logging
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from flask import session
from flask.sessions import SessionMixin
from markupsafe import Markup

from apps import NOTHING, Site, Sites, key_of
from flask_resilient_session import Session

STORED: dict[str, Any] = {"a": 1, "b": [1, 2]}


@pytest.fixture
def site(sites: Sites) -> Site:
    """An application whose visitor has a session that holds ``STORED``."""
    site = sites()
    site.set(**STORED)
    site.data()
    return site


def raw() -> Any:
    """The session object itself, not Flask's proxy of it."""
    return session._get_current_object()  # type: ignore[attr-defined]


# --- its attributes --------------------------------------------------------------


def test_it_is_flasks_kind_of_session(site: Site) -> None:
    """Both a dict and Flask's SessionMixin, before and after loading."""

    def action() -> None:
        target = raw()
        for _ in range(2):
            assert isinstance(target, dict)
            assert isinstance(target, SessionMixin)
            assert isinstance(target, Session)
            len(target)

    assert site.visit(action).status_code == 200


def test_new_tells_whether_something_is_stored(site: Site) -> None:
    """True for a visitor without a session, False for one with."""
    assert site.visit(lambda: str(session.new)).text == "False"
    stranger = site.app.test_client()
    assert site.visit(lambda: str(session.new), browser=stranger).text == "True"


def test_permanent_is_kept_in_the_session(site: Site) -> None:
    """As with Flask, under the key ``_permanent``."""

    def action() -> None:
        assert session.permanent is False
        assert session.modified is False
        session.permanent = True
        assert session.modified is True

    assert site.visit(action).status_code == 200
    assert site.data() == STORED | {"_permanent": True}
    assert site.visit(lambda: str(session.permanent)).text == "True"


def test_accessed_is_set_by_any_use(site: Site) -> None:
    """Also by a use of the object itself, past Flask's proxy."""
    with site.app.test_request_context("/") as context:
        # Since 3.1.3 Flask's own attribute is one that marks the session.
        name = "_session" if hasattr(context, "_session") else "session"
        opened = getattr(context, name)
        before = opened.accessed
        len(opened)
        assert (before, opened.accessed) == (False, True)


def test_attributes_cost_nothing(site: Site) -> None:
    """``modified`` and ``accessed`` say nothing about the data and load nothing."""

    def action() -> str:
        target = raw()
        return f"{target.modified} {target.accessed}"

    assert site.cost(lambda: site.visit(action)) == NOTHING


def test_a_nested_change_needs_modified(site: Site) -> None:
    """As with Flask: a list that is changed in place is not noticed by itself."""
    site.visit(lambda: session["b"].append(3))
    assert site.data() == STORED

    def action() -> None:
        session["b"].append(3)
        session.modified = True

    site.visit(action)
    assert site.data() == {"a": 1, "b": [1, 2, 3]}


def test_a_nested_change_rides_along_with_another(site: Site) -> None:
    """Once something is modified every key is compared."""

    def action() -> None:
        session["b"].append(3)
        session["c"] = 1

    site.visit(action)
    assert site.data() == {"a": 1, "b": [1, 2, 3], "c": 1}


def test_modified_can_be_taken_back(site: Site) -> None:
    """``session.modified = False`` discards the request's changes."""

    def action() -> None:
        session["a"] = 2
        session.modified = False

    site.visit(action)
    assert site.data() == STORED


def test_modified_before_loading_loses_nothing(site: Site) -> None:
    """Setting ``modified`` first, on the object itself, must not end the session."""

    def action() -> None:
        raw().modified = True

    site.visit(action)
    assert site.data() == STORED


# --- id, regenerate, sync --------------------------------------------------------


def test_the_id_is_the_cookies(site: Site) -> None:
    """session.sid is what the cookie holds before the dot."""
    assert site.visit(lambda: session.sid).text == site.sid()  # type: ignore[attr-defined]


def test_a_new_session_keeps_the_id_that_was_asked_for(site: Site) -> None:
    """A new id is made on demand, once, and is the one that is stored."""
    browser = site.app.test_client()
    seen: list[str] = []

    def action() -> None:
        seen.extend(session.sid for _ in range(2))  # type: ignore[attr-defined]
        session["x"] = 1

    site.visit(action, browser=browser)
    assert seen == [site.sid(browser)] * 2
    assert len(seen[0]) == 43


def test_asking_for_an_id_stores_nothing(site: Site) -> None:
    """An id alone is no session."""
    browser = site.app.test_client()
    rows = site.rows()
    site.visit(lambda: session.sid, browser=browser)  # type: ignore[attr-defined]
    assert site.cookie(browser) is None
    assert site.rows() == rows


def test_the_id_is_in_no_text_about_the_session(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither repr nor str nor a log line shows the secret."""
    caplog.set_level(logging.DEBUG)

    def action() -> str:
        target = raw()
        logging.getLogger("test").warning("%s %r", target, target)
        return f"{target!r} {target} {session!r} {session}"

    assert site.sid() not in site.visit(action).text
    assert site.sid() not in caplog.text


def test_repr_shows_the_data_like_dict(site: Site) -> None:
    """For a debugger: the data, whether or not it was used before."""
    assert str(STORED) in site.visit(lambda: repr(raw())).text
    assert str(STORED) in site.visit(lambda: str(raw())).text


def test_regenerate_twice_is_once(site: Site) -> None:
    """The last id counts; the session moves once."""
    ids: list[str] = []

    def action() -> None:
        for _ in range(2):
            session.regenerate()  # type: ignore[attr-defined]
            ids.append(session.sid)  # type: ignore[attr-defined]

    site.visit(action)
    assert site.sid() == ids[-1] != ids[0]
    assert site.data() == STORED
    assert site.state.observer.stats["regenerated"] == 1


def test_regenerate_of_a_session_emptied_afterwards_ends_it(site: Site) -> None:
    """Regenerate and then clear: nothing is left, and no cookie."""
    old = site.cookie()

    def action() -> None:
        session.regenerate()  # type: ignore[attr-defined]
        session.clear()

    site.visit(action)
    assert site.cookie() is None
    assert site.data(site.browser_with(old)) == {}


def test_sync_of_a_new_session_gives_it_its_row(site: Site) -> None:
    """A visitor's first store is in SQL at once, where the view asks for it."""
    browser = site.app.test_client()

    def action() -> None:
        session["x"] = 1
        session.sync()  # type: ignore[attr-defined]

    site.visit(action, browser=browser)
    assert key_of(site.sid(browser)) in site.rows()


# --- values ----------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "none": None,
    "bool": True,
    "int": 2**80,
    "negative": -(2**80),
    "float": 0.1,
    "text": "Grüße \U0001f600 \x00",
    "bytes": b"\x00\xff",
    "list": [1, [2, (3,)]],
    "tuple": (1, (2, [3])),
    "empty": [[], (), {}, "", b""],
    "dict": {"a": {1: 2, None: (1,)}},
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "markup": Markup("<b>x</b>"),
    "uuid": UUID(int=5),
    "decimal": Decimal("1.10"),
    "datetime": datetime(2024, 1, 2, 3, 4, 5, 678901),
    "aware": datetime(2024, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc),
    "zone": datetime(2024, 7, 2, 3, 4, tzinfo=ZoneInfo("Europe/Berlin")),
    "date": date(2024, 1, 2),
    "time": time(1, 2, 3, 4),
    "timedelta": timedelta(days=1, microseconds=1),
}


def test_special_types_come_back_identical(site: Site) -> None:
    """Every value with its type, from both nodes and from SQL."""
    found: list[dict[str, Any]] = []

    def look() -> None:
        found.append(dict(session))

    def store() -> None:
        session.update(VALUES)
        session.sync()  # type: ignore[attr-defined]

    site.visit(store)
    site.visit(look)
    for node in site.nodes:
        node.flush()
    site.visit(look)
    for data in found:
        for name, value in VALUES.items():
            assert data[name] == value
            assert type(data[name]) is type(value)
            assert repr(data[name]) == repr(value)
    assert len(found) == 2


def test_the_order_of_keys_is_kept(site: Site) -> None:
    """As dict keeps it, as far as one request stored them."""
    browser = site.app.test_client()
    names = ["z", "a", "m", "b"]
    site.set(browser, **dict.fromkeys(names, 1))
    assert site.visit(lambda: ",".join(session), browser=browser).text == "z,a,m,b"


@pytest.mark.parametrize("key", [1, None, ("a",), b"a"])
def test_a_key_that_is_no_text_is_a_type_error(site: Site, key: Any) -> None:
    """Flask's session would turn it into text; here it is said at save."""
    site.app.testing = True

    def action() -> None:
        raw()[key] = 1

    with pytest.raises(TypeError, match="key"):
        site.visit(action)
    site.app.testing = False
    assert site.data() == STORED
