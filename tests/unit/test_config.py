"""Every setting: its default, every form it may have, and every mistake."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import pytest
from flask import Flask

from flask_resilient_session.common.errors import ConfigurationError
from flask_resilient_session.core.lifetimes import Timing
from flask_resilient_session.node_list import NodeSettings
from flask_resilient_session.settings import (
    CONFIG_KEYS,
    PREFIX,
    Settings,
    load_settings,
)

CENTURIES = 5000 * 365.25 * 86400
NAN, INF = float("nan"), float("inf")

DEFAULTS: dict[str, Any] = {
    "nodes": (),
    "sync_interval": 120.0,
    "sync_writes": None,
    "absolute_lifetime": None,
    "node_timeout": 0.25,
    "node_retry": 1.0,
    "node_retry_max": 30.0,
    "sql_timeout": 0.5,
    "sql_concurrency": 8,
    "key_prefix": "session:",
    "table": "resilient_sessions",
    "bind_key": None,
    "schema": None,
    "create_table": True,
    "max_bytes": 524288,
    "encrypt": False,
    "on_unavailable": "error",
    "user_key": "_user_id",
    "regenerate_on_login": True,
    "reap_grace": 60.0,
    "reap_probability": 0.0,
}

# What a rule's error has to say, by the kind of the key.
DURATION = "a number of seconds or a timedelta, from 0 to 5000 years"
LIFETIME = "a number of seconds or a timedelta, from 0.001 to 5000 years, or None"
WAIT = "a number of seconds or a timedelta, from 0.001 to 86400"

#: Key -> what its error says is allowed.
ALLOWED = {
    "nodes": "a list of",
    "sync_interval": DURATION,
    "sync_writes": "a whole number of at least 1, or None",
    "absolute_lifetime": LIFETIME,
    "node_timeout": "a number of seconds or a timedelta, from 0.001 to 60",
    "node_retry": WAIT,
    "node_retry_max": WAIT,
    "sql_timeout": WAIT,
    "sql_concurrency": "a whole number of at least 1",
    "key_prefix": "at most 100 printable ASCII characters without whitespace",
    "table": "1 to 63 letters, digits and underscores",
    "bind_key": "a text that is not empty, or None",
    "schema": "a text that is not empty, or None",
    "create_table": "True or False",
    "max_bytes": "a whole number from 1024 to 1000000",
    "encrypt": "True or False",
    "on_unavailable": '"error" or "empty"',
    "user_key": "a text that is not empty",
    "regenerate_on_login": "True or False",
    "reap_grace": DURATION,
    "reap_probability": "a number from 0 to 1",
}

NO_NUMBER: list[Any] = [True, False, None, "", "none", "soon", "1s", [1], {}, b"1"]
NO_NUMBER += [NAN, INF, "nan", "-inf", 10**400, 1j]
NO_OPTIONAL_NUMBER = [v for v in NO_NUMBER if v not in (None, "", "none")]
NO_WAIT = [0, -1, 0.0009, timedelta(0), timedelta(seconds=-1), 86401, *NO_NUMBER]
NO_DURATION = [-1, -0.001, timedelta(seconds=-1), timedelta.max, 1e12, *NO_NUMBER]
NO_COUNT = [0, -1, 1.5, "1.5", timedelta(seconds=1), INF, NAN]
NO_FLAG: list[Any] = [None, "", "none", "yes", "on", 2, -1, 0.0, 1.0, [], "truee"]
NO_TEXT: list[Any] = [True, False, [], {}, b"a"]

DURATIONS = [
    (0, 0.0),
    (7, 7.0),
    (0.5, 0.5),
    ("7", 7.0),
    (" 0.5 ", 0.5),
    (timedelta(minutes=2, milliseconds=5), 120.005),
    (CENTURIES, CENTURIES),
]
WAITS = [
    (0.001, 0.001),
    (2, 2.0),
    ("0.25", 0.25),
    (timedelta(milliseconds=20), 0.02),
    (20.0, 20.0),
]
FLAGS = [
    *[(word, True) for word in (True, 1, "1", "true", "True", "TRUE", " true ")],
    *[(word, False) for word in (False, 0, "0", "false", "False", "FALSE")],
]
NONES = [(word, None) for word in (None, "", " ", "none", "None", "NULL")]
TEXTS = [("other", "other"), (5, "5"), (2.5, "2.5")]

#: Key -> (value, what it becomes).
VALID: dict[str, list[tuple[Any, Any]]] = {
    "nodes": [
        (None, ()),
        ("", ()),
        ("a", (NodeSettings("a:11211", "inet:a:11211", 1.0, "a"),)),
        (["[::1]:1"], (NodeSettings("[::1]:1", "inet6:[::1]:1", 1.0, "::1"),)),
        (
            ({"address": "unix:/m", "weight": 2},),
            (NodeSettings("unix:/m", "unix:/m", 2.0, "localhost"),),
        ),
    ],
    "sync_interval": DURATIONS,
    "sync_writes": [*NONES, (1, 1), ("10", 10), (10.0, 10), (10**6, 10**6)],
    "absolute_lifetime": [*NONES, (86400, 86400.0), ("0.001", 0.001), *DURATIONS[1:]],
    "node_timeout": [*WAITS, (60, 60.0)],
    "node_retry": WAITS,
    "node_retry_max": [(1, 1.0), (86400, 86400.0), (timedelta(minutes=1), 60.0)],
    "sql_timeout": [*WAITS, (86400, 86400.0)],
    "sql_concurrency": [(1, 1), ("16", 16), (1000, 1000)],
    "key_prefix": [*TEXTS, ("", ""), ("none", "none"), ("a" * 100, "a" * 100)],
    "table": [*TEXTS[:2], ("T_1", "T_1"), ("t" * 63, "t" * 63)],
    "bind_key": [*TEXTS, *NONES],
    "schema": [*TEXTS, *NONES, ("my-db.dbo", "my-db.dbo")],
    "create_table": FLAGS,
    "max_bytes": [(1024, 1024), (1_000_000, 1_000_000), ("4096", 4096)],
    "encrypt": FLAGS,
    "on_unavailable": [("error", "error"), ("empty", "empty")],
    "user_key": [*TEXTS, ("none", "none")],
    "regenerate_on_login": FLAGS,
    "reap_grace": DURATIONS,
    "reap_probability": [(0, 0.0), (1, 1.0), (0.25, 0.25), ("0.25", 0.25)],
}

#: Key -> values that are refused.
INVALID: dict[str, list[Any]] = {
    "nodes": [5, True, {"address": "a"}],
    "sync_interval": NO_DURATION,
    "sync_writes": [*NO_COUNT, *NO_OPTIONAL_NUMBER],
    "absolute_lifetime": [0, -1, timedelta(0), 1e12, *NO_OPTIONAL_NUMBER],
    "node_timeout": [*NO_WAIT, 60.1],
    "node_retry": NO_WAIT,
    "node_retry_max": NO_WAIT,
    "sql_timeout": NO_WAIT,
    "sql_concurrency": [*NO_COUNT, *NO_NUMBER],
    "key_prefix": [None, "a b", "a\n", "\x7f", "é", "a" * 101, *NO_TEXT],
    "table": [None, "", "a.b", "a-b", "a b", "a\n", "é", "t" * 64, 2.5, *NO_TEXT],
    "bind_key": NO_TEXT,
    "schema": NO_TEXT,
    "create_table": NO_FLAG,
    "max_bytes": [1023, 1_000_001, 2048.5, timedelta(seconds=2048), *NO_NUMBER],
    "encrypt": NO_FLAG,
    "on_unavailable": [None, "", "Error", "raise", True, 0, [], ["error"]],
    "user_key": [None, "", *NO_TEXT],
    "regenerate_on_login": NO_FLAG,
    "reap_grace": NO_DURATION,
    "reap_probability": [-0.1, 1.1, timedelta(0), *NO_NUMBER],
}


def load(**values: Any) -> Settings:
    """The settings from values given by field name."""
    return load_settings({full(name): value for name, value in values.items()})


def full(field: str) -> str:
    """The full key of a field."""
    return f"RESILIENT_SESSION_{field.upper()}"


def refused(settings: Mapping[str, Any]) -> ConfigurationError:
    """The error for a configuration that is refused."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(settings)
    return caught.value


