"""Moving a session to a new id: login, and whoever asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ..common.errors import SessionTooLarge, SessionUnavailable, SqlUnavailable
from ..common.events import (
    logger,
    session_created,
    session_regenerated,
    session_revoked,
    short,
)
from ..core.answers import Ack, Token, Unreachable
from ..core.reading import (
    Gone,
    Live,
    Standing,
    Unknown,
    join_all,
    live_copies,
    tombstones_at,
    writable_of,
)
from ..core.record import EndReason, Record, Tombstone, changes_between
from .context import SessionContext
from .load import Loader
from .save import Saver
from .steps import MAX_ATTEMPTS, NOBODY, TOO_MANY, Changes, Steps

#: How often a finished move tries to carry over what it found late: SQL may have to
#: be asked, and nobody can be told to come again any more.
_CARRY_ATTEMPTS: Final = 3


class Mover:
    """Gives sessions a new id, and leaves nothing behind under the old one."""

    def __init__(self, steps: Steps, loader: Loader, saver: Saver) -> None:
        self._steps = steps
        self._loader = loader
        self._saver = saver
        self._homes = steps.homes
        self._rows = steps.rows
        self._clock = steps.clock
        self._observer = steps.observer

    def move(
        self,
        old: SessionContext,
        live: Live,
        new: SessionContext,
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
                raise self._steps.not_kept(old, "SQL does not answer")
            now_ms = self._clock.now_ms()
            tombstone = Tombstone(reason, now_ms)
            kept = self._moved_record(live.record, new, changes, reason, now_ms)
            if renew_created:
                kept = replace(kept, created_ms=now_ms)
            try:
                moved = self._rows.move(old, live.record, tombstone, new, kept)
            except SqlUnavailable as error:
                raise self._steps.not_kept(old, error) from error
            if moved is not None:
                # Others were told that what they changed meanwhile is kept: bringing it
                # along is not given up for a request that has waited for SQL.
                patience = old.patience.renewed()
                old = replace(old, patience=patience)
                new = replace(new, patience=patience)
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
        new: SessionContext,
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
        old: SessionContext,
        live: Live,
        tombstone: Tombstone,
        new: SessionContext,
        record: Record,
        now_ms: int,
    ) -> Record | None:
        """Bury the old copies and place the new ones, in one round trip.

        :returns: what concurrent requests had acknowledged on the old homes since the
            load.
        """
        homes = self._homes.names(old)
        tombstones = self._homes.requests(old, tombstone, live.writable, now_ms)
        new_places: dict[str, Token | None] = dict.fromkeys(self._homes.names(new))
        placements = self._homes.requests(new, record, new_places, now_ms)
        acks = self._homes.cluster.write([*tombstones, *placements], old.patience)
        told = [name for name, _ in tombstones]
        # Homes that were not seen have still to be read: perhaps they answer by now.
        answers = dict.fromkeys(homes, Ack.CONFLICT)
        answers |= dict(zip(told, acks, strict=False))
        return self._put_tombstones(old, tombstone, answers, now_ms)

    def _put_tombstones(
        self,
        old: SessionContext,
        tombstone: Tombstone,
        answers: dict[str, Ack],
        now_ms: int,
    ) -> Record | None:
        """Bury what could not be buried at once, again and again until it is done.

        :param answers: what the nodes said to the first try.
        :returns: what others had written there meanwhile.
        """
        found: list[Record] = []
        full: set[str] = set()
        for _ in range(MAX_ATTEMPTS):
            # One without room for a tombstone drops the copy. It is read before: there
            # may be room again, and something new.
            rejected = {n for n, ack in answers.items() if ack is Ack.REJECTED}
            self._homes.put_tombstones(old, tombstone, sorted(rejected & full))
            changed = [n for n, ack in answers.items() if ack is Ack.CONFLICT]
            changed += sorted(rejected - full)
            full |= rejected
            if not changed:
                break
            if old.patience.is_over:
                # Whatever is new there: the old id has to end.
                self._homes.put_tombstones(old, tombstone, list(answers))
                break
            writable, late = self._look(old, tombstone, changed)
            found += late
            answers = self._homes.write(old, tombstone, writable, now_ms)
        else:
            self._homes.put_tombstones(old, tombstone, list(answers))
        return join_all(found) if found else None

    def _look(
        self, old: SessionContext, tombstone: Tombstone, names: Sequence[str]
    ) -> tuple[dict[str, Token | None], list[Record]]:
        """Where these nodes have still to be buried, and the copies there."""
        replies = self._homes.read(old, names)
        # What is new under a key unknown here cannot be read, and ends all the same.
        sealed = [
            name
            for name, reply in replies.items()
            if isinstance(reply, Unreachable) and reply.sealed
        ]
        self._homes.put_tombstones(old, tombstone, sealed)
        writable = writable_of(replies)
        for name in tombstones_at(replies):
            del writable[name]
        return writable, live_copies(replies)

    def _carry_over(
        self, new: SessionContext, seen: Record, late: Record, changes: Changes
    ) -> None:
        """Write to the new session what others had added to the old one meanwhile.

        The move is done, and its cookie has to reach the browser: what cannot be
        carried over any more is dropped, counted and logged.
        """
        missed = {
            key: value
            for key, value in changes_between(seen, late).items()
            if key not in changes
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

    def _report_move(
        self, old: SessionContext, new: SessionContext, reason: EndReason
    ) -> None:
        session, previous = short(new.session_key), short(old.session_key)
        if reason == "ended":
            self._observer.count("revoked")
            self._observer.send(session_revoked, session=previous)
            self._observer.count("created")
            self._observer.send(session_created, session=session)
        else:
            self._observer.count("regenerated")
            self._observer.send(session_regenerated, session=session, previous=previous)
