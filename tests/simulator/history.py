"""What was asked and acknowledged, and what may therefore never be seen.

Steps are the scheduler's: one thing is before another only if its last step comes
before the other's first. Everything here is about what requests were told; nothing
looks into the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from flask_resilient_session.core.lifetimes import Timing
from flask_resilient_session.core.reading import Gone, Live

from .hearing import ALL_EARS, Reader
from .world import World

#: A step after every other: a write that was never acknowledged may still land.
NEVER = 1 << 60

#: Milliseconds that one request may take.
IN_FLIGHT_MS = 60_000


class Violation(AssertionError):
    """A guarantee was broken.

    :ivar rule: which one.
    """

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


@dataclass(slots=True, eq=False)
class Write:
    """One request's change of one key.

    :ivar end: when it was acknowledged.
    :ivar durable: SQL has it for certain.
    :ivar excused: it may be lost; see :meth:`History.excuse`.
    """

    key: str
    value: bytes | None
    start: int
    end: int = NEVER
    end_ms: int = 0
    durable: bool = False
    excused: bool = False

    def __str__(self) -> str:
        value = "nothing" if self.value is None else self.value.decode(errors="replace")
        end = "never" if self.end == NEVER else self.end
        return f"{self.key}={value} [{self.start}..{end}]"


@dataclass(slots=True)
class _Seen:
    """One read of one key."""

    start: int
    end: int
    write: Write


@dataclass(slots=True)
class _Register:
    """One key's writes and reads; the first write is its absence at the start."""

    writes: list[Write]
    seen: list[_Seen] = field(default_factory=list)


class Use(NamedTuple):
    """An acknowledged request.

    :ivar end: step at which it was acknowledged.
    :ivar start_ms: true time at which it began.
    :ivar synced_ms: what was acknowledged by then is in SQL; 0 where SQL was in doubt.
    """

    end: int
    start_ms: int
    synced_ms: int


@dataclass(slots=True)
class Line:
    """The data of a session through all its ids."""

    registers: dict[str, _Register] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)

    def register(self, key: str) -> _Register:
        """The key's register."""
        found = self.registers.get(key)
        if found is None:
            found = self.registers[key] = _Register([Write(key, None, -1, -1)])
        return found


