"""Bytes that others put into memcached or SQL are never used, and never executed."""

from __future__ import annotations

import os
import pickle
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import session

from apps import Site, Sites, TimeMachine, item_of, key_of
from flask_resilient_session.core.envelope import AES_GCM, FORMAT, MAGIC

#: python-memcached's flags: what it unpickles, takes for a number, inflates.
PICKLED, INTEGER, LONG, COMPRESSED = 1, 2, 4, 8
MEGABYTE = 1024 * 1024


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults and a session in both homes and SQL."""
    site = sites()
    site.set(_user_id="alice", secret="of alice")
    site.data()
    return site


ALICE = {"_user_id": "alice", "secret": "of alice"}


def own_copy(site: Site) -> list[bytes | None]:
    """What the homes hold for the browser's session."""
    return [node.raw_get(item_of(site.sid())) for node in site.nodes]


def poison(site: Site, data: bytes, flags: int = 0, homes: int = 2) -> None:
    """Write these bytes where copies of the browser's session are."""
    for node in site.nodes[:homes]:
        node.raw_set(item_of(site.sid()), data, flags)


def change_row(site: Site, sid: str, **values: Any) -> None:
    """Write columns of a session's row past the extension."""
    table = site.state.sql.table
    with site.state.sql.engine.begin() as connection:
        where = table.c.session_key == key_of(sid)
        connection.execute(sa.update(table).where(where).values(values))


def assert_healed(site: Site, data: bytes, expected: Any = None) -> None:
    """The session is as it was, and its true copy stands in both homes again."""
    expected = ALICE if expected is None else expected
    assert site.data() == expected
    # A change takes with it what reading alone may leave.
    site.set(healed=True)
    assert site.data() == expected | {"healed": True}
    assert not any(copy == data for copy in own_copy(site))
    assert site.data() == expected | {"healed": True}


class Executed:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


# --- memcached -------------------------------------------------------------------


@pytest.mark.parametrize("homes", [1, 2])
def test_a_copy_of_another_session_is_not_used(site: Site, homes: int) -> None:
    """Mallory's own valid item under Alice's key is no session of Alice's."""
    mallory = site.browser_with(None)
    site.set(mallory, _user_id="admin")
    site.data(mallory)
    stolen = site.nodes[0].raw_get(item_of(site.sid(mallory)))
    assert stolen is not None
    poison(site, stolen, homes=homes)
    assert_healed(site, stolen)
    assert site.state.observer.stats["corrupt_copies"] >= homes


@pytest.mark.parametrize("homes", [1, 2])
@pytest.mark.parametrize("flags", [0, PICKLED, INTEGER, LONG, COMPRESSED, 9, 2**32 - 1])
def test_garbage_is_replaced(site: Site, flags: int, homes: int) -> None:
    """Whatever the bytes and flags: the true copy is served and put back."""
    garbage = b"12345" if flags in (INTEGER, LONG) else os.urandom(300)
    poison(site, garbage, flags, homes)
    assert_healed(site, garbage)


@pytest.mark.parametrize("flags", [0, PICKLED, PICKLED | COMPRESSED])
def test_a_pickle_is_never_loaded(site: Site, flags: int, tmp_path: Path) -> None:
    """An item that would run code when it is unpickled stays bytes."""
    trap = tmp_path / "executed"
    data = pickle.dumps(Executed(trap))
    poison(site, zlib.compress(data) if flags & COMPRESSED else data, flags)
    assert_healed(site, data)
    assert not trap.exists()
    pickle.loads(data)  # noqa: S301 - that it would have run
    assert trap.exists()


@pytest.mark.parametrize("flags", [PICKLED, COMPRESSED, PICKLED | LONG | COMPRESSED])
def test_a_true_copy_with_flags_is_not_used(site: Site, flags: int) -> None:
    """Our own bytes with flags set were not written by us."""
    true = own_copy(site)[0]
    assert true is not None
    poison(site, true, flags)
    corrupt = site.state.observer.stats["corrupt_copies"]
    assert site.data() == ALICE
    assert site.state.observer.stats["corrupt_copies"] == corrupt + 2


