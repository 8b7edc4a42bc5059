"""Session ids: made of chance alone, and believed only when signed."""

from __future__ import annotations

import base64
import secrets
from typing import Any

import pytest
from flask import session
from itsdangerous import Signer

from apps import NOTHING, Site, Sites, key_of
from flask_resilient_session.web import session as session_module
from flask_resilient_session.web.cookie import CookieSigner


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
