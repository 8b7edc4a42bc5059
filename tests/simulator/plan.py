"""What one seed does: its settings, requests and faults, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from flask_resilient_session.core.lifetimes import Timing

from . import more
from .actions import (
    DAY,
    HOUR,
    MINUTE,
    NODE_FAULTS,
    NODES,
    PAIR,
    WORKERS,
    Action,
    jump,
    node_period,
    sleep,
)

#: What a request does, and how often.
_REQUESTS = {
    "read": 6,
    "own": 5,
    "shared": 4,
    "delete": 2,
    "sync": 0.7,
    "sync delete": 0.7,
    "logout": 0.6,
    "revoke": 0.3,
    "regenerate": 0.9,
    "login": 0.7,
    "refill": 0.4,
    "create": 0.6,
}


@dataclass(frozen=True)
class Request:
    """One request of one browser.

    :ivar client: requests of one client come one after the other.
    :ivar slot: which browser's cookie it carries.
    :ivar old: an earlier cookie of that browser, where there is one.
    """

    client: int
    worker: int
    slot: int
    what: str
    old: bool = False

    def __str__(self) -> str:
        old = " (old cookie)" if self.old else ""
        return f"w{self.worker} browser {self.slot}: {self.what}{old}"


@dataclass(frozen=True)
class Plan:
    """One schedule, but for the order in which its tasks go on.

    :ivar order: seed of that order.
    :ivar nodes: those that the workers begin with.
    :ivar timings: the workers' own, where they differ.
    :ivar lists: the workers' own lists of nodes, where they differ until the end.
    :ivar layout: which zones and weights the nodes have; see ``more.LAYOUTS``.
    :ivar holds_back: milliseconds for which late packets may be held back.
    """

    kind: str
    seed: int
    order: int
    timing: Timing
    skews: tuple[int, ...]
    slots: tuple[bool, ...]
    requests: tuple[Request, ...]
    actions: tuple[Action, ...]
    nodes: tuple[str, ...] = NODES
    timings: tuple[Timing, ...] = ()
    lists: tuple[tuple[str, ...], ...] = ()
    layout: int = 0
    holds_back: tuple[int, ...] = (0,)

    def timing_of(self, worker: int) -> Timing:
        """The durations that a worker goes by."""
        return self.timings[worker] if self.timings else self.timing

    @property
    def longest_slack_ms(self) -> int:
        """The longest time in which some worker records no use."""
        return max(timing.slack_ms for timing in (self.timing, *self.timings))


def make_plan(kind: str, seed: int) -> Plan:
    """The plan of a seed in a class."""
    rng = Random(f"{kind}/{seed}")
    slots = tuple(rng.random() < 0.5 for _ in range(rng.choice((1, 1, 1, 2, 3))))
    clients = rng.randint(2, 5)
    count = rng.randint(10, 30) if kind in ON_TWO else rng.randint(6, 16)
    kinds, weights = list(_REQUESTS), list(_REQUESTS.values())
    whats = rng.choices(kinds, weights, k=count)
    requests = tuple(
        Request(
            client=rng.randrange(clients),
            worker=rng.randrange(WORKERS),
            slot=rng.randrange(len(slots)),
            what=what,
            old=rng.random() < 0.1,
        )
        for what in whats
    )
    order, timing, skews = rng.getrandbits(32), _timing(rng), _skews(rng, kind)
    # Drawn for a limit that is gone: what comes after stays what it was.
    rng.choice((0, 1, 256))
    plan = Plan(
        kind=kind,
        seed=seed,
        order=order,
        timing=timing,
        skews=skews,
        slots=slots,
        requests=requests,
        actions=tuple((CLASSES | EDGES)[kind](rng)),
    )
    adjust = _ADJUSTED.get(kind)
    return more.befall(plan if adjust is None else adjust(plan, rng))


def _timing(rng: Random) -> Timing:
    lifetime = rng.choice((4 * DAY, 20 * DAY))
    timing = Timing(
        lifetime_ms=lifetime,
        absolute_ms=rng.choice((None, None, None, 2 * lifetime)),
        sync_ms=rng.choice((0, MINUTE, 5 * MINUTE, 5 * MINUTE)),
        sync_writes=rng.choice((None, None, 3)),
        reap_grace_ms=HOUR,
    )
    # Drawn for a setting that is gone: what comes after stays what it was.
    rng.choice((0, 10 * MINUTE))
    return timing


def _skews(rng: Random, kind: str) -> tuple[int, ...]:
    if kind == "memory" or rng.random() < 0.6:
        return (0,) * WORKERS
    return tuple(rng.randint(-3, 3) * HOUR for _ in range(WORKERS))


# --- classes ---------------------------------------------------------------------


def _nothing(rng: Random) -> list[Action]:
    """No faults: time goes on."""
    actions = []
    for _ in range(rng.randint(0, 3)):
        actions += [sleep(rng, 60), jump(rng)]
    return actions


def _one_node(rng: Random) -> list[Action]:
    """One faulty node at a time."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        actions += node_period(rng, rng.choice(NODES), NODE_FAULTS)
    return actions


