"""A small shop that shows what becomes of its sessions while nodes come and go.

Everything an application needs to do for its sessions is in :func:`create_app`; the
rest of the package is the shop itself, the panel beside it that looks inside the
session of the page at hand, and the demo that runs it all on real nodes.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from flask import Flask, Response, render_template
from werkzeug.exceptions import HTTPException

from . import shop
from .extensions import sessions
from .history import History
from .models import db, fill_shelves


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """The shop; without nodes configured its sessions live in SQL alone.

    Settings come from the environment as well: ``FLASK_RESILIENT_SESSION_NODES`` and
    so on.

    :param config: settings that go before all others.
    """
    app = Flask(__name__)
    app.config.update(
        # Good for one process; a real site has one key for all of them.
        SECRET_KEY=secrets.token_hex(),
        SESSION_COOKIE_SAMESITE="Lax",
        SQLALCHEMY_DATABASE_URI="sqlite:///shop.sqlite",
        RESILIENT_SESSION_USER_KEY=shop.USER,
    )
    app.config.from_prefixed_env()
    app.config.update(config or {})

    db.init_app(app)
    sessions.init_app(app, db)
    History().listen_to(app)
    app.register_blueprint(shop.bp)
    app.register_error_handler(HTTPException, error_page)
    with app.app_context():
        db.create_all()
        fill_shelves()
    return app


def error_page(error: HTTPException) -> Response:
    """Every error as a page of the shop, under its own status and headers.

    It does not touch the session: where nobody can say whether a session exists
    (503), this page still works.
    """
    response = Response(
        render_template("error.html", error=error, again=error.code == 503),
        status=error.code,
        mimetype="text/html",
    )
    for name, value in error.get_headers():
        if name != "Content-Type":
            response.headers[name] = value
    return response
