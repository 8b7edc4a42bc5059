"""Who runs next, what time it is, and what is still on its way."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from random import Random
from typing import NamedTuple

from greenlet import getcurrent, greenlet

#: A schedule that takes more steps than this hangs.
MAX_STEPS = 200_000


class Stuck(Exception):
    """No task can go on, or they go on for ever."""


class Died(BaseException):
    """The process that a task belongs to has died: it does nothing any more."""


class Task:
    """One greenlet.

    :ivar until: what it waits for, if anything.
    :ivar lead: seconds by which its clock is ahead of the world's. What one request
        waits is no time of the others.
    :ivar process: the process whose request it carries out; 0 for none.
    :ivar doomed: that process has died.
    """

    __slots__ = ("doomed", "greenlet", "lead", "name", "process", "until")

    def __init__(self, name: str, run: Callable[[], None], hub: greenlet) -> None:
        self.name = name
        self.greenlet = greenlet(run, hub)
        self.until: Callable[[], bool] | None = None
        self.lead = 0.0
        self.process = 0
        self.doomed = False


class Late(NamedTuple):
    """Something that takes effect at a moment nobody knows.

    :ivar held_until: true time, in milliseconds, before which it does not.
    """

    kind: str
    land: Callable[[], None]
    held_until: int


class World:
    """The scheduler, the true time, and the packets that are late.

    :param rng: decides everything.
    :param traced: keep what happened as text.
    """

    def __init__(self, rng: Random, *, traced: bool = False) -> None:
        self.rng = rng
        self.step = 0
        #: The true time; a task's own is ahead of it by what it has waited.
        self.wall_ms = 1_800_000_000_000
        self.mono = 1000.0
        #: When time passed in the middle of requests: (step, milliseconds).
        self.passed: list[tuple[int, int]] = []
        self.trace: list[str] | None = [] if traced else None
        self.late: list[Late] = []
        #: Milliseconds for which a late packet may be held back.
        self.holds_back: tuple[int, ...] = (0,)
        #: Nobody else can go on: there is no need to ask.
        self.alone = False
        #: How likely a task that could go on is the one that goes on.
        self.stickiness = rng.choice((0.0, 0.0, 0.5, 0.8))
        self._tasks: list[Task] = []
        self._current: Task | None = None
        self._hub: greenlet | None = None

    # --- tasks -------------------------------------------------------------------

    def spawn(self, name: str, run: Callable[[], None]) -> None:
        """Start a task; it first runs when the scheduler picks it."""
        assert self._hub is not None, "tasks start inside run()"
        self._tasks.append(Task(name, run, self._hub))

    def pause(self) -> None:
        """Let somebody else go on, or not: where anything may happen in between."""
        if self.alone or (self.stickiness and self.rng.random() < self.stickiness):
            self.step += 1
            return
        assert self._hub is not None
        self._hub.switch()

    def wait(self, until: Callable[[], bool]) -> None:
        """Go on when this holds."""
        task = self._current
        assert task is not None
        assert self._hub is not None
        if not until():
            task.until = until
            self._hub.switch()
            task.until = None

    def run(self, first: Callable[[], None]) -> None:
        """Run a task and all that it starts to their ends."""
        self._hub = getcurrent()
        self.spawn("operator", first)
        try:
            self._loop()
        finally:
            for task in self._tasks:
                if task.greenlet:
                    task.greenlet.throw()
            self._tasks.clear()

    # --- processes ---------------------------------------------------------------

    def begin(self, process: int) -> None:
        """The current task carries out a request in this process from now on."""
        task = self._current
        assert task is not None
        task.process, task.lead = process, 0.0

    def end(self) -> None:
        """The request is over: the world's clock is where the task's is, at least."""
        task = self._current
        assert task is not None
        ahead = max(task.lead, 0.0)
        task.process, task.lead = 0, 0.0
        self.mono += ahead
        self.wall_ms += int(ahead * 1000)
        for other in self._tasks:
            if other is not task and other.process:
                # Its own clock stays where it is.
                other.lead -= ahead

    def kill(self, process: int) -> None:
        """All that this process is doing ends where it is."""
        for task in self._tasks:
            if task.process == process and task is not self._current:
                task.doomed = True
                task.until = None

    def _loop(self) -> None:
        tasks, rng = self._tasks, self.rng
        while tasks:
            self.step += 1
            if self.step > MAX_STEPS:
                names = ", ".join(task.name for task in tasks)
                raise Stuck(f"still running after {self.step} steps: {names}")
            if self.late and rng.random() < 0.1:
                index = rng.randrange(len(self.late))
                if self.late[index].held_until <= self.wall_ms:
                    self.deliver(index)
            task = tasks[int(rng.random() * len(tasks))]
            if task.until is not None and not task.until():
                continue
            self._current = task
            if task.doomed:
                task.doomed = False
                task.greenlet.throw(Died())
            else:
                task.greenlet.switch()
            self._current = None
            if task.greenlet.dead:
                tasks.remove(task)

    # --- late packets ------------------------------------------------------------

    def later(self, kind: str, land: Callable[[], None]) -> None:
        """Something that takes effect at a moment nobody knows."""
        held = self.rng.choice(self.holds_back) if len(self.holds_back) > 1 else 0
        self.late.append(Late(kind, land, self.wall_ms + held if held else 0))

    def deliver(self, index: int) -> None:
        """Let one late packet land."""
        packet = self.late.pop(index)
        self.log("      a late packet lands: {}", packet.kind)
        packet.land()

    def deliver_all(self, kinds: str = "", *, held: bool = True) -> None:
        """Let all that is on its way land.

        :param kinds: only what starts with this.
        :param held: also what is held back for longer.
        """
        for index in range(len(self.late) - 1, -1, -1):
            packet = self.late[index]
            if packet.kind.startswith(kinds) and (
                held or packet.held_until <= self.wall_ms
            ):
                self.deliver(index)

    # --- time --------------------------------------------------------------------

    @property
    def now(self) -> float:
        """The monotonic time of whoever asks, in seconds."""
        task = self._current
        return self.mono if task is None else self.mono + task.lead

    @property
    def now_ms(self) -> int:
        """The true time of whoever asks, in Unix milliseconds."""
        task = self._current
        return self.wall_ms if task is None else self.wall_ms + int(task.lead * 1000)

    def spend(self, seconds: float) -> None:
        """Time that the current request, or else everybody, waited."""
        task = self._current
        if task is not None and task.process:
            task.lead += seconds
        else:
            self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        """Time goes by for everybody, also in the middle of requests."""
        self.mono += seconds
        self.wall_ms += int(seconds * 1000)

    def passed_since(self, start: int) -> int:
        """Milliseconds that passed in the middle of requests since this step."""
        return sum(amount for step, amount in self.passed if step >= start)

    def log(self, text: str, *parts: object) -> None:
        """A line of the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.step:5d} {text.format(*parts)}")