def test_one_field_for_each_key() -> None:
    """Settings, keys and this file's tables list the same names."""
    names = [field.name for field in fields(Settings)]
    assert list(CONFIG_KEYS) == [full(name) for name in names]
    for table in (DEFAULTS, ALLOWED, VALID, INVALID):
        assert list(table) == names


@pytest.mark.parametrize("field", DEFAULTS)
def test_default(field: str) -> None:
    """A key that is not set has its documented default, of its proper type."""
    value = getattr(load_settings({}), field)
    assert value == DEFAULTS[field]
    assert type(value) is type(DEFAULTS[field])


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_listed_default(key: str) -> None:
    """Setting a key to its listed default changes nothing."""
    assert load_settings({key: CONFIG_KEYS[key]}) == load_settings({})


def test_listed_defaults_are_documented_values() -> None:
    """The listed defaults are those of the documentation."""
    assert CONFIG_KEYS["RESILIENT_SESSION_NODES"] == []
    for field, default in DEFAULTS.items():
        if field != "nodes":
            assert CONFIG_KEYS[full(field)] == default


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [(field, *pair) for field, pairs in VALID.items() for pair in pairs],
)
def test_valid(field: str, value: object, expected: object) -> None:
    """Every allowed form of a value is read, and gives the type of its field."""
    found = getattr(load(**{field: value}), field)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in INVALID.items() for value in values],
)
def test_invalid(field: str, value: object) -> None:
    """A value that is refused gives an error with key, value and what is allowed."""
    error = refused({full(field): value})
    assert f"{full(field)} = {value!r} is not allowed" in str(error)
    assert ALLOWED[field] in str(error)
    assert error.key == full(field)
    assert error.value is value


