"""The application's transaction is its own, on every kind of SQLite."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import session
from flask_sqlalchemy import SQLAlchemy

from apps import Site, Sites

#: Seconds that our save waits for the application's lock.
TIMEOUT = 0.2


def with_notes(sites: Sites, **config: Any) -> tuple[Site, sa.Table]:
    """A site whose application has a table of notes."""
    site = sites(RESILIENT_SESSION_SQL_TIMEOUT=TIMEOUT, **config)
    notes = sa.Table("notes", site.db.metadata, sa.Column("text", sa.String))
    with site.app.app_context():
        site.db.create_all()
    site.set(_user_id="1")
    site.app._got_first_request = False  # tests go on with setting it up
    return site, notes


def written(site: Site, notes: sa.Table) -> list[str]:
    """The notes, as another transaction sees them."""
    with site.app.app_context():
        return list(site.db.session.scalars(sa.select(notes.c.text)))


IN_MEMORY = [
    "sqlite://",
    "sqlite:///:memory:",
    "sqlite:///file:shared?mode=memory&cache=shared&uri=true",
]


@pytest.mark.parametrize("uri", IN_MEMORY)
def test_in_memory_the_views_work_is_not_committed(sites: Sites, uri: str) -> None:
    """In-memory SQLite has one connection: ours is to another database."""
    # As Flask-SQLAlchemy has it for the first two: one connection for all threads.
    options = {"poolclass": sa.StaticPool}
    site, notes = with_notes(
        sites, SQLALCHEMY_DATABASE_URI=uri, SQLALCHEMY_ENGINE_OPTIONS=options
    )

    def action() -> None:
        site.db.session.execute(notes.insert().values(text="unfinished"))
        session["_user_id"] = "2"
        session.sync()  # type: ignore[attr-defined]

    assert site.visit(action).status_code == 200
    assert site.data() == {"_user_id": "2"}
    assert written(site, notes) == []


def test_in_memory_the_views_work_is_not_rolled_back(sites: Sites) -> None:
    """It is there after our save, for the application to commit."""
    site, notes = with_notes(sites, SQLALCHEMY_DATABASE_URI="sqlite://")
    site.app.teardown_request(lambda error: site.db.session.commit())

    def action() -> None:
        site.db.session.execute(notes.insert().values(text="finished"))
        session["_user_id"] = "2"

    assert site.visit(action).status_code == 200
    assert written(site, notes) == ["finished"]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_an_uncommitted_write_makes_our_save_fail_soon(
    sites: Sites, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """503 within the timeout, with the remedy; the application's work is untouched."""
    site, notes = with_notes(sites)
    site.app.teardown_request(lambda error: getattr(site.db.session, end)())
    before = site.cookie()

    def action() -> None:
        site.db.session.execute(notes.insert().values(text="the view's"))
        session["_user_id"] = "2"

    started = time.monotonic()
    response = site.visit(action)
    assert time.monotonic() - started < TIMEOUT + 1
    assert response.status_code == 503
    assert "Set-Cookie" not in response.headers
    said = response.text + caplog.text
    assert "commit before the view returns" in said
    assert "RESILIENT_SESSION_BIND_KEY" in said
    assert written(site, notes) == (["the view's"] if end == "commit" else [])
    assert site.cookie() == before
    assert site.data() == {"_user_id": "1"}


def test_an_uncommitted_write_does_not_hurt_other_changes(sites: Sites) -> None:
    """What needs no SQL goes to the nodes."""
    site, notes = with_notes(sites)

    def action() -> None:
        site.db.session.execute(notes.insert().values(text="the view's"))
        session["a"] = 1

    assert site.visit(action).status_code == 200
    assert site.data() == {"_user_id": "1", "a": 1}
    assert written(site, notes) == []


def test_a_file_of_their_own_keeps_them_apart(sites: Sites, tmp_path: Path) -> None:
    """The remedy works: sessions in a bind's file do not wait for the view."""
    site, notes = with_notes(
        sites,
        RESILIENT_SESSION_BIND_KEY="sessions",
        SQLALCHEMY_BINDS={"sessions": f"sqlite:///{tmp_path}/sessions.db"},
    )

    def action() -> None:
        site.db.session.execute(notes.insert().values(text="unfinished"))
        session["_user_id"] = "2"

    assert site.visit(action).status_code == 200
    assert site.data() == {"_user_id": "2"}
    assert written(site, notes) == []


def test_pending_objects_are_not_flushed(sites: Sites) -> None:
    """What the view only added stays pending."""
    db = SQLAlchemy()

    class Note(db.Model):  # type: ignore[name-defined,misc]
        id: Any = db.Column(db.Integer, primary_key=True)

    site = sites(db=db)
    db.init_app(site.app)
    with site.app.app_context():
        db.create_all()
    pending: list[int] = []
    site.app.teardown_request(lambda error: pending.append(len(db.session.new)))

    def action() -> None:
        db.session.add(Note())
        session["_user_id"] = "1"

    assert site.visit(action).status_code == 200
    assert pending == [1]
