"""What a request may not have heard of yet, where that is what is promised.

Two promises have a time in them. An end that no home could be told is known to those
that reach both at their next sync. And while new nodes are rolled out, a worker may go
on with the old pair of homes until its next sync, should the one node fail that both
pairs have in common. The second allows a request to miss what others were told lately:
never what its own process was told, and never for longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from .world import World


class Moment(NamedTuple):
    """Who was told something, and when.

    :ivar blind: it reached none of the session's homes.
    """

    process: int
    wall_ms: int
    blind: bool = False


class Excuse(NamedTuple):
    """Why a request may miss something.

    :ivar holds: whether there is a reason for it.
    :ivar covers: whether what was told then is young enough.
    :ivar own: also what its own process was told.
    """

    holds: Callable[[], bool]
    covers: Callable[[Moment], bool]
    own: bool = False


class Reader:
    """What one request may miss.

    :param excuses: what makes it miss a moment of another process.
    :ivar told_gone: step at which its own process was told that the session is gone.
    """

    def __init__(
        self,
        moments: Mapping[int, Moment],
        process: int,
        excuses: Iterable[Excuse] = (),
        told_gone: int = -1,
    ) -> None:
        self._moments = moments
        self._process = process
        self._excuses = tuple(excuses)
        self.told_gone = told_gone

    def is_behind(self) -> bool:
        """Whether it may miss anything at all, so that what it saw is no news."""
        return any(excuse.holds() for excuse in self._excuses)

    def was_blind(self, step: int) -> bool:
        """Whether who was told at this step had only SQL to tell."""
        moment = self._moments.get(step)
        return moment is not None and moment.blind

    def may_miss_all_of(self, step: int) -> bool:
        """Whether it may miss what was told at this step, and who has seen it since."""
        moment = self._moments.get(step)
        return moment is not None and any(
            excuse.own and excuse.holds() and excuse.covers(moment)
            for excuse in self._excuses
        )

    def may_miss(self, step: int) -> bool:
        """Whether it may not have heard of what was told at this step."""
        moment = self._moments.get(step)
        if moment is None:
            return False
        own = moment.process == self._process
        return any(
            excuse.holds() and excuse.covers(moment)
            for excuse in self._excuses
            if excuse.own or not own
        )


#: A request that may miss nothing.
ALL_EARS = Reader({}, -1)


class Hearing:
    """When requests were told what they were told.

    :param never: a step after every other.
    """

    def __init__(self, world: World, never: int) -> None:
        self._world = world
        self._never = never
        self._moments: dict[int, Moment] = {}
        self._gone: dict[tuple[str, int], int] = {}

    def note(self, process: int, *, blind: bool = False) -> None:
        """A request of this process is told something now."""
        world = self._world
        self._moments[world.step] = Moment(process, world.now_ms, blind)

    def note_gone(self, name: str, process: int) -> None:
        """What it is told is that a session was ended."""
        self._gone.setdefault((name, process), self._world.step)

    def reader(self, name: str, process: int, excuses: Iterable[Excuse]) -> Reader:
        """A request of this process that may miss what one of the excuses covers."""
        excuses = tuple(excuses)
        told_gone = self._gone.get((name, process), self._never)
        if any(excuse.own and excuse.holds() for excuse in excuses):
            told_gone = self._never
        return Reader(self._moments, process, excuses, told_gone)