class Signal:
    """A ``threading.Event`` between tasks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_set = False

    def set(self) -> None:
        """Let those that wait go on."""
        self._is_set = True

    def wait(self, timeout: float) -> bool:
        """Wait until it is set."""
        world, started = self._world, self._world.step
        # Nobody's clock goes on while all wait: others are given some turns.
        world.wait(lambda: self._is_set or world.step > started + _PATIENCE)
        if not self._is_set:
            world.spend(max(timeout, 0.0))
        return self._is_set


#: Steps for which a task waits in vain for another one.
_PATIENCE = 2_000


class WorkerClock:
    """The clock of one worker: the true time, and how far it is off."""

    def __init__(self, world: World, skew_ms: int) -> None:
        self._world = world
        self.skew_ms = skew_ms

    def now_ms(self) -> int:
        """Unix milliseconds."""
        return self._world.now_ms + self.skew_ms

    def monotonic(self) -> float:
        """Seconds that only go forward."""
        return self._world.now

    def process_time(self) -> float:
        """Nobody is busy here."""
        return 0.0


@contextmanager
def quiet(logger: object) -> Generator[None]:
    """Nothing logged meanwhile: faults are the normal case here."""
    disabled = getattr(logger, "disabled", False)
    logger.disabled = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logger.disabled = disabled  # type: ignore[attr-defined]
