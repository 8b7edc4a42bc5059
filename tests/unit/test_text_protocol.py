"""The grammar: what is sent, and which replies are believed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import builders
from flask_resilient_session.core.answers import Ack
from flask_resilient_session.memcached.text_protocol import (
    Absent,
    Add,
    Cas,
    Delete,
    Get,
    ProtocolError,
    Set,
    Value,
)

KEY = builders.PREFIX + builders.session_key("alice")
OTHER_KEY = builders.PREFIX + builders.session_key("bob")
KEY_BYTES = KEY.encode()

GET = Get(KEY, limit=100)
ADD = Add(KEY, b"data", 60)
CAS = Cas(KEY, b"data", 60, cas=18446744073709551615, read_at=3)
SET = Set(KEY, b"data", 60)
DELETE = Delete(KEY)
WRITES: list[Any] = [ADD, CAS, SET, DELETE]


def item(data: bytes, *, key: str = KEY, flags: int = 0, cas: int = 7) -> bytes:
    """A reply that holds one item."""
    head = f"VALUE {key} {flags} {len(data)} {cas}\r\n".encode()
    return head + data + b"\r\nEND\r\n"


# --- requests --------------------------------------------------------------------


def test_a_read_asks_for_the_cas_number() -> None:
    """Without it the copy could not be replaced."""
    assert GET.encode() == b"gets " + KEY_BYTES + b"\r\n"


@pytest.mark.parametrize(
    ("request_", "start", "cas"),
    [
        (ADD, b"add ", b""),
        (SET, b"set ", b""),
        (CAS, b"cas ", b" 18446744073709551615"),
    ],
)
def test_stores_have_flags_0_and_their_length(
    request_: Any, start: bytes, cas: bytes
) -> None:
    """The verb, the key, flags 0, exptime, length, perhaps cas."""
    expected = start + KEY_BYTES + b" 0 60 4" + cas + b"\r\ndata\r\n"
    assert request_.encode() == expected


def test_a_delete_has_no_time() -> None:
    """Only the key."""
    assert DELETE.encode() == b"delete " + KEY_BYTES + b"\r\n"


def test_bytes_that_look_like_replies_are_sent_as_they_are() -> None:
    """Data is counted, never escaped or interpreted."""
    data = b"\r\nEND\r\n\0\xff"
    assert Add(KEY, data, 60).encode().endswith(b" 9\r\n" + data + b"\r\n")


def test_what_may_be_repeated() -> None:
    """Whatever gives the same result twice; add and cas do not."""
    repeatable = [r for r in (GET, *WRITES) if r.repeatable]
    assert repeatable == [GET, SET, DELETE]


# --- replies ---------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", b"\r\nEND\r\n", b"\0" * 100])
def test_an_item_is_read_by_its_length(data: bytes) -> None:
    """Whatever the bytes are, the cas number and the flags come with them."""
    reply = item(data, flags=3, cas=2**64 - 1)
    assert GET.parse(reply) == (Value(data, 3, 2**64 - 1), len(reply))


def test_a_miss_is_an_exact_end() -> None:
    """Nothing else says that there is nothing."""
    assert GET.parse(b"END\r\n") == (Absent(), 5)


ANSWERS = [
    (ADD, b"STORED", Ack.STORED),
    (ADD, b"NOT_STORED", Ack.CONFLICT),
    (CAS, b"STORED", Ack.STORED),
    (CAS, b"EXISTS", Ack.CONFLICT),
    (CAS, b"NOT_FOUND", Ack.CONFLICT),
    (SET, b"STORED", Ack.STORED),
    (SET, b"NOT_STORED", Ack.REJECTED),
    (DELETE, b"DELETED", Ack.STORED),
    (DELETE, b"NOT_FOUND", Ack.STORED),
    *((r, b"SERVER_ERROR out of memory storing object", Ack.REJECTED) for r in WRITES),
    *((r, b"SERVER_ERROR object too large for cache", Ack.REJECTED) for r in WRITES),
]


@pytest.mark.parametrize(("request_", "line", "ack"), ANSWERS)
def test_answers_to_writes(request_: Any, line: bytes, ack: Ack) -> None:
    """Each verb's answers, and what they mean to the caller."""
    assert request_.parse(line + b"\r\n") == (ack, len(line) + 2)


WHOLE = [
    (GET, item(b"some data\r\nEND\r\n")),
    (GET, b"END\r\n"),
    *((request_, line + b"\r\n") for request_, line, _ in ANSWERS),
]


@pytest.mark.parametrize(("request_", "reply"), WHOLE)
def test_a_reply_is_read_only_when_it_is_whole(request_: Any, reply: bytes) -> None:
    """Every prefix says: more to come. What follows is not counted."""
    for length in range(len(reply)):
        assert request_.parse(reply[:length]) is None
    parsed, length = request_.parse(reply)
    assert length == len(reply)
    assert request_.parse(reply + b"STORED\r\n") == (parsed, length)


