"""Bytes made up by chance never crash, never pass, never execute."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from flask_resilient_session.core.answers import Ack
from flask_resilient_session.core.envelope import (
    AES_GCM,
    FORMAT,
    MAGIC,
    PLAIN,
    CorruptBytes,
    Keyring,
    UnknownFormat,
    _pack,
)
from flask_resilient_session.core.record import Entry, Record, Tombstone
from flask_resilient_session.core.values import decode_value, encode_value
from flask_resilient_session.memcached.text_protocol import (
    Add,
    Cas,
    Delete,
    Get,
    ProtocolError,
    Set,
    Value,
)
from flask_resilient_session.web.cookie import CookieSigner

EXAMPLES = 300
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

KEY, OTHER_KEY = "0" * 64, "1" * 64
KEYRING = Keyring(["a secret", "an older one"], "fuzz")
ENCRYPTING = Keyring(["a secret"], "fuzz", encrypt=True)
MUTE = CorruptBytes | UnknownFormat


# --- what is fuzzed with ---------------------------------------------------------


@st.composite
def mutations(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """Valid bytes with parts cut, doubled, swapped or overwritten."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 12)))
        kind = draw(st.sampled_from(["cut", "double", "put", "flip", "length"]))
        if kind == "cut":
            del data[start:end]
        elif kind == "double":
            data[start:start] = data[start:end]
        elif kind == "put":
            data[start:end] = draw(st.binary(max_size=12))
        elif kind == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "length":
            # Headers of msgpack that promise more than there is.
            header = draw(st.sampled_from([0xDC, 0xDD, 0xDE, 0xDF, 0xC6, 0xC9, 0xDB]))
            data[start:end] = bytes([header]) + draw(st.binary(min_size=2, max_size=5))
    return bytes(data)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.datetimes(),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.uuids(),
    st.decimals(allow_nan=False),
    st.builds(Markup, st.text(max_size=9)),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.sets(st.integers() | st.text(max_size=4), max_size=4),
        st.frozensets(st.binary(max_size=4), max_size=4),
        st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    ),
    max_leaves=12,
)
encoded = values.map(lambda value: encode_value("key", value))

records = st.builds(
    Record,
    entries=st.dictionaries(
        st.text(max_size=8),
        st.builds(
            Entry,
            st.integers(0, 2**60),
            st.integers(0, 2**64 - 1),
            st.none() | st.binary(max_size=30),
        ),
        max_size=5,
    ),
    created_ms=st.integers(0, 2**50),
    homes=st.sampled_from([(), ("one", "two")]),
)
copies = records | st.builds(
    Tombstone, st.sampled_from(["ended", "moved"]), st.integers(0, 2**50), st.booleans()
)
sealed = st.builds(
    lambda copy, keyring: keyring.seal(KEY, copy),
    copies,
    st.sampled_from([KEYRING, ENCRYPTING]),
)
headers = st.builds(
    lambda form, cipher, key_id, rest: (
        MAGIC + bytes([form, cipher]) + (key_id or KEYRING._header[5:]) + rest
    ),
    st.sampled_from([FORMAT, 0, 2, 255]),
    st.sampled_from([PLAIN, AES_GCM, 2, 255]),
    st.none() | st.binary(min_size=4, max_size=4),
    st.binary(max_size=80),
)

# --- the codec -------------------------------------------------------------------

TYPES = {
    *(type(None), bool, int, float, str, bytes, list, tuple, dict, set, frozenset),
    *(Markup, UUID, Decimal, datetime, date, time, timedelta),
}


def assert_listed(value: Any) -> None:
    """Nothing but the types that the codec promises is in a value."""
    stack = [value]
    while stack:
        part = stack.pop()
        assert type(part) in TYPES
        if isinstance(part, dict):
            stack += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set, frozenset)):
            stack += part


@bounded
@given(st.binary(max_size=200) | mutations(encoded))
@example(b"\xd6\xff\x00\x00\x00\x01")
@example(b"\xc7\x0c\xff" + bytes(12))
@example(b"\x91\xc7\x00\x02\xc7\x00\x02")
@example(b"\xc7\x00\x01")
@example(b"\x93\xc7\x00\x02\x90\x80")
@example(b"\xc7\x15\x080" + b"2026-01-01T00:00|../etc"[:20])
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x91" * 2000)
def test_decoding_gives_a_listed_type_or_a_value_error(data: bytes) -> None:
    """No other exception, no other type, whatever the bytes."""
    try:
        value = decode_value(data)
    except ValueError:
        return
    assert_listed(value)


@bounded
@given(values)
def test_what_is_encoded_comes_back(value: Any) -> None:
    """The mutations above start from encodings that are good."""
    assert decode_value(encode_value("key", value)) == value


def test_promised_lengths_take_no_memory() -> None:
    """Headers that promise gigabytes in a few bytes get none."""
    tracemalloc.start()
    try:
        for header in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF):
            with pytest.raises(ValueError, match="Malformed"):
                decode_value(bytes([header, 0xFF, 0xFF, 0xFF, 0xFF]) + b"x" * 50)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# --- seals -----------------------------------------------------------------------


