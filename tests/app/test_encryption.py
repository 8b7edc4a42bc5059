"""Sessions encrypted at rest: nothing readable in memcached or SQL."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, session

from apps import Site, Sites, item_of, key_of, make_app
from flask_resilient_session import ConfigurationError, ResilientSession
from flask_resilient_session.core import envelope
from flask_resilient_session.core.envelope import AES_GCM, PLAIN, Keyring
from flask_resilient_session.core.record import Record, Tombstone
from servers import Memcached

SECRET = "the plain text of a secret"
DATA = {"_user_id": "alice", "secret": SECRET}


@pytest.fixture
def site(sites: Sites) -> Site:
    """An application that encrypts, and a session in both homes and SQL."""
    site = sites(RESILIENT_SESSION_ENCRYPT=True)
    site.set(**DATA)
    site.data()
    return site


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without the library ``cryptography``."""
    envelope._aes_gcm.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    yield
    envelope._aes_gcm.cache_clear()


def stored(site: Site) -> list[bytes]:
    """The session's items and its row's record."""
    found = [node.raw_get(item_of(site.sid())) for node in site.nodes]
    return [*filter(None, found), site.rows()[key_of(site.sid())].record]


def other_worker(site: Site, sites: Sites, **config: Any) -> Site:
    """Another worker of the same application, and the same browser there."""
    other = sites(**config)
    other.browser = other.browser_with(site.cookie())
    return other


def test_nothing_readable_is_stored(site: Site, tmp_path: Path) -> None:
    """Neither values nor names of keys are in memory, in SQL or in SQL's file."""
    copies = stored(site)
    assert len(copies) == 3
    for data in copies:
        assert data[4] == AES_GCM
        for word in (SECRET, "secret", "alice", "_user_id"):
            assert word.encode() not in data
    assert site.data() == DATA
    assert SECRET.encode() not in (tmp_path / "app.db").read_bytes()


def test_without_the_setting_it_would_be_readable(sites: Sites) -> None:
    """The test above looks for what a plain record does show."""
    site = sites()
    site.set(**DATA)
    site.data()
    assert all(SECRET.encode() in data and data[4] == PLAIN for data in stored(site))


def test_the_users_column_stays_readable(site: Site) -> None:
    """Revocation needs it, so that the user's id is in SQL as it is."""
    assert site.rows()[key_of(site.sid())].user_id == "alice"


def test_equal_sessions_do_not_look_equal() -> None:
    """Two seals of one state differ, and each session has a key of its own."""
    keyring = Keyring(["a secret"], "test", encrypt=True)
    state = Record(created_ms=1)
    first, second = (keyring.seal("0" * 64, state) for _ in range(2))
    assert first != second
    assert keyring.unseal("0" * 64, first) == keyring.unseal("0" * 64, second) == state
    assert keyring.unseal("1" * 64, first) == envelope.CorruptBytes()


def test_every_bit_of_an_encrypted_record_counts() -> None:
    """A flipped bit anywhere gives nothing, and never an exception."""
    keyring = Keyring(["a secret"], "test", encrypt=True)
    data = keyring.seal("0" * 64, Tombstone("ended", 1))
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        opened = keyring.unseal("0" * 64, bytes(changed))
        assert isinstance(opened, (envelope.CorruptBytes, envelope.UnknownFormat))
    for length in range(len(data)):
        assert isinstance(
            keyring.unseal("0" * 64, data[:length]), envelope.CorruptBytes
        )


@pytest.mark.parametrize("body", [b"", b"short", b"x" * 12, b"x" * 100])
def test_a_sealed_body_that_does_not_decrypt_is_corrupt(body: bytes) -> None:
    """Unsealing never raises, even where a good MAC is over bytes of no cipher."""
    keyring = Keyring(["a secret"], "test", encrypt=True)
    header = keyring._header
    data = header + keyring._mac(header, "0" * 64, body) + body
    assert keyring.unseal("0" * 64, data) == envelope.CorruptBytes()


def test_plain_records_are_read_and_sealed_encrypted(sites: Sites) -> None:
    """Switching encryption on loses no session, and the next write encrypts."""
    plain = sites()
    plain.set(**DATA)
    plain.data()
    site = other_worker(plain, sites, RESILIENT_SESSION_ENCRYPT=True)
    assert site.data() == DATA
    site.set(b=1)
    site.visit(lambda: session.sync())  # type: ignore[attr-defined]
    assert site.data() == DATA | {"b": 1}
    assert all(data[4] == AES_GCM for data in stored(site))
    # And back: a worker that does not encrypt reads what one that does has written.
    assert other_worker(site, sites).data() == DATA | {"b": 1}


def test_encryption_keys_rotate_with_the_secret_key(site: Site) -> None:
    """Old records are read by the fallback; what is written needs it no more."""
    old = str(site.app.secret_key)
    site.app.config.update(SECRET_KEY="the next", SECRET_KEY_FALLBACKS=[old])
    assert site.data() == DATA
    site.set(b=1)
    site.visit(lambda: session.sync())  # type: ignore[attr-defined]
    site.app.config.update(SECRET_KEY_FALLBACKS=[])
    assert site.data() == DATA | {"b": 1}
    for node in site.nodes:
        node.raw_delete(item_of(site.sid()))
    assert site.data() == DATA | {"b": 1}


def test_a_worker_without_the_library_leaves_encrypted_sessions_alone(
    site: Site, sites: Sites, no_library: None
) -> None:
    """What it cannot read is unknown to it: 503, and nothing is overwritten."""
    before = stored(site)
    worker = other_worker(site, sites)
    response = worker.visit(lambda: session.update(b=2))
    assert response.status_code == 503
    assert "Set-Cookie" not in response.headers
    assert stored(site) == before


def test_a_worker_without_the_library_keeps_plain_sessions_going(
    sites: Sites, no_library: None
) -> None:
    """It needs no library for what is not encrypted."""
    site = sites()
    site.set(a=1)
    assert site.data() == {"a": 1}


def test_encryption_without_the_library_is_refused_at_the_start(
    nodes: list[Memcached], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """init_app says which setting and which extra, rather than a page at night."""
    from flask_resilient_session import extension

    monkeypatch.setattr(extension, "find_spec", lambda name: None)
    app: Flask = make_app(nodes, tmp_path, RESILIENT_SESSION_ENCRYPT=True)
    with pytest.raises(ConfigurationError) as caught:
        ResilientSession(app)
    assert "RESILIENT_SESSION_ENCRYPT" in str(caught.value)
    assert "[encryption]" in str(caught.value)
    assert "resilient_session" not in app.extensions
