"""The protocol's rules, switched off one at a time.

The checkers are worth something only if they notice: each of these must be caught.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

from flask_resilient_session.common.errors import SqlUnavailable
from flask_resilient_session.core import reading
from flask_resilient_session.core.answers import Ack, Hit, Miss
from flask_resilient_session.core.lifetimes import exptime_seconds as exptime
from flask_resilient_session.core.lifetimes import touch_due
from flask_resilient_session.core.reading import Gone, InsertFirst, Live, Standing
from flask_resilient_session.core.record import Record, Tombstone, drop_markers
from flask_resilient_session.core.writing import Outcome, SqlNeed
from flask_resilient_session.maintenance.reaper import Reaper
from flask_resilient_session.memcached.cluster import Cluster
from flask_resilient_session.memcached.text_protocol import Set
from flask_resilient_session.store import load as loading
from flask_resilient_session.store import move as moving
from flask_resilient_session.store import replicas as homes
from flask_resilient_session.store import save as saving
from flask_resilient_session.store.context import SessionContext
from flask_resilient_session.store.end import Ender
from flask_resilient_session.store.load import Loader
from flask_resilient_session.store.move import Mover
from flask_resilient_session.store.replicas import Homes
from flask_resilient_session.store.row import RowRepository
from flask_resilient_session.store.save import Saver


class Patch(Protocol):
    """Sets an attribute until the test ends."""

    def __call__(self, target: object, name: str, value: object) -> None:
        """Do it."""


@dataclass(frozen=True)
class Mutation:
    """One rule switched off.

    :ivar kind: the class of schedules that must notice.
    :ivar first: the schedule to begin with: where few notice, one that does.
    """

    name: str
    kind: str
    apply: Callable[[Patch], None]
    first: int = 0


MUTATIONS: list[Mutation] = []


def _mutation(
    kind: str, first: int = 0
) -> Callable[[Callable[[Patch], None]], Callable[..., None]]:
    def register(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTATIONS.append(Mutation(apply.__name__, kind, apply, first))
        return apply

    return register


# --- writing ---------------------------------------------------------------------


@_mutation("none")
def blind_set(patch: Patch) -> None:
    """Copies are set, not swapped."""

    def swap(
        self: Cluster, session_key: str, data: bytes, exptime: int, token: object
    ) -> Set:
        return Set(self._key_prefix + session_key, data, exptime)

    patch(Cluster, "swap", swap)


@_mutation("none")
def conflict_ignored(patch: Patch) -> None:
    """A write that met a concurrent one is acknowledged."""
    real = saving.judge_acks

    def judge_acks(*args: Any, **kwargs: Any) -> Outcome:
        outcome = real(*args, **kwargs)
        return Outcome.ACKNOWLEDGED if outcome is Outcome.CONFLICT else outcome

    patch(saving, "judge_acks", judge_acks)


@_mutation("node")
def one_home_is_enough(patch: Patch) -> None:
    """A change that only one home took is acknowledged without SQL."""
    real = saving.judge_acks

    def judge_acks(acks: Mapping[str, Ack], **kwargs: Any) -> Outcome:
        outcome = real(acks, **kwargs)
        stored = Ack.STORED in acks.values()
        if outcome is Outcome.SQL_NOW and stored:
            return Outcome.ACKNOWLEDGED
        return outcome

    patch(saving, "judge_acks", judge_acks)


@_mutation("node")
def homes_before_sql(patch: Patch) -> None:
    """From less than an agreed pair the homes are written, and SQL when it is due."""
    real = saving.sql_need

    def sql_need(live: Live, **kwargs: Any) -> SqlNeed:
        if live.standing is Standing.CONFIRMED:
            live = replace(live, standing=Standing.AGREED)
        return real(live, **kwargs)

    patch(saving, "sql_need", sql_need)
    patch(saving, "judge_acks", lambda acks, **_: Outcome.ACKNOWLEDGED)


@_mutation("full")
def refused_not_removed(patch: Patch) -> None:
    """A refused write leaves the old copies, which still agree."""
    patch(homes, "to_remove", lambda acks, writable: [])


@_mutation("full", 1023)
def all_refused_removed(patch: Patch) -> None:
    """Every home that refused a write loses its copy, whatever it is by then."""

    def to_remove(acks: Mapping[str, Ack], writable: object) -> list[str]:
        if Ack.STORED in acks.values():
            return []
        return [name for name, ack in acks.items() if ack is Ack.REJECTED]

    patch(homes, "to_remove", to_remove)


@_mutation("none")
def repair_by_set(patch: Patch) -> None:
    """Copies are repaired over whatever stands there by now."""

    def keep_times(
        self: Saver,
        context: SessionContext,
        live: Live,
        record: Record,
        *,
        in_sql: bool,
        now_ms: int,
    ) -> None:
        if in_sql or live.repairs or touch_due(record, context.timing, now_ms):
            data, exptime = self._homes._sealed(context, record, now_ms)
            request = self._homes.cluster.put_tombstone(
                context.session_key, data, exptime
            )
            self._homes.cluster.write(
                [(name, request) for name in live.writable], context.patience
            )

    patch(Saver, "_keep_times", keep_times)


@_mutation("memory")
def sync_only_on_writes(patch: Patch) -> None:
    """A request that changes nothing never writes SQL."""
    real = saving.sql_need

    def sql_need(live: Live, *, changed: bool, required: bool, **rest: Any) -> SqlNeed:
        if not changed and not required:
            return SqlNeed.NONE
        return real(live, changed=changed, required=required, **rest)

    patch(saving, "sql_need", sql_need)


@_mutation("none")
def floor_after_changes(patch: Patch) -> None:
    """Markers are dropped after the changes, from whatever was seen."""
    real = RowRepository.update

    def update(
        self: RowRepository, context: SessionContext, record: Record, **rest: Any
    ) -> Record | None:
        return real(self, context, drop_markers(record), **rest)

    patch(RowRepository, "update", update)


# --- reading ---------------------------------------------------------------------


@_mutation("node")
def lone_copy_trusted(patch: Patch) -> None:
    """One copy is served without asking SQL."""
    real = reading.judge_copies

    def judge_copies(replies: Any, timing: Any, now_ms: int) -> Live | Gone | None:
        verdict = real(replies, timing, now_ms)
        hits = [r for r in replies.values() if isinstance(r, Hit)]
        if verdict is not None or len(hits) != 1 or isinstance(hits[0].copy, Tombstone):
            return verdict
        writable = reading.writable_of(replies)
        return Live(hits[0].copy, Standing.AGREED, writable)

    patch(reading, "judge_copies", judge_copies)


@_mutation("node")
def missing_row_is_gone(patch: Patch) -> None:
    """A session without a row is gone, though it never had one."""
    real = loading.judge_row

    def judge_row(*args: Any) -> Any:
        verdict = real(*args)
        return Gone("missing") if isinstance(verdict, InsertFirst) else verdict

    patch(loading, "judge_row", judge_row)


@_mutation("silent")
def never_overdue(patch: Patch) -> None:
    """A pair is believed however long it has not heard of SQL."""
    patch(reading, "overdue", lambda *_: False)


@_mutation("memory", 1634)
def floor_forgotten(patch: Patch) -> None:
    """A sync drops the markers and leaves the floor where it was."""
    real = saving.drop_markers
    patch(
        saving, "drop_markers", lambda record: replace(real(record), floor=record.floor)
    )


@_mutation("silent")
def visitors_never_overdue(patch: Patch) -> None:
    """A pair that was never synced is believed however long it has rested."""
    real = reading.overdue

    def overdue(record: Record, timing: Any, now_ms: int) -> bool:
        return not record.never_synced and real(record, timing, now_ms)

    patch(reading, "overdue", overdue)


@_mutation("node")
def refused_with_sql_up(patch: Patch) -> None:
    """A change that one home did not take is refused, though SQL would keep it."""

    def write_row_now(
        self: Saver, context: SessionContext, live: Live, record: Record
    ) -> Any:
        raise self._steps.not_kept(context, "one of its nodes does not answer")

    patch(Saver, "_write_row_now", write_row_now)


# --- ending ----------------------------------------------------------------------


@_mutation("memory")
def no_tombstones_in_sql(patch: Patch) -> None:
    """A logout tells the homes only."""
    patch(RowRepository, "put_tombstone", lambda *_, **__: None)


@_mutation("node+sql")
def sql_skipped_at_logout(patch: Patch) -> None:
    """A logout tells the homes, then SQL, and is content with one of them."""

    def end(
        self: Ender,
        context: SessionContext,
        live: Live | None,
        also: object = (),
        *,
        in_debt: bool = True,
    ) -> None:
        tombstone = Tombstone("ended", self._clock.now_ms())
        self._homes.put_tombstones(context, tombstone, self._homes.names(context))
        try:
            self._rows.put_tombstone(
                context, tombstone, None if live is None else live.record
            )
        except SqlUnavailable:
            pass

    patch(Ender, "end", end)


@_mutation("none")
def no_tombstones_on_homes(patch: Patch) -> None:
    """A logout tells SQL only."""

    def put_tombstones(
        self: Homes, context: SessionContext, tombstone: Tombstone, names: Sequence[str]
    ) -> dict[str, Ack]:
        return dict.fromkeys(names, Ack.STORED)

    patch(Homes, "put_tombstones", put_tombstones)


@_mutation("node+sql")
def debts_not_paid(patch: Patch) -> None:
    """A tombstone that SQL has not heard of stays where it is."""
    patch(Loader, "_propagate", lambda self, context, gone: gone)


@_mutation("none")
def moves_by_set(patch: Patch) -> None:
    """A move buries the old copies unread."""

    def exchange(
        self: Mover,
        old: SessionContext,
        live: Live,
        tombstone: Tombstone,
        new: SessionContext,
        record: Record,
        now_ms: int,
    ) -> None:
        self._homes.put_tombstones(old, tombstone, self._homes.names(old))
        writable = dict.fromkeys(self._homes.names(new))
        self._homes.write(new, record, writable, now_ms)

    patch(Mover, "_exchange_homes", exchange)


@_mutation("late")
def late_changes_by_stamp(patch: Patch) -> None:
    """A move carries over what is stamped later, whatever is below the floor."""

    def changes_between(seen: Record, late: Record) -> dict[str, bytes | None]:
        return {
            key: entry.value
            for key, entry in late.entries.items()
            if key not in seen.entries or entry.stamp > seen.entries[key].stamp
        }

    patch(moving, "changes_between", changes_between)


@_mutation("none")
def moved_buried_by_readers(patch: Patch) -> None:
    """Readers bury the copies that a move has still to look at."""
    patch(reading, "MOVE_AT_WORK_MS", 0)


# --- reaping ---------------------------------------------------------------------


@_mutation("reaper")
def reaper_asks_nobody(patch: Patch) -> None:
    """A row is judged without its homes."""

    def ask(
        self: Reaper, context: SessionContext, row: Any, options: Any
    ) -> dict[str, Miss]:
        return {name: Miss() for name in row.homes}

    patch(Reaper, "_ask", ask)


# --- what nodes forget -----------------------------------------------------------


@_mutation("long")
def expiry_never_a_date(patch: Patch) -> None:
    """memcached is told 30 days where a copy matters for longer."""
    patch(homes, "exptime_seconds", lambda *times: min(exptime(*times), 30 * 24 * 3600))


# --- rotating the key --------------------------------------------------------------


@_mutation("rotation")
def rows_keep_their_key(patch: Patch) -> None:
    """A sync seals the row with the oldest key that is still accepted."""
    real = RowRepository._row

    def row(self: RowRepository, context: SessionContext, record: Record) -> Any:
        keys = context.keyring._keys
        oldest = copy(context.keyring)
        oldest._header = oldest._header[:5] + list(keys)[-1]
        return real(self, replace(context, keyring=oldest), record)

    patch(RowRepository, "_row", row)