@pytest.mark.parametrize("field", INVALID)
def test_foreign_type(field: str) -> None:
    """An object of a foreign type is refused by every key."""
    value = object()
    assert repr(value) in str(refused({full(field): value}))


def test_node_errors_name_the_entry() -> None:
    """A bad node is shown itself, not the whole list."""
    error = refused({"RESILIENT_SESSION_NODES": ["a:1", "b:0"]})
    assert "RESILIENT_SESSION_NODES = 'b:0' is not allowed" in str(error)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("RESILIENT_SESSION_NODE", "RESILIENT_SESSION_NODES"),
        ("RESILIENT_SESSION_SYNC_INTERVALL", "RESILIENT_SESSION_SYNC_INTERVAL"),
        ("RESILIENT_SESSION_BINDKEY", "RESILIENT_SESSION_BIND_KEY"),
        ("RESILIENT_SESSION_LIFETIME", "RESILIENT_SESSION_ABSOLUTE_LIFETIME"),
    ],
)
def test_misspelt_key(key: str, meant: str) -> None:
    """An unknown key is an error that shows it and suggests the closest one."""
    error = refused({key: "x7"})
    assert f"{key} = 'x7' is not allowed" in str(error)
    assert f"perhaps {meant}." in str(error)


@pytest.mark.parametrize("key", ["RESILIENT_SESSION_", "RESILIENT_SESSION_QQQ"])
def test_unknown_key(key: str) -> None:
    """An unknown key that resembles none is an error that lists those that exist."""
    text = str(refused({key: 1}))
    assert f"{key} = 1 is not allowed" in text
    assert all(known in text for known in CONFIG_KEYS)


def test_other_keys_are_ignored() -> None:
    """Keys of Flask and of other extensions are not looked at."""
    others = {"SECRET_KEY": object(), "SESSION_TYPE": 1, "resilient_session_x": 1}
    assert load_settings(others) == load_settings({})


