"""A session's data as bytes and back, every value with the type that it had.

Each top-level key is encoded by itself, so that a change is found by comparing
bytes and only changed keys are encoded. The format is msgpack; types that
msgpack lacks are extensions of it. Reading creates values of the types listed
here and nothing else: no stored byte chooses code to run.

* Kept as they are: None, bool, int of any size, float, str, bytes, list, tuple,
  dict with any keys of these types, set, frozenset, Markup, UUID, Decimal,
  datetime, date, time (with ``fold``; time zones: see below), timedelta.
* Made into their base type, as Flask's own session does: subclasses of these
  (OrderedDict, IntEnum, named tuples); bytearray becomes bytes, and an object
  with ``__html__`` becomes Markup.
* A ``ZoneInfo`` comes back by its name, any other time zone as its fixed offset
  from UTC, which also stands in for a name that is unknown where it is read.
"""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, NoReturn
from uuid import UUID
from zoneinfo import ZoneInfo

import msgpack
from markupsafe import Markup
from msgpack import ExtType

# Extension numbers are part of every stored session: never change or reuse one.
TUPLE, SET, FROZENSET = 1, 2, 3
BIG_INT, MARKUP, UUID_BYTES, DECIMAL = 4, 5, 6, 7
DATETIME, DATE, TIME, TIMEDELTA = 8, 9, 10, 11

# A tuple or set is an array whose first item is an extension without data. An
# extension *around* the items would need a packer and an unpacker per level,
# and nesting that msgpack's own limit does not see overflows the C stack.
_MARKS = {
    kind: ExtType(code, b"")
    for kind, code in ((tuple, TUPLE), (set, SET), (frozenset, FROZENSET))
}
_BUILDERS: dict[int, Callable[[list[Any]], Any]] = {
    TUPLE: tuple,
    SET: set,
    FROZENSET: frozenset,
}
#: What the encoding of every mark begins with: an extension of length 0.
_MARK_START = b"\xc7\x00"

#: Sets inside sets, at most; sorting members takes a packer for each level.
_SET_LEVELS = 4
#: Containers inside containers that msgpack writes, at most: 255 to 1024,
#: depending on its version and on whether it is the one in C.
_LEAST_LEVELS, _MOST_LEVELS = 255, 1024

_TIMEDELTA = struct.Struct(">iii")


def encode(session: Mapping[str, Any]) -> dict[str, bytes]:
    """Encode a session, each top-level value by itself.

    :param session: the data; only str keys at the top level.
    :returns: the encoded value of each key, in the same order.
    :raises TypeError: a key is not str, or a value holds something that cannot
        be kept, contains itself or is nested too deeply; the text says where.
    """
    pack = _packer().pack
    payload: dict[str, bytes] = {}
    for key, value in session.items():
        name = key if type(key) is str else _checked_key(key)
        try:
            payload[name] = pack(value)
        except (TypeError, ValueError, RecursionError) as error:
            _explain(name, value, error)
    return payload


def encode_value(key: str, value: Any) -> bytes:
    """Encode one top-level value: the same bytes that :func:`encode` gives.

    :param key: its key in the session, for the error text.
    :param value: the value.
    :raises TypeError: as for :func:`encode`.
    """
    name = key if type(key) is str else _checked_key(key)
    try:
        packed: bytes = _packer().pack(value)
    except (TypeError, ValueError, RecursionError) as error:
        _explain(name, value, error)
    return packed


