"""The replication protocol against thousands of seeded schedules with faults.

A failing seed is explained by its shortest trace:
``python -m tests.simulator --class KIND --seed SEED --schedules 1``.
"""

from __future__ import annotations

import pytest

from simulator.mutations import MUTATIONS, Mutation
from simulator.plan import CLASSES, EDGES, make_plan
from simulator.search import explain, run_plan, run_seed

pytestmark = pytest.mark.long

#: Schedules of each class, in parts: 26 * 2 * 100 are 5200. ``make full`` runs 52000.
PARTS = 2
SCHEDULES = 100

#: Schedules in which a rule that is switched off has to be noticed.
NOTICED_WITHIN = 3000


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", CLASSES)
def test_no_schedule_breaks_a_guarantee(kind: str, part: int) -> None:
    """Whatever the order and the faults of its class: no guarantee is broken."""
    for seed in range(part * SCHEDULES, (part + 1) * SCHEDULES):
        violation, _ = run_seed(kind, seed)
        if violation is not None:
            pytest.fail(explain(kind, seed), pytrace=False)


#: Schedules that found a hole, each of which is mended.
FOUND = [
    ("ring", 8000160),  # a tombstone was put unseen on what others took for a home
    ("zones", 481),  # the same, with zones
    ("late", 149),  # an old copy brought a deleted key back under a new id
    ("silent", 22),  # a visitor's pair never asked SQL, however long it had rested
    ("edge", 166),  # a node was told to forget a copy after 30 days
    ("forget", 20),  # a moment of an empty database became a logout for good
    ("stall", 453),  # a move that was slow dropped what others had changed
]


@pytest.mark.parametrize(("kind", "seed"), FOUND)
def test_a_schedule_that_found_a_hole(kind: str, seed: int) -> None:
    """What was broken once stays mended."""
    violation, _ = run_seed(kind, seed)
    if violation is not None:
        pytest.fail(explain(kind, seed), pytrace=False)


@pytest.mark.parametrize("kind", EDGES)
def test_a_limit_that_is_documented_is_seen(kind: str) -> None:
    """Where a promise is known to be broken, the checkers see it."""
    assert any(run_seed(kind, seed)[0] is not None for seed in range(SCHEDULES))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_rule_switched_off_is_noticed(
    mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rule of the protocol is there for a reason that some schedule shows."""
    mutation.apply(monkeypatch.setattr)
    for seed in range(mutation.first, mutation.first + NOTICED_WITHIN):
        violation, _ = run_seed(mutation.kind, seed)
        if violation is not None:
            return
    pytest.fail(f"{mutation.name} went unnoticed in {NOTICED_WITHIN} schedules")


def test_a_seed_replays_exactly() -> None:
    """The same seed gives the same schedule, step by step."""
    plan = make_plan("node+sql", 1)
    traces = [run_plan(plan, traced=True)[1].world.trace for _ in range(2)]
    assert traces[0]
    assert traces[0] == traces[1]


def test_an_explanation_ends_with_what_was_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failing seed is shrunk and told with its operations, faults and states."""
    mutation = next(one for one in MUTATIONS if one.name == "blind_set")
    mutation.apply(monkeypatch.setattr)
    seed = next(seed for seed in range(100) if run_seed("none", seed)[0] is not None)
    text = explain("none", seed)
    assert f"class none, seed {seed}: G" in text
    assert "shrunk to" in text
    assert "SQL: ok" in text
