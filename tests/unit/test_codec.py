"""The codec gives back what it was given, type for type, or says why not."""

from __future__ import annotations

import enum
import math
import struct
from collections import OrderedDict, defaultdict, namedtuple
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

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

TEXT = st.text(st.characters())  # lone surrogates too
# Whole seconds: Python itself misreads an offset of less than one.
OFFSETS = st.integers(-86_399, 86_399).map(lambda s: timezone(timedelta(seconds=s)))
ZONES = st.none() | OFFSETS | st.sampled_from(["UTC", "Europe/Berlin"]).map(ZoneInfo)
FOLDS = st.integers(0, 1)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    TEXT,
    st.binary(),
    TEXT.map(Markup),
    st.uuids(),
    st.decimals(),
    st.builds(lambda at, fold: at.replace(fold=fold), st.datetimes(), FOLDS),
    st.builds(
        lambda at, zone, fold: at.replace(tzinfo=zone, fold=fold),
        st.datetimes(),
        ZONES,
        FOLDS,
    ),
    st.dates(),
    st.builds(
        lambda at, zone, fold: at.replace(tzinfo=zone, fold=fold),
        st.times(),
        ZONES,
        FOLDS,
    ),
    st.timedeltas(),
)
# A signalling NaN cannot be hashed.
HASHABLE_SCALARS = SCALARS.filter(
    lambda value: not (isinstance(value, Decimal) and value.is_snan())
)
HASHABLE = HASHABLE_SCALARS | st.recursive(
    HASHABLE_SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4
)
VALUES = st.recursive(
    SCALARS | st.sets(HASHABLE, max_size=4) | st.frozensets(HASHABLE, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(HASHABLE | st.frozensets(HASHABLE), inner, max_size=4)
    ),
    max_leaves=12,
)


def shape(value: Any) -> Any:
    """Return a value as something that is equal only for identical types."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, [shape(item) for item in value]
    if kind in (set, frozenset):
        return kind, sorted((shape(item) for item in value), key=repr)
    if kind is dict:
        return kind, [(shape(key), shape(item)) for key, item in value.items()]
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is Decimal:
        return kind, value.as_tuple()
    if kind in (datetime, time):
        zone = value.tzinfo
        name = zone.key if isinstance(zone, ZoneInfo) else value.utcoffset()
        return kind, value.replace(tzinfo=None), value.fold, name
    return kind, value


def round_trip(value: Any) -> Any:
    return decode_value(encode_value("key", value))


@given(VALUES)
def test_every_value_comes_back_with_its_type(value: Any) -> None:
    """Reading what was written gives the same value of the same types."""
    assert shape(round_trip(value)) == shape(value)


@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_a_session_comes_back_in_order(session: dict[str, Any]) -> None:
    """A whole session survives, and each key is encoded by itself."""
    payload = encode(session)
    assert shape(decode(payload)) == shape(session)
    assert payload == {key: encode_value(key, session[key]) for key in session}


@given(VALUES)
def test_equal_values_give_equal_bytes(value: Any) -> None:
    """What was read is written as the bytes that it was read from."""
    data = encode_value("key", value)
    assert encode_value("key", decode_value(data)) == data


def test_sets_are_written_in_one_order() -> None:
    """Sets that were filled in another order have the same bytes."""
    numbers = [n * 2**20 for n in range(50)]
    straight, backwards = set(numbers), set[int]()
    while numbers:
        backwards.add(numbers.pop())
    assert encode_value("key", straight) == encode_value("key", backwards)
    assert encode_value("key", {"b", "a"}) == encode_value("key", {"a", "b"})


class Colour(enum.IntEnum):
    RED = 1


class Size(str, enum.Enum):
    LARGE = "l"


class Html:
    def __html__(self) -> str:
        return "<b>"


class Doubling(list[int]):
    pass


class Renamed(dict[str, int]):
    def __html__(self) -> str:
        return "not used"


class Moment(datetime):
    pass


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (Renamed(a=1), {"a": 1}),
        (Doubling([1, 2]), [1, 2]),
        (Point(1, Point(2, 3)), (1, (2, 3))),
        (Colour.RED, 1),
        (type("Big", (int,), {})(2**80), 2**80),
        (type("Ratio", (float,), {})(0.5), 0.5),
        (Size.LARGE, "l"),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"ab"), b"ab"),
        (type("Raw", (bytes,), {})(b"ab"), b"ab"),
        (Html(), Markup("<b>")),
        (Moment(2024, 1, 2, 3, 4, 5, 6), datetime(2024, 1, 2, 3, 4, 5, 6)),
        ({Colour.RED: {Size.LARGE}}, {1: {"l"}}),
    ],
)
def test_subclasses_become_their_base_type(value: Any, base: Any) -> None:
    """A subclass is kept as the supported type that it is built on."""
    assert shape(round_trip(value)) == shape(base)


BERLIN = ZoneInfo("Europe/Berlin")
GOLDEN: dict[bytes, Any] = {
    b"\xc0": None,
    b"\xc3": True,
    b"\xcd\x01\x2c": 300,
    b"\xc7\x09\x04\x01" + bytes(8): 2**64,
    b"\xc7\x09\x04\xff\x7f" + b"\xff" * 7: -(2**63) - 1,
    b"\xcb\x7f\xf8" + bytes(6): math.nan,
    b"\xa3\xed\xa0\x80": "\ud800",
    b"\xc4\x02\x00\x01": b"\x00\x01",
    b"\x92\x01\x02": [1, 2],
    b"\x93\xc7\x00\x01\x01\x02": (1, 2),
    b"\x93\xc7\x00\x02\x01\x02": {1, 2},
    b"\x92\xc7\x00\x03\xa1a": frozenset({"a"}),
    b"\x81\xc3\xa1a": {True: "a"},
    b"\xc7\x03\x05<b>": Markup("<b>"),
    b"\xd8\x06" + bytes(15) + b"\x05": UUID(int=5),
    b"\xc7\x05\x07-1.50": Decimal("-1.50"),
    b"\xc7\x1b\x0812024-01-02T03:04:05.000006": (
        datetime(2024, 1, 2, 3, 4, 5, 6, fold=1)
    ),
    b"\xc7\x1a\x0802024-07-02T00:00:00+00:00": (
        datetime(2024, 7, 2, tzinfo=timezone.utc)
    ),
    b"\xc7\x28\x0802024-07-02T03:04:00+02:00|Europe/Berlin": (
        datetime(2024, 7, 2, 3, 4, tzinfo=BERLIN)
    ),
    b"\xc7\x0a\x092024-01-02": date(2024, 1, 2),
    b"\xd8\x0a003:04:05.000006": time(3, 4, 5, 6),
    b"\xc7\x0c\x0b\xff\xff\xff\xff\0\0\0\x02\0\0\0\x03": timedelta(-1, 2, 3),
}


def test_stored_bytes_mean_the_same_in_every_release() -> None:
    """If this fails, an upgrade could not read the sessions that are stored."""
    for data, value in GOLDEN.items():
        assert shape(decode_value(data)) == shape(value)
        assert encode_value("key", value) == data


def test_an_unknown_zone_is_read_as_its_offset() -> None:
    """A machine without the zone's rules still gets the right instant."""
    data = encode_value("key", datetime(2024, 7, 2, 3, 4, tzinfo=BERLIN))
    for name in (b"Europe/Nowhere", b"../../etc/pass"):
        moment = decode_value(data.replace(b"Europe/Berlin", name[:13]))
        assert moment.tzinfo == timezone(timedelta(hours=2))
        assert moment == datetime(2024, 7, 2, 3, 4, tzinfo=BERLIN)
