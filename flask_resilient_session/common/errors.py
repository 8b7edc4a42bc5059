"""Errors, named by whose fault they are.

What this package raises of its own is a :class:`ResilientSessionError`; wrong values
in a session or an argument are Python's TypeError and ValueError. The two that end
a request are HTTP exceptions as well, so that an application answers them with its
own error pages.
"""

from __future__ import annotations

from werkzeug.exceptions import RequestEntityTooLarge, ServiceUnavailable

#: Seconds a client is asked to wait after a 503. Long enough for a suspected
#: node to be probed again, short enough that a person does not give up.
RETRY_AFTER_SECONDS = 2


class ResilientSessionError(Exception):
    """The root of every error of this package."""


class ConfigurationError(ResilientSessionError, ValueError):
    """A setting is wrong; the text names the key, the value and what is allowed.

    The fault is the operator's. Raised by ``init_app`` and never later.

    :param key: the configuration key.
    :param value: the value found; shown by ``repr``.
    :param allowed: what is allowed, as the end of the sentence
        "… is not allowed: use …".
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key} = {value!r} is not allowed: use {allowed}.")
        self.key = key
        self.value = value
        self.allowed = allowed


class SetupError(ResilientSessionError, RuntimeError):
    """The extension is wired up wrongly; the text says what to do instead."""


class SessionUnavailable(ResilientSessionError, ServiceUnavailable):
    """Nobody can say whether the session exists, or a change could not be kept.

    The fault is the infrastructure's: answered as 503 with ``Retry-After``.
    """

    def __init__(self, description: str | None = None) -> None:
        ServiceUnavailable.__init__(
            self, description=description, retry_after=RETRY_AFTER_SECONDS
        )


class SessionTooLarge(ResilientSessionError, RequestEntityTooLarge):
    """The encoded session is over ``RESILIENT_SESSION_MAX_BYTES``.

    The fault is the request's: answered as 413, and the stored session stays
    as it was.

    :param size: encoded size in bytes.
    :param limit: the limit in bytes.
    """

    def __init__(self, size: int, limit: int) -> None:
        RequestEntityTooLarge.__init__(
            self,
            description=(
                f"The session takes {size} bytes, over the limit of {limit}"
                " (RESILIENT_SESSION_MAX_BYTES); the stored session is unchanged."
            ),
        )
        self.size = size
        self.limit = limit


class SqlUnavailable(ResilientSessionError):
    """SQL did not answer in time, or answered with an error.

    Never reaches the application: the store turns it into a decision.
    """


class SqlBusy(SqlUnavailable):
    """This process has no place or no time left to ask SQL, which may be well.

    That is no reason to guess, nor to skip SQL for a while.
    """
