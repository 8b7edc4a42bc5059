"""An application for real WSGI servers, configured by its environment, and gunicorn.

``FLASK_*`` variables are its settings, as everywhere in Flask. ``SERVED_PRELOAD``
makes it use a session of its own while it is made, so that connections to nodes and
SQL are open when a server forks its workers.

Its pages append to lists in the session, since a list shows what was lost and what is
somebody else's.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from flask import Flask, abort, jsonify, session
from flask_sqlalchemy import SQLAlchemy

from flask_resilient_session import ResilientSession
from servers import free_port, wait_until

#: Seconds for anything that is waited for.
PATIENCE: Final = 30.0

#: Patient, so that a slow machine is not taken for a fault; quick to try again.
SETTINGS: Final = {
    "SECRET_KEY": "a secret of the served app " * 2,
    "SESSION_COOKIE_SECURE": "true",
    "SESSION_COOKIE_SAMESITE": "Lax",
    "RESILIENT_SESSION_NODE_TIMEOUT": "2",
    "RESILIENT_SESSION_NODE_RETRY": "0.05",
    "RESILIENT_SESSION_NODE_RETRY_MAX": "0.1",
    "RESILIENT_SESSION_REQUEST_BUDGET": "16",
    "RESILIENT_SESSION_SQL_TIMEOUT": "5",
}

GUNICORN_HOOKS: Final = """
import os

def post_worker_init(worker):
    os.write(int(os.environ["SERVED_READY"]), b".")
"""


def members_only() -> None:
    """Who is not logged in gets a 401 and stores nothing."""
    if session.get("_user_id") is None:
        abort(401)


def create_app() -> Flask:
    """The application; a WSGI server's ``served_app:create_app()``."""
    app = Flask("served")
    app.config.from_prefixed_env()
    db = SQLAlchemy(app)
    sessions = ResilientSession(app, db)
    state = app.extensions["resilient_session"]
    cluster = state.store.homes.cluster
    durable = state.store.durable
    sql = durable._breaker
    opened: dict[str, Any] = {"process": None, "nodes": 0, "sql": 0}

    @app.post("/login/<user>")
    def login(user: str) -> Any:
        session["_user_id"] = user
        return jsonify(dict(session))

    @app.post("/regenerate")
    def regenerate() -> Any:
        members_only()
        session.regenerate()
        return jsonify(dict(session))

    @app.post("/logout")
    def logout() -> Any:
        data = dict(session)
        session.clear()
        return jsonify(data)

    @app.post("/set/<key>/<value>")
    def put(key: str, value: str) -> Any:
        members_only()
        session[key] = value
        return jsonify(dict(session))

    @app.post("/append/<key>/<value>")
    def append(key: str, value: str) -> Any:
        members_only()
        session[key] = [*session.get(key, ()), value]
        return jsonify(dict(session))

    @app.get("/")
    def index() -> Any:
        return jsonify(dict(session))

    @app.post("/wait/<int:port>/<key>")
    def wait(port: int, key: str) -> Any:
        """Change the session and answer when a listener on this port says so."""
        session[key] = "waited"
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            connection.recv(1)
        return jsonify(dict(session))

    @app.get("/about")
    def about() -> Any:
        """What this process knows; with a cookie it asks every node and SQL first."""
        if session.get("_user_id") is not None:
            app.session_interface.copies(session)  # type: ignore[attr-defined]
            durable.read(session.visit.access_for_saving())  # type: ignore[attr-defined]
        return jsonify(
            process=os.getpid(),
            preloaded=opened,
            suspects=[*cluster.suspects(), *(["SQL"] if sql.suspect else [])],
            stats=dict(sessions.stats),
        )

    if os.environ.get("SERVED_PRELOAD"):
        client = app.test_client()
        client.post("/login/preload", base_url="https://localhost")
        client.get("/", base_url="https://localhost")
        opened["process"] = os.getpid()
        opened["nodes"] = sum(len(node._idle) for node in cluster._nodes.values())
        opened["sql"] = state.sql.engine.pool.checkedin()
    return app


