"""What a soak did and found, for people to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .faults import Fault
from .history import History, Longest


@dataclass(frozen=True)
class Report:
    """What happened.

    :ivar operations: how often each was asked for.
    :ivar unwished: outcomes other than success.
    :ivar faults: in order.
    :ivar longest: the answer that took longest.
    :ivar excused: old pages that a slow machine explains.
    :ivar strains: how often a node was too slow that was well.
    """

    seed: int
    database: str
    operations: Counter[str]
    unwished: Counter[str]
    faults: list[Fault]
    longest: Longest
    violations: list[str]
    excused: list[str]
    strains: int

    @classmethod
    def of(cls, history: History, seed: int, database: str) -> Report:
        """What this history has come to."""
        return cls(
            seed,
            database,
            history.operations,
            history.unwished,
            history.faults,
            history.longest,
            history.violations,
            history.excused,
            history.strains,
        )

    @property
    def kinds(self) -> Counter[str]:
        """How often each thing was broken, alone or with another."""
        return Counter(kind for fault in self.faults for kind in fault.kinds)

    @property
    def answered(self) -> Counter[str]:
        """Kind of fault -> how many requests succeeded while it lasted."""
        counts: Counter[str] = Counter()
        for fault in self.faults:
            for kind in fault.kinds:
                counts[kind] += fault.answered.total()
        return counts

    @property
    def refused(self) -> Counter[str]:
        """Kind of fault -> how many of the witness's logins it kept from SQL."""
        counts: Counter[str] = Counter()
        for fault in self.faults:
            for kind in fault.kinds:
                counts[kind] += fault.refused
        return +counts

    @property
    def logouts(self) -> int:
        """How many were acknowledged while the database was broken."""
        return sum(
            fault.answered["logout"]
            for fault in self.faults
            if any(kind.startswith("sql ") for kind in fault.kinds)
        )

    def __str__(self) -> str:
        both = sum(len(fault.kinds) > 1 for fault in self.faults)
        lines = [
            f"{self.database}, seed {self.seed}",
            f"operations: {_listed(self.operations)}",
            f"faults: {len(self.faults)}, {both} of them a node and the database;"
            f" kinds {_listed(self.kinds)}",
            f"succeeded during faults: {_listed(self.answered)}",
            f"logouts while the database was broken: {self.logouts}",
            f"not answered as wished: {_listed(self.unwished)}",
            f"longest answer: {self.longest}",
            f"a node that was well was too slow: {self.strains};"
            f" excused for that: {len(self.excused)}",
            *(f"  {sentence}" for sentence in self.excused[:20]),
            f"violations: {len(self.violations)}",
            *(f"  {sentence}" for sentence in self.violations[:20]),
        ]
        return "\n".join(lines)


def _listed(counts: Mapping[str, int]) -> str:
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return f"{sum(counts.values())} ({listed})" if listed else "0"