@bounded
@given(st.binary(max_size=200) | mutations(sealed) | headers)
def test_only_what_was_sealed_opens(data: bytes) -> None:
    """Anything else is corrupt or unknown, for any keyring, and never an exception."""
    for keyring in (KEYRING, ENCRYPTING):
        opened = keyring.unseal(KEY, data)
        # A mutation that changed nothing is a good seal, but of this session only.
        assert isinstance(opened, MUTE) or opened == KEYRING.unseal(KEY, data)
        assert isinstance(keyring.unseal(OTHER_KEY, data), MUTE)


@bounded
@given(copies, st.integers(0, 10_000), st.integers(1, 255))
def test_no_byte_of_a_seal_can_be_changed(copy: Any, place: int, change: int) -> None:
    """A good seal opens to what was sealed; with one other byte it does not open."""
    for keyring in (KEYRING, ENCRYPTING):
        data = bytearray(keyring.seal(KEY, copy))
        assert keyring.unseal(KEY, bytes(data)) == copy
        data[place % len(data)] ^= change
        assert isinstance(keyring.unseal(KEY, bytes(data)), MUTE)


@bounded
@given(st.binary(max_size=120) | mutations(copies.map(_pack)))
@example(msgpack.packb([1, 0, 0, 0, 0, 0, "x", [], [0, 0], {}]))
@example(msgpack.packb([1, 0, 0, 0, 0, 0, 0, [], [0, 0], {"a": [1]}]))
@example(msgpack.packb([0, "ended", 1, "x"]))
@example(msgpack.packb([]))
@example(msgpack.packb(1))
def test_a_good_mac_over_nonsense_is_no_exception(body: bytes) -> None:
    """Not even the holder of the key, or a bug, makes unsealing raise."""
    for keyring in (KEYRING, ENCRYPTING):
        header = keyring._header
        keyring.unseal(KEY, header + keyring._mac(header, KEY, body) + body)


@bounded
@given(copies)
def test_other_keys_and_namespaces_open_nothing(copy: Any) -> None:
    """Another secret does not know it; another namespace calls it corrupt."""
    data = KEYRING.seal(KEY, copy)
    assert Keyring(["another"], "fuzz").unseal(KEY, data) == UnknownFormat()
    assert Keyring(["a secret"], "other").unseal(KEY, data) == CorruptBytes()


@bounded
@given(st.text(max_size=100) | st.from_regex(r"[\w-]{43}\.[\w-]{43}", fullmatch=True))
def test_no_made_up_cookie_is_believed(value: str) -> None:
    """Any text as a cookie: no id, no exception."""
    assert CookieSigner(["a secret"]).unsign(value) is None


# --- replies of nodes ------------------------------------------------------------

GET = Get("k", 1000)
WRITES = [Add("k", b"", 1), Cas("k", b"", 1, 1, 1), Set("k", b"", 1), Delete("k")]
items = st.builds(
    lambda key, flags, size, cas, data: (
        b"VALUE %s %d %d %d\r\n%s\r\nEND\r\n"
        % (key, flags, len(data) if size is None else size, cas, data)
    ),
    st.sampled_from([b"k", b"k", b"K", b""]),
    st.integers(-1, 2**33),
    st.none() | st.integers(-5, 10**22),
    st.integers(-1, 2**65),
    st.binary(max_size=40),
)
lines = st.sampled_from(
    b"END,STORED,NOT_STORED,EXISTS,NOT_FOUND,DELETED,ERROR,VALUE,HTTP/1.1 400,"
    b"SERVER_ERROR out of memory,CLIENT_ERROR x".split(b",")
).map(lambda line: line + b"\r\n")
replies = st.binary(max_size=100) | items | lines | mutations(items | lines)


def parsed(request: Any, data: bytes) -> Any:
    """What a reply is taken for; a text where it is refused."""
    try:
        return request.parse(data)
    except ProtocolError:
        return "refused"


@bounded
@given(replies)
def test_a_reply_fits_its_request_or_is_refused(data: bytes) -> None:
    """No exception but the one that closes the connection, no byte read twice."""
    for request in [GET, *WRITES]:
        reply = parsed(request, data)
        if reply in (None, "refused"):
            continue
        found, length = reply
        if isinstance(found, Value) and found.data is None:
            # Longer than it may be: its length says how much to skip.
            assert length > GET.limit
            continue
        assert 0 < length <= len(data)
        if isinstance(found, Value):
            assert len(found.data) <= GET.limit
            assert data[length - 7 : length] == b"\r\nEND\r\n"
            assert parsed(GET, data[:length]) == reply


@bounded
@given(items | lines)
def test_a_reply_in_pieces_is_the_same_reply(data: bytes) -> None:
    """However the network cuts it, a reply is incomplete until it is the same."""
    for request in [GET, *WRITES]:
        whole = parsed(request, data)
        for end in range(len(data)):
            piece = parsed(request, data[:end])
            assert piece is None or piece == whole or whole == "refused"


SOUND: list[tuple[Callable[[bytes], Any], bytes, Any]] = [
    (GET.parse, b"VALUE k 0 1 5\r\nx\r\nEND\r\n", Value(b"x", 0, 5)),
    (WRITES[0].parse, b"STORED\r\n", Ack.STORED),
]


@pytest.mark.parametrize(("parse", "data", "expected"), SOUND)
def test_good_replies_are_understood(
    parse: Callable[[bytes], Any], data: bytes, expected: Any
) -> None:
    """What the fuzzing above starts from is no nonsense."""
    assert parse(data) == (expected, len(data))
