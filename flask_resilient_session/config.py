"""Every setting: its key, default, unit and range.

The ``RESILIENT_SESSION_*`` keys of a Flask configuration become one frozen
:class:`Settings`, once, when an application is initialised. A mistake is an error
then and there, with the key, the value and what is allowed in its text, and never
a surprise in a request. Flask's own keys are not read here, since Flask reads
them per request; the session lifetime comes in through :meth:`Settings.timing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from .addresses import NodeSettings, is_none, parse_nodes, to_number, to_text
from .errors import ConfigurationError

__all__ = [
    "CONFIG_KEYS",
    "PREFIX",
    "NodeSettings",
    "Settings",
    "Timing",
    "load_settings",
]

#: What every key of this package begins with.
PREFIX = "RESILIENT_SESSION_"

# Durations are in seconds, sizes in bytes, lengths in characters.

#: The longest duration, 5000 years. A moment has to fit into a date that a cookie
#: can name, before the year 10000, and into 64 bits of milliseconds.
MAX_DURATION = 5000 * 365.25 * 86400

#: The shortest timeout, pause or lifetime. Times are kept in milliseconds, and
#: below one a timeout would become 0, which servers read as no limit.
MIN_WAIT = 0.001

#: The longest timeout or pause, a day. Drivers keep them in 31 bits of
#: milliseconds, 24 days; past a day nobody waits for the answer.
MAX_WAIT = 86400.0

#: The longest exchange with a node. A worker that waits a minute for a cache
#: serves nobody, and a hung node may cost a process three of these.
MAX_NODE_TIMEOUT = 60.0

#: The longest key prefix. A memcached key has at most 250 bytes, of which the
#: digest of the session id takes 64; the rest stays for keys made from this one.
MAX_PREFIX_LENGTH = 100

#: The longest table name: PostgreSQL keeps 63 bytes, MariaDB 64 characters.
MAX_TABLE_LENGTH = 63

#: The smallest limit of a session: below it a login hardly fits.
MIN_MAX_BYTES = 1024

#: The largest limit of a session. memcached refuses an item over 1 MiB, 1,048,576
#: bytes with its header and key; what is left is for our envelope: the stamps, the
#: deletion markers, the names of the homes and the MAC. A session of very many
#: tiny values needs more for its stamps: the default leaves as much as it uses.
MAX_MAX_BYTES = 1_000_000

#: The longest time in which uses are not recorded, where every change is synced.
_SLACK_MS = 60_000


@dataclass(frozen=True, slots=True)
class Timing:
    """The durations that depend on the session lifetime, in whole milliseconds.

    :param lifetime_ms: idle lifetime of a session.
    :param absolute_ms: longest life of a session however busy; None: no limit.
    :param sync_ms: least time between two SQL writes of a session; 0: every
        change is written.
    :param sync_writes: changes after which SQL is written whatever the time
        (a count); None: time alone decides.
    :param reap_grace_ms: how long after its expiry a row is left alone.
    """

    lifetime_ms: int
    absolute_ms: int | None
    sync_ms: int
    sync_writes: int | None
    reap_grace_ms: int

    @property
    def slack_ms(self) -> int:
        """How often a session in use has its idle time extended.

        With each sync; where every change is synced, once a minute or a tenth of the
        lifetime, whichever is less.
        """
        return self.sync_ms or max(1, min(_SLACK_MS, self.lifetime_ms // 10))


@dataclass(frozen=True, slots=True)
class Settings:
    """One field for each ``RESILIENT_SESSION_*`` key; durations in seconds."""

    nodes: tuple[NodeSettings, ...]
    sync_interval: float
    sync_writes: int | None
    absolute_lifetime: float | None
    node_timeout: float
    node_retry: float
    node_retry_max: float
    request_budget: float
    sql_timeout: float
    sql_concurrency: int
    key_prefix: str
    table: str
    bind_key: str | None
    schema: str | None
    create_table: bool
    max_bytes: int
    encrypt: bool
    on_unavailable: Literal["error", "empty"]
    user_key: str
    regenerate_on_login: bool
    reap_grace: float
    reap_probability: float

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


class _Rule(NamedTuple):
    """How a value is read.

    :param parse: value -> field of the settings; ValueError where it is refused.
    :param allowed: what is allowed, as the end of "… is not allowed: use …".
    """

    parse: Callable[[Any], Any]
    allowed: str


def _optional(rule: _Rule) -> _Rule:
    """The rule with None allowed as well."""
    return _Rule(
        lambda value: None if is_none(value) else rule.parse(value),
        f"{rule.allowed}, or None",
    )


def _within(number: float, low: float, high: float) -> float:
    """The number.

    :raises ValueError: it is not from low to high.
    """
    if not low <= number <= high:
        raise ValueError("out of range")
    return number


def _number(low: float, high: float) -> _Rule:
    """A number from low to high."""
    return _Rule(
        lambda value: _within(to_number(value), low, high),
        f"a number from {low:g} to {high:g}",
    )


def _seconds(low: float, high: float) -> _Rule:
    """A duration from low to high seconds, as a number or a timedelta."""

    def parse(value: object) -> float:
        if isinstance(value, timedelta):
            value = value.total_seconds()
        return _within(to_number(value), low, high)

    top = "5000 years" if high == MAX_DURATION else f"{high:g}"
    return _Rule(parse, f"a number of seconds or a timedelta, from {low:g} to {top}")


def _whole(low: int, high: int | None = None) -> _Rule:
    """A whole number of at least low, and at most high where there is a limit."""

    def parse(value: object) -> int:
        number = to_number(value)
        if not number.is_integer() or not low <= number <= (high or number):
            raise ValueError("not whole or out of range")
        return int(number)

    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    return _Rule(parse, f"a whole number {limits}")


def _flag() -> _Rule:
    """A switch: a bool, 1 or 0, or one of the words for it in any case."""
    words = {"true": True, "1": True, "false": False, "0": False}

    def parse(value: object) -> bool:
        if isinstance(value, bool | int | str):
            word = str(value).strip().lower()
            if word in words:
                return words[word]
        raise ValueError("neither true nor false")

    return _Rule(parse, "True or False")


def _text(pattern: str, allowed: str) -> _Rule:
    """A text that fits a pattern as a whole."""

    def parse(value: object) -> str:
        text = to_text(value)
        if text is None or not re.fullmatch(pattern, text, re.DOTALL):
            raise ValueError("does not fit")
        return text

    return _Rule(parse, allowed)


def _choice(*choices: str) -> _Rule:
    """One of a few words."""

    def parse(value: object) -> object:
        if value not in choices:
            raise ValueError("not one of the choices")
        return value

    return _Rule(parse, " or ".join(f'"{choice}"' for choice in choices))


_DURATION = _seconds(0, MAX_DURATION)
_WAIT = _seconds(MIN_WAIT, MAX_WAIT)
_ANY_TEXT = _text(".+", "a text that is not empty")
_PREFIX_TEXT = _text(
    f"[!-~]{{0,{MAX_PREFIX_LENGTH}}}",
    f"at most {MAX_PREFIX_LENGTH} printable ASCII characters without whitespace",
)
_TABLE_NAME = _text(
    f"[A-Za-z0-9_]{{1,{MAX_TABLE_LENGTH}}}",
    f"1 to {MAX_TABLE_LENGTH} letters, digits and underscores",
)

#: Field of :class:`Settings` -> its default, as it is documented, and its rule.
_KEYS: Mapping[str, tuple[Any, _Rule]] = MappingProxyType(
    {
        "nodes": ([], _Rule(parse_nodes, "a list of nodes")),
        "sync_interval": (120, _DURATION),
        "sync_writes": (None, _optional(_whole(1))),
        "absolute_lifetime": (None, _optional(_seconds(MIN_WAIT, MAX_DURATION))),
        "node_timeout": (0.25, _seconds(MIN_WAIT, MAX_NODE_TIMEOUT)),
        "node_retry": (1.0, _WAIT),
        "node_retry_max": (30, _WAIT),
        "request_budget": (1.0, _WAIT),
        "sql_timeout": (0.5, _WAIT),
        "sql_concurrency": (8, _whole(1)),
        "key_prefix": ("session:", _PREFIX_TEXT),
        "table": ("resilient_sessions", _TABLE_NAME),
        "bind_key": (None, _optional(_ANY_TEXT)),
        "schema": (None, _optional(_ANY_TEXT)),
        "create_table": (True, _flag()),
        "max_bytes": (524288, _whole(MIN_MAX_BYTES, MAX_MAX_BYTES)),
        "encrypt": (False, _flag()),
        "on_unavailable": ("error", _choice("error", "empty")),
        "user_key": ("_user_id", _ANY_TEXT),
        "regenerate_on_login": (True, _flag()),
        "reap_grace": (60, _DURATION),
        "reap_probability": (0.0, _number(0, 1)),
    }
)

#: Every key of this package, under its full name -> its default.
CONFIG_KEYS: Mapping[str, Any] = MappingProxyType(
    {PREFIX + field.upper(): default for field, (default, _) in _KEYS.items()}
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
    settings = Settings(
        **{
            field: _load(PREFIX + field.upper(), config, default, rule)
            for field, (default, rule) in _KEYS.items()
        }
    )
    if settings.node_retry_max < settings.node_retry:
        raise ConfigurationError(
            f"{PREFIX}NODE_RETRY_MAX",
            settings.node_retry_max,
            f"at least {PREFIX}NODE_RETRY, which is {settings.node_retry:g}",
        )
    return settings


def _load(key: str, config: Mapping[str, Any], default: Any, rule: _Rule) -> Any:
    """Read one key.

    :raises ConfigurationError: the value is refused.
    """
    value = config.get(key, default)
    try:
        return rule.parse(value)
    except ConfigurationError:
        raise
    except ValueError:
        raise ConfigurationError(key, value, rule.allowed) from None


def _known_key(key: str) -> str:
    """What to use instead of an unknown key: the closest one, or all of them."""
    # Without the prefix, which would make any two keys look alike.
    fields = {field.upper(): PREFIX + field.upper() for field in _KEYS}
    if close := get_close_matches(key.removeprefix(PREFIX), fields, n=1):
        return f"a key that exists, perhaps {fields[close[0]]}"
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
    rule = _seconds(MIN_WAIT, MAX_DURATION)
    try:
        lifetime_ms = _milliseconds(rule.parse(lifetime))
    except ValueError:
        raise ConfigurationError(
            "PERMANENT_SESSION_LIFETIME", lifetime, rule.allowed
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
