"""Session ids: made of chance alone, believed only when signed, written nowhere."""

from __future__ import annotations

import base64
import copy
import json
import logging
import pickle
import secrets
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from flask import session
from itsdangerous import Signer

from apps import NOTHING, Site, Sites, TimeMachine, key_of
from flask_resilient_session import events, interface
from flask_resilient_session import session as session_module
from flask_resilient_session.cookie import CookieSigner
from servers import Memcached

SIGNALS = [
    *(events.session_created, events.session_regenerated, events.session_revoked),
    *(events.session_expired, events.session_recovered, events.session_conflict),
    *(events.node_down, events.node_up),
]


@pytest.fixture
def sites(nodes: list[Memcached], tmp_path: Path) -> Iterator[Sites]:
    """Applications on two nodes."""
    with Sites(nodes, tmp_path) as made:
        yield made


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults."""
    return sites()


# --- where ids come from ---------------------------------------------------------


def test_an_id_is_256_bits_of_the_systems_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of an id is what ``secrets`` gives for 32 bytes, unchanged."""
    asked: list[int | None] = []

    def token(size: int | None = None) -> str:
        asked.append(size)
        return "T" * 43

    monkeypatch.setattr(session_module.secrets, "token_urlsafe", token)
    assert session_module.new_sid() == "T" * 43
    assert asked == [32]


def test_ids_do_not_repeat_and_use_every_bit() -> None:
    """Among 2,000 ids none is twice there, and each bit is set about half the time."""
    ids = [session_module.new_sid() for _ in range(2000)]
    assert len(set(ids)) == 2000
    raw = [int.from_bytes(base64.urlsafe_b64decode(i + "="), "big") for i in ids]
    for bit in range(256):
        assert 800 < sum(number >> bit & 1 for number in raw) < 1200


# --- which are believed ----------------------------------------------------------

SID = "A" * 43
MALFORMED = [
    f"{SID[:-1]}.{SID}",
    f"{SID}.{SID}=",
    f"{SID}-{SID}",
    f"{SID[:-1]}\n.{SID}",
    f"{SID[:-1]}..{SID}",
    f"{SID[:-1]} .{SID}",
    f"{SID[:-1]}%.{SID}",
    f"{SID[:-1]}/.{SID}",
    f"{SID}.{SID[:-1]}+",
    f"{SID}.{SID[:-1]}é",
    "\uff11" * 43 + f".{SID}",
    "\x00" * 87,
]


@pytest.mark.parametrize("value", MALFORMED)
def test_the_format_is_checked_before_anything_else(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has not the exact shape of a cookie is not even compared with a key."""
    signer = CookieSigner(["a key"])

    def never(*_: object) -> Any:
        raise AssertionError("a malformed cookie was verified")

    monkeypatch.setattr(Signer, "unsign", never)
    monkeypatch.setattr(Signer, "verify_signature", never)
    assert signer.unsign(value) is None


def signed_by(secret: str, **changes: Any) -> str:
    """An id signed as ours are but for these changes."""
    options = dict(CookieSigner([secret])._signer.__dict__)
    return (
        Signer(
            secret,
            salt=changes.get("salt", options["salt"]),
            key_derivation=changes.get("derivation", "hmac"),
            digest_method=changes.get("digest", options["digest_method"]),
        )
        .sign(SID)
        .decode()
    )


def test_the_right_signature_is_believed() -> None:
    """The helper of the next test signs as we do, so that it tests something."""
    assert CookieSigner(["a key"]).unsign(signed_by("a key")) == SID


@pytest.mark.parametrize(
    "cookie",
    [
        signed_by("another key"),
        signed_by("a key", salt="cookie-session"),
        signed_by("a key", salt=b"itsdangerous.Signer"),
        signed_by("a key", derivation="django-concat"),
        signed_by("a key")[:-1],
        signed_by("a key") + "A",
        signed_by("a key").replace("A", "B", 1),
        signed_by("a key")[::-1],
    ],
)
def test_other_keys_salts_and_shapes_cost_nothing(sites: Sites, cookie: str) -> None:
    """Forged or tampered: no memcached and no SQL operation, and an empty session."""
    site = sites(SECRET_KEY="a key")
    site.set(a=1)
    before = [node.command_counts() for node in site.nodes]
    browser = site.browser_with(cookie)
    assert site.cost(lambda: site.data(browser)) == NOTHING
    assert site.data(browser) == {}
    assert [node.command_counts() for node in site.nodes] == before


def test_an_old_key_is_believed_while_it_is_a_fallback(sites: Sites) -> None:
    """A rotated key's cookies work until the key is dropped; then they are foreign."""
    site = sites(SECRET_KEY="old")
    site.set(a=1)
    cookie = site.cookie()
    site.app.config.update(SECRET_KEY="new", SECRET_KEY_FALLBACKS=["old"])
    assert site.data(site.browser_with(cookie)) == {"a": 1}
    site.app.config.update(SECRET_KEY_FALLBACKS=[])
    assert site.cost(lambda: site.data(site.browser_with(cookie))) == NOTHING


def test_a_well_signed_unknown_id_is_never_adopted(site: Site) -> None:
    """Somebody who can sign, or kept a reaped cookie, cannot choose a session's id."""
    sid = secrets.token_urlsafe(32)
    browser = site.browser_with(site.signer.sign(sid))
    assert site.data(browser) == {}
    site.set(browser, _user_id="7")
    assert site.sid(browser) != sid
    assert key_of(sid) not in site.rows()
    for node in site.nodes:
        noted = node.raw_get("session:" + key_of(sid))
        assert noted is None or b"_user_id" not in noted
    assert site.data(site.browser_with(site.signer.sign(sid))) == {}


def test_an_id_in_the_address_or_a_form_means_nothing(site: Site) -> None:
    """Ids come in by the cookie only."""
    site.set(a=1)
    cookie = str(site.cookie())
    stranger = site.app.test_client()
    assert stranger.get("/", query_string={"session": cookie}).json == {}
    site.visit(lambda: dict(session))
    assert stranger.post("/visit", data={"session": cookie}).json == {}
    header = {"Authorization": f"Bearer {cookie}", "X-Session": cookie}
    assert stranger.get("/", headers=header).json == {}


# --- where they are written ------------------------------------------------------


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
        result = self.site.app.test_cli_runner().invoke(args=args)
        self.texts += [result.output, repr(result.exception)]

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
    said.visit(lambda: site.state.interface.trace(session._get_current_object()))  # type: ignore[attr-defined]
    said.visit(lambda: site.state.interface.copies(session._get_current_object()))  # type: ignore[attr-defined]
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
        with site.app.app_context(), suppress(ZeroDivisionError):
            try:
                site.sessions.revoke_user("bob")
            except Exception as error:  # noqa: BLE001
                said.failed(error)
        site.nodes[1].kill()
        said.visit(lambda: session.update(e=5))
    site.nodes[0].restart()
    site.nodes[1].restart()


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
    with listening(said, monkeypatch):
        live_through(site, said, monkeypatch)
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
    assert "UPDATE" in text
    assert "600" in text
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
