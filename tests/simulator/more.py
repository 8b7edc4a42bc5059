"""Classes of schedules about time, SQL, settings and placement; and what befalls all.

What is drawn here comes from dice of its own, so that the plans of ``plan`` stay what
they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from .plan import Plan

#: Waits in the middle of requests, in milliseconds, that no rule has to know of.
_SHORT = (100, 600, 2_000, 8_000)

#: Those of a view that hangs, or of a machine that was paused.
_LONG = (30_000, 5 * MINUTE, HOUR, 7 * HOUR)

#: Zones and weights of the nodes, by name; others are alone in their zone, of weight 1.
LAYOUTS: tuple[dict[str, tuple[str, float]], ...] = (
    {},
    {"a": ("east", 1.0), "b": ("east", 1.0), "c": ("west", 1.0), "d": ("west", 1.0)},
    {"a": ("east", 1.0), "b": ("east", 3.0), "c": ("east", 0.5), "d": ("west", 1.0)},
    {"a": ("a", 0.1), "b": ("b", 5.0), "c": ("c", 1.0), "d": ("d", 2.0)},
)


def befall(plan: Plan) -> Plan:
    """The plan with what may befall any of its class: processes die, time passes."""
    rng = Random(f"{plan.kind}/{plan.seed}/more")
    actions = list(plan.actions)
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 2)):
            _insert(rng, actions, Action("die", worker=rng.randrange(WORKERS)))
    if plan.kind not in ("none", "one") and rng.random() < 0.3:
        for _ in range(rng.randint(1, 2)):
            wait = Action("time passes", amount=rng.choice(_SHORT))
            _insert(rng, actions, wait)
    return replace(plan, actions=tuple(actions))


def _insert(rng: Random, actions: list[Action], action: Action) -> None:
    place = rng.randint(0, len(actions))
    actions[place:place] = [sleep(rng, 20), action]


# --- time ------------------------------------------------------------------------


def _stall(rng: Random) -> list[Action]:
    """Requests take minutes or hours, and packets as long, while one node fails."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        for _ in range(rng.randint(1, 3)):
            wait = rng.choice((*_SHORT, *_LONG))
            actions += [sleep(rng, 30), Action("time passes", amount=wait)]
        if rng.random() < 0.6:
            faults = ("lossy", "lossy", "cut", "restart", "evict")
            period = node_period(rng, rng.choice(NODES), faults)
            wait = Action("time passes", amount=rng.choice(_LONG))
            period.insert(rng.randrange(len(period)), wait)
            actions += period
    return actions


def _clock(rng: Random) -> list[Action]:
    """Workers' clocks step, forwards and backwards, while one node may fail."""
    actions = []
    for _ in range(rng.randint(1, 4)):
        amount = rng.choice((-1, 1)) * rng.choice(
            (2_000, 30_000, 10 * MINUTE, 3 * HOUR)
        )
        worker = rng.randrange(WORKERS)
        actions += [sleep(rng), Action("step", worker=worker, amount=amount)]
        if rng.random() < 0.3:
            actions.append(jump(rng))
        if rng.random() < 0.3:
            actions += node_period(rng, rng.choice(NODES), NODE_FAULTS)
    return actions


def _edge(rng: Random) -> list[Action]:
    """Sessions rest until a second before, or after, something is over or due."""
    actions = []
    for _ in range(rng.randint(2, 6)):
        actions.append(sleep(rng, 30))
        what = rng.choice(("rest", "rest", "due", "due", "reap", "node"))
        if what == "reap":
            actions.append(Action("reap", worker=rng.randrange(WORKERS)))
        elif what == "node":
            node = rng.choice(NODES)
            actions += node_period(rng, node, ("crash", "restart", "cut", "evict"))
        else:
            around = rng.choice((-1000, -1000, 1000, 5_000))
            actions.append(Action(what, amount=around))
    return actions


# --- SQL -------------------------------------------------------------------------


def _forget(rng: Random) -> list[Action]:
    """SQL has forgotten rows for a while, and one node may fail before and after."""
    actions = []
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.4:
            actions += node_period(rng, rng.choice(NODES), NODE_FAULTS)
        actions += [sleep(rng), Action("sql forget", pinned=True)]
        for _ in range(rng.randint(0, 2)):
            actions += [sleep(rng), jump(rng)]
        actions += [sleep(rng), Action("sql remember", pinned=True), sleep(rng)]
        actions.append(Action("settle", pinned=True))
    return actions


def _busy(rng: Random) -> list[Action]:
    """Workers have no connection to spare for a while, and one node may fail."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        actions += [sleep(rng, 20), Action("sql busy"), sleep(rng)]
        if rng.random() < 0.7:
            actions += node_period(rng, rng.choice(NODES), NODE_FAULTS, ("sql busy",))
        else:
            actions += [jump(rng), sleep(rng), Action("sql up")]
    return actions


def _behind(rng: Random) -> list[Action]:
    """SQL is read from a standby that is behind, and one node fails."""
    actions = []
    for _ in range(rng.randint(1, 2)):
        actions += [sleep(rng, 20), Action("sql behind")]
        actions += node_period(rng, rng.choice(NODES), ("restart", "crash", "evict"))
    return actions


# --- placement and settings ------------------------------------------------------


def _one(rng: Random) -> list[Action]:
    """There is one node, and it fails."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        actions += node_period(rng, "a", NODE_FAULTS)
    return actions


