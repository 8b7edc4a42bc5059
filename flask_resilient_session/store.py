"""Load, create, save, end, move: the order of the protocol's steps.

Where decisions meet nodes and SQL: what to do is decided in ``replication``; here
it is done. Nothing waits but in the nodes and SQL that were given, and time and
chance are arguments, so that a simulator can run this through every interleaving.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

from .access import Access
from .clock import Clock
from .durable import Durable
from .errors import SessionTooLarge, SessionUnavailable, SqlUnavailable
from .events import (
    Observer,
    session_conflict,
    session_created,
    session_regenerated,
    session_revoked,
    short,
)
from .homes import Homes
from .loading import Loader
from .record import (
    NONCE_BITS,
    EndReason,
    Entry,
    Hit,
    Record,
    Reply,
    Token,
    Tombstone,
    apply_changes,
    drop_markers,
    join_records,
)
from .replication import (
    PAIR,
    Gone,
    Live,
    Outcome,
    SqlNeed,
    Standing,
    Unknown,
    judge_acks,
    refresh_due,
    sql_need,
)
from .wire import Ack

#: A write that meets a concurrent one is read, joined and tried again this often.
#: Each round some request gets through, so that this is the number of requests that
#: may write one session at the same moment.
MAX_ATTEMPTS: Final = 12

_NOBODY: Final = "neither its nodes nor SQL answer"

#: What a request did to a session: key -> encoded value, or None to delete it.
Changes: TypeAlias = Mapping[str, bytes | None]


class _Conflict(Exception):
    """Somebody else wrote in between.

    :ivar ask_sql: it was noticed in SQL, so that the homes' word is not enough.
    """

    def __init__(self, *, ask_sql: bool) -> None:
        super().__init__()
        self.ask_sql = ask_sql


class Store:
    """The sessions of one application.

    Every method may raise :class:`SessionUnavailable`: nothing was acknowledged
    then, though a change may have reached some of the places.

    :param homes: the copies of sessions.
    :param durable: their rows.
    :param max_bytes: largest encoded session.
    :param random: nonces of stamps.
    """

    def __init__(
        self,
        *,
        homes: Homes,
        durable: Durable,
        max_bytes: int,
        clock: Clock,
        random: random_module.Random,
        observer: Observer,
    ) -> None:
        self.homes = homes
        self.durable = durable
        self._loader = Loader(homes, durable, clock=clock, observer=observer)
        self._max_bytes = max_bytes
        self._clock = clock
        self._random = random
        self._observer = observer

    def load(self, access: Access, *, ask_sql: bool = False) -> Live | Gone | Unknown:
        """See :meth:`flask_resilient_session.loading.Loader.load`."""
        return self._loader.load(access, ask_sql=ask_sql)

    def peek(self, access: Access, names: Sequence[str]) -> dict[str, Reply]:
        """What these nodes hold for a session; changes nothing."""
        return self._loader.peek(access, names)

    # --- create ------------------------------------------------------------------

    def create(self, access: Access, changes: Changes, *, required: bool) -> Live:
        """Store a session under a new id.

        :param required: write SQL before anything is acknowledged; without it a
            session gets its row when its cookie comes back.
        :raises SessionTooLarge: nothing is stored.
        """
        now_ms = self._clock.now_ms()
        homes = self.homes.names(access)
        empty = Record(
            created_ms=now_ms, last_use_ms=now_ms, never_synced=True, homes=homes
        )
        record = self._changed(empty, changes, now_ms)
        in_sql = required or len(homes) < PAIR
        if in_sql:
            record = self._insert_new(access, record)
        acks = self.homes.write(access, record, dict.fromkeys(homes), now_ms)
        outcome = judge_acks(acks, homes=len(homes), in_sql=in_sql)
        if not in_sql and outcome is not Outcome.ACKNOWLEDGED:
            record = self._insert_new(access, record)
        self._observer.count("created")
        self._observer.send(session_created, session=short(access.session_key))
        return Live(record, Standing.AGREED)

    def _insert_new(self, access: Access, record: Record) -> Record:
        try:
            inserted = self.durable.insert(access, record)
        except SqlUnavailable as error:
            raise self._not_kept(access, error) from error
        if inserted is None:
            raise self._not_kept(access, "its new id is taken")
        return inserted

    # --- save --------------------------------------------------------------------

    def save(
        self, access: Access, live: Live, changes: Changes, *, required: bool = False
    ) -> Live | Gone:
        """Keep one request's changes, or only the fact that it used the session.

        :param live: what the request loaded.
        :param changes: key -> encoded value, or None to delete it.
        :param required: acknowledge only what SQL has committed.
        :returns: the session as it is kept, or Gone: it was ended meanwhile and the
            changes are dropped.
        :raises SessionTooLarge: nothing was changed.
        """
        courtesy = not changes and not required
        for _ in range(MAX_ATTEMPTS):
            try:
                return self._attempt(access, live, changes, required)
            except _Conflict as conflict:
                self._observer.count("conflicts")
                self._observer.send(session_conflict, session=short(access.session_key))
                ask_sql = conflict.ask_sql
            verdict = self.load(access, ask_sql=ask_sql)
            if isinstance(verdict, Gone):
                return verdict
            if isinstance(verdict, Unknown):
                if courtesy:
                    return live
                raise self._not_kept(access, _NOBODY)
            live = verdict
        if courtesy:
            return live
        raise self._not_kept(access, "too many requests change it at once")

    def _attempt(
        self, access: Access, live: Live, changes: Changes, required: bool
    ) -> Live:
        now_ms = self._clock.now_ms()
        homes = len(self.homes.names(access))
        if live.standing is Standing.AGREED and len(live.places) < homes:
            # Just created or moved: what stands in its homes was never read.
            raise _Conflict(ask_sql=False)
        need = sql_need(
            live,
            changed=bool(changes),
            required=required,
            homes=homes,
            timing=access.timing,
            now_ms=now_ms,
        )
        record, in_sql = self._to_store(access, live, changes, need, now_ms)
        if not changes:
            self._keep_times(access, live, record, in_sql=in_sql, now_ms=now_ms)
            return replace(live, record=record)
        acks = self.homes.write(access, record, live.places, now_ms)
        outcome = judge_acks(acks, homes=homes, in_sql=in_sql)
        if outcome is Outcome.CONFLICT:
            raise _Conflict(ask_sql=False)
        if outcome is Outcome.SQL_NOW:
            record = self._write_row_now(access, live, record)
        self.homes.remove_refused(access, acks)
        return replace(live, record=record)

    def _to_store(
        self, access: Access, live: Live, changes: Changes, need: SqlNeed, now_ms: int
    ) -> tuple[Record, bool]:
        """The record to write to the homes, and whether SQL has it already."""
        base = replace(
            live.record,
            homes=self.homes.names(access),
            unverified=live.standing is Standing.UNVERIFIED,
        )
        if need is SqlNeed.NONE:
            return self._changed(base, changes, now_ms), False
        for_sql = replace(base, last_use_ms=max(base.last_use_ms, now_ms))
        if live.standing is Standing.AGREED:
            # Before the changes are applied: the floor may only cover what was seen
            # on both homes.
            oldest_ms = now_ms - access.timing.lifetime_ms
            for_sql = drop_markers(for_sql, oldest_ms)
        for_sql = self._changed(for_sql, changes, now_ms)
        try:
            return self._write_row(access, for_sql), True
        except SqlUnavailable as error:
            if need is SqlNeed.REQUIRED:
                raise self._not_kept(access, error) from error
            self._observer.count("syncs_put_off")
            # With its markers: nobody knows whether SQL dropped them too.
            return self._changed(base, changes, now_ms), False

    def _write_row(self, access: Access, record: Record) -> Record:
        """Write the row; a row that is not as the record knows it is a conflict."""
        if record.never_synced:
            synced = self.durable.insert(access, record)
        else:
            synced = self.durable.update(access, record)
        if synced is None:
            raise _Conflict(ask_sql=True)
        return synced

    def _write_row_now(self, access: Access, live: Live, record: Record) -> Record:
        """SQL takes a change that too few homes took."""
        if live.standing is Standing.UNVERIFIED:
            raise self._not_kept(access, "SQL and one of its nodes do not answer")
        try:
            return self._write_row(access, record)
        except SqlUnavailable as error:
            raise self._not_kept(access, error) from error

    def _keep_times(
        self, access: Access, live: Live, record: Record, *, in_sql: bool, now_ms: int
    ) -> None:
        """Tell the homes that an unchanged session was used, and repair them."""
        if live.standing is Standing.UNVERIFIED:
            return
        refreshed = in_sql or refresh_due(record, access.timing, now_ms)
        if refreshed:
            record = replace(record, last_use_ms=max(record.last_use_ms, now_ms))
        repairs = {name: live.places[name] for name in live.repairs}
        acks = self.homes.write(access, record, repairs, now_ms)
        self._observer.count("repaired", list(acks.values()).count(Ack.STORED))
        if refreshed:
            others = {n: t for n, t in live.places.items() if n not in repairs}
            self.homes.tell(access, record, others, now_ms)

    # --- end ---------------------------------------------------------------------

    def end(
        self, access: Access, live: Live | None, also: Iterable[str] = ()
    ) -> frozenset[str]:
        """End a session for good: SQL first, then every reachable home.

        With SQL unreachable both homes have to take the tombstone, which then
        carries a debt that the next reader pays.

        :param live: what the request loaded; None: nothing is known of it.
        :param also: other nodes that may hold a copy.
        :returns: names of the nodes that did not take the tombstone.
        """
        homes = self.homes.names(access)
        names = tuple(dict.fromkeys((*homes, *also)))
        tombstone = Tombstone("ended", self._clock.now_ms())
        try:
            self.durable.bury(access, tombstone, None if live is None else live.record)
        except SqlUnavailable as error:
            acks = self.homes.bury(access, replace(tombstone, debt=True), names)
            if len(homes) < PAIR or set(acks.values()) != {Ack.STORED}:
                raise self._not_kept(access, error) from error
        else:
            acks = self.homes.bury(access, tombstone, names)
        self._observer.count("revoked")
        self._observer.send(session_revoked, session=short(access.session_key))
        return frozenset(n for n, ack in acks.items() if ack is Ack.UNREACHABLE)

    # --- move --------------------------------------------------------------------

    def move(
        self,
        old: Access,
        live: Live,
        new: Access,
        changes: Changes,
        *,
        reason: EndReason = "moved",
        renew_created: bool = False,
    ) -> Live | Gone:
        """Give a session a new id; the old one is dead from then on.

        :param reason: ``moved`` takes the data along; ``ended`` starts the new
            session with nothing but ``changes``.
        :param renew_created: count the absolute lifetime from now.
        :returns: the new session, or Gone: the old one was dead already and there is
            no new one.
        """
        for _ in range(MAX_ATTEMPTS):
            if live.standing is Standing.UNVERIFIED:
                raise self._not_kept(old, "SQL does not answer")
            now_ms = self._clock.now_ms()
            tombstone = Tombstone(reason, now_ms)
            kept = self._moved_record(live.record, new, changes, reason, now_ms)
            if renew_created:
                kept = replace(kept, created_ms=now_ms)
            try:
                moved = self.durable.move(old, live.record, tombstone, new, kept)
            except SqlUnavailable as error:
                raise self._not_kept(old, error) from error
            if moved is not None:
                late = self._exchange_homes(old, live, tombstone, new, moved, now_ms)
                self._report_move(old, new)
                if reason == "moved" and late is not None:
                    return self._carry_over(new, moved, live.record, late, changes)
                return Live(moved, Standing.AGREED)
            verdict = self.load(old, ask_sql=True)
            if isinstance(verdict, Gone):
                return verdict
            if isinstance(verdict, Unknown):
                raise self._not_kept(old, _NOBODY)
            live = verdict
        raise self._not_kept(old, "too many requests change it at once")

    def _moved_record(
        self,
        record: Record,
        new: Access,
        changes: Changes,
        reason: EndReason,
        now_ms: int,
    ) -> Record:
        homes = self.homes.names(new)
        if reason == "ended":
            base = Record(created_ms=now_ms, last_use_ms=now_ms, homes=homes)
        else:
            used_ms = max(record.last_use_ms, now_ms)
            base = replace(record, homes=homes, last_use_ms=used_ms, synced_ms=0)
        return self._changed(base, changes, now_ms)

    def _exchange_homes(
        self,
        old: Access,
        live: Live,
        tombstone: Tombstone,
        new: Access,
        record: Record,
        now_ms: int,
    ) -> Record | None:
        """Bury the old copies and place the new ones, in one round trip.

        The old ones by compare-and-swap: what a concurrent request had acknowledged
        there since the load is found that way, and returned.
        """
        names = self.homes.names(old)
        unseen = [name for name in names if name not in live.places]
        burials = [
            *self.homes.requests(old, tombstone, live.places, now_ms),
            *self.homes.burials(old, tombstone, unseen),
        ]
        new_places: dict[str, Token | None] = dict.fromkeys(self.homes.names(new))
        placements = self.homes.requests(new, record, new_places, now_ms)
        acks = self.homes.cluster.write([*burials, *placements], old.deadline)
        changed = [
            name
            for (name, _), ack in zip(burials, acks[: len(burials)], strict=True)
            if ack in (Ack.CONFLICT, Ack.REFUSED)
        ]
        found: Record | None = None
        for reply in self.homes.read(old, changed).values():
            if isinstance(reply, Hit) and isinstance(reply.copy, Record):
                copy = reply.copy
                found = copy if found is None else join_records(found, copy)
        self.homes.bury(old, tombstone, changed)
        return found

    def _carry_over(
        self, new: Access, moved: Record, seen: Record, late: Record, changes: Changes
    ) -> Live | Gone:
        """Write to the new session what others had added to the old one meanwhile."""
        nothing = Entry(0, 0, None)
        missed = {
            key: entry.value
            for key, entry in late.entries.items()
            if key not in changes and entry.stamp > seen.entries.get(key, nothing).stamp
        }
        if not missed:
            return Live(moved, Standing.AGREED)
        verdict = self.load(new)
        if isinstance(verdict, Live):
            return self.save(new, verdict, missed)
        raise self._not_kept(new, _NOBODY)

    def _report_move(self, old: Access, new: Access) -> None:
        self._observer.count("regenerated")
        self._observer.send(
            session_regenerated,
            session=short(new.session_key),
            previous=short(old.session_key),
        )

    # --- shared steps ------------------------------------------------------------

    def _changed(self, record: Record, changes: Changes, now_ms: int) -> Record:
        """The record with the changes under a new stamp, if it is not too large."""
        if not changes:
            return record
        nonce = self._random.getrandbits(NONCE_BITS)
        changed = apply_changes(record, changes, now_ms, nonce)
        size = changed.size()
        # One that is over a lowered limit may still shrink.
        if size > self._max_bytes and size > record.size():
            raise SessionTooLarge(size, self._max_bytes)
        return changed

    def _not_kept(self, access: Access, why: object) -> SessionUnavailable:
        self._observer.count("unavailable")
        return SessionUnavailable(
            f"Session {short(access.session_key)} was not changed: {why}."
        )