def test_an_item_over_the_limit_is_not_read() -> None:
    """Its header is enough to know that it is none of ours."""
    header = f"VALUE {KEY} 0 101 9\r\n".encode()
    whole = header + b"x" * 101 + b"\r\nEND\r\n"
    for length in (len(header), len(header) + 50, len(whole)):
        assert GET.parse(whole[:length]) == (Value(None, 0, 9), len(whole))
    huge = f"VALUE {KEY} 0 {'9' * 20} 9\r\n".encode()
    assert GET.parse(huge) == (Value(None, 0, 9), len(huge) + int("9" * 20) + 7)
    assert GET.parse(item(b"x" * 100)) == (
        Value(b"x" * 100, 0, 7),
        len(item(b"x" * 100)),
    )


def header(**words: object) -> bytes:
    """An item's first line with some of its words replaced."""
    usual = {"verb": "VALUE", "key": KEY, "flags": 0, "length": 1, "cas": 7}
    return " ".join(str(word) for word in (usual | words).values()).encode() + b"\r\n"


NOT_FOR_A_READ = [
    item(b"x", key=OTHER_KEY),
    item(b"x", key=KEY[:-1]),
    item(b"x", key=KEY.upper()),
    b"STORED\r\n",
    b"ERROR\r\n",
    b"SERVER_ERROR out of memory writing get response\r\n",
    b"CLIENT_ERROR bad\r\n",
    b"END \r\n",
    b"end\r\n",
    b"\r\n",
    b"HTTP/1.1 400 Bad Request\r\n",
    b"HD s4\r\n",
    b"x" * 512,
    b"VALUE " + b"k" * 600,
    f"VALUE {KEY} 0 1\r\n".encode(),
    f"VALUE {KEY} 0 1 7 8\r\n".encode(),
    f"VALUE {KEY} 0  1 7\r\n".encode(),
    header(length=-1),
    header(length="1.0"),
    header(length="+1"),
    header(length="1_0"),
    header(length=""),
    header(flags=-1),
    header(flags="x"),
    header(cas=-7),
    header(cas="9" * 21),
    header(length="9" * 21),
    header(length="9" * 400),
    header(verb="value"),
    header() + b"xxEND\r\n\r\n",
    header() + b"x\r\nEND\r\r",
    header() + b"x\r\nVALUE more",
    header() + b"\r\nEND\r\n\r",
]


@pytest.mark.parametrize("reply", NOT_FOR_A_READ)
def test_replies_that_no_read_believes(reply: bytes) -> None:
    """Another key, another grammar, another length: the connection is lost."""
    with pytest.raises(ProtocolError):
        GET.parse(reply)


@pytest.mark.parametrize("request_", WRITES)
@pytest.mark.parametrize(
    "reply",
    [
        b"END\r\n",
        item(b"x"),
        b"ERROR\r\n",
        b"CLIENT_ERROR bad data chunk\r\n",
        b"STORED \r\n",
        b"stored\r\n",
        b"TOUCHED\r\n",
        b"\r\n",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"x" * 512,
    ],
)
def test_replies_that_no_write_believes(request_: Any, reply: bytes) -> None:
    """What is no answer to a write may be the answer to somebody else's request."""
    with pytest.raises(ProtocolError):
        request_.parse(reply)


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (ADD, b"EXISTS"),
        (ADD, b"NOT_FOUND"),
        (CAS, b"NOT_STORED"),
        (CAS, b"DELETED"),
        (SET, b"EXISTS"),
        (DELETE, b"STORED"),
    ],
)
def test_answers_to_another_verb(request_: Any, line: bytes) -> None:
    """A write believes the answers of its own verb only."""
    with pytest.raises(ProtocolError):
        request_.parse(line + b"\r\n")


# Noise made of the grammar's own words gets further than noise alone.
words = st.sampled_from(
    [
        *(b"VALUE", KEY_BYTES, b"END", b"STORED", b"SERVER_ERROR", b"END\r\n"),
        *(b" ", b"0", b"1", b"5", b"-", b"x", b"\xb2", b"\r\n"),
        *(header(), header(length=3)),
    ]
)
noise = st.one_of(
    st.binary(max_size=700), st.lists(words, max_size=12).map(lambda w: b"".join(w))
)


@given(st.sampled_from([GET, *WRITES]), noise)
def test_parsing_noise_never_fails_otherwise(request_: Any, data: bytes) -> None:
    """A verdict, a wish for more, or a protocol error: nothing else."""
    try:
        parsed = request_.parse(data)
    except ProtocolError:
        return
    if parsed is None:
        assert len(data) < 700
        return
    reply, length = parsed
    assert 0 < length <= len(data)
    if isinstance(reply, Value) and reply.data is not None:
        assert reply.data in data