def _one_node_and_sql(rng: Random) -> list[Action]:
    """One faulty node at a time, and SQL comes and goes."""
    actions = []
    others = ("sql down", "sql up", "sql lossy")
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            actions += [Action(rng.choice(others)), sleep(rng)]
        actions += node_period(rng, rng.choice(NODES), NODE_FAULTS, others)
    return actions


def _zombie(rng: Random) -> list[Action]:
    """One node at a time comes back with what it held at an earlier moment."""
    actions = []
    faults = ("zombie", "zombie", "cut", "crash", "snapshot")
    for _ in range(rng.randint(1, 3)):
        node = rng.choice(NODES)
        actions += [sleep(rng), Action("snapshot", node)]
        actions += node_period(rng, node, faults)
    return actions


def _memory(rng: Random) -> list[Action]:
    """All nodes lose their memory at once, with SQL up."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.7:
            actions += [sleep(rng), jump(rng)]
        actions += [sleep(rng), Action("lose memory")]
    return actions


def _full(rng: Random) -> list[Action]:
    """Nodes refuse writes, all at once too, with SQL up."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        actions += [sleep(rng), Action("full", rng.choice((*NODES, "all", "all")))]
        if rng.random() < 0.3:
            actions.append(jump(rng))
        actions += [sleep(rng, rng.choice((5, 40))), Action("heal", "all")]
    actions.append(Action("settle", pinned=True))
    return actions


