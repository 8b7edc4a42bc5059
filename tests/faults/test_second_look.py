"""What went wrong once where two rooms meet, and must not again."""

from __future__ import annotations

import pytest
from flask import flash, session

from apps import Site, Sites, key_of
from builders import patient
from flask_resilient_session import (
    ConfigurationError,
    SessionUnavailable,
    session_created,
    session_recovered,
    session_regenerated,
    session_revoked,
)
from flask_resilient_session.common.errors import SqlBusy
from flask_resilient_session.core.answers import RowLive
from flask_resilient_session.store.context import SessionContext
from misbehaving import in_child


@pytest.fixture
def site(sites: Sites) -> Site:
    """An application with one visitor who is logged in."""
    site = sites()
    site.app.add_url_rule("/late", "late", lambda: session.update(late=1) or "late")
    site.set(_user_id="7", cart=1)
    site.data()
    return site


def test_a_listener_may_look_at_the_session_that_is_being_loaded(site: Site) -> None:
    """It sees an empty one, and nobody waits for himself."""
    seen: list[object] = []

    def listen(sender: object, **_: object) -> None:
        seen.append(session.get("cart"))

    site.nodes[0].flush()
    with session_recovered.connected_to(listen, sender=site.app):
        assert site.data() == {"_user_id": "7", "cart": 1}
    assert seen == [None]


def test_an_own_shortage_is_no_reason_to_guess(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a place to ask SQL from, a lone copy is not served."""

    def no_place(*_: object) -> None:
        raise SqlBusy("every connection to SQL is in use")

    site.nodes[0].flush()
    monkeypatch.setattr(site.state.sql, "read", no_place)
    for _ in range(5):
        assert site.browser.get("/").status_code == 503
    monkeypatch.undo()
    assert site.data() == {"_user_id": "7", "cart": 1}, "SQL was never skipped"


def test_what_cannot_be_carried_over_does_not_cost_the_session(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The move is done: its cookie is sent, and the loss is counted."""
    old = site.cookie()
    saver = site.state.store.move.__self__._saver

    def refuse(*_: object, **__: object) -> None:
        raise SessionUnavailable("no room")

    def regenerate() -> None:
        session.get("cart")
        with site.app.test_client() as other:
            other.set_cookie("session", old or "")
            other.get("/late")
        monkeypatch.setattr(saver, "save", refuse)
        session.regenerate()

    dropped = site.state.observer.stats["dropped_changes"]
    assert site.visit(regenerate).status_code == 200
    monkeypatch.undo()
    assert site.cookie() != old
    assert site.data() == {"_user_id": "7", "cart": 1}
    assert site.state.observer.stats["dropped_changes"] == dropped + 1


def test_a_child_starts_with_places_of_its_own(site: Site) -> None:
    """What its parent's threads held at the fork is not held there for ever."""
    durable = site.state.store.rows
    gate = durable._gate
    context = SessionContext(
        key_of(site.sid()),
        site.state.keys.of(site.app).keyring,
        site.state.settings.timing(3600),
        patient(),
    )
    assert gate.slots == site.state.settings.sql_concurrency
    for _ in range(gate.slots):
        gate._enter(0, gate._readers)
    assert in_child(lambda: isinstance(durable.read(context), RowLive))
    for _ in range(gate.slots):
        gate._leave()


def test_without_nodes_there_is_the_same_gate(sites: Sites) -> None:
    """SQL alone is asked by as many at once, and who finds no place comes again."""
    site = sites(
        RESILIENT_SESSION_NODES=[],
        RESILIENT_SESSION_SQL_CONCURRENCY=1,
        RESILIENT_SESSION_SQL_TIMEOUT=0.1,
    )
    site.set(a=1)
    gate = site.state.store.rows._gate
    gate._enter(0, gate._readers)
    response = site.browser.get("/")
    assert response.status_code == 503
    assert response.headers["Retry-After"]
    gate._leave()
    assert site.data() == {"a": 1}


def test_an_end_with_a_farewell_is_an_end(site: Site) -> None:
    """``clear()`` and ``flash()`` in one request: one session ends, another begins."""

    def farewell() -> None:
        session.clear()
        flash("bye")

    heard: list[str] = []
    with (
        session_revoked.connected_to(lambda _, **__: heard.append("ended"), site.app),
        session_created.connected_to(lambda _, **__: heard.append("begun"), site.app),
        session_regenerated.connected_to(
            lambda _, **__: heard.append("moved"), site.app
        ),
    ):
        site.visit(farewell)
    assert heard == ["ended", "begun"]


def test_one_listener_that_fails_does_not_silence_another(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them is told."""
    heard: list[str] = []

    def fail(sender: object, **_: object) -> None:
        raise RuntimeError("a listener's bug")

    def listen(sender: object, session: str) -> None:
        heard.append(session)

    with (
        session_created.connected_to(fail, site.app),
        session_created.connected_to(listen, site.app),
    ):
        site.set(site.browser_with(None), a=1)
    assert len(heard) == 1
    assert "A listener of session-created failed" in caplog.text


def test_a_revocation_that_sql_did_not_take_is_no_success(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever revokes acts on the answer: it counts what SQL has committed."""
    with site.app.app_context():
        site.break_sql(monkeypatch)
        with pytest.raises(SessionUnavailable):
            site.sessions.revoke_user("7")
        monkeypatch.undo()
        site.state.store.renew()
        assert site.data() == {"_user_id": "7", "cart": 1}
        assert site.sessions.revoke_user("7") == 1
    assert site.data() == {}


def test_a_bind_that_does_not_exist_is_found_at_once(sites: Sites) -> None:
    """The error names the binds that do."""
    with pytest.raises(ConfigurationError, match="one of SQLALCHEMY_BINDS: other"):
        sites(
            RESILIENT_SESSION_BIND_KEY="sessions",
            SQLALCHEMY_BINDS={"other": "sqlite://"},
        )
