"""What was acknowledged, and what a page may therefore show.

An account has one session at a time. Every element carries the tag of the session that
it was written to, so that one that turns up elsewhere gives itself away.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

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


class History:
    """All lives, and what went wrong.

    :ivar violations: sentences; none is right.
    :ivar counts: operations and their outcomes.
    :ivar ended: cookies whose sessions ended, or went on under another id.
    :ivar faults: what the nemesis did so far, in order.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.ended: list[str] = []
        self.faults: list[str] = []
        self._end: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()

    def count(self, name: str) -> None:
        """Count an operation or an outcome."""
        with self._lock:
            self.counts[name] += 1

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
        self.violate(
            f"{where}: {page.get('_user_id')} was {how} and came back;"
            f" faults since: {', '.join(self.faults[fault:])}"
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
            self.violate(f"{where}: {life.tag} lost {sorted(lost)}")
        for key, number in before.latest.items():
            if int(page.get(key, -1)) < number:
                self.violate(
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
            self.violations.append(sentence)
