"""Flask's session interface: the cookie, the id, and Flask's staircase of saving.

Opening a session costs nothing; its first use loads it. Saving keeps the order of
Flask's own ``save_session``: vary, empty, whether to set the cookie, set it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, cast

from flask import Flask, Request, Response, after_this_request, has_request_context
from flask.sessions import SessionInterface, SessionMixin

from ..common.clock import Clock
from ..common.errors import SessionTooLarge, SessionUnavailable
from ..common.events import Observer, logger
from ..core.reading import Gone, Live
from ..core.values import encode_value
from ..settings import Settings
from ..store.steps import Changes
from ..store.store import Store
from .cookie import delete_cookie, doubtful_settings, set_cookie
from .keys import Keys
from .request import AppParts, RequestVisit
from .session import LazySession, Session, new_sid

#: A request that arrives with an id that was moved this short a time ago was sent
#: before its browser knew the new one. It must not overwrite the fresh cookie.
_MOVED_RECENTLY_MS: Final = 60_000

#: Headers that describe the body or the success that an error replaces.
_OF_THE_REPLACED: Final = frozenset(
    {"set-cookie", "location", "etag", "last-modified", "expires", "cache-control"}
    | {"accept-ranges", "age"}
)


class Cookie(enum.Enum):
    """What happens to the cookie at the end of a request."""

    LEAVE = "leave"
    SET = "set"
    DELETE = "delete"


class ResilientSessionInterface(SessionInterface):
    """Sessions on two nodes and SQL.

    :param settings: the extension's settings of one application.
    :param store: loads and keeps the sessions.
    :param keys: signs ids and seals records.
    """

    session_class = Session

    def __init__(
        self,
        settings: Settings,
        store: Store,
        keys: Keys,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self.settings = settings
        self.store = store
        self.keys = keys
        self.clock = clock
        self.observer = observer
        self._parts = AppParts(settings, store, keys, clock, observer, self)
        self._checked = False

    # --- Flask's side ------------------------------------------------------------

    def open_session(self, app: Flask, request: Request) -> Session | None:
        """A session that loads on first use; None without a secret key."""
        if not self._checked:
            self._checked = True
            self._warn(app)
        if not app.secret_key:
            return None
        visit = RequestVisit(self._parts, app, request)
        if has_request_context():
            after_this_request(visit.note_response)
        return LazySession(visit)

    def save_session(
        self, app: Flask, session: SessionMixin, response: Response
    ) -> None:
        """Keep what the request changed and send the cookie it needs.

        An error that has an answer of its own (413, 503) replaces the response, as
        the application would have answered it; a second call does nothing.
        """
        if not isinstance(session, Session):
            raise TypeError(
                f"{type(session).__name__} was not opened by this session interface."
            )
        if session.accessed:
            response.vary.add("Cookie")
        visit = cast(RequestVisit, session.visit)
        if visit.saved:
            return
        try:
            if session.modified and isinstance(session, LazySession):
                session.ensure_loaded()
            visit.saved = True
            if not session.loaded:
                return
            action, sid = self._keep(app, session, visit)
        except (SessionUnavailable, SessionTooLarge) as error:
            visit.saved = True
            _answer_instead(app, response, error)
            if session.accessed:
                response.vary.add("Cookie")
            return
        if action is Cookie.DELETE:
            delete_cookie(self, app, response)
        elif action is Cookie.SET:
            value = self.keys.of(app).signer.sign(sid)
            new_id = sid != visit.sid
            set_cookie(self, app, session, response, value, new_id=new_id)

    def regenerate(self, session: Session) -> None:
        """Give a session a new id; the name that Flask-Session users know."""
        session.regenerate()

    def _warn(self, app: Flask) -> None:
        """Say once, at the first request, what the application has overlooked."""
        if not app.secret_key:
            logger.warning("Sessions are off: SECRET_KEY is not set.")
        elif not app.debug and not app.testing:
            for sentence in doubtful_settings(self, app):
                logger.warning("%s", sentence)

    # --- the staircase -----------------------------------------------------------

    def _keep(
        self, app: Flask, session: Session, visit: RequestVisit
    ) -> tuple[Cookie, str]:
        """Store the session; what happens to the cookie, and the id in it."""
        live = visit.found if isinstance(visit.found, Live) else None
        if session.is_empty():
            return self._keep_nothing(session, visit, live), ""
        changes = session.changes()
        if live is None:
            return self._keep_new(session, visit, changes)
        user_changed = self.settings.user_key in changes
        if session.cleared:
            # Logged out and filled again: a session of its own, under its own id.
            changes = {k: encode_value(k, v) for k, v in session.items()}
            return self._keep_moved(session, visit, live, changes, ended=True)
        if session.id_wanted_new or (
            user_changed and self.settings.regenerate_on_login
        ):
            return self._keep_moved(session, visit, live, changes, ended=False)
        required = user_changed or session.sync_wanted
        context = visit.context_for_saving()
        kept = self.store.save(context, live, changes, required=required)
        if isinstance(kept, Gone):
            return self._ended_meanwhile(session, visit, kept, changes)
        if not self.should_set_cookie(app, session):
            return Cookie.LEAVE, ""
        return Cookie.SET, session.sid

    def _keep_nothing(
        self, session: Session, visit: RequestVisit, live: Live | None
    ) -> Cookie:
        """The session is empty: nothing to store, perhaps something to end."""
        if not session.modified:
            return Cookie.DELETE if _lost(visit.found) else Cookie.LEAVE
        if live is not None:
            self.store.end(visit.context_for_saving(), live)
            return Cookie.DELETE
        if self._moved_recently(visit.found) or not visit.cookie_came:
            return Cookie.LEAVE
        return Cookie.DELETE

    def _keep_new(
        self, session: Session, visit: RequestVisit, changes: Changes
    ) -> tuple[Cookie, str]:
        """The request came without a session and leaves with one."""
        if not session.modified:
            return Cookie.LEAVE, ""
        sets_user = changes.get(self.settings.user_key) is not None
        if self._moved_recently(visit.found) and not sets_user:
            self._drop(changes)
            return Cookie.LEAVE, ""
        required = sets_user or session.sync_wanted
        self.store.create(visit.context_to(session.sid), changes, required=required)
        return Cookie.SET, session.sid

    def _keep_moved(
        self,
        session: Session,
        visit: RequestVisit,
        live: Live,
        changes: Changes,
        *,
        ended: bool,
    ) -> tuple[Cookie, str]:
        """The session goes on under a new id."""
        sid = session.sid if session.id_wanted_new else new_sid()
        kept = self.store.move(
            visit.context_for_saving(),
            live,
            visit.context_to(sid),
            changes,
            reason="ended" if ended else "moved",
            renew_created=ended or changes.get(self.settings.user_key) is not None,
        )
        if isinstance(kept, Gone):
            return self._ended_meanwhile(session, visit, kept, changes)
        session.rename(sid)
        return Cookie.SET, sid

    def _ended_meanwhile(
        self, session: Session, visit: RequestVisit, gone: Gone, changes: Changes
    ) -> tuple[Cookie, str]:
        """The id died between load and save: drop the changes, unless one logs in."""
        if changes.get(self.settings.user_key) is None:
            self._drop(changes)
            return Cookie.LEAVE, ""
        if gone.reason == "moved":
            # The same browser's own session went on elsewhere: take its data along.
            changes = {k: encode_value(k, v) for k, v in session.items()}
        sid = new_sid()
        self.store.create(visit.context_to(sid), changes, required=True)
        session.rename(sid)
        return Cookie.SET, sid

    def _moved_recently(self, found: object) -> bool:
        return (
            isinstance(found, Gone)
            and found.reason == "moved"
            and self.clock.now_ms() - found.ended_ms < _MOVED_RECENTLY_MS
        )

    def _drop(self, changes: Mapping[str, bytes | None]) -> None:
        if changes:
            self.observer.count("dropped_changes")


def _lost(found: object) -> bool:
    """Whether nobody knows the session, so that its cookie only costs.

    One that ended or moved keeps it: the browser may have the next one already.
    """
    return isinstance(found, Gone) and found.reason == "missing" and not found.held


def _answer_instead(
    app: Flask, response: Response, error: SessionUnavailable | SessionTooLarge
) -> None:
    """Turn a response into the application's own answer to an error."""
    answer = app.make_response(app.handle_user_exception(error))
    close = getattr(response.response, "close", None)
    if close is not None:
        close()
    for name in {name.lower() for name in response.headers.keys()}:  # noqa: SIM118
        if name in _OF_THE_REPLACED or name.startswith("content-"):
            response.headers.remove(name)
    for name, value in answer.headers:
        response.headers.add(name, value)
    response.status = answer.status
    response.response = answer.response
    response.direct_passthrough = answer.direct_passthrough
