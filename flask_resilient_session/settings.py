"""Every setting: its key, default, kind and bounds.

The ``RESILIENT_SESSION_*`` keys of a Flask configuration become one frozen
:class:`Settings`, once, when an application is initialised. A mistake is an error
then and there, with the key, the value and what is allowed in its text, and never
a surprise in a request. Flask's own keys are not read here, since Flask reads
them per request; the session lifetime comes in through :meth:`Settings.timing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

from .common.errors import ConfigurationError
from .core.lifetimes import Timing
from .node_list import NodeSettings, is_none, parse_nodes, to_number, to_text

__all__ = [
    "CONFIG_KEYS",
    "PREFIX",
    "NodeSettings",
    "Settings",
    "load_settings",
]

#: What every key of this package begins with.
PREFIX = "RESILIENT_SESSION_"

#: The longest duration, 5000 years. A moment has to fit into a date that a cookie
#: can name, before the year 10000, and into 64 bits of milliseconds.
MAX_DURATION = 5000 * 365.25 * 86400

#: The shortest timeout, pause or lifetime. Times are kept in milliseconds, and
#: below one a timeout would become 0, which servers read as no limit.
MIN_WAIT = 0.001

#: The longest timeout or pause, a day. Drivers keep them in 31 bits of
#: milliseconds, 24 days; past a day nobody waits for the answer.
MAX_WAIT = 86400.0

# Bounds of a text: a pattern that it fits as a whole, and the pattern in words.

_ANY_TEXT = (".+", "a text that is not empty")

# A memcached key has at most 250 bytes, of which the digest of the session id
# takes 64; the rest stays for keys made from this one.
_KEY_PREFIX = (
    "[!-~]{0,100}",
    "at most 100 printable ASCII characters without whitespace",
)

# PostgreSQL keeps 63 bytes of a table's name, MariaDB 64 characters.
_TABLE_NAME = ("[A-Za-z0-9_]{1,63}", "1 to 63 letters, digits and underscores")


# The kinds. Each reads a value within its bounds; what it refuses is a ValueError
# that says what is allowed, as the end of "… is not allowed: use …".


def _whole(value: object, low: int, high: int | None = None) -> int:
    """A whole number of at least low, and at most high where there is a limit."""
    number = to_number(value)
    if not number.is_integer() or not low <= number <= (high or number):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"a whole number {limits}")
    return int(number)


def _number(value: object, low: float, high: float) -> float:
    """A number from low to high."""
    number = to_number(value)
    if not low <= number <= high:
        raise ValueError(f"a number from {low:g} to {high:g}")
    return number


def _seconds(value: object, low: float, high: float) -> float:
    """A duration from low to high seconds, as a number or a timedelta."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    number = to_number(value)
    if not low <= number <= high:
        top = "5000 years" if high == MAX_DURATION else f"{high:g}"
        raise ValueError(f"a number of seconds or a timedelta, from {low:g} to {top}")
    return number


def _flag(value: object) -> bool:
    """A switch: a bool, 1 or 0, or one of the words for it in any case."""
    words = {"true": True, "1": True, "false": False, "0": False}
    word = str(value).strip().lower() if isinstance(value, bool | int | str) else ""
    if word not in words:
        raise ValueError("True or False")
    return words[word]


def _text(value: object, pattern: str, allowed: str) -> str:
    """A text that fits a pattern as a whole."""
    text = to_text(value)
    if text is None or not re.fullmatch(pattern, text, re.DOTALL):
        raise ValueError(allowed)
    return text


def _choice(value: object, *choices: str) -> object:
    """One of a few words."""
    if value not in choices:
        raise ValueError(" or ".join(f'"{choice}"' for choice in choices))
    return value


def _key(default: Any, kind: Callable[..., Any], *bounds: Any) -> Any:
    """A row of :class:`Settings`: the default as documented, the kind, its bounds."""
    return field(metadata={"default": default, "kind": kind, "bounds": bounds})


