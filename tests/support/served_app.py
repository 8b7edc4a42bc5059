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
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from flask import Flask, abort, g, has_app_context, jsonify, session
from flask_sqlalchemy import SQLAlchemy

from flask_resilient_session import ResilientSession
from flask_resilient_session.core.answers import Unreachable
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
    "RESILIENT_SESSION_SQL_TIMEOUT": "5",
}

#: Seconds that the application spent on an answer, without any wait for its turn.
SECONDS_HEADER: Final = "X-Seconds"

#: Nodes that did not answer a request, or were not asked because they had not before.
SILENT_HEADER: Final = "X-Silent-Nodes"

GUNICORN_HOOKS: Final = """
import os

def post_worker_init(worker):
    os.write(int(os.environ["SERVED_READY"]), b".")
"""


def members_only() -> None:
    """Who is not logged in gets a 401 and stores nothing."""
    if session.get("_user_id") is None:
        abort(401)


def note_silence(cluster: Any) -> None:
    """Let a request remember the nodes that were silent when it needed them."""
    exchange = cluster._exchange

    def noting(requests: Any, patience: Any) -> Any:
        results = exchange(requests, patience)
        if has_app_context():
            silent = g.setdefault("silent_nodes", set())
            for (name, _), (parsed, _) in zip(requests, results, strict=True):
                if isinstance(parsed, Unreachable):
                    silent.add(name)
        return results

    cluster._exchange = noting


def telling(serve: Any) -> Any:
    """A WSGI application that says what it met and how long it took."""

    def application(environ: Any, start_response: Any) -> Any:
        began = time.monotonic()

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            headers.append((SECONDS_HEADER, str(time.monotonic() - began)))
            silent = g.get("silent_nodes", ()) if has_app_context() else ()
            headers.append((SILENT_HEADER, " ".join(sorted(silent))))
            return start_response(status, headers, *error)

        return serve(environ, start)

    return application


def create_app() -> Flask:
    """The application; a WSGI server's ``served_app:create_app()``."""
    app = Flask("served")
    app.config.from_prefixed_env()
    db = SQLAlchemy(app)
    sessions = ResilientSession(app, db)
    state = app.extensions["resilient_session"]
    cluster = state.store.homes.cluster
    sql = state.store.rows._breaker
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
            sessions.inspect(session)
        return jsonify(
            process=os.getpid(),
            preloaded=opened,
            suspects=[*cluster.suspects(), *(["SQL"] if sql.suspect else [])],
            stats=dict(sessions.stats),
        )

    @app.post("/disconnect")
    def disconnect() -> Any:
        """Close the connections to SQL, so that its next use opens new ones."""
        state.sql.dispose()
        return jsonify(process=os.getpid())

    note_silence(cluster)
    app.wsgi_app = telling(app.wsgi_app)  # type: ignore[method-assign]
    if os.environ.get("SERVED_PRELOAD"):
        client = app.test_client()
        client.post("/login/preload", base_url="https://localhost")
        client.get("/", base_url="https://localhost")
        opened["process"] = os.getpid()
        opened["nodes"] = sum(len(node._idle) for node in cluster._nodes.values())
        opened["sql"] = state.sql.engine.pool.checkedin()
    return app


def make_sqlite(file: Path) -> str:
    """Make an SQLite file in WAL mode, and return its URI."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode = WAL").close()
    return f"sqlite:///{file}"


class Gunicorn:
    """A gunicorn process tree that serves :mod:`served_app` on one port.

    :param nodes: RESILIENT_SESSION_NODES, as text.
    :param database: an SQLite file, made here, in WAL mode; or the URI of a database
        that is there.
    :param arguments: gunicorn's, such as ``--threads``.
    :param folder: for its log; by default that of the SQLite file.
    :param settings: more of the application's settings.
    """

    def __init__(
        self,
        nodes: str,
        database: Path | str,
        *arguments: str,
        folder: Path | None = None,
        workers: int = 1,
        preload: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(database, Path):
            folder = folder or database.parent
            database = make_sqlite(database)
        assert folder is not None, "where is the log to be written?"
        self.port = free_port()
        self._workers = workers
        hooks = folder / "gunicorn_hooks.py"
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
            "SQLALCHEMY_DATABASE_URI": database,
            "RESILIENT_SESSION_NODES": nodes,
        }
        self.environment = {f"FLASK_{key}": value for key, value in every.items()}
        self._preload = {"SERVED_PRELOAD": "1"} if preload else {}
        self._log = folder / f"gunicorn{self.port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Gunicorn:
        self.launch()
        self.await_ready()
        return self

    def launch(self) -> None:
        """Start it, also once more after it has ended."""
        self._ready, to_tell = os.pipe()
        environment = {**os.environ, **self.environment, **self._preload}
        environment["SERVED_READY"] = str(to_tell)
        with self._log.open("ab") as log:
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
                response = connection.getresponse()
                if response.status != 200:
                    return False
                page = json.loads(response.read())
            change = workers.discard if page["suspects"] else workers.add
            change(page["process"])
            return len(workers) == self._workers

        wait_until(settled, PATIENCE, "every worker to use every node and SQL")

    def disconnect(self) -> None:
        """Let a worker close its connections to SQL."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE)
        with closing(connection):
            connection.request("POST", "/disconnect")
            assert connection.getresponse().status == 200

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