@dataclass(slots=True, eq=False)
class Session:
    """One session id.

    :ivar born: step at which its creation was acknowledged.
    :ivar end_asked: first step of the first request that ends or moves it.
    :ivar ended: step at which an end or move was acknowledged.
    :ivar seen_gone: step at which a request was told that it had been ended.
    :ivar logout_asked: a request began to end it, not to move it.
    :ivar weak: its creation may have been lost with the memory of all nodes.
    :ivar untold: who ended it could tell neither home.
    :ivar row_away: SQL has forgotten its row for a while.
    :ivar touched_ms: true time at which the last request for it was under way.
    """

    key: str
    line: Line
    born: int
    born_ms: int
    touched_ms: int
    durable: bool
    end_asked: int = NEVER
    ended: int = NEVER
    seen_gone: int = NEVER
    logout_asked: bool = False
    weak: bool = False
    untold: bool = False
    row_away: bool = False
    #: When acknowledged requests were told so, and true times at which they began.
    uses: list[tuple[int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the trace calls it."""
        return self.key[:6]


class History:
    """Everything that was acknowledged, checked at every read.

    :param timing: what all workers go by, but for their intervals.
    :param slack_ms: how much later than its idle lifetime says a session may end.
    :ivar skew_ms: how far two clocks may differ, or have.
    :ivar longest_ms: what the longest request took.
    """

    def __init__(
        self, world: World, timing: Timing, slack_ms: int, skews: Iterable[int]
    ) -> None:
        self.world = world
        self.timing = timing
        self.slack_ms = slack_ms
        self._skews = set(skews)
        self.skew_ms = max(self._skews) - min(self._skews)
        self.longest_ms = 0
        self.sessions: list[Session] = []
        #: A statement went wrong, and not every worker knows yet that SQL is well.
        self.sql_in_doubt = False
        self._rows: dict[str, int] = {}
        self._lost_ms = -1
        self._lost_step = -1

    def clock_steps(self, skew_ms: int) -> None:
        """A worker's clock is off by this from now on."""
        self._skews.add(skew_ms)
        self.skew_ms = max(self._skews) - min(self._skews)

    def took(self, start_ms: int) -> None:
        """A request that began then is over."""
        self.longest_ms = max(self.longest_ms, self.world.now_ms - start_ms)

    # --- writes ------------------------------------------------------------------

    def write(
        self, line: Line, changes: Mapping[str, bytes | None], start: int
    ) -> list[Write]:
        """A request is about to change these keys."""
        writes = [Write(key, value, start) for key, value in changes.items()]
        for write in writes:
            line.register(write.key).writes.append(write)
        return writes

    def acknowledge(self, writes: Iterable[Write], *, durable: bool) -> None:
        """The request was told that they are kept."""
        for write in writes:
            lost = write.start <= self._lost_step
            if (lost or write.excused) and not durable:
                # It was under way when all memory was lost, or during a move.
                continue
            write.end = self.world.step
            write.end_ms = self.world.now_ms
            write.durable = durable

    def born(
        self, key: str, line: Line, *, start: int, start_ms: int, durable: bool
    ) -> Session:
        """The creation of an id was acknowledged."""
        world = self.world
        session = Session(
            key,
            line,
            world.step,
            start_ms,
            world.now_ms,
            durable,
        )
        session.uses.append((world.step, start_ms))
        session.weak = not durable and start <= self._lost_step
        self.sessions.append(session)
        return session

    def used(self, session: Session, start_ms: int, sync_ms: int | None) -> None:
        """A request that used the session was acknowledged.

        :param sync_ms: its worker's sync interval; None where SQL was in doubt.
        """
        session.uses.append((self.world.step, start_ms))
        session.touched_ms = self.world.now_ms
        # What was acknowledged before another one's sync may have come too late for it,
        # by as much as that request took.
        wait_ms = self.skew_ms + self.longest_ms
        synced_ms = 0 if sync_ms is None else start_ms - sync_ms - wait_ms
        session.line.uses.append(Use(self.world.step, start_ms, synced_ms))

    def memory_lost(self) -> None:
        """All nodes are empty: what SQL need not have is not promised any more."""
        world = self.world
        self._lost_step, self._lost_ms = world.step, world.wall_ms
        for session in self.sessions:
            self.row_is_left(session)

    def no_row_needed(self, session: Session) -> None:
        """Without a row it may be lost with its copies, if it never came back."""
        came_back = any(
            use.synced_ms and use.start_ms > session.born_ms + 1
            for use in session.line.uses
        )
        if not session.durable and not came_back:
            session.weak = True

    def row_is_left(self, session: Session) -> None:
        """What SQL need not have of a session is not promised any more."""
        line = session.line
        self.no_row_needed(session)
        last_ms = max((use.synced_ms for use in line.uses), default=0)
        for register in line.registers.values():
            for write in register.writes:
                if write.end == NEVER or write.start < 0 or write.durable:
                    continue
                if last_ms >= write.end_ms:
                    write.durable = True
                else:
                    write.end = NEVER

    def excuse(self, line: Line, start: int) -> None:
        """What was written during this move may be dropped.

        A logout fell into it, or a clock that is far ahead took it for an old one.
        """
        for register in line.registers.values():
            for write in register.writes:
                if not write.durable and start <= write.end:
                    write.end = NEVER
                    write.excused = True

    def in_sql(self, session: Session, start: int) -> None:
        """A request was told that SQL has what it saw when it began."""
        session.durable = True
        for register in session.line.registers.values():
            for write in register.writes:
                if write.end < start:
                    write.durable = True

    # --- reads -------------------------------------------------------------------

    def check_live(
        self, session: Session, live: Live, start: int, reader: Reader = ALL_EARS
    ) -> None:
        """A read that began at ``start`` found the session."""
        name = session.name
        if session.ended < start and not reader.may_miss(session.ended):
            raise Violation(
                "G4", f"{name} was ended at {session.ended} and read at {start}"
            )
        told = reader.told_gone < start or not reader.may_miss(session.seen_gone)
        if session.seen_gone < start and told:
            raise Violation(
                "G4",
                f"{name} was gone at {session.seen_gone} and came back at {start}",
            )
        payload = live.record.payload()
        for key, register in session.line.registers.items():
            value = payload.get(key)
            if session.ended >= start:
                self._check_key(session, register, value, start, reader)
            elif not any(write.value == value for write in register.writes):
                # What else it misses goes on under another id, which its process
                # may know.
                raise Violation("G9", f"{name} ended with {value!r}, never written")
        unknown = payload.keys() - session.line.registers.keys()
        if unknown:
            raise Violation("G6", f"{name} holds {sorted(unknown)}, which nobody wrote")

    def _check_key(
        self,
        session: Session,
        register: _Register,
        value: bytes | None,
        start: int,
        reader: Reader,
    ) -> None:
        # Values are unique; absence may be the start or any deletion.
        found = [write for write in register.writes if write.value == value]
        if not found:
            raise Violation("G9", f"{session.name}: nobody wrote {value!r}")
        for write in found:
            error = self._objection(session, register, write, start, reader)
            if error is None:
                if len(found) == 1 and not reader.is_behind():
                    register.seen.append(_Seen(start, self.world.step, write))
                return
        assert error is not None
        raise error

    def _objection(
        self,
        session: Session,
        register: _Register,
        write: Write,
        start: int,
        reader: Reader,
    ) -> Violation | None:
        for other in register.writes:
            after = other.end < start and write.end < other.start
            if (
                after
                and not reader.may_miss(other.end)
                and not reader.was_blind(write.end)
                and not reader.was_blind(other.end)
            ):
                return Violation(
                    "G1",
                    f"{session.name}: a read at {start} saw {write}, but {other}"
                    " was acknowledged after it and before the read",
                )
        for seen in register.seen:
            if (
                seen.write is not write
                and seen.end < start
                and write.end < seen.start
                and seen.write.end < start
                and not reader.may_miss_all_of(seen.write.end)
                and not (reader.may_miss(seen.write.end) and reader.may_miss(seen.end))
            ):
                return Violation(
                    "G8",
                    f"{session.name}: a read at {start} saw {write}, a read at"
                    f" {seen.start} had seen {seen.write}, both acknowledged",
                )
        return None

    def check_gone(
        self,
        session: Session,
        gone: Gone,
        start: int,
        was_ended: Callable[[], bool],
    ) -> str:
        """A read that began at ``start`` was told that there is no session.

        :param was_ended: whether a tombstone of it was ever put anywhere.
        :returns: why that is so.
        """
        if session.weak or (session.row_away and gone.reason == "missing"):
            return "lost"
        over = self.may_be_over(session, start)
        if gone.reason in ("ended", "moved"):
            asked = session.end_asked != NEVER
            allowed = over or (asked and was_ended())
        else:
            # SQL keeps a tombstone for as long as the session could have lived.
            allowed = over
        # A move that is not yet acknowledged may show at one place before another.
        if gone.reason in ("ended", "missing") or session.ended < NEVER:
            session.seen_gone = min(session.seen_gone, self.world.step)
        if not allowed:
            raise Violation(
                "G1",
                f"{session.name} is gone ({gone.reason}) at {start},"
                " and nobody ended it",
            )
        return "over" if over else "ended"

    # --- time --------------------------------------------------------------------

    def may_be_over(self, session: Session, start: int) -> bool:
        """Whether its time may be over by somebody's clock, as known at this step."""
        # A use that was acknowledged later may not have been seen.
        used_ms = max(used for step, used in session.uses if step < start)
        timing, now_ms = self.timing, self.world.now_ms
        over = now_ms >= used_ms + timing.lifetime_ms - self.skew_ms
        if timing.absolute_ms is not None:
            until_ms = session.born_ms + timing.absolute_ms
            over = over or now_ms >= until_ms - self.skew_ms
        return over

    def check_time(self, session: Session, started_ms: int) -> None:
        """A read that began at this time found the session: was it still alive?"""
        timing = self.timing
        until_ms = session.touched_ms + timing.lifetime_ms + self.slack_ms
        if started_ms > until_ms + self.skew_ms + self.longest_ms:
            raise Violation("G16", f"{session.name} was served after its idle lifetime")
        if timing.absolute_ms is not None:
            until_ms = session.born_ms + timing.absolute_ms
            if started_ms > until_ms + self.skew_ms + self.longest_ms:
                raise Violation("G16", f"{session.name} outlived its absolute lifetime")

    def row_appears(self, key: str, *, live: bool) -> None:
        """A row was inserted."""
        # A live one may appear after a logout that only the homes know of: its
        # tombstones carry a debt, which the next reader pays.
        if live and key in self._rows:
            raise Violation("G5", f"a second row appears for {key[:6]}")
        self._rows.setdefault(key, self.world.step)

    def row_is_forgotten(self, key: str) -> None:
        """SQL has lost a row, which may be inserted once more."""
        self._rows.pop(key, None)

    def row_is_reaped(self, key: str) -> None:
        """A live row went. Expiry is as good as the clocks.

        Where they differ a worker that is behind may still find a copy alive, and
        give it a row.
        """
        if self.skew_ms:
            self._rows.pop(key, None)

    def row_step(self, key: str) -> int:
        """The step at which a session got its row."""
        return self._rows.get(key, NEVER)
