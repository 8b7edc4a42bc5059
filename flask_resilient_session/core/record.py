"""A session as it is stored: its state, and how two states join.

The state is a join-semilattice, so that copies converge in whatever order they
meet: each top-level key carries a stamp, and the higher stamp wins. A tombstone
is the top: joined with anything it stays a tombstone.

A deleted key leaves a marker (an entry without a value), or an old copy would
bring the key back. A sync drops the markers, and the highest stamp dropped
becomes the record's *floor*: of a copy with a lower floor only entries stamped
above it count, since whoever raised the floor had seen all the rest.

Times are Unix milliseconds. Nothing here reads a clock or does I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple, TypeAlias

#: (counter, nonce). The counter is the larger of the Unix time in milliseconds and
#: one more than the largest that the writer saw: a clock alone would let a slow
#: clock's newer write lose, a count alone would let a write that only SQL
#: acknowledged lose to copies that were ahead of it.
Stamp: TypeAlias = tuple[int, int]

#: Bits of a nonce: two writers that pick the same counter must not tie.
NONCE_BITS: Final = 64

NO_FLOOR: Final[Stamp] = (0, 0)

EndReason: TypeAlias = Literal["ended", "moved"]


class Entry(NamedTuple):
    """One top-level key's stamp and encoded value; no value: the key is deleted."""

    counter: int
    nonce: int
    value: bytes | None

    @property
    def stamp(self) -> Stamp:
        """What decides between two values of one key."""
        return (self.counter, self.nonce)


