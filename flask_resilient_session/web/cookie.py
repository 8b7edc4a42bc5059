"""The cookie: an id under a signature, read from the request and put on a response."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Final

from flask import Flask, Request, Response
from flask.sessions import SessionInterface
from itsdangerous import BadSignature, Signer

#: An id exactly as ``session.new_sid`` makes it, a dot, and a signature: anything else
#: was never a cookie of ours.
_COOKIE: Final = re.compile(r"[A-Za-z0-9_-]{43}\.[A-Za-z0-9_-]{43}", re.ASCII)

#: Keeps our signatures apart from others made with the same secret key.
_SALT: Final = "flask-resilient-session"


class CookieSigner:
    """Signs ids, and recognises its own signatures.

    :param secrets: the application's secret keys, the current one first.
    """

    def __init__(self, secrets: Sequence[str | bytes]) -> None:
        raw = [s.encode() if isinstance(s, str) else s for s in secrets]
        # itsdangerous signs with the last key and accepts all of them.
        self._signer = Signer(
            list(reversed(raw)),
            salt=_SALT,
            key_derivation="hmac",
            digest_method=hashlib.sha256,
        )

    def sign(self, sid: str) -> str:
        """The cookie's value for an id."""
        return self._signer.sign(sid).decode("ascii")

    def unsign(self, value: str) -> str | None:
        """The id in a cookie's value; None for anything that is not ours."""
        if not _COOKIE.fullmatch(value):
            return None
        try:
            return self._signer.unsign(value).decode("ascii")
        except BadSignature:
            return None


def read_cookie(interface: SessionInterface, app: Flask, request: Request) -> str:
    """The value of the session cookie; empty without one."""
    return str(request.cookies.get(interface.get_cookie_name(app), ""))


def set_cookie(
    interface: SessionInterface,
    app: Flask,
    session: Any,
    response: Response,
    value: str,
    *,
    new_id: bool,
) -> None:
    """Send the session cookie, as Flask's settings say.

    :param new_id: a cache must not hand the id to others, so that the response is
        not to be stored unless the application says otherwise.
    """
    if new_id and "Cache-Control" not in response.headers:
        response.headers["Cache-Control"] = "no-store"
    response.set_cookie(
        interface.get_cookie_name(app),
        value,
        expires=interface.get_expiration_time(app, session),
        httponly=interface.get_cookie_httponly(app),
        **_attributes(interface, app),
    )
    response.vary.add("Cookie")


def delete_cookie(interface: SessionInterface, app: Flask, response: Response) -> None:
    """Delete the session cookie, with all the attributes that it was set with."""
    response.delete_cookie(
        interface.get_cookie_name(app),
        httponly=interface.get_cookie_httponly(app),
        **_attributes(interface, app),
    )
    response.vary.add("Cookie")


def _attributes(interface: SessionInterface, app: Flask) -> dict[str, Any]:
    return {
        "domain": interface.get_cookie_domain(app),
        "path": interface.get_cookie_path(app),
        "secure": interface.get_cookie_secure(app),
        "partitioned": interface.get_cookie_partitioned(app),
        "samesite": interface.get_cookie_samesite(app),
    }


def doubtful_settings(interface: SessionInterface, app: Flask) -> list[str]:
    """What is wrong or missing in Flask's cookie settings, a sentence each."""
    # Browsers take the prefixes in any case.
    name = interface.get_cookie_name(app)
    prefixed = name.lower()
    secure = interface.get_cookie_secure(app)
    samesite = interface.get_cookie_samesite(app)
    found = []
    if not secure:
        found.append(
            "SESSION_COOKIE_SECURE is not set: the session id also travels over"
            " unencrypted connections. Set it to True where the site has HTTPS."
        )
    if not interface.get_cookie_httponly(app):
        found.append("SESSION_COOKIE_HTTPONLY is off: scripts can read the session id.")
    if samesite is None:
        found.append(
            "SESSION_COOKIE_SAMESITE is not set: other sites' requests carry the"
            " session id where a browser's default lets them. Set it to 'Lax'."
        )
    if not secure:
        found.extend(_needs_secure(interface, app, name, samesite))
    if prefixed.startswith("__host-") and (
        interface.get_cookie_domain(app) or interface.get_cookie_path(app) != "/"
    ):
        found.append(
            f"A cookie named {name} needs SESSION_COOKIE_PATH = '/' and no"
            " SESSION_COOKIE_DOMAIN."
        )
    return found


def _needs_secure(
    interface: SessionInterface, app: Flask, name: str, samesite: str | None
) -> list[str]:
    """Settings that make browsers drop a cookie without the Secure flag."""
    wanting = []
    if samesite is not None and samesite.title() == "None":
        wanting.append("SESSION_COOKIE_SAMESITE = 'None'")
    if interface.get_cookie_partitioned(app):
        wanting.append("SESSION_COOKIE_PARTITIONED")
    if name.lower().startswith(("__secure-", "__host-")):
        wanting.append(f"A cookie named {name}")
    return [f"{what} needs SESSION_COOKIE_SECURE." for what in wanting]
