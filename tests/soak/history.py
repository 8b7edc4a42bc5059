"""What was acknowledged, and what a page may therefore show.

An account has one session at a time. Every element carries the tag of the session that
it was written to, so that one that turns up elsewhere gives itself away.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from .faults import Fault

#: What an empty session's page shows.
NOBODY: Final[dict[str, Any]] = {}


@dataclass
class Life:
    """One session of an account, from login to logout.

    :ivar tag: says whose it is; the user that is logged in.
    :ivar acknowledged: elements of lists that were acknowledged.
    :ivar latest: key -> the largest number acknowledged there.
    :ivar ending: a logout has begun, or the session is given up.
    :ivar moving: changes of the id that are under way.
    """

    tag: str
    cookie: str | None
    acknowledged: set[str] = field(default_factory=set)
    latest: dict[str, int] = field(default_factory=dict)
    moving: int = 0
    ending: bool = False


@dataclass(frozen=True)
class Before:
    """What a request's page has to show: all that was acknowledged before it began."""

    cookie: str | None
    acknowledged: frozenset[str]
    latest: dict[str, int]


@dataclass(frozen=True)
class Longest:
    """The answer that took longest, and what the last fault was when it came."""

    seconds: float = 0.0
    operation: str = "none"
    fault: str = "nothing"

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s ({self.operation}; last broken: {self.fault})"


class History:
    """All lives, and what went wrong.

    A node that is well, but too slow for a worker's patience, is one fault too many
    beside the nemesis's. The workers tell. From then on, until every session was synced
    again, a page may be old without breaking any promise. Nobody is logged out by it,
    and nobody gets another's session.

    :ivar violations: sentences; none is right.
    :ivar excused: those that the slowness of the machine explains.
    :ivar strained: whether a node was too slow, and not every session synced since.
    :ivar strains: how often one was.
    :ivar operations: how often each was asked for.
    :ivar unwished: outcomes that nobody wished for, such as ``503``.
    :ivar longest: the answer that took longest.
    :ivar ended: cookies whose sessions ended, or went on under another id.
    :ivar faults: what the nemesis did so far, in order.
    :ivar fault: what is broken at the moment.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.excused: list[str] = []
        self.strained = False
        self.strains = 0
        self.operations: Counter[str] = Counter()
        self.unwished: Counter[str] = Counter()
        self.longest = Longest()
        self.ended: list[str] = []
        self.faults: list[Fault] = []
        self.fault: Fault | None = None
        self._broken: frozenset[str] = frozenset()
        self._end: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def lasts(self, fault: Fault) -> Iterator[None]:
        """Everything in it is broken from here to the end."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    def breaks(self, node: str) -> None:
        """From here on this node may be silent."""
        self._broken |= {node}

    def mended(self) -> None:
        """From here on every node has to answer."""
        self._broken = frozenset()

    def answered(
        self,
        name: str,
        status: int,
        seconds: float,
        silent: frozenset[str],
        began_in: Fault | None,
    ) -> None:
        """An operation had this outcome; status 0: no answer.

        :param silent: nodes that did not answer the worker.
        :param began_in: what was broken when it was asked for.
        """
        with self._lock:
            if silent - self._broken:
                self.strained = True
                self.strains += 1
            self.operations[name] += 1
            if status != 200:
                self.unwished[str(status or "no answer")] += 1
            elif began_in is not None and began_in is self.fault:
                began_in.answered[name] += 1
            if seconds > self.longest.seconds:
                last = str(self.faults[-1]) if self.faults else "nothing"
                self.longest = Longest(seconds, name, last)

    def before(self, life: Life) -> Before:
        """Taken before a request is sent."""
        with self._lock:
            return Before(life.cookie, frozenset(life.acknowledged), dict(life.latest))

    def appended(self, life: Life, element: str) -> None:
        """An element was acknowledged."""
        with self._lock:
            life.acknowledged.add(element)

    def put(self, life: Life, key: str, number: int) -> None:
        """A number was acknowledged under a key that one client writes."""
        with self._lock:
            life.latest[key] = number

    def moved(self, life: Life, cookie: str | None) -> None:
        """The session has a new id, and the old one is dead."""
        with self._lock:
            if life.cookie is not None and cookie is not None:
                self._bury(life.cookie, "moved")
            life.cookie = cookie

    def logged_out(self, life: Life) -> None:
        """A logout was acknowledged."""
        with self._lock:
            if life.cookie is not None:
                self._bury(life.cookie, "logged out")

    def _bury(self, cookie: str, how: str) -> None:
        self.ended.append(cookie)
        self._end[cookie] = how, max(len(self.faults) - 1, 0)

    def came_back(self, cookie: str, page: Any, where: str) -> None:
        """A session was served after it had ended."""
        how, fault = self._end[cookie]
        self._old_page(
            f"{where}: {page.get('_user_id')} was {how} and came back;"
            f" faults since: {', '.join(map(str, self.faults[fault:]))}"
        )

    def check(self, life: Life, before: Before, page: Any, where: str) -> None:
        """A page of a live session shows it whole, and nothing else."""
        if page.get("_user_id") != life.tag:
            self.violate(f"{where}: {life.tag} got a page of {page.get('_user_id')}")
            return
        shown: set[str] = set()
        for key, value in page.items():
            if key.startswith("list"):
                shown.update(value)
                if len(set(value)) != len(value):
                    self.violate(f"{where}: {life.tag} shows an element twice: {value}")
        foreign = [e for e in shown if not e.startswith(life.tag + "-")]
        if foreign:
            self.violate(f"{where}: {life.tag} shows others' elements: {foreign}")
        lost = before.acknowledged - shown
        if lost:
            self._old_page(f"{where}: {life.tag} lost {sorted(lost)}")
        for key, number in before.latest.items():
            if int(page.get(key, -1)) < number:
                self._old_page(
                    f"{where}: {life.tag} shows {key} = {page.get(key)},"
                    f" and {number} was acknowledged"
                )

    def refused(self, life: Life, before: Before, where: str) -> None:
        """A 401: right only where the session, or its id, was being ended."""
        with self._lock:
            fine = life.ending or life.moving or life.cookie != before.cookie
        if not fine:
            self.violate(f"{where}: {life.tag} is logged out")

    def violate(self, sentence: str) -> None:
        """Something is wrong."""
        with self._lock:
            self.violations.append(self._dated(sentence))

    def _old_page(self, sentence: str) -> None:
        """A page shows what was once, but should be no more."""
        with self._lock:
            found = self.excused if self.strained else self.violations
            found.append(self._dated(sentence))

    def _dated(self, sentence: str) -> str:
        last = str(self.faults[-1]) if self.faults else "nothing"
        return f"{sentence} (last broken: {last})"
