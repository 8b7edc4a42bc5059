"""Who runs next, what time it is, and what is still on its way."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from random import Random

from greenlet import getcurrent, greenlet

#: A schedule that takes more steps than this hangs.
MAX_STEPS = 200_000


class Stuck(Exception):
    """No task can go on, or they go on for ever."""


class Task:
    """One greenlet; ``until`` is what it waits for, if anything."""

    __slots__ = ("greenlet", "name", "until")

    def __init__(self, name: str, run: Callable[[], None], hub: greenlet) -> None:
        self.name = name
        self.greenlet = greenlet(run, hub)
        self.until: Callable[[], bool] | None = None


class World:
    """The scheduler, the true time, and the packets that are late.

    :param rng: decides everything.
    :param traced: keep what happened as text.
    """

    def __init__(self, rng: Random, *, traced: bool = False) -> None:
        self.rng = rng
        self.step = 0
        self.wall_ms = 1_800_000_000_000
        self.mono = 1000.0
        self.trace: list[str] | None = [] if traced else None
        #: Writes that will land some time: (kind, what lands).
        self.late: list[tuple[str, Callable[[], None]]] = []
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

    def _loop(self) -> None:
        tasks, rng = self._tasks, self.rng
        while tasks:
            self.step += 1
            if self.step > MAX_STEPS:
                names = ", ".join(task.name for task in tasks)
                raise Stuck(f"still running after {self.step} steps: {names}")
            if self.late and rng.random() < 0.1:
                self.deliver(rng.randrange(len(self.late)))
            task = tasks[int(rng.random() * len(tasks))]
            if task.until is not None and not task.until():
                continue
            self._current = task
            task.greenlet.switch()
            self._current = None
            if task.greenlet.dead:
                tasks.remove(task)

    # --- late packets ------------------------------------------------------------

    def later(self, kind: str, land: Callable[[], None]) -> None:
        """Something that takes effect at a moment nobody knows."""
        self.late.append((kind, land))

    def deliver(self, index: int) -> None:
        """Let one late packet land."""
        kind, land = self.late.pop(index)
        self.log("      a late packet lands: {}", kind)
        land()

    def deliver_all(self, kinds: str = "") -> None:
        """Let all that is on its way land; only what starts with ``kinds``."""
        for index in range(len(self.late) - 1, -1, -1):
            if self.late[index][0].startswith(kinds):
                self.deliver(index)

    # --- time --------------------------------------------------------------------

    def spend(self, seconds: float) -> None:
        """Time that somebody waited."""
        self.mono += seconds
        self.wall_ms += int(seconds * 1000)

    def log(self, text: str, *parts: object) -> None:
        """A line of the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.step:5d} {text.format(*parts)}")


class Landing:
    """A ``threading.Event`` between tasks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_set = False

    def set(self) -> None:
        """Let those that wait go on."""
        self._is_set = True

    def wait(self, timeout: float) -> bool:
        """Wait until it is set."""
        until = self._world.mono + timeout
        self._world.wait(lambda: self._is_set or self._world.mono >= until)
        return self._is_set


class WorkerClock:
    """The clock of one worker: the true time, and how far it is off."""

    def __init__(self, world: World, skew_ms: int) -> None:
        self._world = world
        self.skew_ms = skew_ms

    def now_ms(self) -> int:
        """Unix milliseconds."""
        return self._world.wall_ms + self.skew_ms

    def monotonic(self) -> float:
        """Seconds that only go forward."""
        return self._world.mono


@contextmanager
def quiet(logger: object) -> Generator[None]:
    """Nothing logged meanwhile: faults are the normal case here."""
    disabled = getattr(logger, "disabled", False)
    logger.disabled = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logger.disabled = disabled  # type: ignore[attr-defined]
