"""Every constructor: what one application's sessions are made of.

Nothing connects before it is used. What belongs to one application is in
``app.extensions["resilient_session"]``.
"""

from __future__ import annotations

import os
import random
import weakref
from dataclasses import dataclass
from typing import Any, Final

from flask import Flask, appcontext_pushed
from flask_sqlalchemy import SQLAlchemy

from .common.breaker import Breaker
from .common.clock import SystemClock
from .common.errors import SetupError
from .common.events import Observer
from .core.ring import Ring, RingNode
from .maintenance.reaper import STATEMENT_SECONDS, Reaper
from .maintenance.revocation import STEP_SECONDS, Revoker
from .memcached.cluster import Cluster
from .memcached.node import Node
from .settings import Settings
from .sql.calls import SqlCalls
from .sql.database import app_engine, default_engine, table_for
from .sql.gate import Gate
from .sql.statements import SqlTable
from .store.replicas import Homes
from .store.row import RowRepository
from .store.store import Store
from .web.interface import ResilientSessionInterface
from .web.keys import Keys

#: Where an application keeps its state.
NAME: Final = "resilient_session"


@dataclass(slots=True)
class AppState:
    """What the extension keeps for one application."""

    settings: Settings
    db: SQLAlchemy | None
    observer: Observer
    clock: SystemClock
    sql: SqlTable
    store: Store
    keys: Keys
    interface: ResilientSessionInterface

    def new_revoker(self, app: Flask, seconds: float = STEP_SECONDS) -> Revoker:
        """A revoker for the application's table, with its keys as they are now.

        :param seconds: for each of its steps.
        """
        return Revoker(
            self.sql,
            self.store,
            keyring=self.keys.of(app).keyring,
            timing=self.settings.timing(app.permanent_session_lifetime),
            clock=self.clock,
            step_seconds=seconds,
        )

    def close(self) -> None:
        """Close all idle connections to nodes and SQL; the next use opens new ones."""
        self.store.homes.cluster.close()
        self.sql.dispose()

    def new_reaper(self, app: Flask, seconds: float = STATEMENT_SECONDS) -> Reaper:
        """A reaper of the application's table, with its keys as they are now.

        :param seconds: for each of its statements.
        """
        return Reaper(
            self.sql,
            self.store,
            keyring=self.keys.of(app).keyring,
            timing=self.settings.timing(app.permanent_session_lifetime),
            clock=self.clock,
            observer=self.observer,
            statement_seconds=seconds,
        )


def state_of(app: Flask) -> AppState:
    """What the extension keeps for an application.

    :raises SetupError: it has not been initialised.
    """
    state = app.extensions.get(NAME)
    if not isinstance(state, AppState):
        raise SetupError(
            "This application has no ResilientSession: call init_app(app, db) first."
        )
    return state


#: The stores of this process, which a forked child has to renew.
_stores: Final[weakref.WeakSet[Store]] = weakref.WeakSet()


def _renew_in_child() -> None:
    for store in list(_stores):
        store.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_in_child)


def new_state(app: Flask, settings: Settings, db: SQLAlchemy | None) -> AppState:
    """Construct everything; nothing connects before it is used."""
    clock = SystemClock()
    # The system's randomness: after a fork a seeded one would repeat itself.
    chance = random.SystemRandom()
    observer = Observer(app)

    def new_breaker() -> Breaker:
        return Breaker(
            first_pause=settings.node_retry, longest_pause=settings.node_retry_max
        )

    ring = Ring(RingNode(n.name, n.weight, n.zone) for n in settings.nodes)
    cluster = Cluster(
        {n.name: Node(n.name, n.address, clock) for n in settings.nodes},
        new_breaker=new_breaker,
        node_timeout=settings.node_timeout,
        key_prefix=settings.key_prefix,
        max_bytes=settings.max_bytes,
        clock=clock,
        random=chance,
        observer=observer,
    )
    gate = Gate(settings.sql_concurrency, clock)
    calls = SqlCalls(
        _table_for(db, settings),
        lambda: _new_engine(app, settings),
        create_table=settings.create_table,
        sql_timeout=settings.sql_timeout,
        gate=gate,
        clock=clock,
    )
    sql = SqlTable(calls)
    rows = RowRepository(
        sql,
        breaker=new_breaker(),
        gate=gate,
        sql_timeout=settings.sql_timeout,
        user_key=settings.user_key,
        clock=clock,
        random=chance,
        observer=observer,
    )
    store = Store(
        homes=Homes(ring, cluster),
        rows=rows,
        max_bytes=settings.max_bytes,
        clock=clock,
        random=chance,
        observer=observer,
    )
    keys = Keys(settings)
    interface = ResilientSessionInterface(settings, store, keys, clock, observer)
    _stores.add(store)
    return AppState(settings, db, observer, clock, sql, store, keys, interface)


def _new_engine(app: Flask, settings: Settings) -> Any:
    db = state_of(app).db or app.extensions.get("sqlalchemy")
    if db is None and settings.bind_key:
        raise SetupError(
            f"RESILIENT_SESSION_BIND_KEY = {settings.bind_key!r} names a bind of"
            " Flask-SQLAlchemy, and this application has no Flask-SQLAlchemy."
        )
    timeout, connections = settings.sql_timeout, settings.sql_concurrency
    if db is None:
        return default_engine(app, sql_timeout=timeout, connections=connections)
    return app_engine(
        app, db, settings.bind_key, sql_timeout=timeout, connections=connections
    )


def _table_for(db: SQLAlchemy | None, settings: Settings) -> Any:
    return table_for(db, settings.bind_key, settings.table, settings.schema)


def register_table(app: Flask, state: AppState) -> None:
    """Make the table part of the application's metadata, now or when it is there.

    Without it Flask-Migrate would take the table for one to drop.
    """
    if state.db is not None:
        return
    if _adopt(app, state):
        return

    def adopt_late(sender: Flask, **_: object) -> None:
        # Before the first request or command runs, whichever pushes a context.
        appcontext_pushed.disconnect(adopt_late, app)
        _adopt(app, state)

    # Strong: nobody else holds this function.
    appcontext_pushed.connect(adopt_late, app, weak=False)


def _adopt(app: Flask, state: AppState) -> bool:
    db = app.extensions.get("sqlalchemy")
    if db is None:
        return False
    state.sql.use(_table_for(db, state.settings))
    return True
