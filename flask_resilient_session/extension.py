"""The extension: a Flask app and every constructor, a table of contents.

What belongs to one application is in ``app.extensions["resilient_session"]``; the
extension object itself knows no application and serves as many as are initialised.
"""

from __future__ import annotations

import os
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

from flask import Flask, Response, appcontext_pushed, current_app
from flask.sessions import SessionMixin
from flask_sqlalchemy import SQLAlchemy

from .common.breaker import Breaker
from .common.clock import SystemClock
from .common.errors import ConfigurationError, SessionUnavailable, SetupError
from .common.events import Observer, Stats, logger, short
from .core.ring import Ring, RingNode
from .maintenance.cli import reap_command, revoke_command
from .maintenance.reaper import STATEMENT_SECONDS, Reaper, ReapOptions, ReapReport
from .maintenance.revocation import STEP_SECONDS, Revoker, SessionInfo
from .memcached.cluster import Cluster
from .memcached.node import Node
from .settings import Settings, load_settings
from .sql.calls import SqlCalls
from .sql.database import app_engine, default_engine, table_for
from .sql.gate import Gate
from .sql.statements import SqlTable
from .store.replicas import Homes
from .store.row import RowRepository
from .store.store import Store
from .web.inspect import SessionInspection, inspect_session
from .web.interface import ResilientSessionInterface
from .web.keys import Keys, session_key_of
from .web.session import Session

_NAME: Final = "resilient_session"

#: The commands, and the name that Flask-Session users have in their cron.
_REAP_COMMANDS: Final = ("reap-sessions", "session_cleanup")

#: Rows that one request reaps, where requests do it.
_REAP_BATCH: Final = 20


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


class ResilientSession:
    """Flask sessions on two memcached nodes and SQL.

    :param app: initialised at once when given.
    :param db: the Flask-SQLAlchemy extension whose database keeps the durable copy;
        the application's registered one when omitted, and an engine of our own where
        there is none.
    """

    def __init__(self, app: Flask | None = None, db: SQLAlchemy | None = None) -> None:
        if app is not None:
            self.init_app(app, db)

    def init_app(self, app: Flask, db: SQLAlchemy | None = None) -> None:
        """Give an application its sessions.

        The order of this and ``db.init_app`` does not matter.

        :raises ConfigurationError: a ``RESILIENT_SESSION_*`` setting is wrong.
        :raises SetupError: the application has been initialised already.
        """
        if _NAME in app.extensions:
            raise SetupError(
                "This application has a ResilientSession already. Call init_app once:"
                " either ResilientSession(app, db), or ResilientSession() and"
                " init_app(app, db)."
            )
        settings = load_settings(app.config)
        settings.timing(app.permanent_session_lifetime)
        if settings.encrypt and find_spec("cryptography") is None:
            raise ConfigurationError(
                "RESILIENT_SESSION_ENCRYPT",
                True,
                "False, or install Flask-Resilient-Session[encryption]",
            )
        binds = app.config.get("SQLALCHEMY_BINDS")
        if settings.bind_key and binds and settings.bind_key not in binds:
            raise ConfigurationError(
                "RESILIENT_SESSION_BIND_KEY",
                settings.bind_key,
                f"one of SQLALCHEMY_BINDS: {', '.join(filter(None, binds))}",
            )
        state = _new_state(app, settings, db)
        app.extensions[_NAME] = state
        _stores.add(state.store)
        app.session_interface = state.interface
        _register_table(app, state)
        for name in _REAP_COMMANDS:
            app.cli.add_command(reap_command(name, lambda a: _state(a).new_reaper(a)))
        app.cli.add_command(revoke_command(lambda a: _state(a).new_revoker(a)))
        if settings.reap_probability:
            app.after_request(_reap_sometimes(state))
        if not settings.nodes:
            logger.warning(
                "No memcached nodes are configured (RESILIENT_SESSION_NODES):"
                " sessions live in SQL alone."
            )
        elif len(settings.nodes) == 1:
            logger.warning(
                "One memcached node alone (RESILIENT_SESSION_NODES) proves nothing: SQL"
                " is asked and told at each request. Configure two or more."
            )

    @property
    def stats(self) -> Stats:
        """The current application's counters in this process."""
        return _current().observer.stats

    def revoke_user(self, user_id: object, *, keep: Session | None = None) -> int:
        """End all sessions of a user of the current application, as by logout.

        :param user_id: what their sessions hold under ``RESILIENT_SESSION_USER_KEY``.
        :param keep: one session that goes on, as after a change of the password.
        :returns: how many were ended. Where a home could not be told, the end is
            effective at their next sync.
        :raises SessionUnavailable: SQL did not answer; some may have been ended.
        :raises ValueError: the user is None, as an anonymous one's id is.
        """
        kept: set[str] = set()
        if keep is not None:
            # Under its id, and under the one that it had until regenerate().
            kept = {session_key_of(keep.sid), keep.visit.session_key()}
        return self._revoke(user_id, lambda session_key: session_key not in kept)

    def revoke_session(self, user_id: object, session: str) -> bool:
        """End one session of a user of the current application.

        :param user_id: as in :meth:`revoke_user`; another user's session stays.
        :param session: :attr:`SessionInfo.session`, from :meth:`sessions_of`.
        :returns: whether there was such a session.
        :raises SessionUnavailable: SQL did not answer.
        :raises ValueError: the user is None.
        """
        return self._revoke(user_id, lambda key: short(key) == session) > 0

    def sessions_of(self, user_id: object) -> list[SessionInfo]:
        """The live sessions of a user of the current application.

        :param user_id: what their sessions hold under ``RESILIENT_SESSION_USER_KEY``.
        :raises SessionUnavailable: SQL did not answer.
        :raises ValueError: the user is None.
        """
        return _current_revoker().sessions_of(_somebody(user_id))

    def inspect(self, session: SessionMixin) -> SessionInspection:
        """Where a session lives, and what its nodes and its row hold right now.

        For demos, tests and the curious: it asks every node, in one round trip, and
        SQL, within the time of the request, and changes nothing. It does not raise
        where they are silent, or where the session is unavailable.

        :param session: ``flask.session``, of the current application; it is loaded
            if that was not done yet.
        :raises TypeError: it is no session of this extension.
        """
        if not isinstance(session, Session):
            raise TypeError(
                f"{session.__class__.__name__} was not opened by a ResilientSession:"
                " pass flask.session."
            )
        return inspect_session(session, _current().store)

    def _revoke(self, user_id: object, chosen: Callable[[str], bool]) -> int:
        report = _current_revoker().revoke(_somebody(user_id), chosen)
        if report.failed is not None:
            logger.error("Sessions were not all ended: %s", report.failed)
            raise SessionUnavailable(
                f"Only {report.ended} sessions were ended, since SQL does not answer."
            )
        return report.ended

    def reap(self, **options: Any) -> ReapReport:
        """One pass of the reaper over the current application's table.

        :param options: the fields of :class:`~flask_resilient_session.ReapOptions`.
        """
        app = _app()
        return _state(app).new_reaper(app).run(ReapOptions(**options))


