"""Applications for the tests of the Flask side, and what they cost per request."""

from __future__ import annotations

import hashlib
import inspect
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from flask import Flask, session
from flask.testing import FlaskClient, FlaskCliRunner
from flask_sqlalchemy import SQLAlchemy
from werkzeug.test import TestResponse

from flask_resilient_session import ResilientSession
from flask_resilient_session.common.clock import SystemClock
from flask_resilient_session.core.lifetimes import row_expires_ms
from flask_resilient_session.core.record import Entry, Record
from flask_resilient_session.core.values import encode_value
from servers import Memcached

#: Statements that are not counted: they are no work of the database's.
_FREE = ("BEGIN", "COMMIT", "ROLLBACK", "PRAGMA", "SAVEPOINT", "RELEASE")

#: What a test may do in a request; what it returns is the response.
Action = Callable[[], Any]


@sa.event.listens_for(sa.Engine, "connect")
def _hurry(connection: Any, _: object) -> None:
    """Do not wait for the disk at every commit: no test pulls the plug."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF").close()


class Cost(NamedTuple):
    """What requests cost: round trips to nodes, and SQL statements."""

    round_trips: int
    statements: int


NOTHING = Cost(0, 0)


def command_runner(app: Flask) -> FlaskCliRunner:
    """Runs commands, and keeps output and errors apart, with click 8.1 as well."""
    mixed = "mix_stderr" in inspect.signature(CliRunner).parameters
    return app.test_cli_runner(**({"mix_stderr": False} if mixed else {}))


def make_app(
    nodes: Sequence[Memcached], tmp_path: Path, *, name: str = "app", **config: Any
) -> Flask:
    """An application on these nodes and an SQLite file, not yet with sessions."""
    static = tmp_path / "static"
    static.mkdir(exist_ok=True)
    (static / "page.txt").write_text("static")
    app = Flask(
        name,
        root_path=str(tmp_path),
        instance_path=str(tmp_path / "instance"),
        static_folder=str(static),
    )
    app.config.update(
        SECRET_KEY="a secret of the tests" * 2,
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/{name}.db",
        RESILIENT_SESSION_NODES=[node.address for node in nodes],
        # A node that was started again is to be found soon.
        RESILIENT_SESSION_NODE_RETRY=0.02,
        RESILIENT_SESSION_NODE_RETRY_MAX=0.04,
        # Under load a healthy machine may be slower than the defaults like.
        RESILIENT_SESSION_NODE_TIMEOUT=1.0,
        RESILIENT_SESSION_SQL_TIMEOUT=2.0,
    )
    app.config.update(config)
    return app


class Site:
    """An application with sessions, a browser that visits it, and its counters.

    :param app: from :func:`make_app`.
    :param db: given to the extension; made here by default.
    :ivar nodes: the servers, where :class:`Sites` made it.
    """

    def __init__(
        self,
        app: Flask,
        db: SQLAlchemy | None = None,
        sessions: ResilientSession | None = None,
    ) -> None:
        self.app = app
        if db is None:
            db = SQLAlchemy()
            db.init_app(app)
        self.db = db
        self.sessions = sessions or ResilientSession()
        self.sessions.init_app(app, db)
        self.nodes: list[Memcached] = []
        self._action: Action = str
        app.add_url_rule("/", "index", lambda: dict(session))
        app.add_url_rule("/plain", "plain", lambda: "plain")
        app.add_url_rule("/visit", "visit", self._view, methods=["GET", "POST"])
        self.browser = app.test_client()
        self._statements = 0
        self._listening = False

    @property
    def state(self) -> Any:
        """What the extension keeps for the application."""
        return self.app.extensions["resilient_session"]

    # --- visiting ----------------------------------------------------------------

    def visit(
        self, action: Action, *, browser: FlaskClient | None = None, **kwargs: Any
    ) -> TestResponse:
        """One request whose view does ``action``."""
        self._action = action
        return (browser or self.browser).get("/visit", **kwargs)

    def set(self, browser: FlaskClient | None = None, **values: Any) -> TestResponse:
        """One request that puts these values into the session."""
        response = self.visit(lambda: session.update(values), browser=browser)
        assert response.status_code == 200, response.text
        return response

    def data(self, browser: FlaskClient | None = None) -> Any:
        """What a visitor's session holds, as a page shows it."""
        response = (browser or self.browser).get("/")
        assert response.status_code == 200, response.text
        return response.json

    def _view(self) -> Any:
        answer = self._action()
        return "done" if answer is None else answer

    # --- what is stored ----------------------------------------------------------

    def cookie(self, browser: FlaskClient | None = None) -> str | None:
        """The browser's session cookie."""
        name = self.app.config["SESSION_COOKIE_NAME"]
        found = (browser or self.browser).get_cookie(name)
        return None if found is None else found.value

    def sid(self, browser: FlaskClient | None = None) -> str:
        """The id in the browser's session cookie."""
        value = self.cookie(browser)
        assert value is not None
        return value.split(".")[0]

    @property
    def signer(self) -> Any:
        """What signs the application's cookies."""
        return self.state.keys.of(self.app).signer

    def browser_with(self, cookie: str | None) -> FlaskClient:
        """A new browser that has this cookie."""
        browser = self.app.test_client()
        if cookie is not None:
            browser.set_cookie(self.app.config["SESSION_COOKIE_NAME"], cookie)
        return browser

    def rows(self) -> dict[str, Any]:
        """Every row by its session key, read without the extension's statements."""
        table = self.state.sql.table
        with self.state.sql.engine.connect() as connection:
            found = connection.execute(sa.select(table)).all()
        return {row.session_key: row for row in found}

    # --- what it costs -----------------------------------------------------------

    def cost(self, call: Callable[[], object]) -> Cost:
        """What a call costs; the table is there and the nodes are connected."""
        if not self._listening:
            engine = self.state.sql.engine
            sa.event.listen(engine, "before_cursor_execute", self._count)
            self._listening = True
        stats = self.state.observer.stats
        round_trips, statements = stats["round_trips"], self._statements
        call()
        return Cost(stats["round_trips"] - round_trips, self._statements - statements)

    def _count(self, connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not statement.lstrip().upper().startswith(_FREE):
            self._statements += 1

    # --- faults ------------------------------------------------------------------

    def break_sql(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make every SQL statement of the extension fail until undone."""

        def fail(*_: Any, **__: Any) -> Any:
            raise sa.exc.OperationalError("", {}, OSError("the database is away"))

        monkeypatch.setattr(self.state.sql._calls, "_ready_engine", fail)

    def close(self) -> None:
        """Close every connection of the application."""
        self.state.close()
        _dispose_engines(self.app)


def _dispose_engines(app: Flask) -> None:
    """Close the connections of an application's Flask-SQLAlchemy, if it has one."""
    if "sqlalchemy" in app.extensions:
        with app.app_context():
            for engine in app.extensions["sqlalchemy"].engines.values():
                engine.dispose()


class Sites(ExitStack):
    """Makes sites for one test and closes them after it."""

    def __init__(self, nodes: Sequence[Memcached], tmp_path: Path) -> None:
        super().__init__()
        self.nodes = nodes
        self.tmp_path = tmp_path

    def __call__(
        self,
        *,
        db: SQLAlchemy | None = None,
        sessions: ResilientSession | None = None,
        **config: Any,
    ) -> Site:
        """Another site with these settings."""
        app = make_app(self.nodes, self.tmp_path, **config)
        site = Site(app, db, sessions)
        site.nodes = list(self.nodes)
        self.callback(site.close)
        return site


class BareApps(ExitStack):
    """Makes applications that a test gives their sessions, and closes them after it."""

    def __init__(self, nodes: Sequence[Memcached], tmp_path: Path) -> None:
        super().__init__()
        self._nodes = nodes
        self._tmp_path = tmp_path

    def __call__(self, **config: Any) -> Flask:
        """Another application, with two pages."""
        app = make_app(self._nodes, self._tmp_path, **config)
        app.add_url_rule("/", "index", lambda: dict(session))
        app.add_url_rule("/set/<key>", "put", _put)
        self.callback(_close, app)
        return app


def _close(app: Flask) -> None:
    if "resilient_session" in app.extensions:
        app.extensions["resilient_session"].close()
    _dispose_engines(app)


def _put(key: str) -> str:
    session[key] = 1
    return "set"


class TimeMachine:
    """Moves the clock of every application in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(SystemClock, "now_ms", lambda clock: self.now_ms())

    def now_ms(self) -> int:
        """Unix milliseconds on the moved clock."""
        return time.time_ns() // 1_000_000 + round(self.seconds * 1000)

    def forward(self, seconds: float) -> None:
        """Let this much time pass."""
        self.seconds += seconds


def key_of(sid: str) -> str:
    """The session key of an id."""
    return hashlib.sha256(sid.encode()).hexdigest()


def item_of(sid: str) -> str:
    """The memcached key of an id."""
    return "session:" + key_of(sid)


def add_rows(site: Site, count: int) -> list[str]:
    """Rows of that many sessions, last used and synced now; their keys."""
    keys = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(count)]
    keyring, now_ms = site.state.keys.of(site.app).keyring, site.state.clock.now_ms()
    homes = tuple(node.address for node in site.nodes)
    record = Record(
        {"n": Entry(now_ms, 0, encode_value("n", 1))},
        created_ms=now_ms,
        last_use_ms=now_ms,
        synced_ms=now_ms,
        row_version=1,
        homes=homes,
    )
    timing = site.state.settings.timing(site.app.permanent_session_lifetime)
    values = {
        "version": 1,
        "user_id": None,
        "homes": ",".join(homes),
        "created_at": now_ms,
        "synced_at": now_ms,
        "expires_at": row_expires_ms(record, timing),
    }
    rows = [
        values | {"session_key": key, "record": keyring.seal(key, record)}
        for key in keys
    ]
    with site.state.sql.engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.execute(sa.insert(site.state.sql.table), rows)
        connection.exec_driver_sql("COMMIT")
    return keys


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
