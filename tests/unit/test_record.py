"""Laws of a session's state and of its bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builders import DAY, KEYRING, NAMESPACE, NOW, PAIR, record, session_key
from flask_resilient_session.core.envelope import (
    FORMAT,
    MAGIC,
    CorruptBytes,
    Keyring,
    UnknownFormat,
)
from flask_resilient_session.core.record import (
    Copy,
    Entry,
    Record,
    Tombstone,
    apply_changes,
    changes_between,
    drop_markers,
    join,
    join_records,
    same_state,
)

KEY = session_key("alice")

# Few keys and stamps, so that they meet often. A nonce decides the value: one
# stamp is one write.
stamps = st.tuples(st.integers(0, 6), st.integers(0, 2))
entries = st.tuples(stamps, st.integers(0, 1)).map(
    lambda drawn: Entry(
        *drawn[0], None if sum(drawn[0]) % 3 == 0 else b"%d%d" % drawn[0]
    )
)
times = st.integers(0, 5)
records = st.builds(
    Record,
    entries=st.dictionaries(st.sampled_from("abc"), entries, max_size=3),
    floor=stamps,
    created_ms=times,
    last_use_ms=times,
    synced_ms=times,
    row_version=times,
    writes=times,
    never_synced=st.booleans(),
    unverified=st.booleans(),
    homes=st.sampled_from([(), PAIR, ("stranger", "first_home")]),
)
tombstones = st.builds(
    Tombstone, st.sampled_from(["ended", "moved"]), times, st.booleans()
)
copies: st.SearchStrategy[Copy] = st.one_of(records, tombstones)
changes = st.dictionaries(
    st.sampled_from("abcd"), st.one_of(st.none(), st.binary(max_size=3)), min_size=1
)


# --- joining ---------------------------------------------------------------------


@given(copies, copies)
def test_joining_is_commutative(left: Copy, right: Copy) -> None:
    """It does not matter which of two copies is met first."""
    assert join(left, right) == join(right, left)


@given(copies, copies, copies)
def test_joining_is_associative(one: Copy, two: Copy, three: Copy) -> None:
    """It does not matter in which order three copies meet."""
    assert join(join(one, two), three) == join(one, join(two, three))


@given(copies, copies)
def test_joining_is_idempotent(left: Copy, right: Copy) -> None:
    """Meeting the same copy again changes nothing."""
    assert join(left, left) == left
    assert join(join(left, right), right) == join(left, right)


@given(records, tombstones)
def test_a_tombstone_is_on_top(live: Record, dead: Tombstone) -> None:
    """Whatever meets a tombstone is dead, however new."""
    assert join(live, dead) == dead
    assert join(dead, live) == dead


def test_of_two_tombstones_the_final_one_stays() -> None:
    """Ended outranks moved, and a debt is paid once one of them says so."""
    moved = Tombstone("moved", 7, debt=True)
    ended = Tombstone("ended", 5)
    assert join(moved, ended) == Tombstone("ended", 7, debt=False)
    assert join(moved, moved).debt  # type: ignore[union-attr]


def test_each_key_has_its_own_winner() -> None:
    """The higher stamp wins per key, a deletion like any other write."""
    left = record({"a": Entry(9, 1, b"new"), "b": Entry(3, 1, b"old")})
    right = record({"a": Entry(8, 9, b"old"), "b": Entry(4, 1, None)})
    assert join_records(left, right).payload() == {"a": b"new"}


def test_the_newest_sync_is_taken_as_a_whole() -> None:
    """A row version never comes with the time or the count of another sync."""
    newer = record(row_version=5, synced_ms=100, writes=1)
    older = record(row_version=4, synced_ms=900, writes=8)
    joined = join_records(older, newer)
    assert (joined.row_version, joined.synced_ms, joined.writes) == (5, 100, 1)


def test_never_synced_ends_with_the_first_copy_that_was() -> None:
    """Only what no copy knows to be synced was never synced."""
    never, synced = record(never_synced=True), record()
    assert not join_records(never, synced).never_synced
    assert join_records(never, never).never_synced


def test_times_do_not_matter_to_the_state() -> None:
    """Two copies agree when keys, stamps and floor do."""
    one = record()
    assert same_state(one, replace(one, last_use_ms=NOW + 5, writes=3))
    assert not same_state(one, replace(one, floor=(1, 0)))
    assert not same_state(one, record({"name": Entry(NOW, 2, b"value")}))


# --- writing ---------------------------------------------------------------------


@given(records, changes, st.integers(0, 9), st.integers(0, 2**64 - 1))
def test_a_change_is_stamped_above_everything_seen(
    seen: Record, wanted: dict[str, bytes | None], now_ms: int, nonce: int
) -> None:
    """Joined with what its writer saw, a change always wins."""
    changed = apply_changes(seen, wanted, now_ms, nonce)
    assert join_records(changed, seen).entries == changed.entries
    kept = {k: v for k, v in wanted.items() if v is not None}
    untouched = {k: v for k, v in seen.payload().items() if k not in wanted}
    assert changed.payload() == untouched | kept
    new = {changed.entries[key].counter for key in kept}
    assert all(counter > seen.largest_counter() for counter in new)
    assert all(counter > seen.floor[0] and counter >= now_ms for counter in new)
    assert changed.writes == seen.writes + 1


def test_deleting_an_unknown_key_leaves_a_marker() -> None:
    """The request saw it on a copy that this record has not heard of."""
    changed = apply_changes(record(), {"name": None, "other": None}, NOW + 1, 5)
    gone = Entry(NOW + 1, 5, None)
    assert changed.entries == {"name": gone, "other": gone}
    late = record({"other": Entry(NOW, 1, b"x")})
    assert join_records(changed, late).payload() == {}
    assert changed.size() == 0


def test_a_slow_clock_does_not_lose_a_newer_write() -> None:
    """A writer whose clock is behind counts on from what it saw."""
    changed = apply_changes(record(), {"name": b"newer"}, NOW - DAY, 1)
    assert changed.entries["name"].counter == NOW + 1


# --- deletion markers ------------------------------------------------------------


def test_all_markers_go() -> None:
    """However young they are; the highest that went becomes the floor."""
    marked = record(
        {"old": Entry(5, 9, None), "new": Entry(50, 1, None), "live": Entry(2, 1, b"x")}
    )
    dropped = drop_markers(marked)
    assert set(dropped.entries) == {"live"}
    assert dropped.floor == (50, 1)
    assert drop_markers(dropped) is dropped


def test_an_old_copy_cannot_bring_a_dropped_key_back() -> None:
    """What a copy from before the deletion holds is below the floor."""
    old_copy = record({"cart": Entry(3, 1, b"full"), "name": Entry(4, 1, b"x")})
    deleted = apply_changes(old_copy, {"cart": None}, 5, 1)
    dropped = drop_markers(deleted)
    joined = join_records(dropped, old_copy)
    assert joined.payload() == {"name": b"x"}
    assert joined == join_records(old_copy, dropped)


def test_a_younger_concurrent_write_survives_the_dropping() -> None:
    """A write above the floor counts, though its copy knows no floor."""
    before = record({"cart": Entry(3, 1, None)})
    dropped = drop_markers(before)
    concurrent = apply_changes(before, {"cart": b"new"}, 10, 2)
    assert join_records(dropped, concurrent).payload() == {"cart": b"new"}


@pytest.mark.parametrize(
    ("late", "changes"),
    [
        # What an old copy holds below the floor was seen and dropped.
        (record({"gone": Entry(3, 1, b"old"), "name": Entry(4, 1, b"x")}), {}),
        (record({"name": Entry(60, 1, b"y")}), {"name": b"y"}),
        (record({"more": Entry(60, 1, b"y")}), {"more": b"y"}),
        (record({"name": Entry(60, 1, None)}), {"name": None}),
        # Deleted late, and the marker dropped by a sync meanwhile.
        (record({}, floor=(60, 1)), {"name": None}),
        (record({"name": Entry(4, 1, b"x")}, floor=(60, 1)), {}),
        (record({"name": Entry(2, 1, b"w")}), {}),
    ],
)
def test_what_others_have_changed_since(
    late: Record, changes: dict[str, bytes | None]
) -> None:
    """Late changes count as the join says, floors included, and nothing else does."""
    seen = record({"name": Entry(4, 1, b"x")}, floor=(50, 1))
    assert changes_between(seen, late) == changes


@given(records)
def test_dropping_markers_leaves_the_content(live: Record) -> None:
    """The user sees no difference, also when the undropped copy is joined again."""
    dropped = drop_markers(live)
    assert dropped.payload() == live.payload()
    rejoined = join_records(dropped, live)
    assert rejoined.payload() == live.payload()
    assert rejoined.floor == dropped.floor


# --- bytes -----------------------------------------------------------------------

texts = st.text(st.characters(), max_size=20)
any_records = st.builds(
    Record,
    entries=st.dictionaries(
        texts,
        st.builds(
            Entry,
            st.integers(0, 2**62),
            st.integers(0, 2**64 - 1),
            st.none() | st.binary(max_size=50),
        ),
    ),
    floor=st.tuples(st.integers(0, 2**62), st.integers(0, 2**64 - 1)),
    created_ms=st.integers(0, 2**62),
    homes=st.lists(texts, max_size=2).map(tuple),
    never_synced=st.booleans(),
    unverified=st.booleans(),
)


@given(st.one_of(any_records, tombstones))
@example(record({"\ud800": Entry(1, 1, b"lone surrogate")}))
def test_what_is_sealed_comes_back_equal(copy: Copy) -> None:
    """Opening returns exactly what was sealed."""
    assert KEYRING.unseal(KEY, KEYRING.seal(KEY, copy)) == copy


@pytest.mark.parametrize("copy", [record(), Tombstone("ended", NOW)])
def test_every_flipped_byte_is_noticed(copy: Copy) -> None:
    """No changed byte is used, wherever it is."""
    sealed = KEYRING.seal(KEY, copy)
    for index in range(len(sealed)):
        for flip in (1, 0x80, 0xFF):
            broken = bytearray(sealed)
            broken[index] ^= flip
            opened = KEYRING.unseal(KEY, bytes(broken))
            assert isinstance(opened, (CorruptBytes, UnknownFormat)), index
            if index >= 9 or index < 3:
                assert isinstance(opened, CorruptBytes), index


def test_encrypted_records() -> None:
    """Unreadable at rest, opened by every worker, for this session only."""
    encrypting = Keyring(["test secret"], NAMESPACE, encrypt=True)
    for copy in (record(), Tombstone("ended", NOW, debt=True)):
        sealed = encrypting.seal(KEY, copy)
        assert sealed != encrypting.seal(KEY, copy)
        assert KEYRING.unseal(KEY, sealed) == copy
        assert encrypting.unseal(KEY, KEYRING.seal(KEY, copy)) == copy
        assert encrypting.unseal(session_key("bob"), sealed) == CorruptBytes()
        for private in (b"value", b"first_home", b"ended"):
            assert private not in sealed
        for index in range(9, len(sealed)):
            broken = sealed[:index] + bytes([sealed[index] ^ 1]) + sealed[index + 1 :]
            assert encrypting.unseal(KEY, broken) == CorruptBytes()


def test_every_cut_is_noticed() -> None:
    """A record with its end, or something after it, missing or added is corrupt."""
    sealed = KEYRING.seal(KEY, record())
    for length in range(len(sealed)):
        assert KEYRING.unseal(KEY, sealed[:length]) == CorruptBytes()
    assert KEYRING.unseal(KEY, sealed + b"\0") == CorruptBytes()


def test_a_record_fits_its_session_and_namespace_only() -> None:
    """Another session's record, or another application's, is corrupt here."""
    sealed = KEYRING.seal(KEY, record())
    assert KEYRING.unseal(session_key("bob"), sealed) == CorruptBytes()
    elsewhere = Keyring(["test secret"], "another prefix\0another_table")
    assert elsewhere.unseal(KEY, sealed) == CorruptBytes()


def test_a_record_under_another_secret_is_unknown() -> None:
    """It may be from a worker that is ahead in a rotation, so it is not corrupt."""
    stranger = Keyring(["another secret"], NAMESPACE)
    assert KEYRING.unseal(KEY, stranger.seal(KEY, record())) == UnknownFormat()


def test_keys_can_be_rotated() -> None:
    """The new keyring reads old records; the old one leaves new records alone."""
    rotated = Keyring(["next secret", "test secret"], NAMESPACE)
    assert rotated.unseal(KEY, KEYRING.seal(KEY, record())) == record()
    assert KEYRING.unseal(KEY, rotated.seal(KEY, record())) == UnknownFormat()
    prepared = Keyring(["test secret", "next secret"], NAMESPACE)
    assert prepared.unseal(KEY, rotated.seal(KEY, record())) == record()


@pytest.mark.parametrize("index", [3, 4], ids=["format", "cipher"])
def test_another_format_or_cipher_is_unknown(index: int) -> None:
    """A record of a later version is neither used nor taken for garbage."""
    sealed = bytearray(KEYRING.seal(KEY, record()))
    sealed[index] = 0xFF
    assert KEYRING.unseal(KEY, bytes(sealed)) == UnknownFormat()


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 3))
def test_arbitrary_bytes_are_never_an_error(noise: bytes, disguise: int) -> None:
    """Whatever a node or SQL holds, opening it gives a verdict."""
    header = KEYRING.seal(KEY, record())[:9]
    start = (b"", MAGIC, MAGIC + bytes((FORMAT, 0)), header)[disguise]
    opened = KEYRING.unseal(KEY, start + noise)
    assert isinstance(opened, (CorruptBytes, UnknownFormat))


@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x90", b"\x01", b"\x91\x01", b"\x92\x00\x01", b"\x01" * 99]
)
def test_a_body_that_only_a_bug_could_write_is_corrupt(
    body: bytes, encrypt: bool
) -> None:
    """Bytes that carry a good MAC but no record are corrupt, not an exception."""
    keyring = Keyring(["test secret"], NAMESPACE, encrypt=encrypt)
    mac = keyring._mac(keyring._header, KEY, body)
    assert keyring.unseal(KEY, keyring._header + mac + body) == CorruptBytes()


GOLDEN = record(
    {"_user_id": Entry(NOW, 2**64 - 1, b"\xa242"), "cart": Entry(NOW + 1, 7, None)},
    floor=(3, 4),
    writes=2,
    never_synced=True,
    unverified=True,
)

GOLDEN_LIVE = (
    "667273010087b4a8ff2af96c552a2771ad2491ea25f3f691bc41d17a8d061a5bfa2d0423"
    "c088f6eb5c9a01cf0000019c1c38a400cf0000019c1c38a400cf0000019c1c38a4000102"
    "0392aa66697273745f686f6d65ab7365636f6e645f686f6d6592030482a85f757365725f"
    "696493cf0000019c1c38a400cfffffffffffffffffc403a23432a46361727493cf000001"
    "9c1c38a40107c0"
)
GOLDEN_DEAD = (
    "667273010087b4a8ffa69a5c691f371bc89883b724faf4731a9b2a98104bc7742a4139dc"
    "e72f15a3629400a56d6f766564cf0000019c1c38a40004"
)


def test_format_1_stays_as_it_is() -> None:
    """Stored sessions outlive an upgrade: these bytes may never change."""
    assert KEYRING.seal(KEY, GOLDEN).hex() == GOLDEN_LIVE
    assert KEYRING.seal(KEY, Tombstone("moved", NOW, debt=True)).hex() == GOLDEN_DEAD


def test_a_keyring_shows_no_secret() -> None:
    """Neither the keyring's text nor its attributes' hold the secret."""
    keyring = Keyring(["a very secret text", b"more of it"], NAMESPACE)
    shown = repr(keyring) + str(keyring) + repr(vars(keyring))
    for secret in ("secret text", "more of it"):
        assert secret not in shown
    for key in keyring._keys.values():
        assert repr(key.encryption) not in shown


def test_a_keyring_needs_a_key() -> None:
    """Without a secret nothing can be sealed, and that is said at once."""
    with pytest.raises(ValueError, match="at least one secret"):
        Keyring([], NAMESPACE)