def decode(payload: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the session that :func:`encode` was given.

    :param payload: encoded values by key.
    :raises ValueError: a value is malformed.
    """
    return {key: decode_value(data) for key, data in payload.items()}


def decode_value(data: bytes) -> Any:
    """Return the value that :func:`encode_value` was given.

    :param data: exactly one encoded value.
    :raises ValueError: the bytes are malformed, or more than one value.
    """
    try:
        if _MARK_START in data:
            return _MarkedReader().read(data)
        return msgpack.unpackb(
            data,
            ext_hook=_read_scalar,
            strict_map_key=False,
            timestamp=3,  # a datetime; never written here, but known to msgpack
            unicode_errors="surrogatepass",
        )
    except _MALFORMED as error:
        # Not chained: msgpack's errors carry the data.
        reason = type(error).__name__
        raise ValueError(f"Malformed session value ({reason}).") from None


# -- writing -----------------------------------------------------------------


def _packer(set_levels: int = _SET_LEVELS) -> msgpack.Packer:
    """Return a new packer.

    A packer that is used again before it is done mixes up the two outputs: by
    another thread or greenlet, or by an ``__html__`` method that itself uses a
    session. A new one takes 0.1 us, as much as finding one kept per thread.
    """
    default = _plain if set_levels == _SET_LEVELS else partial(_plain, sets=set_levels)
    return msgpack.Packer(
        default=default, strict_types=True, unicode_errors="surrogatepass"
    )


class _TooDeep(ValueError):
    """Sets inside sets, over the limit."""


def _plain(value: Any, sets: int = _SET_LEVELS) -> Any:
    """Return something that msgpack can write in place of ``value``.

    :param sets: how many levels of sets may follow.
    """
    kind = _kind_of(value)
    if kind is tuple:
        return [_MARKS[tuple], *value]
    if kind is set or kind is frozenset:
        if not sets:
            raise _TooDeep
        # Equal sets must give equal bytes, whatever order they are walked in.
        return [_MARKS[kind], *sorted(value, key=_packer(sets - 1).pack)]
    if kind is None:
        raise TypeError("unsupported type")
    return _WRITERS[kind](value)


def _kind_of(value: Any) -> type | None:
    """Return the supported type that a value is kept as; None: there is none."""
    kind = type(value)
    if kind in _KINDS:
        return kind
    # Containers come before ``__html__`` and plain values after it, in the
    # order in which Flask's own session asks.
    for base in (dict, tuple, list, bytes):
        if isinstance(value, base):
            return base
    if isinstance(value, (bytearray, memoryview)):
        return bytes
    if kind is not type and callable(getattr(value, "__html__", None)):
        return Markup
    return next((base for base in _BASES if isinstance(value, base)), None)


def _write_int(value: int) -> Any:
    number = int.__int__(value)
    if -(2**63) <= number < 2**64:
        return number
    # One bit more than the number needs, for the sign.
    size = number.bit_length() // 8 + 1
    return ExtType(BIG_INT, number.to_bytes(size, "big", signed=True))


def _write_clock(code: int, value: datetime | time, text: str) -> ExtType:
    zone = value.tzinfo
    if isinstance(zone, ZoneInfo) and zone.key:
        text = f"{text}|{zone.key}"
    return ExtType(code, f"{value.fold}{text}".encode())


def _write_markup(value: Any) -> ExtType:
    text = str.__str__(Markup(value))
    return ExtType(MARKUP, text.encode("utf-8", "surrogatepass"))


def _write_timedelta(value: timedelta) -> ExtType:
    parts = (value.days, value.seconds, value.microseconds)
    return ExtType(TIMEDELTA, _TIMEDELTA.pack(*parts))


# The methods of the base types are named, not those of the value, since a
# subclass may do something else in them.
_WRITERS: dict[type, Callable[[Any], Any]] = {
    dict: lambda value: dict(value.items()),
    list: list,
    bytes: bytes,
    str: str.__str__,
    float: float.__float__,
    int: _write_int,
    Markup: _write_markup,
    UUID: lambda value: ExtType(UUID_BYTES, value.bytes),
    Decimal: lambda value: ExtType(DECIMAL, Decimal.__str__(value).encode()),
    datetime: lambda value: _write_clock(DATETIME, value, datetime.isoformat(value)),
    date: lambda value: ExtType(DATE, date.isoformat(value).encode()),
    time: lambda value: _write_clock(TIME, value, time.isoformat(value)),
    timedelta: _write_timedelta,
}
# A datetime is a date: it has to be asked for first, as it stands above.
_BASES = (*_WRITERS, set, frozenset)
_KINDS = frozenset((*_BASES, tuple, bool, type(None)))


# -- reading -----------------------------------------------------------------

#: All that reading malformed bytes raises. Not MemoryError: it says nothing about
#: the bytes, and a value that is called malformed may be thrown away.
_MALFORMED = (
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    RecursionError,
    struct.error,
)


def _read_scalar(code: int, data: bytes) -> Any:
    """Return the value of an extension that is not the mark of a container."""
    return _READERS[code](data)


class _MarkedReader:
    """Reads one value that has tuples or sets in it."""

    def __init__(self) -> None:
        self._unclaimed = 0

    def read(self, data: bytes) -> Any:
        value = msgpack.unpackb(
            data,
            ext_hook=self._extension,
            list_hook=self._array,
            strict_map_key=False,
            timestamp=3,  # a datetime; never written here, but known to msgpack
            unicode_errors="surrogatepass",
        )
        if self._unclaimed:
            raise ValueError("a mark is not at the start of an array")
        return value

    def _extension(self, code: int, data: bytes) -> Any:
        if code in _BUILDERS and not data:
            self._unclaimed += 1
            return _Mark(code)
        return _read_scalar(code, data)

    def _array(self, items: list[Any]) -> Any:
        if items and type(items[0]) is _Mark:
            self._unclaimed -= 1
            return _BUILDERS[items[0].code](items[1:])
        return items


class _Mark:
    """Stands at the start of an array until the whole array is read."""

    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


def _read_clock(kind: type[datetime | time], data: bytes) -> datetime | time:
    text, _, zone = data[1:].decode().partition("|")
    value = kind.fromisoformat(text)
    if zone:
        try:
            value = value.replace(tzinfo=ZoneInfo(zone))
        except (KeyError, ValueError, OSError):
            # This machine does not know the zone; the offset names the instant.
            pass
    return value.replace(fold=int(data[:1]))


_READERS: dict[int, Callable[[bytes], Any]] = {
    BIG_INT: lambda data: int.from_bytes(data, "big", signed=True),
    MARKUP: lambda data: Markup(data.decode("utf-8", "surrogatepass")),
    UUID_BYTES: lambda data: UUID(bytes=data),
    DECIMAL: lambda data: Decimal(data.decode()),
    DATETIME: partial(_read_clock, datetime),
    DATE: lambda data: date.fromisoformat(data.decode()),
    TIME: partial(_read_clock, time),
    TIMEDELTA: lambda data: timedelta(*_TIMEDELTA.unpack(data)),
}


# -- error texts -------------------------------------------------------------


def _checked_key(key: object) -> str:
    """Return a top-level key as a plain str, or raise TypeError."""
    if isinstance(key, str):
        return str.__str__(key)
    raise TypeError(
        f"The session key {reprlib.repr(key)} is of type {_name(type(key))}, but"
        " the keys of a session must be str: use a str instead, such as str(key)."
    )


def _explain(key: str, value: Any, error: Exception) -> NoReturn:
    """Raise a TypeError that says what could not be encoded, and where.

    Only types and the way to the culprit are named: values may be secret.

    :param key: the top-level key.
    :param value: its value.
    :param error: what msgpack, or a method of the value, raised.
    """
    steps, kind, deep = _culprit(value)
    if kind is None and isinstance(error, (_TooDeep, RecursionError)):
        kind, deep = type(value), True
    if kind is None:
        # Nothing is wrong with the types: the value's own code raised this.
        raise error
    if len(steps) > 10:
        steps = [*steps[:10], "…"]
    where = f"session[{_label(key)}]{''.join(steps)} is of type {_name(kind)}"
    if deep:
        raise TypeError(
            f"{where} and is nested too deeply or contains itself, so that it cannot"
            " be kept in a session: store a flat copy of what is needed."
        ) from None
    raise TypeError(
        f"{where}, which cannot be kept in a session: store plain values such as"
        " str, int, list or dict instead, or an id to look the object up by."
    ) from None


def _culprit(value: Any) -> tuple[list[str], type | None, bool]:
    """Find the first part of a value that cannot be encoded.

    :returns: the way to it, its type (None: nothing found), and whether it is
        at fault for its nesting rather than for its type.
    """
    # No recursion: the value may be deeper than the interpreter's limit.
    steps: list[str] = []
    above: list[int] = []
    depth = 0
    stack: list[Iterator[tuple[str, Any]]] = [iter([("", value)])]
    while stack:
        step, part = next(stack[-1], (None, None))
        if step is None:
            stack.pop()
            if stack:
                steps.pop()
                above.pop()
            continue
        kind = _kind_of(part)
        if kind is None:
            return [*steps, step], type(part), False
        if kind in _CONTAINERS:
            if id(part) in above or len(above) > _MOST_LEVELS:
                return [*steps, step], type(part), True
            steps.append(step)
            above.append(id(part))
            stack.append(_parts(kind, part))
            depth = max(depth, len(above))
    if depth >= _LEAST_LEVELS:
        return [], type(value), True
    return [], None, False


_CONTAINERS = (dict, list, tuple, set, frozenset)


def _parts(kind: type, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a container, each with the step that leads to it."""
    if kind is dict:
        for key, item in value.items():
            yield "[<key>]", key
            yield f"[{_label(key)}]", item
    elif kind is list or kind is tuple:
        for index, item in enumerate(value):
            yield f"[{index}]", item
    else:
        for item in value:
            yield "[<member>]", item


def _label(key: object) -> str:
    """Return a key for an error text: short, and only if it is simple."""
    if type(key) is str:
        return repr(key) if len(key) <= 40 else repr(key[:40]) + "…"
    return (
        str(key) if type(key) is int and abs(key) < 2**64 else f"<{_name(type(key))}>"
    )


def _name(kind: type) -> str:
    """Return the name of a type, with its module unless it is built in."""
    module = kind.__module__
    return (
        kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"
    )
