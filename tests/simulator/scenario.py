"""One plan carried out against the real store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from flask_resilient_session.common.errors import SessionUnavailable
from flask_resilient_session.common.events import logger
from flask_resilient_session.core.answers import Hit
from flask_resilient_session.core.reading import (
    MOVE_AT_WORK_MS,
    Gone,
    Live,
    Standing,
    Unknown,
)
from flask_resilient_session.core.record import Record, same_state
from flask_resilient_session.core.values import encode_value
from flask_resilient_session.store.context import SessionContext
from flask_resilient_session.store.steps import TOO_MANY

from .actions import NODES, PAIR, WORKERS
from .hearing import Excuse, Moment, Reader
from .history import IN_FLIGHT_MS, NEVER, Line, Session, Violation
from .plan import ON_TWO, Plan, Request
from .site import Site
from .worker import USER, Faults, Worker, holds, holds_tombstone, ring_of
from .world import quiet

_SETTLE_TRIES = 8


@dataclass
class Slot:
    """A browser: its cookie, and the cookies it had."""

    session: Session
    olds: list[Session] = field(default_factory=list)


class Run(Site):
    """One schedule: requests, and what may be seen by them."""

    def __init__(self, plan: Plan, *, traced: bool = False) -> None:
        super().__init__(plan, traced=traced)
        self.slots: list[Slot] = []
        self._values = 0

    def go(self) -> None:
        """Carry out the plan.

        :raises Violation: a guarantee was broken.
        """
        with quiet(logger):
            self.world.run(self._operate)
        if self.plan.kind == "none" and self.counts["unavailable"]:
            raise Violation("G7", "unavailable without a fault")

    def _new_key(self) -> str:
        while True:
            key = f"{self.world.rng.getrandbits(256):064x}"
            on_two = set(ring_of(frozenset(NODES)).homes(key)) == {"a", "b"}
            if on_two or self.plan.kind not in ON_TWO:
                return key

    def _new_value(self) -> bytes:
        self._values += 1
        return b"%d" % self._values

    # --- the operator ------------------------------------------------------------

    def _operate(self) -> None:
        for index, required in enumerate(self.plan.slots):
            session = self._create(self.workers[index % WORKERS], required=required)
            assert session is not None
            self.slots.append(Slot(session))
        clients: dict[int, list[Request]] = {}
        for request in self.plan.requests:
            clients.setdefault(request.client, []).append(request)
        self.clients = len(clients)
        for number, requests in clients.items():
            self.world.spawn(f"client {number}", self._client(requests))
        for action in self.plan.actions:
            if action.what != "sleep":
                self.world.log("-- {}", action)
            self.act(action)
        self.world.wait(lambda: not self.clients and not self.active)
        self._finish()

    def _client(self, requests: list[Request]) -> Callable[[], None]:
        def run() -> None:
            for request in requests:
                self.world.wait(lambda: not self.held)
                self.world.step += 1
                self.in_process(
                    self.workers[request.worker], partial(self._request, request)
                )
                self.world.pause()
            self.clients -= 1

        return run

    def read_for_good(self, session: Session) -> None:
        """Load and save until it worked, by a worker that no fault touches."""
        for _ in range(_SETTLE_TRIES):
            self.world.step += 1
            worker = self.world.rng.choice(self._informed())
            self.world.log("read {} by w{}", session.name, worker.index)
            if self._use(worker, session) in ("live", "gone"):
                return
        raise Violation("G7", f"{session.name} stays unavailable without a fault")

    def _informed(self) -> list[Worker]:
        """The workers that know every key that some worker seals with."""
        current = {worker.secrets[0] for worker in self.workers}
        return [one for one in self.workers if current <= {*one.secrets}]

    # --- requests ----------------------------------------------------------------

    def _request(self, request: Request, worker: Worker) -> None:
        slot = self.slots[request.slot % len(self.slots)]
        session = slot.session
        over = min(session.ended, session.seen_gone) < NEVER
        if over and not request.old and self.world.rng.random() < 0.8:
            # Who was logged out comes again, as a rule.
            required = self.plan.slots[request.slot % len(self.plan.slots)]
            created = self._create(worker, required=required)
            if created is None or slot.session is not session:
                return
            slot.olds.append(session)
            session = slot.session = created
            self.world.step += 1
        if request.old and slot.olds:
            session = self.world.rng.choice(slot.olds)
        self.world.log("{} {}", request, session.name)
        if request.what == "create":
            created = self._create(worker, required=self.world.rng.random() < 0.5)
            if created is not None and session is slot.session:
                slot.olds.append(slot.session)
                slot.session = created
        elif request.what == "revoke":
            self._end(worker, session, None)
        else:
            moved = self._use(worker, session, request.what)
            if isinstance(moved, Session) and session is slot.session:
                slot.olds.append(session)
                slot.session = moved

    def _create(self, worker: Worker, *, required: bool) -> Session | None:
        world, history = self.world, self.history
        start, start_ms = world.step, world.now_ms
        line, key = Line(), self._new_key()
        changes: dict[str, bytes | None] = {"s": self._new_value()}
        if required:
            changes[USER] = encode_value(USER, f"user {self._values}")
        writes = history.write(line, changes, start)
        try:
            worker.store.create(worker.context(key), changes, required=required)
        except SessionUnavailable as error:
            self._refused(worker, "create", start, error)
            return None
        self.hearing.note(worker.process)
        self._check_places(worker, key, changes)
        session = history.born(
            key, line, start=start, start_ms=start_ms, durable=required
        )
        history.acknowledge(writes, durable=required)
        self.tell_risks()
        self._count("created", session.name)
        return session

    def _use(
        self, worker: Worker, session: Session, what: str = "read"
    ) -> str | Session:
        """Load, and do what the request does; a session if it got a new id."""
        world, history = self.world, self.history
        start, start_ms = world.step, world.now_ms
        context = worker.context(session.key)
        reader = self._reader(worker, session)
        faults = worker.faults(session.key)
        verdict = worker.store.load(context)
        self._note(worker, session.key, faults)
        session.touched_ms = max(session.touched_ms, world.now_ms)
        if isinstance(verdict, Unknown):
            return self._refused(worker, "load", start, None)
        if isinstance(verdict, Gone):
            self._count("gone", session.name, verdict.reason)
            self._gone(worker, session, verdict, start, faults)
            return "gone"
        self.world.log("  live {}: {}", session.name, _Shown(verdict))
        history.check_live(session, verdict, start, reader)
        history.check_time(session, start_ms)
        try:
            if what == "logout":
                return self._end(worker, session, verdict)
            if what in ("regenerate", "login", "refill"):
                return self._move(
                    worker, session, verdict, what, context, start, faults
                )
            return self._save(worker, session, verdict, what, context, start, faults)
        finally:
            session.touched_ms = max(session.touched_ms, world.now_ms)

    def _save(
        self,
        worker: Worker,
        session: Session,
        live: Live,
        what: str,
        context: SessionContext,
        start: int,
        faults: Faults,
    ) -> str:
        history, start_ms = self.history, self.world.now_ms
        changes = self._changes(what, live)
        required = what.startswith("sync")
        writes = history.write(session.line, changes, start)
        try:
            saved = worker.store.save(context, live, changes, required=required)
        except SessionUnavailable as error:
            return self._refused(worker, what, start, error)
        if isinstance(saved, Gone):
            self._count("gone", session.name, saved.reason)
            self._gone(worker, session, saved, start, faults)
            return "gone"
        self._note(worker, session.key, faults)
        blind = worker.missed_all(session.key, faults)
        if required and not blind:
            history.in_sql(session, start)
        if session.end_asked == NEVER or not self._was_ended(session.key):
            self._check_places(worker, session.key, changes)
        in_doubt = (
            worker.doubts_sql(start)
            or saved.standing is Standing.UNVERIFIED
            # What only the homes have it has not seen.
            or blind
        )
        # Every change is synced, and with one home there is nothing else to rely on.
        at_once = not worker.timing.sync_ms or len(worker.names) < len(PAIR)
        if session.ended == NEVER or not session.untold:
            # Else it goes on under an id that the homes have not heard of.
            history.acknowledge(writes, durable=required or (at_once and not in_doubt))
        self.tell_risks()
        history.used(session, start_ms, None if in_doubt else worker.timing.slack_ms)
        if saved.standing is Standing.UNVERIFIED:
            return self._count("unverified", session.name)
        return self._count("live", session.name)

    def _note(self, worker: Worker, key: str, faults: Faults) -> None:
        """A request is told something now."""
        blind = worker.missed_all(key, faults)
        if blind:
            self.blindly.add(key)
        self.hearing.note(worker.process, blind=blind)

    def _gone(
        self,
        worker: Worker,
        session: Session,
        gone: Gone,
        start: int,
        faults: Faults,
    ) -> None:
        self._note(worker, session.key, faults)
        unheard = self.history.row_step(session.key) >= start
        if (
            gone.reason == "missing"
            and unheard
            and worker.missed_all(session.key, faults)
        ):
            # SQL has never heard of a visitor's first store, and the homes are silent.
            self.counts["gone, unheard"] += 1
            return
        why = self.history.check_gone(
            session, gone, start, lambda: self._was_ended(session.key)
        )
        self.counts[f"gone, {why}"] += 1
        if session.seen_gone != NEVER:
            self.hearing.note_gone(session.name, worker.process)

    def _reader(self, worker: Worker, session: Session) -> Reader:
        """What a request that begins now may miss."""
        world, key = self.world, session.key
        start, wall_ms, faults = world.step, world.now_ms, worker.faults(key)
        # In use it meets SQL at its next sync; after a rest it asks first.
        sync_ms = self.plan.longest_slack_ms
        sync_ms = 2 * (sync_ms + self.history.skew_ms) + IN_FLIGHT_MS

        def at_risk() -> bool:
            return self.rollout.at_risk(key)

        def not_synced(moment: Moment) -> bool:
            return moment.wall_ms + sync_ms >= wall_ms

        def untold() -> bool:
            return session.untold

        def blind() -> bool:
            return worker.missed_all(key, faults)

        def in_memory_only(moment: Moment) -> bool:
            return all(
                use.synced_ms < moment.wall_ms or use.end >= start
                for use in session.line.uses
            )

        def told_to_sql(moment: Moment) -> bool:
            return moment.blind and not_synced(moment)

        excuses = [
            Excuse(at_risk, not_synced),
            Excuse(untold, not_synced, own=True),
            # Who reaches no home goes by SQL alone, and so do the others by what it
            # told SQL, until they sync.
            Excuse(blind, in_memory_only, own=True),
            Excuse(lambda: key in self.blindly, told_to_sql, own=True),
        ]
        return self.hearing.reader(session.name, worker.process, excuses)

    def _check_places(
        self, worker: Worker, key: str, changes: Mapping[str, bytes | None]
    ) -> None:
        """What is acknowledged has reached both homes, or SQL."""
        wanted = {name: value for name, value in changes.items() if value is not None}
        if not wanted or holds(self.database.held.get(key, ()), key, wanted):
            return
        for name in worker.homes_of(key):
            if not holds(self.servers[name].held.get(key, ()), key, wanted):
                raise Violation(
                    "G2", f"{key[:6]}: {wanted} is acknowledged, and not on {name}"
                )

    def _was_ended(self, key: str) -> bool:
        """Whether a tombstone of this session was ever put anywhere."""
        return key in self.database.buried or any(
            holds_tombstone(server.held.get(key, ()), key)
            for server in self.servers.values()
        )

    def _check_end(self, worker: Worker, key: str, start: int, faults: Faults) -> None:
        """What was acknowledged as ended is so in SQL, or on both homes."""
        homes = worker.homes_of(key)
        told = [
            name
            for name in homes
            if holds_tombstone(self.servers[name].held.get(key, ()), key)
        ]
        in_sql = key in self.database.buried
        if not in_sql and (len(homes) < len(PAIR) or len(told) < len(homes)):
            raise Violation("G4", f"{key[:6]} was ended, in SQL not, and on {told}")
        skipped = any(suspect for _, suspect in faults)
        # One may have been given up, by what another request met, since this began.
        away = any(worker.cannot_reach(name) for name in homes)
        reached = worker.faults(key) == faults and not skipped and not away
        full = any(self.servers[name].refused_step >= start for name in homes)
        passed = self.world.passed_since(start) > 0
        if len(told) < len(homes) and reached and not full and not passed:
            raise Violation("G4", f"{key[:6]} was ended, and of {homes} only {told}")

    def _changes(self, what: str, live: Live) -> dict[str, bytes | None]:
        if what == "own":
            return {f"own{self._values}": self._new_value()}
        if what == "shared":
            return {"s": self._new_value()}
        if what in ("delete", "sync delete"):
            keys = sorted(live.record.payload().keys() - {USER})
            if keys:
                return {self.world.rng.choice(keys): None}
        return {}

    def _end(self, worker: Worker, session: Session, live: Live | None) -> str:
        start, faults = self.world.step, worker.faults(session.key)
        session.end_asked = min(session.end_asked, start)
        session.logout_asked = True
        try:
            worker.store.end(worker.context(session.key), live)
        except SessionUnavailable as error:
            return self._refused(worker, "end", start, error)
        self._check_end(worker, session.key, start, faults)
        self._note(worker, session.key, faults)
        session.ended = min(session.ended, self.world.step)
        session.untold |= worker.reaches_none(session.key, faults)
        return self._count("ended", session.name)

    def _move(
        self,
        worker: Worker,
        session: Session,
        live: Live,
        what: str,
        context: SessionContext,
        start: int,
        faults: Faults,
    ) -> str | Session:
        world, history = self.world, self.history
        start_ms = world.now_ms
        key = self._new_key()
        refill = what == "refill"
        line = Line() if refill else session.line
        changes: dict[str, bytes | None] = {}
        if what == "login":
            self._values += 1
            changes[USER] = encode_value(USER, f"user {self._values}")
        elif refill or world.rng.random() < 0.3:
            changes["s"] = self._new_value()
        writes = history.write(line, changes, start)
        session.end_asked = min(session.end_asked, start)
        dropped = worker.observer.stats["dropped_changes"]
        try:
            moved = worker.store.move(
                context,
                live,
                worker.context(key),
                changes,
                reason="ended" if refill else "moved",
                renew_created=what == "login",
            )
        except SessionUnavailable as error:
            return self._refused(worker, what, start, error)
        if isinstance(moved, Gone):
            self._count("gone", session.name, moved.reason)
            self._gone(worker, session, moved, start, faults)
            return "gone"
        self._check_end(worker, session.key, start, faults)
        self._note(worker, session.key, faults)
        session.ended = min(session.ended, world.step)
        session.untold |= worker.reaches_none(session.key, faults)
        blind = worker.missed_all(session.key, faults)
        if blind:
            # It goes on with what SQL has.
            history.row_is_left(session)
        elif not refill:
            history.in_sql(session, start)
        # What it found on the old homes it says to have dropped, for want of SQL.
        said = worker.observer.stats["dropped_changes"] > dropped
        if (
            blind
            or session.logout_asked
            # Others take it for one that ended long ago.
            or world.passed_since(start) >= MOVE_AT_WORK_MS
            or self._looks_over_elsewhere(worker)
            or (said and history.sql_in_doubt)
        ):
            history.excuse(line, start)
        history.acknowledge(writes, durable=True)
        born_ms = session.born_ms if what == "regenerate" else start_ms
        new = history.born(key, line, start=start, start_ms=start_ms, durable=True)
        new.born_ms = born_ms
        self._count("moved", f"{session.name} to {new.name}")
        return new

    def _looks_over_elsewhere(self, worker: Worker) -> bool:
        """Whether a clock is so far ahead that this worker's move seems long done."""
        return self.history.skew_ms >= MOVE_AT_WORK_MS

    def _refused(
        self,
        worker: Worker,
        what: str,
        start: int,
        error: SessionUnavailable | None,
    ) -> str:
        """A request was answered 503: with SQL well, nothing excuses that."""
        # More writers at once than a request tries again: the one excuse that
        # needs no fault.
        if error is not None and TOO_MANY in str(error):
            return self._count("too many", what)
        keys = {one.secrets[0] for one in self.workers}
        excused = (
            worker.doubts_sql(start)
            or self.world.passed_since(start) > 0
            # Its own keys are behind the others'.
            or not keys <= {*worker.secrets}
        )
        if not excused:
            raise Violation("G1", f"{what} refused with SQL up: {error}")
        return self._count("unavailable", what)

    def _count(self, what: str, *about: str) -> str:
        self.counts[what] += 1
        self.world.log("  => {} {}", what, " ".join(about))
        return what

    # --- the end -----------------------------------------------------------------

    def _finish(self) -> None:
        """Heal, read everything everywhere, then lose all memory and read again."""
        world = self.world
        world.log("-- the end: everything heals")
        world.deliver_all()
        for index in range(WORKERS):
            self.roll(index)
        self.settle()
        world.alone = True
        world.deliver_all()
        # Whoever moved a session has had the time to bury its copies alone.
        world.wall_ms += 2 * MOVE_AT_WORK_MS
        for session in self.history.sessions:
            self._read_everywhere(session)
        world.log("-- a sync is due")
        skew = self.history.skew_ms
        sync_ms = self.plan.longest_slack_ms
        world.wall_ms += sync_ms + 2 * skew + 120_000
        for session in self.history.sessions:
            self.read_for_good(session)
        world.deliver_all()
        world.wall_ms += sync_ms + 2 * skew + 120_000
        world.log("-- all memory is lost")
        for server in self.servers.values():
            server.restart()
        self.history.memory_lost()
        for session in self.history.sessions:
            self.read_for_good(session)

    def _read_everywhere(self, session: Session) -> None:
        """Every worker sees the same, and the homes agree on it."""
        shown = set()
        for worker in self.workers:
            self.world.step += 1
            result = self._use(worker, session)
            if result == "unavailable":
                raise Violation("G7", f"{session.name} is unavailable without a fault")
            self.world.deliver_all()
            shown.add(str(result))
        context = self.workers[0].context(session.key)
        store = self.workers[0].store
        copies = [
            reply.copy if isinstance(reply, Hit) else None
            for reply in store.read_copies(context, store.homes.names(context)).values()
        ]
        live = [copy for copy in copies if isinstance(copy, Record)]
        if session.ended < NEVER and live and not session.untold:
            raise Violation("G4", f"{session.name} was ended and a home holds it")
        # One that died in the middle of a move has told SQL only.
        judged = session.end_asked == NEVER or session.ended < NEVER
        if "gone" in shown and judged and not self.history.skew_ms and len(shown) > 1:
            raise Violation("G8", f"{session.name} is gone for some workers only")
        if shown == {"live"} and not (self._at_rest(live)):
            raise Violation("G2", f"the homes of {session.name} do not agree at rest")

    def _at_rest(self, live: Sequence[Record]) -> bool:
        """Whether these copies are all that there should be."""
        alike = all(same_state(copy, live[0]) for copy in live[1:])
        return len(live) == min(len(self.names), len(PAIR)) and alike


class _Shown:
    """A live session in words."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def __str__(self) -> str:
        live = self._live
        payload = {
            key: value.decode(errors="replace")
            for key, value in live.record.payload().items()
        }
        version = f"v{live.record.row_version}"
        return f"{live.standing.value} {version} {payload} repairs {live.repairs}"
