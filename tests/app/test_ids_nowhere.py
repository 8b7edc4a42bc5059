"""No id is written anywhere but into its cookie, whatever goes wrong."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import session
from werkzeug.exceptions import HTTPException

from apps import Site, Sites, TimeMachine, command_runner, key_of
from flask_resilient_session.common import events
from flask_resilient_session.web import interface
from flask_resilient_session.web import session as session_module
from servers import wait_until

SIGNALS = [
    *(events.session_created, events.session_regenerated, events.session_revoked),
    *(events.session_expired, events.session_recovered, events.session_conflict),
    *(events.node_down, events.node_up),
]
SID = "A" * 43


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults."""
    return sites()


class Unserialisable:
    """A value that no session can keep."""


class Collector:
    """Everything that an application says while a test runs."""

    def __init__(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        self.site = site
        self.texts: list[str] = []
        self.ids: set[str] = set()
        self._caplog = caplog
        real = session_module.new_sid

        def noted() -> str:
            sid = real()
            self.ids.add(sid)
            return sid

        self.noted = noted

    def heard(self, sender: object, **fields: object) -> None:
        """A signal's receiver."""
        self.texts.append(repr(fields))

    def failed(self, error: BaseException) -> None:
        """Keep all that an exception and its causes say."""
        seen: BaseException | None = error
        while seen is not None:
            self.texts += [str(seen), repr(seen), repr(seen.args), repr(vars(seen))]
            seen = seen.__cause__ or seen.__context__
        self.texts += traceback.format_exception(error)

    def visit(self, action: Any, **kwargs: Any) -> None:
        """A request; its page counts, its cookie does not, its errors are kept."""

        def acting() -> str:
            try:
                done = action()
            except Exception as error:
                self.failed(error)
                raise
            shown = repr(session), str(session), repr(vars(session).get("visit"))
            return f"{done} {shown}"

        try:
            response = self.site.visit(acting, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at
            self.failed(error)
        else:
            self.texts.append(response.text)
            others = [h for h in response.headers if h[0] != "Set-Cookie"]
            self.texts.append(repr(others))

    def run(self, *args: str) -> None:
        """A command."""
        result = command_runner(self.site.app).invoke(args=args)
        self.texts += [result.stdout, result.stderr, repr(result.exception)]

    def stored(self) -> None:
        """Keep all that nodes and SQL hold."""
        for node in self.site.nodes:
            for key in node.keys():  # noqa: SIM118 - not a dict
                value = node.raw_get(key) or b""
                self.texts += [key, value.decode("latin-1")]
        for row in self.site.rows().values():
            self.texts.append((row.record or b"").decode("latin-1"))
            self.texts.append(repr(row))

    def everything(self) -> str:
        """All of it, with the log and the counters."""
        for record in self._caplog.records:
            self.texts += [record.getMessage(), repr(record.args)]
            if record.exc_info and record.exc_info[1]:
                self.failed(record.exc_info[1])
        self.texts += [self._caplog.text, repr(dict(self.site.state.observer.stats))]
        return "\n".join(self.texts)


@contextmanager
def listening(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every signal heard, every id noted."""
    monkeypatch.setattr(session_module, "new_sid", collector.noted)
    monkeypatch.setattr(interface, "new_sid", collector.noted)
    for signal in SIGNALS:
        signal.connect(collector.heard)
    try:
        yield
    finally:
        for signal in SIGNALS:
            signal.disconnect(collector.heard)


def live_through(site: Site, said: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Visits, logins and logouts, and every fault that a request can meet."""
    said.visit(lambda: session.update(a=1))
    said.visit(lambda: session.update(_user_id="alice"))
    said.visit(lambda: repr(site.sessions.inspect(session)))
    said.visit(lambda: session.update(big=b"x" * 600_000))
    said.visit(lambda: session.update(odd=Unserialisable()))
    said.visit(lambda: 1 // 0)
    said.visit(lambda: session.regenerate())  # type: ignore[attr-defined]
    said.run("revoke-sessions", "--user", "alice", "--yes")
    said.visit(lambda: session.update(_user_id="bob"))
    twin = site.browser_with(site.cookie())
    said.visit(lambda: site.set(twin, b=1) and session.update(b=2))
    with site.app.app_context():
        said.texts.append(repr(site.sessions.sessions_of("bob")))
    site.nodes[0].kill()
    said.visit(lambda: session.update(c=3))
    with monkeypatch.context() as broken:
        site.break_sql(broken)
        said.visit(lambda: session.update(_user_id="carol"))
        said.visit(lambda: session.update(d=4))
        said.run("revoke-sessions", "--all", "--yes")
        said.run("reap-sessions", "--json")
        with site.app.app_context():
            try:
                site.sessions.revoke_user("bob")
            except Exception as error:  # noqa: BLE001
                said.failed(error)
        site.nodes[1].kill()
        said.visit(lambda: session.update(e=5))
    site.nodes[0].restart()
    site.nodes[1].restart()


def is_well(site: Site) -> bool:
    """Whether a visitor can log in, with both homes."""
    visitor = site.browser_with(None)
    response = site.visit(lambda: session.update(_user_id="erin"), browser=visitor)
    suspects = site.state.store.homes.cluster.suspects()
    return response.status_code == 200 and not suspects


def test_raw_ids_are_nowhere_but_in_cookies(
    sites: Sites,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """No log, error, signal, page, command, item, row or archive line has an id."""
    caplog.set_level(logging.DEBUG)
    # As SQLAlchemy's echo does it; on whatever engine the extension makes.
    caplog.set_level(logging.DEBUG, "sqlalchemy.engine")
    caplog.set_level(logging.DEBUG, "sqlalchemy.pool")
    clock = TimeMachine(monkeypatch)
    site = sites(
        RESILIENT_SESSION_NODE_TIMEOUT=0.5, PROPAGATE_EXCEPTIONS=False, TESTING=False
    )
    said = Collector(site, caplog)

    @site.app.errorhandler(HTTPException)
    def page(error: HTTPException) -> HTTPException:
        said.failed(error)
        return error

    with listening(said, monkeypatch):
        live_through(site, said, monkeypatch)
        wait_until(lambda: is_well(site), what="nodes and SQL to be used again")
        clock.forward(1)
        said.visit(lambda: session.update(_user_id="dave"))
        said.stored()
        clock.forward(90 * 24 * 3600)
        archive = tmp_path / "archive.jsonl"
        said.run("reap-sessions", "--archive", str(archive), "--json")
    lines = archive.read_text().splitlines()
    assert lines, said.texts[-2:]
    assert all(json.loads(line)["session"] for line in lines)
    text = said.everything() + "\n".join(lines)
    assert len(said.ids) >= 5
    # What was to go wrong did, and left its words.
    for word in ("UPDATE", "SessionTooLarge", "SessionUnavailable", "Unserialisable"):
        assert word in text
    for word in ("is skipped for a while", "database is away", "previous", "reaped"):
        assert word in text
    assert not [sid for sid in said.ids if sid in text]


def test_a_copy_of_a_session_does_not_hold_its_id(site: Site) -> None:
    """What is pickled, copied or put into JSON is the data alone."""
    found: list[str] = []

    def action() -> None:
        current = session._get_current_object()  # type: ignore[attr-defined]
        copies = [copy.copy(current), copy.deepcopy(current), dict(current)]
        found.append(repr(copies) + repr(pickle.dumps(current)) + json.dumps(current))

    site.set(a=1)
    site.visit(action)
    assert site.sid() not in found[0]


def test_the_short_name_in_messages_does_not_lead_to_the_id() -> None:
    """Messages name a session by a part of its digest."""
    assert events.short(key_of(SID)) == key_of(SID)[:12]


def test_an_error_page_names_no_server(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a database's driver says goes to the log, and not to visitors."""
    site.set(a=1)
    site.data()
    site.break_sql(monkeypatch)
    response = site.visit(lambda: session.update(_user_id="alice"))
    assert response.status_code == 503
    assert "the database is away" not in response.text
    assert "the database is away" in caplog.text
