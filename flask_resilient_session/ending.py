"""Ending a session, and moving it to a new id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from .access import Access
from .errors import SessionTooLarge, SessionUnavailable, SqlUnavailable
from .events import (
    logger,
    session_created,
    session_regenerated,
    session_revoked,
    short,
)
from .loading import Loader
from .record import (
    Corrupt,
    EndReason,
    Entry,
    Hit,
    Miss,
    Record,
    Token,
    Tombstone,
    join_records,
)
from .replication import PAIR, Gone, Live, Standing, Unknown
from .saving import Saver
from .steps import MAX_ATTEMPTS, NOBODY, TOO_MANY, Changes, Steps
from .wire import Ack

#: How often a finished move tries to carry over what it found late: SQL may have to
#: be asked, and nobody can be told to come again any more.
_CARRY_ATTEMPTS: Final = 3


class Ender:
    """Ends sessions for good, with or without one that goes on in their place."""

    def __init__(self, steps: Steps, loader: Loader, saver: Saver) -> None:
        self._steps = steps
        self._loader = loader
        self._saver = saver
        self._homes = steps.homes
        self._durable = steps.durable
        self._clock = steps.clock
        self._observer = steps.observer
        self._trust = steps.trust

    # --- end ---------------------------------------------------------------------

    def end(
        self,
        access: Access,
        live: Live | None,
        also: Iterable[str] = (),
        *,
        in_debt: bool = True,
    ) -> frozenset[str]:
        """End a session for good: SQL first, then every reachable home.

        With SQL unreachable both homes have to take the tombstone, which then
        carries a debt that the next reader pays.

        :param live: what the request loaded; None: nothing is known of it.
        :param also: other nodes that may hold a copy, for who ends it from outside.
        :param in_debt: whether both homes are enough while SQL is unreachable.
        :returns: names of the nodes that did not take the tombstone.
        """
        self._trust.forget(access.session_key)
        homes = self._homes.names(access)
        names = tuple(dict.fromkeys((*homes, *also)))
        tombstone = Tombstone("ended", self._clock.now_ms())
        try:
            self._durable.bury(access, tombstone, None if live is None else live.record)
        except SqlUnavailable as error:
            if not in_debt:
                raise self._steps.not_kept(access, error) from error
            acks = self._homes.bury(access, replace(tombstone, debt=True), names)
            if len(homes) < PAIR or set(acks.values()) != {Ack.STORED}:
                raise self._steps.not_kept(access, error) from error
            record = None if live is None else live.record
            self._durable.owe(access, tombstone, record)
        else:
            acks = self._homes.bury(access, tombstone, names)
            self._homes.bury_at_stand_in(access, tombstone, acks)
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
        self._trust.forget(old.session_key)
        for _ in range(MAX_ATTEMPTS):
            if live.standing is Standing.UNVERIFIED:
                raise self._steps.not_kept(old, "SQL does not answer")
            now_ms = self._clock.now_ms()
            tombstone = Tombstone(reason, now_ms)
            kept = self._moved_record(live.record, new, changes, reason, now_ms)
            if renew_created:
                kept = replace(kept, created_ms=now_ms)
            try:
                moved = self._durable.move(old, live.record, tombstone, new, kept)
            except SqlUnavailable as error:
                raise self._steps.not_kept(old, error) from error
            if moved is not None:
                late = self._exchange_homes(old, live, tombstone, new, moved, now_ms)
                self._report_move(old, new, reason)
                if reason == "moved" and late is not None:
                    self._carry_over(new, live.record, late, changes)
                return Live(moved, Standing.AGREED)
            verdict = self._loader.load(old, ask_sql=True)
            if isinstance(verdict, Gone):
                return verdict
            if isinstance(verdict, Unknown):
                raise self._steps.not_kept(old, NOBODY)
            live = verdict
        raise self._steps.not_kept(old, TOO_MANY)

    def _moved_record(
        self,
        record: Record,
        new: Access,
        changes: Changes,
        reason: EndReason,
        now_ms: int,
    ) -> Record:
        homes = self._homes.names(new)
        if reason == "ended":
            base = Record(created_ms=now_ms, last_use_ms=now_ms, homes=homes)
        else:
            used_ms = max(record.last_use_ms, now_ms)
            base = replace(record, homes=homes, last_use_ms=used_ms, synced_ms=0)
        return self._steps.changed(base, changes, now_ms)

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

        The old ones by compare-and-swap, again and again until it is done: what
        concurrent requests had acknowledged there since the load is found that way,
        and returned.
        """
        names = self._homes.names(old)
        unseen = [name for name in names if name not in live.places]
        burials = [
            *self._homes.requests(old, tombstone, live.places, now_ms),
            *self._homes.burials(old, tombstone, unseen),
        ]
        new_places: dict[str, Token | None] = dict.fromkeys(self._homes.names(new))
        placements = self._homes.requests(new, record, new_places, now_ms)
        requests = [*burials, *placements]
        acks = self._homes.cluster.write(requests, old.deadline)[: len(burials)]
        asked = [name for name, _ in burials]
        told: dict[str, Ack] = {}
        found: Record | None = None
        for _ in range(MAX_ATTEMPTS):
            answers = dict(zip(asked, acks, strict=True))
            told |= answers
            # One without room for a tombstone drops the copy, and is not asked again.
            refused = [n for n, ack in answers.items() if ack is Ack.REFUSED]
            self._homes.bury(old, tombstone, refused)
            changed = [n for n, ack in answers.items() if ack is Ack.CONFLICT]
            if not changed:
                self._homes.bury_at_stand_in(old, tombstone, told)
                return found
            places: dict[str, Token | None] = {}
            for name, reply in self._homes.read(old, changed).items():
                if isinstance(reply, Hit) and isinstance(reply.copy, Record):
                    copy = reply.copy
                    found = copy if found is None else join_records(found, copy)
                    places[name] = reply.token
                elif isinstance(reply, Corrupt):
                    places[name] = reply.token
                elif isinstance(reply, Miss):
                    places[name] = None
            asked = list(places)
            written = self._homes.write(old, tombstone, places, now_ms)
            acks = list(written.values())
        self._homes.bury(old, tombstone, asked)
        return found

    def _carry_over(
        self, new: Access, seen: Record, late: Record, changes: Changes
    ) -> None:
        """Write to the new session what others had added to the old one meanwhile.

        The move is done, and its cookie has to reach the browser: what cannot be
        carried over any more is dropped, counted and logged.
        """
        nothing = Entry(0, 0, None)
        missed = {
            key: entry.value
            for key, entry in late.entries.items()
            if key not in changes and entry.stamp > seen.entries.get(key, nothing).stamp
        }
        if not missed:
            return
        why: object = NOBODY
        for _ in range(_CARRY_ATTEMPTS):
            try:
                verdict = self._loader.load(new)
                if isinstance(verdict, Live):
                    verdict = self._saver.save(new, verdict, missed)
                if not isinstance(verdict, Unknown):
                    # Kept, or ended meanwhile, and then nobody misses it.
                    return
            except SessionUnavailable as error:
                why = error.description
            except SessionTooLarge as error:
                why = error.description
                break
        self._observer.count("dropped_changes")
        name = short(new.session_key)
        logger.error("Changes made while session %s moved were lost: %s", name, why)

    def _report_move(self, old: Access, new: Access, reason: EndReason) -> None:
        session, previous = short(new.session_key), short(old.session_key)
        if reason == "ended":
            self._observer.count("revoked")
            self._observer.send(session_revoked, session=previous)
            self._observer.count("created")
            self._observer.send(session_created, session=session)
        else:
            self._observer.count("regenerated")
            self._observer.send(session_regenerated, session=session, previous=previous)
