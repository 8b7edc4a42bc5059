"""Errors while saving, keys that rotate, and requests at the same time."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from flask import redirect, session

from apps import Site, Sites, TimeMachine, item_of, key_of
from flask_resilient_session import (
    SessionTooLarge,
    session_created,
    session_regenerated,
    session_revoked,
)
from servers import Memcached

OLD = "the old key " * 4
NEW = "the new key " * 4


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults."""
    return sites()


# --- too large -------------------------------------------------------------------


def test_too_large_is_the_applications_own_413(sites: Sites) -> None:
    """The response becomes the application's own page; the stored session stays."""
    site = sites(RESILIENT_SESSION_MAX_BYTES=2000)

    @site.app.errorhandler(413)
    def too_large(error: Exception) -> Any:
        assert isinstance(error, SessionTooLarge)
        assert error.limit == 2000 < error.size
        return {"too": "large"}, 413, {"X-Own": "yes"}

    site.set(a=1)
    before = site.cookie()

    def action() -> Any:
        session.update(a=2, big="x" * 3000)
        return redirect("/elsewhere")

    response = site.visit(action)
    assert response.status_code == 413
    assert response.json == {"too": "large"}
    assert response.headers["X-Own"] == "yes"
    assert "Location" not in response.headers
    assert "Set-Cookie" not in response.headers
    assert int(response.headers["Content-Length"]) == len(response.data)
    assert site.cookie() == before
    assert site.data() == {"a": 1}


def test_too_large_without_a_session_stores_nothing(sites: Sites) -> None:
    """A first store over the limit: 413, no cookie and no row."""
    site = sites(RESILIENT_SESSION_MAX_BYTES=2000)
    response = site.visit(lambda: session.update(big="x" * 3000))
    assert response.status_code == 413
    assert "2000" in response.text
    assert "Set-Cookie" not in response.headers
    assert site.rows() == {}


def test_too_large_at_login_leaves_the_old_session(sites: Sites) -> None:
    """A move that fails leaves the old id as it was."""
    site = sites(RESILIENT_SESSION_MAX_BYTES=2000)
    site.set(a=1)
    response = site.visit(lambda: session.update(_user_id="1", big="x" * 3000))
    assert response.status_code == 413
    assert site.data() == {"a": 1}


def test_too_large_leaves_a_view_s_own_cookie_out(sites: Sites) -> None:
    """The replaced response's cookies belong to a success that did not happen."""
    site = sites(RESILIENT_SESSION_MAX_BYTES=2000)

    def action() -> Any:
        session["big"] = "x" * 3000
        response = site.app.make_response("fine")
        response.set_cookie("own", "1")
        return response

    response = site.visit(action)
    assert response.status_code == 413
    assert "Set-Cookie" not in response.headers
    assert response.headers["Vary"] == "Cookie"


# --- what cannot be stored -------------------------------------------------------


class Unknown:
    """Something that no session can hold."""


@pytest.mark.parametrize("value", [Unknown(), {"deep": [Unknown()]}])
def test_what_cannot_be_stored_is_an_error(
    site: Site, caplog: pytest.LogCaptureFixture, value: object
) -> None:
    """A programming error: 500, key and type in the log, nothing stored."""
    site.set(a=1)
    response = site.visit(lambda: session.update(a=2, bad=value))
    assert response.status_code == 500
    assert "Set-Cookie" not in response.headers
    assert "bad" in caplog.text
    assert "Unknown" in caplog.text
    assert site.data() == {"a": 1}


def test_what_cannot_be_stored_raises_under_test(site: Site) -> None:
    """With TESTING the TypeError reaches the test."""
    site.app.testing = True
    with pytest.raises(TypeError, match=r"bad.*Unknown"):
        site.visit(lambda: session.update(bad=Unknown()))


# --- rotation --------------------------------------------------------------------


def test_a_rotated_key_keeps_sessions(sites: Sites) -> None:
    """Cookies of the old key stay good; what is written is sealed by the new one."""
    site = sites(SECRET_KEY=OLD)
    site.set(a=1)
    site.data()
    first = site.cookie()
    site.app.config.update(SECRET_KEY=NEW, SECRET_KEY_FALLBACKS=[OLD])
    assert site.data() == {"a": 1}
    site.set(b=2)
    second = site.cookie()
    assert second != first
    assert str(second).split(".")[0] == str(first).split(".")[0]
    site.visit(lambda: session.sync())  # type: ignore[attr-defined]
    site.app.config["SECRET_KEY_FALLBACKS"] = []
    assert site.data() == {"a": 1, "b": 2}
    assert site.data(site.browser_with(first)) == {}


def test_a_record_under_an_unknown_key_is_never_overwritten(
    sites: Sites, nodes: list[Memcached]
) -> None:
    """A worker that is behind in a rotation answers 503 and leaves it all alone."""
    site = sites(SECRET_KEY=NEW)
    site.set(_user_id="1")
    sid = site.sid()
    copies = [node.raw_get(item_of(sid)) for node in nodes]
    row = site.rows()[key_of(sid)]
    site.app.config.update(SECRET_KEY=OLD)
    browser = site.browser_with(site.signer.sign(sid))
    for action in (lambda: session.update(b=2), lambda: session.clear()):
        response = site.visit(action, browser=browser)
        assert response.status_code == 503
        assert "Set-Cookie" not in response.headers
    assert [node.raw_get(item_of(sid)) for node in nodes] == copies
    assert site.rows()[key_of(sid)] == row
    site.app.config.update(SECRET_KEY=NEW)
    assert site.data() == {"_user_id": "1"}


