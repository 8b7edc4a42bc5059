"""Faults as values: what is broken, for how long, and who was answered meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeAlias

#: Something is broken inside, and whole again after it.
Breakage: TypeAlias = Callable[[], AbstractContextManager[None]]

#: What can be broken, by the name that a report gives it.
Breakages: TypeAlias = Mapping[str, Breakage]


@dataclass
class Fault:
    """One thing that the nemesis did, or two at once.

    :ivar kinds: what was broken.
    :ivar answered: operation -> how many began and succeeded while it lasted.
    :ivar refused: logins that were refused because SQL was away.
    """

    kinds: tuple[str, ...]
    answered: Counter[str] = field(default_factory=Counter)
    refused: int = 0

    def __str__(self) -> str:
        return " + ".join(self.kinds)