def test_any_mapping() -> None:
    """Settings are read from any mapping, which stays as it is."""
    values = {f"{PREFIX}NODES": ["a"], f"{PREFIX}SYNC_WRITES": 1}
    settings = load_settings(MappingProxyType(values))
    assert settings.sync_writes == 1
    assert values == {f"{PREFIX}NODES": ["a"], f"{PREFIX}SYNC_WRITES": 1}


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"node_retry": 5, "node_retry_max": 4.5}, "4.5"),
        ({"node_retry": 60}, "30.0"),
    ],
)
def test_retry_bounds(values: dict[str, Any], shown: str) -> None:
    """The longest pause before a probe is not below the first."""
    with pytest.raises(ConfigurationError) as caught:
        load(**values)
    text = str(caught.value)
    assert f"RESILIENT_SESSION_NODE_RETRY_MAX = {shown} is not allowed" in text
    assert f"RESILIENT_SESSION_NODE_RETRY, which is {values['node_retry']}" in text


def test_retry_bounds_may_be_equal() -> None:
    """The first pause before a probe may be the longest."""
    settings = load(node_retry=60, node_retry_max=timedelta(minutes=1))
    assert settings.node_retry == settings.node_retry_max == 60.0


def test_settings_are_frozen_values() -> None:
    """Settings cannot be changed, and equal ones are one key of a dict."""
    settings = load(nodes="a,b")
    assert len({settings, load(nodes=["a", "b"])}) == 1
    with pytest.raises(FrozenInstanceError):
        settings.sync_writes = 1  # type: ignore[misc]


def test_node_order_changes_no_node() -> None:
    """The nodes of a list are the same nodes in another order."""
    one, two = load(nodes="a,b,c"), load(nodes="c,a,b")
    assert set(one.nodes) == set(two.nodes)


def from_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> Settings:
    """The settings of a Flask app whose environment holds these variables."""
    for name in list(os.environ):
        if name.startswith("FLASK_"):
            monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(f"FLASK_{full(name)}", value)
    app = Flask(__name__)
    app.config.from_prefixed_env()
    return load_settings(app.config)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("nodes", "a,[::1]:2", ("a:11211", "[::1]:2")),
        ("nodes", '["a", {"address": "b", "name": "n"}]', ("a:11211", "n")),
        ("nodes", "", ()),
        ("nodes", "None", ()),
        ("nodes", "null", ()),
        ("nodes", "[]", ()),
        ("sync_interval", "30", 30.0),
        ("sync_interval", "1.5", 1.5),
        ("sync_interval", '"30"', 30.0),
        ("sync_writes", "10", 10),
        ("sync_writes", "", None),
        ("sync_writes", "None", None),
        ("absolute_lifetime", "null", None),
        ("absolute_lifetime", "3600", 3600.0),
        ("sql_concurrency", "4", 4),
        ("key_prefix", "5", "5"),
        ("key_prefix", "shop:", "shop:"),
        ("table", "2024", "2024"),
        ("bind_key", "None", None),
        ("bind_key", "sessions", "sessions"),
        ("schema", "", None),
        ("create_table", "False", False),
        ("create_table", "false", False),
        ("create_table", "0", False),
        ("create_table", "TRUE", True),
        ("encrypt", "False", False),
        ("encrypt", "True", True),
        ("max_bytes", "4096", 4096),
        ("on_unavailable", "empty", "empty"),
        ("user_key", "7", "7"),
        ("regenerate_on_login", "false", False),
        ("reap_probability", "0.01", 0.01),
    ],
)
def test_environment(
    monkeypatch: pytest.MonkeyPatch, field: str, value: str, expected: object
) -> None:
    """A variable of the environment is read as the same value in Python is."""
    found = getattr(from_environment(monkeypatch, **{field: value}), field)
    if field == "nodes":
        found = tuple(node.name for node in found)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("nodes", "11211", "11211"),
        ("sync_writes", "0", "0"),
        ("sync_writes", "true", "True"),
        ("sync_interval", "NaN", "nan"),
        ("sync_interval", "Infinity", "inf"),
        ("sync_interval", "2 minutes", "'2 minutes'"),
        ("sync_interval", "", "''"),
        ("create_table", "no", "'no'"),
        ("create_table", "null", "None"),
        ("table", "true", "True"),
        ("sync_intervall", "1", "1"),
    ],
)
def test_bad_environment(
    monkeypatch: pytest.MonkeyPatch, field: str, value: str, shown: str
) -> None:
    """A bad variable of the environment is an error that names the key."""
    with pytest.raises(ConfigurationError) as caught:
        from_environment(monkeypatch, **{field: value})
    assert f"{full(field)} = {shown} is not allowed" in str(caught.value)


