"""The grammar of memcached's text protocol, as far as this package speaks it.

Requests know their bytes and how to read their reply; there are no sockets here.
Parsing is strict: a reply is used only when it fits its request to the last byte,
so that a connection that has lost its place is noticed at the first reply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, TypeAlias

from ..core.answers import Ack

#: memcached answers a key of 250 bytes and three numbers of 20 digits in less.
_LONGEST_LINE: Final = 512

_LINE_END: Final = b"\r\n"


class ProtocolError(Exception):
    """The bytes do not fit the request; the connection must be closed."""


@dataclass(frozen=True, slots=True)
class Value:
    """An item: bytes, the flags stored with it, and its cas number.

    ``data`` is None for an item longer than the caller is willing to read: it is
    still to be skipped.
    """

    data: bytes | None
    flags: int
    cas: int


@dataclass(frozen=True, slots=True)
class Absent:
    """The node holds no such item."""


Parsed: TypeAlias = Value | Absent | Ack


class Request(Protocol):
    """A request as bytes, and the reader of its reply."""

    #: Whether it may be sent again on another connection when nobody knows if it
    #: was applied.
    repeatable: bool

    def encode(self) -> bytes:
        """The bytes to send."""

    def parse(self, data: bytes) -> tuple[Parsed, int] | None:
        """The reply at the start of ``data`` and its length, None if incomplete.

        The length of an item that is too long to read may be more than ``data`` has.

        :raises ProtocolError: the bytes do not fit this request.
        """


@dataclass(frozen=True, slots=True)
class Get:
    """Read one item with its cas number.

    :ivar key: the memcached key.
    :ivar limit: longest item, in bytes, that is read.
    """

    key: str
    limit: int
    repeatable = True

    def encode(self) -> bytes:
        return b"gets " + self.key.encode("ascii") + _LINE_END

    def parse(self, data: bytes) -> tuple[Parsed, int] | None:
        if data.startswith(b"END\r\n"):
            return Absent(), 5
        line = _first_line(data)
        if line is None:
            return None
        flags, length, cas = self._parse_header(line)
        start = len(line) + 2
        end = start + length
        whole = end + len(b"\r\nEND\r\n")
        if length > self.limit:
            return Value(None, flags, cas), whole
        if len(data) < whole:
            return None
        if data[end:whole] != b"\r\nEND\r\n":
            raise ProtocolError("the item does not end where its length says")
        return Value(data[start:end], flags, cas), whole

    def _parse_header(self, line: bytes) -> tuple[int, int, int]:
        words = line.split(b" ")
        if len(words) != 5 or words[0] != b"VALUE":
            raise ProtocolError("the reply is neither an item nor a miss")
        if words[1] != self.key.encode("ascii"):
            raise ProtocolError("the reply is about another key")
        if not all(word.isdigit() and len(word) <= 20 for word in words[2:]):
            raise ProtocolError("the item's header is malformed")
        return int(words[2]), int(words[3]), int(words[4])


class _Write:
    """What all writes share: a reply of one line."""

    __slots__ = ()
    repeatable = False
    answers: ClassVar[Mapping[bytes, Ack]]

    def parse(self, data: bytes) -> tuple[Parsed, int] | None:
        line = _first_line(data)
        if line is None:
            return None
        ack = self.answers.get(line)
        if ack is None and line.startswith(b"SERVER_ERROR"):
            ack = Ack.REJECTED
        if ack is None:
            raise ProtocolError("the reply is not an answer to a write")
        return ack, len(line) + 2


@dataclass(frozen=True, slots=True)
class Add(_Write):
    """Store an item where there is none.

    :ivar exptime: seconds that it is kept; more than 30 days' memcached takes for the
        Unix date in seconds until which it is kept.
    """

    key: str
    data: bytes
    exptime: int
    answers: ClassVar[Mapping[bytes, Ack]] = {
        b"STORED": Ack.STORED,
        b"NOT_STORED": Ack.CONFLICT,
    }

    def encode(self) -> bytes:
        return _storage(b"add", self.key, self.data, self.exptime)


@dataclass(frozen=True, slots=True)
class Cas(_Write):
    """Replace an item that nobody wrote since it was read.

    :ivar cas: the cas number read.
    :ivar read_at: when in the node's life it was read (see ``record.Token``).
    """

    key: str
    data: bytes
    exptime: int
    cas: int
    read_at: int
    answers: ClassVar[Mapping[bytes, Ack]] = {
        b"STORED": Ack.STORED,
        b"EXISTS": Ack.CONFLICT,
        b"NOT_FOUND": Ack.CONFLICT,
    }

    def encode(self) -> bytes:
        cas = b" %d" % self.cas
        return _storage(b"cas", self.key, self.data, self.exptime, cas)


@dataclass(frozen=True, slots=True)
class Set(_Write):
    """Store an item whatever stands there: for tombstones, which win anyway."""

    key: str
    data: bytes
    exptime: int
    repeatable = True
    answers: ClassVar[Mapping[bytes, Ack]] = {
        b"STORED": Ack.STORED,
        b"NOT_STORED": Ack.REJECTED,
    }

    def encode(self) -> bytes:
        return _storage(b"set", self.key, self.data, self.exptime)


@dataclass(frozen=True, slots=True)
class Delete(_Write):
    """Remove an item; removing none is as good."""

    key: str
    repeatable = True
    answers: ClassVar[Mapping[bytes, Ack]] = {
        b"DELETED": Ack.STORED,
        b"NOT_FOUND": Ack.STORED,
    }

    def encode(self) -> bytes:
        return b"delete " + self.key.encode("ascii") + _LINE_END


def _storage(
    verb: bytes, key: str, data: bytes, exptime: int, cas: bytes = b""
) -> bytes:
    # Flags are always 0: what a client makes of other flags is not ours to decide.
    head = b"%s %s 0 %d %d" % (verb, key.encode("ascii"), exptime, len(data))
    return b"".join((head, cas, _LINE_END, data, _LINE_END))


def _first_line(data: bytes) -> bytes | None:
    end = data.find(_LINE_END, 0, _LONGEST_LINE)
    if end >= 0:
        return data[:end]
    if len(data) >= _LONGEST_LINE:
        raise ProtocolError("the reply has no line end where one belongs")
    return None