def test_the_key_may_be_set_after_the_set_up(sites: Sites) -> None:
    """The key is read per request, as Flask does."""
    site = sites(SECRET_KEY=None)
    site.app.secret_key = b"bytes are fine too" * 2
    site.set(a=1)
    assert site.data() == {"a": 1}
    site.app.secret_key = "another one" * 4
    assert site.data() == {}


def test_the_id_is_stored_nowhere(
    site: Site, nodes: list[Memcached], caplog: pytest.LogCaptureFixture
) -> None:
    """Only the cookie has the id: no key, record, row or log line has it."""
    caplog.set_level("DEBUG")
    site.set(_user_id="1")
    site.set(a=2)
    sid = site.sid()
    for node in nodes:
        keys = node.keys()
        assert len(keys) == 1
        assert not any(sid in key for key in keys)
        assert not any(sid.encode() in (node.raw_get(key) or b"") for key in keys)
    assert sid not in repr(site.rows())
    assert sid not in caplog.text


# --- at the same time ------------------------------------------------------------


def test_requests_that_change_different_keys_all_survive(site: Site) -> None:
    """Eight writers at once, each with its own key."""
    site.set(start=1)
    site.data()
    cookie = site.cookie()
    writers = 8
    ready = threading.Barrier(writers)

    def write() -> str:
        ready.wait(10)
        session[threading.current_thread().name] = 1
        return "written"

    site._action = write
    statuses: list[int] = []

    def visit() -> None:
        statuses.append(site.browser_with(cookie).get("/visit").status_code)

    threads = [threading.Thread(target=visit, name=f"k{n}") for n in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * writers
    assert site.data() == {"start": 1} | {f"k{n}": 1 for n in range(writers)}


def test_a_slow_reader_does_not_undo_a_change(site: Site) -> None:
    """A request that only reads keeps what another wrote meanwhile."""
    site.set(a=1)
    other = site.browser_with(site.cookie())

    def action() -> str:
        seen = session["a"]
        site.set(other, a=2)
        return str(seen)

    assert site.visit(action).text == "1"
    assert site.data() == {"a": 2}


def test_a_deleted_key_stays_deleted(site: Site) -> None:
    """Deleting one key while another request changes another."""
    site.set(a=1, b=1)
    other = site.browser_with(site.cookie())

    def action() -> None:
        del session["a"]
        site.set(other, b=2)

    site.visit(action)
    assert site.data() == {"b": 2}


# --- time ------------------------------------------------------------------------


def test_a_session_is_synced_once_per_interval(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it changes: one SQL write per interval, also by a reader."""
    clock = TimeMachine(monkeypatch)
    site.set(n=0)
    site.data()
    assert site.cost(lambda: [site.set(n=n) for n in range(9)]).statements == 0
    clock.forward(121)
    assert site.cost(lambda: site.data()).statements == 1
    assert site.cost(lambda: site.set(n=10)).statements == 0


def test_sync_writes_counts_changes(sites: Sites) -> None:
    """RESILIENT_SESSION_SYNC_WRITES: SQL after so many changes."""
    site = sites(RESILIENT_SESSION_SYNC_WRITES=3)
    site.set(n=0)
    site.data()
    costs = [site.cost(lambda n=n: site.set(n=n)).statements for n in range(1, 7)]
    assert costs == [0, 0, 1, 0, 0, 1]


def test_interval_zero_writes_every_change(sites: Sites) -> None:
    """RESILIENT_SESSION_SYNC_INTERVAL=0 writes changes through; reads stay free."""
    site = sites(RESILIENT_SESSION_SYNC_INTERVAL=0)
    site.set(n=0)
    site.data()
    for n in range(1, 4):
        assert site.cost(lambda n=n: site.set(n=n)).statements == 1
        assert site.cost(site.data).statements == 0


# --- signals ---------------------------------------------------------------------


def test_signals_tell_what_became_of_a_session(site: Site) -> None:
    """Created, regenerated, revoked: by short digest, with the app as the sender."""
    told: list[tuple[str, dict[str, Any]]] = []
    app = site.app

    def listen(name: str) -> Any:
        return lambda sender, **fields: told.append((name, fields))

    listeners = [listen(name) for name in ("created", "regenerated", "revoked")]
    for signal, listener in zip(
        (session_created, session_regenerated, session_revoked), listeners, strict=True
    ):
        signal.connect(listener, app)
    site.set(a=1)
    first = key_of(site.sid())[:12]
    site.set(_user_id="1")
    second = key_of(site.sid())[:12]
    site.visit(lambda: session.clear())
    assert told == [
        ("created", {"session": first}),
        ("regenerated", {"session": second, "previous": first}),
        ("revoked", {"session": second}),
    ]
    del listeners


def test_a_failing_listener_hurts_nobody(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """A listener's error is logged, and the session is stored all the same."""

    def listener(sender: object, **fields: object) -> None:
        raise RuntimeError("a listener's bug")

    with session_created.connected_to(listener, site.app):
        site.set(a=1)
    assert site.data() == {"a": 1}
    assert "a listener's bug" in caplog.text
