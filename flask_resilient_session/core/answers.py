"""What nodes and SQL answer, as values: an error is not an absence.

A node holds something, nothing, or bytes that are no record; or it did not answer,
which says nothing about the session. The same goes for SQL.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from .record import Copy, Record, Tombstone

# --- what a node holds -----------------------------------------------------------


class Token(NamedTuple):
    """A compare-and-swap token, and when in the node's life it was read.

    memcached's counter restarts with the server, so that a token is only good on a
    connection opened before the token was read.
    """

    value: int
    read_at: int


@dataclass(frozen=True, slots=True)
class Hit:
    """The node holds a record or tombstone of this session."""

    copy: Copy
    token: Token


@dataclass(frozen=True, slots=True)
class Miss:
    """The node answered that it holds nothing."""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """No answer, or one that cannot be used: it says nothing about the session.

    :ivar sealed: the node does hold a record, under a key or format unknown here.
    """

    reason: str
    sealed: bool = False


@dataclass(frozen=True, slots=True)
class Corrupt:
    """The node holds bytes that are not a record of this session."""

    token: Token


Reply: TypeAlias = Hit | Miss | Unreachable | Corrupt


# --- what a node says about a write ----------------------------------------------


class Ack(enum.Enum):
    """What a node says about a write."""

    STORED = "stored"
    #: Somebody else wrote in between; nothing was changed.
    CONFLICT = "conflict"
    #: The node answered that it cannot; the old value may still be readable.
    REJECTED = "refused"
    #: No answer: the write may be applied, now or later, or never.
    UNREACHABLE = "unreachable"


# --- what SQL answers ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowLive:
    """A live row; its record carries the row's version."""

    record: Record


@dataclass(frozen=True, slots=True)
class RowDead:
    """A tombstone row."""

    tombstone: Tombstone


@dataclass(frozen=True, slots=True)
class RowMissing:
    """SQL answered that there is no row."""


@dataclass(frozen=True, slots=True)
class RowCorrupt:
    """A live row whose record is not one of this session's."""

    version: int


@dataclass(frozen=True, slots=True)
class SqlSilent:
    """SQL could not be asked, or its record is under a key unknown to this worker.

    :ivar well: SQL may be well; this process had too many questions already, which
        is no reason to guess.
    """

    reason: str
    well: bool = False


RowAnswer: TypeAlias = RowLive | RowDead | RowMissing | RowCorrupt | SqlSilent
