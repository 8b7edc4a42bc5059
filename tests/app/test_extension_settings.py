"""What init_app refuses, and settings from elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flask_sqlalchemy import SQLAlchemy

from apps import BareApps, Site, Sites, TimeMachine, works
from flask_resilient_session import (
    ConfigurationError,
    ResilientSession,
    ResilientSessionError,
    SetupError,
)
from servers import Memcached

TABLE = "resilient_sessions"


@pytest.fixture
def apps(nodes: list[Memcached], tmp_path: Path) -> Iterator[BareApps]:
    """Applications that the tests set up."""
    with BareApps(nodes, tmp_path) as made:
        yield made


# --- what is refused -------------------------------------------------------------


def test_twice_is_an_error_with_a_remedy(apps: BareApps) -> None:
    """Initialising an application a second time, by whichever object."""
    app = apps()
    sessions = ResilientSession(app, SQLAlchemy(app))
    for again in (sessions, ResilientSession()):
        with pytest.raises(SetupError, match="once"):
            again.init_app(app)
    works(app)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("RESILIENT_SESSION_SYNC_WRITES", 0),
        ("RESILIENT_SESSION_NODE_TIMEOUT", -1),
        ("RESILIENT_SESSION_NODES", "a:1,a:1"),
        ("RESILIENT_SESSION_ON_UNAVAILABLE", "maybe"),
        ("RESILIENT_SESSION_NODE", "a:1"),
        ("PERMANENT_SESSION_LIFETIME", timedelta(0)),
    ],
)
def test_a_wrong_setting_is_refused_at_once(
    apps: BareApps, key: str, value: object
) -> None:
    """The text names key and value; the application is left as it was."""
    app = apps(**{key: value})
    interface = app.session_interface
    with pytest.raises(ConfigurationError, match=key) as caught:
        ResilientSession(app)
    assert isinstance(caught.value, ResilientSessionError)
    assert "is not allowed: use" in str(caught.value)
    assert "resilient_session" not in app.extensions
    assert app.session_interface is interface


def test_settings_freeze_at_init_app(apps: BareApps) -> None:
    """RESILIENT_SESSION_* changed later have no effect."""
    app = apps()
    ResilientSession(app, SQLAlchemy(app))
    app.config["RESILIENT_SESSION_KEY_PREFIX"] = "other:"
    app.config["RESILIENT_SESSION_TABLE"] = "other"
    works(app)
    assert app.extensions["resilient_session"].settings.key_prefix == "session:"


def test_a_db_that_was_never_initialised_is_explained(apps: BareApps) -> None:
    """The error says which call is missing."""
    app = apps(TESTING=True)
    ResilientSession(app, SQLAlchemy())
    with pytest.raises(SetupError, match=r"db\.init_app\(app\)"):
        app.test_client().get("/set/_user_id")


def test_an_unknown_bind_key_is_explained(apps: BareApps) -> None:
    """The error names the setting and the binds there are."""
    app = apps(TESTING=True, RESILIENT_SESSION_BIND_KEY="nowhere")
    ResilientSession(app, SQLAlchemy(app))
    with pytest.raises(SetupError, match=r"BIND_KEY.*nowhere"):
        app.test_client().get("/set/_user_id")


def test_a_bind_key_without_flask_sqlalchemy_is_explained(apps: BareApps) -> None:
    """It would be ignored in silence, and sessions be in another database."""
    app = apps(TESTING=True, RESILIENT_SESSION_BIND_KEY="other")
    ResilientSession(app)
    with pytest.raises(SetupError, match="RESILIENT_SESSION_BIND_KEY"):
        app.test_client().get("/set/_user_id")


def test_outside_of_an_application_it_says_so(apps: BareApps) -> None:
    """The extension object's methods are about the current application."""
    app = apps()
    sessions = ResilientSession()
    with app.app_context(), pytest.raises(SetupError, match="init_app"):
        _ = sessions.stats


# --- other settings --------------------------------------------------------------


