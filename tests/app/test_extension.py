"""Setting it up: the order of things, and the database that is used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask import Flask, session
from flask_sqlalchemy import SQLAlchemy

from apps import BareApps, tables_of, works
from flask_resilient_session import ResilientSession
from servers import Memcached

TABLE = "resilient_sessions"


@pytest.fixture
def apps(nodes: list[Memcached], tmp_path: Path) -> Iterator[BareApps]:
    """Applications that the tests set up."""
    with BareApps(nodes, tmp_path) as made:
        yield made


# --- order -----------------------------------------------------------------------


@pytest.mark.parametrize("order", ["db first", "sessions first"])
def test_the_order_of_the_two_does_not_matter(apps: BareApps, order: str) -> None:
    """init_app of Flask-SQLAlchemy and of the sessions, either way round."""
    app, db, sessions = apps(), SQLAlchemy(), ResilientSession()
    if order == "db first":
        db.init_app(app)
    sessions.init_app(app, db)
    if order == "sessions first":
        db.init_app(app)
    assert TABLE in db.metadata.tables
    works(app)


def test_the_constructor_can_do_it_at_once(apps: BareApps, tmp_path: Path) -> None:
    """ResilientSession(app, db) initialises the application."""
    app = apps()
    ResilientSession(app, SQLAlchemy(app))
    works(app)
    assert TABLE in tables_of(tmp_path / "app.db")


@pytest.mark.parametrize("order", ["db first", "sessions first"])
@pytest.mark.parametrize("bind_key", [None, "other"])
def test_without_db_the_registered_one_is_used(
    apps: BareApps, tmp_path: Path, order: str, bind_key: str | None
) -> None:
    """The table joins its metadata, at the latest before the first command runs."""
    app = apps(
        RESILIENT_SESSION_BIND_KEY=bind_key,
        SQLALCHEMY_BINDS={"other": f"sqlite:///{tmp_path}/other.db"},
    )
    db = SQLAlchemy()
    if order == "db first":
        db.init_app(app)
    ResilientSession(app)
    if order == "sessions first":
        db.init_app(app)
    with app.app_context():
        assert TABLE in db.metadatas[bind_key].tables
    works(app)
    name = "app.db" if bind_key is None else "other.db"
    assert TABLE in tables_of(tmp_path / name)


def test_a_bind_key_puts_the_table_into_that_database(
    apps: BareApps, tmp_path: Path
) -> None:
    """With db given as well."""
    app = apps(
        RESILIENT_SESSION_BIND_KEY="other",
        SQLALCHEMY_BINDS={"other": f"sqlite:///{tmp_path}/other.db"},
    )
    db = SQLAlchemy(app)
    ResilientSession(app, db)
    works(app)
    assert TABLE not in db.metadata.tables
    assert TABLE in db.metadatas["other"].tables
    assert TABLE in tables_of(tmp_path / "other.db")


# --- no Flask-SQLAlchemy at all --------------------------------------------------


def test_without_any_database_there_is_a_file(apps: BareApps, tmp_path: Path) -> None:
    """An SQLite file of our own in the instance folder; nothing is registered."""
    app = apps()
    del app.config["SQLALCHEMY_DATABASE_URI"]
    ResilientSession(app)
    works(app)
    assert "sqlalchemy" not in app.extensions
    files = [path for path in (tmp_path / "instance").iterdir() if "-" not in path.name]
    assert len(files) == 1
    assert TABLE in tables_of(files[0])


@pytest.mark.parametrize("absolute", [True, False])
def test_without_flask_sqlalchemy_its_uri_is_used(
    apps: BareApps, tmp_path: Path, absolute: bool
) -> None:
    """SQLALCHEMY_DATABASE_URI; a relative file is in the instance folder, as there."""
    uri = f"sqlite:///{tmp_path}/own.db" if absolute else "sqlite:///own.db"
    app = apps(SQLALCHEMY_DATABASE_URI=uri)
    ResilientSession(app)
    works(app)
    assert "sqlalchemy" not in app.extensions
    folder = tmp_path if absolute else tmp_path / "instance"
    assert TABLE in tables_of(folder / "own.db")


def test_the_embedded_default_warns_once_and_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No nodes and no database configured: SQL alone, one line in the log."""
    app = Flask("embedded", instance_path=str(tmp_path / "instance"))
    app.config.update(SECRET_KEY="x" * 32, TESTING=True)
    app.add_url_rule("/", "index", lambda: dict(session))
    app.add_url_rule("/set/<k>", "put", lambda k: session.update({k: 1}) or "set")
    with caplog.at_level(logging.WARNING, "flask_resilient_session"):
        ResilientSession(app)
        works(app)
        browser = app.test_client()
        browser.get("/set/a")
        app.extensions["resilient_session"].close()
        assert browser.get("/").json == {"a": 1}
    app.extensions["resilient_session"].close()
    warnings = [r for r in caplog.records if r.name == "flask_resilient_session"]
    assert len(warnings) == 1
    assert "RESILIENT_SESSION_NODES" in warnings[0].message


