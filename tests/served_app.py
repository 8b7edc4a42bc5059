"""An application for real WSGI servers, configured by its environment.

``FLASK_*`` variables are its settings, as everywhere in Flask. ``SERVED_PRELOAD``
makes it use a session of its own while it is made, so that connections to nodes and
SQL are open when a server forks its workers.

Its pages append to lists in the session, since a list shows what was lost and what is
somebody else's.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from flask import Flask, jsonify, session
from flask_sqlalchemy import SQLAlchemy

from flask_resilient_session import ResilientSession


def create_app() -> Flask:
    """The application; a WSGI server's ``served_app:create_app()``."""
    app = Flask("served")
    app.config.from_prefixed_env()
    db = SQLAlchemy(app)
    sessions = ResilientSession(app, db)
    state = app.extensions["resilient_session"]
    cluster = state.store.homes.cluster
    opened: dict[str, Any] = {"process": None, "nodes": 0, "sql": 0}

    @app.post("/login/<user>")
    def login(user: str) -> Any:
        session["_user_id"] = user
        return jsonify(dict(session))

    @app.post("/logout")
    def logout() -> Any:
        data = dict(session)
        session.clear()
        return jsonify(data)

    @app.post("/set/<key>/<value>")
    def put(key: str, value: str) -> Any:
        session[key] = value
        return jsonify(dict(session))

    @app.post("/append/<key>/<value>")
    def append(key: str, value: str) -> Any:
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
        """What this process knows; with a cookie it uses that session's nodes."""
        session.get("_user_id")
        return jsonify(
            process=os.getpid(),
            preloaded=opened,
            suspects=sorted(cluster.suspects()),
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
