"""Which database holds the durable copy, and how it is reached.

The bridge between Flask-SQLAlchemy and the table: metadata, bind keys, and an engine
whose connections are never the application's.
"""

from __future__ import annotations

import os
from typing import Any, Final

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from ..common.errors import SetupError
from .connections import own_engine, plain_engine
from .table import define_table

#: The file in the instance folder that holds sessions where no database is named.
_DEFAULT_FILE: Final = "resilient_sessions.sqlite"


def table_for(
    db: SQLAlchemy | None, bind_key: str | None, name: str, schema: str | None
) -> sa.Table:
    """The table, in the metadata of the application's bind where it has one."""
    metadata = sa.MetaData() if db is None else db._make_metadata(bind_key)
    return define_table(metadata, name, schema)


def app_engine(
    app: Flask,
    db: SQLAlchemy,
    bind_key: str | None,
    *,
    sql_timeout: float,
    connections: int,
) -> sa.Engine:
    """Connections of our own to the application's database.

    :param sql_timeout: longest wait for a lock or a connection, in seconds.
    :param connections: how many at most.
    :raises SetupError: Flask-SQLAlchemy does not know the application or the bind.
    """
    with app.app_context():
        try:
            engines = db.engines
        except RuntimeError as error:
            raise SetupError(
                "Sessions need their database: call db.init_app(app) on the"
                " Flask-SQLAlchemy object that ResilientSession was given."
            ) from error
        if bind_key not in engines:
            raise SetupError(
                f"RESILIENT_SESSION_BIND_KEY = {bind_key!r} is not among the"
                f" binds of SQLALCHEMY_BINDS: {sorted(filter(None, engines))}."
            )
        return own_engine(engines[bind_key], sql_timeout, connections)


def default_engine(app: Flask, *, sql_timeout: float, connections: int) -> sa.Engine:
    """Connections to ``SQLALCHEMY_DATABASE_URI``, or to a file of our own.

    For applications without Flask-SQLAlchemy; nothing is registered with them.

    :param sql_timeout: longest wait for a lock or a connection, in seconds.
    :param connections: how many at most.
    """
    uri = app.config.get("SQLALCHEMY_DATABASE_URI")
    terms = sql_timeout, connections
    if uri:
        url = sa.make_url(uri)
        if url.get_backend_name() == "sqlite" and url.database not in (None, ""):
            url = url.set(database=_in_instance_folder(app, str(url.database)))
        return plain_engine(url, *terms)
    path = _in_instance_folder(app, _DEFAULT_FILE)
    engine = plain_engine(sa.URL.create("sqlite", database=path), *terms)
    # The file is ours alone: readers need not wait for writers. A commit need not wait
    # for the disk: it outlives the process, and after a power cut the file is whole,
    # though the last moments before may be missing.
    sa.event.listen(engine, "connect", _write_ahead)
    return engine


def _in_instance_folder(app: Flask, path: str) -> str:
    if path == ":memory:" or path.startswith("file:"):
        return path
    os.makedirs(app.instance_path, exist_ok=True)
    return os.path.join(app.instance_path, path)


def _write_ahead(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode = WAL").close()
    connection.execute("PRAGMA synchronous = NORMAL").close()