# --- metadata, creation ----------------------------------------------------------


def test_one_db_may_serve_several_applications(apps: BareApps) -> None:
    """The table is in its metadata once."""
    db, sessions = SQLAlchemy(), ResilientSession()
    for name in ("one", "two"):
        app = apps(name=name)
        db.init_app(app)
        sessions.init_app(app, db)
        works(app)
    assert list(db.metadata.tables) == [TABLE]


def test_create_all_makes_the_table(apps: BareApps, tmp_path: Path) -> None:
    """db.create_all() sees it, with its indexes."""
    app = apps(RESILIENT_SESSION_CREATE_TABLE=False)
    db = SQLAlchemy(app)
    ResilientSession(app, db)
    with app.app_context():
        db.create_all()
    assert tables_of(tmp_path / "app.db") == [TABLE]
    works(app)
    inspector = sa.inspect(app.extensions["resilient_session"].sql.engine)
    columns = {tuple(i["column_names"]) for i in inspector.get_indexes(TABLE)}
    assert columns == {("user_id",), ("expires_at", "session_key")}


def test_a_missing_table_is_said_with_a_remedy(
    apps: BareApps, caplog: pytest.LogCaptureFixture
) -> None:
    """CREATE_TABLE off and no migration: what needs SQL is 503, the log says why."""
    app = apps(RESILIENT_SESSION_CREATE_TABLE="false")
    ResilientSession(app, SQLAlchemy(app))
    response = app.test_client().get("/set/_user_id")
    assert response.status_code == 503
    said = response.text + caplog.text
    assert "no such table" in said
    assert "RESILIENT_SESSION_CREATE_TABLE" in said


def test_the_table_and_schema_can_be_named(apps: BareApps) -> None:
    """RESILIENT_SESSION_TABLE and _SCHEMA, as the metadata spells them."""
    app = apps(RESILIENT_SESSION_TABLE="logins", RESILIENT_SESSION_SCHEMA="main")
    db = SQLAlchemy(app)
    ResilientSession(app, db)
    assert list(db.metadata.tables) == ["main.logins"]
    works(app)


@pytest.mark.parametrize("given", [True, False])
def test_the_metadatas_own_schema_counts(apps: BareApps, given: bool) -> None:
    """``MetaData(schema=…)``: there the table is, and there it is used."""
    db = SQLAlchemy(metadata=sa.MetaData(schema="main"))
    for name in ("one", "two"):
        app = apps(name=name, RESILIENT_SESSION_CREATE_TABLE=False)
        db.init_app(app)
        ResilientSession(app, db if given else None)
        with app.app_context():
            db.create_all()
        works(app)
        used = app.extensions["resilient_session"].sql.table
        assert used.fullname == f"main.{TABLE}"
    assert list(db.metadata.tables) == [f"main.{TABLE}"]