@pytest.mark.parametrize("homes", [1, 2])
def test_a_zip_bomb_is_not_inflated(site: Site, homes: int) -> None:
    """Memory stays flat with an item that would inflate to 200 MB."""
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(MEGABYTE)) for _ in range(200))
    bomb += packer.flush()
    poison(site, bomb, COMPRESSED, homes)
    assert peak_of(site) < 3 * MEGABYTE
    assert_healed(site, bomb)


def peak_of(site: Site) -> int:
    """The most memory that Python took at once while a page was answered."""
    tracemalloc.start()
    try:
        assert site.data() == ALICE
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("homes", [1, 2])
@pytest.mark.parametrize("size", [900_000, 760_000])
def test_an_item_of_900_kb_is_neither_read_nor_left(
    site: Site, homes: int, size: int
) -> None:
    """An item longer than a session may be does not fill memory and is replaced."""
    big = b"x" * size
    poison(site, big, homes=homes)
    assert peak_of(site) < 6 * MEGABYTE
    assert_healed(site, big)


@pytest.mark.parametrize(
    "other",
    [{"RESILIENT_SESSION_KEY_PREFIX": "blog:"}, {"RESILIENT_SESSION_TABLE": "blog"}],
)
def test_a_record_of_another_namespace_is_foreign(
    sites: Sites, other: dict[str, str]
) -> None:
    """Two applications with one secret key cannot be given each other's sessions."""
    shop, blog = sites(), sites(**other)
    shop.set(a="shop")
    shop.data()
    browser = blog.browser_with(shop.cookie())
    prefix = blog.app.config.get("RESILIENT_SESSION_KEY_PREFIX", "session:")
    for node, data in zip(shop.nodes, own_copy(shop), strict=True):
        assert data is not None
        node.raw_set(prefix + key_of(shop.sid()), data)
    blog.set(b=1)
    table = blog.state.sql.table
    row = shop.rows()[key_of(shop.sid())]._mapping
    with blog.state.sql.engine.begin() as connection:
        if table.name == "blog":
            connection.execute(sa.insert(table).values(**row))
    assert blog.data(browser) == {}
    assert blog.state.observer.stats["corrupt_copies"] == 2


# --- keys ------------------------------------------------------------------------


def test_records_are_sealed_anew_after_a_rotation(site: Site) -> None:
    """A rotated key's records are read, and written under the new one."""
    old = own_copy(site)
    site.app.config.update(
        SECRET_KEY="the next secret", SECRET_KEY_FALLBACKS=[site.app.secret_key]
    )
    site.set(b=2)
    assert site.data() == ALICE | {"b": 2}
    site.visit(lambda: session.sync())  # type: ignore[attr-defined]
    current = site.state.keys.of(site.app).keyring._header
    row = site.rows()[key_of(site.sid())].record
    assert all(copy.startswith(current) for copy in [*own_copy(site), row])
    assert set(own_copy(site)).isdisjoint(old)
    site.app.config.update(SECRET_KEY_FALLBACKS=[])
    assert site.data() == ALICE | {"b": 2}


def test_records_of_a_dropped_key_are_neither_used_nor_overwritten(site: Site) -> None:
    """Another worker may be ahead: unknown is not gone, and not ours to replace."""
    sid, before = site.sid(), own_copy(site)
    site.app.config.update(SECRET_KEY="another secret")
    browser = site.browser_with(site.signer.sign(sid))
    response = site.visit(lambda: session.get("secret", "none"), browser=browser)
    assert response.status_code == 503
    assert "of alice" not in response.text
    assert "Set-Cookie" not in response.headers
    found = [node.raw_get(item_of(sid)) for node in site.nodes]
    assert found == before
    assert site.rows()[key_of(sid)].revoked_at is None


def test_sessions_of_a_dropped_key_can_be_revoked(site: Site) -> None:
    """What cannot be read can be ended: the user's column is not sealed."""
    sid = site.sid()
    site.app.config.update(SECRET_KEY="another secret")
    with site.app.app_context():
        assert site.sessions.revoke_user("alice") == 1
    browser = site.browser_with(site.signer.sign(sid))
    assert site.data(browser) == {}


# --- SQL -------------------------------------------------------------------------


def test_a_row_swapped_with_another_is_not_used(site: Site) -> None:
    """With memory lost and rows exchanged nobody gets the other's session."""
    other = site.browser_with(None)
    site.set(other, _user_id="bob", secret="of bob")
    sids = site.sid(), site.sid(other)
    records = [site.rows()[key_of(sid)].record for sid in sids]
    for sid, record in zip(sids, reversed(records), strict=True):
        change_row(site, sid, record=record)
        for node in site.nodes:
            node.raw_delete(item_of(sid))
    assert site.data() == {}
    assert site.data(other) == {}
    assert site.state.observer.stats["corrupt_rows"] >= 2