def test_flask_defaults() -> None:
    """An untouched Flask app has the default settings."""
    app = Flask(__name__)
    assert load_settings(app.config) == load_settings({})


def test_timing_of_the_defaults() -> None:
    """Under Flask's lifetime of 31 days no interval is reduced."""
    app = Flask(__name__)
    assert load_settings({}).timing(app.permanent_session_lifetime) == Timing(
        lifetime_ms=31 * 86_400_000,
        absolute_ms=None,
        sync_ms=120_000,
        sync_writes=None,
        reap_grace_ms=60_000,
    )


def test_timing_of_every_setting() -> None:
    """Every duration arrives in milliseconds, the count as it is."""
    settings = load(
        absolute_lifetime=timedelta(hours=8),
        sync_interval=0.5,
        sync_writes=10,
        reap_grace=timedelta(days=1),
    )
    assert settings.timing(timedelta(minutes=1)) == Timing(
        lifetime_ms=60_000,
        absolute_ms=28_800_000,
        sync_ms=500,
        sync_writes=10,
        reap_grace_ms=86_400_000,
    )


@pytest.mark.parametrize(
    ("lifetime", "sync_ms"),
    [
        (timedelta(seconds=1200), 120_000),
        (timedelta(seconds=1199), 119_900),
        (timedelta(seconds=1), 100),
        (timedelta(milliseconds=7), 1),
        (timedelta(milliseconds=1), 1),
    ],
)
def test_reductions(lifetime: timedelta, sync_ms: int) -> None:
    """The sync interval is at most a tenth of the lifetime, and never 0."""
    timing = load_settings({}).timing(lifetime)
    assert (timing.sync_ms, timing.slack_ms) == (sync_ms, sync_ms)


@pytest.mark.parametrize(
    ("lifetime", "slack_ms"), [(86_400, 60_000), (600, 60_000), (30, 3000), (0.001, 1)]
)
def test_zero_stays_zero(lifetime: float, slack_ms: int) -> None:
    """An interval of 0 keeps its meaning; uses are recorded all the same."""
    timing = load(sync_interval=0, reap_grace=0).timing(lifetime)
    assert (timing.sync_ms, timing.reap_grace_ms) == (0, 0)
    assert timing.slack_ms == slack_ms


def test_tiny_is_not_zero() -> None:
    """An interval below a millisecond does not turn into 0, which means another."""
    assert load(sync_interval=0.0001).timing(60).sync_ms == 1


@pytest.mark.parametrize("seconds", [3600, 3600.0, timedelta(hours=1)])
def test_lifetime_forms(seconds: timedelta | float) -> None:
    """The lifetime is a timedelta or a number of seconds."""
    assert load_settings({}).timing(seconds).lifetime_ms == 3_600_000


@pytest.mark.parametrize(
    "lifetime",
    [0, -1, 0.0001, NAN, INF, timedelta(0), timedelta(days=-1), timedelta.max],
)
def test_bad_lifetime(lifetime: timedelta | float) -> None:
    """A lifetime that is not positive, or without an end, names Flask's key."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings({}).timing(lifetime)
    assert f"PERMANENT_SESSION_LIFETIME = {lifetime!r}" in str(caught.value)
    assert "a number of seconds or a timedelta, from 0.001" in str(caught.value)


def test_timing_is_remembered() -> None:
    """The same lifetime gives the same object, and another lifetime another."""
    settings, lifetime = load(sync_interval=33), timedelta(hours=2)
    assert settings.timing(lifetime) is settings.timing(timedelta(hours=2))
    assert settings.timing(timedelta(seconds=8)).sync_ms == 800
    assert load(sync_interval=34).timing(lifetime).sync_ms == 34_000


def test_whole_milliseconds() -> None:
    """Durations in milliseconds are ints, rounded to the nearest one."""
    timing = load(sync_interval=1.001, reap_grace=0.139).timing(3600)
    assert (timing.sync_ms, timing.reap_grace_ms) == (1001, 139)
    assert type(timing.sync_ms) is int