def _settings(rng: Random) -> list[Action]:
    """Workers differ in their intervals or their nodes, while one node may fail."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        actions += [sleep(rng), Action("due", amount=rng.choice((-1000, 1000)))]
        if rng.random() < 0.4:
            actions += node_period(rng, rng.choice(NODES), NODE_FAULTS)
    return actions


def _zones(rng: Random) -> list[Action]:
    """Nodes have zones and weights, and come and go, worker by worker."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        changed = rng.choice((*NODES, "d", "d", "d"))
        actions.append(Action("add or remove", changed, pinned=True))
        for worker in rng.sample(range(WORKERS), WORKERS):
            actions += [sleep(rng), Action("roll", worker=worker, pinned=True)]
            if rng.random() < 0.2:
                actions.append(jump(rng))
        actions.append(Action("settle", pinned=True))
    return actions


def _silent(rng: Random) -> list[Action]:
    """Some workers reach neither home, others miss one of them, with SQL up."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        for worker in rng.sample(range(WORKERS), rng.randint(1, WORKERS)):
            missed = PAIR if rng.random() < 0.5 else (rng.choice(PAIR),)
            for node in missed:
                actions.append(Action("cut", node, worker=worker))
            actions.append(sleep(rng, 20))
        for _ in range(rng.randint(0, 2)):
            actions += [sleep(rng, 30), jump(rng)]
        actions += [sleep(rng), Action("settle", pinned=True)]
    return actions


def _late(rng: Random) -> list[Action]:
    """Sessions move while a home comes back, seen by nobody, with what it once held."""
    actions = []
    for _ in range(rng.randint(1, 3)):
        home = rng.choice(PAIR)
        actions += [sleep(rng, 20), Action("snapshot", home), sleep(rng)]
        if rng.random() < 0.5:
            actions += [Action("due", amount=1000), sleep(rng)]
        actions += [Action("cut all", home, pinned=True), Action("zombie", home)]
        actions += [sleep(rng, 30), Action("uncut", home, pinned=True)]
        actions += [sleep(rng, 20), Action("settle", home, pinned=True)]
    return actions


MORE: dict[str, Callable[[Random], list[Action]]] = {
    "stall": _stall,
    "clock": _clock,
    "edge": _edge,
    "forget": _forget,
    "busy": _busy,
    "one": _one,
    "settings": _settings,
    "zones": _zones,
    "silent": _silent,
    "late": _late,
}

#: Classes in which promises are broken, as docs/guarantees.rst says.
EDGES: dict[str, Callable[[Random], list[Action]]] = {
    # What SQL answers is taken for its newest state.
    "behind": _behind,
}


# --- what else is special --------------------------------------------------------


def with_held_packets(plan: Plan, rng: Random) -> Plan:
    """Packets are held back for up to hours."""
    return replace(plan, holds_back=(0, 0, 20_000, 10 * MINUTE, 3 * HOUR))


def with_true_clocks(plan: Plan, rng: Random) -> Plan:
    """All clocks are right at first, so that nothing is excused by them."""
    return replace(plan, skews=(0,) * WORKERS)


def with_one_node(plan: Plan, rng: Random) -> Plan:
    """A single node is configured."""
    return replace(plan, nodes=("a",))


def with_lifetimes(plan: Plan, rng: Random) -> Plan:
    """Lifetimes from seconds to months, and clocks that are right."""
    lifetime = rng.choice((30_000, 30 * MINUTE, 2 * DAY, 60 * DAY))
    timing = plan.timing
    timing = replace(
        timing,
        lifetime_ms=lifetime,
        absolute_ms=rng.choice((None, None, 3 * lifetime)),
        sync_ms=min(timing.sync_ms, max(1, lifetime // 10)),
        reap_grace_ms=MINUTE,
    )
    return replace(plan, timing=timing, skews=(0,) * WORKERS)


def with_settings_apart(plan: Plan, rng: Random) -> Plan:
    """Each worker has intervals of its own, and perhaps a list of nodes."""
    timings = tuple(
        replace(
            plan.timing,
            sync_ms=rng.choice((0, MINUTE, 5 * MINUTE, 20 * MINUTE)),
            sync_writes=rng.choice((None, 1, 3)),
        )
        for _ in range(WORKERS)
    )
    lists: tuple[tuple[str, ...], ...] = ()
    if rng.random() < 0.3:
        # By one node: else some sessions would have no home in common.
        other = rng.choice(((*NODES, "d"), PAIR))
        lists = tuple(rng.choice((NODES, other)) for _ in range(WORKERS))
    return replace(plan, timings=timings, lists=lists, skews=(0,) * WORKERS)


def with_layout(plan: Plan, rng: Random) -> Plan:
    """The nodes have zones and weights."""
    return replace(plan, layout=rng.randrange(1, len(LAYOUTS)))


def with_many_moves(plan: Plan, rng: Random) -> Plan:
    """Every session lives on a and b; many get new ids, and keys are deleted."""
    whats = ("delete", "sync delete", "regenerate", "login", "sync", "shared", "own")
    requests = tuple(
        replace(one, what=rng.choice((one.what, *whats))) for one in plan.requests
    )
    return replace(plan, requests=requests, skews=(0,) * WORKERS)


ADJUSTED: dict[str, Callable[[Plan, Random], Plan]] = {
    "stall": with_held_packets,
    "clock": with_true_clocks,
    "edge": with_lifetimes,
    "one": with_one_node,
    "settings": with_settings_apart,
    "zones": with_layout,
    "late": with_many_moves,
}

#: Those in which every session lives on a and b.
ON_TWO = ("silent", "late")