@dataclass(frozen=True, slots=True)
class Settings:
    """The table of every ``RESILIENT_SESSION_*`` key, and their values once read.

    One row is one key. Where the default is None, None is allowed beside what the
    kind allows. Durations are in seconds, sizes in bytes, lengths in characters.
    """

    nodes: tuple[NodeSettings, ...] = _key([], parse_nodes)
    sync_interval: float = _key(120, _seconds, 0, MAX_DURATION)
    sync_writes: int | None = _key(None, _whole, 1)
    absolute_lifetime: float | None = _key(None, _seconds, MIN_WAIT, MAX_DURATION)
    # A worker that waits a minute for a cache serves nobody, and a hung node may
    # cost a process three of these.
    node_timeout: float = _key(0.25, _seconds, MIN_WAIT, 60)
    node_retry: float = _key(1.0, _seconds, MIN_WAIT, MAX_WAIT)
    node_retry_max: float = _key(30, _seconds, MIN_WAIT, MAX_WAIT)
    sql_timeout: float = _key(0.5, _seconds, MIN_WAIT, MAX_WAIT)
    sql_concurrency: int = _key(8, _whole, 1)
    key_prefix: str = _key("session:", _text, *_KEY_PREFIX)
    table: str = _key("resilient_sessions", _text, *_TABLE_NAME)
    bind_key: str | None = _key(None, _text, *_ANY_TEXT)
    schema: str | None = _key(None, _text, *_ANY_TEXT)
    create_table: bool = _key(True, _flag)
    # Below a KiB a login hardly fits. memcached refuses an item over 1 MiB, 1,048,576
    # bytes with its header and key; what is left is for our envelope: the stamps, the
    # deletion markers, the names of the homes and the MAC. A session of very many
    # tiny values needs more for its stamps: the default leaves as much as it uses.
    max_bytes: int = _key(524288, _whole, 1024, 1_000_000)
    encrypt: bool = _key(False, _flag)
    on_unavailable: Literal["error", "empty"] = _key("error", _choice, "error", "empty")
    user_key: str = _key("_user_id", _text, *_ANY_TEXT)
    regenerate_on_login: bool = _key(True, _flag)
    reap_grace: float = _key(60, _seconds, 0, MAX_DURATION)
    reap_probability: float = _key(0.0, _number, 0, 1)

    @property
    def patience(self) -> float:
        """What loading a session may wait in all, in seconds, and saving it as well."""
        return self.node_timeout + self.sql_timeout

    def timing(self, lifetime: timedelta | float) -> Timing:
        """The durations in use under a session lifetime.

        Cheap enough for every request: the answer is remembered.

        :param lifetime: ``PERMANENT_SESSION_LIFETIME`` as it is now, as a
            timedelta or in seconds.
        :returns: the sync interval reduced to a tenth of the lifetime where it is
            larger.
        :raises ConfigurationError: the lifetime is not positive.
        """
        # Numbers rather than the settings as the cache's key: hashing these five
        # is far cheaper than hashing every field.
        return _timing(
            lifetime,
            self.absolute_lifetime,
            self.sync_interval,
            self.sync_writes,
            self.reap_grace,
        )


#: Every key of this package, under its full name -> its default.
CONFIG_KEYS: Mapping[str, Any] = MappingProxyType(
    {PREFIX + row.name.upper(): row.metadata["default"] for row in fields(Settings)}
)


def load_settings(config: Mapping[str, Any]) -> Settings:
    """Read every ``RESILIENT_SESSION_*`` key of a Flask configuration.

    :param config: ``app.config`` or any mapping; other keys are ignored.
    :returns: the settings, defaults filled in.
    :raises ConfigurationError: a key is unknown, or a value is not allowed.
    """
    for key, value in config.items():
        if key.startswith(PREFIX) and key not in CONFIG_KEYS:
            raise ConfigurationError(key, value, _known_key(key))
    values = {}
    for row in fields(Settings):
        key = PREFIX + row.name.upper()
        values[row.name] = _read(key, config.get(key, CONFIG_KEYS[key]), **row.metadata)
    settings = Settings(**values)
    if settings.node_retry_max < settings.node_retry:
        raise ConfigurationError(
            f"{PREFIX}NODE_RETRY_MAX",
            settings.node_retry_max,
            f"at least {PREFIX}NODE_RETRY, which is {settings.node_retry:g}",
        )
    return settings


def _read(
    key: str, value: object, default: object, kind: Callable[..., Any], bounds: Any
) -> Any:
    """Read the value of a key as its row says.

    :raises ConfigurationError: the value is refused.
    """
    if default is None and is_none(value):
        return None
    try:
        return kind(value, *bounds)
    except ConfigurationError:
        raise  # about one node of the list, shown by itself
    except ValueError as error:
        allowed = f"{error}, or None" if default is None else str(error)
        raise ConfigurationError(key, value, allowed) from None


def _known_key(key: str) -> str:
    """What to use instead of an unknown key: the closest one, or all of them."""
    # Without the prefix, which would make any two keys look alike.
    names = [known.removeprefix(PREFIX) for known in CONFIG_KEYS]
    if close := get_close_matches(key.removeprefix(PREFIX), names, n=1):
        return f"a key that exists, perhaps {PREFIX}{close[0]}"
    return f"a key that exists: {', '.join(CONFIG_KEYS)}"


@lru_cache(maxsize=64)
def _timing(
    lifetime: timedelta | float,
    absolute_lifetime: float | None,
    sync_interval: float,
    sync_writes: int | None,
    reap_grace: float,
) -> Timing:
    """What :meth:`Settings.timing` answers, from the fields that it depends on."""
    try:
        lifetime_ms = _milliseconds(_seconds(lifetime, MIN_WAIT, MAX_DURATION))
    except ValueError as error:
        raise ConfigurationError(
            "PERMANENT_SESSION_LIFETIME", lifetime, str(error)
        ) from None
    absolute = absolute_lifetime
    return Timing(
        lifetime_ms=lifetime_ms,
        absolute_ms=None if absolute is None else _milliseconds(absolute),
        sync_ms=_at_most(_milliseconds(sync_interval), lifetime_ms // 10),
        sync_writes=sync_writes,
        reap_grace_ms=_milliseconds(reap_grace),
    )


def _milliseconds(seconds: float) -> int:
    """Seconds in whole milliseconds; only 0 becomes 0, which has its own meaning."""
    return max(1, round(seconds * 1000)) if seconds else 0


def _at_most(wanted_ms: int, limit_ms: int) -> int:
    """The wanted interval, reduced to the limit; only 0 becomes 0."""
    return min(wanted_ms, max(1, limit_ms))
