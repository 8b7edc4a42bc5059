"""What every step for one session in one request needs."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.patience import Patience
from ..core.envelope import Keyring
from ..core.lifetimes import Timing


@dataclass(frozen=True, slots=True)
class SessionContext:
    """One session, and the terms on which this request may reach it.

    :ivar session_key: hex digest of the session id.
    :ivar keyring: seals and opens its records.
    :ivar timing: the lifetimes as they are now.
    :ivar patience: what is left to wait for all steps together.
    """

    session_key: str
    keyring: Keyring
    timing: Timing
    patience: Patience