class Gunicorn:
    """A gunicorn process tree that serves :mod:`served_app` on one port.

    :param nodes: RESILIENT_SESSION_NODES, as text.
    :param database: an SQLite file; made here, in WAL mode.
    :param arguments: gunicorn's, such as ``--threads``.
    :param settings: more of the application's settings.
    """

    def __init__(
        self,
        nodes: str,
        database: Path,
        *arguments: str,
        workers: int = 1,
        preload: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA journal_mode = WAL").close()
        self.port = free_port()
        self._workers = workers
        hooks = database.with_name("gunicorn_hooks.py")
        hooks.write_text(GUNICORN_HOOKS)
        self._command = [
            *(sys.executable, "-m", "gunicorn", "--config", str(hooks)),
            *("--bind", f"127.0.0.1:{self.port}", "--workers", str(workers)),
            *("--chdir", str(Path(__file__).parent), "--log-level", "warning"),
            *("--keep-alive", "60", "--graceful-timeout", str(int(PATIENCE))),
            *(("--preload",) if preload else ()),
            *arguments,
            "served_app:create_app()",
        ]
        setpriv = shutil.which("setpriv")
        if setpriv:
            self._command = [setpriv, "--pdeathsig", "KILL", *self._command]
        every = {
            **SETTINGS,
            **(settings or {}),
            "SQLALCHEMY_DATABASE_URI": f"sqlite:///{database}",
            "RESILIENT_SESSION_NODES": nodes,
        }
        self.environment = {f"FLASK_{key}": value for key, value in every.items()}
        self._preload = {"SERVED_PRELOAD": "1"} if preload else {}
        self._log = database.with_name(f"gunicorn{self.port}.log")
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Gunicorn:
        self.launch()
        self.await_ready()
        return self

    def launch(self) -> None:
        """Start it."""
        self._ready, to_tell = os.pipe()
        environment = {**os.environ, **self.environment, **self._preload}
        environment["SERVED_READY"] = str(to_tell)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                env=environment,
                pass_fds=(to_tell,),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(to_tell)

    def await_ready(self) -> None:
        """Return when all its workers serve."""
        try:
            for _ in range(self._workers):
                # Every worker writes a byte; the end of the pipe is the server's end.
                told = select.select([self._ready], [], [], PATIENCE)[0]
                if not told or not os.read(self._ready, 1):
                    self.kill()
                    raise AssertionError(f"gunicorn did not start:\n{self.log}")
        finally:
            os.close(self._ready)

    def __exit__(self, *_: object) -> None:
        self.kill()

    def settle(self, cookie: str | None) -> None:
        """Return when every worker uses every node and SQL again.

        :param cookie: of a session, so that asking uses its nodes.
        """
        workers: set[int] = set()
        headers = {} if cookie is None else {"Cookie": f"session={cookie}"}

        def settled() -> bool:
            # A new connection each time, so that each worker has its turn.
            connection = http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE)
            with closing(connection):
                connection.request("GET", "/about", headers=headers)
                page = json.loads(connection.getresponse().read())
            change = workers.discard if page["suspects"] else workers.add
            change(page["process"])
            return len(workers) == self._workers

        wait_until(settled, PATIENCE, "every worker to use every node and SQL")

    @property
    def pid(self) -> int:
        """Process id of the master."""
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """All that it said."""
        return self._log.read_text()

    def terminate(self) -> None:
        """Ask it to end when the requests that it has are answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        assert self.process is not None
        return self.process.wait(PATIENCE)

    def deaf(self) -> bool:
        """Whether it takes no more connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return True
        return False

    def kill(self) -> None:
        """End it and its workers, whatever their state; harmless if it has ended."""
        if self.process is not None and self.process.poll() is None:
            # Asked to quit, a threaded worker may wait for a lock that it holds.
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(PATIENCE)
