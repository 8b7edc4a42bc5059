"""The secret keys at work: signatures of cookies, seals of records, digests of ids.

Flask's keys are read per request, as Flask does, so that they can be rotated.
"""

from __future__ import annotations

import hashlib
from typing import Final

from flask import Flask

from ..common.errors import SetupError
from ..common.patience import Patience
from ..core.envelope import Keyring
from ..settings import Settings
from ..store.context import SessionContext
from .cookie import CookieSigner

#: Keys change by rotation and not by request: more sets than this are left-overs.
_REMEMBERED: Final = 8


def session_key_of(sid: str) -> str:
    """The digest that stands for an id everywhere but in the cookie."""
    return hashlib.sha256(sid.encode("ascii")).hexdigest()


class Secrets:
    """What is derived from one set of secret keys, the current one first."""

    def __init__(
        self, secrets: tuple[str | bytes, ...], namespace: str, *, encrypt: bool
    ) -> None:
        self.signer = CookieSigner(secrets)
        self.keyring = Keyring(secrets, namespace, encrypt=encrypt)


class Keys:
    """Derives what one application's sessions need from its secret keys."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        #: Records of another prefix or table are foreign.
        self._namespace = f"{settings.key_prefix}\n{settings.table}"
        self._known: dict[tuple[str | bytes, ...], Secrets] = {}

    def of(self, app: Flask) -> Secrets:
        """Signer and keyring for the application's secret keys as they are now.

        :raises SetupError: it has none.
        """
        if not app.secret_key:
            raise SetupError(
                "Sessions need SECRET_KEY: set it here as it is set for the web server."
            )
        fallbacks = app.config.get("SECRET_KEY_FALLBACKS") or ()
        keys: tuple[str | bytes, ...] = (app.secret_key, *fallbacks)
        known = self._known.get(keys)
        if known is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            known = self._known[keys] = Secrets(
                keys, self._namespace, encrypt=self._settings.encrypt
            )
        return known

    def context(self, app: Flask, sid: str, patience: Patience) -> SessionContext:
        """Access to a session by its id.

        :param patience: what is left to wait for it.
        """
        return SessionContext(
            session_key=session_key_of(sid),
            keyring=self.of(app).keyring,
            timing=self._settings.timing(app.permanent_session_lifetime),
            patience=patience,
        )
