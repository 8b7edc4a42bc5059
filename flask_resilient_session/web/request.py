"""One session in one request: how it is loaded, and when an error can be answered."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from flask import Flask, Request, Response
from flask.sessions import SessionInterface

from ..common.clock import Clock
from ..common.errors import SessionUnavailable
from ..common.events import Observer, logger, short
from ..common.patience import Patience
from ..core.reading import Gone, Live, Unknown
from ..settings import Settings
from ..store.context import SessionContext
from ..store.store import Store
from .cookie import read_cookie
from .keys import Keys
from .session import Session


@dataclass(frozen=True, slots=True)
class AppParts:
    """What all requests of one application share."""

    settings: Settings
    store: Store
    keys: Keys
    clock: Clock
    observer: Observer
    interface: SessionInterface


class RequestVisit:
    """One session in one request: what was loaded, and what may still be waited.

    :ivar cookie_came: the request carried a session cookie, whatever was in it.
    :ivar sid: the id in it, if it is one that we signed.
    :ivar found: what loading found; None while the cookie is missing or forged.
    """

    def __init__(self, parts: AppParts, app: Flask, request: Request) -> None:
        self._parts = parts
        self._app = app
        self._request = request
        self._saving: Patience | None = None
        self.has_response = False
        self.saved = False
        self.cookie_came = False
        self.sid: str | None = None
        self.context: SessionContext | None = None
        self.found: Live | Gone | Unknown | None = None

    def load(self, session: Session) -> None:
        """See :class:`flask_resilient_session.session.Visit`."""
        parts, app = self._parts, self._app
        value = read_cookie(parts.interface, app, self._request)
        self.cookie_came = bool(value)
        self.sid = sid = parts.keys.of(app).signer.unsign(value)
        if sid is None:
            session.fill(None, {})
            return
        self.context = context = parts.keys.context(app, sid, self._new_patience())
        self.found = parts.store.load(context)
        if isinstance(self.found, Live):
            try:
                session.fill(sid, self.found.record.payload())
                return
            except ValueError as error:
                # Written by another version, which knows more types than this one.
                name = short(self.context.session_key)
                logger.error("Session %s cannot be read here: %s", name, error)
                self.found = Unknown()
        elif isinstance(self.found, Gone):
            session.fill(None, {})
            return
        session.become_unavailable(sid)
        if parts.settings.on_unavailable == "error" and not self._too_late():
            raise self._unavailable()

    def session_key(self) -> str:
        """See :class:`flask_resilient_session.session.Visit`."""
        return "" if self.context is None else self.context.session_key

    def refuse_write(self) -> None:
        """See :class:`flask_resilient_session.session.Visit`."""
        if not self._too_late():
            raise self._unavailable()
        self._parts.observer.count("dropped_changes")
        logger.warning("A change of an unavailable session was dropped.")

    def note_response(self, response: Response) -> Response:
        """From here on an error would become a 500 instead of the app's own page."""
        self.has_response = True
        return response

    def context_for_saving(self) -> SessionContext:
        """The loaded session's access, on the terms of saving."""
        assert self.context is not None
        return replace(self.context, patience=self._saving_patience())

    def context_to(self, sid: str) -> SessionContext:
        """Access to another id, on the terms of saving."""
        return self._parts.keys.context(self._app, sid, self._saving_patience())

    def _saving_patience(self) -> Patience:
        """One for all that is saved in this request."""
        if self._saving is None:
            self._saving = self._new_patience()
        return self._saving

    def _new_patience(self) -> Patience:
        return Patience(self._parts.clock, self._parts.settings.patience)

    def _too_late(self) -> bool:
        return self.has_response or self.saved or _in_error_handler()

    def _unavailable(self) -> SessionUnavailable:
        name = "" if self.context is None else f" {short(self.context.session_key)}"
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
