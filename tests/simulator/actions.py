"""What an operator, or bad luck, does: the words that plans are made of."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR

NODES = ("a", "b", "c")
PAIR = ("a", "b")
WORKERS = 3


@dataclass(frozen=True)
class Action:
    """One thing that the operator, or bad luck, does.

    :ivar amount: steps of a sleep; milliseconds, seconds or days of what takes time.
    :ivar pinned: without it the fault assumption would not hold.
    """

    what: str
    node: str = ""
    worker: int = 0
    amount: int = 0
    pinned: bool = False

    def __str__(self) -> str:
        words = [self.what, self.node]
        if self.what in ("cut", "roll", "reap", "die", "step"):
            words.append(f"w{self.worker}")
        if self.amount:
            words.append(str(self.amount))
        return " ".join(word for word in words if word)


def sleep(rng: Random, most: int = 40) -> Action:
    return Action("sleep", amount=rng.randint(1, most))


def jump(rng: Random) -> Action:
    return Action("jump", amount=rng.choice((1000, 2 * MINUTE, 6 * MINUTE, HOUR)))


NODE_FAULTS = (
    "crash",
    "restart",
    "evict",
    "cut",
    "cut",
    "hang",
    "lossy",
    "lossy",
    "full",
    "corrupt",
    "start",
)


def node_period(
    rng: Random, node: str, faults: tuple[str, ...], others: tuple[str, ...] = ()
) -> list[Action]:
    """One node fails in several ways, heals, and every session is read."""
    actions = [sleep(rng)]
    for _ in range(rng.randint(1, 4)):
        fault = Action(rng.choice(faults), node, worker=rng.randrange(WORKERS))
        actions += [fault, sleep(rng)]
        if others and rng.random() < 0.7:
            actions += [Action(rng.choice(others)), sleep(rng)]
        if rng.random() < 0.2:
            actions.append(jump(rng))
    if rng.random() < 0.5:
        actions += [Action("heal", node), sleep(rng)]
    actions.append(Action("settle", node, pinned=True))
    return actions
