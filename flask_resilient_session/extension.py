"""The public API: what an application does with its sessions as a whole.

The extension object knows no application, and serves as many as are initialised.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

from flask import Flask, Response, current_app
from flask.sessions import SessionMixin
from flask_sqlalchemy import SQLAlchemy

from .common.errors import ConfigurationError, SessionUnavailable, SetupError
from .common.events import Stats, logger, short
from .maintenance.cli import reap_command, revoke_command
from .maintenance.reaper import ReapOptions, ReapReport
from .maintenance.revocation import Revoker, SessionInfo
from .settings import load_settings
from .web.inspect import SessionInspection, inspect_session
from .web.keys import session_key_of
from .web.session import Session
from .wiring import NAME, AppState, new_state, register_table, state_of

#: The commands, and the name that Flask-Session users have in their cron.
_REAP_COMMANDS: Final = ("reap-sessions", "session_cleanup")

#: Rows that one request reaps, where requests do it.
_REAP_BATCH: Final = 20


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
        if NAME in app.extensions:
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
        state = new_state(app, settings, db)
        app.extensions[NAME] = state
        app.session_interface = state.interface
        register_table(app, state)
        for name in _REAP_COMMANDS:
            app.cli.add_command(reap_command(name, lambda a: state_of(a).new_reaper(a)))
        app.cli.add_command(revoke_command(lambda a: state_of(a).new_revoker(a)))
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
        return state_of(app).new_reaper(app).run(ReapOptions(**options))


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


def _app() -> Flask:
    """The current application itself, which outlives its proxy."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    return app


def _current() -> AppState:
    return state_of(_app())


def _somebody(user_id: object) -> object:
    """A user, and not the None that stands for everybody elsewhere."""
    if user_id is None:
        raise ValueError("user_id is None: an anonymous user has no sessions to end.")
    return user_id


def _current_revoker() -> Revoker:
    app = _app()
    state = state_of(app)
    # For a request: commands have more patience.
    return state.new_revoker(app, state.settings.patience)
