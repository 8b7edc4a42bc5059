"""Setting it up: order, databases, settings, and what init_app refuses."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, session
from flask_sqlalchemy import SQLAlchemy

from apps import Site, Sites, TimeMachine, make_app
from flask_resilient_session import (
    ConfigurationError,
    ResilientSession,
    ResilientSessionError,
    SetupError,
)
from servers import Memcached

TABLE = "resilient_sessions"


@pytest.fixture
def sites(nodes: list[Memcached], tmp_path: Path) -> Iterator[Sites]:
    """Applications on two nodes."""
    with Sites(nodes, tmp_path) as made:
        yield made


@pytest.fixture
def apps(nodes: list[Memcached], tmp_path: Path) -> Iterator[Any]:
    """Makes applications that are set up by the test, and closes them after it."""
    made: list[Flask] = []

    def make(**config: Any) -> Flask:
        app = make_app(nodes, tmp_path, **config)

        @app.get("/")
        def index() -> dict[str, Any]:
            return dict(session)

        @app.get("/set/<key>")
        def put(key: str) -> str:
            session[key] = 1
            return "set"

        made.append(app)
        return app

    yield make
    for app in made:
        if "resilient_session" in app.extensions:
            app.extensions["resilient_session"].close()
        if "sqlalchemy" in app.extensions:
            with app.app_context():
                for engine in app.extensions["sqlalchemy"].engines.values():
                    engine.dispose()


def works(app: Flask) -> None:
    """Assert that the application keeps a login in its sessions."""
    browser = app.test_client()
    for key in ("a", "_user_id"):
        response = browser.get(f"/set/{key}")
        assert response.status_code == 200, response.text
    assert browser.get("/").json == {"a": 1, "_user_id": 1}


def tables_of(path: Path) -> list[str]:
    """Names of the tables in an SQLite file."""
    engine = sa.create_engine(f"sqlite:///{path}")
    try:
        return sa.inspect(engine).get_table_names()
    finally:
        engine.dispose()


# --- order -----------------------------------------------------------------------


@pytest.mark.parametrize("order", ["db first", "sessions first"])
def test_the_order_of_the_two_does_not_matter(apps: Any, order: str) -> None:
    """init_app of Flask-SQLAlchemy and of the sessions, either way round."""
    app, db, sessions = apps(), SQLAlchemy(), ResilientSession()
    if order == "db first":
        db.init_app(app)
    sessions.init_app(app, db)
    if order == "sessions first":
        db.init_app(app)
    assert TABLE in db.metadata.tables
    works(app)


def test_the_constructor_can_do_it_at_once(apps: Any, tmp_path: Path) -> None:
    """ResilientSession(app, db) initialises the application."""
    app = apps()
    ResilientSession(app, SQLAlchemy(app))
    works(app)
    assert TABLE in tables_of(tmp_path / "app.db")


@pytest.mark.parametrize("order", ["db first", "sessions first"])
@pytest.mark.parametrize("bind_key", [None, "other"])
def test_without_db_the_registered_one_is_used(
    apps: Any, tmp_path: Path, order: str, bind_key: str | None
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
    apps: Any, tmp_path: Path
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


def test_without_any_database_there_is_a_file(apps: Any, tmp_path: Path) -> None:
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
    apps: Any, tmp_path: Path, absolute: bool
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


def test_one_db_may_serve_several_applications(apps: Any) -> None:
    """The table is in its metadata once."""
    db, sessions = SQLAlchemy(), ResilientSession()
    for name in ("one", "two"):
        app = apps(name=name)
        db.init_app(app)
        sessions.init_app(app, db)
        works(app)
    assert list(db.metadata.tables) == [TABLE]


def test_create_all_makes_the_table(apps: Any, tmp_path: Path) -> None:
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
    assert columns == {("user_id",), ("synced_at",), ("expires_at", "session_key")}


def test_a_missing_table_is_said_with_a_remedy(
    apps: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """CREATE_TABLE off and no migration: what needs SQL is 503, the log says why."""
    app = apps(RESILIENT_SESSION_CREATE_TABLE="false")
    ResilientSession(app, SQLAlchemy(app))
    response = app.test_client().get("/set/_user_id")
    assert response.status_code == 503
    said = response.text + caplog.text
    assert "no such table" in said
    assert "RESILIENT_SESSION_CREATE_TABLE" in said


def test_the_table_and_schema_can_be_named(apps: Any) -> None:
    """RESILIENT_SESSION_TABLE and _SCHEMA, as the metadata spells them."""
    app = apps(RESILIENT_SESSION_TABLE="logins", RESILIENT_SESSION_SCHEMA="main")
    db = SQLAlchemy(app)
    ResilientSession(app, db)
    assert list(db.metadata.tables) == ["main.logins"]
    works(app)


# --- what is refused -------------------------------------------------------------


def test_twice_is_an_error_with_a_remedy(apps: Any) -> None:
    """Initialising an application a second time, by whichever object."""
    app = apps()
    sessions = ResilientSession(app, SQLAlchemy(app))
    for again in (sessions, ResilientSession()):
        with pytest.raises(SetupError, match="once"):
            again.init_app(app)
    works(app)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("RESILIENT_SESSION_REPLICAS", 3),
        ("RESILIENT_SESSION_NODE_TIMEOUT", -1),
        ("RESILIENT_SESSION_NODES", "a:1,a:1"),
        ("RESILIENT_SESSION_ON_UNAVAILABLE", "maybe"),
        ("RESILIENT_SESSION_REPLICA", 2),
        ("PERMANENT_SESSION_LIFETIME", timedelta(0)),
    ],
)
def test_a_wrong_setting_is_refused_at_once(apps: Any, key: str, value: object) -> None:
    """The text names key and value; the application is left as it was."""
    app = apps(**{key: value})
    interface = app.session_interface
    with pytest.raises(ConfigurationError, match=key) as caught:
        ResilientSession(app)
    assert isinstance(caught.value, ResilientSessionError)
    assert "is not allowed: use" in str(caught.value)
    assert "resilient_session" not in app.extensions
    assert app.session_interface is interface


def test_settings_freeze_at_init_app(apps: Any) -> None:
    """RESILIENT_SESSION_* changed later have no effect."""
    app = apps()
    ResilientSession(app, SQLAlchemy(app))
    app.config["RESILIENT_SESSION_KEY_PREFIX"] = "other:"
    app.config["RESILIENT_SESSION_TABLE"] = "other"
    works(app)
    assert app.extensions["resilient_session"].settings.key_prefix == "session:"


def test_a_db_that_was_never_initialised_is_explained(apps: Any) -> None:
    """The error says which call is missing."""
    app = apps(TESTING=True)
    ResilientSession(app, SQLAlchemy())
    with pytest.raises(SetupError, match=r"db\.init_app\(app\)"):
        app.test_client().get("/set/_user_id")


def test_an_unknown_bind_key_is_explained(apps: Any) -> None:
    """The error names the setting and the binds there are."""
    app = apps(TESTING=True, RESILIENT_SESSION_BIND_KEY="nowhere")
    ResilientSession(app, SQLAlchemy(app))
    with pytest.raises(SetupError, match=r"BIND_KEY.*nowhere"):
        app.test_client().get("/set/_user_id")


def test_outside_of_an_application_it_says_so(apps: Any) -> None:
    """The extension object's methods are about the current application."""
    app = apps()
    sessions = ResilientSession()
    with app.app_context(), pytest.raises(SetupError, match="init_app"):
        _ = sessions.stats


