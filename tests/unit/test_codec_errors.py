"""What the codec says about data that it cannot keep, and what it survives."""

from __future__ import annotations

import enum
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from flask_resilient_session.core.values import (
    decode,
    decode_value,
    encode,
    encode_value,
)


def message(session: Any) -> str:
    """Return the text of the error that encoding a session raises."""
    with pytest.raises(TypeError) as caught:
        encode(session)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


class Name(str, enum.Enum):
    FIRST = "first"


class Thing:
    def __repr__(self) -> str:
        return "secret"


@pytest.mark.parametrize(
    ("value", "way"),
    [
        (Thing(), "session['cart'] is"),
        ([1, (2, {"price": Thing()})], "session['cart'][1][1]['price'] is"),
        ({5: {None: Thing()}}, "session['cart'][5][<NoneType>] is"),
        ({Thing(): 1}, "session['cart'][<key>] is"),
        ([{(1, Thing())}], "session['cart'][0][<member>][1] is"),
        ({"k" * 60: Thing()}, f"session['cart']['{'k' * 40}'…] is"),
        (OrderedDict(a=Thing()), "session['cart']['a'] is"),
    ],
)
def test_the_error_says_where_and_of_what_type(value: Any, way: str) -> None:
    """The way to the culprit and its type are named, and no value is shown."""
    text = message({"fine": "secret", "cart": value})
    assert text.startswith(way)
    assert f"of type {Thing.__module__}.Thing" in text
    with pytest.raises(TypeError, match="cannot be kept"):
        encode_value("cart", value)


def test_a_key_that_is_not_text_is_named_with_a_remedy() -> None:
    """Top-level keys must be str; a subclass of it becomes str."""
    text = message({5: "secret"})
    assert "key 5 is of type int" in text
    assert "use a str" in text
    with pytest.raises(TypeError, match="of type NoneType"):
        encode_value(None, 1)  # type: ignore[arg-type]
    assert [type(key) for key in encode({Name.FIRST: 1})] == [str]


def nested(levels: int, wrap: Any) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = wrap(value)
    return value


WRAPS = [lambda v: [v], lambda v: (v,), lambda v: {"a": v}]


@pytest.mark.parametrize("wrap", [*WRAPS, lambda v: frozenset([v]), lambda v: [(v,)]])
def test_nesting_that_is_too_deep_is_an_error(wrap: Any) -> None:
    """However deep, it ends with an error text and not with a crash."""
    assert "nested too deeply" in message({"a": nested(1500, wrap)})


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_was_written_can_be_read_however_deep(wrap: Any) -> None:
    """The depth that writing allows is one that reading allows."""
    for levels in (100, 500, 511, 512, 1023, 1024, 1025):
        try:
            data = encode_value("key", nested(levels, wrap))
        except TypeError:
            assert levels > 500
        else:
            assert encode_value("key", decode_value(data)) == data


def test_a_value_that_contains_itself_is_an_error() -> None:
    """Cycles through lists, dicts and tuples are found and located."""
    cycle: list[Any] = [1]
    cycle.append(({"again": cycle},))
    text = message({"a": cycle})
    assert text.startswith("session['a'][1][0]['again'] is of type list")
    assert "contains itself" in text


def test_an_error_of_the_value_itself_is_left_alone() -> None:
    """What an ``__html__`` method raises is not called a fault of the type."""

    class Broken:
        def __html__(self) -> str:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        encode({"a": [Broken()]})


def test_html_that_uses_a_session_does_not_mix_outputs() -> None:
    """Encoding while encoding gives two separate results."""

    class Nosy:
        def __html__(self) -> str:
            return str(len(encode({"b": ["inner" * 100]})["b"]))

    assert decode(encode({"a": ["before", Nosy(), "after"]})) == {
        "a": ["before", Markup("504"), "after"]
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01\x02",
        b"\xa5abc",
        b"\x81\x90\x01",
        b"\xd4\x7f\x00",
        b"\xc7\x00\x01",
        b"\x92\x01\xc7\x00\x01",
        b"\x93\xc7\x00\x01\xc7\x00\x02\x01",
        b"\x92\xc7\x00\x02\x90",
        b"\xd4\x06\x00",
        b"\xd4\x07x",
        b"\xd4\x08x",
        b"\xd4\x0bx",
        b"\x91" * 5000 + b"\x01",
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_malformed_bytes_are_a_value_error(data: bytes) -> None:
    """Cut, trailing, unknown and misplaced bytes are all one kind of error."""
    with pytest.raises(ValueError, match="Malformed session value"):
        decode_value(data)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_value_or_a_value_error(data: bytes) -> None:
    """Nothing but ValueError comes out of bytes that nobody wrote."""
    with suppress(ValueError):
        decode_value(data)