@dataclass(frozen=True, slots=True)
class Record:
    """A live session as a node or SQL holds it.

    :ivar entries: key -> entry, deletion markers included.
    :ivar floor: see the module's text.
    :ivar created_ms: when the session was created.
    :ivar last_use_ms: when it was last used, as far as this copy was told.
    :ivar synced_ms: when SQL was last written; 0 for never.
    :ivar row_version: version of the SQL row at that sync; 0 for none.
    :ivar writes: modifications since that sync.
    :ivar never_synced: the session has no row yet, so that a missing row does not
        mean that the session is gone.
    :ivar unverified: written while SQL could not be asked.
    :ivar homes: names of the nodes that held the session for its last writer.
    """

    entries: Mapping[str, Entry] = field(default_factory=dict)
    floor: Stamp = NO_FLOOR
    created_ms: int = 0
    last_use_ms: int = 0
    synced_ms: int = 0
    row_version: int = 0
    writes: int = 0
    never_synced: bool = False
    unverified: bool = False
    homes: tuple[str, ...] = ()

    def payload(self) -> dict[str, bytes]:
        """Live keys and their encoded values."""
        return {
            key: entry.value
            for key, entry in self.entries.items()
            if entry.value is not None
        }

    def size(self) -> int:
        """Bytes that count towards the size limit: live keys and values."""
        return sum(
            len(key.encode("utf-8", "surrogatepass")) + len(entry.value)
            for key, entry in self.entries.items()
            if entry.value is not None
        )

    def largest_counter(self) -> int:
        """The largest counter seen so far; the next write goes above it."""
        return max(
            (entry.counter for entry in self.entries.values()), default=self.floor[0]
        )


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What stands where a session was ended or moved to another id.

    :ivar reason: ``"ended"`` (logout, revocation) or ``"moved"`` (regenerated).
    :ivar ended_ms: when.
    :ivar debt: SQL has not been told yet; whoever reads this tells it.
    """

    reason: EndReason
    ended_ms: int
    debt: bool = False


Copy: TypeAlias = Record | Tombstone


# --- the lattice -----------------------------------------------------------------


def join(left: Copy, right: Copy) -> Copy:
    """The least state that holds both: commutative, associative, idempotent."""
    if isinstance(left, Tombstone):
        return join_tombstones(left, right) if isinstance(right, Tombstone) else left
    if isinstance(right, Tombstone):
        return right
    return join_records(left, right)


def join_records(left: Record, right: Record) -> Record:
    """:func:`join` for two live records."""
    floor = max(left.floor, right.floor)
    entries = _above(left, floor)
    for key, entry in _above(right, floor).items():
        other = entries.get(key)
        entries[key] = entry if other is None else _later(entry, other)
    # The newest sync's bookkeeping is taken as a whole: a version with another
    # sync's time would let one of the two be judged by the other.
    newest = max(left, right, key=_sync_order)
    return Record(
        entries=entries,
        floor=floor,
        created_ms=min(left.created_ms, right.created_ms),
        last_use_ms=max(left.last_use_ms, right.last_use_ms),
        synced_ms=newest.synced_ms,
        row_version=newest.row_version,
        writes=newest.writes,
        never_synced=left.never_synced and right.never_synced,
        unverified=left.unverified or right.unverified,
        homes=max(left.homes, right.homes),
    )


def changes_between(seen: Record, late: Record) -> dict[str, bytes | None]:
    """What others have changed since a record was read.

    The two are joined first: an entry that stands below the other record's floor was
    seen and dropped by somebody, and does not count.

    :param late: what was found afterwards.
    :returns: key -> encoded value, or None for a deleted key.
    """
    before, after = seen.payload(), join_records(seen, late).payload()
    return {
        key: after.get(key)
        for key in before | after
        if after.get(key) != before.get(key)
    }


def same_state(left: Record, right: Record) -> bool:
    """Whether two records hold the same keys at the same stamps; times may differ."""
    return left.entries == right.entries and left.floor == right.floor


def _above(record: Record, floor: Stamp) -> dict[str, Entry]:
    if record.floor == floor:
        return dict(record.entries)
    return {k: entry for k, entry in record.entries.items() if entry.stamp > floor}


def _later(left: Entry, right: Entry) -> Entry:
    return max(left, right, key=_entry_order)


def _entry_order(entry: Entry) -> tuple[int, int, bool, bytes]:
    # One stamp is one write, so equal stamps come with equal values. The last two
    # members only keep the join commutative should that ever not hold.
    return (entry.counter, entry.nonce, entry.value is not None, entry.value or b"")


def _sync_order(record: Record) -> tuple[int, int, int]:
    return (record.row_version, record.synced_ms, record.writes)


def join_tombstones(left: Tombstone, right: Tombstone) -> Tombstone:
    """:func:`join` for two tombstones."""
    # "ended" outranks "moved": a moved id may still log in within its first minute.
    reason: EndReason = "ended" if "ended" in (left.reason, right.reason) else "moved"
    return Tombstone(
        reason=reason,
        ended_ms=max(left.ended_ms, right.ended_ms),
        debt=left.debt and right.debt,
    )


# --- writing ---------------------------------------------------------------------


def apply_changes(
    record: Record, changes: Mapping[str, bytes | None], now_ms: int, nonce: int
) -> Record:
    """The record after one request's changes, all under one new stamp.

    :param changes: key -> encoded value, or None to delete the key.
    :param nonce: random, :data:`NONCE_BITS` wide.
    """
    counter = max(record.largest_counter() + 1, record.floor[0] + 1, now_ms)
    # A deleted key leaves its marker even where this record has never had it: the
    # request saw it on a copy that may be heard of later.
    entries = dict(record.entries)
    for key, value in changes.items():
        entries[key] = Entry(counter, nonce, value)
    return replace(
        record,
        entries=entries,
        writes=record.writes + 1,
        last_use_ms=max(record.last_use_ms, now_ms),
    )


def drop_markers(record: Record) -> Record:
    """The record without its deletion markers, and with a floor above them.

    Only for a record that both homes hold and SQL has nothing to add to: the floor
    claims that everything stamped below it has been seen.
    """
    markers = [entry for entry in record.entries.values() if entry.value is None]
    if not markers:
        return record
    floor = max(record.floor, *(entry.stamp for entry in markers))
    entries = {
        key: entry for key, entry in record.entries.items() if entry.value is not None
    }
    return replace(record, entries=entries, floor=floor)