@pytest.mark.parametrize("kind", ["garbage", "pickle", "empty", "large"])
def test_a_bad_row_is_replaced_by_the_true_copy(
    site: Site, kind: str, tmp_path: Path
) -> None:
    """A row that is no record of its session is written anew from the homes."""
    trap = tmp_path / "executed"
    bad = {
        "garbage": os.urandom(200),
        "pickle": pickle.dumps(Executed(trap)),
        "empty": b"",
        "large": MAGIC + bytes([FORMAT]) + b"x" * MEGABYTE,
    }[kind]
    change_row(site, site.sid(), record=bad)
    assert site.data() == ALICE
    site.nodes[0].raw_delete(item_of(site.sid()))
    assert site.data() == ALICE
    site.visit(lambda: session.sync())  # type: ignore[attr-defined]
    assert site.rows()[key_of(site.sid())].record != bad
    for node in site.nodes:
        node.raw_delete(item_of(site.sid()))
    assert site.data() == ALICE
    assert not trap.exists()


def test_a_row_cannot_be_brought_back_by_its_plain_columns(site: Site) -> None:
    """Clearing the mark of a tombstone does not bring the data back."""
    cookie = site.cookie()
    sid = site.sid()
    site.visit(lambda: session.clear())
    change_row(site, sid, revoked_at=None, reason=None, expires_at=2**52)
    for node in site.nodes:
        node.raw_delete(item_of(sid))
    assert site.data(site.browser_with(cookie)) == {}


def test_an_encrypted_looking_header_is_not_believed(site: Site) -> None:
    """Changing format, cipher or key id of a true copy makes it no copy."""
    true = own_copy(site)[0]
    assert true is not None
    poison(site, true[:4] + bytes([AES_GCM]) + true[5:])
    assert site.data() == ALICE
    for position in (3, 4, 6):
        strange = bytearray(true)
        strange[position] = 77
        poison(site, bytes(strange))
        assert site.data() == ALICE
        assert site.set(b=1).status_code == 200
        assert site.visit(lambda: session.pop("b") and None).status_code == 200


def test_rows_of_a_dropped_key_go_in_the_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept while a worker may know the key; reaped a whole lifetime past their end."""
    clock = TimeMachine(monkeypatch)
    lifetime = site.app.permanent_session_lifetime.total_seconds()
    site.app.config.update(SECRET_KEY="another secret")
    with site.app.app_context():
        for node in site.nodes:
            node.flush()
        clock.forward(lifetime + 3600)
        assert site.sessions.reap().reaped == 0
        clock.forward(lifetime)
        assert site.sessions.reap().reaped == 1


# --- limits that are stated ------------------------------------------------------


def test_an_older_copy_of_the_same_session_is_believed_on_both_homes(
    site: Site,
) -> None:
    """A limit: a copy proves whose it is, not that it is the newest; SQL ends it."""
    cookie, old = site.cookie(), own_copy(site)
    item = item_of(site.sid())
    site.visit(lambda: session.clear())
    stranger = site.browser_with(cookie)
    assert site.data(stranger) == {}
    # On one home alone the other's tombstone wins.
    assert old[0] is not None
    site.nodes[0].raw_set(item, old[0])
    assert site.data(stranger) == {}
    for node, data in zip(site.nodes, old, strict=True):
        assert data is not None
        node.raw_set(item, data)
    assert site.data(stranger) == ALICE
    # The next sync asks SQL, which has the last word.
    site.visit(lambda: session.sync(), browser=stranger)  # type: ignore[attr-defined]
    assert site.data(stranger) == {}


def test_an_older_row_of_the_same_session_is_believed_without_copies(
    site: Site,
) -> None:
    """A limit: who writes SQL can put back an older row, and nothing but that."""
    old = site.rows()[key_of(site.sid())]
    site.set(secret="changed")
    change_row(site, site.sid(), record=old.record, version=old.version)
    assert site.data() == ALICE | {"secret": "changed"}
    for node in site.nodes:
        node.flush()
    assert site.data() == ALICE