# --- other settings --------------------------------------------------------------


def test_settings_may_come_from_the_environment(
    apps: Any, nodes: list[Memcached], monkeypatch: pytest.MonkeyPatch
) -> None:
    """app.config.from_prefixed_env(), with its JSON and its leftovers of text."""
    addresses = [node.address for node in nodes]
    for key, value in {
        "NODES": ",".join(addresses),
        "REPLICAS": "2",
        "CREATE_TABLE": "True",
        "SYNC_WRITES": "None",
        "ENCRYPT": "false",
        "KEY_PREFIX": "42",
        "NODE_TIMEOUT": "0.5",
    }.items():
        monkeypatch.setenv(f"FLASK_RESILIENT_SESSION_{key}", value)
    app = apps()
    del app.config["RESILIENT_SESSION_NODES"]
    app.config.from_prefixed_env()
    ResilientSession(app, SQLAlchemy(app))
    works(app)
    settings = app.extensions["resilient_session"].settings
    assert [node.name for node in settings.nodes] == addresses
    assert settings.key_prefix == "42"
    assert settings.sync_writes is None
    assert settings.node_timeout == 0.5
    assert all(any(k.startswith("42") for k in node.keys()) for node in nodes)  # noqa: SIM118


def test_json_nodes_from_the_environment(
    apps: Any, nodes: list[Memcached], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JSON list of mappings gives names, weights and zones."""
    spec = [
        {"name": f"n{i}", "address": node.address, "weight": i + 1, "zone": f"z{i}"}
        for i, node in enumerate(nodes)
    ]
    monkeypatch.setenv("FLASK_RESILIENT_SESSION_NODES", json.dumps(spec))
    app = apps()
    app.config.from_prefixed_env()
    ResilientSession(app, SQLAlchemy(app))
    works(app)


@pytest.mark.parametrize("single", ["one replica", "one node"])
def test_one_home_writes_through_and_asks_sql(sites: Sites, single: str) -> None:
    """A copy without a second opinion is not trusted; every change is in SQL."""
    if single == "one node":
        sites.nodes = sites.nodes[:1]
    site = sites(RESILIENT_SESSION_REPLICAS=1 if single == "one replica" else 2)
    site.set(a=1)
    site.data()
    for n in range(3):
        assert site.cost(lambda n=n: site.set(n=n)).statements >= 2
    assert site.cost(site.data).statements == 1
    for node in sites.nodes:
        node.flush()
    assert site.data() == {"a": 1, "n": 2}


def test_requests_reap_now_and_then(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REAP_PROBABILITY: a small batch after the response, for sites without cron."""
    clock = TimeMachine(monkeypatch)
    site = sites(RESILIENT_SESSION_REAP_PROBABILITY=1.0)
    site.set(_user_id="1")
    assert len(site.rows()) == 1
    clock.forward(site.app.permanent_session_lifetime.total_seconds() + 10_000)
    with site.app.test_client().get("/plain") as response:
        assert response.text == "plain"
    assert site.rows() == {}


def test_reap_is_a_method_too(sites: Sites) -> None:
    """sessions.reap() does one pass over the current application's table."""
    site: Site = sites()
    with site.app.app_context():
        report = site.sessions.reap(limit=5)
        assert site.sessions.stats["created"] == 0
    assert (report.examined, report.failed, report.refused) == (0, None, None)