#: The stores of this process, which a forked child has to renew.
_stores: Final[weakref.WeakSet[Store]] = weakref.WeakSet()


def _renew_in_child() -> None:
    for store in list(_stores):
        store.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_in_child)


def _new_state(app: Flask, settings: Settings, db: SQLAlchemy | None) -> AppState:
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
        table_for(db, settings),
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
    return AppState(settings, db, observer, clock, sql, store, keys, interface)


def _new_engine(app: Flask, settings: Settings) -> Any:
    db = _state(app).db or app.extensions.get("sqlalchemy")
    if db is None and settings.bind_key:
        raise SetupError(
            f"RESILIENT_SESSION_BIND_KEY = {settings.bind_key!r} names a bind of"
            " Flask-SQLAlchemy, and this application has no Flask-SQLAlchemy."
        )
    if db is None:
        return default_engine(app, settings)
    return app_engine(app, db, settings)


def _register_table(app: Flask, state: AppState) -> None:
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
    state.sql.use(table_for(db, state.settings))
    return True


def _reap_sometimes(state: AppState) -> Callable[[Response], Response]:
    """Now and then, reap a small batch after a response was sent."""

    def after_request(response: Response) -> Response:
        if random.random() < state.settings.reap_probability:
            app = _app()
            response.call_on_close(lambda: _reap_after_response(app, state))
        return response

    return after_request


def _reap_after_response(app: Flask, state: AppState) -> None:
    if not app.secret_key:
        return
    options = ReapOptions(batch_size=_REAP_BATCH, limit=_REAP_BATCH)
    seconds = state.settings.patience
    report = state.new_reaper(app, seconds).run(options)
    if report.failed is not None or report.aborted is not None:
        reason = report.failed or report.abort_reason
        logger.warning("Reaping after a response did nothing: %s", reason)


def _state(app: Flask) -> AppState:
    state = app.extensions.get(_NAME)
    if not isinstance(state, AppState):
        raise SetupError(
            "This application has no ResilientSession: call init_app(app, db) first."
        )
    return state


def _app() -> Flask:
    """The current application itself, which outlives its proxy."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    return app


def _current() -> AppState:
    return _state(_app())


def _somebody(user_id: object) -> object:
    """A user, and not the None that stands for everybody elsewhere."""
    if user_id is None:
        raise ValueError("user_id is None: an anonymous user has no sessions to end.")
    return user_id


def _current_revoker() -> Revoker:
    app = _app()
    state = _state(app)
    # For a request: commands have more patience.
    return state.new_revoker(app, state.settings.patience)
