"""Flask's session interface: the cookie, the id, and Flask's staircase of saving.

Opening a session costs nothing; its first use loads it. Saving keeps the order of
Flask's own ``save_session``: vary, empty, whether to set the cookie, set it.
"""

from __future__ import annotations

import enum
import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, cast

from flask import Flask, Request, Response, after_this_request, has_request_context
from flask.sessions import SessionInterface, SessionMixin

from .access import Access
from .clock import Clock
from .codec import encode_value
from .config import Settings
from .cookie import CookieSigner, delete_cookie, read_cookie, set_cookie
from .errors import SessionTooLarge, SessionUnavailable
from .events import Observer, logger, short
from .record import Keyring
from .replication import Gone, Live, Unknown
from .session import LazySession, Session, UnavailableSession, new_sid
from .store import Changes, Store

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


class Secrets:
    """What is derived from one set of secret keys."""

    def __init__(self, secrets: tuple[str | bytes, ...], namespace: str) -> None:
        self.signer = CookieSigner(secrets)
        self.keyring = Keyring(secrets, namespace)


class RequestVisit:
    """One session in one request: what was loaded, and the time spent on it.

    :ivar cookie_came: the request carried a session cookie, whatever was in it.
    :ivar found: what loading found; None while the cookie is missing or forged.
    """

    def __init__(
        self, interface: ResilientSessionInterface, app: Flask, request: Request
    ) -> None:
        self._interface = interface
        self._app = app
        self._request = request
        self._spent = 0.0
        self.has_response = False
        self.saved = False
        self.cookie_came = False
        self.access: Access | None = None
        self.found: Live | Gone | Unknown | None = None

    def load(self, session: Session) -> None:
        """See :class:`flask_resilient_session.session.Visit`."""
        interface, app = self._interface, self._app
        value = read_cookie(interface, app, self._request)
        self.cookie_came = bool(value)
        sid = interface.secrets(app).signer.unsign(value)
        if sid is None:
            session.fill(None, {})
            return
        self.access = interface.access(app, sid, self.deadline(for_saving=False))
        self.found = self.timed(lambda: interface.store.load(cast(Access, self.access)))
        if isinstance(self.found, Live):
            try:
                session.fill(sid, self.found.record.payload())
                return
            except ValueError as error:
                # Written by another version, which knows more types than this one.
                name = short(self.access.session_key)
                logger.error("Session %s cannot be read here: %s", name, error)
                self.found = Unknown()
        elif isinstance(self.found, Gone):
            session.fill(None, {})
            return
        session.become_unavailable()
        if interface.settings.on_unavailable == "error" and not self._too_late():
            raise self._unavailable()

    def refuse_write(self) -> None:
        """See :class:`flask_resilient_session.session.Visit`."""
        if not self._too_late():
            raise self._unavailable()
        self._interface.observer.count("dropped_changes")
        logger.warning("A change of an unavailable session was dropped.")

    def note_response(self, response: Response) -> Response:
        """From here on an error would become a 500 instead of the app's own page."""
        self.has_response = True
        return response

    def deadline(self, *, for_saving: bool) -> float:
        """Monotonic time by which loading or saving must end.

        Half of the request's budget is kept for saving; time between the two does
        not count.
        """
        budget = self._interface.settings.request_budget
        allowed = budget - self._spent if for_saving else budget / 2
        return self._interface.clock.monotonic() + allowed

    def timed(self, call: Callable[[], Live | Gone | Unknown]) -> Live | Gone | Unknown:
        """Call something and count its time against the budget."""
        started = self._interface.clock.monotonic()
        try:
            return call()
        finally:
            self._spent += self._interface.clock.monotonic() - started

    def access_for_saving(self) -> Access:
        """The loaded session's access with the time that is left."""
        assert self.access is not None
        return replace(self.access, deadline=self.deadline(for_saving=True))

    def access_to(self, sid: str) -> Access:
        """Access to another id in the time that is left."""
        deadline = self.deadline(for_saving=True)
        return self._interface.access(self._app, sid, deadline)

    def _too_late(self) -> bool:
        return self.has_response or self.saved or _in_error_handler()

    def _unavailable(self) -> SessionUnavailable:
        name = "" if self.access is None else f" {short(self.access.session_key)}"
        return SessionUnavailable(
            f"Nobody can say whether session{name} exists: neither its nodes nor SQL"
            " answer. Try again in a moment."
        )


def _in_error_handler() -> bool:
    """Whether Flask is handling an exception, so that another would be a 500.

    The traceback of an exception starts at the frame that handles it. A view's own
    ``except`` block is none of Flask's.
    """
    handlers = {Flask.full_dispatch_request.__code__, Flask.wsgi_app.__code__}
    error = sys.exc_info()[1]
    while error is not None:
        traceback = error.__traceback__
        if traceback is not None and traceback.tb_frame.f_code in handlers:
            return True
        error = error.__context__
    return False


class ResilientSessionInterface(SessionInterface):
    """Sessions on two nodes and SQL.

    :param settings: the extension's settings of one application.
    :param store: loads and keeps the sessions.
    """

    session_class = Session

    def __init__(
        self, settings: Settings, store: Store, clock: Clock, observer: Observer
    ) -> None:
        self.settings = settings
        self.store = store
        self.clock = clock
        self.observer = observer
        self._secrets: dict[tuple[str | bytes, ...], Secrets] = {}
        self._warned = False

    # --- Flask's side ------------------------------------------------------------

    def open_session(self, app: Flask, request: Request) -> Session | None:
        """A session that loads on first use; None without a secret key."""
        if not app.secret_key:
            if not self._warned:
                self._warned = True
                logger.warning("Sessions are off: SECRET_KEY is not set.")
            return None
        visit = RequestVisit(self, app, request)
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
            value = self.secrets(app).signer.sign(sid)
            set_cookie(self, app, session, response, value)

    def regenerate(self, session: Session) -> None:
        """Give a session a new id; the name that Flask-Session users know."""
        session.regenerate()

    # --- what a request needs ----------------------------------------------------

    def secrets(self, app: Flask) -> Secrets:
        """Signer and keyring for the application's secret keys as they are now."""
        fallbacks = app.config.get("SECRET_KEY_FALLBACKS") or ()
        keys = (cast("str | bytes", app.secret_key), *fallbacks)
        known = self._secrets.get(keys)
        if known is None:
            if len(self._secrets) >= 8:  # keys change by rotation, not by request
                self._secrets.clear()
            known = self._secrets[keys] = Secrets(keys, self.namespace)
        return known

    @property
    def namespace(self) -> str:
        """What records belong to: those of another prefix or table are foreign."""
        return f"{self.settings.key_prefix}\n{self.settings.table}"

    def access(self, app: Flask, sid: str, deadline: float) -> Access:
        """Access to a session by its id."""
        return Access(
            session_key=hashlib.sha256(sid.encode("ascii")).hexdigest(),
            keyring=self.secrets(app).keyring,
            timing=self.settings.timing(app.permanent_session_lifetime),
            deadline=deadline,
        )

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
        access = visit.access_for_saving()
        kept = self.store.save(access, live, changes, required=required)
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
            return Cookie.LEAVE
        if live is not None:
            self.store.end(visit.access_for_saving(), live)
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
        self.store.create(visit.access_to(session.sid), changes, required=required)
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
            visit.access_for_saving(),
            live,
            visit.access_to(sid),
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
        self.store.create(visit.access_to(sid), changes, required=True)
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


__all__ = ["ResilientSessionInterface", "Secrets", "UnavailableSession"]
