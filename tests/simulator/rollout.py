"""What is being rolled out, and what a failing node risks meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from flask_resilient_session.core.envelope import Keyring

#: The secret keys that an application has one after the other.
SECRETS = ("the simulator's secret", "its second one", "its third one")


@lru_cache(maxsize=16)
def keyring(secrets: tuple[str, ...]) -> Keyring:
    """What a worker with these keys, the current one first, can open."""
    return Keyring(secrets, "simulator")


class Rollout:
    """The configuration that workers get at their turn.

    A change of the nodes leaves each session one of its homes. What is not in SQL yet
    is known there, and on the home that comes or goes with some of the workers only.
    If the one in common fails, its session may for a while be what SQL has.

    :param names: the nodes that all workers begin with.
    :param homes: gives a session's homes under a set of nodes.
    :ivar secrets: the secret keys, the current one first.
    """

    def __init__(
        self,
        names: frozenset[str],
        homes: Callable[[frozenset[str], str], Iterable[str]],
    ) -> None:
        self.secrets = SECRETS[:1]
        self._homes = homes
        self._in_use = {names}
        self._failed: set[str] = set()

    # --- keys --------------------------------------------------------------------

    def announce(self) -> None:
        """The next key is accepted, and nothing is sealed with it yet."""
        self.secrets = (*self.secrets, self._next_secret())

    def rotate(self) -> None:
        """The next key comes first, and the old ones are still accepted."""
        newest = self._next_secret()
        olds = (secret for secret in self.secrets if secret != newest)
        self.secrets = (newest, *olds)

    def _next_secret(self) -> str:
        return SECRETS[SECRETS.index(self.secrets[0]) + 1]

    def drop(self) -> None:
        """Only the current key is left."""
        self.secrets = self.secrets[:1]

    # --- nodes -------------------------------------------------------------------

    def spreads(self, names: frozenset[str]) -> None:
        """A worker begins with these nodes."""
        self._in_use.add(names)

    def fails(self, node: str) -> None:
        """A fault begins."""
        self._failed.add(node)

    def is_over(self, names: frozenset[str]) -> None:
        """All workers have these nodes, all are well, and every session was read."""
        self._in_use = {names}
        self._failed.clear()

    def at_risk(self, session_key: str) -> bool:
        """Whether workers may only agree on this session by what SQL has."""
        if not self._failed or len(self._in_use) == 1:
            return False
        pairs = {frozenset(self._homes(n, session_key)) for n in self._in_use}
        return len(pairs) > 1 and frozenset.intersection(*pairs) <= self._failed