def test_settings_may_come_from_the_environment(
    apps: BareApps, nodes: list[Memcached], monkeypatch: pytest.MonkeyPatch
) -> None:
    """app.config.from_prefixed_env(), with its JSON and its leftovers of text."""
    addresses = [node.address for node in nodes]
    for key, value in {
        "NODES": ",".join(addresses),
        "CREATE_TABLE": "True",
        "SYNC_WRITES": "None",
        "ENCRYPT": "false",
        "KEY_PREFIX": "42",
        "NODE_TIMEOUT": "0.5",
    }.items():
        monkeypatch.setenv(f"FLASK_RESILIENT_SESSION_{key}", value)
    app = apps()
    del app.config["RESILIENT_SESSION_NODES"]
    app.config.from_prefixed_env()
    ResilientSession(app, SQLAlchemy(app))
    works(app)
    settings = app.extensions["resilient_session"].settings
    assert [node.name for node in settings.nodes] == addresses
    assert settings.key_prefix == "42"
    assert settings.sync_writes is None
    assert settings.node_timeout == 0.5
    assert all(any(k.startswith("42") for k in node.keys()) for node in nodes)  # noqa: SIM118


def test_json_nodes_from_the_environment(
    apps: BareApps, nodes: list[Memcached], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JSON list of mappings gives names, weights and zones."""
    spec = [
        {"name": f"n{i}", "address": node.address, "weight": i + 1, "zone": f"z{i}"}
        for i, node in enumerate(nodes)
    ]
    monkeypatch.setenv("FLASK_RESILIENT_SESSION_NODES", json.dumps(spec))
    app = apps()
    app.config.from_prefixed_env()
    ResilientSession(app, SQLAlchemy(app))
    works(app)


def test_one_node_writes_through_and_asks_sql(
    sites: Sites, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy without a second opinion is not trusted; every change is in SQL."""
    sites()
    assert caplog.messages == []
    sites.nodes = sites.nodes[:1]
    site = sites()
    (warning,) = caplog.messages
    assert "RESILIENT_SESSION_NODES" in warning
    assert "SQL is asked and told at each request" in warning
    site.set(a=1)
    site.data()
    for n in range(3):
        assert site.cost(lambda n=n: site.set(n=n)).statements >= 2
    assert site.cost(site.data).statements == 1
    for node in sites.nodes:
        node.flush()
    assert site.data() == {"a": 1, "n": 2}


def test_requests_reap_now_and_then(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REAP_PROBABILITY: a small batch after the response, for sites without cron."""
    clock = TimeMachine(monkeypatch)
    site = sites(RESILIENT_SESSION_REAP_PROBABILITY=1.0)
    site.set(_user_id="1")
    assert len(site.rows()) == 1
    clock.forward(site.app.permanent_session_lifetime.total_seconds() + 10_000)
    with site.app.test_client().get("/plain") as response:
        assert response.text == "plain"
    assert site.rows() == {}


def test_reaping_after_a_response_holds_no_worker(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement of it takes as long as a request may wait, not as a command may."""
    site = sites(RESILIENT_SESSION_REAP_PROBABILITY=1.0)
    settings, allowed = site.state.settings, []
    real = site.state.sql.page_expired

    def page_expired(*args: Any) -> Any:
        allowed.append(args[-1] - time.monotonic())
        return real(*args)

    monkeypatch.setattr(site.state.sql, "page_expired", page_expired)
    with site.app.test_client().get("/plain"):
        pass
    waits = settings.node_timeout + settings.sql_timeout
    assert [0 < seconds <= waits for seconds in allowed] == [True]


def test_reap_is_a_method_too(sites: Sites) -> None:
    """sessions.reap() does one pass over the current application's table."""
    site: Site = sites()
    with site.app.app_context():
        report = site.sessions.reap(limit=5)
        assert site.sessions.stats["created"] == 0
    assert (report.examined, report.failed, report.aborted) == (0, None, None)