def _ring(rng: Random) -> list[Action]:
    """The configuration changes by one node, worker by worker."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        actions.append(Action("add or remove", rng.choice((*NODES, "d", "d", "d"))))
        for worker in rng.sample(range(WORKERS), WORKERS):
            actions += [
                sleep(rng),
                Action("roll", worker=worker, pinned=True),
            ]
            if rng.random() < 0.2:
                actions.append(jump(rng))
        actions.append(Action("settle", pinned=True))
    return actions


def _reaper(rng: Random) -> list[Action]:
    """Sessions expire while reapers run and a node may fail."""
    actions = []
    for _ in range(rng.randint(1, 4)):
        days = rng.choice((1, 2, 3, 4, 5, 20, 21))
        jump = days * DAY + rng.choice((-2, 0, 1, 2)) * HOUR
        if rng.random() < 0.3:
            # Uses that SQL does not hear of.
            actions += [sleep(rng, 30), Action("sql down")]
            actions += [sleep(rng, 10), Action("jump", amount=3 * DAY)]
            actions += [sleep(rng), Action("sql up", pinned=True)]
        actions += [sleep(rng, 30), Action("jump", amount=jump)]
        for _ in range(rng.randint(1, 2)):
            actions.append(Action("reap", worker=rng.randrange(WORKERS)))
        if rng.random() < 0.4:
            node = rng.choice(NODES)
            actions += node_period(rng, node, ("crash", "restart", "cut", "evict"))
    return actions


def _stand_in(rng: Random) -> list[Action]:
    """One of the homes a and b fails for long, while anything befalls c."""
    actions = []
    for _ in range(rng.randint(1, 2)):
        home = rng.choice(("a", "b"))
        fault = Action(
            rng.choice(("crash", "crash", "hang", "cut")), home, rng.randrange(WORKERS)
        )
        actions += [sleep(rng), fault]
        for _ in range(rng.randint(2, 8)):
            actions.append(sleep(rng, 60))
            chance = rng.random()
            if chance < 0.5:
                what = rng.choice((*NODE_FAULTS, "snapshot", "zombie", "heal"))
                actions.append(Action(what, "c", rng.randrange(WORKERS)))
            elif chance < 0.8:
                what = rng.choice(NODE_FAULTS)
                actions.append(Action(what, home, rng.randrange(WORKERS)))
            else:
                actions.append(jump(rng))
        actions += [sleep(rng), Action("settle", home, pinned=True)]
    return actions


def _stand_in_and_full(rng: Random) -> list[Action]:
    """One of the homes is silent, and the other one full, before it is back.

    Nothing is under way when there is room again: what was slow might put back what SQL
    held before.
    """
    actions = []
    for _ in range(rng.randint(1, 2)):
        silent, full = rng.sample(("a", "b"), 2)
        what, worker = rng.choice(("hang", "cut", "cut")), rng.randrange(WORKERS)
        actions += [sleep(rng), Action(what, silent, worker)]
        actions += [sleep(rng, 80), Action("full", full)]
        actions += [sleep(rng, 60), Action("heal", silent)]
        actions += [sleep(rng, 60), Action("heal quietly", full), sleep(rng)]
        actions.append(Action("settle", silent, pinned=True))
    return actions


def _split(rng: Random) -> list[Action]:
    """Every worker is cut off from one node at most, not all from the same."""
    actions = []
    for _ in range(rng.randint(2, 6)):
        actions += [Action("split"), sleep(rng, 60)]
        if rng.random() < 0.3:
            actions.append(jump(rng))
    return [*actions, Action("settle", pinned=True)]


def _long(rng: Random) -> list[Action]:
    """Lifetimes whose end memcached is told as a date; reapers run daily."""
    actions = []
    for _ in range(rng.randint(1, 4)):
        days = rng.choice((1, 5, 27, 29, 31, 31, 33, 45, 59, 61))
        actions += [sleep(rng, 30), Action("days", amount=days, pinned=True)]
        if rng.random() < 0.4:
            node = rng.choice(NODES)
            actions += node_period(rng, node, ("crash", "restart", "cut", "evict"))
    return actions


def _rolled(rng: Random, faults: float, nodes: Sequence[str] = NODES) -> list[Action]:
    """A new configuration reaches worker by worker, while one node may fail.

    :param faults: chance that one does, before each worker's turn.
    :param nodes: those that may.
    """
    actions = []
    for worker in rng.sample(range(WORKERS), WORKERS):
        roll = Action("roll", worker=worker, pinned=True)
        if rng.random() < faults:
            period = node_period(rng, rng.choice(nodes), NODE_FAULTS)
            # Somewhere in it: before, while or after the node fails.
            period.insert(rng.randrange(len(period)), roll)
            actions += period
        else:
            actions += [sleep(rng), roll]
        if rng.random() < 0.2:
            actions.append(jump(rng))
    return actions


def _rotation(rng: Random) -> list[Action]:
    """The secret key is rotated, worker by worker, while one node may fail.

    All know the new key before any of them seals with it.
    """
    actions = []
    for _ in range(rng.randint(1, 2)):
        actions += [sleep(rng), Action("announce", pinned=True)]
        actions += _rolled(rng, 0.3)
        actions += [Action("settle", pinned=True), Action("rotate", pinned=True)]
        actions += _rolled(rng, 0.5)
        actions += [sleep(rng), Action("settle", pinned=True)]
        if rng.random() < 0.6:
            # The old key goes once every session was written under the new one.
            actions += [sleep(rng), Action("renew", pinned=True)]
            actions.append(Action("drop", pinned=True))
            actions += _rolled(rng, 0.5)
            actions.append(Action("settle", pinned=True))
    return actions


def _ring_and_node(rng: Random) -> list[Action]:
    """The configuration changes by one node, and one node fails meanwhile."""
    actions = []
    for _ in range(rng.randint(1, 2)):
        changed = rng.choice((*NODES, "d", "d", "d"))
        actions.append(Action("add or remove", changed, pinned=True))
        # The one that comes or goes is nobody's only home: nothing is risked.
        nodes = (changed,) if rng.random() < 0.5 else (*NODES, "d")
        actions += _rolled(rng, 0.6, nodes)
        actions.append(Action("settle", pinned=True))
    return actions


def _pass(rng: Random) -> Action:
    """Seconds go by."""
    return Action("pass", amount=rng.choice((1, 2, 4, 9, 11)))


def _cuts(rng: Random, others: tuple[str, ...] = ()) -> list[Action]:
    """Each worker misses one node, and not all the same one.

    :param others: what else may happen to a node.
    """
    nodes = rng.sample(PAIR, 2)
    cut = [nodes[0], nodes[1], rng.choice(nodes)]
    rng.shuffle(cut)
    actions = [sleep(rng, 20)]
    for worker in rng.sample(range(WORKERS), WORKERS):
        actions.append(Action("cut", cut[worker], worker=worker))
    for _ in range(rng.randint(2, 6)):
        actions.append(sleep(rng))
        if others and rng.random() < 0.6:
            actions.append(Action(rng.choice(others), rng.choice(nodes)))
        elif rng.random() < 0.3:
            worker = rng.randrange(WORKERS)
            actions.append(Action("cut", cut[worker], worker=worker))
    actions.append(Action("settle", pinned=True))
    return actions


def _trust(rng: Random) -> list[Action]:
    """Of two nodes one fails, or workers miss different ones."""
    if rng.random() < 0.3:
        return _with_passes(rng, _one_node_and_sql(rng))
    return _with_passes(rng, _cuts(rng))


def _trust_and_two(rng: Random) -> list[Action]:
    """Of two nodes both fail in one way or another.

    With a sync interval of 0 SQL has all that is acknowledged, and is asked: one node
    is down for all, or each worker misses one.
    """
    if rng.random() < 0.4:
        return _with_passes(rng, _cuts(rng, ("evict", "restart")))
    first, second = rng.sample(PAIR, 2)
    actions = [sleep(rng, 20), Action("snapshot", second), sleep(rng, 20)]
    actions += [Action("crash", first, pinned=True), sleep(rng)]
    faults = ("cut", "hang", "lossy", "full", "evict", "zombie", "snapshot")
    for _ in range(rng.randint(0, 2)):
        actions += [Action("lossy", second), sleep(rng, 60)]
    actions += node_period(rng, second, faults)
    return _with_passes(rng, actions)


def _with_passes(rng: Random, actions: list[Action]) -> list[Action]:
    passed = []
    for action in actions:
        passed.append(action)
        if rng.random() < 0.2:
            passed.append(_pass(rng))
    return passed


def _with_trust(plan: Plan, rng: Random) -> Plan:
    # Nobody needs this number any more, but the next ones have to stay as they are.
    rng.choice((1, 3, 10))
    return replace(plan, nodes=PAIR)


def _with_trust_and_sql(plan: Plan, rng: Random) -> Plan:
    timing = replace(plan.timing, sync_ms=0)
    # What visitors never came back to has no row, and may be lost with its copies.
    # One worker has most of the requests.
    requests = tuple(
        replace(
            one,
            what=rng.choice(("logout", "read", "read", one.what, one.what, one.what)),
            worker=rng.choice((0, 0, 0, one.worker)),
        )
        for one in plan.requests
        if one.what != "create"
    )
    slots = (True,) * len(plan.slots)
    plan = replace(plan, timing=timing, requests=requests, slots=slots)
    return _with_trust(plan, rng)


def _with_long_life(plan: Plan, rng: Random) -> Plan:
    absolute_ms = rng.choice((None, None, 120 * DAY))
    timing = replace(plan.timing, lifetime_ms=60 * DAY, absolute_ms=absolute_ms)
    return replace(plan, timing=timing)


CLASSES: dict[str, Callable[[Random], list[Action]]] = {
    "none": _nothing,
    "node": _one_node,
    "node+sql": _one_node_and_sql,
    "zombie": _zombie,
    "memory": _memory,
    "full": _full,
    "ring": _ring,
    "reaper": _reaper,
    "stand-in": _stand_in,
    "stand-in+full": _stand_in_and_full,
    "split": _split,
    "long": _long,
    "rotation": _rotation,
    "ring+node": _ring_and_node,
    "trust": _trust,
    "trust+two": _trust_and_two,
    **more.MORE,
}

#: Those in which promises are broken, as docs/guarantees.rst says.
EDGES = more.EDGES

#: What else is special about a class.
_ADJUSTED: dict[str, Callable[[Plan, Random], Plan]] = {
    "long": _with_long_life,
    "trust": _with_trust,
    "trust+two": _with_trust_and_sql,
    **more.ADJUSTED,
}

#: Classes in which every session lives on a and b, and c is nobody's home.
ON_TWO = ("stand-in", "stand-in+full", "split", *more.ON_TWO)


# --- shrinking -------------------------------------------------------------------


def smaller(plan: Plan) -> list[Plan]:
    """Plans with one thing less, the largest cuts first."""
    plans = [replace(plan, actions=())] if plan.actions else []
    for name in ("requests", "actions"):
        items = getattr(plan, name)
        size = len(items)
        while size:
            for start in range(0, len(items), size):
                left = tuple(
                    item
                    for index, item in enumerate(items)
                    if not start <= index < start + size or getattr(item, "pinned", 0)
                )
                if len(left) < len(items):
                    plans.append(replace(plan, **{name: left}))
            size //= 2
    if len(plan.slots) > 1:
        plans.append(replace(plan, slots=plan.slots[:1]))
    if any(plan.skews):
        plans.append(replace(plan, skews=(0,) * len(plan.skews)))
    return plans
