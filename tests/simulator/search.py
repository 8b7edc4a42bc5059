"""Run seeds, and make what fails small."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from .history import Violation
from .plan import Plan, make_plan, smaller
from .scenario import Run

#: Orders that are tried for each smaller plan.
_ORDERS = 12


def run_plan(plan: Plan, *, traced: bool = False) -> tuple[Violation | None, Run]:
    """Carry out a plan; what it broke, if anything."""
    run = Run(plan, traced=traced)
    try:
        run.go()
    except Violation as violation:
        return violation, run
    return None, run


def run_seed(kind: str, seed: int) -> tuple[Violation | None, Counter[str]]:
    """One schedule of a class."""
    violation, run = run_plan(make_plan(kind, seed))
    return violation, run.counts


def shrink(plan: Plan, rule: str) -> Plan:
    """The smallest plan found that still breaks the same rule."""
    while True:
        for candidate in smaller(plan):
            found = _failing(candidate, rule)
            if found is not None:
                plan = found
                break
        else:
            return plan


def _failing(plan: Plan, rule: str) -> Plan | None:
    for shift in range(_ORDERS):
        candidate = replace(plan, order=plan.order + shift)
        violation, _ = run_plan(candidate)
        if violation is not None and violation.rule == rule:
            return candidate
    return None


def explain(kind: str, seed: int) -> str:
    """What a failing seed broke, by the shortest trace found."""
    plan = make_plan(kind, seed)
    violation, _ = run_plan(plan)
    assert violation is not None
    plan = shrink(plan, violation.rule)
    shrunk, run = run_plan(plan, traced=True)
    assert run.world.trace is not None
    states = [f"{name}: {server.state()}" for name, server in run.servers.items()]
    lines = [
        f"class {kind}, seed {seed}: {violation}",
        f"shrunk to {len(plan.requests)} requests, {len(plan.actions)} actions:"
        f" {shrunk}",
        f"timing {plan.timing}",
        f"skews {plan.skews}",
        *run.world.trace,
        f"nodes: {'; '.join(states)}; SQL: {run.database.state()}",
    ]
    return "\n".join(lines)
